"""SGLang's and TensorRT-LLM's policies on the clocks: holding changes nothing, everybody is served, nothing is lost."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import simpy
from test_twin import HOSTS, SteppedCost

from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.radixcache import RadixCache
from llmsim.replica import Limits, Replica
from llmsim.request import Request
from llmsim.schedulers import load_scheduler

ROUNDING_S = 1e-9
ID_TOKENS = 64

POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("sglang", {}),
    ("sglang", {"schedule_conservativeness": 0.1}),
    ("sglang", {"schedule_policy": "lpm", "prefill_decode_interval": 3}),
    ("sglang", {"schedule_policy": "dfs-weight", "enable_mixed_chunk": True, "schedule_conservativeness": 0.1}),
    ("sglang", {"schedule_policy": "hrrn", "max_new_tokens": 300}),
    ("sglang", {"schedule_policy": "random", "chunked_prefill_size": 100}),
    ("sglang", {"schedule_policy": "shortest-prefill-first", "chunked_prefill_size": -1}),
    ("sglang", {"enable_priority_scheduling": True, "priority_scheduling_preemption_threshold": 0}),
    ("tensorrt-llm", {}),
    ("tensorrt-llm", {"enable_chunked_prefill": True, "context_chunking_policy": "equal_progress"}),
    ("tensorrt-llm", {"capacity_scheduler_policy": "max_utilization", "enable_chunked_prefill": True}),
    ("tensorrt-llm", {"capacity_scheduler_policy": "max_utilization"}),
    ("tensorrt-llm", {"capacity_scheduler_policy": "static_batch"}),
    ("tensorrt-llm", {"capacity_scheduler_policy": "prefill_first", "enable_chunked_prefill": True}),
]


def requests_of(seed: int, n: int, rate: float, typical_tokens: int) -> list[Request]:
    """Families with common beginnings; half of the answers are named too."""
    random = Random(seed)
    at_s, made = 0.0, []
    for i in range(n):
        at_s += random.expovariate(rate) if random.random() < 0.8 else 0.0
        prompt = min(600, max(1, int(random.lognormvariate(0.0, 0.8) * typical_tokens)))
        output = max(1, int(random.lognormvariate(0.0, 0.8) * typical_tokens / 2))
        named = prompt + output * random.randrange(2)
        ids, family = -(-named // ID_TOKENS), random.randrange(4)
        common = random.randrange(ids + 1)
        names = tuple((family, k) if k < common else (i, k) for k in range(ids))
        request = Request(i, at_s, prompt, output, random.randrange(3), names, named)
        made.append(request)
    return made


def served(
    name: str, arguments: dict[str, Any], requests: list[Request], tokens: int, *, page: int, asynchronous: bool,
    holds: bool = True, radix: bool = True,
) -> Replica:  # fmt: skip
    policy = load_scheduler(name, arguments)
    if not holds:
        answer = policy.schedule

        def restless(replica: Replica, now_s: float) -> None:
            answer(replica, now_s)

        policy.schedule = restless
    cache = RadixCache if radix else KVCache
    kv = cache(tokens // page, page, prefix_block_tokens=ID_TOKENS)
    cost = SteppedCost(HOSTS["vllm"], Graphs.of_engine(32, 700), 1.0)
    env = simpy.Environment()
    replica = Replica(env, policy, cost, kv, Limits(32, 700), asynchronous=asynchronous)
    replica.start(iter(requests))
    env.run()
    return replica


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("tokens", [1500, 20_000], ids=["tight", "ample"])
@pytest.mark.parametrize(("name", "arguments"), POLICIES, ids=str)
def test_holding_changes_nothing_and_everybody_is_served(
    name: str, arguments: dict[str, Any], tokens: int, asynchronous: bool
) -> None:
    radix = name == "sglang"
    page = 1 if radix else 16
    made = [requests_of(7, 80, 12.0, 120) for _ in range(2)]
    replicas = [
        served(name, arguments, requests, tokens, page=page, asynchronous=asynchronous, holds=holds, radix=radix)
        for requests, holds in zip(made, (True, False), strict=True)
    ]
    held, restless = replicas
    assert held.preemptions == restless.preemptions
    assert held.hit_tokens == restless.hit_tokens
    assert len(held.iterations) < len(restless.iterations)
    for one, other in zip(*made, strict=True):
        assert (one.rejected_s == one.rejected_s) == (other.rejected_s == other.rejected_s)
        if one.rejected_s == one.rejected_s:
            continue
        assert one.generated_tokens == one.output_tokens
        for name_s in ("scheduled_s", "first_token_s", "finish_s"):
            assert getattr(one, name_s) == pytest.approx(getattr(other, name_s), abs=ROUNDING_S), (one.id, name_s)
    for replica in replicas:
        assert replica.kv.free_blocks == replica.kv.total_blocks
        assert not replica.running
        assert not replica.waiting


@pytest.mark.parametrize("scheduler", ["vllm", "chunked", "tensorrt-llm"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_other_policies_run_on_the_radix_cache(scheduler: str, asynchronous: bool) -> None:
    made = [requests_of(3, 60, 12.0, 120) for _ in range(2)]
    both = [
        served(scheduler, {}, requests, 3000, page=1, asynchronous=asynchronous, holds=holds)
        for requests, holds in zip(made, (True, False), strict=True)
    ]
    for one, other in zip(*made, strict=True):
        assert one.finish_s == pytest.approx(other.finish_s, abs=ROUNDING_S)
    assert both[0].hit_tokens == both[1].hit_tokens > 0
    assert both[0].kv.free_blocks == 3000


def test_the_cases_above_retract_pause_and_evict() -> None:
    """Their agreement says something only if these happen."""
    for name, arguments in (POLICIES[1], POLICIES[10]):
        radix = name == "sglang"
        replica = served(
            name, arguments, requests_of(7, 80, 12.0, 120), 1500, page=1 if radix else 16, asynchronous=True,
            radix=radix,
        )  # fmt: skip
        assert replica.preemptions > 0
        assert replica.kv.evicted_blocks > 0
        assert replica.hit_tokens > 0
