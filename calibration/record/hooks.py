"""The methods of vLLM that are timed, and why. Nothing else of the recorder touches vLLM's insides.

Wrapped in classes before the engine starts (its processes are forked, so they have them too); vLLM 0.25.1:

    Scheduler.schedule              what each step holds, and its duration               lines s, e
    Scheduler.update_from_output    when a step's tokens go out                          u
    Scheduler._preempt_request      preemptions                                          p
    Scheduler.add_request           when a request reached the scheduler's queue         a (becomes "queued")
    Scheduler.reset_prefix_cache, .shutdown   called between scenarios and at the end: the log is then whole on disk
    UniProcExecutor, MultiprocExecutor .execute_model, .sample_tokens   the launch       x, y

Wrapped on rank 0's objects after the engine has started and warmed up, by `WorkerExtension` (vLLM's own way to add
methods to workers, AsyncEngineArgs.worker_extension_cls):

    Worker.execute_model, .sample_tokens   with several GPUs, the worker's own launch    w, v
    V2 GPUModelRunner.prepare_inputs, .kv_connector.pre_forward, .execute_model, .sample               g
    V1 GPUModelRunner._prepare_inputs, ._determine_batch_execution_and_padding, ._model_forward, ._sample

g: four CUDA events a step: its first work, begin and end of the forward, end of sampling. (V1 counts the LM head with
the forward's end.) Events are read when the step is over, so nobody waits for the GPU. A request whose id contains
`HELD` keeps the GPU waiting for `HOLD_CYCLES` before the forward, until the host has queued all its kernels.

A method that is missing is one line of error, but for the GPU's: then nothing but the GPU's times is missing, and
engine.json says so. Raw logs are JSON lines, times in seconds of time.perf_counter.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

SUPPORTED = ("0.25.1",)
HELD = "_spin"
HOLD_CYCLES = 80_000_000
EXTENSION = "calibration.record.hooks.WorkerExtension"
STEPS, WORKER = "steps.raw.jsonl", "worker.raw.jsonl"
FLUSH_LINES = 200

SCHEDULER = ("vllm.v1.core.sched.scheduler", "Scheduler")
EXECUTORS = (
    ("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
    ("vllm.v1.executor.multiproc_executor", "MultiprocExecutor"),
)


class Log:
    """JSON lines of one process; opened by the process that writes first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._unflushed = 0

    def write(self, *line: Any) -> None:
        if self._file is None:
            self._file = self._path.open("a", buffering=1 << 16, encoding="utf-8")
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._unflushed += 1
        if self._unflushed >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        if self._file is None:
            self._file = self._path.open("a", buffering=1 << 16, encoding="utf-8")
        self._file.flush()
        self._unflushed = 0


class _State:
    """Of this process. `gpu` is set where the worker lives in the engine's process."""

    gpu: GpuTimes | None = None


def _us(seconds: float) -> float:
    return round(seconds, 6)


# ---- in the engine's process --------------------------------------------------------------------------------------


def vllm_version() -> str:
    try:
        return str(import_module("vllm").__version__)
    except ImportError as error:
        raise ValueError(f"vllm cannot be imported ({error}). Install vllm {SUPPORTED[0]} on this machine") from None


def install(folder: Path) -> None:
    """Wrap vLLM's classes; their logs go to `folder`."""
    log = Log(folder / STEPS)
    _State.gpu = None
    scheduler = _class(*SCHEDULER)
    for name, make in _SCHEDULER_HOOKS.items():
        _wrap(scheduler, name, make, log)
    for where in EXECUTORS:
        executor = _class(*where)
        _wrap(executor, "execute_model", _timed("x"), log)
        _wrap(executor, "sample_tokens", _timed("y"), log)


def _class(module: str, name: str) -> type:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"vllm {vllm_version()}: no {module}.{name} ({error}). {_supported()}") from None


def _supported() -> str:
    return f"This recorder is for vllm {', '.join(SUPPORTED)}"


def _wrap(cls: type, name: str, make: Callable[[Any, Log], Any], log: Log) -> None:
    original = getattr(cls, name, None)
    if original is None:
        raise ValueError(f"vllm {vllm_version()}: {cls.__name__} has no method {name}. {_supported()}")
    original = getattr(original, "__wrapped_by_llmsim__", original)
    hook = wraps(original)(make(original, log))
    hook.__wrapped_by_llmsim__ = original
    setattr(cls, name, hook)


def _schedule(original: Any, log: Log) -> Any:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin_s = perf_counter()
        step = original(self, *args, **kwargs)
        took_s = perf_counter() - begin_s
        if not step.total_num_scheduled_tokens:
            log.write("e", _us(begin_s))
            log.flush()
            return step
        chunks, decodes, context = [], 0, 0
        for request_id, new in step.num_scheduled_tokens.items():
            request = self.requests[request_id]
            computed = request.num_computed_tokens
            before = computed - new if computed >= new else computed  # schedule() has counted the new ones already
            if new == 1 and before >= request.num_prompt_tokens - 1 and before > 0:
                decodes += 1
                context += before
            else:
                chunks.append([new, before])
        log.write(
            "s", _us(begin_s), _us(took_s), step.total_num_scheduled_tokens, decodes, context, chunks,
            len(self.running), len(self.waiting), round(self.kv_cache_manager.usage, 5),
        )  # fmt: skip
        return step

    return schedule


