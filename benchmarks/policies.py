"""How fast every built-in policy is: `python -m benchmarks.policies [POLICY ...] [--repeats N] [--json]`.

Each replays the Azure conversation trace of 2023, 2.5 times as fast, on one replica, in a process of its own. Printed:
requests per CPU second of the simulation alone (`simulate`, from a loaded trace to the result's columns), the median of
the repeats, beside the limit of 5,000. Exit status 1 if a policy falls below it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import click

from benchmarks.speed import AZURE, ROOT, SETTINGS, azure

LIMIT = 5_000  # requests per CPU second
SPEEDUP = 2.5
NEEDS = {"vllm-native": "vllm"}  # policies that run another package's code: slow by nature, and without a limit


def builtins() -> dict[str, dict[str, Any]]:
    """Name -> fields of its scenario, for every built-in scheduler, and for every cache eviction that there is."""
    found: dict[str, dict[str, Any]] = {name: {"scheduler": name} for name in _table("llmsim.schedulers")}
    return found | {f"vllm, eviction {name}": {"eviction": name} for name in _table("llmsim.eviction")}


def _table(module: str) -> list[str]:
    return list(import_module(module).BUILTIN) if find_spec(module) is not None else []


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Run one policy in this process."""
    from llmsim.scenario import Scenario
    from llmsim.simulate import simulate

    trace, _ = azure(SPEEDUP)
    scenario = Scenario(**SETTINGS, **builtins()[name])
    seconds = []
    for _ in range(repeats):
        started_s = time.process_time()
        result = simulate(trace, scenario)
        seconds.append(time.process_time() - started_s)
    return {
        "policy": name,
        "requests": len(trace),
        "finished": int((result.requests["finish_s"] > 0).sum()),
        "iterations": int(result.iterations["iterations"].sum()),
        "rows": len(result.iterations["start_s"]),
        "cpu_s": median(seconds),
        "requests_per_cpu_s": len(trace) / median(seconds),
    }


def in_own_process(name: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.policies", "--one", name, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise click.ClickException(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


@click.command()
@click.argument("policies", nargs=-1)
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each policy. [3]")
@click.option("--json", "as_json", is_flag=True, help="One JSON array instead of the table.")
@click.option("--one", hidden=True, help="Run this policy here and print its row as JSON.")
def main(policies: tuple[str, ...], repeats: int, as_json: bool, one: str | None) -> None:
    """Print requests per CPU second of every built-in policy; exit status 1 if one is below the limit."""
    if one:
        print(json.dumps(measure(one, repeats)))
        return
    known = builtins()
    unknown = [name for name in policies if name not in known]
    if unknown:
        raise click.UsageError(f"unknown policy {unknown[0]!r}. Known: {', '.join(known)}.")
    if not AZURE.exists():
        raise click.ClickException(f"{os.path.relpath(AZURE, ROOT)} is not there: download the trace (see README.md)")
    if not as_json:
        print(f"{'policy':<28}{'requests/CPU s':>15}{f'of {LIMIT:,}':>11}{'CPU s':>8}{'iterations':>12}{'rows':>10}")
    rows = [_row(name, repeats, as_json) for name in policies or known]
    if as_json:
        print(json.dumps([row for row in rows if row is not None]))
    if any(row is not None and row["below_limit"] for row in rows):
        sys.exit(1)


def _row(name: str, repeats: int, as_json: bool) -> dict[str, Any] | None:
    """Measure one policy and print its line; None if what it needs is not installed."""
    package = NEEDS.get(name)
    if package is not None:
        print(f"{name:<28}left out: it runs the code of {package}, which sets its speed", file=sys.stderr)
        return None
    row = in_own_process(name, repeats)
    row["below_limit"] = row["requests_per_cpu_s"] < LIMIT
    if not as_json:
        rate = row["requests_per_cpu_s"]
        line = f"{name:<28}{rate:>15,.0f}{rate / LIMIT:>10.1f}x{row['cpu_s']:>8.2f}"
        line += f"{row['iterations']:>12,}{row['rows']:>10,}"
        print(line + (f"  BELOW {LIMIT:,}" if row["below_limit"] else ""), flush=True)
    return row


if __name__ == "__main__":
    main()
