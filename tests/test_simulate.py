"""From a trace to a result: who is sent when and where, and that the same seed gives the same bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_twin import HOSTS, SteppedCost

from llmsim.cost import Ramp
from llmsim.cost.graphs import Graphs
from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

STEP_S = 0.01
SCENARIO = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{STEP_S}", max_num_seqs=64)
NOISY = SteppedCost(HOSTS["vllm"], Graphs.of_engine(64, 8192), 1.0)


def trace(arrival_s: Any, prompt: Any, output: Any, **columns: Any) -> Trace:
    return Trace("made", np.asarray(arrival_s, dtype=np.float64), np.asarray(prompt), np.asarray(output), **columns)


def random_trace(count: int, rate: float, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate, count))
    return trace(arrival_s - arrival_s[0], rng.integers(1, 800, count), rng.integers(1, 120, count))


def most_at_once(result: Result, replica: int | None = None) -> int:
    """Requests sent and not answered, at the worst moment."""
    requests = result.requests
    mine = slice(None) if replica is None else requests["replica"] == replica
    starts, ends = requests["arrival_s"][mine], requests["finish_s"][mine]
    times = np.concatenate([ends, starts])
    changes = np.concatenate([-np.ones(ends.size), np.ones(starts.size)])
    order = np.argsort(times, kind="stable")  # an answer before what it makes its client send
    return int(np.cumsum(changes[order]).max())


# ---- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 3, 16])
def test_a_closed_loop_keeps_exactly_n_under_way(clients: int) -> None:
    result = simulate(random_trace(60, 100.0, 1), replace(SCENARIO, concurrency=clients))
    requests = result.requests
    assert most_at_once(result) == clients
    assert np.isfinite(requests["finish_s"]).all()
    assert (np.diff(requests["arrival_s"]) >= 0).all(), "sent in the trace's order"
    # Each request beyond the first round is sent the instant an earlier one ends, each end sends one.
    later = np.sort(requests["arrival_s"][clients:])
    assert later == pytest.approx(np.sort(requests["finish_s"])[: 60 - clients], abs=1e-12)


def test_more_clients_than_requests_send_all_at_once() -> None:
    result = simulate(random_trace(5, 1.0, 1), replace(SCENARIO, concurrency=9))
    assert result.requests["arrival_s"].tolist() == [0.0] * 5


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_turn_is_sent_its_delay_after_its_parent_has_finished(replicas: int) -> None:
    nan = np.nan
    sessions = trace(
        [0.0, nan, nan, 0.5, nan, nan],
        [100, 150, 200, 100, 150, 150],
        [10, 20, 5, 30, 10, 10],
        parent=np.array([-1, 0, 1, -1, 3, 3]),
        delay_s=np.array([nan, 2.0, 0.0, nan, 1.5, nan]),
    )
    requests = simulate(sessions, replace(SCENARIO, replicas=replicas)).requests
    sent, done = requests["arrival_s"], requests["finish_s"]
    assert np.isfinite(done).all()
    assert sent[[0, 3]].tolist() == [0.0, 0.5]
    assert sent[1] == pytest.approx(done[0] + 2.0)
    assert sent[2] == pytest.approx(done[1])
    assert sent[4] == pytest.approx(done[3] + 1.5)
    assert sent[5] == pytest.approx(done[3])  # no delay given: at once; and two turns may follow one


def test_a_turn_may_stand_behind_requests_that_arrive_after_its_parent_has_finished() -> None:
    columns = {"parent": np.array([-1, -1, 0]), "delay_s": np.array([np.nan, np.nan, 1.0])}
    requests = simulate(trace([0, 100, np.nan], [10] * 3, [5] * 3, **columns), SCENARIO).requests
    assert requests["arrival_s"][2] == pytest.approx(requests["finish_s"][0] + 1)
    assert requests["finish_s"][2] < 100


def test_a_parent_of_a_request_with_an_arrival_is_only_a_fact() -> None:
    columns = {"parent": np.array([-1, 0]), "delay_s": np.array([np.nan, 9.0])}
    requests = simulate(trace([0.0, 0.02], [100, 100], [50, 5], **columns), SCENARIO).requests
    assert requests["arrival_s"].tolist() == [0.0, 0.02]
    assert requests["finish_s"][1] < requests["finish_s"][0]


# ---- where ---------------------------------------------------------------------------------------------------------


def test_round_robin_deals_in_order_of_arrival() -> None:
    result = simulate(random_trace(31, 50.0, 2), replace(SCENARIO, replicas=3))
    assert result.requests["replica"].tolist() == [i % 3 for i in range(31)]


def test_round_robin_is_the_same_read_ahead_or_asked_at_each_arrival() -> None:
    """A closed loop with a client for every request asks at each arrival; arrivals at 0 make both the same."""
    work = trace(np.zeros(30), np.full(30, 100), np.arange(1, 31))
    ahead = simulate(work, replace(SCENARIO, replicas=3)).requests
    asked = simulate(work, replace(SCENARIO, replicas=3, concurrency=30)).requests
    for name in ("replica", "scheduled_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(ahead[name], asked[name], rtol=0, atol=1e-9)


def test_least_outstanding_goes_round_a_busy_replica() -> None:
    """A long request occupies replica 0; the short ones, one after another, all find replica 1 idle."""
    work = trace([0.0, 0.1, 0.5, 0.9, 1.3], [10] * 5, [1000, 5, 5, 5, 5])
    balanced = simulate(work, replace(SCENARIO, replicas=2, router="least_outstanding")).requests
    assert balanced["replica"].tolist() == [0, 1, 1, 1, 1]
    dealt = simulate(work, replace(SCENARIO, replicas=2)).requests
    assert dealt["replica"].tolist() == [0, 1, 0, 1, 0]


def test_least_outstanding_balances_what_is_outstanding() -> None:
    work = random_trace(300, 60.0, 3)
    worst = {}
    for router in ("round_robin", "least_outstanding"):
        result = simulate(work, replace(SCENARIO, replicas=4, router=router))
        worst[router] = max(most_at_once(result, replica) for replica in range(4))
    assert worst["least_outstanding"] <= worst["round_robin"]
    result = simulate(work, replace(SCENARIO, replicas=4, router="least_outstanding"))
    assert worst["least_outstanding"] <= -(-most_at_once(result) // 4) + 1


def test_each_replica_serves_its_share_as_if_alone() -> None:
    work = random_trace(40, 40.0, 4)
    together = simulate(work, replace(SCENARIO, replicas=2)).requests
    for index in range(2):
        mine = np.arange(index, 40, 2)
        alone = simulate(trace(work.arrival_s[mine], work.prompt_tokens[mine], work.output_tokens[mine]), SCENARIO)
        np.testing.assert_allclose(alone.requests["finish_s"], together["finish_s"][mine], rtol=0, atol=1e-9)


# ---- what does not fit ---------------------------------------------------------------------------------------------


class SlowDecodes:
    """A millisecond a prompt token, a second a decode: a replica in the midst of a decode does not wake for long."""

    kind = label = "test"
    host = HOSTS["none"]
    mode = staticmethod(Graphs.of_engine(64, 8192).mode)

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        return Ramp(1.0, 0.0)

    def mixed_s(self, chunks: Any, seqs: int, kv_tokens: int) -> float:
        return 1e-3 * sum(tokens for tokens, _ in chunks)


def test_a_client_learns_at_once_that_its_request_can_never_fit() -> None:
    """The first replica decodes from 0.3 to 1.3 s. At 0.506 s the second client has its answer and sends what can never
    fit to the first replica; turned away, it sends its next one to the second, whose next iteration begins at 0.762."""
    work = trace([0.0] * 6, [200, 250, 100, 1500, 2400, 100], [5, 1, 5, 1, 10, 1])
    scenario = replace(
        SCENARIO, replicas=2, concurrency=4, num_gpu_blocks_override=151, async_scheduling=False,
        enable_prefix_caching=False, max_num_batched_tokens=512, long_prefill_token_threshold=256,
    )  # fmt: skip
    requests = simulate(work, scenario, cost=SlowDecodes()).requests
    assert requests["replica"].tolist() == [0, 1, 0, 1, 0, 1]
    assert requests["arrival_s"] == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.506, 0.506])
    assert np.isnan(requests["finish_s"][4])
    assert requests["scheduled_s"][5] == pytest.approx(0.506 + 0.256)


@pytest.mark.parametrize("concurrency", [None, 2])
def test_requests_that_can_never_fit_are_rejected_and_counted(concurrency: int | None) -> None:
    work = trace([0.0, 0.1, 0.2, 0.3], [100, 2000, 100, 1590], [5, 5, 5, 11])
    tight = replace(SCENARIO, num_gpu_blocks_override=101, concurrency=concurrency)  # 1600 tokens
    result = simulate(work, tight)
    rejected = np.isnan(result.requests["finish_s"]).tolist()
    assert rejected == [False, True, False, False]  # the last token of the last one needs no block
    assert result.stats["rejected"] == 1
    assert result.summary()["failed"] == 1


def test_an_over_long_request_is_an_error_that_names_it() -> None:
    work = trace([0.0, 0.1, 0.2], [100, 3000, 4000], [10, 1097, 10])
    with pytest.raises(ValueError) as error:
        simulate(work, replace(SCENARIO, max_model_len=4096))
    assert str(error.value).startswith(
        "made: 1 of 3 requests are longer than max_model_len=4096;"
        " the first is request 2 with 3000 prompt + 1097 output tokens."
    )
    assert "\n" not in str(error.value)
    simulate(trace([0.0], [3000], [1096]), replace(SCENARIO, max_model_len=4096))  # exactly fits


# ---- determinism ---------------------------------------------------------------------------------------------------


def all_bytes(result: Result) -> dict[str, bytes]:
    tables = {"requests": result.requests, "iterations": result.iterations, "gaps": result.gaps}
    return {f"{table}.{name}": columns[name].tobytes() for table, columns in tables.items() for name in columns}


@pytest.mark.parametrize("settings", [{}, {"replicas": 3, "router": "least_outstanding"}, {"concurrency": 8}])
def test_the_same_seed_gives_the_same_bytes(settings: dict[str, Any]) -> None:
    scenario = replace(SCENARIO, num_gpu_blocks_override=300, **settings)
    first, second = (all_bytes(simulate(random_trace(150, 30.0, 5), scenario, cost=NOISY)) for _ in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_differs_only_with_launch_jitter() -> None:
    work = random_trace(100, 30.0, 5)

    def finish_s(seed: int, jitter: bool) -> list[float]:
        scenario = replace(SCENARIO, seed=seed, launch_jitter=jitter)
        return simulate(work, scenario, cost=NOISY).requests["finish_s"].tolist()

    assert finish_s(0, True) != finish_s(1, True)
    assert finish_s(0, False) == finish_s(1, False)


def test_progress_is_told_of_every_thousandth_answer() -> None:
    told: list[tuple[int, int, float]] = []
    work = trace(np.arange(2500) * 0.001, np.full(2500, 10), np.full(2500, 2))
    result = simulate(work, SCENARIO, lambda *state: told.append(state))
    assert [(done, total) for done, total, _ in told] == [(1000, 2500), (2000, 2500)]
    assert 0 < told[0][2] < told[1][2] <= result.requests["finish_s"].max()


def test_one_client_always_finds_the_first_of_idle_replicas() -> None:
    """Its next request leaves at the very instant of its answer, however that instant was added up (one of 12,000 was
    not: seed 27)."""
    scenario = replace(SCENARIO, cost="auto", replicas=2, router="least_outstanding", concurrency=1)
    assert set(simulate(random_trace(300, 100.0, 27), scenario).requests["replica"].tolist()) == {0}
