"""Hit ratio against cache size, a line for every eviction policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.charts import PALETTE, ROOF, _decades, framed

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

MORE_COLOURS = ("#0e7490", "#4d7c0f", "#9f1239", "#475569")


def reuse_curves(points: pd.DataFrame, *, unlimited: float, title: str, subtitle: str) -> alt.LayerChart:
    """`points`: eviction, cache_blocks, hit_ratio. `unlimited`: hit ratio with room for everything, a dashed line."""
    import altair as alt
    import pandas as pd

    names = list(dict.fromkeys(points["eviction"]))
    colours = (*PALETTE, *MORE_COLOURS)
    low, high = float(points["cache_blocks"].min()), float(points["cache_blocks"].max())
    high = max(high, low * 1.01)
    x = alt.X(
        "cache_blocks:Q",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(title="Cache size (blocks)", values=sorted({low, *_decades(low, high), high}), format=",~g"),
    )
    y = alt.Y("hit_ratio:Q", axis=alt.Axis(title="Prompt blocks found", format="%"), scale=alt.Scale(zero=True))
    colour = alt.Color(
        "eviction:N",
        scale=alt.Scale(domain=names, range=[colours[i % len(colours)] for i in range(len(names))]),
        legend=alt.Legend(title=None, symbolSize=110, symbolOpacity=1, labelFontSize=13),
    )
    roof = pd.DataFrame({"cache_blocks": [low, high], "hit_ratio": [unlimited, unlimited]})
    tips = ["eviction:N", alt.Tooltip("cache_blocks:Q", format=","), alt.Tooltip("hit_ratio:Q", format=".2%")]
    layers = [
        alt.Chart(roof).mark_line(color=ROOF, strokeDash=[5, 4], strokeWidth=1.5).encode(x, y),
        alt.Chart(points)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45))
        .encode(x, y, colour, tooltip=tips),
    ]
    return framed(layers, title, subtitle)
