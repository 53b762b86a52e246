"""From rows as the file states them to requests that can be replayed: drop, truncate, link, sort. All counted.

Every row read is kept or dropped for exactly one reason, the first that applies: filters of the reader, then no prompt,
then no output (a failed request), then over the context. A turn whose parent was dropped waits for the nearest ancestor
that was kept, delays added up; without one it starts its session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.readers.rows import FloatArray, IntArray, Rows, listed

LISTS = ("ids", "session", "slo_class", "tenant", "model", "block_ids", "output_block_ids")
ARRAYS = ("line", "prompt_tokens", "output_tokens", "arrival_s", "delay_s", "priority", "slo_ttft_s", "slo_tpot_s",
          "deadline_s", "predicted_tokens")  # fmt: skip


MAX_SPAN_S = 1e10
UNIT_FIX = "give the unit of the times with --time-unit ms, us or ns, or correct them"
STREAM_ARRIVALS = 0  # its own random stream of the seed


@dataclass(frozen=True)
class Keeping:
    """What may stay: failed rows, and prompts longer than the model's context."""

    failed: str = "drop"
    over_context: str = "error"
    context_tokens: int | None = None


def settle(name: str, rows: Rows, keeping: Keeping) -> tuple[Rows, int, dict[str, int]]:
    """(rows to replay, rows read, rows dropped by reason)."""
    read = len(rows.line) + sum(rows.dropped.values())
    empty = rows.prompt_tokens == 0
    rows.drop(empty, "prompt tokens = 0")
    failed = rows.output_tokens == 0
    if keeping.failed == "drop":
        rows.drop(failed, "output tokens = 0")
    elif failed.any():
        rows.output_tokens = np.where(failed, 1, rows.output_tokens)
        if rows.format != "burstgpt":
            rows.notes.append(f"{int(failed.sum())} rows have no output tokens: kept as one-token requests")
    if keeping.context_tokens is not None:
        _over_context(name, rows, keeping)
    keep = np.ones(len(rows.line), dtype=bool)
    counted = dict(rows.dropped)
    for mask, reason in rows.drops:
        fresh = int((keep & mask).sum())
        keep &= ~mask
        if fresh:
            counted[reason] = counted.get(reason, 0) + fresh
    rows.drops = []
    for reason, count in counted.items():
        rows.notes.append(f"{count} of {read} rows dropped: {reason}")
    if not keep.any():
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in counted.items())
        raise ValueError(f"{name}: no requests left: all {read} rows were dropped ({reasons}){_way_out(counted, read)}")
    if not keep.all():
        _bridge(rows, keep)
        rows = take(rows, np.flatnonzero(keep))
    return rows, read, counted


def _way_out(counted: dict[str, int], read: int) -> str:
    return "; --failed keep replays them as one-token requests" if counted.get("output tokens = 0") else ""


