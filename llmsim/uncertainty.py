"""Prediction intervals: the replay repeated on what the real machine may turn out to be.

Every draw is a whole simulation of the same trace, with a cost model whose terms are off by factors and with a seed of
its own (`llmsim.uncertainty_draws`; by how much: `llmsim.uncertainty_sources`).

The interval of a number reaches from the (1 - level)/2 to the (1 + level)/2 quantile of the draws, at plotting
positions k / (n + 1): if the truth is one more draw, it lies within with probability `level`, whatever the
distribution. That needs n + 1 >= 2 / (1 - level): 19 draws for 90 %.

An interval is of *this trace*: the same requests at the same times, served by another machine of the kind in another
hour. It says nothing about another hour's requests (`llmsim.compare` has the bootstrap for that), about terms that the
engine has and the simulator lacks, or about other traffic. Percentiles from too few requests stay doubtful
(`llmsim.metrics.fewest_samples`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.cost.scaled import Factors, ScaledCost
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of
from llmsim.slo import Slo
from llmsim.uncertainty_draws import Draw, draw_costs, draws_of
from llmsim.uncertainty_run import HEADLINE, Row, Task, in_processes
from llmsim.uncertainty_sources import SEED_ALONE, Source, Sources, sources_of

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.cost import CostModel
    from llmsim.trace import Trace

__all__ = [
    "HEADLINE", "SEED_ALONE", "Draw", "Factors", "Prediction", "Probability", "ScaledCost", "Source", "Sources",
    "draw_costs", "draws_of", "predict", "sources_of",
]  # fmt: skip

DRAWS, LEVEL = 32, 0.9
OTHER, SAME = "this trace, on another machine of the kind in another hour", "this trace, on the same machine again"
SHARES = (0.9, 0.95, 0.99)  # of the requests, for which `Prediction.attaining` is told


@dataclass(frozen=True)
class Probability:
    """That promises are kept, as shares of the draws."""

    all: float
    each: dict[str, float]
    draws: int


@dataclass(frozen=True)
class Prediction:
    """What n draws gave. `values[key][i]`: a number of `Result.summary()` in draw i; None where it does not exist."""

    scenario: Scenario
    level: float
    sources: Sources
    draws: tuple[Draw, ...]
    values: Mapping[str, tuple[float | None, ...]]
    samples: Mapping[str, int]  # of each latency: how many numbers the statistics rest on, in the draw with fewest
    slos: tuple[Slo, ...] = ()
    promised_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # what each of them is about, by draw

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """{key: (low, median, high)} of the numbers that every draw has."""
        found = {}
        for key, held in self.values.items():
            numbers = [value for value in held if value is not None]
            if len(numbers) == len(self.draws):
                found[key] = interval(numbers, self.level)
        return found

    def probability(self, slos: Sequence[Slo] | None = None) -> Probability:
        """That all of the promises are kept, and each of them; by default those that `predict` was given."""
        kept = np.ones(len(self.draws), dtype=bool)
        each: dict[str, float] = {}
        for slo in self.slos if slos is None else slos:
            holds = np.array([slo.met(value_s) for value_s in self._values_s(slo)])
            each[str(slo)] = float(holds.mean())
            kept &= holds
        return Probability(float(kept.mean()), each, len(self.draws))

    def attaining(self, share: float) -> float:
        """Probability that at least this share of the requests meets the goodput targets."""
        attained = self.values["slo_attainment"]
        if None in attained:
            raise ValueError("goodput: no targets were given to predict, so nothing says which requests meet them")
        return float(np.mean([met is not None and met >= share for met in attained]))

    def _values_s(self, slo: Slo) -> tuple[float, ...]:
        """By draw. The summary leaves rejected requests out; to an SLO they are infinitely late."""
        if slo.name in self.promised_s:
            return self.promised_s[slo.name]
        key = f"{'median' if slo.statistic == 'p50' else slo.statistic}_{slo.metric}_ms"
        if key not in self.values or any(self.values["failed"]):
            raise ValueError(f"slo {slo}: {slo.name} was not kept by draw: give it to predict(slos=…)")
        return tuple(nan if value is None else value / 1e3 for value in self.values[key])

    def frame(self) -> pd.DataFrame:
        """A row a number: key, low, median, high."""
        import pandas as pd

        rows = [(key, *ends) for key, ends in self.intervals.items()]
        return pd.DataFrame(rows, columns=["key", "low", "median", "high"])

    def draws_frame(self) -> pd.DataFrame:
        """A row a draw: its factors, seed, and every number."""
        import pandas as pd

        drawn = [draw.factors._asdict() | {"seed": draw.seed} for draw in self.draws]
        numbers = [{key: held[i] for key, held in self.values.items()} for i in range(len(self.draws))]
        return pd.DataFrame([{**one, **more} for one, more in zip(drawn, numbers, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what the intervals are, and what they rest on."""
        found: dict[str, Any] = {
            "level": self.level,
            "draws": len(self.draws),
            "seed": self.scenario.seed,
            "of": SAME if self.sources == SEED_ALONE else OTHER,
            "sources": self.sources.to_dict(),
            "samples": dict(self.samples),
            "intervals": {key: list(ends) for key, ends in self.intervals.items()},
        }
        if self.slos:
            kept = self.probability()
            found["probability"] = {"all": kept.all, "each": kept.each}
        if None not in self.values["slo_attainment"]:
            found["attaining"] = {f"{share:g}": self.attaining(share) for share in SHARES}
        return found


def interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """(low, median, high) of draws, at plotting positions k / (n + 1)."""
    check_level(level, len(values))
    ends = ((1.0 - level) / 2, 0.5, (1.0 + level) / 2)
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), ends, method="weibull").tolist()
    return low, middle, high


def fewest_draws(level: float) -> int:
    return ceil(round(2.0 / (1.0 - level), 9)) - 1


def check_level(level: float, draws: int, name: str = "draws") -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level}: give a share between 0 and 1, such as {LEVEL}")
    if draws < fewest_draws(level):
        raise ValueError(
            f"{name}={draws}: an interval that holds {100 * level:g} % needs {fewest_draws(level)} or more (the lowest"
            f" and the highest of so many bound it): raise {name} or lower the level"
        )


def predict(
    trace: Trace,
    scenario: Scenario,
    *,
    draws: int = DRAWS,
    goodput: dict[str, float] | None = None,
    slos: Sequence[Slo] = (),
    level: float = LEVEL,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    sources: Sources | None = None,
    cost: CostModel | None = None,
) -> Prediction:
    """Replay the trace `draws` times on machines that the scenario's may turn out to be.

    `goodput`: targets in milliseconds, as for `Result.summary`. `jobs`: processes. `progress(done, draws)` after each
    draw. `sources` replaces what the recordings say; `SEED_ALONE` varies nothing but the seed. `cost` replaces
    scenario.cost. Draws and results are the same for the same scenario.seed, whatever `jobs`.
    """
    check_level(level, draws)
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: give 1 or more processes")
    scenario = scenario.resolved()
    inner = cost or cost_of(scenario)
    spread = sources_of(scenario, inner) if sources is None else sources
    drawn = draws_of(scenario, spread, draws)
    task = Task(trace, scenario, inner, goodput or None, tuple(slos))
    rows: list[Row] = []
    for row in task.all(drawn) if jobs == 1 else in_processes(task, drawn, min(jobs, draws)):
        rows.append(row)
        if progress is not None:
            progress(len(rows), draws)
    return Prediction(
        scenario=scenario,
        level=level,
        sources=spread,
        draws=tuple(drawn),
        values={key: tuple(row.values[key] for row in rows) for key in rows[0].values},
        samples={name: min(row.samples[name] for row in rows) for name in rows[0].samples},
        slos=tuple(slos),
        promised_s={name: tuple(row.promised_s[name] for row in rows) for name in rows[0].promised_s},
    )
