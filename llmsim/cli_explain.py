"""`llmsim explain`: where the seconds of a request or of a tail went, and which change would help most."""

from __future__ import annotations

import json
import os
import re
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
from llmsim.cli_replay import _check_closed_loop, _load
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.explain import Explanation, Tail
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
@click.option(
    "--trace", "trace_file", metavar="FILE", help="Of a RUN: its trace, where it is not at its place any more."
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
    trace_file: str | None,
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
    processes = jobs or len(os.sched_getaffinity(0))
    settings: dict[str, Any] = {"knobs": not no_knobs, "jobs": processes, "progress": _progress}
    try:
        if (Path(path) / "manifest.json").is_file():
            run, trace, scenario = _read(Path(path), trace_file, flags)
            outcome = explained(trace, scenario, wanted(run.summary)(run.requests), run=run, **settings)
        else:
            trace, scenario = _replayed(path, trace_file, flags)
            outcome = explained(trace, scenario, wanted(None), **settings)
    finally:
        _progress(0, 0, "")
    if out is not None:
        _write(out, outcome)
    if as_json:
        click.echo(json.dumps(outcome.to_dict(), allow_nan=False))
        return
    click.echo(report(outcome))
    if out is not None:
        click.echo(f"Written: {out}")


def _read(folder: Path, trace_file: str | None, flags: dict[str, Any]) -> tuple[Run, Trace, Scenario]:
    from llmsim.explain_source import of_run
    from llmsim.runs import read_run

    given = [f"--{name.replace('_', '-')}" for name in (*scenario_fields(flags), *trace_arguments(flags))]
    if given:
        raise ValueError(f"{given[0]}: a run is explained as it was: leave it out, or give its TRACE instead")
    run = read_run(folder)
    return run, *of_run(run, trace_file)


def _replayed(path: str, trace_file: str | None, flags: dict[str, Any]) -> tuple[Trace, Scenario]:
    if trace_file is not None:
        raise ValueError(f"--trace {trace_file}: says where the trace of a RUN is, and {path} is no run folder")
    _check_no_run(Path(path), flags["model"] is not None or flags["scenario_file"] is not None)
    _check_closed_loop(flags)
    scenario = scenario_from(flags)
    return _load(path, scenario.resolved(), flags), scenario


RUN_FILES = ("summary.json", "requests.parquet", "iterations.parquet")


def _check_no_run(path: Path, has_model: bool) -> None:
    """What was meant as a run and is none is not taken for a trace without a model. A folder of trace files is one."""
    instead = "give a RUN folder that 'llmsim replay' wrote, or a TRACE with --model and --gpu"
    left = [name for name in RUN_FILES if path.is_dir() and (path / name).is_file()]
    if left:
        has = " and ".join([", ".join(left[:-1]), left[-1]] if len(left) > 1 else left)
        raise FileNotFoundError(f"{path}: has {has} and no manifest.json, so what it ran is not known: {instead}")
    if path.is_dir() and not has_model:
        raise FileNotFoundError(f"{path}: not a run folder (no manifest.json): {instead}")
    if str(path) != "-" and not path.exists() and not has_model:
        raise FileNotFoundError(f"{path}: no such file or folder: {instead}")


def _which(
    request: int | None, worst: int | None, by: str | None, slo: str | None
) -> Callable[[dict[str, Any] | None], Callable[[Columns], Tail]]:
    """What --request, --worst or --slo ask for; told of a run's summary, whose goodput targets --slo may name."""
    from llmsim import explain as explaining

    given = {"--request": request, "--worst": worst, "--slo": slo}
    asked = [f"{name} {value}" for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise ValueError(f"{asked[0]} and {asked[1]}: give one of them")
    if by is not None and (request is not None or slo is not None):
        raise ValueError(f"--by {by}: says what --worst goes by: leave it out with {asked[0]}")
    if request is not None:
        return lambda summary: explaining.one_request(request)
    if slo is None:
        return lambda summary: explaining.worst(worst or WORST, by or "e2el")
    metric, limit_s = _limit(slo)

    def missed(summary: dict[str, Any] | None) -> Callable[[Columns], Tail]:
        target_ms = ((summary or {}).get("slo") or {}).get(metric)
        promised_s = target_ms / 1e3 if limit_s is None and target_ms is not None else limit_s
        return explaining.missing(metric, promised_s)

    return missed


def _limit(slo: str) -> tuple[str, float | None]:
    """ttft=500ms -> (ttft, 0.5); ttft -> (ttft, None)."""
    from llmsim.metrics import TARGETS
    from llmsim.slo import UNITS_S

    metric, sign, text = (part.strip().lower() for part in slo.partition("="))
    if metric not in TARGETS:
        raise ValueError(f"--slo {slo}: {metric!r} is not a latency of a request: give {', '.join(TARGETS)}")
    if not sign:
        return metric, None
    found = re.fullmatch(r"([0-9.]+)\s*([a-z]+)", text)
    if found is None or found[2] not in UNITS_S or not float_or_nan(found[1]) > 0.0:
        raise ValueError(f"--slo {slo}: write METRIC=LIMIT with its unit, {', '.join(UNITS_S)}, e.g. ttft=500ms")
    return metric, float(found[1]) * UNITS_S[found[2]]


def float_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _progress(done: int, total: int, words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done} of {total}: {words}" if words else "\r\x1b[K", end="", file=sys.stderr, flush=True)


def _check_out(out: Path) -> None:
    if out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"--out {out}: the spans are written as .parquet or .csv: give such a name")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.absolute().parent}")


def _write(out: Path, outcome: Explanation) -> None:
    from llmsim.explain import spans_frame

    frame = spans_frame(outcome.lives)
    if out.suffix == ".csv":
        frame.to_csv(out, index=False)
    else:
        frame.to_parquet(out, index=False)
