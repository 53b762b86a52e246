"""SLO-aware chunks: the largest prefill chunk that keeps the decodes beside it within their TPOT.

    chunk = max n with period(n prompt tokens, decodes now) <= target
            in steps of step_tokens, and at least min_chunk_tokens
    target = tpot_ms if given, else the smallest TPOT promised to a request that decodes now

The period is that of both clocks (`llmsim.schedulers.estimate`): with a slow host an iteration with prompts may not
fit at any size. Then, and when the decodes alone exceed the target, prompts go on by min_chunk_tokens an iteration, so
that they end at all. Without decodes, or without a target, nothing is limited. The base's token budget is the only
thing changed, so any base will do, orders included (base=sjf). Sarathi-Serve (OSDI'24, section 4.3) chooses one budget
per deployment from the same trade-off; this chooses it anew for every iteration.

The prompts of an iteration are taken as one chunk after what the first of them has computed, which leaves out the cost
of starting several; launch noise is left out too. Both lengthen some iterations a little beyond the target.
"""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from llmsim.schedulers import load_scheduler
from llmsim.schedulers.estimate import iteration_s

if TYPE_CHECKING:
    from llmsim.replica import Replica


class SloChunk:
    """`tpot_ms` 0: what the requests' classes promise."""

    def __init__(
        self,
        base: str = "vllm",
        base_args: dict[str, Any] | None = None,
        tpot_ms: float = 0.0,
        min_chunk_tokens: int = 64,
        step_tokens: int = 64,
    ) -> None:
        if not (isfinite(tpot_ms) and tpot_ms >= 0.0):
            raise ValueError(
                f"SloChunk: tpot_ms={tpot_ms} is no time: give milliseconds, or 0 for those of the classes"
            )
        for name, tokens in (("min_chunk_tokens", min_chunk_tokens), ("step_tokens", step_tokens)):
            if tokens < 1:
                raise ValueError(f"SloChunk: {name}={tokens} is too small: give 1 or more")
        if base_args is not None and not isinstance(base_args, dict):
            raise ValueError(f'SloChunk: base_args={base_args!r} is no table: give JSON such as {{"headroom": 0.02}}')
        self.base = load_scheduler(base, base_args)
        self.tpot_s, self.least, self.grain = tpot_ms / 1e3, min_chunk_tokens, step_tokens

    def __getattr__(self, name: str) -> Any:
        """Order, victim and hooks are the base's."""
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        limits, seqs = replica.limits, replica.batch.size
        pending = replica.waiting.prefill_tokens
        pending += sum(one.prefill_tokens - one.computed_tokens for one in replica.prefilling)
        if seqs and pending:
            most = min(pending, limits.max_num_batched_tokens - seqs)
            chunk = self.chunk_tokens(replica, most)
            if chunk < most:
                replica.limits = limits._replace(max_num_batched_tokens=seqs + chunk)
        try:
            answer: bool | None = self.base.schedule(replica, now_s)
        finally:
            replica.limits = limits
        return answer

    def chunk_tokens(self, replica: Replica, most: int) -> int:
        """The largest chunk, at most `most` tokens, beside the requests that decode now."""
        target_s = self.target_s(replica)
        if target_s == inf or self._fits(replica, most, target_s):
            return most
        low, high = 0, -(-most // self.grain)  # in grains: low fits (or is none), high does not
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(replica, middle * self.grain, target_s):
                low = middle
            else:
                high = middle
        return min(most, max(low * self.grain, self.least))

    def target_s(self, replica: Replica) -> float:
        """The TPOT to keep; inf: none."""
        if self.tpot_s:
            return self.tpot_s
        promised = [one.slo_tpot_s for one in replica.batch]
        return min((seconds for seconds in promised if seconds == seconds), default=inf)

    @staticmethod
    def _fits(replica: Replica, tokens: int, target_s: float) -> bool:
        computed = next((one.computed_tokens for one in replica.prefilling), 0)
        batch = replica.batch
        return iteration_s(replica, [(tokens, computed)], batch.size, batch.kv_tokens) <= target_s
