"""A cost model whose terms are off by factors: one draw of what the real machine may turn out to be.

    decode   GPU seconds of iterations without prompts
    chunk    GPU seconds of iterations with prompts
    host     every time of the host (`Host.scaled`)

With all three at 1 it gives what the cost model before it gives, number for number. What a draw is made of:
`llmsim.uncertainty`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llmsim.cost import CostModel, Ramp


class Factors(NamedTuple):
    decode: float = 1.0
    chunk: float = 1.0
    host: float = 1.0


class ScaledCost:
    """Everything that is not overridden here is the inner model's: kind, label, profile, range, terms."""

    def __init__(self, inner: CostModel, factors: Factors) -> None:
        for name, factor in factors._asdict().items():
            if not 0.0 < factor < float("inf"):
                raise ValueError(f"factors: {name}={factor} is no factor of a time: give a number above 0, 1 for none")
        self._inner, self.factors = inner, factors
        self.kind, self.label, self.mode = inner.kind, inner.label, inner.mode
        self.host = inner.host if factors.host == 1.0 else inner.host.scaled(factors.host)
        self.outside_measured = inner.outside_measured
        self._decode_ramp, self._mixed_s = inner.decode_ramp, inner.mixed_s

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # asked while it is being unpickled: nothing is there yet
            raise AttributeError(name)
        return getattr(self._inner, name)

    @property
    def drafts(self) -> int | None:
        """Of a speculating engine's cost model, which its replica writes to."""
        drafts: int | None = self._inner.drafts  # type: ignore[attr-defined]  # only such a replica asks
        return drafts

    @drafts.setter
    def drafts(self, drafts: int | None) -> None:
        self._inner.drafts = drafts  # type: ignore[attr-defined]  # as above

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        first_s, growth_s = self._decode_ramp(seqs, kv_tokens)
        factor = self.factors[0]
        return Ramp(factor * first_s, factor * growth_s)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        return self.factors[1] * self._mixed_s(chunks, seqs, kv_tokens)
