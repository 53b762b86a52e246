"""The linear layers of a model one after the other, as an engine runs them: what they take together.

    linear_stack   QKV, output, gate-up, down of one layer and rank, each on rows of its own

A product timed alone repeats one kernel at its own clocks; in a layer kernels of different shapes follow each other,
and what one of them takes depends on those before it. The sums differ by some per cent, by model and rows.
Shapes, FLOPs and bytes are those of `calibration.measure.linear`; seconds are of one layer. Chunks of prompts are timed
at both clocks: an engine that is not full runs one after a rest, a full one at sustained clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from calibration.measure.linear import CALLS, linear_bytes, linear_flops, linear_shapes, tiny
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench
from llmsim.model import Model

COARSE = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BETWEEN = (2, 4, 16, 24, 48, 96, 160, 192, 224, 288, 320, 384, 448, 640, 768, 896, 1025, 1032, 1056, 1088, 1152)
BETWEEN += (1280, 1536, 1792, 2056, 3072, 6144)
SUSTAINED_FROM, COLD_TO = 384, 2560  # tokens timed at sustained and at cold clocks
VARIANTS = {"bfloat16": ("cublas",), "fp8": ("vllm_cutlass", "scaled_mm")}


class Stacks:
    name = "stacks"

    def __init__(self) -> None:
        self._shapes: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._missing: dict[str, str] = {}

    def points(self, wanted: Wanted) -> Iterator[Point]:
        if not wanted.wants("linear_stack"):
            return
        self._shapes = dict(self._of(wanted))
        dtypes = [dtype for dtype in wanted.dtypes if dtype in VARIANTS]
        for tokens in (COARSE, BETWEEN):
            for dtype in dtypes:
                for variant in VARIANTS[dtype]:
                    for model, tp in self._shapes:
                        about = {"dtype": dtype, "model": model, "tensor_parallel": tp}
                        for clocks, sizes in _by_clocks(tokens, wanted.tiny):
                            for size in sizes:
                                yield Point.of("linear_stack", variant, "graph", tokens=size, clocks=clocks, **about)

    def _of(self, wanted: Wanted) -> Iterator[tuple[tuple[str, int], list[tuple[int, int]]]]:
        """Each set of shapes once, under the first model that has it."""
        seen: set[tuple[tuple[int, int], ...]] = set()
        for tp in wanted.tensor_parallel:
            for model in wanted.models:
                if tp not in model.tensor_parallel_sizes():
                    continue
                shapes = layer_shapes(model, tp)
                if wanted.tiny:
                    shapes = [(tiny(n), tiny(k)) for n, k in shapes]
                if tuple(shapes) not in seen:
                    seen.add(tuple(shapes))
                    yield (model.name, tp), shapes

    def measure(self, point: Point, bench: Bench) -> Row:
        """Raises `Unavailable` where the dtype's kernel is not on this machine."""
        if point.variant in self._missing:
            raise Unavailable(self._missing[point.variant])
        tokens, dtype = point["tokens"], point["dtype"]
        shapes = self._shapes[point["model"], point["tensor_parallel"]]
        nbytes = sum(linear_bytes(dtype, tokens, n, k) for n, k in shapes)
        layers = bench.copies(nbytes)
        try:
            products = [
                CALLS[point.variant](bench, layers, dtype, tokens, n, k, f" {i}") for i, (n, k) in enumerate(shapes)
            ]
            products[0][0]()
        except (NotImplementedError, AttributeError, ImportError) as error:
            self._missing[point.variant] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise Unavailable(self._missing[point.variant]) from None
        calls = [partial(_one_after_the_other, layer) for layer in zip(*products, strict=True)]
        flops = sum(linear_flops(tokens, n, k) for n, k in shapes)
        return bench.time(point, calls, flops=flops, bytes=nbytes, layers=1)


def layer_shapes(model: Model, tensor_parallel: int) -> list[tuple[int, int]]:
    """(n, k) of a layer's four products on one rank, in the order they run in."""
    shapes = linear_shapes(model, tensor_parallel)
    return [shapes[name] for name in ("qkv", "output", "gate_up", "down")]


def _by_clocks(tokens: tuple[int, ...], small: bool) -> Iterator[tuple[str, list[int]]]:
    """Cold ones first: the GPU cools down once."""
    yield "cold", [size for size in tokens if size <= (64 if small else COLD_TO)]
    if not small:
        yield "sustained", [size for size in tokens if size >= SUSTAINED_FROM]


def _one_after_the_other(products: tuple[Callable[[], Any], ...]) -> None:
    for product in products:
        product()
