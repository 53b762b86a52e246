"""Charts of policies and plans: what they draw is in the frame, colours are read on light and dark, points are few."""

from __future__ import annotations

import pytest
from needs import require

require("altair")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from llmsim import charts_cache, charts_groups, charts_plan, charts_policies  # noqa: E402
from llmsim.charts import SIDE_COLOURS  # noqa: E402
from llmsim.slo import Slo  # noqa: E402

SIDES = ["vllm", "sjf", "engine=sglang"]
BACKGROUNDS = ("#ffffff", "#0f172a")


def rows_of(chart: object) -> int:
    return sum(len(rows) for rows in chart.to_dict()["datasets"].values())


def layers(chart: object) -> list[dict]:
    return chart.to_dict()["layer"]


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_sides_stand_out_on_light_and_dark(background: str) -> None:
    """3:1 is what WCAG asks of graphics."""
    for colour in {*SIDE_COLOURS, *charts_cache.PLACE_COLOURS, charts_plan.BROKEN}:
        darker, lighter = sorted((luminance(colour), luminance(background)))
        assert (lighter + 0.05) / (darker + 0.05) >= 3.0, colour


# ---- policies -------------------------------------------------------------------------------------------------------


def intervals(high: float = 0.2) -> pd.DataFrame:
    rows = [
        ("sjf", "mean", -0.1, -0.2, -0.05, "better"),
        ("sjf", "p99", 0.1, 0.01, high, "worse"),
        ("engine=sglang", "mean", 0.0, -0.1, 0.1, "unclear"),
        ("engine=sglang", "p99", 0.02, 0.01, 0.03, "worse"),
    ]
    names = ["side", "statistic", "change_share", "low_share", "high_share", "verdict"]
    made = pd.DataFrame(rows, columns=names).assign(latency="ttft", value=1.0, change=0.1)
    return pd.concat([made, made.assign(latency="tpot")], ignore_index=True)


def test_differences_draw_every_interval_once() -> None:
    chart = charts_policies.differences_chart(intervals(), "ttft", SIDES)
    zero, bars, dots = layers(chart)
    assert bars["encoding"]["x"]["field"] == "low_share" and bars["encoding"]["x2"]["field"] == "high_share"
    assert dots["encoding"]["x"]["field"] == "change_share"
    assert dots["encoding"]["fill"]["condition"]["test"] == "(datum.verdict === 'unclear')"
    assert rows_of(chart) == 4 + 1  # of one latency, and the zero
    assert "sjf P99 +10% (worse, surely)" in chart.description and "vllm" in chart.description
    scale = bars["encoding"]["x"]["scale"]
    assert scale["domain"][0] < -0.2 and scale["domain"][1] > 0.2 and "type" not in scale
    assert zero["mark"]["type"] == "rule"


def test_wide_differences_get_a_scale_that_shows_the_narrow_ones_too() -> None:
    chart = charts_policies.differences_chart(intervals(high=40.0), "ttft", SIDES)
    x = layers(chart)[1]["encoding"]["x"]
    assert x["scale"]["type"] == "symlog" and x["scale"]["domain"][1] >= 40.0
    assert 0.0 in x["axis"]["values"] and 30.0 in x["axis"]["values"]


def test_a_side_has_one_colour_in_all_charts() -> None:
    points = pd.DataFrame(
        [(side, rate, 0.9, rate, True) for side in SIDES for rate in (1.0, 2.0)],
        columns=["side", "rate", "slo_attainment", "request_goodput", "stable"],
    )
    points = points.assign(p99_ttft_ms=1.0, p99_tpot_ms=1.0)
    charts = [
        charts_policies.differences_chart(intervals(), "ttft", SIDES),
        charts_policies.attainment_chart(points, SIDES, 0.99),
        charts_policies.goodput_chart(points, SIDES),
    ]
    expected = charts_policies.colours_of(SIDES)
    for chart in charts:
        scale = next(layer["encoding"]["color"]["scale"] for layer in layers(chart) if "color" in layer["encoding"])
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == expected


