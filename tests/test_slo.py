"""Promises: what may be written, what they are compared with, and that refusing requests keeps none."""

from __future__ import annotations

import re
from math import inf, isnan, nan

import numpy as np
import pytest

from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.slo import Slo, good_share, goodput_targets_ms, of_requests_s, percentile, values_s
from llmsim.trace import Trace


@pytest.mark.parametrize(
    ("text", "metric", "statistic", "limit_s"),
    [
        ("ttft_p99=500ms", "ttft", "p99", 0.5),
        ("tpot_p99.9 = 0.05s", "tpot", "p99.9", 0.05),
        ("E2E_mean=2s", "e2el", "mean", 2.0),
        ("itl_median=800us", "itl", "p50", 800e-6),
    ],
)
def test_what_may_be_written(text: str, metric: str, statistic: str, limit_s: float) -> None:
    slo = Slo.parse(text)
    assert (slo.metric, slo.statistic) == (metric, statistic)
    assert slo.limit_s == pytest.approx(limit_s, rel=1e-12)
    assert Slo.parse(str(slo)) == slo


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttft_p99=500", "needs a unit"),
        ("ttft_p99=500min", "needs a unit"),
        ("ttft=500ms", "write METRIC_STATISTIC=LIMIT"),
        ("speed_p99=5s", "'speed' is not one of ttft, tpot, itl, e2el"),
        ("ttft_p100=5s", "'p100' is not mean, median or p1"),
        ("ttft_best=5s", "'best' is not mean, median or p1"),
        ("ttft_p99=0s", "give more than 0"),
        ("ttft_p99=1e-e3s", "'1e-e3' is not a number"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Slo.parse(text)


def test_percentiles_are_numpys_where_all_are_answered() -> None:
    values = np.sort(np.random.default_rng(0).exponential(1.0, 501))
    for percent in (1.0, 50.0, 90.0, 99.0, 99.9):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-12)


def test_a_rejected_request_is_infinitely_late() -> None:
    """Of 100 requests two were rejected: the 97th is answered, the 98th percentile lies beside one that never was."""
    arrival_s = np.arange(100.0)
    finish_s = arrival_s + 1.0
    finish_s[[3, 7]] = nan
    requests = {
        "arrival_s": arrival_s, "first_token_s": np.where(np.isnan(finish_s), nan, arrival_s + 0.5),
        "finish_s": finish_s, "output_tokens": np.full(100, 2),
    }  # fmt: skip
    slos = [Slo("ttft", "p97", 1.0), Slo("ttft", "p98", 1.0), Slo("e2el", "mean", 9.0), Slo("tpot", "p50", 1.0)]
    assert of_requests_s(requests, slos) == (0.5, inf, inf, 0.5)
    assert not slos[1].met(inf) and slos[1].met(nan)


def test_values_are_those_of_the_summary() -> None:
    rng = np.random.default_rng(1)
    arrival_s = np.cumsum(rng.exponential(0.05, 400))
    trace = Trace("made", arrival_s - arrival_s[0], rng.integers(1, 900, 400), rng.integers(1, 60, 400))
    result = simulate(trace, Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="constant:0.01"))
    slos = [Slo(metric, word, 1.0) for metric in ("ttft", "tpot", "itl", "e2el") for word in ("mean", "p50", "p99")]
    summary = result.summary()
    for slo, value_s in zip(slos, values_s(result, slos), strict=True):
        word = "median" if slo.statistic == "p50" else slo.statistic
        assert 1e3 * value_s == pytest.approx(summary[f"{word}_{slo.metric}_ms"], rel=1e-9)


def test_requests_of_one_token_have_no_tpot() -> None:
    trace = Trace("made", np.arange(5.0), np.full(5, 10), np.ones(5, dtype=np.int64))
    result = simulate(trace, Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="constant:0.01"))
    tpot, itl = values_s(result, [Slo("tpot", "p99", 1.0), Slo("itl", "p99", 1.0)])
    assert isnan(tpot) and isnan(itl)


def test_goodput_takes_the_tightest_limit_of_each_latency() -> None:
    slos = [Slo("ttft", "p99", 0.5), Slo("ttft", "p50", 0.1), Slo("tpot", "mean", 0.05), Slo("itl", "p99", 0.2)]
    assert goodput_targets_ms(slos) == {"ttft": 100.0, "tpot": 50.0}


