"""Orders and fairness: each defining rule by hand, on an engine whose iterations last one second each."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from random import Random
from typing import Any

import numpy as np
import pytest
import simpy
from test_twin import HOSTS, SteppedCost

from llmsim.cost import FULL, Host, LaunchNoise, Ramp
from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.schedulers import load_scheduler
from llmsim.schedulers.mlfq import SkipJoinMlfq
from llmsim.schedulers.ordered import Ordered
from llmsim.schedulers.slo_chunk import SloChunk

BLOCK = 16


class Seconds:
    """Every iteration lasts one second; a prompt lasts one more for every `per_s` tokens beyond the first `per_s`."""

    kind = label = "test"

    def __init__(self, per_s: int = 10**9) -> None:
        self.host, self.per_s = Host(), per_s

    def mode(self, tokens: int, chunks: int) -> int:
        return FULL

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        return Ramp(1.0, 0.0)

    def mixed_s(self, chunks: Any, seqs: int, kv_tokens: int) -> float:
        return 1.0 + sum(tokens - 1 for tokens, _ in chunks) // self.per_s


def served(
    policy: Any,
    requests: list[Request],
    cost: Any = None,
    *,
    seqs: int = 1,
    blocks: int = 10_000,
    budget: int = 8192,
    swap: Swap | None = None,
    asynchronous: bool = False,
    admission: Any = None,
    seed: int | None = None,
) -> Replica:
    env = simpy.Environment()
    cost = cost or Seconds()
    noise = None if seed is None else LaunchNoise(cost.host, seed)
    kv, limits = KVCache(blocks, BLOCK), Limits(seqs, budget)
    replica = Replica(
        env, policy, cost, kv, limits, asynchronous=asynchronous, swap=swap, admission=admission, noise=noise
    )
    replica.start(iter(requests))
    env.run()
    return replica


def request(id: int, at_s: float, output: int, prompt: int = 10, **labels: Any) -> Request:
    made = Request(id, at_s, prompt, output)
    for name, value in labels.items():
        setattr(made, name, value)
    return made


def finished(requests: list[Request]) -> list[float]:
    return [one.finish_s for one in requests]


# ---- shortest first ------------------------------------------------------------------------------------------------


def test_the_shortest_waiting_request_is_next_and_the_running_one_is_left_alone() -> None:
    jobs = [request(0, 0.0, 5), request(1, 0.5, 9), request(2, 0.6, 2)]
    served(load_scheduler("sjf"), jobs)
    assert finished(jobs) == [5.0, 16.0, 7.0]
    jobs = [request(0, 0.0, 5), request(1, 0.5, 9), request(2, 0.6, 2)]
    served(load_scheduler("fcfs"), jobs)
    assert finished(jobs) == [5.0, 14.0, 16.0]


@pytest.mark.parametrize("foretold", [(30.0, 40.0), (0.1, 0.2)], ids=["lengths", "ranks"])
def test_what_counts_is_the_prediction(foretold: tuple[float, float]) -> None:
    jobs = [
        request(0, 0.0, 5),
        request(1, 0.5, 9, predicted_tokens=foretold[0]),
        request(2, 0.6, 2, predicted_tokens=foretold[1]),
    ]
    served(load_scheduler("sjf"), jobs)
    assert finished(jobs) == [5.0, 14.0, 16.0]


def test_a_request_passed_over_too_often_is_next() -> None:
    """A new request of 2 tokens comes every 2 s, just before the slot is free; one of 3 waits from 0.5 s on."""

    def workload() -> list[Request]:
        return [request(0, 0.0, 2), request(1, 0.5, 3), *(request(i, 2.0 * i - 3.0, 2) for i in range(2, 12))]

    starved, guarded = workload(), workload()
    served(load_scheduler("sjf"), starved)
    assert starved[1].scheduled_s == 22.0  # last of all: 11 others of 2 s each
    served(load_scheduler("sjf", {"starvation_iterations": 6}), guarded)
    # It joins the queue at 1 s; the iterations of 1, 2, ... 6 s pass it over; the slot is free at 8 s. 5 would do by 6.
    assert guarded[1].scheduled_s == 8.0
    guarded = workload()
    served(load_scheduler("sjf", {"starvation_iterations": 5}), guarded)
    assert guarded[1].scheduled_s == 6.0


def test_shortest_remaining_takes_the_slot_and_gives_it_back() -> None:
    """At 4 s the first has 6 tokens left: one of 3 goes before it, one of 8 does not."""
    jobs = [request(0, 0.0, 10), request(1, 3.5, 3), request(2, 3.6, 8)]
    replica = served(load_scheduler("srtf"), jobs)
    assert finished(jobs) == [13.0, 7.0, 21.0]
    assert replica.preemptions == 0, "it was paused: nothing is computed again"


def test_remaining_counts_what_was_generated_not_what_was_asked_for() -> None:
    """At 8 s the first has 2 of 10 left, so one of 3 waits."""
    jobs = [request(0, 0.0, 10), request(1, 7.5, 3)]
    served(load_scheduler("srtf"), jobs)
    assert finished(jobs) == [10.0, 13.0]


def test_a_promoted_request_keeps_its_slot_for_a_quantum() -> None:
    """Passed over 3 times, the long one is promoted at 4 s and runs 2 iterations before the short ones go on."""
    jobs = [request(1, 0.0, 2), request(0, 0.5, 30), *(request(i, 1.5 * i - 1.5, 2) for i in range(2, 8))]
    served(load_scheduler("srtf", {"starvation_iterations": 3, "quantum_iterations": 2}), jobs, seqs=1)
    # 1: 0-2. 2 (from 1.5): 2-4. 0 waits from 1 on: passed over by the iterations of 1, 2 and 3; runs at 4 and 5.
    assert jobs[1].scheduled_s == 4.0
    assert (jobs[2].finish_s, jobs[3].finish_s) == (4.0, 8.0)  # 3 (from 3.0) would have run at 4


def test_shortest_remaining_needs_lengths() -> None:
    jobs = [request(0, 0.0, 5, predicted_tokens=0.5), request(1, 0.0, 5, predicted_tokens=0.7)]
    with pytest.raises(PolicyError, match=r"predicted_tokens=0\.[57] of request [01] is a rank: use sjf"):
        served(load_scheduler("srtf"), jobs)


def test_with_recompute_blocks_are_taken_from_the_longest_and_only_if_that_helps() -> None:
    """20 blocks: the first two hold 8 each. A prompt of 9 blocks needs one of them out, the one with more left."""
    jobs = [request(0, 0.0, 40, 120), request(1, 0.0, 50, 120), request(2, 3.5, 4, 140)]
    replica = served(load_scheduler("srtf", {"when_full": "recompute"}), jobs, seqs=8, blocks=22)
    assert [one.preemptions for one in jobs] == [0, 1, 0]
    assert replica.preemptions == 1
    jobs = [request(0, 0.0, 40, 120), request(1, 0.0, 50, 120), request(2, 3.5, 30, 330)]
    served(load_scheduler("srtf", {"when_full": "recompute"}), jobs, seqs=8, blocks=23)
    assert [one.preemptions for one in jobs] == [1, 1, 0], "both leave where both are needed"
    jobs = [request(0, 0.0, 20, 120), request(1, 0.0, 50, 120), request(2, 3.5, 30, 330)]
    served(load_scheduler("srtf", {"when_full": "recompute"}), jobs, seqs=8, blocks=23)
    assert jobs[1].preemptions == 0, "the shorter may not be taken, and the longer alone does not make room"


# ---- classes and deadlines -----------------------------------------------------------------------------------------


def test_the_most_urgent_class_first_then_arrival() -> None:
    names = ["batch", "batch", "chat", "batch", "chat"]
    jobs = [request(i, 0.1 * i, 2, slo_class=name) for i, name in enumerate(names)]
    served(load_scheduler("priority", {"classes": "chat,batch"}), jobs)
    assert finished(jobs) == [2.0, 8.0, 4.0, 10.0, 6.0]


def test_without_classes_the_traces_priorities_count() -> None:
    jobs = [request(i, 0.1 * i, 2, priority=p) for i, p in enumerate([0, 5, -1])]
    served(load_scheduler("priority"), jobs)
    assert finished(jobs) == [2.0, 6.0, 4.0]


def test_a_class_nobody_ranked_is_an_error() -> None:
    jobs = [request(i, 0.0, 2, slo_class="gold") for i in range(2)]
    with pytest.raises(PolicyError, match="class 'gold', which is not among chat, batch: name every class"):
        served(load_scheduler("priority", {"classes": "chat,batch"}), jobs)


def test_the_least_urgent_class_loses_its_blocks() -> None:
    """16 blocks for two requests that grow to 11 each: the batch one, although it came first, is recomputed."""
    jobs = [request(0, 0.0, 60, 110, slo_class="batch"), request(1, 0.0, 60, 110, slo_class="chat")]
    served(load_scheduler("priority", {"classes": "chat,batch"}), jobs, seqs=8, blocks=16)
    assert [one.preemptions > 0 for one in jobs] == [True, False]


def test_the_earliest_deadline_first_and_who_has_none_last() -> None:
    jobs = [
        request(0, 0.0, 2),
        request(1, 0.1, 2),
        request(2, 0.2, 2, slo_ttft_s=30.0),
        request(3, 0.3, 2, slo_ttft_s=9.0),
    ]
    served(load_scheduler("edf"), jobs)
    assert finished(jobs) == [2.0, 8.0, 6.0, 4.0]


def test_least_slack_counts_what_the_prompt_takes() -> None:
    """Due at 20.1 and 20.2 s, but the later one's prompt takes 6 s alone: it has to start first."""
    jobs = [
        request(0, 0.0, 2),
        request(1, 0.1, 2, slo_ttft_s=20.0),
        request(2, 0.2, 2, prompt=600, slo_ttft_s=20.0),
    ]
    served(load_scheduler("least-slack"), jobs, Seconds(per_s=100))
    assert finished(jobs) == [2.0, 11.0, 9.0]
    for one in jobs:
        one.__init__(one.id, one.arrival_s, one.prompt_tokens, one.output_tokens)  # type: ignore[misc]
    jobs[1].slo_ttft_s = jobs[2].slo_ttft_s = 20.0
    served(load_scheduler("edf"), jobs, Seconds(per_s=100))
    assert finished(jobs) == [2.0, 4.0, 11.0]


