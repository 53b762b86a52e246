"""The roofline: limits worked out by hand, and the form the engine relies on."""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import pytest

from llmsim.cost import EAGER, FULL, PIECEWISE, Host
from llmsim.cost.graphs import Graphs
from llmsim.cost.load import CostSettings, load_cost
from llmsim.cost.roofline import (
    ATTENTION_FRACTION,
    COMPUTE_FRACTION,
    KV_FRACTION,
    LAYER_LATENCY_S,
    WEIGHT_FRACTION,
    bytes_moved,
    flops,
    ridge,
    windowed_pairs,
    work,
)
from llmsim.hardware import find_gpu, find_model, model_names

H100 = find_gpu("h100-sxm")
LLAMA = find_model("llama-3.1-8b")


def roofline(
    model="llama-3.1-8b", gpu="h100-sxm", tp=1, dtype="bfloat16", kv_dtype="auto", cudagraph="none", **settings
):
    """Without graphs unless asked: no padding."""
    graphs = Graphs.of_engine(256, 8192, cudagraph)
    return load_cost(
        "roofline", find_model(model), find_gpu(gpu), CostSettings(tp, dtype, kv_dtype, graphs, **settings)
    )


# ---- limits by hand ----------------------------------------------------------------------------------------------


def test_one_decode_streams_the_weights():
    weights_bytes = 2 * (LLAMA.linear_params + LLAMA.lm_head_params)
    floor_s = weights_bytes / (WEIGHT_FRACTION * 3.35e12) + 32 * LAYER_LATENCY_S
    assert roofline().decode_ramp(1, 0).first_s == pytest.approx(floor_s, rel=0.005)


def test_a_large_prefill_computes():
    tokens = 8192
    compute_s = 2 * LLAMA.linear_params * tokens / (COMPUTE_FRACTION * 989.4e12)
    pairs_s = 32 * 4 * 4096 * tokens * (tokens + 1) / 2 / (ATTENTION_FRACTION * 989.4e12)
    elements = 8 * 4096 + 2 * (32 + 16) * 128 + 3 * 14336  # norms, RoPE and activation, a row and layer
    rows_s = 32 * tokens * elements * 2 / (WEIGHT_FRACTION * 3.35e12)
    expected_s = compute_s + pairs_s + rows_s + 32 * LAYER_LATENCY_S
    assert roofline().mixed_s([(tokens, 0)], 0, 0) == pytest.approx(expected_s, rel=0.01)


def test_each_cached_token_costs_its_bytes():
    token_s = 131072 / (KV_FRACTION * 3.35e12)
    cost = roofline()
    assert cost.decode_ramp(64, 64_000).first_s - cost.decode_ramp(64, 0).first_s == pytest.approx(64_000 * token_s)
    assert cost.decode_ramp(64, 64_000).growth_s == pytest.approx(64 * token_s)


def test_the_recorded_h100_is_met_within_a_tenth():
    """Steady decode without context and prefill, as recorded with vLLM 0.25.1 (ms; microseconds a token)."""
    cost = roofline(cudagraph="full_and_piecewise")
    for seqs, recorded_ms in ((1, 6.5), (64, 7.1), (256, 10.3)):
        assert cost.decode_ramp(seqs, 0).first_s * 1e3 == pytest.approx(recorded_ms, rel=0.1)
    slope_us = (cost.mixed_s([(1, 0)] * 4096, 0, 0) - cost.mixed_s([(1, 0)] * 2048, 0, 0)) / 2048 * 1e6
    head_us = 2 * LLAMA.lm_head_params / (COMPUTE_FRACTION * 989.4e12) * 1e6
    assert slope_us - head_us == pytest.approx(22.7, rel=0.1)


@pytest.mark.parametrize(
    ("context", "seqs", "timed_ms", "off"),
    [
        (148, 1, 4.916, 0.1),
        (16_404, 1, 5.479, 0.1),
        (1044, 16, 5.623, 0.1),
        (16_403, 16, 12.981, 0.1),
        (147, 64, 5.927, 0.1),
        (1043, 64, 7.575, 0.1),
        (4116, 64, 13.488, 0.1),
        (148, 256, 10.842, 0.15),  # 256 rows are at the ridge, where the form is weakest
        (1044, 256, 17.809, 0.15),
    ],
)
def test_decodes_timed_on_an_h200_are_met(context, seqs, timed_ms, off):
    """GPU milliseconds of Llama-3.1-8B full-graph decodes, sampling included: vLLM 0.25.1, CUDA events, medians."""
    cost = roofline(gpu="h200-sxm", cudagraph="full_and_piecewise")
    assert cost.decode_ramp(seqs, seqs * context).first_s * 1e3 == pytest.approx(timed_ms, rel=off)


