"""What charts show of a run: frames of bounded size from run folders (`llmsim.runs.Run`) and results.

A run of a million requests becomes at most `POINTS` rows, so that a browser can draw them; what was left out is said in
`frame.attrs["notes"]`, one line each, which charts print below their titles. Numbers are those of
`llmsim.metrics`: seconds since the trace's time 0, latencies in milliseconds, percentiles NumPy's linear ones. Requests
that were rejected have no latency and are left out of its distribution, never counted as 0.

The strip over simulated time is in `llmsim.views_strip`, single requests in `llmsim.views_requests`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.metrics import breakdown_s, fewest_samples, latencies_s
from llmsim.views_base import MEASURES, PARTS, POINTS, Floats, frame_of, summary_of, values
from llmsim.views_requests import INSTANTS, gantt, life, rows_of, subset, table, window_s, within
from llmsim.views_strip import strip

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.metrics import Result
    from llmsim.runs import Run

__all__ = [
    "KPIS", "MEASURES", "PARTS", "POINTS", "Kpi", "ecdf", "gantt", "kpis", "life", "linked", "rejections", "scatter",
    "strip", "subset", "table", "values", "where", "window_s", "within",
]  # fmt: skip


def ecdf(runs: Mapping[str, Run | Result], metric: str = "ttft", points: int = 2000) -> pd.DataFrame:
    """The distribution of a measure: `label`, `value` (unit of `MEASURES`), `share` of the requests that have at most
    this value, `requests` that the run's curve rests on.

    A run of more than `points` distinct ranks keeps its smallest and largest value, half of the points evenly spaced in
    rank and half evenly spaced in the logarithm of the distance to the end, so that the tail beyond P99 keeps its
    shape. `share` is exact for every row that is kept.
    """
    share_of_points = max(min(points, POINTS // max(len(runs), 1)), 4)
    parts: dict[str, list[Any]] = {"label": [], "value": [], "share": [], "requests": []}
    notes, thinned = [], False
    for label, run in runs.items():
        every = values(run, metric)
        there = np.sort(every[np.isfinite(every)])
        last = np.flatnonzero(np.append(there[1:] != there[:-1], True)) if there.size else np.zeros(0, dtype=np.int64)
        kept = _ranks(last, share_of_points)
        parts["label"] += [label] * kept.size
        parts["value"] += there[kept].tolist()
        parts["share"] += ((kept + 1) / max(there.size, 1)).tolist()
        parts["requests"] += [there.size] * kept.size
        thinned = thinned or kept.size < last.size
        notes.append(_without(label, every, metric))
    if thinned:
        notes.insert(0, f"up to {share_of_points:,} points a curve, the extremes among them")
    return frame_of(parts, notes, measure=metric, **_named(value=metric))


def _named(**measures: str) -> dict[str, dict[str, str]]:
    """What charts call the columns: title, unit and both as a heading."""
    known = {column: MEASURES[name] for column, name in measures.items()}
    return {
        "titles": {column: measure.title for column, measure in known.items()},
        "units": {column: measure.unit for column, measure in known.items()},
        "headings": {column: measure.heading for column, measure in known.items()},
    }


def _ranks(last: NDArray[np.int64], points: int) -> NDArray[np.int64]:
    """Up to `points` of the ranks, the first and the last among them, denser towards the end."""
    if last.size <= points:
        return last
    even = np.linspace(0, last.size - 1, points // 2)
    tail = last.size - np.geomspace(1, last.size, points - points // 2)
    return last[np.unique(np.concatenate([even, tail]).round().astype(np.int64))]


def _without(label: str, every: Floats, metric: str) -> str:
    missing = int((~np.isfinite(every)).sum())
    why = "rejected, or of one token" if metric == "tpot" else "rejected"
    return f"{label}: {missing:,} of {every.size:,} requests have none: {why}" if missing else ""


def where(runs: Mapping[str, Run | Result], slowest: float = 0.01) -> pd.DataFrame:
    """Where end-to-end latency went: `label`, `group`, `part` (queue, prefill, decode, preempted), `mean_ms` of the
    group's requests, `begin_ms` and `end_ms` of the part when all are laid end to end, `share` of the group's E2EL,
    `requests` in the group.

    Groups: all completed requests, and the `slowest` share of them by E2EL (rounded up; 0: left out).
    """
    rows: list[tuple[Any, ...]] = []
    for label, run in runs.items():
        e2el_s = latencies_s(run.requests)["e2el"]
        done = np.flatnonzero(np.isfinite(e2el_s))
        tail = done[np.argsort(e2el_s[done], kind="stable")[done.size - ceil(slowest * done.size) :]]
        groups = {"all requests": done} | ({f"the slowest {100 * slowest:g} %": tail} if slowest else {})
        parts_s = breakdown_s(run.requests)
        for group, members in groups.items():
            means_ms = {part: 1e3 * float(parts_s[part][members].sum()) / max(members.size, 1) for part in PARTS}
            whole_ms, end_ms = sum(means_ms.values()), 0.0
            for part, mean_ms in means_ms.items():
                begin_ms, end_ms = end_ms, end_ms + mean_ms
                share = mean_ms / whole_ms if whole_ms else None
                rows.append((label, group, part, mean_ms, begin_ms, end_ms, share, members.size))
    names = ("label", "group", "part", "mean_ms", "begin_ms", "end_ms", "share", "requests")
    counts = [f"{row[0]}: {row[-1]:,} requests" for row in rows if row[1:3] == ("all requests", "queue")]
    return frame_of({name: [row[at] for row in rows] for at, name in enumerate(names)}, ["; ".join(counts)])


def scatter(
    runs: Mapping[str, Run | Result], x: str = "arrival_s", y: str = "ttft", points: int = POINTS
) -> pd.DataFrame:
    """Two measures of every request: `label`, `id`, `x`, `y` (units of `MEASURES`), `prompt_tokens`, `output_tokens`.

    Of more than `points` requests, over all runs, these are kept: in each of many slices of equal length along x the
    request with the smallest and the one with the largest y, and of the others every k-th in the trace's order.
    """
    most = max(min(points, POINTS) // max(len(runs), 1), 4)
    parts: list[dict[str, Any]] = []
    notes, drawn, whole = [], 0, 0
    for label, run in runs.items():
        across, up = values(run, x), values(run, y)
        there = np.flatnonzero(np.isfinite(across) & np.isfinite(up))
        kept = there[_thinned(across[there], up[there], most)]
        facts = {name: run.requests[name][kept] for name in ("id", "prompt_tokens", "output_tokens")}
        parts.append({"label": np.full(kept.size, label, dtype=object), "x": across[kept], "y": up[kept], **facts})
        drawn, whole = drawn + kept.size, whole + there.size
        notes.append(_without(label, up, y))
    if drawn < whole:
        notes.insert(0, f"{drawn:,} of {whole:,} requests drawn, the extremes of each moment among them")
    names = ("label", "id", "x", "y", "prompt_tokens", "output_tokens")
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) if parts else [] for name in names}
    return frame_of(joined, notes, x=x, y=y, **_named(x=x, y=y))


def linked(runs: Mapping[str, Run | Result], points: int = POINTS) -> pd.DataFrame:
    """Requests with all that a page needs which no program serves: `label`, `id`, `name` (the id, and the run where
    there are several), the four instants in seconds, `ttft_ms`, `tpot_ms`, `e2el_ms`, `preempted_ms`, `prompt_tokens`,
    `output_tokens`, `replica`; thinned as `scatter` thins arrival and TTFT."""
    chosen = scatter(runs, "arrival_s", "ttft", points)
    parts = []
    for label, run in runs.items():
        rows = rows_of(run, chosen["id"][chosen["label"] == label].to_numpy())
        names = [f"{request} ({label})" if len(runs) > 1 else str(request) for request in run.requests["id"][rows]]
        facts = {
            name: run.requests[name][rows] for name in ("id", *INSTANTS, "prompt_tokens", "output_tokens", "replica")
        }
        latency_ms = {f"{name}_ms": values(run, name)[rows] for name in ("ttft", "tpot", "e2el", "preempted")}
        parts.append(
            {"label": np.full(rows.size, label, dtype=object), "name": np.array(names, dtype=object)}
            | facts
            | latency_ms
        )
    return frame_of({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, chosen.attrs["notes"])


def _thinned(across: Floats, up: Floats, most: int) -> NDArray[np.int64]:
    """Which at most `most` points stand for all."""
    if across.size <= most:
        return np.arange(across.size)
    slices = most // 4
    low, span = float(across.min()), float(np.ptp(across)) or 1.0
    place = np.minimum(((across - low) / span * slices).astype(np.int64), slices - 1)
    order = np.argsort(place, kind="stable")  # a moment where arrivals come in their order
    starts = np.flatnonzero(np.append(True, np.diff(place[order]) > 0))
    ordered = up[order]
    lowest = _first_of(ordered, np.minimum.reduceat(ordered, starts), starts)
    # the last of equal ones: the first of the reversed
    ends = np.append(starts[1:], order.size)
    highest = _first_of(ordered[::-1], np.maximum.reduceat(ordered, starts)[::-1], order.size - ends[::-1])
    kept = np.zeros(across.size, dtype=bool)
    kept[order[lowest]] = kept[order[order.size - 1 - highest]] = True
    others = np.flatnonzero(~kept)
    kept[others[:: ceil(others.size / max(most - (across.size - others.size), 1))]] = True
    return np.flatnonzero(kept)


def _first_of(column: Floats, wanted: Floats, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each slice of a column, from one start to the next, first has the value wanted of it."""
    found = np.flatnonzero(column == np.repeat(wanted, np.diff(np.append(starts, column.size))))
    owner = np.searchsorted(starts, found, side="right")
    return found[np.flatnonzero(np.append(True, np.diff(owner) > 0))]


