"""Calibration: what results rest on, and how far they can be trusted."""

from collections.abc import Callable
from typing import Any

import streamlit as st

from app_pages import shared
from llmsim import charts_calibration, evidence, evidence_words
from llmsim.command_line import argv_of
from llmsim.cost.profile import Profile, profile_names, read_profile
from llmsim.runs import Run
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of

NO_RUN = "What if's baseline"
BOUND: dict[str, Any] = {"bind": "query-params"}


def cached(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the library computed for the same arguments, whoever asked."""
    return st.cache_data(function, max_entries=128, show_spinner=False)(*arguments)


def pick(label: str, options: list[str], key: str) -> str:
    return st.selectbox(label, options, key=key, **BOUND)


def parity(points: Any, by: str, key: str) -> None:
    drawing = charts_calibration.parity_chart(points, by)
    shared.chart(drawing, alt=evidence_words.points_in_words(points), key=f"{key}_parity_chart")
    shape = charts_calibration.histogram_chart(evidence.histogram(points, by), by)
    shared.chart(shape, alt="The same points by relative error", key=f"{key}_histogram_chart")
    shared.downloads(f"{key}_points", points, name="points", drawing=drawing)


def steps(profile: Profile) -> None:
    errors, points = (cached(table, profile.name, evidence.STEPS) for table in (evidence.errors, evidence.points))
    left, right = st.columns(2)
    with left:
        model = pick("Model", evidence_words.panels(errors), "ca_model")
        errors, points = errors[errors["panel"] == model], points[points["panel"] == model]
        st.markdown("**GPU seconds of engine steps**, a row a recorded load")
        drawing, alt = charts_calibration.errors_chart(errors), evidence_words.errors_in_words(errors)
        shared.drawn_with_downloads(errors, drawing, "ca_steps", "steps", alt)
    with right:
        st.markdown(f"**Predicted against recorded**, a point a step: {len(points):,} drawn by lot")
        parity(points, "kind", "ca_steps")


def kernels(profile: Profile) -> None:
    errors, points = (cached(table, profile.name, evidence.KERNELS) for table in (evidence.errors, evidence.points))
    left, right = st.columns(2)
    with left:
        st.markdown("**Kernels**, each point predicted by what was fitted without it")
        drawing, alt = charts_calibration.errors_chart(errors), evidence_words.errors_in_words(errors)
        shared.drawn_with_downloads(errors, drawing, "ca_kernels", "kernels", alt)
    with right:
        operator = pick("Operator", evidence_words.panels(errors), "ca_operator")
        parity(points[points["panel"] == operator], "kind", "ca_kernels")


def recordings(profile: Profile) -> None:
    first, second, third = st.columns([1.4, 1.4, 1])
    names = list(evidence.METRICS)
    with first:
        metric = st.segmented_control("Metric", names, default=names[0], required=True, key="ca_metric", **BOUND)
    with second:
        options = list(evidence.STATISTICS)
        statistic = st.segmented_control("Statistic", options, default="mean", required=True, key="ca_stat", **BOUND)
    with third:
        model = pick("Model", evidence_words.models(cached(evidence.loads, profile.name)), "ca_served")
    loads = cached(evidence.loads_of, profile.name, metric, statistic, model)
    left, right = st.columns([1.4, 1])
    with left:
        st.markdown("**Loads of a real engine**, replayed")
        drawing, alt = charts_calibration.loads_chart(loads), evidence_words.loads_in_words(loads)
        shared.drawn_with_downloads(loads, drawing, "ca_loads", "loads", alt)
    with right:
        st.markdown("**Predicted against recorded**, a point a load")
        points, unit = evidence.as_points(loads), evidence_words.unit_of(metric)
        drawing = charts_calibration.parity_chart(
            points, "rests", unit=unit, measured="measured", predicted="predicted"
        )
        told = evidence_words.points_in_words(points, unit, "measured")
        shared.chart(drawing, alt=told, key="ca_loads_parity_chart")


def this_run(folders: dict[str, Any]) -> Run | None:
    """One that the dashboard was started with, or what What if shows as its baseline."""
    chosen = pick("Run", [NO_RUN, *folders], "ca_run")
    if chosen != NO_RUN:
        return shared.read(folders[chosen])
    with st.expander("Requests and set-up", icon=":material/tune:"):
        left, right = st.columns(2)
        with left:
            choice = shared.trace_picker()
        with right:
            scenario = shared.scenario_picker("base")
    if choice is None or scenario is None:
        return None
    return shared.read(shared.quick_run(choice, scenario))


def extent(run: Run) -> list[str]:
    scenario = Scenario.from_dict(run.manifest["scenario"])
    shared.say(run.manifest.get("notes", ()))
    shared.warn_of_rejections({"run": run})
    cost = cost_of(scenario)
    st.caption(shared.plain(cost.label))
    table = evidence.extent(run.iterations, cost, scenario)
    st.markdown(f"**{shared.plain(evidence_words.extent_in_words(table))}**")
    st.markdown(shared.plain(evidence_words.neighbours_in_words(cost)))
    left, right = st.columns(2)
    with left:
        drawing, alt = charts_calibration.extent_chart(table), evidence_words.extent_in_words(table)
        shared.drawn_with_downloads(table, drawing, "ca_extent", "extent", alt)
    with right:
        st.table(evidence_words.extent_table(table), alt="Largest iterations of the run beside those measured")
    return argv_of(scenario)


shared.page_header(
    "Calibration", "What was measured, how far predictions are from it, and where a run leaves the measured range."
)
left, right = st.columns([1, 4])
with left:
    profile = read_profile(pick("Profile", profile_names(), "ca_profile"))
    st.caption(shared.plain(f"{profile.provenance.engine}, {profile.provenance.recorded}, id {profile.id}"))
commands = evidence_words.commands(profile)
with shared.error_in_place():
    if newer := evidence.stale(profile.name):
        st.warning(shared.plain(newer), icon=":material/history:")
    with right:
        shared.figures(evidence_words.cards(profile.name))
    tabs = st.tabs(
        ["Recordings", "Engine steps", "Kernels", "This run", "Profile"], key="ca_tab", on_change="rerun", **BOUND
    )
    for tab, show in zip(tabs[:3], (recordings, steps, kernels), strict=True):
        if tab.open:
            with tab, shared.error_in_place():
                show(profile)
    run_tab, profile_tab = tabs[3:]
    if run_tab.open:
        with run_tab, shared.error_in_place(*shared.given_runs().values()):
            if run := this_run(shared.given_runs()):
                commands.insert(0, extent(run))
    if profile_tab.open:
        with profile_tab:
            st.table(evidence_words.facts_table(profile), alt="What the profile is of and rests on")
            st.markdown("**How far recordings are from the profile at random** (relative standard deviation)")
            st.table(evidence_words.spread_table(profile), alt="Spread of loads and machines")
            shared.downloads("ca_profiles", evidence.profiles(), name="profiles")
    if where := evidence_words.checkout():
        st.caption(shared.plain(where))
    shared.command_line(*commands)
