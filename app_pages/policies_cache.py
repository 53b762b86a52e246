"""What the page of policies shows of the KV cache."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from app_pages import quick, shared
from app_pages.policies_views import drawn, table
from llmsim import charts_cache, cli_list, compare_cache
from llmsim.choice import TraceChoice
from llmsim.command_line import argv_of
from llmsim.compare_sides import stamps
from llmsim.compare_study import TOUCHED, Study, cache_sides, in_cache, quick_requests, reused
from llmsim.scenario import Scenario


def cache(choice: TraceChoice, scenario: Scenario) -> None:
    evictions = st.multiselect(
        "Eviction policies",
        [row["name"] for row in cli_list.evictions()],
        ["lru", "lfu", "belady"],
        key="pol_evictions",
        bind="query-params",
        accept_new_options=True,
        select_all=False,
        help="Which cached content goes when blocks are needed. Type your own: file.py:Class.",
    )
    shared.within("number of eviction policies", len(evictions), 12, "llmsim trace reuse takes any")
    shared.ask_for_files(evictions)
    with shared.error_in_place():
        _reuse(choice, scenario, evictions)
    st.divider()
    with shared.error_in_place():
        _replayed(choice, scenario, evictions)


def _reuse(choice: TraceChoice, scenario: Scenario, evictions: list[str]) -> None:
    sizes = st.slider("Sizes of cache", 3, 16, 6, key="pol_sizes", bind="query-params")
    asked = (choice, tuple(evictions), sizes, scenario.model, scenario.kv_dtype)
    found = quick.answer(reused, *asked, None, TOUCHED)
    whole = choice.size()
    if found.requests < whole:
        more = shared.long_job("pol_reuse_job", "Look at the whole trace", reused, *asked)
        found = more or found
    st.caption(f"{found.requests:,} of {whole:,} requests, one at a time; blocks of {found.block_tokens} tokens.")
    drawing = charts_cache.hit_ratio_chart(found.points, found.unlimited)
    drawn(drawing, "pol_hit_ratio")
    tried = sorted({int(blocks) for blocks in found.points["cache_blocks"]})
    used = choice.first(found.requests if found.requests < whole else None)
    line = ["llmsim", "trace", "reuse", *used.shown(), "--cache-blocks", ",".join(map(str, tried))]
    line += [*(word for name in evictions for word in ("--eviction", name)), "--model", scenario.model]
    commands = [used.before(), line]
    shared.footer("pol_reuse", commands=commands, frames={"hits": found.points}, drawings={"hits": drawing})


def _replayed(choice: TraceChoice, scenario: Scenario, evictions: list[str]) -> None:
    st.markdown("**Replayed**: the same policies in the engine's cache, and KV tiers below it")
    left, right = st.columns([1, 3])
    with left:
        blocks = st.number_input(
            "KV blocks of a replica", 2, None, None, key="pol_blocks", bind="query-params", placeholder="what fits",
            help="Left empty: what fits the GPU's memory. Fewer show what eviction costs.",
        )  # fmt: skip
    with right:
        tiers = st.text_input(
            "KV tiers", "cpu:16GiB:50GB/s:10us", key="pol_tiers", bind="query-params",
            help="name:capacity:bandwidth:latency, fastest first, separated by commas, e.g. "
            "cpu:64GiB:50GB/s:10us,ssd:1TiB:5GB/s:100us. Empty: none.",
        )  # fmt: skip
    sides = cache_sides(scenario, evictions, tiers, blocks)
    study = Study(choice, sides, stamps=stamps(side for _, side in sides))
    limit = quick_requests(2 * len(sides))
    uses = None
    whole = choice.size(study.shortest)
    if whole > limit:
        uses = shared.long_job("pol_cache_job", "Replay the whole trace", in_cache, study)
    used = choice.first(limit if uses is None and whole > limit else None)
    covered = "All" if used == choice else f"The first {limit:,} of"
    st.caption(f"{covered} {whole:,} requests.")
    shared.say(choice.notes(study.shortest))
    uses = uses or quick.answer(in_cache, replace(study, limit=limit))
    names = [name for name, _ in sides]
    found, moved = compare_cache.found_frame(uses), compare_cache.moved_frame(uses)
    drawings = {"found": charts_cache.found_chart(found, names)}
    if len(moved):
        drawings["moved"] = charts_cache.moved_chart(moved)
    for place, (name, drawing) in zip(st.columns(2), drawings.items(), strict=False):
        with place:
            drawn(drawing, f"pol_{name}")
    numbers = compare_cache.cache_frame(uses)
    table(numbers, "pol_cache_table")
    commands = [used.before(), *(argv_of(side, trace=used.shown()) for _, side in sides)]
    frames = {"found": found, "moved": moved, "cache": numbers}
    shared.footer("pol_cache", commands=commands, frames=frames, drawings=drawings)
