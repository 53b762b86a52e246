"""Earliest deadline first and least slack, by what each request's class promises.

    deadline of the next token    arrival + TTFT promised + tokens generated * TPOT promised    (s)
    edf                           smallest deadline first
    least_slack                   smallest deadline - now - seconds its prompt needs alone first

A request without a promise of TTFT has no deadline and comes after all that have one, in order of arrival; without one
of TPOT its later tokens have the first one's deadline. Deadlines decide who is admitted; requests that run get a token
in every iteration the base gives them one. While a request waits its deadline stands still, and `now` is the same for
all, so both orders are fixed keys: the queue is sorted once per arrival.

With `shed`, a request that waits for its first token is turned away as soon as it could not make it even if it started
now, alone (`llmsim.schedulers.estimate.prefill_s`): nothing is spent on what is lost. Without, it is served late, and
under overload both orders serve the nearly lost first, each making the next one late (the domino effect of EDF).
`--admission deadline` sheds on arrival instead. The classical orders of real-time scheduling (Liu and Layland 1973 for
EDF); slack is called laxity there.
"""

from __future__ import annotations

from math import inf, isnan
from typing import TYPE_CHECKING, Any

from llmsim.queue import WaitingQueue
from llmsim.schedulers.estimate import prefill_s
from llmsim.schedulers.ordered import Ordered

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


def deadline_s(request: Request) -> float:
    """When its next token is due; inf: never."""
    if isnan(request.slo_ttft_s):
        return inf
    later_s = 0.0 if isnan(request.slo_tpot_s) else request.generated_tokens * request.slo_tpot_s
    return request.arrival_s + request.slo_ttft_s + later_s


class EarliestDeadline(Ordered):
    """`shed`: turn away waiting requests that can no longer make their first deadline."""

    def __init__(self, base: str = "vllm", base_args: dict[str, Any] | None = None, shed: bool = False) -> None:
        super().__init__(base, base_args)
        self.shed = shed
        self._needs_s: dict[Request, float] = {}
        self._ended = getattr(self.base, "ended", None)

    def queue(self, engine: Replica) -> WaitingQueue:
        """The engine's waiting requests, in `order`; this is also how the policy gets to know the engine's costs."""
        self._engine = engine
        return WaitingQueue(self.order)

    def order(self, request: Request) -> tuple[float, ...]:
        return deadline_s(request), request.arrival_s, request.id

    def needs_s(self, request: Request) -> float:
        """Seconds its prompt takes alone; kept, since sorting asks often."""
        seconds = self._needs_s.get(request)
        if seconds is None:
            seconds = self._needs_s[request] = prefill_s(self._engine, request.prompt_tokens)
        return seconds

    def ended(self, request: Request, now_s: float) -> None:
        self._needs_s.pop(request, None)
        if self._ended is not None:
            self._ended(request, now_s)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        if not self.shed:
            answer: bool | None = self.base.schedule(replica, now_s)
            return answer
        waiting = replica.waiting
        while waiting.size and self._latest_start_s(waiting.head) < now_s:
            replica.reject(waiting.head)
        hold: bool | None = self.base.schedule(replica, now_s)
        if hold and waiting.size:
            latest_s = self._latest_start_s(waiting.head)
            if latest_s < inf:
                replica.hold_until(latest_s)
        return hold

    def _latest_start_s(self, request: Request) -> float:
        """When it has to start to make its first deadline; never once it has made a token, or without a deadline."""
        if request.generated_tokens:
            return inf
        return deadline_s(request) - self.needs_s(request)


class LeastSlack(EarliestDeadline):
    """As EarliestDeadline, but by the latest start that makes the deadline."""

    def order(self, request: Request) -> tuple[float, ...]:
        due_s = deadline_s(request)
        return due_s - self.needs_s(request) if due_s < inf else inf, request.arrival_s, request.id
