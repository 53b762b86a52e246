"""What is published of SGLang and TensorRT-LLM, found again: cache-aware order, stalls, the price of reserving.

Numbers beside the sources' are in docs/policies/sglang.md and docs/policies/tensorrt-llm.md.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from stepping import Stepped

from llmsim.metrics import Result
from llmsim.radixcache import RadixCache
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.schedulers.sglang import Sglang
from llmsim.simulate import simulate
from llmsim.trace import Trace

ID_TOKENS = 100


def families(groups: int, each: int, shared: int, own: int, output: int, seed: int) -> Trace:
    """Prompts of a few families, shuffled, all sent at once."""
    order = [group for group in range(groups) for _ in range(each)]
    Random(seed).shuffle(order)
    blocks = shared // ID_TOKENS
    ids = [
        tuple(("shared", group, k) if k < blocks else ("own", i, k) for k in range((shared + own) // ID_TOKENS))
        for i, group in enumerate(order)
    ]
    n = len(order)
    lengths = np.full(n, shared + own), np.full(n, output)
    return Trace("families", np.zeros(n), *lengths, block_tokens=ID_TOKENS, block_ids=ids)


def run(trace: Trace, tokens: int, engine: str = "sglang", **settings: Any) -> Result:
    override = {"num_gpu_blocks_override": tokens + 1, "max_model_len": 8192}
    return simulate(trace, Scenario("llama-3.1-8b", "h100-sxm", engine=engine, **(override | settings)))


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
@pytest.mark.parametrize("seed", range(3))
def test_one_at_a_time_a_cache_of_one_request_is_enough_for_the_optimum(policy: str, seed: int) -> None:
    """SGLang, theorem 3.1: in depth-first order each shared token is computed once if the longest request fits."""
    trace = families(groups=6, each=6, shared=600, own=200, output=2, seed=seed)
    steps = Stepped(Sglang(policy), RadixCache(1000, prefix_block_tokens=ID_TOKENS), seqs=1)
    assert trace.block_ids is not None
    for i, ids in enumerate(trace.block_ids):
        steps.add(Request(i, 0.0, 800, 2, 0, ids, 800))
    computed = sum(sum(step.chunks.values()) for step in steps.run())
    assert computed == 6 * 600 + 36 * 200
    assert steps.engine.kv.evicted_blocks > 0


def test_longest_prefix_first_comes_close_to_the_optimal_hit_rate_where_fcfs_does_not() -> None:
    """SGLang, section 6.2: its cache-aware order reaches 96 % of the optimal hit rate on average."""
    trace = families(groups=12, each=10, shared=2000, own=200, output=50, seed=1)
    optimal = 1 - (12 * 2000 + 120 * 200) / int(trace.prompt_tokens.sum())
    share: dict[str, list[float]] = {"fcfs": [], "lpm": []}
    for tokens in (7_000, 10_000, 20_000):
        for policy, found in share.items():
            result = run(trace, tokens, scheduler_args={"schedule_policy": policy})
            found.append(result.summary()["prefix_cache_hit_rate"] / optimal)
    assert np.mean(share["lpm"]) == pytest.approx(0.96, abs=0.02)
    assert np.mean(share["fcfs"]) < 0.5


def longest_gap_s(result: Result) -> float:
    gaps = result.gaps
    return float((gaps["gap_s"] + np.maximum(gaps["growth_s"], 0.0) * (gaps["count"] - 1)).max())


def test_a_long_prompt_stalls_sglangs_decodes_for_all_of_its_chunks_and_vllms_for_none() -> None:
    """Iterations of 10 ms: 8 chunks of 4,000 tokens between two tokens, or beside them."""
    prompt = np.array([100, 32_000])
    trace = Trace("one long", np.array([0.0, 0.5]), prompt, np.array([200, 2]))
    settings: dict[str, Any] = {"cost": "constant:0.01", "num_gpu_blocks_override": None, "max_model_len": 40_000}
    gaps = {
        name: longest_gap_s(run(trace, 0, max_num_batched_tokens=4000, **(settings | more)))
        for name, more in {
            "vllm": {"engine": "vllm"},
            "sglang": {},
            "mixed": {"scheduler_args": {"enable_mixed_chunk": True}},
            "interval": {"scheduler_args": {"prefill_decode_interval": 1}},
        }.items()
    }
    assert gaps["vllm"] == pytest.approx(0.01)
    assert gaps["sglang"] == pytest.approx(0.09)
    assert gaps["mixed"] == pytest.approx(0.01)
    assert gaps["interval"] == pytest.approx(0.02)


def test_reserving_to_the_end_costs_throughput_and_pausing_costs_pauses() -> None:
    """TensorRT-LLM's documentation: MAX_UTILIZATION for throughput, at the risk of pausing requests."""
    random = np.random.default_rng(0)
    n = 600
    trace = Trace("chat", np.zeros(n), random.integers(100, 900, n), random.integers(50, 500, n))
    throughput, paused = {}, {}
    for capacity in ("guaranteed_no_evict", "max_utilization"):
        arguments = {"capacity_scheduler_policy": capacity, "max_new_tokens": 1024, "enable_chunked_prefill": True}
        result = run(trace, 1000, "tensorrt-llm", scheduler_args=arguments)
        throughput[capacity] = result.summary()["output_throughput"]
        paused[capacity] = result.summary()["num_preemptions"]
    assert paused["guaranteed_no_evict"] == 0 < paused["max_utilization"]
    assert throughput["max_utilization"] > 1.1 * throughput["guaranteed_no_evict"]
