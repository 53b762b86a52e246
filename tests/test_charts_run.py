"""Charts of runs: that they draw the frame's columns, name units and percentiles, and stay small; the picture itself is
for the eye."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from made_results import Served, made_result, random_served
from needs import require

from llmsim import charts_run, charts_style, views
from llmsim.charts import COLOURS, png
from llmsim.metrics import Result

require("altair")
require("vl_convert")

POINTS = 20_000


def runs() -> dict[str, Result]:
    return {"slow": made_result(random_served(60, 1)), "fast": made_result(random_served(50, 2))}


def drawings() -> dict[str, Any]:
    both, one = runs(), made_result(random_served(60, 1))
    return {
        "ecdf": charts_run.ecdf_chart(views.ecdf(both, "ttft"), slo_ms=500.0),
        "strip": charts_run.strip_chart(views.strip(both)),
        "where": charts_run.where_chart(views.where(both)),
        "scatter": charts_run.scatter_chart(views.scatter(both, y="e2el")),
        "linked": charts_run.linked_chart(views.linked(both)),
        "gantt": charts_run.gantt_chart(views.gantt(one)),
        "life": charts_run.life_chart(views.life(one, 3)),
    }


def parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every table inside a document."""
    if isinstance(node, dict):
        yield node
        for item in node.values():
            yield from parts(item)
    elif isinstance(node, list):
        for item in node:
            yield from parts(item)


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {name: charts_style.sized(chart, 400) for name, chart in drawings().items()}


def test_every_axis_with_numbers_names_its_unit(documents: dict[str, dict[str, Any]]) -> None:
    units = ("(ms)", "(s)", "(s of simulated time)", "(requests)", "(%)", "(tokens/s)")
    for name, document in documents.items():
        for encoding in (part["encoding"] for part in parts(document) if "encoding" in part):
            for channel in ("x", "y"):
                field = encoding.get(channel, {})
                if field.get("type") == "quantitative" and field.get("axis"):
                    title = field["axis"].get("title")
                    if title is not None:  # panels of the strip share the last one's
                        assert title.endswith(units) or title == "Share of requests", (name, title)


def test_every_chart_is_told_to_screen_readers_and_has_no_background(documents: dict[str, dict[str, Any]]) -> None:
    for document in documents.values():
        assert len(document["description"]) > 40
        assert document["background"] == "transparent"
        text = json.dumps(document)
        assert '"black"' not in text and '"#000' not in text


def test_every_encoded_field_is_a_column_of_its_data(documents: dict[str, dict[str, Any]]) -> None:
    for name, document in documents.items():
        columns = {column for rows in document["datasets"].values() for row in rows for column in row}
        made = {part["as"] for part in parts(document) if isinstance(part.get("as"), str)}
        for part in parts(document):
            if part.get("field"):
                assert part["field"] in columns | made, (name, part["field"])


def test_colours_are_those_of_the_one_table(documents: dict[str, dict[str, Any]]) -> None:
    ranges = {name: [part["scale"]["range"] for part in parts(document) if "range" in part.get("scale", {})]
              for name, document in documents.items()}  # fmt: skip
    assert [COLOURS["baseline"], COLOURS["candidate"]] in ranges["ecdf"]
    assert [COLOURS[part] for part in views.PARTS] in ranges["where"]
    assert [COLOURS[part] for part in ("queue", "prefill", "decode")] in ranges["gantt"]


def test_the_slo_is_a_line_at_its_value(documents: dict[str, dict[str, Any]]) -> None:
    rows = [row for rows in documents["ecdf"]["datasets"].values() for row in rows if "text" in row]
    assert rows == [{"value": 500.0, "text": "SLO 500 ms"}]
    rule = next(part for part in parts(documents["ecdf"]) if part.get("mark", {}).get("type") == "rule")
    assert rule["encoding"]["x"]["field"] == "value"


def test_percentiles_are_named_and_what_was_left_out_is_in_the_subtitle() -> None:
    run = {"run": made_result(random_served(3000, 1))}
    strip = charts_style.sized(charts_run.strip_chart(views.strip(run)), 400)
    assert '["P50", "P90", "P99"]' in json.dumps(strip)
    assert "slices of" in strip["title"]["subtitle"][0]
    dots = charts_style.sized(charts_run.scatter_chart(views.scatter(run, points=500)), 400)
    assert "of 3,000 requests drawn, the extremes of each moment among them" in dots["title"]["subtitle"][0]
    curve = charts_style.sized(charts_run.ecdf_chart(views.ecdf(run, points=100)), 400)
    assert curve["title"]["subtitle"] == ["up to 100 points a curve, the extremes among them"]


def test_requests_far_apart_begin_together() -> None:
    near, far = ([Served(at, [at + 1.0, at + 2.0]) for at in (0.0, gap)] for gap in (5.0, 5000.0))
    for served, begins_s, title in ((near, {0.0, 5.0}, "Simulated time (s)"), (far, {0.0}, "Since it was sent (s)")):
        chart = charts_run.gantt_chart(views.gantt(made_result(served)))
        document = charts_style.sized(chart, 400)
        (rows,) = document["datasets"].values()
        assert {row["begin_s"] for row in rows if row["phase"] == "queue"} == begins_s
        assert document["encoding"]["x"]["axis"]["title"] == title


def test_what_is_selected_has_a_name(documents: dict[str, dict[str, Any]]) -> None:
    names = {
        name: {part["name"] for part in parts(document) if "select" in part} for name, document in documents.items()
    }
    assert names["scatter"] == names["linked"] == {"brush"}
    assert names["gantt"] == {"request"}


def test_a_frame_that_a_browser_would_choke_on_is_refused() -> None:
    frame = views.scatter({"run": made_result(random_served(10, 1))})
    large = pd.concat([frame] * 2500)
    large.attrs = frame.attrs
    with pytest.raises(ValueError, match=f"25000 points: a chart takes at most {POINTS}"):
        charts_run.scatter_chart(large)


def test_latencies_of_zero_have_no_place_on_a_logarithm() -> None:
    run = made_result([Served(0.0, [0.0, 0.5]), Served(1.0, [1.2, 1.4])])
    document = charts_style.sized(charts_run.ecdf_chart(views.ecdf({"run": run}, "ttft")), 400)
    scales = [part["scale"] for part in parts(document) if part.get("field") == "value" and "scale" in part]
    assert scales[0]["type"] == "symlog"
    assert scales[0]["domain"][0] == 0.0


@pytest.mark.parametrize("name", ["ecdf", "strip", "where", "scatter", "linked", "gantt", "life"])
def test_the_renderer_accepts_every_chart(name: str, documents: dict[str, dict[str, Any]]) -> None:
    import vl_convert

    assert vl_convert.vegalite_to_svg(documents[name]).startswith("<svg")


def test_a_picture_of_twenty_thousand_dots_can_be_saved() -> None:
    frame = views.scatter({"run": made_result(random_served(6000, 3))})
    assert png(charts_run.scatter_chart(frame), ppi=40).startswith(b"\x89PNG")
