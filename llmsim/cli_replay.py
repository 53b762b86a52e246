"""`llmsim replay` and `llmsim demo`: a trace and a scenario in, the benchmark block and a run folder out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim import cli_intervals
from llmsim.cli_options import (
    CONTEXT,
    GPU,
    MODEL,
    SectionedCommand,
    json_option,
    scenario_from,
    scenario_options,
    tell,
    trace_arguments,
    trace_options,
)
from llmsim.progress import StatusLine
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.metrics import Result
    from llmsim.trace import Trace

DEMO_TRACE = "chat.csv"
RUNS = "runs"
LATEST_S = 1e10  # a double no longer resolves a microsecond beyond
STRICT_EXTRAPOLATED = 0.05  # share of GPU time outside the measured range that --strict accepts


@click.command(cls=SectionedCommand, context_settings=CONTEXT, epilog="The scenario flags are those of 'vllm serve'.")
@click.argument("trace_path", metavar="TRACE")
@scenario_options
@trace_options
@click.option(
    "--goodput", multiple=True, metavar="METRIC:MS…", help="For ttft, tpot, e2el, e.g. --goodput ttft:500 tpot:50."
)
@click.option("--prices", type=click.Path(path_type=Path), metavar="FILE", help="Dollars per GPU and hour. [llmsim's]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder. [runs/TIME_HASH]")
@click.option("--no-out", is_flag=True, help="Write no run folder.")
@json_option
@click.option("--timeline", is_flag=True, help="Add trace.json.gz to the run folder, for ui.perfetto.dev.")
@click.option("--save-detailed", is_flag=True, help="Add vLLM's arrays of every request to summary.json.")
@click.option("--strict", is_flag=True, help="Fail if over 5 % of the GPU time lies outside the measured range.")
@cli_intervals.interval_options
@click.pass_obj
def replay(
    arguments: list[str],
    /,
    trace_path: str,
    goodput: tuple[str, ...],
    prices: Path | None,
    out: Path | None,
    no_out: bool,
    as_json: bool,
    timeline: bool,
    save_detailed: bool,
    strict: bool,
    **flags: Any,
) -> None:
    """Replay TRACE (a file, or - for standard input) and print what the clients would have seen.

    \b
    llmsim replay chat.csv --model llama-3.1-8b --gpu h100-sxm --goodput ttft:500 tpot:50
    """
    from llmsim.metrics import parse_goodput
    from llmsim.prices import find_price

    _check_outputs(out, no_out, timeline=timeline, save_detailed=save_detailed)
    _check_closed_loop(flags)
    asked = cli_intervals.taken(flags)
    targets = parse_goodput(goodput) or None
    scenario = scenario_from(flags).resolved()
    price = None if prices is None else find_price(scenario.gpu, prices)
    trace = _load(trace_path, scenario, flags)
    result = _simulate(trace, scenario)
    _check_ends(result)
    _check_rejected(result)
    summary = result.summary(targets, price)
    if strict:
        _check_extrapolation(summary)
    summary |= cli_intervals.summary_part(trace, scenario, targets, asked, price)
    folder = None
    if not no_out:
        from llmsim.runs import write_run
        from llmsim.runs_origin import origin

        wrote: dict[str, Any] = {"timeline": timeline, "detailed": save_detailed}
        source = origin(trace, trace_path, trace_arguments(flags), scenario, goodput=targets, price=price, **wrote)
        extra = {"command": ["llmsim", *arguments], **source, "notes": list(trace.notes)}
        with _run_folder(out, scenario, trace) as folder:
            notes = write_run(
                result, folder, summary=summary, manifest_extra=extra, timeline=timeline, detailed=save_detailed
            )
        tell(notes)
    _print(summary | cli_intervals.kept_part(result, asked), folder, as_json)


@click.command(context_settings=CONTEXT)
@click.option("--model", type=MODEL, metavar="NAME", default="llama-3.1-8b", show_default=True)
@click.option("--gpu", type=GPU, metavar="NAME", default="h100-sxm", show_default=True)
@json_option
def demo(model: str, gpu: str, as_json: bool) -> None:
    """Replay a bundled trace of 2,000 chat requests; writes no file.

    \b
    llmsim demo --gpu h200-sxm
    """
    scenario = Scenario(model=model, gpu=gpu).resolved()
    path = demo_trace()
    result = _simulate(_load(str(path), scenario, {}), scenario)
    summary = result.summary({"ttft": 500.0, "tpot": 50.0})
    _print(summary, None, as_json)
    if not as_json:
        setting = f"{_shown(path)} --model {scenario.model} --gpu {scenario.gpu}"
        click.echo(
            "Next:\n"
            "  # the same chats, arriving faster\n"
            f"  llmsim replay {setting} --rate 16 --goodput ttft:500 tpot:50\n"
            "  # smaller prefill chunks\n"
            f"  llmsim replay {setting} --max-num-batched-tokens 2048\n"
            "  # the settings of a server of your own\n"
            f"  llmsim from-vllm --gpu {scenario.gpu} 'vllm serve meta-llama/Llama-3.1-8B-Instruct --max-num-seqs 256'"
        )


def demo_trace() -> Path:
    """In an installed package beside the modules, in a checkout beside the package."""
    package = Path(str(files("llmsim")))
    for folder in (package / "traces", package.parent / "traces"):
        if (folder / DEMO_TRACE).is_file():
            return folder / DEMO_TRACE
    raise FileNotFoundError(f"the demo trace {DEMO_TRACE} is in neither {package}/traces nor {package.parent}/traces")


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _check_outputs(out: Path | None, no_out: bool, **needing: bool) -> None:
    """Before the replay, not after it: its result would be lost."""
    if no_out:
        for name in [name for name, asked in {"out": out is not None, **needing}.items() if asked]:
            raise ValueError(f"--no-out contradicts --{name.replace('_', '-')}: leave one of them out")
        return
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder: give another name")
    folder = (Path(RUNS) if out is None else out).absolute()
    there = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not there.is_dir():
        raise ValueError(f"--out {folder}: {there} is not a folder: give another name")
    if not os.access(there if not folder.exists() or out is not None else folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: no permission to write in {there}: give another folder, or --no-out")


def _check_closed_loop(flags: dict[str, Any]) -> None:
    """What shifts arrival times says nothing where they are ignored."""
    if flags["concurrency"] is None:
        return
    for name in ("rate", "time_scale", "spread"):
        if flags[name] is not None:
            raise ValueError(
                f"--concurrency {flags['concurrency']} ignores arrival times, which --{name.replace('_', '-')} "
                f"{flags[name]} changes: leave one of them out"
            )


def _check_sessions(trace: Trace, scenario: Scenario) -> None:
    waiting = int((trace.arrival_s != trace.arrival_s).sum())  # nan: waits for its parent
    if waiting and scenario.concurrency is not None:
        raise ValueError(
            f"concurrency={scenario.concurrency} contradicts {trace.name}: {waiting} of its {len(trace)} requests wait "
            "for the answer before them in their session, so it is a closed loop of its own: leave --concurrency out"
        )


def _check_ends(result: Result) -> None:
    late = result.requests["finish_s"] > LATEST_S  # False for nan, a rejected request
    if late.any():
        raise ValueError(
            f"{int(late.sum())} of {len(late)} requests end more than {LATEST_S:.0e} s (300 years) after time 0: "
            f"cost={result.scenario.cost} gives times that cannot be meant: {result.cost.label}"
        )


def _check_rejected(result: Result) -> None:
    """A request whose KV cache can never fit is rejected, as engines do: never silently, and not all of them."""
    away, sent = int(result.stats.get("turned_away", 0)), len(result.requests["id"])
    if away:
        print(
            f"WARNING: {away} of {sent} requests were turned away; latencies are those of the others", file=sys.stderr
        )
    rejected = int(result.stats["rejected"]) - away
    if not rejected:
        return
    tokens = (result.kv_blocks - 1) * result.scenario.block_size
    what = f"{rejected} of {sent} requests are rejected: a replica's {result.kv_blocks} KV blocks hold {tokens} tokens"
    if rejected == sent:
        raise ValueError(f"{what}: raise num_gpu_blocks_override or gpu_memory_utilization, or leave them out")
    print(f"WARNING: {what}, they need more; latencies are those of the others", file=sys.stderr)


def _load(path: str, scenario: Scenario, flags: dict[str, Any], *, quiet: bool = False) -> Trace:
    from llmsim.trace import load_trace

    options = trace_arguments(flags)
    trace = load_trace(path, **options, context_tokens=scenario.max_model_len, seed=scenario.seed)
    tell(() if quiet else trace.notes)
    _check_sessions(trace, scenario)
    return trace


def _simulate(trace: Trace, scenario: Scenario) -> Result:
    from llmsim.simulate import simulate

    progress = Progress()
    try:
        return simulate(trace, scenario, progress)
    finally:
        progress.close()


class Progress(StatusLine):
    """Requests answered."""

    def __call__(self, done: int, total: int, simulated_s: float) -> None:
        self.say(lambda took_s: f"{done} of {total} requests answered, {simulated_s:.0f} s simulated in {took_s:.0f} s")


def _check_extrapolation(summary: dict[str, Any]) -> None:
    share = summary["extrapolated"]
    if share is not None and share > STRICT_EXTRAPOLATED:
        raise ValueError(
            f"--strict: {100 * share:.1f} % of the GPU time lies outside the measured range (limit "
            f"{100 * STRICT_EXTRAPOLATED:.0f} %) of {summary['calibration']['label']}: "
            "use a wider profile, or leave --strict out"
        )


@contextmanager
def _run_folder(out: Path | None, scenario: Scenario, trace: Trace) -> Iterator[Path]:
    """The folder to write; if writing fails, no folder that was made for it stays."""
    wanted = (Path(RUNS) / "new" if out is None else out).absolute()
    made = [parent for parent in wanted.parents if not parent.exists()]
    folder = _new_folder(scenario, trace) if out is None else out
    try:
        yield folder
    except BaseException:
        for empty in [folder, *made] if out is None else made:
            with suppress(OSError):
                empty.rmdir()
        raise


def _new_folder(scenario: Scenario, trace: Trace) -> Path:
    """runs/TIME_HASH; the hash is of what decides the result, so equal runs are seen at a glance."""
    what = json.dumps([scenario.to_dict(), trace.sha256, len(trace.prompt_tokens)], sort_keys=True, default=str)
    name = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}_{hashlib.sha256(what.encode()).hexdigest()[:6]}"
    folder, again = Path(RUNS) / name, 1
    while True:
        folder.parent.mkdir(exist_ok=True)
        try:
            folder.mkdir()  # taken, also before another replay that ends within the same second
            return folder
        except FileExistsError:
            again += 1
            folder = Path(RUNS) / f"{name}-{again}"


def _print(summary: dict[str, Any], folder: Path | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**summary, "run_folder": None if folder is None else str(folder)}, allow_nan=False))
        return
    from llmsim.report import report

    click.echo(report(summary, () if folder is None else (f"Results: {folder}",)))
