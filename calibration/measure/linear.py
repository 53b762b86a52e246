"""Linear layers y = x W^T of every (n, k) that the wanted models have at each tensor-parallel size, over tokens.

    QKV       n = (h + 2 g) d / TP   k = H        (h heads, g KV heads, repeated below one a rank, d head size)
    output    n = H                  k = h d / TP
    gate-up   n = 2 I / TP           k = H        (both halves in one product, as engines run it)
    down      n = H                  k = I / TP
    LM head   n = V / TP             k = H        (V padded to a multiple of 64; sampled rows only)

2 M n k operations; weights, input and output once each are the least bytes. No bias. bf16, fp16, tf32 and fp32 are
torch's matrix product; fp8 is `torch._scaled_mm` with one scale per tensor, and, with vLLM installed, its CUTLASS
kernel with one scale per row of the input; int8 and int4 are torch's weight-only kernels, where this torch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench
from llmsim.cost.graphs import capture_sizes
from llmsim.model import ELEMENT_BYTES, Model

COARSE = (1, 8, 64, 256, 512, 1024, 2048, 4096, 8192)
SUSTAINED_FROM = 512  # tokens: below, a layer is bound by memory and the clocks stay up
LM_HEAD_TOKENS = 512
TILE = 128  # rows of a tile: times step where one more begins
GROUP = 128  # weights of one int4 scale
VARIANTS = {
    "bfloat16": ("cublas",),
    "fp8": ("vllm_cutlass", "scaled_mm"),
    "float16": ("cublas",),
    "tf32": ("cublas",),
    "float32": ("cublas",),
    "int8": ("int8_weight",),
    "int4": ("int4_weight",),
}
EVERYWHERE = ("bfloat16", "fp8")  # dtypes measured at every (n, k); the others at those of the first two models
WEIGHT_BYTES = {**ELEMENT_BYTES, "tf32": 4.0, "int4": 0.5 + 4 / GROUP}
OTHER_BYTES = {"float32": 4.0, "tf32": 4.0}  # of inputs and outputs; 2 elsewhere, but for the inputs of fp8


def linear_shapes(model: Model, tensor_parallel: int = 1) -> dict[str, tuple[int, int]]:
    """(n, k) of each linear layer on one rank."""
    head = -(-model.vocab // 64) * 64 // tensor_parallel, model.hidden
    return {**model.layer_linears(tensor_parallel), "lm_head": head}


def linear_flops(tokens: int, n: int, k: int) -> float:
    return 2.0 * tokens * n * k


def linear_bytes(dtype: str, tokens: int, n: int, k: int) -> float:
    other = OTHER_BYTES.get(dtype, 2.0)
    return WEIGHT_BYTES[dtype] * n * k + (1.0 if dtype == "fp8" else other) * tokens * k + other * tokens * n


def dense_tokens() -> list[int]:
    """Where a refinement may be: graph sizes, both sides of a new tile and how it fills up to 2048, and to 16384."""
    around = {TILE * tiles + extra for tiles in range(1, 17) for extra in (0, 1, 8, 16, 32, TILE // 2)}
    around |= {TILE * tiles + 1 for tiles in (20, 24, 28, 32, 48, 64)}
    sizes = {*capture_sizes(1024, 16384), *range(512, 2049, 64), *around}
    return sorted(sizes | {2560, 3072, 3584, 5120, 6144, 7168, 10240, 12288, 14336, 16384})


def clocks(tokens: int) -> str:
    return "sustained" if tokens >= SUSTAINED_FROM else "cold"


def tiny(extent: int) -> int:
    return max(16, extent // 64 // 16 * 16)


class Linear:
    name = "linear"

    def __init__(self) -> None:
        self._unavailable: dict[str, str | None] = {}

    def points(self, wanted: Wanted) -> Iterator[Point]:
        if not wanted.wants("linear"):
            return
        shapes = {size: self._shapes(wanted, size) for size in range(len(wanted.models))}
        for coarse in (True, False):
            tokens = COARSE if coarse else [size for size in dense_tokens() if size not in COARSE]
            if wanted.tiny:
                tokens = [size for size in tokens if size <= 64]
            for dtype in wanted.dtypes:
                for variant in VARIANTS[dtype]:
                    for number, group in shapes.items():
                        if dtype in EVERYWHERE or number < 2:
                            yield from self._of(group, dtype, variant, tokens, refine=not coarse)
                    if coarse and dtype == "bfloat16" and not wanted.tiny:
                        yield from self._both_clocks(shapes[0])

    def _shapes(self, wanted: Wanted, number: int) -> dict[tuple[int, int], tuple[float, bool]]:
        """(n, k) that no earlier model has: its share of that model's multiplications, and whether it is an LM head."""
        earlier = {
            shape
            for model in wanted.models[:number]
            for tp in wanted.tensor_parallel
            if tp in model.tensor_parallel_sizes()
            for shape in linear_shapes(model, tp).values()
        }
        model = wanted.models[number]
        found: dict[tuple[int, int], tuple[float, bool]] = {}
        for tp in wanted.tensor_parallel:
            if tp not in model.tensor_parallel_sizes():
                continue
            layers = linear_shapes(model, tp)
            times = {name: 1 if name == "lm_head" else model.layers for name in layers}
            whole = sum(n * k * times[name] for name, (n, k) in layers.items())
            for name, (n, k) in layers.items():
                if (n, k) not in earlier:
                    found.setdefault((n, k), (n * k * times[name] / whole, name == "lm_head"))
        if not wanted.tiny:
            return found
        small: dict[tuple[int, int], tuple[float, bool]] = {}
        for (n, k), use in found.items():
            small.setdefault((tiny(n), tiny(k)), use)
        return small

    def _of(
        self,
        shapes: dict[tuple[int, int], tuple[float, bool]],
        dtype: str,
        variant: str,
        tokens: list[int] | tuple[int, ...],
        refine: bool,
    ) -> Iterator[Point]:
        """All cold points of a model, then all sustained ones: the GPU cools down once."""
        for state in ("cold", "sustained"):
            for (n, k), (share, lm_head) in shapes.items():
                for size in tokens:
                    if clocks(size) == state and not (lm_head and size > LM_HEAD_TOKENS):
                        point = Point.of("linear", variant, "graph", dtype=dtype, tokens=size, n=n, k=k, clocks=state)
                        yield replace(point, refine=refine, weight=share)

    def _both_clocks(self, shapes: dict[tuple[int, int], tuple[float, bool]]) -> Iterator[Point]:
        """The first model's layers at the other clocks too."""
        for state, tokens in (("cold", (512, 1024, 2048, 8192)), ("sustained", (1, 64, 256))):
            for (n, k), (_, lm_head) in shapes.items():
                for size in () if lm_head else tokens:
                    point = Point.of("linear", "cublas", "graph", dtype="bfloat16", tokens=size, n=n, k=k, clocks=state)
                    yield replace(point, weight=0.0)

    def measure(self, point: Point, bench: Bench) -> Row:
        tokens, n, k, dtype = point["tokens"], point["n"], point["k"], point["dtype"]
        if point.variant not in self._unavailable:
            self._unavailable[point.variant] = unavailable(point.variant, dtype, bench)
        reason = self._unavailable[point.variant]
        if reason:
            raise Unavailable(reason)
        nbytes = linear_bytes(dtype, tokens, n, k)
        bench.torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        calls = CALLS[point.variant](bench, bench.copies(nbytes), dtype, tokens, n, k)
        row = bench.time(point, calls, flops=linear_flops(tokens, n, k), bytes=nbytes)
        bench.torch.set_float32_matmul_precision("highest")
        return row


