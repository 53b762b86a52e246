"""One row per measured point, kept twice: a journal while measuring, Parquet afterwards.

The journal is JSON lines, flushed line by line: provenance first, then {"key", "rows"} per point and {"note"} lines. It
survives a kill at any byte: a half-written last line is dropped, with a note, when it is opened again. Parquet is
written to a temporary file and renamed; its schema metadata holds the provenance as JSON under "llmsim". Seconds,
bytes, tokens and MHz as the column names say; a column is null where it means nothing.

One process writes a journal at a time: two would measure the same GPU at once. ValueError, FileNotFoundError: a file
that is damaged, foreign or in use, a value that no measurement has, a full disk; one line each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

from llmsim.parquet import read_table

FORMAT = "llmsim-measurements"
VERSION = 1


@dataclass(frozen=True)
class Row:
    op: str
    variant: str
    launch: str  # "graph", "eager", "compiled", "compiled_graph" or "host"
    median_s: float
    dtype: str | None = None
    kv_dtype: str | None = None
    model: str | None = None
    clocks: str | None = None  # "cold" (after idle) or "sustained" (after heavy load)
    tokens: int | None = None
    n: int | None = None
    k: int | None = None
    q_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    new_tokens: int | None = None
    context_tokens: int | None = None
    chunks: int | None = None
    seqs: int | None = None
    seq_context_tokens: int | None = None
    skew: str | None = None  # of contexts: see calibration.measure.attention
    size_bytes: int | None = None
    gpus: int | None = None
    layers: int | None = None
    tensor_parallel: int | None = None
    flops: float | None = None
    bytes: float | None = None  # the least that must move
    p10_s: float | None = None
    p90_s: float | None = None
    samples_s: tuple[float, ...] | None = None
    repeats: int | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    measured_at: str | None = None  # UTC
    source: str = "measured"


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES = {field.name: str(field.type).removesuffix(" | None") for field in fields(Row)}
_REQUIRED = ("op", "variant", "launch", "median_s")
_PYTHON = {"str": (str,), "int": (int,), "float": (float, int), "tuple[float, ...]": (list, tuple)}


def _schema() -> Any:
    import pyarrow as pa

    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "tuple[float, ...]": pa.list_(pa.float64())}
    return pa.schema([(name, types[kind]) for name, kind in _TYPES.items()])


def write_parquet(path: Path, rows: Iterable[Row], provenance: dict[str, Any]) -> None:
    """Replaces `path` at once or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {b"llmsim": json.dumps({"format": FORMAT, "version": VERSION, **provenance}).encode()}
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_schema().with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_parquet(path: Path) -> tuple[list[Row], dict[str, Any]]:
    import pyarrow as pa

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. Make it with: python -m calibration measure --out {path}")
    try:
        table = read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}). Measure again") from None
    try:
        provenance = json.loads((table.schema.metadata or {})[b"llmsim"])
        if (provenance["format"], provenance["version"]) != (FORMAT, VERSION):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: no {FORMAT} {VERSION} file. Make one with: python -m calibration measure") from None
    missing = [name for name in _REQUIRED if name not in table.column_names or table[name].null_count]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is absent or has nulls. Measure again")
    known = [name for name in table.column_names if name in _TYPES]
    try:
        records = table.select(known).to_pylist()
    except (pa.ArrowException, ValueError) as error:  # bytes that are no text
        raise ValueError(f"{path}: not a readable Parquet file ({error}). Measure again") from None
    rows = []
    for number, record in enumerate(records):
        try:
            rows.append(_row(record))
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}. Measure again") from None
    return rows, provenance


