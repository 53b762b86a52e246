"""The options of a plan: which kinds of fleet start, and how many replicas of them the limits allow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmsim.plan_contest import Candidate
from llmsim.plan_option import Trial
from llmsim.prices import find_price
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet
from llmsim.trace import Trace


@dataclass(frozen=True)
class Limits:
    replicas: int | None
    budget_usd_per_h: float | None
    max_gpus: int
    prices: Path | None
    rates: tuple[float, float]  # the lowest and the highest to look at


def candidate(trace: Trace, scenario: Scenario, kind: tuple[str, int, str], limits: Limits) -> Candidate:
    """One kind of fleet; if no engine would start it, or it is beyond the limits, with the reason."""
    gpu, tensor_parallel, engine = kind
    price, least = find_price(gpu, limits.prices), limits.replicas or 1
    own = replace(scenario, gpu=price.gpu, replicas=least)
    try:
        own = replace(own, tensor_parallel=tensor_parallel, engine=engine)
        one = Candidate(Trial(own, limits.rates), price, least)
        most, over = _allowed(one, limits)
        if over:
            return replace(one, cannot=over, status="over budget")
        Fleet(trace, own)  # thousands of replicas take their time, so only within the limits
    except ValueError as refused:
        named = _named(own, tensor_parallel, engine)
        return Candidate(Trial(named, limits.rates), price, 0, " ".join(str(refused).split()), "cannot start")
    return one if limits.replicas else replace(one, most=most)


def _allowed(one: Candidate, limits: Limits) -> tuple[int, str]:
    """(replicas within the limits, in what the least number exceeds them)."""
    least, size = one.trial.scenario.replicas, one.trial.scenario.tensor_parallel
    most = limits.max_gpus // size
    if most < least:
        return most, f"{least * size} GPUs, {limits.max_gpus} are allowed"
    budget = limits.budget_usd_per_h
    if budget is not None and one.replica_usd:
        most = min(most, int(budget / one.replica_usd * (1.0 + 1e-12)))
        if most < least:
            return most, f"${least * one.replica_usd:.2f} an hour, the budget is ${budget:.2f}"
    return most, ""


def _named(scenario: Scenario, tensor_parallel: int, engine: str) -> Scenario:
    """What could not be started, with as much of it as a scenario can say."""
    for changes in ({"tensor_parallel": tensor_parallel, "engine": engine}, {"tensor_parallel": tensor_parallel}):
        try:
            return replace(scenario, **changes)
        except ValueError:
            continue
    return scenario