def test_attainment_shows_the_share_asked_for_and_what_is_unstable() -> None:
    rows = [("a", 1.0, 1.0, 1.0, True), ("a", 2.0, 0.6, 1.2, False), ("a", 3.0, None, None, None)]
    points = pd.DataFrame(rows, columns=["side", "rate", "slo_attainment", "request_goodput", "stable"])
    points = points.assign(p99_ttft_ms=1.0, p99_tpot_ms=1.0)
    chart = charts_policies.attainment_chart(points, ["a"], 0.95, "sessions/s")
    rule, line, dots = layers(chart)
    assert rule["mark"]["strokeDash"] and chart.to_dict()["datasets"][rule["data"]["name"]] == [
        {"slo_attainment": 0.95}
    ]
    assert line["encoding"]["x"]["axis"]["title"] == "sessions/s offered"
    assert dots["encoding"]["fill"]["condition"]["test"] == "datum.stable === false"
    drawn = chart.to_dict()["datasets"][dots["data"]["name"]]
    assert [row["queue"] for row in drawn] == ["stable", "unstable: the queue grew all along"]
    assert line["encoding"]["y"]["scale"]["domain"][0] == 0.5  # a tenth below the lowest
    assert len(layers(charts_policies.goodput_chart(points, ["a"], "sessions/s"))) == 2  # no diagonal of sessions
    assert len(layers(charts_policies.goodput_chart(points, ["a"]))) == 3


def test_curves_carry_the_slo() -> None:
    frame = pd.DataFrame(
        {"side": ["vllm"] * 3, "latency": ["ttft"] * 3, "value_ms": [1.0, 10.0, 100.0], "share": [0.0, 0.5, 1.0]}
    )
    chart = charts_policies.latency_chart(frame, "ttft", ["vllm"], 500.0)
    assert layers(chart)[0]["encoding"]["x"]["scale"]["domain"][1] > 500.0
    assert "500 ms" in chart.description and len(layers(chart)) == 2
    assert len(layers(charts_policies.latency_chart(frame, "ttft", ["vllm"]))) == 1


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.5), (0.7, 16.0), (3.0, 40_000.0), (95.0, 105.0)])
def test_a_log_axis_has_ticks_inside(low: float, high: float) -> None:
    ticks = charts_policies.log_ticks(low, high)
    assert len(ticks) >= 1 and all(low <= tick <= high for tick in ticks)
    assert len(ticks) <= 12


# ---- tenants and caches ---------------------------------------------------------------------------------------------


def test_services_of_all_sides_share_their_axes() -> None:
    rows = [
        (side, tenant, t, 10.0 * t, 30.0 * t * (side == "b")) for side in "ab" for tenant in "xy" for t in (0.0, 5.0)
    ]
    frame = pd.DataFrame(rows, columns=["side", "tenant", "time_s", "service_tokens", "asked_tokens"])
    one, other = (charts_groups.service_chart(frame, side, ["x", "y"]) for side in "ab")
    assert rows_of(one) == 4  # of this side only
    for chart in (one, other):
        asked, received = layers(chart)
        assert asked["encoding"]["y"]["scale"]["domain"] == [0, 150.0 * 1.03]
        assert received["encoding"]["x"]["scale"]["domain"] == [0, 5.0]


def test_groups_reach_from_p50_to_p99() -> None:
    rows = [("vllm", "flood", "ttft", 10, 10, 5.0, 4.0, 90.0), ("vllm", "gone", "ttft", 3, 0, np.nan, np.nan, np.nan)]
    frame = pd.DataFrame(
        rows, columns=["side", "group", "latency", "requests", "samples", "mean_ms", "p50_ms", "p99_ms"]
    )
    chart = charts_groups.groups_chart(frame, "ttft", ["vllm"], "tenant")
    bar = layers(chart)[0]
    assert (bar["encoding"]["x"]["field"], bar["encoding"]["x2"]["field"]) == ("p50_ms", "p99_ms")
    assert rows_of(chart) == 1  # who has no answer has no bar


