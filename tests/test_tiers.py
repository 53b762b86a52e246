"""KV tiers: what they hold against sets of blocks, loads by hand, and replays that lose and gain nothing."""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import Any

import numpy as np
import pytest

from llmsim.kvcache import Node
from llmsim.metrics import Result
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet
from llmsim.tiers import Tier, TierSpec, parse_tiers
from llmsim.trace import Trace

GIB = 2**30

# ---- what a tier holds ---------------------------------------------------------------------------------------------


class PlainTier:
    """Sets of blocks by stretch, least recently used first; what is lost goes below."""

    def __init__(self, blocks: int, below: PlainTier | None) -> None:
        self.blocks, self.below = blocks, below
        self.held: OrderedDict[Node, set[int]] = OrderedDict()

    def put(self, node: Node, start: int, end: int) -> None:
        new = set(range(start, end))
        old = self.held.get(node, set())
        if old and not any(block + step in old for block in new for step in (-1, 0, 1)):
            old = set()
        self.held[node] = old | new
        self.held.move_to_end(node)
        lost: dict[Node, set[int]] = {}
        while sum(map(len, self.held.values())) > self.blocks:
            oldest = next(iter(self.held))
            block = max(self.held[oldest])
            self.held[oldest].remove(block)
            lost.setdefault(oldest, set()).add(block)
            if not self.held[oldest]:
                del self.held[oldest]
        if self.below is not None:
            for which, blocks in lost.items():
                self.below.put(which, min(blocks), max(blocks) + 1)


@pytest.mark.parametrize("seed", range(10))
def test_a_tier_holds_what_sets_of_blocks_hold(seed: int) -> None:
    random = Random(seed)
    spec = TierSpec("t", 1.0, 1.0, 0.0)
    lower = Tier(spec, 1.0, None)
    upper = Tier(spec, 1.0, lower)
    upper.blocks, lower.blocks = 20, 30
    plain_lower = PlainTier(30, None)
    plain_upper = PlainTier(20, plain_lower)
    nodes = [Node() for _ in range(8)]
    for turn in range(500):
        node, start = random.choice(nodes), random.randrange(10)
        end = random.randrange(start + 1, 13)
        upper.put(node, start, end, float(turn))
        plain_upper.put(node, start, end)
        for tier, plain in ((upper, plain_upper), (lower, plain_lower)):
            assert tier.used_blocks == sum(map(len, plain.held.values())) <= tier.blocks
            assert list(tier.parts) == list(plain.held)
            for one in nodes:
                held, at = plain.held.get(one, set()), random.randrange(12)
                reach = next(block for block in range(at, 99) if block not in held)
                assert tier.has(one, at) == reach


def test_loads_and_writes_queue_up_each_for_themselves() -> None:
    """10 blocks a second, 0.5 s until the first is there."""
    tier = Tier(TierSpec("t", 100.0, 10.0, 0.5), 1.0, None)
    first, second = Node(), Node()
    tier.put(first, 0, 20, 0.0)
    tier.put(second, 0, 10, 0.0)
    assert [tier.parts[node].ready_s for node in (first, second)] == [2.5, 3.5]
    assert tier.read(20, tier.parts[first].ready_s, 1.0) == pytest.approx(2.5 + 2.0 + 0.5)  # not before it is there
    assert tier.read(10, tier.parts[second].ready_s, 1.0) == pytest.approx(4.5 + 1.0 + 0.5)  # behind the load before


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("none", []),
        ("cpu:64GiB:50GB/s:10us", [("cpu", 64 * GIB, 50e9, 1e-5)]),
        ("cpu:1TiB:5GB/s:2ms,far:0.5GB:100MB/s:0.1s", [("cpu", 2**40, 5e9, 2e-3), ("far", 5e8, 1e8, 0.1)]),
    ],
)
def test_specifications(text: str, specs: list[tuple[Any, ...]]) -> None:
    assert parse_tiers(text) == [TierSpec(*spec) for spec in specs]


@pytest.mark.parametrize(
    "text", ["cpu", "cpu:64:50GB/s:10us", "cpu:64GiB:50GB:10us", "cpu:0GiB:5GB/s:1us", "a:1GB:1GB/s:1s,a:2GB:1GB/s:1s"]
)
def test_what_is_no_tier_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="kv_tiers="):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", kv_tiers=text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_prefix_caching": False, "kv_tiers": "cpu:1GB:1GB/s:1us"}, "without prefix caching nothing is found"),
        ({"eviction": "lfu", "kv_tiers": "cpu:1GB:1GB/s:1us"}, "eviction='lfu' and kv_tiers"),
        ({"kv_tier_prefetch": True}, "give kv_tiers"),
    ],
)
def test_what_contradicts_tiers_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", **changes)


