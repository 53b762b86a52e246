"""The rule that defines each batching policy, by hand: iterations of 10 ms, blocks of 16 tokens, no host."""

from __future__ import annotations

from typing import Any

import pytest
from test_aside import ms, served
from test_twin import SteppedCost, gaps_of

from llmsim.cost import Host
from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.schedulers import load_scheduler
from llmsim.schedulers.dynamic import DynamicBatching
from llmsim.schedulers.orca import Orca
from llmsim.schedulers.sarathi import Sarathi
from llmsim.schedulers.static import StaticBatching
from llmsim.schedulers.vllm_v0 import VllmV0


def rows(replica: Replica, *names: str) -> list[tuple[int, ...]]:
    """Columns of the iteration log, a run written out as its iterations."""
    log = replica.iterations.table()
    assert log["iterations"].max() == 1 or "kv_tokens" not in names
    return [tuple(int(row[name]) for name in names) for row in log for _ in range(int(row["iterations"]))]


def at(times_s: list[float], prompt: int = 100, output: int = 3) -> list[Request]:
    return [Request(i, time_s, prompt, output) for i, time_s in enumerate(times_s)]


# ---- static --------------------------------------------------------------------------------------------------------


def test_a_static_batch_waits_until_it_is_full() -> None:
    requests = at([0.0, 0.02, 0.05, 0.06])
    served(StaticBatching(batch_size=3, timeout_s=1.0), requests)
    assert ms(*(r.scheduled_s for r in requests)) == [50, 50, 50, 1060]


def test_or_until_its_oldest_request_has_waited_long_enough() -> None:
    requests = at([0.0, 0.02, 0.2])
    served(StaticBatching(batch_size=3, timeout_s=0.1), requests)
    assert ms(*(r.scheduled_s for r in requests)) == [100, 100, 300]


def test_nobody_joins_a_static_batch_before_its_longest_answer_is_complete() -> None:
    """Prompts at 0, answers of 3 and 9 tokens: done at 90 ms, when the third is admitted; answers all at once."""
    requests = [Request(0, 0.0, 100, 3), Request(1, 0.0, 100, 9), Request(2, 0.015, 100, 2)]
    replica = served(StaticBatching(batch_size=2, timeout_s=0.0), requests)
    assert ms(*(r.first_token_s for r in requests)) == [90, 90, 110]
    assert ms(*(r.finish_s for r in requests)) == [90, 90, 110]
    assert set(gaps_of(replica)) == {0.0}
    requests = [Request(0, 0.0, 100, 3), Request(1, 0.0, 100, 9)]
    served(StaticBatching(batch_size=2, timeout_s=0.0, stream=True), requests)
    assert ms(*(r.first_token_s for r in requests)) == [10, 10]
    assert ms(*(r.finish_s for r in requests)) == [30, 90]


def test_prompts_are_padded_and_finished_rows_go_on() -> None:
    """Prompts of 40 and 100 are 200 rows; both rows decode to the end, each reading 100 tokens and one more a time."""
    requests = [Request(0, 0.0, 40, 2), Request(1, 0.0, 100, 4)]
    cost = SteppedCost(Host(), Graphs.of_engine(256, 8192), 1.0)
    replica = served(StaticBatching(batch_size=2), requests, cost=cost)
    assert rows(replica, "prefill_tokens", "seqs", "kv_tokens") == [(200, 0, 0), (0, 2, 200), (0, 2, 202), (0, 2, 204)]


def test_padded_rows_beyond_the_token_limit_take_several_iterations() -> None:
    """Three rows of 100 with 250 tokens an iteration: two, then one; then a single row of 300, alone."""
    requests = [Request(i, 0.0, prompt, 2) for i, prompt in enumerate((60, 100, 80))]
    replica = served(StaticBatching(batch_size=3), requests, limits=Limits(8, 250))
    assert rows(replica, "prefill_tokens", "seqs") == [(200, 0), (100, 0), (0, 3)]
    replica = served(StaticBatching(batch_size=1), [Request(0, 0.0, 300, 1)], limits=Limits(8, 250))
    assert rows(replica, "prefill_tokens") == [(300,)]


