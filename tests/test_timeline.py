"""Timelines: valid trace events, nested properly, within the window and the limit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from made_results import Served, made_result, random_served

from llmsim.timeline import EVENTS_A_REQUEST, EVENTS_A_ROW, write_timeline

ROWS = (
    {"start_s": 0.0, "gpu_first_s": 0.5, "gpu_end_s": 0.6, "prefill_requests": 1, "prefill_tokens": 800, "mode": 2},
    {"start_s": 0.4, "iterations": 10, "seqs": 3, "gpu_first_s": 0.1, "gpu_end_s": 1.6, "kv_blocks": 12, "running": 3},
    {"start_s": 1.5, "seqs": 3, "gpu_first_s": 0.1, "gpu_end_s": 1.7},
)


def events(path: Path) -> list[dict[str, Any]]:
    document = json.loads(gzip.decompress(path.read_bytes()))
    assert document["displayTimeUnit"] == "ms"
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def test_iterations_are_complete_events_that_do_not_overlap(tmp_path: Path) -> None:
    result = made_result([Served(0.0, [0.6, 1.6, 1.7])], *ROWS)
    assert write_timeline(result, tmp_path / "t.json.gz") == []
    spans = [e for e in events(tmp_path / "t.json.gz") if e["ph"] == "X"]
    assert [e["name"] for e in spans] == ["prefill 800", "decode x10", "decode"]
    assert [e["ts"] for e in spans] == pytest.approx([0.1e6, 0.6e6, 1.6e6])  # scheduled early, run one after the other
    assert [e["ts"] + e["dur"] for e in spans] == pytest.approx([0.6e6, 1.6e6, 1.7e6])
    assert spans[0]["args"]["mode"] == "eager"
    counters = [e for e in events(tmp_path / "t.json.gz") if e["ph"] == "C" and e["name"] == "KV blocks"]
    assert [e["args"]["in use"] for e in counters] == [0, 12, 0]


def test_each_request_has_its_phases_in_order(tmp_path: Path) -> None:
    served = [Served(0.0, [0.6, 1.7], 0.2), Served(0.5, [])]
    write_timeline(made_result(served, *ROWS), tmp_path / "t.json.gz")
    phases = [e for e in events(tmp_path / "t.json.gz") if e["ph"] in "be"]
    assert [(e["ph"], e["name"]) for e in phases] == [
        (ph, name) for name in ("queue", "prefill", "decode") for ph in "be"
    ]
    assert [e["ts"] for e in phases] == pytest.approx([0, 0.2e6, 0.2e6, 0.6e6, 0.6e6, 1.7e6])


def test_a_window_keeps_what_begins_in_it(tmp_path: Path) -> None:
    result = made_result([Served(0.0, [0.6]), Served(1.0, [1.6])], *ROWS)
    write_timeline(result, tmp_path / "t.json.gz", window_s=(0.4, 1.2))
    kept = events(tmp_path / "t.json.gz")
    assert [e["name"] for e in kept if e["ph"] == "X"] == ["decode x10"]
    assert {e["id"] for e in kept if e["ph"] == "b"} == {1}
    with pytest.raises(ValueError, match="window 2:1 is empty"):
        write_timeline(result, tmp_path / "no.json.gz", window_s=(2.0, 1.0))
    assert not (tmp_path / "no.json.gz").exists()


def test_too_many_events_cut_the_window_and_say_so(tmp_path: Path) -> None:
    result = made_result(random_served(200, 0), *ROWS)
    limit = 100 * EVENTS_A_REQUEST + 3 * EVENTS_A_ROW
    notes = write_timeline(result, tmp_path / "t.json.gz", max_events=limit)
    assert len(notes) == 1 and "stops at" in notes[0]
    kept = [e for e in events(tmp_path / "t.json.gz") if e["ph"] != "M"]
    assert limit - EVENTS_A_REQUEST < len(kept) <= limit
