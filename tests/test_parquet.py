"""Parquet files read whole: without the threads of a data set, and without columns lost in silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmsim.parquet import read_table

ROOT = Path(__file__).parents[1]


def test_a_table_comes_back(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]}).replace_schema_metadata({"llmsim": "here"})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").equals(table, check_metadata=True)
    assert read_table(pa.BufferReader((tmp_path / "t.parquet").read_bytes()), ["b"]).to_pydict() == {"b": ["x", None]}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="two columns are called 'a'"):
        read_table(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no column 'c'"):
        read_table(tmp_path / "t.parquet", ["a", "c"])
    with pytest.raises(OSError, match=r"nowhere\.parquet"):
        read_table(tmp_path / "nowhere.parquet")


def test_nothing_scans_a_data_set_whose_threads_outlive_python(tmp_path: Path) -> None:
    """They abort a process that has done its work, now and then; so look for what starts them."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    code = f"import sys; from llmsim.parquet import read_table as r; r({str(tmp_path / 't.parquet')!r})"
    code += "; sys.exit('pyarrow.dataset' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for file in (path for folder in ("llmsim", "calibration", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        if file.name != "parquet.py":
            text = file.read_text()
            assert "pq.read_table" not in text and "pd.read_parquet" not in text, file
