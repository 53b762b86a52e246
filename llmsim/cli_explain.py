"""`llmsim explain`: where the seconds of a request or of a tail went, and which change would help most."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import (
    CONTEXT,
    INT,
    SectionedCommand,
    json_option,
    scenario_fields,
    scenario_from,
    scenario_options,
    trace_arguments,
    trace_options,
)
from llmsim.cli_replay import _check_closed_loop, _check_rejected, _load
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.explain import Tail
    from llmsim.metrics import Columns
    from llmsim.runs import Run
    from llmsim.trace import Trace

WORST = 10


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@click.argument("path", metavar="RUN|TRACE")
@click.option("--request", type=click.IntRange(min=0), metavar="ID", help="One request, by its id in requests.parquet.")
@click.option("--worst", type=click.IntRange(min=1), metavar="N", help=f"The N slowest requests. [{WORST}]")
@click.option("--by", type=click.Choice(("e2el", "ttft", "tpot")), help="What --worst goes by. [e2el]")
@click.option(
    "--slo", metavar="METRIC[=LIMIT]", help="Requests that miss it: ttft=500ms; ttft: the run's goodput target, or P99."
)
@click.option("--no-knobs", is_flag=True, help="Only explain; try no changes.")
@click.option("--jobs", type=INT, help="Replays at a time. [one a core]")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The spans as a table: .parquet or .csv.")
@json_option
@scenario_options
@trace_options
def explain(
    path: str,
    request: int | None,
    worst: int | None,
    by: str | None,
    slo: str | None,
    no_knobs: bool,
    jobs: int | None,
    out: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Explain where the time of requests went: of a RUN folder, or of a TRACE replayed with the flags of 'replay'.

    \b
    llmsim explain runs/mine --worst 10
    llmsim explain chat.csv --model llama-3.1-8b --gpu h100-sxm --rate 16 --slo ttft=500ms
    """
    from llmsim.explain import explain as explained
    from llmsim.explain_report import report

    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: give 1 or more replays at a time")
    if out is not None:
        _check_out(out)
    wanted = _which(request, worst, by, slo)
    run = None
    if (Path(path) / "manifest.json").is_file():
        run, trace, scenario = _read(path, flags)
    else:
        _check_closed_loop(flags)
        scenario = scenario_from(flags)
        trace = _load(path, scenario.resolved(), flags)
    tail: Any = wanted(run)
    if run is not None:
        _check_repeats(run, trace)
        tail = tail(run.requests)
    processes = jobs or len(os.sched_getaffinity(0))
    outcome = explained(trace, scenario, tail, knobs=not no_knobs, jobs=processes, progress=_progress)
    if out is not None:
        _write(out, outcome)
    if as_json:
        click.echo(json.dumps(outcome.to_dict(), allow_nan=False))
        return
    click.echo(report(outcome))
    if out is not None:
        click.echo(f"Written: {out}")
