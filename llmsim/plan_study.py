"""A plan's questions as values that can be sent to another process: what is asked, and the calls that answer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from llmsim.plan import curve, plan
from llmsim.plan_bench import own_rate
from llmsim.plan_frames import unstable_from
from llmsim.plan_runs import Run, slos_of
from llmsim.plan_types import Plan
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of
from llmsim.slo import Slo
from llmsim.trace import Trace, at_rate
from llmsim.uncertainty import Prediction, interval, predict
from llmsim.uncertainty_sources import NONE, SOURCES, Sources, sources_of

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int, str], None]
LEVEL = 0.9
FEWEST_DRAWS = 19  # that bound an interval of 90 %
SIMULATED = 24_000  # requests of a quick plan, all simulations together
PER_OPTION = 7  # simulations
FEWEST = 300  # requests of a quick plan
STEP, STEPS = 1.25, 5  # beyond the knee
AROUND = (0.8, 0.9, 1.0, 1.1, 1.2)  # of a rate: where the probability is told


class Source(Protocol):
    """Where a trace comes from (`llmsim.choice.TraceChoice`)."""

    def load(self, limit: int | None = None, scenario: Scenario | None = None) -> Trace: ...


@dataclass(frozen=True)
class Demand:
    """What `planned` is asked, in the fields of `llmsim.plan.plan`; None, empty: its own. `limit`: first N requests."""

    source: Source
    scenario: Scenario
    slos: tuple[str, ...]
    rate: float | None = None
    replicas: int | None = None
    gpus: tuple[str, ...] = ()
    tensor_parallels: tuple[int, ...] = ()
    engines: tuple[str, ...] = ()
    budget_usd_per_h: float | None = None
    max_gpus: int = 256
    confidence: float | None = None
    limit: int | None = None

    def trace(self) -> Trace:
        return self.source.load(self.limit, self.scenario)

    @property
    def options(self) -> int:
        return max(len(self.gpus), 1) * max(len(self.tensor_parallels), 1) * max(len(self.engines), 1)


def planned(demand: Demand, jobs: int = 1, progress: Progress | None = None) -> Plan:
    """Raises what `llmsim.plan.plan` does."""
    more: dict[str, Any] = {} if progress is None else {"progress": progress}
    return plan(
        demand.trace(),
        demand.scenario,
        demand.slos,
        rate=demand.rate,
        replicas=demand.replicas,
        gpus=demand.gpus or None,
        tensor_parallels=demand.tensor_parallels or None,
        engines=demand.engines or None,
        budget_usd_per_h=demand.budget_usd_per_h,
        max_gpus=demand.max_gpus,
        confidence=demand.confidence,
        jobs=jobs,
        **more,
    )


def quick(demand: Demand) -> Demand:
    """The same on the first requests and as calibrated, for an answer at once: confidence takes twenty times longer."""
    return replace(demand, limit=quick_requests(demand), confidence=None)


def quick_requests(demand: Demand) -> int:
    """Requests of a plan that is there at once."""
    return max(FEWEST, SIMULATED // (PER_OPTION * demand.options))


def knee(
    demand: Demand, fleet: Scenario, rates: Sequence[float] | None = None, progress: Progress | None = None
) -> tuple[Run, ...]:
    """One fleet's latencies at rising rates, around the highest that it holds unless `rates` are given.

    Then further, `STEP` at a time and at most `STEPS` times, to where its queue runs away.
    """
    trace = demand.trace()
    points = curve(trace, fleet, demand.slos, rates, progress=progress)
    if rates is not None:
        return points
    for _ in range(STEPS):
        if unstable_from(points) is not None:
            break
        further = float(f"{STEP * max(run.rate for run in points):.4g}")
        points += curve(trace, fleet, demand.slos, [further])
    return points


@dataclass(frozen=True)
class SurePoint:
    """One fleet at one rate: the probability that all promises are kept, and each of them with what each draw gave."""

    rate: float
    probability: float
    draws: int
    each: tuple[tuple[Slo, float, tuple[float, ...]], ...]  # SLO, probability, ms by draw
    sources: Sources


def sure(
    demand: Demand,
    fleet: Scenario,
    rate: float | None = None,
    draws: int = FEWEST_DRAWS,
    around: Sequence[float] = AROUND,
    without: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[SurePoint, ...]:
    """How likely a fleet keeps the promises at rates `around` the given one (None: the trace's own).

    `without`: sources of `llmsim.uncertainty_sources` that are left out; ("machine",): the machine is the one that
    the profile was measured on.
    """
    trace, promises = demand.trace(), slos_of(demand.slos)
    resolved = fleet.resolved()
    left_out: dict[str, Any] = dict.fromkeys(without, NONE)
    sources = replace(sources_of(resolved, cost_of(resolved)), **left_out)
    middle = own_rate(trace) if rate is None else rate
    rates = [float(f"{middle * share:.4g}") for share in around]
    found: list[SurePoint] = []
    for at in rates:

        def told(done: int, of: int, at: float = at) -> None:
            if progress is not None:
                progress(of * len(found) + done, of * len(rates), f"machines at {at:g}/s")

        prediction = predict(at_rate(trace, at), fleet, draws=draws, slos=promises, progress=told, sources=sources)
        found.append(sure_point(at, prediction))
    return tuple(found)


def sure_point(rate: float, prediction: Prediction) -> SurePoint:
    kept = prediction.probability()
    each = tuple(
        (slo, kept.each[str(slo)], tuple(1e3 * value_s for value_s in prediction.promised_s[slo.name]))
        for slo in prediction.slos
    )
    return SurePoint(rate, kept.all, kept.draws, each, prediction.sources)


def sure_up_to(points: Sequence[SurePoint], confidence: float) -> float | None:
    """The highest rate at which all promises are kept with this probability, as at every lower one; None: at none."""
    held = None
    for point in sorted(points, key=lambda point: point.rate):
        if point.probability < confidence:
            break
        held = point.rate
    return held


def off_by(sources: Sources) -> str:
    """Standard deviations of decode steps, in words."""
    parts = {name: getattr(sources, name).decode for name in SOURCES}
    said = ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if share)
    return f"decode steps off by (standard deviation): {said}; {sources.basis}" if said else sources.basis


def sure_frame(points: Sequence[SurePoint], level: float = LEVEL) -> pd.DataFrame:
    """A row a rate and SLO: rate, slo, limit_ms, low_ms, median_ms, high_ms (of the interval that holds `level`), low,
    median, high (the same as shares of the limit), probability (of this SLO), probability_all, draws.

    Raises ValueError where so many draws bound no such interval.
    """
    import pandas as pd

    rows = []
    for point in points:
        for slo, probability, draws_ms in point.each:
            ends_ms, limit_ms = interval(draws_ms, level), 1e3 * slo.limit_s
            shares = [value / limit_ms for value in ends_ms]
            rows.append(
                (point.rate, str(slo), limit_ms, *ends_ms, *shares, probability, point.probability, point.draws)
            )
    columns = ["rate", "slo", "limit_ms", "low_ms", "median_ms", "high_ms", "low", "median", "high", "probability"]
    return pd.DataFrame(rows, columns=[*columns, "probability_all", "draws"])


def flags_of(demand: Demand) -> list[str]:
    """What is asked, as flags of `llmsim plan` (the first GPU is among the scenario's own)."""
    words = [word for slo in demand.slos for word in ("--slo", slo)]
    if len(demand.gpus) > 1:
        words += ["--gpu", ",".join(demand.gpus[1:])]
    if demand.tensor_parallels:
        words += ["--tp", ",".join(map(str, demand.tensor_parallels))]
    if demand.engines:
        words += ["--engine", ",".join(demand.engines)]
    for flag, value in (
        ("--rate", demand.rate),
        ("--replicas", demand.replicas),
        ("--budget", demand.budget_usd_per_h),
    ):
        if value is not None:
            words += [flag, f"{value:.17g}"]
    if demand.confidence is not None:
        words += ["--confidence", f"{demand.confidence:g}"]
    return words + (["--max-gpus", str(demand.max_gpus)] if demand.max_gpus != 256 else [])
