"""A run over simulated time: what an engine's dashboard would have shown, slice by slice.

    running, waiting       requests scheduled and not finished (those that are preempted included); sent and not yet
                           scheduled. Mean over the slice, from the requests' own times: the mean of `waiting` times
                           the run's length is the sum of all queue times. `_max`: the largest at any instant of it
    kv_usage               KV blocks in use / usable blocks of all replicas, mean over the slice; `kv_usage_max` the
                           largest of any replica. Blocks are those logged with a row of iterations, which holds while
                           the row has its GPU (`llmsim.utilisation.active_seconds`); an idle replica counts 0
    prompt_tokens_per_s    prompt tokens that prefill chunks computed: those found in a cache are none of them, those
                           computed again after a preemption count again. Evenly over the time of their iteration
    output_tokens_per_s    output tokens of requests that finished: the first one when the client saw it, the others as
                           the decodes of the iteration log are spread, so that they add up to the run's output tokens
    sent                   requests sent in the slice
    ttft_p50/p90/p99_ms    of the requests *sent* in `ttft_slices` consecutive slices together (`frame.attrs`), enough
                           that the median such stretch has the requests which a P90 needs, as far as the run has them;
                           nan where none was sent
    ttft_requests          how many requests those percentiles rest on

All slices are as long as each other (1, 2 or 5 times a power of ten seconds), and the same for all runs; the last one
ends with the last run, and is then shorter. A run has no rows after its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.metrics import fewest_samples, latencies_s
from llmsim.utilisation import active_seconds
from llmsim.views_base import POINTS, Floats, blocks_of, frame_of, replicas_of

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.metrics import Columns, Result
    from llmsim.runs import Run

PERCENTS = (50, 90, 99)


def strip(runs: Mapping[str, Run | Result], slices: int = 200) -> pd.DataFrame:
    """`label`, `time_s` (start of the slice), `end_s` and the columns above: at most `slices` rows a run."""
    edges_s = _edges(runs, min(slices, POINTS // max(len(runs), 1)))
    sent = [np.histogram(run.requests["arrival_s"], edges_s)[0] for run in runs.values()]
    together = _together(sent)
    parts = []
    for label, run in runs.items():
        columns = _columns(run, edges_s) | _ttft(run.requests, edges_s, together)
        there = edges_s[:-1] <= _end_s(run)
        names = np.full(int(there.sum()), label, dtype=object)
        parts.append({"label": names} | {name: column[there] for name, column in columns.items()})
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in (parts or [{}])[0]}
    width_s = float(edges_s[1] - edges_s[0])
    notes = [f"slices of {width_s:g} s; percentiles over {together * width_s:g} s"] if parts else []
    return frame_of(joined, notes, slice_s=width_s, ttft_slices=together)


def _together(sent: list[NDArray[np.int64]]) -> int:
    """How many slices to take together for a percentile: at least forty stretches stay."""
    slices = max((part.size for part in sent), default=1)
    enough = fewest_samples(90)
    for count in (1, 2, 5, 10, 20, 50, 100):
        sums = [np.add.reduceat(part, np.arange(0, part.size, count)) for part in sent]
        if count * 80 > slices or all(np.median(part[part > 0]) >= enough for part in sums if part.any()):
            return count
    return 100


def _end_s(run: Run | Result) -> float:
    times_s = np.concatenate([run.requests["finish_s"], run.requests["arrival_s"]])
    return float(np.nanmax(times_s)) if times_s.size else 0.0


def _edges(runs: Mapping[str, Run | Result], slices: int) -> Floats:
    """Where the slices begin, and the end of the last run."""
    times_s = [run.requests[name] for run in runs.values() for name in ("arrival_s", "finish_s")]
    there = [column[np.isfinite(column)] for column in times_s]
    low_s = min((float(column.min()) for column in there if column.size), default=0.0)
    high_s = max((float(column.max()) for column in there if column.size), default=0.0)
    if high_s <= low_s:
        return np.array([low_s, low_s + 1.0])
    width_s = nice((high_s - low_s) / slices)
    first_s = floor(low_s / width_s) * width_s
    if (high_s - first_s) / width_s > slices:  # beginning at a round number took one slice too many
        first_s = low_s
    count = max(1, ceil((high_s - first_s) / width_s - 1e-9))
    return np.append(first_s + width_s * np.arange(count), high_s)


def nice(seconds: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least this."""
    decade = 10.0 ** floor(log10(seconds))
    return next(step * decade for step in (1.0, 2.0, 5.0, 10.0) if step * decade >= seconds * (1 - 1e-12))


def _columns(run: Run | Result, edges_s: Floats) -> dict[str, NDArray[Any]]:
    requests, iterations = run.requests, run.iterations
    widths_s = np.diff(edges_s)
    done = np.isfinite(requests["finish_s"])
    sent_s, scheduled_s, finish_s = (requests[name][done] for name in ("arrival_s", "scheduled_s", "finish_s"))
    running, running_max = _under_way(scheduled_s, finish_s, edges_s)
    waiting, waiting_max = _under_way(sent_s, scheduled_s, edges_s)
    rows = _Rows(iterations)
    usable = blocks_of(run)
    firsts = np.histogram(requests["first_token_s"][done], edges_s)[0]
    rest = float((requests["output_tokens"][done] - 1).sum())
    decodes = rows.spread((iterations["seqs"] * iterations["iterations"]).astype(np.float64), edges_s)
    if decodes.sum():
        decodes *= rest / decodes.sum()
    return {
        "time_s": edges_s[:-1],
        "end_s": edges_s[1:],
        "running": running,
        "running_max": running_max,
        "waiting": waiting,
        "waiting_max": waiting_max,
        "kv_usage": rows.spread(rows.active_s * iterations["kv_blocks"], edges_s)
        / (widths_s * usable * replicas_of(run)),
        "kv_usage_max": rows.highest(iterations["kv_blocks"], edges_s) / usable,
        "prompt_tokens_per_s": rows.spread(iterations["prefill_tokens"].astype(np.float64), edges_s) / widths_s,
        "output_tokens_per_s": (firsts + decodes) / widths_s,
    }


