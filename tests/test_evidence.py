"""What results rest on: the package's data against its sources, a run's extent against the cost model's own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks import evidence as made
from benchmarks.accuracy import ROOT, recordings
from llmsim import evidence, evidence_words
from llmsim.cost.profile import profile_names, read_profile
from llmsim.recording import load_recording
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.trace import Trace
from llmsim.utilisation import busy_seconds
from llmsim.validate import SEEDS

PROFILES = profile_names()
SMALL_LOAD = ROOT / "tests/data/recordings/vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16/closed64_1024_256.requests.json.gz"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tables are read from, and written to, a folder of the test's own."""
    evidence._table.cache_clear()
    monkeypatch.setattr(evidence._table.__wrapped__, "__defaults__", (tmp_path,))
    yield tmp_path
    evidence._table.cache_clear()


def test_the_data_is_small_and_of_every_shipped_profile() -> None:
    files = [evidence.FOLDER / f"{name}.parquet" for name in evidence.TABLES]
    assert sum(file.stat().st_size for file in files) < 300_000
    for file in files:
        ids = json.loads(pq.read_schema(file).metadata[evidence.META])
        assert sorted(ids) == PROFILES
        assert sorted(pq.read_table(file, columns=["profile"]).column(0).unique().to_pylist()) == PROFILES


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("source", [evidence.KERNELS, evidence.STEPS])
def test_points_and_errors_are_of_the_same_groups(profile: str, source: str) -> None:
    points, errors = evidence.points(profile, source), evidence.errors(profile, source)
    np.testing.assert_allclose(points["error"], points["predicted_s"] / points["measured_s"] - 1, rtol=1e-4, atol=1e-6)
    names = ["panel", "kind"] if source == evidence.KERNELS else ["panel", "kind", "what"]
    groups = points.groupby(names)["error"]
    by = errors.set_index(["panel", "kind"] if source == evidence.KERNELS else ["panel", "kind", "load"])
    assert set(groups.groups) == set(by.index)
    for name, own in groups:
        row = by.loc[name]
        assert len(own) <= row["points"]
        if len(own) == row["points"]:  # none left out: the errors follow from the points
            assert row["median"] == pytest.approx(own.abs().median(), rel=1e-3, abs=1e-6)
            assert row["p90"] == pytest.approx(own.abs().quantile(0.9), rel=1e-3, abs=1e-6)


def test_kernels_errors_are_those_that_the_fit_wrote_down() -> None:
    profile = read_profile("h200-sxm")
    points, errors = made.kernels(profile)
    assert profile.kernels is not None
    found = {}
    for row in errors:
        name = f"{row['panel']} {row['kind']}"
        found[name if name in profile.kernels.error else row["panel"]] = row["median"], row["p90"], row["points"]
    for operator in ("linear bfloat16", "linear fp8", "decode attention bfloat16", "add_rms_norm"):
        median, p90, count = found[operator]
        assert median == pytest.approx(profile.kernels.error[operator], rel=5e-3)
        assert p90 == pytest.approx(profile.kernels.error[f"{operator} p90"], rel=5e-3)
        assert count > 10
    kept = pd.DataFrame(points).groupby(["panel", "kind"]).size()
    counts = pd.DataFrame(errors).set_index(["panel", "kind"])["points"]
    pd.testing.assert_series_equal(
        kept.sort_index(), counts.clip(upper=made.MOST_KERNELS).sort_index(), check_names=False
    )


def test_loads_are_what_the_recordings_say() -> None:
    loads = evidence.loads("h100-sxm")
    own = loads[(loads["load"] == "closed64_1024_256") & (loads["recording"] == SMALL_LOAD.parent.name)]
    recorded = load_recording(SMALL_LOAD)[0]
    measured = own.set_index(["metric", "statistic"])["measured"]
    assert measured["ttft_ms", "mean"] == pytest.approx(1e3 * recorded.ttft_s[recorded.finished].mean(), rel=1e-4)
    assert measured["e2el_ms", "p90"] == pytest.approx(
        1e3 * np.percentile(recorded.e2el_s[recorded.finished], 90), rel=1e-4
    )
    np.testing.assert_allclose(loads["error"], loads["predicted"] / loads["measured"] - 1, rtol=1e-3, atol=1e-5)
    named = {path.name for path in recordings()}
    shown = pd.concat([evidence.loads(name) for name in PROFILES])["recording"]
    assert set(shown) <= named, f"loads of recordings that are gone: run {evidence.COMMAND}"


