"""How many KV blocks an engine has: GPU memory minus everything that is not KV cache.

    requested  = ceil(memory * gpu_memory_utilization)
    available  = requested - weights - activations - runtime
    kv_blocks  = floor(available / (block_tokens * KV bytes per token of one layer) / layers)      on each rank

as vLLM does it (v1/worker/gpu_worker.py and v1/core/kv_cache_utils.py of 0.25.1; the V2 model runner deducts no CUDA
graphs: they live in what `gpu_memory_utilization` leaves over). One block of the result is vLLM's null block and is
never handed out. vLLM measures the middle terms by a profile run; here they follow from shapes (a forward pass of
T = max_num_batched_tokens rows, S = max_num_seqs rows sampled, V vocabulary, all 2-byte unless said):

    weights      all of the rank's weights, and the RoPE table: max_model_len * rotary dimension
    activations  the larger of
      a layer    T (2 H + 3 I / tp): residual and input beside the gate and up projections (2 I) and their product (I),
                 which live together for a moment; MoE: k rows of max(2 I', H) + I' a token; attention if that is larger
      sampling   T H + S V * 10 bytes: hidden states beside the logits, their float32 copy and as much for the sampled
                 distribution
    runtime      what no shape explains: CUDA modules of the kernels, cuBLAS and attention workspaces, input buffers

`runtime` is RUNTIME_BYTES plus, on each rank of a tensor-parallel group, COMMUNICATION_BYTES: an assumption, NCCL and
custom all-reduce buffers. RUNTIME_BYTES lies in the middle of what recorded engines leave (vLLM 0.25.1; 28,240 and
28,123 blocks of Llama-3.1-8B on two H100 SXM machines, 56,057 on an H200, 49,626 of Qwen3-8B on an H200: 0.35, 0.58,
0.56 and 0.82 GiB); with it all four come out within 0.3 %. An error of 0.5 GiB is 1 % of an H100's capacity beside an
8B model.

Left out: vLLM's V1 model runner, which serves most MoE and sliding-window models, also deducts an estimate of its CUDA
graphs, about half a GiB to one and a half.

Sliding-window layers keep only a window of each context. One block table per request cannot show that, so blocks are
counted in the better of two ways, each a lower bound of what the engine fits: all layers keep every token; or the
windows of max_num_seqs requests are set aside first and a block holds the other layers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from llmsim.hardware import Gpu, Model

GIB = 2**30
# Beside its bytes each copy between host and GPU lasts this long: 64 MiB on an H200 in 2,048 pieces of 32 KiB, as
# vLLM V0 swaps (a piece per block, layer, and key or value), takes 6.1 to 6.2 ms, in 32 pieces 1.3 ms
# (calibration/measurements/h200-sxm-links.parquet, copy_h2d and copy_d2h, variant "blocks"). Other GPUs: assumed.
COPY_S = 2.4e-6
RUNTIME_BYTES = int(0.51 * GIB)
COMMUNICATION_BYTES = int(0.2 * GIB)
LOGIT_BYTES = 2 + 4 + 4  # the logit, its float32 copy, and one more float32 for the distribution


def host_blocks(model: Model, *, tensor_parallel: int, kv_dtype: str, block_tokens: int, swap_space_gib: float) -> int:
    """KV blocks that fit into host memory; `swap_space_gib` is per GPU, as vLLM V0's --swap-space was."""
    return int(swap_space_gib * GIB / (block_tokens * model.layers * model.kv_layer_bytes(kv_dtype, tensor_parallel)))


