"""Engines: which scheduler, cache and defaults come together under a name, for `--engine`.

`--scheduler` changes the policy alone and leaves memory, blocks and limits as they are. What is measured of kernels and
host is vLLM's in any case: no other engine has been recorded, so the others run on vLLM's kernels and host and the
result says so. What does not follow from the engine's name is a setting like any other.

    engine          scheduler      prefix cache   tokens of a block   share of the GPU's memory that the engine takes
    vllm            vllm           blocks         16                  0.92
    sglang          sglang         radix tree     1                   (memory - reserve) / memory (mem_fraction_static)
    tensorrt-llm    tensorrt-llm   blocks         32                  0.9 of what is free beside weights and activations
    vllm-v0         vllm-v0        none           16                  0.9
    sarathi         sarathi        none           16                  0.9
    orca, dynamic,  the same       none           16                  0.9
    static

SGLang 0.5.23 [arg_groups/memory_hook.py, fields/schedule.py, cuda_graph_hook.py]: by GPU memory, chunked_prefill_size
and the largest decode graph are those of `SGLANG_BY_MEMORY`;

    reserve  = 512 + 1.5 max(chunk, 2048) + 1024 tp / 8 + 2 graph + 8 * prefill graphs   MiB; on GPUs of more than
               60 GiB at least 10 GiB
    KV pool  = memory * share - weights - what CUDA takes
    max_running_requests = 512 * pool tokens / context, within 2048 and 4096, at most half the pool

Prefill batches of up to chunked_prefill_size tokens run as piecewise graphs (on by default), decode batches beyond the
largest graph as none. Sizes of prefill graphs: by 4 to 32, 16 to 256, 32 to 512, 64 to 1024, 256 to 4096, then 512;
50 up to 4096, where a user's start-up log of 0.5.19 counts 51.
TensorRT-LLM [docs: useful runtime flags, LLM API]: max_batch_size 2048, max_num_tokens 8192, no graphs for prompts.
Assumed: decode graphs up to 128 requests, padded.
vLLM V0 (0.6): max_num_seqs 256, max_num_batched_tokens max(context, 2048), host and GPU take turns, no automatic prefix
caching by default. The papers' engines (Orca, Sarathi-Serve, static and dynamic batching) know no prefix cache and no
overlap of host and GPU either; Sarathi-Serve, a fork of vLLM V0, has its max_num_seqs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llmsim.cost import EAGER, PIECEWISE
from llmsim.cost.graphs import Graphs
from llmsim.hardware import Gpu, Model, find_gpu
from llmsim.kvcache import KVCache
from llmsim.memory import RUNTIME_BYTES, kv_blocks, memory_budget
from llmsim.radixcache import RadixCache

GIB, MIB = 2**30, 2**20
SMALL = float("inf")

# below this many GiB: chunked_prefill_size, largest decode graph, the same for tensor_parallel of 4 and more
SGLANG_BY_MEMORY = (
    (20, 2048, 8, 8),
    (35, 4096, 48, 160),
    (60, 4096, 32, 160),
    (90, 8192, 256, 512),
    (160, 8192, 256, 512),
    (SMALL, 16384, 512, 512),
)
SGLANG_RUNNING = (2048, 4096)  # requests at once, at least and at most
TENSORRT_GRAPH = 128


@dataclass(frozen=True)
class EngineFacts:
    """`own`: fields of a scenario that it decides unless they are given. `lacks`: switches that it does not have."""

    name: str
    about: str
    own: dict[str, Any] = field(hash=False)
    lacks: tuple[str, ...] = ()
    whose: str = ""  # kernels and host would be: not measured, assumed to be vLLM's


BEFORE_V1 = ("enable_prefix_caching", "async_scheduling")


def _paper(name: str, about: str) -> EngineFacts:
    own = {"scheduler": name, "block_size": 16, "gpu_memory_utilization": 0.9}
    return EngineFacts(name, about, own, BEFORE_V1, about.partition(",")[0])


ENGINES: dict[str, EngineFacts] = {
    engine.name: engine
    for engine in (
        EngineFacts(
            "vllm",
            "vLLM V1 (0.25.1)",
            {"scheduler": "vllm", "block_size": 16, "gpu_memory_utilization": 0.92},
        ),
        EngineFacts(
            "sglang",
            "SGLang (0.5.23)",
            {"scheduler": "sglang", "block_size": 1},
            whose="SGLang",
        ),
        EngineFacts(
            "tensorrt-llm",
            "TensorRT-LLM",
            {"scheduler": "tensorrt-llm", "block_size": 32, "gpu_memory_utilization": 0.9},
            whose="TensorRT-LLM",
        ),
        _paper("vllm-v0", "vLLM V0, prefill first (SOSP'23)"),
        _paper("sarathi", "Sarathi-Serve, stall-free chunks (OSDI'24)"),
        _paper("orca", "Orca, iteration-level batching (OSDI'22)"),
        _paper("dynamic", "Dynamic batching, with a time-out"),
        _paper("static", "Static batching, as FasterTransformer's"),
    )
}


def find_engine(name: str) -> EngineFacts:
    if name in ENGINES:
        return ENGINES[name]
    close = get_close_matches(name, ENGINES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(ENGINES)}"
    raise ValueError(f"engine={name!r} is unknown: {hint}")


class Own:
    """Marks a value that nobody gave: the engine's own, which another engine replaces by its own."""