def test_the_ridge_is_the_larger_side_away_from_it():
    assert ridge(3.0, 4.0) == 5.0
    assert ridge(1.0, 0.1) == pytest.approx(1.0, rel=0.01)


def test_two_ranks_halve_the_weights_and_pay_two_all_reduces_a_layer():
    one, two = roofline().decode_ramp(1, 0).first_s, roofline(tp=2).decode_ramp(1, 0).first_s
    weights_s = 2 * (LLAMA.linear_params + LLAMA.lm_head_params) / (WEIGHT_FRACTION * 3.35e12)
    assert two - (one - weights_s / 2) == pytest.approx(2 * 32 * 8e-6, rel=0.05)


def test_slow_links_make_tensor_parallelism_slow():
    chunk = [(4096, 0)]
    assert roofline(tp=4).mixed_s(chunk, 0, 0) < 0.5 * roofline().mixed_s(chunk, 0, 0)
    message_s = 2 * 32 * 2 * 3 / 4 * 4096 * 4096 * 2 / (0.75 * 32e9)  # 64 all-reduces of 32 MiB over PCIe 4
    assert roofline(gpu="l40s", tp=4).mixed_s(chunk, 0, 0) > message_s
    # a bridge joins two boards: four of them talk over PCIe
    assert roofline(gpu="h100-pcie", tp=4).mixed_s(chunk, 0, 0) > roofline(gpu="h100-pcie", tp=2).mixed_s(chunk, 0, 0)


def test_fp8_and_int4_weights_stream_faster_and_only_fp8_computes_faster():
    decode = {dtype: roofline(dtype=dtype).decode_ramp(1, 0).first_s for dtype in ("bfloat16", "fp8", "int4")}
    assert decode["int4"] < decode["fp8"] < decode["bfloat16"]
    prefill = {dtype: roofline(dtype=dtype).mixed_s([(8192, 0)], 0, 0) for dtype in decode}
    assert prefill["fp8"] < 0.7 * prefill["bfloat16"]
    assert prefill["int4"] == pytest.approx(prefill["bfloat16"], rel=0.01)


def test_an_moe_decode_streams_the_experts_its_batch_reaches():
    mixtral, model = roofline("mixtral-8x7b", "h200-sxm"), find_model("mixtral-8x7b")
    grown_s = mixtral.decode_ramp(2, 0).first_s - mixtral.decode_ramp(1, 0).first_s
    more_experts = model.distinct_experts(2) - 2  # 3.5 of 8 against 2
    assert more_experts == pytest.approx(1.5)
    assert grown_s == pytest.approx(1.5 * model.expert_params() * 2 / (WEIGHT_FRACTION * 4.8e12), rel=0.01)


# ---- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("new", "done", "window"), [(5, 0, 3), (5, 2, 3), (5, 10, 3), (2, 0, 3), (4, 1, 100)])
def test_windowed_pairs_count_what_each_query_sees(new, done, window):
    assert windowed_pairs(new, done, window) == sum(min(done + i, window) for i in range(1, new + 1))


def test_sliding_layers_stop_reading_at_their_window():
    gemma = roofline("gemma-3-27b")  # 52 of 62 layers see 1024 tokens
    inside, outside = gemma.decode_ramp(8, 8 * 500), gemma.decode_ramp(8, 8 * 2000)
    assert outside.growth_s == pytest.approx(inside.growth_s * 10 / 62)
    far = gemma.decode_ramp(8, 8 * 4000)
    assert far.first_s - outside.first_s == pytest.approx(outside.growth_s * 2000)


def test_a_chunk_after_a_long_context_costs_its_pairs():
    cost = roofline()
    extra_pairs = 1000 * 30_000
    assert cost.mixed_s([(1000, 30_000)], 0, 0) - cost.mixed_s([(1000, 0)], 0, 0) == pytest.approx(
        extra_pairs * LLAMA.attention_flops_per_pair / (ATTENTION_FRACTION * 989.4e12)
    )


def test_splitting_a_prompt_into_chunks_keeps_its_pairs():
    cost = roofline()
    whole, halves = (
        cost.mixed_s([(8192, 0)], 0, 0),
        cost.mixed_s([(4096, 0)], 0, 0) + cost.mixed_s([(4096, 4096)], 0, 0),
    )
    assert halves == pytest.approx(whole, rel=0.05)


# ---- form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_positive_costs_that_grow(name):
    cost = roofline(name, "b200", tp=2, cudagraph="full_and_piecewise")
    seconds = [cost.decode_ramp(seqs, 0).first_s for seqs in (1, 2, 8, 64, 256, 512, 700)]
    assert seconds[0] > 0
    assert all(later >= earlier for earlier, later in pairwise(seconds))
    chunks = [cost.mixed_s([(new, 0)], 3, 1000) for new in (2, 100, 1000, 8000)]
    assert all(later > earlier for earlier, later in pairwise(chunks))


