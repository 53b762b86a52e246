"""Generic columns, in CSV, JSON lines or Parquet: the names other tools use, the first that matches wins.

This is also what llmsim writes; a written trace reads back with identical columns. A unit in the name of the arrival
column decides (``arrival_time_ms``); dates need none; else ``time_unit``, seconds by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from llmsim.readers.links import check_unique, fitting_sizes, forked_ids, link_parents
from llmsim.readers.rows import UNITS_S, Blocks, FloatArray, IntArray, ReadOptions, Rows, bad_rows, shown
from llmsim.readers.table import Table

ARRIVAL = (
    "arrival_time_s", "arrival_time_ms", "arrival_time_us", "arrival_time_ns",
    "arrival_s", "arrival_ms", "arrival_us", "arrival_ns",
    "timestamp_s", "timestamp_ms", "timestamp_us", "timestamp_ns",
    "arrival", "arrival_time", "arrived_at", "timestamp", "time", "start_time",
)  # fmt: skip
PROMPT = ("prompt_tokens", "input_tokens", "input_length", "input_len", "input_toks", "num_prefill_tokens",
          "prompt_len", "isl", "ContextTokens")  # fmt: skip
OUTPUT = ("output_tokens", "completion_tokens", "generated_tokens", "output_length", "output_len", "output_toks",
          "num_decode_tokens", "osl", "GeneratedTokens")  # fmt: skip
OPTIONAL = ("request_id", "session_id", "turn", "parent_id", "delay_s", "priority", "slo_class", "slo_ttft_ms",
            "slo_tpot_ms", "deadline_s", "predicted_tokens", "model", "tenant", "prefix_id", "prefix_tokens",
            "hash_ids", "output_hash_ids", "block_tokens")  # fmt: skip
MAX_WHOLE = 2.0**53  # above this a double skips whole numbers
PREFIX_BLOCK_TOKENS = 16  # for prefix_id + prefix_tokens: vLLM's block, so no shared token is lost to rounding there
KNOWN = (
    "Known: azure (TIMESTAMP, ContextTokens, GeneratedTokens), burstgpt (Timestamp, Request tokens, Response tokens), "
    "vidur (arrived_at, num_prefill_tokens, num_decode_tokens), splitwise (arrival_timestamp, prompt_size, token_size),"
    " blis (arrival_time_us, input_tokens, output_tokens), mooncake (timestamp, input_length, output_length), "
    "qwen-bailian (chat_id, parent_chat_id), llmservingsim (input_toks, output_toks, arrival_time_ns), sharegpt "
    "(conversations), generic (arrival_time_s, prompt_tokens, output_tokens)"
)


def read(table: Table, options: ReadOptions) -> Rows:
    mapping = options.columns or {}
    arrival, prompt, output = _main_columns(table, mapping)
    rows = Rows("generic", table.lines, table.ints(prompt), table.ints(output), unit=table.unit)
    used = {prompt, output}
    sessions = _optional(table, mapping)
    used |= set(sessions.values())
    if arrival is not None:
        used.add(arrival)
    _arrivals(table, rows, arrival, sessions, options)
    _plain_columns(table, rows, sessions)
    _sharing(table, rows, sessions, options)
    guessed = f"columns: arrival={arrival or 'none'}, prompt={prompt}, output={output}"
    extra = [f"{kind}={name}" for kind, name in sessions.items()]
    rows.notes.insert(0, guessed + (", " + ", ".join(extra) if extra else ""))
    unknown = [name for name in table.names if name not in used and name]
    if unknown:
        rows.notes.append(f"columns not used: {', '.join(unknown[:12])}{' ...' if len(unknown) > 12 else ''}")
    return rows


def _main_columns(table: Table, mapping: Mapping[str, str]) -> tuple[str | None, str, str]:
    found: dict[str, str | None] = {}
    for kind, aliases in (("arrival", ARRIVAL), ("prompt", PROMPT), ("output", OUTPUT)):
        wanted = mapping.get(kind)
        found[kind] = table.find(wanted) if wanted else table.find(*aliases)
        if wanted and found[kind] is None:
            raise ValueError(
                f"{table.name}: --columns {kind}={wanted}: there is no column {wanted}; found {', '.join(table.names)}"
            )
    names = ", ".join(table.names[:12])
    if not any(found.values()):
        raise ValueError(
            f"{table.name}: cannot tell the format: columns {names} match no known trace. {KNOWN}; or map columns with "
            "--columns arrival=...,prompt=...,output=..."
        )
    if found["prompt"] is None or found["output"] is None:
        lacking = "prompt" if found["prompt"] is None else "output"
        usual = PROMPT if lacking == "prompt" else OUTPUT
        raise ValueError(
            f"{table.name}: {table.unit} {table.lines[0]}: {usual[0]} missing: looks like a generic trace without a "
            f"column of {lacking} tokens (found {names}); call it {usual[0]}, {usual[1]} or {usual[2]}, or give "
            f"--columns {lacking}=NAME"
        )
    return found["arrival"], found["prompt"], found["output"]


def _optional(table: Table, mapping: Mapping[str, str]) -> dict[str, str]:
    known = {"arrival", "prompt", "output", *OPTIONAL}
    for kind in mapping:
        if kind not in known:
            near = [name for name in sorted(known) if kind.casefold() in name] or get_close_matches(kind, known, n=1)
            meant = f": did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--columns {kind}={mapping[kind]}: {kind} is not one of {', '.join(sorted(known))}{meant}"
            )
    columns = {}
    for kind in OPTIONAL:
        name = table.find(mapping.get(kind, kind))
        if name is None and kind in mapping:
            raise ValueError(f"{table.name}: --columns {kind}={mapping[kind]}: there is no such column")
        if name is not None:
            columns[kind] = name
    return columns


def _arrivals(table: Table, rows: Rows, arrival: str | None, columns: dict[str, str], options: ReadOptions) -> None:
    if arrival is None:
        return
    suffix = arrival.casefold().rsplit("_", 1)[-1]
    named = suffix if suffix in UNITS_S and "_" in arrival else None
    unit_s = UNITS_S[named] if named and options.time_unit is None else options.unit_s("s")
    waits = np.zeros(len(table), dtype=bool)
    if "parent_id" in columns or ("session_id" in columns and "delay_s" in columns):
        waits = np.array(
            [value is None or (isinstance(value, str) and not value.strip()) for value in table.raw(arrival)]
        )
    if not waits.any():
        dated = table.is_dated(arrival)
        rows.arrival_s = table.times(arrival, unit_s)
        rows.time_unit = None if named or dated else options.time_unit or "s"
        return
    stamped = table.where(~waits)
    rows.arrival_s = np.full(len(table), np.nan)
    if len(stamped):
        rows.arrival_s[~waits] = stamped.times(arrival, unit_s)
    rows.time_unit = None if named else options.time_unit or "s"


def _plain_columns(table: Table, rows: Rows, columns: dict[str, str]) -> None:
    for kind, field in (
        ("session_id", "session"),
        ("slo_class", "slo_class"),
        ("tenant", "tenant"),
        ("model", "model"),
    ):
        if kind in columns:
            setattr(rows, field, table.texts(columns[kind]))
    for kind, field in (("slo_ttft_ms", "slo_ttft_s"), ("slo_tpot_ms", "slo_tpot_s")):
        if kind in columns:
            setattr(rows, field, _sparse(table, columns[kind]) * 1e-3)
    if "deadline_s" in columns:
        rows.deadline_s = _sparse(table, columns["deadline_s"])
    if "predicted_tokens" in columns:
        rows.predicted_tokens = _sparse(table, columns["predicted_tokens"])
    if "priority" in columns:
        rows.priority = _whole(table, columns["priority"], table.floats(columns["priority"], negative=True))
    if "request_id" in columns:
        rows.ids = table.texts(columns["request_id"])
    if "parent_id" in columns:
        _parents(table, rows, columns)
    elif "session_id" in columns and "delay_s" in columns:
        _sessions(table, rows, columns)
    elif rows.ids is not None:
        check_unique(table, columns["request_id"], rows.ids)


def _sparse(table: Table, column: str) -> FloatArray:
    """Numbers where given, nan where the field is empty."""
    empty = np.array([value is None or (isinstance(value, str) and not value.strip()) for value in table.raw(column)])
    if not empty.any():
        return table.floats(column)
    filled = np.full(len(table), np.nan)
    if not empty.all():
        filled[~empty] = table.where(~empty).floats(column)
    return filled


def _whole(table: Table, column: str, values: FloatArray) -> IntArray:
    """Numbers that must be whole, and small enough to be exact."""
    odd = np.flatnonzero((values % 1 != 0) | (abs(values) > MAX_WHOLE))
    bad = [(int(table.lines[i]), float(values[i])) for i in odd]
    if bad:
        raise bad_rows(table.name, bad, column, f"a whole number of at most {MAX_WHOLE:.0f}", unit=table.unit)
    return values.astype(np.int64)


def _parents(table: Table, rows: Rows, columns: dict[str, str]) -> None:
    if rows.ids is None:
        raise ValueError(f"{table.name}: {columns['parent_id']} needs a column request_id to refer to; add one")
    named = [text or None for text in table.texts(columns["parent_id"])]
    rows.parent, notes = link_parents(table, rows.ids, named, columns["request_id"], columns["parent_id"])
    rows.notes += notes
    rows.delay_s = np.nan_to_num(_sparse(table, columns["delay_s"])) if "delay_s" in columns else np.zeros(len(table))
    if rows.arrival_s is None:
        rows.arrival_s = np.where(rows.parent >= 0, np.nan, 0.0)
    orphaned = np.isnan(rows.arrival_s) & (rows.parent < 0)
    if orphaned.any():
        bad = [(int(table.lines[i]), "") for i in np.flatnonzero(orphaned)]
        raise bad_rows(table.name, bad, "arrival", "a time, and the row has no parent to wait for", unit=table.unit)


def _sessions(table: Table, rows: Rows, columns: dict[str, str]) -> None:
    """Turns of a session in file order; a turn without a stamp waits delay_s after the one before."""
    waits_s = _sparse(table, columns["delay_s"])
    rows.parent, rows.delay_s = np.full(len(table), -1), np.nan_to_num(waits_s)
    if rows.arrival_s is None:
        rows.arrival_s = np.full(len(table), np.nan)
    previous: dict[str, int] = {}
    unstamped = 0
    for row, name in enumerate(rows.session or []):
        if name and name in previous:
            rows.parent[row] = previous[name]
        elif np.isnan(rows.arrival_s[row]):
            rows.arrival_s[row], unstamped = 0.0, unstamped + 1
        previous[name] = row
    if unstamped:
        rows.notes.append(f"{unstamped} sessions have no arrival time: they start at time 0")


def _sharing(table: Table, rows: Rows, columns: dict[str, str], options: ReadOptions) -> None:
    if "hash_ids" in columns:
        rows.block_ids = _id_lists(table, columns["hash_ids"])
        rows.block_tokens = _block_tokens(table, rows, columns, options)
        if "output_hash_ids" in columns:
            rows.output_block_ids = _id_lists(table, columns["output_hash_ids"])
        rows.notes += forked_ids(table, rows.block_ids)
    elif "prefix_id" in columns or "prefix_tokens" in columns:
        if not {"prefix_id", "prefix_tokens"} <= set(columns):
            lacking = "prefix_tokens" if "prefix_id" in columns else "prefix_id"
            raise ValueError(f"{table.name}: column {lacking} is missing: prefix_id and prefix_tokens go together")
        rows.block_tokens = options.block_tokens or PREFIX_BLOCK_TOKENS
        _shared_prefixes(table, rows, columns)


def _id_lists(table: Table, column: str) -> Blocks:
    parsed: Blocks = []
    bad = []
    for row, value in enumerate(table.raw(column)):
        ids = value
        if isinstance(value, str):
            ids = _split_ids(value)
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int, str}:
            bad.append((int(table.lines[row]), value))
            continue
        parsed.append(tuple(ids))
    if bad:
        raise bad_rows(table.name, bad, column, "a JSON list of ids, or ids separated by ;", unit=table.unit)
    return parsed


def _split_ids(text: str) -> list[Any] | None:
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            value = json.loads(stripped)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, list) else None
    if not stripped:
        return []
    to_id: Callable[[str], Any] = int if stripped.replace(";", "").replace("-", "").isdecimal() else str
    try:
        return [to_id(part) for part in stripped.split(";")]
    except ValueError:
        return list(stripped.split(";"))


def _block_tokens(table: Table, rows: Rows, columns: dict[str, str], options: ReadOptions) -> int:
    from llmsim.readers.links import check_hash_counts

    assert rows.block_ids is not None
    stated = options.block_tokens
    if "block_tokens" in columns:
        sizes = np.unique(table.ints(columns["block_tokens"]))
        if len(sizes) != 1 or sizes[0] < 1:
            raise ValueError(
                f"{table.name}: column block_tokens holds {shown(sizes.tolist())}; a trace has one block size"
            )
        stated = stated or int(sizes[0])
    if stated is None:
        fitting = fitting_sizes(rows.block_ids, rows.prompt_tokens)
        if len(fitting) != 1:
            found = f"sizes {fitting} all fit" if fitting else "no usual size fits the number of ids on every row"
            raise ValueError(f"{table.name}: hash_ids: the block size is unknown ({found}); give --block-tokens N")
        stated = fitting[0]
        rows.notes.append(
            f"hash_ids: block size {stated} tokens, the only one that fits the number of ids on every row"
        )
    check_hash_counts(table, columns["hash_ids"], rows.block_ids, rows.prompt_tokens, stated, stated)
    return stated


def _shared_prefixes(table: Table, rows: Rows, columns: dict[str, str]) -> None:
    """The first prefix_tokens of all rows with one prefix_id are the same text: whole blocks of it are shared."""
    names = table.texts(columns["prefix_id"])
    given = np.nan_to_num(_sparse(table, columns["prefix_tokens"]))
    lengths = _whole(table, columns["prefix_tokens"], given)
    over = np.flatnonzero(lengths > rows.prompt_tokens)
    if len(over):
        bad = [(int(table.lines[row]), int(lengths[row])) for row in over]
        raise bad_rows(
            table.name,
            bad,
            columns["prefix_tokens"],
            f"at most the prompt ({rows.prompt_tokens[over[0]]})",
            unit=table.unit,
        )
    rows.block_ids = prefix_blocks(names, lengths.tolist(), rows.prompt_tokens.tolist(), rows.block_tokens)


def prefix_blocks(names: list[str], prefix_tokens: list[int], prompt_tokens: list[int], block_tokens: int) -> Blocks:
    """Block ids of prompts that begin with a named prefix; every id not shared is given once only."""
    shared: dict[str, list[int]] = {}
    fresh = 0
    blocks: Blocks = []
    for name, prefix, prompt in zip(names, prefix_tokens, prompt_tokens, strict=True):
        whole, total = (prefix // block_tokens if name else 0), -(-prompt // block_tokens)
        known = shared.setdefault(name, []) if name else []
        if len(known) < whole:
            missing = whole - len(known)
            known.extend(range(fresh, fresh + missing))
            fresh += missing
        blocks.append((*known[:whole], *range(fresh, fresh + total - whole)))
        fresh += total - whole
    return blocks