def _row(record: Any) -> Row:
    """A row out of a file; ValueError says what no measurement has."""
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is no row")
    if wrong := [name for name in record if name not in _TYPES]:
        raise ValueError(f"{wrong[0]!r} is no column")
    if wrong := [name for name in _REQUIRED if record.get(name) is None]:
        raise ValueError(f"{wrong[0]} is missing")
    for name, value in record.items():
        if value is None:
            continue
        kind = _TYPES[name]
        if not isinstance(value, _PYTHON[kind]) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is no {kind}")
        if kind == "int" and not 0 <= value < 2**63 and name != "temperature_c":
            raise ValueError(f"{name}={value} is out of range")
        if kind == "float" and not 0 <= value < inf:
            raise ValueError(f"{name}={value} must be 0 or more and finite")
    if not record["median_s"] and record["op"] != "memory":
        raise ValueError(f"median_s={record['median_s']}: a kernel takes more than 0 s")
    samples_s = record.get("samples_s")
    if samples_s is None:
        return Row(**record)
    if not all(isinstance(value, float | int) and isfinite(value) for value in samples_s):
        raise ValueError("samples_s holds what is no time")
    return Row(**{**record, "samples_s": tuple(samples_s)})


class Journal:
    """Append-only JSON lines at `path`. `points` has the rows of each point measured, by its key."""

    def __init__(self, path: Path, provenance: dict[str, Any]) -> None:
        """Opens or begins it. One begun on another GPU or with another torch is refused, and one in use.

        Without `provenance` it is only read: nothing is begun.
        """
        self.path = path
        self.provenance = provenance
        self.points: dict[str, list[Row]] = {}
        self.notes: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            self._lock()
            if path.stat().st_size:
                self._read(provenance)
            if provenance and not path.stat().st_size:
                self._write({"format": FORMAT, "version": VERSION, **provenance})
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another run writes it. Wait for its end, or give another --out") from None
        except OSError:
            pass  # a file system without locks

    def _read(self, wanted: dict[str, Any]) -> None:
        whole, _, rest = self.path.read_bytes().rpartition(b"\n")
        lines = whole.splitlines()
        begun = self._line(1, lines[0]) if lines else {"format": FORMAT, "version": VERSION}
        header = b'{"format":"%s",' % FORMAT.encode()
        foreign = not lines and rest[: len(header)] != header[: len(rest)]
        if foreign or (begun.get("format"), begun.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{self.path}:1: no journal of {FORMAT} {VERSION}. Give another --out, or remove it")
        if rest or not lines:
            os.truncate(self.path, len(whole) + 1 if lines else 0)
        if not lines:
            return
        for field in ("gpu", "torch", "seed"):
            if wanted.get(field) is not None and begun.get(field) != wanted[field]:
                raise ValueError(
                    f"{self.path}: was measured with {field} {begun.get(field)}, this is {wanted[field]}. "
                    "Give another --out"
                )
        self.provenance = {name: value for name, value in begun.items() if name not in ("format", "version")}
        for number, line in enumerate(lines[1:], 2):
            record = self._line(number, line)
            try:
                if "note" in record:
                    self.notes.append(str(record["note"]))
                else:
                    self.points[record["key"]] = [_row(row) for row in record["rows"]]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.path}:{number}: not a measured point ({error}). Remove the line") from None
        if rest:
            self.notes.append(f"the journal's half-written last line ({len(rest)} bytes) was dropped")

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}:{number}: not a JSON object. Remove the line, the others stay good")
        return record

    def _write(self, record: dict[str, Any]) -> None:
        left = memoryview((json.dumps(record, separators=(",", ":")) + "\n").encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror or error}). "
                "What is measured is kept: mend that and repeat the command"
            ) from None

    def append(self, key: str, rows: Sequence[Row]) -> None:
        """All rows of one point; none for a point that cannot be measured here and must not be tried again."""
        shown = [{name: value for name, value in asdict(row).items() if value is not None} for row in rows]
        self._write({"key": key, "rows": shown})
        self.points[key] = list(rows)

    def note(self, text: str) -> bool:
        """Whether it is new: each note is kept once."""
        if text in self.notes:
            return False
        self._write({"note": text})
        self.notes.append(text)
        return True

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.points.values() for row in rows]

    def finish(self, path: Path) -> None:
        write_parquet(path, self.rows, {**self.provenance, "notes": self.notes})

    def close(self) -> None:
        self._file.close()
