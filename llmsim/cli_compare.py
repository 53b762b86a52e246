"""`llmsim compare`: one trace under several schedulers and settings, or run folders of the same trace."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import (
    CONTEXT,
    ENGINE_FLAG,
    SCENARIO_FLAGS,
    SCHEDULER_FLAGS,
    Known,
    SectionedCommand,
    apply,
    builtins_of,
    check_engine,
    engine_names,
    json_option,
    scenario_fields,
    trace_arguments,
    trace_options,
)
from llmsim.cli_replay import _check_closed_loop, _load
from llmsim.compare_sides import sides_of
from llmsim.progress import PROGRESS_AFTER_S
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.compare import Comparison, Side
    from llmsim.trace import Trace

HEADINGS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
SETTING_FLAGS = [flag for flag in SCENARIO_FLAGS if flag not in (SCHEDULER_FLAGS[0], ENGINE_FLAG)]


@click.command(cls=SectionedCommand, context_settings=CONTEXT, epilog="Differences are to the first side.")
@click.argument("paths", metavar="TRACE|RUN…", nargs=-1, required=True)
@click.option(
    "--scheduler",
    "schedulers",
    multiple=True,
    type=Known(builtins_of("llmsim.schedulers")),
    metavar="NAME",
    help="A side: a policy, or your own file.py:Class. Repeatable.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=Known(engine_names),
    metavar="NAME",
    help="The engine of every side, or if given twice or more, a side each. [vllm]",
)
@click.option(
    "--set",
    "variants",
    multiple=True,
    metavar="FIELD=VALUE,…",
    help="A side: the first one with these fields changed; scheduler.NAME=VALUE is an argument of it. Repeatable.",
)
@lambda command: apply(SETTING_FLAGS, command)
@trace_options
@click.option(
    "--goodput", multiple=True, metavar="METRIC:MS…", help="For ttft, tpot, e2el: --goodput ttft:500 tpot:50."
)
@click.option(
    "--slo", "promises", multiple=True, metavar="METRIC_STATISTIC=LIMIT", help="A tick or a cross: ttft_p99=500ms."
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Replay every side under so many seeds. [1]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Replays at a time. [1]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the paired rows.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Picture: .html, .svg or .png.")
@click.option("--md", "as_markdown", is_flag=True, help="A Markdown table, for pull requests.")
@json_option
@click.pass_obj
def compare(
    arguments: list[str],
    /,
    paths: tuple[str, ...],
    schedulers: tuple[str, ...],
    engines: tuple[str, ...],
    variants: tuple[str, ...],
    goodput: tuple[str, ...],
    promises: tuple[str, ...],
    seeds: int,
    jobs: int,
    out: Path | None,
    plot: Path | None,
    as_markdown: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Replay TRACE under every --scheduler, --engine and --set, and compare request by request; or compare RUN folders.

    \b
    llmsim compare chat.csv --model llama-3.1-8b --gpu h100-sxm --scheduler vllm --scheduler chunked
    llmsim compare chat.csv --model llama-3.1-8b --gpu h100-sxm --set max_num_batched_tokens=2048 --set replicas=2
    llmsim compare chat.csv --model llama-3.1-8b --gpu h100-sxm --engine vllm --engine sglang --slo ttft_p99=500ms --md
    llmsim compare runs/a runs/b
    """
    from llmsim.charts import check_plot
    from llmsim.compare import compare as paired
    from llmsim.compare_prepared import check_slos
    from llmsim.compare_report import report
    from llmsim.metrics import parse_goodput
    from llmsim.slo import Slo

    if as_json and as_markdown:
        raise ValueError("--json and --md: one of them is printed: leave the other out")
    slos = [Slo.parse(text) for text in promises]
    check_slos(slos)
    repeats: list[list[Side]] = []
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder: give another name")
    if plot is not None:
        check_plot(plot)
    targets = parse_goodput(goodput) or None
    if all((Path(path) / "manifest.json").is_file() for path in paths):
        _refuse_settings(schedulers, engines, variants, flags, seeds)
        sides = [_read_side(path) for path in paths]
        targets = targets or _common_targets(sides)
        seed, source = 0, {"runs": list(paths)}
    elif len(paths) == 1:
        _check_closed_loop(flags)
        scenarios = scenarios_of(schedulers, engines, variants, flags)
        seed = next(iter(scenarios.values())).seed
        (sides, *repeats), source = _replayed(paths[0], scenarios, flags, targets, jobs, seeds)
    else:
        odd = next(path for path in paths if not (Path(path) / "manifest.json").is_file())
        raise ValueError(f"{odd}: not a run folder (no manifest.json): give one TRACE, or RUN folders only")
    outcome = paired(sides, targets, seed=seed, repeats=repeats, slos=slos)
    if out is not None:
        _write(out, outcome, source, ["llmsim", *arguments])
    if plot is not None:
        _draw(outcome, plot)
    if as_json:
        from llmsim.compare_report import document
        from llmsim.metrics import json_safe

        click.echo(json.dumps(json_safe(document(outcome)), allow_nan=False))
        return
    if as_markdown:
        from llmsim.compare_markdown import markdown

        click.echo(markdown(outcome))
        return
    click.echo(report(outcome))
    for path in (out, plot):
        if path is not None:
            click.echo(f"Written: {path}")


# ---- sides ----------------------------------------------------------------------------------------------------------


