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
    """`starvation_iterations`: passed over so often in a row, a request goes first (0: never)."""

    def __init__(
        self, base: str = "vllm", base_args: dict[str, Any] | None = None, starvation_iterations: int = 0
    ) -> None:
        super().__init__(base, base_args)
        self.guard = Guard(starvation_iterations, quantum=1)
        self._base_arrived, self._base_ended = (getattr(self.base, name, None) for name in ("arrived", "ended"))

    def order(self, request: Request) -> tuple[float, ...]:
        promotion = self.guard.promoted.get(request)
        if promotion is not None:
            return 0, promotion
        return 1, predicted_tokens(request), request.arrival_s, request.id

    def arrived(self, request: Request, now_s: float) -> None:
        self.guard.waits(request)
        if self._base_arrived is not None:
            self._base_arrived(request, now_s)

    def ended(self, request: Request, now_s: float) -> None:
        self.guard.forget(request)
        if self._base_ended is not None:
            self._base_ended(request, now_s)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        guard = self.guard
        guard.before(replica)
        hold: bool | None = self.base.schedule(replica, now_s)
        if not guard.threshold:
            return hold
        for request, _, _ in replica.chunks:
            guard.runs(request)
        for request in replica.preempted_now:
            guard.waits(request)
        guard.after(replica)
        lasts = guard.lasts(quanta=False) if hold else 0
        if lasts:
            replica.hold_for(lasts)
        return hold
