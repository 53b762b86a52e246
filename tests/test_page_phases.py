"""The page on prefill and decode: its charts' structure, every widget, its errors and its command line."""

from __future__ import annotations

import json
import shlex
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from pages import AppTest, linked
from pages import page as named_page

from llmsim import cli
from llmsim.charts import PHASE_COLOURS
from llmsim.charts_burst import budgets_chart, burst_chart, tokens_chart
from llmsim.charts_phases import growth_chart, moves_chart
from llmsim.phases_burst import budgets, burst
from llmsim.phases_curves import BY, decode_by_batch, moves, prefill_growth
from llmsim.scenario import Scenario

page = partial(named_page, "phases")
MACHINE = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
SIZES = {"prompt_tokens": 2048, "batch": 32, "context_tokens": 1024}
MOST_POINTS = 20_000


def shown(test: AppTest) -> str:
    """All text of the page."""
    texts = [str(one.value) for kind in ("markdown", "caption", "info", "code", "metric") for one in test.get(kind)]
    return "\n".join(texts + [one.value.to_string() for one in test.table])


def drawn(chart: Any) -> list[dict[str, Any]]:
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


def units(chart: Any) -> set[str]:
    """Titles of all axes that have one."""
    found = set()
    for layer in chart.to_dict()["layer"]:
        for channel in ("x", "y"):
            encoding = layer["encoding"].get(channel, {})
            title = encoding.get("title") or (encoding.get("axis") or {}).get("title")
            found |= {title} if title else set()
    return found


# ---- charts


@pytest.mark.parametrize("by", BY)
def test_the_roofline_draws_every_point_where_it_is(by: str) -> None:
    frame = moves(MACHINE, by, **SIZES).frame
    chart = moves_chart(frame)
    places = {(row["intensity"], row["tflops"]) for row in drawn(chart) if "mfu" in row}
    assert places == set(zip(frame["intensity_flops_per_byte"], frame["flops_per_s"] / 1e12, strict=True))
    assert units(chart) == {"Arithmetic intensity (FLOP/byte)", "TFLOP/s of one GPU"}
    texts = [row["text"] for row in drawn(chart) if "text" in row]
    assert sum(text.startswith(("prefill, ", "decode, ")) for text in texts) == 2
    roofs = frame["peak_flops_per_s"].nunique()
    assert sum(text.startswith("compute") for text in texts) == roofs
    assert max(row["tflops"] for row in drawn(chart) if "text" not in row) <= frame["peak_flops_per_s"].max() / 1e12


def test_growth_is_stacked_and_its_unmeasured_end_veiled() -> None:
    growth = prefill_growth(MACHINE, 32_768)
    chart = growth_chart(growth, "prompt_tokens", "prefill", here=32_768, title="Prompt (tokens)")
    rows = drawn(chart)
    for part, column in (("attention", "attention_s"), ("linear layers and between them", "rest_s")):
        assert [row["seconds"] for row in rows if row.get("part") == part] == pytest.approx(growth[column].tolist())
    veil = next(row for row in rows if row.get("text") == "outside the measured range")
    assert veil["prompt_tokens"] == growth.loc[growth["outside_measured"], "prompt_tokens"].min()
    assert units(chart) == {"Prompt (tokens)", "GPU time (ms)"}
    inside = growth_chart(prefill_growth(MACHINE, 1024), "prompt_tokens", "prefill")
    assert not any(row.get("text") for row in drawn(inside))


def test_colours_mean_the_phase() -> None:
    growth = decode_by_batch(MACHINE, 1024)
    colours = growth_chart(growth, "batch", "decode").to_dict()["layer"][0]["encoding"]["color"]["scale"]
    assert colours["range"][-1] == PHASE_COLOURS["decode"] == "#1d4ed8"
    one = burst(MACHINE, token_budget=1024)
    scale = burst_chart(one.clocks(), one.requests()).to_dict()["layer"][0]["encoding"]["color"]["scale"]
    by_name = dict(zip(scale["domain"], scale["range"], strict=True))
    assert by_name["prefill"] == by_name["prompt 1"] == "#c2410c" and by_name["decode"] == "#1d4ed8"


