"""Single requests of a run: which ones, their phases for a Gantt chart, and the life of one.

Phases are those of the columns: queue [arrival_s, scheduled_s), prefill [scheduled_s, first_token_s) and decode
[first_token_s, finish_s). Where in prefill or decode a preempted request stood still is not among the columns; how
long it did is in `preempted_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmsim.views_base import PARTS, Floats, Ints, frame_of, values

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.metrics import Result
    from llmsim.runs import Run

ROWS = 500  # of a Gantt chart
INSTANTS = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
PHASES = ("queue", "prefill", "decode")


def within(run: Run | Result, bounds: Mapping[str, Sequence[float]]) -> Ints:
    """Ids of all requests whose measures lie in the bounds, e.g. {"arrival_s": (10, 20), "ttft": (500, 900)} in the
    units of `MEASURES`: what a brush over a chart selects, also among the requests that the chart left out."""
    inside = np.ones(len(run.requests["id"]), dtype=bool)
    for measure, (low, high) in bounds.items():
        found = values(run, measure)
        inside &= (found >= min(low, high)) & (found <= max(low, high))  # False for nan
    ids: Ints = run.requests["id"][inside]
    return ids


def subset(run: Run | Result, ids: Sequence[int] | NDArray[np.int64]) -> Run | Result:
    """The run with these requests only, for `ecdf` and `where`; its iterations stay those of all."""
    return _at(run, rows_of(run, ids))


def _at(run: Run | Result, rows: NDArray[np.intp]) -> Run | Result:
    return replace(run, requests={name: column[rows] for name, column in run.requests.items()})


def window_s(run: Run | Result, ids: Sequence[int] | NDArray[np.int64]) -> tuple[float, float]:
    """From when the first of these requests was sent to when the last one ended (or was sent, if none was answered)."""
    rows = rows_of(run, ids)
    if not rows.size:
        raise ValueError("no request is selected: draw a larger rectangle")
    sent_s, ends_s = run.requests["arrival_s"][rows], run.requests["finish_s"][rows]
    last_s = float(np.nanmax(np.concatenate([sent_s, ends_s])))
    return float(sent_s.min()), float(np.nextafter(last_s, np.inf))


def table(
    run: Run | Result, ids: Sequence[int] | NDArray[np.int64] | None = None, by: str = "e2el", rows: int | None = 2000
) -> pd.DataFrame:
    """A row a request, the largest `by` first (where there is none: last): `id`, `arrival_s`, tokens, the latencies and
    their parts in ms, `preemptions`, `replica`. `rows`: at most so many; None: all."""
    which = np.arange(len(run.requests["id"])) if ids is None else rows_of(run, ids)
    order = which[_largest(values(run, by)[which], which.size if rows is None else rows)]
    some = _at(run, order)
    columns = {name: some.requests[name] for name in ("id", "arrival_s", "prompt_tokens", "output_tokens")}
    columns |= {f"{name}_ms": values(some, name) for name in ("ttft", "tpot", "e2el", *PARTS)}
    columns |= {name: some.requests[name] for name in ("cached_tokens", "preemptions", "replica")}
    notes = [f"the {order.size:,} of {which.size:,} requests with the largest {by.upper()}"] * (order.size < which.size)
    return frame_of(columns, notes, by=by)


def gantt(
    run: Run | Result, ids: Sequence[int] | NDArray[np.int64] | None = None, worst: str = "e2el", rows: int = 40
) -> pd.DataFrame:
    """Phases of requests, a row each: `id`, `phase`, `begin_s`, `end_s`, `place` (0 for the request sent first), and of
    the request `ttft_ms`, `tpot_ms`, `e2el_ms`, `preempted_ms`, `prompt_tokens`, `output_tokens`, `replica`.

    `ids`: which requests (all if None); of more than `rows` (at most 500) those with the largest `worst`. A rejected
    request has no phases. Raises ValueError for an id that the run does not have.
    """
    limit = min(rows, ROWS)
    which = np.arange(len(run.requests["id"])) if ids is None else rows_of(run, ids)
    measured = values(run, worst)[which]
    done = which[np.isfinite(measured)]
    slowest = done[_largest(measured[np.isfinite(measured)], limit)]
    chosen = slowest[np.argsort(run.requests["arrival_s"][slowest], kind="stable")]
    notes = [f"the {chosen.size:,} of {done.size:,} requests with the largest {worst.upper()}"] * (
        chosen.size < done.size
    )
    return frame_of(_segments(run, chosen), notes, worst=worst)


def life(run: Run | Result, request_id: int) -> pd.DataFrame:
    """The phases of one request in order: as `gantt`, and `duration_ms`, `share` of its E2EL, `reason` in words."""
    frame = gantt(run, [request_id], rows=1)
    if not len(frame):
        raise ValueError(f"request {request_id} was rejected: it has no phases; choose one that was answered")
    duration_ms = 1e3 * (frame["end_s"] - frame["begin_s"])
    whole_ms = float(frame["e2el_ms"].iloc[0])
    frame["duration_ms"], frame["share"] = duration_ms, duration_ms / whole_ms if whole_ms else 0.0
    reasons = _reasons(run, int(rows_of(run, [request_id])[0]))
    frame["reason"] = [reasons[phase] for phase in frame["phase"]]
    return frame


def rows_of(run: Run | Result, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.intp]:
    """Where these requests stand among the run's, in the order of their ids; each once."""
    wanted, known = np.asarray(ids, dtype=np.int64), run.requests["id"]
    if not _rising(wanted):  # sorting a million ids that are sorted takes a third of a second
        wanted = np.unique(wanted)
    order = np.arange(known.size) if _rising(known) else np.argsort(known, kind="stable")
    ordered = known[order]
    places = np.searchsorted(ordered, wanted)
    there = places < known.size
    there[there] = ordered[places[there]] == wanted[there]
    if not there.all():
        raise ValueError(
            f"request {wanted[~there][0]}: the run has none of this id; ids are 0 to {known.max(initial=0)}"
        )
    rows: NDArray[np.intp] = order[places]
    return rows


