"""A plan as frames for charts and tables: operating points, frontiers, the knee, promises with their probability.

    tokens/s/GPU      output tokens per second of the whole fleet / its GPUs
    tokens/s/user     1 / median TPOT: how fast an answer reads (interactivity)
    $ per million     dollars per hour of the fleet / output tokens per hour, in millions

    on the frontier   the SLOs hold, and no other simulation in which they hold is better in one of the two numbers
                      without being worse in the other

A percentile that grows with the length of the trace is no property of a rate, so from the lowest rate at which the
queue kept growing, and kept growing at every higher one, the curve is `unstable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.plan_runs import Run
from llmsim.plan_types import Option, Plan

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("mean", "p50", "p90", "p95", "p99")  # of a curve's points
METRICS = ("ttft", "tpot", "e2el")


def points_frame(plan: Plan) -> pd.DataFrame:
    """A row a simulation that has both rates of tokens: kind, name, gpu, replicas, gpus, rate, requests, whole (not a
    window of the trace), holds, stable, why_not, tokens_per_s_per_gpu, tokens_per_s_per_user, usd_per_h,
    usd_per_million_output_tokens, frontier, cost_frontier.

    Of a kind of fleet with simulations of the whole trace only these are there.
    """
    import pandas as pd

    price = {option.gpu: option.usd_per_h / option.gpus for option in plan.options}
    rows = [_point(run, price.get(run.scenario.gpu)) for run in plan.runs]
    columns = list(_point_columns())
    made = pd.DataFrame([row for row in rows if row["tokens_per_s_per_user"] is not None], columns=columns)
    verified = set(made["kind"][made["whole"]])
    made = made[made["whole"] | ~made["kind"].isin(verified)].reset_index(drop=True)
    made = made.astype({name: "float64" for name in columns if name.startswith(("tokens", "usd"))})
    holds = made["holds"].to_numpy(dtype=bool)
    user, gpu = made["tokens_per_s_per_user"].to_numpy(), made["tokens_per_s_per_gpu"].to_numpy()
    cost = made["usd_per_million_output_tokens"].to_numpy()
    made["frontier"] = frontier(user, gpu, holds)
    made["cost_frontier"] = frontier(user, -cost, holds & np.isfinite(cost))
    return made


def _point_columns() -> tuple[str, ...]:
    return (
        "kind", "name", "gpu", "tensor_parallel", "engine", "replicas", "gpus", "rate", "requests", "whole", "holds",
        "stable", "why_not", "tokens_per_s_per_gpu", "tokens_per_s_per_user", "usd_per_h",
        "usd_per_million_output_tokens",
    )  # fmt: skip


def _point(run: Run, usd_per_gpu_hour: float | None) -> dict[str, Any]:
    s = run.scenario
    gpus = s.replicas * s.tensor_parallel
    kind = f"{s.gpu} TP{s.tensor_parallel} {s.engine}"
    tokens_per_s = run.values["output_throughput"]
    usd_per_h = None if usd_per_gpu_hour is None else usd_per_gpu_hour * gpus
    dear = None if usd_per_h is None or not tokens_per_s else 1e6 * usd_per_h / 3600.0 / tokens_per_s
    values = (
        kind, f"{s.replicas} x {kind}", s.gpu, s.tensor_parallel, s.engine, s.replicas, gpus, run.rate, run.requests,
        run.window is None, run.holds, run.stable, run.why_not, run.values["tokens_per_s_per_gpu"],
        run.values["tokens_per_s_per_user"], usd_per_h, dear,
    )  # fmt: skip
    return dict(zip(_point_columns(), values, strict=True))


def frontier(
    x: NDArray[np.float64], y: NDArray[np.float64], eligible: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Which eligible points no other eligible one beats: larger is better in both; of equal points all are on it."""
    usable = np.ones(len(x), dtype=bool) if eligible is None else np.asarray(eligible, dtype=bool)
    found = np.zeros(len(x), dtype=bool)
    best = -np.inf
    order = sorted(np.flatnonzero(usable).tolist(), key=lambda i: (-x[i], -y[i]))
    last: tuple[float, float] | None = None
    for i in order:
        here = (float(x[i]), float(y[i]))
        found[i] = here[1] > best or here == last
        if here[1] > best:
            best, last = here[1], here
    return found


