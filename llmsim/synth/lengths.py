"""Length distributions, each as its quantile function: tokens(u) for u uniform in (0, 1).

So one uniform number decides one length whatever the distribution, and a Gaussian copula (`correlated`) couples prompt
and output: u = Phi(z) with normals of correlation rho. A normal is truncated to its limits (values outside are drawn
again, none pile up); for every other distribution `min` and `max` clip, last. Continuous values round to the nearest
token, and no request has fewer than one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmsim.readers.rows import FloatArray, IntArray
from llmsim.synth.spec import Spec, bare, parse, split

Quantile = Callable[[FloatArray], FloatArray]
TINY = 1e-12


def quantile(text: str) -> Quantile:
    """The quantile function `text` spells, in real numbers (also used for think times)."""
    spec = parse(text)
    if spec.name not in DISTRIBUTIONS:
        raise ValueError(
            f"lengths {text!r}: {spec.name!r} is not one of {', '.join((*DISTRIBUTIONS, 'empirical', 'ratio'))}"
        )
    if spec.name in ("normal", "uniform", "zipf"):
        inner, low, high = DISTRIBUTIONS[spec.name](spec), -math.inf, math.inf
    else:
        inner = DISTRIBUTIONS[spec.name](spec)
        low, high = spec.number("min", 0.0, least=0), spec.number("max", 1e9)
    spec.done()
    if low > high:
        raise ValueError(f"{text!r}: min={low:g} is above max={high:g}")
    return lambda u: np.clip(inner(u), low, high)


def tokens(text: str, u: FloatArray) -> IntArray:
    """Whole numbers of tokens, at least 1."""
    values = quantile(text)(u)
    if len(values) and float(values.max()) < 0.5:
        raise ValueError(f"{text!r}: every length drawn is below half a token; a request has at least one")
    return np.maximum(np.rint(values), 1).astype(np.int64)


def correlated(u: FloatArray, other: FloatArray, rho: float) -> FloatArray:
    """`other` made to correlate with `u`: uniforms of a Gaussian copula of correlation rho."""
    if not -1 <= rho <= 1:
        raise ValueError(f"rho={rho:g} must lie between -1 and 1")
    if rho == 0:
        return other
    from scipy.special import ndtr, ndtri

    mixed = rho * ndtri(np.clip(u, TINY, 1 - TINY)) + math.sqrt(1 - rho * rho) * ndtri(np.clip(other, TINY, 1 - TINY))
    return np.asarray(ndtr(mixed))


def _fixed(spec: Spec) -> Quantile:
    size = spec.number("tokens" if spec.has("tokens") else "value", least=0)
    return lambda u: np.full(len(u), size)


def _uniform(spec: Spec) -> Quantile:
    """Whole numbers from min to max, both included."""
    low, high = spec.number("min", least=0), spec.number("max", least=0)
    if high < low:
        raise ValueError(f"{spec.text!r}: max={high:g} is below min={low:g}")
    return lambda u: np.floor(low + u * (high - low + 1))


def _random(spec: Spec) -> Quantile:
    """vLLM's `random` data set: uniform on tokens * (1 +- ratio)."""
    size, ratio = spec.number("tokens", 1024, least=1), spec.number("ratio", 0.0, least=0)
    if ratio >= 1:
        raise ValueError(f"{spec.text!r}: ratio={ratio:g} must be below 1")
    low, high = math.floor(size * (1 - ratio)), math.ceil(size * (1 + ratio))
    return lambda u: np.floor(low + u * (high - low + 1))


def _normal(spec: Spec) -> Quantile:
    from scipy.special import ndtr, ndtri

    mean, sd = spec.number("mean"), spec.number("sd", above=0)
    low, high = spec.number("min", 0.0, least=0), spec.number("max", 1e9)
    below, upto = float(ndtr((low - mean) / sd)), float(ndtr((high - mean) / sd))
    if not upto - below > TINY:
        raise ValueError(f"{spec.text!r}: nearly nothing of the distribution lies in [{low:g}, {high:g}]")
    return lambda u: np.asarray(np.clip(mean + sd * ndtri(below + u * (upto - below)), low, high))


