"""`llmsim plan`: how many GPUs, of which kind, set how, for a trace and promises about its latencies."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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
from llmsim.progress import StatusLine
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.plan_runs import Run
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
# What a window of the trace would not repeat: drawn for what is loaded, or counted from where that begins.
NO_WINDOWS = ("spread", "assign_classes", "predict", "start_s")


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
              help="ttft_p99=500ms; ttft, tpot, itl, e2el; mean, median, p1 to p99.99. Of whole requests: "
              "goodput_p99=ttft:500ms,tpot:50ms. Repeatable.")  # fmt: skip
@click.option("--rate", type=float, help="Requests/s to be held. [the trace's own, or the highest with --replicas]")
@click.option("--gpu", "gpus", multiple=True, callback=_several, metavar="NAME,…", help="One or several.")
@click.option("--tensor-parallel-size", "--tensor-parallel", "--tp", "-tp", "tensor_parallels", multiple=True,
              callback=_sizes, metavar="N,…", help="GPUs of one replica. [1]")  # fmt: skip
@click.option("--engine", "engines", multiple=True, callback=_several, metavar="NAME,…", help="One or several. [vllm]")
@click.option("--replicas", type=click.IntRange(min=1), help="The fleet is given: which rate does it hold?")
@click.option("--budget", "budget_usd_per_h", type=float, metavar="DOLLARS", help="At most so many dollars an hour.")
@click.option("--max-gpus", type=click.IntRange(min=1), default=256, help="At most so many GPUs. [256]")
@click.option("--confidence", type=float, metavar="P", help="The answers hold with this probability, e.g. 0.95.")
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
    confidence: float | None,
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
    from llmsim.plan_runs import slos_of

    if out is not None:
        _check_out(out)
    promises = slos_of(slos)
    scenario = _scenario(flags, gpus)
    names = {"gpus": gpus, "tensor_parallels": tensor_parallels, "engines": engines}
    trace, repeat = _load(trace_path, scenario, flags, rate)
    progress = Progress(live_every_s=0.2)
    processes = jobs or len(os.sched_getaffinity(0))
    windows = not any(flags[name] for name in NO_WINDOWS)
    try:
        found = find_plan(
            trace, scenario, promises, rate=rate, replicas=replicas, budget_usd_per_h=budget_usd_per_h,
            max_gpus=max_gpus, confidence=confidence, prices=prices, windows=windows, jobs=processes, progress=progress,
            **{name: value or None for name, value in names.items()},  # type: ignore[arg-type]
        )  # fmt: skip
        points = _curve(trace, found, processes, progress) if curve else ()
    finally:
        progress.close()
    document = plan_report.document(found, points, repeat)
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    else:
        click.echo("\n".join(plan_report.report(found, points, repeat if show_runs else None)))
    if out is not None:  # what was found is there to be read, whatever becomes of the files
        try:
            plan_report.write(found, points, document, out, ["llmsim", *arguments])
        except OSError as error:
            raise ValueError(f"--out {out}: {error.strerror}: the plan is not written: give another folder") from None
        if not as_json:
            click.echo(f"Written: {out}")
    return 0 if found.holds else NO_ANSWER


def _check_out(out: Path) -> None:
    """That the folder can be made, before minutes are spent on what goes into it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder: give another name")
    above = next(one for one in out.absolute().parents if one.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".llmsim-", dir=above))
    except OSError as error:
        raise ValueError(f"--out {out}: {above}: {error.strerror}: give a folder that can be written") from None


def _scenario(flags: dict[str, Any], gpus: tuple[str, ...]) -> Scenario:
    """What the options share: everything but GPU, tensor parallelism, engine and replicas."""
    source = str(flags["scenario_file"] or "flags")
    fields = scenario_fields(flags)
    if gpus:
        fields["gpu"] = gpus[0]
    for name in ("model", "gpu"):
        if name not in fields:
            raise ValueError(f"no {name}: add --{name} NAME (llmsim list {name}s)")
    return Scenario.from_dict(fields, source=source)


def _load(path: str, scenario: Scenario, flags: dict[str, Any], rate: float | None) -> tuple[Trace, Repeat]:
    """The trace, and how a simulation of it is repeated. One without arrival times gets them at `rate`."""
    from llmsim.hardware import find_model
    from llmsim.trace import load_trace, mean_rate_per_s

    context = scenario.max_model_len or find_model(scenario.model).max_context_tokens
    options = trace_arguments(flags) | {"context_tokens": context, "seed": scenario.seed}
    trace = load_trace(path, **options)
    words, own = trace_flags(flags), trace.format != "servegen"  # whose reader takes --rate for something of its own
    unstamped = any(note.startswith("no arrival times") for note in trace.notes)
    if rate is not None and unstamped and mean_rate_per_s(trace) == float("inf") and len(trace) > 1:
        if path == "-":
            raise ValueError("-: standard input without arrival times cannot be read again at --rate: give a file")
        trace, own = load_trace(path, **options, rate=rate), False
        words += ["--rate", repr(rate)]
    tell(trace.notes)
    return trace, Repeat(path, tuple(words), own)


def trace_flags(flags: dict[str, Any]) -> list[str]:
    """The trace's flags as they were given."""
    words: list[str] = []
    for flag in _without(TRACE_FLAGS, TAKEN):
        made: Any = flag(lambda: None)
        option = made.__click_params__[0]
        value = flags.get(option.name)
        if value is not None and value is not False:
            words += [option.opts[0]] if option.is_flag else [option.opts[0], str(value)]
    return words


@dataclass(frozen=True)
class Repeat:
    """The command line of a simulation."""

    path: str
    trace_words: tuple[str, ...]
    by_rate: bool  # --rate rescales this trace; otherwise its times are scaled

    def __call__(self, run: Run) -> str:
        from llmsim.command_line import argv_of, as_text
        from llmsim.slo import goodput_targets_ms

        words = list(self.trace_words)
        if run.window is not None:
            words = _dropped(words, ("--limit", "--duration"))
            words += ["--start", repr(run.window.start_s), "--limit", str(run.window.requests)]
        scaled = ["--time-scale", repr(run.time_scale)]
        words += ["--rate", repr(run.rate)] if self.by_rate and run.window is None else scaled
        targets = goodput_targets_ms([one.slo for one in run.measured])
        options = ["--no-out"]
        if run.draws is not None:  # all draws at once: they come as one set
            promises = [word for one in run.measured for word in ("--slo", str(one.slo))]
            options += ["--intervals", str(run.draws), *promises]
        return as_text(argv_of(run.scenario, trace=[self.path, *words], goodput=targets, options=options))


def _dropped(words: list[str], flags: tuple[str, ...]) -> list[str]:
    pairs = [at for at, word in enumerate(words) if word in flags]
    return [word for at, word in enumerate(words) if at not in pairs and at - 1 not in pairs]


def _curve(trace: Trace, found: Plan, jobs: int, progress: Progress) -> tuple[Run, ...]:
    """Of the cheapest fleet: the knee."""
    from llmsim.plan_capacity import curve, knee_rates

    best = found.cheapest
    highest = None if best is None else best.capacity_rate or best.rate
    if best is None or highest is None:
        tell(("no curve: " + (best.untold if best is not None else "nothing holds"),))
        return ()
    return curve(trace, best.scenario, found.slos, knee_rates(highest), jobs=jobs, progress=progress)


class Progress(StatusLine):
    """Simulations so far, and the last one."""

    def __call__(self, done: int, expected: int, words: str) -> None:
        self.say(lambda took_s: f"{done} of about {expected} simulations in {took_s:.0f} s; {words}")
