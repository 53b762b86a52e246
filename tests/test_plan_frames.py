"""Frames of a plan against plain recomputation: frontiers, costs, the knee, probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsim import plan_frames, plan_study
from llmsim.choice import shipped
from llmsim.plan import curve
from llmsim.plan_runs import Run
from llmsim.plan_types import Plan
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.slo import Slo
from llmsim.trace import at_rate
from llmsim.uncertainty import predict
from llmsim.uncertainty_sources import NONE, Sources

SCENARIO = Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.02", max_num_seqs=16)
DEMAND = plan_study.Demand(
    shipped("chat.csv"), SCENARIO, ("ttft_p99=800ms", "tpot_p95=50ms"), rate=16.0, gpus=("h100-sxm", "h200-sxm"),
    tensor_parallels=(1, 2), limit=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan_study.planned(DEMAND)


def beaten(x: list[float], y: list[float], i: int) -> bool:
    return any(a >= x[i] and b >= y[i] and (a, b) != (x[i], y[i]) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_whom_nobody_beats(seed: int) -> None:
    random = np.random.default_rng(seed)
    x, y = random.integers(0, 8, (2, 30)).astype(float)
    mask = plan_frames.frontier(x, y)
    assert mask.tolist() == [not beaten(x.tolist(), y.tolist(), i) for i in range(30)]
    eligible = random.random(30) < 0.5
    assert (
        plan_frames.frontier(x, y, eligible)[eligible].tolist()
        == plan_frames.frontier(x[eligible], y[eligible]).tolist()
    )
    assert not plan_frames.frontier(x, y, eligible)[~eligible].any()


def test_points_are_simulations_with_their_price(found: Plan) -> None:
    points = plan_frames.points_frame(found)
    assert 0 < len(points) <= len(found.runs)
    prices = {option.gpu: option.usd_per_h / option.gpus for option in found.options}
    by_key = {
        (run.scenario.gpu, run.scenario.tensor_parallel, run.scenario.replicas, run.rate): run for run in found.runs
    }
    for row in points.itertuples():
        run = by_key[row.gpu, row.tensor_parallel, row.replicas, row.rate]
        dollars = prices[row.gpu] * row.replicas * row.tensor_parallel
        tokens = run.values["output_throughput"] * 3600 / 1e6
        assert row.usd_per_million_output_tokens == pytest.approx(dollars / tokens)
        assert row.tokens_per_s_per_gpu == run.values["tokens_per_s_per_gpu"] and row.holds == run.holds
    held = points[points["holds"]]
    x, y = held["tokens_per_s_per_user"].tolist(), held["tokens_per_s_per_gpu"].tolist()
    assert held["frontier"].tolist() == [not beaten(x, y, i) for i in range(len(held))]
    cheap = (-held["usd_per_million_output_tokens"]).tolist()
    assert held["cost_frontier"].tolist() == [not beaten(x, cheap, i) for i in range(len(held))]
    assert not points[~points["holds"]]["frontier"].any()


def test_options_say_which_answer_they_are_and_what_breaks_next(found: Plan) -> None:
    made = plan_frames.options_frame(found).set_index("option")
    assert found.cheapest is not None and "cheapest" in made["answers"][found.cheapest.name]
    assert sorted(word for words in made["answers"] for word in words.split(", ") if word) == [
        "cheapest",
        "fastest",
        "fewest",
    ]
    for option in found.options:
        if option.holds and option.broken is not None:
            assert made["breaks_next"][option.name] == option.broken.why_not != ""
            assert made["margin"][option.name] == min(option.margins.values())
            assert plan_frames.next_break(option).startswith(("with ", "at "))


def test_what_cannot_hold_says_why() -> None:
    none = plan_study.planned(replace(DEMAND, rate=400.0, max_gpus=1))
    made = plan_frames.options_frame(none)
    assert not none.holds and not made["answers"].any() and made["breaks_next"].all()


# ---- the knee -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points() -> tuple[Run, ...]:
    return plan_study.knee(DEMAND, replace(SCENARIO, replicas=2))


def test_the_knee_is_that_of_replays(points: tuple[Run, ...]) -> None:
    made = plan_frames.knee_frame(points)
    assert made["rate"].is_monotonic_increasing and len(made) == len(points) * 3 * 5
    rate = points[3].rate
    summary = simulate(at_rate(DEMAND.trace(), rate), replace(SCENARIO, replicas=2)).summary()
    mine = made[made["rate"] == rate].set_index(["metric", "statistic"])["value_ms"]
    assert mine["ttft", "p99"] == pytest.approx(summary["p99_ttft_ms"])
    assert mine["tpot", "p50"] == pytest.approx(summary["median_tpot_ms"])
    assert mine["e2el", "mean"] == pytest.approx(summary["mean_e2el_ms"])


def test_the_knee_goes_on_to_where_the_queue_runs_away(points: tuple[Run, ...]) -> None:
    begins, held = plan_frames.unstable_from(points), plan_frames.held_rate(points)
    assert begins is not None and held is not None and held < begins
    assert all(not run.stable for run in points if run.rate >= begins)
    last_calm = max((run.rate for run in points if run.stable), default=0.0)
    assert begins == min(run.rate for run in points if run.rate > last_calm)
    made = plan_frames.knee_frame(points)
    assert (made["unstable"] == (made["rate"] >= begins)).all()


def test_given_rates_are_the_ones_simulated() -> None:
    few = plan_study.knee(DEMAND, SCENARIO, [2.0, 4.0])
    assert [run.rate for run in few] == [2.0, 4.0]
    assert [run.values for run in few] == [
        run.values for run in curve(DEMAND.trace(), SCENARIO, DEMAND.slos, [2.0, 4.0])
    ]


# ---- how sure -------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_prediction() -> None:
    fleet = replace(SCENARIO, cost="auto", replicas=2)
    demand = replace(DEMAND, scenario=fleet, limit=60)
    told: list[tuple[int, int]] = []
    found = plan_study.sure(
        demand, fleet, 20.0, around=(1.0, 1.5), progress=lambda done, of, _: told.append((done, of))
    )
    assert [point.rate for point in found] == [20.0, 30.0] and told[-1] == (38, 38)
    slos = tuple(Slo.parse(text) for text in demand.slos)
    plain = predict(at_rate(demand.trace(), 30.0), fleet, draws=19, slos=slos, level=0.9)
    assert found[1].probability == plain.probability().all and found[1].draws == 19
    made = plan_study.sure_frame(found)
    row = made[(made["rate"] == 30.0) & (made["slo"] == str(slos[0]))].iloc[0]
    assert row["probability"] == plain.probability().each[str(slos[0])]
    values = sorted(plain.promised_s["ttft_p99"])
    assert row["low_ms"] == pytest.approx(1e3 * values[0]) and row["high_ms"] == pytest.approx(1e3 * values[-1])
    assert row["high"] == pytest.approx(values[-1] / 0.8) and row["probability_all"] == found[1].probability


def test_the_machine_can_be_left_out_and_confidence_widens_intervals() -> None:
    fleet = replace(SCENARIO, cost="auto", replicas=2)
    demand = replace(DEMAND, scenario=fleet, limit=40)
    (another,) = plan_study.sure(demand, fleet, 20.0, around=(1.0,))
    (same,) = plan_study.sure(demand, fleet, 20.0, around=(1.0,), without=("machine",))
    assert another.sources.machine.decode > 0.0 == same.sources.machine.decode
    assert replace(another.sources, machine=same.sources.machine) == same.sources
    assert "machine" in plan_study.off_by(another.sources) and "machine" not in plan_study.off_by(same.sources)[:60]
    slos = tuple(Slo.parse(text) for text in demand.slos)
    trace = at_rate(demand.trace(), 20.0)
    plain = predict(trace, fleet, draws=19, slos=slos, sources=replace(another.sources, machine=NONE))
    for (_, _, same_ms), (_, _, another_ms), slo in zip(same.each, another.each, slos, strict=True):
        assert same_ms == tuple(1e3 * value_s for value_s in plain.promised_s[slo.name]) != another_ms
    narrow, wide = (plan_study.sure_frame([another], level) for level in (0.5, 0.9))
    assert (wide["high_ms"] > narrow["high_ms"]).all() and (wide["low_ms"] < narrow["low_ms"]).all()
    assert sorted(another.each[0][2])[0] == wide["low_ms"].iloc[0]
    with pytest.raises(ValueError, match=r"draws=19: an interval that holds 95 % needs 39 or more"):
        plan_study.sure_frame([another], 0.95)


def test_a_rate_is_sure_if_it_and_all_below_it_are() -> None:
    points = [
        plan_study.SurePoint(rate, probability, 19, (), Sources())
        for rate, probability in ((3.0, 0.7), (1.0, 1.0), (2.0, 0.9), (4.0, 0.8))
    ]
    found = {confidence: plan_study.sure_up_to(points, confidence) for confidence in (0.5, 0.75, 0.9, 0.95, 1.1)}
    assert found == {0.5: 4.0, 0.75: 2.0, 0.9: 2.0, 0.95: 1.0, 1.1: None}
    assert plan_study.off_by(Sources()) == "exact by definition"


# ---- what is asked --------------------------------------------------------------------------------------------------


def test_flags_are_what_was_asked() -> None:
    words = plan_study.flags_of(
        replace(DEMAND, replicas=3, budget_usd_per_h=20.0, max_gpus=8, engines=("vllm", "sglang"), confidence=0.9)
    )
    assert words == [
        "--slo", "ttft_p99=800ms", "--slo", "tpot_p95=50ms", "--gpu", "h200-sxm", "--tp", "1,2", "--engine",
        "vllm,sglang", "--rate", "16", "--replicas", "3", "--budget", "20", "--confidence", "0.9", "--max-gpus", "8",
    ]  # fmt: skip
    assert plan_study.quick_requests(DEMAND) == 24_000 // 28
