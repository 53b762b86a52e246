"""TensorRT-LLM's two stages: who has room, and what an iteration computes. Blocks of 4 tokens, by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from stepping import Stepped, request_of

from llmsim.kvcache import KVCache
from llmsim.schedulers.tensorrt_llm import TensorRtLlm


def stepped(blocks: int, *, seqs: int = 64, budget: int = 1000, id_tokens: int = 0, **arguments: Any) -> Stepped:
    return Stepped(
        TensorRtLlm(**arguments), KVCache(blocks, 4, prefix_block_tokens=id_tokens), seqs=seqs, budget=budget
    )


# ---- guaranteed_no_evict --------------------------------------------------------------------------------------------


def test_a_request_is_let_in_if_its_blocks_to_the_end_fit_beside_those_of_the_others() -> None:
    """8 + 8 tokens are 4 blocks: two fit into 11, and 3 blocks stay idle though a prompt has 2."""
    steps = stepped(11)
    steps.add(*(request_of(i, 8, 8) for i in range(3)))
    assert steps.step().chunks == {0: 8, 1: 8}
    assert steps.engine.kv.free_blocks == 7
    for _ in range(6):
        assert steps.step().chunks == {}
    assert steps.step().decodes == [0, 1]  # their last tokens
    assert steps.step().chunks == {2: 8}


def test_the_first_that_does_not_fit_stops_those_behind_it() -> None:
    steps = stepped(10)
    steps.add(request_of(0, 8, 24), request_of(1, 8, 8), request_of(2, 1, 1))
    assert steps.step().chunks == {0: 8}  # 8 blocks of 10; the third needs one


def test_what_is_reserved_is_not_allocated() -> None:
    steps = stepped(12)
    steps.add(request_of(0, 4, 20), request_of(1, 4, 20))
    steps.step()
    assert steps.engine.kv.free_blocks == 10
    assert len(steps.run()) == 20 - 1
    assert steps.engine.preemptions == 0


def test_what_the_client_allows_is_reserved_not_what_it_gets() -> None:
    steps = stepped(11, max_new_tokens=16)
    steps.add(request_of(0, 8, 2), request_of(1, 8, 2))
    assert steps.step().chunks == {0: 8}  # 6 blocks each


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunked", [False, True])
def test_nobody_is_ever_paused(seed: int, chunked: bool) -> None:
    random = Random(seed)
    steps = stepped(40, budget=60, enable_chunked_prefill=chunked)
    steps.add(*(request_of(i, random.randrange(1, 60), random.randrange(1, 60)) for i in range(60)))
    steps.run()
    assert steps.engine.preemptions == 0
    assert sorted(steps.finished) == list(range(60))
    assert steps.engine.kv.free_blocks == 40


def test_no_more_than_max_num_seqs() -> None:
    steps = stepped(1000, seqs=3)
    steps.add(*(request_of(i, 4, 4) for i in range(5)))
    assert list(steps.step().chunks) == [0, 1, 2]
    assert steps.step().chunks == {}


# ---- max_utilization ------------------------------------------------------------------------------------------------


def test_max_utilization_lets_in_whoever_s_prompt_fits() -> None:
    """The three of the first test need 2 blocks each for their prompts: all start at once."""
    steps = stepped(11, capacity_scheduler_policy="max_utilization")
    steps.add(*(request_of(i, 8, 8) for i in range(3)))
    assert steps.step().chunks == {0: 8, 1: 8, 2: 8}


def test_max_utilization_pauses_the_last_started_when_a_block_is_missing() -> None:
    """3 requests of 8 + 8 tokens on 9 blocks: 3 each until their 13th token, when the last makes room."""
    steps = stepped(9, capacity_scheduler_policy="max_utilization")
    steps.add(*(request_of(i, 8, 8) for i in range(3)))
    steps.step()
    for _ in range(4):
        assert steps.step() == ([0, 1, 2], {}, [], True)
    paused = steps.step()  # each needs a 4th block
    assert (paused.decodes, paused.preempted, paused.held) == ([0, 1], [2], False)
    assert steps.engine.waiting.head.id == 2
    again = steps.run()
    restarted = next(step for step in again if step.chunks)
    assert restarted.chunks == {2: 13 - 4}  # prompt and 5 tokens, but for the block that the others left it
    assert steps.engine.preemptions == 1


def test_a_paused_request_recomputes_what_it_had_generated() -> None:
    steps = Stepped(TensorRtLlm("max_utilization"), KVCache(9, 4, prefix_caching=False), budget=1000)
    steps.add(*(request_of(i, 8, 8) for i in range(3)))
    chunks = [step.chunks for step in steps.run() if step.chunks]
    assert chunks == [{0: 8, 1: 8, 2: 8}, {2: 13}]


def test_a_waiting_request_that_came_first_takes_the_place_of_a_started_one_behind_it() -> None:
    """Request 0 arrives late at the scheduler but stands before 1, which is paused for it."""
    steps = stepped(9, capacity_scheduler_policy="max_utilization")
    steps.add(request_of(1, 16, 8))
    steps.step()
    steps.add(request_of(0, 20, 2))
    step = steps.step()
    assert (step.preempted, step.chunks, step.decodes) == ([1], {0: 20}, [])
    steps.run()
    assert steps.finished == [0, 1]


def test_pausing_is_the_price_of_utilization() -> None:
    """What a block reserved for a later token could have done now: fewer iterations, more work done twice."""
    iterations = {}
    for capacity in ("guaranteed_no_evict", "max_utilization"):
        steps = stepped(60, capacity_scheduler_policy=capacity)
        random = Random(1)
        steps.add(*(request_of(i, random.randrange(4, 20), random.randrange(20, 60)) for i in range(40)))
        iterations[capacity] = len(steps.run())
        assert (steps.engine.preemptions > 0) == (capacity == "max_utilization")
    assert iterations["max_utilization"] < iterations["guaranteed_no_evict"]


@pytest.mark.parametrize("seed", range(4))
def test_max_utilization_serves_everybody(seed: int) -> None:
    random = Random(seed)
    steps = stepped(30, seqs=8, budget=200, capacity_scheduler_policy="max_utilization")
    steps.add(*(request_of(i, random.randrange(1, 50), random.randrange(1, 50)) for i in range(60)))
    steps.run()
    assert steps.engine.preemptions > 0
    assert sorted(steps.finished) == list(range(60))
    assert steps.engine.kv.free_blocks == 30


def test_max_utilization_starts_no_more_than_there_are_slots() -> None:
    """The first's last token is in flight when the others are taken: its slot is not theirs yet."""
    policy = TensorRtLlm("max_utilization")
    steps = Stepped(policy, KVCache(100, 4), seqs=2, asynchronous=True)
    steps.add(*(request_of(i, 4, 1 if i == 0 else 5) for i in range(4)))
    assert steps.step().chunks == {0: 4, 1: 4}
    assert steps.step().chunks == {}
    assert steps.step().chunks == {2: 4}


