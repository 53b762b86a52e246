"""How charts of runs look: no background and no black, so that they are read on light and dark pages; a title that
names what is drawn, under it the notes of the frame (what was left out); a description for screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsim.charts import COLOURS, _ticks, run_colours

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

POINTS = 20_000  # of any chart
WIDTH, HEIGHT = 560, 240
PARTS = ("queue", "prefill", "decode", "preempted")
NUMBER, SHORT_NUMBER, EXACT = ",~r", ",.4~r", ",.6~r"  # 12,000; 12,340; 12,345.6: never 1.2e+4


def styled(chart: Any, description: str) -> Any:
    """The common look; once, on the outermost chart."""
    text, grid = COLOURS["text"], COLOURS["grid"]
    return (
        chart.properties(background="transparent", description=description)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=text,
            titleColor=text,
            gridColor=grid,
            gridOpacity=0.25,
            domainColor=grid,
            tickColor=grid,
            labelFontSize=11,
            titleFontSize=12,
            titleFontWeight="normal",
        )
        .configure_legend(labelColor=text, titleColor=text, labelFontSize=12, labelLimit=360, symbolOpacity=1)
        .configure_title(
            color=text, subtitleColor=text, anchor="start", fontSize=14, subtitleFontSize=11, offset=8, frame="group"
        )
    )


def check(frame: pd.DataFrame) -> None:
    """Raises ValueError for a frame that a browser would choke on."""
    if len(frame) > POINTS:
        raise ValueError(f"{len(frame)} points: a chart takes at most {POINTS}; make the frame with llmsim.views")


def labels_of(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame["label"]))


def title_of(text: str, frame: pd.DataFrame, *more: str) -> alt.TitleParams:
    """The notes of the frame below the title."""
    import altair as alt

    lines = [*more, *frame.attrs.get("notes", ())]
    return alt.TitleParams(text, subtitle=lines) if lines else alt.TitleParams(text)


def run_colour(labels: Sequence[str], *, legend: bool = True, symbol: str = "stroke", above: int = 8) -> alt.Color:
    """A colour for each run; no legend where there is one run only. `above`: pixels between it and the plot."""
    import altair as alt

    shown = alt.Legend(title=None, orient="top", symbolType=symbol, symbolStrokeWidth=3, offset=above)
    scale = alt.Scale(domain=list(labels), range=run_colours(labels))
    return alt.Color("label:N", scale=scale, legend=shown if legend and len(labels) > 1 else None)


def part_colour(field: str, parts: Sequence[str] = PARTS, *, legend: bool = True) -> alt.Color:
    """Queue, prefill, decode, preempted."""
    import altair as alt

    scale = alt.Scale(domain=list(parts), range=[COLOURS[name] for name in parts])
    shown = alt.Legend(title=None, orient="top", symbolType="square") if legend else None
    return alt.Color(f"{field}:N", scale=scale, legend=shown)


def log_y(values: pd.Series[float], name: str, title: str, **style: Any) -> alt.Y:
    """A logarithmic axis with few lines; linear if a value is 0."""
    import altair as alt

    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 10.0)
    if low <= 0.0:
        return alt.Y(f"{name}:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=title, format=NUMBER, **style))
    low, high = low / 1.15, high * 1.15
    axis = alt.Axis(title=title, format=NUMBER, values=_ticks(low, high), **style)
    return alt.Y(f"{name}:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


def log_x(values: pd.Series[float], name: str, title: str, also: float | None = None) -> alt.X:
    """A logarithmic axis that reaches `also`; where a value is 0, logarithmic from the smallest positive one on."""
    import altair as alt

    positive = values[values > 0]
    shown = [float(positive.min()), float(positive.max())] if len(positive) else [1.0, 10.0]
    shown += [also] if also else []
    low, high = min(shown) / 1.1, max(shown) * 1.1
    if len(positive) < len(values):
        scale = alt.Scale(type="symlog", constant=min(shown), domain=[0.0, high], nice=False)
        return alt.X(f"{name}:Q", scale=scale, axis=alt.Axis(title=title, format=NUMBER, tickCount=6))
    axis = alt.Axis(title=title, format=NUMBER, values=_ticks(low, high), labelOverlap=True)
    return alt.X(f"{name}:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)


def sized(chart: Any, width: int, height: int | None = None) -> dict[str, Any]:
    """The chart's Vega-Lite document with its panels this many pixels wide (`height`: of a chart of one panel)."""
    import altair as alt

    with alt.data_transformers.enable("default", max_rows=None):
        document: dict[str, Any] = chart.to_dict()
    for panel in document.get("vconcat", [document]):
        panel["width"] = width
    if height is not None and "vconcat" not in document:
        document["height"] = height
    document["datasets"] = {name: [_brief(row) for row in rows] for name, rows in document["datasets"].items()}
    return document


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """Nine digits of a number are more than a chart shows, and half of the bytes."""
    return {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in row.items()}


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`: what draws charts without a network."""
    import altair as alt
    import vl_convert

    version = alt.SCHEMA_VERSION.removeprefix("v").rsplit(".", 1)[0]
    bundle: Any = vl_convert.javascript_bundle  # its annotations ask for a snippet that it does not need
    script: str = bundle(vl_version=version)
    return script.replace("</script", "<\\/script")
