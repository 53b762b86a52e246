"""What the page of policies shows: one function a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from app_pages import quick, shared
from llmsim import charts_groups, charts_policies, compare_rates
from llmsim.choice import TraceChoice
from llmsim.command_line import argv_of
from llmsim.compare_study import AT_ONCE, FEWEST, Compared, Study, by_rate, compared, quick_requests
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
    "carried_rate": ("carries up to (per s)", "%.3g"),
    "highest_goodput": ("highest goodput (req/s)", "%.2f"),
    "evicted_blocks": ("evicted (blocks)", "%d"),
    "evicted_tokens": ("evicted (tokens)", "%d"),
}


def table(frame: Any, key: str) -> None:
    sides = dict.fromkeys(frame["side"]) if "side" in frame.columns else {}
    shared.table(frame, key, COLUMNS, colours=charts_policies.colours_of(list(sides)))


def drawn(drawing: Any, key: str) -> None:
    shared.chart(drawing, key=key)


def whole_or_sample(key: str, function: Any, study: Study, limit: int, *arguments: Any) -> tuple[Any, Study]:
    """What the button found of the whole trace; until it is pressed, and while it runs, the answer of a sample.

    Returns it with what it is of.
    """
    choice: TraceChoice = study.source  # type: ignore[assignment]
    whole = choice.size(study.shortest)
    answer = shared.long_job(key, "Run the whole trace", function, study, *arguments) if whole > limit else None
    if answer is None:
        answer = quick.answer(function, replace(study, limit=limit), *arguments)
    covered = f"All {whole:,}" if answer.requests == whole else f"The first {answer.requests:,} of {whole:,}"
    st.caption(f"{covered} requests.")
    shared.say(choice.notes(study.shortest))
    return answer, replace(study, limit=None if answer.requests == whole else answer.requests)


# ---- differences ----------------------------------------------------------------------------------------------------


def differences(study: Study, base: Scenario, flags: Sequence[str]) -> None:
    seeds = st.slider(
        "Seeds", 1, 8, 1, key="pol_seeds", bind="query-params",
        help="Replays of every side; what differs then holds for other launch times too, and numbers are their means.",
    )  # fmt: skip
    study = replace(study, seeds=seeds)
    limit = max(AT_ONCE // seeds, FEWEST)
    found, study = whole_or_sample("pol_compared", compared, study, limit)
    names = found.names
    _said(found)
    table(found.sides, "pol_sides_table")
    first = shared.plain(names[0])
    st.markdown(f"**Difference to {first}**, request by request, with 95 % intervals; hollow: not told apart from 0")
    drawings: dict[str, Any] = {}
    for place, latency in zip(st.columns(3), LATENCIES, strict=True):
        with place:
            drawing = drawings[f"{latency}_differences"] = charts_policies.differences_chart(
                found.intervals, latency, names
            )
            drawn(drawing, f"pol_differences_{latency}")
    for place, latency in zip(st.columns(3), LATENCIES, strict=True):
        with place:
            target_ms = study.targets.get(latency)
            drawing = drawings[latency] = charts_policies.latency_chart(found.curves, latency, names, target_ms)
            drawn(drawing, f"pol_curves_{latency}")
    with st.expander("Every number and its difference; what the intervals mean"):
        st.code(found.report, language=None, wrap_lines=False)
    frames = {"sides": found.sides, "differences": found.intervals, "curves": found.curves}
    shared.footer("pol_differences", commands=_compare_lines(study, base, flags), frames=frames, drawings=drawings)


def _said(found: Compared) -> None:
    shared.say([*found.assigned, *found.notes, *([found.calm] if found.calm else ())])


def _compare_lines(
    study: Study, base: Scenario, flags: Sequence[str], rates: Sequence[float | None] = (None,)
) -> list[list[str] | None]:
    """One `llmsim compare` for each rate; before them what makes the trace, if it has to be made."""
    choice: TraceChoice = study.source.first(study.limit)  # type: ignore[attr-defined]
    drawn_too = ["--assign-classes", study.classes] if study.classes else []
    drawn_too += ["--seeds", str(study.seeds)] if study.seeds > 1 else []
    lines = []
    for rate in rates:
        options = [*flags, *drawn_too, *(["--rate", repr(rate)] if rate is not None else [])]
        goodput = study.targets or None
        lines.append(argv_of(base, command="compare", trace=choice.shown(), goodput=goodput, options=options))
    return [choice.before(), *lines]


# ---- goodput against rate -------------------------------------------------------------------------------------------


def rates(study: Study, base: Scenario, flags: Sequence[str]) -> None:
    first, second, third, fourth = st.columns(4)
    with first:
        low = st.number_input(
            "Lowest rate (per s)", 0.0, None, None, key="pol_low", bind="query-params", placeholder="found",
            help="Left empty: a fifth of what the first side serves when all requests are there at once.",
        )  # fmt: skip
    with second:
        high = st.number_input(
            "Highest rate (per s)", 0.0, None, None, key="pol_high", bind="query-params", placeholder="found",
            help="Left empty: 1.6 times that.",
        )  # fmt: skip
    with third:
        count = st.slider("Rates", 3, 24, 7, key="pol_rates", bind="query-params")
    with fourth:
        percent = st.slider(
            "Within the SLO must be (%)", 50.0, 100.0, 99.0, 0.5, key="pol_share", bind="query-params", format="%g"
        )
    limit = quick_requests(count * len(study.sides))
    found, study = whole_or_sample("pol_rates_job", by_rate, study, limit, low, high, count)
    names = [name for name, _ in study.sides]
    points = compare_rates.frame(found.points)
    attainment = charts_policies.attainment_chart(points, names, percent / 100, found.unit)
    goodput = charts_policies.goodput_chart(points, names, found.unit)
    left, right = st.columns(2)
    with left:
        drawn(attainment, "pol_attainment")
    with right:
        drawn(goodput, "pol_goodput")
    short = " A short sample flatters high rates: its queues have no time to grow." if found.requests <= limit else ""
    st.caption(f"A hollow point: the queue grew all along, so the number depends on the trace's length.{short}")
    table(compare_rates.carried_frame(found.points, percent / 100), "pol_carried")
    lines = _compare_lines(study, base, flags, found.rates)
    drawings = {"attainment": attainment, "goodput": goodput}
    shared.footer("pol_rates", commands=lines, frames={"rates": points}, drawings=drawings)


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
    found, study = whole_or_sample("pol_fair_job", compared, study, AT_ONCE)
    names = found.names
    _said(found)
    if found.service is None and not found.latencies:
        raise ValueError(f"the trace names no tenant and no class: draw some, e.g. {CLASSES}")
    drawings: dict[str, Any] = {}
    frames: dict[str, Any] = {}
    if found.service is not None:
        drawings |= _service(found)
        frames = {"service": found.service, "fairness": found.fairness}
    for label, frame in found.latencies.items():
        what = {"tenant": "tenant", "slo_class": "class"}[label]
        for place, latency in zip(st.columns(2), ("ttft", "e2el"), strict=True):
            with place:
                drawing = charts_groups.groups_chart(frame, latency, names, what)
                drawings[f"{latency}_by_{what}"] = drawing
                drawn(drawing, f"pol_{label}_{latency}")
        table(found.groups[label], f"pol_{label}_table")
        frames |= {f"latency_by_{what}": frame, what: found.groups[label]}
    shared.footer("pol_fairness", commands=_compare_lines(study, base, flags), frames=frames, drawings=drawings)


def _service(found: Compared) -> dict[str, Any]:
    frame = found.service
    assert frame is not None
    tenants = list(dict.fromkeys(frame["tenant"]))
    st.markdown("**Service received by tenant**; dashed: what it had asked for by then")
    drawings = {}
    for row in range(0, len(found.names), 3):
        for place, side in zip(st.columns(3), found.names[row : row + 3], strict=False):
            with place:
                drawing = drawings[f"service_{side}"] = charts_groups.service_chart(frame, side, tenants)
                drawn(drawing, f"pol_service_{side}")
    table(found.fairness, "pol_fairness_table")
    st.caption(
        "Unfairness: the largest change of the difference in service between two tenants while both had requests "
        "waiting (VTC, OSDI'24); empty: no two ever waited at once."
    )
    return drawings
