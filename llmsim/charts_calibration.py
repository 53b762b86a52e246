"""Charts of what results rest on: frames of `llmsim.evidence` drawn, to be read on white and on a dark background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmsim.charts import PALETTE, PHASE_COLOURS, WITHIN, _ticks

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

GREY = "#728197"
HELD_OUT, FITTED = "#c026d3", "#94a3b8"
KIND_COLOURS = {"decodes only": PHASE_COLOURS["decode"], "with prompts": PHASE_COLOURS["prefill"]}
DTYPE_COLOURS = dict(
    zip(("bfloat16", "fp8", "float16", "float32", "int8", "int4"), ("#0891b2", *PALETTE[2:]), strict=False)
)
COLOURS = KIND_COLOURS | DTYPE_COLOURS | {"held out": HELD_OUT, "fitted to": FITTED}
FEW = 60  # points that can be larger
ROW = 19  # pixels
SIDE = 400
PLACED: dict[str, Any] = {"labelBound": False, "labelFlush": False}


def errors_chart(errors: pd.DataFrame) -> alt.LayerChart:
    """A line for each operator or load, from the median of its errors to their 90th percentile."""
    import altair as alt

    shown = errors.assign(
        median_percent=100 * errors["median"], p90_percent=100 * errors["p90"], worst_percent=100 * errors["worst"],
        rests=errors["fitted"].map({True: "fitted to", False: "held out"}),
    )  # fmt: skip
    order = shown.groupby("label")["median"].max().sort_values().index.tolist()
    kinds = [kind for kind in COLOURS if (shown["kind"] == kind).any()]
    y = alt.Y("label:N", sort=order, axis=alt.Axis(title=None, labelLimit=240, ticks=False, domain=False, **PLACED))
    several = len(shown) > len(order)  # kinds in one row
    beside = (alt.YOffset("kind:N", sort=kinds),) if several else ()
    title = "Size of the error (%): median, line to the 90th percentile"
    x = alt.X("median_percent:Q", title=title, scale=alt.Scale(zero=True))
    colour = _colour("kind", {kind: COLOURS[kind] for kind in kinds})
    tips = ["label", "kind", "rests", _tip("points", "points", ",d"), _tip("median_percent", "median (%)", ".1f")]
    tips += [
        _tip("p90_percent", "90th percentile (%)", ".1f"),
        _tip("worst_percent", "worst (%)", "+.0f"),
        "worst_what",
    ]
    base = alt.Chart(shown)
    layers = [
        base.mark_rule(strokeWidth=2).encode(x, alt.X2("p90_percent:Q"), y, *beside, colour),
        base.mark_tick(thickness=2, size=9).encode(alt.X("p90_percent:Q"), y, *beside, colour, tooltip=tips),
        base.mark_circle(size=75, opacity=1).encode(x, y, *beside, colour, tooltip=tips),
    ]
    return alt.LayerChart(layer=layers).properties(width=SIDE, height=(ROW + 7 * several) * len(order))


def parity_chart(
    points: pd.DataFrame,
    by: str,
    *,
    unit: str = "s",
    measured: str = "measured_s",
    predicted: str = "predicted_s",
) -> alt.LayerChart:
    """Two columns against each other, both axes logarithmic and alike; dashed: 10 % off. `by`: the colours."""
    import altair as alt
    import pandas as pd

    values = points[[measured, predicted]].to_numpy()
    low, high = float(values.min()) / 1.4, float(values.max()) * 1.4
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis: dict[str, Any] = {"values": _ticks(low, high), "labelExpr": f"format(datum.value, '~s') + '{unit}'"}
    x = alt.X(f"{measured}:Q", scale=scale, axis=alt.Axis(title="Measured", **axis))
    y = alt.Y(f"{predicted}:Q", scale=scale, axis=alt.Axis(title="Predicted", **axis))
    lines = [
        alt.Chart(pd.DataFrame({measured: [low, high], predicted: [low * ratio, high * ratio]}))
        .mark_line(color=GREY, strokeWidth=1.2, strokeDash=dash, clip=True)
        .encode(x, y)
        for ratio, dash in ((1.0, [1, 0]), (1.0 - WITHIN, [4, 3]), (1.0 + WITHIN, [4, 3]))
    ]
    tips = ["what:N", f"{by}:N", _tip(measured, f"measured ({unit.strip()})", ".3~s")]
    tips += [_tip(predicted, f"predicted ({unit.strip()})", ".3~s"), _tip("error", "error", "+.1%")]
    few = len(points) < FEW
    dots = alt.Chart(points).mark_circle(size=70 if few else 26, opacity=0.9 if few else 0.65)
    dots = dots.encode(x, y, _colour(by, _colours(points, by)), tooltip=tips)
    return alt.LayerChart(layer=[*lines, dots]).properties(width=SIDE, height=SIDE)


def histogram_chart(histogram: pd.DataFrame, by: str) -> alt.LayerChart:
    """`llmsim.evidence.histogram`: shares of points by relative error."""
    import altair as alt
    import pandas as pd

    shown = histogram.assign(
        low_percent=100 * histogram["low"], high_percent=100 * histogram["high"], percent=100 * histogram["share"]
    )
    edge = shown["high_percent"].max()
    title = f"Error (%): + is predicted too long; beyond ±{edge:.0f} at the ends"
    bars = alt.Chart(shown[shown["share"] > 0]).mark_bar(opacity=0.6, binSpacing=0)
    tips = [f"{by}:N", _tip("low_percent", "from (%)", "+.0f"), _tip("high_percent", "to (%)", "+.0f")]
    bars = bars.encode(
        alt.X("low_percent:Q", title=title, bin="binned", scale=alt.Scale(domain=[-edge, edge], nice=False)),
        alt.X2("high_percent:Q"),
        alt.Y("percent:Q", title="Points (%)", stack=None),
        _colour(by, _colours(histogram, by), legend=False),
        tooltip=[*tips, _tip("percent", "points (%)", ".1f")],
    )
    zero = (
        alt.Chart(pd.DataFrame({"low_percent": [0.0]})).mark_rule(color=GREY, strokeWidth=1.2).encode(x="low_percent:Q")
    )
    return alt.LayerChart(layer=[bars, zero]).properties(width=SIDE, height=130)


def loads_chart(loads: pd.DataFrame) -> alt.LayerChart:
    """Errors of one metric's statistic, a row a recorded load; shaded: within 10 %."""
    import altair as alt
    import pandas as pd

    rests = loads["fitted"].map({True: "fitted to", False: "held out"})
    shown = loads.assign(rests=rests, percent=100 * loads["error"])
    shown = shown.assign(
        row=shown["label"] if shown["model"].nunique() == 1 else shown["label"] + ", " + shown["model"]
    )
    y = alt.Y(
        "row:N",
        sort=shown["row"].tolist(),
        axis=alt.Axis(title=None, labelLimit=330, ticks=False, domain=False, **PLACED),
    )
    x = alt.X("percent:Q", title="Error (%): + is predicted too long, of tokens/s too many")
    colour = _colour("rests", {"held out": HELD_OUT, "fitted to": FITTED})
    tips = ["row:N", "recording", "rests", _tip("requests", "requests", ",d"), _tip("measured", "measured", ",.4~g")]
    tips += [_tip("predicted", "predicted", ",.4~g"), _tip("percent", "error (%)", "+.1f")]
    band = alt.Chart(pd.DataFrame({"percent": [-100 * WITHIN], "to": [100 * WITHIN]}))
    zero = pd.DataFrame({"percent": [0.0], "to": [0.0]})
    layers = [
        band.mark_rect(color=GREY, opacity=0.14).encode(x, alt.X2("to:Q")),
        alt.Chart(zero).mark_rule(color=GREY).encode(x),
        alt.Chart(shown.assign(zero=0.0)).mark_rule(strokeWidth=2, opacity=0.5).encode(x, alt.X2("zero:Q"), y, colour),
        alt.Chart(shown).mark_circle(size=90, opacity=1).encode(x, y, colour, tooltip=tips),
    ]
    return alt.LayerChart(layer=layers).properties(width=SIDE, height=ROW * len(shown))


