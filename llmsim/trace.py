"""`Trace`: the requests of a workload as columns, read from any known format and rescaled.

Every reader ends here and every replay starts here. Times are seconds since the first request, lengths are tokens.

A request with a finite `arrival_s` is sent at that time. One whose `arrival_s` is nan is a later turn of a session: it
is sent `delay_s` after request `parent` has finished (closed loop). A parent on a request with a finite arrival is a
fact about the session only; the request does not wait for it.

Prefix identity: `block_ids[i]` names the prompt of request i in blocks of `block_tokens`, ceil(prompt / block_tokens)
ids. Two prompts share exactly their longest common leading run of ids; the last id may stand for a partial block.
`output_block_ids[i]` goes on where the prompt ends: together they cover ceil((prompt + output) / block_tokens) blocks,
and the block that holds the end of the prompt and the beginning of the answer is the last of `block_ids[i]`.

`load_trace` applies, in this order: the reader's filters, dropping and truncation, sorting, the window
(`start_s`, `duration_s`), `limit`, `time_scale`, `rate`, `spread`, `assign_classes`, `predict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TIED_SHARE = 0.5  # above this share of simultaneous arrivals a trace sits on a grid
RATE_LIMITS = (1e-4, 1e3)  # requests/s outside which the unit of time is probably another one
STREAM_SPREAD = 1  # its own random stream of the seed; 0 draws arrivals that a file lacks


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests as columns; optional columns are None when the trace has none."""

    name: str
    arrival_s: FloatArray  # sorted, first is 0; nan: waits for its parent
    prompt_tokens: IntArray
    output_tokens: IntArray
    block_tokens: int = 0
    block_ids: list[tuple[Hashable, ...]] | None = None
    output_block_ids: list[tuple[Hashable, ...]] | None = None
    parent: IntArray | None = None
    delay_s: FloatArray | None = None
    priority: IntArray | None = None
    ids: list[str] | None = None
    session: list[str] | None = None
    slo_class: list[str] | None = None
    tenant: list[str] | None = None
    model: list[str] | None = None
    slo_ttft_s: FloatArray | None = None
    slo_tpot_s: FloatArray | None = None
    deadline_s: FloatArray | None = None
    predicted_tokens: FloatArray | None = None  # of the answer, as a predictor sees it; below 1: a rank
    notes: tuple[str, ...] = ()
    sha256: str = ""
    format: str = ""
    tick_s: float = 0.0  # resolution of the stamps, where the format has a coarse one
    rows_read: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    assigned: tuple[str, ...] = ()  # what the trace did not carry and was drawn for it (classes, tenants, predictions)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last that does not wait."""
        return float(np.nanmax(self.arrival_s)) if len(self) else 0.0

    def frame(self) -> pd.DataFrame:
        """A row per request, of the columns that the trace has."""
        import pandas as pd

        values = {column.name: getattr(self, column.name) for column in fields(self)}
        return pd.DataFrame({k: v for k, v in values.items() if isinstance(v, list | np.ndarray)})

    def with_notes(self, *notes: str) -> Trace:
        return replace(self, notes=self.notes + notes)


