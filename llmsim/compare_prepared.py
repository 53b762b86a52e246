"""One side of a comparison, ready to be drawn: its numbers as functions of how often each request is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.compare_bootstrap import Counts, Floats, percentile
from llmsim.metrics import TARGETS, Columns, latencies_s
from llmsim.slo import Slo, enough, strain

LATENCIES = TARGETS  # ttft, tpot, e2el
PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Side:
    """One scenario's run: its summary and a row per request."""

    name: str
    scenario: dict[str, Any]
    summary: dict[str, Any]
    requests: Columns


class Prepared:
    """One side's numbers as functions of how often each request is drawn; values are sorted once.

    `order`: the requests by their arrival at the first side.
    """

    def __init__(
        self, side: Side, order: NDArray[np.intp], goodput: dict[str, float] | None, slos: Sequence[Slo] = ()
    ) -> None:
        self.side, self.slos = side, slos
        requests = {name: column[order] for name, column in side.requests.items()}
        self.done = np.isfinite(requests["finish_s"])
        latency_s = latencies_s(requests)
        self.latency_ms = {name: 1e3 * values for name, values in latency_s.items()}
        self.strains: dict[Slo, tuple[NDArray[np.intp], Floats]] = {}
        for slo in slos:
            if slo.good_s:
                worst = strain(latency_s, ~self.done, slo)
                rising = np.argsort(worst, kind="stable")
                self.strains[slo] = rising, worst[rising]
        self.sorted: dict[str, tuple[NDArray[np.intp], Floats]] = {}
        for name, values in self.latency_ms.items():
            rising = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]  # nan comes last
            self.sorted[name] = rising, values[rising]
        self.good: NDArray[np.bool_] | None = None
        if goodput:
            self.good = self.done.copy()
            for name, target_ms in goodput.items():
                self.good &= np.nan_to_num(self.latency_ms[name], nan=0.0) <= target_ms
        self.preemptions = requests["preemptions"]
        self.cached = requests["cached_tokens"] * self.done
        self.prompt = requests["prompt_tokens"] * self.done

    def numbers(self, weights: Counts) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, (rising, values) in self.sorted.items():
            times = weights[rising]
            upto = np.cumsum(times)
            total = int(upto[-1]) if len(upto) else 0
            found[f"mean_{name}_ms"] = float(times @ values) / total if total else None
            for percent in PERCENTS:
                found[f"p{percent}_{name}_ms"] = percentile(values, upto, total, percent) if total else None
        if self.good is not None:
            met = float(weights @ self.good)
            duration_s = self.side.summary["duration"]
            found["request_goodput"] = met / duration_s if duration_s else None
            found["slo_attainment"] = met / float(weights.sum())
        found["num_preemptions"] = float(weights @ self.preemptions)
        asked = float(weights @ self.prompt)
        found["prefix_cache_hit_rate"] = float(weights @ self.cached) / asked if asked else None
        return found

    def promised_s(self, weights: Counts) -> list[float]:
        """What each SLO is about, in seconds (`llmsim.slo`: a rejected request is infinitely late; nan: nothing)."""
        return [self._promised_s(slo, weights) for slo in self.slos]

    def _promised_s(self, slo: Slo, weights: Counts) -> float:
        if slo in self.strains:
            rising, values = self.strains[slo]
            upto = np.cumsum(weights[rising])
            total = int(upto[-1]) if len(upto) else 0
            return float(values[np.searchsorted(upto, enough(total, slo))]) if total else nan
        if slo.metric not in self.sorted:
            return itl_s(slo, self.side)
        rising, values = self.sorted[slo.metric]
        times, lost = weights[rising], int(weights[~self.done].sum())
        upto = np.cumsum(times)
        answered = int(upto[-1]) if len(upto) else 0
        total = answered + lost
        if not total:
            return nan
        if slo.percent is None:
            return inf if lost else float(times @ values) / total / 1e3
        rank = (total - 1) * slo.percent / 100.0
        if ceil(rank) >= answered:  # it lies among, or beside, the rejected ones
            low = int(rank)
            return (
                inf if low < rank or low >= answered else float(values[np.searchsorted(upto, low, side="right")]) / 1e3
            )
        return percentile(values, upto, total, slo.percent) / 1e3


ITL = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}  # statistic: word of its key


def check_slos(slos: Sequence[Slo]) -> None:
    """Gaps between tokens belong to no request: of them there is what the run's summary has."""
    for slo in slos:
        if slo.metric == "itl" and slo.statistic not in ITL:
            raise ValueError(f"slo {slo}: a summary has {', '.join(ITL)} of itl: give one of them")


def itl_s(slo: Slo, side: Side) -> float:
    value_ms = side.summary[f"{ITL[slo.statistic]}_itl_ms"]
    return nan if value_ms is None else float(value_ms) / 1e3