def block_copy_s(model: Model, gpu: Gpu, *, tensor_parallel: int, kv_dtype: str, block_tokens: int) -> float:
    """Seconds to copy one KV block to the host or back; the ranks of a group copy their shares at the same time."""
    block_bytes = block_tokens * model.layers * model.kv_layer_bytes(kv_dtype, tensor_parallel)
    pieces = model.layers * (1 if model.mla else 2)
    return block_bytes / gpu.host_bytes_per_s + pieces * COPY_S


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes on one rank."""

    requested_bytes: int
    weights_bytes: int
    activation_bytes: int
    runtime_bytes: int

    @property
    def kv_bytes(self) -> int:
        """What is left for KV cache; negative: by how much the model does not fit."""
        return self.requested_bytes - self.weights_bytes - self.activation_bytes - self.runtime_bytes


def activation_bytes(
    model: Model, dtype: str, tensor_parallel: int, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    size = model.plain_bytes(dtype)
    mlp = 3 * model.intermediate / tensor_parallel
    if model.experts:
        width = model.expert_intermediate / tensor_parallel
        routed = model.experts_per_token * (max(2 * width, model.hidden) + width)
        mlp = max(mlp, routed + 3 * model.shared_intermediate / tensor_parallel)
    value = model.v_head_dim or model.head_dim
    heads = model.heads / tensor_parallel
    kv_heads = heads if model.mla else max(1.0, model.kv_heads / tensor_parallel)
    attention = heads * (model.head_dim + value) + kv_heads * (model.head_dim + value)  # query, output, key, value
    layer = max_num_batched_tokens * (2 * model.hidden + max(mlp, attention)) * size
    sampling = max_num_batched_tokens * model.hidden * size + max_num_seqs * model.vocab * LOGIT_BYTES
    return ceil(max(layer, sampling))


def memory_budget(
    model: Model,
    gpu: Gpu,
    *,
    tensor_parallel: int,
    dtype: str,
    gpu_memory_utilization: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
) -> MemoryBudget:
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization} is not in (0, 1]. vLLM's default is 0.92")
    rotary = model.rope_head_dim or model.head_dim
    rope_table = max_model_len * rotary * model.plain_bytes(dtype)
    return MemoryBudget(
        requested_bytes=ceil(gpu.memory_bytes * gpu_memory_utilization),
        weights_bytes=model.weight_bytes(dtype, tensor_parallel) + ceil(rope_table),
        activation_bytes=activation_bytes(model, dtype, tensor_parallel, max_num_batched_tokens, max_num_seqs),
        runtime_bytes=RUNTIME_BYTES + (COMMUNICATION_BYTES if tensor_parallel > 1 else 0),
    )


def kv_blocks(
    model: Model,
    gpu: Gpu,
    *,
    tensor_parallel: int,
    dtype: str,
    kv_dtype: str,
    block_tokens: int,
    gpu_memory_utilization: float,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    override: int | None = None,
) -> int:
    """Blocks on each rank, vLLM's null block included. `override` replaces the calculation, checks of memory too."""
    model.check_tensor_parallel(tensor_parallel)
    if block_tokens < 1:
        raise ValueError(f"block_size={block_tokens} is below 1. vLLM's default is 16")
    if override is not None:
        if override < 2:
            raise ValueError(f"num_gpu_blocks_override={override} is below 2: one block is the engine's null block")
        return override

    def room(tp: int) -> _Room:
        budget = memory_budget(
            model,
            gpu,
            tensor_parallel=tp,
            dtype=dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        layer_bytes = model.kv_layer_bytes(kv_dtype, tp)
        return _Room(model, budget, block_tokens, layer_bytes, max_num_seqs, max_model_len)

    here = room(tensor_parallel)
    if here.fits:
        return here.blocks
    larger = [tp for tp in model.tensor_parallel_sizes() if tp > tensor_parallel]
    enough = next((tp for tp in larger if room(tp).fits), None)
    if here.budget.kv_bytes < 0 or here.blocks < 2:
        raise ValueError(_too_large(model, gpu, tensor_parallel, gpu_memory_utilization, here, enough))
    remedy = f", or set tensor_parallel={enough}" if enough else ""
    raise ValueError(
        f"max_model_len={max_model_len} does not fit: one request of it needs {_gb(here.needed_bytes)} GB of KV cache, "
        f"{gpu.name} has {_gb(here.budget.kv_bytes)} GB left beside {model.name}. "
        f"Lower max_model_len to {here.longest_tokens} or less{remedy}"
    )


def engine_blocks(model: Model, blocks: int) -> int:
    """`blocks` that a vLLM engine counted, in blocks of all layers, as they are counted here.

    Where some layers slide, its block holds one group of layers of a kind: as many as there are of the rarer kind, or
    of the other, if those are fewer than 1.5 times as many (vLLM 0.25.1, v1/core/kv_cache_utils.py).
    """
    few, many = sorted((model.full_layers, model.sliding_layers))
    return blocks if few == 0 else blocks * (many if many < 1.5 * few else few) // model.layers


@dataclass(frozen=True)
class _Room:
    """The KV cache that a budget leaves."""

    model: Model
    budget: MemoryBudget
    block_tokens: int
    layer_bytes: float  # KV of one token in one layer
    max_num_seqs: int
    max_model_len: int

    @property
    def blocks(self) -> int:
        page_bytes = self.block_tokens * self.layer_bytes
        every_layer = self.budget.kv_bytes // page_bytes // self.model.layers
        if not self.model.sliding_layers or not self.model.full_layers:
            return int(every_layer)
        windows = self.max_num_seqs * self._window_bytes
        beside = (self.budget.kv_bytes - windows) // page_bytes // self.model.full_layers
        return int(max(every_layer, beside))

    @property
    def _window_bytes(self) -> float:
        kept = self.model.sliding_window + self.block_tokens  # the window straddles one block more
        return min(kept, self.max_model_len) * self.layer_bytes * self.model.sliding_layers

    @property
    def needed_bytes(self) -> float:
        """KV of one request of max_model_len."""
        tokens = ceil(self.max_model_len / self.block_tokens) * self.block_tokens
        return tokens * self.layer_bytes * self.model.full_layers + self._window_bytes

    @property
    def longest_tokens(self) -> int:
        """The longest context that one request can have."""
        page_bytes = self.block_tokens * self.layer_bytes
        if self.model.full_layers:
            blocks = (self.budget.kv_bytes - self._window_bytes) // page_bytes // self.model.full_layers
        else:
            blocks = self.budget.kv_bytes // page_bytes // self.model.layers
        return max(int(blocks), self.blocks) * self.block_tokens

    @property
    def fits(self) -> bool:
        return self.blocks >= 2 and self.needed_bytes <= self.budget.kv_bytes


def _too_large(model: Model, gpu: Gpu, tp: int, utilization: float, room: _Room, enough: int | None) -> str:
    budget = room.budget
    short = room.needed_bytes - budget.kv_bytes
    remedy = (
        f"The smallest tensor_parallel that fits is {enough}"
        if enough
        else "No tensor_parallel up to 8 fits: use a GPU with more memory or a quantization"
    )
    return (
        f"{model.name} does not fit on {gpu.name} with tensor_parallel={tp}: weights {_gb(budget.weights_bytes)} GB, "
        f"activations and runtime {_gb(budget.activation_bytes + budget.runtime_bytes)} GB and one request of "
        f"max_model_len={room.max_model_len} ({_gb(room.needed_bytes)} GB) are {_gb(short)} GB more than "
        f"{utilization:g} of its {_gb(gpu.memory_bytes)} GB. {remedy}"
    )


def _gb(count_bytes: float) -> str:
    return f"{count_bytes / 1e9:.1f}"
