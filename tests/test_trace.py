"""What happens to a trace between its file and its replay: dropped, sorted, cut, rescaled, spread; always counted."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmsim.trace import (
    Trace,
    at_rate,
    limited,
    load_trace,
    mean_rate_per_s,
    spread_ties,
    time_scaled,
    window,
)

HEADER = "arrival_time_s,prompt_tokens,output_tokens"


def trace(arrival_s: list[float], **columns: object) -> Trace:
    count = len(arrival_s)
    ones = np.ones(count, dtype=np.int64)
    return Trace("t", np.array(arrival_s, dtype=float), ones, ones, **columns)  # type: ignore[arg-type]


def read(tmp_path: Path, text: str, **options: object) -> Trace:
    (tmp_path / "t.csv").write_text(text)
    return load_trace(tmp_path / "t.csv", **options)  # type: ignore[arg-type]


def test_rows_read_are_kept_or_dropped_for_one_reason(tmp_path: Path) -> None:
    made = read(tmp_path, HEADER + "\n0,5,5\n1,0,0\n2,5,0\n3,0,5\n4,7,7\n")
    assert made.rows_read == len(made) + sum(made.dropped.values()) == 5
    assert dict(made.dropped) == {"prompt tokens = 0": 2, "output tokens = 0": 1}
    kept = read(tmp_path, HEADER + "\n0,5,5\n2,5,0\n", failed="keep")
    assert kept.output_tokens.tolist() == [5, 1]


def test_out_of_order_rows_are_sorted_stably_or_refused(tmp_path: Path) -> None:
    text = HEADER + "\n5,1,1\n3,2,1\n5,3,1\n3,4,1\n"
    made = read(tmp_path, text)
    assert made.prompt_tokens.tolist() == [2, 4, 1, 3] and made.arrival_s.tolist() == [0, 0, 2, 2]
    with pytest.raises(ValueError, match=r"2 rows are earlier than the row before them \(line 3, 5\)"):
        read(tmp_path, text, strict_order=True)


def test_over_context_is_refused_dropped_or_cut(tmp_path: Path) -> None:
    text = HEADER + "\n0,10,5\n1,90,20\n2,200,5\n"
    with pytest.raises(ValueError, match=r"2 requests .* context of 100 tokens \(first: line 3, prompt 90 \+"):
        read(tmp_path, text, context_tokens=100)
    assert dict(read(tmp_path, text, context_tokens=100, over_context="drop").dropped) == {
        "longer than the context of 100 tokens": 2
    }
    cut = read(tmp_path, text, context_tokens=100, over_context="truncate")
    assert cut.prompt_tokens.tolist() == [10, 90, 99] and cut.output_tokens.tolist() == [5, 10, 1]


def test_turn_of_a_dropped_parent_waits_for_its_grandparent(tmp_path: Path) -> None:
    text = HEADER + ",request_id,parent_id,delay_s\n0,5,5,a,,\n,5,0,b,a,2\n,5,5,c,b,3\n"
    made = read(tmp_path, text)
    assert made.parent is not None and made.delay_s is not None
    assert made.parent.tolist() == [-1, 0] and made.delay_s[1] == 5
    started = read(tmp_path, HEADER + ",request_id,parent_id,delay_s\n0,5,0,a,,\n,5,5,b,a,2\n7,5,5,c,,\n")
    assert started.parent is not None and started.parent.tolist() == [-1, -1]
    assert started.arrival_s.tolist() == [0, 5]  # 2 s after its lost parent's arrival, 5 s before c


def test_parents_listed_after_their_turns_come_first(tmp_path: Path) -> None:
    made = read(tmp_path, HEADER + ",request_id,parent_id,delay_s\n,5,5,b,a,2\n0,7,5,a,,\n")
    assert made.ids == ["a", "b"] and made.parent is not None and made.parent.tolist() == [-1, 0]


def test_window_moves_to_zero_and_keeps_whole_sessions() -> None:
    nan = np.nan
    sessions = trace([0, nan, 10, nan, 20], parent=np.array([-1, 0, -1, 2, -1]), delay_s=np.zeros(5))
    cut = window(sessions, 5, 10)
    assert len(cut) == 2 and cut.arrival_s[0] == 0 and np.isnan(cut.arrival_s[1])
    assert cut.parent is not None and cut.parent.tolist() == [-1, 0]
    with pytest.raises(ValueError, match="no request arrives"):
        window(sessions, 100)


def test_rescaling_keeps_the_shape_and_hits_the_rate() -> None:
    made = trace([0, 1, 5])
    assert time_scaled(made, 2).arrival_s.tolist() == [0, 2, 10]
    assert mean_rate_per_s(made) == 0.4  # two gaps in five seconds
    assert at_rate(made, 2).arrival_s.tolist() == [0, 0.2, 1]
    assert at_rate(made, np.inf).arrival_s.tolist() == [0, 0, 0]
    assert limited(made, 2).arrival_s.tolist() == [0, 1]
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match="above 0"):
            at_rate(made, bad)
        with pytest.raises(ValueError, match="above 0"):
            time_scaled(made, bad)


def test_ties_spread_inside_their_tick_in_file_order() -> None:
    made = trace([0.0] * 500 + [3.0] * 500, tick_s=3.0)
    spread = spread_ties(made, seed=1).arrival_s
    assert (np.diff(spread) >= 0).all() and len(np.unique(spread)) == 1000
    assert ((spread[:500] < 3) & (spread[500:] > 2.9)).all() and spread[-1] < 6
    assert np.array_equal(spread, spread_ties(made, seed=1).arrival_s)
    assert not np.array_equal(spread, spread_ties(made, seed=2).arrival_s)


def test_grid_of_arrivals_is_reported(tmp_path: Path) -> None:
    rows = "".join(f"{3 * (k // 4)},1,1\n" for k in range(40))
    assert any("--spread uniform" in note for note in read(tmp_path, HEADER + "\n" + rows).notes)


def test_file_without_times_needs_a_rate_for_more_than_a_batch(tmp_path: Path) -> None:
    text = "prompt_tokens,output_tokens\n" + "5,5\n" * 2000
    assert read(tmp_path, text).span_s == 0
    poisson = read(tmp_path, text, rate=10.0)
    assert mean_rate_per_s(poisson) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"failed": "maybe"}, "failed='maybe' is not one of drop, keep"),
        ({"time_unit": "h"}, "time_unit='h'"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"format": "nope"}, "format='nope' is not one of"),
        ({"columns": {"arrival": "nope"}}, "there is no column nope"),
        ({"block_tokens": 0}, "block_tokens=0"),
        ({"start_s": -1.0}, "the start must be >= 0"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, option: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read(tmp_path, HEADER + "\n0,1,1\n1,1,1\n", **option)


def test_reading_a_csv_imports_neither_pandas_nor_simpy(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + "\n0,1,1\n")
    code = f"import sys; from llmsim.trace import load_trace; load_trace({str(tmp_path / 't.csv')!r}); "
    code += "print([name for name in ('pandas', 'simpy', 'pyarrow.compute') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.speed
def test_a_million_rows_load_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    at_s = np.cumsum(rng.exponential(0.1, 1_000_000))
    (tmp_path / "m.csv").write_text(HEADER + "\n" + "".join(f"{at:.6f},1000,200\n" for at in at_s.tolist()))
    started_s = time.process_time()
    assert len(load_trace(tmp_path / "m.csv")) == 1_000_000
    assert time.process_time() - started_s < 5
