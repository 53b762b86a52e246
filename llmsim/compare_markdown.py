"""A comparison as a Markdown table, for pull requests: a column a side, a row a number.

A difference stands behind the number with its 95 % interval, bold where the interval leaves out 0, with an arrow that
says better or worse.
"""

from __future__ import annotations

from llmsim.compare import LATENCIES, RESAMPLES, Comparison
from llmsim.compare_frames import BETTER, WORSE, verdict
from llmsim.compare_report import promise_words, signed
from llmsim.text import CROSS, TICK

ROWS = (  # key, heading, factor, decimals, unit
    *(
        (f"{word}_{name}_ms", f"{name.upper()} {word}", 1.0, 1 if name != "tpot" else 2, " ms")
        for name in LATENCIES
        for word in ("mean", "p50", "p99")
    ),
    ("request_throughput", "requests/s", 1.0, 2, ""),
    ("output_throughput", "output tokens/s", 1.0, 0, ""),
    ("request_goodput", "goodput, requests/s", 1.0, 2, ""),
    ("slo_attainment", "SLO attainment", 100.0, 1, " %"),
    ("num_preemptions", "preemptions", 1.0, 0, ""),
    ("prefix_cache_hit_rate", "prefix cache hits", 100.0, 1, " %"),
)
MARKS = {BETTER: " ▲", WORSE: " ▼"}


def markdown(comparison: Comparison) -> str:
    first = comparison.sides[0]
    names = [side.name for side in comparison.sides]
    lines = [_row(["", *map(_escaped, names)]), _row(["---", *["---:"] * len(names)])]
    for key, heading, factor, digits, unit in ROWS:
        values = [comparison.numbers[name].get(key) for name in names]
        if all(value is None for value in values):
            continue
        cells = [f"{value * factor:,.{digits}f}{unit}" if value is not None else "-" for value in values]
        for at, name in enumerate(names[1:], 1):
            cells[at] += _change(comparison, name, key, factor, digits)
        lines.append(_row([heading, *cells]))
    for at, promise in enumerate(comparison.promises.get(first.name, ())):
        kept = [promise_words(comparison.promises[name][at]) for name in names]
        lines.append(_row([promise.slo.words, *kept]))
    return "\n".join([*lines, "", *_notes(comparison)])


def _change(comparison: Comparison, name: str, key: str, factor: float, digits: int) -> str:
    change = comparison.differences[name].get(key)
    if change is None:
        return ""
    text = signed(change.value * factor, digits)
    if change.low is None or change.high is None:
        return f" ({text})"
    low, high = signed(change.low * factor, digits), signed(change.high * factor, digits)
    if (text, low, high) != ("0", "0", "0"):
        text += f" [{low}, {high}]"
    mark = MARKS.get(verdict(key, change), "")
    return f" **({text})**{mark}" if mark else f" ({text})"


def _notes(comparison: Comparison) -> list[str]:
    first = comparison.sides[0]
    seeds = f", mean over {len(comparison.seeds)} seeds" if comparison.seeds else ""
    count, drawn = len(first.requests["id"]), comparison.has_intervals
    text = (
        f"{count:,} request{'s' * (count != 1)}, the same for every side{seeds}; in brackets the difference to"
        f" {_escaped(first.name)}"
    )
    if drawn:
        text += (
            f" with its 95 % interval (paired bootstrap, {RESAMPLES:,} draws of blocks of {comparison.block} arrivals),"
            " bold where it leaves out 0: ▲ better, ▼ worse"
        )
    text += "."
    if comparison.promises:
        text += f" {TICK} {CROSS}: whether the SLO is kept{', and the share of the draws that keep it' * drawn}."
    return [text, *(f"Note: {note}." for note in comparison.notes)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`" if "=" in text else text
