"""Random scenarios for `benchmarks.parity`, in the format of recorded schedules (`llmsim.oracle`), without their steps.

Every case draws its engine settings and its requests from one seeded generator, so `(seed, number)` names it. The kinds
differ in what is made scarce; all of them mix the other settings too:

    prefix    sessions whose next turn repeats prompt and answer, branches, exact repetitions, common system prompts
    preempt   KV blocks for a fraction of what runs at once
    chunk     small token budgets, long_prefill_token_threshold, chunked prefill off
    priority  policy `priority` with few classes and equal arrival times, under pressure
    burst     everything arrives at a few instants

A request's tokens are `shared` = [[stream, tokens], ...], the first tokens of named streams one behind the other, from
the start of the prompt and, if they are longer than it, into the answer; what they do not cover is the request's own.
`arrival_step` is the turn of the engine's loop before which it arrives; `clock` says how the same case becomes a trace.
"""

from __future__ import annotations

from random import Random
from typing import Any

KINDS = ("prefix", "preempt", "chunk", "priority", "burst")
BLOCK_SIZES = (1, 8, 16, 16, 32)  # those that a Scenario takes


def make_case(seed: int, number: int) -> dict[str, Any]:
    """Case `number` of the series `seed`."""
    random = Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    block = random.choice(BLOCK_SIZES)
    requests = _requests(random, kind, block)
    longest = max(entry["prompt_len"] + entry["output_len"] for entry in requests)
    config = _limits(random, kind, longest)
    config |= {
        "block_size": block,
        "num_gpu_blocks": _blocks(random, kind, block, requests, longest),
        "policy": "priority" if kind == "priority" or random.random() < 0.15 else "fcfs",
        "async_scheduling": random.random() < 0.5,
        "enable_prefix_caching": kind == "prefix" or random.random() < 0.75,
        "watermark": random.choice((0.0, 0.0, 0.0, 0.01, 0.05, 0.2)),
        "scheduler_reserve_full_isl": random.random() < 0.75,
    }
    for entry in requests:  # tens of thousands of turns would need a cache where nothing fits
        entry["output_len"] = min(entry["output_len"], config["max_model_len"] - entry["prompt_len"])
    return {"name": f"{seed}/{number}", "kind": kind, "config": config, "requests": requests, "clock": _clock(random)}


def _limits(random: Random, kind: str, longest: int) -> dict[str, Any]:
    seqs = random.choice((1, 3, 8, 16, 64, 64, 64))
    budget = max(seqs, random.choice((16, 32, 64, 128, 256) if kind == "chunk" else (64, 256, 1024, 8192)))
    chunked = random.random() < (0.8 if kind == "chunk" else 0.9)
    context = longest + random.choice((0, 0, 1, 7, 1000))
    if not chunked:
        budget = max(budget, context)
    threshold = random.choice((0, 4, 16, 33, 100)) if kind == "chunk" else random.choice((0, 0, 0, 48))
    return {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
        "max_model_len": context,
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": min(threshold, context),
    }


def _blocks(random: Random, kind: str, block: int, requests: list[dict[str, Any]], longest: int) -> int:
    """At least what the longest request needs (else it could never run), and then as much as the kind wants."""
    least = -(-longest // block)
    each = sum(-(-(entry["prompt_len"] + entry["output_len"]) // block) for entry in requests) / len(requests)
    tight = kind in ("preempt", "priority") or random.random() < 0.4
    wanted = each * (random.uniform(1.0, 4.0) if tight else random.uniform(6.0, 40.0))
    return 1 + max(least + random.randrange(3), int(wanted))


def _clock(random: Random) -> dict[str, Any]:
    """How the case becomes a trace: seconds of a turn, tokens of a prefix id, whether answers have ids, clients."""
    return {
        "turn_s": random.choice((0.002, 0.008, 0.03)),
        "jitter": random.random() < 0.7,
        "id_blocks": random.choice((0.5, 1, 1, 2, 4)),
        "answers": random.random() < 0.6,
        "concurrency": random.choice((None, None, None, None, 1, 3, 10)),
        "replicas": random.choice((1, 1, 1, 1, 2)),
    }


def _requests(random: Random, kind: str, block: int) -> list[dict[str, Any]]:
    n = random.randrange(5, 60)
    typical = random.choice((12, 40, 120)) if block > 1 else random.choice((6, 20))
    scale = 3.0 if kind == "preempt" else 1.0  # answers
    shares = kind == "prefix" or random.random() < 0.35
    sessions: list[list[list[Any]]] = [[] for _ in range(random.randrange(1, 6))]
    spread = random.choice((0.1, 0.3, 1.0, 3.0))
    turn = 0.0
    requests: list[dict[str, Any]] = []
    for number in range(n):
        if kind == "burst":
            turn += random.choice((0, 0, 0, 0, 0, 0, 20)) * spread
        elif random.random() < 0.8:
            turn += random.expovariate(1.0 / spread)
        name = f"r{number}"
        prompt, output = _length(random, typical), _length(random, typical * scale / 2)
        shared: list[list[Any]] = []
        if shares and random.random() < 0.85:
            prompt, shared = _turn(random, sessions, name, prompt, output, 12 * typical)
        entry: dict[str, Any] = {
            "id": name,
            "arrival_step": int(turn),
            "prompt_len": prompt,
            "output_len": output,
            "priority": random.randrange(random.choice((1, 2, 5))),
        }
        if shared:
            entry["shared"] = shared
        if random.random() < 0.1:  # the front end stamped it earlier than the engine saw it
            entry["arrival_time"] = max(0.0, float(int(turn) - random.randrange(5)))
        requests.append(entry)
    return requests


def _length(random: Random, typical: float) -> int:
    return max(1, min(int(random.lognormvariate(0.0, 0.9) * typical), int(8 * typical) + 1))


def _turn(
    random: Random, sessions: list[list[list[Any]]], name: str, new: int, output: int, limit: int
) -> tuple[int, list[list[Any]]]:
    """The next turn of some session: what was said so far, or a beginning of it, and `new` tokens more."""
    at = random.randrange(len(sessions))
    said = sessions[at]
    known = sum(tokens for _, tokens in said)
    dice = random.random()
    if known > limit:
        said = said[:1] if random.random() < 0.5 else []  # a new dialogue, perhaps below the same system prompt
    elif said and dice < 0.2:  # a branch: the same up to somewhere
        said = _beginning(said, random.randrange(known + 1))
    elif said and dice < 0.35:  # the very same prompt again, or one token less
        new = 0
        said = _beginning(said, max(1, known - random.randrange(2)))
    known = sum(tokens for _, tokens in said)
    if new:
        said = [*said, [f"of {name}", new + output]]
    sessions[at] = said
    return known + new, said


def _beginning(said: list[list[Any]], tokens: int) -> list[list[Any]]:
    kept: list[list[Any]] = []
    for stream, length in said:
        if tokens > 0:
            kept.append([stream, min(length, tokens)])
            tokens -= length
    return kept


def sequence_of(entry: dict[str, Any]) -> list[tuple[str, Any]]:
    """What names each token of a request's prompt and answer."""
    name, total = entry["id"], entry["prompt_len"] + entry["output_len"]
    tokens: list[tuple[str, Any]] = [(stream, i) for stream, length in entry.get("shared", ()) for i in range(length)]
    tokens += [(name, ("own", i)) for i in range(total - len(tokens))]
    return tokens[:total]
