"""A promise about latency: `ttft_p99=500ms` is "99 % of all requests have their first token within half a second".

    metric      ttft, tpot, e2el (per request), itl (every gap between tokens), as `llmsim.metrics` defines them
    statistic   mean, median, or p1 to p99.99 (p50, p99, p99.9): numpy's linear percentile
    limit       with its unit: us, ms or s

or about requests as a whole: `goodput_p99=ttft:500ms,tpot:50ms` is "99 % of all requests are good", where a good
request meets every one of the limits, in the words of `--goodput ttft:500 tpot:50` (a limit without a unit is in ms, as
there). What is measured of it is a multiple of the limits: each request's largest latency over its limit, and of these
the smallest that the promised share of requests does not exceed. So it is at most 1 just where that share is good, and
says how far the promise is from breaking.

All requests that were sent count. One that was rejected or turned away never had its answer: it is infinitely late, so
that a fleet cannot keep a promise by refusing requests. A request of one token has no tpot and is left out of that one
metric; as part of goodput it meets any tpot, as in `--goodput`. The mean is infinite as soon as one request was
rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, isinf, isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.gaps import GapRuns
from llmsim.metrics import TARGETS, latencies_s

if TYPE_CHECKING:
    from llmsim.metrics import Result
    from llmsim.trace import Trace

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT = "goodput"
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
EXAMPLE = "write METRIC_STATISTIC=LIMIT, e.g. ttft_p99=500ms or tpot_mean=40ms"
GOOD_EXAMPLE = "write goodput_pN=METRIC:LIMIT,…, e.g. goodput_p99=ttft:500ms,tpot:50ms"
FORM = re.compile(r"([a-z0-9]+)_([a-z0-9.]+)\s*=\s*([0-9.eE+-]+)\s*([a-z]*)")
PERCENTILE = re.compile(r"p[1-9][0-9]?(\.[0-9]{1,2})?")  # p1 to p99.99
LIMIT = re.compile(r"([0-9.eE+-]+)([a-z]*)")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Slo:
    """`statistic` of `metric` is to be at most `limit_s` seconds.

    Of goodput: `statistic` pN stands for N % of all requests, `good_s` is what a good one meets (latency, seconds), and
    what is measured is a multiple of that, so `limit_s` is 1.
    """

    metric: str
    statistic: str
    limit_s: float
    good_s: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.metric == GOODPUT:
            self._check_goodput()
        elif self.metric not in METRICS:
            raise ValueError(f"slo metric {self.metric!r} is not one of {', '.join(METRICS)}, {GOODPUT}: {EXAMPLE}")
        elif self.statistic != "mean" and self.percent is None:
            raise ValueError(f"slo statistic {self.statistic!r} is not mean, median or p1 to p99.99: {EXAMPLE}")
        if not (isfinite(self.limit_s) and self.limit_s > 0.0):
            raise ValueError(f"slo limit of {self.limit_s:g} s: give more than 0, and a finite time")
        if self.percent is not None:  # p99.0 and p99 are one promise
            object.__setattr__(self, "statistic", f"p{self.percent:g}")

    def _check_goodput(self) -> None:
        if self.percent is None:
            raise ValueError(f"slo {GOODPUT}_{self.statistic}: say of how many requests, p1 to p99.99: {GOOD_EXAMPLE}")
        names = [name for name, _ in self.good_s]
        wrong = [name for name in names if name not in TARGETS or names.count(name) > 1]
        if not names or wrong:
            said = f"{wrong[0]!r} is not one of {', '.join(TARGETS)}, each once" if wrong else "no limit"
            raise ValueError(f"slo {self.name}: {said}: {GOOD_EXAMPLE}")
        low = [f"{name} {limit_s:g} s" for name, limit_s in self.good_s if not 0.0 < limit_s < inf]
        if low or self.limit_s != 1.0:
            raise ValueError(f"slo {self.name}: limit of {(low or [f'{self.limit_s:g}'])[0]}: give more than 0, and 1")

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From `ttft_p99=500ms`. Raises ValueError that names what is wrong with the text."""
        if text.strip().lower().startswith(GOODPUT):
            return _goodput(text)
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
        return float(self.statistic[1:]) if PERCENTILE.fullmatch(self.statistic) else None

    @property
    def name(self) -> str:
        return f"{self.metric}_{self.statistic}"

    def __str__(self) -> str:
        good = ",".join(f"{name}:{shown_s(limit_s)}" for name, limit_s in self.good_s)
        return f"{self.name}={good or shown_s(self.limit_s)}"

    @property
    def words(self) -> str:
        """As tables and sentences name it: TTFT p99 <= 500 ms; 99 % of requests with TTFT <= 500 ms, TPOT <= 50 ms."""
        if self.good_s:
            good = " and ".join(f"{name.upper()} <= {1e3 * limit_s:g} ms" for name, limit_s in self.good_s)
            return f"{self.percent:g} % of requests with {good}"
        return f"{self.metric.upper()} {self.statistic} <= {1e3 * self.limit_s:g} ms"

    def met(self, value_s: float) -> bool:
        """Nothing measured (nan: no request has this latency) breaks no promise."""
        return isnan(value_s) or value_s <= self.limit_s

    def margin(self, value_s: float) -> float:
        """The part of the limit that is left; negative: the part by which it is exceeded."""
        return 1.0 - value_s / self.limit_s

    def shown(self, value_s: float) -> str:
        """What was measured, as tables show it."""
        if isnan(value_s):
            return "-"
        if isinf(value_s):
            return "rejected"
        return f"{value_s:.2f} of the limits" if self.good_s else f"{1e3 * value_s:,.2f} ms"


