"""Charts of tenants and classes under policies side by side: service over time, latency by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsim.charts import SIDE_COLOURS
from llmsim.charts_policies import NAMES, ROW, WORDS, finished, log_ticks, side_colour

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

TENANT_COLOURS = (*SIDE_COLOURS[4:], *SIDE_COLOURS[1:4])  # those that sides have last, first


def service_chart(frame: pd.DataFrame, side: str, tenants: Sequence[str], *, legend: bool = True) -> alt.LayerChart:
    """Service received by each tenant over time under one side; dashed: what it had asked for by then.

    `frame`: of `compare_groups.service_frame`, of all sides, so that their axes agree.
    """
    import altair as alt

    colours = [TENANT_COLOURS[at % len(TENANT_COLOURS)] for at in range(len(tenants))]
    box = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1) if legend else None
    colour = alt.Color("tenant:N", scale=alt.Scale(domain=list(tenants), range=colours), legend=box)
    top, last_s = float(frame["asked_tokens"].max()), float(frame["time_s"].max())
    shown = frame[frame["side"] == side]
    x = alt.X("time_s:Q", scale=alt.Scale(domain=[0, last_s], nice=False), axis=alt.Axis(title="simulated time (s)"))
    axis = alt.Axis(title="service (prompt + 2 × output tokens)", format="~s", tickCount=5)
    scale = alt.Scale(domain=[0, top * 1.03], nice=False)
    tips = [
        alt.Tooltip("tenant:N"),
        alt.Tooltip("time_s:Q", title="time (s)", format=",.1f"),
        alt.Tooltip("service_tokens:Q", title="received", format=",.0f"),
        alt.Tooltip("asked_tokens:Q", title="asked for", format=",.0f"),
    ]
    base = alt.Chart(shown)
    layers = [
        base.mark_line(strokeDash=[4, 3], strokeWidth=1.4, opacity=0.75).encode(
            x, alt.Y("asked_tokens:Q", scale=scale, axis=axis), colour
        ),
        base.mark_line(strokeWidth=2.4).encode(
            x, alt.Y("service_tokens:Q", scale=scale, axis=axis), colour, tooltip=tips
        ),
    ]
    said = f"Service received over time under {side} by tenant {', '.join(tenants)}; dashed: what each had asked for."
    return finished(layers, side, 150, said)


def groups_chart(frame: pd.DataFrame, latency: str, sides: Sequence[str], what: str) -> alt.LayerChart:
    """P50 to P99 of one latency, a row a group and in it a bar a side. `frame`: of `compare_groups.latency_frame`."""
    import altair as alt

    shown = frame[(frame["latency"] == latency) & frame["p50_ms"].notna()]
    groups = list(dict.fromkeys(shown["group"]))
    low, high = (float(shown["p50_ms"].min()), float(shown["p99_ms"].max())) if len(shown) else (1.0, 10.0)
    low, high = max(low, 1e-3) / 1.25, max(high, 1e-3) * 1.25
    axis = alt.Axis(title=f"{NAMES[latency]}, P50 to P99 (ms)", values=log_ticks(low, high), format=",~g")
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y = alt.Y("group:N", sort=groups, axis=alt.Axis(title=what, ticks=False, domain=False))
    offset = alt.YOffset(
        "side:N", sort=list(sides), scale=alt.Scale(domain=list(sides), paddingInner=0.3, paddingOuter=0.5)
    )
    colour = side_colour(sides)
    tips = [
        alt.Tooltip("side:N"),
        alt.Tooltip("group:N", title=what),
        alt.Tooltip("samples:Q", title="requests", format=","),
        *(alt.Tooltip(f"{word}_ms:Q", title=f"{WORDS[word]} (ms)", format=",.1f") for word in ("mean", "p50", "p99")),
    ]
    base = alt.Chart(shown)
    layers = [
        base.mark_rule(strokeWidth=3).encode(
            alt.X("p50_ms:Q", scale=scale, axis=axis), y, colour, offset, x2="p99_ms:Q", tooltip=tips
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(
            alt.X("p50_ms:Q", scale=scale, axis=axis), y, colour, offset, tooltip=tips
        ),
        base.mark_tick(thickness=3, size=11, opacity=1).encode(
            alt.X("p99_ms:Q", scale=scale, axis=axis), y, colour, offset, tooltip=tips
        ),
    ]
    said = f"{NAMES[latency]} by {what}: from P50 (dot) to P99 (tick) under each of {', '.join(sides)}."
    height = len(groups) * (ROW * len(sides) + 12)
    return finished(layers, f"{NAMES[latency]} by {what}", height, said)
