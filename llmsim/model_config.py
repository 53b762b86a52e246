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
        "defaults": {"tie_word_embeddings": False, "max_position_embeddings": 131072, "sliding_window": 128},
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
BITS = {"awq": (4,), "gptq": (4, 8)}  # of weights; 4 where a config says none
FULL, SLIDING = "full_attention", "sliding_attention"  # the kinds in layer_types that llmsim models
MOST = 2**31 - 1  # of any count here: engines keep them in 32 bits


class _Config:
    """The config's keys, with errors that name file and key."""

    def __init__(self, keys: dict[str, Any], where: str) -> None:
        self.keys = keys
        self.where = where

    def positive(self, *spellings: str, default: int | None = None) -> int:
        return self.integer(*spellings, default=default, least=1)

    def integer(self, *spellings: str, default: int | None = None, least: int = 0) -> int:
        for key in spellings:
            value = self.keys.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                whole = isinstance(value, float) and value.is_integer() and least <= value <= MOST
                fix = f"write {value:.0f}" if whole else f"write one of {least} or more"
                raise ValueError(f"{self.where}: {key}={value!r:.60} is not a whole number: {fix}")
            if not least <= value <= MOST:
                bound = f"{least} or more" if value < least else f"at most {MOST}"
                raise ValueError(f"{self.where}: {key}={value} must be {bound}")
            return value
        if default is None:
            raise ValueError(f"{self.where}: key {spellings[0]!r} is missing. Add it with the model's value")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.keys.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {key}={value!r:.60} is no truth value: write true or false, unquoted")
        return value

    def entries(self, key: str) -> list[Any] | None:
        value = self.keys.get(key)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.where}: {key}={value!r:.60} is not a list: write it as one, or leave it out")
        return value


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
        "tied_embeddings": read.flag("tie_word_embeddings"),
        "max_context_tokens": read.positive("max_position_embeddings"),
        "norms_per_layer": family.get("norms_per_layer", 2),
        "qkv_bias": read.flag("attention_bias", family.get("qkv_bias", False)),
        "out_bias": read.flag("attention_bias") and architecture == "GptOssForCausalLM",
        "expert_bias": family.get("expert_bias", False),
        "qk_norm": family.get("qk_norm", False),
        "quantization": _quantisation(config, where),
    }
    fields |= _experts(read, architecture, layers)
    fields |= _latent_attention(read) if architecture.startswith("Deepseek") else {}
    return fields | _window(read, family, layers)


def _family(config: dict[str, Any], where: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    named = config.get("architectures")
    if named is None or named == []:
        raise ValueError(f"{where}: key 'architectures' is missing. Add it, one of {', '.join(FAMILIES)}")
    first = named[0] if isinstance(named, list) else named
    architecture = TEXT_FAMILY.get(first, first) if isinstance(first, str) else None
    if architecture not in FAMILIES:
        known = ", ".join((*FAMILIES, *TEXT_FAMILY))
        raise ValueError(f"{where}: architectures={first!r:.60} is not one llmsim knows. Known: {known}")
    family = FAMILIES[architecture]
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"{where}: text_config={text!r:.60} is not an object: give one, or leave it out")
    return architecture, family, {**family.get("defaults", {}), **(config if text is None else text)}


def _quantisation(config: dict[str, Any], where: str) -> str | None:
    section = config.get("quantization_config")
    if not section:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else section
    if not isinstance(method, str) or method not in QUANTISED:
        raise ValueError(f"{where}: quant_method={method!r:.60} is not one llmsim knows. Known: {', '.join(QUANTISED)}")
    bits = section.get("bits") if isinstance(section, dict) else None
    if method in BITS and bits is not None:
        if type(bits) is not int or bits not in BITS[method]:
            known = " or ".join(map(str, BITS[method]))
            raise ValueError(f"{where}: bits={bits!r:.60} of {method} is not one llmsim knows. Known: {known}")
        return f"int{bits}"
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
    every = read.positive("decoder_sparse_step", "moe_layer_freq", default=1)
    dense_first = read.integer("first_k_dense_replace", default=0)
    only_dense = read.entries("mlp_only_layers") or []
    for layer in only_dense:
        if type(layer) is not int or not 0 <= layer < layers:
            raise ValueError(f"{read.where}: mlp_only_layers names {layer!r:.60}: name layers from 0 to {layers - 1}")
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
    kinds = _listed_kinds(read, layers)
    if not read.flag("use_sliding_window", default=True):
        return {}
    if not window:
        if SLIDING in kinds if kinds is not None else read.flag("use_sliding_window"):
            why = "use_sliding_window is true" if kinds is None else f"layer_types lists {SLIDING}"
            given = read.keys.get("sliding_window")
            raise ValueError(f"{read.where}: sliding_window={given}, but {why}: write the window in tokens, 1 or more")
        return {}
    if kinds is not None:
        sliding = kinds.count(SLIDING)
    elif "window_every" in family:
        every = read.positive("sliding_window_pattern", "_sliding_window_pattern", default=family["window_every"])
        sliding = layers - layers // every
    elif family.get("window_everywhere"):
        sliding = layers
    elif read.flag("use_sliding_window"):  # Qwen: the first max_window_layers layers attend in full
        sliding = max(0, layers - read.integer("max_window_layers"))
    else:
        return {}
    return {"sliding_window": window, "sliding_layers": sliding} if sliding else {}


def _listed_kinds(read: _Config, layers: int) -> list[str] | None:
    kinds = read.entries("layer_types")
    if kinds is None:
        return None
    if len(kinds) != layers:
        raise ValueError(
            f"{read.where}: layer_types lists {len(kinds)} layers, but num_hidden_layers={layers}: list each layer once"
        )
    for layer, kind in enumerate(kinds):
        if kind not in (FULL, SLIDING):
            raise ValueError(
                f"{read.where}: layer_types[{layer}]={kind!r:.60} is not one llmsim knows. Known: {FULL}, {SLIDING}"
            )
    return kinds
