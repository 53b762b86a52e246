"""Policies: schedulers, engines and caches on the same requests, side by side."""

import streamlit as st

from app_pages import policies_views as views
from app_pages import shared
from app_pages.policies_cache import cache
from app_pages.promises import promises
from llmsim import cli_list
from llmsim.compare_sides import base_of, flags_of, given, parted, sides_of, stamps
from llmsim.compare_study import Study

CACHE = "KV cache"
VIEWS = {"Differences": views.differences, "Goodput": views.rates, "Fairness": views.fairness}
MOST_SIDES = 12  # that are told apart on a chart
USUAL = ["vllm", "vllm-v0", "vtc", "engine=sglang"]


def side_picker() -> list[str]:
    """Every scheduler and engine of the library, or what is typed."""
    schedulers = [row["name"] for row in cli_list.schedulers()]
    return st.multiselect(
        "Sides",
        schedulers + [f"engine={row['name']}" for row in cli_list.engines()],
        USUAL,
        key="pol_sides",
        bind="query-params",
        accept_new_options=True,
        select_all=False,
        help="The first one is what the others are compared with. Type your own: file.py:Class is a scheduler, "
        "FIELD=VALUE,… changes the first side, e.g. max_num_seqs=64 or scheduler=slo-chunk,scheduler.tpot_ms=40.",
    )


def what_they_are() -> None:
    with st.popover("What they are", icon=":material/menu_book:"):
        st.table(cli_list.schedulers())
        st.table([{"name": f"engine={row['name']}", "about": row["about"]} for row in cli_list.engines()])


with st.sidebar:
    with shared.error_in_place():
        choice = shared.trace_picker()
    scenario = shared.scenario_picker("base")
    goodput = promises()

shared.page_header("Policies", "Who goes first, and what is kept: several policies answer the same requests.")
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
    st.info("The answer appears here once the settings at the left are complete.", icon=":material/arrow_back:")
    shared.end_page()
with shared.error_in_place():
    if view == CACHE:
        cache(choice, scenario)
    else:
        left, right = st.columns([5, 1], vertical_alignment="bottom")
        with left:
            words = side_picker()
        with right:
            what_they_are()
        shared.ask_for_files([pair.split("=")[-1] for word in words for pair in word.split(",")])
        sides = sides_of(given(scenario), *parted(words), source="set-up")
        shared.within("number of sides", len(sides), MOST_SIDES, "llmsim compare takes any")
        shared.check_size(*sides.values())
        study = Study(choice, tuple(sides.items()), goodput, stamps=stamps(sides.values()))
        VIEWS[view](study, base_of(scenario, words), flags_of(words))