def test_a_burst_is_drawn_whole_and_bounded() -> None:
    one = burst(MACHINE, prompts=8, prompt_tokens=8192, decodes=60, context_tokens=256, token_budget=128)
    clocks, requests = one.clocks(), one.requests()
    chart, tokens = burst_chart(clocks, requests), tokens_chart(clocks, requests, 128)
    bars = [row for row in drawn(chart) if "lasts_ms" in row and "middle_ms" not in row]
    assert len(bars) == len(clocks) + len(requests)
    assert len(drawn(chart)) < MOST_POINTS and len(drawn(tokens)) < MOST_POINTS
    lanes = chart.to_dict()["layer"][0]["encoding"]["y"]["sort"]
    assert lanes == ["host", "GPU", "60 decodes", *(f"prompt {n}" for n in range(1, len(lanes) - 2))]
    scales = [one.to_dict()["layer"][0]["encoding"]["x"]["scale"]["domain"] for one in (chart, tokens)]
    assert scales[0] == scales[1]
    tops = [row["top"] for row in drawn(tokens) if "top" in row]
    assert max(tops) == 128 and units(tokens) == {"Time since the burst came (ms)", "Tokens"}


def test_tokens_stack_up_to_what_an_iteration_computes() -> None:
    one = burst(MACHINE, token_budget=1024)
    rows = [row for row in drawn(tokens_chart(one.clocks(), one.requests(), 1024)) if "top" in row]
    whole = one.requests().groupby("iteration")["tokens"].sum()
    for iteration, tokens in whole.items():
        own = sorted((row["bottom"], row["top"]) for row in rows if row["iteration"] == iteration)
        assert own[0][0] == 0 and own[-1][1] == tokens
        assert all(below[1] == above[0] for below, above in pairwise(own))


def test_the_trade_of_budgets_has_both_sides() -> None:
    table = budgets(MACHINE, decodes=16, prompts=2, prompt_tokens=512)
    rows = [row for row in drawn(budgets_chart(table, 512)) if "ms" in row]
    assert len(rows) == 2 * len(table)
    assert len([row for row in drawn(budgets_chart(budgets(MACHINE, decodes=0, prompts=1), 64)) if "ms" in row]) == 9


# ---- the page


def test_every_tab_has_its_charts_and_no_other_runs() -> None:
    count = {tab: len(page(ph_tab=tab).get("vega_lite_chart")) for tab in ("Roofline", "Time", "One batch", "Table")}
    assert count == {"Roofline": 1, "Time": 2, "One batch": 3, "Table": 0}


@pytest.mark.parametrize(
    ("widget", "value"),
    [
        ("ph_model", "qwen3-8b"), ("ph_gpu", "h200-sxm"), ("ph_weights", "fp8"), ("ph_kv", "fp8"), ("ph_tp", 2),
        ("ph_prompt", 16384), ("ph_batch", 96), ("ph_context", 4096), ("ph_by", "precision"),
    ],
)  # fmt: skip
def test_every_setting_moves_the_roofline(widget: str, value: Any) -> None:
    test = page()
    before = shown(test), test.get("vega_lite_chart")[0].proto.alt
    kinds = ("selectbox", "select_slider", "segmented_control", "button_group")
    found = [one for kind in kinds for one in test.get(kind) if one.key == widget]
    assert found, f"{widget} is on the page"
    found[0].set_value(value)
    test.run()
    assert not test.exception and not test.error
    assert (shown(test), test.get("vega_lite_chart")[0].proto.alt) != before