def test_a_static_batch_is_as_large_as_its_reserved_rows_fit() -> None:
    """Rows of 100 + 29 - 1 = 128 tokens are 8 blocks, of which 20 hold 2; with 256 reserved for each, 1."""
    requests = at([0.0] * 3, output=29)
    served(StaticBatching(batch_size=3, timeout_s=0.0), requests, blocks=20)
    assert ms(*(r.scheduled_s for r in requests)) == [0, 0, 290]
    requests = at([0.0] * 3, output=29)
    served(StaticBatching(batch_size=3, timeout_s=0.0, reserve_tokens=256), requests, blocks=20)
    assert ms(*(r.scheduled_s for r in requests)) == [0, 290, 580]
    with pytest.raises(PolicyError, match="reserve_tokens=120 for each row, of which request 0 needs 128"):
        served(StaticBatching(reserve_tokens=120, timeout_s=0.0), at([0.0], output=29))
    with pytest.raises(PolicyError, match="reserves 400 tokens of KV for request 0, of 320 there are"):
        served(StaticBatching(reserve_tokens=400, timeout_s=0.0), at([0.0]), blocks=20)


# ---- dynamic -------------------------------------------------------------------------------------------------------


def test_a_dynamic_batch_has_a_preferred_size_or_is_what_waits_in_time() -> None:
    """Five at once: four go, of a preferred size; the fifth waits 50 ms. Then a full batch of 8 goes at once."""
    requests = at([0.0] * 5, output=1)
    served(DynamicBatching(batch_size=8, timeout_s=0.05, preferred_batch_sizes="2,4"), requests)
    assert ms(*(r.scheduled_s for r in requests)) == [0, 0, 0, 0, 50]
    requests = at([0.0] * 9, output=1)
    served(DynamicBatching(batch_size=8, timeout_s=0.05, preferred_batch_sizes="2,4"), requests)
    assert ms(*(r.scheduled_s for r in requests)) == [0] * 8 + [50]


def test_a_dynamic_batch_pads_nothing_and_admits_nobody() -> None:
    requests = [Request(0, 0.0, 40, 2), Request(1, 0.0, 100, 4), Request(2, 0.015, 100, 1)]
    cost = SteppedCost(Host(), Graphs.of_engine(256, 8192), 1.0)
    replica = served(DynamicBatching(batch_size=2, timeout_s=0.0), requests, cost=cost)
    log = rows(replica, "prefill_tokens", "seqs", "kv_tokens")
    assert log == [(140, 0, 0), (0, 2, 140), (0, 1, 101), (0, 1, 102), (100, 0, 0)]
    assert requests[0].finish_s == requests[1].finish_s == requests[2].scheduled_s


# ---- orca ----------------------------------------------------------------------------------------------------------


def test_orca_admits_and_retires_at_every_iteration() -> None:
    """The second joins beside the first one's decode, and the third when the first has left: batches of two."""
    requests = [Request(0, 0.0, 100, 4), Request(1, 0.015, 100, 9), Request(2, 0.016, 100, 2)]
    replica = served(Orca(batch_size=2), requests)
    assert ms(*(r.scheduled_s for r in requests)) == [0, 20, 40]
    assert ms(*(r.finish_s for r in requests)) == [40, 110, 60]
    assert rows(replica, "prefill_tokens", "seqs")[:5] == [(100, 0), (0, 1), (100, 1), (0, 2), (100, 1)]


@pytest.mark.parametrize(
    ("reserve", "together"),
    [("oracle", 4), ("pow2", 3), ("max", 2)],
)
def test_orca_reserves_at_first_schedule(reserve: str, together: int) -> None:
    """100 + 33 - 1 tokens are 9 blocks, 100 + 64 are 11, 256 are 16; there are 36, and 7 are taken by each prompt."""
    requests = at([0.0] * 5, output=33)
    replica = served(Orca(reserve=reserve, max_tokens=256), requests, blocks=36)
    assert replica.iterations.table()["running"].max() == together
    assert sum(r.scheduled_s == 0.0 for r in requests) == together
    assert replica.preemptions == 0


def test_the_first_that_does_not_fit_stops_all_behind_it() -> None:
    """9 of 20 blocks are reserved; 15 are wanted next, and the third would need 1."""
    requests = [Request(0, 0.0, 100, 33), Request(1, 0.0, 200, 30), Request(2, 0.0, 10, 2)]
    served(Orca(), requests, blocks=20)
    assert ms(*(r.scheduled_s for r in requests)) == [0, 330, 330]


def test_orca_never_splits_a_prompt() -> None:
    """Two of 60 fit 100 tokens only one at a time, one of 150 runs alone, beside decodes."""
    requests = [Request(i, 0.0, prompt, 9) for i, prompt in enumerate((60, 60, 150))]
    replica = served(Orca(), requests, limits=Limits(8, 100))
    assert rows(replica, "prefill_tokens", "seqs")[:4] == [(60, 0), (60, 1), (150, 2), (0, 3)]


