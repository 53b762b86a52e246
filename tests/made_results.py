"""Results written by hand: every token's instant is given, the columns follow from the definitions."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import numpy as np

from llmsim.cost.constant import ConstantCost
from llmsim.cost.graphs import Graphs
from llmsim.metrics import GAP_COLUMNS, ITERATION_COLUMNS, Result
from llmsim.scenario import Scenario


@dataclass
class Served:
    """One request as a client saw it; no tokens: rejected."""

    arrival_s: float
    token_s: list[float]
    scheduled_s: float = nan
    prompt_tokens: int = 100
    cached_tokens: int = 0
    preemptions: int = 0
    preempted_s: float = 0.0
    preempted_before_first_s: float = 0.0
    replica: int = 0


def request_columns(served: list[Served]) -> dict[str, np.ndarray]:
    return {
        "id": np.arange(len(served)),
        "arrival_s": np.array([s.arrival_s for s in served]),
        "prompt_tokens": np.array([s.prompt_tokens for s in served]),
        "output_tokens": np.array([len(s.token_s) or 1 for s in served]),
        "replica": np.array([s.replica for s in served]),
        "scheduled_s": np.array([s.arrival_s if isnan(s.scheduled_s) and s.token_s else s.scheduled_s for s in served]),
        "first_token_s": np.array([s.token_s[0] if s.token_s else nan for s in served]),
        "finish_s": np.array([s.token_s[-1] if s.token_s else nan for s in served]),
        "preempted_s": np.array([s.preempted_s for s in served]),
        "preempted_before_first_s": np.array([s.preempted_before_first_s for s in served]),
        "cached_tokens": np.array([s.cached_tokens for s in served]),
        "preemptions": np.array([s.preemptions for s in served]),
    }


def gap_columns(served: list[Served]) -> dict[str, np.ndarray]:
    """One row a gap."""
    rows = [(b - a, 0.0, 1, 1, b) for s in served for a, b in zip(s.token_s, s.token_s[1:], strict=False)]
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate((*GAP_COLUMNS, "end_s"))}


def iteration_columns(*rows: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of the iteration log; what a row does not say is 0 (1 iteration)."""
    filled = [{"iterations": 1, **row} for row in rows]
    times = {"start_s", "gpu_first_s", "gpu_growth_s", "gpu_end_s"}
    return {
        name: np.array([row.get(name, 0) for row in filled], dtype=np.float64 if name in times else np.int64)
        for name in ITERATION_COLUMNS
    }


def made_result(served: list[Served], *rows: dict[str, Any], cost: Any = None, **settings: Any) -> Result:
    scenario = Scenario(**{"model": "llama-3.1-8b", "gpu": "h100-sxm", **settings}).resolved()
    if not rows:
        last_s = max((s.token_s[-1] for s in served if s.token_s), default=0.0)
        rows = ({"start_s": 0.0, "gpu_first_s": last_s, "gpu_end_s": last_s, "seqs": 1, "kv_blocks": 1},)
    return Result(
        requests=request_columns(served),
        iterations=iteration_columns(*rows),
        gaps=gap_columns(served),
        scenario=scenario,
        cost=cost or ConstantCost(0.01, Graphs.of_engine(256, 8192)),
        kv_blocks=1001,
        wall_s=0.5,
    )


def random_served(count: int, seed: int, rate: float = 20.0) -> list[Served]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count))
    served = []
    for arrival_s in arrivals.tolist():
        tokens = int(rng.integers(1, 40))
        first_s = arrival_s + float(rng.exponential(0.2))
        token_s = (first_s + np.concatenate([[0.0], np.cumsum(rng.gamma(2.0, 0.01, tokens - 1))])).tolist()
        scheduled_s = arrival_s + (first_s - arrival_s) * float(rng.random())
        served.append(Served(arrival_s, token_s, scheduled_s, prompt_tokens=int(rng.integers(1, 2000))))
    return served
