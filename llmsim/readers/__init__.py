"""Readers: one file for each family of trace formats, and the literal list of what is recognised.

`read` decides by content, never by file name: magic bytes, then the shape of the file (CSV with a header, JSON lines,
one JSON document, a JSON array, Parquet, a directory), then the names it uses. The first format of `FORMATS` that fits
wins; generic columns come last.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsim.readers import (
    blis,
    delimited,
    generic,
    json_text,
    llmservingsim,
    mooncake,
    qwen,
    results,
    servegen,
    sharegpt,
    weka,
)  # fmt: skip
from llmsim.readers.csv_text import read_csv
from llmsim.readers.effect import apply_filters, idle_options
from llmsim.readers.parquet import read_parquet
from llmsim.readers.rows import ReadOptions, Rows, listed
from llmsim.readers.source import PARQUET, Source, open_source
from llmsim.readers.table import Records, Table, fold


@dataclass(frozen=True)
class Format:
    """A trace format: what it is called, where it occurs, how it is recognised, who reads it."""

    name: str
    shapes: frozenset[str]  # csv (and Parquet) | records (JSON lines, an array, one document) | directory
    fits: Callable[[set[str]], bool]
    read: Callable[[Any, ReadOptions], Rows]


ANY = frozenset({"csv", "records"})
RECORDS = frozenset({"records"})
CSV = frozenset({"csv"})
DIRECTORY = frozenset({"directory"})
FORMATS = (
    Format("qwen-bailian", RECORDS, qwen.fits, qwen.read),
    Format("llmservingsim", RECORDS, llmservingsim.fits, llmservingsim.read),
    Format("aiperf-result", RECORDS, results.fits_aiperf, results.read_aiperf),
    Format("llmservingsim-bench", RECORDS, results.fits_bench, results.read_bench),
    Format("weka", RECORDS, weka.fits, weka.read),
    Format("agent-turns", ANY, weka.fits_turns, weka.read_turns),
    Format("vllm-result", RECORDS, results.fits_vllm, results.read_vllm),
    Format("guidellm", RECORDS, results.fits_guidellm, results.read_guidellm),
    Format("sharegpt", RECORDS, sharegpt.fits, sharegpt.read),
    Format("mooncake", RECORDS, mooncake.fits, mooncake.read),
    Format("prompts", RECORDS, sharegpt.fits_prompts, sharegpt.read_prompts),
    Format("azure", CSV, delimited.fits_azure, delimited.read_azure),
    Format("burstgpt", CSV, delimited.fits_burstgpt, delimited.read_burstgpt),
    Format("vidur", CSV, delimited.fits_vidur, delimited.read_vidur),
    Format("splitwise", CSV, delimited.fits_splitwise, delimited.read_splitwise),
    Format("blis", CSV, blis.fits, blis.read),
    Format("servegen", DIRECTORY, lambda keys: False, servegen.read),
    Format("generic", ANY, lambda keys: True, generic.read),
)
ALIASES = {
    "aiperf": "mooncake", "dynamo": "mooncake", "qwen": "qwen-bailian", "csv": "generic", "jsonl": "generic",
    "parquet": "generic", "vllm": "vllm-result",
}  # fmt: skip
SHAPES = {"csv": "a table with a header", "records": "JSON", "directory": "a directory"}


def read(source: Source, options: ReadOptions, format: str | None = None) -> Rows:
    """The requests of a source, by the format given or else recognised."""
    collecting = gc.isenabled()
    gc.disable()  # a million new containers and no garbage: collecting meanwhile doubles the time
    try:
        rows = _read(source, options, format)
        apply_filters(source.name, rows, options)
        rows.notes += idle_options(rows, options)
        return rows
    finally:
        if collecting:
            gc.enable()


def _read(source: Source, options: ReadOptions, format: str | None) -> Rows:
    if format is not None:
        format = ALIASES.get(format, format)
        known = [one.name for one in FORMATS]
        if format not in known:
            raise ValueError(f"format={format!r} is not one of {', '.join(known)}")
    if source.directory is not None:
        return _read_directory(source, source.directory, options, format)
    shape, content = _shape(source)
    return _choose(source, shape, _keys(content), options, format).read(content, options)


def _shape(source: Source) -> tuple[str, Table]:
    head = source.data.lstrip()[:1]
    if source.data.startswith(PARQUET):
        return "csv", read_parquet(source)
    if head == b"[":
        return "records", _array(source)
    if head == b"{":
        if json_text.is_lines(source):
            return "records", json_text.read_lines(source)
        return "records", json_text.as_records(source, [json_text.read_document(source)])
    if blis.is_preamble(source):
        return "csv", blis.read_with_preamble(source)
    return "csv", read_csv(source)


def _array(source: Source) -> Records:
    array = json_text.read_document(source)
    if not array:
        raise ValueError(f"{source.name}: the JSON array is empty; a trace needs at least one request")
    return json_text.as_records(source, array)


def _read_directory(source: Source, directory: Path, options: ReadOptions, format: str | None) -> Rows:
    if format in (None, "servegen") and servegen.chunks(directory):
        return servegen.read(source, options)
    sessions = sorted(path for path in directory.iterdir() if path.suffix == ".json")
    others = [path.name for path in directory.iterdir() if path.suffix != ".json" and not path.name.startswith(".")]
    if format in (None, "weka") and sessions and not others:
        documents = [json_text.read_document(open_source(path)) for path in sessions]
        records = json_text.as_records(source, documents)
        lacking = [path.name for path, one in zip(sessions, records.records, strict=True) if not weka.fits(set(one))]
        if lacking:
            raise ValueError(f"{source.name}: {lacking[0]} is not a Weka session (requests, hash_id_scope)")
        return weka.read(records, options)
    held = sorted(others + [path.name for path in sessions])
    raise ValueError(
        f"{source.name}: a directory, but neither a ServeGen pool (chunk-<i>-trace.csv) nor only Weka sessions: "
        f"it holds {listed(held) or 'nothing'}; give the trace file itself"
    )


def _keys(content: Any) -> set[str]:
    return {fold(name) for name in content.names} if isinstance(content, Table) else set(map(str, content))


def _choose(source: Source, shape: str, keys: set[str], options: ReadOptions, format: str | None) -> Format:
    if format is None and options.columns:
        format = "generic"
    if format is None:
        if "messages" in keys and not keys & {"input_length", "timestamp", "session_id", "delay", "hash_ids"}:
            format = "sharegpt"  # derivatives of ShareGPT call their conversations messages
        else:
            return next(one for one in FORMATS if shape in one.shapes and one.fits(keys))
    chosen = next(one for one in FORMATS if one.name == format)
    if shape not in chosen.shapes:
        needed = " or ".join(SHAPES[one] for one in sorted(chosen.shapes))
        raise ValueError(
            f"{source.name}: --format {format} needs {needed}, but this is {SHAPES[shape]}; leave --format out"
        )
    return chosen


__all__ = ["FORMATS", "Format", "ReadOptions", "Records", "Rows", "Source", "read"]
