"""Classes and tenants for traces that carry none: drawn with a seed, and never without being asked for.

A specification has parts separated by `;`. Each is a class, or the tenants:

    NAME:SHARE[:KEY=VALUE,...]     a class; the shares add up to 1. Keys: ttft, tpot (a time with its unit, as in 500ms
                                   or 10s: what the class is promised) and priority (a whole number, lower first)
    tenants:N                      N tenants t0 ... t(N-1), all equally likely
    tenants:N:zipf=A               tenant i as likely as (i + 1) ** -A
    tenants:NAME=SHARE,...         tenants by name; the shares add up to 1

    interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:4

Class and tenant of a request are drawn independently of each other and of its lengths; real classes usually differ in
their lengths too, so a trace that carries its own says more (columns slo_class, tenant, slo_ttft_ms, slo_tpot_ms).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import numpy as np

from llmsim.trace import FloatArray, IntArray, Trace

STREAM_CLASSES, STREAM_TENANTS = 2, 3  # streams of the seed of their own; 0 and 1 are the trace's
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
MAX_TENANTS = 1_000_000
EXAMPLE = "interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:4"


@dataclass(frozen=True)
class SloClass:
    """A class of requests; nan: no promise of that kind."""

    name: str
    share: float
    ttft_s: float = nan
    tpot_s: float = nan
    priority: int | None = None


def assign_classes(trace: Trace, spec: str, *, seed: int = 0) -> Trace:
    """The trace with classes and tenants drawn by `spec`. ValueError: a part that cannot be meant, or labels there."""
    classes, tenants = parse_classes(spec)
    changed: dict[str, object] = {}
    said: list[str] = []
    if classes:
        _check_free(trace, ("slo_class", "slo_ttft_s", "slo_tpot_s"), spec)
        member = _draw(len(trace), [one.share for one in classes], seed, STREAM_CLASSES)
        changed["slo_class"] = [classes[i].name for i in member.tolist()]
        for name, values in (("slo_ttft_s", "ttft_s"), ("slo_tpot_s", "tpot_s")):
            seconds = np.array([getattr(one, values) for one in classes])
            if not np.isnan(seconds).all():
                changed[name] = seconds[member]
        if classes[0].priority is not None:
            _check_free(trace, ("priority",), spec)
            changed["priority"] = np.array([one.priority for one in classes], dtype=np.int64)[member]
        said.append("classes " + ", ".join(f"{one.name} {one.share:.4g}" for one in classes))
    if tenants:
        _check_free(trace, ("tenant",), spec)
        names = list(tenants)
        drawn = _draw(len(trace), list(tenants.values()), seed, STREAM_TENANTS)
        changed["tenant"] = [names[i] for i in drawn.tolist()]
        said.append(f"{len(names)} tenants, shares {max(tenants.values()):.4g} to {min(tenants.values()):.4g}")
    note = f"assigned, not in the trace: {'; '.join(said)}; seed {seed}"
    return replace(trace, **changed, assigned=(*trace.assigned, note)).with_notes(note)  # type: ignore[arg-type]


def _draw(requests: int, shares: Sequence[float], seed: int, stream: int) -> IntArray:
    random = np.random.default_rng([seed, stream]).random(requests)
    return np.searchsorted(np.cumsum(shares)[:-1], random, side="right").astype(np.int64)


def _check_free(trace: Trace, columns: tuple[str, ...], spec: str) -> None:
    for name in columns:
        if getattr(trace, name) is not None:
            raise ValueError(f"--assign-classes {spec}: {trace.name} carries {name} of its own: leave that part out")


def parse_classes(spec: str) -> tuple[list[SloClass], dict[str, float]]:
    """Classes in the order given, and tenants with their shares; ValueError names the part and the fix."""
    classes: list[SloClass] = []
    tenants: dict[str, float] = {}
    for part in (text.strip() for text in spec.split(";")):
        if not part:
            raise _wrong(spec, "a part is empty", f"write parts such as {EXAMPLE}")
        name, colon, rest = part.partition(":")
        if name == "tenants":
            if tenants:
                raise _wrong(spec, "tenants is given twice", "keep one")
            tenants = _tenants(spec, rest if colon else "")
        else:
            classes.append(_class(spec, part))
    names = [one.name for one in classes]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(spec, f"class {name} is given twice", "keep one")
    if classes:
        _check_sum(spec, "classes", [one.share for one in classes])
    with_priority = [one.name for one in classes if one.priority is not None]
    if with_priority and len(with_priority) < len(classes):
        lacking = next(name for name in names if name not in with_priority)
        raise _wrong(spec, f"class {lacking} has no priority but {with_priority[0]} has", "give it to all or to none")
    return classes, tenants


def _class(spec: str, part: str) -> SloClass:
    name, _, rest = part.partition(":")
    if not name.strip():
        raise _wrong(spec, f"class {part!r} has no name", f"write parts such as {EXAMPLE}")
    share_text, _, keys = rest.partition(":")
    share = _number(spec, f"class {name}: share", share_text)
    given: dict[str, float] = {}
    priority: int | None = None
    for pair in filter(None, keys.split(",")):
        key, sign, text = (word.strip() for word in pair.partition("="))
        if key in given or (key == "priority" and priority is not None):
            raise _wrong(spec, f"class {name}: {key} is given twice", "keep one")
        if key in ("ttft", "tpot") and sign:
            given[key] = _seconds(spec, f"class {name}: {key}", text)
        elif key == "priority" and re.fullmatch(r"-?\d{1,9}", text):
            priority = int(text)
        else:
            raise _wrong(
                spec, f"class {name}: {pair!r} is no key", "give ttft=TIME, tpot=TIME or priority=WHOLE NUMBER"
            )
    return SloClass(name, share, given.get("ttft", nan), given.get("tpot", nan), priority)


def _tenants(spec: str, rest: str) -> dict[str, float]:
    count_text, _, option = rest.partition(":")
    if "=" in count_text and not option:
        shares: dict[str, float] = {}
        for pair in count_text.split(","):
            name, _, text = (word.strip() for word in pair.partition("="))
            if name in shares or not name:
                raise _wrong(spec, f"tenant {name!r} has no name or is given twice", "give each tenant once")
            shares[name] = _number(spec, f"tenant {name}: share", text)
        _check_sum(spec, "tenants", list(shares.values()))
        return shares
    if not count_text.isdecimal() or not 1 <= int(count_text) <= MAX_TENANTS:
        raise _wrong(spec, f"tenants:{count_text} is no number of tenants", f"give 1 to {MAX_TENANTS}, as in tenants:4")
    exponent = 0.0
    if option:
        key, _, text = option.partition("=")
        if key != "zipf":
            raise _wrong(spec, f"tenants: {option!r} is no way to share", "leave it out or give zipf=EXPONENT")
        exponent = _number(spec, "tenants: zipf", text)
    weights = np.arange(1, int(count_text) + 1, dtype=np.float64) ** -exponent
    weights /= weights.sum()
    return {f"t{i}": share for i, share in enumerate(weights.tolist())}


def _number(spec: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = nan
    if not (isfinite(value) and value > 0.0):
        raise _wrong(spec, f"{what}={text!r} is not a number above 0", f"write parts such as {EXAMPLE}")
    return value


def _seconds(spec: str, what: str, text: str) -> float:
    found = re.fullmatch(r"([\d.]+(?:e-?\d+)?)(s|ms|us)", text)
    if found is None:
        raise _wrong(spec, f"{what}={text!r} is not a time with its unit", "write 500ms or 10s")
    return _number(spec, what, found[1]) * UNITS_S[found[2]]


def _check_sum(spec: str, what: str, shares: Sequence[float]) -> None:
    if abs(sum(shares) - 1.0) > 1e-6:
        raise _wrong(spec, f"the shares of the {what} add up to {sum(shares):g}", "make them add up to 1")


def _wrong(spec: str, what: str, fix: str) -> ValueError:
    return ValueError(f"--assign-classes {spec}: {what}: {fix}")


def promises_s(trace: Trace) -> tuple[FloatArray, FloatArray]:
    """(TTFT, TPOT) promised to each request, seconds; nan where nothing is."""
    absent = np.full(len(trace), nan)
    return (
        absent if trace.slo_ttft_s is None else trace.slo_ttft_s,
        absent if trace.slo_tpot_s is None else trace.slo_tpot_s,
    )
