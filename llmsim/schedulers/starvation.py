"""The starvation guard of arXiv 2408.15792 (section 4.3): who is passed over too often is served first for a while.

    passed over     an iteration of the replica in which a request waits, or is paused
    threshold       after that many in a row it is promoted: before all others, behind those promoted earlier
    quantum         iterations for which a promoted request runs before it is as any other again (only an order that
                    preempts can tell the difference)

Iterations are counted exactly, through runs of many as well. All requests have the same threshold, so they starve in
the order in which they began to wait: a queue, and no work per waiting request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.batch import RunningBatch
    from llmsim.replica import Replica
    from llmsim.request import Request


class Guard:
    """`threshold` 0: off. The policy calls `before` and `after` around its base's schedule, and says who waits."""

    def __init__(self, threshold: int, quantum: int) -> None:
        for name, value, least in (("starvation_iterations", threshold, 0), ("quantum_iterations", quantum, 1)):
            if value < least:
                raise ValueError(f"{name}={value} is too small: give {least} or more")
        self.threshold, self.quantum = threshold, quantum
        self._counted = 0  # iterations up to the last question
        self.promoted: dict[Request, int] = {}  # and which promotion this was
        self.promotions = 0
        self._waits: dict[Request, int] = {}  # requests that do not run: the iteration in which that began
        self._starving: deque[tuple[int, Request]] = deque()  # in order of that; stale when it differs from _waits
        self._left: dict[Request, int] = {}  # promoted requests: iterations left of their quantum
        self._until: dict[Request, int] = {}  # of them, the running ones: the iteration in which it is used up
        self._batch: RunningBatch | None = None  # if the last answer scheduled anything
        self._asked_at = 0  # its iteration then

    @property
    def iteration(self) -> int:
        """Iterations of the replica so far: one without decodes leaves the batch's own count where it is."""
        since = 0 if self._batch is None else max(1, self._batch.iteration - self._asked_at)
        return self._counted + since

    def waits(self, request: Request) -> None:
        """A request joins the queue, or is paused."""
        if not self.threshold:
            return
        if request in self._until:  # what is left of its quantum waits with it
            self._left[request] = self._until.pop(request) - self.iteration
        self._waits[request] = self.iteration
        self._starving.append((self.iteration, request))

    def runs(self, request: Request) -> None:
        """It is admitted, or resumed."""
        if self._waits.pop(request, None) is not None and request in self.promoted:
            self._until[request] = self.iteration + self._left[request]

    def forget(self, request: Request) -> None:
        """It has ended, or was turned away."""
        for known in (self._waits, self.promoted, self._left, self._until):
            known.pop(request, None)

    def before(self, replica: Replica, moved: Callable[[Request], None] | None = None) -> None:
        """Count the iterations since the last answer, promote who starves, end quanta that are used up.

        `moved` is told of running and paused requests that are promoted, or no longer are.
        """
        if not self.threshold:
            return
        now = self._counted = self.iteration
        self._batch = None
        starving = self._starving
        while starving and starving[0][0] + self.threshold <= now:
            since, request = starving.popleft()
            if self._waits.get(request) == since and request not in self.promoted:
                self._promote(replica, request, moved)
        for request in [one for one, end in self._until.items() if end <= now]:
            del self._until[request], self._left[request], self.promoted[request]
            if moved is not None:
                moved(request)

    def _promote(self, replica: Replica, request: Request, moved: Callable[[Request], None] | None) -> None:
        queued = request not in replica.paused
        if queued:
            replica.waiting.remove(request)
        self.promotions += 1
        self.promoted[request] = self.promotions
        self._left[request] = self.quantum
        if queued:
            replica.waiting.put_back(request)
        elif moved is not None:
            moved(request)

    def after(self, replica: Replica) -> None:
        """The iteration is decided."""
        if replica.decoding or replica.chunks:
            self._batch, self._asked_at = replica.batch, replica.batch.iteration

    def lasts(self, quanta: bool) -> int:
        """Iterations from this one on in which nobody is promoted (nor, with `quanta`, demoted); 0: for ever."""
        starving, waits = self._starving, self._waits
        while starving and waits.get(starving[0][1]) != starving[0][0]:
            starving.popleft()
        ends = [starving[0][0] + self.threshold] if starving else []
        if quanta and waits:
            ends += self._until.values()
        return max(1, min(ends) - self._counted) if ends else 0
