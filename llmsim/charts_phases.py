"""Charts of prefill and decode: frames of `llmsim.phases_curves` drawn.

Marks and greys are chosen to be read on a white and on a dark background; text takes the colour of where it is shown,
or a grey that both bear. Seconds of frames are drawn as milliseconds.
"""

from __future__ import annotations

from math import log10
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.charts import HEIGHT, PHASE_COLOURS, WIDTH, _labels, _log_x, _log_y

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

GREY = "#728197"  # of lines and words beside the data: contrast 4.0 on white, 4.5 on the dark theme
PARTS = {"prefill": ("#fb923c", "#c2410c"), "decode": ("#60a5fa", "#1d4ed8")}  # the rest, attention
FEW = 5  # points of a way that all get names
HEIGHT_SMALL = 240


def moves_chart(moves: pd.DataFrame) -> alt.LayerChart:
    """The roofline with both phases, and where they go: `moves` of `llmsim.phases_curves.moves`."""
    import altair as alt

    shown = moves.assign(
        intensity=moves["intensity_flops_per_byte"], tflops=moves["flops_per_s"] / 1e12, ms=1e3 * moves["gpu_s"]
    )
    roofs = shown[["peak_flops_per_s", "peak_bytes_per_s"]].drop_duplicates()
    ridges = roofs["peak_flops_per_s"] / roofs["peak_bytes_per_s"]
    left, right = min(shown["intensity"].min(), ridges.min()) / 1.6, max(shown["intensity"].max(), ridges.max()) * 8
    low = min(shown["tflops"].min(), left * roofs["peak_bytes_per_s"].min() / 1e12) / 1.6
    high = roofs["peak_flops_per_s"].max() / 1e12 * 2.2
    axes = _log_x("intensity", left, right, "Arithmetic intensity (FLOP/byte)"), _log_y("tflops", low, high)
    colour = _phase_colour()
    trail = alt.Chart(shown).mark_line(strokeWidth=2.2).encode(*axes, colour, order="order:Q")
    tips = ["phase", "value", tip("intensity", "FLOP/byte"), tip("tflops", "TFLOP/s"), tip("ms", "GPU time (ms)")]
    tips += [tip("mfu", "MFU", ".1%"), tip("mbu", "MBU", ".1%"), "binds", "paced_by"]
    dots = (
        alt.Chart(shown[~shown["here"]])
        .mark_circle(size=60, opacity=1, stroke="white", strokeWidth=0.8)
        .encode(*axes, colour, tooltip=tips)
    )
    here = (
        alt.Chart(shown[shown["here"]])
        .mark_circle(size=240, opacity=1, stroke="white", strokeWidth=2)
        .encode(*axes, colour, tooltip=tips)
    )
    words = _labels(_named(shown), WIDTH / log10(right / left), HEIGHT / log10(high / low))
    names = alt.Chart(words).mark_text(align="left", baseline="top", dx=10, dy=6, fontSize=12, color=GREY)
    layers = [*_roofs(shown, axes, left, right, low), trail, dots, here, names.encode(*axes, text="text:N")]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=400)


def _roofs(shown: pd.DataFrame, axes: tuple[Any, Any], left: float, right: float, low: float) -> list[alt.Chart]:
    """One roof a precision: that of the setting drawn through, the others dashed."""
    import altair as alt
    import pandas as pd

    layers = []
    for roof, own in shown.groupby(["peak_flops_per_s", "peak_bytes_per_s"]):
        peak, bandwidth = np.array(roof, float) / 1e12
        here = bool(own["here"].any())
        ridge = peak / bandwidth
        corners = pd.DataFrame({"intensity": [left, ridge, right], "tflops": [left * bandwidth, peak, peak]})
        dash = [1, 0] if here else [5, 4]
        layers.append(
            alt.Chart(corners).mark_line(color=GREY, strokeWidth=2.2 if here else 1.3, strokeDash=dash).encode(*axes)
        )
        at = pd.DataFrame({"intensity": [right], "tflops": [peak], "text": [f"compute {peak:,.4g} TFLOP/s"]})
        layers.append(_words(at, axes, align="right", dx=-6, dy=-9))
        if here:
            foot = pd.DataFrame({"intensity": [ridge, ridge], "tflops": [low, peak]})
            layers.append(alt.Chart(foot).mark_line(color=GREY, strokeWidth=1.2, strokeDash=[2, 4]).encode(*axes))
            at = pd.DataFrame({"intensity": [ridge], "tflops": [low], "text": [f"ridge {ridge:,.3g} FLOP/byte"]})
            layers.append(_words(at, axes, align="left", dx=6, dy=-9))
            middle = (left * ridge) ** 0.5
            at = pd.DataFrame(
                {"intensity": [middle], "tflops": [middle * bandwidth], "text": [f"memory {bandwidth:.3g} TB/s"]}
            )
            layers.append(_words(at, axes, align="right", dx=-10, dy=-8))
    return layers


