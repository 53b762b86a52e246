"""What a real engine did: recordings to replay and compare with.

A recording folder holds engine.json (the settings the engine ran with) and, per scenario, NAME.requests.json.gz (or
.xz, packed with that):

    {"engine"? (file with the settings, if not engine.json),
     "scenario": {"name", "concurrency"?, "hash_block_tokens"?},
     "requests": [{"prompt", "output" (tokens), "submit" (s, when it was sent), "hash_ids"?,
                   "t": [[s, tokens], ...] as the client received them}, ...]}

and may hold decode_grid.json.gz, a list of {"name", "requests"}: batches sent at once to an idle engine, each of which
becomes a scenario.
`hash_ids` name the content of the prompt in blocks of 512 tokens, as in Mooncake traces.

A result of `vllm bench serve` is taken as well (llmsim.benchmark_result).

Measured as vLLM's benchmark does: a gap between tokens is a gap between chunks, so tokens that came together give one.
Requests that did not finish stay in the load and out of the comparison.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmsim.benchmark_result import load_benchmark
from llmsim.cost.graphs import capture_sizes
from llmsim.recorded import (
    GRID,
    LONGEST_S,
    Floats,
    Positive,
    RecordedScenario,
    decoded,
    list_files,
    load_name,
    replayed_files,
)
from llmsim.trace import Trace

HASH_BLOCK_TOKENS = 512
# engine.json key -> Scenario field
SETTINGS = {
    "num_gpu_blocks": "num_gpu_blocks_override",
    "block_size": "block_size",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs",
    "max_model_len": "max_model_len",
    "async_scheduling": "async_scheduling",
    "prefix": "enable_prefix_caching",
    "enable_chunked_prefill": "enable_chunked_prefill",
    "kv_dtype": "kv_cache_dtype",
    "dtype": "dtype",
    "quantization": "quantization",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "tensor_parallel_size": "tensor_parallel",
    "scheduling_policy": "scheduling_policy",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "watermark": "watermark",
    "scheduler_reserve_full_isl": "reserve_full_isl",
}
# keys that describe the machine or follow from the settings
DESCRIPTIONS = (
    "engine", "gpu", "model", "torch", "attention", "cpu", "driver", "date", "recorded", "startup_s", "weights_gib",
    "kv_cache_gib", "graphs_gib", "gpu_memory_bytes", "gpu_memory_mib_nvidia_smi", "model_runner", "cudagraph_mode",
    "cudagraph_capture_sizes", "num_gpu_blocks_override", "activations_gib", "load_format", "recorder", "gpu_times",
    "environment",
)  # fmt: skip
CUDAGRAPH_MODES = {"FULL_AND_PIECEWISE": "full_and_piecewise", "PIECEWISE": "piecewise", "NONE": "none"}


class _Request(msgspec.Struct):
    prompt: Positive
    output: Positive
    t: list[tuple[float, Positive]]
    submit: float | None = None
    hash_ids: list[int | str] | None = None


class _Load(msgspec.Struct):
    name: str = ""
    concurrency: Positive | None = None
    hash_block_tokens: Positive = HASH_BLOCK_TOKENS


class _File(msgspec.Struct):
    requests: list[_Request]
    scenario: _Load = msgspec.field(default_factory=_Load)
    engine: str = "engine.json"


class _Batch(msgspec.Struct):
    name: str
    requests: list[_Request]


def load_recording(path: str | Path) -> list[RecordedScenario]:
    """All scenarios of a recording folder, of one NAME.requests.json.gz, or of a `vllm bench serve` result."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file() and ".requests.json" not in path.name and load_name(path) != GRID:
        return load_benchmark(path)
    folder = path if path.is_dir() else path.parent
    files = replayed_files(path) if path.is_dir() else [path]
    if not files:
        inside = ", ".join(sorted(p.parent.name for p in folder.glob("*/engine.json"))) or "none"
        raise ValueError(f"{folder}: no NAME.requests.json.gz in it; give a recording folder (inside it: {inside})")
    others = [file for file in list_files(path) if file not in files] if path.is_dir() else []
    skipped = tuple(f"{other}: batches for fitting, not replayed: skipped" for other in others)
    scenarios: list[RecordedScenario] = []
    for file in files:
        if load_name(file) == GRID:
            engine = _engine(folder / "engine.json", skipped)
            for batch in decoded(file, list[_Batch]):
                scenarios.append(_scenario(file, batch.name, batch.requests, _Load(), *engine))
        else:
            held: _File = decoded(file, _File)
            name = held.scenario.name or load_name(file)
            engine = _engine(folder / held.engine, skipped)
            scenarios.append(_scenario(file, name, held.requests, held.scenario, *engine))
    return scenarios


