"""`sweep(spec)`: every run of a specification, on one machine or on a cluster, into one Parquet data set.

    from llmsim import sweep

    found = sweep("chunks.yaml", out="sweeps/chunks", jobs=2)
    found.frame()[["max_num_batched_tokens", "rate", "p99_ttft_ms"]]

What is in the folder is the same, byte for byte, whatever the number of jobs, the executor, the shards, and how often
it was stopped and resumed: parts are cut by the number of the run (llmsim.sweep_store), and a row is a function of its
run (llmsim.sweep_work). Differences between scenarios at the same trace, options and seed are paired: they replay the
same requests.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsim.runs import versions
from llmsim.sweep_columns import columns_of
from llmsim.sweep_files import digests, used_files
from llmsim.sweep_local import Done, in_process, in_processes
from llmsim.sweep_parts import Part, part_files, parts_of, read_about, read_part, runs_per_part
from llmsim.sweep_spec import Spec
from llmsim.sweep_store import Store
from llmsim.sweep_work import Work
from llmsim.sweep_yaml import read_spec

if TYPE_CHECKING:
    import pandas as pd

EXECUTORS = ("local", "ray")
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class SweepResult:
    """A folder of results: how many of its runs are there, and how many of those have an error instead of numbers."""

    folder: Path
    columns: tuple[str, ...]  # what varies
    runs: int
    done: int
    failed: int

    def frame(self) -> pd.DataFrame:
        """A row per run, by number; the columns of llmsim.sweep_columns, JSON left as text."""
        pa = import_module("pyarrow")
        tables = [read_part(path, part) for part, path in part_files(self.folder, self.runs)]
        if not tables:
            raise ValueError(f"{self.folder}: no part of the sweep is complete: run it, or add --resume to go on")
        return pa.concat_tables(tables).to_pandas()  # type: ignore[no-any-return]

    def manifest(self, run: int) -> dict[str, Any]:
        """What repeats a run: resolved scenario, trace and its SHA-256, seed, versions, command line."""
        return self._document(run, "manifest")

    def summary(self, run: int) -> dict[str, Any]:
        """All numbers of a run, as Result.summary() has them. ValueError if it failed."""
        return self._document(run, "summary")

    def _document(self, run: int, name: str) -> dict[str, Any]:
        for part, path in part_files(self.folder, self.runs):
            if part.first <= run < part.last:
                row = read_part(path, part, ["error", name]).slice(run - part.first, 1).to_pylist()[0]
                if row[name] is None:
                    raise ValueError(f"{self.folder}: run {run} failed: {row['error']}")
                return json.loads(row[name])  # type: ignore[no-any-return]
        if 0 <= run < self.runs:
            raise ValueError(f"{self.folder}: run {run} is not done: 'llmsim sweep' with --resume does it")
        raise ValueError(f"{self.folder}: has no run {run}: give 0 to {self.runs - 1}")


def sweep(
    spec: Spec | str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    jobs: int | None = None,
    executor: str = "local",
    shard: tuple[int, int] | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Do the runs that a specification (a YAML file, or a dict of its shape) lists and `out` does not hold yet.

    `jobs` runs are under way at a time, each in a process of its own; 1 and None: in this process. `executor="ray"`:
    on the Ray cluster that RAY_ADDRESS names, else on one started here; `jobs=None`: on all its CPUs. `shard=(i, n)` or
    "i/n": the i-th of n disjoint parts of the work; all may write to one folder.
    `progress(done, total, seconds left or None)` is told of every run.

    Raises ValueError or FileNotFoundError for a specification that is wrong, a file it names that is not there, and a
    folder that holds something else. A run that cannot be is a row with its `error`.
    """
    if not isinstance(spec, Spec | str | Path | Mapping):
        raise TypeError(f"sweep: spec={spec!r} is no specification: give a YAML file's path, or a dict of its shape")
    checked = spec if isinstance(spec, Spec) else read_spec(spec)
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs}: give 1 or more")
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r} is not one of {', '.join(EXECUTORS)}")
    wanted = shard_of(shard)
    parts = parts_of(checked.runs, wanted)
    files = digests(checked)
    store = Store(Path(out), columns_of(checked), described(checked, files))
    store.begin(checked.text, parts, resume=resume)
    todo = _Todo(checked, store, parts, files)
    try:
        works = iter(todo)
        if executor == "ray":
            from llmsim.sweep_ray import on_ray

            _keep(on_ray(works, jobs, files), store, todo, progress)
        else:
            done = in_processes(works, jobs) if jobs is not None and jobs > 1 else in_process(works)
            _keep(done, store, todo, progress)
    finally:
        store.close()
    return read_sweep(out)


