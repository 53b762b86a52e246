"""KV caches that drop tokens: the batch against a count of every token, macro-steps against single ones, words."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from llmsim.compression import DroppingBatch, DroppingKV
from llmsim.kept import Kept, parse, risk
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.schedulers.vllm import VllmScheduler
from llmsim.simulate import Fleet, simulate
from llmsim.trace import Trace

# ---- the batch against a count of every token ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["window", "budget"])
def test_the_batch_agrees_with_a_count_of_every_token(kind: str, seed: int) -> None:
    random = Random(seed)
    kv = DroppingKV(100_000, 4, Kept(kind, random.choice((8, 18, 40))))
    batch, kept = DroppingBatch(kv), -(-kv.kept.tokens // 4) * 4
    assert kv.kept_tokens == kept
    plain: dict[Request, int] = {}  # computed tokens
    ended = 0
    for i in range(400):
        act = random.random()
        if act < 0.4 or not plain:
            prompt, output = random.randrange(1, 60), random.randrange(2, 60)
            request = Request(i, 0.0, prompt, output, computed_tokens=prompt, generated_tokens=1)
            batch.add(request)
            plain[request] = prompt
        elif act < 0.55:
            request = random.choice(list(plain))
            batch.remove(request)
            assert request.computed_tokens == plain.pop(request)
        else:
            steps = random.randrange(1, batch.steps_to_finish() + 1)
            blocks = sum(
                sum(computed + j < kept and (computed + j) % 4 == 0 for j in range(steps))
                for computed in plain.values()
            )
            assert batch.blocks_needed(steps) == blocks
            growing = batch.growing
            read = batch.kv_tokens
            done = batch.advance(steps)
            for request in plain:
                plain[request] += steps
            if not done:  # within a run what is read grows by the same amount each iteration
                assert batch.kv_tokens == read + steps * growing
            for request in done:
                assert plain.pop(request) == request.prompt_tokens + request.output_tokens - 1
                ended += 1
        assert batch.kv_tokens == sum(min(computed, kept) for computed in plain.values())
        assert batch.growing == sum(computed < kept for computed in plain.values())
        for request, computed in plain.items():
            assert batch.needs_block(request) == (computed < kept and computed % 4 == 0)
    assert ended > 10


# ---- blocks --------------------------------------------------------------------------------------------------------


def test_a_window_never_holds_more_than_its_blocks() -> None:
    kv = DroppingKV(100, 16, Kept("window", 64))
    assert [kv.blocks_for(tokens) for tokens in (1, 48, 64, 65, 5000)] == [1, 3, 4, 4, 4]


def test_a_budget_needs_the_whole_prompt_first() -> None:
    kv = DroppingKV(100, 16, Kept("budget", 64))
    batch = DroppingBatch(kv)
    request = Request(0, 0.0, 800, 50)
    kv.admit(request, kv.match(request, 800), 800)
    assert kv.free_blocks == 50
    request.computed_tokens, request.generated_tokens = 800, 1
    batch.add(request)
    assert (kv.free_blocks, batch.kv_tokens) == (96, 64)
    assert batch.blocks_needed(32) == 0
    batch.remove(request)
    kv.release(request, kv.blocks_for(800), 800)
    assert kv.free_blocks == 100


# ---- in a replay ---------------------------------------------------------------------------------------------------


class NeverHolding(VllmScheduler):
    def schedule(self, replica: Any, now_s: float) -> None:
        super().schedule(replica, now_s)


def trace(requests: int = 60, rate: float = 6.0) -> Trace:
    random = np.random.default_rng(1)
    at_s = np.cumsum(random.exponential(1.0 / rate, requests))
    return Trace(
        "made", at_s - at_s[0], random.integers(10, 3000, requests), random.integers(2, 700, requests)
    )  # fmt: skip


def scenario(**changes: Any) -> Scenario:
    plain: dict[str, Any] = {
        "model": "llama-3.1-8b", "gpu": "h100-sxm", "enable_prefix_caching": False, "launch_jitter": False,
    }  # fmt: skip
    return Scenario(**plain | changes)


@pytest.mark.parametrize("blocks", [4000, 420])
@pytest.mark.parametrize("spec", ["window:512", "sinks:4+252", "budget:400"])
def test_runs_of_iterations_agree_with_single_ones(spec: str, blocks: int) -> None:
    setting = scenario(kv_compression=spec, num_gpu_blocks_override=blocks)
    runs = simulate(trace(), setting)
    fleet = Fleet(trace(), setting)
    fleet.replicas[0].scheduler.__class__ = NeverHolding
    single = fleet.run()
    assert single.iterations["iterations"].max() == 1 < runs.iterations["iterations"].max() <= 700
    for column in ("first_token_s", "finish_s"):
        assert runs.requests[column] == pytest.approx(single.requests[column], abs=1e-9)
    replica = fleet.replicas[0]
    assert replica.kv.free_blocks == replica.kv.total_blocks
    assert np.isfinite(runs.requests["finish_s"]).all()


def test_what_is_dropped_is_room_and_time() -> None:
    """8 prompts of 4,000 tokens, 1,000 answers each: with a window of 512 each holds 32 blocks and decodes faster."""
    eight = Trace("eight", np.zeros(8), np.full(8, 4000), np.full(8, 1000))
    whole, window = (simulate(eight, scenario(kv_compression=spec)) for spec in ("none", "window:512"))
    assert whole.iterations["kv_blocks"].max() == 8 * -(-4999 // 16)
    assert window.iterations["kv_blocks"].max() == 8 * 32
    decode = [run.summary()["mean_tpot_ms"] for run in (whole, window)]
    cost = whole.cost
    step_ms = [1e3 * cost.decode_ramp(8, 8 * tokens).first_s for tokens in (4500, 512)]
    assert decode[0] - decode[1] == pytest.approx(step_ms[0] - step_ms[1], rel=0.05)


def test_a_window_that_nothing_reaches_changes_nothing() -> None:
    plain, wide = (simulate(trace(30), scenario(kv_compression=spec)) for spec in ("none", "window:4096"))
    assert (plain.requests["finish_s"] == wide.requests["finish_s"]).all()


# ---- words ---------------------------------------------------------------------------------------------------------


def test_the_result_names_the_risk() -> None:
    run = simulate(trace(5), scenario(kv_compression="sinks:4+508"))
    (line,) = run.summary()["caveats"]
    assert line.startswith("kv_compression=sinks:4+508 drops context; its effect on the answers is not modelled")
    assert simulate(trace(5), scenario()).summary()["caveats"] == []


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("none", None),
        ("window:4096", ("window", 4096)),
        ("sinks:4+2044", ("sinks", 2048)),
        ("budget:1024", ("budget", 1024)),
    ],
)
def test_specifications(spec: str, kept: tuple[str, int] | None) -> None:
    assert parse(spec) == kept
    assert (risk(spec) is None) == (kept is None)


@pytest.mark.parametrize("spec", ["window", "window:0", "sinks:4", "sinks:4+0", "budget:x", "half:3", "window:-3"])
def test_what_is_no_compression_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"kv_compression='{spec}'".replace("+", r"\+")):
        scenario(kv_compression=spec)


def test_dropped_kv_is_neither_shared_nor_contiguous() -> None:
    with pytest.raises(ValueError, match="dropped KV cannot be shared: give enable_prefix_caching=false"):
        Scenario(model="llama-3.1-8b", gpu="h100-sxm", kv_compression="window:512")
    with pytest.raises(ValueError, match="leave kv_allocation out"):
        scenario(kv_compression="window:512", kv_allocation="max")
