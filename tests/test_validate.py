"""Predicted against measured."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_results import Served, made_result

from llmsim.recording import load_recording
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace
from llmsim.validate import compare, report, validate

HERE = Path(__file__).parent
RECORDINGS = HERE / "data" / "recordings"
H100 = "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16"
METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_throughput")
ENGINE = {
    "num_gpu_blocks": 2000,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "max_model_len": 8192,
    "gpu": "NVIDIA H100 80GB HBM3 (SXM, 700 W)",
    "model": "Llama-3.1-8B",
}


def recorded_by_ourselves(folder: Path, cost: str, **scenario: Any) -> Path:
    """A recording of the simulator: requests of one or two tokens, so that first and last token are all there are."""
    rng = np.random.default_rng(4)
    count = 60
    arrival_s = np.cumsum(rng.exponential(0.02, count))
    trace = Trace("own", arrival_s - arrival_s[0], rng.integers(1, 900, count), rng.integers(1, 3, count))
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 8192}
    settings = {"num_gpu_blocks_override": 2000, "cost": cost, **limits, **scenario}
    result = simulate(trace, Scenario("llama-3.1-8b", "h100-sxm", **settings))
    columns = ("arrival_s", "prompt_tokens", "output_tokens", "first_token_s", "finish_s")
    requests = []
    for sent_s, prompt, output, first_s, last_s in zip(*(result.requests[c].tolist() for c in columns), strict=True):
        t = [[first_s, 1], [last_s, 1]][:output]
        requests.append({"arrival": sent_s, "prompt": prompt, "output": output, "submit": sent_s, "t": t, "cached": 0})
    folder.mkdir()
    (folder / "engine.json").write_text(json.dumps(ENGINE))
    document = {"scenario": {"name": "own"} | scenario, "requests": requests}
    (folder / "own.requests.json.gz").write_bytes(gzip.compress(json.dumps(document).encode()))
    return folder


@pytest.mark.parametrize("scenario", [{}, {"concurrency": 5}])
@pytest.mark.parametrize("cost", ["constant:0.01", "roofline"])
def test_a_recording_of_the_simulator_itself_is_predicted_exactly(
    tmp_path: Path, cost: str, scenario: dict[str, Any]
) -> None:
    comparison = validate(recorded_by_ourselves(tmp_path / "own", cost, **scenario), cost=cost)
    (one,) = comparison["scenarios"]
    errors = [values["error"] for statistics in one["metrics"].values() for values in statistics.values()]
    assert len(errors) == 4 * 4 + 1
    np.testing.assert_allclose(errors, 0.0, atol=1e-9)


def test_an_error_is_relative_and_signed(tmp_path: Path) -> None:
    """Iterations twice as long, nothing else: at low load latencies double."""
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.0001")
    (one,) = validate(folder, cost="constant:0.0002")["scenarios"]
    assert one["metrics"]["ttft_ms"]["p50"]["error"] == pytest.approx(1.0, abs=0.05)
    (one,) = validate(folder, cost="constant:0.00005")["scenarios"]
    assert one["metrics"]["itl_ms"]["p50"]["error"] == pytest.approx(-0.5, abs=0.05)


def test_metrics_compare_only_requests_that_finished(tmp_path: Path) -> None:
    (recorded,) = load_recording(recorded_by_ourselves(tmp_path / "own", "constant:0.01"))
    assert recorded.trace.output_tokens[1] >= 1
    partly = replace(recorded, finished=np.arange(len(recorded.trace)) != 1)
    served = [
        Served(float(sent_s), [float(sent_s) + 1.0 + (row == 1) * 1e6])
        for row, sent_s in enumerate(recorded.trace.arrival_s.tolist())
    ]
    found = compare([made_result(served)], partly)
    assert found["ttft_ms"]["mean"]["predicted"] == pytest.approx(1000.0)
    assert found["itl_ms"]["p50"]["predicted"] is None and found["itl_ms"]["p50"]["error"] is None


def test_gaps_are_compared_only_if_all_requests_finished(tmp_path: Path) -> None:
    """They are pooled: those of an answer that the recording cut short would count on one side alone."""
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.01")
    (recorded,) = load_recording(folder)
    (whole,) = validate(folder, cost="constant:0.01", seeds=1)["scenarios"]
    assert whole["metrics"]["itl_ms"]["p50"]["error"] == pytest.approx(0.0, abs=1e-3)
    partly = replace(recorded, finished=np.arange(len(recorded.trace)) != 1)
    (found,) = validate([partly], cost="constant:0.01", seeds=1)["scenarios"]
    assert found["metrics"]["itl_ms"]["p50"]["error"] is None
    assert found["metrics"]["tpot_ms"]["p50"]["error"] is not None


def test_requests_that_do_not_fit_the_simulated_engine_are_an_error(tmp_path: Path) -> None:
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.01")
    with pytest.raises(ValueError, match=r"own: \d+ of 60 requests do not fit the simulated engine \(20 KV blocks\)"):
        validate(folder, cost="constant:0.01", num_gpu_blocks_override=20, max_model_len=1024, block_size=16)


def test_the_model_and_the_gpu_are_found_in_what_the_recording_says(tmp_path: Path) -> None:
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.01")
    (folder / "engine.json").write_text(json.dumps(ENGINE | {"gpu": "some GPU"}))
    with pytest.raises(ValueError, match=r"its gpu 'some gpu' is no known one .* give gpu \(--gpu NAME\)"):
        validate(folder, cost="constant:0.01")
    assert validate(folder, gpu="h100-sxm", cost="constant:0.01")["scenarios"]


def test_the_table_has_a_line_for_each_metric(tmp_path: Path) -> None:
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.01")
    lines = report(validate(folder, cost="constant:0.01")).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["TTFT", "TPOT", "ITL", "E2EL", "tok/s"]
    assert all("0.0 %" in line for line in lines[1:])


def test_several_scenarios_have_a_median_error() -> None:
    def one(name: str, error: float) -> dict[str, Any]:
        values = {"predicted": 1.0 + error, "measured": 1.0, "error": error}
        latencies = {metric: dict.fromkeys(("mean", "p50", "p90", "p99"), values) for metric in METRICS[:4]}
        return {"name": name, "metrics": latencies | {"output_throughput": {"mean": values}}}

    lines = report({"scenarios": [one("a", 0.02), one("b", -0.05), one("c", 0.04)]}).splitlines()
    assert len(lines) == 1 + 3 * 5 + 5
    labels = ("TTFT", "TPOT", "ITL", "E2EL")
    assert [line.split()[2:] for line in lines[-5:-1]] == [[label, *["4.0", "%"] * 4] for label in labels]


def test_notes_are_collected(tmp_path: Path) -> None:
    folder = recorded_by_ourselves(tmp_path / "own", "constant:0.01")
    (folder / "engine.json").write_text(json.dumps(ENGINE | {"mystery": 1}))
    notes: list[str] = []
    validate(folder, cost="constant:0.01", notes=notes)
    assert len(notes) == 1 and "mystery is not used" in notes[0]


def test_measured_numbers_are_those_of_the_recording_and_every_scenario_is_predicted() -> None:
    folder = RECORDINGS / H100
    comparison = validate(folder, cost="roofline")
    scenarios = {one["name"]: one["metrics"] for one in comparison["scenarios"]}
    assert len(scenarios) == 4 + 30
    with gzip.open(folder / "azconv_x1.requests.json.gz") as packed:
        requests = json.load(packed)["requests"]
    ttft_ms = [1e3 * (r["t"][0][0] - r["submit"]) for r in requests]
    gaps_ms = [1e3 * (b[0] - a[0]) for r in requests for a, b in zip(r["t"], r["t"][1:], strict=False)]
    seen = scenarios["azconv_x1"]
    assert seen["ttft_ms"]["p99"]["measured"] == pytest.approx(np.percentile(ttft_ms, 99))
    assert seen["itl_ms"]["mean"]["measured"] == pytest.approx(np.mean(gaps_ms))
    for name, metrics in scenarios.items():
        # data-sheet facts only: tens of per cent, never a factor of two
        assert abs(metrics["e2el_ms"]["mean"]["error"]) < 0.5, name
        assert abs(metrics["output_throughput"]["mean"]["error"]) < 0.5, name
