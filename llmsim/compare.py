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

With several seeds every side is replayed once for each, paired by seed too, and every number is the mean over seeds.
Seeds redraw what the scenario draws (launch times, acceptance of drafts, whatever a trace is drawn with); what an
interval says then holds for another seed as well (`llmsim.compare_bootstrap`).

A promise (`Slo`) is kept or broken by what a side measured; `share` says in how many of the same draws it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, nan
from typing import TYPE_CHECKING

import numpy as np

from llmsim.compare_bootstrap import Counts, block_length, draw_weights, interval, seed_draws
from llmsim.compare_prepared import LATENCIES, PERCENTS, Prepared, Side, check_slos
from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.slo import Slo
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LATENCIES", "PERCENTS", "Comparison", "Difference", "Promise", "Side", "compare", "run_sides", "side_of"]

STATISTICS = ("mean", "p50", "p90", "p99")
RESAMPLES = 1000
FEW_BLOCKS = 20
FEWEST = 10  # requests that both sides answered: of fewer no interval is drawn
SHOWN_MS = 0.005  # a difference below is printed as 0, and is neither lower nor higher
SEED_STEP = 1000  # between two seeds: replica i of a fleet draws from seed + i
WHOLE_RUN = ("request_throughput", "output_throughput")  # of the run, not of its requests: no interval


@dataclass(frozen=True)
class Difference:
    """To the first side; `low` and `high` bound the 95 % interval, None for a number of the whole run and
    of fewer than `FEWEST` requests.

    `relative`: the same three as fractions of the first side's number (of the same draw), None if that is ever 0.
    """

    value: float
    low: float | None
    high: float | None
    relative: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Promise:
    """An SLO of one side: what it measured, seconds, and the share of the draws that keep it (None for itl, and of
    fewer than `FEWEST` requests)."""

    slo: Slo
    value_s: float
    share: float | None

    @property
    def met(self) -> bool:
        return self.slo.met(self.value_s)


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
    seeds: tuple[int, ...] = ()  # of the replays, if there are several for each side
    promises: dict[str, tuple[Promise, ...]] = field(default_factory=dict)  # of each side, one for every SLO

    @property
    def has_intervals(self) -> bool:
        """Whether there were requests enough for any."""
        return any(change.low is not None for found in self.differences.values() for change in found.values())

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
    return run_seeds([(trace, scenarios)], goodput, jobs=jobs, done=done)[0]


def run_seeds(
    repeats: Sequence[tuple[Trace, Mapping[str, Scenario]]],
    goodput: dict[str, float] | None = None,
    *,
    jobs: int = 1,
    done: Callable[[str, Side], None] | None = None,
) -> list[list[Side]]:
    """The same for each seed's trace and scenarios (`with_seeds`)."""
    work = [(name, trace, one, goodput) for trace, scenarios in repeats for name, one in scenarios.items()]
    sides: list[Side] = []

    def keep(side: Side) -> None:
        sides.append(side)
        if done is not None:
            done(side.name, side)

    if jobs <= 1 or len(work) == 1:
        for one in work:
            keep(_run(one))
    else:
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(min(jobs, len(work))) as pool:
            for side in pool.map(_run, work):
                keep(side)
    each = len(repeats[0][1])
    return [sides[at : at + each] for at in range(0, len(sides), each)]


def with_seeds(scenarios: Mapping[str, Scenario], seeds: int) -> list[dict[str, Scenario]]:
    """The scenarios under so many seeds: their own, then others far from it."""
    return [
        {name: replace(one, seed=one.seed + SEED_STEP * at) for name, one in scenarios.items()} for at in range(seeds)
    ]


def _run(work: tuple[str, Trace, Scenario, dict[str, float] | None]) -> Side:
    name, trace, scenario, goodput = work
    return side_of(name, simulate(trace, scenario), goodput)


def side_of(name: str, result: Result, goodput: dict[str, float] | None = None) -> Side:
    return Side(name, result.scenario.to_dict(), result.summary(goodput), result.requests)


