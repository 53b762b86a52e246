"""Up to which rate a trace can tell anything.

Rescaling brings the starts of sessions closer and nothing else (`llmsim.rescale`): what happens inside keeps its pace.
By Little's law a rate of sessions means so many under way as start in the mean time that one lasts. Of starts within W
seconds, with durations D, the mean number under way at the end comes to

    part of it = E[min(D, W)] / E[D]

so at rates at which W is short against D, nearly all sessions start at once and then trickle: the load never becomes
what the rate says, whatever the rate is. The *reach* is the rate at which that part is `REACHED`. D is what the trace
knows: stamps and waits, without the answers, unless a simulation has said how long these take.

A trace without sessions can be compressed until all requests arrive within `AT_ONCE_S`: what that does not break, no
rate breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmsim.readers.settle import MAX_SPAN_S
from llmsim.rescale import session_roots, starts_span_s
from llmsim.trace import Trace, mean_rate_per_s

if TYPE_CHECKING:
    from llmsim.plan_option import Found
    from llmsim.plan_runs import Run

REACHED = 0.9
AT_ONCE_S = 1e-3  # a fraction of an engine's step
HALVINGS = 60
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reach:
    """The sessions of a trace: how long each lasts without its answers, how many of these one waits for, and the rate
    and span of their starts as the trace has them. Without sessions of any length the durations are empty."""

    name: str
    requests: int
    durations_s: Floats
    waits: Floats
    starts_span_s: float
    own_rate: float

    @classmethod
    def of(cls, trace: Trace) -> Reach:
        durations_s, waits = _sessions(trace)
        if not (durations_s > 0.0).any():
            durations_s = waits = np.zeros(0)
        return cls(trace.name, len(trace), durations_s, waits, starts_span_s(trace), mean_rate_per_s(trace))

    @property
    def has_sessions(self) -> bool:
        return self.durations_s.size > 0

    def window_s(self, rate: float) -> float:
        """From the first start to the last."""
        return self.starts_span_s * self.own_rate / rate

    def at_once_rate(self) -> float:
        """At which all starts come within `AT_ONCE_S`."""
        return self.window_s(1.0) / AT_ONCE_S

    def least_rate(self) -> float:
        """Below which the trace would last longer than times of arrival may."""
        return 2.0 * self.window_s(1.0) / MAX_SPAN_S

    def part(self, rate: float, answer_s: float = 0.0) -> float:
        """Of the sessions that this rate means to be under way, those that come to be."""
        lasts_s = self.durations_s + answer_s * self.waits
        mean_s = float(lasts_s.mean()) if lasts_s.size else 0.0
        return float(np.minimum(lasts_s, self.window_s(rate)).mean()) / mean_s if mean_s else 1.0

    def rate(self, answer_s: float = 0.0) -> float:
        """The highest that this trace can show."""
        at_once = max(self.own_rate, self.at_once_rate())
        if not self.has_sessions or self.part(at_once, answer_s) >= REACHED:
            return at_once
        low, high = 0.0, at_once
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.part(middle, answer_s) >= REACHED else (low, middle)
        return low

    def words(self, answer_s: float = 0.0) -> str:
        """Why nothing is said of higher rates."""
        if not self.has_sessions:
            return (
                f"nothing breaks it on this trace, not even all {self.requests:,} requests within "
                f"{1e3 * AT_ONCE_S:g} ms: too short to tell"
            )
        rate = self.rate(answer_s)
        mean_s = float((self.durations_s + answer_s * self.waits).mean())
        return (
            f"nothing breaks it up to {rate:.3g}/s, and {self.name} tells no more: at higher rates its "
            f"{self.durations_s.size:,} sessions, of {mean_s:.3g} s on average, start within less than "
            f"{self.window_s(rate):.3g} s and are never under way in the number that the rate means: give more sessions"
        )


def _sessions(trace: Trace) -> tuple[Floats, Floats]:
    """(seconds by stamps and waits, answers that are waited for and the last one) of each session."""
    roots = session_roots(trace)
    if roots is None:
        return np.zeros(0), np.zeros(0)
    since_s, waits = np.zeros(len(trace)), np.ones(len(trace))
    parent = trace.parent
    for at in range(len(trace)):
        if not np.isnan(trace.arrival_s[at]):
            since_s[at] = trace.arrival_s[at] - trace.arrival_s[roots[at]]
        else:
            assert parent is not None  # a turn without a stamp waits for one that comes before it
            delay_s = 0.0 if trace.delay_s is None else float(trace.delay_s[at])
            since_s[at], waits[at] = since_s[parent[at]] + delay_s, waits[parent[at]] + 1.0
    firsts, place = np.unique(roots, return_inverse=True)
    longest_s, longest = np.zeros(firsts.size), np.zeros(firsts.size)
    np.maximum.at(longest_s, place, since_s)
    np.maximum.at(longest, place, waits)
    return longest_s, longest


@dataclass(frozen=True)
class Told:
    """The simulation at the highest rate that a fleet holds, the one that breaks just above, or why there is none."""

    held: Run | None = None
    broken: Run | None = None
    untold: str = ""


def told_by(found: Found, reach: Reach, *, chosen: bool = False) -> Told:
    """What a search for the highest rate is worth. `chosen`: the rate is not where it breaks, but was lowered to."""
    held, broken = found.held, found.broken
    if held is None:
        return Told()
    answer_s = answer_of(held)
    beyond = reach.has_sessions and held.rate > reach.rate(answer_s)
    if beyond or (broken is None and not chosen):
        return Told(untold=reach.words(answer_s))
    return Told(held, broken)


def answer_of(run: Run) -> float:
    """Mean seconds of an answer."""
    mean_ms: float | None = run.values["mean_e2el_ms"]
    return 0.0 if mean_ms is None else 1e-3 * mean_ms
