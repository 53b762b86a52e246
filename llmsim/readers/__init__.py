"""Readers: one file for each family of trace formats, and the literal list of what is recognised.

`read` decides by content, never by file name: magic bytes, then the shape of the file (CSV with a header, JSON lines,
one JSON document, a JSON array, Parquet, a directory), then the names it uses. The first format of `FORMATS` that fits
wins; generic columns come last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsim.readers import delimited, generic, json_text, mooncake
from llmsim.readers.rows import ReadOptions, Rows
from llmsim.readers.source import PARQUET, Source
from llmsim.readers.table import Columns, Records, Table, fold, read_csv


@dataclass(frozen=True)
class Format:
    """A trace format: what it is called, where it occurs, how it is recognised, who reads it."""

    name: str
    shape: str  # csv | records | document | directory
    fits: Callable[[set[str]], bool]
    read: Callable[[Any, ReadOptions], Rows]


FORMATS = (
    Format("mooncake", "records", mooncake.fits, mooncake.read),
    Format("azure", "csv", delimited.fits_azure, delimited.read_azure),
    Format("burstgpt", "csv", delimited.fits_burstgpt, delimited.read_burstgpt),
    Format("vidur", "csv", delimited.fits_vidur, delimited.read_vidur),
    Format("splitwise", "csv", delimited.fits_splitwise, delimited.read_splitwise),
    Format("generic", "records", lambda keys: True, generic.read),
    Format("generic", "csv", lambda keys: True, generic.read),
)


def read(source: Source, options: ReadOptions, format: str | None = None) -> Rows:
    """The requests of a source, by the format given or else recognised."""
    shape, content = _shape(source)
    return _choose(source, shape, _keys(content), options, format).read(content, options)


def _shape(source: Source) -> tuple[str, Any]:
    head = source.data.lstrip()[:1]
    if source.data.startswith(PARQUET):
        return "csv", _parquet(source)
    if head == b"[":
        return "records", json_text.as_records(source, json_text.read_document(source))
    if head == b"{":
        return "records", json_text.read_lines(source)
    return "csv", read_csv(source)


def _keys(content: Any) -> set[str]:
    return {fold(name) for name in content.names} if isinstance(content, Table) else set(map(str, content))


def _choose(source: Source, shape: str, keys: set[str], options: ReadOptions, format: str | None) -> Format:
    if format is None and options.columns:
        format = "generic"
    named = [one for one in FORMATS if format in (None, one.name)]
    return next(one for one in named if one.shape == shape and (format is not None or one.fits(keys)))


def _parquet(source: Source) -> Columns:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(pa.BufferReader(source.data))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source.name}: not a whole Parquet file: {' '.join(str(error).split())[:160]}") from None
    if arrow.num_rows == 0:
        raise ValueError(f"{source.name}: the trace has columns but no requests")
    columns = {name: arrow.column(name).to_pylist() for name in arrow.column_names}
    return Columns(source.name, columns, np.arange(1, arrow.num_rows + 1, dtype=np.int64), "row")


__all__ = ["FORMATS", "Format", "ReadOptions", "Records", "Rows", "Source", "read"]