def _rising(ids: Ints) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def _largest(measured: Floats, most: int) -> NDArray[np.intp]:
    """Where the `most` largest stand, the largest first, equal ones in their order, nan last.

    Only those that can be among them are sorted: of a million 0.01 s instead of 0.1 s.
    """
    candidates = np.arange(measured.size)
    if 0 < most < measured.size:
        least = -np.partition(-measured, most - 1)[most - 1]
        if np.isfinite(least):  # nan: fewer are there than were asked for
            candidates = np.flatnonzero(measured >= least)
    return candidates[np.argsort(-measured[candidates], kind="stable")[:most]]


def _segments(run: Run | Result, chosen: NDArray[np.intp]) -> dict[str, NDArray[np.generic]]:
    requests, count = run.requests, chosen.size
    instants = np.stack([requests[name][chosen] for name in INSTANTS])  # phase, request
    some = _at(run, chosen)
    names = ("prompt_tokens", "output_tokens", "cached_tokens", "replica", "preemptions")
    facts: dict[str, NDArray[np.generic]] = {name: some.requests[name] for name in names}
    facts |= {f"{name}_ms": values(some, name) for name in ("ttft", "tpot", "e2el", "preempted")}
    columns: dict[str, NDArray[np.generic]] = {
        "id": np.repeat(requests["id"][chosen], len(PHASES)),
        "place": np.repeat(np.arange(count), len(PHASES)),
        "phase": np.tile(np.array(PHASES, dtype=object), count),
        "begin_s": instants[:-1].T.ravel(),
        "end_s": instants[1:].T.ravel(),
    }
    return columns | {name: np.repeat(column, len(PHASES)) for name, column in facts.items()}


def _reasons(run: Run | Result, row: int) -> dict[str, str]:
    """What was going on beside the request in each phase, from the requests of its replica."""
    requests = run.requests
    beside = (requests["replica"] == requests["replica"][row]) & np.isfinite(requests["finish_s"])
    beside[row] = False
    sent_s, scheduled_s, first_s, finish_s = (requests[name] for name in INSTANTS)
    ahead = int((beside & (sent_s < sent_s[row]) & (scheduled_s > sent_s[row])).sum())
    running = int((beside & (scheduled_s <= sent_s[row]) & (finish_s > sent_s[row])).sum())
    prefills = int((beside & (scheduled_s < first_s[row]) & (first_s > scheduled_s[row])).sum())
    decodes = int((beside & (first_s < finish_s[row]) & (finish_s > first_s[row])).sum())
    interrupted = int((beside & (first_s > first_s[row]) & (scheduled_s < finish_s[row])).sum())
    prompt, cached = int(requests["prompt_tokens"][row]), int(requests["cached_tokens"][row])
    found = f", {cached:,} of them found in the cache" if cached else ""
    times = int(requests["preemptions"][row])
    lost = f"; preempted {times} times, {requests['preempted_s'][row] * 1e3:,.0f} ms in all" if times else ""
    return {
        "queue": f"Queue: {ahead} requests waited ahead of it and {running} were running when it was sent",
        "prefill": f"Prefill: {prompt:,} prompt tokens{found}, beside {prefills} other prompts",
        "decode": f"Decode: {int(requests['output_tokens'][row]):,} tokens, beside {decodes} requests in all; "
        f"{interrupted} prompts were computed meanwhile{lost}",
    }