# ---- static_batch and prefill_first ---------------------------------------------------------------------------------


def test_a_static_batch_runs_until_all_its_members_are_done() -> None:
    steps = stepped(100, seqs=2, capacity_scheduler_policy="static_batch")
    steps.add(request_of(0, 4, 2), request_of(1, 4, 5), request_of(2, 4, 2))
    decodes = [step.decodes or list(step.chunks) for step in steps.run()]
    assert decodes == [[0, 1], [0, 1], [1], [1], [1], [2], [2]]


def test_prefill_first_does_not_generate_beside_a_context() -> None:
    steps = stepped(100, budget=8, capacity_scheduler_policy="prefill_first", enable_chunked_prefill=True)
    steps.add(request_of(0, 4, 5))
    steps.step()
    steps.add(request_of(1, 12, 2))
    assert steps.step() == ([], {1: 8}, [], True)
    assert steps.step() == ([], {1: 4}, [], True)
    assert steps.step().decodes == [0, 1]


# ---- the micro-batch ------------------------------------------------------------------------------------------------


def test_a_prompt_goes_in_whole_or_waits_with_all_behind_it() -> None:
    steps = stepped(100, budget=20)
    steps.add(request_of(0, 12, 4), request_of(1, 12, 4), request_of(2, 1, 4))
    assert steps.step().chunks == {0: 12}
    assert steps.step() == ([0], {1: 12, 2: 1}, [], True)


