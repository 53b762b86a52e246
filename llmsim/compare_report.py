"""A comparison as people read it: a block of lines for each latency, one line a side and one for its difference."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import numpy as np

from llmsim.compare import LATENCIES, RESAMPLES, STATISTICS, Comparison, Difference, Promise
from llmsim.metrics import latencies_s
from llmsim.text import CROSS, TICK, number

WIDTH = 116
CURVE_POINTS = 401
NAMES = {"ttft": "TTFT (ms)", "tpot": "TPOT (ms)", "e2el": "E2EL (ms)"}
SYSTEM = (  # key, heading, factor, decimals
    ("request_throughput", "req/s", 1.0, 2),
    ("output_throughput", "output tok/s", 1.0, 0),
    ("request_goodput", "goodput req/s", 1.0, 2),
    ("slo_attainment", "SLO (%)", 100.0, 1),
    ("num_preemptions", "preemptions", 1.0, 0),
    ("prefix_cache_hit_rate", "cache hits (%)", 100.0, 1),
)
CELL = 25
LABEL = 28  # longer names get a line of their own


def report(comparison: Comparison) -> str:
    """The table, then what its intervals mean."""
    first = comparison.sides[0]
    count = len(first.requests["id"])
    label = min(LABEL, max(14, *(len(side.name) + 4 for side in comparison.sides)))
    drawn = comparison.has_intervals
    requests = f"{count} request{'s' * (count != 1)}, the same for every side"
    lines = [f"{requests}. Below each side: difference to {first.name}{' [95 % interval]' * drawn}"]
    for name in LATENCIES:
        lines.append("")
        lines += _block(comparison, NAMES[name], [(f"{word}_{name}_ms", word, 1.0, 2) for word in STATISTICS], label)
        for side in comparison.sides[1:]:
            if name in comparison.shares[side.name]:
                lower, higher = comparison.shares[side.name][name]
                lines.append(f"  {side.name}: lower for {lower:.0%} of the requests, higher for {higher:.0%}")
    columns = [column for column in SYSTEM if comparison.numbers[first.name].get(column[0]) is not None]
    for part in (columns[:4], columns[4:]):
        if part:
            lines += ["", *_block(comparison, "", part, label)]
    if comparison.promises:
        lines += ["", *_promises(comparison, label)]
    if drawn:
        lines += ["", *wrap(_meaning(comparison), WIDTH)]
    for note in comparison.notes:
        lines += wrap(f"Note: {note}.", WIDTH)
    for words, sides in _trust(comparison).items():
        whose = "" if len(sides) == len(comparison.sides) else f" ({', '.join(sides)})"
        lines += wrap(f"{words[0]}{whose}: {words[1]}", WIDTH)
    return "\n".join(lines)


def _block(comparison: Comparison, title: str, columns: list[tuple[str, str, float, int]], label: int) -> Iterator[str]:
    yield f"{title:<{label}}" + "".join(f"{heading:>{CELL}}" for _, heading, _, _ in columns)
    for side in comparison.sides:
        values = [(comparison.numbers[side.name].get(key), factor, digits) for key, _, factor, digits in columns]
        name = f"  {side.name}"
        if len(name) > label:
            yield name
            name = ""
        yield f"{name:<{label}}" + "".join(f"{number(*value):>{CELL}}" for value in values)
        if side.name in comparison.differences:
            found = comparison.differences[side.name]
            cells = [_change(found.get(key), factor, digits) for key, _, factor, digits in columns]
            yield (" " * label + "".join(f"{cell:>{CELL}}" for cell in cells)).rstrip()


def _change(change: Difference | None, factor: float, digits: int) -> str:
    if change is None:
        return "-"
    largest = max(abs(x * factor) for x in (change.value, change.low or 0.0, change.high or 0.0))
    digits = digits if largest < 100 else min(digits, 1 if largest < 1000 else 0)
    text = signed(change.value * factor, digits)
    if change.low is None or change.high is None:
        return text
    return f"{text} [{signed(change.low * factor, digits)}, {signed(change.high * factor, digits)}]"


def signed(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else "0"


def _promises(comparison: Comparison, label: int) -> Iterator[str]:
    slos = [promise.slo for promise in comparison.promises[comparison.sides[0].name]]
    rows = {name: [promise_words(promise) for promise in kept] for name, kept in comparison.promises.items()}
    columns = zip(*([slo.words for slo in slos], *rows.values()), strict=True)
    widths = [max(CELL, *(len(text) + 2 for text in column)) for column in columns]
    yield f"{'SLO':<{label}}" + "".join(f"{slo.words:>{width}}" for slo, width in zip(slos, widths, strict=True))
    for name, words in rows.items():
        head = f"  {name}"
        if len(head) > label:
            yield head
            head = ""
        yield f"{head:<{label}}" + "".join(f"{text:>{width}}" for text, width in zip(words, widths, strict=True))


def promise_words(promise: Promise) -> str:
    """A tick or a cross, what was measured, and in how many of the draws it is kept."""
    share = "" if promise.share is None else f", {promise.share:.0%}"
    return f"{TICK if promise.met else CROSS} {promise.slo.shown(promise.value_s)}{share}"


def _trust(comparison: Comparison) -> dict[tuple[str, str], list[str]]:
    """What each side's times rest on, and what it leaves out: once for all sides that say the same."""
    said: dict[tuple[str, str], list[str]] = {}
    for side in comparison.sides:
        label = side.summary.get("calibration", {}).get("label")
        for words in [("Cost model", label), *(("Caveat", line) for line in side.summary.get("caveats") or ())]:
            if words[1]:
                said.setdefault((words[0], str(words[1])), []).append(side.name)
    return said


