"""What single changes of `llmsim whatif` do to a scenario: the fields they replace, or why they do not apply.

A function takes the `Setting` and answers; those with arguments return such a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsim.hardware import Gpu, Model, find_gpu, find_model, model_names
from llmsim.scenario import Scenario

Answer = dict[str, Any] | str
HOST_GIB = 64  # of host memory, where a change needs some


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


def ignored(scenario: Scenario, fields: dict[str, Any]) -> str | None:
    """Why the scenario that was made with these fields is not as they say: its engine lacks something."""
    for name, value in fields.items():
        if getattr(scenario, name) != value:
            return f"the engine {scenario.engine} has no {name}"
    return None


@dataclass(frozen=True)
class Change:
    name: str
    about: str
    fields: Callable[[Setting], Answer]
    on: Callable[[Setting], bool] = lambda setting: False  # whether the scenario has the optimisation already


def has(field: str, value: Any) -> Callable[[Setting], bool]:
    return lambda setting: getattr(setting.scenario, field) == value


def no_compiler(fusion: str) -> Callable[[Setting], Answer]:
    """Off: kernels as `fusion` says, and no graphs cut out of compiled code."""

    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        if s.kernel_fusion == "none":
            return "kernel_fusion is none already, which this is a part of" if fusion == "custom" else compiled(s)
        if s.kernel_fusion == "custom" and fusion == "custom":
            return compiled(s)
        graphs = {"full_and_piecewise": "full_decode_only", "piecewise": "none"}
        return {"kernel_fusion": fusion, "cudagraph": graphs.get(s.cudagraph, s.cudagraph)}

    return fields


def compiled(s: Scenario) -> Answer:
    graphs = "full_and_piecewise" if s.cudagraph == "full_decode_only" else s.cudagraph
    return {"kernel_fusion": "compiled", "cudagraph": graphs}


def attention(setting: Setting) -> Answer:
    s, model = setting.scenario, setting.model
    if s.attention_kernel == "math":
        return {"attention_kernel": "flash"}
    if model.mla or model.sliding_layers:
        return f"unfused attention was timed for full attention only; {model.name} has another kind"
    if s.kv_dtype not in ("bfloat16", "float16"):
        return f"unfused attention reads no KV cache in {s.kv_dtype}"
    return {"attention_kernel": "math"}


def graphs(setting: Setting) -> Answer:
    if setting.scenario.cudagraph != "none":
        return {"cudagraph": "none"}
    return {"cudagraph": "full_and_piecewise" if setting.scenario.kernel_fusion == "compiled" else "full_decode_only"}


def full_graphs(setting: Setting) -> Answer:
    if setting.scenario.cudagraph == "piecewise":
        return {"cudagraph": "full_and_piecewise"}
    if setting.scenario.cudagraph != "full_and_piecewise":
        return f"cudagraph is {setting.scenario.cudagraph}: there are no piecewise graphs to fall back to"
    return {"cudagraph": "piecewise"}


def prefix_caching(setting: Setting) -> Answer:
    if not setting.shares_prefixes:
        return "the trace names no blocks that requests share"
    return {"enable_prefix_caching": not setting.scenario.enable_prefix_caching}


def chunked(setting: Setting) -> Answer:
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


def weights(dtype: str, *, activations: str = "auto") -> Callable[[Setting], Answer]:
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


def kv(dtype: str) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        if setting.scenario.kv_dtype == dtype:
            return f"the KV cache is in {dtype} already"
        if setting.scenario.attention_kernel == "math" and dtype not in ("bfloat16", "float16"):
            return f"unfused attention reads no KV cache in {dtype}"
        return {"kv_cache_dtype": dtype}

    return fields


def allocation(setting: Setting) -> Answer:
    """Paged, or the classical cache that sets the longest context aside for every request and shares no blocks."""
    s = setting.scenario
    if s.kv_allocation != "paged":
        return {"kv_allocation": "paged"}
    if s.kv_compression != "none":
        return f"kv_compression={s.kv_compression} needs blocks to drop"
    return {"kv_allocation": "max", "enable_prefix_caching": False} | no_speculation(s)


def compression(spec: str) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        if s.kv_compression != "none":
            return {"kv_compression": "none"}
        if s.kv_allocation != "paged":
            return f"kv_allocation={s.kv_allocation} has no blocks to drop"
        if s.scheduler != "vllm" and s.swap_space_gib:
            return "dropped KV is not swapped"
        return {"kv_compression": spec, "enable_prefix_caching": False} | no_speculation(s)

    return fields


def offload(setting: Setting) -> Answer:
    s = setting.scenario
    if s.kv_tiers != "none":
        return {"kv_tiers": "none", "kv_tier_prefetch": False, "kv_tier_write": "write_through"}
    if not setting.shares_prefixes:
        return "the trace names no blocks that requests share"
    return {"kv_tiers": f"cpu:{HOST_GIB}GiB:{setting.gpu.host_bytes_per_s / 1e9:g}GB/s:10us"}


def swap(setting: Setting) -> Answer:
    s = setting.scenario
    if s.scheduler != "vllm":
        return f"an option of the scheduler vllm; this is {s.scheduler}"
    if s.preemption == "swap":
        return {"preemption": "recompute", "swap_space_gib": 0.0}
    return {"preemption": "swap", "swap_space_gib": float(HOST_GIB)}


def no_speculation(s: Scenario) -> dict[str, Any]:
    return {"speculative_config": {}} if s.speculative_config else {}


def tensor_parallel(double: bool) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        now = setting.scenario.tensor_parallel
        wanted = now * 2 if double else now // 2
        if not double and now == 1:
            return "one GPU cannot be halved"
        if wanted not in setting.model.tensor_parallel_sizes(wanted):
            return f"{setting.model.name} does not split over {wanted} GPUs"
        return {"tensor_parallel": wanted}

    return fields


def seqs(factor: float) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        assert s.max_num_seqs is not None and s.max_num_batched_tokens is not None
        wanted = max(1, round(s.max_num_seqs * factor))
        if wanted == s.max_num_seqs or wanted > s.max_num_batched_tokens:
            return f"max_num_seqs={wanted} is beyond max_num_batched_tokens={s.max_num_batched_tokens}"
        return {"max_num_seqs": wanted}

    return fields


def budget(factor: float) -> Callable[[Setting], Answer]:
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


def speculation(method: str, drafts: int, acceptance: float) -> Callable[[Setting], Answer]:
    """Acceptance is a property of model, drafter and text: these are assumptions, within what papers report."""

    def fields(setting: Setting) -> Answer:
        if setting.scenario.speculative_config:
            return {"speculative_config": {}}
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": drafts, "acceptance": acceptance}
        if method == "draft_model":
            small = smallest_relative(setting)
            if small is None:
                return f"no model of a quarter of the size of {setting.model.name} is known that it shares words with"
            config["model"] = small
        return {"speculative_config": config}

    return fields


def smallest_relative(setting: Setting) -> str | None:
    """The smallest model of the same family, if it is at most a quarter of the size."""
    family = setting.model.name.partition("-")[0]
    models = [find_model(name) for name in model_names() if name.partition("-")[0] == family]
    small = min(models, key=lambda model: model.params, default=None)
    if small is None or 4 * small.params > setting.model.params:
        return None
    return small.name if setting.scenario.tensor_parallel in small.tensor_parallel_sizes() else None


def speculates(method: str) -> Callable[[Setting], bool]:
    return lambda setting: setting.scenario.speculative_config.get("method") == method
