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

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import CostModel, Ramp

OCTAVES = 24  # of tokens in an iteration: to 16 million
TABLE_TOKENS = 16_384  # beyond it the curve is flat
STEPS = 4_099  # draws that steps take in turn


Chunks = Sequence[tuple[int, int]]
Floats = NDArray[np.float64]
Table = tuple[list[float], list[float]]


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


class ScaledCost:
    """Everything that is not overridden here is the inner model's: kind, label, profile, range, terms."""

    decode_ramp: Callable[[int, float], Ramp]
    mixed_s: Callable[..., float]  # chunks, seqs, kv_tokens, and the longest context if it `reads_longest`

    def __init__(self, inner: CostModel, factors: Factors, ripple: Ripple | None = None) -> None:
        for name, factor in factors._asdict().items():
            if not 0.0 < factor < float("inf"):
                raise ValueError(f"factors: {name}={factor} is no factor of a time: give a number above 0, 1 for none")
        self._inner, self.factors, self.ripple = inner, factors, ripple or Ripple()
        self.kind, self.label, self.mode = inner.kind, inner.label, inner.mode
        self.host = inner.host if factors.host == 1.0 else inner.host.scaled(factors.host)
        self.outside_measured = inner.outside_measured
        self._tables = _tables(factors, self.ripple)
        self._begin()

    def _begin(self) -> None:
        decodes, chunks = self._tables
        self.decode_ramp = self._inner.decode_ramp if decodes is None else _decode_ramp(self._inner, *decodes)
        self.mixed_s = self._inner.mixed_s if chunks is None else _mixed_s(self._inner, *chunks)

    def restarted(self) -> ScaledCost:
        """The same with its steps from the first one on: a replay gives the same whatever was replayed before it."""
        other = object.__new__(ScaledCost)
        other.__dict__.update(self.__dict__)
        other._begin()
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """The functions made here cannot be pickled, what they are made of can."""
        return ScaledCost, (self._inner, self.factors, self.ripple)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def drafts(self) -> int | None:
        """Of a speculating engine's cost model, which its replica writes to."""
        drafts: int | None = self._inner.drafts  # type: ignore[attr-defined]  # only such a replica asks
        return drafts

    @drafts.setter
    def drafts(self, drafts: int | None) -> None:
        self._inner.drafts = drafts  # type: ignore[attr-defined]  # as above


# Asked for every iteration: a replay of a draw takes 7 % longer than a plain one (Azure conversation trace).


def _decode_ramp(inner: CostModel, sizes: list[float], steps: list[float]) -> Callable[[int, float], Ramp]:
    decode_ramp, step, new = inner.decode_ramp, cycle(steps).__next__, tuple.__new__

    def scaled(seqs: int, kv_tokens: float) -> Ramp:
        first_s, growth_s = decode_ramp(seqs, kv_tokens)
        factor = sizes[seqs if seqs < TABLE_TOKENS else TABLE_TOKENS] * step()
        return new(Ramp, (factor * first_s, factor * growth_s))

    return scaled


def _mixed_s(inner: CostModel, sizes: list[float], steps: list[float]) -> Callable[..., float]:
    mixed_s, step = inner.mixed_s, cycle(steps).__next__

    def scaled(chunks: Chunks, seqs: int, kv_tokens: float, *longest: float) -> float:
        tokens = seqs
        for new, _ in chunks:
            tokens += new
        factor = sizes[tokens if tokens < TABLE_TOKENS else TABLE_TOKENS] * step()
        return factor * mixed_s(chunks, seqs, kv_tokens, *longest)

    return scaled


def _tables(factors: Factors, ripple: Ripple) -> tuple[Table | None, Table | None]:
    """Of decodes and of chunks; None: as it is."""
    rng = np.random.default_rng(ripple.seed)
    (decode_sizes, chunk_sizes), steps = rng.standard_normal((2, OCTAVES + 1)), rng.standard_normal((2, STEPS))
    return (
        _table(factors.decode, decode_sizes, ripple.decode_sizes, steps[0], ripple.decode_steps),
        _table(factors.chunk, chunk_sizes, ripple.chunk_sizes, steps[1], ripple.chunk_steps),
    )


def _table(factor: float, sizes: Floats, sizes_sd: float, steps: Floats, steps_sd: float) -> Table | None:
    """Factors by tokens, and of steps in turn around a mean of 1."""
    if factor == 1.0 and sizes_sd == steps_sd == 0.0:
        return None
    octave = np.log2(np.maximum(np.arange(TABLE_TOKENS + 1), 1))
    within = octave - np.floor(octave)
    logs = np.interp(octave, np.arange(len(sizes)), sizes) / np.sqrt(within**2 + (1.0 - within) ** 2)
    by_tokens = factor * np.exp(sizes_sd * logs)
    return by_tokens.tolist(), np.exp(steps_sd * steps - steps_sd**2 / 2).tolist()
