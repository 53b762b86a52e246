"""The starvation guard of arXiv 2408.15792 (section 4.3): who is passed over too often is served first for a while.

    passed over     an iteration of the replica in which a request waits
    threshold       after that many in a row it is promoted: to the front of the queue, behind those promoted before it
    quantum         iterations for which a promoted request runs before it is as any other again (only an order that
                    preempts can tell the difference)

Iterations are counted exactly, through runs of many as well. All requests have the same threshold, so they starve in
the order in which they began to wait: a queue, and no work per waiting request.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class Guard:
    """`threshold` 0: off. The policy calls `before` and `after` around its base's schedule."""

    def __init__(self, threshold: int, quantum: int) -> None:
        for name, value, least in (("starvation_iterations", threshold, 0), ("quantum_iterations", quantum, 1)):
            if value < least:
                raise ValueError(f"{name}={value} is too small: give {least} or more")
        self.threshold, self.quantum = threshold, quantum
        self.iteration = 0  # so far
        self.promoted: dict[Request, int] = {}  # and which promotion this was
        self.promotions = 0
        self._waits: dict[Request, int] = {}  # waiting requests: the iteration in which they began to
        self._starving: deque[tuple[int, Request]] = deque()  # in order of that; stale when it differs from _waits
        self._left: dict[Request, int] = {}  # promoted requests: iterations left of their quantum
        self._running: dict[Request, int] = {}  # of them, the running ones: the iteration in which it is used up
        self._asked_at = -1  # batch iteration at the last answer that scheduled anything

    def waits(self, request: Request) -> None:
        """A request joins the queue."""
        if self.threshold:
            self._waits[request] = self.iteration
            self._starving.append((self.iteration, request))

    def forget(self, request: Request) -> None:
        """A request has ended, or was turned away."""
        for known in (self._waits, self.promoted, self._left, self._running):
            known.pop(request, None)

    def before(self, replica: Replica) -> None:
        """Count the iterations since the last answer, promote who starves, end quanta that are used up."""
        if not self.threshold:
            return
        if self._asked_at >= 0:
            self.iteration += max(1, replica.batch.iteration - self._asked_at)
        starving = self._starving
        while starving and starving[0][0] + self.threshold <= self.iteration:
            since, request = starving.popleft()
            if self._waits.get(request) == since and request not in self.promoted:
                replica.waiting.remove(request)
                self.promotions += 1
                self.promoted[request] = self.promotions
                self._left[request] = self.quantum
                replica.waiting.put_back(request)
        for request in [one for one, end in self._running.items() if end <= self.iteration]:
            del self._running[request], self._left[request], self.promoted[request]

    def after(self, replica: Replica) -> None:
        """Book who was admitted and who was preempted in this iteration."""
        if not self.threshold:
            return
        for request, _, _ in replica.chunks:
            if self._waits.pop(request, None) is not None and request in self.promoted:
                self._running[request] = self.iteration + self._left[request]
        for request in replica.preempted_now:
            if request in self._running:  # what is left of its quantum waits with it
                self._left[request] = self._running.pop(request) - self.iteration
            self.waits(request)
        self._asked_at = replica.batch.iteration if replica.decoding or replica.chunks else -1

    def lasts(self, quanta: bool) -> int:
        """Iterations from this one on in which nobody is promoted (nor, with `quanta`, demoted); 0: for ever."""
        starving, waits = self._starving, self._waits
        while starving and waits.get(starving[0][1]) != starving[0][0]:
            starving.popleft()
        ends = [starving[0][0] + self.threshold] if starving else []
        if quanta and self._waits:
            ends += self._running.values()
        return max(1, min(ends) - self.iteration) if ends else 0
