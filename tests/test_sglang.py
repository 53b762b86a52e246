"""SGLang's scheduler by hand: pools of a few tokens, pages of one token unless said."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from stepping import Stepped, request_of

from llmsim.kvcache import KVCache
from llmsim.radixcache import RadixCache
from llmsim.request import Request
from llmsim.schedulers.sglang import Sglang

FALL = 0.7 * (1 - 0.14) / 600  # of the ratio in a decode round


def stepped(
    tokens: int, *, page: int = 1, seqs: int = 64, chunk: int = 1000, id_tokens: int = 0, asynchronous: bool = False,
    caching: bool = True, **arguments: Any,
) -> Stepped:  # fmt: skip
    kv = RadixCache(tokens // page, page, prefix_block_tokens=id_tokens, prefix_caching=caching)
    return Stepped(Sglang(**arguments), kv, seqs=seqs, budget=chunk, asynchronous=asynchronous)


def named(id_: int, prompt: int, output: int, ids: tuple[object, ...], **more: Any) -> Request:
    return request_of(id_, prompt, output, prefix_ids=ids, identity_tokens=prompt, **more)


# ---- prompts first --------------------------------------------------------------------------------------------------


def test_nobody_decodes_while_a_prompt_can_be_taken() -> None:
    steps = stepped(1000)
    steps.add(request_of(0, 10, 5))
    assert steps.step() == ([], {0: 10}, [], False)
    assert steps.step() == ([0], {}, [], True)
    steps.add(request_of(1, 10, 5))
    assert steps.step() == ([], {1: 10}, [], False)
    assert steps.step().decodes == [0, 1]


def test_the_chunks_of_a_long_prompt_run_back_to_back() -> None:
    steps = stepped(1000, chunk=10)
    steps.add(request_of(0, 4, 9))
    steps.step()
    steps.add(request_of(1, 25, 2))
    chunks = [steps.step() for _ in range(3)]
    assert [step.chunks for step in chunks] == [{1: 10}, {1: 10}, {1: 5}]
    assert not any(step.decodes for step in chunks)
    assert steps.step().decodes == [0, 1]


def test_there_is_one_chunked_request_and_it_comes_first() -> None:
    steps = stepped(1000, chunk=10)
    steps.add(request_of(0, 6, 2), request_of(1, 9, 2), request_of(2, 1, 2), request_of(3, 30, 2))
    assert steps.step().chunks == {0: 6, 1: 4}
    assert steps.step().chunks == {1: 5, 2: 1, 3: 4}
    assert steps.step().chunks == {3: 10}


def test_without_chunked_prefill_the_first_prompt_may_exceed_the_input_budget() -> None:
    steps = stepped(1000, chunked_prefill_size=-1, max_prefill_tokens=20)
    steps.add(request_of(0, 30, 2), request_of(1, 5, 2), request_of(2, 14, 2), request_of(3, 2, 2))
    assert steps.step().chunks == {0: 30}
    assert steps.step().chunks == {1: 5, 2: 14}
    assert steps.step().chunks == {3: 2}


def test_chunks_are_cut_to_pages() -> None:
    steps = stepped(1000, page=4, chunk=10)
    steps.add(request_of(0, 20, 2))
    assert steps.step().chunks == {0: 8}
    assert steps.step().chunks == {0: 10}  # of a chunked request the rest of the budget is taken
    assert steps.step().chunks == {0: 2}


def test_decodes_have_no_token_budget() -> None:
    steps = stepped(1000, chunk=4)
    steps.add(*(request_of(i, 1, 5) for i in range(12)))
    for _ in range(3):
        assert len(steps.step().chunks) == 4
    assert len(steps.step().decodes) == 12


def test_mixed_chunks_let_everybody_decode_and_leave_the_rest_of_the_chunk_to_prompts() -> None:
    steps = stepped(1000, chunk=10, enable_mixed_chunk=True)
    steps.add(request_of(0, 1, 9), request_of(1, 1, 9))
    steps.step()
    steps.add(request_of(2, 20, 2))
    assert steps.step() == ([0, 1], {2: 8}, [], False)
    assert steps.step() == ([0, 1], {2: 8}, [], False)
    assert steps.step() == ([0, 1], {2: 4}, [], False)


def test_an_interval_of_decodes_follows_each_prefill_batch() -> None:
    steps = stepped(1000, chunk=10, prefill_decode_interval=2)
    steps.add(request_of(0, 4, 20))
    steps.step()
    steps.add(request_of(1, 15, 9))
    kinds = ["chunk" if step.chunks else "decode" for step in (steps.step() for _ in range(8))]
    assert kinds == ["decode", "decode", "chunk", "decode", "decode", "chunk", "decode", "decode"]


# ---- admission ------------------------------------------------------------------------------------------------------


def test_a_request_is_admitted_if_prompt_answer_and_a_page_are_less_than_what_is_left() -> None:
    """The first takes 10 + 40 + 1 of 100 from the budget: 49 are left, and 8 + 40 + 1 are not less."""
    steps = stepped(100)
    steps.add(request_of(0, 10, 40), request_of(1, 8, 40))
    assert steps.step().chunks == {0: 10}
    steps = stepped(101)
    steps.add(request_of(0, 10, 40), request_of(1, 8, 40))
    assert steps.step().chunks == {0: 10, 1: 8}


def test_after_one_that_did_not_fit_nobody_is_admitted_before_somebody_leaves() -> None:
    steps = stepped(100)
    steps.add(request_of(0, 10, 40), request_of(1, 8, 40))
    steps.step()  # 0 now needs 0.7 * 39 of 90 free tokens, so that 1 would fit
    steps.add(request_of(2, 1, 1))
    assert [steps.step().decodes for _ in range(39)] == [[0]] * 39
    assert steps.step().chunks == {1: 8, 2: 1}


@pytest.mark.parametrize(("prompt", "fits"), [(21, True), (22, False)])
def test_of_what_running_requests_may_generate_the_ratio_is_reserved(prompt: int, fits: bool) -> None:
    """100 - 10 - 0.7 * 39 = 62.7 tokens for prompt + 40 + 1."""
    steps = stepped(100)
    steps.add(request_of(0, 10, 40))
    steps.step()
    steps.add(request_of(1, prompt, 40))
    assert (steps.step().chunks == {1: prompt}) == fits


def test_of_long_answers_4096_tokens_are_reserved() -> None:
    steps = stepped(20_000)
    steps.add(request_of(0, 10, 9000), request_of(1, 10, 9000))
    assert steps.step().chunks == {0: 10, 1: 10}  # not 2 * 9000
    steps = stepped(10_000)
    steps.add(request_of(0, 1000, 8000))
    steps.step()  # 9000 - 0.7 * 4096 = 6132.8
    steps.add(request_of(1, 2035, 5000))
    assert steps.step().chunks == {1: 1000}  # 2035 + 4096 + 1 are less


def test_what_the_client_allows_counts_not_what_it_gets() -> None:
    steps = stepped(100, max_new_tokens=40)
    steps.add(request_of(0, 10, 2), request_of(1, 8, 2))
    assert steps.step().chunks == {0: 10}


def test_cached_tokens_in_use_cost_nothing_and_idle_ones_their_own_size() -> None:
    steps = stepped(100, id_tokens=10)
    steps.add(named(0, 30, 1, ("a", "b", "c")))
    steps.run()
    assert steps.engine.kv.idle_blocks == 30
    steps.add(named(1, 31, 10, ("a", "b", "c", "d")))
    steps.step()  # 30 of 31 found; locked: 100 - 30 - 1 are free
    assert steps.engine.kv.free_blocks == 69
    steps.add(named(2, 31, 61, ("a", "b", "c", "e")))  # 1 + 61 + 1 are not less than 69 - 0.7 * 9 = 62.7
    assert steps.step().chunks == {}
    steps.run()
    assert steps.finished == [0, 1, 2]


def test_max_num_seqs_are_the_slots() -> None:
    steps = stepped(1000, seqs=2)
    steps.add(*(request_of(i, 4, 4) for i in range(3)))
    assert steps.step().chunks == {0: 4, 1: 4}
    assert [steps.step().decodes for _ in range(3)] == [[0, 1]] * 3
    assert steps.step().chunks == {2: 4}


def test_a_request_that_the_pool_cannot_hold_is_refused() -> None:
    steps = stepped(100)
    refused, last = request_of(0, 50, 49), request_of(1, 50, 48)
    steps.add(refused, last)
    assert steps.step().chunks == {1: 50}
    assert refused.rejected_s == 0.0


# ---- the ratio ------------------------------------------------------------------------------------------------------


def test_the_ratio_falls_with_every_decode_round_to_its_floor_and_starts_again_when_idle() -> None:
    steps = stepped(10_000)
    policy = steps.engine.scheduler
    steps.add(request_of(0, 4, 700))
    steps.step()
    assert policy.new_token_ratio == 0.7
    for _ in range(10):
        steps.step()
    policy._look_back(steps.engine)
    assert policy.new_token_ratio == pytest.approx(0.7 - 10 * FALL)
    for _ in range(650):
        steps.step()
    assert policy.new_token_ratio == pytest.approx(0.7 * 0.14)
    steps.run()
    steps.step()
    assert policy.new_token_ratio == 0.7


def test_conservativeness_scales_the_ratio_up_to_one() -> None:
    assert Sglang(schedule_conservativeness=0.3).new_token_ratio == pytest.approx(0.21)
    assert Sglang(schedule_conservativeness=2.0).new_token_ratio == 1.0


# ---- retraction -----------------------------------------------------------------------------------------------------


def overcommitted(prompts: tuple[int, ...], waits: tuple[int, ...], tokens: int = 60) -> Stepped:
    """Answers of 20 tokens, none of which is reserved; `waits`: decode rounds before each request."""
    steps = stepped(tokens, schedule_conservativeness=0.0)
    for i, (prompt, wait) in enumerate(zip(prompts, waits, strict=True)):
        for _ in range(wait):
            steps.step()
        steps.add(request_of(i, prompt, 20))
        steps.step()
    return steps


def until_retraction(steps: Stepped) -> tuple[list[int], list[int]]:
    for _ in range(200):
        step = steps.step()
        if step.preempted:
            return step.preempted, step.decodes
    raise AssertionError("nobody was retracted")


def test_of_equal_answers_the_longest_prompt_is_retracted() -> None:
    steps = overcommitted((10, 12, 8), (0, 0, 0))
    assert until_retraction(steps) == ([1], [0, 2])


def test_who_has_generated_least_is_retracted_first() -> None:
    steps = overcommitted((12, 8, 8), (0, 3, 3))
    assert until_retraction(steps) == ([2], [0, 1])


def test_by_priority_the_least_urgent_is_retracted_first() -> None:
    for low_first, leaves in ((False, 2), (True, 1)):
        steps = stepped(
            60,
            schedule_conservativeness=0.0,
            retraction_policy="priority",
            schedule_low_priority_values_first=low_first,
        )
        for i, priority in enumerate((1, 2, 0)):
            steps.add(request_of(i, 10, 20, priority=priority))
            steps.step()
        assert until_retraction(steps)[0] == [leaves]


def test_a_retraction_sets_the_ratio_by_those_who_stay() -> None:
    """60 - 30 tokens last for 10 rounds; in the 11th two stay, with 1 + 10 tokens each of 20."""
    steps = overcommitted((10, 12, 8), (0, 0, 0))
    until_retraction(steps)
    assert steps.engine.scheduler._ratio == min(1.0, (2 * 11 + 20 * 2) / (2 * 20 + 1))
    steps = stepped(400, schedule_conservativeness=0.0)
    for i in range(2):
        steps.add(request_of(i, 100, 150))
        steps.step()
    until_retraction(steps)
    policy = steps.engine.scheduler  # 100 rounds have filled the pool
    assert policy._ratio == (101 + 20) / (150 + 1)


def test_retracted_requests_join_at_the_end_and_find_their_prompts_again() -> None:
    steps = overcommitted((10, 12, 8), (0, 0, 0))
    steps.add(request_of(3, 5, 30))
    until_retraction(steps)
    assert [request.id for request in steps.engine.waiting] == [3, 1]
    retracted = list(steps.engine.waiting)[1]
    assert retracted.generated_tokens == 11
    assert steps.engine.look_up(retracted).blocks == 12  # not the 10 tokens of its answer in the pool
    steps.run()
    assert sorted(steps.finished) == [0, 1, 2, 3]
    assert steps.engine.kv.free_blocks == 60


def test_at_least_one_is_retracted_and_the_last_one_stays() -> None:
    steps = overcommitted((10, 10), (0, 0), tokens=42)
    assert until_retraction(steps) == ([0], [1])
    steps.run()
    assert sorted(steps.finished) == [0, 1]


# ---- orders ---------------------------------------------------------------------------------------------------------


def order_of(steps: Stepped, *requests: Request) -> list[int]:
    """Who starts in which order, one request at a time."""
    steps.add(*requests)
    started: list[int] = []
    for step in steps.run():
        started += [id_ for id_ in step.chunks if id_ not in started]
    return started


def test_longest_output_first() -> None:
    steps = stepped(1000, seqs=1, schedule_policy="lof")
    assert order_of(steps, request_of(0, 4, 2), request_of(1, 4, 9), request_of(2, 4, 5), request_of(3, 4, 9)) == [
        1, 3, 2, 0,
    ]  # fmt: skip


def test_random_orders_are_repeatable() -> None:
    orders = [
        order_of(stepped(1000, seqs=1, schedule_policy="random", seed=seed), *(request_of(i, 4, 2) for i in range(20)))
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(20)) != orders[0]


def warm(policy: str, *prompts: tuple[object, ...], **arguments: Any) -> Stepped:
    """A cache that has seen these prompts, in blocks of 40 tokens."""
    steps = stepped(10_000, seqs=1, id_tokens=40, schedule_policy=policy, **arguments)
    for i, ids in enumerate(prompts):
        steps.add(named(100 + i, 40 * len(ids), 1, ids))
        steps.run()
    return steps


def test_longest_prefix_match_first() -> None:
    steps = warm("lpm", ("a", "b", "c"))
    requests = [named(0, 121, 2, ("x", "y", "z", "0")), named(1, 121, 2, ("a", "y", "z", "1"))]
    requests += [named(2, 161, 2, ("a", "b", "c", "d", "2")), named(3, 121, 2, ("a", "b", "z", "3"))]
    assert order_of(steps, *requests) == [2, 3, 1, 0]


def test_shortest_prefill_first_counts_what_is_not_cached() -> None:
    steps = warm("shortest-prefill-first", ("a", "b", "c"))
    requests = [named(0, 41, 2, ("x", "0")), named(1, 130, 2, ("a", "b", "c", "1")), named(2, 60, 2, ("y", "2"))]
    assert order_of(steps, *requests) == [1, 0, 2]


def test_the_response_ratio_rises_with_what_was_computed_for_others() -> None:
    """2 has waited for 400 tokens more than 3 of half the length when these two are compared."""
    steps = warm("hrrn")
    steps.add(named(0, 400, 1, ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")), named(2, 200, 1, tuple("klmno")))
    steps.step()
    steps.add(named(3, 100, 1, tuple("pqr")))
    assert order_of(steps) == [2, 3]


def test_depth_first_takes_the_branch_with_more_waiting_requests_and_its_depth_first() -> None:
    steps = warm("dfs-weight", ("a", "b", "c"), ("z", "y"))
    requests = [
        named(0, 90, 2, ("z", "y", "0")),
        named(1, 121, 2, ("a", "n", "1", "1")),
        named(2, 121, 2, ("a", "b", "c", "2")),
        named(3, 121, 2, ("a", "b", "m", "3")),
    ]
    assert order_of(steps, *requests) == [2, 3, 1, 0]


def test_of_requests_that_share_what_is_not_cached_one_goes_ahead() -> None:
    steps = stepped(10_000, chunk=10_000, id_tokens=32, schedule_policy="lpm")
    shared = [named(i, 64, 2, ("a", i)) for i in range(3)]
    steps.add(*shared, named(3, 64, 2, ("b", "c")))
    assert list(steps.step().chunks) == [0, 3, 1, 2]  # 1 and 2 behind 3
    few = stepped(10_000, chunk=10_000, id_tokens=31, schedule_policy="lpm")
    few.add(*(named(i, 62, 2, ("a", i)) for i in range(3)), named(3, 62, 2, ("b", "c")))
    assert list(few.step().chunks) == [0, 1, 2, 3]  # 31 tokens in common are too few


def test_a_queue_of_more_than_128_is_left_as_it_is() -> None:
    for others, first in ((127, 200), (128, 0)):
        steps = warm("lpm", ("a", "b", "c"))
        steps.add(*(named(i, 41, 1, ("x", i)) for i in range(others)), named(200, 121, 1, ("a", "b", "c", "d")))
        assert list(steps.step().chunks) == [first]


def test_without_prefix_caching_cache_aware_orders_are_fcfs() -> None:
    steps = stepped(1000, seqs=1, caching=False, schedule_policy="lpm")
    assert order_of(steps, *(request_of(i, 9 - i, 2) for i in range(4))) == [0, 1, 2, 3]
    steps = stepped(1000, caching=False, schedule_policy="shortest-prefill-first")
    steps.add(request_of(0, 4, 4))
    with pytest.raises(ValueError, match="needs enable_prefix_caching"):
        steps.step()


# ---- priorities -----------------------------------------------------------------------------------------------------


def test_larger_priorities_first_unless_told_otherwise() -> None:
    for low_first, order in ((False, [2, 1, 3, 0]), (True, [0, 1, 3, 2])):
        steps = stepped(
            1000, seqs=1, enable_priority_scheduling=True, schedule_low_priority_values_first=low_first,
            disable_priority_preemption=True,
        )  # fmt: skip
        requests = [request_of(i, 4, 2, priority=priority) for i, priority in enumerate((0, 5, 9, 5))]
        assert order_of(steps, *requests) == order


@pytest.mark.parametrize(("priority", "preempted"), [(20, [0]), (10, [])])
def test_a_request_takes_the_slot_of_one_whose_priority_is_lower_by_more_than_the_threshold(
    priority: int, preempted: list[int]
) -> None:
    steps = stepped(1000, seqs=2, enable_priority_scheduling=True)
    steps.add(request_of(0, 4, 9), request_of(1, 4, 9, priority=15))
    steps.step()
    steps.add(request_of(2, 4, 9, priority=priority))
    step = steps.step()
    assert step.preempted == preempted
    assert step.chunks == ({2: 4} if preempted else {})
    steps.run()
    assert sorted(steps.finished) == [0, 1, 2]


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_prompt_is_shared_once_its_results_are_taken(asynchronous: bool) -> None:
    steps = stepped(1000, id_tokens=40, asynchronous=asynchronous)
    steps.add(named(0, 80, 9, ("a", "b")))
    steps.step()
    steps.add(named(1, 81, 9, ("a", "b", "c")))
    assert steps.step().chunks == {1: 81 if asynchronous else 1}
    steps.add(named(2, 81, 9, ("a", "b", "d")))
    assert steps.step().chunks == {2: 1}


def test_no_request_of_a_batch_evicts_what_another_one_found() -> None:
    """0 needs room that only a, used longer ago than b, could give; 1, behind it, has found a."""
    steps = stepped(300, id_tokens=40)
    for i, name in enumerate("ab"):
        steps.add(named(10 + i, 120, 1, (name, name, name)))
        steps.run()
    steps.add(named(0, 100, 10, ("x", "y", "z")), named(1, 121, 10, ("a", "a", "a", "q")))
    assert steps.step().chunks == {0: 100, 1: 1}


def test_it_runs_on_a_cache_of_blocks_too() -> None:
    steps = Stepped(Sglang("lpm"), KVCache(200, 16, prefix_block_tokens=16), budget=200)
    steps.add(*(named(i, 80, 20, ("a", "b", "c", "d", i)) for i in range(8)))
    steps.run()
    assert sorted(steps.finished) == list(range(8))
    assert steps.engine.hit_tokens > 0


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="schedule_policy='sjf' is unknown"):
        Sglang("sjf")
    with pytest.raises(ValueError, match="retraction_policy='age' is unknown"):
        Sglang(retraction_policy="age")
    with pytest.raises(ValueError, match="prefill_decode_interval=-1 is too small"):
        Sglang(prefill_decode_interval=-1)
    with pytest.raises(ValueError, match="contradicts enable_priority_scheduling"):
        Sglang("lpm", enable_priority_scheduling=True)
    assert Sglang.token_limit(None) == inf  # type: ignore[arg-type]
