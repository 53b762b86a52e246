"""Shortest job first: the waiting request with the shortest (predicted) answer is admitted next; none is preempted.

    key = predicted answer (tokens, or a rank below 1), then arrival

The prediction is the trace's (`--predict`, or a column predicted_tokens); without one the answer's length is known
exactly. Ranks do as well as lengths, since only their order matters (arXiv 2408.15792, section 3). Long requests
starve under load; `starvation_iterations` switches the guard of section 4.3 on (`llmsim.schedulers.starvation`).
With a base that preempts, a preempted request waits in its place by the same key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.schedulers.ordered import Ordered, predicted_tokens
from llmsim.schedulers.starvation import Guard

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class ShortestFirst(Ordered):
    """`starvation_iterations`: passed over so often, a request goes first (0: never), for `quantum_iterations`."""

    preempts = False

    def __init__(
        self,
        base: str = "vllm",
        base_args: dict[str, Any] | None = None,
        starvation_iterations: int = 0,
        quantum_iterations: int = 100,
    ) -> None:
        super().__init__(base, base_args)
        self.guard = Guard(starvation_iterations, quantum_iterations)
        self._arrived, self._ended = getattr(self.base, "arrived", None), getattr(self.base, "ended", None)

    def order(self, request: Request) -> tuple[float, ...]:
        promotion = self.guard.promoted.get(request)
        if promotion is not None:
            return 0, promotion, 0.0, 0
        return 1, self.length(request), request.arrival_s, request.id

    def length(self, request: Request) -> float:
        """What requests are ordered by."""
        return predicted_tokens(request)

    def arrived(self, request: Request, now_s: float) -> None:
        self.guard.waits(request)
        if self._arrived is not None:
            self._arrived(request, now_s)

    def ended(self, request: Request, now_s: float) -> None:
        self.guard.forget(request)
        if self._ended is not None:
            self._ended(request, now_s)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        guard = self.guard
        guard.before(replica)
        if self.preempts:
            self.make_room(replica)
        hold: bool | None = self.base.schedule(replica, now_s)
        guard.after(replica)
        if hold and guard.threshold:
            lasts = guard.lasts(self.preempts)
            if lasts:
                replica.hold_for(lasts)
        return hold

    def make_room(self, replica: Replica) -> None:
        """For orders that preempt."""
