# ruff: noqa: UP031  (every event is full of braces, which the other ways of formatting would double)
"""A run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: Trace Event Format JSON, gzipped.

One process a replica. Its thread "GPU" holds a complete event ("X") per row of the iteration log, with what was in the
iteration; its counters ("C") are requests running and waiting and KV blocks in use; each request is a track of its own
with its phases queue, prefill and decode (nestable asynchronous events "b"/"e": they may overlap, which events of one
thread may not). Times are microseconds. A run of many iterations is one event from the end of the row before it.

Events are streamed, never held. At most `max_events` are written: the window then ends earlier, and the caller is told.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from itertools import chain
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import MODE_NAMES

if TYPE_CHECKING:
    from llmsim.metrics import Columns, Result
    from llmsim.runs import Run

Floats = NDArray[np.float64]

EVENTS_A_ROW = 3  # the iteration and two counters
EVENTS_A_REQUEST = 6  # three phases, begin and end
MAX_EVENTS = 1_000_000  # about 15 MB gzipped; Perfetto opens it in some seconds


def write_timeline(
    result: Result | Run, path: Path, window_s: tuple[float, float] | None = None, max_events: int = MAX_EVENTS
) -> list[str]:
    """Write what happened in the window; returns what had to be left out, one line each."""
    start_s, stop_s, notes = _window(result, window_s, max_events)
    with open(path, "wb") as raw:
        _pack(result, raw, start_s, stop_s)
    return notes


def timeline_bytes(
    result: Result | Run, window_s: tuple[float, float] | None = None, max_events: int = MAX_EVENTS
) -> bytes:
    """The same as the bytes of the file."""
    start_s, stop_s, _ = _window(result, window_s, max_events)
    packed = io.BytesIO()
    _pack(result, packed, start_s, stop_s)
    return packed.getvalue()


def _window(
    result: Result | Run, window_s: tuple[float, float] | None, max_events: int
) -> tuple[float, float, list[str]]:
    """Its begin, where it has to end, and what that leaves out."""
    start_s, stop_s = window_s or (0.0, inf)
    if not 0.0 <= start_s < stop_s:
        raise ValueError(f"window {start_s:g}:{stop_s:g} is empty; give START:STOP in seconds with 0 <= START < STOP")
    cut_s = _cut(result, start_s, stop_s, max_events)
    if cut_s == stop_s:
        return start_s, stop_s, []
    limit = f"timeline: stops at {cut_s:.3f} s, {max_events} events after {start_s:g} s"
    return start_s, cut_s, [f"{limit}; choose a later window to see the rest"]


def _pack(result: Result | Run, raw: BinaryIO, start_s: float, stop_s: float) -> None:
    with (
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,  # no name, no date: same bytes
        io.TextIOWrapper(packed, encoding="utf-8") as text,
    ):
        _write(result, text, start_s, stop_s)


def _cut(result: Result | Run, start_s: float, stop_s: float, max_events: int) -> float:
    """The end of the window that keeps the number of events within the limit."""
    rows_s, sent_s = result.iterations["start_s"], result.requests["arrival_s"]
    starts_s = np.concatenate([rows_s, sent_s])
    events = np.concatenate([np.full(rows_s.size, EVENTS_A_ROW), np.full(sent_s.size, EVENTS_A_REQUEST)])
    inside = (starts_s >= start_s) & (starts_s < stop_s)
    order = np.argsort(starts_s[inside], kind="stable")
    total = np.cumsum(events[inside][order])
    if not total.size or total[-1] <= max_events:
        return stop_s
    return float(starts_s[inside][order][np.searchsorted(total, max_events, side="right")])


def _write(result: Result | Run, out: TextIO, start_s: float, stop_s: float) -> None:
    out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
    separator = ""
    log = result.iterations
    for event in chain(_names(log), _rows(log, start_s, stop_s), _phases(result, start_s, stop_s)):
        out.write(separator)
        out.write(event)
        separator = ",\n"
    out.write("\n]}\n")


def _names(iterations: Columns) -> Iterator[str]:
    for replica in np.unique(iterations["replica"]).tolist():
        yield '{"ph":"M","name":"process_name","pid":%d,"args":{"name":"replica %d"}}' % (replica, replica)
        yield '{"ph":"M","name":"thread_name","pid":%d,"tid":0,"args":{"name":"GPU"}}' % replica


def _gpu_start_s(iterations: Columns) -> Floats:
    """When the GPU began each row. Of one iteration: its end less its length. Of several: the start of the row, but not
    before the end of the row ahead; the host may have paced them, so their lengths need not add up to the row."""
    single_s = iterations["gpu_end_s"] - iterations["gpu_first_s"]
    order = np.lexsort((iterations["gpu_end_s"], iterations["replica"]))
    ahead_s = np.full(order.size, -inf)
    same = iterations["replica"][order[1:]] == iterations["replica"][order[:-1]]
    ahead_s[order[1:]] = np.where(same, iterations["gpu_end_s"][order[:-1]], -inf)
    begin_s: Floats = np.maximum(np.where(iterations["iterations"] == 1, single_s, iterations["start_s"]), ahead_s)
    return begin_s


def _rows(iterations: Columns, start_s: float, stop_s: float) -> Iterator[str]:
    kept = np.flatnonzero((iterations["start_s"] >= start_s) & (iterations["start_s"] < stop_s))
    names = ("replica", "start_s", "iterations", "mode", "seqs", "kv_tokens", "prefill_requests", "prefill_tokens",
             "gpu_end_s", "running", "waiting", "kv_blocks")  # fmt: skip
    columns = [iterations[name][kept].tolist() for name in names]
    begins_s = _gpu_start_s(iterations)[kept].tolist()
    for begin_s, replica, at_s, n, mode, seqs, kv, prefills, tokens, end_s, running, waiting, blocks in zip(
        begins_s, *columns, strict=True
    ):
        duration_s = end_s - begin_s
        name = f"prefill {tokens}" if tokens else "decode" if n == 1 else f"decode x{n}"
        yield (
            '{"ph":"X","name":"%s","pid":%d,"tid":0,"ts":%.3f,"dur":%.3f,"args":{"iterations":%d,"mode":"%s","decodes":%d,'
            '"kv_tokens":%d,"prefill_requests":%d,"prefill_tokens":%d}}'
            % (name, replica, begin_s * 1e6, duration_s * 1e6, n, MODE_NAMES[int(mode)], seqs, kv, prefills, tokens)
        )
        yield '{"ph":"C","name":"requests","pid":%d,"ts":%.3f,"args":{"running":%d,"waiting":%d}}' % (
            replica, at_s * 1e6, running, waiting,
        )  # fmt: skip
        yield '{"ph":"C","name":"KV blocks","pid":%d,"ts":%.3f,"args":{"in use":%d}}' % (replica, at_s * 1e6, blocks)


def _phases(result: Result | Run, start_s: float, stop_s: float) -> Iterator[str]:
    requests = result.requests
    kept = np.flatnonzero((requests["arrival_s"] >= start_s) & (requests["arrival_s"] < stop_s))
    names = ("replica", "arrival_s", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    columns = [requests[name][kept].tolist() for name in names]
    for row, name, replica, *instants_s, prompt, output in zip(
        kept.tolist(), requests["id"][kept].tolist(), *columns, strict=True
    ):
        label = json.dumps(f"request {name}: {prompt} in, {output} out")
        for phase, begin_s, end_s in zip(("queue", "prefill", "decode"), instants_s, instants_s[1:], strict=False):
            if not isfinite(end_s):
                break
            where = '"cat":"request","id":%d,"pid":%d,"tid":1' % (row, replica)
            yield '{"ph":"b","name":"%s",%s,"ts":%.3f,"args":{"request":%s}}' % (phase, where, begin_s * 1e6, label)
            yield '{"ph":"e","name":"%s",%s,"ts":%.3f}' % (phase, where, end_s * 1e6)
