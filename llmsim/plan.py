"""How many GPUs, of which kind, set how, for this traffic and these promises.

    plan(trace, scenario, slos, rate=40, gpus=("h100-sxm", "h200-sxm"), tensor_parallels=(1, 2))

An *option* is a kind of fleet: GPU, tensor-parallel size, engine. For a demand (`rate`, or the trace's own) the plan
finds the fewest replicas of each option that hold every SLO; for a given fleet (`replicas` and no `rate`) the highest
rate that it holds. The answers are the best of those options by GPUs, by dollars and by speed.

How it searches (`llmsim.plan_search`, `plan_option`, `plan_bench`, `plan_contest`):

1. Every option is searched on a window of the trace, its busiest: short simulations.
2. The best by each measure are searched again on the whole trace, around what the window said; so is every option that
   could still win, until none is left. The others are dropped; they keep the window's numbers, and the plan says so.
3. If asked for, what makes the winners hold with a probability (`llmsim.plan_sure`).
4. Of the winners, the highest rate that their fleet holds.

Steps follow each other; within one, options do not depend on each other: the plan is the same for any number of `jobs`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from llmsim.engines import find_engine
from llmsim.plan_asked import check_count, check_number, check_prices, check_rate, several
from llmsim.plan_bench import Ask, Bench, busiest_window, own_rate
from llmsim.plan_candidates import Limits, candidate
from llmsim.plan_capacity import (
    TOLERANCE,
    WINDOW_REQUESTS,
    Progress,
    capacity,
    check_open,
    curve,
    curve_rows,
    told_as,
)
from llmsim.plan_contest import Candidate, Contest, Sure
from llmsim.plan_notes import notes_of
from llmsim.plan_option import Found
from llmsim.plan_reach import Reach, Told, told_by
from llmsim.plan_runs import Capacity, Measured, Run, Window, slos_of
from llmsim.plan_sure import Doubter, check_confidence, draws_for
from llmsim.plan_types import Option, Plan
from llmsim.scenario import Scenario
from llmsim.slo import Slo
from llmsim.trace import Trace

__all__ = [
    "Capacity", "Measured", "Option", "Plan", "Run", "Slo", "Window", "capacity", "curve", "curve_rows", "plan",
]  # fmt: skip

MAX_GPUS = 256
WINDOW_S = 60.0  # simulated, at the demand: shorter ones would hardly fill the batches
HEADROOM_TOLERANCE = 0.02
SIMULATIONS = (6, 4)  # for each option on its window, for each contender on the whole trace: what progress expects


def plan(
    trace: Trace,
    scenario: Scenario,
    slos: Sequence[Slo | str] | str,
    *,
    rate: float | None = None,
    replicas: int | None = None,
    gpus: Sequence[str] | str | None = None,
    tensor_parallels: Sequence[int] | int | None = None,
    engines: Sequence[str] | str | None = None,
    budget_usd_per_h: float | None = None,
    max_gpus: int = MAX_GPUS,
    confidence: float | None = None,
    prices: Path | str | None = None,
    tolerance: float = TOLERANCE,
    windows: bool = True,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Plan:
    """The plan; nothing meets the SLOs if `Plan.holds` is False.

    `scenario` (not `resolved()`): everything that the options do not set. `rate`: requests/s (sessions/s if turns
    wait). `replicas`: the fleet is given; with `rate`, whether it holds that, otherwise the highest rate it holds.
    `confidence`: with which probability the answers hold (`llmsim.plan_sure`). `prices`: a file as `llmsim.prices`
    describes. `progress(done, expected, words)` after every simulation. Raises ValueError for a question that has no
    meaning; an option that cannot start is listed with its reason instead.
    """
    promises = slos_of(slos)
    _check(rate, replicas, budget_usd_per_h, max_gpus, tolerance, jobs)
    check_prices(prices)
    check_open(scenario)
    if confidence is not None:
        check_confidence(confidence)
    kinds = list(product(
        several("gpus", gpus, scenario.gpu), several("tensor_parallels", tensor_parallels, scenario.tensor_parallel),
        several("engines", engines, scenario.engine),
    ))  # fmt: skip
    for _, _, engine in kinds:
        find_engine(engine)  # a name that nobody has is a slip; what it names may still not start
    fleet = replicas is not None and rate is None
    own = own_rate(trace)  # a shape to rescale is needed in any case
    demand = None if fleet else (rate or own)
    reach = Reach.of(trace)
    if demand is not None:
        check_rate(demand, reach, trace.name)
    rates = reach.least_rate(), max(reach.rate(), demand or 0.0)
    limits = Limits(replicas, budget_usd_per_h, max_gpus, None if prices is None else Path(prices), rates)
    candidates = [candidate(trace, scenario, kind, limits) for kind in kinds]
    able = [one for one in candidates if not one.cannot]
    window = _window(trace, demand, replicas or 1) if windows else None
    told = _Told(progress, SIMULATIONS[0] * len(able))
    with Bench(trace, promises, jobs, told) as bench:
        search = _Search(bench, Contest(able, demand, window), replicas, tolerance, told)
        search.look()
        search.verify()
        if confidence is not None:
            told.expected = told.done + draws_for(confidence)
            while Doubter(bench, search.contest, confidence).look():
                search.verify()
        search.headroom()
    options = {id(one): _option(one, search.contest, reach) for one in candidates}
    fewest, cheapest, fastest = (None if one is None else options[id(one)] for one in search.contest.winners())
    return Plan(
        slos=promises,
        rate=demand,
        fleet=fleet,
        trace=_facts(trace, reach),
        options=tuple(sorted(options.values(), key=lambda option: _order(option, fleet))),
        fewest=fewest,
        cheapest=cheapest,
        fastest=fastest,
        runs=tuple(run for one in candidates for run in (*one.trial.runs.values(), *one.drawn)),
        prices={one.price.gpu: str(one.price) for one in candidates},
        confidence=confidence,
        notes=notes_of(reach, [one for one in (fewest, cheapest, fastest) if one is not None]),
    )


def _check(
    rate: float | None, replicas: int | None, budget: float | None, max_gpus: int, tolerance: float, jobs: int
) -> None:
    check_number("rate", rate, "requests/s above 0")
    check_count("replicas", replicas, "replicas")
    check_number("budget_usd_per_h", budget, "dollars per hour above 0")
    check_count("max_gpus", max_gpus, "GPUs")
    check_number("tolerance", tolerance, f"a fraction of the rate, e.g. {TOLERANCE}", below=1.0)
    check_count("jobs", jobs, "processes")


def _window(trace: Trace, demand: float | None, replicas: int) -> Window | None:
    requests = WINDOW_REQUESTS * (replicas if demand is None else 1)
    return busiest_window(trace, max(requests, int(WINDOW_S * (demand or 0.0))))


def _facts(trace: Trace, reach: Reach) -> dict[str, Any]:
    waits = bool((trace.arrival_s != trace.arrival_s).any())  # nan: a turn that waits for its parent
    stamped = "nominal requests/s" if reach.has_sessions else "requests/s"  # only the starts of sessions are rescaled
    return {
        "name": trace.name,
        "sha256": trace.sha256,
        "requests": len(trace),
        "rate": own_rate(trace),
        "unit": "sessions/s" if waits else stamped,
        "sessions": reach.durations_s.size or None,
        "longest_rate": reach.rate() if reach.has_sessions else None,
    }


class _Told:
    """Counts simulations for whoever watches."""

    def __init__(self, progress: Progress | None, expected: int) -> None:
        self.progress, self.expected, self.done = progress, expected, 0

    def __call__(self, run: Run) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.expected, self.done + 1), told_as(run))


@dataclass(frozen=True)
class _Search:
    """The steps, each of which ends before the next begins."""

    bench: Bench
    contest: Contest
    replicas: int | None  # given, or to be found
    tolerance: float
    told: _Told

    def look(self) -> None:
        """Every option on the window."""
        if self.contest.window is None:
            return
        ones = self.contest.ones
        for one, found in zip(ones, self.bench.drive([self._rough(one) for one in ones]), strict=True):
            one.rough = found

    def verify(self) -> None:
        """On the whole trace: all that can win, until none is left."""
        while chosen := self.contest.contenders():
            self.told.expected = self.told.done + SIMULATIONS[1] * len(chosen)
            searches = [self._whole(one) for one in chosen]
            for one, found in zip(chosen, self.bench.drive(searches), strict=True):
                one.whole = found

    def headroom(self) -> None:
        """The highest rate that each winning fleet holds; for a given fleet that is the answer itself."""
        winners = {id(one): one for one in self.contest.winners() if one is not None}
        demand = self.contest.demand
        if demand is None:
            for one in self.contest.ones:
                one.capacity = one.whole
            return
        self.told.expected = self.told.done + SIMULATIONS[1] * len(winners)
        searches = []
        for one in winners.values():
            assert one.held is not None
            fleet = replace(one.trial, scenario=one.held.scenario)
            searches.append(fleet.whole_rates(demand, demand, HEADROOM_TOLERANCE))
        for one, found in zip(winners.values(), self.bench.drive(searches), strict=True):
            one.capacity = found

    def _rough(self, one: Candidate) -> Generator[Ask, Run, Found]:
        demand, window = self.contest.demand, self.contest.window
        if demand is None:
            return one.trial.rates(self.bench.simulator.own_rate, window)
        if self.replicas is not None:
            return one.trial.fixed(demand, window)
        return one.trial.size(demand, window, most=one.most)

    def _whole(self, one: Candidate) -> Generator[Ask, Run, Found]:
        demand = self.contest.demand
        if demand is not None and self.replicas is not None:
            return one.trial.fixed(demand, None)
        guess = None if one.rough is None else self.contest.expected(one)
        if demand is None:
            return one.trial.whole_rates(guess, self.bench.simulator.own_rate, self.tolerance)
        return one.trial.whole_size(None if guess is None else int(guess), demand, most=one.most)


# ---- what is said of each option ------------------------------------------------------------------------------------


def _option(one: Candidate, contest: Contest, reach: Reach) -> Option:
    found = one.whole or one.rough
    if found is None:
        usd = one.trial.scenario.replicas * one.replica_usd
        return Option(one.trial.scenario, usd, one.status, one.cannot, None, None, False)
    sure = one.sure or Sure(None, "")
    capacity = Told() if one.capacity is None else told_by(one.capacity, reach, chosen=bool(sure.doubts))
    run = found.held or found.broken
    assert run is not None
    status, reason = "holds", ""
    if found.held is None:
        status, reason = "breaks", _broken_words(one, run, contest)
    elif one.whole is None:
        status, reason = "dropped", _dropped_words(one, run, contest)
    return Option(
        scenario=run.scenario,
        usd_per_h=run.scenario.replicas * one.replica_usd,
        status=status,
        reason=reason,
        run=run,
        broken=found.broken if found.held is not None else None,
        verified=one.whole is not None,
        capacity_run=capacity.held,
        capacity_broken=capacity.broken,
        untold=capacity.untold,
        open=contest.demand is None and bool(capacity.untold),
        probability=sure.probability,
        draws=sure.draws,
        doubts=sure.doubts,
    )


def _broken_words(one: Candidate, run: Run, contest: Contest) -> str:
    if run.holds and one.sure is not None:
        return one.sure.doubts
    if contest.demand is None:
        return f"even at {run.rate:.3g}/s: {run.why_not}"
    most = f"even with {run.scenario.replicas} replicas" if run.scenario.replicas > 1 else "with 1 replica"
    return f"{most}: {run.why_not}"


def _dropped_words(one: Candidate, run: Run, contest: Contest) -> str:
    window = f"{run.requests} requests of the trace"
    if contest.demand is None:
        return f"cannot win: holds about {run.rate:.3g}/s, as {window} show"
    return f"cannot win: needs about {run.scenario.replicas}, as {window} show"


def _order(option: Option, fleet: bool) -> tuple[int, float, float]:
    """What holds before what does not; the cheapest first: per hour, of given fleets for the rate they hold."""
    place = ("holds", "dropped", "breaks", "over budget", "cannot start").index(option.status)
    per = option.usd_per_h / option.rate if fleet and option.rate else option.usd_per_h
    return place, per, option.value("mean_e2el_ms") or 0.0
