"""One engine under a plan: start it, serve the loads one after the other, write the folder.

The engine runs in processes forked from this one (so that `hooks` are in them): nothing here may start CUDA. Whatever
ends a recording early (the time limit, Ctrl-C, SIGTERM, an engine that dies), what was served so far is written.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from calibration.record import hooks
from calibration.record.client import Client
from calibration.record.export import Exporter, Served, dumped, put
from calibration.record.plans import Plan, fitting
from calibration.record.setup import cpu_text, gpu_text, model_config, nvidia_smi, recorder_version, vocabulary

# Set unless the caller's environment has them. The last two keep NVLink multicast off.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
RAW = "raw"
LAST_WORD_S = 10.0  # for the engine's answer to a call between scenarios

Say = Callable[[str], None]


@dataclass
class Recorded:
    out: Path
    scenarios: list[str]
    cause: str = ""  # why it ended before the plan was through


def record(
    plan: Plan,
    out: Path,
    *,
    weights: Path | None = None,
    gpu: str | None = None,
    time_limit_s: float = inf,
    keep_raw: bool = False,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> Recorded:
    """`weights`: a real checkpoint's folder; else random ones. `time_limit_s`: from when the engine is up."""
    if (out / "engine.json").exists():
        raise ValueError(f"{out}: holds a recording already. Give another --out, or remove it")
    config, model = model_config(str(weights) if weights else plan.model)
    if weights:
        model = f"{model_config(plan.model)[1]}, weights of {weights.name}"
    else:
        model = f"{model} architecture, random weights"
    machine = nvidia_smi()
    gpus = int(plan.engine.get("tensor_parallel_size", 1))
    if gpus > machine["gpus"]:
        raise ValueError(f"tensor_parallel_size={gpus}: this machine has {machine['gpus']} GPUs")
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    about = {
        "engine": f"vllm {hooks.vllm_version()}",
        "gpu": gpu_text(machine["name"], gpu),
        "gpu_memory_mib_nvidia_smi": machine["memory_mib"],
        "driver": machine["driver"],
        "cpu": cpu_text(),
        "model": model,
        "recorded": datetime.now(UTC).date().isoformat(),
        "recorder": recorder_version(),
        "environment": {
            key: os.environ[key]
            for key in sorted(os.environ)
            if key.startswith(("VLLM_", "NCCL_")) and not re.search("KEY|TOKEN|SECRET", key)
        },
    }
    raw = out.resolve() / RAW
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    try:
        if hooks.vllm_version() not in hooks.SUPPORTED:
            say(f"vllm {hooks.vllm_version()}: the recorder is made for {', '.join(hooks.SUPPORTED)}; trying")
        hooks.install(raw)
        session = _Session(plan, out, raw, about, vocabulary(config), time_limit_s, say)
        return asyncio.run(session.run(_engine_arguments(plan.engine, weights or _random_model(raw, config), weights)))
    finally:
        if not keep_raw:
            shutil.rmtree(raw, ignore_errors=True)
        with suppress(OSError):  # it holds something
            out.rmdir()


def _random_model(raw: Path, config: dict[str, Any]) -> Path:
    folder = raw / "model"
    folder.mkdir()
    put(folder / "config.json", dumped(config))
    return folder


def _engine_arguments(given: dict[str, Any], model: Path, weights: Path | None) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in fields(AsyncEngineArgs)]
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ValueError(f"engine option {key!r}: vllm has none of that name" + (f"; {close[0]}?" if close else ""))
    fixed = {"model": str(model), "skip_tokenizer_init": True, "worker_extension_cls": hooks.EXTENSION}
    return AsyncEngineArgs(**{"load_format": "auto" if weights else "dummy"} | given | fixed)


