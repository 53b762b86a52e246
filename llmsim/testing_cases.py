"""Seeded scenarios that a policy has to survive: every kind of loop, cache and clock, with and without room.

    loop      open (the trace's times), closed (three clients), sessions (turns wait for the answer before)
    memory    ample: nobody is ever short; snug: four of the longest fit; tight: the longest and two blocks more
    clock     asynchronous or synchronous scheduling

each with each, prefix caching on in every other one, then two replicas, prompts far above the token budget, requests of
one token, everybody at once, and preemption storms (short prompts and long answers: many are let in, few can stay),
with and without host memory to swap to.
Lengths and gaps are drawn from the seed; lengths are short, so that all of it runs in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmsim.scenario import Scenario
from llmsim.trace import Trace

BLOCK_TOKENS = 16
ID_TOKENS = 64  # of a prefix id of the trace
LOOPS, MEMORY, CLOCKS = ("open", "closed", "sessions"), ("ample", "snug", "tight"), ("async", "sync")
CLASSES = ("interactive", "standard", "batch")
CLIENTS = 3  # of a closed loop
AMPLE_BLOCKS = 5000


@dataclass(frozen=True)
class Case:
    """One trace on one scenario."""

    name: str
    trace: Trace
    scenario: Scenario


@dataclass(frozen=True)
class Shape:
    """What the requests of a case look like. `prompt`, `output`: medians in tokens; `gap_s`: mean between arrivals."""

    loop: str = "open"
    memory: str = "snug"
    clock: str = "async"
    caching: bool = True
    replicas: int = 1
    prompt: int = 120
    output: int = 24
    gap_s: float = 0.02
    budget: int = 256
    seqs: int = 16
    swap_gib: float = 0.0
    requests: int = 30


def cases(seed: int = 0) -> list[Case]:
    shapes = [
        Shape(loop, memory, clock, caching=at % 2 == 0, seqs=(4, 16, 64)[at % 3], budget=(128, 512)[at % 4 // 2])
        for at, (loop, memory, clock) in enumerate(product(LOOPS, MEMORY, CLOCKS))
    ]
    named = [(_name(shape), shape) for shape in shapes]
    named += [
        ("two replicas", Shape(replicas=2)),
        ("prompts far above the token budget", Shape(prompt=600, budget=64, output=6)),
        ("requests of one token", Shape(prompt=1, output=1, gap_s=0.001)),
        ("everybody at once, tight memory", Shape(memory="tight", gap_s=0.0, caching=False)),
        ("preemption storm", Shape(memory="tight", gap_s=0.0, prompt=20, output=120, caching=False)),
        ("preemption storm, sync", Shape(memory="tight", gap_s=0.001, prompt=20, output=120, clock="sync")),
        ("preemption storm, host memory", Shape(memory="tight", gap_s=0.0, prompt=20, output=120, swap_gib=1.0)),
        ("preemption storm, little host memory", Shape(memory="tight", gap_s=0.0, output=120, swap_gib=0.02)),
    ]
    return [_case(name, shape, np.random.default_rng([seed, at])) for at, (name, shape) in enumerate(named)]


def eviction_cases(seed: int = 0) -> list[Case]:
    """Caches that are too small for what is shared: each loop, snug and tight memory, each clock; one replica."""
    shapes = [
        Shape(loop, memory, clock, requests=80, prompt=200, output=12, gap_s=0.05)
        for loop, memory, clock in product(LOOPS, MEMORY[1:], CLOCKS)
    ]
    return [_case(_name(shape), shape, np.random.default_rng([seed, 100 + at])) for at, shape in enumerate(shapes)]


def _name(shape: Shape) -> str:
    return f"{shape.loop} loop, {shape.memory} memory, {shape.clock}"


def _case(name: str, shape: Shape, random: np.random.Generator) -> Case:
    trace = _trace(name, shape, random)
    longest = int((-(-(trace.prompt_tokens + trace.output_tokens) // BLOCK_TOKENS)).max())
    blocks = {"ample": AMPLE_BLOCKS, "snug": 4 * longest, "tight": longest + 2}[shape.memory]
    scenario = Scenario(
        model="llama-3.1-8b",
        gpu="h100-sxm",
        replicas=shape.replicas,
        max_num_seqs=min(shape.seqs, shape.budget),
        max_num_batched_tokens=shape.budget,
        block_size=BLOCK_TOKENS,
        num_gpu_blocks_override=blocks + 1,  # block 0 is vLLM's null block
        enable_prefix_caching=shape.caching,
        async_scheduling=shape.clock == "async",
        swap_space_gib=shape.swap_gib,
        concurrency=CLIENTS if shape.loop == "closed" else None,
    )
    return Case(f"{name}{', prefix caching' if shape.caching else ''}", trace, scenario)


def _trace(name: str, shape: Shape, random: np.random.Generator) -> Trace:
    """Some arrive together; tenants, classes and priorities are dealt, families share beginnings of prompts."""
    count = shape.requests
    prompt = _lengths(shape.requests, shape.prompt, random)
    output = _lengths(shape.requests, shape.output, random)
    waits_s = np.where(random.random(count) < 0.7, random.exponential(1.0, count) * shape.gap_s, 0.0)
    arrival_s = np.cumsum(waits_s) - waits_s[0]
    group, promise = random.integers(0, 3, count), random.integers(0, 3, count)
    columns: dict[str, Any] = {
        "priority": random.integers(0, 3, count),
        "tenant": [f"tenant-{number}" for number in group],
        "slo_class": [CLASSES[number] for number in promise],
        "slo_ttft_s": np.array([0.1, 0.5, np.nan])[promise],
        "slo_tpot_s": np.array([0.01, 0.05, np.nan])[promise],
    }
    if shape.loop == "sessions":
        columns |= _turns(arrival_s, prompt, output, random)
    elif shape.caching:
        common = random.integers(0, 4, count)
        columns["block_tokens"] = ID_TOKENS
        columns["block_ids"] = [
            tuple(
                (int(group[i]), k) if k < common[i] else ("own", i, k) for k in range(-(-int(prompt[i]) // ID_TOKENS))
            )
            for i in range(count)
        ]
    return Trace(name, arrival_s, prompt, output, **columns)


def _lengths(count: int, median: int, random: np.random.Generator) -> Any:
    if median == 1:
        return np.ones(count, dtype=np.int64)
    drawn = (random.lognormal(0.0, 0.8, count) * median).astype(np.int64)
    return np.clip(np.where(random.random(count) < 0.1, 1, drawn), 1, 5 * median)


def _turns(arrival_s: Any, prompt: Any, output: Any, random: np.random.Generator) -> dict[str, Any]:
    """Two in three requests go on with the conversation of an earlier one: its prompt, its answer and a new question.

    Changes arrival times and prompts in place.
    """
    count = len(prompt)
    parent, delay_s = np.full(count, -1), np.full(count, np.nan)
    ids: list[tuple[Any, ...]] = []
    answers: list[tuple[Any, ...]] = []
    for i in range(count):
        said: tuple[Any, ...] = ()
        if i > 2 and random.random() < 0.67:
            before = parent[i] = int(random.integers(max(0, i - 6), i))
            if prompt[before] + output[before] < 500:  # else it begins a new conversation after the old one
                said = (ids[before] + answers[before])[: (int(prompt[before]) + int(output[before])) // ID_TOKENS]
            prompt[i] = ID_TOKENS * len(said) + 1 + prompt[i] // 3
            arrival_s[i], delay_s[i] = np.nan, float(random.exponential(0.05))
        names = [*said, *((i, k) for k in range(len(said), -(-int(prompt[i] + output[i]) // ID_TOKENS)))]
        asked = -(-int(prompt[i]) // ID_TOKENS)
        ids.append(tuple(names[:asked]))
        answers.append(tuple(names[asked:]))
    return {
        "parent": parent, "delay_s": delay_s, "block_tokens": ID_TOKENS, "block_ids": ids, "output_block_ids": answers,
    }  # fmt: skip
