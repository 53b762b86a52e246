"""The searches of one option: how many replicas a demand needs, which rate a fleet holds.

Each first looks at a window of the trace (`llmsim.plan_bench`), guided by one overloaded simulation, whose throughput
no fleet of this kind can exceed; `whole_*` then starts from there and asks the whole trace.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TypeVar

from llmsim.plan_bench import Ask
from llmsim.plan_runs import Run, Window
from llmsim.plan_search import fewest, highest_rate, rounded
from llmsim.scenario import Scenario

W = TypeVar("W")  # what a search wants to try
A = TypeVar("A")  # what it is told of that
F = TypeVar("F")  # what it finds
OVERLOAD = 1000.0  # times the trace's own rate: as good as all at once
SPAN = 4096.0  # how far below the guess a rate is looked for; above it, as far as the trace can tell
WINDOW_TOLERANCE, WINDOW_GUESS = 0.08, 0.6  # of the throughput under overload, an SLO leaves about so much


@dataclass(frozen=True)
class Found:
    """Where it turns: the simulation that holds and the nearest one that does not; either may be missing."""

    held: Run | None
    broken: Run | None


def answered(search: Generator[W, A, F], answer: Callable[[W], Generator[Ask, Run, A]]) -> Generator[Ask, Run, F]:
    """What a search finds, each thing it wants to try answered by simulations."""
    try:
        wanted = next(search)
        while True:
            wanted = search.send((yield from answer(wanted)))
    except StopIteration as end:
        found: F = end.value
        return found


@dataclass
class Trial:
    """One option under search; `runs` keeps every simulation, so that none is asked for twice. `ends`: the lowest
    and the highest rate that the trace can show (`llmsim.plan_reach`)."""

    scenario: Scenario
    ends: tuple[float, float]
    runs: dict[tuple[int, float, Window | None], Run] = field(default_factory=dict)

    def ask(self, replicas: int, rate: float, window: Window | None) -> Generator[Ask, Run, Run]:
        key = replicas, rate, window
        if key not in self.runs:
            self.runs[key] = yield Ask(replace(self.scenario, replicas=replicas), rate, window)
        return self.runs[key]

    # ---- how many replicas -------------------------------------------------------------------------------------------

    def size(self, rate: float, window: Window | None, *, most: int) -> Generator[Ask, Run, Found]:
        """The fewest replicas for a demand, from nothing."""
        alone = yield from self.ask(1, rate, window)
        if alone.holds or most == 1:
            return Found(alone, None) if alone.holds else Found(None, alone)
        guess = ceil((alone.values["request_rate"] or rate) / (alone.values["request_throughput"] or rate))
        return (yield from self._fewest(max(2, guess), rate, window, most, broken=1))

    def whole_size(self, guess: int | None, rate: float, *, most: int) -> Generator[Ask, Run, Found]:
        """The same on the whole trace, from a guess that should be close."""
        if guess is None:
            return (yield from self.size(rate, None, most=most))
        return (yield from self._fewest(guess, rate, None, most, broken=0))

    def fixed(self, rate: float, window: Window | None) -> Generator[Ask, Run, Found]:
        """Whether the fleet as it is holds a rate."""
        run = yield from self.ask(self.scenario.replicas, rate, window)
        return Found(run, None) if run.holds else Found(None, run)

    def _fewest(
        self, guess: int, rate: float, window: Window | None, most: int, broken: int
    ) -> Generator[Ask, Run, Found]:
        def holds(count: int) -> Generator[Ask, Run, bool]:
            return (yield from self.ask(count, rate, window)).holds

        held, broken = yield from answered(fewest(guess, most=most, broken=broken), holds)
        return Found(self.runs.get((held or 0, rate, window)), self.runs.get((broken, rate, window)))

    # ---- which rate --------------------------------------------------------------------------------------------------

    def rates(self, own_rate: float, window: Window | None) -> Generator[Ask, Run, Found]:
        """The highest rate that the fleet holds, roughly, from nothing. Nothing broken: none that the trace shows."""
        flood = yield from self.ask(self.scenario.replicas, rounded(OVERLOAD * own_rate), window)
        offered, served = flood.values["request_rate"], flood.values["request_throughput"]
        share = served / offered if offered and served else 1.0 / OVERLOAD  # offered: of the window, not of the trace
        guess = WINDOW_GUESS * share * flood.rate
        return (yield from self._highest(guess, window, WINDOW_TOLERANCE))

    def whole_rates(self, guess: float | None, own_rate: float, tolerance: float) -> Generator[Ask, Run, Found]:
        """The same on the whole trace, to `tolerance`, from a guess that should be close."""
        if guess is None:
            rough = yield from self.rates(own_rate, None)
            near = rough.held or rough.broken
            assert near is not None
            guess = near.rate
        return (yield from self._highest(guess, None, tolerance))

    def _highest(self, guess: float, window: Window | None, tolerance: float) -> Generator[Ask, Run, Found]:
        replicas = self.scenario.replicas

        def excess(rate: float) -> Generator[Ask, Run, float]:
            return (yield from self.ask(replicas, rate, window)).excess

        least, most = self.ends
        guess = min(max(guess, least), most)
        search = highest_rate(guess, tolerance=tolerance, least=max(guess / SPAN, least), most=most)
        held, broken = yield from answered(search, excess)
        return Found(self.runs.get((replicas, held or 0.0, window)), self.runs.get((replicas, broken or 0.0, window)))
