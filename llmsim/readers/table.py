"""Rows and columns, whatever file they came from: columns are asked for by name and checked as a whole.

A `Table` converts a column in one sweep (Arrow for CSV, one pass over the types for JSON). Only when that fails
does it go value by value (`values.py`) to accept what is harmless and to name the lines that are not. The sweep is
strictly narrower than the careful way, so it can never let through what the careful way refuses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.readers import values
from llmsim.readers.rows import MAX_TOKENS, FloatArray, IntArray


class Table(ABC):
    """Named columns; `text` says that every value is text (CSV), `unit` what `lines` counts."""

    text = False

    def __init__(self, name: str, names: Sequence[str], lines: IntArray, unit: str = "line") -> None:
        self.name = name
        self.names = list(names)
        self.lines = lines
        self.unit = unit
        self._by_fold = {fold(header): header for header in reversed(self.names)}

    def __len__(self) -> int:
        return len(self.lines)

    def find(self, *aliases: str) -> str | None:
        """The first of `aliases` that is a column, as the file spells it."""
        return next((self._by_fold[fold(alias)] for alias in aliases if fold(alias) in self._by_fold), None)

    @abstractmethod
    def raw(self, column: str) -> list[Any]:
        """The column's values as the file has them."""

    def _int_sweep(self, column: str) -> IntArray | None:
        types = set(map(type, self.raw(column)))
        if types != {int}:
            return None
        try:
            return np.array(self.raw(column), dtype=np.int64)
        except OverflowError:
            return None

    def _float_sweep(self, column: str) -> FloatArray | None:
        if not set(map(type, self.raw(column))) <= {int, float}:
            return None
        try:
            swept: FloatArray = np.array(self.raw(column), dtype=np.float64)
        except OverflowError:
            return None
        return swept

    def _stamp_sweep(self, column: str) -> FloatArray | None:
        return None

    def ints(self, column: str) -> IntArray:
        """A column of token counts."""
        swept = self._int_sweep(column)
        if swept is not None and (len(swept) == 0 or (swept.min() >= 0 and swept.max() <= MAX_TOKENS)):
            return swept
        return values.counts(self.name, column, self.raw(column), self.lines, text=self.text, unit=self.unit)

    def floats(self, column: str, *, negative: bool = False) -> FloatArray:
        """A column of finite numbers."""
        swept = self._float_sweep(column)
        if swept is not None and bool(np.isfinite(swept).all()) and (negative or len(swept) == 0 or swept.min() >= 0):
            return swept
        return values.numbers(
            self.name, column, self.raw(column), self.lines, text=self.text, unit=self.unit, negative=negative
        )

    def times(self, column: str, unit_s: float) -> FloatArray:
        """Seconds since the earliest stamp of the column: numbers of `unit_s` seconds each, or dates."""
        if not len(self):
            return np.empty(0)
        whole = self._int_sweep(column)
        if whole is not None and whole.min() >= 0:
            # Subtracted as integers: nanoseconds since 1970 do not fit a double.
            return np.asarray((whole - whole.min()) * unit_s)
        if self.is_dated(column):
            swept = self._stamp_sweep(column)
            if swept is not None:
                return swept
            return values.stamps(self.name, column, self.raw(column), self.lines, text=self.text, unit=self.unit)
        swept_s = self._float_sweep(column)
        if swept_s is not None and bool(np.isfinite(swept_s).all()) and swept_s.min() >= 0:
            numbers = swept_s
        else:
            numbers = values.numbers(
                self.name, column, self.raw(column), self.lines, text=self.text, unit=self.unit,
                expected=f"a readable time ({values.ACCEPTED_TIMES})",
            )  # fmt: skip
        return np.asarray((numbers - numbers.min()) * unit_s)

    def first(self, column: str) -> object:
        """The first value that is there."""
        return next((value for value in self.raw(column) if value not in (None, "")), None)

    def is_dated(self, column: str) -> bool:
        """Whether the column holds dates (and so needs no unit)."""
        return values.stamp_of(self.first(column)) is not None

    def where(self, mask: NDArray[np.bool_]) -> Table:
        """The rows of the mask, under their old line numbers."""
        return Part(self, mask)

    def texts(self, column: str) -> list[str]:
        """A column as text; absent is the empty string."""
        return ["" if value is None else value if type(value) is str else str(value) for value in self.raw(column)]


class Gathered(Table):
    """A table whose columns are gathered when they are asked for, once."""

    def __init__(self, name: str, names: Sequence[str], lines: IntArray, unit: str = "line") -> None:
        super().__init__(name, names, lines, unit)
        self._gathered: dict[str, list[Any]] = {}

    def raw(self, column: str) -> list[Any]:
        if column not in self._gathered:
            self._gathered[column] = self._gather(column)
        return self._gathered[column]

    @abstractmethod
    def _gather(self, column: str) -> list[Any]:
        """What `raw` gives."""


class Part(Gathered):
    """Some rows of a table."""

    def __init__(self, whole: Table, mask: NDArray[np.bool_]) -> None:
        super().__init__(whole.name, whole.names, whole.lines[mask], whole.unit)
        self.text = whole.text
        self._whole, self._kept = whole, np.flatnonzero(mask).tolist()

    def _gather(self, column: str) -> list[Any]:
        values = self._whole.raw(column)
        return [values[row] for row in self._kept]


class Records(Gathered):
    """JSON records: one dict each."""

    def __init__(self, name: str, records: list[dict[str, Any]], lines: IntArray, unit: str = "line") -> None:
        names: dict[str, None] = {}
        for record in records:
            if not names.keys() >= record.keys():  # a field may first appear far down the file
                names.update(dict.fromkeys(record))
        super().__init__(name, list(names), lines, unit)
        self.records = records

    def _gather(self, column: str) -> list[Any]:
        return [record.get(column) for record in self.records]


def fold(header: str) -> str:
    """Column names are compared without case, without surrounding space, without quotes."""
    return header.strip().strip('"').casefold()
