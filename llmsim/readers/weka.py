"""Agent sessions: Weka / Claude Code traces (one JSON object a session), and their flattened form (one request a line).

Session: `id, block_size, hash_id_scope, requests[]`; request: `t` (s since session start), `in`, `out`, `hash_ids`
(64-token blocks), `api_time`, `think_time`; a `subagent` holds nested `requests` and joins before the next outer one.
Sessions start at zero, so their starts have to be generated. A turn waits for the one before, then for the recorded
think time (else the gap that the stamps leave after `api_time`); idle days are in the data: `max_wait_s` caps waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsim.readers.links import check_hash_counts
from llmsim.readers.rows import MAX_TOKENS, ReadOptions, Rows, bad_rows, listed
from llmsim.readers.table import Records, Table
from llmsim.readers.values import counts, missing_field, numbers, seconds_of

BLOCK_TOKENS = 64
LONG_WAIT_S = 3600.0


def fits(keys: set[str]) -> bool:
    return {"requests", "hash_id_scope"} <= keys


def fits_turns(keys: set[str]) -> bool:
    return {"session_id", "output_tokens"} <= keys and bool(keys & {"think_time_s", "pre_gap_s"})


def read(table: Records, options: ReadOptions) -> Rows:
    calls: list[dict[str, Any]] = []
    lines: list[int] = []
    parent: list[int] = []
    session: list[str] = []
    seen: dict[str, int] = {}
    sizes: set[int] = set()
    for place, (record, line) in enumerate(zip(table.records, table.lines.tolist(), strict=True)):
        name = str(record.get("id", place))
        if name in seen:
            raise ValueError(
                f"{table.name}: session id {name} appears on {table.unit}s {seen[name]} and {line}; rename one"
            )
        seen[name] = line
        size = record.get("block_size", BLOCK_TOKENS)
        if type(size) is not int or not 1 <= size <= MAX_TOKENS:
            expected = f"a whole number from 1 to {MAX_TOKENS}"
            raise bad_rows(table.name, [(line, size)], "block_size", expected, unit=table.unit)
        sizes.add(size)
        start = len(calls)
        _walk(table, line, record.get("requests"), -1, calls, parent)
        lines += [line] * (len(calls) - start)
        session += [name] * (len(calls) - start)
    if not calls:
        raise ValueError(f"{table.name}: {len(table)} sessions but no requests in them; nothing to replay")
    if len(sizes) != 1:
        raise ValueError(f"{table.name}: block_size must be the same in all sessions, found {listed(sorted(sizes))}")
    line = np.array(lines, dtype=np.int64)
    prompts = counts(table.name, "in", [call.get("in") for call in calls], line, text=False, unit=table.unit)
    outputs = counts(table.name, "out", [call.get("out") for call in calls], line, text=False, unit=table.unit)
    rows = Rows("weka", line, prompts, outputs, unit=table.unit, session=session)
    rows.ids = [str(row) for row in range(len(calls))]
    rows.parent = np.array(parent, dtype=np.int64)
    rows.delay_s = _waits_s(table, calls, parent, line)
    if all(isinstance(call.get("model"), str) for call in calls):
        rows.model = [call["model"] for call in calls]
    rows.block_tokens = options.block_tokens or sizes.pop()
    _blocks(table, rows, calls, options)
    _warn_long(rows, options)
    return rows


def _walk(table: Table, line: int, requests: Any, before: int, calls: list[dict[str, Any]], parent: list[int]) -> int:
    """Append the calls of a list in order, nested ones too; returns the last, which the next outer one waits for."""
    if not isinstance(requests, list) or not all(isinstance(one, dict) for one in requests):
        raise missing_field(table.name, "requests (a list of objects)", [line], table.unit)
    for request in requests:
        if request.get("type") == "subagent" or "requests" in request:
            before = _walk(table, line, request.get("requests"), before, calls, parent)
            continue
        calls.append(request)
        parent.append(before)
        before = len(calls) - 1
    return before


def _waits_s(table: Table, calls: list[dict[str, Any]], parent: list[int], line: Any) -> Any:
    waits: list[object] = []
    for call, before in zip(calls, parent, strict=True):
        wait: object = 0.0
        if before >= 0:
            wait = call.get("think_time")
            if wait is None:
                earlier = calls[before]
                parts = [seconds_of(value, text=False) for value in (call.get("t"), earlier.get("t"))]
                took = seconds_of(earlier.get("api_time", 0.0), text=False)
                if None not in parts and took is not None:
                    wait = max(0.0, float(parts[0] or 0) - float(parts[1] or 0) - took)
        waits.append(wait)
    return numbers(table.name, "think_time (or t)", waits, line, text=False, unit=table.unit)


def _blocks(table: Table, rows: Rows, calls: list[dict[str, Any]], options: ReadOptions) -> None:
    held = [call.get("hash_ids") for call in calls]
    if all(ids is None for ids in held):
        rows.block_tokens = 0
        return
    bad = [
        (int(rows.line[i]), ids)
        for i, ids in enumerate(held)
        if type(ids) is not list or not set(map(type, ids)) <= {int, str}
    ]
    if bad:
        raise bad_rows(table.name, bad, "hash_ids", "a list of whole numbers or strings", unit=table.unit)
    # Ids are local to their session: the session is part of the name.
    assert rows.session is not None
    blocks = [tuple((name, value) for value in ids or []) for name, ids in zip(rows.session, held, strict=True)]
    rows.block_ids = list(blocks)
    check_hash_counts(
        table, "hash_ids", rows.block_ids, rows.prompt_tokens, rows.block_tokens, options.block_tokens, rows.line
    )


def _warn_long(rows: Rows, options: ReadOptions) -> None:
    assert rows.delay_s is not None
    long = int((rows.delay_s > LONG_WAIT_S).sum())
    if long and options.max_wait_s is None:
        rows.notes.append(
            f"{long} turns wait more than an hour (longest {rows.delay_s.max():.0f} s); --max-wait S caps waits"
        )


def read_turns(table: Table, options: ReadOptions) -> Rows:
    """One request a line, in order within its session; the wait before it is `pre_gap_s` or the last `think_time_s`."""
    prompt = table.find("input_tokens", "input_len", "prompt_tokens")
    if prompt is None:
        raise ValueError(
            f"{table.name}: {table.unit} {table.lines[0]}: input_tokens missing (found {', '.join(table.names)})"
        )
    output = table.find("output_tokens") or "output_tokens"
    rows = Rows("agent-turns", table.lines, table.ints(prompt), table.ints(output), unit=table.unit)
    rows.session = table.texts(table.find("session_id") or "session_id")
    before, after = table.find("pre_gap_s"), table.find("think_time_s")
    waits_s = table.floats(before or after or "")
    rows.parent, rows.delay_s = np.full(len(table), -1), np.zeros(len(table))
    previous: dict[str, int] = {}
    for row, name in enumerate(rows.session):
        if name in previous:
            rows.parent[row] = previous[name]
            rows.delay_s[row] = waits_s[row] if before else waits_s[previous[name]]
        previous[name] = row
    rows.ids = [str(row) for row in range(len(table))]
    model = table.find("model", "model_id")
    if model:
        rows.model = table.texts(model)
    _warn_long(rows, options)
    return rows
