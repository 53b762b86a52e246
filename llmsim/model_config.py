"""A Hugging Face `config.json` -> the fields of `llmsim.model.Model`.

Every architecture spells its shapes in its own keys, and leaves out those that equal its configuration class's
default (transformers, `configuration_*.py`). `FAMILIES` says what differs from the plain decoder (Llama). A key that is
needed, missing and without such a default is an error, never a guess. Text decoders only; of a multimodal model the
`text_config` is read.
"""

from __future__ import annotations

from typing import Any

# Plain values are fields of Model that the architecture implies; "defaults" are config keys its class may leave out.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"window_everywhere": True},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "Phi3ForCausalLM": {"window_everywhere": True},
    "MixtralForCausalLM": {"window_everywhere": True},
    "Qwen2MoeForCausalLM": {"qkv_bias": True},
    "Qwen3MoeForCausalLM": {"qk_norm": True},
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
    "Gemma2ForCausalLM": {
        "norms_per_layer": 4,
        "window_every": 2,
        "defaults": {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    },
    "Gemma3ForCausalLM": {
        "norms_per_layer": 4,
        "qk_norm": True,
        "window_every": 6,
        "defaults": {
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
    },
    "GptOssForCausalLM": {
        "qkv_bias": True,
        "out_bias": True,
        "expert_bias": True,
        "window_every": 2,
        "defaults": {"tie_word_embeddings": False, "max_position_embeddings": 131072},
    },
}
# The language model inside these is one of the above.
TEXT_FAMILY = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
    "LlavaForConditionalGeneration": "LlamaForCausalLM",
}
# quantization_config.quant_method -> how llmsim names the format
QUANTISED = {"fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4", "awq": "int4", "gptq": "int4"}


class _Config:
    """The config's keys, with errors that name file and key."""

    def __init__(self, keys: dict[str, Any], where: str) -> None:
        self.keys = keys
        self.where = where

    def positive(self, *spellings: str, default: int | None = None) -> int:
        value = self.integer(*spellings, default=default)
        if value == 0:
            raise ValueError(f"{self.where}: {spellings[0]}=0 must be above 0")
        return value

    def integer(self, *spellings: str, default: int | None = None) -> int:
        for key in spellings:
            value = self.keys.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{self.where}: {key}={value!r} is not a whole number")
            return value
        if default is None:
            raise ValueError(f"{self.where}: key {spellings[0]!r} is missing. Add it with the model's value")
        return default


def model_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of Model, except name and source."""
    architecture, family, keys = _family(config, where)
    read = _Config(keys, where)
    heads = read.positive("num_attention_heads")
    hidden = read.positive("hidden_size")
    layers = read.positive("num_hidden_layers")
    kv_heads = read.positive("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if hidden % heads and keys.get("head_dim") is None and not architecture.startswith("Deepseek"):
        raise ValueError(f"{where}: key 'head_dim' is missing, and {heads} heads do not divide hidden_size={hidden}")
    fields = {
        "architecture": architecture,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": read.positive("head_dim", default=max(1, hidden // heads)),
        "vocab": read.positive("vocab_size"),
        "tied_embeddings": bool(keys.get("tie_word_embeddings", False)),
        "max_context_tokens": read.positive("max_position_embeddings"),
        "norms_per_layer": family.get("norms_per_layer", 2),
        "qkv_bias": bool(keys.get("attention_bias", family.get("qkv_bias", False))),
        "out_bias": bool(keys.get("attention_bias", False)) and architecture == "GptOssForCausalLM",
        "expert_bias": family.get("expert_bias", False),
        "qk_norm": family.get("qk_norm", False),
        "quantization": _quantisation(config, where),
    }
    fields |= _experts(read, architecture, layers)
    fields |= _latent_attention(read) if architecture.startswith("Deepseek") else {}
    return fields | _window(read, family, layers)


def _family(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    named = config.get("architectures")
    if not named:
        raise ValueError(f"{where}: key 'architectures' is missing. Add it, one of {', '.join(FAMILIES)}")
    if isinstance(named, str):
        named = [named]
    architecture = TEXT_FAMILY.get(named[0], named[0])
    if architecture not in FAMILIES:
        known = ", ".join((*FAMILIES, *TEXT_FAMILY))
        raise ValueError(f"{where}: architectures={named[0]!r} is not one llmsim knows. Known: {known}")
    family = FAMILIES[architecture]
    keys = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return architecture, family, {**family.get("defaults", {}), **keys}


def _quantisation(config: dict[str, Any], where: str) -> str | None:
    section = config.get("quantization_config")
    if not section:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else section
    if method not in QUANTISED:
        raise ValueError(f"{where}: quant_method={method!r} is not one llmsim knows. Known: {', '.join(QUANTISED)}")
    if method == "gptq" and section.get("bits", 4) == 8:
        return "int8"
    return QUANTISED[method]


def _experts(read: _Config, architecture: str, layers: int) -> dict[str, Any]:
    experts = read.integer("num_local_experts", "num_experts", "n_routed_experts", default=0)
    if not experts:
        return {"intermediate": read.positive("intermediate_size")}
    width = "moe_intermediate_size" if "moe_intermediate_size" in read.keys else "intermediate_size"
    expert_intermediate = read.positive(width)
    chosen = read.positive("num_experts_per_tok", "experts_per_token")
    if chosen > experts:
        raise ValueError(f"{read.where}: num_experts_per_tok={chosen} is above the {experts} experts")
    shared = read.integer("shared_expert_intermediate_size", default=0)
    shared += read.integer("n_shared_experts", default=0) * expert_intermediate
    every = read.integer("decoder_sparse_step", "moe_layer_freq", default=1)
    dense_first = read.integer("first_k_dense_replace", default=0)
    only_dense = set(read.keys.get("mlp_only_layers") or ())
    moe_layers = sum(
        layer >= dense_first and layer not in only_dense and (layer + 1) % every == 0 for layer in range(layers)
    )
    return {
        "experts": experts,
        "experts_per_token": chosen,
        "expert_intermediate": expert_intermediate,
        "shared_intermediate": shared,
        "moe_layers": moe_layers,
        "intermediate": read.integer("intermediate_size") if moe_layers < layers else 0,
    }


def _latent_attention(read: _Config) -> dict[str, Any]:
    nope, rope = read.integer("qk_nope_head_dim"), read.integer("qk_rope_head_dim")
    return {
        "q_lora_rank": read.integer("q_lora_rank", default=0),
        "kv_lora_rank": read.integer("kv_lora_rank"),
        "nope_head_dim": nope,
        "rope_head_dim": rope,
        "v_head_dim": read.integer("v_head_dim"),
        "head_dim": nope + rope,
    }


def _window(read: _Config, family: dict[str, Any], layers: int) -> dict[str, Any]:
    """Sliding-window layers: as listed, or every one but each n-th, or (early Mistral) all."""
    window = read.integer("sliding_window", default=0)
    listed = read.keys.get("layer_types")
    if read.keys.get("use_sliding_window") is False or not window:
        return {}
    if listed:
        sliding = sum(kind == "sliding_attention" for kind in listed)
    elif "window_every" in family:
        every = read.integer("sliding_window_pattern", "_sliding_window_pattern", default=family["window_every"])
        sliding = layers - layers // every
    elif family.get("window_everywhere"):
        sliding = layers
    elif read.keys.get("use_sliding_window"):  # Qwen: the first max_window_layers layers attend in full
        sliding = max(0, layers - read.integer("max_window_layers"))
    else:
        return {}
    return {"sliding_window": window, "sliding_layers": sliding} if sliding else {}
