"""Which requests a replica takes at all: asked once per request, when it becomes schedulable.

An admission control is a class with one method, `admit(request, replica, now_s) -> bool`. False turns the request away:
its client gets no answer, its times stay nan, and it counts as rejected. What policies see, it sees: `replica.waiting`,
`replica.prefilling`, `replica.batch`, `replica.kv`, `replica.limits`, `replica.cost`.

    none                               every request
    queue-depth, max_waiting=N         unless N requests wait already
    deadline, headroom=H               unless its first token would surely be late: it arrives with TTFT promised by its
                                       class, and (1 + H) * (prompt tokens ahead of it and its own / speed) exceeds what
                                       is left of that. Speed: that of a full prefill iteration beside the requests that
                                       decode now (`llmsim.schedulers.estimate`).

The deadline control takes the queue as first come, first served and KV blocks as free, so it errs on the side of
admitting; H > 0 sheds earlier. Requests without a promise are always admitted. Behind these stands no single paper;
shedding by predicted lateness is what SLO-aware servers call early rejection (Mooncake, arXiv 2407.00079, section 7.2).
"""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING, Any, Protocol

from llmsim.plugins import load_plugin
from llmsim.schedulers.estimate import iteration_s

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

BUILTIN = {
    "none": "llmsim.admission:Everyone",
    "deadline": "llmsim.admission:Deadline",
    "queue-depth": "llmsim.admission:QueueDepth",
}


class Admission(Protocol):
    def admit(self, request: Request, replica: Replica, now_s: float) -> bool: ...


class Everyone:
    """Every request."""

    def admit(self, request: Request, replica: Replica, now_s: float) -> bool:
        return True


class QueueDepth:
    """`max_waiting`: requests that may wait; the next one is turned away."""

    def __init__(self, max_waiting: int = 100) -> None:
        if max_waiting < 0:
            raise ValueError(f"admission queue-depth: max_waiting={max_waiting} is negative: give 0 or more")
        self.max_waiting = max_waiting

    def admit(self, request: Request, replica: Replica, now_s: float) -> bool:
        return replica.waiting.size < self.max_waiting


class Deadline:
    """`headroom`: how much longer than estimated the wait is taken to be, 0.2 for a fifth."""

    def __init__(self, headroom: float = 0.0) -> None:
        if not headroom >= 0.0:
            raise ValueError(f"admission deadline: headroom={headroom} is negative: give 0 or more")
        self.headroom = headroom

    def admit(self, request: Request, replica: Replica, now_s: float) -> bool:
        promised_s = request.slo_ttft_s
        if isnan(promised_s):
            return True
        return now_s + (1.0 + self.headroom) * self.first_token_s(request, replica) <= request.arrival_s + promised_s

    @staticmethod
    def first_token_s(request: Request, replica: Replica) -> float:
        """Seconds from now to its first token if all prompts ahead are computed first, at full speed."""
        ahead = replica.waiting.prefill_tokens
        ahead += sum(one.prefill_tokens - one.computed_tokens for one in replica.prefilling)
        tokens = ahead + request.prompt_tokens
        seqs, kv_tokens = replica.batch.size, replica.batch.kv_tokens
        budget = max(1, replica.limits.max_num_batched_tokens - seqs)
        whole, rest = divmod(tokens, budget)
        seconds = whole * iteration_s(replica, [(budget, 0)], seqs, kv_tokens) if whole else 0.0
        return seconds + (iteration_s(replica, [(rest, 0)], seqs, kv_tokens) if rest else 0.0)


def load_admission(spec: str, arguments: dict[str, Any] | None = None) -> Any:
    """An admission control by name, or from the user's own file."""
    return load_plugin(
        spec,
        arguments,
        kind="admission",
        builtin=BUILTIN,
        method="admit",
        signature="admit(self, request, replica, now_s)",
    )
