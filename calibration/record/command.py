"""python -m calibration record TRACE, and engine: a real vLLM under a load, for `llmsim validate` and `fit`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf, isnan
from pathlib import Path
from typing import Any

import click

from calibration.record.plans import Load, Plan, checked, make_loads, of_trace, read_plan
from calibration.record.session import Recorded, record

SWITCHES = ("enforce_eager", "enable_prefix_caching", "enable_chunked_prefill", "async_scheduling")
OPTIONS = {
    "tensor_parallel_size": int, "dtype": str, "quantization": str, "kv_cache_dtype": str, "max_num_seqs": int,
    "max_num_batched_tokens": int, "gpu_memory_utilization": float, "num_gpu_blocks_override": int,
    "max_model_len": int, "scheduling_policy": str, "block_size": int, "seed": int,
}  # fmt: skip
# What `engine` runs in so many seconds or more, its start included (Llama-3.1-8B on an H200).
FULL_S, SMALL_S = 420, 240
FULL_LOADS = "warm,decode_grid,mixed_grid,poisson:1024:128:q8:40s,chat:q8:40s"
SMALL_LOADS = "warm,decode_grid:small,mixed_grid:small,poisson:1024:128:q8:25s"
ENGINE_LIMITS = {"max_num_batched_tokens": 8192, "max_num_seqs": 256}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--engine", "engine_pairs", multiple=True, metavar="KEY=VALUE",
        help="Any field of vLLM's AsyncEngineArgs, the value as JSON or text. Repeatable.",
    )(command)  # fmt: skip
    for name in reversed(SWITCHES):
        command = click.option(f"{_flag(name)}/--no-{name.replace('_', '-')}", name, default=None)(command)
    for name, kind in reversed(OPTIONS.items()):
        command = click.option(_flag(name), name, type=kind, help=f"vLLM's {_flag(name)}")(command)
    return command


def _engine(options: dict[str, Any], pairs: tuple[str, ...]) -> dict[str, Any]:
    chosen = {name: options[name] for name in (*OPTIONS, *SWITCHES) if options.get(name) is not None}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--engine {pair}: write KEY=VALUE, as in --engine block_size=32")
        key = key.replace("-", "_")
        if key in chosen:
            raise ValueError(f"--engine {pair}: {key} is given twice")
        try:
            chosen[key] = json.loads(text)
        except ValueError:
            chosen[key] = text
    return chosen


def seconds(text: str) -> float:
    """ "90", "90s" or "10min"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min)?", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"budget {text!r}: write 90s or 10min")
    return float(match[1]) * (60 if match[2] == "min" else 1)


@click.command("record")
@click.argument("trace", required=False)
@click.option("--loads", help="Instead of TRACE, loads by name, comma separated: see calibration/record/plans.py")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Instead of TRACE, a plan file of loads.")
@click.option("--model", help="As in: llmsim list models, or a config.json")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The recording's folder, new.")
@click.option("--weights", type=click.Path(path_type=Path), help="A checkpoint's folder. Default: random weights.")
@click.option("--gpu", help="llmsim's name of this GPU, where nvidia-smi's does not say it.")
@click.option("--time-limit", "time_limit_s", type=click.FloatRange(min=0, min_open=True), default=inf, help="Seconds.")
@click.option("--rate", type=float, help="Rescale TRACE to this many requests/s.")
@click.option("--time-scale", type=float, help="Stretch TRACE's arrivals by this factor.")
@click.option("--requests", type=click.IntRange(min=1), help="Only the first so many of TRACE.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Closed loop: so many clients send TRACE in order.")
@click.option("--name", help="Name of TRACE's scenario. Default: the file's.")
@click.option(
    "--load-seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of --loads and of prompts."
)
@click.option("--keep-raw", is_flag=True, help="Keep the raw logs, in OUT/raw.")
@engine_options
def record_command(
    trace: str | None,
    loads: str | None,
    plan_path: Path | None,
    model: str | None,
    out: Path,
    weights: Path | None,
    gpu: str | None,
    time_limit_s: float,
    rate: float | None,
    time_scale: float | None,
    requests: int | None,
    concurrency: int | None,
    name: str | None,
    load_seed: int,
    keep_raw: bool,
    engine_pairs: tuple[str, ...],
    **options: Any,
) -> None:
    """Replay TRACE on a real vLLM on this machine, and leave a recording that `llmsim validate` reads."""
    if isnan(time_limit_s):
        raise ValueError("--time-limit nan: give seconds above 0")
    if sum(source is not None for source in (trace, loads, plan_path)) != 1:
        raise ValueError("give one of TRACE, --loads and --plan")
    if trace is None and any(value is not None for value in (rate, time_scale, requests, concurrency, name)):
        raise ValueError("--rate, --time-scale, --requests, --concurrency and --name are for a TRACE")
    engine = _engine(options, engine_pairs)
    if plan_path is not None:
        plan = read_plan(plan_path)
        plan = replace(plan, model=model or plan.model, engine=plan.engine | engine)
    else:
        if model is None:
            raise ValueError("--model is missing. Name one (llmsim list models) or a config.json")
        if loads is not None:
            plan = Plan(model, engine, make_loads(loads, load_seed), load_seed)
        else:
            assert trace is not None
            plan = Plan(model, engine, (_trace_load(trace, rate, time_scale, requests, concurrency, name),), load_seed)
    done = _record(plan, out, weights=weights, gpu=gpu, time_limit_s=time_limit_s, keep_raw=keep_raw)
    click.echo(f"{out}: {', '.join(done.scenarios)}. Next: llmsim validate {out}")


