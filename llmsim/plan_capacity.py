"""The highest rate that one fleet holds, and what becomes of latencies as the rate rises (the knee)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from math import exp, inf, log
from typing import Any

from llmsim.plan_asked import check_count, check_number
from llmsim.plan_bench import Ask, Bench, busiest_window, own_rate
from llmsim.plan_option import Found, Trial
from llmsim.plan_reach import Reach, told_by
from llmsim.plan_runs import Capacity, Run, slos_of, with_replicas
from llmsim.plan_search import rounded
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet
from llmsim.slo import Slo
from llmsim.trace import Trace

TOLERANCE = 0.01  # of a rate
WINDOW_REQUESTS = 2000  # for each replica
CURVE_POINTS = 12
CURVE_SPAN = (0.1, 1.3)  # of the capacity
Progress = Callable[[int, int, str], None]  # simulations done, expected, the last one in words


def capacity(
    trace: Trace,
    scenario: Scenario,
    slos: Sequence[Slo | str],
    *,
    replicas: int | None = None,
    tolerance: float = TOLERANCE,
    windows: bool = True,
    progress: Progress | None = None,
) -> Capacity:
    """The highest rate, in requests/s (sessions/s if turns wait), at which every SLO holds on the whole trace.

    `replicas`: instead of the scenario's. `tolerance`: how far apart, as a fraction, the rate that holds and the one
    that does not may be. `windows`: look at a stretch of the trace first. Raises ValueError for a scenario no engine
    would start with, and for a trace without a shape to rescale.
    """
    check_number("tolerance", tolerance, f"a fraction of the rate, e.g. {TOLERANCE}", below=1.0)
    check_count("replicas", replicas, "replicas")
    fleet = scenario if replicas is None else with_replicas(scenario, replicas)
    own_rate(trace)  # has a shape to rescale
    promises, reach = slos_of(slos), Reach.of(trace)
    trial = Trial(fleet, (reach.least_rate(), reach.rate()))
    check_open(fleet)
    Fleet(trace, fleet)  # what no engine would start with is said before anything is simulated
    with Bench(trace, promises, 1, _counting(progress)) as bench:
        (found,) = bench.drive([whole_capacity(trial, trace, tolerance, windows=windows)])
    runs = tuple(trial.runs.values())
    if found.held is None:
        return Capacity(None, None if found.broken is None else found.broken.rate, runs)
    said = told_by(found, reach)
    held, broken = (None if run is None else run.rate for run in (said.held, said.broken))
    return Capacity(held, broken, runs, said.untold)


def whole_capacity(trial: Trial, trace: Trace, tolerance: float, *, windows: bool) -> Generator[Ask, Run, Found]:
    """From nothing to the whole trace's answer; every simulation is left in `trial.runs`."""
    rate, guess = own_rate(trace), None
    window = busiest_window(trace, WINDOW_REQUESTS * trial.scenario.replicas) if windows else None
    if window is not None:
        rough = yield from trial.rates(rate, window)
        near = rough.held or rough.broken
        guess = None if near is None else near.rate
    return (yield from trial.whole_rates(guess, rate, tolerance))


def curve(
    trace: Trace,
    scenario: Scenario,
    slos: Sequence[Slo | str],
    rates: Sequence[float] | None = None,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
) -> tuple[Run, ...]:
    """The same fleet at rising rates, the whole trace each time.

    Without `rates`: a dozen from a tenth of the capacity to a third beyond it, closer together near the knee. What
    each point says is in `curve_rows`.
    """
    promises = slos_of(slos)
    check_open(scenario)
    Fleet(trace, scenario)
    if rates is None:
        found = capacity(trace, scenario, promises, progress=progress)
        rates = knee_rates(found.rate or found.broken_rate or own_rate(trace))
    wrong = [rate for rate in rates if not 0.0 < rate < float("inf")]
    if wrong:
        raise ValueError(f"rates: {wrong[0]:g} is no rate: give requests/s above 0")
    with Bench(trace, promises, jobs, _counting(progress)) as bench:
        return tuple(
            bench.drive([Trial(scenario, (0.0, inf)).ask(scenario.replicas, rate, None) for rate in sorted(set(rates))])
        )


def knee_rates(highest: float) -> list[float]:
    """Rates around the knee at `highest`: their distances to it shrink towards it, and one is the knee itself."""
    low, high = CURVE_SPAN
    below = CURVE_POINTS - 4
    rates = [highest * (1.0 - (1.0 - low) * exp(log(0.03) * i / (below - 1))) for i in range(below)]
    rates += [highest] + [highest * (1.0 + (high - 1.0) * share) for share in (0.1, 0.4, 1.0)]
    return [rounded(rate) for rate in rates]


def curve_rows(points: Sequence[Run]) -> list[dict[str, Any]]:
    """Each point: rate, {ttft,tpot,itl,e2el}_{mean,p50,p90,p95,p99}_s, attainment, stable, holds, what breaks."""
    rows = []
    for run in points:
        row: dict[str, Any] = {"rate": run.rate, "replicas": run.scenario.replicas}
        for metric in ("ttft", "tpot", "itl", "e2el"):
            for word, key in (("mean", "mean"), ("p50", "median"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99")):
                value_ms = run.values[f"{key}_{metric}_ms"]
                row[f"{metric}_{word}_s"] = None if value_ms is None else value_ms / 1e3
        row |= {"attainment": run.values["slo_attainment"], "goodput": run.values["request_goodput"]}
        row |= {name: run.values[name] for name in ("tokens_per_s_per_gpu", "tokens_per_s_per_user")}
        rows.append(row | {"stable": run.stable, "holds": run.holds, "why_not": run.why_not})
    return rows


def check_open(scenario: Scenario) -> None:
    if scenario.concurrency is not None:
        raise ValueError(
            f"concurrency={scenario.concurrency}: a closed loop has no rate to plan for: leave concurrency out"
        )


def _counting(progress: Progress | None) -> Callable[[Run], None]:
    done = 0

    def told(run: Run) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, max(done + 1, 14), told_as(run))

    return told


def told_as(run: Run) -> str:
    """A simulation in a few words, for progress."""
    s = run.scenario
    where = "" if run.window is None else f", {run.requests} requests"
    said = "holds" if run.holds else "breaks"
    return f"{s.replicas} x {s.gpu} TP{s.tensor_parallel} {s.engine} at {run.rate:.4g}/s{where}: {said}"
