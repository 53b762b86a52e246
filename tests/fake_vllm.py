"""Stand-ins for the parts of vLLM 0.25.1 and torch that the recorder uses: an engine that takes a millisecond a step.

Asynchronous scheduling with two batches in flight, chunked prefill, no KV limit. `Engine` holds what a test may change.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter, sleep
from types import ModuleType, SimpleNamespace
from typing import Any

STEP_S = 0.001


@dataclass
class Engine:
    """How the fake behaves."""

    runner: str = "v2"
    fail_start: str = ""
    die_after: int = 10**9  # steps
    preempt: str = ""  # id of a request to preempt once
    prompts: list[tuple[str, list[int]]] = field(default_factory=list)
    remove: tuple[tuple[str, str], ...] = ()  # (class, method) this version lacks


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at_s - self.at_s)


@dataclass
class Request:
    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    answers: asyncio.Queue[Any]
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    promised: int = 0


def modules(engine: Engine) -> dict[str, ModuleType]:
    """A fresh fake package, to be put into sys.modules."""

    class Scheduler:
        def __init__(self, budget: int, most: int) -> None:
            self.requests: dict[str, Request] = {}
            self.running: list[Request] = []
            self.waiting: list[Request] = []
            self.kv_cache_manager = SimpleNamespace(usage=0.25)
            self.budget, self.most = budget, most

        def add_request(self, request: Request) -> None:
            self.requests[request.request_id] = request
            self.waiting.append(request)

        def _preempt_request(self, request: Request, timestamp: float) -> None:
            request.num_computed_tokens = 0

        def schedule(self, throttle_prefills: bool = False) -> Any:
            left, new, scheduled = self.budget, [], {}
            for request in self.running:
                if engine.preempt and engine.preempt in request.request_id and request.num_output_tokens == 2:
                    engine.preempt = ""
                    self._preempt_request(request, 0.0)
                    request.num_computed_tokens = request.num_prompt_tokens + request.num_output_tokens
                left -= self._grant(request, left, scheduled)
            while self.waiting and len(self.running) < self.most and left > 0:
                request = self.waiting.pop(0)
                self.running.append(request)
                new.append(SimpleNamespace(req_id=request.request_id))
                left -= self._grant(request, left, scheduled)
            return SimpleNamespace(
                total_num_scheduled_tokens=sum(scheduled.values()), num_scheduled_tokens=scheduled,
                scheduled_new_reqs=new, finished_req_ids=set(),
            )  # fmt: skip

        def _grant(self, request: Request, left: int, scheduled: dict[str, int]) -> int:
            missing = request.num_prompt_tokens - request.num_computed_tokens
            tokens = min(missing, left) if missing > 0 else min(1, left)
            if tokens <= 0 or request.promised == request.max_tokens:
                return 0
            request.num_computed_tokens += tokens
            request.promised += request.num_computed_tokens >= request.num_prompt_tokens
            scheduled[request.request_id] = tokens
            return tokens

        def update_from_output(self, scheduler_output: Any, output: Any) -> None:
            for request_id in output:
                request = self.requests.get(request_id)
                if request is None:
                    continue
                request.num_output_tokens += 1
                request.answers.put_nowait(1)
                if request.num_output_tokens == request.max_tokens:
                    self.drop(request)

        def drop(self, request: Request) -> None:
            self.requests.pop(request.request_id, None)
            self.running = [other for other in self.running if other is not request]
            self.waiting = [other for other in self.waiting if other is not request]

        def reset_prefix_cache(self, *_: Any) -> bool:
            return True

        def shutdown(self) -> None:
            pass

    class Runner:
        """Model runner V2."""

        def __init__(self) -> None:
            self.kv_connector = SimpleNamespace(pre_forward=lambda step: None)
            backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
            self.attn_groups = [[SimpleNamespace(backend=backend)]]
            self.model_memory_usage = 15 * 2**30

        def prepare_inputs(self, step: Any, batch: Any) -> None:
            pass

        def execute_model(self, step: Any) -> None:
            mode = "NONE" if step.total_num_scheduled_tokens > 512 else "FULL"
            tokens = step.total_num_scheduled_tokens
            if tokens:
                self.prepare_inputs(step, SimpleNamespace(cg_mode=SimpleNamespace(name=mode), num_tokens=tokens))
                self.kv_connector.pre_forward(step)

        def sample(self) -> None:
            pass

        def sample_tokens(self) -> None:
            self.sample()

    class RunnerV1(Runner):
        prepare_inputs = property()  # V1 has none

        def _prepare_inputs(self, step: Any) -> None:
            pass

        def _determine_batch_execution_and_padding(self, tokens: int) -> Any:
            return SimpleNamespace(name="PIECEWISE"), SimpleNamespace(num_tokens=tokens)

        def _model_forward(self) -> None:
            pass

        def _sample(self) -> None:
            pass

        def execute_model(self, step: Any) -> None:
            if step.total_num_scheduled_tokens:
                self._prepare_inputs(step)
                self._determine_batch_execution_and_padding(step.total_num_scheduled_tokens)
                self._model_forward()

        def sample_tokens(self) -> None:
            self._sample()

    class Worker:
        def __init__(self, rank: int, config: Any) -> None:
            self.rank, self.vllm_config, self.device = rank, config, "cuda:0"
            self.model_runner = Runner() if engine.runner == "v2" else RunnerV1()
            self.use_v2_model_runner = engine.runner == "v2"
            self.available_kv_cache_memory_bytes = 100 * 2**30

        def execute_model(self, step: Any) -> None:
            self.model_runner.execute_model(step)

        def sample_tokens(self, grammar: Any) -> None:
            self.model_runner.sample_tokens()

    class Executor:
        def __init__(self, config: Any, extension: type) -> None:
            kind = type("Worker", (Worker, extension), {})
            self.workers = [kind(rank, config) for rank in range(config.parallel_config.world_size)]

        def _all(self, method: str, argument: Any) -> None:
            for worker in self.workers:
                getattr(worker, method)(argument)

    class UniProcExecutor(Executor):
        def execute_model(self, scheduler_output: Any, non_block: bool = False) -> None:
            self._all("execute_model", scheduler_output)

        def sample_tokens(self, grammar: Any, non_block: bool = False) -> None:
            self._all("sample_tokens", grammar)

    class MultiprocExecutor(Executor):
        def execute_model(self, scheduler_output: Any, non_block: bool = False) -> None:
            self._all("execute_model", scheduler_output)

        def sample_tokens(self, grammar: Any, non_block: bool = False) -> None:
            self._all("sample_tokens", grammar)

    @dataclass
    class AsyncEngineArgs:
        model: str
        load_format: str = "auto"
        skip_tokenizer_init: bool = False
        worker_extension_cls: str = ""
        tensor_parallel_size: int = 1
        max_num_seqs: int = 256
        max_num_batched_tokens: int = 8192
        max_model_len: int | None = None
        quantization: str | None = None
        enforce_eager: bool = False
        num_gpu_blocks_override: int | None = None

    class AsyncLLM:
        @classmethod
        def from_engine_args(cls, args: Any) -> AsyncLLM:
            if engine.fail_start:
                raise RuntimeError(engine.fail_start)
            return cls(args)

        def __init__(self, args: Any) -> None:
            parallel = SimpleNamespace(
                tensor_parallel_size=args.tensor_parallel_size, world_size=args.tensor_parallel_size
            )
            self.vllm_config = SimpleNamespace(
                cache_config=SimpleNamespace(
                    num_gpu_blocks=args.num_gpu_blocks_override or 56057, block_size=16, gpu_memory_utilization=0.9,
                    enable_prefix_caching=True, cache_dtype="auto",
                ),
                scheduler_config=SimpleNamespace(
                    max_num_batched_tokens=args.max_num_batched_tokens, max_num_seqs=args.max_num_seqs,
                    async_scheduling=True, enable_chunked_prefill=True, policy="fcfs", long_prefill_token_threshold=0,
                    watermark=0.0, scheduler_reserve_full_isl=True,
                ),
                model_config=SimpleNamespace(
                    dtype="torch.bfloat16", quantization=args.quantization, max_model_len=args.max_model_len or 131072
                ),
                parallel_config=parallel,
                compilation_config=SimpleNamespace(
                    cudagraph_mode="CUDAGraphMode.FULL_AND_PIECEWISE",
                    cudagraph_capture_sizes=[1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)],
                ),
            )  # fmt: skip
            module, _, name = args.worker_extension_cls.rpartition(".")
            extension = getattr(import_module(module), name)
            executor = UniProcExecutor if parallel.world_size == 1 else MultiprocExecutor
            self.executor = executor(self.vllm_config, extension)
            self.scheduler = Scheduler(args.max_num_batched_tokens, args.max_num_seqs)
            self.errored, self.steps = False, 0
            self.wake = asyncio.Event()
            self.loop = asyncio.get_running_loop().create_task(self._loop())

        async def _loop(self) -> None:
            queue: list[tuple[Any, list[str]]] = []
            while True:
                if not self.scheduler.requests and not queue:
                    self.wake.clear()
                    await self.wake.wait()
                if self.scheduler.requests:
                    step = self.scheduler.schedule(False)
                    self.executor.execute_model(step, non_block=True)
                    tokens = step.total_num_scheduled_tokens
                    output = [key for key in step.num_scheduled_tokens if self._yields(key)]
                    if tokens:
                        self.executor.sample_tokens(None, non_block=True)
                        self.steps += 1
                    queue.append((step, output))
                    if len(queue) < 2 and tokens:
                        await asyncio.sleep(0)
                        continue
                await asyncio.sleep(STEP_S)
                if self.steps > engine.die_after:
                    self.errored = True
                    for request in self.scheduler.requests.values():
                        request.answers.put_nowait(RuntimeError("EngineCore encountered an issue"))
                    return
                if queue:
                    step, output = queue.pop(0)
                    self.scheduler.update_from_output(step, output)

        def _yields(self, request_id: str) -> bool:
            request = self.scheduler.requests[request_id]
            return request.num_computed_tokens >= request.num_prompt_tokens

        async def generate(self, prompt: Any, params: Any, request_id: str, *, priority: int = 0) -> Any:
            if self.errored:
                raise RuntimeError("EngineCore is dead")
            ids = prompt["prompt_token_ids"]
            if len(ids) == 666:
                raise ValueError("this prompt\nis refused")
            engine.prompts.append((request_id, ids))
            request = Request(f"{request_id}-0a1b2c3d", len(ids), params.max_tokens, asyncio.Queue())
            self.scheduler.add_request(request)
            self.wake.set()
            try:
                for _ in range(params.max_tokens):
                    answer = await request.answers.get()
                    if isinstance(answer, Exception):
                        raise answer
                    yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])], num_cached_tokens=0)
            finally:
                self.scheduler.drop(request)

        async def reset_prefix_cache(self) -> bool:
            return self.scheduler.reset_prefix_cache()

        async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            return [getattr(worker, method)(*args) for worker in self.executor.workers]

        def shutdown(self) -> None:
            self.loop.cancel()

    class SamplingParams:
        def __init__(self, **given: Any) -> None:
            assert given["ignore_eos"] and given["min_tokens"] == given["max_tokens"]
            self.max_tokens = given["max_tokens"]

    made = {
        "vllm": {"__version__": "0.25.1", "SamplingParams": SamplingParams},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=1)},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.core.sched.scheduler": {"Scheduler": Scheduler},
        "vllm.v1.executor.uniproc_executor": {"UniProcExecutor": UniProcExecutor},
        "vllm.v1.executor.multiproc_executor": {"MultiprocExecutor": MultiprocExecutor},
        "vllm.v1.attention.backends.fa_utils": {"get_flash_attn_version": lambda: 3},
        "torch": {
            "__version__": "2.11.0+cu130",
            "cuda": SimpleNamespace(
                Event=Event, _sleep=lambda cycles: sleep(0.002),
                get_device_properties=lambda device: SimpleNamespace(total_memory=150109880320),
            ),
        },
    }  # fmt: skip
    for name, method in engine.remove:
        delattr({"Scheduler": Scheduler, "UniProcExecutor": UniProcExecutor, "Runner": Runner}[name], method)
    packages: dict[str, ModuleType] = {}
    for name, content in made.items():
        for depth in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:depth])
            packages.setdefault(parent, ModuleType(parent)).__path__ = []  # type: ignore[attr-defined]
        vars(packages[name]).update(content)
    return packages


def install(monkeypatch: Any, engine: Engine) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules(engine).items():
        monkeypatch.setitem(sys.modules, name, module)