def _trace_load(
    path: str,
    rate: float | None,
    time_scale: float | None,
    requests: int | None,
    concurrency: int | None,
    name: str | None,
) -> Load:
    from llmsim.trace import load_trace

    trace = load_trace(path, rate=rate, time_scale=time_scale, limit=requests)
    for note in trace.notes:
        click.echo(note, err=True)
    named = name or re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).name.split(".")[0]).strip("_") or "trace"
    load = of_trace(trace, named, concurrency)
    checked([load])
    return load


def _record(plan: Plan, out: Path, **options: Any) -> Recorded:
    try:
        done = record(plan, out, **options)
    except KeyboardInterrupt:
        raise ValueError(f"{out}: interrupted before the first scenario: nothing is recorded") from None
    if not done.scenarios:
        raise ValueError(f"{out}: no scenario was recorded" + (f": {done.cause}" if done.cause else ""))
    return done


@click.command("trace")
@click.option("--model", required=True, help="A dense one in bfloat16, as in: llmsim list models, or a config.json")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .parquet; more models add to it.")
@engine_options
def trace_command(model: str, out: Path, engine_pairs: tuple[str, ...], **options: Any) -> None:
    """Time the kernels between matrix products and attention in a real vLLM's steps, for `fit --kernels`."""
    from calibration.measure.rows import read_parquet, write_parquet
    from calibration.record.kernels import trace

    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: give a file that ends in .parquet")
    known, about = read_parquet(out) if out.exists() else ([], {})
    rows, source = trace(model, _engine(options, engine_pairs), partial(click.echo, err=True))
    if not rows:
        raise ValueError(f"model={model}: none of its kernels has a known name. Trace llama-3.1-8b")
    kept = [row for row in known if row.model != rows[0].model]
    traced = {**about.get("traced", {}), str(rows[0].model): source}
    write_parquet(out, [*kept, *rows], {"gpu": source["name"], "date": source["date"], "traced": traced})
    click.echo(f"{out}: {len(rows)} rows of {rows[0].model}. Next: python -m calibration fit ... --kernels {out}")


@click.command("engine")
@click.option("--model", required=True, help="As in: llmsim list models, or a config.json")
@click.option("--gpu", required=True, help="As in: llmsim list gpus")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The recording's folder, new.")
@click.option("--budget", default="10min", show_default=True, help="Start of the engine included.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Fit a profile to the recording and write it.")
@click.option("--keep-raw", is_flag=True, help="Keep the raw logs, in OUT/raw.")
@engine_options
def engine_command(
    model: str,
    gpu: str,
    out: Path,
    budget: str,
    output: Path | None,
    keep_raw: bool,
    engine_pairs: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a real vLLM on planned batches and a short replay, and fit a profile to its steps."""
    if output is not None and (output.suffix != ".json" or not output.parent.is_dir()):
        raise ValueError(f"--output {output}: a profile is a .json file in a folder that is there")
    budget_s = seconds(budget)
    if budget_s < SMALL_S:
        raise ValueError(f"--budget {budget}: at least {SMALL_S} s, of which the engine's start takes about 70")
    loads = make_loads(FULL_LOADS if budget_s >= FULL_S else SMALL_LOADS)
    engine = ENGINE_LIMITS | _engine(options, engine_pairs)
    done = _record(Plan(model, engine, loads), out, gpu=gpu, time_limit_s=budget_s - 75, keep_raw=keep_raw)
    click.echo(f"{out}: {', '.join(done.scenarios)}")
    if output is not None:
        _fit(out, output, model, gpu, engine)


def _fit(out: Path, output: Path, model: str, gpu: str, engine: dict[str, Any]) -> None:
    dtype = str(engine.get("quantization") or engine.get("dtype") or "bfloat16")
    kv_dtype = str(engine.get("kv_cache_dtype") or "auto")
    try:
        from calibration.profiles import fit_profile, write_profile
        from calibration.steps import read_recording

        profile = fit_profile([read_recording(out)], output.stem, gpu, model, dtype, kv_dtype)
    except ImportError as error:
        again = f"python -m calibration fit {out} --gpu {gpu} --model {model} --dtype {dtype} --kv-dtype {kv_dtype}"
        print(f"not fitted ({error}). Elsewhere: {again} -o {output}", file=sys.stderr)
        return
    write_profile(profile, output)
    click.echo(f"{output}: profile {profile.name} ({profile.id})")
