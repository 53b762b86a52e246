"""Simulating for a page: at once on a sample, whole on a button, in a process of its own; results on disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from app_pages.shared_files import ask_for_files
from app_pages.shared_output import say, show_error
from app_pages.shared_words import plain
from llmsim.choice import Replay, TraceChoice, replay, replay_all
from llmsim.command_line import argv_of
from llmsim.compare_sides import stamps
from llmsim.jobs import Job
from llmsim.jobs_store import Store, remove_stale
from llmsim.runs import TABLES, Run
from llmsim.scenario import Scenario

GIVEN = "the runs given"
REQUESTS = ("requests",)  # of a run's tables: enough for what is about single requests
EVERY_S = 0.5  # between two looks at a job


@st.cache_resource(show_spinner=False, on_release=Store.close)
def store() -> Store:
    """The server's own; removed when it ends."""
    import atexit

    remove_stale()
    made = Store()
    atexit.register(made.close)
    return made


def read(folder: Path, tables: Collection[str] = TABLES) -> Run:
    """A run folder, remembered for all sessions; `tables`: those that are needed, since a long run's take a while."""
    return store().read(folder, tables)


def given_runs() -> dict[str, Path]:
    """The run folders that `llmsim dashboard RUN…` was started with, by name; by path where two are called the same."""
    folders = [Path(folder) for folder in json.loads(os.environ.get("LLMSIM_DASHBOARD_RUNS", "[]"))]
    names = [folder.name for folder in folders]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, folders, strict=True)}


def runs_picker(key: str) -> dict[str, Path] | None:
    """One or two of the runs that the dashboard was opened on; None if there are none or a simulation is asked for."""
    runs = given_runs()
    if not runs:
        return None
    shown = st.segmented_control(
        "Show", [GIVEN, "a simulation"], default=GIVEN, required=True, key=key, bind="query-params", width="stretch"
    )
    if shown != GIVEN:
        return None
    names = list(runs)
    baseline = st.selectbox("Baseline", names, key=f"{key}_baseline", bind="query-params")
    if len(names) == 1:
        return {"baseline": runs[baseline]}
    candidate = st.selectbox("Candidate", names, 1, key=f"{key}_candidate", bind="query-params")
    return {"baseline": runs[baseline], "candidate": runs[candidate]}


def quick_run(choice: TraceChoice, scenario: Scenario, sample: int | None = None) -> Path:
    """The run folder of the first `sample` requests: at most 20,000, fewer where answers are long.

    Raises the library's errors.
    """
    return _ensure(choice, scenario, sample or choice.quick(scenario))


def _ensure(choice: TraceChoice, scenario: Scenario, limit: int | None) -> Path:
    key = key_of(choice, scenario, limit)
    if store().has(key):
        store().used(key)
        return store().runs / key
    with store().making(key) as folder:
        return replay(Replay(choice, scenario, folder, tuple(_command(choice, scenario)), limit))


def answers(key: str, choice: TraceChoice, scenarios: Mapping[str, Scenario]) -> tuple[dict[str, Path], TraceChoice]:
    """A quick answer now; the whole trace where that is more, on a button, with progress and Stop.

    Returns the run folders and what they are of: the requests chosen, or the first of them.
    """
    sizes = [choice.size(scenario) for scenario in scenarios.values()]  # a model's context may leave some out
    sample = min(choice.quick(scenario) for scenario in scenarios.values())
    every = " and ".join(f"{size:,}" for size in dict.fromkeys(sizes))
    partly = sample < max(sizes)
    whole = full_runs(key, choice, scenarios) if partly else None
    if whole is not None:
        st.caption(f"On all {every} requests.")
    else:
        st.caption(f"Quick answer on {f'the first {sample:,} of' if partly else 'all'} {every} requests.")
    say(note for scenario in scenarios.values() for note in choice.notes(scenario))
    if whole is not None:
        return whole, choice
    used = choice.first(sample if partly else None)
    return {label: _ensure(choice, scenario, sample) for label, scenario in scenarios.items()}, used