def test_what_can_no_longer_make_it_is_turned_away_at_once() -> None:
    """The slot is free at 10 s. One had to start by 5.1 - 1 s; one can still make 12.2 - 1 s."""
    jobs = [request(0, 0.0, 10), request(1, 0.1, 3, slo_ttft_s=5.0), request(2, 0.2, 3, slo_ttft_s=12.0)]
    replica = served(load_scheduler("edf", {"shed": True}), jobs)
    assert jobs[1].rejected_s == 5.0, "the first iteration that starts after 4.1 s"
    assert finished(jobs)[::2] == [10.0, 13.0] and replica.rejections == 1
    jobs = [request(0, 0.0, 10), request(1, 0.1, 3, slo_ttft_s=5.0), request(2, 0.2, 3, slo_ttft_s=12.0)]
    served(load_scheduler("edf"), jobs)
    assert finished(jobs) == [10.0, 13.0, 16.0], "without shedding the lost one makes the other late"


# ---- VTC -----------------------------------------------------------------------------------------------------------


def test_tenants_take_turns_by_what_they_were_given() -> None:
    """A request costs 16 + 2 * 2 = 20 to either: y goes second although x has four in the queue before it."""
    jobs = [request(i, 0.0, 2, 16, tenant="x" if i < 4 else "y") for i in range(6)]
    served(load_scheduler("vtc"), jobs)
    assert finished(jobs) == [2.0, 6.0, 10.0, 12.0, 4.0, 8.0]