# ---- in a replay ---------------------------------------------------------------------------------------------------


def named(prompts: list[tuple[float, tuple[int, ...]]], output: int = 5, tail: int = 10) -> Trace:
    """(arrival, ids of 64 tokens); each prompt ends `tail` tokens into a last, own block."""
    ids = [(*names, 10_000 + i) for i, (_, names) in enumerate(prompts)]
    tokens = np.array([64 * (len(row) - 1) + tail for row in ids])
    return Trace(
        "named", np.array([at_s for at_s, _ in prompts]), tokens, np.full(len(ids), output), block_tokens=64,
        block_ids=list(ids),
    )  # fmt: skip


def run(trace: Trace, **changes: Any) -> tuple[Result, Fleet]:
    plain: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100-sxm", "launch_jitter": False}
    fleet = Fleet(trace, Scenario(**plain | changes))
    return fleet.run(), fleet


A, B = tuple(range(64)), tuple(range(100, 190))  # 4,096 and 5,760 tokens
RETURN = [(0.0, A), (2.0, B), (4.0, A)]  # in 400 blocks (6,400 tokens) the second one takes the place of the first


@pytest.mark.parametrize("write", ["write_through", "on_eviction"])
def test_what_the_gpu_lost_is_loaded_in_the_time_that_takes(write: str) -> None:
    """4,096 tokens of 131,072 bytes at 10 GB/s: 53.7 ms, and 1 ms of latency; then the last 10 tokens are computed."""
    settings = {"num_gpu_blocks_override": 401, "kv_tier_write": write}
    result, fleet = run(named(RETURN), kv_tiers="cpu:8GiB:10GB/s:1ms", **settings)
    without, _ = run(named(RETURN), num_gpu_blocks_override=401)
    small, _ = run(named([(0.0, ()), (4.0, ())]), num_gpu_blocks_override=401)
    lost = without.requests["cached_tokens"][2]
    assert lost < 800
    assert result.requests["cached_tokens"].tolist() == [0, 0, 4096]
    (tier,) = result.summary()["kv_tiers"]
    assert tier["loaded_tokens"] == 4096 - lost
    load_s = (4096 - lost) * 131072 / 10e9 + 1e-3
    waited_s = result.requests["scheduled_s"][2] - 4.0
    assert waited_s == pytest.approx(load_s, abs=0.006)  # it is seen when the host looks next
    compute_s = small.requests["first_token_s"][1] - 4.0
    assert result.requests["first_token_s"][2] - 4.0 == pytest.approx(load_s + compute_s, abs=0.008)
    assert without.requests["first_token_s"][2] - 4.0 > load_s + compute_s + 0.02
    assert fleet.replicas[0].kv.free_blocks == 400


def test_others_go_on_while_one_is_loaded() -> None:
    """A slow tier: the load takes 4 s, and another request is served in that time as if nothing were there."""
    slow = "cpu:8GiB:0.13GB/s:1ms"
    prompts = [*RETURN, (4.5, (7,))]
    result, _ = run(named(prompts, output=40), kv_tiers=slow, num_gpu_blocks_override=401)
    alone, _ = run(named([(0.0, ()), (4.5, (7,))], output=40), num_gpu_blocks_override=401)
    assert result.requests["scheduled_s"][2] > 7.5
    assert result.requests["finish_s"][3] == pytest.approx(alone.requests["finish_s"][1], abs=0.02)
    assert result.requests["finish_s"][3] < result.requests["scheduled_s"][2]


def test_a_load_takes_no_token_budget() -> None:
    result, _ = run(named(RETURN), kv_tiers="cpu:8GiB:10GB/s:1ms", num_gpu_blocks_override=401)
    computed = int(result.iterations["prefill_tokens"].sum())
    assert computed == int(result.requests["prompt_tokens"].sum() - result.requests["cached_tokens"].sum())


def test_less_than_a_block_is_not_loaded() -> None:
    trace = named([(0.0, ()), (1.0, ())], tail=15)
    result, fleet = run(trace, kv_tiers="cpu:8GiB:10GB/s:1ms")
    assert fleet.replicas[0].scheduler.loads == 0
    assert result.requests["cached_tokens"].tolist() == [0, 0]


