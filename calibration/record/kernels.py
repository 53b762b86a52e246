"""What a real engine's own kernels take between matrix products and attention: torch's profiler around steps of vLLM.

Norms, RoPE and activation of a compiled model are kernels that the compiler made, which run nowhere else, and find in
the cache what the kernel before them wrote. So they are read off the engine's steps: prompts alone (1,024 to 8,192
tokens) and decodes alone (1 to 128), random weights, CUDA graphs as vLLM uses them. On an H200 RoPE takes 0.7 of what
vLLM's own kernel takes alone, the activation 0.85 to 0.95.

    add_rms_norm   kernels named ..fused_add_rms_norm..; the compiler makes two, of different bytes: their mean
    norm_add_norm  ..fused_add_rms_norm_rms_norm.. of models that normalise behind their blocks too
    silu_mul       ..mul_silu.. or ..gelu_mul..
    kv_write       reshape_and_cache_flash
    rope           the one other kernel of the compiler that every layer runs; not where query and key are normalised,
                   which it fuses with that

A kernel counts for a step that runs it in (nearly) every layer: the first and last layer's are fused with what lies
outside. A step begins where FlashAttention 3 prepares its schedule: once a step, or, where only some layers slide, in
each layer.

`python -m calibration trace --model llama-3.1-8b --out engine.parquet` needs vllm, a GPU and two minutes a model.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from calibration.measure.elementwise import least_bytes, shapes
from calibration.measure.points import Point
from calibration.measure.rows import Row
from calibration.record.setup import model_config, nvidia_smi
from llmsim.hardware import find_model
from llmsim.model import Model

VARIANT, LAUNCH = "vllm_compiled", "engine"
STEP_BEGINS, ATTENTION = "prepare_varlen_num_blocks", "FlashAttnFwdSm90"
NAMES = (
    ("norm_add_norm", re.compile("fused_add_rms_norm_rms_norm")),
    ("add_rms_norm", re.compile("fused_add_rms_norm")),
    ("silu_mul", re.compile("mul_silu|silu_and_mul|gelu_mul")),
    ("kv_write", re.compile("reshape_and_cache")),
    ("rope", re.compile("^triton_poi")),
)
FUSED_ELSEWHERE = 2  # layers of a kernel that are another one: the first's and the last's
LONGEST_DECODE_KERNEL_S = 800e-6  # steps with a longer kernel are the prompts before the decodes
TOKEN_LIMIT = 8192


class Case(NamedTuple):
    """`requests` prompts of `prompt` tokens, `outputs` each, `times` over; `tokens`: rows of the steps that count."""

    name: str
    requests: int
    prompt: int
    outputs: int
    times: int
    tokens: int


CASES = (
    *(Case(f"prefill_{n}x1024", n, 1024, 1, times, 1024 * n) for n, times in ((1, 6), (2, 3), (4, 3), (8, 3))),
    *(Case(f"decode_{n}", n, 512, 24, 1, n) for n in (1, 8, 32, 128)),
)


class Kernel(NamedTuple):
    name: str
    begin_s: float
    seconds: float


def steps_of(kernels: Sequence[Kernel], layers: int) -> Iterator[list[Kernel]]:
    """Of each step its kernels; ValueError where the engine does not run FlashAttention 3."""
    begins, attended = [], layers
    for i, kernel in enumerate(kernels):
        if STEP_BEGINS in kernel.name and attended >= layers:
            begins.append(i)
            attended = 0
        attended += ATTENTION in kernel.name
    if not begins:
        raise ValueError(f"no kernel {STEP_BEGINS}: steps are told by it. Trace on a Hopper GPU, attention by FA3")
    for begin, end in zip(begins, [*begins[1:], len(kernels)], strict=True):
        yield list(kernels[begin:end])


def seconds_of(step: Sequence[Kernel], model: Model) -> dict[str, float]:
    """Seconds of each operation in one layer of a step."""
    runs: dict[str, list[float]] = defaultdict(list)
    for kernel in step:
        runs[kernel.name].append(kernel.seconds)
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, seconds in runs.items():
        if len(seconds) >= model.layers - FUSED_ELSEWHERE:
            op = next((op for op, pattern in NAMES if pattern.search(name)), None)
            if op:
                kinds[op].append(fmean(seconds))
    if model.qk_norm or len(kinds["rope"]) != 1:
        kinds.pop("rope", None)
    return {op: fmean(seconds) for op, seconds in kinds.items()}


def rows_of(traced: Sequence[tuple[Case, Sequence[Kernel]]], model: Model, measured_at: str | None) -> list[Row]:
    """Medians over the steps of each case."""
    widths = dict(shapes(model, 1))
    rows = []
    for case, kernels in traced:
        found: dict[str, list[float]] = defaultdict(list)
        for step in steps_of(kernels, model.layers):
            if case.outputs > 1 and max(kernel.seconds for kernel in step) > LONGEST_DECODE_KERNEL_S:
                continue
            for op, seconds in seconds_of(step, model).items():
                found[op].append(seconds)
        for op, steps_s in sorted(found.items()):
            kv_dtype = "bfloat16" if op == "kv_write" else None
            point = Point.of(op, VARIANT, LAUNCH, dtype="bfloat16", kv_dtype=kv_dtype, tokens=case.tokens, **widths[op])
            rows.append(
                Row(
                    op, VARIANT, LAUNCH, median(steps_s), dtype="bfloat16", kv_dtype=kv_dtype, model=model.name,
                    tokens=case.tokens, **widths[op], bytes=least_bytes(point), repeats=len(steps_s),
                    p10_s=min(steps_s), p90_s=max(steps_s), measured_at=measured_at,
                )
            )  # fmt: skip
    return rows


def trace(model_name: str, engine: dict[str, Any], say: Callable[[str], None]) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one model and where they are from; starts vLLM in this process."""
    about = nvidia_smi()
    config, _ = model_config(model_name)
    model = find_model(model_name)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    try:
        from vllm import LLM, SamplingParams, __version__
    except ImportError as error:
        raise ValueError(f"vllm cannot be imported ({error}). Install it: pip install 'llmsim[vllm]'") from None
    import torch
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        fixed = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}
        llm = LLM(**{"max_num_batched_tokens": TOKEN_LIMIT, "max_model_len": TOKEN_LIMIT} | engine | fixed)
        generator = torch.Generator().manual_seed(0)

        def run(case: Case) -> None:
            ids = torch.randint(10, config["vocab_size"] - 10, (case.requests, case.prompt), generator=generator)
            prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
            sampling = SamplingParams(max_tokens=case.outputs, ignore_eos=True, temperature=0.0, detokenize=False)
            llm.generate(prompts, sampling, use_tqdm=False)

        traced = []
        for case in CASES:
            run(case)
            run(case)
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(case.times):
                    run(case)
                torch.cuda.synchronize()
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            traced.append((case, kernels_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])))
            say(f"{case.name}: {len(traced[-1][1])} kernels")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    about |= {"engine": f"vllm {__version__}", "torch": torch.__version__, "model": model.name, "date": now}
    return rows_of(traced, model, now), about


def kernels_of(events: Sequence[dict[str, Any]]) -> list[Kernel]:
    """Of a Chrome trace, in the order they began."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    found = [Kernel(event["name"], event["ts"] * 1e-6, event["dur"] * 1e-6) for event in kernels]
    return sorted(found, key=lambda kernel: kernel.begin_s)