def test_orca_says_what_it_cannot_reserve() -> None:
    with pytest.raises(PolicyError, match="max_tokens=120 for each request, of which request 0 needs 132"):
        served(Orca(reserve="max", max_tokens=120), at([0.0], output=33))
    with pytest.raises(PolicyError, match="max_tokens=400 for request 0, more than the 20 KV blocks there are"):
        served(Orca(reserve="max", max_tokens=400), at([0.0], output=33), blocks=20)


# ---- vllm v0 -------------------------------------------------------------------------------------------------------


def test_prompts_come_first_and_alone() -> None:
    """The second prompt arrives during the first decode; the first request's third token waits for it: 20 ms."""
    requests = [Request(0, 0.0, 100, 4), Request(1, 0.015, 100, 2)]
    replica = served(VllmV0(), requests)
    assert rows(replica, "prefill_tokens", "seqs") == [(100, 0), (0, 1), (100, 0), (0, 2), (0, 1)]
    assert ms(*gaps_of(replica)) == [10, 10, 10, 20]
    assert ms(*(r.finish_s for r in requests)) == [50, 40]


def test_admission_leaves_the_watermark_free() -> None:
    """Of 100 blocks 1 stays free: after 7 of the first, 92 are too many by 0 and 93 by 1."""
    for prompt, waits in ((92 * 16, False), (92 * 16 + 1, True)):
        requests = [Request(0, 0.0, 100, 3), Request(1, 0.0, prompt, 1)]
        served(VllmV0(), requests, blocks=100)
        assert ms(requests[1].scheduled_s) == [30 if waits else 0]


def test_the_latest_arrival_is_recomputed_when_no_block_is_free() -> None:
    """Two prompts of 96 tokens take 6 of 13 blocks each; the first decode wants one more each: one is left.

    The first gets it; the second, the latest arrival, goes, and runs its 97 tokens again once the first has ended.
    """
    requests = at([0.0, 0.0], prompt=96, output=4)
    replica = served(VllmV0(watermark=0.0), requests, kv=KVCache(13, 16, prefix_caching=False))
    assert ms(*(r.finish_s for r in requests)) == [40, 70]
    assert [r.preemptions for r in requests] == [0, 1]
    assert rows(replica, "prefill_tokens", "seqs") == [(192, 0), (0, 1), (0, 1), (0, 1), (97, 0), (0, 1), (0, 1)]
    assert ms(requests[1].preempted_s) == [40]  # 10 to 50 ms


