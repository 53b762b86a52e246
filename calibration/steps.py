"""Read recordings of a real engine: what each step did, and when host and GPU were done with it.

Files that end in .gz may be packed with xz instead, under that ending, or not at all.

A recording is a folder with `engine.json` (settings of the engine), `NAME.requests.json.gz` (what the client saw) and
`NAME.steps.jsonl.gz` (what the scheduler did), or `NAME.json.gz` with a list of small scenarios that hold both. Lines
of the step log, all times in seconds on one clock:

    ["s", t, dt, tokens, decodes, decode_context, [[new, computed], ...], running, waiting, kv_usage]   schedule
    ["e", t]            an empty schedule          ["x", t, dt, tokens]   launch of the step just scheduled
    ["u", t, dt, ...]   update of the oldest step  ["y", t, dt]           its sampling; the launch ends with it
    ["p", t, computed, outputs]   a preemption
    ["w", t, dt, tokens], ["v", t, dt]   under tensor parallelism, "x" and "y" of the first worker: the launches that
                        count, in order of the steps; "x" and "y" are then only messages to the workers

`NAME.gpu.jsonl.gz` (in a list of scenarios the key `gpu`) may add what CUDA events showed, in milliseconds:
[step, idle before, input preparation, forward pass, LM head and sampling, mode, rows, held].

An update line names no step. The engine keeps a queue of two batches, empty ones included, and updates the oldest; if
empty schedules are logged the pairs follow first in, first out. Otherwise the queue is replayed: between two updates
the engine schedules until two batches are in flight, so where a schedule line is missing there was an empty one.

FileNotFoundError: a file that is not there. ValueError: one that is cut short or holds what no recorder writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

from calibration.contexts import note_contexts
from llmsim.cost import WARM_S, Clocks
from llmsim.cost.basis import pairs_of
from llmsim.cost.graphs import Graphs
from llmsim.recorded import LARGEST, LONGEST_S, list_files, load_files, load_name, packed_file, read_bytes
from llmsim.recording import read_settings

KINDS = ("s", "e", "x", "y", "u", "p", "w", "v")  # of lines of a step log
MOST_OFF = 0.01  # of a step log's tokens, from those of its requests
MOST_GPU_MS = 1e6  # of a step: above it a time is a mistake
# Sooner than this after its schedule no step has a result: the update must be of an older, empty batch.
SOONEST_RESULT_S = 4e-3
# Between two steps in flight the GPU idles this long at most; longer, and it waited for the host.
MOST_IDLE_MS = 0.02
# Preparing inputs keeps the GPU busy this long at most (0.04 to 0.05 ms); longer, and it waited for the host to go on.
MOST_PREPARING_MS = 0.06
# A forward pass that lasts no longer than this beyond its launch was paced by it (launch-bound ones: 0.5 to 2 ms).
LAUNCH_MARGIN_MS = 3.0


@dataclass
class StepRow:
    """One scheduled step. `chunks`: (new, computed before) of prompts; `seqs` decodes with `kv_tokens` of context."""

    schedule_s: float
    schedule_took_s: float
    tokens: int
    seqs: int
    kv_tokens: int
    chunks: list[tuple[int, int]]
    running: int
    waiting: int
    update_s: float = nan
    update_took_s: float = nan
    launch_s: float = nan  # only if the log has "x" lines
    launched_s: float = nan
    after_preemption: bool = False
    warm: bool = False  # has chunks, and the step just before it had some too
    after: StepRow | None = None  # the step just before, if that had chunks and this one has none
    low: float = 0.0  # how far clocks were still down when `after` began
    since_chunk: int = 1_000_000  # decode steps since the last one with chunks, this one included
    gpu_s: float = nan  # timed on the GPU itself, unless the launch paced it
    held: bool = False  # timed after a rest, all of it launched before the GPU began: its clocks are high
    deviation_tokens: float = 0.0  # the decodes' standard deviation of context times `seqs`; 0: not known, or even
    longest_tokens: int = 0  # the longest of their contexts; 0: not known

    @property
    def new_tokens(self) -> int:
        return sum(new for new, _ in self.chunks)

    def read_tokens(self, skew_share: float) -> float:
        """Cached tokens of the decodes, and what uneven contexts cost more or less."""
        return self.kv_tokens + skew_share * self.deviation_tokens

    @property
    def pairs(self) -> float:
        return attention_pairs(self.chunks)


def attention_pairs(chunks: Sequence[tuple[int, int]]) -> float:
    """(query, key) pairs of causal attention: each new token sees what was computed, itself and the new ones before."""
    return sum(pairs_of(new, done) for new, done in chunks)


@dataclass
class RequestRow:
    """What the client saw of one request; `token_s` has one time per token."""

    send_s: float
    prompt_tokens: int
    output_tokens: int
    token_s: list[float]
    cached_tokens: int = 0


@dataclass
class Scenario:
    name: str
    requests: list[RequestRow]
    steps: list[StepRow]
    preemptions: int = 0
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for before, step in pairwise(self.steps):
            recent = step.schedule_s - before.update_s < WARM_S
            step.warm = bool(before.chunks and step.chunks and recent)
            step.after = before if before.chunks and not step.chunks and recent else None
            if before.chunks or recent:
                step.since_chunk = 1 if before.chunks else before.since_chunk + 1
        self._note_clocks()

    def _note_clocks(self) -> None:
        clocks = Clocks()
        for i, step in enumerate(self.steps):
            chunk = step.after
            if chunk is None or chunk.update_s != chunk.update_s:
                continue
            began_s = max(chunk.schedule_s, self.steps[i - 2].update_s if i > 1 else 0.0)
            lasted_s = chunk.gpu_s if chunk.gpu_s == chunk.gpu_s else max(chunk.update_s - began_s, 0.0)
            step.low = clocks.after_chunk(chunk.update_s, lasted_s)


@dataclass
class Recording:
    path: Path
    engine: dict[str, Any]
    scenarios: list[Scenario]
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    timed: list[Scenario] = field(default_factory=list)  # steps timed on the GPU that no client waited for
    loads: list[str] = field(default_factory=list)  # names of the files read

    @property
    def graphs(self) -> Graphs:
        for key in ("cudagraph_capture_sizes", "max_num_seqs"):
            if self.engine.get(key) is None:
                where = self.path / "engine.json"
                raise ValueError(f"{where}: no {key}, so launches are not known. Write what the engine had")
        return Graphs(self.engine["cudagraph_capture_sizes"], self.engine["max_num_seqs"])

    @property
    def waits(self) -> bool:
        """Scheduled synchronously: its steps and launches hold the wait for the results before."""
        return self.engine.get("async_scheduling") is False


def pair_steps(lines: Sequence[Sequence[Any]], gpu: Sequence[Sequence[Any]] = ()) -> list[StepRow]:
    """Scheduled steps in order, each with its own update; a step still in flight at the end is left out.

    `gpu`: lines of NAME.gpu.jsonl.gz, for `StepRow.gpu_s`.
    """
    logged = any(line[0] == "e" for line in lines)
    workers = any(line[0] == "w" for line in lines)
    begun = ended = 0  # steps whose launch a worker has begun, and ended
    queue: list[StepRow | None] = []  # None: an empty batch
    rows: list[StepRow] = []
    current: StepRow | None = None
    since_update, preempted = 0, False
    for line in lines:
        kind = line[0]
        if kind not in KINDS:
            raise ValueError(f"a line of kind {kind!r}, not one of {', '.join(KINDS)}")
        if not all(type(value) in (int, float) for value in line[1:3]) or not (
            abs(line[1]) <= LONGEST_S and 0.0 <= min(line[2:3], default=0.0) <= LONGEST_S
        ):
            raise ValueError(f"a time that is none: {line}")
        if kind == "s":
            current = _row(line)
            current.after_preemption, preempted = preempted, False
            rows.append(current)
            queue.append(current)
            since_update += 1
        elif kind == "e":
            current = None
            queue.append(None)
        elif kind == "x" and current is not None and not workers:
            current.launch_s = line[1]
        elif kind == "y" and current is not None and not workers:
            current.launched_s = line[1] + line[2]
        elif kind == "w" and begun < len(rows):
            rows[begun].launch_s = line[1]
            begun += 1
        elif kind == "v" and ended < len(rows):
            rows[ended].launched_s = line[1] + line[2]
            ended += 1
        elif kind == "p":
            preempted = True
        elif kind == "u":
            if not logged:
                _insert_empty(queue, line[1], since_update)
            done = queue.pop(0) if queue else None
            if done is not None:
                done.update_s, done.update_took_s = line[1], line[2]
            since_update = 0
    for line in gpu:
        if not 0 <= line[0] < len(rows):
            raise ValueError(f"GPU times of step {line[0]}, of {len(rows)}")
        if not all(0.0 <= value <= MOST_GPU_MS for value in (line[1] or 0.0, *line[2:5])):
            raise ValueError(f"GPU times of step {line[0]} below 0 or above {MOST_GPU_MS:.0e} ms: {line[1:5]}")
        _time_on_gpu(rows[line[0]], line)
    return [row for row in rows if row.update_s == row.update_s]


def _time_on_gpu(row: StepRow, line: Sequence[Any]) -> None:
    """A step whose kernels were still being launched while they ran shows the launch, not the GPU."""
    _, idle_ms, prepare_ms, forward_ms, tail_ms, mode, _, held = line
    row.held = bool(held)
    launching_ms = 1e3 * (row.launched_s - row.launch_s)
    if row.held:
        row.gpu_s = 1e-3 * (forward_ms + tail_ms)
    elif mode == "FULL":
        prepare_ms = min(prepare_ms, MOST_PREPARING_MS)
        row.gpu_s = 1e-3 * (min(idle_ms or 0.0, MOST_IDLE_MS) + prepare_ms + forward_ms + tail_ms)
    elif forward_ms > launching_ms + LAUNCH_MARGIN_MS:
        row.gpu_s = 1e-3 * (prepare_ms + forward_ms + tail_ms)


def _row(line: Sequence[Any]) -> StepRow:
    """One-token chunks are counted with the decodes: the engine launches and computes them alike."""
    schedule_s, took_s, tokens, seqs, kv_tokens, prompts, running, waiting = line[1:9]
    counts = (tokens, seqs, kv_tokens, running, waiting, *(n for new, done in prompts for n in (new - 1, done)))
    if not all(type(count) is int and 0 <= count <= LARGEST for count in counts):
        raise ValueError(f"a count that is none: {line}")
    chunks = [(new, done) for new, done in prompts if new > 1]
    tails = [done for new, done in prompts if new == 1]
    seqs, kv_tokens = seqs + len(tails), kv_tokens + sum(tails)
    return StepRow(schedule_s, took_s, tokens, seqs, kv_tokens, chunks, running, waiting)


def _insert_empty(queue: list[StepRow | None], update_s: float, since_update: int) -> None:
    while len(queue) < 2 and any(queue):
        newest = queue[0]
        too_soon = newest is not None and update_s - newest.schedule_s < SOONEST_RESULT_S
        queue.insert(0 if since_update and len(queue) == 1 and too_soon else len(queue), None)


def read_recording(path: Path, names: Sequence[str] | None = None) -> Recording:
    """All scenarios of the folder, or those named."""
    engine_file = path / "engine.json"
    if not engine_file.is_file():
        raise FileNotFoundError(f"{engine_file}: no such file. Name a recording's folder; it holds engine.json")
    _, engine, _ = read_settings(engine_file)
    recording = Recording(path, engine, [])
    recording.files["engine.json"] = _sha256(engine_file)
    present = {load_name(file): file for file in [*list_files(path), *load_files(path)]}
    if not present:
        raise FileNotFoundError(f"{path}: no NAME.requests.json.gz in it. Record a load, or name another folder")
    if missing := [name for name in names or () if name not in present]:
        raise FileNotFoundError(f"{path}: no scenario {', '.join(missing)}. It has {', '.join(sorted(present))}")
    for name, file in sorted(present.items()):
        if names is not None and name not in names:
            continue
        with _damaged(file):
            content = _parsed(_text(file))
        recording.loads.append(name)
        recording.files[file.name] = _sha256(file)
        if isinstance(content, list):
            for part in content:
                with _damaged(file):
                    scenario = _scenario(part["name"], part, part["steps"], part.get("gpu", ()))
                    served = all("t" in row for row in part["requests"])
                    if served:
                        _check_log(scenario)
                served = served and not any(step.held for step in scenario.steps)
                (recording.scenarios if served else recording.timed).append(scenario)
            continue
        steps = packed_file(path, f"{name}.steps.jsonl")
        if not steps.exists():
            raise FileNotFoundError(f"{steps}: no such file. {file.name} needs its step log beside it")
        timed = packed_file(path, f"{name}.gpu.jsonl")
        lines, gpu = _lines(steps), _lines(timed) if timed.exists() else []
        recording.files |= {used.name: _sha256(used) for used in (steps, timed) if used.exists()}
        with _damaged(path / name):
            scenario = _scenario(name, content, lines, gpu)
            _check_log(scenario)
            recording.scenarios.append(scenario)
    return recording


@contextmanager
def _damaged(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        told = " ".join(str(error).split())
        if told.startswith(f"{file}: "):
            raise ValueError(told) from None
        raise ValueError(f"{file}: damaged ({type(error).__name__}: {told}). Record it again") from None


def _parsed(text: str) -> Any:
    def refused(name: str) -> None:
        raise ValueError(f"{name} is no number")

    return json.loads(text, parse_constant=refused)


def _lines(file: Path) -> list[Any]:
    with _damaged(file):
        return [_parsed(line) for line in _text(file).splitlines()]


def _text(file: Path) -> str:
    return read_bytes(file).decode()


def _scenario(name: str, content: dict[str, Any], lines: list[Any], gpu: Sequence[Any]) -> Scenario:
    requests = [
        RequestRow(
            send_s=_number(row["submit"]),
            prompt_tokens=_count(row["prompt"], 1),
            output_tokens=_count(row["output"], 1),
            token_s=[_number(at) for at, tokens in row.get("t", ()) for _ in range(_count(tokens, 1))],
            cached_tokens=_count(row.get("cached") or 0),
        )
        for row in content["requests"]
        if row.get("submit") is not None
    ]
    if not requests:
        raise ValueError("no request was sent")
    preemptions = sum(line[0] == "p" for line in lines)
    concurrency = content.get("scenario", {}).get("concurrency")
    steps = pair_steps(lines, gpu)
    note_contexts(steps, requests)
    return Scenario(name, requests, steps, preemptions, concurrency)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not -LONGEST_S <= value <= LONGEST_S:
        raise ValueError(f"{value!r} is no time in seconds")
    return float(value)


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{value!r} is no whole number of {least} or more")
    return value


def _check_log(scenario: Scenario) -> None:
    """Whether the steps are those of these requests: as many decodes as tokens after the first ones, all of their
    prompts; ValueError if not. Recordings with hundreds of preemptions are 0.3 % off."""
    tokens = sum(max(len(request.token_s) - 1, 0) for request in scenario.requests)
    unseen = sum(request.output_tokens - len(request.token_s) for request in scenario.requests)
    decodes = sum(step.seqs for step in scenario.steps)
    if not (1 - MOST_OFF) * tokens <= decodes <= (1 + MOST_OFF) * tokens + unseen + len(scenario.requests):
        raise ValueError(f"{decodes:,} decodes in the step log, {tokens:,} tokens after the first of each request")
    prompts = sum(request.prompt_tokens - request.cached_tokens for request in scenario.requests if request.token_s)
    computed = sum(step.new_tokens for step in scenario.steps)
    if computed < (1 - MOST_OFF) * prompts - len(scenario.requests):
        raise ValueError(f"{computed:,} prompt tokens in the step log, {prompts:,} in the requests")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
