"""The replica's loop: times of one request by hand, what policies may not do, and what holding may not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simpy
from test_twin import HOSTS, SteppedCost, gaps_of

from llmsim.cost import EAGER, FULL, Host, LaunchNoise, Ramp
from llmsim.cost.graphs import Graphs
from llmsim.engine import Engine
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.schedulers import HOLD, load_scheduler
from llmsim.schedulers.chunked import Chunked
from llmsim.schedulers.dynamic import DynamicBatching
from llmsim.schedulers.orca import Orca
from llmsim.schedulers.sarathi import Sarathi
from llmsim.schedulers.static import StaticBatching
from llmsim.schedulers.vllm import VllmScheduler
from llmsim.schedulers.vllm_v0 import VllmV0

ROUNDING_S = 1e-9  # sums of series in another order of additions


def served(
    policy: Any,
    requests: Iterable[Request],
    cost: Any,
    *,
    blocks: int = 10_000,
    seqs: int = 256,
    budget: int = 8192,
    asynchronous: bool = True,
    seed: int | None = None,
    swap: Swap | None = None,
) -> Replica:
    noise = None if seed is None else LaunchNoise(cost.host, seed)
    env = simpy.Environment()
    kv, limits = KVCache(blocks, 16), Limits(seqs, budget)
    replica = Replica(env, policy, cost, kv, limits, asynchronous=asynchronous, noise=noise, swap=swap)
    replica.start(iter(requests))
    env.run()
    return replica


# ---- one request by hand -------------------------------------------------------------------------------------------


class HandCost:
    """A prompt runs 50 ms, launched kernel by kernel; a decode 10 ms, launched as one graph."""

    kind = label = "test"

    def __init__(self, host: Host) -> None:
        self.host = host

    def mode(self, tokens: int, chunks: int) -> int:
        return EAGER if chunks else FULL

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        return Ramp(0.010, 0.0)

    def mixed_s(self, chunks: Any, seqs: int, kv_tokens: int) -> float:
        return 0.050


HOST = Host(
    schedule_s=1e-3, schedule_per_request_s=0.1e-3, schedule_per_token_s=0.01e-3, launch_s=(2e-3, 5e-3, 9e-3),
    launch_per_request_s=(0.2e-3, 0.3e-3, 0.4e-3), update_s=0.5e-3, update_per_output_s=0.05e-3,
    lead_s=(0.7e-3, 0.8e-3, 0.9e-3), tail_s=(0.1e-3, 0.2e-3, 0.3e-3), receive_busy_s=3e-3, receive_per_token_s=0.02e-3,
    receive_s=2e-3, respond_s=4e-3, respond_per_output_s=0.03e-3,
)  # fmt: skip
SCHEDULABLE_MS = 1000 + (3 + 0.02 * 100) + 2  # sent at 1 s: passes in, per token of 100, and is announced
PREFILL_LAUNCH_MS = SCHEDULABLE_MS + 1 + 0.1 * 1 + 0.01 * 100  # x0(0): schedule, per running request, per prompt token
PREFILL_LAUNCHED_MS = PREFILL_LAUNCH_MS + 9 + 0.4  # L(0)
PREFILL_END_MS = PREFILL_LAUNCH_MS + 0.9 + 50  # E(0): lead, then the GPU
SEEN_MS = 4 + 0.03  # from the update's begin to the client
UPDATE_MS = 0.5 + 0.05
DECODE_SCHEDULE_MS = 1 + 0.1


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_one_request_by_hand(asynchronous: bool) -> None:
    request = Request(0, 1.0, 100, 3)
    replica = served(VllmScheduler(), [request], HandCost(HOST), asynchronous=asynchronous)
    if asynchronous:  # both decodes are scheduled before the token they follow is known
        first_end_ms = PREFILL_END_MS + 10  # E(1): launched long before, right behind the prefill
        second_end_ms = first_end_ms + 10  # E(2)
    else:
        first_end_ms = PREFILL_END_MS + UPDATE_MS + DECODE_SCHEDULE_MS + 0.7 + 10
        second_end_ms = first_end_ms + UPDATE_MS + DECODE_SCHEDULE_MS + 0.7 + 10
    assert request.scheduled_s * 1e3 == pytest.approx(SCHEDULABLE_MS)
    assert request.first_token_s * 1e3 == pytest.approx(PREFILL_END_MS + SEEN_MS)
    assert request.finish_s * 1e3 == pytest.approx(second_end_ms + SEEN_MS)
    assert gaps_of(replica) * 1e3 == pytest.approx([first_end_ms - PREFILL_END_MS, second_end_ms - first_end_ms])


def test_a_slow_launch_ends_after_the_gpu_could() -> None:
    """Launch-bound: the GPU's 50 ms hide in a launch of 80 ms, which ends the step with its tail."""
    host = Host(launch_s=(0.0, 0.0, 80e-3), lead_s=(0.0, 0.0, 1e-3), tail_s=(0.0, 0.0, 5e-3))
    request = Request(0, 0.0, 100, 1)
    served(VllmScheduler(), [request], HandCost(host))
    assert request.finish_s == pytest.approx(85e-3)