def test_or_swapped_to_host_memory_and_back() -> None:
    """As above: 6 blocks of 1 ms go out before the first decode (26 ms) and come back after the third (46 to 62)."""
    requests = at([0.0, 0.0], prompt=96, output=4)
    swap = Swap(6, 1e-3)
    replica = served(VllmV0(preemption="swap", watermark=0.0), requests, blocks=13, swap=swap)
    assert rows(replica, "prefill_tokens", "seqs") == [(192, 0), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert ms(*(r.finish_s for r in requests)) == [46, 82]
    assert ms(requests[1].preempted_s) == [52]  # 10 to 62 ms
    assert (swap.copied_out_blocks, swap.copied_in_blocks) == (6, 6)


def test_nobody_is_admitted_while_somebody_is_swapped_out() -> None:
    requests = [*at([0.0, 0.0], prompt=96, output=4), Request(2, 0.021, 10, 1)]
    served(VllmV0(preemption="swap", watermark=0.0), requests, blocks=13, swap=Swap(6, 0.0))
    assert ms(*(r.scheduled_s for r in requests)) == [0, 0, 50]  # the second is back from 40 ms on


def test_a_request_decodes_only_while_a_block_is_free_even_if_it_needs_none() -> None:
    """Prompts of 96 and 100 tokens take 6 + 7 of 14 blocks. The first takes the last one, the second needs none.

    It goes, is computed again at once (prompts first), and goes again; its last token comes with its third prefill.
    """
    requests = [Request(0, 0.0, 96, 3), Request(1, 0.0, 100, 3)]
    replica = served(VllmV0(watermark=0.0), requests, kv=KVCache(14, 16, prefix_caching=False))
    assert rows(replica, "prefill_tokens", "seqs") == [(196, 0), (0, 1), (101, 0), (0, 1), (102, 0)]
    assert [r.preemptions for r in requests] == [0, 2]


# ---- sarathi -------------------------------------------------------------------------------------------------------


def test_decodes_never_wait_and_chunks_fill_the_budget() -> None:
    """Budget 64: the prompt of 200 gets 63 beside one decode, 63, 63 and 11; then the third's 52 fit that budget."""
    requests = [Request(0, 0.0, 64, 9), Request(1, 0.001, 200, 2), Request(2, 0.002, 60, 2)]
    replica = served(Sarathi(token_budget=64), requests)
    log = rows(replica, "prefill_tokens", "seqs")
    assert log[:6] == [(64, 0), (63, 1), (63, 1), (63, 1), (11 + 52, 1), (8, 2)]
    assert ms(*gaps_of(replica)) == [10] * (8 + 1 + 1)


def test_memory_for_the_whole_prompt_is_taken_at_admission() -> None:
    """Of 14 blocks the first holds 5 from 40 ms on; 10 more for 160 tokens do not fit, though a chunk of 16 would."""
    requests = [Request(0, 0.0, 64, 9), Request(1, 0.041, 160, 1)]
    served(Sarathi(token_budget=17, watermark=0.0), requests, blocks=14)
    assert requests[1].scheduled_s == requests[0].finish_s


def test_memory_kept_for_a_prompt_is_not_given_to_decodes() -> None:
    """12 blocks; the second prompt is promised 8.

    The first has 64 tokens in 4 and takes a fifth with its first decode: 7 are left, the second waits. Of 60 tokens it
    leaves room for the second, admitted with 4 tokens beside the last of the first's chunks of 16; four decodes later
    it wants a fifth block, but what is free was promised: the latest arrival goes.
    """
    requests = [Request(0, 0.0, 64, 5), Request(1, 0.001, 128, 1)]
    served(Sarathi(token_budget=64, watermark=0.0), requests, blocks=12)
    assert [r.preemptions for r in requests] == [0, 0]
    assert ms(requests[0].finish_s, requests[1].scheduled_s) == [50, 50]
    requests = [Request(0, 0.0, 60, 12), Request(1, 0.001, 128, 1)]
    served(Sarathi(token_budget=16, watermark=0.0), requests, blocks=12)
    assert [r.preemptions for r in requests] == [0, 1]
    assert requests[1].finish_s > requests[0].finish_s


def test_a_budget_below_the_number_of_decodes_admits_nobody() -> None:
    requests = at([0.0, 0.001, 0.002], prompt=2, output=9)
    served(Sarathi(token_budget=2), requests)
    assert requests[2].scheduled_s >= requests[0].finish_s - 1e-9


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("static", {"batch_size": 0}, "batch_size=0 is not a whole number of 1 or more"),
        ("static", {"timeout_s": -1.0}, "timeout_s=-1.0 is no time to wait: give 0 or more seconds"),
        ("dynamic", {"preferred_batch_sizes": "4,64"}, "are not all between 1 and batch_size=32"),
        ("dynamic", {"preferred_batch_sizes": "four"}, "'four' are not whole numbers"),
        ("orca", {"reserve": "half"}, "reserve='half' is unknown. Choose oracle, pow2, max"),
        ("orca", {"max_tokens": 0}, "max_tokens=0 is not a whole number of 1 or more"),
        ("vllm-v0", {"preemption": "abort"}, "preemption='abort' is unknown. Choose recompute or swap"),
        ("vllm-v0", {"watermark": 1.0}, "watermark=1.0 is not a fraction"),
        ("sarathi", {"token_budget": 0}, "token_budget=0 is not a whole number of 1 or more"),
        ("sarathi", {"watermark": -0.1}, "watermark=-0.1 is not a fraction"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        load_scheduler(name, arguments)


def test_preempted_prompts_share_blocks_where_prefix_caching_is_on() -> None:
    """vLLM V0 and Sarathi look prefixes up; Orca and static batching compute every prompt whole."""
    found = []
    for policy in (VllmV0(), Sarathi(), Orca(), StaticBatching(timeout_s=0.0), DynamicBatching(timeout_s=0.0)):
        requests = [Request(i, 1.0 * i, 100, 2, prefix_ids=(1, 2, 3, 4, 5, 6), identity_tokens=96) for i in range(2)]
        kv = KVCache(100, 16, prefix_block_tokens=16)
        served(policy, requests, kv=kv)
        assert kv.free_blocks == kv.total_blocks
        found.append(requests[1].cached_tokens)
    assert found == [96, 96, 0, 0, 0]