def _over_context(name: str, rows: Rows, keeping: Keeping) -> None:
    limit = keeping.context_tokens
    assert limit is not None
    over = (rows.prompt_tokens + rows.output_tokens > limit) & (rows.prompt_tokens > 0)
    if keeping.failed == "drop":
        over &= rows.output_tokens > 0
    if not over.any():
        return
    at = np.flatnonzero(over)
    first = int(at[0])
    what = (
        f"{len(at)} requests are longer than the context of {limit} tokens (first: {rows.unit} {rows.line[first]}, "
        f"prompt {rows.prompt_tokens[first]} + output {rows.output_tokens[first]})"
    )
    if keeping.over_context == "error":
        raise ValueError(f"{name}: {what}; give --over-context drop or truncate, or a larger context")
    if keeping.over_context == "drop":
        rows.drop(over, f"longer than the context of {limit} tokens")
        return
    # The prompt is cut from its end, so leading prefix blocks stay what they were; an answer keeps at least one token.
    prompts = np.minimum(rows.prompt_tokens, limit - 1)
    outputs = np.minimum(rows.output_tokens, limit - prompts)
    rows.prompt_tokens = np.where(over, prompts, rows.prompt_tokens)
    rows.output_tokens = np.where(over, outputs, rows.output_tokens)
    if rows.block_ids is not None:
        for row in at:
            rows.block_ids[row] = rows.block_ids[row][: -(-int(prompts[row]) // rows.block_tokens)]
    if rows.output_block_ids is not None:
        for row in at:
            blocks = -(-int(prompts[row] + outputs[row]) // rows.block_tokens) - -(
                -int(prompts[row]) // rows.block_tokens
            )
            rows.output_block_ids[row] = rows.output_block_ids[row][: max(blocks, 0)]
    rows.notes.append(f"{what}: cut to fit")


def _bridge(rows: Rows, keep: NDArray[np.bool_]) -> None:
    """Let turns of dropped parents wait for the nearest kept ancestor."""
    if rows.parent is None:
        return
    parent, delay_s, arrival_s = rows.parent, rows.delay_s, rows.arrival_s
    assert delay_s is not None
    if arrival_s is None:  # sessions whose starts are drawn later: every later turn waits
        arrival_s = np.where(parent >= 0, np.nan, -np.inf)
    for row in np.flatnonzero(keep & (parent >= 0)):
        while parent[row] >= 0 and not keep[parent[row]]:
            lost = int(parent[row])
            if np.isnan(arrival_s[row]):
                if np.isnan(arrival_s[lost]):
                    delay_s[row] += delay_s[lost]
                else:
                    arrival_s[row] = arrival_s[lost] + delay_s[row]
            parent[row] = parent[lost]


def take(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """The rows in `order`; parents are renumbered, a parent left out becomes none."""
    for name in ARRAYS:
        column = getattr(rows, name)
        if column is not None:
            setattr(rows, name, column[order])
    indexes: Sequence[int] = order.tolist()
    for name in LISTS:
        column = getattr(rows, name)
        if column is not None:
            setattr(rows, name, [column[i] for i in indexes])
    if rows.parent is not None:
        rows.parent = renumbered(rows.parent, order)
    return rows


def renumbered(parent: IntArray, order: NDArray[np.int64]) -> IntArray:
    place = np.full(len(parent) + 1, -1, dtype=np.int64)
    place[order] = np.arange(len(order))
    return np.asarray(place[parent[order]])


def check_times(name: str, arrival_s: FloatArray, delay_s: FloatArray | None, fix: str = UNIT_FIX) -> None:
    """Centuries are a mistaken unit, and a double would no longer resolve their microseconds; `fix`: of arrivals that
    are not the file's own."""
    for what, seconds, way_out in (("arrivals span", arrival_s, fix), ("a turn waits", delay_s, UNIT_FIX)):
        longest_s = np.nan_to_num(seconds, nan=0.0).max(initial=0.0) if seconds is not None else 0.0
        if longest_s > MAX_SPAN_S:
            raise ValueError(f"{name}: {what} {longest_s:.4g} s, more than {MAX_SPAN_S:.0e} s (300 years): {way_out}")


def session_starts(arrival_s: FloatArray, parent: IntArray | None) -> FloatArray:
    """Arrival of each request or, for one that waits, of the ancestor its session started with."""
    if parent is None or not np.isnan(arrival_s).any():
        return arrival_s
    up = np.where(np.isnan(arrival_s), parent, np.arange(len(parent)))
    for _ in range(max(1, len(parent).bit_length())):
        up = up[up]
    return np.asarray(arrival_s[up])


def regenerate_arrivals(rows: Rows, rate: float | None, seed: int) -> None:
    """Arrivals for a file that has none: a renewal process at the given rate, else everything at time 0."""
    starts = np.ones(len(rows.line), dtype=bool) if rows.parent is None else rows.parent < 0
    what = "sessions" if rows.parent is not None else "requests"
    rate = rows.rate if rate is None else rate
    rows.arrival_s = np.full(len(rows.line), np.nan)
    if rate is None or math.isinf(rate):
        rows.arrival_s[starts] = 0.0
        rows.notes.append(f"no arrival times: all {what} start at time 0; give --rate R for Poisson arrivals")
        return
    if not rate > 0:
        raise ValueError(f"rate={rate:g} must be above 0 requests/s")
    rng = np.random.default_rng([seed, STREAM_ARRIVALS])
    gaps_s = rng.gamma(rows.burstiness, 1.0 / (rate * rows.burstiness), size=int(starts.sum()))
    rows.arrival_s[starts] = np.cumsum(gaps_s) - gaps_s[0]
    process = "Poisson" if rows.burstiness == 1.0 else f"gamma (burstiness {rows.burstiness:g})"
    rows.notes.append(f"no arrival times: {process} arrivals of {what} at {rate:g}/s, seed {seed}")


def order_in_time(name: str, rows: Rows, strict_order: bool) -> Rows:
    """Stable sort by arrival; a waiting turn stands after its parent's session start, in file order."""
    assert rows.arrival_s is not None
    sent = rows.arrival_s[~np.isnan(rows.arrival_s)]
    back = np.flatnonzero(np.diff(sent) < 0)
    if len(back):
        stamped = rows.line[~np.isnan(rows.arrival_s)]
        first = [int(stamped[i + 1]) for i in back[:5]]
        if strict_order:
            raise ValueError(
                f"{name}: {len(back)} rows are earlier than the row before them ({rows.unit} {listed(first)}); sort "
                "the trace by arrival, or leave out --strict-order"
            )
        rows.notes.append(
            f"{len(back)} rows are earlier than the row before them (first: {rows.unit} {first[0]}): sorted"
        )
    starts = session_starts(rows.arrival_s, rows.parent)
    order = np.argsort(starts, kind="stable")
    if rows.parent is not None:
        order = parents_first(order, rows.parent)
    if (np.diff(order) != 1).any():
        rows = take(rows, order)
    assert rows.arrival_s is not None
    rows.arrival_s = rows.arrival_s - np.nanmin(rows.arrival_s)
    return rows


def parents_first(order: NDArray[np.int64], parent: IntArray) -> NDArray[np.int64]:
    """Move turns that a file lists before their parents behind them."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    if not ((parent >= 0) & (place[parent] > place)).any():
        return order
    depth = np.zeros(len(parent), dtype=np.int64)
    up: Any = parent.copy()
    while (up >= 0).any():
        depth += up >= 0
        up = np.where(up >= 0, parent[up], -1)
    roots = np.arange(len(parent))
    for _ in range(int(depth.max())):
        roots = np.where(parent[roots] >= 0, parent[roots], roots)
    return np.lexsort((np.arange(len(parent)), depth, place[roots]))