def _under_way(begin_s: Floats, end_s: Floats, edges_s: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """(mean, largest) number of intervals [begin, end) under way in each slice."""
    begins, ends = np.sort(begin_s), np.sort(end_s)
    # Seconds lived up to t by all that began = sum(t - begin) over those that began, less the same for the ends.
    lived_s = _age(begins, edges_s) - _age(ends, edges_s)
    times_s = np.concatenate([ends, begins])  # at a tie the end comes first
    order = np.argsort(times_s, kind="stable")
    number = np.cumsum(np.repeat([-1, 1], begins.size)[order])
    mean = np.maximum(np.diff(lived_s) / np.diff(edges_s), 0.0)  # a rounding below 0 is 0
    # The level at the slice's beginning, then after each event inside it.
    first = np.searchsorted(times_s[order], edges_s[:-1], side="right")
    last = np.searchsorted(times_s[order], edges_s[1:], side="left")
    padded = np.concatenate([[0], number, [0]])
    bounds = np.stack([first, np.maximum(last, first) + 1], axis=1).ravel()
    return mean, np.maximum.reduceat(padded, bounds)[::2]


def _age(sorted_s: Floats, at_s: Floats) -> Floats:
    count = np.searchsorted(sorted_s, at_s, side="right")
    sums = np.concatenate([[0.0], np.cumsum(sorted_s - sorted_s[0])]) if sorted_s.size else np.zeros(1)
    first = sorted_s[0] if sorted_s.size else 0.0
    return count * (at_s - first) - sums[count]  # from the first one on: sums of large times would cancel


class _Rows:
    """When each row of the iteration log had its GPU, so that what it did can be spread over slices."""

    def __init__(self, iterations: Columns) -> None:
        self.active_s = active_seconds(iterations)
        self.end_s = iterations["gpu_end_s"]
        self.replica = iterations["replica"]
        order = np.lexsort((self.end_s, self.replica))
        ordered = self.replica[order]
        bounds = np.flatnonzero(np.append(True, np.diff(ordered) != 0)) if order.size else np.zeros(0, dtype=np.int64)
        self.by_replica = np.split(order, bounds[1:])

    def spread(self, amounts: Floats, edges_s: Floats) -> Floats:
        """How much of the rows' amounts falls into each slice, each evenly over its row's time."""
        total = np.zeros(edges_s.size)
        for rows in self.by_replica:
            ends_s, active_s = self.end_s[rows], self.active_s[rows]
            upto = np.concatenate([[0.0], np.cumsum(amounts[rows])])
            whole = np.searchsorted(ends_s, edges_s, side="right")  # rows that ended by then
            total += upto[whole]
            cut = np.minimum(whole, max(rows.size - 1, 0))
            if rows.size:
                length_s = np.where(active_s[cut] > 0.0, active_s[cut], 1.0)
                part = np.clip((edges_s - (ends_s[cut] - active_s[cut])) / length_s, 0.0, 1.0)
                total += np.where(whole < rows.size, part * amounts[rows][cut], 0.0)
        return np.diff(total)

    def highest(self, level: NDArray[Any], edges_s: Floats) -> Floats:
        """The largest level of any replica in each slice; 0 where none had a row."""
        most = np.zeros(edges_s.size - 1)
        for rows in self.by_replica:
            if not rows.size:
                continue
            ends_s = self.end_s[rows]
            begins_s = ends_s - self.active_s[rows]
            first = np.searchsorted(ends_s, edges_s[:-1], side="right")
            stop = np.searchsorted(begins_s, edges_s[1:], side="left")
            there = stop > first
            bounds = np.stack([first[there], stop[there]], axis=1).ravel()
            padded = np.append(level[rows], 0)
            if bounds.size:
                most[there] = np.maximum(most[there], np.maximum.reduceat(padded, bounds)[::2])
        return most


def _ttft(requests: Columns, edges_s: Floats, together: int) -> dict[str, NDArray[Any]]:
    ttft_ms = 1e3 * latencies_s(requests)["ttft"]
    done = np.flatnonzero(np.isfinite(ttft_ms))
    order = done[np.argsort(requests["arrival_s"][done], kind="stable")]
    bounds = np.searchsorted(requests["arrival_s"][order], edges_s[together:-1:together], side="left")
    groups = np.split(ttft_ms[order], bounds)
    rows = [np.percentile(group, PERCENTS) if group.size else np.full(len(PERCENTS), np.nan) for group in groups]
    slices = np.arange(edges_s.size - 1) // together
    found = {f"ttft_p{percent}_ms": np.array(rows)[slices, at] for at, percent in enumerate(PERCENTS)}
    counts = np.array([group.size for group in groups])[slices]
    return {"sent": np.histogram(requests["arrival_s"], edges_s)[0], "ttft_requests": counts} | found
