"""`llmsim plan`: how many GPUs, of which kind, set how, for a trace and promises about its latencies."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import (
    CONTEXT,
    SCENARIO_FLAGS,
    TRACE_FLAGS,
    SectionedCommand,
    apply,
    json_option,
    scenario_fields,
    tell,
    trace_arguments,
)
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.plan_types import Plan
    from llmsim.trace import Trace

NO_ANSWER = 3  # exit status: nothing meets the SLOs
TAKEN = (
    "gpu",
    "tensor_parallel",
    "engine",
    "replicas",
    "concurrency",
    "rate",
    "time_scale",
)  # flags of our own, or none
DRAWN_LATER = ("spread", "assign_classes", "predict")  # drawn for what is loaded: a window would draw them differently
PROGRESS_AFTER_S = 2.0


def _without(flags: list[Callable[[Any], Any]], names: tuple[str, ...]) -> list[Callable[[Any], Any]]:
    """Flags that several commands share, but for some."""

    def named(flag: Callable[[Any], Any]) -> str:
        made: Any = flag(lambda: None)
        return str(made.__click_params__[0].name)

    return [flag for flag in flags if named(flag) not in names]


def _several(_: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """--gpu a,b and --gpu a --gpu b are the same."""
    found = tuple(word.strip() for text in value for word in text.split(","))
    if "" in found:
        raise click.BadParameter(f"{','.join(value)}: a name is empty", param=param)
    return tuple(dict.fromkeys(found))


def _sizes(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[int, ...]:
    words = _several(ctx, param, value)
    wrong = [word for word in words if not word.isdigit() or int(word) < 1]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} is not a number of GPUs: write e.g. 1,2,4", param=param)
    return tuple(map(int, words))


@click.command(cls=SectionedCommand, context_settings=CONTEXT, epilog="Exit status 3: nothing meets the SLOs.")
@click.argument("trace_path", metavar="TRACE")
@click.option("--slo", "slos", multiple=True, required=True, metavar="METRIC_STATISTIC=LIMIT",
              help="ttft_p99=500ms; ttft, tpot, itl, e2el; mean, median, p1 to p99.99. Repeatable.")  # fmt: skip
@click.option("--rate", type=float, help="Requests/s to be held. [the trace's own, or the highest with --replicas]")
@click.option("--gpu", "gpus", multiple=True, callback=_several, metavar="NAME,…", help="One or several.")
@click.option("--tensor-parallel-size", "--tensor-parallel", "--tp", "-tp", "tensor_parallels", multiple=True,
              callback=_sizes, metavar="N,…", help="GPUs of one replica. [1]")  # fmt: skip
@click.option("--engine", "engines", multiple=True, callback=_several, metavar="NAME,…", help="One or several. [vllm]")
@click.option("--replicas", type=click.IntRange(min=1), help="The fleet is given: which rate does it hold?")
@click.option("--budget", "budget_usd_per_h", type=float, metavar="DOLLARS", help="At most so many dollars an hour.")
@click.option("--max-gpus", type=click.IntRange(min=1), default=256, help="At most so many GPUs. [256]")
@click.option("--prices", type=click.Path(path_type=Path), metavar="FILE", help="Dollars per GPU and hour. [llmsim's]")
@lambda command: apply(_without(SCENARIO_FLAGS, TAKEN), command)
@lambda command: apply(_without(TRACE_FLAGS, TAKEN), command)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. [one a core]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for options, runs and manifest.")
@click.option("--curve", is_flag=True, help="Also the cheapest fleet's latencies as the rate rises.")
@click.option("--runs", "show_runs", is_flag=True, help="Also every simulation, with the command that repeats it.")
@json_option
@click.pass_obj
def plan(
    arguments: list[str],
    /,
    trace_path: str,
    slos: tuple[str, ...],
    rate: float | None,
    gpus: tuple[str, ...],
    tensor_parallels: tuple[int, ...],
    engines: tuple[str, ...],
    replicas: int | None,
    budget_usd_per_h: float | None,
    max_gpus: int,
    prices: Path | None,
    jobs: int | None,
    out: Path | None,
    curve: bool,
    show_runs: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Find the fleets that hold TRACE at a rate within promises about latency: fewest GPUs, cheapest, fastest.

    \b
    llmsim plan chat.csv --model llama-3.1-8b --gpu h100-sxm,h200-sxm --tp 1,2 --rate 40 \\
        --slo ttft_p99=500ms --slo tpot_p95=50ms
    llmsim plan chat.csv --model llama-3.1-8b --gpu h100-sxm --replicas 4 --slo ttft_p99=500ms
    """
    from llmsim import plan_report
    from llmsim.plan import plan as find_plan
    from llmsim.plan_types import slos_of

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder: give another name")
    promises = slos_of(slos)
    scenario = _scenario(flags, gpus)
    names = {"gpus": gpus, "tensor_parallels": tensor_parallels, "engines": engines}
    trace, repeat = _load(trace_path, scenario, flags, names, rate)
    progress = Progress()
    processes = jobs or len(os.sched_getaffinity(0))
    windows = not any(flags[name] for name in DRAWN_LATER)
    try:
        found = find_plan(
            trace, scenario, promises, rate=rate, replicas=replicas, budget_usd_per_h=budget_usd_per_h,
            max_gpus=max_gpus, prices=prices, windows=windows, jobs=processes, progress=progress,
            **{name: value or None for name, value in names.items()},  # type: ignore[arg-type]
        )  # fmt: skip
        points = _curve(trace, found, processes, progress) if curve else ()
    finally:
        progress.close()
    document = plan_report.document(found, points, repeat)
    if out is not None:
        plan_report.write(found, points, document, out, ["llmsim", *arguments])
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    else:
        click.echo("\n".join(plan_report.report(found, points, repeat if show_runs else None)))
        if out is not None:
            click.echo(f"Written: {out}")
    return 0 if found.holds else NO_ANSWER


def _scenario(flags: dict[str, Any], gpus: tuple[str, ...]) -> Scenario:
    """What the options share: everything but GPU, tensor parallelism, engine and replicas."""
    source = str(flags["scenario_file"] or "flags")
    absent = dict.fromkeys(name for name in TAKEN if name in Scenario.__dataclass_fields__)
    fields = scenario_fields(flags | absent)
    for name in [name for name in flags if name in Scenario.__dataclass_fields__ or name in ("scenario_file",)]:
        flags.pop(name)
    if gpus:
        fields["gpu"] = gpus[0]
    for name in ("model", "gpu"):
        if name not in fields:
            raise ValueError(f"no {name}: add --{name} NAME (llmsim list {name}s)")
    return Scenario.from_dict(fields, source=source)
