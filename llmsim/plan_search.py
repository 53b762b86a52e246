"""Where something begins or ceases to hold: bracketing and bisection, as generators.

A search yields what it wants to try and is sent what came of it. It knows nothing of simulations: whoever drives it
may run several searches at a time. Both assume that what holds keeps holding with fewer requests or more replicas;
where noise bends that, they find one of the places where it changes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import ceil, exp, floor, isfinite, log, log10, sqrt

DIGITS = 4  # of a rate: enough to repeat it from a printed table
SLOPE = 2.0  # of log latency over log rate, until two points have shown it


def rounded(rate: float) -> float:
    """To `DIGITS` significant digits: a rate that can be typed."""
    return round(rate, DIGITS - 1 - floor(log10(rate)))


@dataclass(frozen=True)
class Point:
    rate: float
    excess: float  # log of (worst value / limit): at most 0 if it holds, inf if it cannot be said by how much not


def highest_rate(
    guess: float, *, tolerance: float, least: float, most: float
) -> Generator[float, float, tuple[float | None, float | None]]:
    """(highest rate that holds, lowest that does not), no more than `tolerance` apart as a fraction of the first.

    Is sent the excess at each rate it yields. Looks around `guess`, as far as the excess suggests and further each
    time, then goes for the crossing of the line through the two ends (excess over log rate), and halves where that is
    slow. (None, r): not even `least` holds. (r, None): even `most` does.
    """
    held: Point | None = None
    broken: Point | None = None
    before: Point | None = None  # of the same side, for the slope
    cap = 2.0
    least, most = rounded(least), rounded(most)  # the ends themselves are among the rates that are tried
    rate = rounded(min(max(guess, least), most))
    while held is None or broken is None:
        here = Point(rate, (yield rate))
        if here.excess <= 0.0:
            if rate >= most:
                return rate, None
            before, held = held, here
            rate = min(rate * _step(here, before, tolerance, cap), most)
        else:
            if rate <= least:
                return None, rate
            before, broken = broken, here
            rate = max(rate / _step(here, before, tolerance, cap), least)
        cap = min(cap * cap, 64.0)
        rate = rounded(rate)
    halve = False
    while broken.rate > held.rate * (1.0 + tolerance):
        width = log(broken.rate / held.rate)
        rate = rounded(_between(held, broken, tolerance, halve))
        if not held.rate < rate < broken.rate:
            break
        here = Point(rate, (yield rate))
        held, broken = (here, broken) if here.excess <= 0.0 else (held, here)
        halve = log(broken.rate / held.rate) > 0.5 * width
    return held.rate, broken.rate


def _step(here: Point, before: Point | None, tolerance: float, cap: float) -> float:
    """By which factor to move on: to where the excess should vanish, a little beyond, at most `cap`."""
    slope = SLOPE
    if before is not None and isfinite(here.excess) and isfinite(before.excess):
        found = (here.excess - before.excess) / log(here.rate / before.rate)
        slope = found if found > 0.0 else SLOPE
    return max(1.0 + tolerance, min(exp(min(abs(here.excess) / slope, 10.0)) * (1.0 + tolerance / 2.0), cap))


def _between(held: Point, broken: Point, tolerance: float, halve: bool) -> float:
    """The next rate between two ends; far enough from both that the bracket closes if the line was right."""
    if halve or not isfinite(broken.excess) or not isfinite(held.excess):
        return sqrt(held.rate * broken.rate)
    share = held.excess / (held.excess - broken.excess)
    line = held.rate * exp(share * log(broken.rate / held.rate))
    apart = 1.0 + 0.9 * tolerance
    if broken.rate < held.rate * apart**2:
        return sqrt(held.rate * broken.rate)
    return min(max(line, held.rate * apart), broken.rate / apart)


def fewest(guess: int, *, most: int, broken: int = 0) -> Generator[int, bool, tuple[int | None, int]]:
    """(fewest that hold, one less), given that `broken` do not. (None, most): not even `most` hold.

    Looks upwards from `guess` by factors that grow (1.3, its square, ...) until it holds, then downwards by steps that
    double until it does not, then halves.
    """
    factor, step, held = 1.3, 1, None
    count = min(max(guess, broken + 1), most)
    while held is None:
        if (yield count):
            held = count
        else:
            broken = count
            if count >= most:
                return None, most
            count = min(most, max(count + 1, ceil(count * factor)))
            factor *= factor
    bracketed = broken >= guess
    while held - broken > 1:
        count = (held + broken) // 2 if bracketed else max(broken + 1, held - step)
        if (yield count):
            held, step = count, 2 * step
        else:
            broken, bracketed = count, True
    return held, broken
