"""What the page of plans shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from app_pages import quick, shared
from llmsim import charts_plan, plan_frames, plan_study
from llmsim.choice import TraceChoice
from llmsim.command_line import argv_of
from llmsim.compare_study import rate_unit
from llmsim.plan_study import Demand
from llmsim.plan_types import Option, Plan
from llmsim.slo import Slo

VIEWS = ("Fleets", "Knee", "How sure")
ANSWERS = {"fewest": "Fewest GPUs", "cheapest": "Cheapest", "fastest": "Fastest"}
OPTION_COLUMNS = {
    "option": ("fleet", None),
    "answers": ("is the", None),
    "status": ("SLOs", None),
    "gpus": ("GPUs", "%d"),
    "usd_per_h": ("$ per hour", "%.2f"),
    "rate": ("at (per s)", "%.4g"),
    "capacity_rate": ("holds up to (per s)", "%.4g"),
    "tightest": ("tightest promise", None),
    "margin": ("its margin", "percent"),
    "probability": ("P(SLOs met)", "percent"),
    "breaks_next": ("what breaks it, or the next smaller fleet", None),
    "usd_per_million_output_tokens": ("$ / 1M output tokens", "%.2f"),
    "goodput_per_gpu": ("goodput per GPU (req/s)", "%.2f"),
    "goodput_per_usd": ("good requests per $", "%.0f"),
    "tokens_per_s_per_gpu": ("tokens/s/GPU", "%.0f"),
    "tokens_per_s_per_user": ("tokens/s/user", "%.1f"),
}


def show(demand: Demand, used: Demand, found: Plan) -> None:
    """`used`: the demand that the plan was made for, perhaps on the first requests only."""
    for note in found.notes:
        st.warning(shared.plain(note), icon=":material/timer:")
    answers(found)
    view = st.segmented_control(
        "Look at", VIEWS, default="Fleets", required=True, key="plan_view", bind="query-params",
        label_visibility="collapsed",
    )  # fmt: skip
    if view == "Fleets":
        fleets(demand, used, found)
        return
    option = option_picker(found)
    if view == "Knee":
        knee(demand, used, option)
    else:
        how_sure(demand, used, found, option)


def answers(found: Plan) -> None:
    if not found.holds:
        st.error("Nothing that was tried meets the promises; below is what breaks in each.", icon=":material/block:")
        return
    for place, (name, option) in zip(st.columns(3), found.answers.items(), strict=True):
        if option is None:
            continue
        with place.container(border=True, height="stretch"):
            st.metric(
                ANSWERS[name],
                f"{option.gpus} GPUs · ${option.usd_per_h:,.2f}/h",
                help=option.run and shared.plain(_margins(option)),
            )
            st.markdown(f"**{shared.plain(option.name)}**")
            if option.run and (few := [str(one.slo) for one in option.run.measured if option.run.too_few(one.slo)]):
                st.caption(f"From too few requests to bound the percentile: {shared.plain(', '.join(few))}")
            if option.broken is not None:
                st.caption(f"Breaks {shared.plain(plan_frames.next_break(option))}")
            if option.capacity_broken is not None and not found.fleet:
                above = option.capacity_broken
                why = shared.plain(above.why_not)
                st.caption(f"Holds up to {option.capacity_rate:.4g} per s; at {above.rate:.4g}: {why}")
            if option.untold:
                st.caption(f"Highest rate: {shared.plain(option.untold)}")


def _margins(option: Option) -> str:
    return "; ".join(f"{slo}: {margin:.0%} of its limit left" for slo, margin in option.margins.items())


# ---- fleets ---------------------------------------------------------------------------------------------------------


def fleets(demand: Demand, used: Demand, found: Plan) -> None:
    points = plan_frames.points_frame(found)
    drawings: dict[str, Any] = {}
    if len(points):
        drawings = {"pareto": charts_plan.pareto_chart(points), "cost": charts_plan.cost_chart(points)}
    for place, (name, drawing) in zip(st.columns(2), drawings.items(), strict=False):
        with place:
            shared.chart(drawing, key=f"plan_{name}")
    st.caption("Every point is a simulation; hollow: a promise is broken; dashed: the frontier of those that hold.")
    options = plan_frames.options_frame(found)
    st.markdown("**Options**, the best first, with what breaks in the next smaller fleet or at the next higher rate")
    columns = {name: told for name, told in OPTION_COLUMNS.items() if name != "probability" or found.confidence}
    shared.table(options, "plan_options", columns)
    st.caption(shared.plain("Prices: " + "; ".join(found.prices.values())))
    runs = found.runs_frame()
    with st.expander(f"All {len(runs)} simulations"):
        st.dataframe(runs, hide_index=True, key="plan_runs", placeholder="–")
    frames = {"options": found.frame(), "runs": runs, "points": points}
    whole = _commands(demand) if used != demand else ()
    shared.footer("plan", commands=_commands(used), whole=whole, frames=frames, drawings=drawings)


def _commands(demand: Demand, more: tuple[str, ...] = ()) -> list[list[str] | None]:
    choice: TraceChoice = demand.source.first(demand.limit)  # type: ignore[attr-defined]
    return [
        choice.before(),
        argv_of(demand.scenario, command="plan", trace=choice.shown(), options=[*plan_study.flags_of(demand), *more]),
    ]


def option_picker(found: Plan) -> Option:
    """Those that hold first, the cheapest first of all."""
    started = {option.name: option for option in found.options if option.run is not None}
    if not started:
        raise ValueError("no option could be started: nothing to look at")
    names = list(started)
    usual = found.cheapest.name if found.cheapest is not None else names[0]
    name = st.selectbox("Fleet", names, names.index(usual), key="plan_option", bind="query-params")
    return started[name]


# ---- the knee -------------------------------------------------------------------------------------------------------


def knee(demand: Demand, used: Demand, option: Option) -> None:
    points = None
    if used.limit is not None:
        points = shared.long_job(
            "plan_knee_job", "Simulate on the whole trace", plan_study.knee, demand, option.scenario
        )
    shown = used if points is None else demand
    points = points or quick.answer(plan_study.knee, used, option.scenario)
    frame, held = plan_frames.knee_frame(points), plan_frames.held_rate(points)
    slos = [Slo.parse(text) for text in demand.slos]
    unit = rate_unit(demand.trace())
    drawings = {metric: charts_plan.knee_chart(frame, metric, slos, held, unit) for metric in ("ttft", "tpot")}
    for place, (metric, drawing) in zip(st.columns(2), drawings.items(), strict=True):
        with place:
            shared.chart(drawing, key=f"plan_knee_{metric}")
    st.caption(
        f"{points[0].requests:,} requests at each of {len(points)} rates on {shared.plain(option.name)}. Shaded: the "
        "queue kept growing, so latencies depend on the trace's length."
    )
    shared.footer("plan_knee", commands=_commands(shown, ("--curve",)), frames={"knee": frame}, drawings=drawings)


# ---- how sure -------------------------------------------------------------------------------------------------------


def how_sure(demand: Demand, used: Demand, found: Plan, option: Option) -> None:
    first, second, third = st.columns([2, 2, 1], vertical_alignment="center")
    with first:
        draws = st.slider("Replays at every rate", 19, 199, 19, 20, key="plan_draws", bind="query-params",
                          help="19 bound an interval of 90 %, 39 one of 95 %, 199 one of 99 %.")  # fmt: skip
    with second:
        percent = st.slider("Confidence asked for (%)", 50, 99, 90, key="plan_confidence", bind="query-params",
                            help="Up to which rate promises are kept with it; what intervals hold.")  # fmt: skip
    with third:
        another = st.toggle("Another machine", True, key="plan_machine", bind="query-params",
                            help="Machines of one kind differ. Off: the one that the profile was measured on, in "
                            "another hour.")  # fmt: skip
    st.caption(
        "The replay is repeated with cost models that are off by as much as recordings of the real engine say, and "
        "other seeds."
    )
    rate = option.rate if option.rate is not None else found.rate
    asked = (used, option.scenario, rate, draws, plan_study.AROUND, () if another else ("machine",))
    points = shared.long_job("plan_sure_job", "How sure is that?", plan_study.sure, *asked)
    if points is not None:
        sure(used, points, percent / 100, rate_unit(used.trace()))


def sure(demand: Demand, points: Sequence[plan_study.SurePoint], confidence: float, unit: str) -> None:
    middle, highest = points[len(points) // 2], plan_study.sure_up_to(points, confidence)
    held = "at none of these rates" if highest is None else f"up to {highest:g} {unit}"
    kept = [(f"P(every promise kept) at {middle.rate:g} {unit}", middle.probability)]
    kept += [(str(slo), probability) for slo, probability, _ in middle.each]
    shared.figures(
        [{"label": f"Kept with {confidence:.0%}", "value": held}]
        + [{"label": label, "value": f"{probability:.0%}"} for label, probability in kept]
    )
    st.caption(f"From {middle.draws} replays at each rate; {shared.plain(plan_study.off_by(middle.sources))}.")
    frame = plan_study.sure_frame(points, confidence)
    drawings = {
        "probability": charts_plan.probability_chart(frame, confidence, unit),
        "intervals": charts_plan.promise_chart(frame, middle.rate, confidence),
    }
    for place, (name, drawing) in zip(st.columns(2), drawings.items(), strict=True):
        with place:
            shared.chart(drawing, key=f"plan_{name}")
    shared.footer("plan_sure", commands=_commands(demand), frames={"probability": frame}, drawings=drawings)
