"""Facts of GPUs and models, and what follows from them."""

import json

import pytest

from llmsim.hardware import dtype_name, find_gpu, find_model, gpu_names, model_names

# Parameters as the authors or the checkpoints state them (multimodal models: the language model).
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_099_328,
    "gemma-3-12b": 11_765_788_416,
    "gemma-3-27b": 27_009_346_304,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
    "deepseek-v2-lite": 15_706_484_224,
}


def test_shapes_give_the_published_parameter_counts():
    assert set(PUBLISHED) == set(model_names())
    for name, count in PUBLISHED.items():
        assert find_model(name).params == pytest.approx(count, rel=1e-3), name


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 12.9), ("mixtral-8x22b", 39.1), ("deepseek-v3", 37), ("qwen3-30b-a3b", 3.3)],
)
def test_a_token_of_an_moe_model_passes_the_published_active_parameters(name, billions):
    assert find_model(name).active_params == pytest.approx(billions * 1e9, rel=0.02)


def test_llama_by_hand():
    llama = find_model("llama-3.1-8b")
    layer = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 14336
    assert llama.linear_params == 32 * layer
    assert llama.linear_flops_per_token == 2 * 32 * layer
    assert llama.lm_head_params == 128256 * 4096
    assert llama.attention_flops_per_pair == 4 * 32 * 128 * 32
    assert llama.kv_bytes_per_token("bfloat16") == 2 * 8 * 128 * 2 * 32
    assert llama.kv_bytes_per_token("fp8_e4m3", 2) == 2 * 4 * 128 * 32
    assert llama.weight_bytes("bfloat16") == 2 * llama.params


def test_mla_keeps_one_latent_vector_per_token():
    v3 = find_model("deepseek-v3")
    assert v3.mla
    assert v3.kv_bytes_per_token("bfloat16") == (512 + 64) * 2 * 61
    assert v3.decode_flops_per_pair == 2 * 128 * (512 + 64 + 512)
    assert v3.attention_flops_per_pair == 2 * 128 * (128 + 64 + 128) * 61


def test_published_weight_formats_are_kept_unless_another_is_asked_for():
    v3 = find_model("deepseek-v3")
    assert v3.quantization == "fp8"
    # 671 GB of 1-byte weights, and a second byte for the two embedding tables
    assert v3.weight_bytes("bfloat16") == pytest.approx(671.03e9 + 2 * 129280 * 7168, rel=1e-4)
    assert v3.weight_bytes("int4") < 0.6 * v3.weight_bytes("bfloat16")
    # the published checkpoint of gpt-oss-120b is 65.2 GB (60.8 GiB)
    assert find_model("gpt-oss-120b").weight_bytes("bfloat16") == pytest.approx(65.2e9, rel=0.01)


def test_int4_weights_with_scales_are_about_the_size_of_published_checkpoints():
    # Llama 3.1 70B AWQ (group 128, 16-bit embeddings) is 39.8 GB
    assert find_model("llama-3.1-70b").weight_bytes("awq") == pytest.approx(39.8e9, rel=0.01)


def test_distinct_experts_grow_from_those_of_one_token_to_all():
    qwen = find_model("qwen3-30b-a3b")  # 8 of 128
    assert qwen.distinct_experts(1) == pytest.approx(8)
    assert qwen.distinct_experts(2) == pytest.approx(8 + 8 * (1 - 8 / 128))
    assert qwen.distinct_experts(1000) == pytest.approx(128)
    assert find_model("qwen3-8b").distinct_experts(64) == 0


def test_sliding_layers_follow_each_familys_pattern():
    counts = {name: find_model(name).sliding_layers for name in ("gemma-3-27b", "gemma-2-9b", "gpt-oss-20b")}
    assert counts == {"gemma-3-27b": 62 - 10, "gemma-2-9b": 21, "gpt-oss-20b": 12}
    assert find_model("gemma-3-12b").sliding_window == 1024
    assert find_model("mistral-7b").sliding_layers == find_model("qwen2.5-7b").sliding_layers == 0


def test_ranks_must_divide_heads_and_kv_heads_are_repeated():
    qwen = find_model("qwen2.5-7b")  # 28 heads, 4 KV heads
    assert qwen.tensor_parallel_sizes() == [1, 2, 4]
    with pytest.raises(
        ValueError, match=r"tensor_parallel=8 does not divide the 28 heads, 4 KV heads .* Use one of 1, 2, 4"
    ):
        qwen.weight_bytes("bfloat16", 8)
    small = find_model("qwen2.5-3b")  # 16 heads, 2 KV heads
    assert (
        small.kv_bytes_per_token("auto", 8)
        == small.kv_bytes_per_token("auto", 2)
        == small.kv_bytes_per_token("auto") // 2
    )
    assert small.weight_bytes("bfloat16", 8) > small.weight_bytes("bfloat16") / 8


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int4"])
def test_ranks_together_hold_at_least_the_model(name, dtype):
    model = find_model(name)
    for tp in model.tensor_parallel_sizes():
        assert tp * model.weight_bytes(dtype, tp) >= model.weight_bytes(dtype) * (1 - 1e-9)
        assert tp * model.kv_bytes_per_token("auto", tp) >= model.kv_bytes_per_token("auto")


