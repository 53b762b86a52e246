"""Memory that is not left for weights and KV blocks: `size_bytes`, per variant. Nothing is timed (median_s is 0).

    total             of the GPU, as CUDA reports it (on the CPU: of the host)
    context           the CUDA context of one process with torch, before any kernel of a library
    cublas_workspace  what the first bf16 matrix product adds: cuBLAS's handle, kernels and workspace
    graph_per_size    what a CUDA graph of `layers` layers of Llama-3.1-8B adds, for each of several batch sizes
                      (`tokens`) captured from the largest down into one pool
    nccl              per GPU, the communicator of `gpus` GPUs after its first all-reduce

All but "total" are differences of free memory around the step, in processes of their own: what other processes take or
give back meanwhile is counted too, so nothing else may run on the GPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.measure.communication import NO_MULTICAST
from calibration.measure.launch import USUAL_MODEL, Stack
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row

if TYPE_CHECKING:
    from calibration.measure.timing import Bench

GRAPH_TOKENS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
GRAPH_LAYERS = 32
LIMIT_S = 180.0


class Memory:
    name = "memory"

    def points(self, wanted: Wanted) -> Iterator[Point]:
        if not wanted.wants("memory"):
            return
        yield Point.of("memory", "total", "host")
        if wanted.tiny:
            return
        yield Point.of("memory", "context", "host")
        yield Point.of("memory", "cublas_workspace", "host")
        yield Point.of("memory", "graph_per_size", "host", model=USUAL_MODEL, layers=GRAPH_LAYERS)
        for gpus in (2, 4, 8):
            if gpus <= wanted.gpus:
                yield Point.of("memory", "nccl", "host", gpus=gpus)

    def measure(self, point: Point, bench: Bench) -> list[Row]:
        if point.variant == "total":
            total = (
                bench.torch.cuda.get_device_properties(0).total_memory
                if bench.cuda
                else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            )
            return [_row(point, total)]
        if not bench.cuda:
            raise Unavailable("it needs a GPU")
        if point.variant == "nccl":
            return [_row(point, min(_in_processes(_nccl, point["gpus"])))]
        if point.variant == "graph_per_size":
            (sizes,) = _in_processes(_graphs, 1)
            return [_row(point, size, tokens=tokens) for tokens, size in sizes]
        before, _ = bench.torch.cuda.mem_get_info()
        (found,) = _in_processes(_first_kernels, 1)
        return [_row(point, before - found["free"] if point.variant == "context" else found["cublas"])]


def _row(point: Point, size: int, **columns: Any) -> Row:
    return Row(
        op=point.op,
        variant=point.variant,
        launch=point.launch,
        median_s=0.0,
        size_bytes=int(size),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **point.columns,
        **columns,
    )


def _in_processes(work: Any, count: int) -> list[Any]:
    """What `work(rank, count, store)` returns in each of `count` fresh processes."""
    context = get_context("spawn")
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="llmsim-memory-") as folder:
        try:
            for rank in range(count):
                pipe, theirs = context.Pipe()
                arguments = (work, rank, count, str(Path(folder) / "store"), theirs)
                process = context.Process(target=_send, args=arguments, daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(pipe)
            return [_received(rank, pipe) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join(10)


def _received(rank: int, pipe: Connection) -> Any:
    if not wait([pipe], LIMIT_S):
        raise Unavailable(f"no answer from process {rank} within {LIMIT_S:g} s")
    try:
        value, problem = pipe.recv()
    except EOFError:
        raise Unavailable(f"process {rank} ended without an answer") from None
    if problem:
        raise Unavailable(problem)
    return value


def _send(work: Any, rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ.update(NO_MULTICAST)
    try:
        pipe.send((work(rank, count, store), None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"))


def _free(torch: Any) -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def _first_kernels(_rank: int, _count: int, _store: str) -> dict[str, int]:
    import torch

    torch.cuda.init()
    free = _free(torch)
    weights, inputs, outputs = (torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    before = _free(torch)
    torch.mm(inputs, weights, out=outputs)
    return {"free": free, "cublas": before - _free(torch)}


def _nccl(rank: int, count: int, store: str) -> int:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    buffer = torch.zeros(2**20, device="cuda")
    before = _free(torch)
    dist.init_process_group("nccl", f"file://{store}", rank=rank, world_size=count)
    dist.all_reduce(buffer)
    return before - _free(torch)


def _graphs(_rank: int, _count: int, _store: str) -> list[tuple[int, int]]:
    import torch

    from calibration.measure.timing import Bench
    from llmsim.hardware import find_model

    with torch.inference_mode():
        stack = Stack(find_model(USUAL_MODEL), GRAPH_LAYERS, max(GRAPH_TOKENS), Bench("cuda"))
        pool, graphs, sizes = torch.cuda.graph_pool_handle(), [], []
        for tokens in GRAPH_TOKENS:
            stack.forward(tokens)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = _free(torch)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                stack.forward(tokens)
            graph.replay()
            graphs.append(graph)
            sizes.append((tokens, before - _free(torch)))
    return sizes
