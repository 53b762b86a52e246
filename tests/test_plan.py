"""Planning: against queueing theory and plain searches, the same to the byte, and repeatable by its own commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from math import exp, inf, log
from pathlib import Path

import numpy as np
import pytest
from needs import require

from llmsim import cli
from llmsim.plan import Slo, capacity, curve, curve_rows, plan
from llmsim.plan_bench import busiest_window
from llmsim.plan_reach import Reach
from llmsim.plan_report import report
from llmsim.plan_search import fewest, highest_rate, rounded
from llmsim.plan_types import Plan
from llmsim.scenario import Scenario
from llmsim.trace import Trace

STEP_S, TOKENS = 0.01, 4
SERVICE_S = STEP_S * TOKENS
ONE_AT_A_TIME = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{STEP_S}", max_num_seqs=1)


def poisson(count: int, seed: int = 1, tokens: int = TOKENS) -> Trace:
    arrival_s = np.cumsum(np.random.default_rng(seed).exponential(1.0, count))
    return Trace("poisson", arrival_s - arrival_s[0], np.full(count, 100), np.full(count, tokens))


def evenly(count: int, tokens: int) -> Trace:
    return Trace("even", np.arange(float(count)), np.full(count, 100), np.full(count, tokens))


def sojourns_s(trace: Trace, rate: float, replicas: int = 1) -> np.ndarray:
    """Lindley's recursion: of servers that take every `replicas`-th request, one at a time, each SERVICE_S long."""
    arrival_s = trace.arrival_s * ((len(trace) - 1) / trace.arrival_s[-1] / rate)
    out = np.empty(len(trace))
    for server in range(replicas):
        free_s = 0.0
        for i in range(server, len(trace), replicas):
            free_s = max(free_s, arrival_s[i]) + SERVICE_S
            out[i] = free_s - arrival_s[i]
    return out


# ---- the searches ---------------------------------------------------------------------------------------------------


def driven(search, answer: Callable) -> tuple:
    asked = []
    try:
        value = next(search)
        while True:
            asked.append(value)
            value = search.send(answer(value))
    except StopIteration as end:
        return end.value, asked


@pytest.mark.parametrize("turn", [0.003, 1.0, 17.3, 4321.0])
@pytest.mark.parametrize("slope", [0.3, 2.0, 30.0])
@pytest.mark.parametrize("wall", [1.02, inf], ids=["runs away", "smooth"])
def test_the_highest_rate_is_bracketed(turn: float, slope: float, wall: float) -> None:
    """From any guess, also where latency jumps to infinity just beyond the limit; in few steps from a good one."""

    def excess(rate: float) -> float:
        return inf if rate > turn * wall else slope * log(rate / turn)

    for guess in (turn / 300, turn / 1.3, turn, turn * 50):
        (held, broken), asked = driven(highest_rate(guess, tolerance=0.01, least=turn / 1e4, most=turn * 1e4), excess)
        assert held <= turn * (1 + 1e-9) < broken and broken <= held * 1.0101
        assert len(asked) <= 20 and len(set(asked)) == len(asked)
        assert all(rate == rounded(rate) for rate in asked)


def test_a_rate_that_nothing_limits_and_one_that_nothing_holds() -> None:
    assert driven(highest_rate(1.0, tolerance=0.01, least=0.1, most=50.0), lambda _: -1.0)[0] == (50.0, None)
    assert driven(highest_rate(1.0, tolerance=0.01, least=0.1, most=50.0), lambda _: inf)[0] == (None, 0.1)
    odd = {"tolerance": 0.01, "least": 0.123417, "most": 56.78912}  # neither end has four digits
    assert driven(highest_rate(1.0, **odd), lambda _: -1.0)[0] == (56.79, None)
    assert driven(highest_rate(1.0, **odd), lambda _: 0.5)[0] == (None, 0.1234)


@pytest.mark.parametrize("guess", [1e-300, 3.21, 1e9])
def test_a_search_ends_whatever_it_is_sent(guess: float) -> None:
    """Held, broken, nan or noise: from any guess in a range of 40 decades, with a tolerance finer than the digits, a
    bounded number of rates, no one twice while it looks around."""
    rng = np.random.default_rng(7)
    for answer in (lambda _: -1e-12, lambda _: 1e-12, lambda _: inf, lambda _: -inf, lambda _: float("nan"),
                   lambda _: rng.choice([-inf, -1e-9, -2.0, 1e-9, 3.0, inf, float("nan")])):  # fmt: skip
        for tolerance in (1e-9, 0.01, 0.5):
            _, asked = driven(highest_rate(guess, tolerance=tolerance, least=1.23456e-20, most=9.87654e20), answer)
            assert len(asked) <= 100


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 40, 100])
@pytest.mark.parametrize("guess", [1, 6, 50, 100])
def test_the_fewest_that_hold(needed: int, guess: int) -> None:
    (held, broken), asked = driven(fewest(guess, most=100), lambda count: count >= needed)
    assert (held, broken) == (needed, needed - 1)
    assert len(set(asked)) == len(asked) <= 14