def _engine(path: Path, skipped: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    settings, engine, notes = read_settings(path)
    return settings, engine, skipped + notes


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(Scenario fields, the file as it is, notes on what was not used) of an engine.json."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; without the engine's settings its run cannot be repeated")
    engine: dict[str, Any] = decoded(path, dict[str, Any])
    settings = {field: engine[key] for key, field in SETTINGS.items() if engine.get(key) is not None}
    notes = [f"{path}: {key} is not used" for key in engine if key not in SETTINGS and key not in DESCRIPTIONS]
    if "cudagraph_mode" in engine:
        mode = str(engine["cudagraph_mode"]).rpartition(".")[2].upper()
        if mode not in CUDAGRAPH_MODES:
            known = ", ".join(CUDAGRAPH_MODES)
            raise ValueError(f"{path}: cudagraph_mode={mode!r} is not modelled; only {known} are")
        settings["cudagraph"] = CUDAGRAPH_MODES[mode]
    sizes = engine.get("cudagraph_capture_sizes")
    if sizes is not None and not (isinstance(sizes, list) and all(type(size) is int for size in sizes)):
        raise ValueError(f"{path}: cudagraph_capture_sizes={sizes!r} is not a list of whole numbers")
    for field in ("max_num_seqs", "max_num_batched_tokens"):
        if type(settings.get(field, 1)) is not int:
            raise ValueError(f"{path}: {field}={settings[field]!r} is not a whole number")
    if sizes and "max_num_seqs" in settings and "max_num_batched_tokens" in settings:
        modelled = capture_sizes(settings["max_num_seqs"], settings["max_num_batched_tokens"])
        if tuple(sizes) != modelled:
            notes.append(
                f"{path}: cudagraph_capture_sizes ({len(sizes)}, to {max(sizes)}) are not vLLM's for these limits; "
                f"those are replayed ({len(modelled)}, to {modelled[-1] if modelled else 0})"
            )
    return settings, engine, tuple(notes)


def _scenario(
    file: Path,
    name: str,
    requests: list[_Request],
    load: _Load,
    settings: dict[str, Any],
    engine: dict[str, Any],
    notes: tuple[str, ...],
) -> RecordedScenario:
    sent = sorted((r for r in requests if r.submit is not None), key=lambda r: r.submit or 0.0)
    if not sent:
        raise ValueError(f"{file}: scenario {name} has no request that was sent (`submit`); record it again")
    for index, request in enumerate(requests):
        _check_request(f"{file}: scenario {name}, request {index}", request)
    submit_s = np.array([r.submit for r in sent], dtype=np.float64)
    finished = np.array([sum(n for _, n in r.t) == r.output for r in sent], dtype=bool)
    first_s = np.array([r.t[0][0] if r.t else np.nan for r in sent])
    last_s = np.array([r.t[-1][0] if r.t else np.nan for r in sent])
    unsent, unfinished = len(requests) - len(sent), int((~finished).sum())
    if unsent:
        notes += (f"{name}: {unsent} of {len(requests)} requests were never sent: left out",)
    if unfinished:
        notes += (f"{name}: {unfinished} of {len(sent)} requests did not finish: replayed, not compared",)
    if unfinished == len(sent):
        raise ValueError(f"{file}: scenario {name}: none of its {len(sent)} requests finished; record it again")
    return RecordedScenario(
        name=name,
        trace=_trace(name, sent, submit_s, load),
        concurrency=load.concurrency,
        settings=settings,
        engine=engine,
        finished=finished,
        ttft_s=np.where(finished, first_s - submit_s, np.nan),
        e2el_s=np.where(finished, last_s - submit_s, np.nan),
        gaps_s=[_gaps_s(r) if whole else np.zeros(0) for r, whole in zip(sent, finished, strict=True)],
        duration_s=float(last_s[finished].max() - submit_s.min()),
        notes=notes,
    )


def _gaps_s(request: _Request) -> Floats:
    gaps_s: Floats = np.diff(np.array([t for t, _ in request.t], dtype=np.float64))
    return gaps_s


def _check_request(where: str, request: _Request) -> None:
    times_s = [t for t, _ in request.t]
    if sum(n for _, n in request.t) > request.output:
        raise ValueError(f"{where}: t holds more tokens than output={request.output}; the recording is damaged")
    if request.submit is None and times_s:
        raise ValueError(f"{where}: received tokens but has no submit; the recording is damaged")
    if any(later < sooner for sooner, later in zip([request.submit or 0.0, *times_s], times_s, strict=False)):
        raise ValueError(f"{where}: its times run backwards (submit={request.submit}); the recording is damaged")
    if any(abs(time_s) > LONGEST_S for time_s in (request.submit or 0.0, *times_s)):
        raise ValueError(f"{where}: a time beyond {LONGEST_S:.0e} s; the recording is damaged")


def _trace(name: str, sent: list[_Request], submit_s: Floats, load: _Load) -> Trace:
    arrival_s = submit_s - submit_s[0]
    if load.concurrency is not None:
        # Later requests were sent when a slot came free: that instant is the simulation's to find.
        arrival_s = np.minimum(arrival_s, arrival_s[min(load.concurrency, arrival_s.size) - 1])
    block_ids: list[tuple[Hashable, ...]] | None = None
    if any(r.hash_ids for r in sent):
        block_ids = [_block_ids(row, request, load.hash_block_tokens) for row, request in enumerate(sent)]
    return Trace(
        name=name,
        arrival_s=arrival_s,
        prompt_tokens=np.array([r.prompt for r in sent], dtype=np.int64),
        output_tokens=np.array([r.output for r in sent], dtype=np.int64),
        block_tokens=load.hash_block_tokens if block_ids else 0,
        block_ids=block_ids,
    )


def _block_ids(row: int, request: _Request, block_tokens: int) -> tuple[Hashable, ...]:
    """An id per block of the prompt; what the recording does not name was drawn at random, so nobody shares it."""
    blocks = -(-request.prompt // block_tokens)
    ids: tuple[Hashable, ...] = tuple(request.hash_ids or ())[:blocks]
    return ids + tuple(("own", row, block) for block in range(len(ids), blocks))
