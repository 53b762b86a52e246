"""The bootstrap of `llmsim.compare`: blocks of consecutive requests, and seeds.

    D* = mean over seeds of D_j(w) + t sqrt(s^2 / N)

w draws blocks of consecutive arrivals with replacement (circular block bootstrap: Politis & Romano 1992), the same for
every side and seed. s is the standard deviation of the N seeds' differences D_j, and t a draw of Student's distribution
with N - 1 degrees of freedom: seeds are independent of each other and few, and the percentiles of a few resampled seeds
promise too much (of three seeds no resample leaves their range, which holds the truth three times out of four). With
one seed the second term is not there, and an interval is that of requests alone.
"""

from __future__ import annotations

from math import ceil, log10, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
TAILS = (2.5, 97.5)  # percent: a 95 % interval


def interval(whole: Floats, drawn: Floats, seeds: Floats) -> tuple[float, float]:
    """The 95 % interval of a difference.

    `whole`: it, for each seed; `drawn`: a row for each resample of the requests, a column for each seed; `seeds`:
    draws of Student's distribution, one a row (`seed_draws`).
    """
    scattered = drawn.mean(axis=1)
    if len(whole) > 1:
        scattered = scattered + seeds * (float(whole.std(ddof=1)) / sqrt(len(whole)))
    low, high = np.percentile(scattered, TAILS).tolist()
    return low, high


def seed_draws(random: np.random.Generator, resamples: int, seeds: int) -> Floats:
    """Of what the mean of so many seeds may be off by, in its standard errors."""
    drawn: Floats = random.standard_t(seeds - 1, resamples) if seeds > 1 else np.zeros(resamples)
    return drawn


def percentile(values: Floats, upto: Counts, total: int, percent: float) -> float:
    """numpy's linear percentile of `values` (sorted), each repeated; `upto`: how many there are up to each."""
    rank = (total - 1) * percent / 100.0
    low = int(rank)
    at, after = np.searchsorted(upto, (low, min(low + 1, total - 1)), side="right").tolist()
    below, above = float(values[at]), float(values[after])
    return below + (rank - low) * (above - below)


def draw_weights(random: np.random.Generator, count: int, block: int) -> Counts:
    """How often each request is drawn: blocks of consecutive arrivals, the last one cut, wrapping around at the end."""
    blocks = ceil(count / block)
    starts = random.integers(0, count, blocks)
    steps = np.zeros(2 * count + 1, dtype=np.int64)
    np.add.at(steps, starts[:-1], 1)
    np.add.at(steps, starts[:-1] + block, -1)
    steps[starts[-1]] += 1
    steps[starts[-1] + count - (blocks - 1) * block] -= 1
    drawn = np.cumsum(steps[:-1])
    return drawn[:count] + drawn[count:]


def block_length(values: Floats) -> int:
    """Politis & White's block length for the circular bootstrap of a mean (Econometric Reviews 23 and 28).

    b = (2 G^2 / D)^(1/3) n^(1/3),  G = sum w(k/M) |k| R(k),  D = 4/3 (sum w(k/M) R(k))^2, with R the autocovariance, w
    the flat-top window, and M twice the lag after which the autocorrelation stays within 2 sqrt(log10(n) / n).
    """
    count = len(values)
    centred = values - values.mean() if count else values
    if count < 10 or not float(centred @ centred) > 0.0:
        return 1
    run = max(5, ceil(sqrt(log10(count))))
    most = ceil(sqrt(count)) + run
    covariance = np.array([centred[: count - lag] @ centred[lag:] for lag in range(min(most + 1, count))]) / count
    small = np.abs(covariance[1:] / covariance[0]) < 2.0 * sqrt(log10(count) / count)
    quiet = [lag for lag in range(len(small) - run + 1) if small[lag : lag + run].all()]
    longest = ceil(min(3.0 * sqrt(count), count / 3.0))
    if not quiet:
        return longest
    lags = min(2 * max(quiet[0], 1), len(covariance) - 1)
    share = np.arange(1, lags + 1) / lags
    window = np.where(share <= 0.5, 1.0, 2.0 * (1.0 - share))
    tail = window * covariance[1 : lags + 1]
    spectrum = covariance[0] + 2.0 * tail.sum()
    slope = 2.0 * (tail * np.arange(1, lags + 1)).sum()
    if spectrum <= 0.0:
        return longest
    length: float = (2.0 * slope**2 / (4.0 / 3.0 * spectrum**2)) ** (1.0 / 3.0) * count ** (1.0 / 3.0)
    return int(min(max(1, ceil(length)), longest))
