"""Qwen-Bailian JSON lines: conversations with parents and the hashes of 16-token blocks.

    {"chat_id", "parent_chat_id" (-1: first turn), "timestamp" s, "input_length", "output_length", "type", "turn",
     "hash_ids"}

The last block of a turn may be hashed differently in the next one (padding, and reasoning removed from the history), so
a turn does not extend its parent exactly: only leading ids are compared. Every turn has a stamp of its own and is sent
at it; with `closed_loop` a later turn waits for its parent instead. Source: alibaba-edu/qwen-bailian-usagetraces-anon.
"""

from __future__ import annotations

import numpy as np

from llmsim.readers.delimited import require
from llmsim.readers.links import block_ids_of, link_parents
from llmsim.readers.rows import ReadOptions, Rows
from llmsim.readers.table import Records

BLOCK_TOKENS = 16


def fits(keys: set[str]) -> bool:
    return {"chat_id", "parent_chat_id"} <= keys


def read(table: Records, options: ReadOptions) -> Rows:
    chat, parent_id, stamp, prompt, output = require(
        table, "a Qwen-Bailian", "chat_id", "parent_chat_id", "timestamp", "input_length", "output_length"
    )
    rows = Rows("qwen-bailian", table.lines, table.ints(prompt), table.ints(output), unit=table.unit)
    rows.arrival_s = table.times(stamp, options.unit_s("s"))
    rows.time_unit = options.time_unit or "s"
    chats = table.raw(chat)
    parents = [None if parent in (-1, None) else parent for parent in table.raw(parent_id)]
    rows.parent, notes = link_parents(table, chats, parents, "chat_id", "parent_chat_id")
    rows.notes += notes
    rows.ids = [str(value) for value in chats]
    rows.session = _sessions(rows)
    _waits(rows, options)
    if table.find("hash_ids"):
        rows.block_tokens = options.block_tokens or BLOCK_TOKENS
        rows.block_ids = block_ids_of(table, "hash_ids", rows.prompt_tokens, rows.block_tokens, options.block_tokens)
    return rows


def _sessions(rows: Rows) -> list[str]:
    assert rows.parent is not None and rows.ids is not None
    root = np.where(rows.parent >= 0, rows.parent, np.arange(len(rows.parent)))
    for _ in range(max(1, len(root).bit_length())):
        root = root[root]
    return [rows.ids[i] for i in root.tolist()]


def _waits(rows: Rows, options: ReadOptions) -> None:
    assert rows.parent is not None and rows.arrival_s is not None
    later = rows.parent >= 0
    since_parent_s = np.where(later, rows.arrival_s - rows.arrival_s[rows.parent], 0.0)
    early = later & (since_parent_s < 0)
    rows.delay_s = np.maximum(since_parent_s, 0.0)
    if early.any():
        what = "each waits for its parent" if options.closed_loop else "sent at their own stamps (open loop)"
        rows.notes.append(f"{int(early.sum())} turns arrive before their parent: {what}")
    if not options.closed_loop:
        rows.delay_s = np.zeros(len(later))
        return
    rows.arrival_s = np.where(later, np.nan, rows.arrival_s)
    rows.notes.append(
        "closed loop: a turn waits, after its parent has finished, as long as it arrived after it in the trace (finish "
        "times are not recorded, so the parent's own duration is part of the wait)"
    )