def compare(
    sides: Sequence[Side],
    goodput: dict[str, float] | None = None,
    *,
    seed: int = 0,
    repeats: Sequence[Sequence[Side]] = (),
    slos: Sequence[Slo] = (),
) -> Comparison:
    """Pair the requests of all sides with the first one's. `repeats`: the same sides, replayed under other seeds.

    Raises ValueError if there are fewer than two sides, two of one name, or sides of different traces.
    """
    check_slos(slos)
    every = [sides, *repeats]
    for replayed in every:
        _check_paired(replayed)
        if [side.name for side in replayed] != [side.name for side in sides]:
            raise ValueError("repeats are not of the same sides: replay each of them under every seed")
    fleets = _prepared(every, goodput, slos)
    count = len(sides[0].requests["id"])
    block = max(1, *(_block_length(fleet, fleets[0]) for fleet in fleets[1:]))
    drawn = _Drawn(fleets, block, seed)
    numbers = {side.name: drawn.numbers(at) for at, side in enumerate(sides)}
    differences = {side.name: drawn.differences(at) for at, side in enumerate(sides) if at}
    for key in WHOLE_RUN:
        means = {side.name: _mean([one[at].summary[key] for one in every]) for at, side in enumerate(sides)}
        before = means[sides[0].name]
        for name, now in means.items():
            numbers[name][key] = now
            if name in differences and now is not None and before is not None:
                differences[name][key] = Difference(now - before, None, None)
    shares = {side.name: _shares(fleets[0], fleets[at]) for at, side in enumerate(sides) if at}
    promises = {side.name: drawn.promises(at) for at, side in enumerate(sides)} if slos else {}
    seeds = tuple(int(one[0].scenario["seed"]) for one in every) if repeats else ()
    notes = _notes(sides, count, block)
    return Comparison(tuple(sides), goodput, numbers, differences, shares, block, notes, seeds, promises)


def _prepared(
    every: Sequence[Sequence[Side]], goodput: dict[str, float] | None, slos: Sequence[Slo]
) -> list[list[Prepared]]:
    """For each side, its runs by seed; requests in order of arrival at the first side of that seed."""
    fleets: list[list[Prepared]] = [[] for _ in every[0]]
    for replayed in every:
        order = np.argsort(replayed[0].requests["arrival_s"], kind="stable")
        for at, side in enumerate(replayed):
            fleets[at].append(Prepared(side, order, goodput, slos))
    return fleets


