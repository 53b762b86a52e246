"""Engines by name: what each decides, what overrides it, and what the result says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsim import cli
from llmsim.cost import EAGER, FULL, PIECEWISE
from llmsim.engines import ENGINES, PhaseGraphs, graphs_of, sglang_limits, sglang_memory_share, sglang_running
from llmsim.hardware import find_gpu, find_model
from llmsim.kvcache import KVCache
from llmsim.memory import RUNTIME_BYTES
from llmsim.radixcache import RadixCache
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet, blocks_of, cost_of, simulate
from llmsim.trace import Trace

GIB = 2**30


def scenario(**settings: object) -> Scenario:
    return Scenario(**({"model": "llama-3.1-8b", "gpu": "h100-sxm"} | settings))  # type: ignore[arg-type]


def tiny() -> Trace:
    return Trace("tiny", np.zeros(4), np.full(4, 50), np.full(4, 5))


def test_the_default_engine_is_vllm_and_changes_nothing() -> None:
    plain = scenario()
    assert (plain.engine, plain.scheduler, plain.block_size, plain.gpu_memory_utilization) == ("vllm", "vllm", 16, 0.92)
    assert plain == scenario(engine="vllm", scheduler="vllm", block_size=16, gpu_memory_utilization=0.92)
    resolved = plain.resolved()
    assert (type(resolved.block_size), type(resolved.scheduler)) == (int, str)
    assert cost_of(plain).label == cost_of(scenario(engine="vllm")).label


@pytest.mark.parametrize(
    ("engine", "policy", "block", "tokens", "seqs"),
    [
        ("sglang", "sglang", 1, 8192, 2048),
        ("tensorrt-llm", "tensorrt-llm", 32, 8192, 2048),
        ("vllm-v0", "vllm-v0", 16, 131072, 256),
    ],
)
def test_an_engine_brings_scheduler_block_size_and_limits(
    engine: str, policy: str, block: int, tokens: int, seqs: int
) -> None:
    s = scenario(engine=engine).resolved()
    assert (s.scheduler, s.block_size, s.max_num_batched_tokens, s.max_num_seqs) == (policy, block, tokens, seqs)


def test_what_is_given_is_not_the_engines() -> None:
    s = scenario(engine="sglang", scheduler="vllm", block_size=16, gpu_memory_utilization=0.7, max_num_seqs=7)
    s = s.resolved()
    assert (s.scheduler, s.block_size, s.gpu_memory_utilization, s.max_num_seqs) == ("vllm", 16, 0.7, 7)


def test_another_engine_replaces_what_was_not_given() -> None:
    changed = replace(scenario(max_num_seqs=7), engine="sglang")
    assert (changed.scheduler, changed.block_size, changed.max_num_seqs) == ("sglang", 1, 7)
    back = replace(changed, engine="vllm")
    assert (back.scheduler, back.block_size, back.gpu_memory_utilization) == ("vllm", 16, 0.92)
    kept = replace(scenario(block_size=32), engine="sglang")
    assert kept.block_size == 32


def test_a_scenario_survives_its_file(tmp_path: object) -> None:
    import tomllib

    s = scenario(engine="sglang")
    assert Scenario.from_dict(tomllib.loads(s.to_toml())) == s


def test_a_scheduler_alone_leaves_memory_and_limits() -> None:
    only = scenario(scheduler="sglang").resolved()
    assert replace(only, scheduler="vllm") == scenario().resolved()


@pytest.mark.parametrize(
    ("gpu", "tp", "limits"),
    [
        ("l40s", 1, (4096, 32)),
        ("l40s", 4, (4096, 160)),
        ("h100-sxm", 1, (8192, 256)),
        ("h200-sxm", 8, (8192, 512)),
        ("b200", 1, (16384, 512)),
    ],
)
def test_sglangs_table_by_gpu_memory(gpu: str, tp: int, limits: tuple[int, int]) -> None:
    assert sglang_limits(find_gpu(gpu), tp) == limits


def test_mem_fraction_static_by_hand() -> None:
    """512 + 1.5 * 8192 + 128 + 512 + 8 * 58 MiB of 81,091 MiB; 50 sizes up to 4096, 8 more up to 8192."""
    gpu = find_gpu("h100-sxm")
    reserve = (512 + 12288 + 128 + 512 + 8 * 58) * 2**20
    assert sglang_memory_share(gpu, 1, 8192) == round(1 - reserve / gpu.memory_bytes, 3)
    assert sglang_memory_share(gpu, 1, 2048) == round(1 - 10 * GIB / gpu.memory_bytes, 3)  # at least 10 GiB


def test_sglangs_pool_is_its_share_less_the_weights() -> None:
    s = scenario(engine="sglang", gpu_memory_utilization=0.8)
    gpu, model = find_gpu("h100-sxm"), find_model("llama-3.1-8b")
    rope = 131072 * 128 * 2
    pool = 0.8 * gpu.memory_bytes - model.weight_bytes("bfloat16", 1) - rope - RUNTIME_BYTES
    assert blocks_of(s) - 1 == int(pool // model.kv_bytes_per_token("bfloat16", 1))


def test_tensorrt_llm_takes_a_share_of_what_is_free() -> None:
    all_of_it = blocks_of(scenario(engine="tensorrt-llm", gpu_memory_utilization=1.0)) - 1
    assert blocks_of(scenario(engine="tensorrt-llm")) - 1 == pytest.approx(0.9 * all_of_it, abs=1)


@pytest.mark.parametrize(
    ("pool", "context", "running"),
    [(400_000, 131_072, 2048), (900_000, 131_072, 3515), (900_000, 8192, 4096), (100, 8192, 50)],
)
def test_max_running_requests(pool: int, context: int, running: int) -> None:
    assert sglang_running(pool, context) == running


def test_a_model_that_does_not_fit_is_refused_with_the_engine_named() -> None:
    with pytest.raises(ValueError, match=r"room for \d+ tokens of KV cache beside llama-3.1-70b.*SGLang"):
        blocks_of(Scenario(model="llama-3.1-70b", gpu="h100-sxm", engine="sglang", tensor_parallel=2))


def test_the_engines_cache() -> None:
    caches = {
        engine: type(Fleet(tiny(), scenario(engine=engine, cost="constant:0.01")).replicas[0].kv)
        for engine in ("vllm", "sglang", "tensorrt-llm")
    }
    assert caches == {"vllm": KVCache, "sglang": RadixCache, "tensorrt-llm": KVCache}


def test_prompts_and_decodes_have_graphs_of_their_own() -> None:
    graphs = graphs_of("sglang", find_gpu("h100-sxm"), 1, 2048, 8192, "full_and_piecewise")
    assert [graphs.mode(n, 0) for n in (1, 256, 257)] == [FULL, FULL, EAGER]
    assert [graphs.mode(n, 1) for n in (257, 8192, 8193)] == [PIECEWISE, PIECEWISE, EAGER]
    assert graphs.padded(9) == 12
    assert graphs.padded(4100) == 4608
    assert graphs_of("tensorrt-llm", find_gpu("h100-sxm"), 1, 64, 8192, "full_and_piecewise").mode(64, 1) == EAGER
    assert PhaseGraphs([1, 2], [4], "none").mode(1, 0) == EAGER


def test_engines_before_v1_have_no_prefix_cache_and_no_overlap() -> None:
    s = scenario(engine="orca")
    assert (s.enable_prefix_caching, s.async_scheduling) == (False, False)


def test_the_result_says_whose_kernels_these_are() -> None:
    assert cost_of(scenario(engine="sglang")).label.endswith(
        "; calibrated on vLLM: the kernels and host of SGLang assumed alike"
    )
    assert "assumed alike" not in cost_of(scenario(scheduler="sglang")).label


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine_serves(engine: str) -> None:
    result = simulate(tiny(), scenario(engine=engine, cost="constant:0.01"))
    assert (result.requests["finish_s"] > 0).all()
    assert result.scenario.scheduler == engine


def test_a_radix_tree_knows_no_other_kinds_of_cache() -> None:
    with pytest.raises(ValueError, match="eviction='lfu': the engine sglang has a radix tree"):
        scenario(engine="sglang", eviction="lfu")


def test_unknown_engines_are_named() -> None:
    with pytest.raises(ValueError, match=r"engine='sglan' is unknown: did you mean sglang\?"):
        scenario(engine="sglan")


def test_the_command_line_knows_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "engines"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ENGINES)
    command = ["replay", "traces/chat.csv", "--limit", "20", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--no-out"]
    assert cli.main([*command, "--engine", "sglang"]) == 0
    assert "kernels and host of SGLang assumed alike" in capsys.readouterr().out
    assert cli.main([*command, "--engine", "orca", "--enable-prefix-caching"]) == 2
    assert "the engine orca has none" in capsys.readouterr().err
