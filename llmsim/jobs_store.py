"""Where a dashboard's results live: on disk, bounded, and gone with the server.

    ROOT/lock       held by the server that owns the folder; who finds it free may remove the folder
    ROOT/runs/KEY   run folders, at most `most_runs` and `most_bytes` of them: the least recently used go first
    ROOT/jobs/…     what workers are told and what they answer (`llmsim.jobs`)
    ROOT/uploads/…  traces that came through the browser, the latest `most_uploads`

Runs that were read lately stay in memory as well, up to `most_read_bytes`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from llmsim.jobs import Jobs
from llmsim.runs import DERIVED, TABLES, Run, read_run

PREFIX = "llmsim-dashboard-"
MOST_RUNS, MOST_BYTES, MOST_READ_BYTES, MOST_UPLOADS = 64, 2 << 30, 512 << 20, 8
SPARED_S = 30.0  # a run that was asked for so lately may be about to be read


class Store:
    """The folder of one server."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        most_runs: int = MOST_RUNS,
        most_bytes: int = MOST_BYTES,
        most_read_bytes: int = MOST_READ_BYTES,
        spared_s: float = SPARED_S,
    ) -> None:
        # mkdtemp: readable by this user alone, since what lies there is unpickled
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX)) if root is None else root
        self.most_runs, self.most_bytes, self.most_read_bytes = most_runs, most_bytes, most_read_bytes
        self.spared_s = spared_s
        self._owned = _locked(self.root / "lock")
        self.runs, self.uploads = self.root / "runs", self.root / "uploads"
        for folder in (self.runs, self.uploads):
            folder.mkdir(exist_ok=True)
        self.jobs = Jobs(self.root / "jobs")
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._used: OrderedDict[str, float] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._read: OrderedDict[Path, tuple[Run, int]] = OrderedDict()

    # ------------------------------------------------------------------------------------------------------- runs

    @contextmanager
    def making(self, key: str) -> Iterator[Path]:
        """The folder of a run, for one thread at a time; afterwards the store is trimmed."""
        with self._lock:
            lock = self._making.setdefault(key, threading.Lock())
        try:
            with lock:
                yield self.runs / key
        finally:
            with self._lock:
                if not lock.locked():
                    self._making.pop(key, None)
        self.used(key)

    def has(self, key: str) -> bool:
        return (self.runs / key / "manifest.json").is_file()

    def used(self, key: str) -> None:
        """It was asked for now; others make room if there are too many."""
        with self._lock:
            if self.has(key):
                self._used[key] = time.monotonic()
                self._used.move_to_end(key)
                if key not in self._sizes:
                    self._sizes[key] = _bytes_of(self.runs / key)
            self._trim()

    def _trim(self) -> None:
        now_s = time.monotonic()
        for key, used_s in list(self._used.items())[:-1]:  # the latest stays, however large
            few = len(self._used) <= self.most_runs and sum(self._sizes.values()) <= self.most_bytes
            if few or (now_s - used_s < self.spared_s and len(self._used) <= 2 * self.most_runs):
                break
            shutil.rmtree(self.runs / key, ignore_errors=True)
            del self._used[key], self._sizes[key]
            self._read.pop(self.runs / key, None)
        for partial in self.runs.glob(".*.partial-*"):
            if not _alive(int(partial.name.rpartition("-")[2])):
                shutil.rmtree(partial, ignore_errors=True)

    def read(self, folder: Path, tables: Collection[str] = TABLES) -> Run:
        """`read_run` without the columns that others give, remembered; of a folder elsewhere too. With `tables` at
        least those are there."""
        with self._lock:
            known = self._read[folder][0] if folder in self._read and (folder / "manifest.json").is_file() else None
            there = {} if known is None else {name: getattr(known, name) for name in TABLES if getattr(known, name)}
            if known is not None and there.keys() >= set(tables):
                self._read.move_to_end(folder)
                return known
        run = read_run(folder, tables=set(tables) - there.keys(), without=DERIVED)
        run = replace(run, **there)
        size = sum(column.nbytes for table in (run.requests, run.iterations) for column in table.values())
        with self._lock:
            self._read[folder] = (run, size)
            self._read.move_to_end(folder)
            while len(self._read) > 1 and sum(bytes_ for _, bytes_ in self._read.values()) > self.most_read_bytes:
                self._read.popitem(last=False)
        return run

    # ---------------------------------------------------------------------------------------------------- uploads

    def keep_upload(self, name: str, digest: str, data: bytes) -> Path:
        """A file under its own name; the oldest make room."""
        folder = self.uploads / digest
        path = folder / (Path(name).name or "upload")
        with self._lock:
            folder.mkdir(exist_ok=True)
            if not path.is_file():
                path.write_bytes(data)
            os.utime(folder)
            oldest_first = sorted(self.uploads.iterdir(), key=lambda place: place.stat().st_mtime)
            for old in oldest_first[:-MOST_UPLOADS]:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def close(self) -> None:
        """End what runs and remove everything."""
        self.jobs.close()
        shutil.rmtree(self.root, ignore_errors=True)
        self._owned.close()


def remove_stale(parent: Path | None = None) -> list[Path]:
    """Folders of servers that ended without closing theirs; only our own, and only those nobody holds."""
    removed = []
    for root in (parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or just now going away
            if root.stat().st_uid != os.getuid() or not (root / "lock").is_file():
                continue
            _locked(root / "lock").close()
            shutil.rmtree(root)
            removed.append(root)
    return removed


def _locked(path: Path) -> IO[str]:
    """Open and hold; OSError if another process holds it. It lasts as long as the file is open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
