"""A run folder: everything one replay produced, in files other tools read.

    summary.json         `Result.summary()` without its wall-clock keys (llmsim.metrics.WALL_KEYS); with `detailed` also
                         vLLM's per-request arrays input_lens, output_lens, ttfts, latencies, start_times (s) and
                         errors; `itls` is left out: gaps are logged by iteration, not by request
    requests.parquet     a row per request: the columns of `Result.requests` and, in seconds, ttft_s, tpot_s, e2el_s,
                         queue_s, prefill_s, decode_s; null where a number does not exist
    iterations.parquet   a row per run of iterations: the columns of `Result.iterations`
    trace.json.gz        the timeline, if asked for (llmsim.timeline)
    manifest.json        how it came about: scenario, versions, seed, what the caller adds (command line, trace), date
                         and wall time, size and SHA-256 of the other files

All but manifest.json are byte for byte the same for the same version, seed, trace and scenario. The folder is written
under another name and renamed when it is complete, so an interrupted or failed write leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import llmsim
from llmsim.metrics import WALL_KEYS, Columns, Result, breakdown_s, goodput_of, json_safe, latencies_s
from llmsim.timeline import write_timeline

TABLES = ("requests", "iterations")
# of requests.parquet: for other tools; `latencies_s` and `breakdown_s` give them again
DERIVED = ("ttft_s", "tpot_s", "e2el_s", "queue_s", "prefill_s", "decode_s")


@dataclass(frozen=True)
class Run:
    """A run folder read back."""

    folder: Path
    summary: dict[str, Any]
    manifest: dict[str, Any]
    requests: Columns
    iterations: Columns


def write_run(
    result: Result,
    folder: Path,
    *,
    summary: dict[str, Any],
    manifest_extra: dict[str, Any] | None = None,
    timeline: bool = False,
    timeline_window_s: tuple[float, float] | None = None,
    detailed: bool = False,
) -> list[str]:
    """Write the folder; returns what should be said about it (a timeline that had to be cut), one line each."""
    notes: list[str] = []
    with complete_folder(folder) as partial:
        kept = {name: value for name, value in summary.items() if name not in WALL_KEYS}
        write_json(partial / "summary.json", kept | (detailed_arrays(result.requests) if detailed else {}))
        write_parquet(partial / "requests.parquet", _request_columns(result.requests))
        write_parquet(partial / "iterations.parquet", result.iterations)
        if timeline:
            notes += write_timeline(result, partial / "trace.json.gz", window_s=timeline_window_s)
        write_json(partial / "manifest.json", _manifest(result, summary, partial) | (manifest_extra or {}))
    return notes


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name once everything is in it; an error leaves nothing behind."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={folder}: exists and is not an empty folder; give another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(error.errno or 0, error.strerror or str(error), str(folder)) from error
    except BaseException:  # Ctrl-C included: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_run(folder: Path, *, tables: Collection[str] = TABLES, without: Collection[str] = ()) -> Run:
    """A table that is not among `tables` has no columns, and no table has those named by `without`: of a run of a
    million requests reading both tables takes a second, the requests without what is `DERIVED` a tenth of it.

    Raises FileNotFoundError for what is no run folder, ValueError for a damaged one.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: not a run folder (no manifest.json); give the folder that --out wrote")
    documents = {}
    for name in ("summary", "manifest"):
        try:
            documents[name] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / name}.json: cannot be read ({error}); repeat the run") from None
    read = {name: _read_parquet(folder / f"{name}.parquet", without) if name in tables else {} for name in TABLES}
    return Run(folder, documents["summary"], documents["manifest"], read["requests"], read["iterations"])


def with_goodput(run: Run, targets: dict[str, float]) -> Run:
    """The same run, judged by other targets (milliseconds) than those it was written with."""
    completed = np.isfinite(run.requests["finish_s"])
    done = {name: column[completed] for name, column in run.requests.items()}
    judged = goodput_of(done, latencies_s(done), targets, len(completed), run.summary["duration"])
    return replace(run, summary=run.summary | json_safe(judged))


def detailed_arrays(requests: Columns) -> dict[str, list[Any]]:
    """Per-request arrays under vLLM's names; a rejected request has output 0 and an error, as there."""
    done = np.isfinite(requests["finish_s"])
    latency_s = latencies_s(requests)
    return {
        "input_lens": requests["prompt_tokens"].tolist(),
        "output_lens": np.where(done, requests["output_tokens"], 0).tolist(),
        "ttfts": np.where(done, latency_s["ttft"], 0.0).tolist(),
        "latencies": np.where(done, latency_s["e2el"], 0.0).tolist(),
        "start_times": requests["arrival_s"].tolist(),
        "errors": _errors(requests, done),
    }


def _errors(requests: Columns, done: Any) -> list[str]:
    turned_away = requests.get("turned_away", np.zeros(len(done), dtype=bool))
    reasons = np.where(turned_away, "rejected: turned away by the policy", "rejected: its KV blocks can never fit")
    return [str(reason) for reason in np.where(done, "", reasons)]


def _request_columns(requests: Columns) -> Columns:
    parts = {f"{name}_s": values for name, values in breakdown_s(requests).items() if name != "preempted"}
    return requests | {f"{name}_s": values for name, values in latencies_s(requests).items()} | parts


def _manifest(result: Result, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "versions": versions(),
        "scenario": result.scenario.to_dict(),
        "seed": result.scenario.seed,
        "kv_blocks": result.kv_blocks,
        "calibration": summary["calibration"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: summary.get(name) for name in WALL_KEYS},
        "files": facts_of_files(folder),
    }


def versions() -> dict[str, str]:
    packages: Sequence[str] = ("numpy", "simpy", "pyarrow")
    own = {"llmsim": llmsim.__version__, "python": platform.python_version()}
    return own | {package: version(package) for package in packages}


def facts_of_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of what a folder holds."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(json_safe(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_parquet(path: Path, columns: Columns) -> None:
    pa, pq = _pyarrow()
    # from_pandas: nan, "has not happened", becomes null
    table = pa.table({name: pa.array(column, from_pandas=True) for name, column in columns.items()})
    pq.write_table(table, path, compression="zstd")


def _pyarrow() -> tuple[Any, Any]:
    """Imported when a run is written or read: 0.2 s that other commands need not spend. Untyped: it ships no stubs."""
    return import_module("pyarrow"), import_module("pyarrow.parquet")


def _read_parquet(path: Path, without: Collection[str] = ()) -> Columns:
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            table = file.read([name for name in file.schema_arrow.names if name not in without])
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); repeat the run") from None
    return {name: table.column(name).to_numpy() for name in table.column_names}
