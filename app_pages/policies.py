"""Policies: schedulers, engines and caches on the same requests, side by side."""

import streamlit as st

from app_pages import policies_views as views
from app_pages import shared
from llmsim import cli_list
from llmsim.compare_sides import base_of, flags_of, given, parted, sides_of, stamps
from llmsim.compare_study import Study

CACHE = "KV cache"
VIEWS = {"Differences": views.differences, "Goodput": views.rates, "Fairness": views.fairness}
USUAL = ["vllm", "vllm-v0", "vtc", "engine=sglang"]


def known_sides() -> list[str]:
    """Every scheduler and engine of the library, written as a side."""
    return [row["name"] for row in cli_list.schedulers()] + [f"engine={row['name']}" for row in cli_list.engines()]


def side_picker() -> list[str]:
    return st.multiselect(
        "Sides",
        known_sides(),
        USUAL,
        key="pol_sides",
        bind="query-params",
        accept_new_options=True,
        help="The first one is what the others are compared with. Type your own: file.py:Class is a scheduler, "
        "FIELD=VALUE,… changes the first side, e.g. max_num_seqs=64 or scheduler=slo-chunk,scheduler.tpot_ms=40.",
    )


def slo_picker() -> tuple[tuple[str, float], ...]:
    left, middle, right = st.columns(3)
    with left:
        ttft_ms = st.number_input(
            "SLO: TTFT (ms)", 0.0, None, 500.0, 50.0, format="%g", key="pol_ttft", bind="query-params", help="0: none"
        )
    with middle:
        tpot_ms = st.number_input(
            "SLO: TPOT (ms)", 0.0, None, 50.0, 5.0, format="%g", key="pol_tpot", bind="query-params", help="0: none"
        )
    with right:
        e2el_ms = st.number_input(
            "SLO: E2EL (ms)", 0.0, None, 0.0, 500.0, format="%g", key="pol_e2el", bind="query-params", help="0: none"
        )
    return tuple((name, ms) for name, ms in (("ttft", ttft_ms), ("tpot", tpot_ms), ("e2el", e2el_ms)) if ms)


shared.page_header("Policies", "Who goes first, and what is kept: several policies answer the same requests.")
with st.sidebar:
    st.subheader("Requests")
    with shared.error_in_place():
        choice = shared.trace_picker()
    st.subheader("Set-up")
    scenario = shared.scenario_picker("base")
view = st.segmented_control(
    "Look at",
    [*VIEWS, CACHE],
    default="Differences",
    required=True,
    key="pol_view",
    bind="query-params",
    label_visibility="collapsed",
)
if choice is None or scenario is None:
    st.stop()
with shared.error_in_place():
    if view == CACHE:
        views.cache(choice, scenario)
    else:
        words = side_picker()
        goodput = slo_picker()
        sides = sides_of(given(scenario), *parted(words), source="set-up")
        study = Study(choice, tuple(sides.items()), goodput, stamps=stamps(sides.values()))
        VIEWS[view](study, base_of(scenario, words), flags_of(words))