def test_a_long_answer_costs_its_tenant_turns() -> None:
    """x's first costs 16 + 2 * 12 = 40: y has two of 20 each before x is next (a tie: x was here first)."""
    jobs = [request(0, 0.0, 12, 16, tenant="x"), request(1, 0.0, 2, 16, tenant="x")]
    jobs += [request(i, 0.0, 2, 16, tenant="y") for i in range(2, 5)]
    served(load_scheduler("vtc"), jobs)
    assert finished(jobs) == [12.0, 18.0, 14.0, 16.0, 20.0]


def test_weights_divide_the_cost() -> None:
    """With weight 2 a request costs x 10: after one each, x has two turns for one of y."""
    jobs = [request(i, 0.0, 2, 16, tenant="x" if i < 5 else "y") for i in range(8)]
    served(load_scheduler("vtc", {"weights": {"x": 2.0}}), jobs)
    order = sorted(jobs, key=lambda one: one.finish_s)
    assert "".join(str(one.tenant) for one in order) == "xyxxyxxy"


def test_idleness_earns_no_credit() -> None:
    """y comes when x has been given 60 already: lifted to x's counter, it gets every other turn and not three."""
    jobs = [request(i, 0.0, 2, 16, tenant="x") for i in range(6)]
    jobs += [request(i, 5.5, 2, 16, tenant="y") for i in range(6, 9)]
    served(load_scheduler("vtc"), jobs)
    order = sorted(jobs, key=lambda one: one.finish_s)
    # x, x, x; y joins at 6 s with x's 60, which has been here longer
    assert "".join(str(one.tenant) for one in order) == "xxxxyxyxy"


