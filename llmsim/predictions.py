"""Predictions of answer lengths: what shortest-job-first policies know of a request before it runs.

    perfect            the true length
    sigma=S            length * exp(S * z), z standard normal, drawn per request (log-normal noise), at least 1 token
    tau=T              the S whose predictions have Kendall's tau-b = T with the true lengths, 0 < T <= 1
    rank               the share of the trace's requests with a shorter answer, in [0, 1): an order without lengths, as
                       a ranking model gives it (arXiv 2408.15792 trains one; it predicts no lengths)
    rank,sigma=S       the ranks of noisy predictions, likewise rank,tau=T

tau = (concordant - discordant pairs) / sqrt(pairs untied in one * pairs untied in the other). One draw of z serves
every S, so tau falls as S grows, and bisection finds it; the achieved value is measured over the whole trace and noted.
Left out: predictors whose error depends on the prompt, and predictions refined while the answer grows.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, nan

import numpy as np

from llmsim.trace import FloatArray, Trace

STREAM_PREDICTIONS = 4  # its own stream of the seed
SEARCHED = 50_000  # requests on which sigma is searched; of longer traces, evenly spaced ones
LARGEST_SIGMA = 64.0
TOLERANCE = 1e-4  # of tau


def predict(trace: Trace, spec: str, *, seed: int = 0) -> Trace:
    """The trace with `predicted_tokens` by `spec`. ValueError: what cannot be meant, or predictions already there."""
    ranks, kind, value = _parse(spec)
    if trace.predicted_tokens is not None:
        raise ValueError(f"--predict {spec}: {trace.name} carries predicted_tokens of its own: leave --predict out")
    true = trace.output_tokens.astype(np.float64)
    z = np.random.default_rng([seed, STREAM_PREDICTIONS]).standard_normal(len(true))
    sigma = value if kind == "sigma" else 0.0
    if kind == "tau":
        sigma = sigma_for_tau(true, z, value)
    predicted = noisy(true, z, sigma)
    achieved = kendall_tau(true, predicted)
    if ranks:
        predicted = rank_shares(predicted)
    what = "perfect" if not sigma else f"log-normal noise, sigma {sigma:.4g}"
    only = " (ranks only)" if ranks else ""
    note = f"predictions made, not in the trace: {what}{only}; Kendall's tau {achieved:.4f}; seed {seed}"
    return replace(trace, predicted_tokens=predicted, assigned=(*trace.assigned, note)).with_notes(note)


def _parse(spec: str) -> tuple[bool, str, float]:
    words = [word.strip() for word in spec.split(",")]
    ranks = words[0] == "rank"
    rest = words[1:] if ranks else words
    if rest in ([], ["perfect"]):
        return ranks, "perfect", 0.0
    kind, _, text = rest[0].partition("=")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    limit = 1.0 if kind == "tau" else LARGEST_SIGMA
    above = value > 0.0 if kind == "tau" else value >= 0.0
    if len(rest) > 1 or kind not in ("sigma", "tau") or not (isfinite(value) and above and value <= limit):
        raise ValueError(
            f"--predict {spec}: is no prediction: give perfect, sigma=S (0 to {LARGEST_SIGMA:g}), tau=T (above 0, "
            "at most 1), rank, rank,sigma=S or rank,tau=T"
        )
    return ranks, kind, value


def noisy(true: FloatArray, z: FloatArray, sigma: float) -> FloatArray:
    """Nobody predicts an answer of less than one token, which also keeps lengths apart from ranks."""
    with np.errstate(over="ignore"):
        made: FloatArray = np.clip(true * np.exp(sigma * z), 1.0, 1e300)
    return made


def rank_shares(predicted: FloatArray) -> FloatArray:
    """The share of all requests predicted to be shorter."""
    ordered = np.sort(predicted)
    shares: FloatArray = np.searchsorted(ordered, predicted, side="left") / len(predicted)
    return shares


def kendall_tau(true: FloatArray, predicted: FloatArray) -> float:
    """Kendall's tau-b; nan if all true lengths, or all predictions, are the same."""
    from scipy.stats import kendalltau

    if len(true) < 2:
        return nan
    return float(kendalltau(true, predicted).statistic)


def sigma_for_tau(true: FloatArray, z: FloatArray, tau: float) -> float:
    """The noise whose predictions have Kendall's tau with the true lengths; ValueError if no noise has it."""
    if len(true) > SEARCHED:
        picked = np.linspace(0, len(true) - 1, SEARCHED).astype(np.int64)
        true, z = true[picked], z[picked]
    if tau == 1.0:
        return 0.0
    low, high = 0.0, 1.0
    while kendall_tau(true, noisy(true, z, high)) > tau:
        low, high = high, 2.0 * high
        if high > LARGEST_SIGMA:
            raise ValueError(
                f"--predict tau={tau:g}: no noise makes predictions that bad on this trace: give a larger tau"
            )
    found, sigma = inf, high
    while high - low > 1e-9 and abs(found - tau) > TOLERANCE:
        sigma = 0.5 * (low + high)
        found = kendall_tau(true, noisy(true, z, sigma))
        low, high = (sigma, high) if found > tau else (low, sigma)
    if abs(found - tau) > 0.01:
        # tied lengths: any noise at all breaks their ties, and tau-b jumps down from 1
        raise ValueError(
            f"--predict tau={tau:g}: lengths of this trace are tied, and noise reaches {found:.4f} at most: give at "
            "most that, or 1"
        )
    return sigma