def _update(original: Any, log: Log) -> Any:
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        begin_s = perf_counter()
        result = original(self, scheduler_output, *args, **kwargs)
        log.write("u", _us(begin_s), _us(perf_counter() - begin_s), scheduler_output.total_num_scheduled_tokens)
        if _State.gpu is not None:
            _State.gpu.read()
        if not self.running and not self.waiting:
            log.flush()
        return result

    return update_from_output


def _preempt(original: Any, log: Log) -> Any:
    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        log.write("p", _us(perf_counter()), request.num_computed_tokens, request.num_output_tokens)
        return original(self, request, *args, **kwargs)

    return _preempt_request


def _add(original: Any, log: Log) -> Any:
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        log.write("a", _us(perf_counter()), request.num_prompt_tokens, request.request_id)
        return original(self, request, *args, **kwargs)

    return add_request


def _flushed(original: Any, log: Log) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        log.flush()
        return original(self, *args, **kwargs)

    return call


def _timed(tag: str) -> Callable[[Any, Log], Any]:
    def make(original: Any, log: Log) -> Any:
        def call(self: Any, argument: Any = None, *args: Any, **kwargs: Any) -> Any:
            begin_s = perf_counter()
            result = original(self, argument, *args, **kwargs)
            took_s = perf_counter() - begin_s
            tokens = getattr(argument, "total_num_scheduled_tokens", None)
            if tokens is None:
                log.write(tag, _us(begin_s), _us(took_s))
            elif tokens:
                log.write(tag, _us(begin_s), _us(took_s), tokens)
            return result

        return call

    return make


_SCHEDULER_HOOKS: dict[str, Callable[[Any, Log], Any]] = {
    "schedule": _schedule,
    "update_from_output": _update,
    "_preempt_request": _preempt,
    "add_request": _add,
    "reset_prefix_cache": _flushed,
    "shutdown": _flushed,
}


# ---- in the worker's process --------------------------------------------------------------------------------------


class WorkerExtension:
    """Methods that vLLM mixes into its worker and calls by `collective_rpc`. They return what msgpack can carry."""

    def llmsim_install(self, folder: str) -> dict[str, Any] | None:
        """On rank 0: start recording, and say what the worker knows. Others: None."""
        worker: Any = self
        if worker.rank != 0:
            return None
        log = Log(Path(folder) / WORKER)
        self._llmsim_log = log
        self._llmsim_gpu: GpuTimes | None = None
        missing = ""
        try:
            self._llmsim_gpu = GpuTimes(worker.model_runner, log)
        except AttributeError as error:
            missing = str(error)
        if worker.vllm_config.parallel_config.world_size > 1:
            self._llmsim_launches()
        else:
            _State.gpu = self._llmsim_gpu
        log.flush()
        return facts(worker) | {"gpu_times": missing or "CUDA events"}

    def _llmsim_launches(self) -> None:
        worker: Any = self
        log, gpu = self._llmsim_log, self._llmsim_gpu
        execute, sample = worker.execute_model, worker.sample_tokens

        def execute_model(step: Any, *args: Any, **kwargs: Any) -> Any:
            begin_s = perf_counter()
            result = execute(step, *args, **kwargs)
            took_s = perf_counter() - begin_s
            if step.total_num_scheduled_tokens:
                log.write("w", _us(begin_s), _us(took_s), step.total_num_scheduled_tokens)
            return result

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            begin_s = perf_counter()
            result = sample(*args, **kwargs)
            log.write("v", _us(begin_s), _us(perf_counter() - begin_s))
            if gpu is not None:
                gpu.read()
            return result

        worker.execute_model, worker.sample_tokens = execute_model, sample_tokens

    def llmsim_flush(self) -> None:
        """All of the steps so far is on disk, their GPU times too."""
        if (log := getattr(self, "_llmsim_log", None)) is not None:
            if self._llmsim_gpu is not None:
                self._llmsim_gpu.finish()
            log.flush()


def facts(worker: Any) -> dict[str, Any]:
    """What engine.json says of the worker; what this version does not tell is left out."""
    import torch

    def gib(value: Any) -> float:
        return round(float(value) / 2**30, 2)

    def attention() -> str:
        name = worker.model_runner.attn_groups[0][0].backend.get_name()
        if name != "FLASH_ATTN":
            return name
        return (
            f"{name} (FlashAttention {import_module('vllm.v1.attention.backends.fa_utils').get_flash_attn_version()})"
        )

    wanted: dict[str, Callable[[], Any]] = {
        "gpu_memory_bytes": lambda: int(torch.cuda.get_device_properties(worker.device).total_memory),
        "torch": lambda: str(torch.__version__),
        "attention": attention,
        "weights_gib": lambda: gib(worker.model_runner.model_memory_usage),
        "kv_cache_gib": lambda: gib(worker.available_kv_cache_memory_bytes),
        "activations_gib": lambda: gib(worker.peak_activation_memory),
        "model_runner": lambda: "v2" if worker.use_v2_model_runner else "v1",
    }
    found = {}
    for key, tell in wanted.items():
        try:
            found[key] = tell()
        except Exception:  # a detail of this version must not end a recording
            continue
    return found