def test_lifted_to_who_left_last_when_nobody_waits() -> None:
    policy = load_scheduler("vtc")
    jobs = [
        request(0, 0.0, 4, 16, tenant="x"),
        request(1, 10.0, 2, 16, tenant="y"),
        request(2, 10.1, 2, 16, tenant="x"),
    ]
    served(policy, jobs)
    # y starts from x's 16 + 2 * 4 = 24; when x is back at 11 s, y has paid 16 + 2 of its 20, and x starts from that
    assert policy._queue.counter("y") == 44.0 and policy._queue.counter("x") == 62.0


def test_counters_are_the_service_given() -> None:
    policy = load_scheduler("vtc")
    random = Random(4)
    jobs = [
        request(i, 0.0, random.randint(1, 40), random.randint(1, 90), tenant=random.choice("abc")) for i in range(80)
    ]
    replica = served(policy, jobs, seqs=6, blocks=30, budget=64)
    assert replica.preemptions > 0, "what was computed twice must count once"
    for tenant in "abc":
        mine = [one for one in jobs if one.tenant == tenant]
        assert policy._queue.counter(tenant) == sum(one.prompt_tokens + 2 * one.output_tokens for one in mine)


class Watched(Ordered):
    """Wraps a policy and keeps what each tenant has been given at every schedule, while both have requests waiting."""

    def __init__(self, policy: Any, jobs: list[Request]) -> None:
        self.base, self.jobs = policy, jobs
        self.differences: list[float] = []

    order = property(lambda self: getattr(self.base, "order", None))  # type: ignore[assignment]

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.base.schedule(replica, now_s)
        if {one.tenant for one in replica.waiting} == {"f", "g"}:
            self.differences.append(self.service("f", replica) - self.service("g", replica))
        return None

    def service(self, tenant: str, replica: Any) -> float:
        given = 0.0
        for one in self.jobs:
            if one.tenant == tenant and one.scheduled_s == one.scheduled_s:
                made = replica.batch.iteration - one.joined if one.joined >= 0 else 0
                given += one.prompt_tokens + 2.0 * (one.generated_tokens + made)
        return given


