"""A scenario: everything about the serving system that one replay needs to know, flat and frozen.

Fields carry vLLM's names and, unless said otherwise, the defaults of vLLM 0.25's API server (engine/arg_utils.py,
config/scheduler.py, config/cache.py). `None` means "what vLLM would choose for this model and GPU"; `resolved()` fills
it in:

    max_model_len            the model's own context
    max_num_batched_tokens   8192 on GPUs of 70 GiB or more that are not an A100, else 2048; at least max_model_len
                             without chunked prefill; at most max_num_seqs * max_model_len
    max_num_seqs             1024 on the same GPUs, else 256; at most max_num_batched_tokens
    quantization             that of the published weights, if they are quantised

This is the only place with defaults and the only place with checks of settings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from llmsim.drafting import Speculation, speculation_of
from llmsim.engines import (
    Own,
    OwnFloat,
    OwnInt,
    OwnText,
    default_limits,
    find_engine,
    marked,
    pool_blocks,
    sglang_own,
    sglang_running,
)
from llmsim.hardware import Gpu, Model, dtype_name, find_gpu, find_model
from llmsim.scenario_file import toml_line
from llmsim.scenario_kv import check_kv_cache

GIB = 2**30
LARGE_GPU_BYTES = 70 * GIB  # vLLM's line between small and large default limits
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")  # auto: bfloat16
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
# of the weights; activations of the 4-bit formats stay in `dtype`
QUANTIZATIONS = ("fp8", "int8", "int4", "mxfp4", "awq", "awq_marlin", "gptq", "gptq_marlin")
CUDAGRAPHS = ("full_and_piecewise", "full_decode_only", "piecewise", "none")
ATTENTION_KERNELS = ("flash", "math")
KERNEL_FUSIONS = ("compiled", "custom", "none")
ACTIVATION_DTYPES = ("auto", "bfloat16")
KV_ALLOCATIONS = ("paged", "max", "pow2", "oracle")
KV_TIER_WRITES = ("write_through", "on_eviction")
PREEMPTIONS = ("recompute", "swap", "pause")
SCHEDULING_POLICIES = ("fcfs", "priority")
# fields that make vLLM's cache another one, and what leaves it as it is
KV_CACHE_KINDS = {"eviction": "lru", "kv_allocation": "paged", "kv_tiers": "none", "kv_compression": "none"}
VLLM_SCHEDULERS = ("vllm", "vllm-native")  # our own, and the installed vLLM's
CUTTING = ("sglang", "tensorrt-llm")  # prompts to whole blocks
# argument of these policies: the field it comes from
VLLM_OPTIONS = {
    "policy": "scheduling_policy",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "watermark": "watermark",
    "reserve_full_isl": "reserve_full_isl",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "preemption": "preemption",
}


@dataclass(frozen=True)
class Scenario:
    """A fleet of identical replicas: one model on `tensor_parallel` GPUs each, one engine configuration, one router."""

    model: str  # a name of `llmsim list models`, or the path of a Hugging Face config.json
    gpu: str  # a name of `llmsim list gpus`
    tensor_parallel: int = 1  # GPUs of one replica
    replicas: int = 1
    router: str = "round_robin"  # a name of `llmsim list routers`, or path/to/file.py:ClassName
    router_args: dict[str, Any] = field(default_factory=dict, hash=False)
    scheduler: str = OwnText("vllm")  # a name of `llmsim list schedulers`, or path/to/file.py:ClassName
    scheduler_args: dict[str, Any] = field(default_factory=dict, hash=False)
    scheduling_policy: str = "fcfs"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int = OwnInt(16)  # tokens of a KV block
    gpu_memory_utilization: float = OwnFloat(0.92)  # the engine's share; what it means is in llmsim.engines
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    kv_cache_dtype: str = "auto"  # auto: as `dtype`
    dtype: str = "bfloat16"
    quantization: str | None = None
    num_gpu_blocks_override: int | None = None  # per replica; None: from the GPU's memory
    long_prefill_token_threshold: int = 0  # 0: off
    watermark: float = 0.0  # fraction of KV blocks kept free at admission
    reserve_full_isl: bool = True  # admit a request only if blocks for its whole sequence are free
    async_scheduling: bool = True
    cudagraph: str = "full_and_piecewise"
    cost: str = "auto"  # auto, roofline, constant:SECONDS, a name of `llmsim list profiles`, or a path to a profile
    launch_jitter: bool = True  # draw the host's launch times from their measured spread
    host_scale: float = 1.0  # 2: a host that needs twice the time for everything it does
    concurrency: int | None = None  # closed loop: at most this many requests under way; None: sent when the trace says
    seed: int = 0
    eviction: str = "lru"  # which cached content is lost: a name of `llmsim list evictions`, or file.py:ClassName
    eviction_args: dict[str, Any] = field(default_factory=dict, hash=False)
    kv_allocation: str = "paged"  # or what a contiguous cache reserves for a request: max, pow2, oracle
    kv_tiers: str = "none"  # below the GPU, fastest first: name:capacity:bandwidth:latency, separated by commas
    kv_tier_write: str = "write_through"  # or on_eviction
    kv_tier_prefetch: bool = False  # lower tiers' content moves to the first when a request arrives
    preemption: str = "recompute"  # of the scheduler vllm, when KV blocks run short: recompute, swap, pause
    kv_compression: str = "none"  # tokens that a request keeps: window:W, sinks:S+W, budget:B
    admission: str = "none"  # which requests are taken: none (all), deadline, queue-depth, or path/to/file.py:ClassName
    admission_args: dict[str, Any] = field(default_factory=dict, hash=False)
    swap_space_gib: float = 0.0  # host memory per GPU for the KV of requests that a policy swaps out; 0: none
    engine: str = "vllm"  # a name of `llmsim list engines`: scheduler, cache and defaults together
    # What if the engine lacked one of its optimisations (llmsim.cost.variant)? The defaults are what vLLM does.
    attention_kernel: str = "flash"  # math: scores in memory, every step of attention a kernel of its own
    kernel_fusion: str = "compiled"  # custom: torch.compile off, hand-written kernels; none: each operation a kernel
    speculative_config: dict[str, Any] = field(default_factory=dict, hash=False)  # llmsim.drafting; {}: off
    activation_dtype: str = "auto"  # of the linear layers' inputs: as fast as the weights allow, or bfloat16

    def __post_init__(self) -> None:
        _check_types(self)
        _as_the_engine_has_it(self)
        _check_ranges(self)
        _check_together(self)

    def resolved(self) -> Scenario:
        """The same scenario with every default filled in for its model and GPU, checked against both."""
        model, gpu = find_model(self.model), find_gpu(self.gpu)
        _check_facts(self, model)
        context = self.max_model_len or model.max_context_tokens
        tokens, seqs = self._limits(context, model, gpu)
        return replace(
            self,
            max_model_len=context,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
            dtype=self._compute_dtype,
            kv_cache_dtype=self.kv_dtype,
            quantization=self.quantization or model.quantization,
            scheduler=str(self.scheduler),
            block_size=int(self.block_size),
            gpu_memory_utilization=float(self.gpu_memory_utilization),
            # vLLM looks n-grams up between two steps, so it schedules synchronously with them
            async_scheduling=self.async_scheduling and not (self.speculation and self.speculation.on_host),
        )

    @property
    def speculation(self) -> Speculation | None:
        return speculation_of(self.speculative_config)

    @property
    def kv_dtype(self) -> str:
        """What one number of the KV cache is stored as."""
        return self._compute_dtype if self.kv_cache_dtype == "auto" else dtype_name(self.kv_cache_dtype)

    @property
    def weight_dtype(self) -> str:
        """What one weight of the linear layers is stored as."""
        return dtype_name(self.quantization) if self.quantization else self._compute_dtype

    @property
    def _compute_dtype(self) -> str:
        return "bfloat16" if self.dtype == "auto" else dtype_name(self.dtype)

    def _limits(self, context: int, model: Model, gpu: Gpu) -> tuple[int, int]:
        """(max_num_batched_tokens, max_num_seqs) as the engine (vLLM's: its server) sets them if not given."""
        if self.engine == "sglang":
            return self._sglang_limits(context, model, gpu)
        large = gpu.memory_bytes >= LARGE_GPU_BYTES and "a100" not in gpu.name.lower()
        own_tokens, own_seqs = default_limits(self.engine, gpu, self.tensor_parallel, context)
        seqs = self.max_num_seqs or own_seqs or (1024 if large else 256)
        tokens = self.max_num_batched_tokens or own_tokens
        if tokens is None:
            tokens = 8192 if large else 2048
            if not self.enable_chunked_prefill:
                tokens = max(tokens, context)
            tokens = min(tokens, seqs * context)
        if self.max_num_seqs is None:
            seqs = min(seqs, tokens)
        return tokens, seqs

    def _sglang_limits(self, context: int, model: Model, gpu: Gpu) -> tuple[int, int]:
        """(chunked_prefill_size, max_running_requests) where they are not given; decodes have no token budget."""
        own_tokens, _ = default_limits(self.engine, gpu, self.tensor_parallel, context)
        tokens = self.max_num_batched_tokens or own_tokens
        assert tokens is not None, "SGLang has a chunk size for every GPU"
        if self.max_num_seqs is not None:
            return tokens, self.max_num_seqs
        blocks = pool_blocks(
            self.engine, model, gpu, tensor_parallel=self.tensor_parallel, dtype=self.weight_dtype,
            kv_dtype=self.kv_dtype, block_tokens=self.block_size, gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_batched_tokens=tokens, max_num_seqs=1, max_model_len=context, override=self.num_gpu_blocks_override,
        )  # fmt: skip
        return tokens, sglang_running((blocks - 1) * self.block_size, context)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "scenario") -> Scenario:
        """Strict: an unknown field or a value of the wrong type is an error that names `source`."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{source}: unknown field {name!r}.{_did_you_mean(name, known)}")
        for name in ("model", "gpu"):
            if name not in values:
                raise ValueError(f"{source}: no {name}: add {name} = NAME (llmsim list {name}s)")
        return cls(**values)

    def to_toml(self) -> str:
        """One line a field, as `--scenario FILE` reads it; fields that are None are left out."""
        given = {name: value for name, value in asdict(self).items() if value is not None and value != {}}
        return "".join(toml_line(name, value) for name, value in given.items())


def _did_you_mean(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known fields: {', '.join(known)}"


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "dict[str, Any]": ((dict,), "a table of name = value"),
}


def _check_types(scenario: Scenario) -> None:
    for item in fields(scenario):
        kind, optional = str(item.type).removesuffix(" | None"), str(item.type).endswith(" | None")
        value: Any = getattr(scenario, item.name)
        if value is None and optional:
            continue
        types, words = _KINDS[kind]
        # bool is an int to Python, not to a reader of max_num_seqs=True
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
            default = " or leave it out" if optional else ""
            raise ValueError(f"{item.name}={value!r} is not {words}: give {words}{default}")
        if kind == "float" and not isfinite(getattr(scenario, item.name)):
            raise ValueError(f"{item.name}={value!r} is not finite: give a number")
        if kind == "str" and not str(value).strip():
            raise ValueError(f"{item.name} is empty: give a name")


def _as_the_engine_has_it(scenario: Scenario) -> None:
    """What is not given is the engine's own; what it lacks is off. Nothing else changes a scenario once it is made."""
    engine = find_engine(scenario.engine)
    own = dict(engine.own)
    if engine.name == "sglang":
        own |= sglang_own(scenario.gpu, scenario.tensor_parallel, scenario.max_num_batched_tokens)
    for name, value in own.items():
        if isinstance(getattr(scenario, name), Own):
            object.__setattr__(scenario, name, marked(value))
    for name in engine.lacks:
        object.__setattr__(scenario, name, False)


