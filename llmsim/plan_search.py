"""Where something begins or ceases to hold: bracketing and bisection, as generators.

A search yields what it wants to try and is sent what came of it. It knows nothing of simulations: whoever drives it
may run several searches at a time. Both assume that what holds keeps holding with fewer requests or more replicas;
where noise bends that, they find one of the places where it changes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import ceil, exp, floor, inf, isfinite, log, log1p, log10, sqrt

DIGITS = 4  # of a rate: enough to repeat it from a printed table
SLOPE = 2.0  # of log latency over log rate, until two points have shown it
LEAST_STEP = 0.01  # of the logarithm of a rate; doubled with every step outwards, so that few cross any range
OUTWARD, INWARD = 400, 64  # steps at most: 64^340 is beyond any float, and 32 halvings of its logarithm leave 1e-7


def rounded(rate: float) -> float:
    """To `DIGITS` significant digits: a rate that can be typed."""
    return round(rate, DIGITS - 1 - floor(log10(rate)))


@dataclass(frozen=True)
class Point:
    rate: float
    excess: float  # log of (worst value / limit): at most 0 if it holds, inf if it cannot be said by how much not


@dataclass
class Bracket:
    """The closest two points that were tried: one that holds, and one that does not at a higher rate."""

    held: Point | None = None
    broken: Point | None = None

    def add(self, point: Point) -> None:
        if point.excess <= 0.0:
            self.held = point
        else:
            self.broken = point

    @property
    def rates(self) -> tuple[float | None, float | None]:
        held, broken = (None if end is None else end.rate for end in (self.held, self.broken))
        return held, broken


def highest_rate(
    guess: float, *, tolerance: float, least: float, most: float
) -> Generator[float, float, tuple[float | None, float | None]]:
    """(highest rate that holds, lowest that does not), no more than `tolerance` apart as a fraction of the first.

    Is sent the excess at each rate it yields. Looks around `guess`, as far as the excess suggests and further each
    time, then goes for the crossing of the line through the two ends (excess over log rate), and halves where that is
    slow. (None, r): not even `least` holds. (r, None): even `most` does. Both ends are rounded like any rate.

    It ends whatever it is sent, even nan: there are at most `OUTWARD` + `INWARD` simulations. Outwards the k-th step is
    at least 1 % times 2^k, so `OUTWARD` of them cross any range of floats and the clamp to [least, most] ends the
    search. Inwards each second step halves the bracket's logarithm, until it is as wide as the tolerance or no rate of
    `DIGITS` digits lies within; the loops are counted all the same.
    """
    least, most = rounded(least), rounded(most)
    bracket = Bracket()
    rate = min(max(rounded(guess), least), most)
    before: Point | None = None
    for step in range(OUTWARD):
        here = Point(rate, (yield rate))
        bracket.add(here)
        upwards = here.excess <= 0.0
        if (bracket.held and bracket.broken) or rate == (most if upwards else least):
            break
        factor = _step(here, before, tolerance, step)
        before = here
        rate = min(max(rounded(rate * factor if upwards else rate / factor), least), most)
    if bracket.held is None or bracket.broken is None:
        return bracket.rates
    yield from _narrowed(bracket, tolerance)
    return bracket.rates


def _narrowed(bracket: Bracket, tolerance: float) -> Generator[float, float, None]:
    halve = False
    for _ in range(INWARD):
        held, broken = bracket.held, bracket.broken
        assert held is not None and broken is not None
        if broken.rate <= held.rate * (1.0 + tolerance):
            return
        rate = rounded(_between(held, broken, tolerance, halve))
        if not held.rate < rate < broken.rate:
            return
        bracket.add(Point(rate, (yield rate)))
        low, high = bracket.held or held, bracket.broken or broken
        halve = log(high.rate / low.rate) > 0.5 * log(broken.rate / held.rate)


def _step(here: Point, before: Point | None, tolerance: float, count: int) -> float:
    """By which factor to move on: to where the excess should vanish, a little beyond; at least `LEAST_STEP`, doubled
    (as a logarithm) each time, and at most 2, squared each time up to 64, unless the least is more than that."""
    slope = SLOPE
    if before is not None and isfinite(here.excess) and isfinite(before.excess):
        found = (here.excess - before.excess) / log(here.rate / before.rate)
        slope = found if found > 0.0 else SLOPE
    wanted = abs(here.excess) / slope if here.excess == here.excess else inf
    factor = exp(min(wanted, 10.0)) * (1.0 + tolerance / 2.0)
    least = exp(min(max(LEAST_STEP, log1p(tolerance)) * 2.0**count, log(64.0)))
    most: float = 2.0 ** min(2**count, 6)
    return max(least, min(factor, most))


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
