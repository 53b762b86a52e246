"""Time one point: the median over replays of a CUDA graph, between CUDA events, on random data in rotating buffers.

A call is run once to warm up, all calls are captured into one graph, as often as it takes for a replay to last
`REPLAY_S` (so that the 0.5 us resolution of events and the few microseconds before a graph's first kernel stay under
1 %), and the graph is replayed `MIN_REPLAYS` times or more, until the middle 80 % lie within `SPREAD` of the median or
`cap_s` is spent. The calls are one operation on different buffers that together exceed twice the L2 cache, so no call
finds its own inputs there. `launch` of the point decides: "graph" and "compiled_graph" replay, "eager" and "compiled"
call from Python, and their time contains the host's where the host is the slower. Points with clocks="sustained" run
straight after heavy matrix products, those with "cold" after `IDLE_S` without load. Clocks, temperature and power are
read from NVML while the replays run. On the CPU the same points are timed with `time.perf_counter`, never as a graph.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil
from typing import Any

from calibration.measure.points import Point
from calibration.measure.rows import Row

REPLAY_S = 1.5e-3
MIN_REPLAYS = 10
MAX_REPLAYS = 30
MAX_NODES = 2000  # of one graph
MAX_COPIES = 256
SPREAD = 0.03  # (p90 - p10) / median
LOAD_FLOPS = 2.0 * 4096**3  # of one matrix product that warms the GPU
HEAVY = 0.6  # of its operations per second
LOAD_S = 0.3  # of matrix products before a sustained point that follows a pause
IDLE_S = 0.2
LOW_CLOCKS: dict[str | None, float] = {"cold": 0.8, "sustained": 0.6}  # of the highest: below, it is said
GRAPHS = ("graph", "compiled_graph")

TORCH_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "tf32": "float32",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
    "int64": "int64",
    "int32": "int32",
}

# Reasons for lower clocks that are a fault of cooling or supply (nvml.h: nvmlClocksEventReason*)
_FAULTS = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


class Nvml:
    """What is read of NVML's C interface; every reading is None where the library or the reading is missing."""

    def __init__(self, uuid: str) -> None:
        try:
            self._lib = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self._lib = None
            return
        self._gpu = ctypes.c_void_p()
        found = ctypes.byref(self._gpu)
        if self._lib.nvmlInit_v2() or self._lib.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), found):
            self._lib = None

    def _read(self, function: str, kind: Any, *before: int) -> int | None:
        if self._lib is None or not hasattr(self._lib, function):
            return None
        value = kind()
        failed = getattr(self._lib, function)(self._gpu, *before, ctypes.byref(value))
        return None if failed else int(value.value)

    @property
    def sm_mhz(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", ctypes.c_uint, 1)

    @property
    def max_sm_mhz(self) -> int | None:
        return self._read("nvmlDeviceGetMaxClockInfo", ctypes.c_uint, 1)

    @property
    def memory_mhz(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", ctypes.c_uint, 2)

    @property
    def temperature_c(self) -> int | None:
        return self._read("nvmlDeviceGetTemperature", ctypes.c_uint, 0)

    @property
    def power_w(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage", ctypes.c_uint)
        return None if milliwatts is None else milliwatts / 1e3

    @property
    def driver(self) -> str | None:
        text = ctypes.create_string_buffer(80)
        failed = self._lib is None or self._lib.nvmlSystemGetDriverVersion(text, len(text))
        return None if failed else text.value.decode()

    @property
    def processes(self) -> int | None:
        """Processes that compute on this GPU, this one included."""
        count = ctypes.c_uint(0)
        if self._lib is None or not hasattr(self._lib, "nvmlDeviceGetComputeRunningProcesses_v3"):
            return None
        failed = self._lib.nvmlDeviceGetComputeRunningProcesses_v3(self._gpu, ctypes.byref(count), None)
        return int(count.value) if failed in (0, 7) else None  # 7: more than the none that fit

    @property
    def faults(self) -> list[str]:
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong) or 0
        return [name for bit, name in _FAULTS.items() if reasons & bit]


class Bench:
    """One device, its random data and its clock. `notes` collects what is wrong with the device, once each."""

    def __init__(self, device: str = "cuda", seed: int = 0, cap_s: float = 0.15) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.seed = seed
        self.cap_s = cap_s
        self.notes: list[str] = []
        self.cuda = device == "cuda"
        self.generator = torch.Generator(device).manual_seed(seed)
        self._pools: dict[tuple[Any, str], Any] = {}
        self._busy_at = 0.0
        if self.cuda:
            gpu = torch.cuda.get_device_properties(0)
            self.l2_bytes = gpu.L2_cache_size
            self.nvml = Nvml(str(gpu.uuid))
            self._stream = torch.cuda.Stream()
            self._load: tuple[Any, Any, float] | None = None
            self._max_mhz = self.nvml.max_sm_mhz
            self._read_at = -1.0
            self._slow: dict[str, int | None] = {}
            self.reset()

    def reset(self) -> None:
        """Gives back all memory, after running out of it or before another kind of operator."""
        self._pools.clear()
        if self.cuda:
            torch = self.torch
            self._anchor = None
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # A pool that graphs share stays alive only while one graph does: this one, of one small kernel.
            self._graph_pool = torch.cuda.graph_pool_handle()
            small = torch.zeros(1, device="cuda")
            small.add_(1)
            self._anchor = self._capture([lambda: small.add_(1)], 1)

    # ---- data -----------------------------------------------------------------------------------------------------

    def dtype(self, dtype: Any) -> Any:
        """The torch dtype of a name as rows have it."""
        return getattr(self.torch, TORCH_DTYPES[dtype]) if isinstance(dtype, str) else dtype

    def randn(self, shape: Sequence[int], dtype: Any) -> Any:
        """New memory with standard normal numbers (fp8: converted; integers: even over -127 ... 127)."""
        torch, kind = self.torch, self.dtype(dtype)
        if not kind.is_floating_point:
            return torch.randint(-127, 128, tuple(shape), dtype=kind, device=self.device, generator=self.generator)
        wide = kind if kind.itemsize > 1 else torch.bfloat16
        return torch.randn(tuple(shape), dtype=wide, device=self.device, generator=self.generator).to(kind)

    def copies(self, bytes_per_call: float) -> int:
        """How many buffers one call must rotate over so that none is still in L2, at most `MAX_COPIES`: small ones
        stay in the cache, as they do between the kernels of an engine."""
        if not self.cuda:
            return 2
        return max(1, min(MAX_COPIES, ceil(3 * self.l2_bytes / max(1, bytes_per_call))))

    def views(self, count: int, shape: Sequence[int], dtype: Any, use: str = "input") -> list[Any]:
        """`count` views, apart from each other, of one random tensor that all points share. Inputs are only read;
        give another `use` for what is written, and for a second input beside the first."""
        kind = self.dtype(dtype)
        size = 1
        for extent in shape:
            size *= extent
        stride = -(-size // 512) * 512  # aligned for the tensor cores and TMA
        pool = self._pools.get((kind, use))
        if pool is None or pool.numel() < count * stride:
            self._pools.pop((kind, use), None)
            del pool
            pool = self._pools[kind, use] = self._fill(count * stride, kind)
        return [pool[index * stride : index * stride + size].view(tuple(shape)) for index in range(count)]

    def _fill(self, size: int, kind: Any) -> Any:
        """Random numbers, drawn for 64 Mi elements at a time: fp8 needs twice its memory while it is converted."""
        pool = self.torch.empty(size, dtype=kind, device=self.device)
        for start in range(0, size, 1 << 26):
            part = pool[start : start + (1 << 26)]
            part.copy_(self.randn(part.shape, kind))
        return pool

    def held_bytes(self, use: str) -> int:
        """Of the shared tensors whose `use` begins so."""
        return sum(pool.nbytes for (_, name), pool in self._pools.items() if name.startswith(use))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Whole or not at all, and never back to eager after many shapes. On the CPU traced only: compiling takes
        seconds, and nobody reads those times."""
        self.torch._dynamo.config.recompile_limit = 64
        return self.torch.compile(function, fullgraph=True, backend="inductor" if self.cuda else "eager")

    # ---- clocks ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def heat(self) -> None:
        """Queues matrix products: for as long as the GPU was idle, between 20 ms and `LOAD_S`."""
        torch = self.torch
        if self._load is None:
            left, right = self.randn((4096, 4096), "bfloat16"), self.randn((4096, 4096), "bfloat16")
            for _ in range(3):
                left @ right
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                left @ right
            end.record()
            end.synchronize()
            self._load = left, right, start.elapsed_time(end) / 1e3 / 20
        left, right, each_s = self._load
        load_s = min(LOAD_S, max(0.02, time.monotonic() - self._busy_at))
        out = torch.empty_like(left)
        for _ in range(ceil(load_s / each_s)):
            torch.mm(left, right, out=out)

    def _heavy(self, flops_per_s: float) -> bool:
        """Whether it warms the GPU as the matrix products do."""
        return self._load is not None and flops_per_s > HEAVY * LOAD_FLOPS / self._load[2]

    def cool(self) -> None:
        wait_s = self._busy_at + IDLE_S - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)

    def _readings(self, clocks: str | None) -> dict[str, Any]:
        """Clocks now; what changes slowly is read every half second, because a reading can take milliseconds."""
        nvml = self.nvml
        sm_mhz = nvml.sm_mhz
        if sm_mhz and self._max_mhz and sm_mhz < LOW_CLOCKS.get(clocks, 0.0) * self._max_mhz:
            self.note(
                f"under {LOW_CLOCKS[clocks]:.0%} of the GPU's {self._max_mhz} MHz at some points that are {clocks}"
            )
        if time.monotonic() - self._read_at > 0.5:
            self._read_at = time.monotonic()
            self._slow = {field: getattr(nvml, field) for field in ("memory_mhz", "temperature_c")}
            for fault in nvml.faults:
                self.note(f"the GPU lowered its clocks because of {fault}: cool it, or measure again later")
        return {"sm_mhz": sm_mhz, "power_w": nvml.power_w, **self._slow}

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # ---- timing ---------------------------------------------------------------------------------------------------

    def time(
        self,
        point: Point,
        calls: Sequence[Callable[[], Any]],
        flops: float | None = None,
        bytes: float | None = None,
        samples: bool = False,
        **columns: Any,
    ) -> Row:
        """Seconds of one call, each of `calls` being the same operation on its own buffers. `columns`: more of the
        row's. `samples` keeps the seconds of every replay."""
        with self.torch.inference_mode():
            if self.cuda:
                launch = point.launch
                seconds, readings = self._on_gpu(point, calls, flops or 0.0)
            else:
                launch = {"graph": "eager", "compiled_graph": "compiled"}.get(point.launch, point.launch)
                seconds, readings = self._on_cpu(calls), {}
        more = {"launch": launch, "flops": flops, "bytes": bytes, **readings, **columns}
        return sampled(point, seconds, keep=samples, **more)

    def _on_cpu(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        seconds = []
        until = time.perf_counter() + min(self.cap_s, 2e-3)
        while len(seconds) < 3 or (time.perf_counter() < until and len(seconds) < MAX_REPLAYS):
            begun = time.perf_counter()
            for call in calls:
                call()
            seconds.append((time.perf_counter() - begun) / len(calls))
        return seconds

    def _capture(self, calls: Sequence[Callable[[], Any]], times: int) -> Any:
        """A graph of all calls, one after the other, `times` over. `torch.cuda.graph` would empty the cache first."""
        torch = self.torch
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
            try:
                for _ in range(times):
                    for call in calls:
                        call()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken; what broke it matters
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    def _interval_s(self, replay: Callable[[], Any]) -> float:
        """Of the second of two replays, launched while the first keeps the GPU busy."""
        replay()
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _warm_up(self, calls: Sequence[Callable[[], Any]]) -> None:
        """On the stream of the capture: libraries keep a workspace for each stream."""
        torch = self.torch
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls[:2]:
                call()
            calls[0]()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()

    def _on_gpu(
        self, point: Point, calls: Sequence[Callable[[], Any]], flops: float
    ) -> tuple[list[float], dict[str, Any]]:
        torch = self.torch
        self._warm_up(calls)
        if point.launch in GRAPHS:
            times = 1
            while True:
                graph = self._capture(calls, times)
                replay_s = self._interval_s(graph.replay)
                most = max(1, MAX_NODES // len(calls))
                if replay_s > 0.7 * REPLAY_S or times == most:
                    break
                times = min(ceil(times * REPLAY_S / replay_s), most)
            replay = graph.replay
        else:
            once_s = self._interval_s(lambda: [call() for call in calls])
            times = ceil(REPLAY_S / once_s)
            replay_s = once_s * times

            def replay() -> None:
                for _ in range(times):
                    for call in calls:
                        call()

        fewest = MIN_REPLAYS if replay_s * MIN_REPLAYS < 4 * self.cap_s else 3
        if point.get("clocks") == "cold":
            torch.cuda.synchronize()
            self.cool()
        elif point.get("clocks") == "sustained":
            self.heat()
        replay()
        seconds: list[float] = []
        readings: dict[str, Any] = {}
        spent_s = 0.0
        while True:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(fewest + 1)]
            events[0].record()
            for event in events[1:]:
                replay()
                event.record()
            if not readings:
                readings = self._readings(point.get("clocks"))
            events[-1].synchronize()
            batch = [start.elapsed_time(end) / 1e3 / (times * len(calls)) for start, end in pairwise(events)]
            seconds += batch
            spent_s += sum(batch) * times * len(calls)
            ordered = sorted(seconds)
            spread = (quantile(ordered, 0.9) - quantile(ordered, 0.1)) / quantile(ordered, 0.5)
            if spread <= SPREAD or spent_s >= self.cap_s or len(seconds) >= MAX_REPLAYS:
                break
        if point.get("clocks") != "cold" or self._heavy(flops / quantile(ordered, 0.5)):
            self._busy_at = time.monotonic()
        return seconds, readings


def sampled(point: Point, seconds: Sequence[float], *, keep: bool, **columns: Any) -> Row:
    """The row of a point from what each repeat took; `columns` come before the point's own."""
    ordered = sorted(seconds)
    row = {
        "op": point.op,
        "variant": point.variant,
        "launch": point.launch,
        "median_s": quantile(ordered, 0.5),
        "p10_s": quantile(ordered, 0.1),
        "p90_s": quantile(ordered, 0.9),
        "repeats": len(seconds),
        "samples_s": tuple(seconds) if keep else None,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Row(**{**row, **point.columns, **columns})


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted numbers, between neighbours in proportion."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
