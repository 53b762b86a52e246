"""Charts of a run, or of several overlaid, from the frames of `llmsim.views`.

They carry no background and no black: they are read on light and dark pages. Each has a title that names what is
drawn, the notes of its frame (what was left out) as a subtitle, units on its axes, tooltips, and a description for
screen readers. None takes more than `POINTS` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsim.charts import COLOURS, run_colours

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    Chart = alt.Chart | alt.LayerChart | alt.VConcatChart | alt.HConcatChart

POINTS = 20_000
PARTS = ("queue", "prefill", "decode", "preempted")
WIDTH, HEIGHT = 560, 240
SHORT = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
DASHES = {"P50": [1, 0], "P90": [5, 3], "P99": [2, 2]}
# Panels of the strip: field of the frame, title of the axis, format
PANELS = (
    ("running", "Running (requests)", ",.0f"),
    ("waiting", "Waiting (requests)", ",.0f"),
    ("kv_usage", "KV cache in use (%)", ".0%"),
    ("prompt_tokens_per_s", "Prompt (tokens/s)", "~s"),
    ("output_tokens_per_s", "Output (tokens/s)", "~s"),
)


def styled(chart: Any, description: str) -> Any:
    """The common look; once, on the outermost chart."""
    text, grid = COLOURS["text"], COLOURS["grid"]
    return (
        chart.properties(background="transparent", description=description)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=text, titleColor=text, gridColor=grid, gridOpacity=0.25, domainColor=grid, tickColor=grid,
            labelFontSize=11, titleFontSize=12, titleFontWeight="normal",
        )
        .configure_legend(labelColor=text, titleColor=text, labelFontSize=12, labelLimit=360, symbolOpacity=1)
        .configure_title(
            color=text, subtitleColor=text, anchor="start", fontSize=14, subtitleFontSize=11, offset=8, frame="group"
        )
        .configure_header(labelColor=text, titleColor=text)
    )  # fmt: skip


def check(frame: pd.DataFrame) -> None:
    if len(frame) > POINTS:
        raise ValueError(f"{len(frame)} points: a chart takes at most {POINTS}; make the frame with llmsim.views")


def _labels(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["label"]))


def _colour(labels: Sequence[str], *, legend: bool = True) -> alt.Color:
    """Of the runs; no legend where there is one run only."""
    import altair as alt

    shown = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=3)
    scale = alt.Scale(domain=list(labels), range=run_colours(labels))
    return alt.Color("label:N", scale=scale, legend=shown if legend and len(labels) > 1 else None)


def _title(text: str, frame: pd.DataFrame, *more: str) -> alt.TitleParams:
    import altair as alt

    lines = [*more, *frame.attrs.get("notes", ())]
    return alt.TitleParams(text, subtitle=lines) if lines else alt.TitleParams(text)


def ecdf_chart(frame: pd.DataFrame, slo_ms: float | None = None, title: str | None = None) -> alt.LayerChart:
    """`llmsim.views.ecdf` as curves, runs overlaid, with the SLO as a dashed line. x is logarithmic, or, where a value
    is 0, logarithmic from the smallest positive one on."""
    import altair as alt
    import pandas as pd

    from llmsim.views_base import MEASURES

    check(frame)
    measure = frame.attrs["measure"]
    labels, heading = _labels(frame), MEASURES[measure].heading
    positive = frame["value"][frame["value"] > 0]
    if len(positive) == len(frame):
        scale = alt.Scale(type="log", nice=False, padding=8)
    else:
        scale = alt.Scale(type="symlog", constant=float(positive.min()) if len(positive) else 1.0, nice=False)
    x = alt.X("value:Q", scale=scale, axis=alt.Axis(title=heading, format=",~r", tickCount=6, labelOverlap=True))
    y = alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="Share of requests", format=".0%"))
    unit = MEASURES[measure].unit
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("value:Q", title=f"at most ({unit})", format=",.4~r"),
        alt.Tooltip("share:Q", title="share of requests", format=".2%"),
        alt.Tooltip("requests:Q", title="requests", format=","),
    ]
    line = alt.Chart(frame).mark_line(strokeWidth=2.5, interpolate="step-after", clip=True)
    layers: list[Any] = [line.encode(x, y, _colour(labels), tooltip=tips)]
    if slo_ms is not None:
        text = f"SLO {slo_ms:g} {unit}"
        goal = alt.Chart(pd.DataFrame({"value": [slo_ms], "text": [text]}))
        layers.append(goal.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(x))
        style: dict[str, Any] = {"align": "left", "dx": 4, "color": COLOURS["slo"], "fontSize": 11}
        layers.append(goal.mark_text(**style).encode(x, y=alt.value(8), text="text:N"))
    name = title or MEASURES[measure].title
    said = f"Cumulative share of requests by {heading}, for {', '.join(labels)}" + (
        f", with the SLO of {slo_ms:g} {unit}" if slo_ms is not None else ""
    )
    chart: alt.LayerChart = styled(
        alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=_title(name, frame)), said
    )
    return chart


def strip_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """`llmsim.views.strip` as panels over the same simulated time: lines are means of a slice, the shade reaches up to
    its largest value."""
    import altair as alt

    check(frame)
    labels = _labels(frame)
    panels = [_panel(frame, labels, *panel, legend=at == 0) for at, panel in enumerate(PANELS)]
    panels.append(_ttft_panel(frame, labels))
    said = f"Requests, KV cache usage, tokens per second and TTFT over simulated time, for {', '.join(labels)}"
    chart: alt.VConcatChart = styled(
        alt.vconcat(*panels, spacing=8)
        .properties(title=_title("Over simulated time", frame))
        .resolve_scale(x="shared"),
        said,
    )
    return chart


def _time(frame: pd.DataFrame, *, last: bool = False) -> alt.X:
    import altair as alt

    domain = [float(frame["time_s"].min()), float(frame["end_s"].max())] if len(frame) else [0.0, 1.0]
    axis = alt.Axis(title="Simulated time (s)" if last else None, labels=last, ticks=last, format=",~r")
    return alt.X("time_s:Q", scale=alt.Scale(domain=domain, nice=False), axis=axis)


def _panel(frame: pd.DataFrame, labels: Sequence[str], field: str, title: str, form: str, *, legend: bool) -> Any:
    import altair as alt

    x = _time(frame)
    colour = _colour(labels, legend=legend)
    axis = alt.Axis(title=title, format=form, tickCount=3, minExtent=44, titleAnchor="start", titleAngle=0,
                    titleAlign="left", titleY=-6, titleX=0, titleBaseline="bottom")  # fmt: skip
    y = alt.Y(f"{field}:Q", axis=axis, scale=alt.Scale(zero=True))
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("time_s:Q", title="from (s)", format=",.6~r"),
        alt.Tooltip(f"{field}:Q", title=title, format=",.3~g" if "%" not in form else ".1%"),
    ]
    base = alt.Chart(frame)
    layers = []
    if f"{field}_max" in frame:
        tips.append(alt.Tooltip(f"{field}_max:Q", title="largest", format=",.3~g" if "%" not in form else ".1%"))
        band = base.mark_area(opacity=0.18, interpolate="step-after")
        layers.append(band.encode(x, y, alt.Y2(f"{field}_max:Q"), colour))
    layers.append(base.mark_line(strokeWidth=1.6, interpolate="step-after").encode(x, y, colour, tooltip=tips))
    return alt.layer(*layers).properties(width=WIDTH, height=64)


def _ttft_panel(frame: pd.DataFrame, labels: Sequence[str]) -> Any:
    import altair as alt

    fields = {"ttft_p50_ms": "P50", "ttft_p90_ms": "P90", "ttft_p99_ms": "P99"}
    there = frame[frame["ttft_requests"] > 0]
    long = there.melt(["label", "time_s", "ttft_requests"], list(fields), "percentile", "ttft_ms")
    long["percentile"] = long["percentile"].map(fields)
    y = alt.Y("ttft_ms:Q", scale=alt.Scale(type="log"), axis=alt.Axis(title="TTFT of requests sent then (ms)",
              tickCount=4, format="~s", minExtent=44, titleAnchor="start", titleAngle=0, titleAlign="left", titleY=-6,
              titleX=0, titleBaseline="bottom"))  # fmt: skip
    dash = alt.StrokeDash(
        "percentile:N",
        scale=alt.Scale(domain=list(DASHES), range=list(DASHES.values())),
        legend=alt.Legend(title=None, orient="bottom", symbolStrokeColor=COLOURS["text"], symbolSize=400),
    )
    tips = [
        alt.Tooltip("label:N", title="run"),
        "percentile:N",
        alt.Tooltip("time_s:Q", title="from (s)", format=",.6~r"),
        alt.Tooltip("ttft_ms:Q", title="TTFT (ms)", format=",.4~r"),
        alt.Tooltip("ttft_requests:Q", title="of requests", format=","),
    ]
    line = alt.Chart(long).mark_line(strokeWidth=1.6, interpolate="step-after")
    colour = _colour(labels, legend=False)
    return line.encode(_time(frame, last=True), y, colour, dash, tooltip=tips).properties(width=WIDTH, height=110)


def where_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """`llmsim.views.where` as stacked bars: mean E2EL of each run, split into its parts; a block for each group."""
    import altair as alt

    check(frame)
    labels = _labels(frame)
    blocks = []
    for at, group in enumerate(dict.fromkeys(frame["group"])):
        part = frame[frame["group"] == group]
        blocks.append(_stacked(part, labels, group, legend=at == 0))
    chart: alt.VConcatChart = styled(
        alt.vconcat(*blocks, spacing=10).properties(title=_title("Where end-to-end latency went", frame)),
        f"Mean end-to-end latency split into queue, prefill, decode and preempted, for {', '.join(labels)}",
    )
    return chart


def _stacked(part: pd.DataFrame, labels: Sequence[str], group: str, *, legend: bool) -> Any:
    import altair as alt

    colour = alt.Color(
        "part:N",
        scale=alt.Scale(domain=list(PARTS), range=[COLOURS[name] for name in PARTS]),
        legend=alt.Legend(title=None, orient="top", symbolType="square") if legend else None,
    )
    tips = [
        alt.Tooltip("label:N", title="run"),
        "part:N",
        alt.Tooltip("mean_ms:Q", title="mean (ms)", format=",.4~r"),
        alt.Tooltip("share:Q", title="share of E2EL", format=".1%"),
        alt.Tooltip("requests:Q", title="requests", format=","),
    ]
    x = alt.X("begin_ms:Q", axis=alt.Axis(title=f"Mean E2EL of {group} (ms)", format=",~r", tickCount=7))
    y = alt.Y("label:N", sort=list(labels), axis=alt.Axis(title=None, labelLimit=160))
    bars = alt.Chart(part).mark_bar(height={"band": 0.72}).encode(x, y, colour, alt.X2("end_ms:Q"), tooltip=tips)
    wide = part[(part["end_ms"] - part["begin_ms"]) > 0.06 * part["end_ms"].max()]
    wide = wide.assign(middle_ms=(wide["begin_ms"] + wide["end_ms"]) / 2)
    # on the bars, whose colours do not depend on the page's: near-black on the light one, near-white on the others
    ink = alt.condition("datum.part == 'queue'", alt.value("#1e293b"), alt.value("#f8fafc"))
    text = alt.Chart(wide).mark_text(fontSize=11).encode(
        alt.X("middle_ms:Q"), y, text=alt.Text("share:Q", format=".0%"), color=ink
    )  # fmt: skip
    return alt.layer(bars, text).properties(width=WIDTH, height=32 * len(labels))


def scatter_chart(frame: pd.DataFrame) -> alt.Chart:
    """`llmsim.views.scatter` as dots; a rectangle drawn over it is the parameter "brush", in the fields x and y."""
    import altair as alt

    from llmsim.views_base import MEASURES

    check(frame)
    labels = _labels(frame)
    first, second = MEASURES[frame.attrs["x"]], MEASURES[frame.attrs["y"]]
    positive = len(frame) > 0 and bool((frame["y"] > 0).all())
    x = alt.X("x:Q", scale=alt.Scale(nice=False, zero=False, padding=6),
              axis=alt.Axis(title=first.heading, format=",~r"))  # fmt: skip
    y = alt.Y("y:Q", scale=alt.Scale(type="log" if positive else "linear"),
              axis=alt.Axis(title=second.heading, format=",~r", tickCount=5))  # fmt: skip
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("id:Q", title="request", format="d"),
        alt.Tooltip("x:Q", title=first.heading, format=",.6~r"),
        alt.Tooltip("y:Q", title=second.heading, format=",.4~r"),
        alt.Tooltip("prompt_tokens:Q", title="prompt (tokens)", format=","),
        alt.Tooltip("output_tokens:Q", title="output (tokens)", format=","),
    ]
    brush = alt.selection_interval(name="brush", encodings=["x", "y"])
    size, opacity = (26, 0.65) if len(frame) < 5000 else (10, 0.35)
    dots = alt.Chart(frame).mark_circle(size=size, opacity=opacity, clip=True)
    titled = _title(f"{second.title} of each request", frame)
    dots = dots.encode(x, y, _colour(labels), tooltip=tips).add_params(brush)
    chart: alt.Chart = styled(
        dots.properties(width=WIDTH, height=HEIGHT, title=titled),
        f"{second.heading} against {first.heading}, a dot a request, for {', '.join(labels)}",
    )
    return chart
