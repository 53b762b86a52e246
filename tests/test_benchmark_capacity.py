"""`benchmarks.capacity` on an engine that is known: what was recorded is what the simulator itself does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.capacity import Answer, Judged, crossing, judge, table
from llmsim.recorded import RecordedScenario
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.synth import synthesise

SETTINGS = {"max_num_seqs": 4}
ASKED = {"promises": [("ttft", "p99")], "seeds": [0]}
TRACE = synthesise(150, arrivals="poisson:rate=8", lengths="uniform:min=20,max=60", seed=3, name="made")


def recorded(step_s: float, rate: float = 8.0) -> RecordedScenario:
    """As an engine whose every iteration takes `step_s` serves it."""
    trace = replace(TRACE, arrival_s=TRACE.arrival_s * (8.0 / rate))
    machine = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{step_s}", **SETTINGS)
    seen = simulate(trace, machine).requests
    nothing = [np.zeros(0)] * len(trace)
    ttft_s, e2el_s = seen["first_token_s"] - seen["arrival_s"], seen["finish_s"] - seen["arrival_s"]
    whole = np.ones(len(trace), dtype=bool)
    engine = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
    return RecordedScenario("made", trace, None, SETTINGS, engine, whole, ttft_s, e2el_s, nothing, 1.0)


def test_the_rate_of_an_engine_known_exactly_is_found() -> None:
    """Its own promises are just kept at the rate sent: the search ends within its tolerance of it."""
    found = judge(recorded(0.0035), "folder", **ASKED, cost="constant:0.0035")
    assert found.stable and found.predicted_stable
    assert found.errors("ttft_p99") == pytest.approx([0.0], abs=0.006)


def test_an_engine_predicted_too_slow_holds_less_in_proportion() -> None:
    """All times a tenth longer: under a limit a tenth higher the rate is a tenth lower, under the same limit less."""
    found = judge(recorded(0.0035), "folder", **ASKED, cost="constant:0.00385")
    (error,) = found.errors("ttft_p99")
    assert -0.25 < error < -0.09


def test_an_engine_that_fell_behind_has_no_rate_to_find() -> None:
    found = judge(recorded(0.0035, rate=60.0), "folder", **ASKED, cost="constant:0.0035")
    assert found.stable is False and found.predicted_stable is False and not found.answers
    assert "falls behind | falls behind" in table([found, held(0.02)])


def held(error: float) -> Judged:
    answer = Answer(0.02, (9.9 + 10.0 * error, 10.1 + 10.0 * error))
    return Judged("folder", "load", 10.0, False, True, True, {"tpot_p95": answer, "ttft_p99": answer})


def test_the_table_says_how_far_off() -> None:
    text = table([held(0.02), held(-0.04), held(0.01)])
    assert "| `folder` | load | 10.00 | 20 ms | -4.0% (-5.0% to -3.0%) |" in text
    assert "median |error| 2.0%, 2 of 3 loads within 3 %" in text
    assert "said rightly of 3 of 3 loads" in text


def test_the_crossing_is_read_off_in_log_seconds() -> None:
    assert crossing({28.0: 0.5, 32.0: 2.0, 8.0: 0.1}, 1.0) == pytest.approx(30.0)
    assert crossing({28.0: 0.5, 32.0: 0.9}, 1.0) is None