def test_no_number_holds() -> None:
    assert driven(fewest(3, most=100), lambda _: False)[0] == (None, 100)


# ---- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seqs", "replicas"), [(1, 1), (4, 1), (4, 3)])
def test_capacity_in_closed_form(seqs: int, replicas: int) -> None:
    """Evenly spaced requests of `tokens` iterations in a batch of `seqs`: a replica serves seqs / (tokens * step) of
    them a second, and up to there none waits longer than an iteration or two."""
    tokens = 20
    scenario = replace(ONE_AT_A_TIME, max_num_seqs=seqs, async_scheduling=False)  # a slot is free at once
    found = capacity(evenly(1200, tokens), scenario, ["e2el_p99=250ms"], replicas=replicas)
    expected = replicas * seqs / (tokens * STEP_S)
    assert found.rate is not None and found.broken_rate is not None
    assert found.rate <= found.broken_rate <= found.rate * 1.0101
    assert found.rate == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("slo", ["e2el_p99=250ms", "e2el_mean=80ms", "ttft_p90=120ms"])
def test_capacity_equals_lindleys(slo: str, replicas: int) -> None:
    """A plain queue on a grid of rates of 0.2 % finds the same crossing, within the tolerance asked for."""
    trace, promise = poisson(1500), Slo.parse(slo)

    def kept(rate: float) -> bool:
        waits_s = sojourns_s(trace, rate, replicas) - (SERVICE_S - STEP_S if promise.metric == "ttft" else 0.0)
        value_s = waits_s.mean() if promise.percent is None else np.percentile(waits_s, promise.percent)
        return bool(value_s <= promise.limit_s)

    found = capacity(trace, ONE_AT_A_TIME, [promise], replicas=replicas)
    assert found.rate is not None and found.broken_rate is not None
    assert kept(found.rate) and not kept(found.broken_rate)
    grid = found.rate * 1.002 ** np.arange(-15, 16)
    assert [kept(rate) for rate in grid] == sorted((kept(rate) for rate in grid), reverse=True), "one crossing"
    assert max(rate for rate in grid if kept(rate)) <= found.rate * 1.011


def test_capacity_under_a_share_of_good_requests_is_lindleys() -> None:
    """19 of 20 requests have their first token within 90 ms and their answer within 110 ms: by the plain queue the
    former is the harder, and the rate found is the last at which so many do."""
    trace, promise = poisson(1500), "goodput_p95=ttft:90ms,e2el:110ms"
    found = capacity(trace, ONE_AT_A_TIME, [promise])
    assert found.rate is not None and found.broken_rate is not None and found.held is not None

    def good(rate: float) -> float:
        e2el_s = sojourns_s(trace, rate)
        return float(np.mean((e2el_s - (SERVICE_S - STEP_S) <= 0.09) & (e2el_s <= 0.11)))

    assert good(found.broken_rate) < 0.95 <= good(found.rate)
    (measured,) = found.held.measured
    assert measured.share == pytest.approx(good(found.rate)) == found.held.values["slo_attainment"]
    assert str(measured) == f"{100 * good(found.rate):.4g} % of requests good"
    assert found.broken is not None and found.broken.why_not.endswith("% of requests good, 95 % promised")


def test_capacity_of_m_d_1() -> None:
    """Pollaczek and Khinchine: mean sojourn d (1 + r / (2 (1 - r))) = 2 d at r = 2/3. 12,000 requests of a Poisson
    process know that rate to about 3 % (their mean wait, to 6 %; it grows by 3 % per per cent of rate)."""
    found = capacity(poisson(8_000, seed=5), ONE_AT_A_TIME, [Slo("e2el", "mean", 2 * SERVICE_S)])
    assert found.rate == pytest.approx(2 / 3 / SERVICE_S, rel=0.05)


def test_a_queue_that_keeps_growing_holds_nothing() -> None:
    """Twice what it can serve, with a limit beyond the trace's length: met, and no rate that is held."""
    found = capacity(evenly(1200, TOKENS), ONE_AT_A_TIME, ["ttft_p99=1000s"])
    assert found.rate is not None and 1 / SERVICE_S <= found.rate <= 1.06 / SERVICE_S, "seen from 1 / sqrt(n) on"
    assert found.broken is not None and found.broken.breaks == () and "unstable" in found.broken.why_not


def test_more_replicas_hold_more() -> None:
    rates = [capacity(poisson(1500), ONE_AT_A_TIME, ["e2el_p99=250ms"], replicas=n).rate or 0.0 for n in (1, 2, 4)]
    assert rates[1] > 2 * rates[0] and rates[2] > 2 * rates[1], "dealt in turn, each also gets a smoother share"


def test_a_promise_no_rate_keeps() -> None:
    found = capacity(poisson(100), ONE_AT_A_TIME, ["e2el_mean=39ms"])
    assert found.rate is None and found.broken is not None
    assert found.broken.breaks[0].value_s == pytest.approx(SERVICE_S, rel=0.02)