def test_a_run_of_decodes_is_the_series_of_its_iterations():
    cost, seqs, kv_tokens = roofline(cudagraph="full_and_piecewise"), 37, 37 * 900
    ramp = cost.decode_ramp(seqs, kv_tokens)
    one_by_one = sum(cost.decode_ramp(seqs, kv_tokens + i * seqs).first_s for i in range(500))
    assert ramp.elapsed_s(500) == pytest.approx(one_by_one, rel=1e-12)


def test_graphs_cost_their_padded_rows():
    padded = roofline(cudagraph="full_and_piecewise")
    exact = roofline()
    padding_s = padded.decode_ramp(249, 0).first_s - exact.decode_ramp(249, 0).first_s
    assert padding_s == pytest.approx(exact.decode_ramp(256, 0).first_s - exact.decode_ramp(249, 0).first_s, rel=0.2)
    assert [padded.mode(8, 0), padded.mode(400, 1), padded.mode(600, 1)] == [FULL, PIECEWISE, EAGER]


def test_a_one_token_chunk_costs_what_a_decode_does():
    cost = roofline()
    assert cost.mixed_s([(1, 700)], 0, 0) == pytest.approx(cost.decode_ramp(1, 700).first_s, rel=1e-9)
    assert cost.mixed_s([], 5, 4000) == pytest.approx(cost.decode_ramp(5, 4000).first_s, rel=1e-12)


def test_the_label_admits_that_nothing_was_measured():
    cost = roofline()
    assert cost.kind == "roofline"
    assert "uncalibrated" in cost.label and "h100-sxm" in cost.label
    assert cost.outside_measured({"seqs": np.arange(3)}).tolist() == [True, True, True]


# ---- host and loading --------------------------------------------------------------------------------------------


def test_launches_go_layer_by_layer_but_for_a_full_graph():
    eight, seventy = roofline().host, roofline("llama-3.1-70b", "h200").host
    assert seventy.launch_s[FULL] == eight.launch_s[FULL] == 3e-3
    assert seventy.launch_s[PIECEWISE] == pytest.approx(eight.launch_s[PIECEWISE] * 80 / 32)
    assert seventy.launch_s[EAGER] == pytest.approx(eight.launch_s[EAGER] * 80 / 32)


def test_host_scale_multiplies_everything_the_host_does():
    once, twice = roofline().host, roofline(host_scale=2.0).host
    for item in fields(Host):
        before, after = getattr(once, item.name), getattr(twice, item.name)
        if isinstance(before, float):
            assert after == 2 * before, item.name
    assert twice.launch_s == tuple(2 * launch_s for launch_s in once.launch_s)
    noisy = Host(launch_jitter_s=((), (1e-3, -1e-3), ()), drift_hold_s=0.4, warm_share=0.1, cool_share=0.2).scaled(3.0)
    assert noisy.launch_jitter_s[1] == (3e-3, -3e-3)
    assert (noisy.drift_hold_s, noisy.warm_share, noisy.cool_share) == (0.4, 0.1, 0.2), "no time the host takes"


def test_a_constant_cost_is_constant_and_has_no_host():
    settings = CostSettings(1, "bfloat16", "auto", Graphs.of_engine(256, 8192))
    cost = load_cost("constant:0.02", LLAMA, H100, settings)
    assert cost.kind == "constant"
    assert cost.mixed_s([(8192, 0)], 9, 1000) == cost.decode_ramp(200, 10**6).first_s == 0.02
    assert cost.decode_ramp(3, 5).growth_s == 0
    assert cost.host == Host()
    assert cost.outside_measured({"seqs": np.arange(2)}).tolist() == [False, False]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("constant", "needs seconds after the colon"),
        ("constant:fast", "needs seconds after the colon"),
        ("constant:0", "must be more than 0 seconds"),
        ("constant:nan", "must be more than 0 seconds"),
    ],
)
def test_a_constant_that_is_none_is_named(spec, message):
    settings = CostSettings(1, "bfloat16", "auto", Graphs.of_engine(256, 8192))
    with pytest.raises(ValueError, match=message):
        load_cost(spec, LLAMA, H100, settings)


def test_auto_is_the_roofline_where_nothing_was_measured():
    settings = CostSettings(1, "bfloat16", "auto", Graphs.of_engine(256, 8192))
    assert load_cost("auto", LLAMA, find_gpu("mi300x"), settings).kind == "roofline"
    assert load_cost("auto", find_model("mixtral-8x7b"), find_gpu("h200"), settings).kind == "roofline"