def test_gpus_name_a_source_for_every_fact():
    for name in gpu_names():
        gpu = find_gpu(name)
        facts = {"memory", "bandwidth", "flops", "l2", "link"}
        assert set(gpu.sources) - {"host"} == facts  # host: where its copies were timed
        assert all(gpu.sources.values())
        assert {"float32", "bfloat16", "float16"} <= set(gpu.flops_per_s)
        assert 20e9 < gpu.memory_bytes < 300e9
        assert 100 < gpu.flops_per_s["bfloat16"] / gpu.bandwidth_bytes_per_s < 450  # operations per byte at the ridge


def test_memory_is_what_an_engine_sees_not_what_nvidia_smi_says():
    smi_bytes = {"h100-sxm": 81559, "h200-sxm": 143771, "a100-80gb-sxm": 81920, "l40s": 46068, "rtx-4090": 24564}
    for name, mib in smi_bytes.items():
        assert 0.95 * mib * 2**20 < find_gpu(name).memory_bytes < mib * 2**20


def test_a_gpu_without_a_dtype_computes_in_bfloat16():
    assert find_gpu("a100").compute_dtype("fp8") == "bfloat16"
    assert find_gpu("h100").compute_dtype("fp8") == "fp8"
    assert find_gpu("b200").compute_dtype("int4") == "bfloat16"


def test_names_are_found_by_alias_case_and_hub_path():
    assert find_gpu("H100").name == find_gpu("h100-sxm").name == "h100-sxm"
    assert find_gpu("a100-80gb").name == "a100-80gb-sxm"
    assert find_model("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"
    assert find_model("Qwen/Qwen3-8B").name == "qwen3-8b"
    assert find_model("deepseek-ai/DeepSeek-R1-Distill-Llama-70B").name == "llama-3.3-70b"


def test_no_two_facts_answer_to_the_same_name():
    from llmsim.hardware import _facts

    for file in ("gpus.toml", "models.toml"):
        names = [alias for key, facts in _facts(file).items() for alias in (key, *facts.get("aliases", ()))]
        assert len(names) == len(set(names))
        assert names == [name.lower() for name in names]


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"^unknown GPU 'h10'\. Did you mean h100-sxm\? See: llmsim list gpus$"):
        find_gpu("h10")
    with pytest.raises(
        ValueError, match=r"^unknown model 'lama-3.1-8b'\. Did you mean llama-3.1-8b\? See: llmsim list models$"
    ):
        find_model("lama-3.1-8b")
    with pytest.raises(ValueError, match=r"unknown dtype 'fp6'\. Use one of float32"):
        dtype_name("fp6")


# ---- config.json -------------------------------------------------------------------------------------------------

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
GEMMA3 = {  # as published: what equals the configuration class's defaults is left out
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
MISTRAL = {  # the first one: every layer slides
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def config(tmp_path):
    def write(keys, **changes):
        kept = {key: value for key, value in {**keys, **changes}.items() if value != "absent"}
        path = tmp_path / "my-model" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept))
        return path

    return write


def test_a_config_file_or_its_folder_gives_the_model(config):
    path = config(QWEN3_MOE)
    known = find_model("qwen3-30b-a3b")
    for given in (path, path.parent):
        model = find_model(str(given))
        assert model.name == "my-model"
        assert (model.params, model.active_params) == (known.params, known.active_params)


