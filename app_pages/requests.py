"""Requests: every request as a dot, the phases of the slowest or of those in a rectangle, the life of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import streamlit as st

from app_pages import shared
from llmsim import views, views_life
from llmsim.charts_run import ecdf_chart, gantt_chart, life_chart, scatter_chart
from llmsim.choice import TraceChoice
from llmsim.command_line import argv_of
from llmsim.scenario import Scenario
from llmsim.timeline import timeline_bytes

LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "end-to-end latency"}
WHAT_IF = {"candidate": "What if: the candidate", "baseline": "What if: the baseline"}
MOST_STAYS = 30  # of a request that is preempted again and again
DOTS = 8000  # more overlap each other, and a browser needs a second longer for 20,000
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


@dataclass(frozen=True)
class Chosen:
    """A run, the commands that make it, and what it replayed if this page knows better than its manifest."""

    folder: Path
    commands: Sequence[Sequence[str] | None]
    choice: TraceChoice | None = None
    scenario: Scenario | None = None

    def explain(self, request: int) -> list[str]:
        """The command that explains one request."""
        if self.choice is None or self.scenario is None:
            return ["llmsim", "explain", str(self.folder), "--request", str(request)]
        options = ("--request", str(request))
        return argv_of(self.scenario, command="explain", trace=self.choice.shown(), options=options)


def chosen_run() -> Chosen | None:
    """The run that the reader picked; None until there is one."""
    runs = shared.given_runs()
    options = [*runs, *WHAT_IF]
    name = st.selectbox(
        "Run", options, format_func=lambda option: WHAT_IF.get(option, option), key="requests_run", bind="query-params"
    )
    if name in runs:
        command = shared.read(runs[name], shared.REQUESTS).manifest.get("command")
        return Chosen(runs[name], [command])
    choice = shared.trace_picker()
    candidate_tab, baseline_tab = st.tabs(["Candidate", "Baseline"])
    with baseline_tab:
        baseline = shared.scenario_picker("base")
    with candidate_tab:
        candidate = shared.scenario_picker("cand", follows="base")
    scenario = baseline if name == "baseline" else candidate
    if choice is None or scenario is None:
        return None
    folders, used = shared.answers("requests", choice, {name: scenario})
    return Chosen(folders[name], [used.before(), argv_of(scenario, trace=used.shown())], used, scenario)


def brushed(folder: Path, measure: str) -> dict[str, Sequence[float]] | None:
    """The dots; what the rectangle over them spans, None without one."""
    frame = shared.cached_frame(views.scatter, {"run": folder}, tables=shared.REQUESTS, y=measure, points=DOTS)
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


@st.cache_data(max_entries=64, show_spinner="replaying with an observer …")
def explained_once(folder: Path, request: int, choice: TraceChoice | None, scenario: Scenario | None) -> pd.DataFrame:
    return views_life.explained(folder, request, choice, scenario)


def life_of(chosen: Chosen, request: int) -> pd.DataFrame:
    """Why it waited, by a replay with an observer; until there is one, or if none can be: what the columns tell."""
    run = shared.read(chosen.folder, shared.REQUESTS)
    columns = views.life(run, request)
    shared.ask_for_files(run.manifest.get("scenario", {}))
    arguments = (chosen.folder, request, chosen.choice, chosen.scenario)
    if len(run.requests["id"]) > views_life.AT_ONCE:
        found = shared.long_job(
            "requests_explain", "Replay the run to explain this request", views_life.explained, *arguments
        )
        return columns if found is None else found
    try:
        return explained_once(*arguments)
    except ValueError as error:
        st.caption(f"What the run's columns tell; no more, since {shared.plain(error)}")
        return columns


def show_life(chosen: Chosen, slowest: int) -> int:
    """One request, by its number or the slowest one; which it was."""
    most = int(shared.read(chosen.folder, shared.REQUESTS).requests["id"].max())
    number = st.number_input(
        "Request", 0, most, None, placeholder=f"{slowest}, the slowest",
        key="requests_id", bind="query-params", help="A click on a bar or on a row of the table chooses one.",
    )  # fmt: skip
    request = slowest if number is None else int(number)
    with shared.error_in_place():
        frame = life_of(chosen, request)
        shared.chart(life_chart(frame), key="requests_life")
        stays = [
            {"from (s)": f"{begin_s:,.3f}", "ms": f"{duration_ms:,.1f}", "what": shared.plain(reason)}
            for begin_s, duration_ms, reason in frame[["begin_s", "duration_ms", "reason"]].to_numpy()
        ]
        st.table(stays[:MOST_STAYS], hide_index=True, alt=f"What request {frame['id'].iloc[0]} did, and why it waited")
        if len(stays) > MOST_STAYS:
            st.caption(f"{len(stays) - MOST_STAYS} more stays: see llmsim explain --json.")
    return request


def show_table(frame: pd.DataFrame) -> None:
    """The requests as rows; a click on one shows its life."""
    st.caption(shared.plain("; ".join(frame.attrs["notes"])) or f"{len(frame):,} requests")
    config = {
        name: st.column_config.NumberColumn(title, format=form) for name, (title, form) in COLUMNS.items()
    }  # fmt: skip
    key, ids = "requests_table", frame["id"].tolist()
    st.dataframe(
        frame, hide_index=True, column_config=config, key=key, selection_mode="single-row", height=360,
        on_select=lambda: row_picked(key, ids),
    )  # fmt: skip


def show(chosen: Chosen, measure: str, rows: int) -> None:
    folder = chosen.folder
    run = shared.read(folder, shared.REQUESTS)
    if chosen.choice is None:
        shared.say(run.manifest.get("notes", ()))
    shared.warn_of_rejections({"run": run})
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
        if some:
            curves = views.ecdf({"all requests": run, "in the rectangle": views.subset(run, ids)}, measure)
        else:
            curves = shared.cached_frame(views.ecdf, {"all requests": folder}, tables=shared.REQUESTS, metric=measure)
        shared.chart(ecdf_chart(curves), key="requests_ecdf")

    gantt = views.gantt(run, ids, worst=measure, rows=rows)
    if not len(gantt):
        st.warning("None of these requests was answered: there is nothing to show of them.", icon=":material/block:")
        return
    drawing = gantt_chart(gantt)
    table = views.table(run, ids, by=measure, rows=MOST_ROWS)
    left, right = st.columns([3, 2])
    with left:
        shared.chart(drawing, key="requests_gantt", on_select=lambda: picked("requests_gantt"))
    with right:
        request = show_life(chosen, int(table["id"].iloc[0]))
    show_table(table)
    left, right = st.columns([4, 1])
    with left:
        shared.command_line(*chosen.commands, chosen.explain(request))
    with right:
        shared.downloads(
            "requests",
            lambda: views.table(run, ids, by=measure, rows=None),
            name="requests",
            drawing=drawing,
            more={"perfetto.json.gz": lambda: timeline_bytes(shared.read(folder), views.window_s(run, ids))},
        )


shared.page_header("Requests", "Single requests: how long each waited, and for what.")
chosen = None
with st.sidebar, shared.error_in_place(*shared.given_runs().values()):
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
    shared.end_page()

given = () if chosen.choice is not None else (chosen.folder,)
with shared.error_in_place(*given):
    show(chosen, measure, rows)
