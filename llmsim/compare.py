"""The same trace under several scenarios, paired by request: what differs, and how sure that is.

Every side replays the same requests at the same times (closed loops and sessions: the same requests in the same order),
so a difference is not blurred by another draw of traffic. Differences are to the first side:

    D = statistic(side) - statistic(first)     mean and percentiles of TTFT, TPOT, E2EL; goodput, SLO attainment,
                                               preemptions, prefix cache hit rate

with 95 % intervals by a paired bootstrap: requests are drawn with replacement, the same ones for every side, and D is
computed again; the interval reaches from the 2.5th to the 97.5th percentile of 1,000 such Ds. Requests are not
independent of each other (a burst delays all who queue behind it), so blocks of consecutive arrivals are drawn and not
single requests (circular block bootstrap: Politis & Romano 1992). The block's length is the one that Politis & White
(2004, with the correction of 2009) derive from the autocorrelation of the paired differences, the longest of all
latencies and sides, at most min(3 sqrt(n), n / 3).

What an interval means: how far D would scatter over stretches of traffic like this one. It says nothing about another
load, and with fewer than `FEW_BLOCKS` blocks it is too narrow. Throughput belongs to the run as a whole and has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log10, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.metrics import TARGETS, Columns, Result, latencies_s
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

LATENCIES = TARGETS  # ttft, tpot, e2el
STATISTICS = ("mean", "p50", "p90", "p99")
PERCENTS = (50, 90, 99)
RESAMPLES = 1000
FEW_BLOCKS = 20
WHOLE_RUN = ("request_throughput", "output_throughput")  # of the run, not of its requests: no interval
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """One scenario's run: its summary and a row per request."""

    name: str
    scenario: dict[str, Any]
    summary: dict[str, Any]
    requests: Columns


@dataclass(frozen=True)
class Difference:
    """To the first side; `low` and `high` bound the 95 % interval, None for a number of the whole run.

    `relative`: the same three as fractions of the first side's number (of the same draw), None if that is ever 0.
    """

    value: float
    low: float | None
    high: float | None
    relative: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """`differences[side name][key]`; `lower[side name][latency]`: shares of requests with a lower and a higher one."""

    sides: tuple[Side, ...]
    targets: dict[str, float] | None
    numbers: dict[str, dict[str, float | None]]
    differences: dict[str, dict[str, Difference]]
    shares: dict[str, dict[str, tuple[float, float]]]
    block: int  # consecutive arrivals that are drawn together
    notes: tuple[str, ...] = field(default=())

    def frame(self) -> pd.DataFrame:
        """A row a side (but the first) and number: its value, the difference, the interval, and a verdict."""
        from llmsim.compare_frames import differences_frame

        return differences_frame(self)


def run_sides(
    trace: Trace,
    scenarios: Mapping[str, Scenario],
    goodput: dict[str, float] | None = None,
    *,
    jobs: int = 1,
    done: Callable[[str, Side], None] | None = None,
) -> list[Side]:
    """Replay the trace under each scenario, `jobs` at a time; `done(name, side)` is told of each as it ends."""
    work = [(name, trace, scenario, goodput) for name, scenario in scenarios.items()]
    sides: list[Side] = []

    def keep(side: Side) -> None:
        sides.append(side)
        if done is not None:
            done(side.name, side)

    if jobs <= 1 or len(work) == 1:
        for one in work:
            keep(_run(one))
        return sides
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(min(jobs, len(work))) as pool:
        for side in pool.map(_run, work):
            keep(side)
    return sides


def _run(work: tuple[str, Trace, Scenario, dict[str, float] | None]) -> Side:
    name, trace, scenario, goodput = work
    return side_of(name, simulate(trace, scenario), goodput)


def side_of(name: str, result: Result, goodput: dict[str, float] | None = None) -> Side:
    return Side(name, result.scenario.to_dict(), result.summary(goodput), result.requests)


def compare(sides: Sequence[Side], goodput: dict[str, float] | None = None, *, seed: int = 0) -> Comparison:
    """Pair the requests of all sides with the first one's.

    Raises ValueError if there are fewer than two sides, two of one name, or sides of different traces.
    """
    _check_paired(sides)
    order = np.argsort(sides[0].requests["arrival_s"], kind="stable")
    prepared = [_Prepared(side, order, goodput) for side in sides]
    count = len(order)
    block = max([1, *(_block_length(one, prepared[0]) for one in prepared[1:])])
    once = np.ones(count, dtype=np.int64)
    numbers = {one.side.name: one.numbers(once) for one in prepared}
    random = np.random.default_rng(seed)
    drawn: list[list[dict[str, float | None]]] = [[] for _ in prepared]
    for _ in range(RESAMPLES):
        weights = _weights(random, count, block)
        for at, one in enumerate(prepared):
            drawn[at].append(one.numbers(weights))
    differences = {}
    for one, scattered in zip(prepared[1:], drawn[1:], strict=True):
        name = one.side.name
        differences[name] = _differences(numbers[sides[0].name], numbers[name], drawn[0], scattered)
        for key in WHOLE_RUN:
            before, now = sides[0].summary[key], one.side.summary[key]
            if before is not None and now is not None:
                differences[name][key] = Difference(now - before, None, None)
    for one in prepared:
        numbers[one.side.name] |= {key: one.side.summary[key] for key in WHOLE_RUN}
    shares = {one.side.name: _shares(prepared[0], one) for one in prepared[1:]}
    return Comparison(tuple(sides), goodput, numbers, differences, shares, block, _notes(sides, count, block))


