"""Parquet with a row for each request: only the columns that a format asks for become Python values.

Arrow holds what Python does not: times of any year, text that is not UTF-8, zones that nobody knows. Such values are
refused where a column that is read holds them, by row; other columns may hold anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.readers.rows import bad_rows
from llmsim.readers.source import Source
from llmsim.readers.table import Gathered

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetTable(Gathered):
    """The columns of an Arrow table."""

    def __init__(self, name: str, arrow: pa.Table) -> None:
        super().__init__(name, arrow.column_names, np.arange(1, arrow.num_rows + 1, dtype=np.int64), "row")
        self._arrow = arrow

    def _gather(self, column: str) -> list[Any]:
        arrow = self._arrow.column(column)
        try:
            values: list[Any] = arrow.to_pylist()
        except (ArithmeticError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
            raise self._unreadable(column, arrow) from None
        return values

    def _unreadable(self, column: str, arrow: pa.ChunkedArray) -> ValueError:
        expected, fix = f"a {arrow.type} that Python can hold", "correct it, or write the column as numbers"
        zone = getattr(arrow.type, "tz", None)
        bad: list[tuple[int, object]] = []
        for line, scalar in zip(self.lines.tolist(), arrow, strict=True):
            try:
                scalar.as_py()
            except UnicodeDecodeError as error:
                bad.append((line, error.object))
                expected, fix = "UTF-8 text", "write the column again as UTF-8"
            except (ArithmeticError, ValueError) as error:
                stored = getattr(scalar, "value", None)
                bad.append((line, stored if isinstance(stored, int) else error))
                if zone and isinstance(error, ValueError):
                    expected = f"a time in a zone that this machine knows (the column's is {zone!r})"
                    fix = "write the column in UTC"
        return bad_rows(self.name, bad, column, expected, fix, self.unit)


def read_parquet(source: Source) -> ParquetTable:
    import pyarrow as pa

    from llmsim.parquet import read_table

    try:
        arrow = read_table(pa.BufferReader(source.data))
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        if "decrypt" in reason:
            raise ValueError(f"{source.name}: an encrypted Parquet file ({reason}); write it unencrypted") from None
        raise ValueError(f"{source.name}: not a whole Parquet file: {reason}") from None
    if arrow.num_rows == 0:
        raise ValueError(f"{source.name}: the trace has columns but no requests")
    return ParquetTable(source.name, arrow)
