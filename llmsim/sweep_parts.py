"""Reading the folder of a sweep: its parts, and that what is there is what was written.

Every reader of results goes through `read_part`, so a damaged part file, one that holds other runs than its name says,
and one that is no part of the sweep (a copy under another number) are refused by name instead of being counted. A part
file carries the SHA-256 of its own bytes (those of the digest counted as zeros) in its metadata, so that it is checked
wherever it is copied to: bytes that changed on a disk are not results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from llmsim.parquet import read_table

PARTS = 64  # at most so many: what one sweep can be split into
ABOUT = "_sweep.json"
SEAL = b"llmsim.sha256"
UNSEALED = b"0" * 64
AFTER_SEAL = 2  # bytes that Parquet's metadata has between a name and its text: kind of field, length


def runs_per_part(runs: int) -> int:
    return -(-runs // PARTS)


@dataclass(frozen=True)
class Part:
    """Runs first to last (excluded) of a sweep."""

    index: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}"

    def __len__(self) -> int:
        return self.last - self.first


def parts_of(runs: int, shard: tuple[int, int] | None = None) -> list[Part]:
    """All parts, or those of shard i of n (counted from 1): every n-th."""
    size = runs_per_part(runs)
    parts = [Part(at, first, min(first + size, runs)) for at, first in enumerate(range(0, runs, size))]
    if shard is None:
        return parts
    at, count = shard
    if count > len(parts):
        raise ValueError(f"shard {at}/{count}: {runs} runs make {len(parts)} parts: give at most {len(parts)} shards")
    return parts[at - 1 :: count]


def read_about(folder: Path) -> dict[str, Any]:
    """What `_sweep.json` says. FileNotFoundError if there is none, ValueError if it is not what a sweep writes."""
    path = folder / ABOUT
    instead = "bring it back, or do the sweep again with another --out"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{folder}: not the folder of a sweep (no {ABOUT})") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}): {instead}") from None
    kinds = {"specification": str, "runs": int, "columns": list, "files": dict, "versions": dict}
    for name, kind in kinds.items():
        value: Any = about.get(name) if isinstance(about, dict) else None
        if not isinstance(value, kind) or value == 0:
            raise ValueError(f"{path}: damaged: {name!r} is {'missing' if value is None else repr(value)}: {instead}")
    return dict(about)


def part_files(folder: Path, runs: int) -> Iterator[tuple[Part, Path]]:
    """The part files that are there, by number. ValueError for one that a sweep of so many runs does not have."""
    parts = {f"{part.name}.parquet": part for part in parts_of(runs)}
    for path in sorted(Path(folder).glob("part-*.parquet")):
        if path.name not in parts:
            first, *_, last = (*parts, *parts)
            has = first if first == last else f"{first} to {last}"
            raise ValueError(f"{path}: no part of this sweep, whose {runs} runs are {has}: take the file away")
        yield parts[path.name], path


def encode_part(table: Any) -> bytes:
    """The bytes of a part's file; without dictionaries, and with statistics of the number alone: of a hundred columns
    they would be most of a small part."""
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    buffer = pa.BufferOutputStream()
    table = table.replace_schema_metadata({SEAL: UNSEALED})
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_statistics=["run"])
    content: bytes = buffer.getvalue().to_pybytes()
    at = _seal_of(content)
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(UNSEALED) :]


def _seal_of(content: bytes) -> int:
    """Where the digest stands: the metadata is at the end."""
    return content.rfind(SEAL) + len(SEAL) + AFTER_SEAL


def _check_seal(content: bytes) -> None:
    at = _seal_of(content)
    digest, end = content[at : at + len(UNSEALED)], at + len(UNSEALED)
    if hashlib.sha256(content[:at] + UNSEALED + content[end:]).hexdigest().encode() != digest:
        raise ValueError("its SHA-256 is not the one it carries")


def read_part(path: Path, part: Part, columns: Sequence[str] | None = None) -> Any:
    """A part as a pyarrow table, or some columns of it and `run`.

    Raises ValueError if it is not as it was written, or holds other runs than its name says.
    """
    pa = import_module("pyarrow")
    again = "delete it, and 'llmsim sweep' with --resume does its runs again"
    try:
        content = path.read_bytes()
        _check_seal(content)
        wanted = None if columns is None else list(dict.fromkeys(("run", *columns)))
        table = read_table(pa.BufferReader(content), columns=wanted)
    except (OSError, ValueError) as error:  # pyarrow's errors are either
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}): {again}") from None
    runs = table["run"].to_pylist()
    if runs != list(range(part.first, part.last)):
        held = f"runs {runs[0]} to {runs[-1]}" if runs else "no runs"
        raise ValueError(f"{path}: holds {held}, not {part.first} to {part.last - 1} as its name says: {again}")
    return table.replace_schema_metadata()
