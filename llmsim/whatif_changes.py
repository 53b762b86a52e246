"""The optimisations that `llmsim whatif` tries, one line each.

A `Change` is one setting. Where the scenario has the optimisation already, the change takes it away, and what it buys
is the difference between the run without it and the run with it; where it does not, the change adds it. `fields` is
told about the scenario and returns the fields to replace, or in a few words why the change does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsim.hardware import Gpu, Model, find_gpu, find_model, model_names
from llmsim.scenario import Scenario

Answer = dict[str, Any] | str


@dataclass(frozen=True)
class Setting:
    """What a change may look at."""

    scenario: Scenario  # resolved
    given: Scenario  # as it was given: None where vLLM chooses
    model: Model
    gpu: Gpu
    shares_prefixes: bool  # whether the trace names blocks that requests share

    @classmethod
    def of(cls, scenario: Scenario, shares_prefixes: bool) -> Setting:
        resolved = scenario.resolved()
        return cls(resolved, scenario, find_model(resolved.model), find_gpu(resolved.gpu), shares_prefixes)


@dataclass(frozen=True)
class Change:
    name: str
    about: str
    fields: Callable[[Setting], Answer]
    on: Callable[[Setting], bool] = lambda setting: False  # whether the scenario has the optimisation already


def _has(field: str, value: Any) -> Callable[[Setting], bool]:
    return lambda setting: getattr(setting.scenario, field) == value


def _no_compiler(fusion: str) -> Callable[[Setting], Answer]:
    """Off: kernels as `fusion` says, and no graphs cut out of compiled code."""

    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        if s.kernel_fusion == "none":
            return "kernel_fusion is none already, which this is a part of" if fusion == "custom" else _compiled(s)
        if s.kernel_fusion == "custom" and fusion == "custom":
            return _compiled(s)
        graphs = {"full_and_piecewise": "full_decode_only", "piecewise": "none"}
        return {"kernel_fusion": fusion, "cudagraph": graphs.get(s.cudagraph, s.cudagraph)}

    return fields


def _compiled(s: Scenario) -> Answer:
    graphs = "full_and_piecewise" if s.cudagraph == "full_decode_only" else s.cudagraph
    return {"kernel_fusion": "compiled", "cudagraph": graphs}


def _attention(setting: Setting) -> Answer:
    s, model = setting.scenario, setting.model
    if s.attention_kernel == "math":
        return {"attention_kernel": "flash"}
    if model.mla or model.sliding_layers:
        return f"unfused attention was timed for full attention only; {model.name} has another kind"
    if s.kv_dtype not in ("bfloat16", "float16"):
        return f"unfused attention reads no KV cache in {s.kv_dtype}"
    return {"attention_kernel": "math"}


def _graphs(setting: Setting) -> Answer:
    if setting.scenario.cudagraph != "none":
        return {"cudagraph": "none"}
    return {"cudagraph": "full_and_piecewise" if setting.scenario.kernel_fusion == "compiled" else "full_decode_only"}


def _full_graphs(setting: Setting) -> Answer:
    if setting.scenario.cudagraph == "piecewise":
        return {"cudagraph": "full_and_piecewise"}
    if setting.scenario.cudagraph != "full_and_piecewise":
        return f"cudagraph is {setting.scenario.cudagraph}: there are no piecewise graphs to fall back to"
    return {"cudagraph": "piecewise"}


def _prefix_caching(setting: Setting) -> Answer:
    if not setting.shares_prefixes:
        return "the trace names no blocks that requests share"
    return {"enable_prefix_caching": not setting.scenario.enable_prefix_caching}


def _chunked(setting: Setting) -> Answer:
    s = setting.scenario
    if s.scheduler != "vllm":
        return f"an option of the scheduler vllm; this is {s.scheduler}"
    if not s.enable_chunked_prefill:
        return {"enable_chunked_prefill": True, "max_num_batched_tokens": None}
    assert s.max_num_batched_tokens is not None and s.max_model_len is not None
    if s.long_prefill_token_threshold:
        return "long_prefill_token_threshold asks for chunks"
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(s.max_num_batched_tokens, s.max_model_len),
    }


def _weights(dtype: str, *, activations: str = "auto") -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s, model, gpu = setting.scenario, setting.model, setting.gpu
        now = model.weight_format(s.weight_dtype)
        if now == dtype and s.activation_dtype == activations:
            return f"the weights are in {dtype} already"
        if dtype in ("bfloat16", "float32"):
            if model.quantization:
                return f"the published weights are in {model.quantization}"
            return {"dtype": dtype, "quantization": None, "activation_dtype": "auto"}
        if activations == "auto" and dtype not in gpu.flops_per_s and dtype in ("fp8", "int8"):
            return f"{gpu.name} does not multiply in {dtype}"
        return {"quantization": dtype, "activation_dtype": activations}

    return fields


def _kv(dtype: str) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        if setting.scenario.kv_dtype == dtype:
            return f"the KV cache is in {dtype} already"
        if setting.scenario.attention_kernel == "math" and dtype not in ("bfloat16", "float16"):
            return f"unfused attention reads no KV cache in {dtype}"
        return {"kv_cache_dtype": dtype}

    return fields


def _allocation(setting: Setting) -> Answer:
    """Paged, or the classical cache that sets the longest context aside for every request and shares no blocks."""
    s = setting.scenario
    if s.kv_allocation != "paged":
        return {"kv_allocation": "paged"}
    if s.kv_compression != "none":
        return f"kv_compression={s.kv_compression} needs blocks to drop"
    return {"kv_allocation": "max", "enable_prefix_caching": False} | _no_speculation(s)


def _compression(spec: str) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        if s.kv_compression != "none":
            return {"kv_compression": "none"}
        if s.kv_allocation != "paged":
            return f"kv_allocation={s.kv_allocation} has no blocks to drop"
        if s.scheduler != "vllm" and s.swap_space_gib:
            return "dropped KV is not swapped"
        return {"kv_compression": spec, "enable_prefix_caching": False} | _no_speculation(s)

    return fields


def _no_speculation(s: Scenario) -> dict[str, Any]:
    return {"speculative_config": {}} if s.speculative_config else {}


def _tensor_parallel(double: bool) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        now = setting.scenario.tensor_parallel
        wanted = now * 2 if double else now // 2
        if not double and now == 1:
            return "one GPU cannot be halved"
        if wanted not in setting.model.tensor_parallel_sizes(wanted):
            return f"{setting.model.name} does not split over {wanted} GPUs"
        return {"tensor_parallel": wanted}

    return fields


def _seqs(factor: float) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        assert s.max_num_seqs is not None and s.max_num_batched_tokens is not None
        wanted = max(1, round(s.max_num_seqs * factor))
        if wanted == s.max_num_seqs or wanted > s.max_num_batched_tokens:
            return f"max_num_seqs={wanted} is beyond max_num_batched_tokens={s.max_num_batched_tokens}"
        return {"max_num_seqs": wanted}

    return fields


def _budget(factor: float) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        assert s.max_num_seqs is not None and s.max_num_batched_tokens is not None
        wanted = round(s.max_num_batched_tokens * factor)
        if wanted < s.max_num_seqs:
            return f"max_num_batched_tokens={wanted} is below max_num_seqs={s.max_num_seqs}"
        if not s.enable_chunked_prefill:
            return "prompts are not split: the budget is the longest of them"
        return {"max_num_batched_tokens": wanted}

    return fields


def _speculation(method: str, drafts: int, acceptance: float) -> Callable[[Setting], Answer]:
    """Acceptance is a property of model, drafter and text: these are assumptions, within what papers report."""

    def fields(setting: Setting) -> Answer:
        if setting.scenario.speculative_config:
            return {"speculative_config": {}}
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": drafts, "acceptance": acceptance}
        if method == "draft_model":
            small = _smallest_relative(setting)
            if small is None:
                return f"no model of a quarter of the size of {setting.model.name} is known that it shares words with"
            config["model"] = small
        return {"speculative_config": config}

    return fields


def _smallest_relative(setting: Setting) -> str | None:
    """The smallest model of the same family, if it is at most a quarter of the size."""
    family = setting.model.name.partition("-")[0]
    models = [find_model(name) for name in model_names() if name.partition("-")[0] == family]
    small = min(models, key=lambda model: model.params, default=None)
    if small is None or 4 * small.params > setting.model.params:
        return None
    return small.name if setting.scenario.tensor_parallel in small.tensor_parallel_sizes() else None


def _speculates(method: str) -> Callable[[Setting], bool]:
    return lambda setting: setting.scenario.speculative_config.get("method") == method


CHANGES: tuple[Change, ...] = (
    Change("flash-attention", "FlashAttention", _attention, _has("attention_kernel", "flash")),
    Change("operator-fusion", "operator fusion", _no_compiler("none"), lambda f: f.scenario.kernel_fusion != "none"),
    Change("torch-compile", "torch.compile", _no_compiler("custom"), _has("kernel_fusion", "compiled")),
    Change("cuda-graphs", "CUDA graphs", _graphs, lambda f: f.scenario.cudagraph != "none"),
    Change("full-graphs", "full CUDA graphs", _full_graphs, _has("cudagraph", "full_and_piecewise")),
    Change("prefix-caching", "prefix caching", _prefix_caching, _has("enable_prefix_caching", True)),
    Change("chunked-prefill", "chunked prefill", _chunked, _has("enable_chunked_prefill", True)),
    Change(
        "async-scheduling",
        "asynchronous scheduling",
        lambda f: {"async_scheduling": not f.scenario.async_scheduling},
        _has("async_scheduling", True),
    ),
    Change("weights-fp32", "weights and activations in float32", _weights("float32")),
    Change("weights-bf16", "weights and activations in bfloat16", _weights("bfloat16")),
    Change("weights-fp8", "weights and activations in fp8", _weights("fp8")),
    Change("weights-fp8-only", "weights in fp8, activations in bfloat16", _weights("fp8", activations="bfloat16")),
    Change("weights-int4", "weights in int4", _weights("int4")),
    Change("kv-bf16", "KV cache in bfloat16", _kv("bfloat16")),
    Change("kv-fp8", "KV cache in fp8", _kv("fp8")),
    Change("kv-int8", "KV cache in int8", _kv("int8")),
    Change("kv-int4", "KV cache in int4", _kv("int4")),
    Change("paged-kv", "paged KV cache", _allocation, _has("kv_allocation", "paged")),
    Change(
        "kv-sinks",
        "KV cache of 4 sinks and 1,020 tokens",
        _compression("sinks:4+1020"),
        _has("kv_compression", "sinks:4+1020"),
    ),
    Change("tp-double", "twice the tensor-parallel size", _tensor_parallel(True)),
    Change("tp-half", "half the tensor-parallel size", _tensor_parallel(False)),
    Change("seqs-double", "twice max_num_seqs", _seqs(2)),
    Change("seqs-quarter", "a quarter of max_num_seqs", _seqs(0.25)),
    Change("budget-double", "twice the token budget", _budget(2)),
    Change("budget-quarter", "a quarter of the token budget", _budget(0.25)),
    Change(
        "speculation-ngram", "n-gram speculation, 3 drafts at 0.4", _speculation("ngram", 3, 0.4), _speculates("ngram")
    ),
    Change("speculation-eagle", "EAGLE head, 3 drafts at 0.7", _speculation("eagle", 3, 0.7), _speculates("eagle")),
    Change(
        "speculation-model",
        "draft model, 4 drafts at 0.75",
        _speculation("draft_model", 4, 0.75),
        _speculates("draft_model"),
    ),
)


def chosen(only: tuple[str, ...], skip: tuple[str, ...]) -> list[Change]:
    """The table, or the part of it that `--only` and `--skip` name."""
    known = [change.name for change in CHANGES]
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option} {name}: no such change. Known: {', '.join(known)}")
    return [c for c in CHANGES if (not only or c.name in only) and c.name not in skip]