@dataclass
class _Step:
    number: int
    begin: Any
    held: bool
    mode: str = "NONE"
    padded: int = 0
    forward: Any = None
    forward_end: Any = None
    end: Any = None


class GpuTimes:
    """CUDA events around the parts of each step of one model runner (V2 or V1)."""

    def __init__(self, runner: Any, log: Log) -> None:
        """AttributeError, with a line, if the runner lacks a method."""
        self._log = log
        self._waiting: deque[_Step] = deque()  # over for the host, perhaps not for the GPU
        self._last: _Step | None = None
        self._current: _Step | None = None
        self._steps = 0
        self._held: set[str] = set()
        v2 = hasattr(runner, "prepare_inputs")
        points = self._points_v2(runner) if v2 else self._points_v1(runner)
        for owner, name, _ in points:
            if not hasattr(owner, name):
                raise AttributeError(f"not recorded: vllm {vllm_version()} has no {type(owner).__name__}.{name}")
        for owner, name, make in points:
            setattr(owner, name, make(getattr(owner, name)))

    def _points_v2(self, runner: Any) -> list[tuple[Any, str, Callable[[Any], Any]]]:
        def prepare(original: Any) -> Any:
            def prepare_inputs(scheduler_output: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
                self._begin(scheduler_output, batch.cg_mode.name, batch.num_tokens)
                return original(scheduler_output, batch, *args, **kwargs)

            return prepare_inputs

        def connect(original: Any) -> Any:
            def pre_forward(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                self._forward()
                return result

            return pre_forward

        def execute(original: Any) -> Any:
            def execute_model(*args: Any, **kwargs: Any) -> Any:
                self._current = None
                result = original(*args, **kwargs)
                self._forward_end()
                return result

            return execute_model

        connector = getattr(runner, "kv_connector", None)
        return [
            (runner, "prepare_inputs", prepare),
            (connector, "pre_forward", connect),
            (runner, "execute_model", execute),
            (runner, "sample", self._sample),
        ]

    def _points_v1(self, runner: Any) -> list[tuple[Any, str, Callable[[Any], Any]]]:
        def prepare(original: Any) -> Any:
            def _prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                self._begin(scheduler_output)
                return original(scheduler_output, *args, **kwargs)

            return _prepare_inputs

        def pad(original: Any) -> Any:
            def _determine_batch_execution_and_padding(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if self._current is not None:
                    self._current.mode, self._current.padded = result[0].name, result[1].num_tokens
                return result

            return _determine_batch_execution_and_padding

        def forward(original: Any) -> Any:
            def _model_forward(*args: Any, **kwargs: Any) -> Any:
                self._forward()
                result = original(*args, **kwargs)
                self._forward_end()
                return result

            return _model_forward

        return [
            (runner, "_prepare_inputs", prepare),
            (runner, "_determine_batch_execution_and_padding", pad),
            (runner, "_model_forward", forward),
            (runner, "_sample", self._sample),
        ]

    def _sample(self, original: Any) -> Any:
        def sample(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            step, self._current = self._current, None
            if step is not None and step.forward_end is not None:
                step.end = self._event()
                self._waiting.append(step)
            return result

        return sample

    def _begin(self, scheduler_output: Any, mode: str = "NONE", padded: int = 0) -> None:
        self._held.update(new.req_id for new in scheduler_output.scheduled_new_reqs if HELD in new.req_id)
        held = any(request_id in scheduler_output.num_scheduled_tokens for request_id in self._held)
        self._held -= set(scheduler_output.finished_req_ids)
        self._current = _Step(self._steps, self._event(), held, mode, padded)
        self._steps += 1

    def _forward(self) -> None:
        step = self._current
        if step is not None and step.forward is None:
            if step.held:
                import torch

                torch.cuda._sleep(HOLD_CYCLES)
            step.forward = self._event()

    def _forward_end(self) -> None:
        if self._current is not None and self._current.forward is not None:
            self._current.forward_end = self._event()

    def _event(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> None:
        """Log the steps that the GPU is through with."""
        while self._waiting and self._waiting[0].end.query():
            step, before = self._waiting.popleft(), self._last
            idle_ms = None if before is None else round(before.end.elapsed_time(step.begin), 4)
            parts = (step.begin, step.forward, step.forward_end, step.end)
            spent_ms = [round(a.elapsed_time(b), 4) for a, b in pairwise(parts)]
            self._log.write("g", step.number, idle_ms, *spent_ms, step.mode, step.padded, int(step.held))
            self._last = step

    def finish(self) -> None:
        if self._waiting:
            self._waiting[-1].end.synchronize()
            self.read()
