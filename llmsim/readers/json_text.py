"""JSON traces: lines, one document, or an array; and where exactly a broken one breaks.

msgspec decodes the whole file in one call. If it refuses, each line is tried alone: first strictly, then with Python's
own decoder, which accepts NaN and Infinity so that the column check can name the field that holds them.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np

from llmsim.readers.rows import IntArray
from llmsim.readers.source import Source, not_utf8
from llmsim.readers.table import Records


def is_lines(source: Source) -> bool:
    """Whether a file that begins with ``{`` holds one object a line (a single whole line counts)."""
    first = source.data.lstrip().split(b"\n", 1)[0]
    if _lenient(first) is not None:
        return True
    # A broken first line above whole ones is a broken JSON lines file, not one document.
    rest = source.data.strip().split(b"\n", 2)
    return len(rest) > 1 and rest[1].lstrip().startswith(b"{") and _lenient(rest[1]) is not None


def read_lines(source: Source) -> Records:
    """One JSON object a line."""
    data = source.data.rstrip()
    try:
        records = msgspec.json.Decoder().decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _line_by_line(source, data)
    lines = _line_numbers(data, len(records))
    if len(lines) != len(records):  # an object over several lines: the decoder minds it less than a reader of lines
        return _line_by_line(source, data)
    return _records(source, records, lines, "line")


def _line_numbers(data: bytes, records: int) -> IntArray:
    if data.count(b"\n") + 1 == records:
        return np.arange(1, records + 1, dtype=np.int64)
    filled = [number for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    return np.array(filled, dtype=np.int64)


def _records(source: Source, records: list[Any], lines: IntArray, unit: str) -> Records:
    for line, record in zip(lines, records, strict=True):
        if type(record) is not dict:
            raise ValueError(
                f"{source.name}: {unit} {line}: expected a JSON object, found {_kind(record)}; a trace holds one "
                "object for each request"
            )
    return Records(source.name, records, lines, unit)


def _line_by_line(source: Source, data: bytes) -> Records:
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    records = []
    for position, (number, line) in enumerate(lines):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            offset = sum(len(before) + 1 for before in data.split(b"\n")[: number - 1]) + error.start
            raise not_utf8(source.name, data, offset) from None
        record = _lenient(line)
        if record is None:
            last = position == len(lines) - 1
            hint = f"file truncated? ({position} complete rows before it)" if last else _why(line)
            raise ValueError(f"{source.name}: line {number}: not valid JSON; {hint}")
        records.append(record)
    return _records(source, records, np.array([number for number, _ in lines], dtype=np.int64), "line")


def _lenient(text: bytes) -> Any:
    """The JSON value, or None if it is not JSON even when NaN and Infinity are allowed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _why(text: bytes) -> str:
    try:
        json.loads(text)
    except RecursionError:
        return "it is nested too deeply to be a request"
    except json.JSONDecodeError as error:
        return f"{error.msg} at column {error.colno}"
    except ValueError as error:  # the interpreter's limit on the digits of one integer
        return str(error).split(";")[0]
    return "it is not a JSON object"


def read_document(source: Source) -> Any:
    """One JSON value spread over the file: an object, or an array (cut arrays say what was whole)."""
    text = source.text()
    try:
        return msgspec.json.decode(source.data)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{source.name}: the JSON is nested too deeply to be a trace") from None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise _cut_array(source, text, error) from None
        offset = len(text[: error.pos].encode())
        cut = "; file truncated?" if error.pos >= len(text.rstrip()) - 1 else ""
        raise ValueError(
            f"{source.name}: line {error.lineno}: not valid JSON at byte offset {offset} ({error.msg}){cut}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{source.name}: {str(error).split(';')[0]}") from None


def _cut_array(source: Source, text: str, error: json.JSONDecodeError) -> ValueError:
    decoder, at, whole = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            break
        whole += 1
    offset = len(text[:at].encode())
    what = "conversations" if '"conversations"' in text[:4096] else "elements"
    end = len(text.rstrip())
    if error.msg == "Extra data":
        return ValueError(
            f"{source.name}: line {error.lineno}: more data after the JSON array; a trace is one array of objects, or "
            "one object a line"
        )
    cut = error.pos >= end - 1 or not text.rstrip().endswith("]")
    return ValueError(
        f"{source.name}: the JSON array {'is cut: file truncated?' if cut else 'is broken:'} byte offset {offset} of "
        f"{len(source.data)} begins an element that is not whole ({whole} complete {what} before it; {error.msg}); "
        "fetch the file again"
    )


def as_records(source: Source, array: list[Any]) -> Records:
    """An array of objects, numbered from 1."""
    return _records(source, array, np.arange(1, len(array) + 1, dtype=np.int64), "element")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true/false"}
    return kinds.get(type(value), "null")
