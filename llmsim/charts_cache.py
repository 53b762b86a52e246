"""Charts of the KV cache: hit ratio against size, where prompts were found, what tiers moved; on light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from typing import TYPE_CHECKING

from llmsim.charts import COLOURS, SIDE_COLOURS
from llmsim.charts_policies import finished, log_ticks
from llmsim.charts_style import WIDTH, styled

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

GIB = 2**30
BAR = 26  # pixels of a side
PLACE_COLOURS = ("#12926b", "#0e93a8", "#3b82f6", "#a25ee8")  # fastest place first


def hit_ratio_chart(points: pd.DataFrame, unlimited: float) -> alt.LayerChart:
    """Share of prompt blocks found against the cache's size, a line a policy; dashed: with room for everything.

    `points`: of `llmsim.reuse.frame`; rows without a limit are left out. With cache_bytes the axis counts GiB.
    """
    import altair as alt
    import pandas as pd

    shown = points[[not isinf(blocks) for blocks in points["cache_blocks"]]]
    in_bytes = bool(len(shown)) and bool(shown["cache_bytes"].notna().all())
    shown = shown.assign(size=shown["cache_bytes"] / GIB if in_bytes else shown["cache_blocks"])
    low, high = (float(shown["size"].min()), float(shown["size"].max())) if len(shown) else (1.0, 10.0)
    high = max(high, low * 1.01)
    title = "cache size (GiB of KV)" if in_bytes else "cache size (blocks)"
    x = alt.X(
        "size:Q",
        scale=alt.Scale(type="log", domain=[low / 1.03, high * 1.03], nice=False),
        axis=alt.Axis(title=title, values=log_ticks(low, high), format=",~g"),
    )
    top = min(max([unlimited, *shown["hit_ratio"]]) * 1.08, 1.0)
    y = alt.Y(
        "hit_ratio:Q",
        scale=alt.Scale(domain=[0, top], nice=False),
        axis=alt.Axis(title="prompt blocks found", format="%"),
    )
    names = list(dict.fromkeys(shown["eviction"]))
    colours = [SIDE_COLOURS[at % len(SIDE_COLOURS)] for at in range(len(names))]
    legend = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1, columns=8)
    colour = alt.Color("eviction:N", scale=alt.Scale(domain=names, range=colours), legend=legend)
    tips = [
        alt.Tooltip("eviction:N"),
        alt.Tooltip("cache_blocks:Q", title="blocks", format=","),
        alt.Tooltip("cache_tokens:Q", title="tokens", format=",.0f"),
        alt.Tooltip("hit_ratio:Q", title="found", format=".2%"),
    ]
    roof = alt.Chart(pd.DataFrame({"hit_ratio": [unlimited]}))
    layers = [
        roof.mark_rule(color=COLOURS["text"], strokeDash=[5, 4], strokeWidth=1.5).encode(y),
        alt.Chart(shown).mark_line(strokeWidth=2.2).encode(x, y, colour),
        alt.Chart(shown).mark_point(filled=True, size=45, opacity=1).encode(x, y, colour, tooltip=tips),
    ]
    said = f"Prompt blocks found against the cache's size under {', '.join(names)}; dashed: all kept, {unlimited:.1%}"
    return finished(layers, "Hit ratio against cache size", 240, said + ".")


def found_chart(frame: pd.DataFrame, sides: Sequence[str]) -> alt.Chart:
    """Where prompt tokens came from, a bar a side. `frame`: of `llmsim.compare_cache.found_frame`."""
    import altair as alt

    places = list(dict.fromkeys(frame.sort_values("order", kind="stable")["place"]))
    places.sort(key=lambda place: place == "computed")  # last, whatever the other sides have
    rank = {place: at for at, place in enumerate(places)}
    colours = [
        COLOURS["prefill"] if place == "computed" else PLACE_COLOURS[at % len(PLACE_COLOURS)]
        for place, at in rank.items()
    ]
    shown = frame.assign(rank=[rank[place] for place in frame["place"]])
    legend = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1)
    tips = [
        alt.Tooltip("side:N"),
        alt.Tooltip("place:N"),
        alt.Tooltip("tokens:Q", title="prompt tokens", format=","),
        alt.Tooltip("share:Q", format=".1%"),
    ]
    rows = zip(frame["side"], frame["place"], frame["share"], strict=True)
    said = "; ".join(f"{side}: {place} {share:.0%}" for side, place, share in rows if share is not None)
    chart: alt.Chart = (
        alt.Chart(shown)
        .mark_bar(height={"band": 0.72})
        .encode(
            x=alt.X(
                "share:Q",
                stack="zero",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(title="share of prompt tokens", format="%"),
            ),
            y=alt.Y("side:N", sort=list(sides), axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=260)),
            color=alt.Color("place:N", scale=alt.Scale(domain=places, range=colours), legend=legend),
            order=alt.Order("rank:Q"),
            tooltip=tips,
        )
        .properties(width=WIDTH, height=BAR * len(sides), title="Where prompt tokens came from")
    )
    return _styled(chart, f"Where prompt tokens came from. {said}.")


def moved_chart(frame: pd.DataFrame) -> alt.Chart:
    """GiB loaded from each tier and written to it. `frame`: of `llmsim.compare_cache.moved_frame`."""
    import altair as alt

    shown = frame.assign(gib=frame["bytes"] / GIB, lane=frame["side"] + " · " + frame["tier"])
    lanes = list(dict.fromkeys(shown["lane"]))
    colours = alt.Scale(domain=["loaded", "written"], range=["#3b82f6", "#b7791f"])
    rows = zip(shown["lane"], shown["direction"], shown["gib"], strict=True)
    said = "; ".join(f"{lane}: {direction} {gib:,.1f} GiB" for lane, direction, gib in rows)
    chart: alt.Chart = (
        alt.Chart(shown)
        .mark_bar()
        .encode(
            x=alt.X("gib:Q", axis=alt.Axis(title="KV moved (GiB)", format=",~f")),
            y=alt.Y("lane:N", sort=lanes, axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=260)),
            yOffset=alt.YOffset("direction:N", sort=["loaded", "written"]),
            color=alt.Color("direction:N", scale=colours, legend=alt.Legend(title=None, orient="top", symbolSize=110)),
            tooltip=[
                "side:N",
                "tier:N",
                "direction:N",
                alt.Tooltip("tokens:Q", format=","),
                alt.Tooltip("gib:Q", title="GiB", format=",.2f"),
            ],
        )
        .properties(width=WIDTH, height=2 * BAR * len(lanes), title="Moved by tiers")
    )
    return _styled(chart, f"KV moved by tiers. {said}.")


def _styled(chart: alt.Chart, said: str) -> alt.Chart:
    made: alt.Chart = styled(chart, said)
    return made