def test_what_nothing_breaks_has_no_capacity() -> None:
    """50 requests, one at a time: even all at once the last waits for 2 s. Below that limit there is a rate."""
    trace = evenly(50, TOKENS)
    found = capacity(trace, ONE_AT_A_TIME, ["e2el_p99=3s"])
    assert found.rate is None and found.broken_rate is None and found.held is None
    assert "not even all 50 requests within 1 ms" in found.untold
    told = capacity(trace, ONE_AT_A_TIME, ["e2el_p99=1s"])
    assert told.rate is not None and told.untold == ""
    for wanted in ({"replicas": 1}, {"rate": 5.0}):
        open_ended = plan(trace, ONE_AT_A_TIME, ["e2el_p99=3s"], **wanted)  # type: ignore[arg-type]
        option = open_ended.cheapest
        assert option is not None and option.capacity_rate is None and option.row()["capacity_rate"] is None
        assert "too short to tell" in option.row()["capacity_untold"]
        assert (option.rate, option.goodput is None) == ((None, True) if open_ended.fleet else (5.0, False))
        assert "untold" in "\n".join(report(open_ended)) and "e+" not in "\n".join(report(open_ended))


def test_what_refuses_every_request_holds_nothing(tmp_path: Path) -> None:
    """At any rate, also under a promise about gaps, of which there are none."""
    denies = tmp_path / "deny.py"
    denies.write_text("class Deny:\n    def admit(self, request, replica, now_s):\n        return False\n")
    none = replace(ONE_AT_A_TIME, admission=f"{denies}:Deny")
    for slo in ("ttft_p99=1s", "itl_p99=1s"):
        found = capacity(poisson(200), none, [slo])
        assert found.rate is None and found.untold == "" and len(found.points) < 20
        assert found.broken is not None and "never (rejected requests)" in found.broken.why_not


@pytest.mark.parametrize("slo", ["tpot_p99=50ms", "itl_mean=1s", "goodput_p99=tpot:50ms"])
def test_a_promise_about_tokens_that_nobody_gets(slo: str) -> None:
    with pytest.raises(ValueError, match="no request of poisson has a second token, so nothing could break this"):
        capacity(poisson(200, tokens=1), ONE_AT_A_TIME, ["ttft_p99=1s", slo])


def test_the_knee_rises_and_says_where_it_breaks() -> None:
    points = curve_rows(curve(poisson(1200), ONE_AT_A_TIME, ["e2el_p99=250ms"], [5.0, 15.0, 24.0, 35.0]))
    assert [row["rate"] for row in points] == [5.0, 15.0, 24.0, 35.0]
    p99_s = [row["e2el_p99_s"] for row in points]
    assert p99_s == sorted(p99_s)
    assert [row["holds"] for row in points] == [row["e2el_p99_s"] <= 0.25 and row["stable"] for row in points]
    assert points[0]["holds"] and not points[-1]["stable"]


# ---- plans ----------------------------------------------------------------------------------------------------------

PROMISES = ("e2el_p99=250ms",)


def planned(trace: Trace, **wanted: object) -> Plan:
    return plan(trace, ONE_AT_A_TIME, PROMISES, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [10.0, 60.0])
def test_the_fewest_replicas_are_lindleys(rate: float) -> None:
    trace = poisson(3000)
    needed = next(n for n in range(1, 99) if np.percentile(sojourns_s(trace, rate, n), 99) <= 0.25)
    found = planned(trace, rate=rate)
    assert found.fewest is not None and found.fewest.replicas == needed
    assert found.fewest is found.cheapest is found.fastest
    assert found.fewest.verified and found.fewest.capacity_rate >= rate
    if needed > 1:
        assert found.fewest.broken is not None and found.fewest.broken.scenario.replicas == needed - 1
        assert not found.fewest.broken.holds


def test_the_same_to_the_byte_in_any_number_of_processes() -> None:
    wanted = {"rate": 33.0, "gpus": ["h100-sxm", "a100-80gb-sxm"]}
    first, parallel = (planned(poisson(4000), **wanted, jobs=jobs).to_dict() for jobs in (1, 2))
    assert json.dumps(first) == json.dumps(parallel)
    assert len({json.dumps([run[name] for name in ("gpu", "engine", "replicas", "rate", "window")])
                for run in first["runs"]}) == len(first["runs"]), "none is simulated twice"  # fmt: skip


def test_what_is_dropped_could_not_have_won() -> None:
    """Roofline fleets of three GPUs: the answers are those of a plan that looks at every option on the whole trace."""
    rng = np.random.default_rng(3)
    arrival_s = np.cumsum(rng.gamma(0.5, 2.0, 4050))
    trace = Trace("bursty", arrival_s - arrival_s[0], rng.integers(50, 1500, 4050), rng.integers(2, 40, 4050))
    base = Scenario(model="qwen3-8b", gpu="h100-sxm", cost="roofline")
    wanted = {"rate": 30.0, "gpus": ["h100-sxm", "l40s", "rtx-pro-6000"], "tensor_parallels": [1, 2]}
    slos = ["ttft_p99=900ms", "tpot_p95=60ms"]
    quick = plan(trace, base, slos, **wanted, jobs=2)  # type: ignore[arg-type]
    every = plan(trace, base, slos, **wanted, jobs=2, windows=False)  # type: ignore[arg-type]
    dropped = [option for option in quick.options if option.status == "dropped"]
    assert dropped and all(option.verified for option in every.options if option.run)
    for name, option in every.answers.items():
        mine = quick.answers[name]
        assert option is not None and mine is not None
        assert (mine.name, mine.usd_per_h) == (option.name, option.usd_per_h), name


