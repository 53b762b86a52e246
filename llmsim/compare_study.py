"""Everything that is looked at when sides are compared, as frames of bounded size: one call, in any process.

A `Study` says which requests are replayed under which sides. `compared` pairs the sides request by request; `by_rate`
replays them over a grid of rates; `in_cache` looks at the KV cache. What they return holds no request, so it can be
sent between processes and kept, however long the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmsim.compare import Side, compare, side_of, with_seeds
from llmsim.compare_cache import CacheUse, cache_uses, check_answered
from llmsim.compare_frames import intervals_frame, shares_frame, sides_frame
from llmsim.compare_groups import fairness_frame, groups_frame, has_groups, latency_frame, service_frame
from llmsim.compare_rates import RatePoint, rate_curves, rate_grid
from llmsim.compare_report import curves, report
from llmsim.metrics import fewest_samples
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]
GROUPS = {"tenant": "tenants", "slo_class": "classes"}  # column of the trace: key of the summary
MOST_SEEDS = 16
AT_ONCE = 2000  # requests of a quick comparison
REPLAYED = 12_000  # requests that a quick look at rates or caches replays in all
FEWEST = 200  # of each of its replays
TOUCHED = 150_000  # prompt blocks that a quick look at reuse looks up
SATURATION = 1000  # requests that tell how many a side serves per second
CALM = 0.02  # of requests' time in the queue: less, and its order decides nothing
LIGHT, HEAVY = 0.2, 1.6  # ends of a grid of rates, of what the first side serves at most


class Source(Protocol):
    """Where a trace comes from (`llmsim.choice.TraceChoice`)."""

    def load(self, limit: int | None = None, scenario: Scenario | None = None) -> Trace: ...


@dataclass(frozen=True)
class Study:
    """`goodput`: (latency, ms) pairs; `classes`: drawn for a trace without (`llmsim.classes`); `limit`: first N only.

    `stamps`: states of the users' files that sides name (`compare_sides.stamps`): an edited one is another study.
    """

    source: Source
    sides: tuple[tuple[str, Scenario], ...]
    goodput: tuple[tuple[str, float], ...] = ()
    classes: str = ""
    limit: int | None = None
    stamps: tuple[tuple[str, int], ...] = ()
    seeds: int = 1  # replays of every side in `compared`

    @property
    def targets(self) -> dict[str, float]:
        return dict(self.goodput)

    @property
    def scenarios(self) -> dict[str, Scenario]:
        return dict(self.sides)

    def trace(self) -> Trace:
        """Of the length that every side takes, with what was to be drawn for it. Raises what reading it does."""
        trace = self.source.load(self.limit, self.shortest)
        if not self.classes:
            return trace
        from llmsim.classes import assign_classes

        return assign_classes(trace, self.classes, seed=self.sides[0][1].seed)

    @property
    def shortest(self) -> Scenario:
        """The side, resolved, whose context is the shortest: what is longer is refused, dropped or cut for all."""
        if not self.sides:
            raise ValueError("no side: name a scheduler or an engine")
        return min((one.resolved() for _, one in self.sides), key=lambda one: one.max_model_len or 0)


@dataclass(frozen=True)
class Compared:
    """What `compared` found; a frame that the trace gives no reason for is None."""

    names: tuple[str, ...]
    requests: int
    block: int  # consecutive arrivals that the bootstrap draws together
    notes: tuple[str, ...]
    report: str
    sides: pd.DataFrame  # compare_frames.sides_frame
    intervals: pd.DataFrame  # compare_frames.intervals_frame
    shares: pd.DataFrame  # compare_frames.shares_frame
    curves: pd.DataFrame  # compare_report.curves
    latencies: dict[str, pd.DataFrame]  # by label of the trace: compare_groups.latency_frame
    groups: dict[str, pd.DataFrame]  # by label: the summaries' numbers of each class or tenant
    service: pd.DataFrame | None  # compare_groups.service_frame
    fairness: pd.DataFrame | None  # compare_groups.fairness_frame
    assigned: tuple[str, ...]  # what was drawn
    calm: str  # why differences are small where hardly anything waits, else empty


def compared(study: Study, progress: Progress | None = None) -> Compared:
    """Replay under every side and compare. Raises ValueError for fewer than two sides, and what `simulate` does."""
    import pandas as pd

    if len(study.sides) < 2:
        raise ValueError("one side to compare: add another scheduler, an engine or FIELD=VALUE")
    if not 1 <= study.seeds <= MOST_SEEDS:
        raise ValueError(f"seeds={study.seeds}: give 1 to {MOST_SEEDS}")
    drawn = [replace(study, sides=tuple(one.items())) for one in with_seeds(study.scenarios, study.seeds)]
    traces = [one.trace() for one in drawn]
    trace, told = traces[0], _Told(progress, study.seeds * len(traces[0]) * len(study.sides))
    sides, *repeats = [_replayed(one, its, told) for one, its in zip(drawn, traces, strict=True)]
    told.now(0, "requests; comparing")
    outcome = compare(sides, study.targets or None, seed=study.sides[0][1].seed, repeats=repeats)
    columns = {side.name: side.requests for side in sides}
    labels = has_groups(sides[0].requests)
    tenants = "tenant" in labels
    summaries = {side.name: side.summary for side in sides}
    return Compared(
        tuple(columns),
        len(trace),
        outcome.block,
        (*outcome.notes, *_few([side.summary for side in sides])),
        report(outcome),
        sides_frame(outcome),
        intervals_frame(outcome),
        shares_frame(outcome),
        pd.DataFrame(curves(outcome)),
        {label: latency_frame(columns, label) for label in labels},
        {label: groups_frame(summaries, GROUPS[label]) for label in labels},
        service_frame(columns) if tenants else None,
        fairness_frame(columns) if tenants else None,
        trace.assigned,
        _calm(sides[0]),
    )


def _few(summaries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Which P99 rest on too few requests to be bounded: of the sides, and of their tenants and classes."""
    need = fewest_samples(99)
    counts = {"": min(summary["completed"] for summary in summaries)}
    for label in GROUPS.values():
        for summary in summaries:
            for name, numbers in (summary.get(label) or {}).items():
                counts[f" of {name}"] = min(counts.get(f" of {name}", need), numbers["completed"])
    return tuple(
        f"P99{who} from {count} requests; {need} are needed to bound it"
        for who, count in counts.items()
        if count < need
    )


