"""The simulations behind a prediction: what is kept of each draw, in this process or in several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmsim.simulate import simulate
from llmsim.slo import Slo, values_s

if TYPE_CHECKING:
    from llmsim.cost import CostModel
    from llmsim.prices import Price
    from llmsim.scenario import Scenario
    from llmsim.trace import Trace
    from llmsim.uncertainty_draws import Draw

LATENCIES = ("ttft", "tpot", "itl", "e2el")
WORDS = ("mean", "median", "p90", "p95", "p99")
HEADLINE = (
    *(f"{word}_{name}_ms" for name in LATENCIES for word in WORDS),
    "duration", "failed", "request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
    "slo_attainment", "goodput_tok_s", "tokens_per_s_per_user", "tokens_per_s_per_gpu", "gpu_busy_frac",
    "cost_per_1m_output_tokens", "cost_per_1m_total_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is kept of a draw: numbers and samples of the summary, and what each SLO is about (s)."""

    values: dict[str, float | None]
    samples: dict[str, int]
    promised_s: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What every draw shares: sent to a process once."""

    trace: Trace
    scenario: Scenario
    cost: CostModel
    goodput: dict[str, float] | None
    slos: tuple[Slo, ...]
    price: Price | None = None

    def all(self, drawn: Sequence[Draw]) -> Iterator[Row]:
        return map(self.one, drawn)

    def one(self, draw: Draw) -> Row:
        result = simulate(self.trace, replace(self.scenario, seed=draw.seed), cost=draw.of(self.cost))
        summary = result.summary(self.goodput, self.price)
        values = {key: summary[key] for key in HEADLINE}
        late = zip(self.slos, values_s(result, self.slos), strict=True)
        return Row(values, summary["samples"], {slo.name: value_s for slo, value_s in late})


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
