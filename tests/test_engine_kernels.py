"""Kernels of an engine: two steps of Llama-3.1-8B in vLLM 0.25.1 on an H200, as torch's profiler gave them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.record.kernels import Case, Kernel, kernels_of, rows_of, seconds_of, steps_of
from llmsim.hardware import find_model

TRACED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "engine_kernels.json.gz").read_bytes()))
LLAMA = find_model("llama-3.1-8b")
PROMPT, DECODES = Case("prefill", 1, 1024, 1, 1, 1024), Case("decode", 32, 512, 24, 1, 32)


def test_each_operation_of_a_layer_is_told_by_its_kernels() -> None:
    seconds = seconds_of(kernels_of(TRACED["prefill_1x1024"]), LLAMA)
    expected = {"add_rms_norm": 9.1e-6, "silu_mul": 20.9e-6, "kv_write": 7.3e-6, "rope": 9.8e-6}
    assert seconds == pytest.approx(expected, rel=0.1)


def test_rows_hold_what_a_fit_needs() -> None:
    rows = rows_of(
        [(PROMPT, kernels_of(TRACED["prefill_1x1024"])), (DECODES, kernels_of(TRACED["decode_32"]))], LLAMA, None
    )
    assert {(row.op, row.tokens) for row in rows} == {
        (op, tokens) for op in ("add_rms_norm", "silu_mul", "kv_write", "rope") for tokens in (1024, 32)
    }
    assert {(row.variant, row.launch, row.model) for row in rows} == {("vllm_compiled", "engine", "llama-3.1-8b")}
    (norm,) = (row for row in rows if (row.op, row.tokens) == ("add_rms_norm", 1024))
    assert (norm.n, norm.bytes) == (4096, 8 * 1024 * 4096)
    (write,) = (row for row in rows if (row.op, row.tokens) == ("kv_write", 32))
    assert (write.kv_heads, write.head_dim, write.kv_dtype) == (8, 128, "bfloat16")


def test_prompts_before_decodes_are_no_decode_steps() -> None:
    kernels = kernels_of(TRACED["decode_32"])
    later_s = kernels[-1].begin_s + 1.0
    prompts = [kernel._replace(begin_s=kernel.begin_s + later_s) for kernel in kernels]
    prompts[5] = prompts[5]._replace(seconds=1e-3)
    (alone,), (both,) = (
        [row.repeats for row in rows_of([(DECODES, held)], LLAMA, None) if row.op == "rope"]
        for held in (kernels, [*kernels, *prompts])
    )
    assert alone == both == 1
    assert len(list(steps_of([*kernels, *prompts], LLAMA.layers))) == 2


def test_norms_of_query_and_key_leave_rope_out() -> None:
    found = seconds_of(kernels_of(TRACED["prefill_1x1024"]), replace(LLAMA, qk_norm=True))
    assert set(found) == {"add_rms_norm", "silu_mul", "kv_write"}


def test_where_some_layers_slide_each_prepares_its_schedule() -> None:
    kernels = kernels_of(TRACED["decode_32"])
    prepare = next(kernel for kernel in kernels if "prepare_varlen" in kernel.name)
    each = []
    for kernel in kernels:
        if "FlashAttnFwdSm90" in kernel.name:
            each.append(prepare._replace(begin_s=kernel.begin_s))
        each.append(kernel)
    whole = [kernel for kernel in kernels if "prepare_varlen" not in kernel.name]
    (step,) = list(steps_of(each[1:] if "prepare_varlen" in each[0].name else each, LLAMA.layers))
    assert seconds_of(step, LLAMA)["silu_mul"] == pytest.approx(seconds_of(whole, LLAMA)["silu_mul"], rel=0.05)
    two = list(steps_of([*each, *(k._replace(begin_s=k.begin_s + 1.0) for k in each)], LLAMA.layers))
    assert len(two) == 2


def test_pairs_of_norms_and_gelu_have_their_names() -> None:
    names = ("triton_red_fused__to_copy_add_fused_add_rms_norm_rms_norm_2", "triton_poi_fused_gelu_mul_slice_1")
    step = [Kernel(name, 0.0, 1e-6) for name in names for _ in range(42)]
    assert set(seconds_of(step, find_model("gemma-2-9b"))) == {"norm_add_norm", "silu_mul"}


def test_steps_need_flash_attention_3() -> None:
    with pytest.raises(ValueError, match="no kernel prepare_varlen_num_blocks"):
        list(steps_of([Kernel("triton_poi_fused_0", 0.0, 1e-6)], 32))
