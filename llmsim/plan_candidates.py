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
    reach: float  # the highest rate to look at


def candidate(trace: Trace, scenario: Scenario, kind: tuple[str, int, str], limits: Limits) -> Candidate:
    """One kind of fleet; if no engine would start it, or it is beyond the limits, with the reason."""
    gpu, tensor_parallel, engine = kind
    price, least = find_price(gpu, limits.prices), limits.replicas or 1
    own = replace(scenario, gpu=price.gpu, replicas=least)
    try:
        own = replace(own, tensor_parallel=tensor_parallel, engine=engine)
        Fleet(trace, own)
    except ValueError as refused:
        named = _named(own, tensor_parallel, engine)
        return Candidate(Trial(named, limits.reach), price, 0, " ".join(str(refused).split()), "cannot start")
    one = Candidate(Trial(own, limits.reach), price, least)
    most = limits.max_gpus // tensor_parallel
    if most < least:
        gpus = least * tensor_parallel
        return replace(one, cannot=f"{gpus} GPUs, {limits.max_gpus} are allowed", status="over budget")
    budget = limits.budget_usd_per_h
    if budget is not None and one.replica_usd:
        most = min(most, int(budget / one.replica_usd * (1.0 + 1e-12)))
        if most < least:
            usd = least * one.replica_usd
            return replace(one, cannot=f"${usd:.2f} an hour, the budget is ${budget:.2f}", status="over budget")
    return one if limits.replicas else replace(one, most=most)


def _named(scenario: Scenario, tensor_parallel: int, engine: str) -> Scenario:
    """What could not be started, with as much of it as a scenario can say."""
    for changes in ({"tensor_parallel": tensor_parallel, "engine": engine}, {"tensor_parallel": tensor_parallel}):
        try:
            return replace(scenario, **changes)
        except ValueError:
            continue
    return scenario
