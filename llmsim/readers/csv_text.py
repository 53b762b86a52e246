"""CSV with a header: Arrow parses it, Python's own reader says what is wrong with it.

The delimiter is the comma, or the tab or semicolon of a header without commas. Lines are counted as an editor counts
them: the header is line 1, and a quoted line break makes the next row start further down.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.readers import values
from llmsim.readers.rows import FloatArray, IntArray, bad_rows, shown
from llmsim.readers.source import Source, not_utf8
from llmsim.readers.table import Table, fold

if TYPE_CHECKING:
    import pyarrow as pa

HEADER_BYTES = 1 << 16  # below the 131,072 characters that Python's reader takes in a field
Parse = Callable[[str, str, str], "NDArray[Any] | None"]  # (column, Arrow type, dtype) -> values, None: does not fit


class CsvTable(Table):
    """CSV: the text of every column, and typed columns parsed from the same bytes when asked for.

    Typed columns are parsed again rather than cast: `pyarrow.compute` and Arrow's `to_numpy` (which imports pandas)
    cost ten times as long to import as a 20,000-row file takes to read.
    """

    text = True

    def __init__(self, name: str, names: Sequence[str], lines: IntArray, texts: pa.Table, parse: Parse) -> None:
        super().__init__(name, names, lines)
        self._texts = texts
        self._parse = parse

    def raw(self, column: str) -> list[Any]:
        texts: list[Any] = self._texts.column(self.names.index(column)).to_pylist()
        return texts

    def first(self, column: str) -> object:
        head = self._texts.column(self.names.index(column)).slice(0, 1000).to_pylist()
        return next((text for text in head if text.strip()), None)

    def _typed(self, column: str, kind: str, dtype: str) -> NDArray[Any] | None:
        return self._parse(str(self.names.index(column)), kind, dtype)

    def _int_sweep(self, column: str) -> IntArray | None:
        return self._typed(column, "int64", "int64")

    def _float_sweep(self, column: str) -> FloatArray | None:
        return self._typed(column, "float64", "float64")

    def _stamp_sweep(self, column: str) -> FloatArray | None:
        for kind in ("timestamp[ns]", "timestamp[ns, UTC]"):
            nanoseconds = self._typed(column, kind, "int64")
            if nanoseconds is not None:
                return np.asarray((nanoseconds - nanoseconds.min()) * 1e-9)
        return None


def read_csv(source: Source, data: bytes | None = None, first_line: int = 1) -> CsvTable:
    """Parse CSV with a header. `first_line`: the header's line number in the file (a preamble may precede it)."""
    import pyarrow as pa
    import pyarrow.csv as pacsv

    data = source.data if data is None else data
    head = data[: data.find(b"\n")] if b"\n" in data else data
    delimiter, names = _header(source, head if head.count(b'"') % 2 == 0 else data[:65536], first_line)
    body = _without_blank_end(data)
    quoted = b'"' in body
    parse_options = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=quoted, ignore_empty_lines=True)
    read_options = pacsv.ReadOptions(column_names=[str(i) for i in range(len(names))], skip_rows_after_names=1)
    # One block is one piece of work. Arrow's threads would be starting still when a short file has been refused and the
    # process ends, which aborts it now and then; the one that its serial reader has was waited for.
    read_options.use_threads = len(body) > read_options.block_size

    def parsed(convert_options: Any) -> pa.Table:
        return pacsv.read_csv(
            pa.BufferReader(pa.py_buffer(body)),
            read_options=read_options,
            parse_options=parse_options,
            convert_options=convert_options,
        )

    def typed(column: str, kind: str, dtype: str) -> NDArray[Any] | None:
        if kind == "int64" and (b"0x" in body or b"0X" in body):
            return None  # Arrow reads 0x10 as sixteen; nobody writes tokens so on purpose
        kinds = {"timestamp[ns]": pa.timestamp("ns"), "timestamp[ns, UTC]": pa.timestamp("ns", "UTC")}
        arrow_type = kinds.get(kind) or pa.type_for_alias(kind)
        try:
            only = parsed(
                pacsv.ConvertOptions(column_types={column: arrow_type}, include_columns=[column], null_values=[])
            )
        except pa.ArrowInvalid:
            return None
        chunks = [
            np.frombuffer(chunk.buffers()[1], dtype=dtype)[chunk.offset : chunk.offset + len(chunk)]
            for chunk in only.column(0).chunks
            if len(chunk)
        ]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=dtype)

    every = pacsv.ConvertOptions(
        column_types={str(i): pa.string() for i in range(len(names))}, strings_can_be_null=False
    )
    try:
        try:
            arrow = parsed(every)
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error):
                raise
            read_options.block_size = len(body) + 1  # a row longer than Arrow's block: the ids of a very long prompt
            arrow = parsed(every)
    except pa.ArrowInvalid as error:
        if len(body.split(b"\n", 1)) == 1:
            raise ValueError(f"{source.name}: the trace has a header but no requests") from None
        raise _broken_csv(source, body, delimiter, len(names), first_line, str(error)) from None
    if arrow.num_rows == 0:
        raise ValueError(f"{source.name}: the trace has a header but no requests")
    plain = not quoted and body.count(b"\n") == arrow.num_rows and b"\r" not in body.replace(b"\r\n", b"")
    if plain:
        lines = np.arange(first_line + 1, first_line + 1 + arrow.num_rows, dtype=np.int64)
    else:
        starts = _line_numbers(source.name, body, delimiter, first_line)
        lines = np.array(starts[1:], dtype=np.int64)
    if len(lines) != arrow.num_rows:
        raise ValueError(f"{source.name}: quoting is inconsistent: {len(lines)} or {arrow.num_rows} rows; re-export it")
    return CsvTable(source.name, names, lines, arrow, typed)


