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

from calibration.measure.linear import CALLS, linear_bytes, linear_flops, tiny, unavailable
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench

COARSE = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BETWEEN = (2, 4, 16, 24, 48, 96, 160, 192, 224, 288, 320, 384, 448, 640, 768, 896, 1025, 1032, 1056, 1088, 1152)
BETWEEN += (1280, 1536, 1792, 2056, 3072, 6144)
SUSTAINED_FROM, COLD_TO = 384, 2560  # tokens timed at sustained and at cold clocks
VARIANTS = {"bfloat16": ("cublas",), "fp8": ("vllm_cutlass", "scaled_mm")}


class Stacks:
    name = "stacks"

    def __init__(self) -> None:
        self._shapes: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._unavailable: dict[str, str | None] = {}

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
                shapes = list(model.layer_linears(tp).values())
                if wanted.tiny:
                    shapes = [(tiny(n), tiny(k)) for n, k in shapes]
                if tuple(shapes) not in seen:
                    seen.add(tuple(shapes))
                    yield (model.name, tp), shapes

    def measure(self, point: Point, bench: Bench) -> Row:
        """Raises `Unavailable` where the dtype's kernel is not on this machine."""
        tokens, dtype = point["tokens"], point["dtype"]
        if point.variant not in self._unavailable:
            self._unavailable[point.variant] = unavailable(point.variant, dtype, bench)
        reason = self._unavailable[point.variant]
        if reason:
            raise Unavailable(reason)
        shapes = self._shapes[point["model"], point["tensor_parallel"]]
        nbytes = sum(linear_bytes(dtype, tokens, n, k) for n, k in shapes)
        layers, make = bench.copies(nbytes), CALLS[point.variant]
        products = [make(bench, layers, dtype, tokens, n, k, f" {i}") for i, (n, k) in enumerate(shapes)]
        calls = [partial(_one_after_the_other, layer) for layer in zip(*products, strict=True)]
        flops = sum(linear_flops(tokens, n, k) for n, k in shapes)
        return bench.time(point, calls, flops=flops, bytes=nbytes, layers=1)


def _by_clocks(tokens: tuple[int, ...], small: bool) -> Iterator[tuple[str, list[int]]]:
    """Cold ones first: the GPU cools down once."""
    yield "cold", [size for size in tokens if size <= (64 if small else COLD_TO)]
    if not small:
        yield "sustained", [size for size in tokens if size >= SUSTAINED_FROM]


def _one_after_the_other(products: tuple[Callable[[], Any], ...]) -> None:
    for product in products:
        product()
