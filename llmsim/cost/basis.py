"""What a profile's coefficients multiply: the work of one model's iterations, as fit and loop need it.

GPU seconds of an iteration of n rows (tokens, padded in graph modes), s decodes, q requests in all and
chunks (new, done):

    pure decodes    T = L(n) + head(q) + base(s) + b(s) * kv_tokens
    with chunks     B = L(n) + head(q) + base(s) + b_mixed * kv_tokens + call + (cached if any done > 0)
                        + sum over chunks C(new, done)
                    T = B + w * power(s) * min(B, 50 ms)
    C = span * (done + new) + max(a * (done * max(new, least) + new (new + 1) / 2), b_mixed * done)

Where the tiles of the attention kernel are known (llmsim.cost.tiles), all of an iteration's attention is one call of
it, as it schedules chunks and decodes: with chunks

    B = L(n) + head(q) + attention * layers * call(chunks, s, kv_tokens, longest)

attention, a over the kernel's seconds per pair, being what the engine's calls take over those timed alone.

L is given at knots. Two bases say what lies between them and what another model's terms are:

    `ShapeBasis`    no kernels were timed: L includes the head and is linear in `effective_rows`; base, call, span and
                    cached are 0, least 1; other models by data-sheet shapes (llmsim.cost.profile)
    `KernelBasis`   L(n) = r(n) * body(n), body composed from timed kernels (llmsim.cost.kernels), r linear in log n
                    between the knots: what an engine adds to its kernels. Other models: their own body, and what is
                    added as a gap a layer and a ratio (llmsim.cost.profile.by_kernels)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import WARM_S
from llmsim.cost.graphs import LARGEST_CAPTURE
from llmsim.cost.kernels import Forward, effective_rows
from llmsim.cost.tiles import Schedule

Floats = NDArray[np.float64]

# With 8 KV heads, 1 to 4 requests of any context fill the 132 SMs of an H100 or H200 in one wave, and so do 8 and 16;
# other small batches need a second, half-empty one. Timed on an H200 by CUDA events (long_q0.7, contexts of 12,000 to
# 30,000).
UNEVEN = {5: 0.3, 6: 0.25, 7: 0.25, 9: 0.13, 10: 0.13, 11: 0.13, **dict.fromkeys(range(12, 16), 0.08)}  # 8 KV heads
# Uneven contexts leave SMs idle at the end of decode attention. On H200s (Llama-3.1-8B, chat at 8 and 20 requests/s:
# standard deviation 0.8 to 1 of the mean) 32 to 64 requests take 12 % longer than as many even ones, more requests 7 %.
# Where kernels were timed `Forward.decode_skew` says it.
SKEW_SHARE = 0.1
POWER_SEQS = 55  # decodes that pull them half-way down
TABLE_ROWS, TABLE_REQUESTS = 16_384, 1_024  # tables grow beyond where needed
# Knots between these two are of many decodes alone, which take 10 to 20 % more than their kernels; a prompt's rows
# beside few decodes do not: on H200s, of 192 to 448 rows, 1.00 to 1.1 of them, as on a line between the two.
DECODES_ONLY = (64, 512)
REFERENCE_SEQS = 64.0  # requests of the batch whose cost per cached token a clock states


def unevenness(seqs: int, kv_heads: float) -> float:
    """u: share by which decode attention of `seqs` requests with `kv_heads` KV heads on a rank takes longer."""
    return UNEVEN.get(round(seqs * kv_heads / 8), 0.0)


def pairs_of(new: int, done: int) -> float:
    """(query, key) pairs of a chunk."""
    return done * new + 0.5 * new * (new + 1)


def windowed_pairs(new: int, done: int, window: int) -> float:
    """The same when each query sees at most `window` keys, itself included."""
    growing = max(0, min(new, window - done))  # queries that still see their whole context
    return growing * done + growing * (growing + 1) / 2 + (new - growing) * window


def power(seqs: int) -> float:
    """How far `seqs` decodes have pulled the clocks down for a chunk beside them: 0 to 1."""
    return seqs * seqs / (seqs * seqs + POWER_SEQS * POWER_SEQS)


class Basis(Protocol):
    schedule: Schedule | None  # of one layer's attention calls
    mixed_skew: float  # as `skew`, beside chunks
    call_s: float
    span_s: float
    least_rows: float
    cached_s: float

    def position(self, rows: Floats) -> Floats:
        """Where `rows` lie between knots; L over `body_s` is linear in it."""

    def body_s(self, rows: Floats) -> Floats: ...

    def head_s(self, requests: Floats) -> Floats: ...

    def base_s(self, seqs: Floats) -> Floats: ...

    def uneven(self, seqs: Floats) -> Floats:
        """b(s) over the clock's coefficient: 1 for `REFERENCE_SEQS` requests."""

    def skew(self, seqs: Floats) -> Floats:
        """Share of the standard deviation of contexts that every decode reads more, in seconds."""


