"""Goodput against rate: every side at every rate of a grid, so that each is judged by the traffic it can carry.

The trace is rescaled to each rate (bursts keep their shape, waits between turns of a session their length), and every
side replays the same requests at the same times.

    attainment  requests that meet every target / requests sent, rejected ones included
    goodput     requests per second that meet every target
    carried     the highest rate of the grid up to which a side never fell below an attainment
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace, at_rate

if TYPE_CHECKING:
    import pandas as pd

FEWEST_RATES = 2
MOST_RATES = 64
NUMBERS = (
    "request_throughput", "request_goodput", "slo_attainment", "output_throughput", "tokens_per_s_per_gpu",
    "median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms", "p99_e2el_ms",
)  # fmt: skip


@dataclass(frozen=True)
class RatePoint:
    """One side at one rate; numbers under the keys of `Result.summary()`, None where there is none."""

    side: str
    rate: float  # requests per second offered (sessions per second of a trace whose turns wait)
    requests: int
    completed: int
    stable: bool | None
    stability: str
    numbers: dict[str, float | None]


def rate_grid(lowest: float, highest: float, points: int) -> list[float]:
    """`points` rates from lowest to highest, evenly spaced, to three significant digits."""
    if not 0.0 < lowest < highest < float("inf"):
        raise ValueError(f"rates {lowest:g} to {highest:g}: give two rates above 0 requests/s, the lower one first")
    if not FEWEST_RATES <= points <= MOST_RATES:
        raise ValueError(f"{points} rates: give {FEWEST_RATES} to {MOST_RATES}")
    step = (highest - lowest) / (points - 1)
    return sorted({float(f"{lowest + step * at:.3g}") for at in range(points)})


def rate_curves(
    trace: Trace,
    scenarios: Mapping[str, Scenario],
    rates: Sequence[float],
    goodput: dict[str, float],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[RatePoint]:
    """Every side at every rate, low rates first; `progress(done, total, what)` is told of each replay.

    Raises ValueError without targets, without a side, or for a trace that cannot be rescaled.
    """
    if not goodput:
        raise ValueError("no SLO: goodput against rate needs targets, e.g. ttft:500 tpot:50")
    if not scenarios:
        raise ValueError("no side: name a scheduler or an engine")
    total = len(rates) * len(scenarios)
    found: list[RatePoint] = []
    for rate in rates:
        at_this_rate = at_rate(trace, rate)
        for name, scenario in scenarios.items():
            if progress is not None:
                progress(len(found), total, f"{name} at {rate:g} requests/s")
            found.append(rate_point(name, rate, simulate(at_this_rate, scenario), goodput))
    if progress is not None:
        progress(total, total, "done")
    return found


def rate_point(name: str, rate: float, result: Result, goodput: dict[str, float]) -> RatePoint:
    summary = result.summary(goodput)
    return RatePoint(
        name,
        rate,
        summary["num_prompts"],
        summary["completed"],
        summary["stable"],
        summary["stability"],
        {key: summary[key] for key in NUMBERS},
    )


def frame(points: Iterable[RatePoint]) -> pd.DataFrame:
    """A row a point: side, rate, requests, completed, stable, stability and every number."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for point in points:
        row = asdict(point)
        rows.append(row | row.pop("numbers"))
    columns = ["side", "rate", "requests", "completed", "stable", "stability", *NUMBERS]
    made = pd.DataFrame(rows, columns=columns)
    return made.astype(dict.fromkeys(NUMBERS, "float64"))


def carried(points: Iterable[RatePoint], attainment: float) -> dict[str, float | None]:
    """Side -> highest rate of the grid with this attainment there and at every lower rate; None: not even the first."""
    if not 0.0 < attainment <= 1.0:
        raise ValueError(f"attainment={attainment:g} is no share of the requests: give one above 0, at most 1")
    best: dict[str, float | None] = {}
    failed: set[str] = set()
    for point in sorted(points, key=lambda one: one.rate):
        best.setdefault(point.side, None)
        share = point.numbers["slo_attainment"]
        if share is None or share < attainment:
            failed.add(point.side)
        if point.side not in failed:
            best[point.side] = point.rate
    return best


def carried_frame(points: Sequence[RatePoint], attainment: float) -> pd.DataFrame:
    """A row a side, in the order of the points: side, carried_rate (None: not even the lowest), highest_goodput."""
    import pandas as pd

    rates = carried(points, attainment)
    order = list(dict.fromkeys(point.side for point in points))
    most = {
        side: max((one.numbers["request_goodput"] or 0.0 for one in points if one.side == side), default=0.0)
        for side in order
    }
    rows = [(side, rates[side], most[side]) for side in order]
    made = pd.DataFrame(rows, columns=["side", "carried_rate", "highest_goodput"])
    return made.astype({"carried_rate": "float64"})
