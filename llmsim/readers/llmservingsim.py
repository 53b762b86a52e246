"""LLMServingSim workloads: flat requests and agentic sessions, with token ids.

Flat: `input_toks`, `output_toks`, `arrival_time_ns`, optionally `input_tok_ids` and `output_tok_ids`. Agentic:
`session_id`, `arrival_time_ns`, `sub_requests`; each call is followed by `tool_duration_ns`, which begins when the call
has finished (the last one has no effect). Both may share a file. Token ids become ids of 16-token blocks such that
equal ids mean equal text up to and including that block. Source: casys-kaist/LLMServingSim, workload format.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsim.readers.rows import ReadOptions, Rows, bad_rows
from llmsim.readers.table import Records
from llmsim.readers.values import counts, missing_field, numbers

BLOCK_TOKENS = 16


def fits(keys: set[str]) -> bool:
    return "sub_requests" in keys or {"arrival_time_ns", "input_toks"} <= keys


def read(table: Records, options: ReadOptions) -> Rows:
    calls, lines, parent, session = _flatten(table)
    line = np.array(lines, dtype=np.int64)

    def ints(field: str) -> Any:
        return counts(table.name, field, [call.get(field) for call in calls], line, text=False, unit=table.unit)

    rows = Rows("llmservingsim", line, ints("input_toks"), ints("output_toks"), unit=table.unit)
    first = [row for row, before in enumerate(parent) if before < 0]
    stamps = [calls[row].get("arrival_time_ns") for row in first]
    arrival_s = np.full(len(calls), np.nan)
    unit_s = options.unit_s("ns")
    at = numbers(table.name, "arrival_time_ns", stamps, line[first], text=False, unit=table.unit)
    arrival_s[first] = (at - at.min()) * unit_s
    rows.arrival_s = arrival_s
    if any(before >= 0 for before in parent) or any(session):
        rows.session = session
        rows.parent = np.array(parent, dtype=np.int64)
        waits = [0 if before < 0 else calls[before].get("tool_duration_ns", 0) for before in parent]
        rows.delay_s = numbers(table.name, "tool_duration_ns", waits, line, text=False, unit=table.unit) * unit_s
    if any("input_tok_ids" in call for call in calls):
        rows.block_tokens = options.block_tokens or BLOCK_TOKENS
        _blocks(table, rows, calls)
    return rows


def _flatten(table: Records) -> tuple[list[dict[str, Any]], list[int], list[int], list[str]]:
    calls: list[dict[str, Any]] = []
    lines: list[int] = []
    parent: list[int] = []
    session: list[str] = []
    seen: dict[str, int] = {}
    for record, line in zip(table.records, table.lines.tolist(), strict=True):
        where = f"{table.name}: {table.unit} {line}"
        if "sub_requests" not in record:
            calls.append(record)
            lines.append(line)
            parent.append(-1)
            session.append("")
            continue
        subs = record["sub_requests"]
        if not isinstance(subs, list) or not all(isinstance(sub, dict) for sub in subs):
            raise ValueError(f"{where}: sub_requests is not a list of objects; each needs input_toks and output_toks")
        if not subs:
            raise ValueError(f"{where}: sub_requests is empty; a session needs at least one call, or remove the line")
        if record.get("session_id") is None:
            raise missing_field(table.name, "session_id", [line], table.unit)
        name = str(record["session_id"])
        if name in seen:
            raise ValueError(f"{table.name}: session_id {name} appears on lines {seen[name]} and {line}; rename one")
        seen[name] = line
        for place, sub in enumerate(subs):
            calls.append(sub if place else {**sub, "arrival_time_ns": record.get("arrival_time_ns")})
            lines.append(line)
            parent.append(len(calls) - 2 if place else -1)
            session.append(name)
    return calls, lines, parent, session


def _blocks(table: Records, rows: Rows, calls: list[dict[str, Any]]) -> None:
    """Chained ids by interning (id of the block before, its tokens): exact, without hash collisions."""
    size = rows.block_tokens
    known: dict[tuple[Any, ...], int] = {}
    rows.block_ids, rows.output_block_ids = [], []
    bad: list[tuple[int, object]] = []
    without = 0
    for row, call in enumerate(calls):
        prompt, output = int(rows.prompt_tokens[row]), int(rows.output_tokens[row])
        ids, answer = call.get("input_tok_ids"), call.get("output_tok_ids") or []
        if ids is None:
            without += 1
            ids, answer = [("none", row)] * prompt, []
        for given, needed, field in ((ids, prompt, "input_toks"), (answer, output, "output_toks")):
            if not isinstance(given, list) or not set(map(type, given)) <= {int, tuple}:
                raise bad_rows(
                    table.name, [(int(rows.line[row]), given)], f"token ids of {field}", "a list of whole numbers",
                    unit=table.unit,
                )  # fmt: skip
            if given and len(given) != needed:
                bad.append((int(rows.line[row]), f"{len(given)} token ids for {field} {needed}"))
        if bad:
            continue
        stream = [*ids, *(answer or [("answer", row)] * output)]
        chain = -1
        chained = []
        for start in range(0, len(stream), size):
            chain = known.setdefault((chain, tuple(stream[start : start + size])), len(known))
            chained.append(chain)
        asked = -(-prompt // size)
        rows.block_ids.append(tuple(chained[:asked]))
        rows.output_block_ids.append(tuple(chained[asked:]))
    if bad:
        raise bad_rows(table.name, bad, "token ids", "as many ids as tokens", unit=table.unit)
    if without:
        rows.notes.append(f"{without} requests have no input_tok_ids: their prompts share nothing")