def test_a_negative_host_scale_is_refused():
    with pytest.raises(ValueError, match="host_scale=-1 must be 0 or more"):
        CostSettings(1, "bfloat16", "auto", Graphs.of_engine(256, 8192), host_scale=-1)


# ---- work of a finished run --------------------------------------------------------------------------------------


def log(*rows):
    """An iteration log of (iterations, seqs, kv_tokens, chunks) rows."""
    columns = [
        "iterations",
        "seqs",
        "kv_tokens",
        "prefill_requests",
        "prefill_tokens",
        "prefill_pairs",
        "prefill_context",
    ]
    table = [
        (
            n,
            seqs,
            kv_tokens,
            len(chunks),
            sum(new for new, _ in chunks),
            sum(new * done + new * (new + 1) // 2 for new, done in chunks),
            sum(done for _, done in chunks),
        )
        for n, seqs, kv_tokens, chunks in rows
    ]
    return dict(zip(columns, np.array(table).T, strict=True))


def test_flops_of_a_row_by_hand():
    per_token = LLAMA.linear_flops_per_token
    head = 2 * LLAMA.lm_head_params
    pair = LLAMA.attention_flops_per_pair
    rows = log((3, 2, 100, []), (1, 2, 50, [(4, 6)]))
    # three decode iterations of two requests: contexts of 102, 104 and 106 with the new tokens
    decode = 6 * (per_token + head) + pair * (102 + 104 + 106)
    mixed = (2 + 4) * per_token + (2 + 1) * head + pair * (52 + 4 * 6 + 10)
    assert flops(LLAMA, rows).tolist() == pytest.approx([decode, mixed])
    assert flops(LLAMA, rows, 4).tolist() == pytest.approx([decode / 4, mixed / 4])


def test_bytes_of_a_row_by_hand():
    weights = 2 * (LLAMA.linear_params + LLAMA.lm_head_params)
    token = LLAMA.kv_bytes_per_token("auto")
    rows = log((3, 2, 100, []), (1, 2, 50, [(4, 6)]))
    decode = 3 * weights + token * (102 + 104 + 106 + 6)  # read, and six tokens written
    mixed = weights + token * (52 + 6 + 2 + 4)
    assert bytes_moved(LLAMA, rows, "bfloat16").tolist() == pytest.approx([decode, mixed])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-4b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"])
def test_a_run_works_as_much_as_its_iterations_one_by_one(name):
    model, n, seqs, kv_tokens = find_model(name), 3000, 4, 4 * 100
    run = log((n, seqs, kv_tokens, []))
    single = log(*((1, seqs, kv_tokens + i * seqs, []) for i in range(n)))
    assert flops(model, run).sum() == pytest.approx(flops(model, single).sum())
    assert bytes_moved(model, run, "bfloat16").sum() == pytest.approx(bytes_moved(model, single, "bfloat16").sum())


@pytest.mark.parametrize("name", model_names())
def test_the_roofline_is_never_faster_than_the_peaks(name):
    """Neither MFU nor MBU above 1, for one rank and for four."""
    model, gpu = find_model(name), find_gpu("b200")
    rows = log((1, 1, 10, []), (1, 256, 256 * 3000, []), (1, 0, 0, [(8192, 0)]), (1, 64, 64_000, [(512, 20_000)]))
    for tp in (tp for tp in (1, 2, 4) if tp in model.tensor_parallel_sizes()):
        cost = roofline(name, "b200", tp=tp)
        seconds = np.array(
            [
                cost.decode_ramp(1, 10).first_s,
                cost.decode_ramp(256, 256 * 3000).first_s,
                cost.mixed_s([(8192, 0)], 0, 0),
                cost.mixed_s([(512, 20_000)], 64, 64_000),
            ]
        )
        peak = gpu.flops_per_s[gpu.compute_dtype(model.weight_format("bfloat16"))]
        assert (flops(model, rows, tp) < seconds * peak).all()
        moved = bytes_moved(model, rows, "bfloat16", "auto", tp)
        assert (moved < seconds * gpu.bandwidth_bytes_per_s).all()


def test_work_is_that_of_one_gpu_of_the_replica():
    @dataclass
    class Served:
        tensor_parallel: int = 2
        weight_dtype: str = "fp8"
        kv_dtype: str = "fp8"

    rows = log((2, 5, 500, []))
    per_gpu = work(LLAMA, Served(), rows)
    assert per_gpu[0].tolist() == flops(LLAMA, rows, 2).tolist()
    assert per_gpu[1].tolist() == bytes_moved(LLAMA, rows, "fp8", "fp8", 2).tolist()
