"""Copies between host and GPU, on a GPU and between GPUs, by size: swapping, offload and KV transfer are made of them.

    op         variants                          bytes: what must move
    copy_h2d   "pinned", "pageable", "blocks"    size
    copy_d2h   the same                          size
    copy_d2d   "torch"                           2 size (read and written)
    copy_p2p   "torch", from GPU 0 to GPU 1      size

"blocks" moves size_bytes in n pieces (column `n`) between pinned memory and the GPU, each from its own place to a
shuffled one, as offloading KV block by block does; launch="graph" has the pieces in a CUDA graph, "eager" issues them
from Python, one call each. Pageable copies are staged by the driver and make the host wait. On the CPU all are host to
host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from calibration.measure.points import Point, Unavailable, Wanted

if TYPE_CHECKING:
    from calibration.measure.rows import Row
    from calibration.measure.timing import Bench

KIB, MIB = 1024, 1024**2
SIZES = [64 * KIB << power for power in range(13)]  # to 256 MiB
BLOCKS_BYTES = 64 * MIB
BLOCKS = [32 * KIB << power for power in range(7)]  # to 2 MiB
HOST_BYTES = 256 * MIB  # of pinned and of pageable memory, over which copies rotate
MOST_CALLS = 8


class Copies:
    name = "copies"

    def __init__(self) -> None:
        self._host: dict[bool, Any] = {}

    def points(self, wanted: Wanted) -> Iterator[Point]:
        sizes = [64 * KIB] if wanted.tiny else SIZES[::2] + SIZES[1::2]
        total, blocks = (256 * KIB, [32 * KIB]) if wanted.tiny else (BLOCKS_BYTES, BLOCKS)
        for op in ("copy_h2d", "copy_d2h"):
            if wanted.wants(op):
                for variant in ("pinned", "pageable"):
                    for size in sizes:
                        yield Point.of(op, variant, "eager", size_bytes=size)
                for launch in ("graph", "eager"):
                    for block in blocks:
                        yield Point.of(op, "blocks", launch, size_bytes=total, n=total // block)
        for size in sizes:
            if wanted.wants("copy_d2d"):
                yield Point.of("copy_d2d", "torch", "graph", size_bytes=size)
            if wanted.wants("copy_p2p") and wanted.gpus > 1:
                yield Point.of("copy_p2p", "torch", "eager", size_bytes=size, gpus=2)

    def measure(self, point: Point, bench: Bench) -> Row:
        size = point["size_bytes"]
        if point.op in ("copy_d2d", "copy_p2p"):
            return self._on_gpus(point, bench)
        count = 1 if point.variant == "blocks" else min(MOST_CALLS, HOST_BYTES // size)
        host = self._memory(bench, pinned=point.variant != "pageable")
        # the host's side is spread over all of its memory, so that small copies do not find it in a cache
        theirs = [host[index * (HOST_BYTES // count) :][:size] if bench.cuda else host[:size] for index in range(count)]
        ours = [view.view(bench.torch.uint8) for view in bench.views(count, (size,), "int8", "copy")]
        calls = []
        for here, there in zip(theirs, ours, strict=True):
            source, target = (here, there) if point.op == "copy_h2d" else (there, here)
            if point.variant == "blocks":
                calls.append(_in_blocks(source, target, point["n"], bench))
            else:
                calls.append(partial(target.copy_, source, non_blocking=point.variant == "pinned"))
        return bench.time(point, calls, bytes=float(size))

    def _on_gpus(self, point: Point, bench: Bench) -> Row:
        torch, size = bench.torch, point["size_bytes"]
        between = point.op == "copy_p2p"
        if between and torch.cuda.device_count() < 2:
            raise Unavailable("there is one GPU only")
        count = bench.copies(2 * size)
        sources = bench.views(count, (size,), "int8")
        if between:
            pool = torch.empty((count, size), dtype=torch.int8, device="cuda:1")
            targets = list(pool.unbind())
        else:
            targets = bench.views(count, (size,), "int8", "copy")
        calls = [partial(to.copy_, of, non_blocking=True) for to, of in zip(targets, sources, strict=True)]
        return bench.time(point, calls, bytes=float(size if between else 2 * size))

    def _memory(self, bench: Bench, pinned: bool) -> Any:
        """Random bytes of the host, made once."""
        torch = bench.torch
        if pinned not in self._host:
            size = HOST_BYTES if bench.cuda else MIB
            memory = torch.empty(size // 8, dtype=torch.int64, pin_memory=pinned and bench.cuda)
            self._host[pinned] = memory.random_(generator=torch.Generator().manual_seed(bench.seed)).view(torch.uint8)
        return self._host[pinned]


def _in_blocks(source: Any, target: Any, pieces: int, bench: Bench) -> Callable[[], None]:
    order = bench.torch.randperm(pieces, generator=bench.torch.Generator().manual_seed(bench.seed)).tolist()
    parts, places = source.chunk(pieces), target.chunk(pieces)
    pairs = [(parts[index], places[place]) for index, place in enumerate(order)]

    def run() -> None:
        for part, place in pairs:
            place.copy_(part, non_blocking=True)

    return run
