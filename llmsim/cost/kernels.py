"""What a forward pass costs, composed from kernels timed on the GPU: any dense model, precision, tensor-parallel size.

Seconds of R rows (tokens of an iteration, padded in graph modes) and r requests on one rank:

    body(R)    layers * (the four linear layers + norms, RoPE, activation, KV write, fp8 quantising, the schedule of
                         attention where only some layers slide
                         + two all-reduces of R * hidden elements if tensor_parallel > 1)
    head(r)    LM head t(vocab, hidden, r), sampling of r rows
    decode     layers * (base(s) + token(s) * cached tokens), s requests of one token each
    mixed      layers * what FlashAttention 3 takes for all chunks and decodes of an iteration (llmsim.cost.tiles);
               where tiles of its kernels are not known (imported tables) layers * (call + cached if any c > 0 + sum
               over chunks of n new tokens after c of span * (c + n) + pair * (c * max(n, least) + n (n + 1) / 2))
               and decodes as alone; span is what the longest row of tiles takes, which few heads cannot hide

A linear layer of n outputs, k inputs takes t = q * ridge, where ridge = sqrt(memory^2 + compute^2) of data-sheet rates
and q is measured: a table over rows for each (n, k), linear between them, constant beyond the ends. Rows count as
`effective_rows`: GEMMs compute tiles of 128. Above 256 rows, where they pace the time, a tile just begun costs a
quarter of a full one and half a tile nearly all of it (on an H200, of what 1,152 rows cost more than 1,024, 1,032 cost
0.3 and 1,090 cost 0.95). For an (n, k) that was not measured q is the mean over the nearest shapes that were, by
distance^-3 in (log2 n, log2 k). Where both sides of many tile edges were timed (fp8, whose time falls as a tile fills),
rows count as themselves. A layer's four products, timed one after the other, take the sum of t times a ratio (`Stack`):
by rows at the clocks of a rested GPU, one number under sustained load. An iteration lies between the two by how long
it lasts (CLOCKS_FALL_S). A layer that was not timed has the geometric mean of its nearest ones' ratios, by distance^-3.

Memory-bound kernels are curves of seconds over bytes moved, all-reduces over bytes of the message: linear between
measured sizes, in proportion beyond the last. Decode attention is affine in cached tokens for each number of requests;
`least` is the smallest query tile.

Everything is computed when a model is loaded; the loop sees tables. `error` carries how far each operator's prediction
is from measurements held out (python -m calibration check-kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, log2
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmsim.cost.tiles import Schedule, Tiles, tile_shape
from llmsim.model import ELEMENT_BYTES, KV_BITS, KV_SCALE_BYTES, Model

Floats = NDArray[np.float64]

NEIGHBOURS = 6  # measured shapes that stand for one that was not
FALL_OFF = 3.0

# Iterations up to the first run at the clocks of a rested GPU, from the second on at those of sustained load.
CLOCKS_FALL_S = (0.05, 0.2)
LAYER_LINEARS = 4

TILE_ROWS = 128
TILE_AT_ONCE = 0.25  # of a full tile's time, as soon as its first row is there
TILE_PAID_ROWS, TILE_PAID = 64, 0.95  # rows after which nearly the whole tile is paid, and how much of it
FIRST_TILED_ROW = 256  # below, memory paces the GEMMs
KV_WRITE_WIDTH = 512  # on an H200 4 and 8 heads of 128 and 8 of 256 take as long, 2 of 128 half of it
# Contexts that differ leave multiprocessors idle at the end of a call, the more the fewer tiles there are; and they
# fill the last wave, so that one request more than a full one costs no more than another. Of H200s' engine steps (chat
# and Azure loads, 2, 4 and 8 KV heads; with an fp8 cache, where products bind instead of bytes, 8).
SKEW_SHARE, SKEW_SHARE_FP8 = 0.4, 0.12
WAVE_POINTS = 61
ENOUGH_COUNTS = 0.5  # of the numbers of requests that the most densely timed heads have
PREPARE_S = 2.2e-6  # FlashAttention 3's schedule, in each layer where only some slide (traced steps of Gemma-2-9B)


def effective_rows(rows: Floats) -> Floats:
    """Rows of full GEMM tiles that take as long as `rows` do."""
    full, begun = np.divmod(rows, TILE_ROWS)
    share = np.interp(begun, (0.0, TILE_PAID_ROWS, TILE_ROWS), (TILE_AT_ONCE, TILE_PAID, 1.0))
    tiled: Floats = np.where(begun > 0, TILE_ROWS * (full + share), rows)
    return np.where(rows <= FIRST_TILED_ROW, rows, tiled)


def kv_write_width(kv: int) -> int:
    """Keys of a token that take as long to write as `kv` do: a block of threads a token, busy with KV_WRITE_WIDTH."""
    return max(min(kv, KV_WRITE_WIDTH), kv // 4)


class NotTimedError(ValueError):
    """The kernels lack what a model needs."""


class Stack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The products of one layer, one after the other: seconds over the sum of what the table says of each."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ratio: tuple[float, ...]  # at cold clocks
    loaded: float  # under sustained load, at any rows

    def at(self, tokens: Floats) -> Floats:
        ratio: Floats = np.interp(np.log(np.maximum(tokens, 1.0)), np.log(self.tokens), self.ratio)
        return ratio

    def far_from(self, shapes: Sequence[tuple[int, int]]) -> float:
        pairs = zip(shapes, self.shapes, strict=True)
        return sum(hypot(log2(n / own_n), log2(k / own_k)) for (n, k), (own_n, own_k) in pairs)


class LinearTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """q of every measured shape: measured seconds over the ridge of data-sheet rates."""

    weight_bytes: float  # per element
    activation_bytes: float
    flops_per_s: float  # the peak and bandwidth that the ridge is made of
    bandwidth_bytes_per_s: float
    tiled: bool  # rows count as effective_rows; where both sides of tile edges were timed, as themselves
    tokens: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (n outputs, k inputs)
    slowness: tuple[tuple[float, ...], ...]  # by shape, by tokens
    quantises: bool = False  # whether quantising the input is in the time
    stacks: tuple[Stack, ...] = ()

    def rows(self, tokens: Floats) -> Floats:
        return effective_rows(tokens) if self.tiled else tokens

    def ridge_s(self, n: int, k: int, tokens: Floats) -> Floats:
        tokens = self.rows(tokens)
        compute_s = 2.0 * n * k * tokens / self.flops_per_s
        moved = n * k * self.weight_bytes + (n + k) * tokens * self.activation_bytes
        ridge_s: Floats = np.sqrt(compute_s**2 + (moved / self.bandwidth_bytes_per_s) ** 2)
        return ridge_s

    def weights(self, n: int, k: int, without: tuple[int, int] | None = None) -> list[tuple[int, float]]:
        """(index of a measured shape, its weight); `without`: a shape held out."""
        far = [
            (hypot(log2(n / other_n), log2(k / other_k)), i)
            for i, (other_n, other_k) in enumerate(self.shapes)
            if (other_n, other_k) != without
        ]
        nearest = sorted(far)[:NEIGHBOURS]
        if not nearest:
            raise ValueError("kernels: a table of linear layers needs two shapes to predict a third. Measure more")
        if nearest[0][0] < 1e-9:
            return [(nearest[0][1], 1.0)]
        raw = [(i, distance**-FALL_OFF) for distance, i in nearest]
        total = sum(weight for _, weight in raw)
        return [(i, weight / total) for i, weight in raw]

    def seconds(self, n: int, k: int, tokens: Floats, without: tuple[int, int] | None = None) -> Floats:
        slowness = np.zeros(len(tokens))
        at, known = self.rows(tokens), self.rows(np.array(self.tokens, float))
        for i, weight in self.weights(n, k, without):
            slowness += weight * np.interp(at, known, self.slowness[i])
        seconds: Floats = slowness * self.ridge_s(n, k, tokens)
        return seconds

    def layer_s(
        self, shapes: Sequence[tuple[int, int]], tokens: Floats, without: Stack | None = None
    ) -> tuple[Floats, Floats]:
        """Of a layer's products one after the other, at cold clocks and under sustained load; `without`: a stack held
        out."""
        cold_s = loaded_s = sum((self.seconds(n, k, tokens) for n, k in shapes), np.zeros(len(tokens)))
        far = sorted((stack.far_from(shapes), i) for i, stack in enumerate(self.stacks) if stack is not without)
        far = [(1.0, far[0][1])] if far and far[0][0] < 1e-9 else far[:NEIGHBOURS]
        total = sum(distance**-FALL_OFF for distance, _ in far)
        for distance, i in far:
            share, stack = distance**-FALL_OFF / total, self.stacks[i]
            cold_s, loaded_s = cold_s * stack.at(tokens) ** share, loaded_s * stack.loaded**share
        return cold_s, loaded_s


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds over bytes: linear between, in proportion beyond the last, flat before the first."""

    size_bytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, moved: Floats) -> Floats:
        beyond = np.maximum(moved / self.size_bytes[-1], 1.0)
        seconds: Floats = np.interp(moved, self.size_bytes, self.seconds) * beyond
        return seconds


