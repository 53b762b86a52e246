"""Charts of a plan: speed against throughput, cost against speed, the knee, how sure the promises are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsim.charts import COLOURS, SIDE_COLOURS
from llmsim.charts_policies import finished, log_ticks

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    from llmsim.slo import Slo

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
BROKEN = "#dc3d43"  # a promise that is broken, and where the queue runs away
STATISTIC_COLOURS = {  # as legends name them
    "mean": "#6f8f1a", "P50": COLOURS["baseline"], "P90": "#0e93a8", "P95": "#a25ee8", "P99": COLOURS["candidate"],
}  # fmt: skip
ALWAYS = ("P50", "P99")  # drawn whatever the promises are about
TOOLTIPS = (
    ("name", "fleet", ""), ("rate", "rate (per s)", ",.3~g"), ("tokens_per_s_per_gpu", "tokens/s/GPU", ",.0f"),
    ("tokens_per_s_per_user", "tokens/s/user", ",.1f"),
    ("usd_per_million_output_tokens", "$ / 1M output tokens", ",.2f"),
    ("requests", "requests simulated", ","), ("verdict", "SLOs", ""),
)  # fmt: skip


def pareto_chart(points: pd.DataFrame) -> alt.LayerChart:
    """Tokens/s/GPU against tokens/s/user, a point a simulation; the line is the frontier of those that hold.

    `points`: of `llmsim.plan_frames.points_frame`.
    """
    return _trade_off(points, "tokens_per_s_per_gpu", "output tokens/s per GPU", "frontier", "Throughput against speed")


def cost_chart(points: pd.DataFrame) -> alt.LayerChart:
    """Dollars per million output tokens against tokens/s/user; the line is the cheapest that hold at each speed."""
    shown = points[points["usd_per_million_output_tokens"].notna()]
    title = "$ per million output tokens"
    return _trade_off(shown, "usd_per_million_output_tokens", title, "cost_frontier", "Cost against speed")


def _trade_off(points: pd.DataFrame, field: str, title: str, edge: str, name: str) -> alt.LayerChart:
    import altair as alt

    shown = points.assign(verdict=[why or "hold" for why in points["why_not"]])
    speed = alt.Axis(title="tokens/s per user (median)")
    x = alt.X("tokens_per_s_per_user:Q", scale=_room(shown["tokens_per_s_per_user"]), axis=speed)
    y = alt.Y(f"{field}:Q", scale=_room(shown[field]), axis=alt.Axis(title=title, format=",~r"))
    gpus = list(dict.fromkeys(shown["gpu"]))
    scale = alt.Scale(domain=gpus, range=[SIDE_COLOURS[(at + 1) % len(SIDE_COLOURS)] for at in range(len(gpus))])
    legend = alt.Legend(title=None, orient="top", symbolSize=110, symbolOpacity=1)
    colour = alt.Color("gpu:N", scale=scale, legend=legend)
    hollow = alt.condition(alt.datum.holds, alt.Color("gpu:N", scale=scale, legend=None), alt.value("transparent"))
    tips = [alt.Tooltip(column, title=words, format=form or alt.Undefined) for column, words, form in TOOLTIPS]
    best = shown[shown[edge]].sort_values("tokens_per_s_per_user")
    labelled = best.sort_values(field, ascending=edge == "cost_frontier").drop_duplicates("kind")
    base = alt.Chart(shown)
    line = alt.Chart(best).mark_line(color=COLOURS["text"], strokeWidth=2, strokeDash=[6, 3], interpolate="linear")
    text: dict[str, Any] = {"align": "left", "dx": 9, "fontSize": 11, "color": COLOURS["text"]}
    by_speed = labelled.sort_values("tokens_per_s_per_user")
    # away from the frontier, every other one further, so that neighbours do not lie on each other
    rows = ((12, by_speed[::2]), (26, by_speed[1::2])) if edge == "cost_frontier" else ((-8, by_speed),)
    layers = [
        line.encode(x, y),
        base.mark_point(size=70, strokeWidth=1.8, opacity=0.95).encode(x, y, colour, fill=hollow, tooltip=tips),
        *(alt.Chart(some).mark_text(**text, dy=dy).encode(x, y, text="name:N") for dy, some in rows if len(some)),
    ]
    count = int(shown["holds"].sum())
    said = f"{name}: {len(shown)} simulations, {count} of which keep the SLOs; frontier: "
    return finished(layers, name, 300, said + (", ".join(best["name"]) or "none") + ".")


def _room(values: pd.Series) -> alt.Scale:
    """Zero is no place to begin where all points are far from it; labels need room above and beside."""
    import altair as alt

    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.12 * ((high - low) or high or 1.0)
    return alt.Scale(domain=[max(low - room, 0.0), high + room], nice=False)


# ---- the knee -------------------------------------------------------------------------------------------------------


def knee_chart(
    frame: pd.DataFrame, metric: str, slos: Sequence[Slo], held: float | None, unit: str = "requests/s"
) -> alt.LayerChart:
    """P50, P99 and what its SLOs are about, of one latency against the rate; its SLOs as lines; shaded: the queue grew.

    `frame`: of `llmsim.plan_frames.knee_frame`; `held`: the highest rate at which every SLO holds, a vertical line.
    """
    import altair as alt
    import pandas as pd

    shown = frame[(frame["metric"] == metric) & frame["value_ms"].notna()]
    limits = pd.DataFrame(
        [(1e3 * slo.limit_s, _named(slo.statistic)) for slo in slos if slo.metric == metric],
        columns=["value_ms", "of"],
    )
    names = [name for name in STATISTIC_COLOURS if name in ALWAYS or name in set(limits["of"])]
    shown = shown.assign(percentile=[_named(word) for word in shown["statistic"]])
    shown = shown[shown["percentile"].isin(names)]
    values = [*shown["value_ms"], *limits["value_ms"]]
    low, high = (min(values) / 1.25, max(values) * 1.25) if values else (1.0, 10.0)
    rates = (float(shown["rate"].min()), float(shown["rate"].max())) if len(shown) else (0.0, 1.0)
    room = 0.02 * (rates[1] - rates[0])
    ends = alt.Scale(domain=[max(rates[0] - room, 0.0), rates[1] + room], nice=False)
    x = alt.X("rate:Q", scale=ends, axis=alt.Axis(title=f"rate ({unit})"))
    y = alt.Y("value_ms:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False),
              axis=alt.Axis(title=f"{NAMES[metric]} (ms)", values=log_ticks(low, high), format=",~r"))  # fmt: skip
    scale = alt.Scale(domain=names, range=[STATISTIC_COLOURS[name] for name in names])
    colour = alt.Color("percentile:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolSize=110))
    tips = [
        alt.Tooltip("percentile:N"), alt.Tooltip("rate:Q", title=f"rate ({unit})", format=",.3~g"),
        alt.Tooltip("value_ms:Q", title=f"{NAMES[metric]} (ms)", format=",.1f"),
        alt.Tooltip("why_not:N", title="breaks"),
    ]  # fmt: skip
    base = alt.Chart(shown)
    layers: list[Any] = [*_shaded(shown, rates[1] + room, x), *_limits(limits, y), *_capacity(held, x, unit)]
    layers += [
        base.mark_line(strokeWidth=2.2, clip=True).encode(x, y, colour),
        base.mark_point(filled=True, size=40, opacity=1, clip=True).encode(x, y, colour, tooltip=tips),
    ]
    said = f"{', '.join(names)} of {NAMES[metric]} against the rate"
    said += "; it holds at no rate shown" if held is None else f"; every SLO holds up to {held:.4g} {unit}"
    unstable = shown[shown["unstable"]]
    said += f"; unstable from {float(unstable['rate'].min()):.4g} on" if len(unstable) else ""
    return finished(layers, f"{NAMES[metric]} as the rate rises", 230, said + ".")


def _named(statistic: str) -> str:
    return statistic if statistic == "mean" else statistic.upper()


def _shaded(shown: pd.DataFrame, end: float, x: alt.X) -> list[Any]:
    """From the last rate whose queue did not run away: beyond it nobody has looked."""
    import altair as alt
    import pandas as pd

    unstable, calm = shown[shown["unstable"]], shown[~shown["unstable"]]
    if not len(unstable):
        return []
    begins = float(calm["rate"].max()) if len(calm) else float(unstable["rate"].min())
    area = alt.Chart(pd.DataFrame({"rate": [begins], "end": [end], "text": ["unstable"]}))
    return [
        area.mark_rect(color=BROKEN, opacity=0.13).encode(x, x2="end:Q"),
        area.mark_text(color=BROKEN, align="left", dx=5, fontSize=11).encode(x, y=alt.value(10), text="text:N"),
    ]


def _limits(limits: pd.DataFrame, y: alt.Y) -> list[Any]:
    import altair as alt

    lines = alt.Chart(limits.assign(text=[f"SLO {of} {ms:,g} ms" for ms, of in limits.itertuples(index=False)]))
    style: dict[str, Any] = {"align": "left", "dx": 4, "dy": -6, "fontSize": 11, "color": COLOURS["slo"]}
    return [
        lines.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(y),
        lines.mark_text(**style).encode(y, x=alt.value(0), text="text:N"),
    ]


def _capacity(held: float | None, x: alt.X, unit: str) -> list[Any]:
    import altair as alt
    import pandas as pd

    if held is None:
        return []
    line = alt.Chart(pd.DataFrame({"rate": [held], "text": [f"holds up to {held:.4g} {unit}"]}))
    style: dict[str, Any] = {"align": "right", "dx": -5, "fontSize": 11, "color": COLOURS["text"]}
    return [
        line.mark_rule(color=COLOURS["text"], strokeWidth=1.5).encode(x),
        line.mark_text(**style).encode(x, y=alt.value(222), text="text:N"),
    ]


# ---- how sure -------------------------------------------------------------------------------------------------------


def probability_chart(frame: pd.DataFrame, confidence: float, unit: str = "requests/s") -> alt.LayerChart:
    """Probability that the SLOs are met against the rate: all, and each. `frame`: of `plan_study.sure_frame`."""
    import altair as alt
    import pandas as pd

    every = frame.drop_duplicates("rate").assign(slo="all SLOs", probability=lambda rows: rows["probability_all"])
    names = ["all SLOs", *dict.fromkeys(frame["slo"])]
    shown = pd.concat([frame, every], ignore_index=True) if len(names) > 2 else every
    names = names if len(names) > 2 else names[:1]
    colours = [COLOURS["candidate"], *SIDE_COLOURS[2:]]
    scale = alt.Scale(domain=names, range=[colours[at % len(colours)] for at in range(len(names))])
    colour = alt.Color("slo:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolSize=110))
    x = alt.X("rate:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=f"rate ({unit})"))
    y = alt.Y("probability:Q", scale=alt.Scale(domain=[0, 1.02], nice=False),
              axis=alt.Axis(title="probability that it is met", format="%", tickCount=5))  # fmt: skip
    tips = ["slo:N", alt.Tooltip("rate:Q", format=",.4~g"), alt.Tooltip("probability:Q", format=".0%"), "draws:Q"]
    goal = alt.Chart(pd.DataFrame({"probability": [confidence]}))
    layers = [
        goal.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(y),
        alt.Chart(shown).mark_line(strokeWidth=2.2).encode(x, y, colour),
        alt.Chart(shown).mark_point(filled=True, size=55, opacity=1).encode(x, y, colour, tooltip=tips),
    ]
    rows = zip(every["rate"], every["probability"], strict=True)
    said = "; ".join(f"{rate:.4g}: {probability:.0%}" for rate, probability in rows)
    return finished(layers, "How likely the SLOs are met", 230, f"Probability that every SLO is met by rate. {said}.")


def promise_chart(frame: pd.DataFrame, rate: float, level: float = 0.9) -> alt.LayerChart:
    """Intervals of what each SLO is about at one rate, as shares of its limit (the dashed line at 100 %).

    `frame`: of `plan_study.sure_frame` at this level.
    """
    import altair as alt
    import pandas as pd

    shown = frame[(frame["rate"] == rate) & frame["high"].map(lambda value: value < float("inf"))]
    names = list(dict.fromkeys(shown["slo"]))
    top = max([1.1, *(1.08 * shown["high"])])
    axis = alt.Axis(title="share of the limit", format="%")
    scale = alt.Scale(domain=[0, top], nice=False)
    x = alt.X("low:Q", scale=scale, axis=axis)
    y = alt.Y("slo:N", sort=names, axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=260))
    over = alt.condition(alt.datum.high > 1, alt.value(BROKEN), alt.value(SIDE_COLOURS[3]))
    tips = [
        "slo:N",
        *(alt.Tooltip(f"{word}_ms:Q", title=f"{word} (ms)", format=",.1f") for word in ("low", "median", "high")),
        alt.Tooltip("probability:Q", format=".0%"),
    ]  # fmt: skip
    base = alt.Chart(shown)
    limit = alt.Chart(pd.DataFrame({"low": [1.0]}))
    layers = [
        limit.mark_rule(color=COLOURS["slo"], strokeDash=[5, 4], strokeWidth=1.5).encode(x),
        base.mark_rule(strokeWidth=4).encode(x, y, x2="high:Q", color=over, tooltip=tips),
        base.mark_point(filled=True, size=90, opacity=1).encode(
            alt.X("median:Q", scale=scale, axis=axis), y, color=over, tooltip=tips
        ),
    ]
    rows = zip(shown["slo"], shown["low"], shown["high"], strict=True)
    said = "; ".join(f"{slo}: {low:.0%} to {high:.0%} of its limit" for slo, low, high in rows)
    return finished(layers, f"{100 * level:.4g} % intervals at {rate:.4g}/s", max(40 * len(names), 60), said + ".")