def backlog(seed: int) -> list[Request]:
    """f floods, g sends as much later in the queue; both have requests waiting throughout."""
    random = Random(seed)
    jobs = []
    for i in range(240):
        lengths = random.randint(1, 60), random.randint(1, 120)
        jobs.append(request(i, 0.0, *lengths, tenant="f" if i < 120 else "g"))
    return jobs


@pytest.mark.parametrize("seed", range(12))
def test_vtc_bounds_the_difference_between_backlogged_clients_and_fcfs_does_not(seed: int) -> None:
    """|W_f - W_g| <= 2 max(w_p L, w_q M) over any interval (theorem 4.4); M = 64 blocks of 16 tokens.

    `orca` reserves whole sequences, so nobody is preempted, as the theorem assumes.
    """
    bound = 2 * max(1 * 120, 2 * 64 * BLOCK)
    spread = {}
    for name, arguments in (("vtc", {"base": "orca"}), ("fcfs", {"base": "orca"})):
        jobs = backlog(seed)
        watched = Watched(load_scheduler(name, arguments), jobs)
        replica = served(watched, jobs, seqs=64, blocks=64)
        assert not replica.preemptions
        spread[name] = max(watched.differences) - min(watched.differences)
    assert spread["vtc"] <= bound < spread["fcfs"]


# ---- MLFQ ----------------------------------------------------------------------------------------------------------


def test_a_request_joins_the_first_level_whose_quantum_its_prompt_fits() -> None:
    """100 tokens a second: prompts of 1, 2, 3 and 9 s join levels 0 (1 s), 1 (2 s), 2 (4 s) and 4 (16 s)."""
    policy = SkipJoinMlfq()
    replica = served(policy, [], Seconds(per_s=100))
    assert replica.cost.decode_ramp(1, 0).first_s == policy.quantum(0) == 1.0
    assert [policy.level_for(request(0, 0.0, 5, prompt)) for prompt in (100, 200, 300, 900)] == [0, 1, 2, 4]
    assert SkipJoinMlfq(levels=3).levels == 3
    capped = SkipJoinMlfq(levels=3)
    served(capped, [], Seconds(per_s=100))
    assert capped.level_for(request(0, 0.0, 5, 900)) == 2


def test_who_has_used_up_its_quantum_makes_way_and_keeps_its_blocks() -> None:
    """Quanta 1, 2, 4, ... The first is at level 2 (from 3 s) when the second comes at level 0, then 1 (from 5 s)."""
    jobs = [request(0, 0.0, 10), request(1, 3.5, 4)]
    policy = SkipJoinMlfq(starvation_s=0.0)
    replica = served(policy, jobs)
    # 1 runs at 4 (its level 0), 5 and 6 (level 1); at 7 it is at level 2, where 0 has been since 3: 0 goes on
    # from 7 to its level's end: 4 s of level 2, of which it used 3 to 4; so 7, 8, 9; then 1, and 0 at level 3.
    assert jobs[1].first_token_s == 5.0
    assert jobs[1].finish_s == 11.0 and jobs[0].finish_s == 14.0
    assert replica.preemptions == 0


def test_starved_requests_are_promoted() -> None:
    """A long one is passed over by a stream of short ones until it has waited 6 s."""

    def workload() -> list[Request]:
        return [request(0, 0.0, 8), *(request(i, 1.0 * i - 0.5, 1) for i in range(1, 30))]

    starved, promoted = workload(), workload()
    served(SkipJoinMlfq(starvation_s=0.0), starved)
    assert starved[0].finish_s == 37.0  # all 29 others first
    policy = SkipJoinMlfq(starvation_s=6.0)
    served(policy, promoted)
    # It runs at 0 and waits from 1; promoted at 7, behind the one that came at 6.5, it runs at 8 for a quantum of 1 s.
    assert [one.scheduled_s for one in promoted[6:10]] == [6.0, 7.0, 9.0, 10.0]
    assert [one.scheduled_s for one in starved[6:10]] == [6.0, 7.0, 8.0, 9.0]
    assert policy.promotions == 3  # at 7, 15 and 23 s; the last of the others is done at 33 s


