"""What if: two set-ups answer the same requests, side by side."""

from pathlib import Path

import streamlit as st

from app_pages import shared
from app_pages.promises import promises
from llmsim import views
from llmsim.charts_run import ecdf_chart, strip_panels, where_panels
from llmsim.command_line import argv_of
from llmsim.runs import with_goodput

HEADLINES = (
    "p99_ttft_ms", "p99_tpot_ms", "slo_attainment", "output_throughput", "cost_per_1m_output_tokens",
)  # fmt: skip


def show(folders: dict[str, Path], commands: list[list[str] | None], slo: dict[str, float]) -> None:
    runs = {label: with_goodput(shared.read(folder, shared.REQUESTS), slo) for label, folder in folders.items()}
    numbers = views.kpis(*runs.values())
    shared.kpi_row([number for number in numbers if number.key in HEADLINES])
    shared.warn_of_rejections(runs)
    for label, run in runs.items():
        if run.summary["stable"] is False:
            st.warning(
                shared.plain(run.summary["stability"]),
                title=f"The {label} does not keep up",
                icon=":material/trending_up:",
            )

    limits_ms = {"ttft": slo["ttft"], "tpot": slo["tpot"], "e2el": None}
    for place, (metric, limit_ms) in zip(st.columns(3), limits_ms.items(), strict=True):
        with place:
            frame = shared.cached_frame(views.ecdf, folders, tables=shared.REQUESTS, metric=metric)
            alt = f"Cumulative distribution of {metric.upper()}, baseline and candidate"
            shared.chart(ecdf_chart(frame, limit_ms), alt=alt, key=f"what_if_ecdf_{metric}")
    left, right = st.columns([3, 2])
    with right:  # before the strip, which needs the iterations, too
        where = shared.cached_frame(views.where, folders, tables=shared.REQUESTS)
        said = "Mean end-to-end latency split into queue, prefill, decode and preempted, for both set-ups"
        shared.chart(where_panels(where), alt=said, key="what_if_where")
        table = shared.kpi_table(numbers)
    with left:
        strip = shared.cached_frame(views.strip, folders)
        said = "Running and waiting requests, KV cache in use, tokens per second and TTFT over simulated time"
        shared.chart(strip_panels(strip), alt=said, key="what_if_strip")
    shared.footer(
        "what_if",
        commands=commands,
        frames={"numbers": table, "strip": strip, "where": where},
    )


folders, commands = None, []
with st.sidebar:
    given = shared.runs_picker("shown")
    choice = baseline = candidate = None
    if given is None:
        with shared.error_in_place():
            choice = shared.trace_picker()
        candidate_tab, baseline_tab = st.tabs(["Candidate", "Baseline"])
        with baseline_tab:
            baseline = shared.scenario_picker("base")
        with candidate_tab:
            candidate = shared.scenario_picker("cand", follows="base")
    slo = dict(promises())

shared.page_header("What if", "Two set-ups answer the same requests. Drag a setting and see what it would change.")
with shared.error_in_place(*(given or {}).values()):
    if given is not None:
        folders, commands = (
            given,
            [shared.read(folder, shared.REQUESTS).manifest.get("command") for folder in given.values()],
        )
    elif choice is not None and baseline is not None and candidate is not None:
        pair = {"baseline": baseline, "candidate": candidate}
        folders, used = shared.answers("what_if", choice, pair)
        commands = [used.before(), *(argv_of(one, trace=used.shown(), goodput=slo) for one in pair.values())]
if folders is None:
    st.info("The answer appears here once the settings at the left are complete.", icon=":material/arrow_back:")
    shared.end_page()
with shared.error_in_place(*(given or {}).values()):
    if given is not None:
        shared.say(
            note for folder in given.values() for note in shared.read(folder, shared.REQUESTS).manifest.get("notes", ())
        )
    show(folders, commands, slo)