def _check_paired(sides: Sequence[Side]) -> None:
    if len(sides) < 2:
        raise ValueError(f"{len(sides)} side to compare: give two or more schedulers, --set variants or run folders")
    first = sides[0]
    for at, side in enumerate(sides[1:], 1):
        if side.name in [other.name for other in sides[:at]]:
            raise ValueError(f"{side.name} is given twice: leave one out")
        for column in ("id", "prompt_tokens", "output_tokens"):
            if not np.array_equal(side.requests[column], first.requests[column]):
                raise ValueError(
                    f"{side.name} and {first.name} are not runs of the same requests: they differ in {column}; "
                    "replay the same trace with the same trace flags"
                )


class _Prepared:
    """One side's numbers as functions of how often each request is drawn; values are sorted once.

    `order`: the requests by their arrival at the first side.
    """

    def __init__(self, side: Side, order: NDArray[np.intp], goodput: dict[str, float] | None) -> None:
        self.side = side
        requests = {name: column[order] for name, column in side.requests.items()}
        self.done = np.isfinite(requests["finish_s"])
        self.latency_ms = {name: 1e3 * values for name, values in latencies_s(requests).items()}
        self.sorted: dict[str, tuple[NDArray[np.intp], Floats]] = {}
        for name, values in self.latency_ms.items():
            rising = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]  # nan comes last
            self.sorted[name] = rising, values[rising]
        self.good: NDArray[np.bool_] | None = None
        if goodput:
            self.good = self.done.copy()
            for name, target_ms in goodput.items():
                self.good &= np.nan_to_num(self.latency_ms[name], nan=0.0) <= target_ms
        self.preemptions = requests["preemptions"]
        self.cached = requests["cached_tokens"] * self.done
        self.prompt = requests["prompt_tokens"] * self.done

    def numbers(self, weights: Counts) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, (rising, values) in self.sorted.items():
            times = weights[rising]
            upto = np.cumsum(times)
            total = int(upto[-1]) if len(upto) else 0
            found[f"mean_{name}_ms"] = float(times @ values) / total if total else None
            for percent in PERCENTS:
                found[f"p{percent}_{name}_ms"] = _percentile(values, upto, total, percent) if total else None
        if self.good is not None:
            met = float(weights @ self.good)
            duration_s = self.side.summary["duration"]
            found["request_goodput"] = met / duration_s if duration_s else None
            found["slo_attainment"] = met / float(weights.sum())
        found["num_preemptions"] = float(weights @ self.preemptions)
        asked = float(weights @ self.prompt)
        found["prefix_cache_hit_rate"] = float(weights @ self.cached) / asked if asked else None
        return found


def _percentile(values: Floats, upto: Counts, total: int, percent: int) -> float:
    """numpy's linear percentile of `values` (sorted), each repeated; `upto`: how many there are up to each."""
    rank = (total - 1) * percent / 100.0
    low = int(rank)
    at, after = np.searchsorted(upto, (low, min(low + 1, total - 1)), side="right").tolist()
    below, above = float(values[at]), float(values[after])
    return below + (rank - low) * (above - below)


def _differences(
    first: Mapping[str, float | None],
    mine: Mapping[str, float | None],
    first_drawn: Sequence[Mapping[str, float | None]],
    drawn: Sequence[Mapping[str, float | None]],
) -> dict[str, Difference]:
    found = {}
    for key, value in mine.items():
        before = first[key]
        if value is None or before is None:
            continue
        pairs = [(a[key], b[key]) for a, b in zip(first_drawn, drawn, strict=True)]
        then, now = np.array([pair for pair in pairs if None not in pair], dtype=np.float64).T
        low, high = np.percentile(now - then, (2.5, 97.5)).tolist()
        relative = None
        if before and then.all():
            share = np.percentile(now / then - 1.0, (2.5, 97.5)).tolist()
            relative = (value / before - 1.0, share[0], share[1])
        found[key] = Difference(value - before, low, high, relative)
    return found


def _shares(first: _Prepared, other: _Prepared) -> dict[str, tuple[float, float]]:
    """Of the requests that both sides answered: the shares with a lower and with a higher latency."""
    found = {}
    for name in LATENCIES:
        change = other.latency_ms[name] - first.latency_ms[name]
        change = change[np.isfinite(change)]
        if change.size:
            slack_ms = 1e-6  # a nanosecond: rounding of sums
            found[name] = float((change < -slack_ms).mean()), float((change > slack_ms).mean())
    return found


def _weights(random: np.random.Generator, count: int, block: int) -> Counts:
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


def _block_length(one: _Prepared, first: _Prepared) -> int:
    changes = [one.latency_ms[name] - first.latency_ms[name] for name in LATENCIES]
    # To a nanosecond: below that it is the rounding of sums, not a difference.
    return max(block_length(np.round(change[np.isfinite(change)], 6)) for change in changes)


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


def _notes(sides: Sequence[Side], count: int, block: int) -> tuple[str, ...]:
    notes = []
    if ceil(count / block) < FEW_BLOCKS:
        notes.append(
            f"{count} requests are only {ceil(count / block)} blocks of {block} that depend on each other: the"
            " intervals are too narrow; replay a longer trace"
        )
    for side in sides:
        rejected = int((~np.isfinite(side.requests["finish_s"])).sum())
        if rejected:
            notes.append(f"{side.name} rejected {rejected} of {count} requests: its latencies are those of the others")
        if side.summary.get("stable") is False:
            notes.append(f"{side.name}: {side.summary['stability']}")
    return tuple(notes)