class Heads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attention's shape on one rank."""

    q_heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str

    def timed_as(self, kv_dtype: str) -> Heads:
        """The same with the KV that stands for an integer one: no kernel of those was timed."""
        return Heads(self.q_heads, self.kv_heads, self.head_dim, kv_dtype) if self.kv_dtype in KV_BITS else self

    def far_from(self, other: Heads) -> float:
        """Distance of two shapes: width of the KV first, then queries per KV head, then the head size."""
        width = abs(log2(self.kv_heads * self.head_dim / (other.kv_heads * other.head_dim)))
        group = abs(log2(self.q_heads / self.kv_heads * other.kv_heads / other.q_heads))
        other_dtype = 100.0 if self.kv_dtype != other.kv_dtype else 0.0
        return other_dtype + width + group + 2.0 * abs(log2(self.head_dim / other.head_dim))


class DecodeTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Decode attention of one layer: base_s + token_s * cached tokens, by number of requests."""

    heads: Heads
    seqs: tuple[int, ...]
    base_s: tuple[float, ...]
    token_s: tuple[float, ...]


class PrefillForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prefill attention of one layer and chunk."""

    heads: Heads
    call_s: float
    span_s: float
    pair_s: float
    least_rows: float
    cached_s: float

    def seconds(self, new: int, cached: int, least_s: float = 0.0) -> float:
        """`least_s`: of the pairs, as when reading their keys takes longer."""
        pairs = cached * max(new, self.least_rows) + 0.5 * new * (new + 1)
        seconds = self.call_s + self.span_s * (new + cached) + max(self.pair_s * pairs, least_s)
        return seconds + (self.cached_s if cached else 0.0)


class Kernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    gpu: str
    source: str  # who timed them, with what
    measurements: dict[str, str]  # file -> sha256
    linears: dict[str, LinearTable]  # by dtype of the weights
    elementwise: dict[str, Curve]  # by op
    head_rows: Curve  # sampling: seconds over bytes of logits
    decodes: tuple[DecodeTable, ...]
    prefills: tuple[PrefillForm, ...]
    all_reduce: dict[str, Curve]  # by number of GPUs
    error: dict[str, float]  # operator -> median relative error, held out; "OPERATOR p90"
    tiles: tuple[Tiles, ...] = ()  # where the engine's attention is FlashAttention 3

    def linear(self, dtype: str) -> LinearTable:
        if dtype not in self.linears:
            known = ", ".join(self.linears)
            raise NotTimedError(f"dtype={dtype}: linear layers in it were not timed on {self.gpu} (only {known})")
        return self.linears[dtype]


class Forward:
    """The forward pass of one model on one rank of `tensor_parallel` GPUs. All seconds are of the GPU."""

    def __init__(self, kernels: Kernels, model: Model, dtype: str, kv_dtype: str, tensor_parallel: int) -> None:
        self.layer_linears = list(model.layer_linears(tensor_parallel).values())
        self._kernels, self._model, self._tp = kernels, model, tensor_parallel
        stored = model.weight_format(dtype)
        self._linear = kernels.linear(stored)
        self._plain = kernels.linear("bfloat16" if model.plain_bytes(dtype) == 2.0 else "float32")
        # int8 and int4 weights are expanded beside 2-byte inputs
        self._quantises = stored == "fp8" and not self._linear.quantises and "quant_fp8" in kernels.elementwise
        self._activation_bytes = model.plain_bytes(dtype)
        kv_heads = max(1, model.kv_heads // tensor_parallel)
        wanted = Heads(model.heads // tensor_parallel, kv_heads, model.head_dim, kv_name(kv_dtype))
        self._decode = decodes_like(kernels.decodes, wanted.timed_as("fp8"))  # reading takes the time: by the bytes
        self._alike = wanted.kv_heads / self._decode.heads.kv_heads  # requests that make as many tiles
        self._prefill = nearest(kernels.prefills, wanted.timed_as("bfloat16"))  # computed with once it is expanded
        self._heads = wanted
        self._kv_ratio = _kv_bytes(wanted) / _kv_bytes(self._decode.heads)
        measured = self._prefill.heads
        if tensor_parallel > 1:
            self._all_reduce()
        self._pair_ratio = wanted.q_heads * wanted.head_dim / (measured.q_heads * measured.head_dim)

    @property
    def layers(self) -> int:
        return self._model.layers

    @property
    def kv_dtype(self) -> str:
        return self._heads.kv_dtype

    def body_s(self, rows: Floats) -> Floats:
        model, tp, size = self._model, self._tp, self._activation_bytes
        rows = np.asarray(rows, float)
        seconds = self._linears_s(rows)
        if self._quantises:
            seconds += self._quantising_s(rows)
        heads, kv = self._heads.q_heads * model.head_dim, self._heads.kv_heads * model.head_dim
        moved = {
            "rope": (1, 2 * (heads + kv)),
            "silu_mul": (1, 3 * model.intermediate / tp),
            "kv_write": (1, 4 * kv_write_width(kv)),
        }
        if model.norms_per_layer == 4 and "norm_add_norm" in self._kernels.elementwise:
            moved["norm_add_norm"] = (2, 4 * model.hidden)
        else:
            moved["add_rms_norm"] = (model.norms_per_layer, 4 * model.hidden)
        if model.qk_norm:
            moved["rms_norm"] = (1, 2 * (heads + kv))
        for op, (times, width) in moved.items():
            if op in self._kernels.elementwise:
                seconds += times * self._kernels.elementwise[op].at(rows * width * size)
        if tp > 1:
            seconds += 2 * self._all_reduce().at(rows * model.hidden * size)
        if 0 < model.sliding_layers < model.layers and self._kernels.tiles:
            seconds += PREPARE_S
        return model.layers * seconds

    def _linears_s(self, rows: Floats) -> Floats:
        """Of a layer's products, at the clocks of an iteration as long as all layers' take."""
        cold_s, loaded_s = self._linear.layer_s(self.layer_linears, rows)
        lasting = np.interp(np.log(self._model.layers * cold_s), np.log(CLOCKS_FALL_S), (0.0, 1.0))
        seconds: Floats = cold_s * (loaded_s / cold_s) ** lasting
        return seconds

    def _quantising_s(self, rows: Floats) -> Floats:
        """Of the inputs of a layer's products: a kernel for attention's output; norms and activation write theirs in
        fp8 themselves (compiled as one kernel by vLLM 0.25.1), which saves a launch, not the work."""
        curve, bytes_each = self._kernels.elementwise["quant_fp8"], self._activation_bytes + ELEMENT_BYTES["fp8"]
        (_, hidden), (_, attended), _, (_, width) = self.layer_linears
        fused = sum(curve.at(rows * k * bytes_each) - curve.seconds[0] for k in (hidden, hidden, width))
        seconds: Floats = curve.at(rows * attended * bytes_each) + fused
        return seconds

    def body_parts(self, rows: Floats) -> dict[str, Floats]:
        """`body_s` by term: matrix products, what lies between, all-reduces."""
        model, tp = self._model, self._tp
        rows = np.asarray(rows, float)
        linear = self._linears_s(rows)
        reduce = np.zeros(len(rows))
        if tp > 1:
            reduce = 2 * self._all_reduce().at(rows * model.hidden * self._activation_bytes)
        linear, reduce = model.layers * linear, model.layers * reduce
        return {"linear": linear, "between": self.body_s(rows) - linear - reduce, "communication": reduce}

    def head_s(self, requests: Floats) -> Floats:
        model, size = self._model, self._activation_bytes
        requests = np.asarray(requests, float)
        seconds = self._plain.seconds(model.vocab // self._tp, model.hidden, requests)
        seconds += self._kernels.head_rows.at(requests * model.vocab * size)
        if self._tp > 1:  # an all-gather of the logits moves half as much as an all-reduce
            seconds += self._all_reduce().at(requests * model.vocab * size) / 2
        seconds[requests <= 0] = 0.0
        return seconds

    def _all_reduce(self) -> Curve:
        curves = self._kernels.all_reduce
        if str(self._tp) in curves:
            return curves[str(self._tp)]
        if not curves:
            raise NotTimedError(f"tensor_parallel={self._tp}: no all-reduce was timed on {self._kernels.gpu}")
        # a ring or tree over more GPUs moves 2 (tp - 1) / tp of the message through each link
        known = max(curves, key=int)
        ratio = (1 - 1 / self._tp) / (1 - 1 / int(known))
        return Curve(curves[known].size_bytes, tuple(s * ratio for s in curves[known].seconds))

    def decode_base_s(self, seqs: Floats) -> Floats:
        table = self._decode
        base: Floats = self._model.layers * np.interp(self._alike * seqs, table.seqs, table.base_s)
        return base

    def decode_token_s(self, seqs: Floats) -> Floats:
        """Seconds per cached token, all layers, for batches of `seqs`."""
        table = self._decode
        token: Floats = self._model.layers * self._kv_ratio * np.interp(self._alike * seqs, table.seqs, table.token_s)
        return token

    @property
    def mixed_skew(self) -> float:
        """The same beside chunks, where tiles of all kinds fill the waves."""
        return SKEW_SHARE / self._heads.kv_heads

    def decode_skew(self, seqs: Floats) -> Floats:
        """What the standard deviation of contexts costs as a share of reading as many tokens, for batches of `seqs`:
        SKEW_SHARE over KV heads, and what the mean over a wave of tiles costs more than this number's place in it."""
        fp8 = self._heads.kv_dtype == "fp8"
        share: Floats = np.full(len(seqs), self.mixed_skew + (SKEW_SHARE_FP8 if fp8 else 0.0))
        if self._kernels.tiles:
            wave = self._kernels.tiles[0].processors / self._heads.kv_heads
            half = np.minimum(wave, seqs) / 2
            around = seqs[:, None] + half[:, None] * np.linspace(-1.0, 1.0, WAVE_POINTS)
            share += self.decode_token_s(around).mean(axis=1) / self.decode_token_s(seqs) - 1.0
        return share

    def schedule(self, graph_tokens: int) -> Schedule | None:
        """Of one layer's attention; None where its kernel's tiles are not known."""
        heads, every = self._heads, self._kernels.tiles
        stored = heads.kv_dtype if heads.kv_dtype not in KV_BITS else "bfloat16"  # computed with once it is expanded
        own = [tiles for tiles in every if tiles.kv_dtype == stored] or list(every)
        if not own:
            return None
        tiles = min(own, key=lambda tiles: abs(log2(tiles.head_dim / heads.head_dim)))
        if tiles.head_dim != heads.head_dim or tiles.kv_dtype != stored:
            rows, keys = tile_shape(heads.head_dim, stored)
            work = rows * keys * heads.head_dim / (tiles.shape[0] * tiles.shape[1] * tiles.head_dim)
            tiles = msgspec.structs.replace(
                tiles, head_dim=heads.head_dim, kv_dtype=stored, block_s=tiles.block_s * work
            )
        return Schedule(tiles, heads.q_heads, heads.kv_heads, graph_tokens)

    def chunk(self) -> PrefillForm:
        """The terms of `prefill` above, all layers."""
        form, layers = self._prefill, self._model.layers
        return PrefillForm(
            self._heads,
            layers * form.call_s,
            layers * form.span_s,
            layers * form.pair_s * self._pair_ratio,
            form.least_rows,
            layers * form.cached_s,
        )

    @property
    def extrapolated(self) -> list[str]:
        """What of this model was not measured itself but taken from its neighbours."""
        timed_together = any(stack.far_from(self.layer_linears) == 0.0 for stack in self._linear.stacks)
        alone = [] if timed_together else self.layer_linears
        out = [f"linear {n}x{k}" for n, k in alone if (n, k) not in self._linear.shapes]
        if self._heads.kv_dtype in KV_BITS:
            out.append(f"attention over {self._heads.kv_dtype} KV, by its bytes; dequantising it was not timed")
        elif self._decode.heads != self._heads:
            out.append(f"attention of {self._heads.q_heads}/{self._heads.kv_heads} heads of {self._heads.head_dim}")
        if self._tp > 1 and str(self._tp) not in self._kernels.all_reduce:
            out.append(f"all-reduce over {self._tp} GPUs")
        return out


Shape = TypeVar("Shape", DecodeTable, PrefillForm)


def kv_name(kv_dtype: str) -> str:
    if kv_dtype in KV_BITS:
        return kv_dtype
    return "bfloat16" if kv_dtype in ("auto", "bfloat16", "float16") else "fp8"


def decodes_like(tables: Sequence[DecodeTable], wanted: Heads) -> DecodeTable:
    """Decode attention goes with tiles, requests times KV heads, not with either: on an H200 37 us for 17 requests of 8
    heads, 34 of 4 and 68 of 2. So heads timed at few numbers of requests are told by others' many."""
    own = [
        table for table in tables if table.heads.kv_dtype == wanted.kv_dtype and table.heads.head_dim == wanted.head_dim
    ]
    dense = [table for table in own if len(table.seqs) >= ENOUGH_COUNTS * max(len(table.seqs) for table in own)]
    if not dense:
        return nearest(tables, wanted)
    far = [(abs(log2(table.heads.kv_heads / wanted.kv_heads)), table.heads.far_from(wanted)) for table in dense]
    return dense[far.index(min(far))]


def nearest(tables: Sequence[Shape], wanted: Heads) -> Shape:
    if not tables:
        raise NotTimedError("no attention was timed")
    return min(tables, key=lambda table: table.heads.far_from(wanted))


def _kv_bytes(heads: Heads) -> float:
    if heads.kv_dtype in KV_BITS:
        return heads.kv_heads * (heads.head_dim * KV_BITS[heads.kv_dtype] / 8 + KV_SCALE_BYTES)
    return heads.kv_heads * heads.head_dim * (1.0 if heads.kv_dtype == "fp8" else 2.0)