def key_of(choice: TraceChoice, scenario: Scenario, limit: int | None) -> str:
    text = json.dumps([choice.facts(), scenario.to_dict(), limit, stamps([scenario])], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _command(choice: TraceChoice, scenario: Scenario) -> Sequence[str]:
    return argv_of(scenario, trace=choice.shown())


def full_run(key: str, choice: TraceChoice, scenario: Scenario) -> Path | None:
    """A button, then progress with a working Stop, then the run folder of the whole trace."""
    done = full_runs(key, choice, {"run": scenario})
    return None if done is None else done["run"]


def full_runs(key: str, choice: TraceChoice, scenarios: Mapping[str, Scenario]) -> dict[str, Path] | None:
    """The same for several scenarios on one trace, one after the other."""
    folders = [store().runs / key_of(choice, scenario, None) for scenario in scenarios.values()]
    if not all(store().has(folder.name) for folder in folders):
        todo = [
            Replay(choice, scenario, folder, tuple(_command(choice, scenario)))
            for scenario, folder in zip(scenarios.values(), folders, strict=True)
        ]
        long_job(key, "Run the whole trace", replay_all, todo)
    if not all(store().has(folder.name) for folder in folders):
        return None
    for folder in folders:
        store().used(folder.name)
    return dict(zip(scenarios, folders, strict=True))


@dataclass
class Asked:
    """A job of one session, and the arguments it was started with."""

    digest: str
    job: Job | None = None
    error: str = ""


def _end_all(asked: dict[str, Asked]) -> None:
    for one in asked.values():
        if one.job is not None:
            store().jobs.forget(one.job)


@st.cache_resource(scope="session", show_spinner=False, on_release=_end_all)
def _asked() -> dict[str, Asked]:
    """This session's jobs by key; they end with it."""
    return {}


def long_job(key: str, label: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A button that runs `function(*arguments, progress=…)` of llmsim in a worker process; its result, or None.

    While it runs: progress and a Stop that kills it. A result is shown for as long as the arguments are the same.
    """
    ask_for_files(arguments)
    digest = hashlib.sha256(pickle.dumps((function, arguments))).hexdigest()
    asked = _asked().get(key, Asked(digest))
    if asked.job is not None and asked.job.state == "running":
        st.fragment(run_every=EVERY_S)(_watch)(key, asked)
        return None
    if asked.job is not None and asked.job.state == "done" and asked.digest == digest:
        return asked.job.result()
    _settle(asked)
    if st.button(label, key=f"{key}_start", type="primary", icon=":material/play_arrow:"):
        try:
            _asked()[key] = Asked(digest, store().jobs.start(function, *arguments))
        except ValueError as error:
            show_error(error)
            return None
        st.rerun()
    if asked.error and asked.digest == digest:
        st.error(plain(asked.error), icon=":material/error:")
    return None


def _settle(asked: Asked) -> None:
    """What failed leaves its message, what is over leaves its folder."""
    job, asked.job = asked.job, None
    if job is None:
        return
    if job.state == "failed":
        try:
            job.result()
        except (ValueError, RuntimeError) as error:
            asked.error = str(error)
    store().jobs.forget(job)


def _watch(key: str, asked: Asked) -> None:
    job = asked.job
    if job is None or job.state != "running":
        st.rerun()
    done, total, words = job.progress()
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.progress(done / total if total else 0.0, text=f"{done:,} of {total:,} {plain(words)}" if total else "starting")
    if right.button("Stop", key=f"{key}_stop", icon=":material/stop:", width="stretch"):
        job.stop()
        asked.error = f"stopped after {job.elapsed_s:.0f} s"
        st.rerun()


@st.cache_data(max_entries=64, show_spinner=False)
def _frame(
    _function: Callable[..., pd.DataFrame],
    name: str,
    folders: dict[str, Path],
    options: dict[str, Any],
    _tables: Collection[str],
) -> pd.DataFrame:
    return _function({label: read(folder, _tables) for label, folder in folders.items()}, **options)


def cached_frame(
    function: Callable[..., pd.DataFrame],
    folders: Mapping[str, Path],
    *,
    tables: Collection[str] = TABLES,
    **options: Any,
) -> pd.DataFrame:
    """`function({label: Run}, **options)`, remembered by what the runs are (a run's folder names its content).

    `tables`: those of the runs that the function looks at.
    """
    return _frame(function, f"{function.__module__}.{function.__qualname__}", dict(folders), options, tables)
