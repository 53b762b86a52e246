"""`benchmarks.sweep`: what its table claims, of rounds made by hand."""

from __future__ import annotations

import pytest

from benchmarks.sweep import Taken, Way, in_turns, table

WORKERS = {"one process": 1, "--jobs 2": 2, "--executor ray --jobs 2": 2}


def rounds(others: float) -> dict[str, Taken]:
    """Two processes do 1.9 times the work of one; a run takes 5 % more CPU beside another, and 1 % in the parent."""
    return {
        "one process": Taken(1.0, 1.0, 1.0, 0.0, 0.01),
        "--jobs 2": Taken(1.9, 1.0, 1.04, 0.01, others),
        "--executor ray --jobs 2": Taken(1.8, 1.0, 1.05, 0.05, 0.02),
    }


def test_a_quiet_machine_scales_by_the_clock() -> None:
    lines = table(rounds(0.03), WORKERS, 1000, 3)
    assert "| --jobs 2 | 1.90 | 3.0% | 95% | 100.0% | 1.040 | 0.010 | 95% |" in lines
    assert "the machine was quiet." in lines[-1] and "takes +4.8% more under Ray" in lines[-1]


def test_a_busy_one_does_not_and_says_so() -> None:
    lines = table(rounds(0.031), WORKERS, 1000, 3)
    assert "| --jobs 2 | 1.90 | 3.1% | - | 100.0% | 1.040 | 0.010 | 95% |" in lines
    assert "was not quiet" in lines[-1]


def test_quiet_rounds_count_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([Taken(5.0, 1.0, 1.0, 0.0, 0.5), Taken(1.0, 0.9, 1.2, 0.0, 0.0), Taken(1.2, 0.8, 1.4, 0.0, 0.02)])
    monkeypatch.setattr("benchmarks.sweep.timed", lambda *_: next(made))
    way: Way = (iter, 1, list)
    found = in_turns({"one": way}, None, 3)["one"]  # type: ignore[arg-type]
    assert found == Taken(1.1, 0.9, 1.2, 0.0, 0.0)
