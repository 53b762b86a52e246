"""The scheduler of the vLLM that is installed here, without an engine around it: no GPU, no model, no clock.

`InstalledVllm` makes vLLM's own scheduler object (v1/core/sched/scheduler.py `Scheduler`, async_scheduler.py
`AsyncScheduler`) with its own KV cache manager, and stands where vLLM's engine core does (v1/engine/core.py): requests
go in, `schedule()` says what runs, `update()` hands back the tokens. The model is one layer of nothing, on the CPU;
which device it would run on changes nothing in these classes. Two steps get past checks that ask for a GPU: the device
is given as "cpu", and asynchronous scheduling is switched on in the finished configuration.

Nothing here is imported before a scheduler is asked for: `import vllm` takes some 8 s.
Written against vLLM 0.25.1; any version with the same V1 classes works. Left out: LoRA, connectors, multimodal inputs,
structured output, speculation, pipeline parallelism.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

WRITTEN_FOR = "0.25.1"
INSTALL = "pip install 'llmsim[native]', see docs/policies/vllm-native.md"
CONTEXT_TOKENS = 1 << 24  # of the model of nothing: above any max_model_len
# A Llama as small as vLLM's own checks of a model allow; nobody computes it.
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 64,
    "max_position_embeddings": CONTEXT_TOKENS, "torch_dtype": "float32",
}  # fmt: skip


class Options(NamedTuple):
    """What vLLM is told, in its own words; `num_gpu_blocks` includes the null block."""

    num_gpu_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fcfs"
    long_prefill_token_threshold: int = 0
    watermark: float = 0.0
    scheduler_reserve_full_isl: bool = True
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    async_scheduling: bool = True


class Scheduled(NamedTuple):
    """One request's share of an iteration."""

    name: str
    tokens: int
    computed_before: int  # tokens whose KV exists when the iteration begins; on admission the prefix hit


class Answer(NamedTuple):
    """What one `schedule()` decided, in vLLM's order."""

    scheduled: list[Scheduled]
    preempted: list[str]
    raw: Any  # vLLM's own object, to be handed back with the tokens


class VllmMissingError(ValueError):
    """vLLM is not here, or is one that cannot be driven."""


def vllm_version() -> str:
    """The installed version, or VllmMissingError."""
    return str(_vllm().version)


@cache
def _vllm() -> SimpleNamespace:
    """vLLM's classes. Raises VllmMissingError with the fix, in one line."""
    if importlib.util.find_spec("vllm") is None:
        raise VllmMissingError(f"scheduler vllm-native needs vLLM, which is not installed here. {INSTALL}.")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it has much to say about a machine without a GPU
    try:
        import vllm
        from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request
        from vllm.v1.structured_output import StructuredOutputManager
    except ImportError as error:
        what = " ".join(str(error).split())
        raise VllmMissingError(
            f"scheduler vllm-native: the installed vLLM does not load: {what}. {INSTALL}."
        ) from error
    init_none_hash(_hash)  # the root of all hash chains: one of a process, and drawn anew by every call
    return SimpleNamespace(
        version=vllm.__version__, CacheConfig=CacheConfig, DeviceConfig=DeviceConfig,
        ModelConfig=ModelConfig, ParallelConfig=ParallelConfig, SchedulerConfig=SchedulerConfig, VllmConfig=VllmConfig,
        SamplingParams=SamplingParams, get_request_block_hasher=get_request_block_hasher,
        AsyncScheduler=AsyncScheduler, Scheduler=Scheduler, FullAttentionSpec=FullAttentionSpec,
        KVCacheConfig=KVCacheConfig, KVCacheGroupSpec=KVCacheGroupSpec, ModelRunnerOutput=ModelRunnerOutput,
        Request=Request, StructuredOutputManager=StructuredOutputManager,
    )  # fmt: skip


def _hash(content: Any) -> bytes:
    """As vLLM's default `sha256`: the chain itself (parent, tokens, extra keys) is vLLM's."""
    return hashlib.sha256(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)).digest()