def test_the_last_token_is_computed_though_all_of_a_prompt_is_there() -> None:
    """Prompts of 65 blocks, known to the last one: 64 are loaded."""
    prompts = [(0.0, A), (2.0, B), (4.0, A)]
    trace = named(prompts, tail=16)
    trace.block_ids[2] = trace.block_ids[0]  # type: ignore[index]
    result, _ = run(trace, kv_tiers="cpu:8GiB:10GB/s:1ms", num_gpu_blocks_override=401)
    assert result.requests["cached_tokens"][2] == 4096
    assert result.requests["prompt_tokens"][2] == 4096 + 16


def test_prefetch_moves_content_up_before_it_is_asked_for() -> None:
    """What the GPU lost lies on a slow disk. A long answer keeps the only slot, the next prompt waits: with prefetch
    its KV is in host memory by then."""
    tiers = "cpu:0.3GiB:20GB/s:10us,disk:64GiB:1GB/s:1ms"
    prompts = [*RETURN[:2], (4.0, B[:80]), (4.01, A)]
    settings = {"num_gpu_blocks_override": 401, "max_num_seqs": 1, "kv_tiers": tiers}
    trace = named(prompts, output=200)
    plain, _ = run(trace, **settings)
    early, _ = run(trace, kv_tier_prefetch=True, **settings)
    waited = [r.requests["first_token_s"][3] - r.requests["finish_s"][2] for r in (plain, early)]
    assert waited[0] > waited[1] + 0.1


def made(seed: int, requests: int) -> Trace:
    """Families with common beginnings; answers of any length."""
    random = Random(seed)
    prompts, at_s = [], 0.0
    for i in range(requests):
        at_s += random.expovariate(4.0)
        family, common = random.randrange(5), random.randrange(40)
        own = tuple(1000 * (i + 1) + j for j in range(random.randrange(20)))
        prompts.append((at_s, tuple(100_000 * (family + 1) + j for j in range(common)) + own))
    return named(prompts, output=60)


@pytest.mark.parametrize("scheduler", ["vllm", "chunked"])
@pytest.mark.parametrize("write", ["write_through", "on_eviction"])
@pytest.mark.parametrize("seed", range(3))
def test_under_load_everybody_is_served_and_all_comes_back(seed: int, write: str, scheduler: str) -> None:
    result, fleet = run(
        made(seed, 150), num_gpu_blocks_override=300, kv_tiers="cpu:1GiB:1GB/s:1ms,disk:2GiB:0.5GB/s:2ms",
        kv_tier_write=write, kv_tier_prefetch=seed == 2, scheduler=scheduler,
    )  # fmt: skip
    (replica,) = fleet.replicas
    assert np.isfinite(result.requests["finish_s"]).all()
    assert (result.requests["cached_tokens"] < result.requests["prompt_tokens"]).all()
    assert replica.kv.free_blocks == replica.kv.total_blocks
    assert not replica.paused
    assert not replica.scheduler._loading
    assert replica.scheduler.loads > 20
    for tier in replica.kv.tiers:
        assert tier.used_blocks == sum(part.end - part.start for part in tier.parts.values()) <= tier.blocks


@pytest.mark.parametrize("write", ["write_through", "on_eviction"])
def test_one_at_a_time_ample_tiers_find_what_an_ample_gpu_finds(write: str) -> None:
    trace = made(7, 120)
    alone = {"concurrency": 1}
    small, _ = run(trace, num_gpu_blocks_override=300, kv_tiers="cpu:512GiB:50GB/s:1us", kv_tier_write=write, **alone)
    large, _ = run(trace, num_gpu_blocks_override=50_000, **alone)
    assert small.requests["cached_tokens"].tolist() == large.requests["cached_tokens"].tolist()
    assert large.requests["cached_tokens"].sum() > 50_000


def test_a_tier_below_one_block_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_tiers: cpu is smaller than one KV block of 2097152 bytes"):
        run(named(RETURN), kv_tiers="cpu:1MB:1GB/s:1us")


def test_the_report_says_what_each_tier_gave() -> None:
    from llmsim.report import report

    result, _ = run(named(RETURN), kv_tiers="cpu:8GiB:10GB/s:1ms", num_gpu_blocks_override=401)
    assert "Loaded from cpu (% of prompt tokens):" in report(result.summary())
