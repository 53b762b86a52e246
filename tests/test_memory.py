"""KV blocks: what an engine's memory leaves for its cache."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llmsim.hardware import find_gpu, find_model
from llmsim.memory import activation_bytes, engine_blocks, kv_blocks, memory_budget
from llmsim.recording import load_recording
from llmsim.validate import replays

RECORDINGS = Path(__file__).parent / "data" / "recordings"
GEMMA = Path(__file__).parents[1] / "calibration" / "recordings" / "vllm-0.25.1_h200-sxm_gemma-2-9b_bf16"
LLAMA = find_model("llama-3.1-8b")
H100 = find_gpu("h100-sxm")


def blocks(model=LLAMA, gpu=H100, **changes):
    settings = {
        "tensor_parallel": 1,
        "dtype": "bfloat16",
        "kv_dtype": "auto",
        "block_tokens": 16,
        "gpu_memory_utilization": 0.9,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "max_model_len": 8192,
    }
    return kv_blocks(model, gpu, **(settings | changes))


@pytest.mark.parametrize(
    ("gpu", "model", "max_model_len", "recorded"),
    [  # vLLM 0.25.1 with gpu_memory_utilization 0.9, 8192 tokens, 256 requests
        ("h100-sxm", "llama-3.1-8b", 131072, 28240),
        ("h100-sxm", "llama-3.1-8b", 131072, 28123),  # another machine
        ("h200-sxm", "llama-3.1-8b", 131072, 56057),
        ("h200-sxm", "qwen3-8b", 40960, 49626),
    ],
)
def test_recorded_engines_had_as_many_blocks_within_half_a_percent(gpu, model, max_model_len, recorded):
    assert blocks(find_model(model), find_gpu(gpu), max_model_len=max_model_len) == pytest.approx(recorded, rel=0.005)


def test_the_recorded_h100s_are_those_of_the_recordings():
    folders = sorted(RECORDINGS.glob("vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16*"))
    engines = [json.loads((folder / "engine.json").read_text(encoding="utf-8")) for folder in folders]
    assert [engine["num_gpu_blocks"] for engine in engines] == [28240, 28123]
    for engine in engines:
        names = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "gpu_memory_utilization")
        counted = blocks(**{name: engine[name] for name in names})
        assert counted == pytest.approx(engine["num_gpu_blocks"], rel=0.005)


def test_blocks_of_an_engine_whose_layers_slide_are_those_of_a_group():
    gemma = find_model("gemma-2-9b")  # 21 of 42 layers slide: two groups
    assert engine_blocks(gemma, 42659) == 21329
    assert engine_blocks(LLAMA, 42659) == 42659
    twelve, five = (replace(gemma, layers=24, sliding_layers=24 - full) for full in (12, 5))
    assert engine_blocks(twelve, 1000) == 500 and engine_blocks(five, 2400) == 500
    thirteen = replace(gemma, layers=25, sliding_layers=12)  # 13 and 12, padded to 13 each
    assert engine_blocks(thirteen, 1000) == 520
    recorded = load_recording(GEMMA)[0]
    assert replays(recorded, [0])[0].kv_blocks == 21329


def test_a_layer_of_many_tokens_or_a_sampling_of_many_requests_sets_the_activations():
    # 8192 tokens: residual and input (2 * 4096) beside gate, up and their product (3 * 14336), 2 bytes each
    assert activation_bytes(LLAMA, "bfloat16", 1, 8192, 256) == 8192 * (2 * 4096 + 3 * 14336) * 2
    # 1024 requests over 128256 logits of 10 bytes, beside 2048 hidden states
    assert activation_bytes(LLAMA, "bfloat16", 1, 2048, 1024) == 2048 * 4096 * 2 + 1024 * 128256 * 10


def test_two_ranks_halve_what_is_split():
    one = activation_bytes(LLAMA, "bfloat16", 1, 8192, 1)
    two = activation_bytes(LLAMA, "bfloat16", 2, 8192, 1)
    assert one - two == 8192 * 3 * 14336 // 2 * 2


@pytest.mark.parametrize(
    ("change", "factor"),
    [({"kv_dtype": "fp8"}, 2.0), ({"block_tokens": 32}, 0.5)],
)
def test_blocks_scale_with_the_bytes_of_a_block(change, factor):
    assert blocks(**change) == pytest.approx(blocks() * factor, abs=2)


def test_more_room_or_smaller_weights_mean_more_blocks():
    assert blocks(gpu_memory_utilization=0.92) > blocks()
    assert blocks(dtype="int4") > blocks(dtype="fp8") > blocks()
    assert blocks(max_num_batched_tokens=2048) > blocks()
    # two ranks: half the weights each and half the KV of a token
    assert blocks(tensor_parallel=2) > 2 * blocks()


def test_kv_heads_repeated_on_every_rank_cost_their_memory():
    qwen = find_model("qwen2.5-7b")  # 4 KV heads, 28 heads
    assert qwen.kv_bytes_per_token("auto", 4) == qwen.kv_bytes_per_token("auto", 1) // 4
    deepseek = find_model("deepseek-v3")  # the latent vector is the same on every rank
    assert deepseek.kv_bytes_per_token("auto", 8) == deepseek.kv_bytes_per_token("auto", 1) == 61 * 576 * 2


def test_short_windows_leave_room_that_full_attention_would_take():
    oss = find_model("gpt-oss-120b")  # every other layer sees 128 tokens only
    settings = {"max_model_len": 131072, "max_num_seqs": 256}
    budget = memory_budget(
        oss,
        H100,
        tensor_parallel=1,
        dtype="bfloat16",
        gpu_memory_utilization=0.9,
        max_num_batched_tokens=8192,
        **settings,
    )
    every_layer = budget.kv_bytes // (16 * oss.kv_bytes_per_token("auto"))
    windows = 256 * (128 + 16) * 18 * 2048
    assert blocks(oss, **settings) == (budget.kv_bytes - windows) // (16 * 18 * 2048)
    assert blocks(oss, **settings) > 1.5 * every_layer


def test_an_override_replaces_the_calculation():
    assert blocks(find_model("llama-3.1-405b"), override=1000) == 1000
    with pytest.raises(ValueError, match="num_gpu_blocks_override=1 is below 2"):
        blocks(override=1)


def test_a_model_that_does_not_fit_says_how_much_is_missing_and_what_would_fit():
    with pytest.raises(ValueError) as error:
        blocks(find_model("llama-3.1-70b"))
    message = str(error.value)
    assert "llama-3.1-70b does not fit on h100-sxm with tensor_parallel=1" in message
    assert "weights 141.1 GB" in message
    short_gb = float(re.search(r"are ([\d.]+) GB more than 0.9 of its 85.0 GB", message).group(1))
    assert 69 < short_gb < 71  # 141.1 + 0.5 runtime + 1.6 activations + 2.7 of KV, less 76.5, in GB
    assert message.endswith("The smallest tensor_parallel that fits is 2")
    assert blocks(find_model("llama-3.1-70b"), tensor_parallel=2) * 16 > 8192


def test_the_smallest_tensor_parallel_depends_on_the_context():
    settings = {"model": find_model("llama-3.1-70b"), "max_model_len": 131072}
    with pytest.raises(ValueError, match="The smallest tensor_parallel that fits is 4"):
        blocks(**settings)
    with pytest.raises(ValueError, match="or set tensor_parallel=4"):
        blocks(**settings, tensor_parallel=2)
    assert blocks(**settings, tensor_parallel=4) * 16 > 131072


def test_a_model_that_fits_nowhere_says_so():
    with pytest.raises(ValueError, match="No tensor_parallel up to 8 fits: use a GPU with more memory"):
        blocks(find_model("llama-3.1-405b"), find_gpu("a100-40gb"))


def test_a_context_that_does_not_fit_says_which_does():
    card = find_gpu("rtx-4090")
    with pytest.raises(ValueError) as error:
        blocks(gpu=card, max_model_len=131072)
    message = str(error.value)
    assert message.startswith("max_model_len=131072 does not fit: one request of it needs 17.2 GB of KV cache")
    longest = int(re.search(r"Lower max_model_len to (\d+) or less", message).group(1))
    assert blocks(gpu=card, max_model_len=longest) >= longest // 16
    with pytest.raises(ValueError, match="does not fit"):
        blocks(gpu=card, max_model_len=2 * longest)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=1.2 is not in \(0, 1\]"):
        blocks(gpu_memory_utilization=1.2)
    with pytest.raises(ValueError, match="tensor_parallel=3 does not divide the 32 heads"):
        blocks(tensor_parallel=3)
    with pytest.raises(ValueError, match="block_size=0"):
        blocks(block_tokens=0)
