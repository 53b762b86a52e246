"""The folder of a sweep: one Parquet data set of part files, and what makes it safe to stop at any moment.

    part-00000.parquet     a row per run, by number; every part but the last has the same number of runs
    _sweep.json            what the runs were made from: digest of the specification, versions, SHA-256 of every file it
                           names; a resumed sweep has to agree with it
    _sweep.yaml            the specification
    _part-00000.jsonl      the journal of a part that is under way: a line per run that is done

A part's file appears under its name when it is complete (written under another, then renamed) and never changes; its
bytes depend on the runs alone. So shards are parts, merging folders is copying part files, and what is done is what is
there. A journal is locked by whoever writes it; a line that a crash has cut short is not a result. Names with an
underscore in front are left out by pandas, pyarrow and Spark when they read the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from llmsim.sweep_columns import table_of, types_of
from llmsim.sweep_parts import ABOUT, Part, encode_part, part_files, read_about, read_part, runs_per_part
from llmsim.sweep_work import Row
from llmsim.text import named

SPECIFICATION = "_sweep.yaml"
SYNC_EVERY_S = 1.0


class Store:
    """Keeps the rows of a sweep; `described` is what `_sweep.json` says of it."""

    def __init__(self, folder: Path, columns: Sequence[tuple[str, str]], described: dict[str, Any]) -> None:
        self.folder, self.columns, self.described = folder, columns, described
        self._open: dict[int, _Journal] = {}
        self._size = runs_per_part(described["runs"])

    def begin(self, spec_text: str, parts: Sequence[Part], *, resume: bool) -> None:
        """Make the folder, or check that the one there is this sweep's and, unless it is to go on, holds no `parts`."""
        folder = self.folder
        about = folder / ABOUT
        if about.is_file():
            self._check_same()
            list(part_files(folder, self.described["runs"]))  # a file that is no part would be taken for results
            if not resume and any(path.exists() for part in parts for path in (self._file(part), self._journal(part))):
                raise ValueError(f"out={folder}: holds results of this sweep: add --resume to go on, or another --out")
            if not (folder / SPECIFICATION).is_file():
                _write_whole(folder / SPECIFICATION, spec_text.encode())
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"out={folder}: exists and is not the folder of a sweep: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(about, (json.dumps(self.described, indent=1) + "\n").encode())  # first: another shard may look
        _write_whole(folder / SPECIFICATION, spec_text.encode())

    def _file(self, part: Part) -> Path:
        return self.folder / f"{part.name}.parquet"

    def _journal(self, part: Part) -> Path:
        return self.folder / f"_{part.name}.jsonl"

    def _check_same(self) -> None:
        before = read_about(self.folder)
        for name, now in self.described.items():
            then = before.get(name)
            if then != now:
                raise ValueError(f"out={self.folder}: {_difference(name, then, now)}: give another --out")

    # ---------------------------------------------------------------------------------------------------- parts

    def missing(self, part: Part) -> list[int]:
        """Runs of a part without a file that are still to be done; opens its journal if there are any."""
        journal = _Journal(self._journal(part), part)
        self._open[part.index] = journal
        missing = [run for run in range(part.first, part.last) if run not in journal.rows]
        if not missing:
            self._finish(journal)
        return missing

    def ids(self, part: Part) -> list[str] | None:
        """Of its runs, if its file is there and whole; one that is not is taken away, to be made again."""
        path = self._file(part)
        if not path.exists():
            return None
        try:
            table = read_part(path, part)
        except ValueError:
            path.unlink()
            return None
        if list(zip(table.column_names, table.schema.types, strict=True)) != types_of(self.columns):
            raise ValueError(f"{path}: its columns are not those of this sweep: another sweep's? Take the file away")
        return list(table["id"].to_pylist())

    def keep(self, row: Row) -> None:
        """The row is on disk when this returns."""
        journal = self._open[row.run // self._size]
        journal.add(row)
        if len(journal.rows) == len(journal.part):
            self._finish(journal)

    def _finish(self, journal: _Journal) -> None:
        rows = [journal.rows[run] for run in sorted(journal.rows)]
        _write_whole(self._file(journal.part), encode_part(table_of(rows, self.columns)))
        journal.remove()
        del self._open[journal.part.index]

    def close(self) -> None:
        for journal in self._open.values():
            journal.close()
        self._open.clear()


def _difference(name: str, then: Any, now: Any) -> str:
    if name == "files" and isinstance(then, dict):
        changed = sorted(path for path in {*then, *now} if then.get(path) != now.get(path))
        return f"{', '.join(changed)} changed since it was made"
    if name == "versions" and isinstance(then, dict):
        words = [f"{one} {then.get(one)} (now {now[one]})" for one in now if then.get(one) != now[one]]
        return f"was made with {', '.join(words)}"
    return "was made from another specification"


class _Journal:
    """Rows of an unfinished part; locked, so that two sweeps do not write one part."""

    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.part = path, part
        self.rows: dict[int, Row] = {}
        self.file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - stays open as long as the part is under way
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise ValueError(f"{path}: another sweep is writing it: wait for it, or give another --out") from None
        self._synced_s = time.monotonic()
        self._read()

    def _read(self) -> None:
        """What an earlier sweep has done. What follows the last whole line is cut off."""
        self.file.seek(0)
        whole = 0
        for line in self.file:
            row = _row(line)
            if row is None:
                break
            whole += len(line)
            if self.part.first <= row.run < self.part.last:
                self.rows[row.run] = row
        self.file.truncate(whole)

    def add(self, row: Row) -> None:
        self.rows[row.run] = row
        with named(self.path):
            self.file.write(row.to_json().encode() + b"\n")
            self.file.flush()
        now_s = time.monotonic()
        if now_s - self._synced_s > SYNC_EVERY_S:  # against a machine that goes; a process that goes loses nothing
            os.fsync(self.file.fileno())
            self._synced_s = now_s

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # of a full disk: the line that did not fit, which add has told
            self.file.close()


def _row(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Row.from_json(line.decode())
    except (ValueError, TypeError, KeyError):
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """All of it under its name, or nothing."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with named(path), open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def finished_runs(folder: Path, part: Part) -> set[int]:
    """Runs of a part whose results are there and whole; changes nothing."""
    path = folder / f"{part.name}.parquet"
    if path.is_file():
        with suppress(ValueError):
            read_part(path, part)
            return set(range(part.first, part.last))
    try:
        lines = (folder / f"_{part.name}.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return set()
    return {row.run for line in lines if (row := _row(line)) is not None}
