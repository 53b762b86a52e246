"""Sessions: users who send the next turn when the answer has come and they have thought.

    sessions:turns=(uniform:min=3,max=9),think=(exponential:mean=5),system=500,shared=1,history=1,open=0,context=200000
    closed:users=16,think=(exponential:mean=5),stagger=1

The arrival process governs session starts. With history, the prompt of turn k is the system prompt, all new inputs up
to k and all answers before k; turns share it as blocks of one stream, and `shared` system prompts are common to all
sessions. `open=1` sends each turn `think` after the one before was *sent* (open loop). `closed` is a fixed number of
users without history: each sends its next request `think` after its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.readers.rows import Blocks, FloatArray, IntArray
from llmsim.synth.arrivals import arrivals
from llmsim.synth.lengths import quantile
from llmsim.synth.spec import bare, parse


@dataclass
class Turns:
    """The plan of all sessions: which request is whose turn, and when."""

    session: IntArray
    parent: IntArray
    delay_s: FloatArray
    arrival_s: FloatArray
    system_tokens: int = 0
    shared: bool = False
    history: bool = False
    context_tokens: int | None = None


def plan(text: str, process: str, requests: int, arrival_rng: np.random.Generator, rng: np.random.Generator) -> Turns:
    spec = parse(text)
    think = quantile(bare(spec.text_of("think", "fixed:value=0")))
    if spec.name == "closed":
        users, stagger_s = spec.count("users"), spec.number("stagger", 0.0, least=0)
        spec.done()
        user = np.arange(requests) % users
        parent = np.where(np.arange(requests) >= users, np.arange(requests) - users, -1)
        arrival_s = np.where(parent < 0, user * stagger_s, np.nan)
        return Turns(user, parent, np.where(parent < 0, 0.0, think(rng.random(requests))), arrival_s)
    if spec.name != "sessions":
        raise ValueError(f"sessions {text!r}: {spec.name!r} is not one of sessions, closed")
    turns_of = quantile(bare(spec.text_of("turns")))
    system, shared = spec.count("system", 0, least=0), bool(spec.count("shared", 1, least=0))
    history, is_open = bool(spec.count("history", 1, least=0)), bool(spec.count("open", 0, least=0))
    context = spec.count("context", least=2) if spec.has("context") else None
    spec.done()
    turns = np.empty(0, dtype=np.int64)
    while turns.sum() < requests:
        drawn = np.maximum(np.rint(turns_of(rng.random(max(64, requests // 8)))), 1).astype(np.int64)
        turns = np.concatenate([turns, drawn])
    count = int(np.searchsorted(np.cumsum(turns), requests)) + 1
    session = np.repeat(np.arange(count), turns[:count])[:requests]
    first = np.append(True, session[1:] != session[:-1])
    parent = np.where(first, -1, np.arange(requests) - 1)
    delay_s = np.where(first, 0.0, think(rng.random(requests)))
    starts_s = arrivals(process, count, arrival_rng)[session]
    arrival_s = np.where(first, starts_s, np.nan)
    if is_open:
        arrival_s = starts_s + _running(delay_s, first)
    return Turns(session, parent, delay_s, arrival_s, system, shared, history, context)


def _running(values: Any, first: Any) -> NDArray[Any]:
    """Sums that start again at each session."""
    total = np.cumsum(values)
    starts = np.flatnonzero(first)
    before = np.where(starts > 0, total[starts - 1], 0)
    return np.asarray(total - np.repeat(before, np.diff(np.append(starts, len(values)))))


def prompts(turns: Turns, new_tokens: IntArray, output_tokens: IntArray) -> IntArray:
    """Prompt of each turn: the system prompt, the new input and, with history, everything said before."""
    if not turns.history:
        return turns.system_tokens + new_tokens
    first = np.append(True, turns.session[1:] != turns.session[:-1])
    said = _running(new_tokens + output_tokens, first)
    return np.asarray(turns.system_tokens + said - output_tokens)


def blocks(turns: Turns, prompt_tokens: IntArray, output_tokens: IntArray, block_tokens: int) -> tuple[Blocks, Blocks]:
    """Block ids of prompts and answers: one stream for each session, after the blocks of a shared system prompt."""
    common = turns.system_tokens // block_tokens if turns.shared else 0
    fresh = common
    asked: Blocks = []
    answered: Blocks = []
    stream: list[int] = []
    session = -1
    rows = zip(turns.session.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), strict=True)
    for owner, prompt, output in rows:
        if owner != session or not turns.history:
            # Without history nothing but the system prompt comes back in the next turn.
            keep = turns.system_tokens // block_tokens if owner == session else common
            stream, session = (stream[:keep] if owner == session else list(range(common))), owner
        needed, upto = -(-(prompt + output) // block_tokens), -(-prompt // block_tokens)
        grown = max(0, needed - len(stream))
        stream.extend(range(fresh, fresh + grown))
        fresh += grown
        asked.append(tuple(stream[:upto]))
        answered.append(tuple(stream[upto:needed]))
    return asked, answered
