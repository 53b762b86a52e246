"""The batching policies against their plain twins: every request, every gap, over random traces, hosts and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import simpy
from plain_engine import PlainEngine, PlainRequest, Settings
from plain_policies import Plain, PlainOrca, PlainSarathi, PlainStatic, PlainV0
from test_twin import HOSTS, SteppedCost, assert_agree, requests_of

from llmsim.cost import LaunchNoise
from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.schedulers.orca import Orca
from llmsim.schedulers.sarathi import Sarathi
from llmsim.schedulers.static import StaticBatching
from llmsim.schedulers.vllm_v0 import VllmV0


class PlainV0Swapping(PlainV0):
    swaps, copy_s, host_blocks = True, 3e-4, 60


class PlainSarathi64(PlainSarathi):
    token_budget = 64


class PlainStaticWaiting(PlainStatic):
    batch_size, timeout_s = 6, 0.15


PAIRS: dict[str, tuple[Callable[[], Any], type[Plain]]] = {
    "orca": (Orca, PlainOrca),
    "vllm v0": (VllmV0, PlainV0),
    "vllm v0 swap": (lambda: VllmV0(preemption="swap"), PlainV0Swapping),
    "sarathi": (Sarathi, PlainSarathi),
    "sarathi 64": (lambda: Sarathi(token_budget=64), PlainSarathi64),
    "static": (lambda: StaticBatching(batch_size=4, timeout_s=0.0, stream=True), PlainStatic),
    "static waiting": (lambda: StaticBatching(batch_size=6, timeout_s=0.15, stream=True), PlainStaticWaiting),
}
CASES = [  # seed, rate, prompt, output, blocks, extra settings
    (0, 8.0, 300, 60, 4000, {}),
    (1, 40.0, 300, 60, 4000, {"max_num_seqs": 16}),
    (2, 30.0, 200, 80, 160, {}),
    (3, 30.0, 200, 80, 120, {"max_num_batched_tokens": 300, "max_num_seqs": 64}),
    (4, 2.0, 100, 200, 4000, {}),
]


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
@pytest.mark.parametrize("pair", PAIRS)
def test_policies_agree_with_their_plain_twins(pair: str, case: Any, host: str, asynchronous: bool) -> None:
    seed, rate, prompt, output, blocks, extra = case
    made, plain_type = PAIRS[pair]
    settings = Settings(num_gpu_blocks=blocks, async_scheduling=asynchronous, prefix_caching=False)
    settings = replace(settings, **extra)
    rows = requests_of(Random(seed), 60, rate, prompt, output, settings.block_size, False)
    rows = [row for row in rows if (row[1] + row[2]) / settings.block_size < blocks - 2]
    cost = SteppedCost(HOSTS[host], Graphs.of_engine(256, 8192), 1.0)
    plain = [PlainRequest(i, r[0], r[1], r[2]) for i, r in enumerate(rows)]
    noise = LaunchNoise(cost.host, seed)
    twin = plain_type(settings)
    steps = PlainEngine(cost, settings, noise.draw, twin).run(plain)

    env = simpy.Environment()
    swap = Swap(PlainV0Swapping.host_blocks, PlainV0Swapping.copy_s)
    replica = Replica(
        env, made(), cost, KVCache(blocks - 1, settings.block_size, prefix_caching=False),
        Limits(settings.max_num_seqs, settings.max_num_batched_tokens), asynchronous=asynchronous, swap=swap,
        noise=LaunchNoise(cost.host, seed),
    )  # fmt: skip
    fast = [Request(i, r[0], r[1], r[2]) for i, r in enumerate(rows)]
    replica.start(iter(fast))
    env.run()
    assert_agree(replica, fast, plain, len(steps))
    if pair.startswith(("vllm", "sarathi")) and blocks < 200:
        assert replica.preemptions > 0, "memory was not tight: the comparison says little"
    if pair == "vllm v0 swap" and blocks < 200:
        assert swap.copied_in_blocks > 0
