"""`llmsim plan` against an exhaustive search: how long it takes, and how far from the optimum its answers are.

    python -m benchmarks.plan [--question demand|fleet|both] [--jobs 2] [--no-exhaustive] [--update]

The Azure conversation trace of 2023 (in ../shared/traces) for llama-3.1-8b on three kinds of GPU, tensor-parallel sizes
1, 2 and 4, and three engines: 27 options, promised TTFT p99 <= 500 ms and TPOT p95 <= 50 ms.

demand   40 requests/s: fewest GPUs, cheapest, fastest. Exhaustive: 1, 2, 3 ... replicas of every option on the whole
         trace until it holds.
fleet    one replica: the highest rate per GPU, per dollar and of all. Exhaustive: rates from 64/s down by steps of a
         fifth until one holds, then up by single per cents until one breaks, on the whole trace.

The exhaustive search shares nothing with the plan but the simulator: it scales arrivals, takes percentiles and compares
them by itself, drops nothing and knows no windows. Both keep to `--jobs` processes; wall times are those of the machine
as it is, CPU seconds those of all processes. `--update` puts what is printed into docs/planning.md.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.accuracy import update as put
from llmsim import Scenario, load_trace, simulate
from llmsim.plan import Plan, plan
from llmsim.prices import find_price

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "planning.md"
TRACE = ROOT.parent / "shared" / "traces" / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
GPUS, SIZES, ENGINES = ("h100-sxm", "h200-sxm", "a100-80gb-sxm"), (1, 2, 4), ("vllm", "sglang", "tensorrt-llm")
SLOS = ("ttft_p99=500ms", "tpot_p95=50ms")
TTFT_P99_S, TPOT_P95_S = 0.5, 0.05
DEMAND, FASTEST, COARSE, FINE, SLOWEST = 40.0, 64.0, 0.8, 1.01, 0.5
MOST_GPUS, NEVER_S = 256, 1e12
QUESTIONS: dict[str, dict[str, Any]] = {"demand": {"rate": DEMAND}, "fleet": {"replicas": 1}}


@dataclass(frozen=True)
class Kind:
    gpu: str
    tensor_parallel: int
    engine: str

    def scenario(self, replicas: int) -> Scenario:
        return Scenario(
            model="llama-3.1-8b", gpu=self.gpu, tensor_parallel=self.tensor_parallel, engine=self.engine,
            replicas=replicas,
        )  # fmt: skip

    def usd_per_h(self, replicas: int) -> float:
        return replicas * self.tensor_parallel * find_price(self.gpu).usd_per_gpu_hour

    def __str__(self) -> str:
        return f"{self.gpu} TP{self.tensor_parallel} {self.engine}"


def holds(kind: Kind, replicas: int, rate: float) -> tuple[bool, float]:
    """(whether both promises are kept and the queue does not run away, mean E2EL in seconds) on the whole trace."""
    trace = load_trace(TRACE)
    own_rate = (len(trace.arrival_s) - 1) / trace.arrival_s[-1]
    faster = replace(trace, arrival_s=trace.arrival_s * (own_rate / rate))
    result = simulate(faster, kind.scenario(replicas))
    done = result.requests
    rejected = np.isnan(done["finish_s"])  # an overloaded engine may give up on requests: they are late for ever
    ttft_s = np.where(rejected, NEVER_S, done["first_token_s"] - done["arrival_s"])
    many = done["output_tokens"] > 1
    tpot_s = np.where(rejected, NEVER_S, done["finish_s"] - done["first_token_s"])[many] / (
        done["output_tokens"][many] - 1
    )
    kept = np.percentile(ttft_s, 99) <= TTFT_P99_S and np.percentile(tpot_s, 95) <= TPOT_P95_S
    stable = result.summary()["stable"]
    return bool(kept and stable), float(np.nanmean(done["finish_s"] - done["arrival_s"]))


def fewest_replicas(kind: Kind) -> tuple[Kind, dict[str, float] | None]:
    """Scores of the smallest fleet of a kind that holds the demand, by trying all from one."""
    for replicas in range(1, MOST_GPUS // kind.tensor_parallel + 1):
        kept, e2el_s = holds(kind, replicas, DEMAND)
        if kept:
            return kind, {
                "fewest": replicas * kind.tensor_parallel, "cheapest": kind.usd_per_h(replicas), "fastest": e2el_s,
            }  # fmt: skip
    return kind, None


def highest_rate(kind: Kind) -> tuple[Kind, dict[str, float] | None]:
    """Scores of one replica at the last rate of the grid that holds."""
    rate = FASTEST
    while not holds(kind, 1, rate)[0]:
        rate *= COARSE
        if rate < SLOWEST:
            return kind, None
    while holds(kind, 1, rate * FINE)[0]:
        rate *= FINE
    return kind, {
        "fewest": kind.tensor_parallel / rate, "cheapest": kind.usd_per_h(1) / rate, "fastest": 1.0 / rate,
    }  # fmt: skip


def exhaustive(question: str, jobs: int) -> dict[str, tuple[Kind, float]]:
    """The best option by each score, the lower the better, and that score."""
    kinds = [Kind(*kind) for kind in product(GPUS, SIZES, ENGINES)]
    with ProcessPoolExecutor(jobs) as pool:
        found = list(pool.map(fewest_replicas if question == "demand" else highest_rate, kinds))
    able = [(kind, scores) for kind, scores in found if scores is not None]
    return {
        name: min(((kind, scores[name]) for kind, scores in able), key=lambda one: one[1])
        for name in ("fewest", "cheapest", "fastest")
    }


def planned(found: Plan, name: str) -> float:
    """The plan's answer by the same score."""
    option = found.answers[name]
    assert option is not None and option.run is not None
    e2el_s = option.run.values["mean_e2el_ms"] / 1e3
    if not found.fleet:
        return {"fewest": option.gpus, "cheapest": option.usd_per_h, "fastest": e2el_s}[name]
    assert option.rate is not None
    return {"fewest": option.gpus, "cheapest": option.usd_per_h, "fastest": 1.0}[name] / option.rate