def test_an_arrival_during_a_launch_slows_it() -> None:
    """80 ms of launch from 0; a prompt of 200 tokens becomes schedulable at 30 ms: 200 x 10 us more."""
    host = Host(launch_s=(0.0, 0.0, 80e-3), interference_per_token_s=10e-6)
    first, second = Request(0, 0.0, 100, 1), Request(1, 30e-3, 200, 1)
    served(VllmScheduler(), [first, second], HandCost(host), asynchronous=False)
    assert first.finish_s == pytest.approx(82e-3)
    assert second.scheduled_s == pytest.approx(82e-3)


@pytest.mark.parametrize(("launch_ms", "slowed_ms"), [(30, 2), (5, 0)])
@pytest.mark.parametrize("ready_ms", [55.5, 115.5])
def test_an_arrival_slows_a_full_graph_that_sets_the_pace(launch_ms: int, slowed_ms: int, ready_ms: float) -> None:
    """Decodes of 10 ms; 30 ms to launch one are its pace, 5 ms hide. A prompt of 200 tokens: 200 x 10 us more."""
    host = Host(launch_s=(launch_ms * 1e-3, 0.0, 0.0), interference_per_token_s=10e-6)
    scheduled_s = []
    for tokens in (1, 200):
        others = [Request(1, ready_ms * 1e-3, tokens, 1)]
        served(VllmScheduler(), [Request(0, 0.0, 100, 10), *others], HandCost(host))
        scheduled_s.append(others[0].scheduled_s)
    assert 1e3 * (scheduled_s[1] - scheduled_s[0]) == pytest.approx(slowed_ms * 199 / 200, abs=1e-6)


def test_a_request_that_arrives_during_step_k_joins_step_k_plus_2() -> None:
    """Asynchronous scheduling has scheduled step k+1 already."""
    first, second = Request(0, 0.0, 100, 9), Request(1, 0.065, 100, 1)  # in the second decode: 60 to 70 ms
    served(VllmScheduler(), [first, second], HandCost(Host()))
    assert second.scheduled_s == pytest.approx(0.070)
    assert second.finish_s == pytest.approx(0.080 + 0.050)
    first, second = Request(0, 0.0, 100, 9), Request(1, 0.065, 100, 1)
    served(VllmScheduler(), [first, second], HandCost(Host()), asynchronous=False)
    assert second.finish_s == pytest.approx(0.070 + 0.050)


# ---- what policies may not do --------------------------------------------------------------------------------------


