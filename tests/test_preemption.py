"""What the policy vllm does with a request that finds no block: recompute, swap, pause; by hand and under load."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmsim.cost.constant import ConstantCost
from llmsim.cost.graphs import Graphs
from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet
from llmsim.trace import Trace

KINDS = ("recompute", "swap", "pause")


def scenario(preemption: str, **changes: Any) -> Scenario:
    plain: dict[str, Any] = {
        "model": "llama-3.1-8b", "gpu": "h100-sxm", "enable_prefix_caching": False, "launch_jitter": False,
        "preemption": preemption, "swap_space_gib": 16.0 if preemption == "swap" else 0.0,
    }  # fmt: skip
    return Scenario(**plain | changes)


def replayed(trace: Trace, setting: Scenario, cost: Any = None) -> tuple[Result, Fleet]:
    fleet = Fleet(trace, setting, cost=cost)
    return fleet.run(), fleet


@pytest.fixture(scope="module")
def crowded() -> dict[str, tuple[Result, Fleet]]:
    """200 requests in 1,200 blocks, where about 900 tokens each want 60: far more than fit."""
    random = np.random.default_rng(1)
    at_s = np.cumsum(random.exponential(1 / 20, 200))
    trace = Trace("crowded", at_s - at_s[0], random.integers(10, 1000, 200), random.integers(50, 900, 200))
    return {kind: replayed(trace, scenario(kind, num_gpu_blocks_override=1201)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_is_served_and_every_block_comes_back(kind: str, crowded: dict[str, tuple[Result, Fleet]]) -> None:
    result, fleet = crowded[kind]
    (replica,) = fleet.replicas
    assert np.isfinite(result.requests["finish_s"]).all()
    assert replica.kv.free_blocks == replica.kv.total_blocks
    assert not replica.paused
    assert result.iterations["kv_blocks"].max() > 1190
    if replica.swap is not None:
        assert replica.swap.free_blocks == replica.swap.blocks


def computed_tokens(result: Result) -> int:
    return int(result.iterations["prefill_tokens"].sum())


def test_only_recompute_computes_twice(crowded: dict[str, tuple[Result, Fleet]]) -> None:
    prompts = int(crowded["swap"][0].requests["prompt_tokens"].sum())
    extra = {kind: computed_tokens(result) / prompts - 1.0 for kind, (result, _) in crowded.items()}
    preempted = {kind: fleet.replicas[0].preemptions for kind, (_, fleet) in crowded.items()}
    assert preempted["recompute"] > 30
    assert extra["recompute"] > 0.1
    assert preempted["swap"] > 30
    assert extra["swap"] == pytest.approx(0.0, abs=1e-3)  # but for tails of one token, which are decodes
    swap = crowded["swap"][1].replicas[0].swap
    assert swap is not None
    assert swap.copied_in_blocks == swap.copied_out_blocks > 1000


def test_pausing_gives_up_less_than_it_would_recompute(crowded: dict[str, tuple[Result, Fleet]]) -> None:
    """It recomputes only to break a deadlock, and it admits nobody meanwhile: slower, with steadier tokens."""
    recompute, pause = crowded["recompute"], crowded["pause"]
    assert pause[1].replicas[0].preemptions < recompute[1].replicas[0].preemptions
    assert computed_tokens(pause[0]) < computed_tokens(recompute[0])


# ---- by hand: two requests, blocks of 16 tokens, iterations of 10 ms ------------------------------------------------


def two(kind: str, blocks: int) -> tuple[Result, Fleet]:
    """The older one, 16 + 40 tokens, takes blocks 2, 3, 4 with its decodes 1, 17, 33. The younger one, 15 + 30 tokens
    and 10 iterations later, takes blocks 2 and 3 with its decodes 2 and 18, which is the older one's 28th."""
    trace = Trace("two", np.array([0.0, 0.1]), np.array([16, 15]), np.array([40, 30]))
    setting = scenario(kind, num_gpu_blocks_override=blocks + 1, async_scheduling=False, max_model_len=64)
    return replayed(trace, setting, ConstantCost(0.01, Graphs.of_engine(256, 8192, "full_and_piecewise")))


@pytest.mark.parametrize("kind", ["recompute", "swap"])
def test_the_newest_gives_way(kind: str) -> None:
    """5 blocks: the younger one's third is not there."""
    result, fleet = two(kind, 5)
    alone, _ = two(kind, 7)
    swap = fleet.replicas[0].swap
    copies_s = 2 * swap.seconds_per_block if swap is not None else 0.0  # two blocks out, while the older one runs
    assert result.requests["preemptions"].tolist() == [0, 1]
    assert result.requests["finish_s"][0] == pytest.approx(alone.requests["finish_s"][0] + copies_s, abs=1e-9)
    assert result.requests["finish_s"][1] > alone.requests["finish_s"][1] + 0.1


def test_who_is_preempted_computes_prompt_and_answer_again() -> None:
    """It had 32 tokens in two blocks and was to compute the 33rd."""
    result, _ = two("recompute", 5)
    assert computed_tokens(result) == 31 + 33


def test_who_is_swapped_out_is_copied_whole_and_comes_back() -> None:
    result, fleet = two("swap", 5)
    swap = fleet.replicas[0].swap
    assert swap is not None
    assert swap.copied_out_blocks == swap.copied_in_blocks == 2
    assert computed_tokens(result) == 31


def test_who_is_paused_keeps_its_blocks_until_others_end() -> None:
    """6 blocks: the older one's fourth is not there, at its decode 33; the younger one has it, and 8 tokens to go."""
    result, fleet = two("pause", 6)
    alone, _ = two("pause", 7)
    assert fleet.replicas[0].preemptions == 0
    assert computed_tokens(result) == 31
    finish_s, alone_s = result.requests["finish_s"], alone.requests["finish_s"]
    assert finish_s[1] == pytest.approx(alone_s[1], abs=1e-9)
    waited = round((finish_s[0] - alone_s[0]) / 0.01)
    assert 6 <= waited <= 9, "until the younger one's last token, and the iteration in which its blocks come free"


def test_two_that_wait_for_one_another_do_not_wait_for_ever() -> None:
    """5 blocks: the younger one sits out with two, the older one needs a fourth while it holds three."""
    result, fleet = two("pause", 5)
    assert result.requests["preemptions"].tolist() == [0, 1]
    assert np.isfinite(result.requests["finish_s"]).all()
    assert fleet.replicas[0].kv.free_blocks == 5


def test_swap_without_host_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="preemption='swap' needs host memory: give swap_space_gib"):
        scenario("swap", swap_space_gib=0.0)
    v0 = {"engine": "vllm-v0", "scheduler_args": {"preemption": "swap"}}
    with pytest.raises(ValueError, match="scheduler_args preemption='swap' needs host memory: give swap_space_gib"):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", **v0)
    below = {"scheduler": "sjf", "scheduler_args": {"base": "vllm-v0", "base_args": {"preemption": "swap"}}}
    with pytest.raises(ValueError, match="scheduler_args preemption='swap' needs host memory: give swap_space_gib"):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", **below)
    assert Scenario(model="llama-3.1-8b", gpu="h100-sxm", swap_space_gib=1.0, **v0).scheduler == "vllm-v0"


def test_other_policies_have_their_own_ways() -> None:
    with pytest.raises(ValueError, match="preemption='pause' is an option of the scheduler vllm"):
        scenario("pause", scheduler="chunked")
