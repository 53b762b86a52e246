"""What a plan rests on: simulations, and what each promise came to. All frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, isinf, log
from typing import TYPE_CHECKING, Any

from llmsim.metrics import fewest_samples
from llmsim.slo import Slo, parse_slos

if TYPE_CHECKING:
    from llmsim.scenario import Scenario

# Of a simulation's summary, what a plan keeps (llmsim.metrics says what each is).
KEPT = (
    "num_prompts", "completed", "duration", "request_rate", "request_throughput", "output_throughput",
    "request_goodput", "slo_attainment", *(f"{word}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")
                        for word in ("mean", "median", "p90", "p95", "p99")),
    "tokens_per_s_per_gpu", "tokens_per_s_per_user", "gpu_busy_frac", "num_preemptions", "prefix_cache_hit_rate",
    "stable", "stability", "extrapolated", "cost_model",
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A stretch of the trace: its first `requests` requests (whole sessions) that arrive at `start_s` or later."""

    start_s: float
    requests: int


@dataclass(frozen=True)
class Measured:
    """One SLO in one simulation."""

    slo: Slo
    value_s: float  # inf: too many requests were rejected; nan: no request has this latency
    share: float | None = None  # of the requests that are good, where the promise is about that

    @property
    def met(self) -> bool:
        return self.slo.met(self.value_s)

    @property
    def margin(self) -> float:
        """The part of the limit that is left; negative: the part by which it is exceeded."""
        return self.slo.margin(self.value_s)

    @property
    def figure(self) -> str:
        """The value alone: of goodput the share of requests, for that is what was promised."""
        if self.share is not None:
            return f"{100 * self.share:.4g} %"
        return f"{1e3 * self.value_s:,.4g} ms"

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.figure} of requests good" + (f", {self.slo.percent:g} % promised" if not self.met else "")
        if isinf(self.value_s):
            return f"{self.slo.metric.upper()} {self.slo.statistic} never (rejected requests)"
        value = f"{1e3 * self.value_s:,.4g} ms" if self.value_s < 10.0 else f"{self.value_s:,.3g} s"
        over = f", {factor_over(self.value_s / self.slo.limit_s)} over" if not self.met else ""
        return f"{self.slo.metric.upper()} {self.slo.statistic} {value}{over}"

    def to_dict(self) -> dict[str, Any]:
        return {"slo": str(self.slo), "value_s": self.value_s, "margin": self.margin, "met": self.met} | (
            {} if self.share is None else {"share": self.share}
        )


@dataclass(frozen=True)
class Run:
    """One simulation: `scenario` on the trace with its arrivals `time_scale` times as late, or on a window of it.

    `rate` is that of the whole trace on the same scale of time, requests/s (sessions/s if turns wait).
    """

    scenario: Scenario
    rate: float
    time_scale: float
    window: Window | None
    requests: int
    values: dict[str, Any] = field(hash=False)  # of the summary, `KEPT`
    measured: tuple[Measured, ...]  # in the order of the plan's SLOs
    draw: int | None = None  # which of the machines that the real one may be (llmsim.uncertainty); None: as calibrated
    draws: int | None = None  # of so many

    @property
    def stable(self) -> bool:
        """Not known to be overloaded: too few requests to tell count as stable."""
        return self.values["stable"] is not False

    @property
    def holds(self) -> bool:
        """Every SLO is met and the queue did not keep growing: otherwise latencies say how long the trace is."""
        return self.stable and all(one.met for one in self.measured)

    @property
    def breaks(self) -> tuple[Measured, ...]:
        return tuple(one for one in self.measured if not one.met)

    def too_few(self, slo: Slo) -> bool:
        """Whether nothing bounds the percentile of this promise from above: of gaps between tokens there are enough."""
        percent = slo.percent
        if percent is None or percent <= 50.0 or slo.metric == "itl":
            return False
        return bool(self.values["completed"] < fewest_samples(percent))

    @property
    def pressure(self) -> float:
        """Log of the worst value over its limit, the queue left aside: at most 0 if every SLO is met."""
        ratios = [one.value_s / one.slo.limit_s for one in self.measured if one.value_s > 0.0]  # not nan
        return log(max(ratios)) if ratios else -inf

    @property
    def excess(self) -> float:
        """The same, inf if the queue kept growing: at most 0 if it holds."""
        return self.pressure if self.stable else inf

    @property
    def why_not(self) -> str:
        """What breaks, in words; empty if it holds."""
        words = [str(one) for one in self.breaks]
        queue = str(self.values["stability"]).partition(", so ")[0]
        if self.stable or words:
            return "; ".join(words + ([] if self.stable else [queue]))
        return f"{', '.join(map(str, self.measured))} kept, but the load is {queue}"

    def to_dict(self) -> dict[str, Any]:
        window = None if self.window is None else {"start_s": self.window.start_s, "requests": self.window.requests}
        return {
            "gpu": self.scenario.gpu,
            "tensor_parallel": self.scenario.tensor_parallel,
            "engine": self.scenario.engine,
            "replicas": self.scenario.replicas,
            "rate": self.rate,
            "time_scale": self.time_scale,
            "window": window,
            "draw": self.draw,
            "draws": self.draws,
            "requests": self.requests,
            "holds": self.holds,
            "why_not": self.why_not,
            "slos": [one.to_dict() for one in self.measured],
            "values": self.values,
        }


@dataclass(frozen=True)
class Capacity:
    """The highest rate at which every SLO holds, between `rate` and `broken_rate`.

    `rate` is None if nothing holds, however low, or, with the reason in `untold`, if the trace cannot tell: nothing
    breaks it, or only rates that the trace does not show (`llmsim.plan_reach`). `points`: every simulation.
    """

    rate: float | None
    broken_rate: float | None
    points: tuple[Run, ...]
    untold: str = ""

    def at(self, rate: float | None) -> Run | None:
        """The simulation at that rate, the one of the whole trace if there are two."""
        found = [run for run in self.points if run.rate == rate]
        return min(found, key=lambda run: run.window is not None, default=None)

    @property
    def held(self) -> Run | None:
        return self.at(self.rate)

    @property
    def broken(self) -> Run | None:
        return self.at(self.broken_rate)


def run_row(run: Run) -> dict[str, Any]:
    """One row of `Plan.runs_frame()`."""
    row = run.to_dict()
    for name in ("window", "values", "slos"):
        del row[name]
    row |= {str(one.slo): one.value_s for one in run.measured}
    window = run.window
    row["window_start_s"] = None if window is None else window.start_s
    row["window_requests"] = None if window is None else window.requests
    return row | run.values


def factor_over(ratio: float) -> str:
    """By how much a limit is exceeded: 12 %, or 4.2 times where that says more."""
    return f"{100 * (ratio - 1):.{0 if ratio >= 1.01 else 2}f} %" if ratio < 2.0 else f"{ratio:.3g} times"


def with_replicas(scenario: Scenario, replicas: int) -> Scenario:
    return replace(scenario, replicas=replicas)


def slos_of(slos: Sequence[Slo | str] | str) -> tuple[Slo, ...]:
    """Checked: at least one."""
    found = parse_slos(slos)
    if not found:
        raise ValueError("no slo: give at least one promise, e.g. ttft_p99=500ms")
    return found