class Rule:
    """A policy made of one function."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act = act

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.act(replica)
        return None


def decode_twice(replica: Any) -> None:
    if replica.batch:
        replica.decode()
        replica.decode()
    replica.prefill(replica.waiting.head, 100)


def too_many_tokens(replica: Any) -> None:
    replica.prefill(replica.waiting.head, 101)


def too_many_of_the_rest(replica: Any) -> None:
    request = next(iter(replica.prefilling), None)
    if request is None:
        replica.prefill(replica.waiting.head, 60)
    else:
        replica.prefill(request, 41)


def no_tokens(replica: Any) -> None:
    replica.prefill(replica.waiting.head, 0)


def too_many_requests(replica: Any) -> None:
    for request in replica.waiting:
        replica.prefill(request, 10)


def preempt_a_waiting_one(replica: Any) -> None:
    replica.preempt(replica.waiting.head)


def a_stranger(replica: Any) -> None:
    replica.prefill(Request(9, 0.0, 100, 5), 100)


def beyond_the_budget(replica: Any) -> None:
    for request in list(replica.waiting)[:2]:
        replica.prefill(request, 100)


def prefilled(replica: Any) -> Request | None:
    """The oldest decoding request; first its prompt."""
    if not replica.batch and replica.waiting:
        replica.prefill(replica.waiting.head, 100)
    return next(iter(replica.batch), None)


def decode_a_waiting_one(replica: Any) -> None:
    if prefilled(replica):
        replica.decode_one(replica.waiting.head)


def decode_one_twice(replica: Any) -> None:
    if request := prefilled(replica):
        replica.decode_one(request)
        replica.decode_one(request)


def decode_all_and_one(replica: Any) -> None:
    if request := prefilled(replica):
        replica.decode()
        replica.decode_one(request)


def decode_one_and_stop(replica: Any) -> None:
    if request := prefilled(replica):
        replica.decode_one(request)


def nothing(replica: Any) -> None:
    pass


BROKEN_RULES = {
    "Rule called decode() twice for one iteration.": decode_twice,
    "Rule asked to prefill 101 tokens of request 0, which has 100 left.": too_many_tokens,
    "Rule asked to prefill 41 tokens of request 0, which has 40 left.": too_many_of_the_rest,
    "Rule asked to prefill 0 tokens of request 0, which has 100 left.": no_tokens,
    "Rule admitted request 2 beyond max_num_seqs=2.": too_many_requests,
    "Rule preempted request 0, which is not running.": preempt_a_waiting_one,
    "Rule asked to prefill request 9, which is neither waiting nor running.": a_stranger,
    "Rule scheduled 200 tokens in one iteration, beyond max_num_batched_tokens=150.": beyond_the_budget,
    "Rule asked to decode request 1, which is not decoding.": decode_a_waiting_one,
    "Rule asked to decode request 0, which makes a token in this iteration already.": decode_one_twice,
    "Rule asked to decode request 0 after decode() in the same iteration.": decode_all_and_one,
    "Rule ended its answer without pause_others() after decode_one().": decode_one_and_stop,
    "Rule schedules nothing although 3 requests wait and 0 hold slots; the first is request 0, which needs 7 KV blocks"
    " of the 10000 free.": nothing,
}


@pytest.mark.parametrize("sentence", BROKEN_RULES)
def test_a_policy_that_breaks_a_rule_is_named(sentence: str) -> None:
    requests = [Request(i, 0.0, 100, 5) for i in range(3)]
    with pytest.raises(PolicyError) as error:
        served(Rule(BROKEN_RULES[sentence]), requests, HandCost(Host()), seqs=2, budget=150)
    assert str(error.value) == sentence


def test_decoding_without_a_free_block_is_an_error() -> None:
    def decode_regardless(replica: Any) -> None:
        if request := prefilled(replica):
            replica.decode_one(request)
            replica.pause_others()

    class Borrowed(Rule):
        def schedule(self, replica: Any, now_s: float) -> bool | None:
            replica.kv.take(replica.kv.free_blocks if replica.batch else 0)
            return super().schedule(replica, now_s)

    with pytest.raises(PolicyError, match="request 0, which needs a KV block, with none free"):
        served(Borrowed(decode_regardless), [Request(0, 0.0, 100, 30)], HandCost(Host()), blocks=20)


def test_prefill_without_room_is_answered_not_raised() -> None:
    answers: list[bool] = []

    def greedy(replica: Any) -> None:
        if replica.batch:
            replica.decode()
        for request in replica.waiting:
            answers.append(replica.prefill(request, request.prefill_tokens))

    requests = [Request(i, 0.0, 100, 2) for i in range(2)]
    served(Rule(greedy), requests, HandCost(Host()), blocks=10)
    assert answers[:2] == [True, False]  # 7 blocks each
    assert answers[-1]
    assert [request.finish_s > 0 for request in requests] == [True, True]


def test_cached_blocks_that_nobody_holds_count_as_needed() -> None:
    """Taking them from the free list leaves less room: 8 blocks wanted, 6 of them cached, 7 free."""
    kv = KVCache(10, 16, prefix_block_tokens=16)
    engine = Engine(Rule(nothing), kv, Limits(8, 8192))
    ids = tuple(range(8))
    first = Request(0, 0.0, 97, 1, prefix_ids=ids, identity_tokens=97)
    kv.admit(first, kv.match(first, 97), 97)
    kv.release(first, 7, 97)
    kv.take(3)
    second = Request(1, 0.0, 128, 1, prefix_ids=ids, identity_tokens=128)
    engine.waiting.append(second)
    hit = engine.look_up(second)
    assert (hit.blocks, hit.idle_blocks, kv.free_blocks) == (6, 6, 7)
    assert not engine.prefill(second, 32, hit)
    assert engine.prefill(second, 16, hit)
    assert kv.free_blocks == 0


# ---- a policy in the user's own file -------------------------------------------------------------------------------

ONE_AT_A_TIME = '''
"""Prefill one prompt at a time, whole, while the others decode."""

class OneAtATime:
    def __init__(self, most=4):
        self.most = most

    def schedule(self, replica, now_s):
        replica.decode()
        if replica.waiting and len(replica.running) < self.most:
            request = replica.waiting.head
            replica.prefill(request, request.prefill_tokens - replica.look_up(request).blocks * 16)

class Settings:
    pass

class Strict:
    def __init__(self, limit):
        self.limit = limit

    def schedule(self, replica, now_s):
        pass
'''


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_policy.py"
    path.write_text(ONE_AT_A_TIME)
    return path


def test_a_policy_in_the_users_file_serves_requests(policy_file: Path) -> None:
    policy = load_scheduler(f"{policy_file}:OneAtATime", {"most": 2})
    requests = [Request(i, 0.0, 100, 10) for i in range(4)]
    replica = served(policy, requests, HandCost(Host()), asynchronous=False)
    assert all(request.finish_s > 0 for request in requests)
    log = replica.iterations.table()
    assert log["prefill_requests"].max() == 1
    assert log["running"].max() == 2


@pytest.mark.parametrize(
    ("spec", "arguments", "kind", "sentence"),
    [
        ("fastest", {}, ValueError, "unknown scheduler 'fastest'. Built-in: vllm, "),
        ("{file}:Mine", {}, ValueError, "no class Mine in {file}. Classes with schedule(): OneAtATime, Strict."),
        ("{folder}/nowhere.py:Mine", {}, FileNotFoundError, "no file {folder}/nowhere.py in "),
        ("{file}:Settings", {}, ValueError, "class Settings has no method schedule(self, replica, now_s). Add it."),
        ("{file}:OneAtATime", {"least": 1}, ValueError, "unknown argument 'least'. Valid arguments: most."),
        ("{file}:Strict", {}, ValueError, "argument 'limit' has no default. Give it a value."),
        ("chunked", {"headroom": 1.5}, ValueError, "headroom=1.5 is not a fraction"),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_explained(
    spec: str, arguments: dict[str, Any], kind: type[Exception], sentence: str, policy_file: Path
) -> None:
    places = {"file": str(policy_file), "folder": str(policy_file.parent)}
    with pytest.raises(kind) as error:
        load_scheduler(spec.format(**places), arguments)
    assert sentence.format(**places) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_inside_the_users_file_surfaces_untouched(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError('mine')\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        load_scheduler(f"{tmp_path}/broken.py:Mine")


# ---- holding changes nothing ---------------------------------------------------------------------------------------


class AskedEveryTime:
    """Another policy's answers, without its promise that they last."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        for name in ("order", "victim", "streams", "arrived", "ended", "token_limit"):
            if hasattr(policy, name):
                setattr(self, name, getattr(policy, name))

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.policy.schedule(replica, now_s)
        return None