def test_a_multimodal_config_gives_its_language_model_with_the_familys_defaults(config):
    model = find_model(str(config(GEMMA3)))
    known = find_model("gemma-3-4b")
    assert model.params == known.params
    assert (model.sliding_layers, model.sliding_window) == (known.sliding_layers, known.sliding_window)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantized_configs_say_so(config, method):
    path = config(QWEN3_MOE, quantization_config={"quant_method": method, "bits": 4})
    assert find_model(str(path)).quantization == "int4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "absent"}, "key 'num_hidden_layers' is missing"),
        ({"num_experts_per_tok": "absent"}, "key 'num_experts_per_tok' is missing"),
        ({"vocab_size": "many"}, "vocab_size='many' is not a whole number"),
        ({"hidden_size": 0}, "hidden_size=0 must be 1 or more"),
        ({"hidden_size": -1}, "hidden_size=-1 must be 1 or more"),
        ({"sliding_window": -1}, "sliding_window=-1 must be 0 or more"),
        ({"sliding_window": 4096.0}, "sliding_window=4096.0 is not a whole number: write 4096"),
        ({"sliding_window": 4096.5}, "sliding_window=4096.5 is not a whole number: write one of 0 or more"),
        ({"sliding_window": 2**62}, f"sliding_window={2**62} must be at most 2147483647"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be 1 or more"),
        ({"mlp_only_layers": 5}, "mlp_only_layers=5 is not a list: write it as one"),
        ({"mlp_only_layers": [0, "1"]}, "mlp_only_layers names '1': name layers from 0 to 47"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers names 48: name layers from 0 to 47"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 is no multiple of num_key_value_heads=5"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok=200 is above the 128 experts"),
        ({"head_dim": "absent", "hidden_size": 2050}, "key 'head_dim' is missing"),
        ({"architectures": ["MambaForCausalLM"]}, "architectures='MambaForCausalLM' is not one llmsim knows"),
        ({"architectures": "absent"}, "key 'architectures' is missing"),
        ({"architectures": {"a": 1}}, "architectures={'a': 1} is not one llmsim knows"),
        ({"architectures": [["a"]]}, "architectures=['a'] is not one llmsim knows"),
        ({"text_config": 5}, "text_config=5 is not an object: give one, or leave it out"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is no truth value: write true or false"),
        ({"use_sliding_window": "false"}, "use_sliding_window='false' is no truth value: write true or false"),
        ({"attention_bias": 0}, "attention_bias=0 is no truth value: write true or false"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method='hqq' is not one llmsim knows"),
        ({"quantization_config": {"quant_method": ["a"]}}, "quant_method=['a'] is not one llmsim knows"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "bits=3 of gptq is not one llmsim knows"),
        ({"quantization_config": {"quant_method": "gptq", "bits": "8"}}, "bits='8' of gptq is not one llmsim knows"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "bits=8 of awq is not one llmsim knows"),
        ({"use_sliding_window": True}, "sliding_window=None, but use_sliding_window is true: write the window"),
        ({"layer_types": [FULL] * 100}, "layer_types lists 100 layers, but num_hidden_layers=48: list each layer once"),
        ({"layer_types": []}, "layer_types lists 0 layers, but num_hidden_layers=48: list each layer once"),
        ({"layer_types": 5}, "layer_types=5 is not a list: write it as one"),
        ({"layer_types": SLIDING}, "layer_types='sliding_attention' is not a list: write it as one"),
        ({"layer_types": {SLIDING: 48}}, "layer_types={'sliding_attention': 48} is not a list: write it as one"),
        ({"layer_types": [FULL] * 47 + ["x"]}, "layer_types[47]='x' is not one llmsim knows. Known: full_attention"),
        ({"layer_types": ["linear_attention"] * 48}, "layer_types[0]='linear_attention' is not one llmsim knows"),
        ({"layer_types": [[]] * 48}, "layer_types[0]=[] is not one llmsim knows"),
        (
            {"layer_types": [SLIDING] * 48, "sliding_window": 0, "use_sliding_window": None},
            "sliding_window=0, but layer_types lists sliding_attention: write the window in tokens, 1 or more",
        ),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_that_names_file_and_key(config, changes, message):
    path = config(QWEN3_MOE, **changes)
    with pytest.raises(ValueError) as error:
        find_model(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "changes", "sliding"),
    [
        (QWEN3_MOE, {"layer_types": [FULL] * 48}, 0),
        (QWEN3_MOE, {"layer_types": [FULL] * 48, "use_sliding_window": True}, 0),
        (QWEN3_MOE, {"layer_types": [SLIDING] * 48, "sliding_window": 4096}, 0),  # use_sliding_window: false
        (QWEN3_MOE, {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 40}, 8),
        (MISTRAL, {}, 32),
        (MISTRAL, {"sliding_window": None}, 0),
        (MISTRAL, {"sliding_window": 262144, "use_sliding_window": None, "tie_word_embeddings": None}, 32),
        (MISTRAL, {"layer_types": [SLIDING, FULL] * 16}, 16),
        (MISTRAL, {"layer_types": None}, 32),
        (MISTRAL, {"architectures": ["Gemma2ForCausalLM"]}, 16),
        (MISTRAL, {"architectures": "Gemma2ForCausalLM", "sliding_window_pattern": 4}, 24),
        (MISTRAL, {"architectures": ["GptOssForCausalLM"], "sliding_window": "absent"}, 16),
    ],
)
def test_sliding_layers_are_those_of_the_config(config, keys, changes, sliding):
    assert find_model(str(config(keys, **changes))).sliding_layers == sliding


def test_a_pattern_of_no_layers_is_refused(config):
    path = config(MISTRAL, architectures=["Gemma2ForCausalLM"], sliding_window_pattern=0)
    with pytest.raises(ValueError, match=r"config\.json: sliding_window_pattern=0 must be 1 or more$"):
        find_model(str(path))


def test_files_that_are_not_configs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_model(str(tmp_path / "config.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        find_model(str(tmp_path / "list.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        find_model(str(tmp_path / "broken.json"))