def test_hits_are_drawn_in_gib_where_a_token_has_bytes() -> None:
    points = pd.DataFrame(
        {
            "eviction": ["lru", "lru", "lru"],
            "cache_blocks": [10.0, 100.0, np.inf],
            "cache_tokens": [640.0, 6400.0, np.inf],
            "cache_bytes": [2.0**30, 10 * 2.0**30, np.inf],
            "hit_ratio": [0.2, 0.5, 0.6],
        }
    )
    chart = charts_cache.hit_ratio_chart(points, 0.6)
    roof, line, _ = layers(chart)
    assert line["encoding"]["x"]["axis"]["title"] == "cache size (GiB of KV)"
    assert [row["size"] for row in chart.to_dict()["datasets"][line["data"]["name"]]] == [1.0, 10.0]
    assert chart.to_dict()["datasets"][roof["data"]["name"]] == [{"hit_ratio": 0.6}]
    blocks = charts_cache.hit_ratio_chart(points.assign(cache_bytes=np.nan), 0.6)
    assert layers(blocks)[1]["encoding"]["x"]["axis"]["title"] == "cache size (blocks)"


def test_what_was_computed_comes_last_and_in_the_colour_of_prefill() -> None:
    rows = [
        ("lru", "GPU cache", 60, 0.6, 0),
        ("lru", "computed", 40, 0.4, 1),
        ("t", "GPU cache", 50, 0.5, 0),
        ("t", "cpu", 20, 0.2, 1),
        ("t", "computed", 30, 0.3, 2),
    ]
    frame = pd.DataFrame(rows, columns=["side", "place", "tokens", "share", "order"])
    chart = charts_cache.found_chart(frame, ["lru", "t"])
    scale = chart.to_dict()["encoding"]["color"]["scale"]
    assert scale["domain"] == ["GPU cache", "cpu", "computed"] and scale["range"][-1] == "#c2410c"
    assert "t: cpu 20%" in chart.description
    moved = pd.DataFrame(
        [("t", "cpu", "loaded", 5, 3 * 2.0**30)], columns=["side", "tier", "direction", "tokens", "bytes"]
    )
    assert "t · cpu: loaded 3.0 GiB" in charts_cache.moved_chart(moved).description


# ---- plans ----------------------------------------------------------------------------------------------------------


def points() -> pd.DataFrame:
    rows = [
        ("h100 TP1", "1 x h100", "h100", 100.0, 50.0, 0.5, True, True, False),
        ("h100 TP1", "2 x h100", "h100", 60.0, 90.0, 0.9, True, True, True),
        ("h200 TP1", "1 x h200", "h200", 150.0, 10.0, 0.3, False, False, False),
    ]
    names = [
        "kind",
        "name",
        "gpu",
        "tokens_per_s_per_gpu",
        "tokens_per_s_per_user",
        "usd_per_million_output_tokens",
        "holds",
        "frontier",
        "cost_frontier",
    ]
    return pd.DataFrame(rows, columns=names).assign(rate=1.0, requests=10, why_not=["", "", "TTFT p99 1,000 ms"])


def test_the_frontier_is_a_line_through_what_holds() -> None:
    chart = charts_plan.pareto_chart(points())
    line, dots, text = layers(chart)
    data = chart.to_dict()["datasets"]
    assert [row["name"] for row in data[line["data"]["name"]]] == ["1 x h100", "2 x h100"]
    assert len(data[dots["data"]["name"]]) == 3 and dots["encoding"]["fill"]["condition"]["test"] == "datum.holds"
    assert [row["name"] for row in data[text["data"]["name"]]] == ["1 x h100"]  # one label a kind
    assert "3 simulations, 2 of which keep the SLOs" in chart.description
    cost = charts_plan.cost_chart(points())
    assert layers(cost)[1]["encoding"]["y"]["axis"]["title"] == "$ per million output tokens"


def knee() -> pd.DataFrame:
    rows = [
        (rate, "ttft", word, value * rate, rate < 3, rate < 2, "", rate >= 3)
        for rate in (1.0, 2.0, 3.0)
        for word, value in (("p50", 10.0), ("p99", 40.0))
    ]
    return pd.DataFrame(
        rows, columns=["rate", "metric", "statistic", "value_ms", "stable", "holds", "why_not", "unstable"]
    )