# ---- shares of good requests ----------------------------------------------------------------------------------------

GOOD = "goodput_p99=ttft:500ms,tpot:50ms"


@pytest.mark.parametrize("text", [GOOD, "goodput_p99=ttft:500,tpot:50", "Goodput_p99 = ttft:0.5s tpot:50000us"])
def test_goodput_in_the_words_of_goodput(text: str) -> None:
    slo = Slo.parse(text)
    assert str(slo) == GOOD and Slo.parse(str(slo)) == slo
    assert slo.words == "99 % of requests with TTFT <= 500 ms and TPOT <= 50 ms"
    assert goodput_targets_ms([Slo("ttft", "p50", 0.1), slo]) == {"ttft": 500.0, "tpot": 50.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("goodput_p99=", "'' is no limit"),
        ("goodput_p99=ttft", "'ttft' is no limit"),
        ("goodput_p99=ttft:5min", "'ttft:5min' is no limit"),
        ("goodput_p99=itl:5", "'itl' is not one of ttft, tpot, e2el"),
        ("goodput_p99=ttft:5,ttft:6", "'ttft' is not one of"),
        ("goodput_p99=ttft:0", "give more than 0"),
        ("goodput_mean=ttft:5", "say of how many requests"),
        ("goodput=0.99", "is no limit: write goodput_pN="),
    ],
)
def test_what_is_wrong_with_goodput_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Slo.parse(text)


def of_ten() -> dict[str, np.ndarray]:
    """Ten requests: the first token of request i comes after i + 1 s, the second 1 s later; the last was rejected."""
    arrival_s = np.arange(10.0)
    finish_s = arrival_s + np.arange(10.0) + 2.0
    finish_s[9] = nan
    first_token_s = np.where(np.isnan(finish_s), nan, finish_s - 1.0)
    return {
        "arrival_s": arrival_s, "first_token_s": first_token_s, "finish_s": finish_s,
        "output_tokens": np.full(10, 2),
    }  # fmt: skip


def test_a_promise_about_goodput_is_kept_just_where_the_share_is() -> None:
    """TTFT within 6 s: six of ten are good, whatever the TPOT of 1 s allows; the tenth never is."""
    slos = [Slo.parse(f"goodput_p{percent}=ttft:6s,tpot:1s") for percent in (50, 60, 61, 70, 90, 91)]
    values = of_requests_s(of_ten(), slos)
    assert values == pytest.approx([1.0, 1.0, 7 / 6, 7 / 6, 9 / 6, inf])
    assert [slo.met(value) for slo, value in zip(slos, values, strict=True)] == [True, True, False, False, False, False]
    assert good_share(of_ten(), slos[0]) == pytest.approx(0.6)
    assert good_share(of_ten(), Slo.parse("goodput_p50=tpot:900ms")) == 0.0
    assert good_share(of_ten(), Slo("ttft", "p50", 6.0)) is None


def test_a_request_of_one_token_meets_any_tpot() -> None:
    requests = of_ten() | {"output_tokens": np.ones(10)}
    assert good_share(requests, Slo.parse("goodput_p50=tpot:1us")) == pytest.approx(0.9)


def test_goodput_is_the_summarys_attainment() -> None:
    rng = np.random.default_rng(2)
    arrival_s = np.cumsum(rng.exponential(0.05, 400))
    trace = Trace("made", arrival_s - arrival_s[0], rng.integers(1, 900, 400), rng.integers(1, 60, 400))
    result = simulate(trace, Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="constant:0.02", max_num_seqs=8))
    for limit in (300, 2000, 5000):
        attained = result.summary({"ttft": limit, "e2el": 2 * limit})["slo_attainment"]
        slos = [Slo.parse(f"goodput_p{percent}=ttft:{limit},e2el:{2 * limit}") for percent in range(1, 100)]
        assert good_share(result.requests, slos[0]) == attained
        kept = [slo.met(value) for slo, value in zip(slos, values_s(result, slos), strict=True)]
        assert kept == [round(attained * 400) >= round(4 * percent) for percent in range(1, 100)]