def test_what_cannot_start_is_listed_with_its_reason() -> None:
    found = plan(
        poisson(300), Scenario(model="llama-3.1-70b", gpu="h100-sxm", cost="constant:0.01"), ["ttft_p99=1s"],
        gpus=["h100-sxm", "rtx-4090"], tensor_parallels=[1, 3, 4], rate=5.0,
    )  # fmt: skip
    reasons = {(option.gpu, option.tensor_parallel): option for option in found.options}
    assert len(reasons) == 6
    assert "does not fit" in reasons["h100-sxm", 1].reason
    assert "tensor_parallel=3 does not divide" in reasons["rtx-4090", 3].reason
    assert reasons["h100-sxm", 4].holds and found.cheapest is reasons["h100-sxm", 4]
    assert {option.status for option in found.options if not option.run} == {"cannot start"}


def test_a_budget_excludes_and_says_so() -> None:
    usd = planned(poisson(1500), rate=60.0).cheapest
    assert usd is not None and usd.replicas > 1
    enough = planned(poisson(1500), rate=60.0, budget_usd_per_h=usd.usd_per_h)
    assert enough.cheapest is not None and enough.cheapest.name == usd.name
    short = planned(poisson(1500), rate=60.0, budget_usd_per_h=usd.usd_per_h - 0.01)
    assert not short.holds and short.options[0].status == "breaks"
    assert f"even with {usd.replicas - 1} replica" in short.options[0].reason
    none = planned(poisson(1500), rate=60.0, budget_usd_per_h=1.0)
    assert none.options[0].status == "over budget" and "the budget is $1.00" in none.options[0].reason
    assert not none.runs


def test_options_are_listed_by_price_whatever_they_win() -> None:
    """Winners stand among the others; of given fleets the order is that of dollars for the rate held."""
    machine = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="roofline")
    kinds = {"gpus": ["h200-sxm", "h100-sxm"], "tensor_parallels": [4, 1], "windows": False}
    trace = poisson(100, tokens=20)
    found = plan(trace, machine, ["e2el_p99=2s"], rate=4.0, **kinds)  # type: ignore[arg-type]
    prices = [option.usd_per_h for option in found.options]
    assert all(option.holds for option in found.options) and prices == sorted(prices) and len(set(prices)) == 4
    assert found.cheapest is found.options[0] and found.fastest is found.options[2], "as dear ones hold it too"
    found = plan(trace, machine, ["e2el_p99=2s"], replicas=1, **kinds)  # type: ignore[arg-type]
    each = [option.usd_per_h / option.rate for option in found.options if option.rate]
    assert each == sorted(each) and len(each) == 4 and found.cheapest is found.options[0]


def test_a_given_fleet_and_a_rate_is_one_question() -> None:
    trace = poisson(1500)
    held = capacity(trace, ONE_AT_A_TIME, PROMISES, replicas=2).rate
    assert held is not None
    assert planned(trace, replicas=2, rate=0.9 * held).holds
    assert not planned(trace, replicas=2, rate=1.1 * held).holds
    found = planned(trace, replicas=2)
    assert found.fleet and found.cheapest is not None and found.cheapest.replicas == 2
    assert found.cheapest.capacity_rate == pytest.approx(held, rel=0.011)