def _without_blank_end(data: bytes) -> bytes:
    """Without the blank lines at the end; spaces that end the last row are part of it."""
    body = data.rstrip(b"\r\n")
    while b"\n" in body and not body[body.rfind(b"\n") :].strip():
        body = body[: body.rfind(b"\n")].rstrip(b"\r\n")
    return body


def _header(source: Source, head: bytes, first_line: int) -> tuple[str, list[str]]:
    if len(head) > HEADER_BYTES:
        raise ValueError(
            f"{source.name}: line {first_line}: {len(head):,} bytes where the header should be, which takes at most "
            f"{HEADER_BYTES:,}; give CSV with a header and a line for each request"
        )
    try:
        text = head.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(source.name, head, error.start) from None
    delimiter = next((mark for mark in (",", "\t", ";") if mark in text), ",")
    if "\r" in text:
        raise ValueError(f"{source.name}: line {first_line}: lines end in CR alone; convert them to LF: tr '\\r' '\\n'")
    if not text.strip():
        raise ValueError(f"{source.name}: line {first_line}: blank where the header should be; remove the line")
    if text.startswith("#"):
        raise ValueError(f"{source.name}: line {first_line}: a comment where the header should be; remove it")
    names = [name.strip() for name in next(csv.reader(io.StringIO(text), delimiter=delimiter), [])]
    first = names[0] if names else ""
    if values.NUMBER.fullmatch(first) or values.stamp_of(first) is not None:
        servegen = re.fullmatch(r"chunk-\d+-trace\.csv", source.name)
        if servegen:
            raise ValueError(f"{source.name}: one client of a ServeGen pool; give the directory that holds it instead")
        raise ValueError(
            f"{source.name}: line {first_line}: the first line is data ({shown(first)}), not a header; add a header, "
            'for example "TIMESTAMP,ContextTokens,GeneratedTokens" for an Azure trace or '
            '"arrival_time_s,prompt_tokens,output_tokens"'
        )
    seen: dict[str, int] = {}
    for position, name in enumerate(names, start=1):
        if fold(name) in seen and fold(name):
            raise ValueError(
                f"{source.name}: line {first_line}: column {name} appears twice in the header (columns "
                f"{seen[fold(name)]} and {position}); rename or remove one"
            )
        seen[fold(name)] = position
    return delimiter, names


def _line_numbers(name: str, body: bytes, delimiter: str, first_line: int) -> list[int]:
    """The line each row starts on; blank lines and quoted line breaks make it differ from the row number."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(name, body, error.start, first_line) from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    starts, at = [], first_line
    try:
        for row in reader:
            if row:
                starts.append(at)
            at = first_line + reader.line_num
    except csv.Error as error:
        raise ValueError(f"{name}: line {at}: {error}; is a quote left open, or a line break a lone CR?") from None
    return starts


def _broken_csv(source: Source, body: bytes, delimiter: str, width: int, first_line: int, why: str) -> ValueError:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(source.name, source.data, source.data.find(body) + error.start)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    bad, at = [], first_line
    try:
        for row in reader:
            if row and len(row) != width:
                bad.append((at, len(row)))
            at = first_line + reader.line_num
    except csv.Error as error:
        return ValueError(f"{source.name}: line {at}: {error}; is a quote left open?")
    if bad:
        fix = "write numbers without thousands separators, and quote text that holds a comma"
        if bad[0][1] < width:
            last = bad[0][0] == at - 1
            fix = "file truncated?" if last and len(bad) == 1 else "every row needs every column"
        expected = f"the number of fields of the header ({width})"
        return bad_rows(source.name, bad, "fields on the line", expected, fix)
    return ValueError(f"{source.name}: not readable as CSV: {' '.join(why.split())[:200]}")