def _words(frame: pd.DataFrame, axes: tuple[Any, Any], **style: Any) -> alt.Chart:
    import altair as alt

    chart: alt.Chart = alt.Chart(frame).mark_text(fontSize=12, color=GREY, **style).encode(*axes, text="text:N")
    return chart


def _named(shown: pd.DataFrame) -> pd.DataFrame:
    """The points that get their names written: the setting itself, the ends of each way, and all of a short one."""
    first, last = (shown.groupby("phase")["order"].transform(end) for end in ("min", "max"))
    short = shown.groupby("phase")["order"].transform("size") <= FEW
    chosen = shown[shown["here"] | (shown["order"] == first) | (shown["order"] == last) | short]
    text = [
        f"{phase}, {value}" if here else value
        for phase, value, here in zip(chosen["phase"], chosen["value"], chosen["here"], strict=True)
    ]
    return chosen.assign(text=text).sort_values("here", ascending=False).reset_index(drop=True)


def growth_chart(
    growth: pd.DataFrame, across: str, phase: str, *, here: float | None = None, title: str = ""
) -> alt.LayerChart:
    """GPU time in parts over `across`, a column of the frame; the dashed line is time on both clocks, where the host is
    slower than the GPU. Shaded: outside the measured range. `here`: the setting itself."""
    import altair as alt
    import pandas as pd

    names = {"rest_s": "linear layers and between them", "attention_s": "attention"}
    parts = growth.melt([across], list(names), "part", "seconds")
    parts = parts.assign(
        part=parts["part"].map(names), ms=1e3 * parts["seconds"], order=parts["part"].eq("attention_s")
    )
    x = alt.X(f"{across}:Q", axis=alt.Axis(title=title or across, format=",d"), scale=alt.Scale(nice=False, zero=True))
    y = alt.Y("ms:Q", title="GPU time (ms)", stack="zero")
    scale = alt.Scale(domain=list(names.values()), range=list(PARTS[phase]))
    colour = alt.Color(
        "part:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolOpacity=1, labelLimit=320)
    )
    area = (
        alt.Chart(parts)
        .mark_area(opacity=0.9)
        .encode(
            x,
            y,
            colour,
            order="order:O",
            tooltip=[tip(across, title or across, ",d"), "part", tip("ms", "ms", ".2f")],
        )
    )
    wall = growth.assign(wall_ms=1e3 * growth["wall_s"])
    pace = (
        alt.Chart(wall)
        .mark_line(color=GREY, strokeWidth=1.6, strokeDash=[6, 3])
        .encode(
            x,
            alt.Y("wall_ms:Q"),
            tooltip=[tip(across, title or across, ",d"), tip("wall_ms", "wall time (ms)", ".2f")],
        )
    )
    layers: list[alt.Chart] = [area, pace, *_outside(growth, across, x)]
    if here is not None:
        layers.append(
            alt.Chart(pd.DataFrame({across: [here]})).mark_rule(color=PHASE_COLOURS[phase], strokeWidth=2).encode(x)
        )
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=HEIGHT_SMALL)


def _outside(growth: pd.DataFrame, across: str, x: alt.X) -> list[alt.Chart]:
    """A veil over what lies outside the measured range."""
    import altair as alt
    import pandas as pd

    outside = growth.loc[growth["outside_measured"], across]
    if outside.empty:
        return []
    low, high = float(outside.min()), float(growth[across].max())
    span = alt.Chart(pd.DataFrame({across: [low], "to": [high], "text": ["outside the measured range"]}))
    words = span.mark_text(align="left", baseline="top", dx=5, dy=5, fontSize=11, color=GREY)
    return [
        span.mark_rect(color=GREY, opacity=0.22).encode(x, alt.X2("to:Q")),
        words.encode(x, y=alt.value(0), text="text:N"),
    ]


def _phase_colour() -> alt.Color:
    import altair as alt

    scale = alt.Scale(domain=list(PHASE_COLOURS), range=list(PHASE_COLOURS.values()))
    return alt.Color(
        "phase:N", scale=scale, legend=alt.Legend(title=None, orient="top-left", symbolOpacity=1, symbolSize=120)
    )


def tip(field: str, title: str, form: str = ",.3~g") -> alt.Tooltip:
    import altair as alt

    return alt.Tooltip(f"{field}:Q", title=title, format=form)
