"""BLIS trace v2: CSV, optionally below a YAML preamble; all `_us` columns are microseconds.

`prefix_length` comes on top of `input_tokens`: a row of a prefix group has a prompt of prefix_length + input_tokens
(unlike the generic columns, where prefix_tokens is part of the prompt). `server_input_tokens`, where given, overrides
`input_tokens`. Source: inference-sim/inference-sim, trace format version 2.
"""

from __future__ import annotations

import numpy as np

from llmsim.readers.csv_text import CsvTable, read_csv
from llmsim.readers.delimited import require
from llmsim.readers.generic import PREFIX_BLOCK_TOKENS, prefix_blocks
from llmsim.readers.rows import ReadOptions, Rows
from llmsim.readers.source import Source
from llmsim.readers.table import Table


def fits(keys: set[str]) -> bool:
    return "arrival_time_us" in keys and bool(keys & {"round_index", "prefix_group", "client_id"})


def is_preamble(source: Source) -> bool:
    return (
        b"trace_version" in source.data[:2048].split(b"\n", 2)[0] + b"\n" + source.data[:2048].split(b"\n", 2)[-1][:512]
    )


def read_with_preamble(source: Source) -> CsvTable:
    """Skip the YAML lines: the table begins at the first line that names arrival_time_us."""
    at = 0
    for number, line in enumerate(source.data.split(b"\n"), start=1):
        if b"arrival_time_us" in line and b"," in line:
            return read_csv(source, source.data[at:], number)
        at += len(line) + 1
    raise ValueError(
        f"{source.name}: a BLIS header without its table; give the CSV that holds the requests (arrival_time_us, ...)"
    )


def read(table: Table, options: ReadOptions) -> Rows:
    stamp, prompt, output = require(table, "a BLIS", "arrival_time_us", "input_tokens", "output_tokens")
    prompts = table.ints(prompt)
    server = table.find("server_input_tokens")
    if server:
        measured = table.ints(server)
        prompts = np.where(measured > 0, measured, prompts)
    group, length = table.find("prefix_group"), table.find("prefix_length")
    groups = table.texts(group) if group else [""] * len(table)
    lengths = np.zeros(len(table), dtype=np.int64)
    if length:
        lengths = np.where([bool(name) for name in groups], table.ints(length), 0)
    rows = Rows("blis", table.lines, prompts + lengths, table.ints(output))
    rows.arrival_s = table.times(stamp, 1e-6)
    if lengths.any():
        rows.block_tokens = options.block_tokens or PREFIX_BLOCK_TOKENS
        rows.block_ids = prefix_blocks(groups, lengths.tolist(), rows.prompt_tokens.tolist(), rows.block_tokens)
    for column, field in (
        ("session_id", "session"),
        ("tenant_id", "tenant"),
        ("slo_class", "slo_class"),
        ("model", "model"),
    ):
        found = table.find(column)
        if found:
            setattr(rows, field, table.texts(found))
    deadline = table.find("deadline_us")
    if deadline:
        at = table.floats(deadline) * 1e-6
        rows.deadline_s = np.where(at > 0, at, np.nan)
    status = table.find("status")
    if status:
        failed = np.array([text.strip().casefold() in ("error", "failed", "timeout") for text in table.texts(status)])
        rows.drop(failed, "failed on the source system")
    return rows