@cache
def _model_config(max_model_len: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        return _vllm().ModelConfig(
            model=folder, skip_tokenizer_init=True, max_model_len=max_model_len, dtype="float32", seed=0
        )


def _config(options: Options) -> Any:
    v, o = _vllm(), options
    cache_config = v.CacheConfig(block_size=o.block_size, enable_prefix_caching=o.enable_prefix_caching)
    cache_config.num_gpu_blocks = o.num_gpu_blocks
    config = v.VllmConfig(
        model_config=_model_config(o.max_model_len),
        scheduler_config=v.SchedulerConfig(
            max_num_seqs=o.max_num_seqs,
            max_num_batched_tokens=o.max_num_batched_tokens,
            max_model_len=o.max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=o.enable_chunked_prefill,
            long_prefill_token_threshold=o.long_prefill_token_threshold,
            policy=o.policy,
            watermark=o.watermark,
            scheduler_reserve_full_isl=o.scheduler_reserve_full_isl,
            async_scheduling=False,
        ),
        cache_config=cache_config,
        parallel_config=v.ParallelConfig(),
        device_config=v.DeviceConfig(device="cpu"),
    )
    config.scheduler_config.async_scheduling = o.async_scheduling
    return config


class InstalledVllm:
    """One scheduler of the installed vLLM and its KV cache; requests are known by name.

    Raises VllmMissingError if there is no vLLM or it cannot be driven; whatever vLLM itself raises surfaces untouched.
    """

    def __init__(self, options: Options) -> None:
        v = _vllm()
        self.options, self.version = options, v.version
        try:
            config = _config(options)
            spec = v.FullAttentionSpec(
                block_size=options.block_size, num_kv_heads=1, head_size=1, dtype=config.model_config.dtype
            )
            groups = [v.KVCacheGroupSpec(["layer"], spec)]
            self._hasher = v.get_request_block_hasher(options.block_size, _hash)
            self.scheduler = (v.AsyncScheduler if options.async_scheduling else v.Scheduler)(
                vllm_config=config,
                kv_cache_config=v.KVCacheConfig(
                    num_blocks=options.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=groups
                ),
                structured_output_manager=v.StructuredOutputManager(config),
                block_size=options.block_size,
            )
            self._pool = self.scheduler.kv_cache_manager.block_pool
            self._count_evictions()
        except (TypeError, AttributeError) as error:
            what = " ".join(str(error).split())
            raise VllmMissingError(
                f"scheduler vllm-native: vLLM {self.version} is not built as {WRITTEN_FOR} is: {what}. "
                f"Install vLLM {WRITTEN_FOR}, or use --scheduler vllm."
            ) from error
        self.evicted_blocks = 0

    def _count_evictions(self) -> None:
        evict = self._pool._maybe_evict_cached_block

        def counted(block: Any) -> bool:
            evicted = bool(evict(block))
            self.evicted_blocks += evicted
            return evicted

        self._pool._maybe_evict_cached_block = counted

    def add(self, name: str, prompt: list[int], output_tokens: int, arrival_s: float, priority: int = 0) -> None:
        """A request joins the queue; `prompt` are its token ids, and it makes exactly `output_tokens`."""
        v = _vllm()
        self.scheduler.add_request(
            v.Request(
                name,
                prompt,
                v.SamplingParams(max_tokens=output_tokens, ignore_eos=True),
                None,
                arrival_time=arrival_s,
                priority=priority,
                block_hasher=self._hasher if self.options.enable_prefix_caching else None,
            )
        )

    def schedule(self) -> Answer:
        """vLLM decides the next iteration."""
        scheduler = self.scheduler
        before = list(scheduler.running)
        raw = scheduler.schedule()
        requests = scheduler.requests
        scheduled = [
            Scheduled(name, tokens, requests[name].num_computed_tokens - tokens)  # it has added them already
            for name, tokens in raw.num_scheduled_tokens.items()
        ]
        preempted: list[str] = []
        if before and (len(before) > len(scheduler.running) or before[-1] is not scheduler.running[len(before) - 1]):
            preempted = self._preempted(before)
        return Answer(scheduled, preempted, raw)

    def _preempted(self, before: list[Any]) -> list[str]:
        """Who of `before` runs no more, in the order in which they were sent away.

        vLLM reports a set. With fcfs the last one stands at the front of the queue; with priorities each victim was
        the least urgent of those left, the first of them on a tie.
        """
        stays = {request.request_id for request in self.scheduler.running}
        gone = [request for request in before if request.request_id not in stays]
        if self.options.policy == "priority":
            gone.sort(key=lambda request: (request.priority, request.arrival_time), reverse=True)
            return [request.request_id for request in gone]
        names = {request.request_id for request in gone}
        return [name for name in reversed(self.waiting_names()) if name in names]

    def update(self, raw: Any, tokens: dict[str, int]) -> list[tuple[str, int, str | None]]:
        """Hand vLLM an iteration's tokens; returns (request, tokens taken, why it ended or None) in its order.

        `tokens` holds one for each request that samples; the others of the iteration were in the middle of a prompt.
        """
        names = list(raw.num_scheduled_tokens)
        output = _vllm().ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[tokens[name]] if name in tokens else [] for name in names],
        )
        told = self.scheduler.update_from_output(raw, output)
        return [
            (one.request_id, len(one.new_token_ids), None if one.finish_reason is None else str(one.finish_reason))
            for client in told.values()
            for one in client.outputs
        ]

    @property
    def free_blocks(self) -> int:
        """Blocks nobody holds, with or without content."""
        return int(self._pool.get_num_free_blocks())

    def running_names(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]

    def waiting_names(self) -> list[str]:
        """From the front; what vLLM has set aside comes first, as it does in its own pass."""
        queues = [getattr(self.scheduler, "skipped_waiting", ()), self.scheduler.waiting]
        return [request.request_id for queue in queues for request in queue]