@dataclass(frozen=True)
class Kpi:
    """A headline number of one run or two, in `unit`.

    `delta` = candidate - baseline, `relative` = delta / baseline; None where a number does not exist (or the baseline
    is 0). `better`: "lower", "higher", or None where neither is, as of latencies if one run answered fewer requests.
    `few`: why a percentile is doubtful, or empty.
    """

    key: str
    title: str
    unit: str
    baseline: float | None
    candidate: float | None
    delta: float | None
    relative: float | None
    better: str | None
    few: str


# summary key (a dot goes into a table), title, unit, factor, what is better
KPIS = (
    ("p50_ttft_ms", "TTFT, median", "ms", 1, "lower"),
    ("p99_ttft_ms", "TTFT, P99", "ms", 1, "lower"),
    ("p50_tpot_ms", "TPOT, median", "ms", 1, "lower"),
    ("p99_tpot_ms", "TPOT, P99", "ms", 1, "lower"),
    ("p50_e2el_ms", "E2EL, median", "ms", 1, "lower"),
    ("p99_e2el_ms", "E2EL, P99", "ms", 1, "lower"),
    ("slo_attainment", "SLO attainment", "%", 100, "higher"),
    ("request_throughput", "Throughput", "requests/s", 1, "higher"),
    ("output_throughput", "Output", "tokens/s", 1, "higher"),
    ("queue_ms.share_of_e2el", "Queue, of E2EL", "%", 100, "lower"),
    ("kv_cache_usage_perc.max", "KV cache usage, peak", "%", 100, None),
    ("num_preemptions", "Preemptions", "times", 1, "lower"),
    ("gpu_busy_frac", "GPU busy", "%", 100, None),
    ("cost_per_1m_output_tokens", "Cost of 1M output tokens", "$", 1, "lower"),
)


