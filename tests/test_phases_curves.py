"""Ways on the roofline and curves of growth, against the points of `llmsim phases`, data sheets and hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsim.hardware import find_gpu, find_model
from llmsim.phases import Engine, batches_beside, compare, decode_point
from llmsim.phases_curves import BY, decode_by_batch, decode_by_context, moves, prefill_growth
from llmsim.phases_table import beside, growing, points_table, served_table
from llmsim.phases_words import growth_in_words, moves_in_words
from llmsim.scenario import Scenario

MACHINE = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
ROOFLINE = replace(MACHINE, cost="roofline")
SIZES = {"prompt_tokens": 1024, "batch": 16, "context_tokens": 2000}
LLAMA = find_model("llama-3.1-8b")


@pytest.mark.parametrize("by", BY)
def test_one_point_of_each_phase_is_the_setting_itself(by: str) -> None:
    way = moves(MACHINE, by, **SIZES)
    here = way.frame[way.frame["here"]]
    assert sorted(here["phase"]) == ["decode", "prefill"] and len(way.frame) > 4
    outcome = compare(MACHINE, prompt_tokens=1024, batches=[16], context_tokens=2000)
    expected = {p.phase: p for p in outcome.points if (p.phase, p.size) in {("prefill", 1024), ("decode", 16)}}
    assert (way.prefill, way.decode) == (expected["prefill"], expected["decode"])
    for phase, point in expected.items():
        row = here[here["phase"] == phase].iloc[0]
        assert row["intensity_flops_per_byte"] == point.intensity_flops_per_byte and row["gpu_s"] == point.gpu_s


def test_batches_go_as_far_as_the_cache_holds_them() -> None:
    decodes = moves(ROOFLINE, "batch", **SIZES).frame.query("phase == 'decode'")
    assert decodes["size"].tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]  # 916,112 tokens: 457 contexts of 2,001
    # linear layers' weights are read once, keys and values of every request
    weight_bytes = 2 * (LLAMA.linear_params + LLAMA.lm_head_params)
    moved = decodes["bytes_per_token"] * decodes["size"]
    kv_bytes = 2 * 32 * 8 * 128 * 2 * 2000 * decodes["size"]
    np.testing.assert_allclose(moved, weight_bytes + kv_bytes, rtol=2e-3)  # and what a step writes
    assert decodes["intensity_flops_per_byte"].is_monotonic_increasing


def test_context_moves_prompts_and_caches() -> None:
    frame = moves(ROOFLINE, "context", **SIZES).frame
    prompts, decodes = (frame[frame["phase"] == phase] for phase in ("prefill", "decode"))
    assert prompts["size"].tolist() == [128 << i for i in range(10)]  # 131,072 leaves no room for an answer
    assert 2000 in decodes["context_tokens"].tolist() and decodes["size"].eq(16).all()
    assert decodes["context_tokens"].max() * 16 < Engine.of(ROOFLINE).kv_cache_tokens
    assert decodes["intensity_flops_per_byte"].is_monotonic_decreasing


def test_precisions_have_their_own_roofs() -> None:
    way = moves(ROOFLINE, "precision", **SIZES)
    frame, peaks = way.frame, find_gpu("h200-sxm").flops_per_s
    roofs = frame.groupby("value")["peak_flops_per_s"].first()
    assert roofs["bf16"] == roofs["int4"] == peaks["bfloat16"] and roofs["fp8"] == peaks["fp8"]
    decodes = frame[frame["phase"] == "decode"].set_index("value")
    assert decodes.loc["bf16", "here"] and not decodes.loc["fp8", "here"]
    kv_bytes = 2 * 32 * 8 * 128 * 2000 * 16  # one byte a number instead of two, of every cached token
    saved = 16 * (decodes.loc["fp8", "bytes_per_token"] - decodes.loc["fp8, KV fp8", "bytes_per_token"])
    assert saved == pytest.approx(kv_bytes, rel=2e-3)


def test_tensor_parallelism_splits_the_work() -> None:
    frame = moves(ROOFLINE, "GPUs", **SIZES).frame
    assert frame["value"].unique().tolist() == ["TP 1", "TP 2", "TP 4", "TP 8"]
    for _, own in frame.groupby("phase"):
        total = own["flops_per_token"] * [1, 2, 4, 8]
        np.testing.assert_allclose(total, total.iloc[0], rtol=1e-6)


def test_what_cannot_be_is_left_out_with_its_reason() -> None:
    large = Scenario(model="llama-3.1-70b", gpu="h100-sxm", tensor_parallel=4, cost="roofline")
    way = moves(large, "GPUs", **SIZES)
    assert way.frame["value"].unique().tolist() == ["TP 4", "TP 8"]
    assert [line.split(":")[0] for line in way.left_out] == ["TP 1", "TP 2"]
    assert all("\n" not in line for line in way.left_out)
    with pytest.raises(ValueError, match="by='colour' is not one of batch, context"):
        moves(MACHINE, "colour", **SIZES)
    with pytest.raises(ValueError, match="batch=4000: the KV cache"):
        moves(MACHINE, "batch", **SIZES | {"batch": 4000})


def test_a_precision_of_its_own_is_among_the_others() -> None:
    frame = moves(replace(ROOFLINE, quantization="int8"), "precision", **SIZES).frame
    assert frame.loc[frame["here"], "value"].unique().tolist() == ["as set"]


def test_attention_of_a_prompt_grows_with_its_square() -> None:
    growth = prefill_growth(MACHINE, 2048)
    assert growth["prompt_tokens"].is_monotonic_increasing and growth["prompt_tokens"].iloc[-1] == 8192
    np.testing.assert_allclose(growth["rest_s"] + growth["attention_s"], growth["gpu_s"])
    long = growth[growth["prompt_tokens"] > 2500]  # one chunk of up to 8,192, beside which a call costs little
    pairs = long["prompt_tokens"] * (long["prompt_tokens"] + 1)
    per_pair = long["attention_s"] / pairs
    np.testing.assert_allclose(per_pair, per_pair.mean(), rtol=0.11)  # tiles see whole blocks of keys, and begin
    assert (growth["wall_s"] > growth["gpu_s"]).all()
    assert not growth["outside_measured"].any()
    assert prefill_growth(MACHINE, 32_768)["outside_measured"].iloc[-1]


def test_decodes_are_affine_in_context_and_are_the_points_of_the_table() -> None:
    growth = decode_by_context(MACHINE, 16, 2000)
    assert growth["context_tokens"].iloc[-1] == 8192
    np.testing.assert_allclose(growth["rest_s"], growth["rest_s"].iloc[0])
    slope = np.diff(growth["attention_s"]) / np.diff(growth["context_tokens"])
    np.testing.assert_allclose(slope, slope[0])
    point = decode_point(Engine.of(MACHINE), 16, int(growth["context_tokens"].iloc[5]))
    row = growth.iloc[5]
    assert (row["gpu_s"], row["wall_s"], row["tokens_per_s"]) == (point.gpu_s, point.wall_s, point.tokens_per_s)


def test_batches_end_where_the_cache_is_full() -> None:
    growth, engine = decode_by_batch(MACHINE, 2000), Engine.of(MACHINE)
    assert (growth["batch"].iloc[0], growth["batch"].iloc[-1]) == (1, 57_257 // 126)  # blocks; of 2,001 tokens
    assert engine.kv_blocks - 1 == 57_257
    np.testing.assert_allclose(growth["batch"] / growth["wall_s"], growth["tokens_per_s"])


def test_usual_batches_that_fit_and_the_one_asked_for() -> None:
    assert batches_beside(MACHINE, 3, 1000) == [1, 3, 8, 64, 256]
    assert batches_beside(MACHINE, 3, 60_000) == [1, 3, 8, 15]


def test_what_is_printed_is_what_is_in_the_tables() -> None:
    outcome = compare(MACHINE, batches=[1, 8], context_tokens=5000)
    table = points_table(outcome).frame()
    assert list(table.columns) == [
        *(f"prefill {n}" for n in ("128", "1,024", "8,192", "32,768")),
        "decode 1",
        "decode 8",
    ]
    assert table.loc["binds", "decode 8"] == "memory" and outcome.points[-1].context_tokens == 5000
    assert float(table.loc["MFU (%)", "prefill 1,024"]) == pytest.approx(100 * outcome.points[1].mfu, abs=0.05)
    assert list(served_table(outcome).frame().columns) == ["alone", "closed loop of 64"]
    two = beside(outcome.points[1], outcome.points[-1])
    assert list(two.columns) == ["prefill, 1,024 tokens", "decode, batch 8"] and two.loc["binds"].tolist() == [
        "compute",
        "memory",
    ]
    assert len(growing(outcome)) == 3
    assert "never below the capacity of 182 requests" in growing(outcome)[2]  # of 5,001 tokens: 57,257 // 313


def test_words_for_who_cannot_see() -> None:
    assert moves_in_words(moves(ROOFLINE, "batch", **SIZES), "batch").startswith(
        "Roofline, by batch: prefill from 1,024"
    )
    told = growth_in_words(decode_by_context(ROOFLINE, 16, 2000), "context_tokens")
    assert told.startswith("GPU time over context tokens: ") and told.endswith("%")
