"""The page on calibration: its charts' structure, every widget, its words where data is old or missing."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import AppTest, linked
from pages import page as named_page

from llmsim import cli, evidence, evidence_words
from llmsim.charts_calibration import (
    errors_chart,
    extent_chart,
    histogram_chart,
    loads_chart,
    parity_chart,
)

page = partial(named_page, "calibration")
TABS = {"Recordings": 2, "Engine steps": 3, "Kernels": 3, "This run": 1, "Profile": 0}  # and their charts
MOST_POINTS = 20_000


def alts(test: AppTest) -> list[str]:
    return [chart.proto.alt for chart in test.get("vega_lite_chart")]


def rows(chart: Any) -> list[dict[str, Any]]:
    return [row for values in chart.to_dict()["datasets"].values() for row in values]


# ---- charts


@pytest.mark.parametrize("source", [evidence.KERNELS, evidence.STEPS])
def test_parity_draws_every_point_between_equal_axes(source: str) -> None:
    points = evidence.points("h200-sxm", source)
    points = points[points["panel"].isin(["linear", "llama-3.1-8b"])]  # as the page shows them: one at a time
    chart = parity_chart(points, "kind")
    own = [(row["measured_s"], row["predicted_s"]) for row in rows(chart) if "kind" in row]
    assert len(own) == len(points) < MOST_POINTS
    np.testing.assert_allclose(sorted(own), sorted(zip(points["measured_s"], points["predicted_s"], strict=True)))
    layers = chart.to_dict()["layer"]
    x, y = (layers[-1]["encoding"][channel] for channel in ("x", "y"))
    assert x["scale"] == y["scale"] and x["scale"]["type"] == "log"
    assert (x["axis"]["title"], y["axis"]["title"]) == ("Measured", "Predicted")  # the unit is at every tick
    slopes = {round(row["predicted_s"] / row["measured_s"], 6) for row in rows(chart) if "kind" not in row}
    assert slopes == {1.0, 0.9, 1.1}


def test_errors_run_from_median_to_ninetieth_percentile() -> None:
    errors = evidence.errors("h200-sxm", evidence.KERNELS)
    chart = errors_chart(errors)
    drawn = {row["label"]: (row["median_percent"], row["p90_percent"]) for row in rows(chart)}
    assert drawn == {
        row["label"]: pytest.approx((100 * row["median"], 100 * row["p90"])) for row in errors.to_dict("records")
    }
    order = chart.to_dict()["layer"][0]["encoding"]["y"]["sort"]
    medians = errors.set_index("label")["median"]
    assert medians.loc[order].is_monotonic_increasing


def test_steps_of_both_kinds_share_a_row_and_have_their_phases_colours() -> None:
    errors = evidence.errors("h200-sxm", evidence.STEPS)
    layer = errors_chart(errors[errors["panel"] == "llama-3.1-8b"]).to_dict()["layer"][-1]["encoding"]
    scale = layer["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
        "decodes only": "#1d4ed8",
        "with prompts": "#c2410c",
    }
    assert layer["yOffset"]["field"] == "kind"


def test_loads_are_errors_in_per_cent() -> None:
    loads = evidence.loads_of("h200-sxm", "TTFT", "mean")
    drawn = [row["percent"] for row in rows(loads_chart(loads)) if "requests" in row and "zero" not in row]
    np.testing.assert_allclose(drawn, 100 * loads["error"])
    told = evidence_words.loads_in_words(loads)
    assert f"{loads['error'].iloc[loads['error'].abs().argmax()]:+.1%}" in told


def test_the_histogram_has_bars_for_every_share() -> None:
    bars = evidence.histogram(evidence.points("h100-sxm", evidence.STEPS), "kind")
    drawn = [row for row in rows(histogram_chart(bars, "kind")) if "percent" in row]
    assert sum(row["percent"] for row in drawn) == pytest.approx(200)  # 100 of each kind


def test_the_extent_is_in_multiples_of_what_was_measured() -> None:
    table = pd.DataFrame(
        {
            "range": ["a", "b", "c", "d"],
            "measured": [100.0, 10.0, 5.0, None],
            "run": [50.0, 40.0, 0.0, None],
            "share": [0, 0.5, 0, 0.5],
        }
    )
    drawn = {row["range"]: (row["ratio"], row["place"]) for row in rows(extent_chart(table)) if "range" in row}
    assert drawn == {"a": (0.5, "inside"), "b": (4.0, "beyond")}


# ---- the page


@pytest.mark.parametrize("profile", ["h100-sxm", "h200-sxm"])
@pytest.mark.parametrize("tab", TABS)
def test_every_tab_of_every_profile(tab: str, profile: str) -> None:
    test = page(ca_tab=tab, ca_profile=profile)
    assert not test.error and len(alts(test)) == TABS[tab]
    assert all(len(alt) > 20 for alt in alts(test))
    assert [metric.value for metric in test.metric] == [card["value"] for card in evidence_words.cards(profile)]


@pytest.mark.parametrize(
    ("tab", "widget", "value"),
    [
        ("Recordings", "ca_profile", "h200-sxm"), ("Recordings", "ca_metric", "tokens/s"),
        ("Recordings", "ca_stat", "p99"), ("Recordings", "ca_served", "qwen3-8b"),
        ("Engine steps", "ca_model", "llama-3.1-8b fp8"), ("Kernels", "ca_operator", "decode attention"),
    ],
)  # fmt: skip
def test_every_widget_changes_what_is_shown(tab: str, widget: str, value: str) -> None:
    state = {"ca_tab": tab, "ca_profile": "h100-sxm" if widget == "ca_profile" else "h200-sxm"}
    test = page(**state)
    before = alts(test)
    found = [one for kind in ("selectbox", "segmented_control", "button_group") for one in test.get(kind)]
    next(one for one in found if one.key == widget).set_value(value)
    test.run()
    assert not test.exception and not test.error
    assert alts(test) != before


def test_the_run_is_that_of_the_set_up() -> None:
    long = {"trace_from": "synthetic", "base_gpu": "h200-sxm", "base_model": "qwen3-32b", "base_tp": 4}
    test = page(ca_tab="This run", **long)
    text = "\n".join(one.value for one in [*test.markdown, *test.caption])
    assert "scaled from llama-3.1-8b by kernels to qwen3-32b, tensor_parallel 4" in text
    assert "taken from the nearest that were" in text and "measured range" in text
    table = test.table[0].value
    assert table.loc["tokens of an iteration", "largest measured"] == "8,192"
    assert test.code[0].value.splitlines()[0].startswith("llmsim replay ")


def test_what_was_not_measured_says_so_in_place() -> None:
    test = page(ca_tab="This run", base_gpu="a100-80gb-sxm")
    assert test.error[0].value.startswith("cost model roofline: it was not measured")


def test_a_run_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i / 10},20000,20\n" for i in range(20)))
    argv = ["replay", str(trace), "--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--out", str(folder)]
    assert cli.main(argv) == 0
    monkeypatch.setenv("LLMSIM_DASHBOARD_RUNS", json.dumps([str(folder)]))
    test = page(ca_tab="This run", ca_run="mine")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["extrapolated"] > 0
    table = test.table[0].value
    assert table.loc["any of these", "GPU time beyond"] == f"{summary['extrapolated']:.1%}"


def test_data_of_another_profile_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "stale", lambda name: f"{name} is another")
    test = page()
    assert [warning.value for warning in test.warning] == ["h100-sxm is another"]


def test_missing_data_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise FileNotFoundError(f"{name}.parquet: the errors of the shipped profiles are not there")

    monkeypatch.setattr(evidence, "_table", gone)
    test = page()
    assert [error.value for error in test.error] == ["errors.parquet: the errors of the shipped profiles are not there"]


def test_its_commands_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(ca_profile="h200-sxm").code[0].value.splitlines()
    assert lines[0] == "llmsim list profiles" and lines[-1] == evidence.COMMAND
    assert cli.main(shlex.split(lines[0])[1:]) == 0
    assert "h200-sxm" in capsys.readouterr().out


def test_widgets_are_in_the_address() -> None:
    test = linked("calibration", ca_profile="h200-sxm", ca_tab="Engine steps", ca_model="qwen2.5-14b")
    assert len(alts(test)) == TABS["Engine steps"]
    errors = evidence.errors("h200-sxm", evidence.STEPS)
    assert alts(test)[0] == evidence_words.errors_in_words(errors[errors["panel"] == "qwen2.5-14b"])