def tokens_are_seen_when_iterations_end(
    replica: Replica, requests: list[Request], tokens: Iterable[Iterable[Request]]
) -> None:
    """`tokens`: who made one in each iteration. The host takes no time; all blocks are back in the end."""
    ends_s = replica.iterations.table()["gpu_end_s"]
    token_s: dict[Request, list[float]] = {request: [] for request in requests}
    for end_s, makers in zip(ends_s, tokens, strict=True):
        for request in makers:
            token_s[request].append(float(end_s))
    for request in requests:
        assert len(token_s[request]) == request.output_tokens
        assert request.first_token_s == pytest.approx(token_s[request][0], abs=ROUNDING_S)
        assert request.finish_s == pytest.approx(token_s[request][-1], abs=ROUNDING_S)
    expected = np.sort(np.concatenate([np.diff(times) for times in token_s.values()]))
    np.testing.assert_allclose(gaps_of(replica), expected, rtol=0, atol=2 * ROUNDING_S)
    assert replica.kv.free_blocks == replica.kv.total_blocks


def some_requests(seed: int, count: int = 80, rate: float = 25.0, prompt: int = 200, output: int = 60) -> list[Request]:
    random = Random(seed)
    at_s, requests = 0.0, []
    for i in range(count):
        at_s += random.expovariate(rate)
        lengths = (max(1, int(random.lognormvariate(0.0, 0.8) * mean)) for mean in (prompt, output))
        requests.append(Request(i, at_s, *lengths, random.randrange(3)))
    return requests