class _Drawn:
    """All sides' numbers: as they are, and in every resample. Arrays by key; nan for a number that does not exist."""

    def __init__(self, fleets: list[list[Prepared]], block: int, seed: int) -> None:
        self.fleets = fleets
        random = np.random.default_rng(seed)
        counts = [len(one.done) for one in fleets[0]]
        self.whole = [self._of(fleet, [np.ones(count, dtype=np.int64) for count in counts]) for fleet in fleets]
        rows: list[list[dict[str, list[float]]]] = [[] for _ in fleets]
        for _ in range(RESAMPLES):
            weights = [draw_weights(random, counts[0], block)]
            for count in counts[1:]:  # the same requests of every seed, where there are as many
                weights.append(weights[0] if count == counts[0] else draw_weights(random, count, block))
            for at, fleet in enumerate(fleets):
                rows[at].append(self._of(fleet, weights))
        self.drawn = [{key: np.array([row[key] for row in side]) for key in side[0]} for side in rows]
        self.seeds = seed_draws(random, RESAMPLES, len(counts))

    @staticmethod
    def _of(fleet: list[Prepared], weights: list[Counts]) -> dict[str, list[float]]:
        """Each number by seed, and the promises under their places."""
        found = [one.numbers(mine) for one, mine in zip(fleet, weights, strict=True)]
        by_key = {key: [nan if (value := one[key]) is None else value for one in found] for key in found[0]}
        promised = [one.promised_s(mine) for one, mine in zip(fleet, weights, strict=True)]
        return by_key | {f"#{at}": list(values) for at, values in enumerate(zip(*promised, strict=True))}

    def answered(self, at: int) -> int:
        """Requests of one seed that this side and the first one answered, the fewest of all seeds."""
        return min(int((a.done & b.done).sum()) for a, b in zip(self.fleets[0], self.fleets[at], strict=True))

    def numbers(self, at: int) -> dict[str, float | None]:
        return {key: _mean(values) for key, values in self.whole[at].items() if not key.startswith("#")}

    def differences(self, at: int) -> dict[str, Difference]:
        found = {}
        for key, values in self.whole[at].items():
            then, now = np.array(self.whole[0][key]), np.array(values)
            if key.startswith("#") or np.isnan(now - then).any():
                continue
            if self.answered(at) < FEWEST:
                found[key] = Difference(float(now.mean()) - float(then.mean()), None, None)
                continue
            drawn_then, drawn_now = self.drawn[0][key], self.drawn[at][key]
            known = ~np.isnan(drawn_now - drawn_then).any(axis=1)
            drawn_then, drawn_now, seeds = drawn_then[known], drawn_now[known], self.seeds[known]
            low, high = interval(now - then, drawn_now - drawn_then, seeds)
            relative = None
            if then.all() and drawn_then.all():
                share = now / then - 1.0
                bounds = interval(share, drawn_now / drawn_then - 1.0, seeds)
                relative = (float(share.mean()), *bounds)
            found[key] = Difference(float(now.mean()) - float(then.mean()), low, high, relative)
        return found

    def promises(self, at: int) -> tuple[Promise, ...]:
        found = []
        for place, slo in enumerate(self.fleets[at][0].slos):
            values = np.array(self.whole[at][f"#{place}"])
            value_s, share = float(values.mean()), None
            judged = (slo.metric in LATENCIES or slo.good_s) and self.answered(at) >= FEWEST
            if judged and not np.isnan(values).any():
                drawn = self.drawn[at][f"#{place}"].mean(axis=1)
                spread = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
                if np.isfinite(spread) and spread:
                    drawn = drawn + self.seeds * spread
                share = float((drawn <= slo.limit_s).mean())
            found.append(Promise(slo, value_s, share))
        return tuple(found)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and value == value]
    return float(np.mean(known)) if len(known) == len(values) else None


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


def _shares(first: Sequence[Prepared], other: Sequence[Prepared]) -> dict[str, tuple[float, float]]:
    """Of the requests that both sides answered: the shares with a lower and with a higher latency."""
    found = {}
    for name in LATENCIES:
        change = np.concatenate([b.latency_ms[name] - a.latency_ms[name] for a, b in zip(first, other, strict=True)])
        change = change[np.isfinite(change)]
        if change.size:
            found[name] = float((change < -SHOWN_MS).mean()), float((change > SHOWN_MS).mean())
    return found


def _block_length(fleet: Sequence[Prepared], first: Sequence[Prepared]) -> int:
    """Of the differences that are drawn: means over seeds, where the seeds have the same requests."""
    longest = 1
    for name in LATENCIES:
        changes = [b.latency_ms[name] - a.latency_ms[name] for a, b in zip(first, fleet, strict=True)]
        if len({len(change) for change in changes}) == 1:
            changes = [np.mean(changes, axis=0)]
        for change in changes:
            # To a nanosecond: below that it is the rounding of sums, not a difference.
            longest = max(longest, block_length(np.round(change[np.isfinite(change)], 6)))
    return longest


def _notes(sides: Sequence[Side], count: int, block: int) -> tuple[str, ...]:
    notes = []
    if count < FEWEST:
        notes.append(f"of {count} request{'s' * (count != 1)} there are no intervals: replay {FEWEST} or more")
    elif ceil(count / block) < FEW_BLOCKS:
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
