"""The fast replica against the plain twin: every request, every gap, over random traces and settings."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import simpy
from plain_engine import PlainEngine, PlainRequest, Settings

from llmsim.cost import Host, LaunchNoise, Ramp
from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.replica import Limits, Replica
from llmsim.request import Request
from llmsim.schedulers.vllm import VllmScheduler

TOLERANCE_S = 1e-9  # sums of series in another order of additions


class SteppedCost:
    """GPU seconds with every effect a cost model may have: padding steps, attention, batch, cached tokens."""

    kind = "test"
    label = "test"

    def __init__(self, host: Host, graphs: Graphs, scale: float) -> None:
        self.host, self.graphs, self.scale = host, graphs, scale
        self.mode = graphs.mode

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        a, b = self.scale * (6e-3 + 1e-5 * self.graphs.padded(seqs)), 5e-8 * self.scale
        return Ramp(a + b * kv_tokens, b * seqs)

    def mixed_s(self, chunks, seqs, kv_tokens):
        new = sum(n for n, _ in chunks)
        pairs = sum(n * c + n * (n + 1) / 2 for n, c in chunks)
        return self.scale * (6e-3 + 2e-5 * (new + seqs) + 1e-9 * pairs + 7e-8 * kv_tokens)


HOSTS = {
    "none": Host(),
    "vllm": Host(
        schedule_s=3e-4, schedule_per_request_s=2e-6, schedule_per_token_s=2e-7, launch_s=(1.4e-3, 12e-3, 26e-3),
        launch_per_request_s=(5e-6, 0.0, 0.0), launch_per_chunk_s=(0.0, 1e-3, 2e-3),
        launch_jitter_s=((), (-2e-3, 0.0, 3e-3), (-4e-3, 0.0, 1e-3, 9e-3)),
        launch_drift_s=((), (-1e-3, 2e-3), (-2e-3, 3e-3)), drift_hold_s=0.2, update_s=1.3e-4, update_per_output_s=6e-6,
        interference_per_token_s=2e-6, lead_s=(1e-3, 2e-3, 2e-3), tail_s=(5e-4, 1e-3, 1e-3), receive_busy_s=3e-4,
        receive_per_token_s=5e-7, receive_s=9e-4, wake_s=4e-4, respond_s=1.2e-3, respond_per_output_s=3.6e-5,
        warm_share=0.05,
        cool_share=0.07,
    ),
}  # fmt: skip
HOSTS["late"] = replace(HOSTS["vllm"], return_s=4e-4)
HOSTS["worker"] = replace(HOSTS["vllm"], return_s=4e-4, worker=True)
HOSTS["slow worker"] = replace(HOSTS["worker"], launch_s=(7e-3, 14e-3, 30e-3))


def requests_of(random: Random, n: int, rate: float, prompt: int, output: int, block: int, shared: bool):
    """[arrival, prompt, output, priority, content of the prompt's full blocks]"""
    at, rows = 0.0, []
    for i in range(n):
        at += random.expovariate(rate) if random.random() < 0.8 else 0.0  # some arrive together
        p = max(1, int(random.lognormvariate(0, 0.8) * prompt))
        o = max(1, int(random.lognormvariate(0, 0.8) * output)) if random.random() < 0.9 else 1
        keys: tuple = ()
        if shared:
            stem = random.randrange(3)
            same = random.randrange(0, 8)
            keys = tuple(("s", stem, k) if k < same else ("r", i, k) for k in range(p // block))
            keys = tuple(keys[: k + 1] for k in range(len(keys)))  # chained, as hashes are
        rows.append((at, p, o, random.randrange(3), keys))
    return rows


def run_fast(rows, settings: Settings, cost, noise):
    env = simpy.Environment()
    done: dict[int, Request] = {}
    held = iter(())

    def make(i, row):
        request = Request(i, row[0], row[1], row[2], row[3])
        if row[4]:
            request.prefix_ids, request.identity_tokens = row[4], row[1]
        return request

    def finish(request, replica):
        done[request.id] = request
        follower = next(held, None)
        if follower is not None:
            follower.arrival_s = request.finish_s
            timer = env.timeout(request.finish_s - env.now)
            timer.callbacks.append(lambda _: replica.submit(follower))

    replica = Replica(
        env,
        VllmScheduler(
            policy=settings.policy,
            long_prefill_token_threshold=settings.long_prefill_token_threshold,
            watermark=settings.watermark,
            reserve_full_isl=settings.reserve_full_isl,
        ),
        cost,
        KVCache(
            settings.num_gpu_blocks - 1, settings.block_size, prefix_caching=settings.prefix_caching,
            prefix_block_tokens=settings.block_size,
        ),
        Limits(settings.max_num_seqs, settings.max_num_batched_tokens),
        asynchronous=settings.async_scheduling,
        noise=noise,
        on_finish=finish,
    )  # fmt: skip
    requests = [make(i, row) for i, row in enumerate(rows)]
    if settings.concurrency:
        held = iter(requests[settings.concurrency :])
        replica.start()
        for request in requests[: settings.concurrency]:
            timer = env.timeout(request.arrival_s)
            timer.callbacks.append(lambda _, request=request: replica.submit(request))
        env.run()
    else:
        yielded = iter(requests)
        if noise is not None and noise.online:
            replica.start()
            for request in yielded:
                timer = env.timeout(request.arrival_s)
                timer.callbacks.append(lambda _, request=request: replica.submit(request))
        else:
            replica.start(yielded)
        env.run()
    return replica, [done[i] for i in range(len(rows))]


def gaps_of(replica: Replica):
    gaps = []
    for gap_s, growth_s, count, weight, _ in replica.gaps.table():
        gaps.append(np.repeat(gap_s + growth_s * np.arange(count), weight))
    return np.sort(np.concatenate(gaps)) if gaps else np.empty(0)


class Noise(LaunchNoise):
    online = False


CASES = [
    # seed, rate, prompt, output, blocks, extra settings
    (0, 8.0, 300, 60, 4000, {}),
    (1, 40.0, 300, 60, 4000, {}),
    (2, 20.0, 800, 40, 4000, {"max_num_batched_tokens": 512, "max_num_seqs": 64}),
    (3, 30.0, 200, 80, 160, {}),
    (4, 30.0, 200, 80, 160, {"policy": "priority"}),
    (5, 30.0, 200, 80, 200, {"long_prefill_token_threshold": 64, "max_num_batched_tokens": 256, "max_num_seqs": 32}),
    (6, 30.0, 200, 80, 160, {"reserve_full_isl": False, "max_num_batched_tokens": 300, "max_num_seqs": 64}),
    (7, 30.0, 200, 80, 220, {"watermark": 0.05, "max_num_seqs": 16}),
    (8, 30.0, 100, 80, 400, {"max_num_batched_tokens": 16, "max_num_seqs": 64}),
    (9, 30.0, 200, 80, 160, {"prefix_caching": False}),
    (10, 3.0, 100, 200, 4000, {}),
    (11, 30.0, 200, 80, 260, {"concurrency": 12}),
    (12, 10.0, 200, 80, 4000, {"concurrency": 3}),
]


def assert_agree(replica: Replica, fast: list[Request], plain: list[PlainRequest], iterations: int) -> None:
    """The same token times, preemptions and cache hits as the plain twin, and nothing left behind."""
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.preemptions == theirs.preemptions, ours.id
        assert ours.cached_tokens == theirs.cached, ours.id
        assert ours.scheduled_s == pytest.approx(theirs.scheduled_s, abs=TOLERANCE_S), ours.id
        assert ours.first_token_s == pytest.approx(theirs.token_s[0], abs=TOLERANCE_S), ours.id
        assert ours.finish_s == pytest.approx(theirs.token_s[-1], abs=TOLERANCE_S), ours.id
    expected = np.sort(np.concatenate([np.diff(r.token_s) for r in plain]))
    np.testing.assert_allclose(gaps_of(replica), expected, atol=2 * TOLERANCE_S)
    assert replica.iterations.table()["iterations"].sum() == iterations
    assert replica.kv.free_blocks == replica.kv.total_blocks
    assert not replica.running
    assert not replica.waiting


# Half of all combinations: any three of case, host, scale and sharing occur in each of theirs.
GRID = [
    pytest.param(*case, host, scale, shared, id=f"{case[0]}-{host}-{name}-{'shared' if shared else 'own'}")
    for case in CASES
    for at, host in enumerate(HOSTS)
    for scale, name in ((1.0, "gpu-bound"), (0.15, "host-bound"))
    for shared in (False, True)
    if (case[0] + at + (scale == 1.0) + shared) % 2 == 0
]


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(("seed", "rate", "prompt", "output", "blocks", "extra", "host", "scale", "shared"), GRID)
def test_replica_agrees_with_the_plain_twin(
    seed, rate, prompt, output, blocks, extra, host, scale, shared, asynchronous
):
    settings = Settings(num_gpu_blocks=blocks, async_scheduling=asynchronous, **extra)
    rows = requests_of(Random(seed), 60, rate / scale, prompt, output, settings.block_size, shared)
    rows = [row for row in rows if (row[1] + row[2]) / settings.block_size < blocks - 2]
    graphs = Graphs.of_engine(settings.max_num_seqs, settings.max_num_batched_tokens)
    cost = SteppedCost(HOSTS[host], graphs, scale)
    plain = [PlainRequest(i, r[0], r[1], r[2], priority=r[3], block_keys=r[4]) for i, r in enumerate(rows)]
    if settings.concurrency:
        rows = [(0.0, *row[1:]) for row in rows]
        for request in plain:
            request.send_s = 0.0
    noise = LaunchNoise(cost.host, seed)
    steps = PlainEngine(cost, settings, noise.draw).run(plain)
    for online in (False, True):
        own_noise = Noise(cost.host, seed)
        own_noise.online = online
        replica, fast = run_fast(rows, settings, cost, own_noise)
        assert_agree(replica, fast, plain, len(steps))
