"""The bench of a plan: it simulates what searches ask for, here or in worker processes, and cuts short traces.

Common random numbers: every simulation replays the same requests in the same order with the same seeds; a rate changes
the scale of time and nothing else. So differences between options are theirs, and an answer is the same to the byte
whenever it is asked for, by however many processes.

A rate rescales the arrivals of sessions, not the waits inside them: `llmsim.trace.time_scaled`.

A *window* is a short stretch of the trace on the same scale of time: the busiest of its length, by work per second,
where the work of a request is its prompt and its answer, each as a multiple of its mean. A fleet that fails, fails
there first, so it tells where to look in the whole trace. What it says of the whole trace is never taken as an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from math import isinf
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llmsim.cost import CostModel
from llmsim.plan_asked import check_count
from llmsim.plan_runs import KEPT, Measured, Run, Window
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.slo import Slo, check_measurable, good_share, goodput_targets_ms, values_s
from llmsim.trace import Trace, at_rate, limited, mean_rate_per_s, time_scaled, window
from llmsim.uncertainty_draws import Draw

T = TypeVar("T")
Search = Generator["Ask", Run, T]


@dataclass(frozen=True)
class Ask:
    """A simulation that a search wants."""

    scenario: Scenario
    rate: float
    window: Window | None = None
    draw: Drawn | None = None


class Drawn(NamedTuple):
    """Which of the machines that the real one may be."""

    number: int
    of: int
    machine: Draw


class Simulator:
    """One trace and its SLOs; holds the windows and cost models that come again."""

    def __init__(self, trace: Trace, slos: tuple[Slo, ...]) -> None:
        self.trace, self.slos = trace, slos
        self.own_rate = own_rate(trace)
        self._windows: dict[Window, Trace] = {}
        self._costs: dict[str, CostModel] = {}

    def run(self, ask: Ask) -> Run:
        time_scale = self.own_rate / ask.rate
        if ask.window is None:
            trace = at_rate(self.trace, ask.rate)
        else:
            trace = time_scaled(self._window(ask.window), time_scale)
        scenario, cost = ask.scenario, self.cost(ask.scenario)
        if ask.draw is not None:
            machine = ask.draw.machine
            scenario, cost = replace(scenario, seed=machine.seed), machine.of(cost)
        result = simulate(trace, scenario, cost=cost)
        summary = result.summary(goodput_targets_ms(self.slos))
        summary["cost_model"] = summary["calibration"]["label"]
        found = zip(self.slos, values_s(result, self.slos), strict=True)
        return Run(
            ask.scenario,
            ask.rate,
            time_scale,
            ask.window,
            len(trace),
            {name: summary[name] for name in KEPT},
            tuple(Measured(slo, value, good_share(result.requests, slo)) for slo, value in found),
            None if ask.draw is None else ask.draw.number,
            None if ask.draw is None else ask.draw.of,
        )

    def _window(self, wanted: Window) -> Trace:
        if wanted not in self._windows:
            self._windows[wanted] = limited(window(self.trace, wanted.start_s), wanted.requests)
        return self._windows[wanted]

    def cost(self, scenario: Scenario) -> CostModel:
        key = replace(scenario, replicas=1).to_toml()
        if key not in self._costs:
            self._costs[key] = cost_of(scenario)
        return self._costs[key]


def own_rate(trace: Trace) -> float:
    """Requests per second as the trace has them. Raises ValueError if it has no shape that could be rescaled."""
    rate = mean_rate_per_s(trace)
    if isinf(rate):
        if int((trace.arrival_s == trace.arrival_s).sum()) == 1:  # the others wait for it
            raise ValueError(f"{trace.name}: one request or session has no rate: give a trace of several")
        raise ValueError(
            f"{trace.name}: all {len(trace):,} requests arrive at once: there is no shape to rescale: give one with "
            "other arrival times, or one without any and a rate, at which they are drawn"
        )
    return rate


def busiest_window(trace: Trace, requests: int) -> Window | None:
    """The `requests` consecutive requests with the most work per second; None if that is most of the trace."""
    from llmsim.readers.settle import session_starts

    count = len(trace)
    if 2 * requests > count:
        return None
    starts_s = session_starts(trace.arrival_s, trace.parent)
    work = trace.prompt_tokens / trace.prompt_tokens.mean() + trace.output_tokens / trace.output_tokens.mean()
    before = np.concatenate([[0.0], np.cumsum(work)])
    first = np.flatnonzero(np.diff(starts_s, prepend=-np.inf) > 0)  # of simultaneous arrivals, all or none
    first = first[first + requests <= count]
    span_s = starts_s[first + requests - 1] - starts_s[first]
    with np.errstate(divide="ignore"):
        density = np.where(span_s > 0, (before[first + requests] - before[first]) / span_s, -np.inf)
    if not density.size or not np.isfinite(density.max()):
        return None
    return Window(float(starts_s[first[int(density.argmax())]]), requests)


# ---- driving searches -----------------------------------------------------------------------------------------------

_worker: dict[str, Simulator] = {}  # of a worker process: the trace, sent once


def _begin(trace: Trace, slos: tuple[Slo, ...]) -> None:
    _worker["simulator"] = Simulator(trace, slos)


def _work(ask: Ask) -> Run:
    return _worker["simulator"].run(ask)


class Bench:
    """Drives searches; `told(run)` hears of every simulation as it ends. A context: it ends its processes."""

    def __init__(self, trace: Trace, slos: tuple[Slo, ...], jobs: int, told: Callable[[Run], None]) -> None:
        check_count("jobs", jobs, "processes")
        check_measurable(slos, trace)
        self.simulator, self._told = Simulator(trace, slos), told
        self._pool = ProcessPoolExecutor(jobs, initializer=_begin, initargs=(trace, slos)) if jobs > 1 else None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def drive(self, searches: Sequence[Search[T]]) -> list[T]:
        """What each search returns, in their order. None depends on another, so neither do the answers on timing."""
        return self._in_turn(searches) if self._pool is None else self._at_once(searches, self._pool)

    def _in_turn(self, searches: Sequence[Search[T]]) -> list[T]:
        answers = []
        for search in searches:
            run: Run | None = None
            try:
                while True:
                    run = self.simulator.run(search.send(run))  # type: ignore[arg-type]  # None starts a generator
                    self._told(run)
            except StopIteration as end:
                answers.append(end.value)
        return answers

    def _at_once(self, searches: Sequence[Search[T]], pool: ProcessPoolExecutor) -> list[T]:
        answers: dict[int, T] = {}
        under_way: dict[Future[Run], int] = {}

        def go_on(at: int, run: Run | None) -> None:
            try:
                under_way[pool.submit(_work, searches[at].send(run))] = at  # type: ignore[arg-type]
            except StopIteration as end:
                answers[at] = end.value

        for at in range(len(searches)):
            go_on(at, None)
        while under_way:
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = future.result()
                self._told(run)
                go_on(under_way.pop(future), run)
        return [answers[at] for at in range(len(searches))]


def ignore(*_: Any) -> None:
    """What is told to nobody."""
