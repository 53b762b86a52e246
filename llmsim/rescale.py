"""Arrivals on another scale of time: sessions start sooner or later, what happens inside them keeps its pace.

    arrival_i' = k * start_i + (arrival_i - start_i)        start: the first request of i's session; k: the time scale

A request without a session is its own, so that `arrival' = k * arrival`. Users do not think faster because there are
more of them: scaling the stamps of later turns too would send a turn before the answer it reacts to, and find prefixes
in the cache that a real user would come back to only after they were evicted. A turn without a stamp waits for its
parent anyway (`Trace.delay_s`).

Sessions overlap differently on another scale, so requests may change their order. The mean rate over the whole span
comes out lower than asked for if sessions are long beside the span of their starts: the rate is that of the middle,
where as many sessions end as begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmsim.trace import Trace

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def session_roots(trace: Trace) -> IntArray | None:
    """The first request of each request's session, by parents or else by session names; None if all stand alone."""
    count = len(trace)
    if trace.parent is not None and (trace.parent >= 0).any():
        up = np.where(trace.parent >= 0, trace.parent, np.arange(count))
        for _ in range(max(1, count.bit_length())):
            up = up[up]
        return up
    if trace.session is None:
        return None
    first: dict[str, int] = {}
    roots = [first.setdefault(name, at) if name else at for at, name in enumerate(trace.session)]
    return np.array(roots, dtype=np.int64) if len(first) < count else None


def rescaled_s(trace: Trace, time_scale: float) -> FloatArray:
    """When each request arrives, in the trace's order; nan for one that waits for its parent."""
    roots = session_roots(trace)
    with np.errstate(over="ignore"):
        if roots is None:
            return np.asarray(trace.arrival_s * time_scale)
        starts_s = trace.arrival_s[roots]
        return np.asarray(starts_s * time_scale + (trace.arrival_s - starts_s))


def in_order(arrival_s: FloatArray, parent: IntArray | None) -> IntArray | None:
    """The order of these arrivals; a waiting turn stays behind its parent. None if it is the one they are in."""
    from llmsim.readers.settle import parents_first, session_starts

    order = np.argsort(session_starts(arrival_s, parent), kind="stable")
    if parent is not None:
        order = parents_first(order, parent)
    return order if (np.diff(order) != 1).any() else None


def longest_s(trace: Trace) -> float:
    """How long the longest session lasts by its stamps; waits for answers come on top."""
    roots = session_roots(trace)
    if roots is None:
        return 0.0
    return float(np.nan_to_num(trace.arrival_s - trace.arrival_s[roots], nan=0.0).max(initial=0.0))


def starts_span_s(trace: Trace) -> float:
    """From the start of the first session to that of the last."""
    roots = session_roots(trace)
    return float(np.ptp(trace.arrival_s if roots is None else trace.arrival_s[np.unique(roots)]))


def pace_note(trace: Trace, time_scale: float) -> str | None:
    """What becomes of sessions on another scale; None if the trace has none of more than one stamp."""
    lasts_s = longest_s(trace)
    if not lasts_s:
        return None
    return (
        f"sessions start within {starts_span_s(trace) * time_scale:.4g} s, rescaled; inside them the times stay, the "
        f"longest lasts {lasts_s:.4g} s"
    )
