"""What a plan may be asked: everything else is refused in one line that names it."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from llmsim.plan_reach import AT_ONCE_S, Reach


def check_number(name: str, value: Any, says: str, below: float = inf) -> None:
    """A number above 0 and below `below`, or None; True is none."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} is not a number: give {says}")
    if not 0.0 < float(value) < below:
        raise ValueError(f"{name}={float(value):g}: give {says}")


def check_count(name: str, value: Any, what: str) -> None:
    """A whole number of at least 1, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} is not a whole number: give 1 or more {what}")
    if value < 1:
        raise ValueError(f"{name}={value} is too small: give 1 or more {what}")


def check_prices(prices: Any) -> None:
    if prices is not None and not isinstance(prices, str | Path):
        raise ValueError(f"prices={prices!r}: give the path of a file of prices, or None for llmsim's own")


def several(name: str, given: Any, own: Any) -> tuple[Any, ...]:
    """Of the options that are asked for; None is the scenario's own, one alone is one."""
    kind: type = type(own)
    if given is None:
        return (own,)
    found = (given,) if isinstance(given, kind | str) or not isinstance(given, Iterable) else tuple(given)
    if not found:
        raise ValueError(f"{name}={given!r} is empty: name one or more, or leave it out for the scenario's {own}")
    for one in found:
        if isinstance(one, bool) or not isinstance(one, Integral if kind is int else kind):
            raise ValueError(f"{name}: {one!r} is not a {'number of GPUs' if kind is int else 'name'}")
    return tuple(dict.fromkeys(found))


def check_rate(rate: float, reach: Reach, name: str) -> None:
    """That the trace, rescaled, neither lasts longer than times may nor comes down to one instant."""
    least, most = reach.least_rate(), max(reach.own_rate, reach.at_once_rate())
    if rate < least:
        raise ValueError(f"rate={rate:g}: {name} would last for centuries: give {2 * least:.2g} requests/s or more")
    if rate > most * (1.0 + 1e-9):
        raise ValueError(
            f"rate={rate:g}: all {reach.requests:,} requests of {name} would come within {1e3 * AT_ONCE_S:g} ms: give "
            f"{most:.3g} requests/s or less, or a longer trace"
        )
