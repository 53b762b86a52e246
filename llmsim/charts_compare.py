"""The chart of a comparison: how latencies are distributed under each side, and how their statistics differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import TYPE_CHECKING, Any

from llmsim.charts import PALETTE, ROOF, _ticks

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

COLOURS = (*PALETTE, "#0891b2", "#65a30d", "#475569", "#9f1239", "#1e1b4b", "#b45309")
PANEL, LOW = 300, 200  # pixels of a panel's width and of the upper row's height
ROW = 12  # pixels of a side in a statistic of the lower row


def comparison(
    curves: pd.DataFrame,
    changes: pd.DataFrame,
    *,
    sides: Sequence[str],
    latencies: Mapping[str, str],
    targets: Mapping[str, float],
    title: str,
    subtitle: Sequence[str],
) -> alt.VConcatChart:
    """Above, the share of requests with at most a latency (logarithmic); below, differences to the first side.

    `curves`: side, latency, value_ms, share. `changes`: side, latency, statistic, change, low, high (fractions of the
    first side's number, with their 95 % interval). `latencies`: key -> heading; `targets`: key -> goodput target in ms.
    """
    import altair as alt

    colours = [COLOURS[at % len(COLOURS)] for at in range(len(sides))]
    legend = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1, labelFontSize=12, labelLimit=400)
    scale = alt.Scale(domain=list(sides), range=colours)
    colour = alt.Color("side:N", scale=scale, legend=legend)
    upper = [_curves(curves[curves["latency"] == key], latencies[key], targets.get(key), colour) for key in latencies]
    rows: list[Any] = [alt.hconcat(*upper, spacing=26)]
    if len(changes):
        lower = [_changes(changes[changes["latency"] == key], sides, latencies[key], colour) for key in latencies]
        rows.append(alt.hconcat(*lower, spacing=26))
    chart: alt.VConcatChart = (
        alt.vconcat(*rows, spacing=24)
        .properties(
            title=alt.TitleParams(
                title, subtitle=list(subtitle), anchor="start", fontSize=16, subtitleFontSize=12, offset=14
            )
        )
        .configure_title(subtitleColor=ROOF)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal", gridColor="#e2e8f0")
        .configure_view(stroke="#cbd5e1")
    )
    return chart


def _curves(frame: pd.DataFrame, heading: str, target_ms: float | None, colour: alt.Color) -> alt.LayerChart:
    import altair as alt
    import pandas as pd

    low, high = float(frame["value_ms"].min()), float(frame["value_ms"].max())
    low, high = low / 1.1, max(high, target_ms or 0.0) * 1.1
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    ticks = alt.Axis(title=f"{heading} (ms)", values=_ticks(low, high) if log10(high / low) > 0.2 else [], format=",~g")
    x = alt.X("value_ms:Q", scale=scale, axis=ticks)
    y = alt.Y(
        "share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share of requests", format="%", minExtent=40)
    )
    line = (
        alt.Chart(frame).mark_line(strokeWidth=2, clip=True).encode(x, y, colour, tooltip=["side", "value_ms", "share"])
    )
    layers: list[Any] = [line]
    if target_ms is not None:
        mark = alt.Chart(pd.DataFrame({"value_ms": [target_ms]}))
        layers.append(mark.mark_rule(color=ROOF, strokeDash=[4, 3]).encode(x))
    return alt.LayerChart(layer=layers, width=PANEL, height=LOW)


def _changes(frame: pd.DataFrame, sides: Sequence[str], heading: str, colour: alt.Color) -> alt.LayerChart:
    import altair as alt
    import pandas as pd

    others = list(sides[1:])
    y = alt.Y("statistic:N", sort=list(dict.fromkeys(frame["statistic"])), axis=alt.Axis(title=None, minExtent=58))
    offset = alt.YOffset("side:N", sort=others, scale=alt.Scale(domain=others, paddingInner=0.3, paddingOuter=0.5))
    label = "datum.value == 0 ? '0' : format(datum.value, '+.0%')"
    axis = alt.Axis(title=f"{heading}: difference to {sides[0]}", labelExpr=label, tickCount=5)
    x = alt.X("low:Q", axis=axis)
    tips = [alt.Tooltip("side:N"), alt.Tooltip("statistic:N")]
    tips += [alt.Tooltip(f"{name}:Q", format="+.1%") for name in ("change", "low", "high")]
    base = alt.Chart(frame)
    layers = [
        alt.Chart(pd.DataFrame({"low": [0.0]})).mark_rule(color=ROOF).encode(x),
        base.mark_rule(strokeWidth=2).encode(x, y, colour, offset, x2="high:Q", tooltip=tips),
        base.mark_circle(size=50, opacity=1).encode(alt.X("change:Q", axis=axis), y, colour, offset, tooltip=tips),
    ]
    height = len(set(frame["statistic"])) * (ROW * len(others) + 12)
    return alt.LayerChart(layer=layers, width=PANEL, height=height)