def scenarios_of(
    schedulers: tuple[str, ...], engines: tuple[str, ...], variants: tuple[str, ...], flags: dict[str, Any]
) -> dict[str, Scenario]:
    """Name -> scenario of every side, all checked before the first replay. Takes the scenario flags out of `flags`."""
    source = str(flags["scenario_file"] or "flags")
    fields = scenario_fields(flags)
    if len(engines) == 1:
        fields["engine"] = engines[0]
    for name in engines:
        check_engine(fields | {"engine": name})
    for name in ("model", "gpu"):
        if name not in fields:
            raise ValueError(f"no {name}: add --{name} NAME (llmsim list {name}s)")
    return sides_of(fields, schedulers, variants, engines=engines if len(engines) > 1 else (), source=source)


def _replayed(
    path: str,
    scenarios: dict[str, Scenario],
    flags: dict[str, Any],
    targets: dict[str, float] | None,
    jobs: int,
    seeds: int,
) -> tuple[list[list[Side]], dict[str, Any]]:
    """The sides, for each seed; what a trace is read with is drawn anew too."""
    from llmsim.compare import run_seeds, with_seeds
    from llmsim.metrics import all_rejected

    if seeds > 1 and path == "-":
        raise ValueError(f"--seeds {seeds}: the trace is read once for each, which standard input is not: give a file")
    shortest = min(scenario.max_model_len or 0 for scenario in scenarios.values())
    repeats: list[tuple[Trace, dict[str, Scenario]]] = []
    for drawn in with_seeds(scenarios, seeds):
        first = replace(next(iter(drawn.values())), max_model_len=shortest)
        repeats.append((_load(path, first, flags, quiet=bool(repeats)), drawn))
    started_s = time.monotonic()

    def done(name: str, side: Side) -> None:
        if time.monotonic() - started_s > PROGRESS_AFTER_S:
            wall_s = side.summary["sim_wall_s"]
            click.echo(f"{name}: {side.summary['completed']} requests answered in {wall_s:.1f} s", err=True)

    trace = repeats[0][0]
    every = run_seeds(repeats, targets, jobs=jobs, done=done)
    for side in (side for sides in every for side in sides):
        if not side.summary["completed"]:
            raise ValueError(f"{side.name}: {all_rejected(side.requests, side.scenario['admission'])}")
    return every, {"trace": {"name": trace.name, "sha256": trace.sha256, "requests": len(trace)}}


def _refuse_settings(
    schedulers: tuple[str, ...], engines: tuple[str, ...], variants: tuple[str, ...], flags: dict[str, Any], seeds: int
) -> None:
    given = [f"--scheduler {name}" for name in schedulers] + [f"--engine {name}" for name in engines]
    given += [f"--set {text}" for text in variants] + ([f"--seeds {seeds}"] if seeds > 1 else [])
    given += [f"--{name.replace('_', '-')}" for name in (*scenario_fields(flags), *trace_arguments(flags))]
    if given:
        raise ValueError(f"{given[0]}: run folders are compared as they are: leave it out, or give a TRACE")


def _read_side(path: str) -> Side:
    from llmsim.compare import Side
    from llmsim.runs import read_run

    run = read_run(Path(path))
    return Side(path, run.manifest["scenario"], run.summary, run.requests)


def _common_targets(sides: list[Side]) -> dict[str, float] | None:
    """The goodput targets that every run was summarised with, if they were the same."""
    targets = sides[0].summary.get("slo")
    return dict(targets) if targets and all(side.summary.get("slo") == targets for side in sides) else None


# ---- files ----------------------------------------------------------------------------------------------------------


def _write(folder: Path, outcome: Comparison, source: dict[str, Any], command: list[str]) -> None:
    """requests.parquet: a row a request, columns NAME[side]; comparison.json; manifest.json."""
    from llmsim.compare_report import document
    from llmsim.metrics import latencies_s
    from llmsim.runs import complete_folder, facts_of_files, versions, write_json, write_parquet

    first = outcome.sides[0].requests
    columns = {name: first[name] for name in ("id", "prompt_tokens", "output_tokens")}
    for side in outcome.sides:
        latency_s = {f"{name}_s": values for name, values in latencies_s(side.requests).items()}
        kept = {name: side.requests[name] for name in ("arrival_s", "cached_tokens", "preemptions", "replica")}
        columns |= {f"{name}[{side.name}]": values for name, values in (kept | latency_s).items()}
    with complete_folder(folder) as partial:
        write_parquet(partial / "requests.parquet", columns)
        write_json(partial / "comparison.json", document(outcome))
        manifest = {
            "command": shlex.join(command),
            **source,
            "sides": {side.name: side.scenario for side in outcome.sides},
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": facts_of_files(partial),
        }
        write_json(partial / "manifest.json", manifest)


def _draw(outcome: Comparison, path: Path) -> None:
    import pandas as pd

    from llmsim.charts import save
    from llmsim.charts_compare import comparison
    from llmsim.compare_report import changes, curves

    first = outcome.sides[0]
    same = [name for name in ("model", "gpu") if len({str(side.scenario[name]) for side in outcome.sides}) == 1]
    setting = ", ".join(str(first.scenario[name]) for name in same)
    count = len(first.requests["id"])
    lines = [
        f"{count:,} requests, the same for every side{': ' if setting else ''}{setting}",
        f"differences to {first.name} with 95 % intervals (blocks of {outcome.block} consecutive arrivals, paired)",
    ]
    if outcome.targets:
        goals = ", ".join(f"{HEADINGS[name]} {value:g} ms" for name, value in outcome.targets.items())
        lines[0] += f"; dashed: {goals}"
    chart = comparison(
        pd.DataFrame(curves(outcome)),
        pd.DataFrame(changes(outcome)),
        sides=[side.name for side in outcome.sides],
        latencies=HEADINGS,
        targets=outcome.targets or {},
        title="Latency by request",
        subtitle=lines,
    )
    save(chart, path)