def test_loads_of_one_metric_come_held_out_first() -> None:
    shown = evidence.loads_of("h200-sxm", "TTFT", "p90")
    assert shown["metric"].eq("ttft_ms").all() and shown["statistic"].eq("p90").all()
    assert shown["fitted"].is_monotonic_increasing and shown["fitted"].any()
    assert not shown.duplicated(["recording", "load"]).any()
    one = evidence.loads_of("h200-sxm", "tokens/s", "p90", "qwen2.5-7b")
    assert one["statistic"].eq("mean").all() and one["model"].eq("qwen2.5-7b").all() and len(one) > 2
    points = evidence.as_points(shown)
    np.testing.assert_allclose(1e3 * points["measured"], shown["measured"])
    np.testing.assert_allclose(evidence.as_points(one)["measured"], one["measured"])
    first, *models = evidence_words.models(evidence.loads("h200-sxm"))
    assert first == "all" and models == sorted(set(models)) and {"llama-3.1-8b", "qwen2.5-7b"} <= set(models)


def test_a_histogram_holds_every_point_once() -> None:
    shown = pd.DataFrame({"kind": ["a"] * 4 + ["b"], "error": [-0.7, -0.001, 0.001, 0.3, 9.0]})
    bars = evidence.histogram(shown, "kind")
    assert bars.groupby("kind")["share"].sum().to_dict() == {"a": pytest.approx(1), "b": pytest.approx(1)}
    first, last = bars[bars["kind"] == "a"].iloc[0], bars[bars["kind"] == "b"].iloc[-1]
    assert (first["low"], first["share"]) == (-0.5, 0.25) and (last["high"], last["share"]) == (0.5, 1.0)


def test_data_of_another_profile_says_so(elsewhere: Path) -> None:
    rows = {name: evidence._table(name, evidence.FOLDER)[0] for name in evidence.TABLES}
    ids = {name: read_profile(name).id for name in PROFILES}
    made.write(elsewhere, rows, ids | {"h200-sxm": "0123456789ab"})
    assert evidence.stale("h100-sxm") is None
    told = evidence.stale("h200-sxm")
    assert told is not None and "are of h200-sxm 0123456789ab" in told and ids["h200-sxm"] in told
    assert evidence.COMMAND in told
    pd.testing.assert_frame_equal(evidence._table("loads")[0], rows["loads"])


def test_missing_data_names_its_command(elsewhere: Path) -> None:
    with pytest.raises(FileNotFoundError, match=evidence.COMMAND):
        evidence.errors("h200-sxm", evidence.STEPS)


def test_facts_of_a_profile() -> None:
    table = evidence.profiles().set_index("profile")
    for name in PROFILES:
        profile = read_profile(name)
        row = table.loc[name]
        assert (row["id"], row["gpu"], row["engine"]) == (profile.id, profile.gpu, profile.provenance.engine)
        text = evidence_words.facts_table(profile)["value"]
        assert text["most tokens of an iteration"] == f"{profile.measured.tokens:,}"
        spread = evidence_words.spread_table(profile)
        assert profile.spread is not None
        assert spread.loc["loads of one machine", "decode steps"] == f"{100 * profile.spread.runs.gpu_decode:.1f} %"


def test_the_typical_error_is_the_median_of_what_was_held_out() -> None:
    errors, loads = evidence.errors("h200-sxm", evidence.STEPS), evidence.loads("h200-sxm")
    held = [row["median"] for row in errors.to_dict("records") if not row["fitted"] and row["kind"] == "with prompts"]
    of = evidence.typical("h200-sxm")
    assert of["with prompts"] == pytest.approx(float(np.median(held)))
    means = loads[(loads["metric"] == "e2el_ms") & (loads["statistic"] == "mean") & ~loads["fitted"]]
    assert of["E2EL"] == pytest.approx(float(np.median(np.abs(means["error"]))))
    assert evidence_words.cards("h200-sxm")[1]["value"] == f"{100 * of['with prompts']:.1f} %"


@pytest.mark.parametrize("profile", PROFILES)
def test_the_worst_load_is_told_beside_the_medians(profile: str) -> None:
    loads = evidence.loads(profile)
    loads = loads[loads["metric"].isin(["ttft_ms", "tpot_ms", "e2el_ms"]) & (loads["statistic"] == "mean")]
    held = [row["error"] for row in loads.to_dict("records") if not row["fitted"] and row["error"] == row["error"]]
    found = evidence.worst(profile)
    assert found is not None and found[0] == pytest.approx(max(held, key=abs))
    card = evidence_words.cards(profile)[-1]
    assert (card["label"], card["value"]) == ("worst mean latency", f"{100 * found[0]:+.1f} %")


def test_loads_are_predicted_with_the_draws_of_validate() -> None:
    """One number for one recording, on the page and on the command line."""
    assert made.DRAWS == SEEDS


