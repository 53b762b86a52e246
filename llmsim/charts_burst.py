"""Charts of a burst of prompts: frames of `llmsim.phases_burst` drawn, in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.charts import PHASE_COLOURS, WIDTH, _ticks
from llmsim.charts_phases import GREY, HEIGHT_SMALL, tip

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

PROMPT_SHADES = ("#c2410c", "#f59e0b", "#9a3412", "#fb923c", "#d97706", "#7c2d12", "#ea580c", "#fdba74")
LIGHT = ("#f59e0b", "#fb923c", "#d97706", "#fdba74")  # of them, those on which white is not read
HOST_SHADES = {"schedule": "#94a3b8", "launch": "#64748b", "update": "#cbd5e1"}
LANE = 24  # pixels of a lane of the timeline
CLOCKS = ("host", "worker", "GPU")
EXTENT: dict[str, Any] = {"minExtent": 78, "maxExtent": 78}  # of y axes that have to begin at the same place
LEAST_SHARE = 0.045  # of the width: bars as wide as that have their tokens written in them


def burst_chart(clocks: pd.DataFrame, requests: pd.DataFrame) -> alt.LayerChart:
    """A burst on both clocks, and below what each request gets computed: `Burst.clocks` and `Burst.requests`."""
    import altair as alt
    import pandas as pd

    own = requests.assign(
        part=requests["lane"].where(requests["kind"] == "prefill", "decode"), order=requests["request"]
    )
    busy = clocks.assign(order=[CLOCKS.index(lane) - len(CLOCKS) - 1 for lane in clocks["lane"]])
    frame = _in_ms(pd.concat([busy, own], ignore_index=True))
    lanes = frame.sort_values("order")["lane"].unique().tolist()
    x = _burst_x(clocks)
    y = alt.Y(
        "lane:N",
        sort=lanes,
        scale=alt.Scale(paddingInner=0.22, paddingOuter=0.1),
        axis=alt.Axis(title=None, ticks=False, domain=False, labelBound=False, labelFlush=False, **EXTENT),
    )
    tips = [
        "lane",
        "part",
        "iteration:Q",
        "mode",
        tip("tokens", "tokens", ",d"),
        tip("begin_ms", "begins (ms)", ".2f"),
    ]
    tips += [tip("lasts_ms", "lasts (ms)", ".2f"), tip("computed_tokens", "computed before (tokens)", ",d")]
    bars = alt.Chart(frame).mark_bar(stroke="white", strokeWidth=0.4)
    wide = frame[frame["part"].str.startswith("prompt") & (frame["lasts_ms"] >= LEAST_SHARE * _span_ms(frame))]
    shades = _prompt_shades(requests)
    inks = ["#0f172a" if shades[part] in LIGHT else "#ffffff" for part in wide["part"]]
    wide = wide.assign(middle_ms=(wide["begin_ms"] + wide["end_ms"]) / 2, ink=inks)
    words = alt.Chart(wide).mark_text(fontSize=11, fontWeight="bold").encode(color=alt.Color("ink:N", scale=None))
    layers = [
        bars.encode(x, alt.X2("end_ms:Q"), y, _part_colour(requests), tooltip=tips),
        words.encode(alt.X("middle_ms:Q"), y, text=alt.Text("tokens:Q", format=",d")),
    ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=LANE * len(lanes))


def tokens_chart(clocks: pd.DataFrame, requests: pd.DataFrame, token_budget: int) -> alt.LayerChart:
    """The tokens of a burst's iterations, chunks on top of decodes, up to the budget: a column as wide as it lasts."""
    import altair as alt
    import pandas as pd

    frame = _in_ms(requests.assign(part=requests["lane"].where(requests["kind"] == "prefill", "decode")))
    several = {"begin_ms": "first", "end_ms": "first", "tokens": "sum"}
    decodes = frame[frame["kind"] == "decode"].groupby("iteration", as_index=False).agg(several)
    stacked = pd.concat([decodes.assign(request=0, part="decode"), frame[frame["kind"] == "prefill"]])
    stacked = stacked.sort_values(["iteration", "request"])
    top = stacked.groupby("iteration")["tokens"].cumsum()
    stacked = stacked.assign(top=top, bottom=top - stacked["tokens"])
    x = _burst_x(clocks)
    scale = alt.Scale(domain=[0, 1.15 * max(token_budget, int(top.max()))], nice=False)
    y = alt.Y("bottom:Q", scale=scale, axis=alt.Axis(title="Tokens", tickCount=4, titleX=-64, **EXTENT))
    told = {"bottom": [token_budget], "text": [f"token budget {token_budget:,}"], "begin_ms": [frame["begin_ms"].min()]}
    line = alt.Chart(pd.DataFrame(told))
    tips = ["part", "iteration:Q", tip("tokens", "tokens", ",d")]
    layers = [
        alt.Chart(stacked)
        .mark_rect(stroke="white", strokeWidth=0.4)
        .encode(x, alt.X2("end_ms:Q"), y, alt.Y2("top:Q"), _part_colour(requests, legend=False), tooltip=tips),
        line.mark_rule(color=GREY, strokeDash=[5, 4]).encode(y),
        line.mark_text(color=GREY, align="left", dx=4, dy=-7, fontSize=11).encode(x, y, text="text:N"),
    ]
    return alt.LayerChart(layer=layers).properties(width=WIDTH, height=96)