def load_trace(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    time_unit: str | None = None,
    time_scale: float | None = None,
    rate: float | None = None,
    start_s: float | None = None,
    duration_s: float | None = None,
    limit: int | None = None,
    failed: str = "drop",
    model: str | None = None,
    log_type: str | None = None,
    spread: str = "none",
    over_context: str = "error",
    context_tokens: int | None = None,
    block_tokens: int | None = None,
    strict_order: bool = False,
    sharegpt_mode: str = "multi-turn",
    closed_loop: bool = False,
    max_wait_s: float | None = None,
    rank_correlated: bool = False,
    assign_classes: str | None = None,
    predict: str | None = None,
    tokenizer: Callable[[str], int] | None = None,
    seed: int = 0,
) -> Trace:
    """Read a trace of any known format (a file, a directory, ``-`` for standard input)."""
    from llmsim import readers
    from llmsim.readers.settle import UNIT_FIX, Keeping, check_times, order_in_time, regenerate_arrivals, settle
    from llmsim.readers.source import open_source

    _check_choice("failed", failed, ("drop", "keep"))
    _check_choice("spread", spread, ("none", "uniform"))
    _check_choice("over_context", over_context, ("error", "drop", "truncate"))
    _check_choice("sharegpt_mode", sharegpt_mode, ("first-pair", "multi-turn"))
    if time_unit is not None:
        _check_choice("time_unit", time_unit, ("s", "ms", "us", "ns"))
    wanted = (("block_tokens", block_tokens, 1), ("context_tokens", context_tokens, 2), ("seed", seed, 0))
    for name, count, least in wanted:
        if count is not None and not least <= count < 2**63:
            raise ValueError(f"{name}={count} must be at least {least}" + (" and below 2**63" if count > 0 else ""))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral)):
        raise ValueError(f"limit={limit!r} is not a number of requests: give a whole number, 1 or more")
    if max_wait_s is not None and not max_wait_s >= 0:
        raise ValueError(f"max_wait_s={max_wait_s} must be at least 0 seconds")
    options = readers.ReadOptions(
        columns=columns, time_unit=time_unit, failed=failed, model=model, log_type=log_type, block_tokens=block_tokens,
        sharegpt_mode=sharegpt_mode, closed_loop=closed_loop, max_wait_s=max_wait_s, rate=rate, seed=seed,
        tokenizer=tokenizer, rank_correlated=rank_correlated, start_s=start_s, duration_s=duration_s,
    )  # fmt: skip
    source = open_source(path)
    rows = readers.read(source, options, format)
    guess = (
        f"{source.name}: read as {rows.format}" if format is None else f"{source.name}: format {rows.format} as given"
    )
    rows.notes.insert(0, guess)
    rows, read, dropped = settle(source.name, rows, Keeping(failed, over_context, context_tokens))
    regenerated = rows.arrival_s is None
    if regenerated:
        regenerate_arrivals(rows, rate, seed)
    rows = order_in_time(source.name, rows, strict_order)
    given = {column.name: getattr(rows, column.name) for column in fields(Trace) if hasattr(rows, column.name)}
    given |= {"name": source.name, "notes": tuple(rows.notes), "sha256": source.sha256}
    given |= {"rows_read": read, "dropped": dropped}
    trace = Trace(**given)
    at = rows.rate if rate is None else rate  # of arrivals that were drawn
    fix = UNIT_FIX if at is None or not regenerated else f"give a rate above {at:g}"
    check_times(trace.name, trace.arrival_s, trace.delay_s, fix)
    if rows.time_unit is not None:
        trace = _suspect_unit(trace, rows.time_unit)
    if max_wait_s is not None:
        trace = with_waits_capped(trace, max_wait_s)
    if (start_s is not None or duration_s is not None) and rows.format != "servegen":
        trace = window(trace, start_s or 0.0, duration_s)
    if limit is not None:
        trace = limited(trace, limit)
    rescaling = rate is not None and not regenerated and rows.format != "servegen"
    if rescaling and time_scale is not None:
        raise ValueError(
            f"rate={rate:g} with time_scale={time_scale:g}: the rate alone decides how fast requests arrive: leave one"
            " of them out"
        )
    if time_scale is not None:
        trace = time_scaled(trace, time_scale)
    if rate is not None and rescaling:
        trace = at_rate(trace, rate)
    trace = spread_ties(trace, seed=seed) if spread == "uniform" else _report_ties(trace)
    return _labelled(trace, assign_classes, predict, seed)


