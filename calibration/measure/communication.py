"""Collectives and point-to-point messages between the GPUs of this machine, by size and number of GPUs.

One process a GPU (`Ranks`), started once for the largest number and kept; smaller numbers are subgroups of it. What is
timed is a run of calls back to back, between CUDA events on rank 0, after a collective that lines the ranks up: seconds
are of one call. launch="graph" replays the calls from a CUDA graph, "eager" makes them from Python. Buffers are bf16
and few, so small ones are in L2, as the output of the layer before is.

    op              size_bytes              bytes: the least that a GPU sends over n GPUs
    all_reduce      the buffer              2 (n - 1) / n size
    all_gather      the gathered output     (n - 1) / n size
    reduce_scatter  the whole input         (n - 1) / n size
    send_recv       the message             size; half of a round trip between two GPUs

Variants: "nccl", with NVLink multicast (NVLS) off; "vllm_custom", vLLM's custom all-reduce, below its 8 MiB; "gloo" on
the CPU. A rank that dies, or a group that gives no answer in time, is one line, and the other ranks are ended.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench, sampled

KIB, MIB = 1024, 1024**2
OPS = ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
SIZES = [4 * KIB << power for power in range(17)]  # to 256 MiB
BETWEEN = [size * 3 // 2 for size in SIZES if size < 4 * MIB]
CUSTOM_BYTES = 8 * MIB  # vLLM's CustomAllreduce: max_size
BUFFERS = 4
SAMPLES = 20
RUN_S = 2e-3  # of calls back to back
START_S = 180.0  # for importing torch, and vllm, in every rank, and for its first collective
ANSWER_S = 60.0
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


class Job(NamedTuple):
    op: str
    variant: str
    launch: str
    size_bytes: int
    ranks: int
    samples: int


def sent_bytes(op: str, size_bytes: int, ranks: int) -> float:
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "send_recv": 1.0}.get(op, (ranks - 1) / ranks)
    return share * size_bytes


def calls_in_run(size_bytes: int) -> int:
    """Back to back in one sample: about `RUN_S` at 10 us and 100 GB/s; all ranks must agree, so nothing is measured."""
    return max(BUFFERS, min(64, int(RUN_S / (10e-6 + size_bytes / 100e9))))


# ---- in a rank ----------------------------------------------------------------------------------------------------


def _rank(rank: int, ranks: int, device: str, store: str, pipe: Connection) -> None:
    """Answers jobs with ("seconds", samples), or ("unavailable" | "error", one line), until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    os.environ.update(NO_MULTICAST)
    try:
        worker = _Worker(rank, ranks, device, store)
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            try:
                pipe.send(("seconds", worker.run(job)))
            except Unavailable as reason:
                pipe.send(("unavailable", str(reason)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        with suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"))


class _Worker:
    def __init__(self, rank: int, ranks: int, device: str, store: str) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist, self.rank = torch, dist, rank
        self.cuda = device == "cuda"
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream()
        else:
            torch.set_num_threads(1)
        limit = timedelta(seconds=START_S)
        backend = "nccl" if self.cuda else "gloo"
        dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
        self.groups, self.host_groups = {}, {}
        size = 2
        while size <= ranks:  # every rank must take part in making every group
            self.groups[size] = dist.new_group(list(range(size)), timeout=limit)
            if self.cuda:  # vLLM's custom all-reduce exchanges its handles over one of the host's
                self.host_groups[size] = dist.new_group(list(range(size)), timeout=limit, backend="gloo")
            size *= 2
        self._custom: dict[int, Any] = {}

    def run(self, job: Job) -> list[float]:
        with self.torch.inference_mode():
            buffers, call = self._operation(job)
            count = calls_in_run(job.size_bytes)
            self._line_up(job.ranks)
            for index in range(BUFFERS):
                call(index)
            if not self.cuda:
                return [self._host_sample(job, call, count) for _ in range(job.samples)]
            fresh = [buffer.clone() for buffer in buffers]
            replay = self._graph(job, call, count) if job.launch == "graph" else lambda: _repeat(call, count)
            return [self._sample(job, replay, count, buffers, fresh) for _ in range(job.samples)]

    def _operation(self, job: Job) -> tuple[list[Any], Callable[[int], Any]]:
        """Buffers that a call changes, and the call on the buffer of an index."""
        torch, dist = self.torch, self.dist
        group, ranks = self.groups[job.ranks], job.ranks
        elements = job.size_bytes // 2 // ranks * ranks
        generator = torch.Generator(self.device).manual_seed(self.rank)
        whole = [
            torch.randn(elements, dtype=torch.bfloat16, device=self.device, generator=generator) for _ in range(BUFFERS)
        ]
        parts = [buffer[: elements // ranks].clone() for buffer in whole]
        if job.variant == "vllm_custom":
            custom = self._vllm_custom(ranks)
            if not custom.should_custom_ar(whole[0]):
                raise Unavailable(f"vLLM's custom all-reduce takes no {job.size_bytes} bytes over {ranks} GPUs here")
            return [], lambda index: custom.custom_all_reduce(whole[index % BUFFERS])
        if job.op == "all_reduce":
            return whole, lambda index: dist.all_reduce(whole[index % BUFFERS], group=group)
        if job.op == "all_gather":  # renamed in torch 2.13
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return [], lambda index: gather(whole[index % BUFFERS], parts[index % BUFFERS], group=group)
        if job.op == "reduce_scatter":
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            return [], lambda index: scatter(parts[index % BUFFERS], whole[index % BUFFERS], group=group)

        def ping_pong(index: int) -> None:
            message = whole[index % BUFFERS]
            for sender in (0, 1):
                if self.rank == sender:
                    dist.send(message, 1 - sender, group=group)
                else:
                    dist.recv(message, sender, group=group)

        return [], ping_pong

    def _vllm_custom(self, ranks: int) -> Any:
        if ranks not in self._custom:
            try:
                from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce
            except Exception as error:  # an extension that does not fit this machine fails in many ways
                reason = next(iter(str(error).splitlines()), repr(error))
                raise Unavailable(f"vllm's custom all-reduce is not importable ({reason})") from None
            self._custom[ranks] = CustomAllreduce(self.host_groups[ranks], self.device, max_size=CUSTOM_BYTES)
        if self._custom[ranks].disabled:
            raise Unavailable(f"vLLM's custom all-reduce switches itself off over {ranks} GPUs of this machine")
        return self._custom[ranks]

    def _graph(self, job: Job, call: Callable[[int], Any], count: int) -> Callable[[], Any]:
        torch = self.torch
        registered = self._vllm_custom(job.ranks).capture() if job.variant == "vllm_custom" else nullcontext()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with registered, torch.cuda.stream(self._stream):
            # NCCL's watchdog thread asks CUDA about its events meanwhile, which a capture of mode "global" forbids
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                _repeat(call, count)
            finally:
                graph.capture_end()
        graph.replay()
        return graph.replay

    def _line_up(self, ranks: int) -> None:
        self.dist.all_reduce(self.torch.zeros(1, device=self.device), group=self.groups[ranks])

    def _sample(self, job: Job, replay: Callable[[], Any], count: int, buffers: list[Any], fresh: list[Any]) -> float:
        for buffer, source in zip(buffers, fresh, strict=True):  # sums would overflow in the end
            buffer.copy_(source)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._line_up(job.ranks)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count / (2 if job.op == "send_recv" else 1)

    def _host_sample(self, job: Job, call: Callable[[int], Any], count: int) -> float:
        self._line_up(job.ranks)
        begun = time.perf_counter()
        _repeat(call, count)
        return (time.perf_counter() - begun) / count / (2 if job.op == "send_recv" else 1)


def _repeat(call: Callable[[int], Any], count: int) -> None:
    for index in range(count):
        call(index)


# ---- beside them --------------------------------------------------------------------------------------------------


class Ranks:
    """`count` processes, one a GPU. Any failure ends all of them, and says in one line which and why."""

    def __init__(self, count: int, device: str, start_s: float = START_S, answer_s: float = ANSWER_S) -> None:
        self.count = count
        self.start_s, self.answer_s = start_s, answer_s
        self._folder = tempfile.TemporaryDirectory(prefix="llmsim-ranks-")
        context = get_context("spawn")
        self.processes, self._pipes = [], []
        for rank in range(count):
            pipe, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_rank, args=(rank, count, device, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(pipe)
        self._begun: set[tuple[int, str]] = set()
        self._answers(range(count), start_s)

    def seconds(self, job: Job) -> list[float]:
        """Rank 0's samples."""
        for pipe in self._pipes[: job.ranks]:
            with suppress(BrokenPipeError):  # the wait below says which rank has ended
                pipe.send(job)
        began = job.op, job.variant, job.ranks
        limit_s = self.answer_s if began in self._begun else self.start_s  # libraries connect the ranks at first use
        self._begun.add(began)
        return self._answers(range(job.ranks), limit_s)[0]

    def _answers(self, ranks: range, limit_s: float) -> list[Any]:
        """What every rank says next."""
        until = time.monotonic() + limit_s
        said: dict[int, tuple[str, Any]] = {}
        while len(said) < len(ranks):
            open_ = [rank for rank in ranks if rank not in said]
            ready = wait([self._pipes[rank] for rank in open_], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                names = ", ".join(map(str, open_))
                raise Unavailable(f"no answer from rank {names} of {self.count} within {limit_s:g} s: ranks ended")
            for rank in open_:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    said[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(5)
                    said[rank] = ("error", f"it ended with exit code {self.processes[rank].exitcode}")
                if said[rank][0] == "error":
                    self.close()
                    raise Unavailable(f"rank {rank} of {self.count}: {said[rank][1]}")
        refused = [text for kind, text in said.values() if kind == "unavailable"]
        if refused:
            raise Unavailable(refused[0])
        return [said[rank][1] for rank in ranks]

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join(10)
        self._folder.cleanup()


class Communication:
    """All ops between GPUs. Its processes live until `close` or the end of this one."""

    name = "communication"

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._failed: str | None = None

    def points(self, wanted: Wanted) -> Iterator[Point]:
        if wanted.tiny:
            cases = [(op, "gloo", "eager", 2, [4 * KIB, 64 * KIB]) for op in OPS]
        else:
            cases = []
            for launch in ("graph", "eager"):
                for gpus in (2, 4, 8):
                    if gpus > wanted.gpus:
                        continue
                    sizes = sorted(SIZES[::2]) + sorted([*SIZES[1::2], *BETWEEN])
                    for op in OPS if gpus == 2 else OPS[:3]:
                        cases.append((op, "nccl", launch, gpus, sizes))
                    custom = [size for size in sizes if size < CUSTOM_BYTES]
                    cases.append(("all_reduce", "vllm_custom", launch, gpus, custom))
        for op, variant, launch, gpus, sizes in cases:
            if wanted.wants(op):
                for size in sizes:
                    yield Point.of(op, variant, launch, dtype="bfloat16", gpus=gpus, size_bytes=size)

    def measure(self, point: Point, bench: Bench) -> Row:
        gpus, size = point["gpus"], point["size_bytes"]
        job = Job(point.op, point.variant, point.launch, size, gpus, SAMPLES if bench.cuda else 3)
        seconds = self._started(gpus, bench).seconds(job)
        readings = (
            {name: getattr(bench.nvml, name) for name in ("sm_mhz", "memory_mhz", "temperature_c", "power_w")}
            if bench.cuda
            else {}
        )
        return sampled(point, seconds, keep=False, bytes=sent_bytes(point.op, size, gpus), **readings)

    def _started(self, gpus: int, bench: Bench) -> Ranks:
        here = bench.torch.cuda.device_count() if bench.cuda else 2
        if gpus > here:
            raise Unavailable(f"{gpus} GPUs are needed, {here} there")
        if self._failed:
            raise Unavailable(self._failed)
        if self._ranks is None or not self._ranks.alive:
            self.close()
            try:
                self._ranks = Ranks(max(size for size in (2, 4, 8) if size <= here), bench.device)
            except Unavailable as reason:
                self._failed = str(reason)  # or every point would wait as long again
                raise
        return self._ranks

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