@pytest.mark.parametrize("when_full", ["defer", "swap", "recompute"])
def test_when_blocks_run_out_the_least_urgent_make_room_as_asked(when_full: str) -> None:
    """20 blocks; the first holds 10 when a prompt of 12 comes at a higher level."""
    jobs = [request(0, 0.0, 40, 140), request(1, 3.5, 2, 190)]
    swap = Swap(100, 1 / 1024) if when_full == "swap" else None
    served(SkipJoinMlfq(when_full=when_full, reserve=0.0), jobs, seqs=8, blocks=20, swap=swap)
    assert jobs[0].preemptions == (0 if when_full == "defer" else 1)
    assert (jobs[1].finish_s < jobs[0].finish_s) is (when_full != "defer")
    if swap is not None:
        assert swap.copied_out_blocks == swap.copied_in_blocks == 9 and swap.free_blocks == 100
        # 2 + 40 iterations, nothing computed again; 9 blocks out and 9 in
        assert jobs[1].finish_s == 6.0 + 9 / 1024 and jobs[0].finish_s == 42.0 + 18 / 1024
    assert all(one.finish_s < inf for one in jobs)


def test_swap_needs_host_memory() -> None:
    with pytest.raises(ValueError, match="when_full='swap' needs host memory: give swap_space_gib"):
        served(SkipJoinMlfq(when_full="swap"), [])


# ---- chunks --------------------------------------------------------------------------------------------------------


def test_the_chunk_is_the_largest_that_keeps_the_decodes_in_time() -> None:
    cost = SteppedCost(HOSTS["none"], Graphs.of_engine(256, 8192), 1.0)
    policy = SloChunk(tpot_ms=30.0, min_chunk_tokens=16, step_tokens=16)
    seen: list[tuple[int, float]] = []

    class Probe(Ordered):
        def __init__(self) -> None:
            self.base = policy

        order = None  # type: ignore[assignment]

        def schedule(self, replica: Any, now_s: float) -> bool | None:
            seqs, kv_tokens = replica.batch.size, replica.batch.kv_tokens
            left = replica.waiting.prefill_tokens + sum(
                r.prefill_tokens - r.computed_tokens for r in replica.prefilling
            )
            before = next((r.computed_tokens for r in replica.prefilling), 0)
            policy.schedule(replica, now_s)
            if seqs and replica.chunks:
                tokens = sum(tokens for _, tokens, _ in replica.chunks)
                seen.append((tokens, cost.mixed_s([(tokens, before)], seqs, kv_tokens)))
                if tokens < left:
                    assert cost.mixed_s([(tokens + 16, before)], seqs, kv_tokens) > 0.030
            return None

    jobs = [request(i, 0.05 * i, 60, 1500) for i in range(20)]
    served(Probe(), jobs, cost, seqs=256, asynchronous=True)
    assert len(seen) > 20
    assert max(seconds for tokens, seconds in seen if tokens > 16) <= 0.030


def test_the_strictest_promise_among_decoding_requests_is_the_target() -> None:
    policy = SloChunk()
    replica = served(policy, [])
    for i, tpot_s in enumerate((0.2, nan, 0.05)):
        one = request(i, 0.0, 5, slo_tpot_s=tpot_s)
        one.computed_tokens, one.generated_tokens = 10, 1
        replica.batch.add(one)
    assert policy.target_s(replica) == 0.05
    assert SloChunk(tpot_ms=80.0).target_s(replica) == 0.08


# ---- composition ---------------------------------------------------------------------------------------------------

