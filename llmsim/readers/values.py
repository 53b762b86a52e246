"""One value of a trace: token counts, seconds, wall-clock stamps, and why one is refused.

The slow and exact half of reading a column. `table.py` converts whole columns at once and comes here only when that
fails, to accept what is harmless (``12.0`` in a token column, as pandas writes it) and to name what is not.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

import numpy as np

from llmsim.readers.rows import MAX_TOKENS, FloatArray, IntArray, bad_rows, shown

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
STAMP = re.compile(
    r"(\d{4})[-/](\d{2})[-/](\d{2})(?:[ T](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?)?"
    r"\s*(Z|UTC|[+-]\d{2}(?::?\d{2})?)?",
    re.ASCII | re.IGNORECASE,
)
EPOCH = datetime(1970, 1, 1)
ACCEPTED_TIMES = "a finite number or a date like 2024-05-10 00:00:00.009930+00:00"
THOUSANDS = re.compile(r"[+-]?\d{1,3}([,.' _\u00a0\u202f]\d{3})+")


def count_of(value: object, *, text: bool, negative: bool = False) -> int | None:
    """A whole number, or None. `text`: the value comes from CSV, where every number is text."""
    number: int | float
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        stripped = value.strip()
        if not text or not NUMBER.fullmatch(stripped):
            return None
        if re.fullmatch(r"[+-]?\d+", stripped):
            number = int(stripped) if len(stripped) < 40 else MAX_TOKENS * MAX_TOKENS
        else:
            number = float(stripped)
    elif isinstance(value, int | float):
        number = value
    else:
        return None
    if isinstance(number, float) and not (math.isfinite(number) and number.is_integer()):
        return None
    whole = int(number)
    return None if (whole < 0 and not negative) or abs(whole) > MAX_TOKENS else whole


def why_not_count(value: object, *, text: bool) -> tuple[str, str]:
    """What was expected, and the fix, for a value `count_of` refused."""
    fix = ""
    number = value.strip() if isinstance(value, str) else value
    if isinstance(number, float) and not math.isfinite(number):
        return "a finite number", "token counts are whole numbers"
    if isinstance(number, str) and not text and NUMBER.fullmatch(number):
        fix = "write the number without quotes"
    elif isinstance(number, str) and THOUSANDS.fullmatch(number):
        fix = "write numbers without thousands separators"
    elif (isinstance(number, str) and NUMBER.fullmatch(number) and abs(float(number)) > MAX_TOKENS) or (
        isinstance(number, int | float) and not isinstance(number, bool) and abs(number) > MAX_TOKENS
    ):
        return f"a plausible token count (at most {MAX_TOKENS})", "is this column really tokens?"
    else:
        fix = "token counts are whole numbers"
    return "a non-negative integer", fix


def seconds_of(value: object, *, text: bool) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        if not text or not NUMBER.fullmatch(value.strip()):
            return None
        value = float(value)
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def stamp_of(value: object) -> tuple[int, bool] | None:
    """(nanoseconds since 1970, whether a UTC offset was given), or None: also of a time before the year 1 or after the
    year 9999 in UTC. Never through local time."""
    try:
        return _stamp_of(value)
    except OverflowError:
        return None


def _stamp_of(value: object) -> tuple[int, bool] | None:
    if isinstance(value, datetime):
        zoned = value.tzinfo is not None
        naive = value.astimezone(UTC).replace(tzinfo=None) if zoned else value
        return (naive - EPOCH) // timedelta(microseconds=1) * 1000, zoned
    match = STAMP.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    try:
        at = datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), min(int(second or 0), 59))
    except ValueError:
        return None
    if int(second or 0) > 60:
        return None
    at += timedelta(seconds=int(second or 0) - at.second)  # a leap second is the next minute's first
    if zone and zone.upper() not in ("Z", "UTC"):
        digits = zone[1:].replace(":", "").ljust(4, "0")
        offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        at -= offset if zone[0] == "+" else -offset
    nanoseconds = int((fraction or "0").ljust(9, "0"))
    return (at - EPOCH) // timedelta(seconds=1) * 1_000_000_000 + nanoseconds, bool(zone)


def counts(name: str, column: str, values: list[object], lines: IntArray, *, text: bool, unit: str) -> IntArray:
    """A token column value by value; every bad one is named."""
    parsed = [count_of(value, text=text) for value in values]
    missing = [int(lines[i]) for i, value in enumerate(values) if value is None]
    if missing:
        raise missing_field(name, column, missing, unit)
    bad = [(int(lines[i]), values[i]) for i, number in enumerate(parsed) if number is None]
    if bad:
        expected, fix = why_not_count(bad[0][1], text=text)
        raise bad_rows(name, bad, _named(column, text), expected, fix, unit)
    return np.array(parsed, dtype=np.int64)


def numbers(
    name: str,
    column: str,
    values: list[object],
    lines: IntArray,
    *,
    text: bool,
    unit: str,
    negative: bool = False,
    expected: str = "a finite number",
) -> FloatArray:
    """A column of finite numbers value by value."""
    missing = [int(lines[i]) for i, value in enumerate(values) if value is None]
    if missing:
        raise missing_field(name, column, missing, unit)
    parsed = [seconds_of(value, text=text) for value in values]
    bad = [
        (int(lines[i]), values[i]) for i, number in enumerate(parsed) if number is None or (number < 0 and not negative)
    ]
    if bad:
        first = seconds_of(bad[0][1], text=text)
        quoted = isinstance(bad[0][1], str) and not text and NUMBER.fullmatch(bad[0][1].strip())
        if first is not None:
            expected = "a finite number of at least 0"
        elif str(bad[0][1]).strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
            expected = "a finite number"
        raise bad_rows(
            name, bad, _named(column, text), expected, "write the number without quotes" if quoted else "", unit
        )
    return np.array(parsed, dtype=np.float64)


def stamps(name: str, column: str, values: list[object], lines: IntArray, *, text: bool, unit: str) -> FloatArray:
    """A column of dates value by value, as seconds since the earliest; zoned and unzoned may not mix."""
    parsed = [stamp_of(value) for value in values]
    bad = [(int(lines[i]), values[i]) for i, stamp in enumerate(parsed) if stamp is None]
    if bad:
        raise bad_rows(name, bad, _named(column, text), f"a readable time ({ACCEPTED_TIMES})", "", unit)
    read = [stamp for stamp in parsed if stamp is not None]
    zoned = [stamp[1] for stamp in read]
    if any(zoned) != all(zoned):
        other = zoned.index(not zoned[0])
        has, lacks = (other, 0) if zoned[other] else (0, other)
        raise ValueError(
            f"{name}: {unit} {lines[has]}: timestamp {shown(values[has])} has a UTC offset but {unit} {lines[lacks]} "
            f"({shown(values[lacks])}) has none; a trace must use one convention"
        )
    nanoseconds = np.array([stamp[0] for stamp in read], dtype=object)
    return np.array(nanoseconds - nanoseconds.min(), dtype=np.float64) * 1e-9


def missing_field(name: str, column: str, lines: list[int], unit: str = "line") -> ValueError:
    more = f" (also missing on {len(lines) - 1} more, next {unit} {lines[1]})" if len(lines) > 1 else ""
    return ValueError(f"{name}: {unit} {lines[0]}: {column} missing{more}; every request needs it")


def _named(column: str, text: bool) -> str:
    return f"column {column}" if text else column
