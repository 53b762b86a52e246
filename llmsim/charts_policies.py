"""Charts of policies side by side: differences with intervals, goodput against rate.

Functions of a frame (`llmsim.compare_frames`, `compare_rates`) to a chart that is read on light and on dark. Sides have
the same colour in all of them, by their order. Each chart's `description` says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from llmsim.charts import COLOURS, SIDE_COLOURS, _decades, _ticks
from llmsim.charts_style import WIDTH, styled

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
WORDS = {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99"}
ROW = 15  # pixels of a side in a row of intervals
WIDE = 1.5  # differences beyond this fraction get a scale that is linear only near zero
NEAR = 0.1  # up to here
STEPS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
VERDICTS = {"better": "better, surely", "worse": "worse, surely", "unclear": "not told apart"}


def finished(layers: Sequence[Any], title: str, height: float, said: str) -> alt.LayerChart:
    """Layers as one chart in the common look, its plot `height` pixels high; `said` describes it in words."""
    import altair as alt

    chart: alt.LayerChart = styled(alt.LayerChart(layer=list(layers), width=WIDTH, height=height, title=title), said)
    return chart


def colours_of(sides: Sequence[str]) -> dict[str, str]:
    """The colour of each side, the same in every chart that is given the same sides."""
    return {side: SIDE_COLOURS[at % len(SIDE_COLOURS)] for at, side in enumerate(sides)}


def log_ticks(low: float, high: float) -> list[float]:
    """Decades on a long axis, 1-2-5 on a short one."""
    decades = _decades(low, high)
    if len(decades) > 3:
        return _ticks(low, high)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    fine = [times * 10.0**power for power in powers for times in (1, 2, 5)]
    inside = [tick for tick in fine if low <= tick <= high]
    return inside if len(inside) >= 2 else _ticks(low, high)


def side_colour(sides: Sequence[str], *, legend: bool = True) -> alt.Color:
    import altair as alt

    colours = list(colours_of(sides).values())
    box = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1, labelLimit=320, columns=4)
    return alt.Color("side:N", scale=alt.Scale(domain=list(sides), range=colours), legend=box if legend else None)


# ---- paired differences ---------------------------------------------------------------------------------------------


def differences_chart(frame: pd.DataFrame, latency: str, sides: Sequence[str]) -> alt.LayerChart:
    """Intervals of one latency's statistics, as fractions of the first side's.

    `frame`: of `compare_frames.intervals_frame`. A full dot: the interval leaves out 0; a hollow one: it does not.
    """
    import altair as alt
    import pandas as pd

    rows = frame[(frame["latency"] == latency) & frame["change_share"].notna()]
    others = list(sides[1:])
    words = [WORDS[name] for name in dict.fromkeys(rows["statistic"])]
    shown = rows.assign(statistic_name=[WORDS[name] for name in rows["statistic"]])
    shown["said"] = [VERDICTS.get(name, name) for name in shown["verdict"]]
    x = _difference_axis(shown, f"{NAMES[latency]}: difference to {sides[0]}")
    y = alt.Y("statistic_name:N", sort=words, axis=alt.Axis(title=None, ticks=False, domain=False))
    offset = alt.YOffset("side:N", sort=others, scale=alt.Scale(domain=others, paddingInner=0.3, paddingOuter=0.6))
    colour = side_colour(sides, legend=False)
    fill = alt.condition(alt.datum.verdict == "unclear", alt.value("transparent"), colour)
    tips = [
        alt.Tooltip("side:N"),
        alt.Tooltip("statistic_name:N", title="statistic"),
        alt.Tooltip("value:Q", title="value (ms)", format=",.2f"),
        alt.Tooltip("change:Q", title="change (ms)", format="+,.2f"),
        *(alt.Tooltip(f"{name}_share:Q", title=name, format="+.1%") for name in ("change", "low", "high")),
        alt.Tooltip("said:N", title="verdict"),
    ]
    base = alt.Chart(shown)
    zero = (
        alt.Chart(pd.DataFrame({"at": [0.0]}))
        .mark_rule(color=COLOURS["text"], strokeWidth=1.5)
        .encode(x=x.copy_at("at"))
    )
    bars = base.mark_rule(strokeWidth=2.5).encode(
        x=x.copy_at("low_share"), x2="high_share:Q", y=y, yOffset=offset, color=colour, tooltip=tips
    )
    dots = base.mark_point(size=55, strokeWidth=2, opacity=1).encode(
        x=x.copy_at("change_share"), y=y, yOffset=offset, color=colour, fill=fill, tooltip=tips
    )
    height = len(words) * (ROW * max(len(others), 1) + 14)
    said = _differences_said(shown, latency, sides[0])
    return finished([zero, bars, dots], f"{NAMES[latency]}, 95 % intervals", height, said)


class _Axis:
    """One scale for several fields."""

    def __init__(self, scale: alt.Scale, axis: alt.Axis) -> None:
        self.scale, self.axis = scale, axis

    def copy_at(self, field: str) -> alt.X:
        import altair as alt

        return alt.X(f"{field}:Q", scale=self.scale, axis=self.axis)


def _difference_axis(shown: pd.DataFrame, title: str) -> _Axis:
    import altair as alt

    low = min(float(shown["low_share"].min()), 0.0) if len(shown) else 0.0
    high = max(float(shown["high_share"].max()), 0.0) if len(shown) else 0.0
    widest = max(-low, high, 0.02)
    label = "datum.value == 0 ? '0' : format(datum.value, '+,~%')"
    if widest <= WIDE:
        room = 0.06 * max(high - low, widest)
        scale = alt.Scale(domain=[low - room, high + room], nice=False)
        return _Axis(scale, alt.Axis(title=title, labelExpr=label, tickCount=5))
    values = [-step for step in STEPS if -step >= 1.3 * low] + [0.0] + [step for step in STEPS if step <= 1.3 * high]
    scale = alt.Scale(type="symlog", constant=NEAR, domain=[1.15 * low, 1.15 * high], nice=False)
    return _Axis(scale, alt.Axis(title=title, labelExpr=label, values=sorted(values), labelOverlap=True))


def _differences_said(shown: pd.DataFrame, latency: str, first: str) -> str:
    said = [
        f"{row.side} {row.statistic_name} {row.change_share:+.0%} ({row.said})"
        for row in shown.itertuples()
        if row.statistic in ("mean", "p99")
    ]
    return f"Differences of {NAMES[latency]} to {first} with 95 % intervals: {'; '.join(said) or 'none'}."


def latency_chart(
    frame: pd.DataFrame, latency: str, sides: Sequence[str], target_ms: float | None = None
) -> alt.LayerChart:
    """Share of requests with at most a latency, a line a side. `frame`: side, latency, value_ms, share."""
    import altair as alt
    import pandas as pd

    shown = frame[frame["latency"] == latency]
    low, high = (float(shown["value_ms"].min()), float(shown["value_ms"].max())) if len(shown) else (1.0, 10.0)
    low, high = max(low, 1e-3) / 1.1, max(high, target_ms or 0.0, 1e-3) * 1.1
    ticks = log_ticks(low, high) if log10(high / low) > 0.2 else []
    scale = alt.Scale(type="log", domain=[low, high], nice=False, clamp=True)
    x = alt.X("value_ms:Q", scale=scale, axis=alt.Axis(title=f"{NAMES[latency]} (ms)", values=ticks, format=",~g"))
    y = alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share of requests", format="%"))
    tips = ["side:N", alt.Tooltip("value_ms:Q", title="ms", format=",.1f"), alt.Tooltip("share:Q", format=".1%")]
    line = alt.Chart(shown).mark_line(strokeWidth=2, clip=True)
    layers: list[Any] = [line.encode(x, y, side_colour(sides, legend=False), tooltip=tips)]
    said = f"Distribution of {NAMES[latency]} by side: share of requests with at most each latency"
    if target_ms is not None:
        mark = alt.Chart(pd.DataFrame({"value_ms": [target_ms]}))
        layers.append(mark.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(x))
        said += f"; dashed: the SLO of {target_ms:g} ms"
    return finished(layers, f"{NAMES[latency]} of requests", 140, said + ".")


# ---- goodput against rate -------------------------------------------------------------------------------------------


def attainment_chart(
    frame: pd.DataFrame, sides: Sequence[str], attainment: float, unit: str = "requests/s"
) -> alt.LayerChart:
    """SLO attainment against the rate offered, a line a side; the dashed line is the share asked for.

    `frame`: of `compare_rates.frame`. A hollow point: the queue grew all along, so the number depends on the trace's
    length.
    """
    import altair as alt
    import pandas as pd

    shown = _with_stability(frame[frame["slo_attainment"].notna()])
    lowest = min([attainment, *shown["slo_attainment"]])
    bottom = max(floor((lowest - 0.02) * 10) / 10, 0.0)
    y = alt.Y(
        "slo_attainment:Q",
        scale=alt.Scale(domain=[bottom, 1.0 + 0.02 * (1.0 - bottom)], nice=False),
        axis=alt.Axis(title="requests within the SLO", format="%", tickCount=6),
    )
    rule = alt.Chart(pd.DataFrame({"slo_attainment": [attainment]}))
    layers = [
        rule.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(y),
        *_lines(shown, y, sides, unit),
    ]
    said = (
        f"SLO attainment against the rate of requests, a line for each of {', '.join(sides)}; dashed: {attainment:.4g}"
    )
    return finished(layers, "Within the SLO", 220, said + ".")


def goodput_chart(frame: pd.DataFrame, sides: Sequence[str], unit: str = "requests/s") -> alt.LayerChart:
    """Requests per second within the SLO against the rate offered; on the dashed diagonal all of them are (there is
    none where sessions are counted: how many requests each has is not said here)."""
    import altair as alt
    import pandas as pd

    shown = _with_stability(frame[frame["request_goodput"].notna()])
    high = float(shown["rate"].max()) if len(shown) else 1.0
    y = alt.Y("request_goodput:Q", axis=alt.Axis(title="goodput (requests/s)"), scale=alt.Scale(domainMin=0))
    layers = _lines(shown, y, sides, unit)
    said = f"Goodput against the rate of {unit}, a line for each of {', '.join(sides)}"
    if unit == "requests/s":
        diagonal = alt.Chart(pd.DataFrame({"rate": [0.0, high], "request_goodput": [0.0, high]}))
        dashed = diagonal.mark_line(color=COLOURS["text"], strokeDash=[5, 4], strokeWidth=1.5, clip=True)
        layers.insert(0, dashed.encode(_rate_axis(shown, unit), y))
        said += "; dashed: all within the SLO"
    return finished(layers, "Goodput", 220, said + ".")


def _with_stability(frame: pd.DataFrame) -> pd.DataFrame:
    said = {True: "stable", False: "unstable: the queue grew all along"}
    return frame.assign(queue=[said.get(value, "cannot be told") for value in frame["stable"]])


def _rate_axis(shown: pd.DataFrame, unit: str) -> alt.X:
    import altair as alt

    high = float(shown["rate"].max()) if len(shown) else 1.0
    low = float(shown["rate"].min()) if len(shown) else 0.0
    room = 0.03 * (high - low or high)
    scale = alt.Scale(domain=[max(low - room, 0.0), high + room], nice=False)
    return alt.X("rate:Q", scale=scale, axis=alt.Axis(title=f"{unit} offered"))


def _lines(shown: pd.DataFrame, y: alt.Y, sides: Sequence[str], unit: str) -> list[alt.Chart]:
    import altair as alt

    x, colour = _rate_axis(shown, unit), side_colour(sides)
    hollow = alt.condition("datum.stable === false", alt.value("transparent"), side_colour(sides, legend=False))
    tips = [
        alt.Tooltip("side:N"),
        alt.Tooltip("rate:Q", title=f"{unit} offered", format=",.3~g"),
        alt.Tooltip("slo_attainment:Q", title="within the SLO", format=".1%"),
        alt.Tooltip("request_goodput:Q", title="goodput (requests/s)", format=",.2f"),
        alt.Tooltip("p99_ttft_ms:Q", title="P99 TTFT (ms)", format=",.0f"),
        alt.Tooltip("p99_tpot_ms:Q", title="P99 TPOT (ms)", format=",.1f"),
        alt.Tooltip("queue:N"),
    ]
    base = alt.Chart(shown)
    return [
        base.mark_line(strokeWidth=2.2, clip=True).encode(x, y, colour),
        base.mark_point(size=45, strokeWidth=2, opacity=1).encode(x, y, colour, fill=hollow, tooltip=tips),
    ]
