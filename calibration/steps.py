"""Read recordings of a real engine: what each step did, and when host and GPU were done with it.

A recording is a folder with `engine.json` (settings of the engine), `NAME.requests.json.gz` (what the client saw) and
`NAME.steps.jsonl.gz` (what the scheduler did), or `NAME.json.gz` with a list of small scenarios that hold both. Lines
of the step log, all times in seconds on one clock:

    ["s", t, dt, tokens, decodes, decode_context, [[new, computed], ...], running, waiting, kv_usage]   schedule
    ["e", t]            an empty schedule          ["x", t, dt, tokens]   launch of the step just scheduled
    ["u", t, dt, ...]   update of the oldest step  ["y", t, dt]           its sampling; the launch ends with it
    ["p", t, computed, outputs]   a preemption

An update line names no step. The engine keeps a queue of two batches, empty ones included, and updates the oldest; if
empty schedules are logged the pairs follow first in, first out. Otherwise the queue is replayed: between two updates
the engine schedules until two batches are in flight, so where a schedule line is missing there was an empty one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

from llmsim.cost import WARM_S

# Sooner than this after its schedule no step has a result: the update must be of an older, empty batch.
SOONEST_RESULT_S = 4e-3


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

    @property
    def new_tokens(self) -> int:
        return sum(new for new, _ in self.chunks)

    @property
    def pairs(self) -> float:
        return attention_pairs(self.chunks)


def attention_pairs(chunks: Sequence[tuple[int, int]]) -> float:
    """(query, key) pairs of causal attention: each new token sees what was computed, itself and the new ones before."""
    return sum(new * done + 0.5 * new * (new + 1) for new, done in chunks)


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
            step.warm = bool(before.chunks and step.chunks and step.schedule_s - before.update_s < WARM_S)



@dataclass
class Recording:
    path: Path
    engine: dict[str, Any]
    scenarios: list[Scenario]
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256


def pair_steps(lines: Sequence[Sequence[Any]]) -> list[StepRow]:
    """Scheduled steps in order, each with its own update; a step still in flight at the end is left out."""
    logged = any(line[0] == "e" for line in lines)
    queue: list[StepRow | None] = []  # None: an empty batch
    rows: list[StepRow] = []
    current: StepRow | None = None
    since_update, preempted = 0, False
    for line in lines:
        kind = line[0]
        if kind == "s":
            current = _row(line)
            current.after_preemption, preempted = preempted, False
            rows.append(current)
            queue.append(current)
            since_update += 1
        elif kind == "e":
            current = None
            queue.append(None)
        elif kind == "x" and current is not None:
            current.launch_s = line[1]
        elif kind == "y" and current is not None:
            current.launched_s = line[1] + line[2]
        elif kind == "p":
            preempted = True
        elif kind == "u":
            if not logged:
                _insert_empty(queue, line[1], since_update)
            done = queue.pop(0) if queue else None
            if done is not None:
                done.update_s, done.update_took_s = line[1], line[2]
            since_update = 0
    return [row for row in rows if row.update_s == row.update_s]


def _row(line: Sequence[Any]) -> StepRow:
    """One-token chunks are counted with the decodes: the engine launches and computes them alike."""
    schedule_s, took_s, tokens, seqs, kv_tokens, prompts, running, waiting = line[1:9]
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
    recording = Recording(path, json.loads(engine_file.read_text()), [])
    recording.files["engine.json"] = _sha256(engine_file)
    present = {file.name.removesuffix(".json.gz").removesuffix(".requests"): file for file in path.glob("*.json.gz")}
    if missing := [name for name in names or () if name not in present]:
        raise FileNotFoundError(f"{path}: no scenario {', '.join(missing)}. It has {', '.join(sorted(present))}")
    for name, file in sorted(present.items()):
        if names is not None and name not in names:
            continue
        recording.files[file.name] = _sha256(file)
        with gzip.open(file, "rt") as stream:
            content = json.load(stream)
        if isinstance(content, list):
            served = [part for part in content if all("t" in row for row in part["requests"])]
            if names is not None and len(served) < len(content):
                raise ValueError(f"{file}: has steps that no client waited for. It times kernels and cannot be fitted")
            recording.scenarios += [_scenario(part["name"], part, part["steps"]) for part in served]
            continue
        steps = path / f"{name}.steps.jsonl.gz"
        if not steps.is_file():
            raise FileNotFoundError(f"{steps}: no such file. {file.name} needs its step log beside it")
        recording.files[steps.name] = _sha256(steps)
        with gzip.open(steps, "rt") as stream:
            recording.scenarios.append(_scenario(name, content, [json.loads(line) for line in stream]))
    return recording


def _scenario(name: str, content: dict[str, Any], lines: list[Any]) -> Scenario:
    requests = [
        RequestRow(
            send_s=row["submit"],
            prompt_tokens=row["prompt"],
            output_tokens=row["output"],
            token_s=[at for at, tokens in row["t"] for _ in range(tokens)],
            cached_tokens=row.get("cached") or 0,
        )
        for row in content["requests"]
        if "submit" in row
    ]
    preemptions = sum(line[0] == "p" for line in lines)
    concurrency = content.get("scenario", {}).get("concurrency")
    return Scenario(name, requests, pair_steps(lines), preemptions, concurrency)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