def _labelled(trace: Trace, classes: str | None, predict: str | None, seed: int) -> Trace:
    """Labels that the file does not carry, where they are asked for."""
    if classes is not None:
        from llmsim.classes import assign_classes

        trace = assign_classes(trace, classes, seed=seed)
    if predict is not None:
        from llmsim import predictions

        trace = predictions.predict(trace, predict, seed=seed)
    return trace


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _suspect_unit(trace: Trace, unit: str) -> Trace:
    stamps = trace.arrival_s[~np.isnan(trace.arrival_s)]
    span_s = float(stamps[-1]) if len(stamps) else 0.0
    if len(stamps) < 3 or span_s == 0.0:
        return trace
    per_s = len(stamps) / span_s
    if RATE_LIMITS[0] <= per_s <= RATE_LIMITS[1]:
        return trace
    words = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    per_unit = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
    fractional = "are fractional and " if bool(((stamps * per_unit[unit]) % 1.0 > 1e-6).any()) else ""
    plausible = [u for u in per_unit if RATE_LIMITS[0] <= per_s * per_unit[u] / per_unit[unit] <= RATE_LIMITS[1]]
    other = (plausible or ["s" if unit != "s" else "ms"])[0]
    return trace.with_notes(
        f"timestamps {fractional}span {span_s * 1e3:.6g} ms ({per_s:.4g} req/s): read as {words[unit]} ({trace.format} "
        f"timestamps are {words[unit]}); give --time-unit {other} if these are {words[other]}"
    )


def with_waits_capped(trace: Trace, max_wait_s: float) -> Trace:
    """No turn waits longer than `max_wait_s` after its parent."""
    if trace.delay_s is None:
        return trace
    long = int((trace.delay_s > max_wait_s).sum())
    note = (
        f"{long} waits longer than {max_wait_s:g} s cut to it" if long else f"no wait is longer than {max_wait_s:g} s"
    )
    return replace(trace, delay_s=np.minimum(trace.delay_s, max_wait_s)).with_notes(note)


def _gaps_s(trace: Trace) -> FloatArray:
    return np.diff(trace.arrival_s[~np.isnan(trace.arrival_s)])


def _report_ties(trace: Trace) -> Trace:
    gaps_s = _gaps_s(trace)
    share = float((gaps_s == 0).mean()) if len(gaps_s) else 0.0
    if share <= TIED_SHARE or trace.span_s == 0.0:
        return trace
    return trace.with_notes(
        f"{share:.0%} of the arrivals coincide with the one before: the stamps sit on a grid; --spread uniform moves "
        "them apart within it"
    )


def in_time_order(trace: Trace) -> Trace:
    """Sorted by arrival, stable."""
    return subset(trace, np.argsort(trace.arrival_s, kind="stable"))


def subset(trace: Trace, order: NDArray[np.int64]) -> Trace:
    """The requests in `order`; a parent left out becomes none."""
    from llmsim.readers.settle import renumbered

    changed: dict[str, object] = {}
    indexes = order.tolist()
    for column in fields(trace):
        values = getattr(trace, column.name)
        if isinstance(values, np.ndarray):
            changed[column.name] = values[order]
        elif isinstance(values, list):
            changed[column.name] = [values[i] for i in indexes]
    if trace.parent is not None:
        changed["parent"] = renumbered(trace.parent, order)
    return replace(trace, **changed)  # type: ignore[arg-type]


def window(trace: Trace, start_s: float = 0.0, duration_s: float | None = None) -> Trace:
    """Requests (and whole sessions) that arrive in [start_s, start_s + duration_s), moved to time 0."""
    from llmsim.readers.settle import session_starts

    if start_s < 0 or (duration_s is not None and not duration_s > 0):
        raise ValueError(
            f"window start_s={start_s:g}, duration_s={duration_s}: the start must be >= 0, the duration > 0"
        )
    end_s = math.inf if duration_s is None else start_s + duration_s
    starts = session_starts(trace.arrival_s, trace.parent)
    inside = np.flatnonzero((starts >= start_s) & (starts < end_s))
    if not len(inside):
        raise ValueError(
            f"{trace.name}: no request arrives in [{start_s:g}, {end_s:g}) s; the trace spans {trace.span_s:.6g} s"
        )
    kept = subset(trace, inside)
    return replace(kept, arrival_s=kept.arrival_s - np.nanmin(kept.arrival_s)).with_notes(
        f"window [{start_s:g}, {end_s:g}) s: {len(kept)} of {len(trace)} requests"
    )


def limited(trace: Trace, limit: int) -> Trace:
    """The first `limit` requests."""
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 request")
    if limit >= len(trace):
        return trace
    return subset(trace, np.arange(limit)).with_notes(f"limit: the first {limit} of {len(trace)} requests")


