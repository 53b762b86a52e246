"""What the page of policies shows: one function a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from app_pages import quick, shared
from llmsim import charts_cache, charts_policies, cli_list, compare_cache, compare_rates
from llmsim.choice import TraceChoice
from llmsim.command_line import argv_of
from llmsim.compare_sides import stamps
from llmsim.compare_study import (
    AT_ONCE,
    TOUCHED,
    ByRate,
    Compared,
    Study,
    by_rate,
    cache_sides,
    compared,
    in_cache,
    quick_requests,
    reused,
)
from llmsim.scenario import Scenario

LATENCIES = ("ttft", "tpot", "e2el")
CLASSES = "tenants:flood=0.8,small=0.2"
COLUMNS = {  # of the tables: key, heading, format
    "side": ("side", None),
    "completed": ("requests answered", "%d"),
    "slo_attainment": ("within SLO", "percent"),
    "request_goodput": ("goodput (req/s)", "%.2f"),
    "p50_ttft_ms": ("P50 TTFT (ms)", "%.1f"),
    "p99_ttft_ms": ("P99 TTFT (ms)", "%.1f"),
    "p50_tpot_ms": ("P50 TPOT (ms)", "%.2f"),
    "p99_tpot_ms": ("P99 TPOT (ms)", "%.2f"),
    "p99_e2el_ms": ("P99 E2EL (ms)", "%.0f"),
    "mean_ttft_ms": ("mean TTFT (ms)", "%.1f"),
    "mean_tpot_ms": ("mean TPOT (ms)", "%.2f"),
    "output_throughput": ("output (tok/s)", "%.0f"),
    "num_preemptions": ("preemptions", "%d"),
    "prefix_cache_hit_rate": ("prompt tokens found", "percent"),
    "group": ("who", None),
    "requests": ("requests", "%d"),
    "turned_away": ("turned away", "%d"),
    "service_share": ("share of service", "percent"),
    "unfairness_tokens": ("unfairness (service tokens)", "%.0f"),
    "carried_rate": ("carries up to (req/s)", "%.3g"),
    "highest_goodput": ("highest goodput (req/s)", "%.2f"),
    "evicted_blocks": ("evicted (blocks)", "%d"),
    "evicted_tokens": ("evicted (tokens)", "%d"),
}


def table(frame: Any, key: str) -> None:
    shown = {
        name: st.column_config.Column(COLUMNS[name][0])
        if COLUMNS[name][1] is None
        else st.column_config.NumberColumn(COLUMNS[name][0], format=COLUMNS[name][1])
        for name in frame.columns
        if name in COLUMNS
    }
    if "side" in frame.columns:
        colours = charts_policies.colours_of(list(dict.fromkeys(frame["side"])))
        frame = frame.style.map(lambda side: f"color: {colours[side]}; font-weight: bold", subset=["side"])
    st.dataframe(frame, hide_index=True, column_config=shown, column_order=list(shown), key=key)


def drawn(drawing: Any, key: str) -> None:
    shared.chart(drawing, alt=drawing.description, key=key)


def whole_or_sample(key: str, function: Any, study: Study, limit: int, *arguments: Any) -> Any:
    """What the button found of the whole trace; until it is pressed, and while it runs, the answer of a sample."""
    sample = replace(study, limit=limit)
    if len(study.source.load()) <= limit:
        answer = quick.answer(function, sample, *arguments)
        st.caption(f"All {answer.requests:,} requests.")
        return answer
    answer = shared.long_job(key, "Run the whole trace", function, study, *arguments)
    if answer is None:
        answer = quick.answer(function, sample, *arguments)
        st.caption(f"The first {answer.requests:,} of {len(study.source.load()):,} requests.")
    return answer


# ---- differences ----------------------------------------------------------------------------------------------------


def differences(study: Study, base: Scenario, flags: Sequence[str]) -> None:
    found: Compared = whole_or_sample("pol_compared", compared, study, AT_ONCE)
    names = found.names
    _said(found)
    table(found.sides, "pol_sides_table")
    st.markdown(f"**Difference to {names[0]}**, request by request, with 95 % intervals; hollow: not told apart from 0")
    targets = study.targets
    for place, latency in zip(st.columns(3), LATENCIES, strict=True):
        with place:
            drawn(charts_policies.differences_chart(found.intervals, latency, names), f"pol_differences_{latency}")
    for place, latency in zip(st.columns(3), LATENCIES, strict=True):
        with place:
            drawing = charts_policies.latency_chart(found.curves, latency, names, targets.get(latency))
            drawn(drawing, f"pol_curves_{latency}")
    with st.expander("What each number differs by, and what the intervals mean"):
        st.code(found.report, language=None, wrap_lines=False)
    shared.downloads("pol_differences", found.intervals, name="differences")
    shared.command_line(_compare_line(study, base, flags))


def _said(found: Compared) -> None:
    lines = [*found.assigned, *found.notes, *([found.calm] if found.calm else ())]
    if lines:
        st.caption("  \n".join(f":material/info: {line}." for line in lines))


def _compare_line(study: Study, base: Scenario, flags: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    options = [*flags, *more, *(["--assign-classes", study.classes] if study.classes else [])]
    source: Any = study.source
    return argv_of(base, command="compare", trace=source.command_line(), goodput=study.targets or None, options=options)


# ---- goodput against rate -------------------------------------------------------------------------------------------


def rates(study: Study, base: Scenario, flags: Sequence[str]) -> None:
    first, second, third, fourth = st.columns(4)
    with first:
        low = st.number_input(
            "Lowest rate (req/s)", 0.0, None, None, key="pol_low", bind="query-params", placeholder="found",
            help="Left empty: a fifth of what the first side serves when all requests are there at once.",
        )  # fmt: skip
    with second:
        high = st.number_input(
            "Highest rate (req/s)", 0.0, None, None, key="pol_high", bind="query-params", placeholder="found",
            help="Left empty: 1.6 times that.",
        )  # fmt: skip
    with third:
        count = st.slider("Rates", 3, 24, 9, key="pol_rates", bind="query-params")
    with fourth:
        percent = st.slider(
            "Within the SLO must be (%)", 50.0, 100.0, 99.0, 0.5, key="pol_share", bind="query-params", format="%g"
        )
    limit = quick_requests(count * len(study.sides))
    found: ByRate = whole_or_sample("pol_rates_job", by_rate, study, limit, low, high, count)
    names = [name for name, _ in study.sides]
    points = compare_rates.frame(found.points)
    left, right = st.columns(2)
    with left:
        drawn(charts_policies.attainment_chart(points, names, percent / 100), "pol_attainment")
    with right:
        drawn(charts_policies.goodput_chart(points, names), "pol_goodput")
    st.caption("A hollow point: the queue grew all along, so the number depends on the trace's length.")
    table(compare_rates.carried_frame(found.points, percent / 100), "pol_carried")
    shared.downloads("pol_rates_files", points, name="goodput-by-rate")
    shared.command_line(*(_compare_line(study, base, flags, ["--rate", repr(rate)]) for rate in found.rates))


# ---- fairness -------------------------------------------------------------------------------------------------------


def fairness(study: Study, base: Scenario, flags: Sequence[str]) -> None:
    classes = st.text_input(
        "Draw classes and tenants",
        CLASSES,
        key="pol_classes",
        bind="query-params",
        help="For a trace that names none: interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:4. Empty: "
        "the trace's own.",
    )
    study = replace(study, classes=classes)
    found: Compared = whole_or_sample("pol_fair_job", compared, study, AT_ONCE)
    names = found.names
    _said(found)
    if found.service is None and not found.latencies:
        raise ValueError(f"the trace names no tenant and no class: draw some, e.g. {CLASSES}")
    if found.service is not None and found.fairness is not None:
        _service(found)
    for label, frame in found.latencies.items():
        what = {"tenant": "tenant", "slo_class": "class"}[label]
        for place, latency in zip(st.columns(2), ("ttft", "e2el"), strict=True):
            with place:
                drawn(charts_policies.groups_chart(frame, latency, names, what), f"pol_{label}_{latency}")
        table(found.groups[label], f"pol_{label}_table")
        shared.downloads(f"pol_{label}_files", frame, name=f"latency-by-{what}")
    shared.command_line(_compare_line(study, base, flags))


def _service(found: Compared) -> None:
    frame = found.service
    assert frame is not None
    tenants = list(dict.fromkeys(frame["tenant"]))
    st.markdown("**Service received by tenant**; dashed: what it had asked for by then")
    for row in range(0, len(found.names), 3):
        for place, side in zip(st.columns(3), found.names[row : row + 3], strict=False):
            with place:
                drawn(charts_policies.service_chart(frame, side, tenants), f"pol_service_{side}")
    table(found.fairness, "pol_fairness")
    st.caption(
        "Unfairness: the largest change of the difference in service between two tenants while both had requests "
        "waiting (VTC, OSDI'24); empty: no two ever waited at once."
    )
    shared.downloads("pol_service_files", frame, name="service-by-tenant")


# ---- KV cache -------------------------------------------------------------------------------------------------------


def cache(choice: TraceChoice, scenario: Scenario) -> None:
    evictions = st.multiselect(
        "Eviction policies",
        [row["name"] for row in cli_list.evictions()],
        ["lru", "lfu", "belady"],
        key="pol_evictions",
        bind="query-params",
        accept_new_options=True,
        help="Which cached content goes when blocks are needed. Type your own: file.py:Class.",
    )
    with shared.error_in_place():
        _reuse(choice, scenario, evictions)
    st.divider()
    with shared.error_in_place():
        _replayed(choice, scenario, evictions)


def _reuse(choice: TraceChoice, scenario: Scenario, evictions: list[str]) -> None:
    sizes = st.slider("Sizes of cache", 3, 16, 6, key="pol_sizes", bind="query-params")
    asked = (choice, tuple(evictions), sizes, scenario.model, scenario.kv_dtype)
    found = quick.answer(reused, *asked, None, TOUCHED)
    whole = len(choice.load())
    if found.requests < whole:
        more = shared.long_job("pol_reuse_job", "Look at the whole trace", reused, *asked)
        found = more or found
    st.caption(f"{found.requests:,} of {whole:,} requests, one at a time; blocks of {found.block_tokens} tokens.")
    drawing = charts_cache.hit_ratio_chart(found.points, found.unlimited)
    drawn(drawing, "pol_hit_ratio")
    shared.downloads("pol_reuse_files", found.points, name="hit-ratio", drawing=drawing)
    tried = sorted({int(blocks) for blocks in found.points["cache_blocks"]})
    line = ["llmsim", "trace", "reuse", *choice.command_line(), "--cache-blocks", ",".join(map(str, tried))]
    shared.command_line(
        [*line, *(word for name in evictions for word in ("--eviction", name)), "--model", scenario.model]
    )


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
    limit = quick_requests(len(sides))
    uses = None
    if len(choice.load()) > limit:
        uses = shared.long_job("pol_cache_job", "Replay the whole trace", in_cache, study)
    uses = uses or quick.answer(in_cache, replace(study, limit=limit))
    names = [name for name, _ in sides]
    found, moved = compare_cache.found_frame(uses), compare_cache.moved_frame(uses)
    one, two = st.columns(2)
    with one:
        drawn(charts_cache.found_chart(found, names), "pol_found")
    with two:
        if len(moved):
            drawn(charts_cache.moved_chart(moved), "pol_moved")
        else:
            st.caption("No tiers: nothing is moved.")
    table(compare_cache.cache_frame(uses), "pol_cache_table")
    shared.downloads("pol_cache_files", found, name="prompt-tokens-found")
    shared.command_line(*(argv_of(side, trace=choice.command_line()) for _, side in sides))
