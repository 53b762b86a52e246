"""Arrival processes: when requests (or sessions) start, in seconds, the first at 0.

Renewal processes draw independent gaps of mean 1/rate: exponential (Poisson), gamma of shape 1/cv^2 and scale
cv^2/rate, Weibull whose shape k solves CV(k) = cv. `burstiness` is the gamma shape, as vLLM and AIPerf name it:
CV = 1/sqrt(burstiness). Gaps are not clipped (clipping at 3/rate, as one simulator does, raises the rate by 5.2 %).
Modulated processes are Poisson inside each state; diurnal ones thin a sinusoid. Ramps go by request index, as vLLM's.
`exact` rescales so that the n requests span exactly (n - 1)/rate; off by default, since it removes real variation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llmsim.readers.rows import FloatArray
from llmsim.synth.spec import Spec, parse

Rng = np.random.Generator


def arrivals(text: str, requests: int, rng: Rng) -> FloatArray:
    """`requests` arrival times of the process `text` spells."""
    spec = parse(text)
    process = PROCESSES.get(spec.name)
    if process is None:
        raise ValueError(f"arrivals {text!r}: {spec.name!r} is not one of {', '.join(PROCESSES)}")
    if requests < 1:
        raise ValueError(f"requests={requests} must be at least 1")
    exact = spec.count("exact", 0, least=0)
    at_s: FloatArray = process(spec, requests, rng)
    spec.done()
    at_s = at_s - at_s[0]
    if exact and requests > 1:
        rate = spec.number("rate", above=0)
        at_s = at_s * ((requests - 1) / rate / at_s[-1])
    return at_s


def _cv(spec: Spec, default: float | None = None) -> float:
    if spec.has("cv") and spec.has("burstiness"):
        raise ValueError(f"{spec.text!r}: give cv or burstiness, not both (cv = 1/sqrt(burstiness))")
    if spec.has("burstiness"):
        return 1.0 / math.sqrt(spec.number("burstiness", above=0))
    return spec.number("cv", default, above=0)


def _gamma_gaps(mean_s: float, cv: float, size: int, rng: Rng) -> FloatArray:
    gaps_s: FloatArray = rng.gamma(1.0 / cv**2, cv**2 * mean_s, size=size)
    return gaps_s


def constant(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    return np.arange(requests) / spec.number("rate", above=0)


def poisson(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    rate = spec.number("rate", above=0)
    return np.zeros(requests) if math.isinf(rate) else np.cumsum(rng.exponential(1.0 / rate, size=requests))


def gamma(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    return np.cumsum(_gamma_gaps(1.0 / spec.number("rate", above=0), _cv(spec), requests, rng))


def weibull_shape(cv: float) -> float:
    """k with sqrt(Gamma(1+2/k)/Gamma(1+1/k)^2 - 1) = cv, by bisection: the CV falls as k grows."""
    low, high = 0.05, 1000.0

    def cv_of(shape: float) -> float:
        log_ratio = math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)
        return math.sqrt(max(math.expm1(log_ratio), 0.0)) if log_ratio < 600 else math.inf

    if not cv_of(high) <= cv <= cv_of(low):
        raise ValueError(f"cv={cv:g} is outside what a Weibull distribution reaches here ({cv_of(high):.3g} upwards)")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cv_of(middle) > cv else (low, middle)
    return low


def weibull(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    shape = weibull_shape(_cv(spec))
    scale_s = 1.0 / (spec.number("rate", above=0) * math.gamma(1 + 1 / shape))
    return np.cumsum(rng.weibull(shape, size=requests) * scale_s)


def _poisson_in(segments: Callable[[], tuple[FloatArray, FloatArray]], requests: int, rng: Rng) -> FloatArray:
    """Poisson arrivals inside consecutive segments (durations in s, rates per s), drawn in batches until enough."""
    parts, begin_s, have = [], 0.0, 0
    while have < requests:
        duration_s, rate = segments()
        counts = rng.poisson(duration_s * rate)
        starts_s = begin_s + np.cumsum(duration_s) - duration_s
        at_s = np.repeat(starts_s, counts) + rng.random(int(counts.sum())) * np.repeat(duration_s, counts)
        parts.append(np.sort(at_s))
        begin_s += float(duration_s.sum())
        have += len(at_s)
    return np.concatenate(parts)[:requests]


def mmpp(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    rates, sojourns_s = np.array(spec.numbers("rates")), np.array(spec.numbers("sojourns"))
    if len(rates) != len(sojourns_s) or len(rates) < 2 or not rates.any() or (sojourns_s <= 0).any():
        raise ValueError(f"{spec.text!r}: rates and sojourns need as many entries, at least two, sojourns above 0 s")
    state = [0]

    def segments() -> tuple[FloatArray, FloatArray]:
        # The next state is any of the others, equally likely.
        path = (state[0] + np.cumsum(rng.integers(1, len(rates), size=256))) % len(rates)
        path = np.concatenate([[state[0]], path[:-1]])
        state[0] = int((path[-1] + rng.integers(1, len(rates))) % len(rates))
        return rng.exponential(sojourns_s[path]), rates[path]

    return _poisson_in(segments, requests, rng)


def on_off(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    rates = np.array([spec.number("on_rate", above=0), spec.number("off_rate", 0.0, least=0)])
    lasting_s = np.array([spec.number("on", above=0), spec.number("off", above=0)])
    fixed = spec.count("fixed", 0, least=0)

    def segments() -> tuple[FloatArray, FloatArray]:
        durations_s = np.tile(lasting_s, 128)
        return (durations_s if fixed else rng.exponential(durations_s)), np.tile(rates, 128)

    return _poisson_in(segments, requests, rng)


def diurnal(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    """rate(t) = rate * (1 + a sin(2 pi (t/period + phase))) with a = (peak/trough - 1)/(peak/trough + 1)."""
    rate, ratio = spec.number("rate", above=0), spec.number("peak_to_trough", least=1)
    period_s, phase = spec.number("period", 86400.0, above=0), spec.number("phase", 0.0)
    swing = (ratio - 1) / (ratio + 1)
    parts, begin_s, have = [], 0.0, 0
    while have < requests:
        batch = int(1.2 * (1 + swing) * (requests - have)) + 64
        at_s = begin_s + np.cumsum(rng.exponential(1 / (rate * (1 + swing)), size=batch))
        level = (1 + swing * np.sin(2 * math.pi * (at_s / period_s + phase))) / (1 + swing)
        kept = at_s[rng.random(batch) < level]
        parts.append(kept)
        begin_s, have = float(at_s[-1]), have + len(kept)
    return np.concatenate(parts)[:requests]


def piecewise(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    """A renewal process in each piece; the last piece goes on until there are enough."""
    at, rates = spec.numbers("at"), spec.numbers("rates")
    cvs = spec.numbers("cv", "1")
    cvs = cvs * len(rates) if len(cvs) == 1 else cvs
    if len(at) != len(rates) or len(cvs) != len(rates) or at != sorted(set(at)) or rates[-1] <= 0 or min(cvs) <= 0:
        raise ValueError(f"{spec.text!r}: at must rise, rates (and cv) have one entry for each, the last rate above 0")
    parts, have = [], 0
    for begin_s, end_s, rate, cv in zip(at, [*at[1:], math.inf], rates, cvs, strict=True):
        last_s = begin_s
        while rate > 0 and have < requests and last_s < end_s:
            wanted = requests - have if math.isinf(end_s) else int((end_s - last_s) * rate * 1.1) + 16
            at_s = last_s + np.cumsum(_gamma_gaps(1 / rate, cv, min(wanted, requests), rng))
            last_s = float(at_s[-1])
            parts.append(at_s[at_s < end_s])
            have += len(parts[-1])
    return np.concatenate(parts)[:requests]


def ramp(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    start, end = spec.number("start", above=0), spec.number("end", above=0)
    part = np.arange(requests) / max(requests - 1, 1)
    shape = spec.text_of("shape", "linear")
    if shape not in ("linear", "exponential"):
        raise ValueError(f"{spec.text!r}: shape={shape} is not linear or exponential")
    rates = start + (end - start) * part if shape == "linear" else start * (end / start) ** part
    return np.cumsum(_gamma_gaps(1.0, _cv(spec, 1.0), requests, rng) / rates)


def spike(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    base, extra = spec.number("base", least=0), spec.number("extra", above=0)
    start_s, length_s = spec.number("start", least=0), spec.number("length", above=0)
    if base == 0:
        raise ValueError(f"{spec.text!r}: base=0 sends nothing after the spike; give a base rate above 0")
    tail_s = 1.1 * requests / base + 1.0
    first = [True]

    def segments() -> tuple[FloatArray, FloatArray]:
        if first[0]:
            first[0] = False
            return np.array([start_s, length_s, tail_s]), np.array([base, base + extra, base])
        return np.array([tail_s]), np.array([base])

    return _poisson_in(segments, requests, rng)


def pulse(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    pulses = np.arange(requests, dtype=np.float64) // spec.count("size")
    return pulses * spec.number("every", above=0)


def batch(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    return np.zeros(requests)


def replay(spec: Spec, requests: int, rng: Rng) -> FloatArray:
    """The arrival times of another trace, optionally rescaled to a mean rate."""
    from llmsim.trace import at_rate, load_trace

    trace = load_trace(spec.text_of("path"))
    if spec.has("rate"):
        trace = at_rate(trace, spec.number("rate", above=0))
    at_s = trace.arrival_s[~np.isnan(trace.arrival_s)]
    if len(at_s) < requests:
        raise ValueError(f"{spec.text!r}: {requests} requests asked for, but the trace has {len(at_s)} arrivals")
    return at_s[:requests]


PROCESSES: dict[str, Callable[[Spec, int, Rng], FloatArray]] = {
    "constant": constant, "poisson": poisson, "gamma": gamma, "weibull": weibull, "mmpp": mmpp, "on-off": on_off,
    "diurnal": diurnal, "piecewise": piecewise, "ramp": ramp, "spike": spike, "pulse": pulse, "batch": batch,
    "replay": replay,
}  # fmt: skip
