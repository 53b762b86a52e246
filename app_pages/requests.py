"""Requests: every request as a dot, the phases of the slowest or of those in a rectangle, the life of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import streamlit as st

from app_pages import shared
from llmsim import views
from llmsim.charts_run import ecdf_chart, gantt_chart, life_chart, scatter_chart
from llmsim.command_line import argv_of
from llmsim.runs import Run
from llmsim.timeline import timeline_bytes

LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "end-to-end latency"}
WHAT_IF = {"candidate": "What if: the candidate", "baseline": "What if: the baseline"}
MOST_ROWS = 2000  # of the table that the browser is sent
COLUMNS = {  # of the table: column of views.table, what it is called, format
    "id": ("request", "%d"),
    "arrival_s": ("sent at (s)", "%.3f"),
    "prompt_tokens": ("prompt (tokens)", "localized"),
    "output_tokens": ("output (tokens)", "localized"),
    "ttft_ms": ("TTFT (ms)", "%.1f"),
    "tpot_ms": ("TPOT (ms)", "%.2f"),
    "e2el_ms": ("E2EL (ms)", "%.1f"),
    "queue_ms": ("queue (ms)", "%.1f"),
    "prefill_ms": ("prefill (ms)", "%.1f"),
    "decode_ms": ("decode (ms)", "%.1f"),
    "preempted_ms": ("preempted (ms)", "%.1f"),
    "cached_tokens": ("from the cache (tokens)", "localized"),
    "preemptions": ("preemptions", "%d"),
    "replica": ("replica", "%d"),
}
Commands = list[Sequence[str] | None]


def given() -> dict[str, Path]:
    """The runs that the dashboard was started with, by what tells them apart."""
    folders = shared.given_runs()
    names = [folder.name for folder in folders]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, folders, strict=True)}


def chosen_run() -> tuple[Path, Commands] | None:
    """The folder of the run that the reader picked, and the commands that make it; None until there is one."""
    runs = given()
    options = [*runs, *WHAT_IF]
    name = st.selectbox(
        "Run", options, format_func=lambda option: WHAT_IF.get(option, option), key="requests_run", bind="query-params"
    )
    if name in runs:
        command = shared.read(runs[name]).manifest.get("command")
        return runs[name], [command] if command else []
    choice = shared.trace_picker()
    candidate_tab, baseline_tab = st.tabs(["Candidate", "Baseline"])
    with baseline_tab:
        baseline = shared.scenario_picker("base")
    with candidate_tab:
        candidate = shared.scenario_picker("cand", follows="base")
    scenario = baseline if name == "baseline" else candidate
    if choice is None or scenario is None:
        return None
    folder = shared.answers("requests", choice, {name: scenario})[name]
    return folder, [choice.before(), argv_of(scenario, trace=choice.shown())]


def brushed(folder: Path, measure: str) -> dict[str, Sequence[float]] | None:
    """The dots; what the rectangle over them spans, None without one."""
    frame = shared.cached_frame(views.scatter, {"run": folder}, y=measure)
    key = f"requests_dots_{folder.name}_{measure}"  # another run or measure: no rectangle
    event = shared.chart(scatter_chart(frame), key=key, on_select="rerun")
    span = event.selection.get("brush", {})
    return {"arrival_s": span["x"], measure: span["y"]} if span.get("x") and span.get("y") else None


def picked(key: str) -> None:
    """A click in the Gantt chart: show that request's life."""
    chosen = st.session_state[key].selection.get("request", [])
    if chosen:
        st.session_state["requests_id"] = int(chosen[0]["id"])


def row_picked(key: str, ids: Sequence[int]) -> None:
    rows = st.session_state[key].selection.rows
    if rows:
        st.session_state["requests_id"] = int(ids[rows[0]])


def show_life(run: Run, slowest: int) -> None:
    """One request, by its number or the slowest one."""
    number = st.number_input(
        "Request", 0, int(run.requests["id"].max()), None, placeholder=f"{slowest}, the slowest",
        key="requests_id", bind="query-params", help="A click on a bar or on a row of the table chooses one.",
    )  # fmt: skip
    with shared.error_in_place():
        frame = views.life(run, slowest if number is None else int(number))
        shared.chart(life_chart(frame), key="requests_life")
        for phase, duration_ms, reason in zip(frame["phase"], frame["duration_ms"], frame["reason"], strict=True):
            st.markdown(f"**{phase.capitalize()}**, {duration_ms:,.1f} ms: {reason}")


def show_table(frame: pd.DataFrame) -> None:
    """The requests as rows; a click on one shows its life."""
    st.caption("; ".join(frame.attrs["notes"]) or f"{len(frame):,} requests")
    config = {
        name: st.column_config.NumberColumn(title, format=form) for name, (title, form) in COLUMNS.items()
    }  # fmt: skip
    key, ids = "requests_table", frame["id"].tolist()
    st.dataframe(
        frame, hide_index=True, column_config=config, key=key, selection_mode="single-row", height=360,
        on_select=lambda: row_picked(key, ids),
    )  # fmt: skip


shared.page_header("Requests", "Single requests: how long each waited, and for what.")
chosen = None
with st.sidebar, shared.error_in_place():
    chosen = chosen_run()
    measure = st.segmented_control(
        "Latency",
        list(LATENCIES),
        format_func=str.upper,
        default="ttft",
        required=True,
        key="requests_measure",
        bind="query-params",
    )
    rows = st.slider("Requests in the Gantt chart", 10, 500, 40, 10, key="requests_rows", bind="query-params")
if chosen is None:
    st.info("Requests appear here once the settings at the left are complete.", icon=":material/arrow_back:")
    st.stop()

folder, commands = chosen
run = shared.read(folder)
left, right = st.columns([3, 2])
with left:
    bounds = brushed(folder, measure)
    ids = views.within(run, bounds or {})
    some = bounds is not None and len(ids) > 0
    if not some:
        ids = run.requests["id"]
    st.caption(
        f"{len(ids):,} of {len(run.requests['id']):,} requests are in the rectangle."
        if some
        else "Draw a rectangle over the dots: everything below and beside is then about the requests in it."
    )
with right:
    sides = {"all requests": run} | ({"in the rectangle": views.subset(run, ids)} if some else {})
    shared.chart(ecdf_chart(views.ecdf(sides, measure)), key="requests_ecdf")

gantt = views.gantt(run, ids, worst=measure, rows=rows)
if not len(gantt):
    st.warning("None of these requests was answered: there is nothing to show of them.", icon=":material/block:")
    st.stop()
drawing = gantt_chart(gantt)
table = views.table(run, ids, by=measure, rows=MOST_ROWS)
left, right = st.columns([3, 2])
with left:
    shared.chart(drawing, key="requests_gantt", on_select=lambda: picked("requests_gantt"))
with right:
    show_life(run, int(table["id"].iloc[0]))
show_table(table)
left, right = st.columns([4, 1])
with left:
    shared.command_line(*(command for command in commands if command))
with right:
    shared.downloads(
        "requests",
        lambda: views.table(run, ids, by=measure, rows=None),
        name="requests",
        drawing=drawing,
        more={"perfetto.json.gz": lambda: timeline_bytes(run, views.window_s(run, ids))},
    )