def cpu_s() -> float:
    """Of this process and of those it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(call: Any) -> tuple[Any, float, float]:
    wall_s, before_s = time.perf_counter(), cpu_s()
    answer = call()
    return answer, time.perf_counter() - wall_s, cpu_s() - before_s


def judge(question: str, jobs: int, with_exhaustive: bool) -> Iterator[str]:
    trace = load_trace(TRACE)
    wanted: dict[str, Any] = {"gpus": GPUS, "tensor_parallels": SIZES, "engines": ENGINES, **QUESTIONS[question]}
    base = Kind(GPUS[0], 1, ENGINES[0]).scenario(1)
    found, wall_s, used_s = timed(lambda: plan(trace, base, SLOS, jobs=jobs, **wanted))
    whole = sum(run.window is None for run in found.runs)
    yield (
        f"{question}: {len(found.options)} options in {wall_s:.0f} s, {used_s:.0f} CPU s, {jobs} processes;"
        f" {len(found.runs)} simulations, {whole} of the whole trace"
    )
    for name, option in found.answers.items():
        yield f"  {name}: {option.name}, ${option.usd_per_h:.2f}/h, {option.rate:.4g}/s"
    if not with_exhaustive:
        return
    best, wall_s, used_s = timed(lambda: exhaustive(question, jobs))
    yield f"  exhaustive, {len(GPUS) * len(SIZES) * len(ENGINES)} options: {wall_s:.0f} s, {used_s:.0f} CPU s"
    for name, (kind, score) in best.items():
        mine = planned(found, name)
        option = found.answers[name]
        yield f"  {name}: {kind} at {score:.5g}; the plan's {option.kind} at {mine:.5g} ({mine / score - 1:+.2%})"


@click.command(help=__doc__)
@click.option("--question", type=click.Choice(["demand", "fleet", "both"]), default="both", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--exhaustive/--no-exhaustive", "with_exhaustive", default=True, help="Minutes. [on]")
@click.option("--update", is_flag=True, help="Put it into docs/planning.md.")
def main(question: str, jobs: int, with_exhaustive: bool, update: bool) -> None:
    if not TRACE.is_file():
        raise click.ClickException(f"{TRACE} is missing: see README.md for where the trace is published")
    printed = []
    for one in QUESTIONS if question == "both" else (question,):
        for line in judge(one, jobs, with_exhaustive):
            click.echo(line)
            printed.append(line)
    if update:
        put(PAGE, "```text\n" + "\n".join(printed) + "\n```", ("<!-- plan -->", "<!-- /plan -->"))


if __name__ == "__main__":
    main()