def _burst_x(clocks: pd.DataFrame) -> alt.X:
    """The same for both charts of a burst, so that they can stand one above the other."""
    import altair as alt

    scale = alt.Scale(domain=[1e3 * clocks["begin_s"].min(), 1e3 * clocks["end_s"].max()], nice=False)
    title = "Time since the burst came (ms)"
    return alt.X("begin_ms:Q", scale=scale, axis=alt.Axis(title=title, tickCount=12, orient="bottom"))


def _in_ms(frame: pd.DataFrame) -> pd.DataFrame:
    begin_ms, end_ms = 1e3 * frame["begin_s"], 1e3 * frame["end_s"]
    return frame.assign(begin_ms=begin_ms, end_ms=end_ms, lasts_ms=end_ms - begin_ms)


def _span_ms(frame: pd.DataFrame) -> float:
    return float(frame["end_ms"].max() - frame["begin_ms"].min())


def _part_colour(requests: pd.DataFrame, *, legend: bool = True) -> alt.Color:
    """The host in greys, decodes blue, prompts in shades of prefill's colour."""
    import altair as alt

    shades = HOST_SHADES | PHASE_COLOURS | _prompt_shades(requests)
    shown = alt.Legend(
        title=None, orient="top", symbolType="square", symbolOpacity=1, symbolStrokeWidth=0,
        values=[*HOST_SHADES, *PHASE_COLOURS],
    )  # fmt: skip
    scale = alt.Scale(domain=list(shades), range=list(shades.values()))
    return alt.Color("part:N", scale=scale, legend=shown if legend else None)


def _prompt_shades(requests: pd.DataFrame) -> dict[str, str]:
    numbers = sorted(int(number) for number in requests.loc[requests["request"] > 0, "request"].unique())
    return {f"prompt {n}": PROMPT_SHADES[(n - 1) % len(PROMPT_SHADES)] for n in numbers}


def budgets_chart(budgets: pd.DataFrame, token_budget: int) -> alt.LayerChart:
    """What the token budget trades: first tokens of the burst against gaps of those who decode."""
    import altair as alt
    import pandas as pd

    names = {"mean_ttft_s": "mean TTFT of the burst", "longest_gap_s": "longest gap between two tokens"}
    kept = [name for name in names if budgets[name].notna().any()]
    long = budgets.melt(["token_budget"], kept, "what", "seconds").dropna()
    long = long.assign(what=long["what"].map(names), ms=1e3 * long["seconds"])
    x = alt.X(
        "token_budget:Q",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(
            title="Token budget of an iteration (max_num_batched_tokens)",
            values=budgets["token_budget"].tolist(),
            format=",d",
        ),
    )
    low, high = long["ms"].min() / 1.3, long["ms"].max() * 1.3
    axis = alt.Axis(title="Time (ms)", values=_ticks(low, high), format=",~g")
    y = alt.Y("ms:Q", scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)
    scale = alt.Scale(domain=list(names.values()), range=list(PHASE_COLOURS.values()))
    colour = alt.Color(
        "what:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolOpacity=1, labelLimit=320)
    )
    tips = ["what", tip("token_budget", "token budget", ",d"), tip("ms", "ms", ".1f")]
    lines = (
        alt.Chart(long)
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=60, filled=True))
        .encode(x, y, colour, tooltip=tips)
    )
    rule = alt.Chart(pd.DataFrame({"token_budget": [token_budget]})).mark_rule(color=GREY, strokeDash=[5, 4]).encode(x)
    return alt.LayerChart(layer=[rule, lines]).properties(width=WIDTH, height=HEIGHT_SMALL)
