"""A sweep as people read it: a table of runs, and how long something takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmsim.sweep import SweepResult
from llmsim.sweep_outline import Estimate, Outlined
from llmsim.sweep_parts import part_files, read_part
from llmsim.text import aligned, number

MOST_ROWS = 40  # of results; the listing of --dry-run is complete
HEADLINES = (  # column, heading, factor, decimals
    ("request_throughput", "req/s", 1.0, 2),
    ("output_throughput", "tok/s", 1.0, 0),
    ("p50_ttft_ms", "TTFT p50", 1.0, 1),
    ("p99_ttft_ms", "TTFT p99", 1.0, 1),
    ("p50_tpot_ms", "TPOT p50", 1.0, 2),
    ("p99_tpot_ms", "TPOT p99", 1.0, 2),
    ("slo_attainment", "SLO %", 100.0, 1),
    ("cost_per_1m_output_tokens", "$/1M", 1.0, 3),
)


def report(found: SweepResult, most: int = MOST_ROWS) -> str:
    """The first rows: the axes and a few headlines (latencies in ms), or the error."""
    shown: list[dict[str, Any]] = []
    total = 0
    wanted = ["run", *found.columns, "error", *(name for name, *_ in HEADLINES)]
    for part, path in part_files(found.folder, found.runs):
        total += len(part)
        if len(shown) < most:
            shown += read_part(path, part, wanted).to_pylist()
    shown = shown[:most]
    columns = [one for one in HEADLINES if any(row[one[0]] is not None for row in shown)]
    rows = [["run", *found.columns, *(heading for _, heading, _, _ in columns)]]
    errors = [""]
    for row in shown:
        numbers = [number(row[name], factor, digits) for name, _, factor, digits in columns]
        rows.append([str(row["run"]), *(_text(row[name]) for name in found.columns), *numbers])
        errors.append("" if row["error"] is None else f"error: {row['error']}")
        if row["error"] is not None:
            rows[-1][len(found.columns) + 1 :] = [""] * len(columns)
    texts = _kinds(rows, len(found.columns))
    lines = [f"{line}  {error}".rstrip() for line, error in zip(aligned(rows, texts), errors, strict=True)]
    if total > len(shown):
        lines.append(f"… and {total - len(shown)} more")
    return "\n".join(lines)


def listing(runs: Iterable[Outlined], columns: Sequence[str]) -> Iterator[str]:
    """A line a run; as it comes, so that long lists need no memory."""
    yield "run  " + ", ".join(columns)
    for one in runs:
        values = ", ".join(f"{name}={_text(label)}" for name, label in zip(columns, one.labels, strict=True))
        state = f"  impossible: {one.error}" if one.error else "  done" if one.done else ""
        yield f"{one.run:<4} {values}{state}".rstrip()


def about(estimate: Estimate, runs: int, jobs: int) -> str:
    """How long `runs` will take."""
    if estimate.seconds_per_run is None:
        return "none of the runs that were tried works: no estimate"
    seconds = estimate.seconds_per_run * runs / jobs
    many = f"{jobs} at a time" if jobs > 1 else "one at a time"
    return (
        f"about {duration(seconds)} for {runs} runs, {many} (timed on the first {estimate.timed_requests} requests of "
        f"{estimate.timed_runs} runs; overloaded runs take longer)"
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _kinds(rows: Sequence[Sequence[str]], axes: int) -> set[int]:
    """The columns of text: axes with anything that is no number."""
    texts = set()
    for at in range(1, axes + 1):
        if any(not row[at].replace(".", "", 1).replace("-", "", 1).isdigit() for row in rows[1:]):
            texts.add(at)
    return texts


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
