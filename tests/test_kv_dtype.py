"""Quantised KV: bytes with their scales, capacity, and attention's time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmsim.hardware import find_model
from llmsim.scenario import KV_CACHE_DTYPES, Scenario
from llmsim.simulate import blocks_of, cost_of

LLAMA = find_model("llama-3.1-8b")  # 32 layers, 8 KV heads of 128
SCENARIO = Scenario(model="llama-3.1-8b", gpu="h100-sxm")


@pytest.mark.parametrize(
    ("dtype", "token_bytes"),
    [
        ("bfloat16", 32 * 2 * 8 * 128 * 2),
        ("fp8", 32 * 2 * 8 * 128),
        ("int8", 32 * 2 * 8 * (128 + 4)),  # a scale and a zero point of 2 bytes for each vector
        ("int4", 32 * 2 * 8 * (64 + 4)),
    ],
)
def test_bytes_of_a_token(dtype: str, token_bytes: int) -> None:
    assert LLAMA.kv_bytes_per_token(dtype) == token_bytes
    assert LLAMA.kv_bytes_per_token(dtype, 8) == token_bytes / 8


def test_a_latent_vector_is_one_vector() -> None:
    model = find_model("deepseek-v3")
    assert model.kv_layer_bytes("int8") == model.kv_lora_rank + model.rope_head_dim + 4


def test_capacity_follows_the_bytes() -> None:
    blocks = {dtype: blocks_of(replace(SCENARIO, kv_cache_dtype=dtype)) for dtype in KV_CACHE_DTYPES}
    assert blocks["fp8"] / blocks["auto"] == pytest.approx(2.0, rel=1e-3)
    assert blocks["int8"] / blocks["auto"] == pytest.approx(256 / 132, rel=1e-3)
    assert blocks["int4"] / blocks["auto"] == pytest.approx(256 / 68, rel=1e-3)


@pytest.mark.parametrize(("cost", "slack"), [("roofline", 1e-6), ("auto", 1e-6)])
def test_decode_attention_over_integers_takes_its_bytes(cost: str, slack: float) -> None:
    """Seconds of a cached token, beside those of an fp8 cache; dequantising is not timed, and the label says so."""
    growth = {}
    for dtype in ("auto", "fp8", "int8", "int4"):
        model = cost_of(replace(SCENARIO, kv_cache_dtype=dtype, cost=cost))
        growth[dtype] = model.decode_ramp(64, 64 * 2000).growth_s
        if cost == "auto" and dtype.startswith("int"):
            assert f"attention over {dtype} KV, by its bytes; dequantising it was not timed" in model.label
    assert growth["fp8"] < growth["auto"]
    assert growth["int8"] / growth["fp8"] == pytest.approx(132 / 128, rel=slack)
    if cost == "auto":
        assert growth["int4"] / growth["fp8"] == pytest.approx(68 / 128, rel=slack)
    else:  # there compute is a floor: reading 4 bits takes less time than multiplying what they stand for
        assert growth["int4"] <= growth["int8"]
