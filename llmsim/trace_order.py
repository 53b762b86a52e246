"""In which order a trace's requests are likely to come, turns that wait for others included."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.trace import Trace


def likely_times_s(trace: Trace) -> list[float]:
    """When each request is sent if answers take no time: a turn comes its think time after the one before it."""
    times_s: list[float] = trace.arrival_s.tolist()
    for i in range(len(times_s)):
        chain = []  # turns whose time is not known yet, the latest first
        at = i
        while isnan(times_s[at]) and trace.parent is not None:
            chain.append(at)
            at = int(trace.parent[at])
        for turn in reversed(chain):
            delay_s = 0.0 if trace.delay_s is None or isnan(trace.delay_s[turn]) else float(trace.delay_s[turn])
            times_s[turn] = times_s[at] + delay_s
            at = turn
    return times_s
