"""Mooncake JSON lines, and the superset AIPerf, Dynamo, SGLang and GuideLLM read and write.

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one per 512-token block]}

Each id stands for one block, ceil(input_length / 512) of them (all published rows obey this; GuideLLM enforces it).
AIPerf adds `session_id` and `delay` (ms after the previous turn of the session has finished), and prompts given as
text, which need a tokenizer. Source: kvcache-ai/Mooncake, FAST'25 release; AIPerf documentation of trace replay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsim.readers.links import block_ids_of, forked_ids
from llmsim.readers.rows import Blocks, FloatArray, IntArray, ReadOptions, Rows, bad_rows
from llmsim.readers.table import Records
from llmsim.readers.values import missing_field, seconds_of

BLOCK_TOKENS = 512
GRID_S = 3.0  # published Mooncake arrivals sit on a 3-second grid
TEXT_FIELDS = ("text_input", "messages", "payload")
NAMES = {"arrival": "timestamp", "prompt": "input_length", "output": "output_length"}


def fits(keys: set[str]) -> bool:
    elsewhere = keys & {
        "arrival_time_s",
        "arrival_time_ms",
        "arrival_time_us",
        "arrival_time_ns",
        "arrival",
        "arrived_at",
    }
    return ("input_length" in keys and not elsewhere) or bool(keys & set(TEXT_FIELDS))


def read(table: Records, options: ReadOptions) -> Rows:
    prompt_tokens = _prompts(table, options)
    if table.find("output_length") is None:
        found = ", ".join(table.names)
        raise ValueError(
            f"{table.name}: {table.unit} {table.lines[0]}: output_length missing (found {found}); the replay needs the "
            "length of every answer"
        )
    rows = Rows(
        "mooncake", table.lines, prompt_tokens, table.ints("output_length"), unit=table.unit, ids=None, tick_s=GRID_S
    )
    rows.block_tokens = 0
    if table.find("hash_ids"):
        rows.block_tokens = options.block_tokens or BLOCK_TOKENS
        rows.block_ids = _blocks(table, rows, options)
        rows.notes += forked_ids(table, rows.block_ids)
    _times(table, rows, options)
    return rows


def _prompts(table: Records, options: ReadOptions) -> IntArray:
    texts = [name for name in TEXT_FIELDS if table.find(name)]
    if not texts:
        return table.ints("input_length")
    lengths = table.raw("input_length") if table.find("input_length") else [None] * len(table)
    counted: list[int | None] = []
    for row, length in enumerate(lengths):
        given = [name for name in texts if table.raw(name)[row] is not None]
        if (length is not None) + len(given) != 1:
            forms = ", ".join(("input_length", *TEXT_FIELDS))
            found = (["input_length"] if length is not None else []) + given
            raise ValueError(
                f"{table.name}: {table.unit} {table.lines[row]}: exactly one of {forms} is needed, found "
                f"{' and '.join(found) or 'none'}"
            )
        if length is None and options.tokenizer is None:
            raise ValueError(
                f"{table.name}: {table.unit} {table.lines[row]}: {given[0]} is text, and no tokenizer is configured; "
                "give input_length instead (or load_trace(tokenizer=...))"
            )
        counted.append(length if length is not None else _tokens(table.raw(given[0])[row], options))
    filled = [{"input_length": value} for value in counted]
    return Records(table.name, filled, table.lines, table.unit).ints("input_length")


def _tokens(prompt: Any, options: ReadOptions) -> int:
    assert options.tokenizer is not None
    if isinstance(prompt, str):
        return options.tokenizer(prompt)
    if isinstance(prompt, list):
        return sum(_tokens(part, options) for part in prompt)
    if isinstance(prompt, dict):
        inner = prompt.get("content", prompt.get("messages", prompt.get("prompt", prompt.get("text"))))
        return 0 if inner is None else _tokens(inner, options)
    return 0


def _blocks(table: Records, rows: Rows, options: ReadOptions) -> Blocks:
    given = table.raw("hash_ids")
    if None not in given:
        return block_ids_of(table, "hash_ids", rows.prompt_tokens, rows.block_tokens, options.block_tokens)
    without = np.array([value is None for value in given])
    some = Records(
        table.name,
        [record for record, lacks in zip(table.records, without, strict=True) if not lacks],
        table.lines[~without],
        table.unit,
    )
    read = iter(block_ids_of(some, "hash_ids", rows.prompt_tokens[~without], rows.block_tokens, options.block_tokens))
    rows.notes.append(f"{int(without.sum())} requests have no hash_ids: their prompts share nothing")
    blocks: Blocks = []
    fresh = -1  # ids of prompts that share nothing: negative, so that no hash of the file equals them
    for row, lacks in enumerate(without):
        if not lacks:
            blocks.append(next(read))
            continue
        needed = -(-int(rows.prompt_tokens[row]) // rows.block_tokens)
        blocks.append(tuple(range(fresh, fresh - needed, -1)))
        fresh -= needed
    return blocks


def _times(table: Records, rows: Rows, options: ReadOptions) -> None:
    unit_s = options.unit_s("ms")
    rows.time_unit = options.time_unit or "ms"
    session, delay, stamp = table.find("session_id"), table.find("delay"), table.find("timestamp")
    if session:
        rows.session = table.texts(session)
    if delay is None and not (session and stamp is None):
        if stamp is None:
            raise missing_field(table.name, "timestamp", [int(line) for line in table.lines], table.unit)
        rows.arrival_s = table.times(stamp, unit_s)
        return
    if session is None:
        raise ValueError(f"{table.name}: delay is given but session_id is not; a delay follows a turn of a session")
    rows.arrival_s = _optional_seconds(table, stamp, unit_s)
    waits_s = _optional_seconds(table, delay, unit_s)
    rows.parent, rows.delay_s = np.full(len(table), -1), np.zeros(len(table))
    previous: dict[str, int] = {}
    for row, name in enumerate(rows.session or []):
        if name and name in previous:
            rows.parent[row] = previous[name]
            if not np.isnan(waits_s[row]) or np.isnan(rows.arrival_s[row]):
                rows.arrival_s[row] = np.nan  # a turn with a delay waits for its parent, whatever its stamp says
                rows.delay_s[row] = np.nan_to_num(waits_s[row])
        elif np.isnan(rows.arrival_s[row]):
            rows.arrival_s[row] = 0.0  # a session without a stamp starts at once
        previous[name] = row


def _optional_seconds(table: Records, column: str | None, unit_s: float) -> FloatArray:
    seconds = np.full(len(table), np.nan)
    if column is None:
        return seconds
    bad = []
    for row, value in enumerate(table.raw(column)):
        if value is None:
            continue
        number = seconds_of(value, text=False)
        if number is None or number < 0:
            bad.append((int(table.lines[row]), value))
        else:
            seconds[row] = number * unit_s
    if bad:
        raise bad_rows(table.name, bad, column, "a finite number of at least 0", unit=table.unit)
    return seconds