def options_frame(plan: Plan) -> pd.DataFrame:
    """A row an option, the best first: option, answers (which of fewest, cheapest, fastest it is), gpus, usd_per_h,
    status, rate, capacity_rate, tightest (the SLO with the least margin), margin, breaks_next (what breaks in the
    nearest fleet or rate that does not hold; of one that does not hold: in it) and numbers per GPU and per dollar.
    """
    import pandas as pd

    rows = [_option(plan, option) for option in plan.options]
    made = pd.DataFrame(rows)
    numbers = ["rate", "capacity_rate", "margin", "goodput_per_gpu", "goodput_per_usd", "probability"]
    return made.astype(dict.fromkeys([*numbers, "usd_per_million_output_tokens"], "float64"))


def next_break(option: Option) -> str:
    """What breaks in the nearest fleet or at the nearest rate that does not hold, in a line; empty if nothing did."""
    run = option.broken
    if run is None:
        return ""
    words = [str(one) for one in run.breaks] + ([] if run.stable else ["the queue runs away"])
    left = run.scenario.replicas
    where = f"at {run.rate:.4g} per s" if left == option.replicas else f"with {left} replica{'s' * (left > 1)}"
    return f"{where}: {'; '.join(words)}"


def _option(plan: Plan, option: Option) -> dict[str, Any]:
    tightest = min(option.margins.items(), key=lambda item: item[1], default=(None, None))
    answers = [name for name, one in plan.answers.items() if one == option]
    breaks = option.untold if option.broken is None else option.broken.why_not
    return {
        "option": option.name,
        "answers": ", ".join(answers),
        "gpus": option.gpus,
        "usd_per_h": option.usd_per_h,
        "status": option.status,
        "rate": option.rate,
        "capacity_rate": option.capacity_rate,
        "tightest": tightest[0],
        "margin": tightest[1],
        "breaks_next": breaks if option.holds else option.reason,
        "goodput_per_gpu": option.goodput_per_gpu,
        "goodput_per_usd": option.goodput_per_usd,
        "usd_per_million_output_tokens": option.usd_per_million_output_tokens,
        "tokens_per_s_per_gpu": option.tokens_per_s_per_gpu,
        "tokens_per_s_per_user": option.tokens_per_s_per_user,
        "probability": option.probability,
        "verified": option.verified,
    }


# ---- the knee -------------------------------------------------------------------------------------------------------


def knee_frame(points: Sequence[Run]) -> pd.DataFrame:
    """A row a rate, latency and statistic: rate, metric, statistic, value_ms, stable, holds, why_not, unstable (see
    above); by rate."""
    import pandas as pd

    from llmsim.plan_capacity import curve_rows

    begins = unstable_from(points)
    rows = [
        (
            row["rate"],
            metric,
            statistic,
            None if value_s is None else 1e3 * value_s,
            row["stable"],
            row["holds"],
            row["why_not"],
            begins is not None and row["rate"] >= begins,
        )
        for row in sorted(curve_rows(points), key=lambda row: row["rate"])
        for metric in METRICS
        for statistic in STATISTICS
        for value_s in [row[f"{metric}_{statistic}_s"]]
    ]
    columns = ["rate", "metric", "statistic", "value_ms", "stable", "holds", "why_not", "unstable"]
    return pd.DataFrame(rows, columns=columns).astype({"value_ms": "float64"})


def unstable_from(points: Sequence[Run]) -> float | None:
    """The lowest rate from which on every point's queue kept growing; None if the highest one's did not."""
    begins = None
    for run in sorted(points, key=lambda run: -run.rate):
        if run.stable:
            break
        begins = run.rate
    return begins


def held_rate(points: Sequence[Run]) -> float | None:
    """The highest rate among the points that hold every SLO; None if none does."""
    return max((run.rate for run in points if run.holds), default=None)