class OwnText(Own, str):
    __slots__ = ()


class OwnInt(Own, int):
    __slots__ = ()


class OwnFloat(Own, float):
    __slots__ = ()


def marked(value: str | float) -> Any:
    """An engine's own value, equal to `value` and marked as not given."""
    if isinstance(value, str):
        return OwnText(value)
    return OwnInt(value) if isinstance(value, int) else OwnFloat(value)


# ---- what depends on the GPU and the model


def sglang_limits(gpu: Gpu, tensor_parallel: int) -> tuple[int, int]:
    """(chunked_prefill_size, largest decode graph)."""
    for below_gib, chunk, graph, graph_tp4 in SGLANG_BY_MEMORY:
        if gpu.memory_bytes < below_gib * GIB:
            return chunk, graph_tp4 if tensor_parallel >= 4 else graph
    raise AssertionError("the last row has no bound")


def sglang_memory_share(gpu: Gpu, tensor_parallel: int, chunk_tokens: int) -> float:
    """mem_fraction_static: weights and KV pool, as a share of the GPU's memory."""
    graph = sglang_limits(gpu, tensor_parallel)[1]
    prefill_graphs = len(sglang_prefill_sizes(chunk_tokens))
    reserve = 512 + 1.5 * max(chunk_tokens, 2048) + 1024 * tensor_parallel / 8 + 2 * graph + 8 * prefill_graphs
    reserve *= MIB
    if gpu.memory_bytes > 60 * GIB:
        reserve = max(reserve, 10 * GIB)
    return round((gpu.memory_bytes - reserve) / gpu.memory_bytes, 3)


def sglang_own(gpu: str, tensor_parallel: int, chunk_tokens: int | None) -> dict[str, Any]:
    """What SGLang decides by the GPU; nothing of an unknown one, which is refused elsewhere."""
    try:
        found = find_gpu(gpu)
    except ValueError:
        return {}
    chunk = chunk_tokens or sglang_limits(found, tensor_parallel)[0]
    return {"gpu_memory_utilization": sglang_memory_share(found, tensor_parallel, chunk)}


def default_limits(engine: str, gpu: Gpu, tensor_parallel: int, context: int) -> tuple[int | None, int | None]:
    """(max_num_batched_tokens, max_num_seqs) of an engine; None: as vLLM V1 would set it, or from the KV pool."""
    if engine == "sglang":
        return sglang_limits(gpu, tensor_parallel)[0], None
    if engine == "tensorrt-llm":
        return 8192, 2048
    if engine == "vllm-v0":
        return max(context, 2048), 256
    if engine == "sarathi":
        return None, 256
    return None, None