POLICIES: dict[str, Callable[[], Any]] = {
    "vllm": VllmScheduler,
    "vllm priority": lambda: VllmScheduler(policy="priority"),
    "chunked": Chunked,
    "chunked without headroom": lambda: Chunked(headroom=0.0),
    "vllm v0": VllmV0,
    "vllm v0 swap": lambda: VllmV0(preemption="swap"),
    "sarathi": lambda: Sarathi(token_budget=64),
}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("blocks", [10_000, 150], ids=["ample", "tight"])
@pytest.mark.parametrize("host", [name for name in HOSTS if name != "slow worker"])  # has no closed form
@pytest.mark.parametrize("policy", POLICIES)
def test_hold_is_honest(policy: str, host: str, blocks: int, asynchronous: bool) -> None:
    cost = SteppedCost(HOSTS[host], Graphs.of_engine(256, 512), 1.0)
    outcomes = []
    for made in (POLICIES[policy](), AskedEveryTime(POLICIES[policy]())):
        requests = [r for r in some_requests(3) if r.prompt_tokens + r.output_tokens < 140 * 16]
        settings: dict[str, Any] = {"asynchronous": asynchronous, "seed": 7, "swap": Swap(60, 1e-4)}
        replica = served(made, requests, cost, blocks=blocks, budget=512, **settings)
        times = np.array([(r.scheduled_s, r.first_token_s, r.finish_s, r.preempted_s) for r in requests])
        outcomes.append((times, [r.preemptions for r in requests], gaps_of(replica), len(replica.iterations)))
    held, asked = outcomes
    np.testing.assert_allclose(held[0], asked[0], rtol=0, atol=ROUNDING_S)
    assert held[1] == asked[1]
    np.testing.assert_allclose(held[2], asked[2], rtol=0, atol=2 * ROUNDING_S)
    assert held[3] < asked[3], "nothing was held: the comparison says nothing"
    assert bool(sum(held[1])) == (blocks == 150)


RESERVING: dict[str, Callable[[], Any]] = {  # they never preempt
    "orca": Orca,
    "orca pow2": lambda: Orca(reserve="pow2"),
    "static": lambda: StaticBatching(batch_size=6, timeout_s=0.2),
    "static streamed": lambda: StaticBatching(batch_size=6, timeout_s=0.0, stream=True),
    "dynamic": lambda: DynamicBatching(batch_size=8, timeout_s=0.1, preferred_batch_sizes="2,4"),
}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("blocks", [10_000, 150], ids=["ample", "tight"])
@pytest.mark.parametrize("host", [name for name in HOSTS if name != "slow worker"])
@pytest.mark.parametrize("policy", RESERVING)
def test_hold_is_honest_where_memory_is_reserved(policy: str, host: str, blocks: int, asynchronous: bool) -> None:
    cost = SteppedCost(HOSTS[host], Graphs.of_engine(256, 512), 1.0)
    outcomes = []
    for made in (RESERVING[policy](), AskedEveryTime(RESERVING[policy]())):
        requests = [r for r in some_requests(3) if r.prompt_tokens + r.output_tokens < 140 * 16]
        replica = served(made, requests, cost, blocks=blocks, budget=512, asynchronous=asynchronous, seed=7)
        times = np.array([(r.scheduled_s, r.first_token_s, r.finish_s) for r in requests])
        assert replica.preemptions == 0
        assert not replica.unanswered()
        assert replica.kv.free_blocks == replica.kv.total_blocks
        outcomes.append((times, gaps_of(replica), len(replica.iterations)))
    held, asked = outcomes
    np.testing.assert_allclose(held[0], asked[0], rtol=0, atol=ROUNDING_S)
    np.testing.assert_allclose(held[1], asked[1], rtol=0, atol=2 * ROUNDING_S)
    assert held[2] < asked[2], "nothing was held: the comparison says nothing"


