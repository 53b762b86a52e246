"""A cost model whose terms are off by factors: one draw of what the real machine may turn out to be.

    decode   GPU seconds of iterations without prompts
    chunk    GPU seconds of iterations with prompts
    host     every time of the host (`Host.scaled`)

each times, for GPU seconds, two more (`Ripple`):

    sizes    a fixed random curve over the iteration's tokens: the logarithm is normal at every power of two, and
             between two of them interpolated in log2 of the tokens and scaled to the same deviation
    steps    drawn anew for every iteration, and once for a run of decodes; its mean is 1

With all factors at 1 and no ripple it gives what the cost model before it gives, number for number. What a draw is made
of: `llmsim.uncertainty_draws`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any, NamedTuple

import numpy as np

from llmsim.cost import CostModel, Ramp

OCTAVES = 24  # of tokens in an iteration: to 16 million
TABLE_TOKENS = 16_384  # beyond it the curve is flat
STEPS = 4_099  # draws that steps take in turn


class Factors(NamedTuple):
    decode: float = 1.0
    chunk: float = 1.0
    host: float = 1.0


class Ripple(NamedTuple):
    """Relative standard deviations by iteration, and the seed they are drawn with."""

    decode_sizes: float = 0.0
    chunk_sizes: float = 0.0
    decode_steps: float = 0.0
    chunk_steps: float = 0.0
    seed: int = 0

    @property
    def still(self) -> bool:
        return not any(self[:4])


class ScaledCost:
    """Everything that is not overridden here is the inner model's: kind, label, profile, range, terms."""

    def __init__(self, inner: CostModel, factors: Factors, ripple: Ripple | None = None) -> None:
        for name, factor in factors._asdict().items():
            if not 0.0 < factor < float("inf"):
                raise ValueError(f"factors: {name}={factor} is no factor of a time: give a number above 0, 1 for none")
        self._inner, self.factors, self.ripple = inner, factors, ripple or Ripple()
        self.kind, self.label, self.mode = inner.kind, inner.label, inner.mode
        self.host = inner.host if factors.host == 1.0 else inner.host.scaled(factors.host)
        self.outside_measured = inner.outside_measured
        self._decode_ramp, self._mixed_s = inner.decode_ramp, inner.mixed_s
        # by tokens, and in turn: lists, for an index into an array takes ten times as long
        self._decodes = self._chunks = [1.0] * (TABLE_TOKENS + 1)
        self._decode_steps = self._chunk_steps = [1.0] * STEPS
        if not self.ripple.still:
            self._draw(self.ripple)
        self._decodes = self._decodes if factors.decode == 1.0 else [factors.decode * one for one in self._decodes]
        self._chunks = self._chunks if factors.chunk == 1.0 else [factors.chunk * one for one in self._chunks]
        self._at = 0

    def _draw(self, ripple: Ripple) -> None:
        rng = np.random.default_rng(ripple.seed)
        decodes, chunks = rng.standard_normal((2, OCTAVES + 1))
        self._decodes, self._chunks = _curve(decodes, ripple.decode_sizes), _curve(chunks, ripple.chunk_sizes)
        decode_steps, chunk_steps = rng.standard_normal((2, STEPS))
        self._decode_steps = _around_one(decode_steps, ripple.decode_steps)
        self._chunk_steps = _around_one(chunk_steps, ripple.chunk_steps)

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
        self._at = at = self._at + 1 if self._at < STEPS - 1 else 0
        factor = self._decodes[seqs if seqs < TABLE_TOKENS else TABLE_TOKENS] * self._decode_steps[at]
        return Ramp(factor * first_s, factor * growth_s)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        tokens = seqs
        for new, _ in chunks:
            tokens += new
        self._at = at = self._at + 1 if self._at < STEPS - 1 else 0
        factor = self._chunks[tokens if tokens < TABLE_TOKENS else TABLE_TOKENS] * self._chunk_steps[at]
        return factor * self._mixed_s(chunks, seqs, kv_tokens)


def _curve(normals: Any, deviation: float) -> list[float]:
    """Factors by tokens."""
    octave = np.log2(np.maximum(np.arange(TABLE_TOKENS + 1), 1))
    within = octave - np.floor(octave)
    logs = np.interp(octave, np.arange(len(normals)), normals) / np.sqrt(within**2 + (1.0 - within) ** 2)
    factors: list[float] = np.exp(deviation * logs).tolist()
    return factors


def _around_one(normals: Any, deviation: float) -> list[float]:
    steps: list[float] = (np.exp(deviation * normals) / exp(deviation**2 / 2)).tolist()
    return steps