def test_goodput_per_gpu_and_dollar() -> None:
    """Of 3 replicas all but the late ones, by hand."""
    trace = poisson(1500)
    found = planned(trace, rate=60.0)
    best = found.cheapest
    assert best is not None and best.run is not None
    late = float((sojourns_s(trace, 60.0, best.replicas) > 0.25).sum())
    per_s = (1500 - late) / best.run.values["duration"]
    assert best.goodput_per_gpu == pytest.approx(per_s / best.replicas, rel=1e-9)
    assert best.goodput_per_usd == pytest.approx(3600 * per_s / best.usd_per_h, rel=1e-9)
    tokens_per_h = 3600 * 1500 * TOKENS / best.run.values["duration"]
    assert best.usd_per_million_output_tokens == pytest.approx(1e6 * best.usd_per_h / tokens_per_h, rel=1e-9)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"rate": True}, "rate=True is not a number"),
        ({"rate": "5"}, "rate='5' is not a number"),
        ({"rate": 1e-12}, "rate=1e-12: poisson would last for centuries: give"),
        ({"rate": 5e-324}, "poisson would last for centuries"),
        ({"rate": 1e308}, "rate=1e+308: all 200 requests of poisson would come within 1 ms"),
        ({"max_gpus": 1.5}, "max_gpus=1.5 is not a whole number: give 1 or more GPUs"),
        ({"replicas": True}, "replicas=True is not a whole number"),
        ({"jobs": "2"}, "jobs='2' is not a whole number: give 1 or more processes"),
        ({"gpus": []}, "gpus=[] is empty"),
        ({"gpus": [5]}, "gpus: 5 is not a name"),
        ({"tensor_parallels": [True]}, "tensor_parallels: True is not a number of GPUs"),
        ({"tensor_parallels": "1"}, "tensor_parallels: '1' is not a number of GPUs"),
        ({"engines": "vlm"}, "vlm"),
        ({"prices": {"h100-sxm": 2.0}}, "prices={'h100-sxm': 2.0}: give the path"),
        ({"confidence": 0.9999}, "takes 10,000 simulations of each fleet looked at, 1,000 are the most: give 0.999 or"),
        ({"confidence": "0.9"}, "confidence='0.9' is not a number"),
        ({"rate": -1.0}, "rate=-1: give requests/s above 0"),
        ({"replicas": 0}, "replicas=0 is too small"),
        ({"budget_usd_per_h": 0.0}, "budget_usd_per_h=0"),
        ({"max_gpus": 0}, "max_gpus=0"),
        ({"tolerance": 1.0}, "tolerance=1"),
        ({"jobs": 0}, "jobs=0"),
        ({"gpus": ["h1000"]}, "unknown GPU"),
    ],
)
def test_a_question_without_meaning_is_refused(wanted: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        planned(poisson(200), **wanted)


def test_one_alone_is_one() -> None:
    trace = poisson(200)
    many = plan(
        trace, ONE_AT_A_TIME, ["e2el_p99=9s"], rate=5.0, gpus=["h100-sxm"], tensor_parallels=[1], engines=["vllm"]
    )
    one = plan(trace, ONE_AT_A_TIME, "e2el_p99=9s", rate=5.0, gpus="h100-sxm", tensor_parallels=1, engines="vllm")
    assert one.to_dict() == many.to_dict()


def test_what_is_over_the_limits_is_not_built() -> None:
    found = planned(poisson(200), replicas=10**9)
    assert found.options[0].reason == "1000000000 GPUs, 256 are allowed" and not found.runs


def test_only_the_queue_breaks_it() -> None:
    """Twice what one serves, for a minute: the promise is kept of this trace, and that is said with its value."""
    found = plan(evenly(1200, TOKENS), ONE_AT_A_TIME, ["e2el_p99=1000s"], rate=50.0, max_gpus=1)
    assert not found.holds
    assert re.match(
        r"with 1 replica: E2EL p99 [\d.]+ s kept, but the load is unstable: the queue grew", found.options[0].reason
    )
    assert "Nothing holds this load: 1 x h100-sxm TP1 vllm keeps every SLO of this trace, but falls behind" in str(
        found
    )


def test_what_limits_a_fleet_above_the_demand_is_named() -> None:
    option = planned(poisson(1500), rate=20.0).cheapest
    assert option is not None and option.capacity_rate is not None and option.capacity_broken is not None
    row = option.row()
    assert option.capacity_rate < row["capacity_breaks_at"] <= 1.0201 * option.capacity_rate
    assert row["capacity_breaks"].startswith("E2EL p99 2") and row["capacity_breaks"] in str(
        planned(poisson(1500), rate=20.0)
    ).replace("\n  ", " ")


def test_what_draws_support() -> None:
    """Of 20 of 20, 0.05^(1/20); of k of n, where the binomial tail is 0.05."""
    from llmsim.plan_sure import lower_bound

    assert lower_bound(20, 20) == pytest.approx(0.05 ** (1 / 20), rel=1e-9)
    assert lower_bound(0, 20) == 0.0 and lower_bound(1000, 1000) == pytest.approx(0.05 ** (1 / 1000), rel=1e-9)
    p = lower_bound(18, 20)
    assert p**20 + 20 * p**19 * (1 - p) + 190 * p**18 * (1 - p) ** 2 == pytest.approx(0.05, rel=1e-6)


def test_promises_and_traces_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="no slo"):
        plan(poisson(200), ONE_AT_A_TIME, [])
    with pytest.raises(ValueError, match="ttft_p99 is given twice"):
        plan(poisson(200), ONE_AT_A_TIME, ["ttft_p99=1s", "ttft_p99.0=2s"])
    with pytest.raises(ValueError, match="slo 5 is no promise: write METRIC"):
        plan(poisson(200), ONE_AT_A_TIME, [5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one request or session has no rate"):
        plan(poisson(1), ONE_AT_A_TIME, PROMISES, rate=5.0)
    with pytest.raises(ValueError, match="concurrency=3: a closed loop has no rate"):
        plan(poisson(200), replace(ONE_AT_A_TIME, concurrency=3), PROMISES)
    with pytest.raises(ValueError, match="all 200 requests arrive at once"):
        plan(replace(poisson(200), arrival_s=np.zeros(200)), ONE_AT_A_TIME, PROMISES)


def test_the_window_is_the_busiest() -> None:
    arrival_s = np.concatenate([np.arange(100.0), 100 + 0.1 * np.arange(100), 110 + np.arange(100.0)])
    trace = Trace("made", arrival_s, np.full(300, 10), np.full(300, 10))
    window = busiest_window(trace, 50)
    assert window is not None and 100.0 <= window.start_s <= 105.0 and window.requests == 50
    assert busiest_window(trace, 151) is None
    heavy = replace(trace, output_tokens=np.where(np.arange(300) < 20, 5000, 1))
    window = busiest_window(heavy, 20)
    assert window is not None and window.start_s == 0.0, "20 times 16 of work in 19 s, against 20 times 1 in 1.9 s"


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    trace, path = poisson(4200), tmp_path / "poisson.csv"
    rows = [f"{at:.6f},100,{TOKENS}" for at in trace.arrival_s]
    path.write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


SETTING = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", f"constant:{STEP_S}", "--max-num-seqs", "1"]


def test_every_simulation_is_repeated_by_its_command(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("pandas")
    import pandas as pd

    out = tmp_path / "found"
    options = ["--rate", "30", "--slo", "e2el_p99=250ms", "--jobs", "1", "--out", str(out), "--json"]
    assert cli.main(["plan", str(trace_file), *SETTING, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"]["cheapest"].endswith("x h100-sxm TP1 vllm")
    assert {run["window"] is None for run in found["runs"]} == {True, False}
    for run in [found["runs"][0], found["runs"][-1]]:
        words = shlex.split(run["command"])
        assert words[:2] == ["llmsim", "replay"]
        assert cli.main([*words[1:], "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        for name in ("p99_e2el_ms", "mean_ttft_ms", "output_throughput", "slo_attainment", "stable"):
            assert summary[name] == run["values"][name]
    assert len(pd.read_parquet(out / "runs.parquet")) == len(found["runs"])
    assert list(pd.read_parquet(out / "options.parquet")["status"]) == ["holds"]
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == {
        "options.parquet", "runs.parquet", "plan.json",
    }  # fmt: skip


def test_exit_status_3_when_nothing_holds(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--slo", "e2el_mean=39ms", "--max-gpus", "4", "--rate", "60", "--jobs", "1"]
    assert cli.main(["plan", str(trace_file), *SETTING, *options]) == 3
    printed = capsys.readouterr().out
    assert "Nothing meets the SLOs" in printed and "E2EL mean 4" in printed


def test_the_table_names_fleets_margins_and_what_breaks(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--slo", "e2el_p99=250ms", "--rate", "60", "--jobs", "1", "--curve", "--runs", "--limit", "1500"]
    assert cli.main(["plan", str(trace_file), *SETTING, *options]) == 0
    printed = capsys.readouterr().out
    assert "Promised: E2EL p99 <= 250 ms" in printed
    assert re.search(
        r"fewest GPUs, cheapest, fastest +3 x h100-sxm TP1 vllm +3 +11\.97 +[\d.]+ ms \(\+\d+ %\)", printed
    )
    assert "3 x h100-sxm TP1 vllm: breaks with 2 replicas: E2EL p99" in printed
    assert "as the rate rises:" in printed and "Price: $3.99 per h100-sxm" in printed
    assert len(re.findall(r"^(holds|breaks) +llmsim replay ", printed, flags=re.MULTILINE)) > 4


def test_a_folder_that_cannot_be_written_is_said_at_once(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "plan",
        str(trace_file),
        *SETTING,
        "--slo",
        "e2el_p99=9s",
        "--rate",
        "5",
        "--limit",
        "200",
        "--jobs",
        "1",
    ]
    assert cli.main([*options, "--out", str(trace_file / "below")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"--out {trace_file}/below" in said.err and "a folder that can be written" in said.err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmsim.plan_report.write", full)
    assert cli.main([*options, "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr()
    assert "fewest GPUs" in said.out and "No space left on device: the plan is not written" in said.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slo", "ttft_p99=500"], "needs a unit"),
        (["--slo", "ttft_p99.999=1s"], "'p99.999' is not mean, median or p1 to p99.99"),
        (["--slo", "ttft_p1e1=1s"], "'p1e1' is not mean"),
        (["--slo", "ttft_p099=1s"], "'p099' is not mean"),
        (["--slo", "ttft_p99=1e400s"], "limit of inf s: give more than 0, and a finite time"),
        (["--slo", "ttft_p99=1s", "--tp", "1,x"], "'x' is not a number of GPUs"),
        (["--slo", "ttft_p99=1s", "--gpu", "h100-sxm,,"], "a name is empty"),
        (["--slo", "ttft_p99=1s", "--prices", "nowhere.toml"], "no such file"),
        (["--slo", "ttft_p99=1s", "--engine", "vlm"], "vlm"),
    ],
)
def test_wrong_input_is_one_line(
    trace_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert cli.main(["plan", str(trace_file), *SETTING, *options]) == 2
    assert said in capsys.readouterr().err


# ---- confidence -----------------------------------------------------------------------------------------------------


def test_a_confident_plan_pays_for_doubt() -> None:
    """A limit just above what the calibrated fleet does: about every other machine is slower, so it takes more, or a
    lower rate. The probabilities are those of `predict`; what is sure already is left as it is."""
    from llmsim.trace import at_rate
    from llmsim.uncertainty import predict

    trace = replace(poisson(400), prompt_tokens=np.full(400, 600), output_tokens=np.full(400, 12))
    base = Scenario(model="llama-3.1-8b", gpu="h100-sxm")
    value_s = curve(trace, base, ["ttft_mean=10s"], [20.0])[0].measured[0].value_s
    slo = Slo("ttft", "mean", 1.001 * value_s)
    bare = plan(trace, base, [slo], rate=20.0).cheapest
    assert bare is not None and bare.replicas == 1 and bare.probability is None
    found = plan(trace, base, [slo], rate=20.0, confidence=0.9)
    sure = found.cheapest
    assert sure is not None and sure.replicas > 1
    assert f"{sure.replicas - 1} hold" in sure.doubts and "with a probability below 0.9: " in sure.doubts
    failed, drawn = (int(word) for word in re.findall(r"(\d+) of (\d+) draws failed", sure.doubts)[0])
    assert 2 < failed <= drawn <= 20
    words = " ".join(str(found).split())
    assert f"{round(sure.probability * 20)} of 20 draws hold, which supports a probability of 0." in words  # type: ignore[operator]
    assert {run.draw for run in found.runs} == {None, *range(20)}
    assert {run.draws for run in found.runs} == {None, 20}
    for replicas, enough in ((sure.replicas, True), (sure.replicas - 1, False)):
        told = predict(at_rate(trace, 20.0), replace(base, replicas=replicas), draws=20, slos=[slo]).probability().all
        assert (told >= 0.9) is enough
        assert not enough or told == sure.probability
    easy = plan(trace, base, ["ttft_mean=10s"], rate=20.0, confidence=0.9).cheapest
    assert easy is not None and (easy.replicas, easy.probability) == (1, 1.0)
    with pytest.raises(ValueError, match="confidence=1: give a probability"):
        plan(trace, base, [slo], rate=20.0, confidence=1.0)


def test_a_given_fleet_holds_less_for_sure() -> None:
    trace = replace(poisson(150), prompt_tokens=np.full(150, 600), output_tokens=np.full(150, 12))
    base = Scenario(model="llama-3.1-8b", gpu="h100-sxm")
    bare, sure = (plan(trace, base, ["ttft_p90=150ms"], replicas=1, confidence=p).cheapest for p in (None, 0.9))
    assert bare is not None and sure is not None and sure.probability is not None
    assert 0.0 < sure.capacity_rate < bare.capacity_rate and sure.probability >= 0.9
    assert f"{bare.capacity_rate:.4g}/s holds with a probability below 0.9" in sure.doubts


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_another_rate_moves_sessions_as_a_whole() -> None:
    """Two sessions of stamped turns at half the time: starts halve, what happens inside stays; turns trade places."""
    from llmsim.trace import at_rate, time_scaled

    trace = Trace(
        "sessions", np.array([0.0, 4.0, 10.0, 12.0]), np.full(4, 10), np.full(4, 10),
        parent=np.array([-1, 0, -1, 0]), ids=["a", "a2", "b", "a3"],
    )  # fmt: skip
    scaled = time_scaled(trace, 0.5)
    assert scaled.ids == ["a", "a2", "b", "a3"] and scaled.arrival_s.tolist() == [0.0, 4.0, 5.0, 12.0]
    faster = time_scaled(trace, 0.1)
    assert faster.ids == ["a", "b", "a2", "a3"] and faster.arrival_s.tolist() == [0.0, 1.0, 4.0, 12.0]
    assert faster.parent is not None and faster.parent.tolist() == [-1, -1, 0, 0]
    named = replace(trace, parent=None, session=["x", "x", "y", "x"])
    assert time_scaled(named, 0.1).arrival_s.tolist() == [0.0, 1.0, 4.0, 12.0]
    plain = replace(trace, parent=None, session=None)
    assert time_scaled(plain, 0.1).arrival_s.tolist() == pytest.approx([0.0, 0.4, 1.0, 1.2])
    assert "the longest lasts 12 s" in at_rate(trace, 1.0).notes[0]


def test_waiting_turns_keep_their_waits_at_any_rate() -> None:
    """A turn 3 s after the answer before it, also when sessions start ten times as often."""
    count = 200
    arrival_s = np.where(np.arange(count) % 2 == 0, np.arange(count) * 5.0, np.nan)
    trace = Trace(
        "waits", arrival_s, np.full(count, 50), np.full(count, 4),
        parent=np.where(np.arange(count) % 2 == 0, -1, np.arange(count) - 1),
        delay_s=np.where(np.arange(count) % 2 == 0, 0.0, 3.0),
    )  # fmt: skip
    points = curve(trace, ONE_AT_A_TIME, ["ttft_p99=1s"], [0.1, 1.0])
    assert [run.requests for run in points] == [count, count]
    assert points[1].values["duration"] == pytest.approx(points[0].values["duration"] / 10, rel=0.05)
    found = plan(trace, ONE_AT_A_TIME, ["ttft_p99=1s"], rate=1.0)
    assert found.trace["unit"] == "sessions/s" and found.holds


def sessions(count: int, delay_s: float) -> Trace:
    """Of two turns each, the second `delay_s` after the first one's answer; a session a second."""
    at = np.arange(2 * count)
    first = at % 2 == 0
    return Trace(
        "pairs", np.where(first, at / 2.0, np.nan), np.full(at.size, 50), np.full(at.size, TOKENS),
        parent=np.where(first, -1, at - 1), delay_s=np.where(first, 0.0, delay_s),
    )  # fmt: skip


def test_a_trace_tells_no_rate_that_its_sessions_do_not_reach() -> None:
    """Sessions of 20 s that start over 49 s: at k times the pace within 49 / k s, of which 18 s would be enough to see
    nine tenths of the sessions that are meant to be under way: 49 / 18 = 2.7 times, less for the answers' 0.08 s."""
    trace = sessions(50, 20.0)
    reach = Reach.of(trace)
    assert reach.rate() == pytest.approx(49.0 / 18.0, rel=1e-6)
    assert reach.rate(0.04) == pytest.approx(49.0 / (0.9 * 20.08), rel=1e-6)
    assert reach.part(10.0) == pytest.approx(4.9 / 20.0) and reach.part(1.0) == 1.0
    found = capacity(trace, ONE_AT_A_TIME, ["e2el_p99=1s"])
    assert found.rate is None and "nothing breaks it up to 2.71/s, and pairs tells no more" in found.untold
    assert sorted(run.rate for run in found.points)[-2] <= 2.73, "beside the flood"
    option = plan(trace, ONE_AT_A_TIME, ["e2el_p99=1s"], rate=2.0).cheapest
    assert option is not None and option.capacity_rate is None and "give more sessions" in option.untold
    beyond = plan(trace, ONE_AT_A_TIME, ["e2el_p99=1s"], rate=10.0)
    assert beyond.cheapest is not None and beyond.cheapest.capacity_rate is None
    assert any("24 % of those that the rate means" in note and "not steady" in note for note in beyond.notes)
    assert beyond.cheapest.row()["offered_rate"] == pytest.approx(99 / (49 / 10 + 20), rel=0.05)
    assert plan(sessions(400, 2.0), ONE_AT_A_TIME, ["e2el_p99=250ms"], replicas=1).cheapest.capacity_rate > 8.0  # type: ignore[union-attr, operator]


def test_stamped_sessions_are_no_rate_of_requests() -> None:
    waits = sessions(50, 20.0)
    stamped = replace(waits, arrival_s=np.sort(np.where(np.isnan(waits.arrival_s), 0.0, waits.arrival_s)))
    named = replace(
        stamped, arrival_s=np.arange(100.0), parent=None, delay_s=None, session=[str(i % 50) for i in range(100)]
    )
    assert Reach.of(named).durations_s.tolist() == [50.0] * 50
    found = plan(named, ONE_AT_A_TIME, ["e2el_p99=1s"], rate=2.0)
    assert found.trace["unit"] == "nominal requests/s" and "sent req/s" in "\n".join(report(found))


def test_a_trace_too_short_for_its_rate_is_said() -> None:
    """5 s of requests that take 0.2 s and more; and sessions that last longer than all of them take to start."""
    found = plan(poisson(500), replace(ONE_AT_A_TIME, max_num_seqs=8), ["e2el_p99=1s"], rate=100.0)
    assert found.holds and not any("the trace lasts" in note for note in found.notes)
    long = replace(poisson(500, tokens=60), tenant=None)
    short = plan(long, replace(ONE_AT_A_TIME, max_num_seqs=256), ["e2el_p99=1s"], rate=100.0)
    (note,) = plan(long, replace(ONE_AT_A_TIME, max_num_seqs=256), ["e2el_p99=1s"], rate=100.0).notes
    assert "lasts 4.99 s" in note and "a longer trace" in note
    assert short.frame().attrs["notes"] == [note] and "queues hardly form" in " ".join(str(short).split())
    stamps = np.sort(np.random.default_rng(0).uniform(0.0, 500.0, 500))
    sessions = replace(poisson(500), arrival_s=stamps - stamps[0], session=[str(i % 50) for i in range(500)])
    notes = plan(sessions, replace(ONE_AT_A_TIME, max_num_seqs=8), ["e2el_p99=1s"], rate=10.0).notes
    assert any("the load is not steady" in note for note in notes)


def test_excess_is_the_log_of_the_worst_ratio() -> None:
    (run,) = curve(poisson(1200), ONE_AT_A_TIME, ["e2el_p99=250ms", "ttft_mean=30ms"], [15.0])
    worst = max(one.value_s / one.slo.limit_s for one in run.measured)
    assert exp(run.excess) == pytest.approx(worst)
