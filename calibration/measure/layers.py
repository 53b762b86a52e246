"""Whole decoder layers and whole forward passes with random weights: the check that the parts add up.

    layer     x + residual, norm, QKV, rotary embedding, KV write, attention, output; add, norm, gate-up, SiLU, down
    forward   embedding, `layers` of them with weights of their own, norm, LM head on one row a request, argmax

The layer is Llama's: two norms, no biases, no QK norms, on one GPU. A batch is `chunks` prompt chunks of `new_tokens`
after `context_tokens`, beside `seqs` decodes after `seq_context_tokens`; `tokens` are all of its rows. Attention is the
backend that `variant` names, over its own pool of random keys and values. launch="compiled" compiles what lies between
the attentions, as engines do, "graph" captures all of it. `layers` is below the model's where its weights do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from calibration.measure import attention
from calibration.measure.elementwise import POSITIONS, _add_rms_norm, _rope, _silu_mul
from calibration.measure.linear import clocks, linear_bytes, linear_flops
from calibration.measure.points import Point, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench
from llmsim.model import Model

MODELS = ("llama-3.1-8b", "qwen2.5-7b", "llama-3.2-1b")
BACKENDS = ("fa3", "varlen", "sdpa_flash")  # the first that is here
LAUNCHES = ("graph", "eager", "compiled_graph", "compiled")
WEIGHT_MEMORY = 0.5  # of what is free
DTYPE = "bfloat16"

# chunks, new tokens, context, seqs, their context
DECODES = [(0, 0, 0, seqs, context) for context in (512, 4096) for seqs in (1, 8, 64, 256)]
PREFILLS = [(1, new, context, 0, 0) for new, context in ((128, 0), (512, 0), (2048, 0), (8192, 0), (2048, 8192))]
MIXED = [(1, 64, 2048, 128, 1024), (1, 512, 0, 32, 1024), (1, 2048, 0, 64, 1024), (1, 8192, 0, 128, 512)]
TINY = [(0, 0, 0, 4, 24), (1, 16, 8, 0, 0), (1, 16, 0, 3, 24)]


class Dims(NamedTuple):
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocab: int

    @classmethod
    def of(cls, model: Model, tiny: bool) -> Dims:
        if tiny:
            return cls(2, 64, 4, 2, 16, 128, 256)
        heads = model.heads, model.kv_heads, model.head_dim
        return cls(model.layers, model.hidden, *heads, model.intermediate, model.vocab)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return {
            "qkv": ((self.q_heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "output": (self.hidden, self.q_heads * self.head_dim),
            "gate_up": (2 * self.width, self.hidden),
            "down": (self.hidden, self.width),
        }

    @property
    def layer_elements(self) -> int:
        return sum(n * k for n, k in self.linears.values())


class Layers:
    name = "layers"

    def __init__(self) -> None:
        self._dims: dict[str, Dims] = {}
        self._pool: attention.Pool | None = None
        self._compiled: dict[str, Any] = {}

    def points(self, wanted: Wanted) -> Iterator[Point]:
        chosen = [model for model in wanted.models if model.name in MODELS] or list(wanted.models[:2])
        if DTYPE not in wanted.dtypes:
            return
        self._dims = {model.name: Dims.of(model, wanted.tiny) for model in chosen}
        variant = next(name for name in BACKENDS if not attention.BACKENDS[name].unavailable(wanted.device))
        batches = TINY if wanted.tiny else [*DECODES, *PREFILLS, *MIXED]
        for launch in LAUNCHES:
            for model in chosen:
                for op in ("layer", "forward"):
                    if wanted.wants(op):
                        for batch in batches:
                            yield self._point(op, variant, launch, model.name, batch)

    def _point(self, op: str, variant: str, launch: str, model: str, batch: tuple[int, ...]) -> Point:
        chunks, new, context, seqs, seq_context = batch
        dims = self._dims[model]
        tokens = chunks * new + seqs
        columns: dict[str, Any] = {"chunks": chunks, "new_tokens": new, "context_tokens": context} if chunks else {}
        if seqs:
            columns |= {"seqs": seqs, "seq_context_tokens": seq_context, "skew": "uniform"}
        heads = {"q_heads": dims.q_heads, "kv_heads": dims.kv_heads, "head_dim": dims.head_dim}
        about = {"dtype": DTYPE, "kv_dtype": DTYPE, "model": model, "tensor_parallel": 1}
        return Point.of(op, variant, launch, tokens=tokens, clocks=clocks(tokens), **about, **heads, **columns)

    def measure(self, point: Point, bench: Bench) -> Row:
        if self._pool is None or self._pool.bench is not bench:
            self._pool = attention.Pool(bench)
        dims, forward = self._dims[point["model"]], point.op == "forward"
        layers = self._fitting(dims, bench) if forward else bench.copies(2 * dims.layer_elements)
        run = _Pass(point, dims, layers, bench, self._attention(point), self._functions(point, bench))
        calls: list[Callable[[], Any]]
        calls = [run.forward] if forward else [partial(run.layer, index) for index in range(layers)]
        counted = layers if forward else 1
        flops, nbytes = self._least(point, dims, counted)
        return bench.time(point, calls, flops=flops, bytes=nbytes, layers=counted)

    def _fitting(self, dims: Dims, bench: Bench) -> int:
        if not bench.cuda:
            return dims.layers
        torch = bench.torch
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        held = bench.held_bytes("layer")
        fitting = int(WEIGHT_MEMORY * (free + held) / (2 * dims.layer_elements))
        return max(1, min(dims.layers, fitting))

    def _attention(self, point: Point) -> attention.Call:
        part = "mixed" if point.get("chunks") and point.get("seqs") else "prefill" if point.get("chunks") else "decode"
        launch = "graph" if point.launch in ("graph", "compiled_graph") else "eager"
        left_out = ("tokens", "clocks", "model", "tensor_parallel")
        columns = {name: value for name, value in point.shape if name not in left_out}
        assert self._pool is not None
        return attention.prepare(Point.of(f"attention_{part}", point.variant, launch, **columns), self._pool, 1)[0]

    def _functions(self, point: Point, bench: Bench) -> dict[str, Callable[..., Any]]:
        functions = _functions(bench.torch, self._dims[point["model"]])
        if point.launch not in ("compiled", "compiled_graph"):
            return functions
        for name, function in functions.items():
            key = f"{point['model']}/{name}"
            if key not in self._compiled:
                self._compiled[key] = bench.compile(function)
        return {name: self._compiled[f"{point['model']}/{name}"] for name in functions}

    def _least(self, point: Point, dims: Dims, layers: int) -> tuple[float, float]:
        batch = attention.batch_of(point)
        heads = attention.Heads(dims.q_heads, dims.kv_heads, dims.head_dim)
        tokens = point["tokens"]
        flops = layers * (batch.flops(heads) + sum(linear_flops(tokens, n, k) for n, k in dims.linears.values()))
        nbytes = layers * (
            batch.bytes(heads, DTYPE) + sum(linear_bytes(DTYPE, tokens, n, k) for n, k in dims.linears.values())
        )
        if point.op == "forward":
            rows = point.get("chunks", 0) + point.get("seqs", 0)
            flops += linear_flops(rows, dims.vocab, dims.hidden)
            nbytes += linear_bytes(DTYPE, rows, dims.vocab, dims.hidden)
        return flops, nbytes


def _functions(torch: Any, dims: Dims) -> dict[str, Callable[..., Any]]:
    """What lies between the attentions of two layers."""
    add_norm, rope, silu_mul = _add_rms_norm(torch), _rope(torch), _silu_mul(torch)
    linear = torch.nn.functional.linear
    widths = [heads * dims.head_dim for heads in (dims.q_heads, dims.kv_heads, dims.kv_heads)]

    def before(x: Any, residual: Any, norm: Any, qkv: Any, positions: Any, table: Any) -> Any:
        x, residual = add_norm(x, residual, norm)
        query, key, value = linear(x, qkv).split(widths, -1)
        query, key, value = (part.unflatten(-1, (-1, dims.head_dim)) for part in (query, key, value))
        return *rope(positions, query, key, table), value, residual

    def after(attended: Any, residual: Any, output: Any, norm: Any, gate_up: Any, down: Any) -> Any:
        x, residual = add_norm(linear(attended, output), residual, norm)
        return linear(silu_mul(linear(x, gate_up)), down), residual

    return {"before": before, "after": after}


class _Pass:
    """One batch through `layers` layers, each with weights of its own."""

    def __init__(
        self,
        point: Point,
        dims: Dims,
        layers: int,
        bench: Bench,
        attend: attention.Call,
        functions: dict[str, Callable[..., Any]],
    ) -> None:
        torch, tokens = bench.torch, point["tokens"]
        self._torch, self._attend, self._functions = torch, attend, functions
        self._layers = layers
        self._weights = {
            name: bench.views(layers, shape, DTYPE, f"layer {name}") for name, shape in dims.linears.items()
        }
        self._norm = bench.randn((dims.hidden,), DTYPE)
        self._x = bench.views(2, (tokens, dims.hidden), DTYPE, "x")
        kv = (tokens, dims.kv_heads, dims.head_dim)
        self._caches = [bench.views(layers, kv, DTYPE, use) for use in ("keys", "values")]
        self._slots = torch.randperm(tokens, device=bench.device, generator=bench.generator)
        self._ids, self._positions = (
            torch.randint(most, (tokens,), device=bench.device, generator=bench.generator)
            for most in (dims.vocab, POSITIONS)
        )
        self._table = bench.randn((POSITIONS, dims.head_dim), DTYPE)
        if point.op == "forward":
            self._embedding, self._head = bench.views(2, (dims.vocab, dims.hidden), DTYPE, "weight")
            rows = point.get("chunks", 0) + point.get("seqs", 0)
            self._sampled = torch.arange(rows, device=bench.device)
        if point.launch in ("compiled", "compiled_graph"):
            for tensor in (*self._x, self._positions):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def layer(self, index: int, x: Any = None, residual: Any = None) -> tuple[Any, Any]:
        if x is None:
            x, residual = self._x
        weights = {name: sets[index] for name, sets in self._weights.items()}
        _, key, value, residual = self._functions["before"](
            x, residual, self._norm, weights["qkv"], self._positions, self._table
        )
        for cache, new in zip(self._caches, (key, value), strict=True):
            cache[index].index_copy_(0, self._slots, new)
        attended = self._attend.output(self._attend.run()).flatten(1)
        return self._functions["after"](
            attended, residual, weights["output"], self._norm, weights["gate_up"], weights["down"]
        )

    def forward(self) -> Any:
        functional = self._torch.nn.functional
        x = functional.embedding(self._ids, self._embedding)
        residual = self._x[1]
        for index in range(self._layers):
            x, residual = self.layer(index, x, residual)
        x = functional.rms_norm((x + residual)[self._sampled], self._norm.shape, self._norm)
        return functional.linear(x, self._head).float().argmax(-1)
