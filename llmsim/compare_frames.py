"""A comparison as frames, for pages, notebooks and charts: every number of it, and what can be said of each difference.

verdict   "better" or "worse" than the first side if the 95 % interval of the difference leaves out 0, "unclear" if it
          holds 0 or there is none of so few requests, "run" for numbers of the whole run, which have no interval
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.compare import LATENCIES, STATISTICS, WHOLE_RUN, Comparison, Difference

if TYPE_CHECKING:
    import pandas as pd

HIGHER_IS_BETTER = frozenset({"request_goodput", "slo_attainment", "prefix_cache_hit_rate", *WHOLE_RUN})
UNITS = {
    "request_goodput": "req/s",
    "slo_attainment": "share",
    "num_preemptions": "preemptions",
    "prefix_cache_hit_rate": "share",
    "request_throughput": "req/s",
    "output_throughput": "tok/s",
}
SLACK = 1e-6  # a nanosecond: rounding of sums, as in llmsim.compare
BETTER, WORSE, UNCLEAR, WHOLE = "better", "worse", "unclear", "run"
HEADLINES = (
    "slo_attainment", "request_goodput", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms", "p99_e2el_ms",
    "output_throughput", "num_preemptions", "prefix_cache_hit_rate",
)  # fmt: skip


def verdict(key: str, change: Difference) -> str:
    if change.low is None or change.high is None:
        return WHOLE if key in WHOLE_RUN else UNCLEAR
    if change.low <= SLACK and change.high >= -SLACK:
        return UNCLEAR
    return BETTER if (change.value > 0.0) == (key in HIGHER_IS_BETTER) else WORSE


def sides_frame(comparison: Comparison) -> pd.DataFrame:
    """A row a side: its headline numbers, under their keys; targets that nobody set leave their columns out."""
    import pandas as pd

    rows = []
    for side in comparison.sides:
        numbers = comparison.numbers[side.name]
        row: dict[str, Any] = {"side": side.name, "completed": side.summary["completed"]}
        rows.append(row | {key: numbers[key] for key in HEADLINES if key in numbers})
    return pd.DataFrame(rows)


def differences_frame(comparison: Comparison) -> pd.DataFrame:
    """A row a side (the first left out) and number: side, key, unit, value, change, low, high, change_share, low_share,
    high_share (fractions of the first side's number) and verdict."""
    import pandas as pd

    rows = []
    for name, found in comparison.differences.items():
        for key, change in found.items():
            relative = change.relative or (None, None, None)
            rows.append(
                (
                    name,
                    key,
                    UNITS.get(key, "ms"),
                    comparison.numbers[name][key],
                    change.value,
                    change.low,
                    change.high,
                    *relative,
                    verdict(key, change),
                )
            )
    shares = ["change_share", "low_share", "high_share"]
    columns = ["side", "key", "unit", "value", "change", "low", "high", *shares, "verdict"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:10], "float64"))


def intervals_frame(comparison: Comparison) -> pd.DataFrame:
    """Of `differences_frame` the latencies, with latency and statistic as columns of their own."""
    made = differences_frame(comparison)
    names = {f"{word}_{latency}_ms": (latency, word) for latency in LATENCIES for word in STATISTICS}
    made = made[made["key"].isin(names)].reset_index(drop=True)
    made["latency"] = [names[key][0] for key in made["key"]]
    made["statistic"] = [names[key][1] for key in made["key"]]
    return made


def shares_frame(comparison: Comparison) -> pd.DataFrame:
    """A row a side and latency: side, latency, lower, higher (shares of the requests)."""
    import pandas as pd

    rows = [
        (name, latency, lower, higher)
        for name, found in comparison.shares.items()
        for latency, (lower, higher) in found.items()
    ]
    return pd.DataFrame(rows, columns=["side", "latency", "lower", "higher"])