def extent_chart(extent: pd.DataFrame) -> alt.LayerChart:
    """How far a run goes beside what was measured, in multiples of it; shaded: beyond."""
    import altair as alt
    import pandas as pd

    known = extent[extent["measured"].notna() & (extent["run"] > 0)]
    shown = known.assign(ratio=known["run"] / known["measured"], percent=100 * known["share"], one=1.0)
    shown = shown.assign(place=["beyond" if ratio > 1 else "inside" for ratio in shown["ratio"]])
    low, high = min(shown["ratio"].min(), 0.5) / 1.5, max(shown["ratio"].max(), 2.0) * 1.5
    title = "Largest of the run, in multiples of the largest measured"
    axis = alt.Axis(title=title, values=_ticks(low, high), format="~g")
    x = alt.X("ratio:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)
    y = alt.Y(
        "range:N",
        sort=shown["range"].tolist(),
        axis=alt.Axis(title=None, labelLimit=330, ticks=False, domain=False, **PLACED),
    )
    colour = _colour("place", {"inside": "#059669", "beyond": "#d97706"})
    tips = ["range", _tip("measured", "largest measured", ",d"), _tip("run", "largest of the run", ",d")]
    tips += [_tip("percent", "GPU time beyond (%)", ".1f")]
    veil = alt.Chart(pd.DataFrame({"ratio": [1.0], "to": [high]})).mark_rect(color="#d97706", opacity=0.12)
    layers = [
        veil.encode(x, alt.X2("to:Q")),
        alt.Chart(shown).mark_rule(strokeWidth=2, opacity=0.6).encode(x, alt.X2("one:Q"), y, colour),
        alt.Chart(shown).mark_circle(size=120, opacity=1).encode(x, y, colour, tooltip=tips),
        alt.Chart(pd.DataFrame({"ratio": [1.0]})).mark_rule(color=GREY, strokeWidth=1.5).encode(x),
    ]
    return alt.LayerChart(layer=layers).properties(width=SIDE, height=34 * len(shown))


def _colours(frame: pd.DataFrame, by: str) -> dict[str, str]:
    """Known kinds keep their colour; others take the palette's in turn."""
    values = [str(value) for value in frame[by].unique()]
    known = {name: colour for name, colour in COLOURS.items() if name in values}
    spare = iter([colour for colour in PALETTE * len(values) if colour not in known.values()])
    return known | {value: next(spare) for value in values if value not in known}


def _colour(field: str, colours: Mapping[str, str], *, legend: bool = True) -> alt.Color:
    import altair as alt

    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    shown = alt.Legend(title=None, orient="top", symbolOpacity=1, symbolSize=90, labelLimit=300)
    return alt.Color(f"{field}:N", scale=scale, legend=shown if legend and len(colours) > 1 else None)


def _tip(field: str, title: str, form: str) -> alt.Tooltip:
    import altair as alt

    return alt.Tooltip(f"{field}:Q", title=title, format=form)
