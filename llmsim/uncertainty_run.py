"""The simulations behind a prediction: what is kept of each draw, in this process or in several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmsim.gaps import GapRuns
from llmsim.metrics import Result, latencies_s
from llmsim.simulate import simulate

if TYPE_CHECKING:
    from llmsim.cost import CostModel
    from llmsim.scenario import Scenario
    from llmsim.trace import Trace
    from llmsim.uncertainty_draws import Draw

LATENCIES = ("ttft", "tpot", "itl", "e2el")
WORDS = ("mean", "median", "p90", "p95", "p99")
HEADLINE = (
    *(f"{word}_{name}_ms" for name in LATENCIES for word in WORDS),
    "duration", "request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
    "slo_attainment", "goodput_tok_s", "tokens_per_s_per_user", "tokens_per_s_per_gpu", "gpu_busy_frac",
    "cost_per_1m_output_tokens", "cost_per_1m_total_tokens",
)  # fmt: skip


class Promise(Protocol):
    """One service-level objective, as `llmsim.plan.Slo` is: a statistic of a latency, and what it may be at most."""

    @property
    def metric(self) -> str: ...
    @property
    def statistic(self) -> str: ...
    @property
    def limit_s(self) -> float: ...


def promise_name(slo: Promise) -> str:
    return f"{slo.metric}_{slo.statistic}<={1e3 * slo.limit_s:g}ms"


def summary_key(slo: Promise) -> str:
    """The key of the summary, or of the same form, that a promise is about."""
    word = "median" if slo.statistic in ("p50", "median") else slo.statistic
    return f"{word}_{slo.metric}_ms"


@dataclass(frozen=True)
class Row:
    values: dict[str, float | None]
    samples: dict[str, int]


@dataclass(frozen=True)
class Task:
    """What every draw shares: sent to a process once."""

    trace: Trace
    scenario: Scenario
    cost: CostModel
    goodput: dict[str, float] | None
    slos: tuple[Promise, ...]

    def all(self, drawn: Sequence[Draw]) -> Iterator[Row]:
        return map(self.one, drawn)

    def one(self, draw: Draw) -> Row:
        result = simulate(self.trace, replace(self.scenario, seed=draw.seed), cost=draw.of(self.cost))
        summary = result.summary(self.goodput)
        values = {key: summary[key] for key in HEADLINE}
        for slo in self.slos:
            key = summary_key(slo)
            if key not in values:
                values[key] = summary[key] if key in summary else _statistic_ms(result, slo)
        return Row(values, summary["samples"])


def _statistic_ms(result: Result, slo: Promise) -> float | None:
    """A percentile that the summary does not have."""
    try:
        percent = float(slo.statistic.removeprefix("p"))
    except ValueError:
        percent = -1.0
    if slo.metric not in LATENCIES or not slo.statistic.startswith("p") or not 0.0 < percent < 100.0:
        raise ValueError(
            f"slo {promise_name(slo)}: give one of {', '.join(LATENCIES)}, and mean or a percentile such as p99"
        )
    if slo.metric == "itl":
        gaps = GapRuns.of(result.gaps)
        return 1e3 * gaps.percentiles_s([percent])[0] if gaps.total else None
    values_s = latencies_s(result.requests)[slo.metric]
    values_s = values_s[np.isfinite(values_s)]
    return 1e3 * float(np.percentile(values_s, percent)) if values_s.size else None


_task: Task | None = None  # of this worker process


def _begin(task: Task) -> None:
    global _task  # a process pool's initializer has no other place for it
    _task = task


def _one(draw: Draw) -> Row:
    assert _task is not None
    return _task.one(draw)


def in_processes(task: Task, drawn: Sequence[Draw], jobs: int) -> Iterator[Row]:
    with ProcessPoolExecutor(jobs, initializer=_begin, initargs=(task,)) as pool:
        yield from pool.map(_one, drawn)