def time_scaled(trace: Trace, time_scale: float, *, rate: float | None = None) -> Trace:
    """Arrivals `time_scale` times as late (2: half the rate); of a session, its start: users do not speed up.

    `rate`: what was asked for, if not the time scale itself.
    """
    if not (time_scale > 0 and math.isfinite(time_scale)):
        raise ValueError(f"time_scale={time_scale:g} must be a finite number above 0")
    from llmsim.readers.settle import check_times
    from llmsim.rescale import in_order, pace_note, rescaled_s

    arrival_s = rescaled_s(trace, time_scale)
    fix = f"give a time scale below {time_scale:g}" if rate is None else f"give a rate above {rate:g}"
    check_times(trace.name, arrival_s, None, fix)
    scaled = replace(trace, arrival_s=arrival_s, tick_s=trace.tick_s * time_scale)
    note = pace_note(trace, time_scale)
    if note is None:
        return scaled
    order = in_order(arrival_s, trace.parent)
    scaled = scaled if order is None else subset(scaled, order)
    return replace(scaled, arrival_s=scaled.arrival_s - np.nanmin(scaled.arrival_s)).with_notes(note)


def mean_rate_per_s(trace: Trace) -> float:
    """(arrivals - 1) / span; inf when all arrive at once. Turns that wait for a parent are not counted."""
    sent = int((~np.isnan(trace.arrival_s)).sum())
    return (sent - 1) / trace.span_s if trace.span_s > 0 else math.inf


def at_rate(trace: Trace, rate: float) -> Trace:
    """Rescaled to a mean rate in requests/s (sessions/s if turns wait): keeps the shape of bursts and of sessions."""
    if not rate > 0:
        raise ValueError(f"rate={rate:g} must be above 0 requests/s")
    if math.isinf(rate):
        return replace(trace, arrival_s=trace.arrival_s * 0.0).with_notes("rate inf: all requests arrive at time 0")
    now = mean_rate_per_s(trace)
    if math.isinf(now):
        if len(trace) == 1:
            return trace
        raise ValueError(f"{trace.name}: all requests arrive at once: there is no shape to rescale to rate={rate:g}")
    unit = "sessions/s" if np.isnan(trace.arrival_s).any() else "requests/s"
    if math.isinf(now / rate):
        raise ValueError(f"rate={rate:g} is too low to rescale to: give a higher one, in requests/s")
    return time_scaled(trace, now / rate, rate=rate).with_notes(f"rescaled from {now:.4g} to {rate:g} {unit}")


def spread_ties(trace: Trace, *, seed: int = 0, tick_s: float | None = None) -> Trace:
    """Move simultaneous arrivals uniformly at random inside the grid of the stamps (their resolution, `tick_s`)."""
    arrival_s = trace.arrival_s
    sent = np.flatnonzero(~np.isnan(arrival_s))
    gaps_s = np.diff(arrival_s[sent])
    if len(sent) < 2 or not (gaps_s == 0).any():
        return trace.with_notes("spread uniform: no simultaneous arrivals to move")
    steps_s = gaps_s[gaps_s > 0]
    tick = tick_s or trace.tick_s or (float(np.median(steps_s)) if len(steps_s) else 0.0)
    if tick <= 0:
        raise ValueError(f"{trace.name}: all requests arrive at once: there is no grid to spread them in; give a rate")
    rng = np.random.default_rng([seed, STREAM_SPREAD])
    instants, group = np.unique(arrival_s[sent], return_inverse=True)
    room_s = np.minimum(np.diff(instants, append=instants[-1] + tick), tick)
    tied = np.bincount(group)[group] > 1
    moved = arrival_s[sent] + np.where(tied, rng.random(len(sent)) * room_s[group], 0.0)
    # Sorted within the instant, so that the order of the file stays the order of arrival.
    moved = np.sort(moved)
    spread_s = arrival_s.copy()
    spread_s[sent] = moved - moved[0]
    return replace(trace, arrival_s=spread_s).with_notes(
        f"spread uniform: {int(tied.sum())} simultaneous arrivals moved inside {tick:g} s, seed {seed}"
    )