def _meaning(comparison: Comparison) -> str:
    seeds = comparison.seeds
    text = (
        f"Intervals: paired bootstrap, {RESAMPLES:,} draws of blocks of {comparison.block} consecutive arrivals (near"
        " each other requests are not independent; the length follows from the autocorrelation of the differences,"
        " Politis & White 2004). "
    )
    if seeds:
        text += (
            f"Every number is the mean over the {len(seeds)} seeds {', '.join(map(str, seeds))}, paired by seed, and"
            f" the intervals allow for other seeds too (Student's t, {len(seeds) - 1} degrees of freedom). "
        )
    text += (
        "They say how far a difference would scatter over traffic like this, not over other loads. Throughput is of"
        " the run as a whole and has none."
    )
    if comparison.promises:
        text += " SLO: what was measured (a rejected request is infinitely late), and the share of draws that keep it."
    return text


def document(comparison: Comparison) -> dict[str, Any]:
    """The same for `--json`, every number under the key that `Result.summary()` gives it."""
    return {
        "requests": len(comparison.sides[0].requests["id"]),
        "slo": comparison.targets,
        "bootstrap": {"resamples": RESAMPLES, "block": comparison.block, "confidence": 0.95},
        "seeds": list(comparison.seeds),
        "sides": [
            {
                "name": side.name,
                "scenario": side.scenario,
                "numbers": comparison.numbers[side.name],
                "differences": {
                    key: {"value": change.value, "low": change.low, "high": change.high, "relative": change.relative}
                    for key, change in comparison.differences.get(side.name, {}).items()
                },
                "shares": {
                    name: {"lower": lower, "higher": higher}
                    for name, (lower, higher) in comparison.shares.get(side.name, {}).items()
                },
                "slos": [
                    {"slo": str(promise.slo), "value_s": promise.value_s, "met": promise.met, "share": promise.share}
                    for promise in comparison.promises.get(side.name, ())
                ],
                "summary": side.summary,
            }
            for side in comparison.sides
        ],
        "notes": list(comparison.notes),
    }


def curves(comparison: Comparison) -> dict[str, list[Any]]:
    """Columns side, latency, value_ms, share of every side's distributions, at `CURVE_POINTS` shares."""
    columns: dict[str, list[Any]] = {name: [] for name in ("side", "latency", "value_ms", "share")}
    share = np.linspace(0.0, 1.0, CURVE_POINTS)
    for side in comparison.sides:
        for name, values_s in latencies_s(side.requests).items():
            values_s = values_s[np.isfinite(values_s)]
            if values_s.size:
                columns["side"] += [side.name] * CURVE_POINTS
                columns["latency"] += [name] * CURVE_POINTS
                columns["value_ms"] += np.quantile(1e3 * values_s, share).tolist()
                columns["share"] += share.tolist()
    return columns


def changes(comparison: Comparison) -> dict[str, list[Any]]:
    """Columns side, latency, statistic, change, low, high: differences as fractions of the first side's number."""
    columns: dict[str, list[Any]] = {name: [] for name in ("side", "latency", "statistic", "change", "low", "high")}
    for name, found in comparison.differences.items():
        for latency in LATENCIES:
            for statistic in STATISTICS:
                change = found.get(f"{statistic}_{latency}_ms")
                if change is not None and change.relative is not None:
                    for column, value in zip(columns, (name, latency, statistic, *change.relative), strict=True):
                        columns[column].append(value)
    return columns
