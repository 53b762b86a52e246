"""Charts of single requests, from the frames of `llmsim.views`: every request as a dot, the phases of some as a Gantt
chart, both linked, the life of one. What is selected has a name: "brush" among the dots, "request" in the Gantt chart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.charts import COLOURS
from llmsim.charts_style import (
    EXACT,
    HEIGHT,
    NUMBER,
    PARTS,
    SHORT_NUMBER,
    WIDTH,
    check,
    labels_of,
    log_y,
    part_colour,
    run_colour,
    styled,
    title_of,
)

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

SHORT = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
FAR = 60
FEW = 5000  # dots that may be large
GANTT_PX, STEP_PX = 500, 14  # height of a Gantt chart, at most; of one request in it, at most
NAMED = 40  # requests of a Gantt chart whose ids are readable


def scatter_chart(frame: pd.DataFrame) -> alt.Chart:
    """`llmsim.views.scatter` as dots; a rectangle drawn over it is the parameter "brush", in the fields x and y."""
    import altair as alt

    check(frame)
    labels, first, second = labels_of(frame), frame.attrs["headings"]["x"], frame.attrs["headings"]["y"]
    across = alt.Axis(title=first, format=NUMBER)
    x = alt.X("x:Q", scale=alt.Scale(nice=False, zero=False, padding=6), axis=across)
    tips = [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("id:Q", title="request", format="d"),
        alt.Tooltip("x:Q", title=first, format=EXACT),
        alt.Tooltip("y:Q", title=second, format=SHORT_NUMBER),
        alt.Tooltip("prompt_tokens:Q", title="prompt (tokens)", format=","),
        alt.Tooltip("output_tokens:Q", title="output (tokens)", format=","),
    ]
    brush = alt.selection_interval(name="brush", encodings=["x", "y"])
    size, opacity = (26, 0.6) if len(frame) < FEW else (10, 0.35)
    dots = alt.Chart(frame).mark_circle(size=size, opacity=opacity, clip=True)
    colour = run_colour(labels, symbol="circle")
    dots = dots.encode(x, log_y(frame["y"], "y", second), colour, tooltip=tips).add_params(brush)
    whole = dots.properties(
        width=WIDTH, height=HEIGHT, title=title_of(f"{frame.attrs['titles']['y']}, each request", frame)
    )
    said = f"{second} against {first}, a dot a request, for {', '.join(labels)}"
    chart: alt.Chart = styled(whole, said)
    return chart


def linked_chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """`llmsim.views.linked`: every request as a dot, and the phases of the slowest among those in the brush below; it
    works in a page that no program serves."""
    import altair as alt

    check(frame)
    brush = alt.selection_interval(name="brush", encodings=["x", "y"])
    x = alt.X(
        "arrival_s:Q",
        scale=alt.Scale(nice=False, zero=False, padding=6),
        axis=alt.Axis(title="Sent at (s of simulated time)", format=NUMBER),
    )
    dots = alt.Chart(frame).mark_circle(size=24, clip=True)
    labels = labels_of(frame)
    dots = dots.encode(
        x,
        log_y(frame["ttft_ms"], "ttft_ms", "Time to first token, TTFT (ms)"),
        run_colour(labels, symbol="circle"),
        opacity=alt.condition(brush, alt.value(0.7), alt.value(0.1)),
        tooltip=_dot_tips(),
    )
    above = dots.add_params(brush).properties(width=WIDTH, height=HEIGHT)
    slowest = (
        alt.Chart(frame)
        .transform_filter(brush)
        .transform_window(rank="row_number()", sort=[alt.SortField("e2el_ms", order="descending")])
        .transform_filter(f"datum.rank <= {NAMED}")
    )
    time = alt.X(
        "begin_s:Q", scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(title="Simulated time (s)", format=NUMBER)
    )
    y = alt.Y(
        "name:N",
        sort=alt.SortField("arrival_s"),
        axis=alt.Axis(title="Slowest in the brush", ticks=False, grid=False, domain=False, labelLimit=150),
    )
    instants = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
    layers = [
        slowest.transform_calculate(begin_s=f"datum.{begin}", end_s=f"datum.{end}", phase=f"'{phase}'")
        .mark_bar(height={"band": 0.8})
        .encode(time, y, part_colour("phase", PARTS[:3]), alt.X2("end_s:Q"), tooltip=_gantt_tips())
        for phase, begin, end in zip(PARTS, instants, instants[1:], strict=False)
    ]
    below = alt.layer(*layers).properties(width=WIDTH, height=alt.Step(STEP_PX - 2))
    hint = "Draw a rectangle over the dots to choose requests; a click beside it takes all again"
    whole = alt.vconcat(above, below, spacing=14).resolve_scale(color="independent")
    whole = whole.properties(title=title_of("Requests, and the phases of the slowest", frame, hint))
    said = f"TTFT against the time of sending, a dot a request, for {', '.join(labels)}; phases of the slowest"
    chart: alt.VConcatChart = styled(whole, said)
    return chart


def _dot_tips() -> list[alt.Tooltip]:
    import altair as alt

    return [
        alt.Tooltip("label:N", title="run"),
        alt.Tooltip("id:Q", title="request", format="d"),
        alt.Tooltip("arrival_s:Q", title="sent at (s)", format=",.3f"),
        *(alt.Tooltip(f"{name}_ms:Q", title=f"{short} (ms)", format=SHORT_NUMBER) for name, short in SHORT.items()),
        alt.Tooltip("prompt_tokens:Q", title="prompt (tokens)", format=","),
        alt.Tooltip("output_tokens:Q", title="output (tokens)", format=","),
    ]


def gantt_chart(frame: pd.DataFrame) -> alt.Chart:
    """`llmsim.views.gantt`: a line a request, the one sent first on top. A click selects a request: the parameter
    "request", in the field id. Requests so far apart that their lines would be dots all begin at 0, when sent.
    """
    import altair as alt

    check(frame)
    apart = _far_apart(frame)
    if apart:
        sent_s = frame.groupby("id")["begin_s"].transform("min")
        frame = frame.assign(begin_s=frame["begin_s"] - sent_s, end_s=frame["end_s"] - sent_s)
    rows = int(frame["place"].max()) + 1 if len(frame) else 0
    step_px = min(STEP_PX, GANTT_PX / max(rows, 1))
    picked = alt.selection_point(name="request", fields=["id"])
    x = alt.X(
        "begin_s:Q",
        scale=alt.Scale(zero=False, nice=False),
        axis=alt.Axis(title="Since it was sent (s)" if apart else "Simulated time (s)", format=NUMBER),
    )
    title = "Request (id)" if rows <= NAMED else "Requests, in the order in which they were sent"
    names = alt.Axis(title=title, labels=rows <= NAMED, ticks=False, grid=False, domain=False)
    y = alt.Y("id:O", sort=alt.SortField("place"), axis=names)
    bars = alt.Chart(frame).mark_bar(height={"band": 0.8 if step_px > 4 else 1.0})
    bars = bars.encode(
        x,
        y,
        part_colour("phase", list(dict.fromkeys(frame["phase"]))),
        alt.X2("end_s:Q"),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.45)),
        tooltip=_gantt_tips(),
    ).add_params(picked)
    titled = title_of(f"Phases of {rows:,} request{'s' * (rows != 1)}", frame)
    whole = bars.properties(width=WIDTH, height=max(40, round(step_px * rows)), title=titled)
    said = f"Queue, prefill and decode of {rows} requests over simulated time, a line a request"
    chart: alt.Chart = styled(whole, said)
    return chart


def _far_apart(frame: pd.DataFrame) -> bool:
    """Whether the longest request takes less than a `FAR`th of the time between the first and the last one."""
    if not len(frame):
        return False
    return float(frame["end_s"].max() - frame["begin_s"].min()) > FAR * float(frame["e2el_ms"].max()) / 1e3 > 0.0


def _gantt_tips() -> list[alt.Tooltip]:
    import altair as alt

    return [
        alt.Tooltip("id:Q", title="request", format="d"),
        alt.Tooltip("phase:N", title="phase"),
        alt.Tooltip("begin_s:Q", title="from (s)", format=",.3f"),
        alt.Tooltip("end_s:Q", title="to (s)", format=",.3f"),
        *(alt.Tooltip(f"{name}_ms:Q", title=f"{short} (ms)", format=SHORT_NUMBER) for name, short in SHORT.items()),
        alt.Tooltip("preempted_ms:Q", title="preempted (ms)", format=SHORT_NUMBER),
        alt.Tooltip("prompt_tokens:Q", title="prompt (tokens)", format=","),
        alt.Tooltip("output_tokens:Q", title="output (tokens)", format=","),
        alt.Tooltip("replica:Q", title="replica", format="d"),
    ]


def life_chart(frame: pd.DataFrame) -> alt.LayerChart:
    """`llmsim.views.life` or `llmsim.views_life.explained`: one request, a line a phase with its length; the reason is
    in the tooltip."""
    import altair as alt

    check(frame)
    low_s, high_s = float(frame["begin_s"].min()), float(frame["end_s"].max())
    room_s = (high_s - low_s) * 0.3 or 1.0  # for the text of the last phase
    x = alt.X(
        "begin_s:Q",
        scale=alt.Scale(domain=[low_s, high_s + room_s], nice=False),
        axis=alt.Axis(title="Simulated time (s)", format=NUMBER, tickCount=6),
    )
    sums = frame.groupby("phase", sort=False).agg({"end_s": "max", "duration_ms": "sum", "share": "sum"}).reset_index()
    sums["text"] = [
        f"{ms:,.0f} ms ({part:.0%})" if ms >= 1000 else f"{ms:.3g} ms ({part:.0%})"
        for ms, part in zip(sums["duration_ms"], sums["share"], strict=True)
    ]
    phases = list(sums["phase"])
    y = alt.Y("phase:N", sort=phases, axis=alt.Axis(title=None, grid=False, ticks=False, labelFontSize=12))
    tips = [
        alt.Tooltip("phase:N", title="phase"),
        alt.Tooltip("begin_s:Q", title="from (s)", format=",.3f"),
        alt.Tooltip("end_s:Q", title="to (s)", format=",.3f"),
        alt.Tooltip("duration_ms:Q", title="length (ms)", format=SHORT_NUMBER),
        alt.Tooltip("reason:N", title="why"),
    ]
    bars = alt.Chart(frame).mark_bar(height=18)
    bars = bars.encode(x, y, part_colour("phase", phases, legend=False), alt.X2("end_s:Q"), tooltip=tips)
    text = alt.Chart(sums).mark_text(align="left", dx=6, color=COLOURS["text"])
    text = text.encode(alt.X("end_s:Q"), y, text="text:N")
    row = frame.iloc[0]
    tokens = f"{int(row['prompt_tokens']):,} prompt and {int(row['output_tokens']):,} output tokens"
    titled = title_of(f"Request {int(row['id'])}", frame, f"{tokens}, replica {int(row['replica'])}")
    whole = alt.layer(bars, text).properties(width=WIDTH, height=34 * len(phases), title=titled)
    lengths = ", ".join(f"{phase} {words}" for phase, words in zip(phases, sums["text"], strict=True))
    chart: alt.LayerChart = styled(whole, f"Phases of request {int(row['id'])} over simulated time: {lengths}")
    return chart