def run_of(prompt: int, scenario: Scenario, requests: int = 12) -> Any:
    columns = {"prompt_tokens": np.full(requests, prompt), "output_tokens": np.full(requests, 50)}
    return simulate(Trace(name="alike", arrival_s=np.arange(requests) * 0.05, **columns), scenario)


def test_extent_says_what_a_run_leaves_and_for_how_long() -> None:
    scenario = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
    measured = read_profile("h200-sxm").measured
    result = run_of(40_000, scenario)
    table = evidence.extent(result.iterations, result.cost, result.scenario).set_index("range")
    log, busy_s = result.iterations, busy_seconds(result.iterations)
    most_cached = (log["kv_tokens"] + log["seqs"] * (log["iterations"] - 1)).max()
    cached = table.loc["cached tokens that its decodes read"]
    assert (cached["measured"], cached["run"]) == (measured.kv_tokens, most_cached) and cached["run"] > cached[
        "measured"
    ]
    context = table.loc["context before the chunks of its prompts (tokens)"]
    beyond = log["prefill_context"] > measured.context_tokens
    assert context["share"] == pytest.approx(busy_s[beyond].sum() / busy_s.sum()) and 0 < context["share"] < 1
    assert table.loc["any of these", "share"] == pytest.approx(result.summary()["extrapolated"])
    told = evidence_words.extent_in_words(table.reset_index())
    assert "is outside the measured range, by cached tokens that its decodes read (" in told
    assert evidence_words.extent_table(table.reset_index()).loc["decodes of an iteration", "largest measured"] == "256"


def test_a_run_inside_and_a_synchronous_one() -> None:
    scenario = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
    result = run_of(500, scenario)
    table = evidence.extent(result.iterations, result.cost, result.scenario)
    assert table["share"].eq(0).all()
    assert evidence_words.extent_in_words(table) == "All GPU time of the run is inside the measured range."
    synchronous = Scenario(model="llama-3.1-8b", gpu="h200-sxm", async_scheduling=False)
    table = evidence.extent(result.iterations, result.cost, synchronous)
    assert "100.0 % of the run's GPU time" in evidence_words.extent_in_words(table)


def test_what_was_not_measured_has_no_range() -> None:
    result = run_of(500, Scenario(model="llama-3.1-8b", gpu="h200-sxm", cost="roofline"))
    with pytest.raises(ValueError, match="cost model roofline: it was not measured"):
        evidence.extent(result.iterations, result.cost, result.scenario)


def test_neighbours_are_named() -> None:
    own = cost_of(Scenario(model="llama-3.1-8b", gpu="h200-sxm"))
    assert evidence_words.neighbours_in_words(own) == ""
    split = cost_of(Scenario(model="llama-3.1-70b", gpu="h200-sxm", tensor_parallel=4))
    assert "all-reduce over 4 GPUs" in evidence_words.neighbours_in_words(split)
    assert all(name in split.label for name in split.from_neighbours)


def test_outside_is_any_range_or_decodes_without_a_graph() -> None:
    cost, random = cost_of(Scenario(model="llama-3.1-8b", gpu="h200-sxm")), np.random.default_rng(0)
    names = ("seqs", "prefill_tokens", "kv_tokens", "prefill_context", "iterations", "mode")
    log = {
        name: random.integers(0, high, 500)
        for name, high in zip(names, (400, 9000, 400_000, 30_000, 40, 3), strict=True)
    }
    log["prefill_tokens"][random.random(500) < 0.5] = 0
    m = cost.profile.measured
    expected = [
        seqs + new > m.tokens or seqs > m.seqs or kv + seqs * (n - 1) > m.kv_tokens or context > m.context_tokens
        or (new == 0 and mode != 0)
        for seqs, new, kv, context, n, mode in zip(*(log[name].tolist() for name in names), strict=True)
    ]  # fmt: skip
    assert cost.outside_measured(log).tolist() == expected and 50 < sum(expected) < 450


def test_elsewhere_it_says_where_the_raw_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evidence_words.checkout() is None
    monkeypatch.setattr(evidence_words, "__file__", str(tmp_path / "llmsim" / "evidence_words.py"))
    told = evidence_words.checkout()
    assert told is not None and "calibration/recordings" in told


def test_commands_name_files_that_are_there() -> None:
    for name in PROFILES:
        words = [word for command in evidence_words.commands(read_profile(name)) for word in command]
        paths = [word for word in words if "/" in word]
        assert len(paths) > 1
        for path in paths:
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("profile", profile_names())
def test_no_two_loads_have_one_label(profile: str) -> None:
    found = evidence.loads(profile)
    assert not found.duplicated(["label", "model", "metric", "statistic"]).any()
