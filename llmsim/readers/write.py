"""Traces to files: generic CSV, JSON lines or Parquet, and Mooncake JSON lines.

What the generic forms write, `generic.read` reads back identically: floats in their shortest exact form, prefix ids as
whole numbers (ids of other kinds are numbered in order of appearance), the block size in a column of its own.
Mooncake keeps times (milliseconds), lengths, ids and session delays; what it cannot hold is an error, not a loss.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmsim.trace import Trace

WRITERS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
IDS = ("hash_ids", "output_hash_ids")


def write_trace(trace: Trace, path: str | Path, format: str | None = None) -> str:
    """Write `trace`; the format is the file's suffix unless given (csv, jsonl, parquet, mooncake)."""
    kind = check_writable(path, format)
    place = Path(path).resolve()  # through a symbolic link to the file it names
    if place.exists() and not place.is_file():  # /dev/stdout, a named pipe: nothing to rename into place
        _write(trace, place, kind)
        return kind
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        _write(trace, partial, kind)
        os.replace(partial, place)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
    except BaseException:  # Ctrl-C included: nothing half-written stays, and what was there before does
        partial.unlink(missing_ok=True)
        raise
    return kind


def check_writable(path: str | Path, format: str | None = None) -> str:
    """The format a file would be written in; an error if it could not be, before there is anything to lose."""
    place = Path(path)
    kind = format or WRITERS.get(place.suffix)
    if str(path) == "-":
        raise ValueError("-: traces are not written to standard output under this name; give a file, or /dev/stdout")
    if kind not in ("csv", "jsonl", "parquet", "mooncake"):
        raise ValueError(
            f"{path}: cannot tell the format to write: end the name in .csv, .jsonl or .parquet, or give --to"
        )
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {place.parent}; create it first")
    if place.is_dir():
        raise ValueError(f"{path}: is a directory; give the name of a file")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write there; give another name")
    return kind


def left_out(trace: Trace, kind: str) -> list[str]:
    """What the written form has no place for although a replay does not need it, as notes."""
    waits = trace.parent is not None and bool(np.isnan(trace.arrival_s).any())
    labels = ["ids", "model", "tenant", "slo_ttft_s", "slo_tpot_s", "deadline_s", "predicted_tokens"]
    labels += [] if waits else ["parent"]
    lost = [name for name in labels if getattr(trace, name) is not None]
    return [f"Mooncake lines have no place for {', '.join(lost)}: left out"] if kind == "mooncake" and lost else []


def _write(trace: Trace, place: Path, kind: str) -> None:
    if kind == "mooncake":
        _write_lines(place, _mooncake(trace))
    elif kind == "parquet":
        _write_parquet(place, columns(trace))
    elif kind == "jsonl":
        made = columns(trace)
        rows = zip(*made.values(), strict=True)
        _write_lines(place, ({k: v for k, v in zip(made, row, strict=True) if v is not None} for row in rows))
    else:
        _write_csv(place, columns(trace))


def columns(trace: Trace) -> dict[str, list[Any]]:
    """The generic columns of a trace; None where a request has no value."""
    made: dict[str, list[Any]] = {}
    ids = trace.ids
    if ids is None and trace.parent is not None:
        ids = [str(row) for row in range(len(trace))]
    if ids is not None:
        made["request_id"] = ids
    made["arrival_time_s"] = _sparse(trace.arrival_s)
    made["prompt_tokens"] = trace.prompt_tokens.tolist()
    made["output_tokens"] = trace.output_tokens.tolist()
    if trace.session is not None:
        made["session_id"] = trace.session
    if trace.parent is not None and ids is not None:
        made["parent_id"] = [ids[row] if row >= 0 else None for row in trace.parent.tolist()]
        made["delay_s"] = _sparse(trace.delay_s if trace.delay_s is not None else np.zeros(len(trace)))
    if trace.priority is not None:
        made["priority"] = trace.priority.tolist()
    for name, values in (("slo_class", trace.slo_class), ("model", trace.model), ("tenant", trace.tenant)):
        if values is not None:
            made[name] = list(values)
    for name, seconds in (("slo_ttft_ms", trace.slo_ttft_s), ("slo_tpot_ms", trace.slo_tpot_s)):
        if seconds is not None:
            made[name] = _sparse(seconds * 1e3)
    if trace.deadline_s is not None:
        made["deadline_s"] = _sparse(trace.deadline_s)
    if trace.predicted_tokens is not None:
        made["predicted_tokens"] = _sparse(trace.predicted_tokens)
    if trace.block_ids is not None:
        number = _numbering(trace)
        made["hash_ids"] = [[number(block) for block in ids] for ids in trace.block_ids]
        if trace.output_block_ids is not None:
            made["output_hash_ids"] = [[number(block) for block in ids] for ids in trace.output_block_ids]
        made["block_tokens"] = [trace.block_tokens] * len(trace)
    return made


def _numbering(trace: Trace) -> Any:
    lists = (trace.block_ids or []) + (trace.output_block_ids or [])
    if all(type(block) is int for ids in lists for block in ids):
        return lambda block: block
    numbers: dict[Hashable, int] = {}
    return lambda block: numbers.setdefault(block, len(numbers))


def _sparse(values: Any) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _write_csv(place: Path, made: dict[str, list[Any]]) -> None:
    for name in IDS:
        if name in made:
            made[name] = [";".join(map(str, ids)) for ids in made[name]]
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(made)
        writer.writerows(zip(*made.values(), strict=True))


def _write_lines(place: Path, records: Iterator[dict[str, Any]]) -> None:
    with place.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _write_parquet(place: Path, made: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(made), place)


def _mooncake(trace: Trace) -> Iterator[dict[str, Any]]:
    if trace.priority is not None or trace.slo_class is not None or trace.output_block_ids is not None:
        kept = "times, lengths, hash_ids and session delays"
        raise ValueError(
            f"{trace.name}: Mooncake lines hold only {kept}; write .jsonl to keep classes and answers' ids"
        )
    waits = trace.parent is not None and bool(np.isnan(trace.arrival_s).any())
    if waits and not _chains(trace):
        raise ValueError(
            f"{trace.name}: turns do not follow one another in their sessions; write .jsonl to keep parents"
        )
    number = _numbering(trace)
    for row in range(len(trace)):
        record: dict[str, Any] = {}
        at_s = float(trace.arrival_s[row])
        if at_s == at_s:
            record["timestamp"] = at_s * 1e3
        if trace.session is not None and trace.session[row]:
            record["session_id"] = trace.session[row]
            if at_s != at_s and trace.delay_s is not None:
                record["delay"] = float(trace.delay_s[row]) * 1e3
        record["input_length"] = int(trace.prompt_tokens[row])
        record["output_length"] = int(trace.output_tokens[row])
        if trace.block_ids is not None:
            record["hash_ids"] = [number(block) for block in trace.block_ids[row]]
        yield record


def _chains(trace: Trace) -> bool:
    """Whether every turn's parent is the previous row of its session."""
    if trace.session is None or trace.parent is None:
        return False
    previous: dict[str, int] = {}
    for row, (name, parent) in enumerate(zip(trace.session, trace.parent.tolist(), strict=True)):
        if name and previous.get(name, -1) != parent:
            return False
        previous[name] = row
    return True