OF_THE_ANSWERED = [key for key, *_ in KPIS if key.endswith("_ms") or key == "queue_ms.share_of_e2el"]


def kpis(baseline: Run | Result, candidate: Run | Result | None = None) -> list[Kpi]:
    """The headline numbers of a run, or of two with their differences; those that no run has are left out."""
    sides = [summary_of(run) for run in (baseline, candidate) if run is not None]
    rows = []
    for key, title, unit, factor, better in KPIS:
        before, *after = [_number(summary, key, factor) for summary in sides]
        now = after[0] if after else None
        if before is None and now is None:
            continue
        delta = now - before if now is not None and before is not None else None
        relative = delta / before if delta is not None and before else None
        if key in OF_THE_ANSWERED and len({summary.get("failed") for summary in sides}) > 1:
            better = None
        few = next((text for text in (_few(summary, key) for summary in sides) if text), "")
        rows.append(Kpi(key, title, unit, before, now, delta, relative, better, few))
    return rows


def rejections(run: Run | Result) -> str:
    """How many requests were never answered, and why, in words; empty if all were."""
    summary = summary_of(run)
    sent, away = summary["num_prompts"], summary.get("turned_away", 0)
    parts = []
    if rejected := summary["failed"] - away:
        parts.append(f"{rejected:,} of {sent:,} requests are rejected: the KV cache of a replica cannot hold them")
    if away:
        parts.append(f"{away:,} of {sent:,} requests were turned away")
    return "; ".join([*parts, "latencies are those of the others"]) if parts else ""


def _number(summary: Mapping[str, Any], key: str, factor: float) -> float | None:
    name, _, inner = key.partition(".")
    value = summary.get(name)
    if inner:
        value = None if value is None else value.get(inner)
    return None if value is None else float(value) * factor


def _few(summary: Mapping[str, Any], key: str) -> str:
    percent, _, rest = key.partition("_")
    metric = rest.removesuffix("_ms")
    if not percent[1:].isdigit() or metric not in summary["samples"]:
        return ""
    have, need = int(summary["samples"][metric]), fewest_samples(int(percent[1:]))
    return f"{percent.upper()} from {have} requests; {need} are needed to bound it" if have < need else ""
