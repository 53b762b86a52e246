"""Inter-token gaps of a whole run, kept as arithmetic runs: exact statistics without one number per token.

A run (gap_s, growth_s, count, weight) stands for the gaps `gap_s + i * growth_s`, i = 0 .. count-1, each seen by
`weight` requests: one row of a decode run is what its whole batch saw. The multiset has sum(count * weight) members,
one per output token but the first of each request.

Mean and standard deviation are closed sums. Percentiles are those of `numpy.percentile(..., method="linear")` on the
expanded multiset: the two order statistics around rank (n - 1) * p / 100 are found by a radix search on the bit
pattern of the floats (monotone for values >= 0), which reads the runs in chunks of about a million gaps, so the memory
does not grow with the run. Rows that do not reach the wanted bucket are skipped from the second pass on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK = 1 << 20  # gaps expanded at a time: 8 MB an array
BUCKET_BITS = 16  # 65,536 buckets a pass: four passes at most for 64-bit keys


def _keys(values: Floats) -> Ints:
    """Integers in the order of the (non-negative) values."""
    return (values + 0.0).view(np.int64)  # + 0.0 turns -0.0, whose bits are negative, into 0.0


@dataclass(frozen=True)
class GapRuns:
    gap_s: Floats
    growth_s: Floats
    count: Ints
    weight: Floats

    @classmethod
    def of(cls, columns: dict[str, NDArray[Any]]) -> GapRuns:
        """Checked and reduced: rows that stand for nothing leave, constant rows become one gap of more weight."""
        gap_s = np.asarray(columns["gap_s"], dtype=np.float64)
        growth_s = np.asarray(columns["growth_s"], dtype=np.float64)
        count = np.asarray(columns["count"], dtype=np.int64)
        weight = np.asarray(columns["weight"], dtype=np.float64)
        kept = (count > 0) & (weight > 0)
        if not kept.all():
            gap_s, growth_s, count, weight = gap_s[kept], growth_s[kept], count[kept], weight[kept]
        lowest_s = np.minimum(gap_s, gap_s + growth_s * (count - 1))
        if gap_s.size and not float(lowest_s.min()) >= 0.0:
            raise ValueError(f"gaps: gap_s={float(lowest_s.min())} is no time between tokens (0 or more seconds)")
        constant = growth_s == 0.0
        return cls(gap_s, growth_s, np.where(constant, 1, count), np.where(constant, weight * count, weight))

    @property
    def total(self) -> int:
        return int((self.count * self.weight).sum())

    def mean_s(self) -> float:
        c = self.count
        return float((self.weight * (c * self.gap_s + self.growth_s * (c * (c - 1) / 2))).sum() / self.total)

    def std_s(self) -> float:
        mean_s, c = self.mean_s(), self.count.astype(np.float64)
        off = self.gap_s - mean_s  # around the mean: sums of raw squares would cancel
        squares = c * off**2 + off * self.growth_s * c * (c - 1) + self.growth_s**2 * (c - 1) * c * (2 * c - 1) / 6
        return float(np.sqrt((self.weight * squares).sum() / self.total))

    def percentiles_s(self, percents: Sequence[float]) -> list[float]:
        ranks = [(self.total - 1) * percent / 100.0 for percent in percents]
        below = [int(rank) for rank in ranks]
        wanted = sorted({*below, *(min(low + 1, self.total - 1) for low in below)})
        values = dict(zip(wanted, self._order_statistics(wanted), strict=True))
        answers = []
        for rank, low in zip(ranks, below, strict=True):
            a, b = values[low], values[min(low + 1, self.total - 1)]
            answers.append(a + (b - a) * (rank - low))
        return answers

    def _expanded(self, low: int, high: int) -> Iterator[tuple[Ints, Floats]]:
        """Keys in [low, high] with their weights, chunk by chunk."""
        last_s = self.gap_s + self.growth_s * (self.count - 1)
        rows = np.flatnonzero(
            (_keys(np.maximum(self.gap_s, last_s)) >= low) & (_keys(np.minimum(self.gap_s, last_s)) <= high)
        )
        ends = np.cumsum(self.count[rows])
        first = 0
        while first < rows.size:
            done = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
            part = rows[first:stop]
            count = self.count[part]
            step = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            values = np.repeat(self.gap_s[part], count) + np.repeat(self.growth_s[part], count) * step
            keys, weights = _keys(values), np.repeat(self.weight[part], count)
            inside = (keys >= low) & (keys <= high)
            yield (keys, weights) if inside.all() else (keys[inside], weights[inside])
            first = stop

    def _order_statistics(self, ranks: list[int]) -> list[float]:
        """The values at these ranks (0 is the smallest), ascending, by narrowing one bucket at a time."""
        last_s = self.gap_s + self.growth_s * (self.count - 1)
        low = int(_keys(np.minimum(self.gap_s, last_s)).min())
        high = int(_keys(np.maximum(self.gap_s, last_s)).max())
        found: dict[int, int] = {}
        todo = [(low, high, 0.0, ranks)]  # key range, gaps below it, the ranks inside
        while todo:
            low, high, below, inside = todo.pop()
            if low == high:
                found.update(dict.fromkeys(inside, low))
                continue
            shift = max(0, (high - low).bit_length() - BUCKET_BITS)
            totals = np.zeros(((high - low) >> shift) + 1)
            for keys, weights in self._expanded(low, high):
                totals += np.bincount((keys - low) >> shift, weights=weights, minlength=totals.size)
            ends = below + np.cumsum(totals)
            buckets = np.searchsorted(ends, np.asarray(inside), side="right").tolist()
            for bucket in sorted(set(buckets)):
                start = low + (bucket << shift)
                stop = min(high, start + (1 << shift) - 1)
                members = [rank for rank, own in zip(inside, buckets, strict=True) if own == bucket]
                todo.append((start, stop, float(ends[bucket] - totals[bucket]), members))
        keys_found = np.array([found[rank] for rank in ranks], dtype=np.int64)
        return [float(value) for value in keys_found.view(np.float64)]