class ShapeBasis:
    schedule: Schedule | None = None
    mixed_skew = SKEW_SHARE
    call_s = span_s = cached_s = 0.0
    least_rows = 1.0

    def __init__(self, kv_heads: float, last_knot: float = inf) -> None:
        self._kv_heads, self._last_knot = kv_heads, last_knot

    def position(self, rows: Floats) -> Floats:
        return effective_rows(rows)

    def body_s(self, rows: Floats) -> Floats:
        """1, and beyond the last knot in proportion to the rows."""
        return np.maximum(effective_rows(rows) / self._last_knot, 1.0)

    def head_s(self, requests: Floats) -> Floats:
        return np.zeros(len(requests))

    def base_s(self, seqs: Floats) -> Floats:
        return np.zeros(len(seqs))

    def uneven(self, seqs: Floats) -> Floats:
        return np.array([1.0 + unevenness(int(n), self._kv_heads) for n in seqs])

    def skew(self, seqs: Floats) -> Floats:
        return np.full(len(seqs), SKEW_SHARE)


class KernelBasis:
    def __init__(self, forward: Forward, graph_tokens: int = LARGEST_CAPTURE) -> None:
        self.forward, self.mixed_skew = forward, forward.mixed_skew
        form = forward.chunk()
        self.call_s, self.span_s, self.pair_s = form.call_s, form.span_s, form.pair_s
        self.least_rows, self.cached_s = form.least_rows, form.cached_s
        self.schedule = forward.schedule(graph_tokens)
        if self.schedule is not None:
            self.pair_s = forward.layers * self.schedule.pair_s
        self.kv_token_s = float(forward.decode_token_s(np.array([REFERENCE_SEQS]))[0])

    def position(self, rows: Floats) -> Floats:
        return np.log2(np.maximum(rows, 1.0))

    def body_s(self, rows: Floats) -> Floats:
        return self.forward.body_s(rows)

    @property
    def layers(self) -> int:
        return self.forward.layers

    def head_s(self, requests: Floats) -> Floats:
        return self.forward.head_s(requests)

    def base_s(self, seqs: Floats) -> Floats:
        return np.where(seqs > 0, self.forward.decode_base_s(seqs), 0.0)

    def uneven(self, seqs: Floats) -> Floats:
        return self.forward.decode_token_s(seqs) / self.kv_token_s

    def skew(self, seqs: Floats) -> Floats:
        return self.forward.decode_skew(seqs)


def with_prompts(basis: Basis, knots: Floats) -> NDArray[np.bool_]:
    """Which knots say what rows cost beside chunks: all, unless kernels tell what lies between two sides of them."""
    first, last = DECODES_ONLY
    few, many = knots <= first, knots >= last
    told: NDArray[np.bool_] = few | many
    return told if isinstance(basis, KernelBasis) and few.any() and many.any() else np.ones(len(knots), bool)


def columns(basis: Basis, knots: Sequence[float], rows: Floats) -> Floats:
    """Matrix that turns L at the knots into L at `rows`; beyond the last knot in proportion to the body."""
    at, ends = basis.position(np.asarray(rows, float)), basis.position(np.asarray(knots, float))
    left = np.maximum(np.searchsorted(ends, at, side="right") - 1, 0)
    right = np.minimum(left + 1, len(ends) - 1)
    between = (at > ends[left]) & (right > left)
    gap = np.where(between, ends[right] - ends[left], 1.0)
    share = np.where(between, 1.0 / gap * (at - ends[left]), 0.0)  # to the last bit what np.interp gives for each knot
    weights, row = np.zeros((len(at), len(knots))), np.arange(len(at))
    weights[row, right] = share
    weights[row, left] = 1.0 - share
    scaled: Floats = weights * basis.body_s(rows)[:, None] / basis.body_s(np.asarray(knots, float))[None, :]
    return scaled