@pytest.mark.parametrize(
    ("tab", "widget", "value"),
    [
        ("Time", "ph_across", "batch"), ("One batch", "ph_budget", 512), ("One batch", "ph_prompts", 2),
        ("One batch", "ph_decodes", 0),
    ],
)  # fmt: skip
def test_settings_of_the_other_tabs(tab: str, widget: str, value: Any) -> None:
    before, after = page(ph_tab=tab), page(ph_tab=tab, **{widget: value})
    assert not after.error
    assert [one.proto.alt for one in before.get("vega_lite_chart")] != [
        one.proto.alt for one in after.get("vega_lite_chart")
    ]


def test_the_burst_is_that_of_the_settings() -> None:
    test = page(ph_tab="One batch", ph_gpu="h200-sxm", ph_budget=512, ph_prompts=3, ph_prompt=1024, ph_context=512)
    one = burst(MACHINE, prompts=3, prompt_tokens=1024, decodes=16, context_tokens=512, token_budget=512)
    values = {metric.label: metric.value for metric in test.metric}
    assert values["mean TTFT"] == f"{1e3 * one.mean_ttft_s:,.1f} ms" and values["chunks"] == str(one.chunks)


def test_the_command_line_of_a_burst_prints_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    test = page(ph_tab="One batch", ph_gpu="h200-sxm", ph_budget=512, ph_prompts=3, ph_decodes=8, ph_context=512)
    assert cli.main([*shlex.split(test.code[0].value)[1:], "--json"]) == 0
    met = json.loads(capsys.readouterr().out)["burst"]
    values = {metric.label: metric.value for metric in test.metric}
    assert values["longest gap"] == f"{1e3 * met['longest_gap_s']:,.1f} ms" and met["token_budget"] == 512
    assert values["mean TTFT"] == f"{1e3 * met['mean_ttft_s']:,.1f} ms" and met["decodes"] == 8


def test_the_command_line_prints_the_pages_table(capsys: pytest.CaptureFixture[str]) -> None:
    test = page(ph_tab="Table", ph_gpu="h200-sxm", ph_prompt=4096, ph_batch=48, ph_context=2048, ph_weights="fp8")
    program, *argv = shlex.split(test.code[0].value)
    assert program == "llmsim" and argv[0] == "phases"
    assert cli.main(argv) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    intensity = test.table[0].value.loc["intensity (FLOP/byte)"].tolist()
    assert ["intensity", "(FLOP/byte)", *intensity] in printed


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"ph_batch": 1024, "ph_context": 16384}, "batch=1024: the KV cache ("),
        ({"ph_model": "llama-3.1-70b"}, "llama-3.1-70b"),
        ({"ph_model": "qwen2.5-7b", "ph_tp": 8}, "tensor_parallel=8 does not divide"),
        ({"ph_prompt": 131_072}, "above max_model_len=131072"),
        ({"ph_context": 131_072}, "context=131072 leaves no room"),
        (
            {"ph_tab": "One batch", "ph_decodes": 63, "ph_budget": 64, "ph_prompt": 65536},
            "max_num_batched_tokens=64 cuts",
        ),
    ],
)
def test_what_cannot_be_is_one_line_in_place(state: dict[str, Any], told: str) -> None:
    test = page(**state)
    assert len(test.error) == 1 and told in test.error[0].value and "\n" not in test.error[0].value
    assert test.get("select_slider"), "the widgets stay, to put it right"


def test_every_chart_has_words_for_who_cannot_see() -> None:
    for tab in ("Roofline", "Time", "One batch"):
        for chart in page(ph_tab=tab).get("vega_lite_chart"):
            assert len(chart.proto.alt) > 40 and any(letter.isdigit() for letter in chart.proto.alt)


def test_widgets_are_in_the_address() -> None:
    test = linked("phases", ph_gpu="h200-sxm", ph_batch="64", ph_tab="Time", ph_tp="2")
    assert not test.error
    assert "2 x h200-sxm" in shown(test) and len(test.get("vega_lite_chart")) == 2
    assert "--batch 1,8,64,256" in test.code[0].value
