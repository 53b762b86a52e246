"""What a plan consists of: simulations, options, answers. All frozen; `to_dict()` is JSON-ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, isinf, log
from typing import TYPE_CHECKING, Any

from llmsim.metrics import json_safe
from llmsim.slo import Slo

if TYPE_CHECKING:
    import pandas as pd

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

    @property
    def met(self) -> bool:
        return self.slo.met(self.value_s)

    @property
    def margin(self) -> float:
        """The part of the limit that is left; negative: the part by which it is exceeded."""
        return self.slo.margin(self.value_s)

    def __str__(self) -> str:
        if isinf(self.value_s):
            return f"{self.slo.metric.upper()} {self.slo.statistic} never (rejected requests)"
        value = f"{1e3 * self.value_s:,.4g} ms" if self.value_s < 10.0 else f"{self.value_s:,.3g} s"
        over = f", {factor_over(self.value_s / self.slo.limit_s)} over" if not self.met else ""
        return f"{self.slo.metric.upper()} {self.slo.statistic} {value}{over}"

    def to_dict(self) -> dict[str, Any]:
        return {"slo": str(self.slo), "value_s": self.value_s, "margin": self.margin, "met": self.met}


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
        return "; ".join(words + ([] if self.stable else [str(self.values["stability"])]))

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
            "requests": self.requests,
            "holds": self.holds,
            "why_not": self.why_not,
            "slos": [one.to_dict() for one in self.measured],
            "values": self.values,
        }


@dataclass(frozen=True)
class Capacity:
    """The highest rate at which every SLO holds, between `rate` and `broken_rate`.

    `rate` is None if nothing holds, however low; `broken_rate` None if everything does. `points`: every simulation.
    """

    rate: float | None
    broken_rate: float | None
    points: tuple[Run, ...]

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


@dataclass(frozen=True)
class Option:
    """A fleet of one kind: the smallest that holds the demand, or, if the fleet is given, the highest rate it holds.

    `run` is the simulation the numbers are from, `broken` the nearest that does not hold: with one replica fewer, or at
    the next higher rate. `verified`: both are of the whole trace, not of a window of it.
    """

    scenario: Scenario
    usd_per_h: float
    status: str  # holds, breaks, dropped (a window of the trace says that it cannot win), over budget, cannot start
    reason: str  # why it does not hold or was not looked into further, one line; empty if it holds
    run: Run | None
    broken: Run | None
    verified: bool
    capacity_rate: float | None = None  # the highest rate this fleet holds, if that was looked for
    probability: float | None = None  # that every SLO is met (llmsim.uncertainty), if it was asked for

    @property
    def gpu(self) -> str:
        return self.scenario.gpu

    @property
    def tensor_parallel(self) -> int:
        return self.scenario.tensor_parallel

    @property
    def engine(self) -> str:
        return self.scenario.engine

    @property
    def replicas(self) -> int:
        return self.scenario.replicas

    @property
    def gpus(self) -> int:
        return self.replicas * self.tensor_parallel

    @property
    def name(self) -> str:
        return f"{self.replicas} x {self.kind}"

    @property
    def kind(self) -> str:
        return f"{self.gpu} TP{self.tensor_parallel} {self.engine}"

    @property
    def holds(self) -> bool:
        return self.status == "holds"

    @property
    def rate(self) -> float | None:
        return None if self.run is None else self.run.rate

    @property
    def margins(self) -> dict[str, float]:
        """By SLO: the part of its limit that is left."""
        return {} if self.run is None else {str(one.slo): one.margin for one in self.run.measured}

    @property
    def breaks(self) -> tuple[Measured, ...]:
        """The SLOs that break here, or, if it holds, in the nearest fleet or at the nearest rate that does not."""
        run = self.broken if self.holds else self.run
        return () if run is None else run.breaks

    def value(self, name: str) -> Any:
        return None if self.run is None else self.run.values[name]

    def _number(self, name: str) -> float | None:
        found: float | None = self.value(name)
        return found

    @property
    def goodput(self) -> float | None:
        """Requests per second that meet the limit of every SLO, each by itself; nothing if the fleet does not hold."""
        return self._number("request_goodput") if self.holds else None

    @property
    def goodput_per_gpu(self) -> float | None:
        return None if self.goodput is None else self.goodput / self.gpus

    @property
    def goodput_per_usd(self) -> float | None:
        """Requests that meet every limit, per dollar."""
        return None if self.goodput is None or not self.usd_per_h else 3600.0 * self.goodput / self.usd_per_h

    @property
    def usd_per_million_output_tokens(self) -> float | None:
        tokens_per_s = self.value("output_throughput")
        return 1e6 * self.usd_per_h / 3600.0 / tokens_per_s if tokens_per_s else None

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        return self._number("tokens_per_s_per_gpu")

    @property
    def tokens_per_s_per_user(self) -> float | None:
        return self._number("tokens_per_s_per_user")

    def row(self) -> dict[str, Any]:
        """One row of `Plan.frame()`."""
        numbers = {name: self.value(name) for name in KEPT if name != "stability"}
        slos = {} if self.run is None else {f"{one.slo.name}_margin": one.margin for one in self.run.measured}
        return {
            "gpu": self.gpu, "tensor_parallel": self.tensor_parallel, "engine": self.engine,
            "replicas": self.replicas, "gpus": self.gpus, "usd_per_h": self.usd_per_h, "rate": self.rate,
            "status": self.status, "holds": self.holds, "verified": self.verified, "reason": self.reason,
            "breaks_next": None if self.broken is None else self.broken.why_not,
            "capacity_rate": self.capacity_rate, "probability": self.probability, "goodput": self.goodput,
            "goodput_per_gpu": self.goodput_per_gpu, "goodput_per_usd": self.goodput_per_usd,
            "usd_per_million_output_tokens": self.usd_per_million_output_tokens, **slos, **numbers,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return self.row() | {
            "name": self.name,
            "scenario": self.scenario.to_dict(),
            "slos": [] if self.run is None else [one.to_dict() for one in self.run.measured],
            "broken": None if self.broken is None else self.broken.to_dict(),
        }


@dataclass(frozen=True)
class Plan:
    """Options, the best first, and the three answers among those that hold.

    For a demand (`fleet` False): `fewest` GPUs, `cheapest` per hour, `fastest` (lowest mean E2EL). For a given fleet
    (`fleet` True): the highest rate per GPU, per dollar, and of all.
    """

    slos: tuple[Slo, ...]
    rate: float | None  # the demand; None: the highest rate was looked for
    fleet: bool
    trace: dict[str, Any]
    options: tuple[Option, ...]
    fewest: Option | None
    cheapest: Option | None
    fastest: Option | None
    runs: tuple[Run, ...]
    prices: dict[str, str]  # by GPU, with source and date
    confidence: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether any option meets the SLOs (within the budget)."""
        return self.cheapest is not None

    @property
    def answers(self) -> dict[str, Option | None]:
        return {"fewest": self.fewest, "cheapest": self.cheapest, "fastest": self.fastest}

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([option.row() for option in self.options])

    def runs_frame(self) -> pd.DataFrame:
        """A row for every simulation."""
        import pandas as pd

        return pd.DataFrame([run_row(run) for run in self.runs])

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "slos": [str(slo) for slo in self.slos],
            "rate": self.rate,
            "fleet": self.fleet,
            "confidence": self.confidence,
            "trace": self.trace,
            "holds": self.holds,
            "answers": {name: None if one is None else one.name for name, one in self.answers.items()},
            "options": [option.to_dict() for option in self.options],
            "runs": [run.to_dict() for run in self.runs],
            "prices": self.prices,
            "notes": list(self.notes),
        }
        return {name: json_safe(value) for name, value in document.items()}


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
    return f"{100 * (ratio - 1):.2g} %" if ratio < 2.0 else f"{ratio:.3g} times"


def with_replicas(scenario: Scenario, replicas: int) -> Scenario:
    return replace(scenario, replicas=replicas)


def slos_of(slos: Sequence[Slo | str]) -> tuple[Slo, ...]:
    """Checked: at least one, and one limit for each statistic."""
    found = tuple(Slo.parse(slo) if isinstance(slo, str) else slo for slo in slos)
    if not found:
        raise ValueError("no slo: give at least one promise, e.g. ttft_p99=500ms")
    names = [slo.name for slo in found]
    for at, slo in enumerate(found):
        if slo.name in names[:at]:
            raise ValueError(f"slo {slo}: {slo.name} is given twice: keep one")
    return found
