"""KV memory reserved in one piece: what each kind reserves, buddies by search, and the figure of the vLLM paper."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from llmsim.contiguous import KINDS, Buddies, ContiguousKV
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace


def test_pieces_are_halved_and_put_together_again() -> None:
    buddies = Buddies(8)
    first, second = buddies.take(0), buddies.take(0)
    assert (first, second) == (0, 1)
    assert buddies.take(2) == 4
    assert not buddies.fits(2)  # 2 and 3 are free, and that is all
    buddies.give(first, 0)
    assert not buddies.fits(2)  # its buddy is not
    buddies.give(second, 0)
    assert buddies.fits(2)


def test_memory_of_any_size_is_cut_into_aligned_pieces() -> None:
    buddies = Buddies(13)
    assert [sorted(pieces) for pieces in buddies.free] == [[12], [], [8], [0]]


@pytest.mark.parametrize("seed", range(5))
def test_buddies_never_overlap_and_lose_nothing(seed: int) -> None:
    random = Random(seed)
    total = random.randrange(20, 200)
    buddies = Buddies(total)
    owner: list[int | None] = [None] * total  # the plain twin: who has each block
    given: dict[int, tuple[int, int]] = {}
    for turn in range(600):
        order = random.randrange(5)
        free_runs = any(
            all(owner[i] is None for i in range(start, start + (1 << order)))
            for start in range(0, total - (1 << order) + 1, 1 << order)
        )
        if random.random() < 0.55:
            assert buddies.fits(order) == free_runs  # buddies that are free are always put together
            if free_runs:
                start = buddies.take(order)
                assert start % (1 << order) == 0
                assert all(owner[i] is None for i in range(start, start + (1 << order)))
                owner[start : start + (1 << order)] = [turn] * (1 << order)
                given[turn] = (start, order)
        elif given:
            start, order = given.pop(random.choice(list(given)))
            buddies.give(start, order)
            owner[start : start + (1 << order)] = [None] * (1 << order)
    assert given


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("max", 128), ("pow2", 16), ("oracle", 8)],  # 2048; 100 + 64 = 164: 11 blocks; 100 + 20 = 120: 8 blocks
)
def test_what_each_kind_reserves(kind: str, blocks: int) -> None:
    kv = ContiguousKV(1024, 16, kind=kind, max_model_len=2048)
    request = Request(0, 0.0, 100, 20 if kind == "oracle" else 33)
    assert kv.reserved_blocks(request) == blocks
    hit = kv.match(request, 100)
    kv.admit(request, hit, 100)
    assert (hit.blocks, hit.idle_blocks, kv.free_blocks) == (0, blocks, 1024 - blocks)
    kv.release(request, 0, 119)
    assert kv.free_blocks == 1024


def test_scattered_free_blocks_admit_nobody() -> None:
    """Two thirds are free, and no piece of half the memory: external fragmentation."""
    kv = ContiguousKV(8, 16, kind="oracle", max_model_len=64)
    small = [Request(i, 0.0, 8, 8) for i in range(8)]
    for request in small:
        kv.admit(request, kv.match(request, 8), 8)
    for request in small[1:4] + small[5:]:
        kv.release(request, 0, 15)
    large = Request(9, 0.0, 50, 14)
    assert kv.free_blocks == 6
    assert kv.reserved_blocks(large) == 4
    assert kv.match(large, 50).idle_blocks > kv.total_blocks


def test_a_cache_below_one_request_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_allocation='max': a request of max_model_len=2048 takes a piece of 128"):
        ContiguousKV(100, 16, kind="max", max_model_len=2048)


def test_contiguous_kv_is_not_shared_and_that_must_be_said() -> None:
    with pytest.raises(ValueError, match="enable_prefix_caching=false"):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", kv_allocation="max")


# ---- the vLLM paper, figure 2 --------------------------------------------------------------------------------------

PAPER = {"max": 0.204, "pow2": 0.268, "oracle": 0.382, "paged": 0.963}


@pytest.fixture(scope="module")
def shares() -> dict[str, float]:
    """Share of KV memory that holds token states, with lengths like ShareGPT's in that paper (means 161 and 338).

    15,700 tokens of KV beside OPT-13B on 40 GB, contexts of 2,048, more requests than can be served.
    """
    random = np.random.default_rng(0)
    n = 1500
    at_s = np.cumsum(random.exponential(1 / 50, n))
    prompt = np.clip(random.lognormal(np.log(161) - 0.605, 1.1, n).astype(np.int64), 4, 1024)
    output = np.clip(random.lognormal(np.log(338) - 0.405, 0.9, n).astype(np.int64), 4, 1000)
    trace = Trace("like ShareGPT", at_s - at_s[0], prompt, output)
    found = {}
    for kind in (*KINDS, "paged"):
        scenario = Scenario(
            model="llama-3.1-8b", gpu="a100-40gb-sxm", max_model_len=2048, num_gpu_blocks_override=981, cost="roofline",
            kv_allocation=kind, enable_prefix_caching=False,
        )  # fmt: skip
        result = simulate(trace, scenario)
        summary = result.summary()
        assert summary["completed"] == n
        assert kind == "paged" or summary["num_preemptions"] == 0
        found[kind] = summary["kv_token_share"]
    return found


@pytest.mark.parametrize("kind", PAPER)
def test_token_states_take_the_share_of_memory_that_the_paper_found(kind: str, shares: dict[str, float]) -> None:
    """Within four points: its trace and its schedulers are not ours."""
    assert shares[kind] == pytest.approx(PAPER[kind], abs=0.04), shares


def test_paging_holds_more_than_twice_the_tokens_of_the_best_reservation(shares: dict[str, float]) -> None:
    assert shares["max"] < shares["pow2"] < shares["oracle"] < shares["paged"] / 2