def test_generation_comes_before_contexts_in_the_budget() -> None:
    steps = stepped(100, budget=20)
    steps.add(request_of(0, 4, 9))
    steps.step()
    steps.add(request_of(1, 20, 4))
    assert steps.step() == ([0], {}, [], True)  # 19 tokens are left


def test_a_prompt_longer_than_the_budget_is_refused_without_chunked_context() -> None:
    steps = stepped(100, budget=20)
    refused = request_of(0, 21, 1)
    steps.add(refused, request_of(1, 20, 1))
    assert steps.step().chunks == {1: 20}
    assert refused.rejected_s == 0.0
    assert steps.engine.rejections == 1


def test_chunks_in_order_are_cut_to_whole_blocks() -> None:
    steps = stepped(100, budget=30, enable_chunked_prefill=True)
    steps.add(request_of(0, 10, 4), request_of(1, 50, 4), request_of(2, 10, 4))
    assert steps.step().chunks == {0: 10, 1: 20}
    assert steps.step() == ([0], {1: 28}, [], True)
    assert steps.step() == ([0], {1: 2, 2: 10}, [], True)


def test_a_chunk_of_less_than_a_block_is_not_scheduled() -> None:
    steps = stepped(100, budget=22, enable_chunked_prefill=True)
    steps.add(request_of(0, 20, 4), request_of(1, 50, 4))
    assert steps.step().chunks == {0: 20}


def test_equal_progress_gives_a_block_to_each_in_turn() -> None:
    steps = stepped(100, budget=30, enable_chunked_prefill=True, context_chunking_policy="equal_progress")
    steps.add(request_of(0, 6, 4), request_of(1, 50, 4), request_of(2, 50, 4))
    assert steps.step().chunks == {0: 6, 1: 12, 2: 12}
    assert steps.step() == ([0], {1: 16, 2: 12}, [], True)


# ---- block reuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", ["guaranteed_no_evict", "max_utilization"])
def test_a_request_waits_for_the_block_that_another_computes_now(capacity: str) -> None:
    steps = stepped(100, id_tokens=4, capacity_scheduler_policy=capacity)
    same = {"prefix_ids": ("a", "b", "c"), "identity_tokens": 12}
    steps.add(request_of(0, 12, 4, **same), request_of(1, 12, 4, **same), request_of(2, 8, 4))
    assert steps.step().chunks == {0: 12, 2: 8}
    assert steps.step().chunks == {1: 4}


def test_a_static_batch_does_not_wait_for_blocks() -> None:
    steps = stepped(100, id_tokens=4, capacity_scheduler_policy="static_batch")
    same = {"prefix_ids": ("a", "b", "c"), "identity_tokens": 12}
    steps.add(request_of(0, 12, 4, **same), request_of(1, 12, 4, **same))
    assert list(steps.step().chunks) == [0, 1]


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_unknown_policies_are_named() -> None:
    with pytest.raises(ValueError, match="capacity_scheduler_policy='no_evict' is unknown"):
        TensorRtLlm("no_evict")
    with pytest.raises(ValueError, match="context_chunking_policy='lifo' is unknown"):
        TensorRtLlm(context_chunking_policy="lifo")
