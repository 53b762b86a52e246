"""Prediction intervals: theory that must hold whatever the profiles say."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from math import exp
from statistics import NormalDist

import numpy as np
import pytest

from llmsim.cost.scaled import Factors, Ripple, ScaledCost
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.slo import Slo
from llmsim.trace import Trace
from llmsim.uncertainty import SEED_ALONE, Prediction, Source, Sources, draw_costs, draws_of, interval, predict

STEP_S = 0.01
CONSTANT = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{STEP_S}", async_scheduling=False)
PROFILE = Scenario(model="llama-3.1-8b", gpu="h200-sxm")


def apart(count: int, prompt: int = 64, output: int = 11) -> Trace:
    """Requests far enough apart to be alone."""
    return Trace("apart", 10.0 * np.arange(count), np.full(count, prompt), np.full(count, output))


def busy(count: int = 60, rate: float = 40.0) -> Trace:
    rng = np.random.default_rng(5)
    arrival_s = np.cumsum(rng.exponential(1 / rate, count))
    return Trace("busy", arrival_s - arrival_s[0], rng.integers(50, 900, count), rng.integers(2, 40, count))


# ---- draws and intervals --------------------------------------------------------------------------------------------


def test_without_spread_an_interval_is_the_point() -> None:
    """A constant cost is exact and its host takes no time: nothing is left to vary, not even by the seed."""
    found = predict(busy(), CONSTANT, draws=19, goodput={"ttft": 50.0})
    summary = simulate(busy(), CONSTANT).summary({"ttft": 50.0})
    assert found.intervals["p99_ttft_ms"][1] > 1e3 * STEP_S
    for key, ends in found.intervals.items():
        assert ends == pytest.approx((summary[key],) * 3, rel=1e-12), key


def test_a_factor_on_a_constant_cost_scales_latencies_by_itself() -> None:
    """Alone, synchronously: TTFT is one iteration with a prompt, TPOT one without; each by its own factor."""
    sources = Sources(machine=Source(0.1, 0.2), model=Source(0.05, 0.0))
    found = predict(apart(3), CONSTANT, draws=25, sources=sources)
    for i, draw in enumerate(found.draws):
        assert found.values["p99_ttft_ms"][i] == pytest.approx(1e3 * STEP_S * draw.factors.chunk)
        assert found.values["mean_tpot_ms"][i] == pytest.approx(1e3 * STEP_S * draw.factors.decode)
        assert found.values["mean_e2el_ms"][i] == pytest.approx(
            1e3 * STEP_S * (draw.factors.chunk + 10 * draw.factors.decode)
        )


def test_factors_have_the_deviations_of_their_sources_and_one_machine_moves_both() -> None:
    sources = Sources(machine=Source(0.03, 0.06, 0.2), hour=Source(0.04, 0.0, 0.0), model=Source(0.0, 0.08, 0.1))
    draws = draws_of(CONSTANT, sources, 4000)
    decode, chunk, host = (np.log([draw.factors[i] for draw in draws]) for i in range(3))
    within = 5 / np.sqrt(2 * 4000)  # five standard errors of a deviation, relative
    assert decode.std() == pytest.approx(0.05, rel=within)
    assert chunk.std() == pytest.approx(0.1, rel=within)
    assert host.std() == pytest.approx(np.hypot(0.2, 0.1), rel=within)
    shared = 0.03 * 0.06 / (0.05 * 0.1)  # the machine's part, all that the two have in common
    assert np.corrcoef(decode, chunk)[0, 1] == pytest.approx(shared, abs=5 / np.sqrt(4000))
    assert np.corrcoef(decode, host)[0, 1] == pytest.approx(0.0, abs=5 / np.sqrt(4000))
    assert len({draw.seed for draw in draws}) == 4000


def test_draws_follow_the_scenarios_seed_and_nothing_else_of_it() -> None:
    sources = Sources(machine=Source(0.1, 0.1, 0.1))
    first = draws_of(CONSTANT, sources, 20)
    assert draws_of(replace(CONSTANT, replicas=3, max_num_seqs=7), sources, 20) == first
    assert draws_of(replace(CONSTANT, seed=1), sources, 20) != first
    assert draws_of(replace(CONSTANT, seed=1), sources, 20, seed=0) == first


def test_an_interval_lies_between_order_statistics() -> None:
    assert interval(list(range(1, 20)), 0.9) == pytest.approx((1, 10, 19))  # 1 / 20 below, 1 / 20 above
    assert interval(list(range(1, 200)), 0.99) == pytest.approx((1, 100, 199))
    assert interval([30, 10, 20], 0.5) == pytest.approx((10, 20, 30))
    with pytest.raises(ValueError, match=r"draws=18: an interval that holds 90 % needs 19 or more .* raise draws"):
        interval(list(range(18)), 0.9)
    with pytest.raises(ValueError, match=r"level=1\.0: give a share between 0 and 1"):
        interval(list(range(18)), 1.0)


@pytest.mark.parametrize(("level", "draws"), [(0.5, 7), (0.9, 19), (0.9, 32)])
def test_one_more_draw_lies_within_as_often_as_the_level_says(level: float, draws: int) -> None:
    """Whatever the distribution, here a skewed one with a heavy tail. Interpolated ranks cost a little."""
    values = np.exp(2.0 * np.random.default_rng(1).standard_normal((4000, draws + 1)))
    ends = np.quantile(values[:, :-1], [(1 - level) / 2, (1 + level) / 2], axis=1, method="weibull")
    inside = np.mean((ends[0] <= values[:, -1]) & (values[:, -1] <= ends[1]))
    assert inside == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 4000) + 0.01)


# ---- promises -------------------------------------------------------------------------------------------------------


def test_probability_of_a_promise_is_that_of_the_distribution_it_was_drawn_from() -> None:
    """TPOT alone is STEP_S times a log-normal factor, TTFT the same times another of the same machine."""
    draws, deviation = 150, 0.1
    tpot = [Slo("tpot", "p99", STEP_S * exp(deviation * NormalDist().inv_cdf(q))) for q in (0.25, 0.8)]
    found = predict(apart(2), CONSTANT, draws=draws, sources=Sources(machine=Source(deviation, 0.0)), slos=(tpot[0],))
    assert found.probability().all == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / draws))
    both = found.probability(tpot)
    assert both.each[str(tpot[1])] == pytest.approx(0.8, abs=4 * np.sqrt(0.8 * 0.2 / draws))
    assert both.all == both.each[str(tpot[0])], "one machine is below both limits, or the lower one breaks"
    good = Slo("goodput", "p90", 1.0, (("tpot", tpot[0].limit_s),))  # all requests of a machine are alike
    again = predict(apart(2), CONSTANT, draws=19, sources=Sources(machine=Source(deviation, 0.0)), slos=(tpot[0], good))
    assert again.probability([good]).all == again.probability([tpot[0]]).all
    ttft = Slo("ttft", "mean", 0.9999 * STEP_S)  # exactly STEP_S in every draw
    assert found.probability([tpot[1], ttft]).all == 0.0


def test_independent_promises_are_kept_together_as_often_as_the_product_says() -> None:
    draws = 150
    sources = Sources(hour=Source(0.1, 0.1))
    slos = [Slo("tpot", "mean", STEP_S), Slo("ttft", "mean", STEP_S)]
    found = predict(apart(1), CONSTANT, draws=draws, sources=sources, slos=slos).probability()
    assert list(found.each.values()) == pytest.approx([0.5, 0.5], abs=4 * 0.5 / np.sqrt(draws))
    assert found.all == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / draws))


def test_a_percentile_the_summary_lacks_is_kept_when_asked_for() -> None:
    odd = Slo("e2el", "p37.5", 1.0)
    found = predict(busy(), CONSTANT, draws=19, slos=[odd])
    requests = simulate(busy(), CONSTANT).requests
    expected_s = np.percentile(requests["finish_s"] - requests["arrival_s"], 37.5)
    assert found.promised_s["e2el_p37.5"] == pytest.approx([expected_s] * 19)
    with pytest.raises(ValueError, match=r"e2el_p12 was not kept by draw: give it to predict\(slos="):
        found.probability([Slo("e2el", "p12", 1.0)])


def test_a_rejected_request_is_infinitely_late_and_no_summary_hides_it() -> None:
    small = replace(CONSTANT, num_gpu_blocks_override=10)  # 144 tokens
    trace = Trace("two", np.array([0.0, 5.0]), np.array([64, 600]), np.array([4, 4]))
    late = Slo("ttft", "p99", 1.0)
    assert predict(trace, small, draws=19, slos=[late]).probability().all == 0.0
    with pytest.raises(ValueError, match="was not kept by draw"):
        predict(trace, small, draws=19).probability([late])


def test_attaining_counts_draws_in_which_enough_requests_meet_the_targets() -> None:
    sources = Sources(machine=Source(0.1, 0.1))
    found = predict(apart(4), CONSTANT, draws=99, goodput={"tpot": 1e3 * STEP_S}, sources=sources)
    below = np.mean([draw.factors.decode <= 1.0 for draw in found.draws])
    assert found.attaining(0.5) == found.attaining(1.0) == pytest.approx(below), "all requests are alike"
    with pytest.raises(ValueError, match="goodput: no targets were given"):
        predict(apart(1), CONSTANT, draws=19).attaining(0.9)


# ---- replays --------------------------------------------------------------------------------------------------------


def numbers(found: Prediction) -> dict[str, tuple[float | None, ...]]:
    return dict(found.values)


def test_processes_and_order_change_nothing_and_progress_counts_draws() -> None:
    seen: list[tuple[int, int]] = []
    here = predict(busy(), PROFILE, draws=19, slos=[Slo("itl", "p75", 0.01)])
    there = predict(
        busy(), PROFILE, draws=19, slos=[Slo("itl", "p75", 0.01)], jobs=2, progress=lambda i, n: seen.append((i, n))
    )
    assert numbers(there) == numbers(here) and there.promised_s == here.promised_s
    assert seen == [(i, 19) for i in range(1, 20)]
    with pytest.raises(ValueError, match="jobs=0: give 1 or more"):
        predict(busy(), PROFILE, draws=19, jobs=0)


def test_a_drawn_cost_gives_the_same_replay_every_time() -> None:
    cost = draw_costs(PROFILE, 2)[1]
    first, again = (simulate(busy(), PROFILE, cost=cost).requests["finish_s"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    copied = simulate(busy(), PROFILE, cost=pickle.loads(pickle.dumps(cost))).requests["finish_s"]
    np.testing.assert_array_equal(first, copied)


def test_costs_to_build_on_are_those_of_the_prediction() -> None:
    found = predict(busy(), PROFILE, draws=19)
    costs = draw_costs(PROFILE, 19)
    scenario = replace(PROFILE, seed=found.draws[7].seed)
    assert simulate(busy(), scenario, cost=costs[7]).summary()["p90_e2el_ms"] == found.values["p90_e2el_ms"][7]


def test_seeds_alone_are_replays_with_those_seeds() -> None:
    found = predict(busy(), PROFILE, draws=19, sources=SEED_ALONE)
    seed = found.draws[3].seed
    assert simulate(busy(), replace(PROFILE, seed=seed)).summary()["mean_ttft_ms"] == found.values["mean_ttft_ms"][3]
    assert found.to_dict()["of"] == "this trace, on the same machine again"


def test_a_speculating_engine_can_be_drawn() -> None:
    drafts = {"method": "eagle", "num_speculative_tokens": 2, "acceptance": 0.6}
    scenario = replace(PROFILE, speculative_config=drafts)
    plain = simulate(busy(20), scenario).summary()
    same = simulate(busy(20), scenario, cost=ScaledCost(cost_of(scenario), Factors())).summary()
    assert same["mean_tpot_ms"] == plain["mean_tpot_ms"]
    low, _, high = predict(busy(20), scenario, draws=19).intervals["mean_tpot_ms"]
    assert low < plain["mean_tpot_ms"] < high


def test_frames_and_json_hold_what_the_intervals_do() -> None:
    found = predict(busy(), PROFILE, draws=19, goodput={"ttft": 100.0}, slos=[Slo("ttft", "p99", 0.1)])
    frame = found.frame().set_index("key")
    assert tuple(frame.loc["p99_tpot_ms"]) == found.intervals["p99_tpot_ms"]
    draws = found.draws_frame()
    assert len(draws) == 19 and draws["decode"][4] == found.draws[4].factors.decode
    document = found.to_dict()
    assert document["intervals"]["slo_attainment"] == list(found.intervals["slo_attainment"])
    assert document["probability"]["each"] == {"ttft_p99=100ms": found.probability().all}
    assert set(document["attaining"]) == {"0.9", "0.95", "0.99"}


# ---- the scaled cost ------------------------------------------------------------------------------------------------

CHUNKS = ([(512, 0)], [(17, 300), (2048, 0)])


def test_factors_of_one_change_nothing_and_others_scale() -> None:
    inner = cost_of(PROFILE)
    same, slower = ScaledCost(inner, Factors()), ScaledCost(inner, Factors(1.1, 1.2, 1.3))
    for seqs in (1, 33, 256):
        plain, ramp = inner.decode_ramp(seqs, 500.0 * seqs), slower.decode_ramp(seqs, 500.0 * seqs)
        assert same.decode_ramp(seqs, 500.0 * seqs) == plain
        assert ramp == pytest.approx((1.1 * plain.first_s, 1.1 * plain.growth_s))
        for chunks in CHUNKS:
            plain_s = inner.mixed_s(chunks, seqs, 900.0)
            assert same.mixed_s(chunks, seqs, 900.0) == plain_s
            assert slower.mixed_s(chunks, seqs, 900.0) == pytest.approx(1.2 * plain_s)
    assert slower.host == inner.host.scaled(1.3) and same.host is inner.host
    assert slower.label == inner.label and slower.profile is inner.profile
    with pytest.raises(ValueError, match=r"factors: chunk=0\.0 is no factor of a time"):
        ScaledCost(inner, Factors(chunk=0.0))


def test_iterations_of_one_size_share_their_error_and_single_ones_stray_around_it() -> None:
    inner, deviation = cost_of(CONSTANT), 0.02
    octaves = [
        [
            ScaledCost(inner, Factors(), Ripple(deviation, 0.0, 0.0, 0.0, seed)).decode_ramp(2**k, 0).first_s
            for k in (0, 5)
        ]
        for seed in range(400)
    ]
    logs = np.log(np.array(octaves) / STEP_S)
    assert logs.std(axis=0) == pytest.approx([deviation] * 2, rel=5 / np.sqrt(800))
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(0.0, abs=5 / np.sqrt(400))
    curve = ScaledCost(inner, Factors(), Ripple(deviation, seed=3))
    values = [curve.decode_ramp(seqs, 0).first_s for seqs in range(64, 129)]
    assert max(abs(b / a - 1.0) for a, b in pairwise(values)) < 0.01, "it is a curve, not noise"
    noisy = ScaledCost(inner, Factors(), Ripple(0.0, 0.0, 0.0, deviation, seed=1))
    steps = np.array([noisy.mixed_s([(100, 0)], 4, 50.0) for _ in range(4000)]) / STEP_S
    assert steps.std() == pytest.approx(deviation, rel=0.06)
    assert steps.mean() == pytest.approx(1.0, abs=5 * deviation / np.sqrt(4000))
    assert noisy.decode_ramp(4, 0).first_s == STEP_S


def test_saturation_is_told_with_the_rate_that_can_be_served() -> None:
    """One request at a time, four iterations each: the server does 25 requests/s, and is sent 30."""
    from llmsim.rates import stability

    scenario = replace(CONSTANT, max_num_seqs=1)
    rng = np.random.default_rng(2)
    for rate in (30.0, 50.0):
        arrival_s = np.cumsum(rng.exponential(1 / rate, 3000))
        requests = simulate(Trace("full", arrival_s, np.full(3000, 10), np.full(3000, 4)), scenario).requests
        stable, words = stability(requests, None)
        assert stable is False
        assert words.startswith("unstable: the queue grew all along, by ")
        assert "so latencies depend on the trace's length" in words
        told = float(words.partition("highest stable rate about ")[2].split()[0])
        assert told == pytest.approx(1 / (4 * STEP_S), rel=0.03), "three digits; arrivals are Poisson's"
        growth = float(words.partition("by ")[2].split()[0])
        assert growth == pytest.approx(rate - 25.0, rel=0.15)