class _Session:
    def __init__(
        self, plan: Plan, out: Path, raw: Path, about: dict[str, Any], vocab: int, time_limit_s: float, say: Say
    ) -> None:
        self._plan, self._out, self._raw, self._about = plan, out, raw, about
        self._vocab, self._time_limit_s, self._say = vocab, time_limit_s, say
        self._exporter = Exporter(out, raw)
        self._signalled = ""

    async def run(self, arguments: Any) -> Recorded:
        from vllm.v1.engine.async_llm import AsyncLLM

        began_s = perf_counter()
        self._say(f"starting {self._about['engine']}: {self._about['model']}, on {self._about['gpu']}")
        try:
            engine = AsyncLLM.from_engine_args(arguments)
        except Exception as error:
            raise ValueError(f"vllm did not start: {_short(error)}. Its own log above says more") from None
        stop = asyncio.Event()
        with _signals(stop, self):
            try:
                settings = await self._settings(engine, arguments, perf_counter() - began_s)
                put(self._out / "engine.json", _indented(settings))
                self._say(
                    f"engine up after {settings['startup_s']:.0f} s: {settings['num_gpu_blocks']} KV blocks, "
                    f"model runner {settings.get('model_runner', 'unknown')}, GPU times: {settings['gpu_times']}"
                )
                return await self._serve(engine, stop, settings)
            finally:
                with suppress(Exception):
                    engine.shutdown()

    async def _settings(self, engine: Any, arguments: Any, startup_s: float) -> dict[str, Any]:
        await self._between(engine)
        if not (self._raw / hooks.STEPS).is_file():
            raise ValueError(
                "vllm started its engine without the recorder's hooks: by spawn, not fork, because CUDA runs in this "
                "process already or VLLM_WORKER_MULTIPROC_METHOD says so"
            )
        told = await engine.collective_rpc("llmsim_install", args=(str(self._raw),))
        config = engine.vllm_config
        cache, scheduler, compilation = config.cache_config, config.scheduler_config, config.compilation_config
        settings = {
            "startup_s": round(startup_s, 1),
            "num_gpu_blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
            "num_gpu_blocks_override": self._plan.engine.get("num_gpu_blocks_override"),
            "gpu_memory_utilization": cache.gpu_memory_utilization,
            "prefix": cache.enable_prefix_caching,
            "kv_dtype": str(cache.cache_dtype),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": config.model_config.quantization,
            "max_model_len": config.model_config.max_model_len,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "async_scheduling": bool(scheduler.async_scheduling),
            "enable_chunked_prefill": scheduler.enable_chunked_prefill,
            "scheduling_policy": str(scheduler.policy),
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
            "watermark": scheduler.watermark,
            "scheduler_reserve_full_isl": scheduler.scheduler_reserve_full_isl,
            "cudagraph_mode": str(compilation.cudagraph_mode).rpartition(".")[2],
            "cudagraph_capture_sizes": sorted(compilation.cudagraph_capture_sizes or []),
            "load_format": arguments.load_format,
        }
        worker = next(facts for facts in told if facts)
        return settings | worker | self._about

    async def _serve(self, engine: Any, stop: asyncio.Event, settings: dict[str, Any]) -> Recorded:
        client = Client(_generator(engine), self._vocab, self._plan.seed, stop, self._say)
        end_s = perf_counter() + self._time_limit_s
        done: list[str] = []
        cause = ""
        for load in self._plan.loads:
            if cause := self._ended(engine, end_s):
                break
            part, note = fitting(load, settings["max_model_len"], settings["max_num_seqs"])
            if note:
                self._say(note)
            if part is None:
                continue
            served = await client.serve(part, end_s - perf_counter())
            if engine.errored:
                await asyncio.sleep(1.0)  # its processes write the rest of their logs as they end
            else:
                await self._between(engine, worker=True)
            took_s = perf_counter() - served.start_s
            if problem := self._exporter.add(served):
                self._say(problem)
            elif served.keep:
                done.append(served.name)
            self._say(_summary(served, took_s))
        cause = cause or self._ended(engine, end_s)
        left_out = [load.name for load in self._plan.loads if load.keep and load.name not in done]
        if cause and left_out:
            self._say(f"{cause}; not recorded: {', '.join(left_out)}")
        return Recorded(self._out, done, cause)

    def _ended(self, engine: Any, end_s: float) -> str:
        if self._signalled:
            return f"stopped by {self._signalled}"
        if engine.errored:
            return "the engine died, its own log says why"
        return f"the time limit of {self._time_limit_s:g} s is reached" if perf_counter() > end_s else ""

    async def _between(self, engine: Any, worker: bool = False) -> None:
        """Empties the prefix cache and completes the logs on disk."""
        try:
            await asyncio.wait_for(engine.reset_prefix_cache(), LAST_WORD_S)
            if worker:
                await asyncio.wait_for(engine.collective_rpc("llmsim_flush"), LAST_WORD_S)
        except Exception as error:
            if not engine.errored:
                self._say(f"the engine did not answer between scenarios: {_short(error)}")

    def signalled(self, name: str) -> None:
        self._signalled = name


class _signals:  # noqa: N801
    """SIGINT and SIGTERM end the scenario that runs; a second one ends the program."""

    def __init__(self, stop: asyncio.Event, session: _Session) -> None:
        self._stop, self._session = stop, session
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
                self._loop.add_signal_handler(number, self._first, number)

    def _first(self, number: signal.Signals) -> None:
        self._session.signalled(signal.Signals(number).name)
        self._stop.set()
        self._remove()

    def _remove(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError, RuntimeError, ValueError):  # where none could be added
                self._loop.remove_signal_handler(number)

    def __exit__(self, *error: object) -> None:
        self._remove()


def _generator(engine: Any) -> Callable[..., AsyncIterator[tuple[int, int | None]]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def generate(
        prompt: list[int], output_tokens: int, request_id: str, priority: int = 0
    ) -> AsyncIterator[tuple[int, int | None]]:
        wanted = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        stream = engine.generate({"prompt_token_ids": prompt}, wanted, request_id, priority=priority)
        async for answer in stream:
            yield len(answer.outputs[0].token_ids), answer.num_cached_tokens

    return generate


def _summary(served: Served, took_s: float) -> str:
    ttft_ms = [1e3 * (row["t"][0][0] - row["submit"]) for row in served.requests if row["t"]]
    first = f", TTFT p50 {np.median(ttft_ms):.1f} ms" if ttft_ms else ""
    tokens = sum(count for row in served.requests for _, count in row["t"])
    errors = f", errors: {'; '.join(served.errors)}" if served.errors else ""
    unfinished = f", {served.unfinished} unfinished" if served.unfinished else ""
    return f"{served.name}: {len(served.requests)} requests{unfinished}, {took_s:.1f} s, {tokens} tokens{first}{errors}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _indented(settings: dict[str, Any]) -> str:
    """A line a key: lists of capture sizes stay short."""
    lines = [f" {dumped(key)}: {dumped(value)}" for key, value in settings.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