def _goodput(text: str) -> Slo:
    """From `goodput_p99=ttft:500ms,tpot:50`."""
    name, _, limits = text.strip().lower().partition("=")
    good_s = []
    for word in re.split(r"[,\s]+", limits.strip()):
        metric, _, limit = word.partition(":")
        found = LIMIT.fullmatch(limit)
        unit = (found[2] or "ms") if found else ""
        try:
            number = float(found[1]) if found else nan
        except ValueError:
            number = nan
        if isnan(number) or unit not in UNITS_S:
            raise ValueError(f"slo {text!r}: {word!r} is no limit: {GOOD_EXAMPLE}")
        good_s.append((metric, number / round(1.0 / UNITS_S[unit])))  # 50 ms is 0.05 s to the last bit
    return Slo(GOODPUT, name.removeprefix(GOODPUT).strip().removeprefix("_"), 1.0, tuple(good_s))


def shown_s(seconds: float) -> str:
    """In the unit that needs no leading zero."""
    unit = "s" if seconds >= 10.0 else "ms" if seconds >= 1e-3 else "us"
    return f"{seconds / UNITS_S[unit]:.10g}{unit}"


def parse_slos(slos: Iterable[Slo | str] | str) -> tuple[Slo, ...]:
    """In the order given; one limit for each statistic."""
    found: list[Slo] = []
    for one in (slos,) if isinstance(slos, str | Slo) else slos:
        if not isinstance(one, str | Slo):
            raise ValueError(f"slo {one!r} is no promise: {EXAMPLE}")
        slo = Slo.parse(one) if isinstance(one, str) else one
        if slo.name in [other.name for other in found]:
            raise ValueError(f"slo {slo}: {slo.name} is given twice: keep one")
        found.append(slo)
    return tuple(found)


def check_measurable(slos: Iterable[Slo], trace: Trace) -> None:
    """Raises ValueError for a promise about the time between tokens if no request has a second one: whatever a fleet
    did, it would count as kept."""
    if (trace.output_tokens > 1).any():
        return
    for slo in slos:
        about = {name for name, _ in slo.good_s} or {slo.metric}
        if about <= {"tpot", "itl"}:
            raise ValueError(
                f"slo {slo}: no request of {trace.name} has a second token, so nothing could break this: leave it out, "
                "or promise ttft or e2el"
            )


def goodput_targets_ms(slos: Sequence[Slo]) -> dict[str, float]:
    """Per-request targets for goodput: those of the promises about it; of others the limits, whatever the statistic.
    The tightest of each latency."""
    said = [pair for slo in slos for pair in slo.good_s]
    targets: dict[str, float] = {}
    for metric, limit_s in said or [(slo.metric, slo.limit_s) for slo in slos]:
        if metric in TARGETS:
            targets[metric] = min(1e3 * limit_s, targets.get(metric, inf))
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
    measured = [
        nth(np.sort(strain(latency_s, rejected, slo)), slo) if slo.good_s else _value_s(slo, rising, runs)
        for slo in slos
    ]
    nothing = inf if len(rejected) and rejected.all() else nan  # rejected requests have no gaps at all
    return tuple(nothing if isnan(value) else value for value in measured)


def strain(latency_s: dict[str, Floats], rejected: NDArray[np.bool_], slo: Slo) -> Floats:
    """By request: its largest latency over the limit of a good one; inf if it was rejected."""
    ratios = [np.nan_to_num(latency_s[name], nan=0.0) / limit_s for name, limit_s in slo.good_s]
    worst: Floats = np.where(rejected, inf, np.max(ratios, axis=0))
    return worst


def nth(rising: Floats, slo: Slo) -> float:
    """The smallest strain that the promised share of requests does not exceed; nan: there are none."""
    return float(rising[enough(rising.size, slo) - 1]) if rising.size else nan


def enough(requests: int, slo: Slo) -> int:
    """How many of them have to be good."""
    assert slo.percent is not None
    return ceil(round(requests * slo.percent / 100.0, 9))


def good_share(requests: Any, slo: Slo) -> float | None:
    """The share of requests that are good; None: the promise is about something else, or there are no requests."""
    if not slo.good_s or not len(requests["finish_s"]):
        return None
    return float(np.mean(strain(latencies_s(requests), ~np.isfinite(requests["finish_s"]), slo) <= 1.0))


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
