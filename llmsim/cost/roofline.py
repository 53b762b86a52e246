"""Cost from facts alone: what the data sheets allow, less a stated loss. Uncalibrated: use it where no profile exists.

GPU seconds of an iteration of R rows (tokens, padded if a graph runs it) and r requests, on one rank:

    linear      ridge(2 * weights passed * R / (COMPUTE * peak), weight bytes / (WEIGHT * bandwidth))
    LM head     ridge(2 * V H r / (COMPUTE * peak), (2 V H + 10 V r) bytes / (WEIGHT * bandwidth)), logits and sampler
                included
    rows        8 H + 2 (h + 2 g) d + 3 I elements of a row and layer that norms, RoPE and activation read and write
    layers      LAYER_LATENCY_S each: the dozen kernels of a layer cannot be shorter than their start and drain
    prefill     max(pairs * FLOPs per pair / (ATTENTION * peak), KV bytes of the contexts / (KV * bandwidth))
    decode      per cached token max(KV bytes / (KV * bandwidth), FLOPs per pair / (ATTENTION * peak))
    all-reduce  two a layer: latency + 2 (tp - 1) / tp * R H * 2 bytes / (LINK * link); one all-gather of the logits

    ridge(c, m) = sqrt(c^2 + m^2): the roofline's max(c, m) with its corner rounded, because near the ridge GEMMs reach
    neither limit. At c = m it is 1.41 times the maximum, a factor of four away 1.03 times.

A chunk of n new tokens after d computed ones has n d + n (n + 1) / 2 (query, key) pairs; a sliding-window layer sees at
most a window of keys per query. MoE weights are those of the experts a batch is expected to reach (hardware.py).
In a run of decodes a sliding layer stops growing once the mean context fills its window; growth is that of the run's
first iteration. Left out: length skew within a batch, expert imbalance, slower decode attention beside prefill, clocks
that drop under power limits, overlap of communication with compute.

The fractions are what good kernels reach of a data-sheet peak on Hopper and Ampere: dense GEMMs of thousands of rows
0.65 to 0.75 (H100 at its 700 W limit), weight streaming 0.85 and KV streaming 0.90 of the bandwidth, causal
FlashAttention prefill about 0.5 at the lengths of chunks (FlashAttention-3, section 4.1: 0.35 to 0.75 from 512 to 16k
tokens), NCCL all-reduce 0.75 of NVLink. With them Llama-3.1-8B in bfloat16 decodes one request in 6.4 ms on an H100
(recorded: 6.5) and reads 43 ns of cache a token (43); linear layers of prefills take 23 us a token (22.7). Decodes
timed on an H200, which chose none of them, come out 1 to 8 % short up to 64 requests and 14 % short at 256 (the ridge),
from 128 to 16,384 tokens of context. Other GPUs, tensor parallelism and MoE were not checked against anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import Host, Ramp
from llmsim.cost.basis import pairs_of, windowed_pairs
from llmsim.cost.graphs import Graphs
from llmsim.cost.terms import Parts
from llmsim.hardware import Gpu, Model

if TYPE_CHECKING:
    from llmsim.scenario import Scenario

COMPUTE_FRACTION = 0.70
WEIGHT_FRACTION = 0.85
KV_FRACTION = 0.90
ATTENTION_FRACTION = 0.50
LINK_FRACTION = 0.75
LAYER_LATENCY_S = 35e-6
NVLINK_LATENCY_S = 8e-6  # one all-reduce of a few KiB within a node
PCIE_LATENCY_S = 30e-6
LOGIT_BYTES = 10  # a 2-byte logit, its float32 copy, and one more float32 of the sampler

Columns = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]


def default_host(layers: int) -> Host:
    """A host as recorded beside an H100 (16 virtual cores, vLLM 0.25.1, 32 layers), without jitter.

    A full graph is one launch however deep the model; piecewise and eager launches go layer by layer.
    """
    depth = layers / 32
    return Host(
        schedule_s=0.25e-3,
        schedule_per_request_s=2e-6,
        schedule_per_token_s=0.1e-6,
        launch_s=(3e-3, 15e-3 * depth, 28e-3 * depth),
        update_s=0.13e-3,
        update_per_output_s=6e-6,
        interference_per_token_s=2e-6,
        lead_s=(2e-3, 2e-3, 2e-3),
        tail_s=(0.0, 1e-3, 1e-3),
        receive_busy_s=0.4e-3,
        receive_s=0.8e-3,
        receive_per_token_s=0.5e-6,
        respond_s=1.2e-3,
        respond_per_output_s=36e-6,
    )


def ridge(compute_s: float, memory_s: float) -> float:
    return sqrt(compute_s * compute_s + memory_s * memory_s)


class RooflineCost:
    """`dtype` is the format of the weights; matmuls run in it where the GPU can, else in bfloat16."""

    kind = origin = "roofline"

    def __init__(
        self,
        model: Model,
        gpu: Gpu,
        *,
        tensor_parallel: int,
        dtype: str,
        kv_dtype: str,
        graphs: Graphs,
        host: Host,
        compute_dtype: str | None = None,
    ) -> None:
        model.check_tensor_parallel(tensor_parallel)
        self.host = host
        self.mode = graphs.mode
        self.label = f"roofline of {gpu.name}'s data sheet, uncalibrated: expect errors of tens of percent"
        self._model, self._dtype, self._tp = model, dtype, tensor_parallel
        self._padded = graphs.padded
        computed = compute_dtype or gpu.compute_dtype(model.weight_format(dtype))
        self._peak = gpu.flops_per_s[computed] * COMPUTE_FRACTION
        self._weight_rate = gpu.bandwidth_bytes_per_s * WEIGHT_FRACTION
        self._plain_bytes = model.plain_bytes(dtype)
        self._link_rate, self._link_latency_s = _link(gpu, tensor_parallel)
        attention_peak = gpu.flops_per_s["bfloat16"] * ATTENTION_FRACTION
        self._pair_s = model.layer_flops_per_pair / tensor_parallel / attention_peak  # of one layer
        self._kv_s = model.kv_layer_bytes(kv_dtype, tensor_parallel) / (gpu.bandwidth_bytes_per_s * KV_FRACTION)
        self._cached_s = max(self._kv_s, model.decode_flops_per_pair / tensor_parallel / attention_peak)
        self._rows_s: dict[int, float] = {}
        self._heads_s: list[float] = []  # by requests
        self._decodes_s: list[float] = []  # by requests: a decode iteration without context

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        while len(self._decodes_s) <= seqs:
            self._decodes_s.append(self._linear_s(len(self._decodes_s), len(self._decodes_s)))
        model = self._model
        layers = model.full_layers
        if kv_tokens < seqs * model.sliding_window:
            layers = model.layers
        return Ramp(self._decodes_s[seqs] + self._decode_attention_s(seqs, kv_tokens), self._cached_s * layers * seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        tokens = seqs
        attention_s = self._decode_attention_s(seqs, kv_tokens) if seqs else 0.0
        for new, done in chunks:
            tokens += new
            attention_s += self._chunk_s(new, done)
        return self._linear_s(tokens, seqs + len(chunks)) + attention_s

    def outside_measured(self, iterations: dict[str, Any]) -> NDArray[np.bool_]:
        """All of them: nothing was measured."""
        return np.ones(len(iterations["seqs"]), dtype=bool)

    # ---- attention --------------------------------------------------------------------------------------------

    def _decode_attention_s(self, seqs: int, kv_tokens: float) -> float:
        model = self._model
        cached = kv_tokens + seqs  # each new token sees itself too
        windowed = min(cached, seqs * model.sliding_window)  # as if all contexts were the mean one
        return self._cached_s * (model.full_layers * cached + model.sliding_layers * windowed)

    def _chunk_s(self, new: int, done: int) -> float:
        model = self._model
        pairs = pairs_of(new, done)
        seconds = model.full_layers * max(pairs * self._pair_s, (new + done) * self._kv_s)
        if model.sliding_layers:
            keys = min(new + done, new + model.sliding_window)
            pairs = windowed_pairs(new, done, model.sliding_window)
            seconds += model.sliding_layers * max(pairs * self._pair_s, keys * self._kv_s)
        return seconds

    # ---- everything else --------------------------------------------------------------------------------------

    def _linear_s(self, tokens: int, requests: int) -> float:
        rows = self._padded(tokens)
        if rows not in self._rows_s:
            self._rows_s[rows] = self._layers_s(rows)
        while len(self._heads_s) <= requests:
            self._heads_s.append(self._lm_head_s(len(self._heads_s)))
        return self._rows_s[rows] + self._heads_s[requests]

    def parts(self, tokens: int, requests: int, seqs: int) -> Parts:
        model, rows = self._model, self._padded(tokens)
        layers_s = self._layers_s(rows)
        reduce_s = 2 * model.layers * self._all_reduce_s(rows * model.hidden * self._plain_bytes)
        width = model.hidden * 8 + (2 * (model.heads + 2 * model.kv_heads) * model.head_dim + 3 * model.mlp_width) / (
            self._tp
        )
        between_s = rows * model.layers * width * self._plain_bytes / self._weight_rate + model.layers * LAYER_LATENCY_S
        attention_s = self._decode_attention_s(seqs, 0)
        head_s = self._lm_head_s(requests)
        return Parts(layers_s - reduce_s - between_s, between_s, head_s, attention_s, reduce_s)

    def rows_s(self, tokens: int, requests: int) -> float:
        return self._linear_s(tokens, requests)

    def head_s(self, requests: int) -> float:
        return self._lm_head_s(requests)

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        """Sliding windows as if all chunks of an iteration were alike."""
        model = self._model
        seconds = model.full_layers * np.maximum(pairs * self._pair_s, (tokens + context_tokens) * self._kv_s)
        if model.sliding_layers:
            window = model.sliding_window
            keys = np.minimum(tokens + context_tokens, tokens + chunks * window)
            narrow = np.minimum(pairs, tokens * float(window))
            seconds = seconds + model.sliding_layers * np.maximum(narrow * self._pair_s, keys * self._kv_s)
        return seconds

    def clocked_s(self, seconds: float, seqs: int) -> float:
        """Lower clocks are left out."""
        return seconds

    @property
    def pair_s(self) -> float:
        return self._pair_s * self._model.layers

    def _layers_s(self, rows: int) -> float:
        model, tp = self._model, self._tp
        passed = model.dense_linear_params(tp) + model.experts_per_token * model.expert_params(tp)
        weights_bytes = model.linear_bytes(self._dtype, tp, model.distinct_experts(rows))
        width = model.hidden * 8 + (2 * (model.heads + 2 * model.kv_heads) * model.head_dim + 3 * model.mlp_width) / tp
        moved_bytes = rows * model.layers * width * self._plain_bytes
        return (
            ridge(2 * passed * rows / self._peak, weights_bytes / self._weight_rate)
            + moved_bytes / self._weight_rate
            + model.layers * LAYER_LATENCY_S
            + 2 * model.layers * self._all_reduce_s(rows * model.hidden * self._plain_bytes)
        )

    def _lm_head_s(self, requests: int) -> float:
        weights = self._model.lm_head_params / self._tp
        logits = requests * self._model.vocab
        head_s = ridge(
            2 * weights * requests / self._peak,
            (weights * self._plain_bytes + logits * LOGIT_BYTES) / self._weight_rate,
        )
        return head_s + self._all_reduce_s(logits * self._plain_bytes) / 2  # an all-gather moves half as much

    def _all_reduce_s(self, message_bytes: float) -> float:
        if self._tp == 1:
            return 0.0
        return self._link_latency_s + 2 * (self._tp - 1) / self._tp * message_bytes / self._link_rate


def _link(gpu: Gpu, tp: int) -> tuple[float, float]:
    """Achieved bytes per second between the GPUs of a group, and the latency of one collective."""
    bridged_out = "pairs only" in gpu.link and tp > 2  # the bridge joins two boards; the rest goes over PCIe
    if bridged_out or gpu.link.startswith("PCIe"):
        return gpu.pcie_bytes_per_s * LINK_FRACTION, PCIE_LATENCY_S
    return gpu.link_bytes_per_s * LINK_FRACTION, NVLINK_LATENCY_S


# ---- the work of a finished run: for MFU, MBU and bottlenecks -----------------------------------------------------


def flops(model: Model, iterations: Columns, tensor_parallel: int = 1) -> Floats:
    """Useful operations of each row of an iteration log on one rank: no padding, every layer at full context up to a
    window, the mean context standing for all."""
    decoded = iterations["iterations"] * iterations["seqs"]
    decode, prefill = _layer_pairs(model, iterations)
    if "decoded_tokens" in iterations:  # of a speculating engine; rejected drafts are no use
        made = iterations["decoded_tokens"]
        decode = decode * (made / np.maximum(decoded, 1))
        decoded = made
    tokens = decoded + iterations["prefill_tokens"]
    heads = decoded + iterations["prefill_requests"]
    linear = 2.0 * (model.linear_params * tokens + model.lm_head_params * heads)
    total: Floats = linear + model.decode_flops_per_pair * decode + model.layer_flops_per_pair * prefill
    return total / tensor_parallel


def bytes_moved(
    model: Model, iterations: Columns, dtype: str, kv_dtype: str = "auto", tensor_parallel: int = 1
) -> Floats:
    """Bytes one rank must read or write for each row: weights once an iteration (of MoE layers the experts reached),
    KV cache read by decodes and by prefill chunks, KV written."""
    n, seqs = iterations["iterations"], iterations["seqs"]
    batch = seqs + iterations["prefill_tokens"]
    dense_bytes = model.linear_bytes(dtype, tensor_parallel, 0)
    expert_bytes = model.linear_bytes(dtype, tensor_parallel, 1) - dense_bytes
    reached = np.array([model.distinct_experts(size) for size in batch.tolist()]) if model.experts else 0.0
    head_bytes = model.lm_head_params / tensor_parallel * model.plain_bytes(dtype)
    layer_bytes = model.kv_layer_bytes(kv_dtype, tensor_parallel)
    decoded, _ = _layer_pairs(model, iterations)
    context = iterations["prefill_context"]
    windowed = np.minimum(context, iterations["prefill_requests"] * model.sliding_window)
    kv = decoded + model.full_layers * context + model.sliding_layers * windowed
    kv = kv + model.layers * (n * seqs + iterations["prefill_tokens"])  # written
    moved: Floats = n * (dense_bytes + reached * expert_bytes + head_bytes) + kv * layer_bytes
    return moved


def work(model: Model, scenario: Scenario, iterations: Columns) -> tuple[Floats, Floats]:
    """FLOPs and bytes of each row on one GPU of the replica."""
    tp = scenario.tensor_parallel
    return flops(model, iterations, tp), bytes_moved(model, iterations, scenario.weight_dtype, scenario.kv_dtype, tp)


def _layer_pairs(model: Model, iterations: Columns) -> tuple[Floats, Floats]:
    """(query, key) pairs of decodes and of prefills, times layers."""
    n = iterations["iterations"].astype(np.float64)
    seqs = iterations["seqs"]
    first = iterations["kv_tokens"] + seqs
    decode = n * first + seqs * n * (n - 1) / 2
    prefill = iterations["prefill_pairs"].astype(np.float64)
    # iterations whose windows are not yet full, as if all contexts were the mean one
    room = seqs * model.sliding_window - first
    filling = np.clip(np.floor(np.divide(room, seqs, out=np.zeros(len(n)), where=seqs > 0)) + 1, 0, n)
    windowed = filling * first + seqs * filling * (filling - 1) / 2 + (n - filling) * seqs * model.sliding_window
    narrow = np.minimum(prefill, iterations["prefill_tokens"] * float(model.sliding_window))
    return (
        model.full_layers * decode + model.sliding_layers * windowed,
        model.full_layers * prefill + model.sliding_layers * narrow,
    )
