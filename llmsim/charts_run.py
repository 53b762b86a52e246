"""Charts of a run, or of several overlaid, from the frames of `llmsim.views`: distributions, the strip over simulated
time, where latency went. Those of single requests are in `llmsim.charts_requests`. None takes more than 20,000 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsim.charts import COLOURS
from llmsim.charts_requests import gantt_chart, life_chart, linked_chart, scatter_chart
from llmsim.charts_style import (
    EXACT,
    HEIGHT,
    NUMBER,
    SHORT_NUMBER,
    WIDTH,
    check,
    labels_of,
    log_x,
    log_y,
    part_colour,
    run_colour,
    styled,
    title_of,
)

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

__all__ = [
    "ecdf_chart", "gantt_chart", "life_chart", "linked_chart", "scatter_chart", "strip_chart", "strip_panels",
    "where_chart", "where_panels",
]  # fmt: skip

DASHES = {"P50": [1, 0], "P90": [5, 3], "P99": [2, 2]}
# The title of an axis, written above it from left to right
ABOVE: dict[str, Any] = {
    "minExtent": 44,
    "titleAnchor": "start",
    "titleAngle": 0,
    "titleAlign": "left",
    "titleY": -6,
    "titleX": 0,
    "titleBaseline": "bottom",
}
# Panels of the strip: field of the frame, title of the axis, format
PANELS = (
    ("running", "Running (requests)", ",.0f"),
    ("waiting", "Waiting (requests)", ",.0f"),
    ("kv_usage", "KV cache in use (%)", ".0%"),
    ("prompt_tokens_per_s", "Prompt tokens computed (tokens/s)", "~s"),
    ("output_tokens_per_s", "Output tokens (tokens/s)", "~s"),
)


def ecdf_chart(
    frame: pd.DataFrame, slo_ms: float | None = None, title: str | None = None, *, legend: bool = True
) -> alt.LayerChart:
    """`llmsim.views.ecdf` as curves over a logarithmic axis, runs overlaid, the SLO a dashed line. Without `legend`:
    beside charts that have one."""
    import altair as alt

    check(frame)
    labels, heading, unit = labels_of(frame), frame.attrs["headings"]["value"], frame.attrs["units"]["value"]
    x = log_x(frame["value"], "value", heading, slo_ms)
    y = alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="Share of requests", format=".0%"))
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("value:Q", title=f"at most ({unit})", format=SHORT_NUMBER),
        alt.Tooltip("share:Q", title="share of requests", format=".2%"),
        alt.Tooltip("requests:Q", title="requests", format=","),
    ]
    line = alt.Chart(frame).mark_line(strokeWidth=2.5, interpolate="step-after", clip=True)
    layers: list[Any] = [line.encode(x, y, run_colour(labels, legend=legend), tooltip=tips)]
    said = f"Cumulative share of requests by {heading}, for {', '.join(labels)}"
    if slo_ms is not None:
        layers += _goal(x, slo_ms, f"SLO {slo_ms:g} {unit}")
        said += f", with the SLO of {slo_ms:g} {unit}"
    whole = alt.layer(*layers).properties(
        width=WIDTH, height=HEIGHT, title=title_of(title or frame.attrs["titles"]["value"], frame)
    )
    chart: alt.LayerChart = styled(whole, said)
    return chart


def _goal(x: alt.X, at: float, text: str) -> list[Any]:
    """A dashed line across the plot, its text on the left of it, where curves are low."""
    import altair as alt
    import pandas as pd

    goal = alt.Chart(pd.DataFrame({"value": [at], "text": [text]}))
    style: dict[str, Any] = {
        "align": "right",
        "baseline": "bottom",
        "dx": -5,
        "dy": -4,
        "color": COLOURS["slo"],
        "fontSize": 11,
    }
    return [
        goal.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(x),
        goal.mark_text(**style).encode(x, y=alt.value("height"), text="text:N"),
    ]


def strip_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """`llmsim.views.strip` as panels over the same simulated time: lines are means of a slice, the shade reaches up to
    its largest value."""
    import altair as alt

    panels, title, said = _strip(frame)
    whole = alt.vconcat(*panels, spacing=8).properties(title=title)
    chart: alt.VConcatChart = styled(whole.resolve_scale(x="shared", color="independent"), said)
    return chart


def strip_panels(frame: pd.DataFrame) -> list[Any]:
    """The same as charts that stand alone, in a third of the time: Altair copies what it joins again and again."""
    return _alone(*_strip(frame))


def _strip(frame: pd.DataFrame) -> tuple[list[Any], alt.TitleParams, str]:
    check(frame)
    labels = labels_of(frame)
    panels = [_panel(frame, labels, *panel, legend=panel == PANELS[0]) for panel in PANELS]
    panels.append(_ttft_panel(frame, labels))
    said = f"Requests, KV cache usage, tokens per second and TTFT over simulated time, for {', '.join(labels)}"
    return panels, title_of("Over simulated time", frame), said


def _alone(panels: Sequence[Any], title: alt.TitleParams, said: str) -> list[Any]:
    """Charts of their own; the first one carries the title of all."""
    titled = [panels[0].properties(title=title), *panels[1:]]
    return [styled(panel, f"{said}, panel {number}") for number, panel in enumerate(titled, 1)]


def _time(frame: pd.DataFrame, *, last: bool = False) -> alt.X:
    import altair as alt

    domain = [float(frame["time_s"].min()), float(frame["end_s"].max())] if len(frame) else [0.0, 1.0]
    axis = alt.Axis(title="Simulated time (s)" if last else None, labels=last, ticks=last, format=NUMBER)
    return alt.X("time_s:Q", scale=alt.Scale(domain=domain, nice=False), axis=axis)


def _panel(frame: pd.DataFrame, labels: Sequence[str], field: str, title: str, form: str, *, legend: bool) -> Any:
    import altair as alt

    x, colour = _time(frame), run_colour(labels, legend=legend, above=24)
    whole: dict[str, Any] = (
        {} if "%" in form else {"tickMinStep": 1}
    )  # of few requests no halves, which would read 1, 1
    axis = alt.Axis(title=title, format=form, tickCount=3, **whole, **ABOVE)
    y = alt.Y(f"{field}:Q", axis=axis, scale=alt.Scale(zero=True))
    shown = ".1%" if "%" in form else SHORT_NUMBER
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("time_s:Q", title="from (s)", format=EXACT),
        alt.Tooltip("end_s:Q", title="to (s)", format=EXACT),
        alt.Tooltip(f"{field}:Q", title=title, format=shown),
    ]
    base, layers = alt.Chart(frame), []
    if f"{field}_max" in frame:
        tips.append(alt.Tooltip(f"{field}_max:Q", title="largest", format=shown))
        band = base.mark_area(opacity=0.18, interpolate="step-after")
        layers.append(band.encode(x, y, colour, alt.Y2(f"{field}_max:Q")))
    layers.append(base.mark_line(strokeWidth=1.6, interpolate="step-after").encode(x, y, colour, tooltip=tips))
    return alt.layer(*layers).properties(width=WIDTH, height=64)


def _ttft_panel(frame: pd.DataFrame, labels: Sequence[str]) -> Any:
    import altair as alt

    fields = {f"ttft_{name.lower()}_ms": name for name in DASHES}
    there = frame[frame["ttft_requests"] > 0]
    long = there.melt(["label", "time_s", "ttft_requests"], list(fields), "percentile", "ttft_ms")
    long["percentile"] = long["percentile"].map(fields)
    y = log_y(long["ttft_ms"], "ttft_ms", "TTFT of requests sent then (ms)", **ABOVE)
    dash = alt.StrokeDash(
        "percentile:N",
        scale=alt.Scale(domain=list(DASHES), range=list(DASHES.values())),
        legend=alt.Legend(title=None, orient="bottom", symbolStrokeColor=COLOURS["text"], symbolSize=400),
    )
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("percentile:N", title="percentile"),
        alt.Tooltip("time_s:Q", title="from (s)", format=EXACT),
        alt.Tooltip("ttft_ms:Q", title="TTFT (ms)", format=SHORT_NUMBER),
        alt.Tooltip("ttft_requests:Q", title="of requests", format=","),
    ]
    line = alt.Chart(long).mark_line(strokeWidth=1.6, interpolate="step-after")
    colour = run_colour(labels, legend=False)
    return line.encode(_time(frame, last=True), y, colour, dash, tooltip=tips).properties(width=WIDTH, height=110)


def where_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """`llmsim.views.where` as stacked bars: mean E2EL of each run, split into its parts; a block for each group."""
    import altair as alt

    blocks, title, said = _where(frame)
    whole = alt.vconcat(*blocks, spacing=10).properties(title=title)
    chart: alt.VConcatChart = styled(whole.resolve_scale(color="independent"), said)
    return chart


def where_panels(frame: pd.DataFrame) -> list[Any]:
    """The same as charts that stand alone."""
    return _alone(*_where(frame))


def _where(frame: pd.DataFrame) -> tuple[list[Any], alt.TitleParams, str]:
    check(frame)
    labels, groups = labels_of(frame), list(dict.fromkeys(frame["group"]))
    blocks = [_stacked(frame[frame["group"] == group], labels, group, legend=group == groups[0]) for group in groups]
    said = f"Mean end-to-end latency split into queue, prefill, decode and preempted, for {', '.join(labels)}"
    return blocks, title_of("Where end-to-end latency went", frame), said


def _stacked(part: pd.DataFrame, labels: Sequence[str], group: str, *, legend: bool) -> Any:
    import altair as alt

    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("part:N", title="part"),
        alt.Tooltip("mean_ms:Q", title="mean (ms)", format=SHORT_NUMBER),
        alt.Tooltip("share:Q", title="share of E2EL", format=".1%"),
        alt.Tooltip("requests:Q", title="requests", format=","),
    ]
    x = alt.X("begin_ms:Q", axis=alt.Axis(title=f"Mean E2EL of {group} (ms)", format=NUMBER, tickCount=7))
    y = alt.Y("label:N", sort=list(labels), axis=alt.Axis(title=None, labelLimit=160))
    bars = alt.Chart(part).mark_bar(height={"band": 0.72})
    bars = bars.encode(x, y, part_colour("part", legend=legend), alt.X2("end_ms:Q"), tooltip=tips)
    wide = part[(part["end_ms"] - part["begin_ms"]) > 0.06 * part["end_ms"].max()]
    wide = wide.assign(middle_ms=(wide["begin_ms"] + wide["end_ms"]) / 2)
    # on the bars, whose colours do not depend on the page's: near-black on the light one, near-white on the others
    ink = alt.condition("datum.part == 'queue'", alt.value("#0f172a"), alt.value("#f8fafc"))
    text = alt.Chart(wide).mark_text(fontSize=11)
    text = text.encode(alt.X("middle_ms:Q"), y, text=alt.Text("share:Q", format=".0%"), color=ink)
    return alt.layer(bars, text).properties(width=WIDTH, height=32 * len(labels))