def test_the_knee_shades_what_is_unstable_and_draws_every_slo() -> None:
    slos = [Slo("ttft", "p99", 0.1), Slo("tpot", "p99", 0.05)]
    chart = charts_plan.knee_chart(knee(), "ttft", slos, 1.0, "sessions/s")
    made = chart.to_dict()
    data = {layer["mark"]["type"]: made["datasets"][layer["data"]["name"]] for layer in made["layer"]}
    assert data["rect"] == [{"rate": 2.0, "end": 3.04, "text": "unstable"}]  # from the last rate that was stable
    texts = [
        row["text"]
        for layer in made["layer"]
        if layer["mark"]["type"] == "text"
        for row in made["datasets"][layer["data"]["name"]]
    ]
    assert texts == ["unstable", "SLO P99 100 ms", "holds up to 1 sessions/s"]
    assert "unstable from 3" in chart.description and "holds up to 1 sessions/s" in chart.description
    calm = charts_plan.knee_chart(knee().assign(unstable=False), "ttft", [], None)
    assert "rect" not in {layer["mark"]["type"] for layer in layers(calm)} and "holds at no rate" in calm.description


def sure() -> pd.DataFrame:
    rows = [
        (rate, slo, 100.0, 50.0, 80.0, high, 0.5, 0.8, high / 100, p, both, 19)
        for rate, both in ((1.0, 1.0), (2.0, 0.4))
        for slo, high, p in (("ttft_p99=100ms", 90.0, 1.0), ("tpot_p99=100ms", 120.0, both))
    ]
    names = [
        "rate",
        "slo",
        "limit_ms",
        "low_ms",
        "median_ms",
        "high_ms",
        "low",
        "median",
        "high",
        "probability",
        "probability_all",
        "draws",
    ]
    return pd.DataFrame(rows, columns=names)


def test_the_probability_of_all_promises_stands_beside_each() -> None:
    chart = charts_plan.probability_chart(sure(), 0.95)
    goal, line, _ = layers(chart)
    drawn = pd.DataFrame(chart.to_dict()["datasets"][line["data"]["name"]])
    assert drawn[drawn["slo"] == "all SLOs"]["probability"].tolist() == [1.0, 0.4] and len(drawn) == 6
    assert chart.to_dict()["datasets"][goal["data"]["name"]] == [{"probability": 0.95}]
    assert "2: 40%" in chart.description
    alone = charts_plan.probability_chart(sure()[sure()["slo"] == "ttft_p99=100ms"], 0.95)
    assert layers(alone)[1]["encoding"]["color"]["scale"]["domain"] == ["all SLOs"]


def test_intervals_are_drawn_against_their_limits() -> None:
    chart = charts_plan.promise_chart(sure(), 2.0)
    rule, bars, _ = layers(chart)
    assert bars["encoding"]["color"]["condition"]["value"] == charts_plan.BROKEN
    assert bars["encoding"]["color"]["condition"]["test"] == "(datum.high > 1)"
    assert "tpot_p99=100ms: 50% to 120% of its limit" in chart.description
    never = charts_plan.promise_chart(sure().assign(high=np.inf), 2.0)
    assert rows_of(never) == 1  # the limit: what was rejected is infinitely late
    assert rule["mark"]["type"] == "rule"


def test_empty_frames_draw_empty_charts() -> None:
    for chart in (
        charts_plan.pareto_chart(points().iloc[:0]),
        charts_plan.cost_chart(points().iloc[:0]),
        charts_plan.knee_chart(knee().iloc[:0], "ttft", [], None),
        charts_policies.differences_chart(intervals().iloc[:0], "ttft", SIDES),
    ):
        assert chart.to_dict()["layer"]


def test_the_largest_charts_stay_small() -> None:
    """Ten sides, six tenants and the others, all slices; ten sides' curves."""
    from llmsim.compare_groups import SHOWN, SLICES
    from llmsim.compare_report import CURVE_POINTS

    assert 2 * (SHOWN + 1) * (SLICES + 1) < 20_000 and 10 * CURVE_POINTS < 20_000