@dataclass(frozen=True)
class Coefficients:
    """Of one model: L at the knots, and seconds per cached token and (query, key) pair."""

    knots: tuple[float, ...]
    linear_s: tuple[float, ...]
    full_kv_s: float
    mixed_kv_s: float
    pair_s: float
    power_share: float


@dataclass(frozen=True)
class Windows:
    """Layers that see the last tokens only."""

    share: float  # of all layers
    tokens: int

    def read_tokens(self, cached: float, requests: float) -> float:
        """Cached tokens that a layer reads in the mean, as if all contexts were the mean one."""
        return cached - self.share * max(cached - requests * self.tokens, 0.0)


class StepClock:
    """T of one model's iterations: tables made once.

    Of sliding layers a chunk sees at most the window before it, and of its own tokens as many pairs as lie in it; the
    tiles saved are taken off evenly.
    """

    def __init__(
        self,
        basis: Basis,
        coefficients: Coefficients,
        padded: Callable[[int], int],
        windows: Windows | None = None,
    ) -> None:
        self._basis, self._coefficients, self._padded, self.windows = basis, coefficients, padded, windows
        self._schedule = basis.schedule
        self._layers = 0.0  # of attention in the engine, in those of the kernel timed alone
        if isinstance(basis, KernelBasis):
            self._layers = basis.layers * coefficients.pair_s / basis.pair_s
        self._linear_s: list[float] = []  # by rows
        self._beside_chunks_s: list[float] = []  # of the rows up to where it is the same
        self._head_s: list[float] = []  # by requests
        self._base_s: list[float] = []  # by decodes
        self._kv_s: list[float] = []
        self._skew: list[float] = []
        self._decode_s: list[float] = []  # without context
        self._grow(TABLE_ROWS)
        self._widen(TABLE_REQUESTS)
        knots = np.array(coefficients.knots, float)
        told = with_prompts(basis, knots)
        if not told.all():
            at = np.maximum(np.arange(knots[knots >= DECODES_ONLY[1]].min()), 1.0)
            linear_s = np.array(coefficients.linear_s)[told]
            self._beside_chunks_s = (columns(basis, knots[told].tolist(), at) @ linear_s).tolist()

    def _grow(self, rows: int) -> None:
        at = np.arange(len(self._linear_s), rows + 1, dtype=float)
        knots, linear_s = self._coefficients.knots, np.array(self._coefficients.linear_s)
        self._linear_s += (columns(self._basis, knots, np.maximum(at, 1.0)) @ linear_s).tolist()

    def _widen(self, requests: int) -> None:
        at = np.arange(len(self._head_s), requests + 1, dtype=float)
        self._head_s += self._basis.head_s(at).tolist()
        self._base_s += self._basis.base_s(at).tolist()
        self._kv_s += (self._coefficients.full_kv_s * self._basis.uneven(at)).tolist()
        self._skew += self._basis.skew(np.maximum(at, 1.0)).tolist()
        decodes = range(len(self._decode_s), requests + 1)
        self._decode_s += [
            self.linear_s(self._padded(n) if n else 0) + self._head_s[n] + self._base_s[n] for n in decodes
        ]

    def linear_s(self, rows: int) -> float:
        if rows >= len(self._linear_s):
            self._grow(2 * rows)
        return self._linear_s[rows]

    def mixed_linear_s(self, rows: int) -> float:
        """Beside chunks."""
        return self._beside_chunks_s[rows] if rows < len(self._beside_chunks_s) else self.linear_s(rows)

    def head_s(self, requests: int) -> float:
        if requests >= len(self._head_s):
            self._widen(2 * requests)
        return self._head_s[requests]

    def rows_s(self, tokens: int, requests: int) -> float:
        """Linear layers, what lies between them, and the head."""
        rows = self._padded(tokens)
        return (self.mixed_linear_s(rows) if tokens > requests else self.linear_s(rows)) + self.head_s(requests)

    def decode(self, seqs: int) -> tuple[float, float]:
        """Seconds of an iteration of `seqs` decodes without context, and per cached token."""
        if seqs >= len(self._head_s):
            self._widen(2 * seqs)
        return self._decode_s[seqs], self._kv_s[seqs]

    def skew_share(self, seqs: int, beside_chunks: bool = False) -> float:
        """Of the standard deviation of contexts times `seqs`, what an iteration of so many decodes reads more."""
        if beside_chunks:
            return self._basis.mixed_skew
        if seqs >= len(self._head_s):
            self._widen(2 * seqs)
        return self._skew[seqs]

    def in_windows(self, kv_tokens: float, seqs: int) -> float:
        """Of `kv_tokens` cached tokens of `seqs` decodes, those that a layer reads in the mean."""
        return kv_tokens if self.windows is None else self.windows.read_tokens(kv_tokens, seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float = 0.0) -> float:
        if self._schedule is None:
            return self._summed_s(chunks, seqs, kv_tokens)
        own, tokens, requests = self._coefficients, seqs, seqs + len(chunks)
        for new, _ in chunks:
            tokens += new
        if requests >= len(self._head_s):
            self._widen(2 * requests)
        seconds = self._layers * self._schedule.seconds(chunks, seqs, kv_tokens, longest)
        if self.windows is not None:
            windowed_s = self._windowed_s(self.windows, chunks, seqs, kv_tokens, longest)
            seconds -= self.windows.share * (seconds - windowed_s)
        seconds += self.mixed_linear_s(self._padded(tokens)) + self._head_s[requests]
        return seconds + own.power_share * power(seqs) * min(seconds, WARM_S)

    def _windowed_s(
        self, windows: Windows, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float
    ) -> float:
        """Attention as if every layer were a sliding one."""
        assert self._schedule is not None
        near = [(new, min(done, windows.tokens)) for new, done in chunks]
        read = min(kv_tokens, float(seqs * windows.tokens))
        seconds = self._layers * self._schedule.seconds(near, seqs, read, min(longest, float(windows.tokens)))
        beyond = sum(pairs_of(new, done) - windowed_pairs(new, done, windows.tokens) for new, done in near)
        return seconds - self._coefficients.pair_s * beyond

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        """Attention of prompts from sums over an iteration's chunks: where tiles are known of one chunk as it is
        scheduled, of several and of columns as if all tiles were shared out evenly and none waited for; else of chunks
        of their mean size. Sliding windows as if all chunks of an iteration were alike."""
        seconds = self._unwindowed_s(chunks, tokens, context_tokens, pairs)
        if self.windows is None:
            return seconds
        window = self.windows.tokens
        near, narrow = np.minimum(context_tokens, chunks * window), np.minimum(pairs, tokens * float(window))
        return seconds - self.windows.share * (seconds - self._unwindowed_s(chunks, tokens, near, narrow))

    def _unwindowed_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        if self._schedule is None:
            basis, own = self._basis, self._coefficients
            mean = np.maximum(tokens / np.maximum(chunks, 1), 1)
            least = context_tokens * np.maximum(basis.least_rows - mean, 0.0)  # pairs of a query tile that is not full
            return (
                basis.call_s * (chunks > 0)
                + basis.span_s * (tokens + context_tokens)
                + np.maximum(own.pair_s * (pairs + least), own.mixed_kv_s * context_tokens)
                + basis.cached_s * (context_tokens > 0)
            )
        if np.ndim(tokens) == 0 and chunks == 1:
            return self._layers * self._schedule.seconds([(int(tokens), int(context_tokens))])
        return self._layers * self._schedule.even_s(chunks, tokens, pairs)

    def _summed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        own, basis = self._coefficients, self._basis
        kv_s, pair_s, call_s, span_s, least = own.mixed_kv_s, own.pair_s, basis.call_s, basis.span_s, basis.least_rows
        windows = self.windows
        seconds = call_s + kv_s * self.in_windows(kv_tokens, seqs)
        tokens, requests, cached = seqs, seqs + len(chunks), 0
        for new, done in chunks:
            tokens += new
            cached += done
            pairs = done * (new if new > least else least) + 0.5 * new * (new + 1)
            if windows is not None:
                pairs -= windows.share * (pairs_of(new, done) - windowed_pairs(new, done, windows.tokens))
            near = self.in_windows(done, 1)
            seconds += span_s * (new + near) + max(pair_s * pairs, kv_s * near)
        if cached:
            seconds += basis.cached_s
        if requests >= len(self._head_s):
            self._widen(2 * requests)
        seconds += self.mixed_linear_s(self._padded(tokens)) + self._head_s[requests] + self._base_s[seqs]
        return seconds + own.power_share * power(seqs) * min(seconds, WARM_S)