def unavailable(variant: str, dtype: str, bench: Bench) -> str | None:
    """Why a variant cannot run here at all, found with a shape every kernel accepts; None if it can."""
    try:
        CALLS[variant](bench, 1, dtype, 64, 256, 256)[0]()
        bench.synchronize()
    except bench.torch.OutOfMemoryError:
        raise
    # What torch and vLLM raise for a kernel they lack: not for this GPU, not in this version, not installed.
    except (RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    return None


# One on each of `count` buffers. `of`: whose they are, where products of several shapes are held at once.
Calls = list[Callable[[], Any]]


def _operands(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str) -> Iterator[tuple[Any, Any]]:
    inputs = bench.views(count, (tokens, k), dtype, f"x{of}")
    return zip(inputs, bench.views(count, (n, k), dtype, f"weight{of}"), strict=True)


def _cublas(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str = "") -> Calls:
    outputs = bench.views(count, (tokens, n), dtype, f"out{of}")
    pairs = zip(_operands(bench, count, dtype, tokens, n, k, of), outputs, strict=True)
    return [partial(bench.torch.mm, x, weight.t(), out=out) for (x, weight), out in pairs]


def _scaled_mm(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str = "") -> Calls:
    torch = bench.torch
    scale = torch.ones((), device=bench.device)
    more = {"scale_a": scale, "scale_b": scale, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    pairs = _operands(bench, count, dtype, tokens, n, k, of)
    return [partial(torch._scaled_mm, x, weight.t(), **more) for x, weight in pairs]


def _vllm_cutlass(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str = "") -> Calls:
    from vllm import _custom_ops as ops

    torch = bench.torch
    rows, whole = torch.ones((tokens, 1), device=bench.device), torch.ones((1, 1), device=bench.device)
    return [
        partial(ops.cutlass_scaled_mm, x, weight.t(), rows, whole, torch.bfloat16)
        for x, weight in _operands(bench, count, dtype, tokens, n, k, of)
    ]


def _int8_weight(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str = "") -> Calls:
    inputs = bench.views(count, (tokens, k), "bfloat16", f"x{of}")
    weights = bench.views(count, (n, k), "int8", f"weight{of}")
    scales = bench.randn((n,), "bfloat16")
    return [partial(bench.torch._weight_int8pack_mm, x, w, scales) for x, w in zip(inputs, weights, strict=True)]


def _int4_weight(bench: Bench, count: int, dtype: str, tokens: int, n: int, k: int, of: str = "") -> Calls:
    torch = bench.torch
    if not bench.cuda:
        raise NotImplementedError("torch's packed int4 weights for CUDA do not run on a CPU")
    inputs = bench.views(count, (tokens, k), "bfloat16", f"x{of}")
    # Packed as `torch._convert_weight_to_int4pack` lays them out with 8 inner tiles. Random bits are as good.
    bits = bench.views(count, (n * k // 2,), "int8", f"weight{of}")
    weights = [view.view(torch.int32).view(n // 8, k // (8 * 16), 32, 4) for view in bits]
    scales = bench.randn((k // GROUP, n, 2), "bfloat16")
    pairs = zip(inputs, weights, strict=True)
    return [partial(torch._weight_int4pack_mm, x, weight, GROUP, scales) for x, weight in pairs]


CALLS: dict[str, Callable[..., Calls]] = {
    "cublas": _cublas,
    "scaled_mm": _scaled_mm,
    "vllm_cutlass": _vllm_cutlass,
    "int8_weight": _int8_weight,
    "int4_weight": _int4_weight,
}
