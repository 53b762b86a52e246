"""Parquet files read whole, by this thread and the CPU pool that it waits for.

`pyarrow.parquet.read_table` scans through a data set, whose threads may still let go of Python objects when the
interpreter ends: "terminate called without an active exception", exit status 134 after all is done (one run in 15 of a
busy machine with pyarrow 26; apache/arrow issues 34314, 39862). `ParquetFile.read` has no such threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any


def read_table(source: Any, columns: Sequence[str] | None = None) -> Any:
    """A pyarrow table of a path or buffer, or of some of its columns.

    Raises pyarrow.ArrowInvalid (a ValueError) if it is no whole Parquet file, two columns have one name or one asked
    for is not there; OSError if it cannot be read.
    """
    pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    with pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if twice is not None:
            raise pa.ArrowInvalid(f"two columns are called {twice!r}")
        missing = next((name for name in columns or () if name not in names), None)
        if missing is not None:
            raise pa.ArrowInvalid(f"no column {missing!r}")
        return file.read(columns=columns)
