"""How fast llmsim is: `python -m benchmarks.speed [CASE ...] [--repeats N] [--json]`.

Every case runs in a process of its own, so that its peak memory is its own; times are CPU seconds of the simulation
alone (`simulate`, from a loaded trace to the result's columns), the median of the repeats. Start-up is measured over
whole commands. Cases that replay public traces read them from ../shared/traces and say so if they are not there.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "traces"
AZURE = SHARED / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
MOONCAKE = SHARED / "mooncake" / "conversation_trace.first2000.jsonl"
SETTINGS: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}


def azure(speedup: float) -> tuple[Any, dict[str, Any]]:
    from llmsim.trace import load_trace

    return load_trace(AZURE, time_scale=1.0 / speedup), {}


def speculating() -> tuple[Any, dict[str, Any]]:
    trace, _ = azure(2.5)
    return trace, {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}}


def mooncake() -> tuple[Any, dict[str, Any]]:
    from llmsim.trace import load_trace

    return load_trace(MOONCAKE), {}


def million() -> tuple[Any, dict[str, Any]]:
    """8 requests/s for each of 64 replicas, chat-like lengths."""
    return _synthetic(1_000_000, rate=8.0 * 64), {"replicas": 64}


def queue(waiting: int) -> tuple[Any, dict[str, Any]]:
    """As many clients as keep a replica full and `waiting` requests queued, each sending when it has its answer."""
    import numpy as np

    from llmsim.trace import Trace

    clients = 400 + waiting  # about 400 requests of this length fill the KV cache
    requests = clients + 20_000
    lengths = np.full(requests, 1024), np.full(requests, 128)
    return Trace(f"queue-{waiting}", np.zeros(requests), *lengths), {"concurrency": clients}


def _synthetic(requests: int, rate: float) -> Any:
    import numpy as np

    from llmsim.trace import Trace

    random = np.random.default_rng(0)
    at_s = np.cumsum(random.exponential(1.0 / rate, requests))
    prompt = np.clip(random.lognormal(6.633, 0.985, requests).astype(np.int64), 1, 8000)
    output = np.clip(random.lognormal(5.019, 0.859, requests).astype(np.int64), 1, 1000)
    return Trace("synthetic", at_s - at_s[0], prompt, output)


CASES: dict[str, tuple[str, Callable[[], tuple[Any, dict[str, Any]]], Path | None, int]] = {
    "azure-1x": ("Azure conversation trace, 1 replica", lambda: azure(1.0), AZURE, 5),
    "azure-2.5x": ("the same, 2.5 times as fast", lambda: azure(2.5), AZURE, 5),
    "azure-2.5x-eagle": ("the same, speculating: three drafts of an EAGLE head", speculating, AZURE, 3),
    "mooncake": ("Mooncake conversation, first 2,000, prefix caching", mooncake, MOONCAKE, 5),
    "queue-50": ("about 50 waiting, KV cache full, 20,450 requests", lambda: queue(50), None, 3),
    "queue-50000": ("up to 50,000 waiting, the same, 70,400 requests", lambda: queue(50_000), None, 3),
    "million-64": ("1,000,000 synthetic requests, 64 replicas", million, None, 1),
}


def measure(name: str, repeats: int | None) -> dict[str, Any]:
    """Run one case in this process."""
    from llmsim.scenario import Scenario
    from llmsim.simulate import simulate

    _, make, _, usual = CASES[name]
    trace, settings = make()
    scenario = Scenario(**SETTINGS, **settings)
    seconds = []
    for _ in range(repeats or usual):
        started_s = time.process_time()
        result = simulate(trace, scenario)
        seconds.append(time.process_time() - started_s)
    cpu_s = median(seconds)
    done = result.requests["finish_s"] > 0
    return {
        "case": name,
        "requests": len(trace),
        "finished": int(done.sum()),
        "cpu_s": cpu_s,
        "requests_per_cpu_s": len(trace) / cpu_s,
        "tokens_per_cpu_s": int((trace.prompt_tokens + trace.output_tokens)[done].sum()) / cpu_s,
        "iterations_per_cpu_s": int(result.iterations["iterations"].sum()) / cpu_s,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cost": result.cost.label,
    }


def command_cpu_s(*arguments: str) -> float:
    """CPU seconds of a whole command, median of five after a warm-up."""
    seconds = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "llmsim", *arguments], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(seconds[1:])


def in_own_process(name: str, repeats: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.speed", "--one", name]
    if repeats:
        command += ["--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise click.ClickException(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


@click.command()
@click.argument("cases", nargs=-1)
@click.option("--repeats", type=click.IntRange(min=1), help="Runs of each case; default 5, 3 or 1 by length.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@click.option("--one", hidden=True, help="Run this case here and print its row as JSON.")
def main(cases: tuple[str, ...], repeats: int | None, as_json: bool, one: str | None) -> None:
    """Print requests, simulated tokens and iterations per CPU second, start-up time and peak memory."""
    if one:
        print(json.dumps(measure(one, repeats)))
        return
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise click.UsageError(f"unknown case {unknown[0]!r}. Known: {', '.join(CASES)}.")
    rows = []
    if not as_json:
        print(f"{'case':<52}{'requests/s':>12}{'tokens/s':>14}{'iterations/s':>14}{'CPU s':>8}{'peak MB':>9}")
    for name in cases or CASES:
        title, _, needs, _ = CASES[name]
        if needs is not None and not needs.exists():
            print(f"{title:<52}left out: {os.path.relpath(needs, ROOT)} is not there", file=sys.stderr)
            continue
        row = in_own_process(name, repeats)
        rows.append(row)
        if not as_json:
            rates = f"{row['requests_per_cpu_s']:>12,.0f}{row['tokens_per_cpu_s']:>14,.0f}"
            rates += f"{row['iterations_per_cpu_s']:>14,.0f}{row['cpu_s']:>8.2f}{row['peak_memory_mb']:>9.0f}"
            print(f"{title:<52}{rates}", flush=True)
    start_up = {"help_cpu_s": command_cpu_s("--help"), "replay_cpu_s": _replay_start_up_s()}
    if as_json:
        print(json.dumps({"cases": rows, "start_up": start_up}))
    else:
        print(f"llmsim --help: {start_up['help_cpu_s']:.3f} CPU s")
        print(f"llmsim replay of one request, everything but the simulation: {start_up['replay_cpu_s']:.2f} CPU s")
        if rows:
            print(f"cost model: {rows[0]['cost']}")


def _replay_start_up_s() -> float:
    """A replay of the shipped trace's first request: what is left when there is nothing to simulate."""
    trace = ROOT / "traces" / "chat.csv"
    return command_cpu_s(
        "replay", str(trace), "--limit", "1", "--model", SETTINGS["model"], "--gpu", SETTINGS["gpu"], "--no-out"
    )


if __name__ == "__main__":
    main()