def _calm(first: Side) -> str:
    waited = first.summary["queue_ms"]["share_of_e2el"]
    if waited is None or waited > CALM:
        return ""
    return (
        f"Under {first.name} requests wait {waited:.1%} of their time: where nothing queues, the order of the queue "
        "hardly matters. Raise the rate to tell policies apart"
    )


class _Told:
    """Requests answered of all replays together."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._before = progress, total, 0

    def now(self, done: int, words: str) -> None:
        if self._progress is not None:
            self._progress(self._before + done, self._total, words)

    def ended(self, requests: int) -> None:
        self._before += requests


def _replayed(study: Study, trace: Trace, told: _Told) -> list[Side]:
    found: list[Side] = []
    for name, scenario in study.sides:

        def progress(done: int, _: int, simulated_s: float, name: str = name) -> None:
            told.now(done, f"requests; {name}, {simulated_s:,.0f} s simulated")

        result = simulate(trace, scenario, progress)
        check_answered(name, result)
        found.append(side_of(name, result, study.targets or None))
        told.ended(len(trace))
    return found


@dataclass(frozen=True)
class ByRate:
    """What `by_rate` found, and the grid that it chose or was given."""

    points: tuple[RatePoint, ...]
    rates: tuple[float, ...]
    requests: int
    unit: str  # of the rates: requests/s, or sessions/s if turns wait


def by_rate(
    study: Study, lowest: float | None, highest: float | None, count: int, progress: Progress | None = None
) -> ByRate:
    """Goodput at `count` rates; an end that is None follows from what the first side serves if all is sent at once."""
    trace = study.trace()
    if lowest is None or highest is None:
        served = saturation_rate(trace, study.sides[0][1])
        lowest = LIGHT * served if lowest is None else lowest
        highest = HEAVY * served if highest is None else highest
    rates = rate_grid(lowest, highest, count)
    points = rate_curves(trace, study.scenarios, rates, study.targets, progress=progress)
    return ByRate(tuple(points), tuple(rates), len(trace), rate_unit(trace))


def rate_unit(trace: Trace) -> str:
    """What a rate of this trace counts: turns that wait for an answer are not sent at a rate, their sessions are."""
    return "sessions/s" if np.isnan(trace.arrival_s).any() else "requests/s"


def saturation_rate(trace: Trace, scenario: Scenario) -> float:
    """What is served per second when the first `SATURATION` requests are there from the start and no turn waits.

    In `rate_unit`s: with sessions, as many of them as so many requests belong to.
    """
    from llmsim.trace import limited

    first = limited(trace, SATURATION)
    together = replace(first, arrival_s=np.zeros(len(first)), parent=None, delay_s=None)
    result = simulate(together, scenario)
    if not result.duration_s > 0.0:
        raise ValueError(f"{trace.name}: none of its requests can be answered: no rate is worth trying")
    sent_by_rate = float((~np.isnan(trace.arrival_s)).mean())
    return float(result.finished.sum()) / result.duration_s * sent_by_rate


def in_cache(study: Study, progress: Progress | None = None) -> list[CacheUse]:
    """What each side's KV cache found, lost and moved."""
    return cache_uses(study.trace(), study.scenarios, progress=progress)


