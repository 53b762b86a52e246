"""A promise about latency: `ttft_p99=500ms` is "99 % of all requests have their first token within half a second".

    metric      ttft, tpot, e2el (per request), itl (every gap between tokens), as `llmsim.metrics` defines them
    statistic   mean, median, or pN with 0 < N < 100 (p50, p99, p99.9): numpy's linear percentile
    limit       with its unit: us, ms or s

All requests that were sent count. One that was rejected or turned away never had its answer: it is infinitely late, so
that a fleet cannot keep a promise by refusing requests. A request of one token has no tpot and is left out of that one
metric. The mean is infinite as soon as one request was rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isinf, isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.gaps import GapRuns
from llmsim.metrics import TARGETS, latencies_s

if TYPE_CHECKING:
    from llmsim.metrics import Result

METRICS = ("ttft", "tpot", "itl", "e2el")
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
EXAMPLE = "write METRIC_STATISTIC=LIMIT, e.g. ttft_p99=500ms or tpot_mean=40ms"
FORM = re.compile(r"([a-z0-9]+)_([a-z0-9.]+)\s*=\s*([0-9.eE+-]+)\s*([a-z]*)")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Slo:
    """`statistic` of `metric` is to be at most `limit_s` seconds."""

    metric: str
    statistic: str
    limit_s: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"slo metric {self.metric!r} is not one of {', '.join(METRICS)}: {EXAMPLE}")
        if self.statistic != "mean" and self.percent is None:
            raise ValueError(f"slo statistic {self.statistic!r} is not mean, median or p1 to p99.99: {EXAMPLE}")
        if not (isfinite(self.limit_s) and self.limit_s > 0.0):
            raise ValueError(f"slo limit of {self.limit_s:g} s: give more than 0")

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `ttft_p99=500ms`. Raises ValueError that names what is wrong with the text."""
        found = FORM.fullmatch(text.strip().lower())
        if found is None:
            raise ValueError(f"slo {text!r}: {EXAMPLE}")
        metric, statistic, number, unit = found.groups()
        if unit not in UNITS_S:
            raise ValueError(f"slo {text!r}: the limit needs a unit, {', '.join(UNITS_S)}: {EXAMPLE}")
        try:
            limit = float(number)
        except ValueError:
            raise ValueError(f"slo {text!r}: {number!r} is not a number: {EXAMPLE}") from None
        return cls("e2el" if metric == "e2e" else metric, "p50" if statistic == "median" else statistic,
                   limit * UNITS_S[unit])  # fmt: skip

    @property
    def percent(self) -> float | None:
        """Of a percentile; None for the mean."""
        try:
            percent = float(self.statistic[1:]) if self.statistic.startswith("p") else nan
        except ValueError:
            return None
        return percent if 0.0 < percent < 100.0 else None

    @property
    def name(self) -> str:
        return f"{self.metric}_{self.statistic}"

    def __str__(self) -> str:
        return f"{self.name}={shown_s(self.limit_s)}"

    @property
    def words(self) -> str:
        """As tables and sentences name it: TTFT p99 <= 500 ms."""
        return f"{self.metric.upper()} {self.statistic} <= {1e3 * self.limit_s:g} ms"

    def met(self, value_s: float) -> bool:
        """Nothing measured (nan: no request has this latency) breaks no promise."""
        return isnan(value_s) or value_s <= self.limit_s

    def margin(self, value_s: float) -> float:
        """The part of the limit that is left; negative: the part by which it is exceeded."""
        return 1.0 - value_s / self.limit_s


def shown_s(seconds: float) -> str:
    """In the unit that needs no leading zero."""
    unit = "s" if seconds >= 10.0 else "ms" if seconds >= 1e-3 else "us"
    return f"{seconds / UNITS_S[unit]:.10g}{unit}"


def parse_slos(slos: Iterable[Slo | str]) -> tuple[Slo, ...]:
    """In the order given; one limit for each statistic."""
    found: list[Slo] = []
    for one in slos:
        slo = Slo.parse(one) if isinstance(one, str) else one
        if slo.name in [other.name for other in found]:
            raise ValueError(f"slo {slo}: {slo.name} is given twice: keep one")
        found.append(slo)
    return tuple(found)


def goodput_targets_ms(slos: Sequence[Slo]) -> dict[str, float]:
    """Per-request targets for goodput: the tightest limit of each latency of a request, whatever the statistic."""
    targets: dict[str, float] = {}
    for slo in slos:
        if slo.metric in TARGETS:
            targets[slo.metric] = min(1e3 * slo.limit_s, targets.get(slo.metric, inf))
    return targets


def values_s(result: Result, slos: Sequence[Slo]) -> tuple[float, ...]:
    """What each SLO is about, as measured: seconds; inf if too many requests were rejected, nan if there is nothing."""
    return of_requests_s(result.requests, slos, gaps=result.gaps)


def of_requests_s(requests: Any, slos: Sequence[Slo], *, gaps: Any = None) -> tuple[float, ...]:
    """The same from the columns of requests, and of gaps where an SLO is about itl."""
    rejected = ~np.isfinite(requests["finish_s"])
    latency_s = latencies_s(requests)
    rising: dict[str, Floats] = {}
    for name in {slo.metric for slo in slos} & latency_s.keys():
        values = np.where(rejected, inf, latency_s[name])
        rising[name] = np.sort(values[~np.isnan(values)])
    runs = GapRuns.of(gaps) if gaps is not None else None
    return tuple(_value_s(slo, rising, runs) for slo in slos)


def _value_s(slo: Slo, rising: dict[str, Floats], runs: GapRuns | None) -> float:
    if slo.metric == "itl":
        if runs is None:
            raise ValueError(f"slo {slo}: these requests come without the gaps between their tokens: leave it out")
        if not runs.total:
            return nan
        return float(runs.mean_s() if slo.percent is None else runs.percentiles_s([slo.percent])[0])
    values = rising[slo.metric]
    if not values.size:
        return nan
    return float(values.mean()) if slo.percent is None else percentile(values, slo.percent)


def percentile(rising: Floats, percent: float) -> float:
    """numpy's linear percentile of sorted values that may end in inf (numpy makes nan of inf beside a number)."""
    rank = (rising.size - 1) * percent / 100.0
    low = int(rank)
    below, share = float(rising[low]), rank - low
    if not share:
        return below
    above = float(rising[low + 1])
    return inf if isinf(above) else below + share * (above - below)