def test_a_head_that_waits_for_an_answer_being_generated_is_admitted_when_it_can_be() -> None:
    """The second prompt repeats the first one's answer, 20 blocks of prompt and 20 of answer in a cache of 40.

    When it arrives the first has begun its block 21: 20 are found, 20 needed, 19 free. When that block is full, after
    16 decodes, 21 are found and 19 needed.
    """
    outcomes = []
    for policy in (VllmScheduler(), AskedEveryTime(VllmScheduler())):
        ids = tuple(range(40))
        first = Request(0, 0.0, 320, 320, prefix_ids=ids, identity_tokens=640)
        second = Request(1, 0.055, 640, 1, prefix_ids=ids, identity_tokens=640)
        env = simpy.Environment()
        kv, limits = KVCache(40, 16, prefix_block_tokens=16), Limits(8, 8192)
        replica = Replica(env, policy, HandCost(Host()), kv, limits, asynchronous=False)
        replica.start(iter([first, second]))
        env.run()
        assert second.cached_tokens == 336
        assert second.scheduled_s == pytest.approx(0.050 + 15 * 0.010)  # with the sixteenth decode
        outcomes.append((first.finish_s, second.finish_s))
    assert outcomes[0] == pytest.approx(outcomes[1], abs=ROUNDING_S)


# ---- gaps of policies that pause, preempt and prefill alone --------------------------------------------------------


class Recorded:
    """Keeps who gets a token in each iteration, as the policy itself sees it."""

    def __init__(self) -> None:
        self.tokens: list[list[Request]] = []

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        decoding = self.decide(replica)
        if decoding or replica.chunks:
            firsts = [r for r, tokens, before in replica.chunks if before + tokens == r.prefill_tokens]
            self.tokens.append(decoding + firsts)
        return None

    def decide(self, replica: Any) -> list[Request]:
        raise NotImplementedError  # each rule below is a subclass with its own


def admit(replica: Any, most: int) -> None:
    for request in replica.waiting:
        if len(replica.running) >= most:
            break
        replica.prefill(request, request.prefill_tokens - 16 * replica.look_up(request).blocks)


class PrefillFirst(Recorded):
    """Nobody decodes while prompts wait."""

    def decide(self, replica: Any) -> list[Request]:
        admit(replica, 12)
        if replica.chunks:
            return []
        replica.decode()
        return list(replica.batch)


class Fickle(Recorded):
    """Decodes some, pauses the others, and now and then preempts one: a different choice every iteration."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)

    def decide(self, replica: Any) -> list[Request]:
        random = self.random
        if replica.batch and random.random() < 0.05:
            replica.preempt(random.choice(list(replica.batch)))
        members = list(replica.batch)
        if random.random() < 0.5:
            replica.decode()
            decoding = members
        else:
            decoding = [request for request in members if random.random() < 0.6] or members[:1]
            for request in decoding:
                replica.decode_one(request)
            replica.pause_others()
        if random.random() < 0.5 or not decoding:
            admit(replica, 10)
        return decoding


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("made", [PrefillFirst, lambda: Fickle(1), lambda: Fickle(2)], ids=["prefill first", "a", "b"])
def test_gaps_are_those_of_each_request(made: Callable[[], Recorded], asynchronous: bool) -> None:
    """The host takes no time here, so a token is seen when its iteration ends on the GPU."""
    policy = made()
    requests = some_requests(5, count=60, output=30)
    cost = SteppedCost(Host(), Graphs.of_engine(256, 8192), 1.0)
    replica = served(policy, requests, cost, asynchronous=asynchronous)
    tokens_are_seen_when_iterations_end(replica, requests, policy.tokens)


def test_hold_is_exported_for_policies() -> None:
    import llmsim

    assert llmsim.HOLD is HOLD is True


def test_requests_that_take_each_others_blocks_for_ever_are_an_error() -> None:
    policy = VllmScheduler(policy="priority", long_prefill_token_threshold=12, reserve_full_isl=False)
    kv = KVCache(19, 16, prefix_caching=False)
    env = simpy.Environment()
    replica = Replica(env, policy, SteppedCost(HOSTS["none"], Graphs.of_engine(2, 128), 1.0), kv, Limits(2, 128))
    with pytest.raises(PolicyError, match=r"without a token in between.*reserve_full_isl"):
        replica.start(iter([Request(0, 0.0, 209, 20), Request(1, 0.0, 209, 20)]))
