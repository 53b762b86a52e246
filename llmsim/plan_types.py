"""A plan: its options and its answers. Frozen; `to_dict()` is JSON-ready, `frame()` has a row for every option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsim.metrics import json_safe
from llmsim.plan_runs import KEPT, Capacity, Measured, Run, Window, run_row, slos_of
from llmsim.slo import Slo

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.scenario import Scenario

__all__ = ["KEPT", "Capacity", "Measured", "Option", "Plan", "Run", "Window", "slos_of"]


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
    capacity_run: Run | None = None  # at the highest rate this fleet holds, if that was looked for and can be told
    capacity_broken: Run | None = None  # the simulation just above it, which does not hold
    untold: str = ""  # why the trace does not tell the highest rate
    open: bool = False  # that was the question, so that there is no rate to give numbers of
    probability: float | None = None  # that every SLO is met (llmsim.uncertainty), if it was asked for: the share of
    draws: int | None = None  # so many machines that the real one may be
    doubts: str = ""  # which smaller fleet, or higher rate, holds as calibrated and with too low a probability

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
        return None if self.run is None or self.open else self.run.rate

    @property
    def capacity_rate(self) -> float | None:
        """The highest rate that this fleet holds; None: not looked for, or `untold`."""
        return None if self.capacity_run is None else self.capacity_run.rate

    @property
    def probability_at_least(self) -> float | None:
        """What the draws support with 95 % confidence (`llmsim.plan_sure.lower_bound`)."""
        from llmsim.plan_sure import lower_bound

        if self.probability is None or self.draws is None:
            return None
        return lower_bound(round(self.probability * self.draws), self.draws)

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
        return None if self.run is None or self.open else self.run.values[name]

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
            "offered_rate": self.value("request_rate"),
            "breaks_next": None if self.broken is None else self.broken.why_not,
            "capacity_rate": self.capacity_rate, "capacity_untold": self.untold,
            "capacity_breaks_at": None if self.capacity_broken is None else self.capacity_broken.rate,
            "capacity_breaks": None if self.capacity_broken is None else self.capacity_broken.why_not,
            "probability": self.probability, "draws": self.draws,
            "probability_at_least": self.probability_at_least, "doubts": self.doubts,
            "goodput": self.goodput,
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
    notes: tuple[str, ...] = ()  # why the numbers may mislead: of a trace too short for its rates, for one

    @property
    def holds(self) -> bool:
        """Whether any option meets the SLOs (within the budget)."""
        return self.cheapest is not None

    @property
    def answers(self) -> dict[str, Option | None]:
        return {"fewest": self.fewest, "cheapest": self.cheapest, "fastest": self.fastest}

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        made = pd.DataFrame([option.row() for option in self.options])
        made.attrs["notes"] = list(self.notes)
        return made

    def __str__(self) -> str:
        """As `llmsim plan` prints it, with what should be known beside the numbers."""
        from llmsim.plan_report import report

        return "\n".join(report(self))

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