def lognormal_parameters(spec: Spec) -> tuple[float, float]:
    """(mu, sigma) from mu, sigma | median, sigma | mean, median | mean, sd."""
    if spec.has("mu"):
        return spec.number("mu"), spec.number("sigma", least=0)
    if spec.has("median") and spec.has("sigma"):
        return math.log(spec.number("median", above=0)), spec.number("sigma", least=0)
    if spec.has("mean") and spec.has("median"):
        mean, median = spec.number("mean", above=0), spec.number("median", above=0)
        if mean < median:
            raise ValueError(f"{spec.text!r}: the mean of a lognormal is not below its median")
        return math.log(median), math.sqrt(2 * math.log(mean / median))
    if spec.has("mean") and spec.has("sd"):
        mean, sd = spec.number("mean", above=0), spec.number("sd", least=0)
        sigma2 = math.log1p((sd / mean) ** 2)
        return math.log(mean) - sigma2 / 2, math.sqrt(sigma2)
    raise ValueError(f"{spec.text!r}: lognormal needs mu,sigma or median,sigma or mean,median or mean,sd")


def _lognormal(spec: Spec) -> Quantile:
    from scipy.special import ndtri

    mu, sigma = lognormal_parameters(spec)
    return lambda u: np.asarray(np.exp(mu + sigma * ndtri(np.clip(u, TINY, 1 - TINY))))


def _exponential(spec: Spec) -> Quantile:
    mean = spec.number("mean", above=0)
    return lambda u: -mean * np.log1p(-np.minimum(u, 1 - TINY))


def _pareto(spec: Spec) -> Quantile:
    least, alpha = spec.number("least", above=0), spec.number("alpha", above=0)
    return lambda u: least * (1 - np.minimum(u, 1 - TINY)) ** (-1 / alpha)


def _zipf(spec: Spec) -> Quantile:
    """P(min + i) proportional to (i + 1)^-theta."""
    theta, low, high = spec.number("theta", 0.6, least=0), spec.count("min"), spec.count("max")
    if not low <= high <= low + 10_000_000:
        raise ValueError(f"{spec.text!r}: max={high} must be at least min={low} (and within ten million of it)")
    weights = np.arange(1, high - low + 2, dtype=np.float64) ** -theta
    return _table(np.arange(low, high + 1, dtype=np.float64), weights)


def _table(values: FloatArray, weights: FloatArray) -> Quantile:
    cumulative = np.cumsum(weights) / weights.sum()
    return lambda u: values[np.minimum(np.searchsorted(cumulative, u, side="right"), len(values) - 1)]


def _histogram(spec: Spec) -> Quantile:
    values, weights = np.array(spec.numbers("tokens")), np.array(spec.numbers("weights"))
    if len(values) != len(weights) or not weights.sum() > 0:
        raise ValueError(f"{spec.text!r}: tokens and weights need as many entries, and a weight above 0")
    return _table(values, weights)


def _cdf(spec: Spec) -> Quantile:
    """Linear between points (tokens, fraction); the last fraction is 1."""
    values, fractions = np.array(spec.numbers("tokens")), np.array(spec.numbers("fractions"))
    rising = len(values) == len(fractions) and bool((np.diff(fractions) > 0).all() and (np.diff(values) >= 0).all())
    if not rising or abs(fractions[-1] - 1) > 1e-9:
        raise ValueError(f"{spec.text!r}: tokens and fractions need as many rising entries, the last fraction 1")
    return lambda u: np.interp(u, fractions, values)


def _mixture(spec: Spec) -> Quantile:
    """Component by component: the first digits of u choose the part, the rest of u is its own uniform."""
    parts = [quantile(bare(text)) for text in split(spec.text_of("parts"), "/")]
    weights = np.array(spec.numbers("weights"))
    if len(parts) != len(weights) or not weights.sum() > 0:
        raise ValueError(f"{spec.text!r}: parts and weights need as many entries, and a weight above 0")
    upper = np.cumsum(weights) / weights.sum()
    lower = upper - weights / weights.sum()

    def draw(u: FloatArray) -> FloatArray:
        chosen: NDArray[np.intp] = np.minimum(np.searchsorted(upper, u, side="right"), len(parts) - 1)
        drawn = np.empty(len(u))
        for part, tokens_of in enumerate(parts):
            mine = chosen == part
            drawn[mine] = tokens_of((u[mine] - lower[part]) / max(upper[part] - lower[part], TINY))
        return drawn

    return draw


DISTRIBUTIONS: dict[str, Callable[[Spec], Quantile]] = {
    "fixed": _fixed, "uniform": _uniform, "random": _random, "normal": _normal, "lognormal": _lognormal,
    "exponential": _exponential, "pareto": _pareto, "zipf": _zipf, "histogram": _histogram, "cdf": _cdf,
    "mixture": _mixture,
}  # fmt: skip