def cache_sides(
    scenario: Scenario, evictions: Sequence[str], tiers: str = "", blocks: int | None = None
) -> tuple[tuple[str, Scenario], ...]:
    """A side for each eviction policy, and one with the tiers below vLLM's own order.

    `tiers`: as `Scenario.kv_tiers`; `blocks`: KV blocks of a replica, None: what fits the GPU. Raises ValueError for
    what cannot be meant.
    """
    base = scenario if blocks is None else replace(scenario, num_gpu_blocks_override=blocks)
    plain: dict[str, Any] = {"kv_tiers": "none", "kv_tier_prefetch": False, "kv_tier_write": "write_through"}
    sides = {name: replace(base, eviction=name, eviction_args={}, **plain) for name in dict.fromkeys(evictions)}
    if tiers.strip():
        names = " + ".join(part.partition(":")[0].strip() for part in tiers.split(","))
        sides[f"lru + {names}"] = replace(base, eviction="lru", eviction_args={}, kv_tiers=tiers.strip())
    for side in sides.values():
        side.resolved()  # checked against model and GPU
    if not sides:
        raise ValueError("no side: name an eviction policy (lru) or give KV tiers (cpu:64GiB:50GB/s:10us)")
    return tuple(sides.items())


@dataclass(frozen=True)
class Reused:
    """What `reused` found: a frame of `llmsim.reuse.frame`, and the hit ratio with room for everything."""

    points: pd.DataFrame
    unlimited: float
    requests: int
    block_tokens: int


def reused(
    source: Source,
    evictions: Sequence[str],
    sizes: int,
    model: str,
    kv_dtype: str,
    limit: int | None = None,
    touched: int | None = None,
    progress: Progress | None = None,
) -> Reused:
    """Hit ratio of every policy at `sizes` sizes of cache; `touched`: prompt blocks looked up in all, at most.

    Raises ValueError for a trace without ids.
    """
    from llmsim.hardware import find_model
    from llmsim.reuse import UNLIMITED, curves, frame, size_grid
    from llmsim.trace import limited

    if not evictions:
        raise ValueError("no eviction policy: name one, e.g. lru")
    trace = source.load(limit)
    if touched is not None and trace.block_ids is not None:
        lengths = np.cumsum([len(ids) for ids in trace.block_ids])
        most = int(np.searchsorted(lengths, touched / (sizes * len(evictions)), side="right"))
        trace = limited(trace, min(max(most, FEWEST), len(trace)))
    grid = size_grid(trace, sizes)
    found = curves(trace, grid, list(dict.fromkeys(evictions)), progress=progress)
    unlimited = curves(trace, [UNLIMITED], ["lru"])[0].hit_ratio
    token_bytes = find_model(model).kv_bytes_per_token(kv_dtype)
    points = frame(found, block_tokens=trace.block_tokens, token_bytes=token_bytes)
    return Reused(points, unlimited, len(trace), trace.block_tokens)


def quick_requests(replays: int) -> int:
    """Requests of each of so many replays for an answer at once."""
    return max(FEWEST, REPLAYED // max(replays, 1))