def _keep(done: Iterator[Done], store: Store, todo: _Todo, progress: Progress | None) -> None:
    first_s, finished = 0.0, 0
    for _, row, _ in done:
        store.keep(row)
        finished += 1
        if progress is None:
            continue
        now_s = time.monotonic()
        if finished == 1:
            first_s = now_s  # starting workers or a cluster is no part of a run
            progress(todo.found + 1, todo.total, None)
            continue
        left = todo.total - todo.found - finished
        progress(todo.found + finished, todo.total, (now_s - first_s) / (finished - 1) * left)


class _Todo:
    """Draws the runs that are missing, a part at a time."""

    def __init__(self, spec: Spec, store: Store, parts: list[Part], files: dict[str, str]) -> None:
        self.spec, self.store, self.files = spec, store, files
        self.total = sum(len(part) for part in parts)
        self.parts = [part for part in parts if not self._is_done(part)]
        self.found = self.total - sum(len(part) for part in self.parts)  # runs that need not be done

    def _is_done(self, part: Part) -> bool:
        """ValueError if the part's file, which is whole, is of other runs: copied from another sweep's folder."""
        ids = self.store.ids(part)
        for run, there in zip(range(part.first, part.last), ids or (), strict=ids is not None):
            if there != work_of(self.spec, run, self.files).id:
                path = self.store.folder / f"{part.name}.parquet"
                raise ValueError(f"{path}: its run {run} is of another sweep: take the file away")
        return ids is not None

    def __iter__(self) -> Iterator[Work]:
        for part in self.parts:
            missing = self.store.missing(part)
            self.found += len(part) - len(missing)
            for run in missing:
                yield work_of(self.spec, run, self.files)


def work_of(spec: Spec, run: int, files: Mapping[str, str]) -> Work:
    labels, settings = spec.run(run)
    # The scenario's files count by their content: another policy under the same name is another run.
    named = {path: digest for path, digest in files.items() if path in used_files(settings)}
    what = json.dumps([settings, spec.goodput, named], sort_keys=True)
    identity = hashlib.sha256(what.encode()).hexdigest()[:16]
    sha256 = named.pop(settings["trace"])
    return Work(run, identity, labels, settings, spec.goodput, sha256, named)


def described(spec: Spec, files: Mapping[str, str]) -> dict[str, Any]:
    """What all results of a folder have in common; no date and no machine, so that it is the same everywhere."""
    return {
        "format": "llmsim-sweep",
        "specification": spec.digest,
        "runs": spec.runs,
        "runs_per_part": runs_per_part(spec.runs),
        "columns": list(spec.columns),
        "files": dict(files),
        "versions": versions(),
    }


def shard_of(shard: tuple[int, int] | str | None) -> tuple[int, int] | None:
    """(i, n) with 1 <= i <= n, also from "i/n"."""
    if shard is None:
        return None
    at, count = shard if not isinstance(shard, str) else _numbers(shard)
    if count < 1:
        raise ValueError(f"shard {at}/{count}: there are no {count} shards: write i/n, the first of four is 1/4")
    if not 1 <= at <= count:
        raise ValueError(f"shard {at}/{count}: give 1/{max(count, 1)} to {max(count, 1)}/{max(count, 1)}")
    return at, count


def _numbers(text: str) -> tuple[int, int]:
    at, slash, count = text.partition("/")
    if not (slash and at.strip().isdigit() and count.strip().isdigit()):
        raise ValueError(f"shard {text!r}: write i/n, the first of four is 1/4")
    return int(at), int(count)


def read_sweep(folder: str | Path) -> SweepResult:
    """The folder of a sweep as it stands, also one under way: what its complete parts hold.

    Raises FileNotFoundError for another folder, ValueError naming a file that is damaged or no part of the sweep.
    """
    folder = Path(folder)
    about = read_about(folder)
    done = failed = 0
    for part, path in part_files(folder, about["runs"]):
        errors = read_part(path, part, ["error"])["error"]
        done += len(errors)
        failed += len(errors) - errors.null_count
    return SweepResult(folder, tuple(about["columns"]), about["runs"], done, failed)