_AT_LEAST = {
    "tensor_parallel": 1,
    "replicas": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_model_len": 1,
    "num_gpu_blocks_override": 2,  # block 0 is vLLM's null block and holds nothing
    "long_prefill_token_threshold": 0,
    "concurrency": 1,
    "seed": 0,
}

_ONE_OF = {
    "scheduling_policy": SCHEDULING_POLICIES,
    "cudagraph": CUDAGRAPHS,
    "dtype": DTYPES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "kv_allocation": KV_ALLOCATIONS,
    "preemption": PREEMPTIONS,
    "kv_tier_write": KV_TIER_WRITES,
    "quantization": QUANTIZATIONS,
    "attention_kernel": ATTENTION_KERNELS,
    "kernel_fusion": KERNEL_FUSIONS,
    "activation_dtype": ACTIVATION_DTYPES,
}


def _check_ranges(s: Scenario) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(s, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is too small: give {least} or more")
        if value is not None and value >= 2**63:
            raise ValueError(f"{name}={value} is too large: give less than 2**63")
    for name, choices in _ONE_OF.items():
        value = getattr(s, name)
        if value is not None and value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    if s.block_size != 1 and (s.block_size < 8 or s.block_size % 8):
        raise ValueError(f"block_size={s.block_size} is no size engines offer: give a multiple of 8 (vLLM: 16), or 1")
    if not 0.0 < s.gpu_memory_utilization <= 1.0:
        raise ValueError(
            f"gpu_memory_utilization={s.gpu_memory_utilization} is not a fraction of the GPU's memory: "
            "give more than 0, at most 1"
        )
    if not 0.0 <= s.watermark < 1.0:
        raise ValueError(f"watermark={s.watermark} is not a fraction of the KV blocks: give 0 or more, less than 1")
    if not 0.0 <= s.swap_space_gib <= 65536.0:
        raise ValueError(f"swap_space_gib={s.swap_space_gib} is no host memory: give GiB per GPU, 0 for none")
    if not 0.0 < s.host_scale <= 1000.0:
        raise ValueError(
            f"host_scale={s.host_scale} is not a factor for the host's times: give 1 for the measured host, 2 for half "
            "its speed, at most 1000"
        )


def _check_together(s: Scenario) -> None:
    tokens, seqs, context = s.max_num_batched_tokens, s.max_num_seqs, s.max_model_len
    if tokens is not None and seqs is not None and tokens < seqs and s.engine != "sglang":
        raise ValueError(_below_seqs(tokens, seqs))
    if context is not None:
        _check_context(s, context)
    if s.kernel_fusion != "compiled" and "piecewise" in s.cudagraph:
        raise ValueError(
            f"cudagraph={s.cudagraph} needs kernel_fusion=compiled, since piecewise graphs are cut out of compiled "
            f"code: with kernel_fusion={s.kernel_fusion} give cudagraph full_decode_only or none"
        )
    _check_speculation(s)
    _check_policy(s)
    _check_chunks(s)
    check_kv_cache(s)
    _check_radix_tree(s)


def _check_speculation(s: Scenario) -> None:
    """Drafts need blocks that a request keeps while it grows."""
    if speculation_of(s.speculative_config) is None:
        return
    if s.cost.partition(":")[0] == "constant":
        raise ValueError(
            f"speculative_config: cost={s.cost} takes the same time for any number of rows, so drafts cost nothing: "
            "give another cost, or leave one of them out"
        )
    if s.scheduler == "vllm-native":
        raise ValueError("speculative_config: the scheduler vllm-native is asked without drafts: leave one of them out")
    for name, plain in (("kv_allocation", "paged"), ("kv_compression", "none")):
        if getattr(s, name) != plain:
            raise ValueError(
                f"speculative_config with {name}={getattr(s, name)!r} is not modelled: leave one of them out"
            )


def _check_radix_tree(s: Scenario) -> None:
    for name, plain in KV_CACHE_KINDS.items():
        value = getattr(s, name)
        if s.engine == "sglang" and value != plain:
            raise ValueError(
                f"{name}={value!r}: the engine sglang has a radix tree, which knows none: leave it out, or give the "
                "scheduler sglang with the engine vllm"
            )


def _check_policy(s: Scenario) -> None:
    """vLLM's policy takes its options from fields of their own, and no other policy knows them."""
    if s.scheduler in VLLM_SCHEDULERS:
        for name, field_name in VLLM_OPTIONS.items():
            if name in s.scheduler_args:
                raise ValueError(
                    f"scheduler_args {name}={s.scheduler_args[name]!r}: the scheduler {s.scheduler} takes it from the "
                    f"field {field_name}: give {field_name} instead"
                )
        return
    for field_name in VLLM_OPTIONS.values():
        given, default = getattr(s, field_name), Scenario.__dataclass_fields__[field_name].default
        if given != default:
            raise ValueError(
                f"{field_name}={given!r} is an option of the scheduler vllm, which {s.scheduler} does not know: "
                "leave it out"
            )


def _check_chunks(s: Scenario) -> None:
    """SGLang and TensorRT-LLM cut prompts to whole blocks: with less than one to a chunk they would never begin."""
    scheduler, args = s.scheduler, s.scheduler_args
    if args.get("base") in CUTTING and isinstance(args.get("base_args", {}), dict):
        scheduler, args = args["base"], args.get("base_args", {})
    if scheduler not in CUTTING or (scheduler == "tensorrt-llm" and args.get("enable_chunked_prefill") is not True):
        return
    name, chunk = "max_num_batched_tokens", s.max_num_batched_tokens
    if scheduler == "sglang" and args.get("chunked_prefill_size"):
        name, chunk = "chunked_prefill_size", args["chunked_prefill_size"]
    if isinstance(chunk, int) and 0 < chunk < s.block_size:
        raise ValueError(
            f"{name}={chunk} is below block_size={s.block_size}, and the scheduler {scheduler} cuts prompts to whole "
            f"blocks: give at least {s.block_size}, or a smaller block_size"
        )


def _check_context(s: Scenario, context: int) -> None:
    tokens, threshold = s.max_num_batched_tokens, s.long_prefill_token_threshold
    if tokens is not None and tokens < context and not s.enable_chunked_prefill:
        raise ValueError(
            f"max_num_batched_tokens={tokens} is below max_model_len={context} with chunked prefill off: a long prompt "
            f"could never run. Raise it to {context}, lower max_model_len, or enable chunked prefill"
        )
    if threshold > context:
        raise ValueError(
            f"long_prefill_token_threshold={threshold} is above max_model_len={context}: "
            f"give at most {context}, or 0 for off"
        )


def _below_seqs(tokens: int, seqs: int) -> str:
    return (
        f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}: each decoding request needs one token per "
        f"iteration. Raise max_num_batched_tokens to {seqs} or lower max_num_seqs"
    )


def _check_facts(s: Scenario, model: Model) -> None:
    if s.max_model_len is not None and s.max_model_len > model.max_context_tokens:
        raise ValueError(
            f"max_model_len={s.max_model_len} is above the {model.max_context_tokens} tokens of {model.name}: lower it"
        )
    model.check_tensor_parallel(s.tensor_parallel)
    speculation = s.speculation
    if speculation is not None and speculation.model is not None:
        find_model(speculation.model).check_tensor_parallel(s.tensor_parallel)
