"""Who follows whom: parents named by id become row numbers, and prefix ids are checked against the prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from llmsim.readers.rows import Blocks, IntArray, bad_rows, listed
from llmsim.readers.table import Table
from llmsim.readers.values import missing_field

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
SNIFFED_ROWS = 1000


def check_unique(table: Table, column: str, ids: Sequence[Hashable]) -> dict[Hashable, int]:
    """Row of each id; an id given twice is an error naming both lines."""
    rows = {value: row for row, value in enumerate(ids)}
    if len(rows) == len(ids):
        return rows
    first: dict[Hashable, int] = {}
    twice = []
    for row, value in enumerate(ids):
        if value in first:
            twice.append((value, first[value], row))
        first.setdefault(value, row)
    value, one, two = twice[0]
    more = f" ({len(twice) - 1} more ids are given twice)" if len(twice) > 1 else ""
    raise ValueError(
        f"{table.name}: {column} {value} appears on {table.unit}s {table.lines[one]} and {table.lines[two]}{more}; "
        "every request needs an id of its own"
    )


def link_parents(
    table: Table, ids: Sequence[Hashable], parents: Sequence[Hashable | None], id_column: str, parent_column: str
) -> tuple[IntArray, list[str]]:
    """Row of each parent (-1: none) and notes about parents that the file does not hold. Cycles are errors."""
    for column, values in ((id_column, ids), (parent_column, parents)):
        odd = [(int(table.lines[i]), one) for i, one in enumerate(values) if type(one) not in (int, str)]
        odd = [(line, one) for line, one in odd if one is not None or column == id_column]
        if odd:
            raise bad_rows(table.name, odd, column, "an id (a whole number or a string)", unit=table.unit)
    rows = check_unique(table, id_column, ids)
    linked = np.array([-1 if parent is None else rows.get(parent, -2) for parent in parents], dtype=np.int64)
    notes = []
    orphans = np.flatnonzero(linked == -2)
    if len(orphans):
        missing = parents[int(orphans[0])]
        who = f"1 request names {parent_column} {missing}"
        if len(orphans) > 1:
            who = f"{len(orphans)} requests name a {parent_column} (the first: {missing})"
        notes.append(f"{who}, which is not in the file: treated as the start of its session")
        linked[orphans] = -1
    _refuse_cycles(table, linked, ids, id_column)
    return linked, notes


def _refuse_cycles(table: Table, parent: IntArray, ids: Sequence[Hashable], id_column: str) -> None:
    # Peeling by pointer doubling: after k rounds `up` is the 2^k-th ancestor; what never reaches a root is on or
    # below a cycle.
    up = np.append(parent, -1)
    up[up < 0] = len(parent)
    for _ in range(max(1, len(parent).bit_length())):
        up = up[up]
    caught = np.flatnonzero(up[:-1] != len(parent))
    if not len(caught):
        return
    row, seen = int(caught[0]), []
    while row not in seen:
        seen.append(row)
        row = int(parent[row])
    loop = seen[seen.index(row) :]
    raise ValueError(
        f"{table.name}: the parents of {id_column}s {listed([ids[i] for i in loop])} form a cycle "
        f"({table.unit}s {listed([int(table.lines[i]) for i in loop])}); a session has to start somewhere"
    )


def block_ids_of(table: Table, column: str, prompt_tokens: IntArray, block_tokens: int, option: int | None) -> Blocks:
    """Prefix ids of a JSON column, checked: a list on every row, ceil(prompt / block) of them."""
    values = table.raw(column)
    missing = [int(table.lines[row]) for row, value in enumerate(values) if value is None]
    if missing:
        raise missing_field(table.name, column, missing, table.unit)
    bad = [
        (int(table.lines[row]), value)
        for row, value in enumerate(values)
        if type(value) is not list or not set(map(type, value)) <= {int, str}
    ]
    if bad:
        raise bad_rows(table.name, bad, column, "a list of whole numbers or strings", unit=table.unit)
    blocks: Blocks = [tuple(value) for value in values]
    check_hash_counts(table, column, blocks, prompt_tokens, block_tokens, option)
    return blocks


def fitting_sizes(blocks: Blocks, prompt_tokens: IntArray) -> list[int]:
    """Block sizes for which every one of the first rows has ceil(prompt / size) ids."""
    held = np.array([len(ids) for ids in blocks[:SNIFFED_ROWS]], dtype=np.int64)
    prompts = prompt_tokens[:SNIFFED_ROWS]
    return [size for size in BLOCK_SIZES if len(held) and bool((-(-prompts // size) == held).all())]


def check_hash_counts(
    table: Table,
    column: str,
    blocks: Blocks,
    prompt_tokens: IntArray,
    block_tokens: int,
    option: int | None,
    lines: IntArray | None = None,
) -> None:
    """`lines`: where each request stands, if a line of the file holds several."""
    lines = table.lines if lines is None else lines
    held = np.fromiter(map(len, blocks), dtype=np.int64, count=len(blocks))
    needed = -(-prompt_tokens // block_tokens)
    wrong = np.flatnonzero(held != needed)
    if not len(wrong):
        return
    sizes = fitting_sizes(blocks, prompt_tokens)
    given = "given" if option else "this format's"
    if sizes:
        raise ValueError(
            f"{table.name}: every row has the {column} of {sizes[0]}-token blocks, not of {given} {block_tokens}; "
            f"give --block-tokens {sizes[0]}"
        )
    row = int(wrong[0])
    more = f" ({len(wrong) - 1} more rows are wrong, next {table.unit} {lines[wrong[1]]})" if len(wrong) > 1 else ""
    raise ValueError(
        f"{table.name}: {table.unit} {lines[row]}: input_length {prompt_tokens[row]} needs "
        f"ceil({prompt_tokens[row]}/{block_tokens}) = {needed[row]} {column}, found {held[row]}{more}. "
        "Wrong --block-tokens?"
    )


def forked_ids(table: Table, blocks: Blocks) -> list[str]:
    """A note if one id stands behind two different predecessors: then it does not name a whole prefix."""
    flat = list(chain.from_iterable(blocks))
    if set(map(type, flat)) != {int}:
        return []
    try:
        ids = np.array(flat, dtype=np.int64)
    except OverflowError:
        return []
    lengths = np.fromiter(map(len, blocks), dtype=np.int64, count=len(blocks))
    starts = np.cumsum(lengths) - lengths
    before = np.empty_like(ids)
    before[1:] = ids[:-1]
    before[starts[lengths > 0]] = -1
    codes = _dense(ids)
    first = np.full(int(codes.max()) + 1, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(ids) - 1, -1, -1)
    forked = np.flatnonzero(before[first[codes]] != before)
    if not len(forked):
        return []
    place = int(forked[0])
    row_of = np.repeat(np.arange(len(blocks)), lengths)
    one, two = (int(table.lines[row_of[at]]) for at in (first[codes[place]], place))
    return [
        f"prefix id {ids[place]} follows different ids on {table.unit}s {one} and {two} ({len(forked)} such places): "
        "ids name single blocks, not whole prefixes; hits are counted by leading run only"
    ]


def _dense(ids: IntArray) -> NDArray[np.int64]:
    if ids.min() >= 0 and ids.max() < 4 * len(ids) + 1024:
        return ids
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)