ORDERS: dict[str, Callable[[str], Any]] = {
    "fcfs": lambda base: load_scheduler("fcfs", {"base": base}),
    "priority": lambda base: load_scheduler("priority", {"base": base, "classes": "a,b,c"}),
    "sjf": lambda base: load_scheduler("sjf", {"base": base}),
    "sjf guarded": lambda base: load_scheduler("sjf", {"base": base, "starvation_iterations": 30}),
    "srtf": lambda base: load_scheduler("srtf", {"base": base}),
    "srtf recompute": lambda base: load_scheduler("srtf", {"base": base, "when_full": "recompute"}),
    "srtf guarded": lambda base: load_scheduler(
        "srtf", {"base": base, "starvation_iterations": 40, "quantum_iterations": 9}
    ),
    "mlfq": lambda base: load_scheduler("mlfq", {"base": base, "starvation_s": 1.0}),
    "mlfq swap": lambda base: load_scheduler("mlfq", {"base": base, "when_full": "swap"}),
    "edf": lambda base: load_scheduler("edf", {"base": base}),
    "edf shed": lambda base: load_scheduler("edf", {"base": base, "shed": True}),
    "least-slack": lambda base: load_scheduler("least-slack", {"base": base, "shed": True}),
    "vtc": lambda base: load_scheduler("vtc", {"base": base}),
    "slo-chunk": lambda base: load_scheduler("slo-chunk", {"base": base, "tpot_ms": 25.0}),
    "slo-chunk of sjf": lambda base: load_scheduler("slo-chunk", {"base": "sjf", "base_args": {"base": base}}),
}


def mixed_requests(seed: int, count: int = 70, rate: float = 25.0) -> list[Request]:
    random = Random(seed)
    at_s, made = 0.0, []
    for i in range(count):
        at_s += random.expovariate(rate)
        prompt, output = (max(1, int(random.lognormvariate(0.0, 0.8) * mean)) for mean in (200, 60))
        labels = {"tenant": random.choice("xyz"), "slo_class": random.choice("abc"), "priority": random.randrange(3)}
        promised = random.choice([nan, 0.3, 2.0])
        predicted = max(1.0, output * random.lognormvariate(0.0, 0.5))
        made.append(request(i, at_s, output, prompt, slo_ttft_s=promised, predicted_tokens=predicted, **labels))
    return [one for one in made if one.prompt_tokens + one.output_tokens < 140 * BLOCK]


class Unheld(Ordered):
    """Another policy's answers, without its promise that they last."""

    def __init__(self, policy: Any) -> None:
        self.base = policy

    order = property(lambda self: getattr(self.base, "order", None))  # type: ignore[assignment]

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.base.schedule(replica, now_s)
        return None


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(("blocks", "seqs"), [(10_000, 8), (150, 256)], ids=["few slots", "few blocks"])
@pytest.mark.parametrize("name", ORDERS)
def test_hold_is_honest(name: str, blocks: int, seqs: int, asynchronous: bool) -> None:
    cost = SteppedCost(HOSTS["vllm"], Graphs.of_engine(256, 512), 1.0)
    outcomes = []
    for wrap in (lambda policy: policy, Unheld):
        jobs = mixed_requests(3)
        swap = Swap(500, 2e-4) if "swap" in name else None
        policy = wrap(ORDERS[name]("vllm"))
        replica = served(
            policy, jobs, cost, seqs=seqs, blocks=blocks, budget=512, swap=swap, asynchronous=asynchronous, seed=7
        )
        times = np.array([(r.scheduled_s, r.first_token_s, r.finish_s, r.preempted_s, r.rejected_s) for r in jobs])
        outcomes.append((times, [r.preemptions for r in jobs], len(replica.iterations)))
        assert replica.kv.free_blocks == replica.kv.total_blocks and not replica.running and not replica.waiting.size
    held, asked = outcomes
    np.testing.assert_allclose(held[0], asked[0], rtol=0, atol=1e-9)
    assert held[1] == asked[1]
    assert held[2] < asked[2], "nothing was held: the comparison says nothing"
    answered = ~np.isnan(held[0][:, 2])
    assert (answered | ~np.isnan(held[0][:, 4])).all(), "neither answered nor turned away"