def sglang_running(pool_tokens: int, context: int) -> int:
    """max_running_requests."""
    least, most = SGLANG_RUNNING
    return max(1, min(max(512 * pool_tokens // context, least), most, pool_tokens // 2))


def pool_blocks(engine: str, model: Model, gpu: Gpu, **kind: Any) -> int:
    """KV blocks of one replica by the engine's own reckoning, with one more that holds nothing (vLLM's null block).

    `kind`: what `llmsim.memory.kv_blocks` takes. Raises ValueError if the model does not fit.
    """
    if engine not in ("sglang", "tensorrt-llm") or kind.get("override") is not None:
        return kv_blocks(model, gpu, **kind)
    block_bytes = kind["block_tokens"] * model.kv_bytes_per_token(kind["kv_dtype"], kind["tensor_parallel"])
    blocks = int(pool_bytes(engine, model, gpu, **kind) // block_bytes)
    needed = -(-kind["max_model_len"] // kind["block_tokens"])
    if blocks < needed:
        tokens = max(blocks, 0) * kind["block_tokens"]
        raise ValueError(
            f"max_model_len={kind['max_model_len']} does not fit: {gpu.name} has room for {tokens} tokens of KV cache"
            f" beside {model.name} under {ENGINES[engine].about}. Lower max_model_len, or raise tensor_parallel or"
            " gpu_memory_utilization"
        )
    return blocks + 1


def pool_bytes(engine: str, model: Model, gpu: Gpu, **kind: Any) -> float:
    """Bytes of one rank's KV pool under SGLang or TensorRT-LLM."""
    names = ("tensor_parallel", "dtype", "max_num_batched_tokens", "max_num_seqs", "max_model_len")
    budget = memory_budget(model, gpu, gpu_memory_utilization=1.0, **{name: kind[name] for name in names})
    share: float = kind["gpu_memory_utilization"]
    if engine == "tensorrt-llm":
        return share * budget.kv_bytes
    return share * gpu.memory_bytes - budget.weights_bytes - RUNTIME_BYTES


class PhaseGraphs(Graphs):
    """Graphs of their own for decode batches (full) and for batches with prompts (piecewise)."""

    def __init__(self, decodes: Sequence[int], prompts: Sequence[int], cudagraph: str) -> None:
        super().__init__(sorted({*decodes, *prompts}), decodes[-1], cudagraph)
        self._largest_decode = decodes[-1] if self.sizes else 0
        self._largest_prompt = max(prompts, default=0) if self.sizes else 0

    def mode(self, tokens: int, chunks: int) -> int:
        if chunks:
            return PIECEWISE if tokens <= self._largest_prompt else EAGER
        return self._uniform[tokens] if tokens <= self._largest_decode else EAGER


def sglang_prefill_sizes(chunk_tokens: int) -> list[int]:
    grid = [*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
    grid += [*range(1280, 4097, 256), *range(4608, chunk_tokens + 1, 512)]
    return [size for size in grid if size <= chunk_tokens]


def graphs_of(
    engine: str, gpu: Gpu, tensor_parallel: int, max_num_seqs: int, max_num_batched_tokens: int, cudagraph: str
) -> Graphs:
    """Which iterations are CUDA graphs: vLLM's sizes, SGLang's, or those assumed of TensorRT-LLM."""
    if engine == "sglang":
        largest = min(sglang_limits(gpu, tensor_parallel)[1], max_num_seqs)
        grid = [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 497, 16), *range(512, 4097, 32)]
        prompts = sglang_prefill_sizes(max_num_batched_tokens)
    elif engine == "tensorrt-llm":
        largest = min(TENSORRT_GRAPH, max_num_seqs)
        grid, prompts = [1, 2, 4, *range(8, TENSORRT_GRAPH + 1, 8)], []
    else:
        return Graphs.of_engine(max_num_seqs, max_num_batched_tokens, cudagraph)
    decodes = sorted({size for size in grid if size < largest} | {largest})
    return PhaseGraphs(decodes, prompts, cudagraph)


def cache_class(engine: str) -> type[KVCache]:
    return RadixCache if engine == "sglang" else KVCache
