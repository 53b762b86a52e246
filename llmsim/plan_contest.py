"""Who wins a plan, and who still could.

An option's scores, the lower the better, are its GPUs, its dollars per hour and the mean end-to-end latency; where the
highest rate of a given fleet is asked for, GPUs, dollars and one, each divided by that rate.

What a window says is carried over to the whole trace by the shift between the two, on the logarithm of the worst SLO
value over its limit (`Run.pressure`): of all simulations made of both, for the same fleet at the same rate, the median
is what to expect and the lowest, less `SLACK`, the best to hope for. An option whose best is no better than what
another has shown on the whole trace cannot win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite, log
from statistics import median

from llmsim.plan_option import Found, Trial
from llmsim.plan_runs import Run, Window
from llmsim.plan_search import SLOPE, rounded
from llmsim.prices import Price

SLACK = 0.1  # of the logarithm: a value 10 % lower than any shift so far would have it
SLOPES = (0.5, 20.0)  # of log latency over log rate, between which two close points are believed
Scores = tuple[float, float, float]


@dataclass(frozen=True)
class Sure:
    """What was found of the probability that a fleet holds."""

    probability: float | None  # None: nothing within the limits reaches what was asked for
    doubts: str  # of what holds as calibrated, and too seldom otherwise
    draws: int | None = None  # what the probability is the share of


@dataclass
class Candidate:
    """An option under search."""

    trial: Trial
    price: Price
    most: int  # replicas that the limits allow
    cannot: str = ""  # why it is not searched at all
    status: str = ""  # of that
    rough: Found | None = None  # on the window
    whole: Found | None = None
    capacity: Found | None = None  # the highest rate of this very fleet, and the nearest that breaks it
    sure: Sure | None = None
    drawn: list[Run] = field(default_factory=list)  # simulations on machines that the real one may be

    @property
    def replica_gpus(self) -> int:
        return self.trial.scenario.tensor_parallel

    @property
    def replica_usd(self) -> float:
        return self.replica_gpus * self.price.usd_per_gpu_hour

    @property
    def held(self) -> Run | None:
        """On the whole trace."""
        return None if self.whole is None else self.whole.held


@dataclass(frozen=True)
class Contest:
    """The state of a search between two of its steps."""

    ones: Sequence[Candidate]
    demand: float | None  # None: the highest rate of each fleet is asked for
    window: Window | None

    # ---- scores ------------------------------------------------------------------------------------------------------

    def scores(self, one: Candidate, replicas: int, rate: float, e2el_ms: float) -> Scores:
        gpus, usd = replicas * one.replica_gpus, replicas * one.replica_usd
        return (gpus, usd, e2el_ms) if self.demand is not None else (gpus / rate, usd / rate, 1.0 / rate)

    def shown(self, one: Candidate) -> Scores | None:
        """By the whole trace."""
        run = one.held
        return None if run is None else self.scores(one, run.scenario.replicas, run.rate, _e2el_ms(run))

    def winners(self) -> tuple[Candidate | None, Candidate | None, Candidate | None]:
        """Fewest GPUs, cheapest, fastest; ties are broken by the other two scores, then by the order of the options."""
        shown = [(scores, at) for at, one in enumerate(self.ones) if (scores := self.shown(one)) is not None]
        if not shown:
            return None, None, None
        orders = ((0, 1, 2), (1, 0, 2), (2, 1, 0))
        best = [min(shown, key=lambda item: ([item[0][i] for i in order], item[1])) for order in orders]
        return self.ones[best[0][1]], self.ones[best[1][1]], self.ones[best[2][1]]

    # ---- from the window to the whole trace --------------------------------------------------------------------------

    def shifts(self) -> list[float]:
        """Pressure on the whole trace less that on the window, wherever both are known."""
        found = []
        for one in self.ones:
            for (replicas, rate, window), run in one.trial.runs.items():
                if window is None and (twin := one.trial.runs.get((replicas, rate, self.window))) is not None:
                    found.append(run.pressure - twin.pressure)
        return [shift for shift in found if isfinite(shift)]

    def expected(self, one: Candidate) -> int | float:
        """Where the whole trace should turn: replicas, or a rate."""
        shifts = self.shifts()
        return self._turn(one, median(shifts) if shifts else 0.0)

    def hoped(self, one: Candidate) -> Scores:
        """The best scores that the whole trace may show of an option that has been searched on the window only."""
        assert one.rough is not None
        run = one.rough.held or one.rough.broken
        assert run is not None
        turn = self._turn(one, min(self.shifts(), default=0.0) - SLACK)
        ratios = [
            _e2el_ms(other.held) / _e2el_ms(other.rough.held)
            for other in self.ones
            if other.held is not None and other.rough is not None and other.rough.held is not None
        ]
        e2el_ms = _e2el_ms(run) * min(ratios, default=1.0) * exp(-SLACK)
        if self.demand is None:
            return self.scores(one, run.scenario.replicas, turn, e2el_ms)
        return self.scores(one, int(turn), self.demand, e2el_ms)

    def _turn(self, one: Candidate, shift: float) -> int | float:
        assert one.rough is not None
        return self._fewest(one, shift) if self.demand is not None else _rate(one.rough, shift)

    def _fewest(self, one: Candidate, shift: float) -> int:
        """The fewest replicas whose pressure on the window, shifted, is at most 0; what was not tried, by `SLOPE`."""
        assert one.rough is not None
        if one.rough.held is None:
            return one.most
        count = one.rough.held.scenario.replicas
        pressure = one.rough.held.pressure
        while count > 1:
            tried = one.trial.runs.get((count - 1, one.rough.held.rate, self.window))
            pressure = tried.pressure if tried is not None else pressure + SLOPE * log(count / (count - 1))
            if pressure + shift > 0.0:
                break
            count -= 1
        return count

    # ---- who could win -----------------------------------------------------------------------------------------------

    def contenders(self) -> list[Candidate]:
        """Options to look at on the whole trace next."""
        left = [one for one in self.ones if one.whole is None]
        if self.window is None or not left:
            return left
        best = [self.shown(one) for one in self.winners() if one is not None]
        hopes = [(one, self.hoped(one)) for one in left if self._may_hold(one)]
        if not best:
            return self._first(hopes) or self._least_broken(left)
        return [one for one, hope in hopes if any(hope[i] < scores[i] for i, scores in enumerate(best) if scores)]

    def _first(self, hopes: Sequence[tuple[Candidate, Scores]]) -> list[Candidate]:
        """With nothing known of the whole trace: the best by each score."""
        if not hopes:
            return []
        best = {id(one): one for i in range(3) for one, _ in [min(hopes, key=lambda item: item[1][i])]}
        return list(best.values())

    def _may_hold(self, one: Candidate) -> bool:
        """What did not hold on the window, with all the replicas that the limits allow, has to be close to it."""
        assert one.rough is not None
        if one.rough.held is not None:
            return True
        assert one.rough.broken is not None
        return one.rough.broken.pressure + min(self.shifts(), default=0.0) - SLACK <= 0.0

    def _least_broken(self, left: Sequence[Candidate]) -> list[Candidate]:
        """Nothing held so far. That is not said of the whole trace before it has been asked once."""
        if any(one.whole is not None for one in self.ones):
            return []
        return [min(left, key=_brokenness)]


def _brokenness(one: Candidate) -> float:
    assert one.rough is not None and one.rough.broken is not None
    return one.rough.broken.pressure


def _e2el_ms(run: Run) -> float:
    found: float | None = run.values["mean_e2el_ms"]
    return inf if found is None else found


def _rate(rough: Found, shift: float) -> float:
    """Where the line through the window's two ends, shifted, is 0."""
    near = rough.held or rough.broken
    assert near is not None
    slope = SLOPE
    if rough.held is not None and rough.broken is not None and isfinite(rough.broken.pressure - rough.held.pressure):
        slope = (rough.broken.pressure - rough.held.pressure) / log(rough.broken.rate / rough.held.rate)
    slope = min(max(slope, SLOPES[0]), SLOPES[1])
    away = (near.pressure + shift) / slope if isfinite(near.pressure) else 0.0
    return rounded(near.rate * exp(-away))