@pytest.mark.parametrize("base", ["chunked", "sarathi", "orca", "vllm-v0", "static", "dynamic"])
@pytest.mark.parametrize("name", ORDERS)
def test_orders_compose_with_the_batching_policies(name: str, base: str) -> None:
    if base in ("static", "dynamic", "orca", "vllm-v0") and name.partition(" ")[0] in ("mlfq", "srtf"):
        with pytest.raises(ValueError, match=f"base={base} cannot be preempted: .* Give another base"):
            ORDERS[name](base)
        return
    cost = SteppedCost(HOSTS["vllm"], Graphs.of_engine(256, 8192), 1.0)
    jobs = mixed_requests(5)
    swap = Swap(500, 2e-4) if "swap" in name else None
    replica = served(ORDERS[name](base), jobs, cost, seqs=16, blocks=400, budget=8192, swap=swap, asynchronous=True)
    assert all(one.finish_s == one.finish_s or one.rejected_s == one.rejected_s for one in jobs)
    assert replica.kv.free_blocks == 400


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("sjf", {"base": "vllm", "base_args": {"policy": "priority"}}, "has an order of its own"),
        ("sjf", {"base": "vtc"}, "base=vtc .* has an order of its own"),
        ("vtc", {"base": "mlfq"}, "base=mlfq .* has an order of its own"),
        ("edf", {"base": "vllm-native"}, "it drives vLLM's own scheduler, which keeps its own queue"),
        ("edf", {"base": "fastest"}, "unknown scheduler 'fastest'"),
        ("edf", {"base_args": 3}, "base_args=3 is no table"),
        ("edf", {"base": "chunked", "base_args": {"colour": 1}}, "unknown argument 'colour'"),
        ("sjf", {"starvation_iterations": -1}, "starvation_iterations=-1 is too small"),
        ("srtf", {"quantum_iterations": 0}, "quantum_iterations=0 is too small"),
        ("srtf", {"when_full": "panic"}, "when_full='panic': give one of auto, recompute, swap, defer"),
        ("mlfq", {"levels": 0}, "levels=0: give 1 to 64"),
        ("mlfq", {"quantum_s": -1.0}, "quantum_s=-1.0 is no time"),
        ("mlfq", {"reserve": 1.0}, "reserve=1.0 is no share"),
        ("vtc", {"w_q": 0.0}, "w_q=0.0 is not a number above 0"),
        ("vtc", {"weights": {"a": -2}}, "weight a=-2 is not a number above 0"),
        ("priority", {"classes": "a,,b"}, "give different names"),
        ("slo-chunk", {"tpot_ms": -5.0}, "tpot_ms=-5.0 is no time"),
        ("slo-chunk", {"step_tokens": 0}, "step_tokens=0 is too small"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load_scheduler(name, arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("per_block_s", "delay_s"), [(1 / 32, 0.0), (0.5, 3.5)], ids=["hidden", "too long to hide"])
def test_swaps_run_beside_the_iteration_before(per_block_s: float, delay_s: float) -> None:
    """9 blocks leave while an iteration of 1 s runs: 0.28 s hide behind it, of 4.5 s the rest is waited for."""
    first_tokens = []
    for seconds in (0.0, per_block_s):
        jobs = [request(0, 0.0, 40, 140), request(1, 3.5, 2, 190)]
        policy = SkipJoinMlfq(when_full="swap", reserve=0.0, quantum_s=1.0)
        served(policy, jobs, seqs=8, blocks=20, swap=Swap(100, seconds), asynchronous=True)
        first_tokens.append(jobs[1].first_token_s)
        assert jobs[0].preemptions >= 1
    assert first_tokens[1] - first_tokens[0] == pytest.approx(delay_s)
