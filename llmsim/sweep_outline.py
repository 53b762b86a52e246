"""What a sweep would do: its runs, which of them can be, which are done, and about how long the rest takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmsim.scenario import Scenario
from llmsim.sweep_files import digests
from llmsim.sweep_parts import parts_of
from llmsim.sweep_spec import Spec, options_of, scenario_of
from llmsim.sweep_store import finished_runs
from llmsim.sweep_work import Traces, in_one_line, run_one

TIMED_RUNS = 3  # spread over the sweep
TIMED_REQUESTS = 500  # of each, the first ones


@dataclass(frozen=True)
class Outlined:
    """A run: its place on the axes, whether its result is there, why it cannot be (None: nothing speaks against it)."""

    run: int
    labels: tuple[Any, ...]
    done: bool
    error: str | None


def outline(spec: Spec, folder: Path | None = None, shard: tuple[int, int] | None = None) -> Iterator[Outlined]:
    """Every run of a sweep or of one shard. `folder`: where results of it may be."""
    for part in parts_of(spec.runs, shard):
        done = set() if folder is None else finished_runs(folder, part)
        for run in range(part.first, part.last):
            labels, settings = spec.run(run)
            yield Outlined(run, labels, run in done, impossible(settings))


def impossible(settings: dict[str, Any]) -> str | None:
    """Why a scenario cannot be, as far as that is seen without simulating it."""
    try:
        Scenario.from_dict(scenario_of(settings), source="scenario").resolved()
    except (ValueError, FileNotFoundError) as error:
        return in_one_line(error)
    return None


@dataclass(frozen=True)
class Estimate:
    """CPU seconds of one run, of a few that were timed; None if none of those could be run."""

    seconds_per_run: float | None
    timed_runs: int
    timed_requests: int


def estimate(spec: Spec) -> Estimate:
    """Times the first requests of a few runs: each run's requests times its seconds per request.

    A run whose queue grows and grows takes longer per request than its first ones.
    """
    from llmsim.sweep import work_of

    files, traces = digests(spec), Traces()
    taken_s: list[float] = []
    requests = 0
    for run in sorted({0, spec.runs // 2, spec.runs - 1}):
        work = work_of(spec, run, files)
        few = min(TIMED_REQUESTS, work.settings.get("limit") or TIMED_REQUESTS)
        short = replace(work, settings=work.settings | {"limit": few})
        run_one(short, traces)  # reads the profile and the trace, which a worker does once
        row, took = run_one(short, traces)
        if row.summary is None:
            continue
        scenario = Scenario.from_dict(scenario_of(work.settings)).resolved()
        whole = traces.load(work.settings["trace"], options_of(work.settings), scenario.max_model_len, scenario.seed)
        taken_s.append(took.cpu_s * len(whole) / row.summary["num_prompts"])
        requests += row.summary["num_prompts"]
    return Estimate(sum(taken_s) / len(taken_s) if taken_s else None, len(taken_s), requests)
