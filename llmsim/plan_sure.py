"""Fleets that hold with a given probability: the winners of a plan, looked at on every machine the real one may be.

The machines are the draws of `llmsim.uncertainty`: cost models that are off by as much as recordings say, each with a
seed of its own, the same for every option. A fleet holds with probability k / n if it does on k of n. A winner that
falls short gets another replica, or a lower rate where the fleet is given, until it holds often enough; then the
winners are looked up again, for another option may now be better, also one that could not win before. An option counts
as it was calibrated until it has been looked at, which can only be too good: so no better option is missed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor

from llmsim.plan_asked import check_number
from llmsim.plan_bench import Ask, Bench, Drawn
from llmsim.plan_contest import Candidate, Contest, Sure
from llmsim.plan_option import Found
from llmsim.plan_runs import Run
from llmsim.plan_search import highest_rate
from llmsim.scenario import Scenario
from llmsim.uncertainty_draws import draws_of
from llmsim.uncertainty_sources import sources_of

DRAWS = 20  # at least; as many as let one of them fail
MOST_DRAWS = 1000  # of one fleet: minutes to hours
BLOCK = 4  # draws at a time: enough to know that too many fail
RATE_TOLERANCE = 0.02
HELD, FAILED = -0.05, 0.1  # what the search of a rate is told instead of an excess: it moves by 2 % and 5 %


@dataclass(frozen=True)
class Tally:
    """Draws looked at so far, of `planned`, and how many of them failed."""

    failed: int
    drawn: int
    planned: int
    allowed: int

    @property
    def enough(self) -> bool:
        """Whether as many hold as were asked for; known early only if not."""
        return self.failed <= self.allowed

    def sure(self, doubts: str) -> Sure:
        return Sure(1.0 - self.failed / self.planned, doubts, self.planned)


def lower_bound(kept: int, draws: int, doubt: float = 0.05) -> float:
    """The least probability to hold with which so many of the draws would hold in `doubt` of all cases: the one-sided
    bound of Clopper and Pearson. Of n of n it is doubt^(1 / n): 0.86 of 20."""
    from scipy.special import betaincinv

    return float(betaincinv(kept, draws - kept + 1, doubt)) if kept else 0.0


def draws_for(confidence: float) -> int:
    return max(DRAWS, ceil(1 / (1 - Fraction(repr(float(confidence))))))  # 0.9999 as it was written: 10,000


def check_confidence(confidence: float) -> None:
    check_number("confidence", confidence, "a probability between 0 and 1, such as 0.95", below=1.0)
    if draws_for(confidence) > MOST_DRAWS:
        raise ValueError(
            f"confidence={confidence:.12g}: takes {draws_for(confidence):,} simulations of each fleet looked at, "
            f"{MOST_DRAWS:,} are the most: give {1.0 - 1.0 / MOST_DRAWS:g} or less"
        )


@dataclass(frozen=True)
class Doubter:
    """Looks at winners."""

    bench: Bench
    contest: Contest
    confidence: float

    def look(self) -> bool:
        """At those not looked at yet; False: the winners are sure."""
        doubtful = {id(one): one for one in self.contest.winners() if one is not None and one.sure is None}
        for one in doubtful.values():
            if self.contest.demand is not None:
                self._enough_replicas(one, self.contest.demand)
            else:
                self._low_enough_rate(one)
        return bool(doubtful)

    def _enough_replicas(self, one: Candidate, demand: float) -> None:
        assert one.held is not None
        first = one.held.scenario.replicas
        doubts = ""
        for replicas in range(first, one.most + 1):
            tally = self._tally(one, replicas, demand)
            if tally.enough:
                self._keep(one, replicas, demand, tally.sure(doubts))
                return
            doubts = self._doubts(f"{replicas} hold{'s' * (replicas == 1)}", tally)
        self._keep(one, None, demand, Sure(None, doubts))

    def _low_enough_rate(self, one: Candidate) -> None:
        assert one.held is not None
        replicas, highest = one.held.scenario.replicas, one.held.rate
        tallies = {highest: self._tally(one, replicas, highest)}
        if tallies[highest].enough:
            one.sure = tallies[highest].sure("")
            return
        search = highest_rate(0.95 * highest, tolerance=RATE_TOLERANCE, least=highest / 64, most=highest)
        try:
            rate = next(search)
            while True:
                if rate not in tallies:
                    tallies[rate] = self._tally(one, replicas, rate)
                rate = search.send(HELD if tallies[rate].enough else FAILED)
        except StopIteration as end:
            held = end.value[0]
        doubts = self._doubts(f"{highest:.4g}/s holds", tallies[highest])
        if held is None:
            self._keep(one, None, 0.0, Sure(None, doubts))
        else:
            self._keep(one, replicas, held, tallies[held].sure(doubts))

    def _doubts(self, what: str, tally: Tally) -> str:
        return f"{what} with a probability below {self.confidence:g}: {tally.failed} of {tally.drawn} draws failed"

    def _tally(self, one: Candidate, replicas: int, rate: float) -> Tally:
        """The draws on which this holds, until it cannot be as many as were asked for."""
        scenario = replace(one.trial.scenario, replicas=replicas)
        count = draws_for(self.confidence)
        sources = sources_of(scenario.resolved(), self.bench.simulator.cost(scenario))
        drawn = [Drawn(at, count, machine) for at, machine in enumerate(draws_of(scenario, sources, count))]
        tally = Tally(0, 0, count, floor(count * (1.0 - self.confidence) + 1e-9))
        for at in range(0, count, BLOCK):
            runs = self._drawn_runs(one, scenario, rate, drawn[at : at + BLOCK])
            failed = sum(not run.holds for run in runs)
            tally = replace(tally, failed=tally.failed + failed, drawn=tally.drawn + len(runs))
            if not tally.enough:
                break
        return tally

    def _drawn_runs(self, one: Candidate, scenario: Scenario, rate: float, drawn: Sequence[Drawn]) -> list[Run]:
        runs = self.bench.drive([_one(Ask(scenario, rate, draw=draw)) for draw in drawn])
        one.drawn.extend(runs)
        return runs

    def _keep(self, one: Candidate, replicas: int | None, rate: float, sure: Sure) -> None:
        """This is now what the option is; its plain simulation too, where there is none yet."""
        one.sure = sure
        assert one.whole is not None and one.held is not None
        if replicas is None:
            one.whole = Found(None, one.held)
            return
        if (replicas, rate) != (one.held.scenario.replicas, one.held.rate):
            (held,) = self.bench.drive([one.trial.ask(replicas, rate, None)])
            one.whole = Found(held, one.whole.broken)


def _one(ask: Ask) -> Generator[Ask, Run, Run]:
    return (yield ask)
