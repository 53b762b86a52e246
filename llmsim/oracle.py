"""Replaying a schedule recorded from vLLM's own scheduler classes, step by step, and naming the first difference.

A case is a JSON object with `config` (engine settings), `requests` (arrival turn, lengths, token ids) and `steps`:
per turn of the engine's loop what was scheduled, in order, with tokens and prefix hits, who was preempted, how many
blocks were left free, and which tokens came out. There is no clock: a request with `arrival_step` i is added before
the schedule of loop turn i. With asynchronous scheduling a turn waits for the oldest iteration once two are in
flight.

Compared per step: turn, requests in order with tokens, tokens computed before, kind and prefix hit; preempted
requests in order; running and waiting requests in order; free blocks after scheduling; emitted tokens and finish
reasons; free blocks after the results were processed. At the end: preemptions in all, and which turn produced each
token.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import deque
from pathlib import Path
from typing import Any

from llmsim.engine import Engine, Limits
from llmsim.kvcache import KVCache
from llmsim.request import Request
from llmsim.schedulers.vllm import VllmScheduler

COMPARED = ("scheduled", "preempted", "running", "waiting", "free_blocks", "emitted", "free_blocks_after_update")
COMPARED_ENTRY = ("id", "kind", "computed_before", "tokens", "prefix_hit", "samples")
REQUIRED_CONFIG = ("num_gpu_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")


def replay_case(path: str | Path) -> str | None:
    """None if our scheduler makes the recorded schedule; else one line: the first step and field that differ.

    Raises ValueError naming the file and field if the file is not a recorded case, FileNotFoundError if there is none.
    """
    case = load_case(path)
    replayed = Replay(case, str(path))
    made = replayed.run()
    for number, (ours, theirs) in enumerate(zip(made, case["steps"], strict=False)):
        difference = first_difference(ours, theirs)
        if difference is not None:
            return f"step {number} (turn {theirs.get('iter')}): {difference}"
    if len(made) != len(case["steps"]):
        return f"step {min(len(made), len(case['steps']))}: {len(made)} steps, recorded {len(case['steps'])}"
    preemptions = sum(len(step["preempted"]) for step in made)
    if preemptions != case.get("total_preemptions", preemptions):
        return f"total_preemptions: {preemptions}, recorded {case['total_preemptions']}"
    for name, output in case.get("outputs", {}).items():
        steps = replayed.token_turns.get(name, [])
        if "token_steps" in output and steps != output["token_steps"]:
            return f"outputs of {name}: token_steps {steps}, recorded {output['token_steps']}"
    return None


def is_case(document: Any) -> bool:
    """Whether a JSON document looks like a recorded schedule."""
    return isinstance(document, dict) and {"config", "requests", "steps"} <= document.keys()


def is_case_file(path: Path) -> bool:
    """Whether a file, gzipped or not, holds a recorded schedule."""
    if path.is_dir() or not path.name.endswith((".json", ".json.gz")):
        return False
    try:
        return is_case(json.loads(_text(path)))
    except (ValueError, OSError, EOFError):
        return False  # not one JSON document: whoever reads it as something else says what is wrong with it


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    return content.decode("utf-8")


def load_case(path: str | Path) -> dict[str, Any]:
    try:
        text = _text(Path(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}). Copy it again.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}. A recorded case is a JSON file.") from None
    try:
        case: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not JSON ({error.msg}). Is the file complete?") from None
    if not is_case(case):
        raise ValueError(f"{path}: not a recorded schedule: it needs the keys config, requests and steps.")
    for key in REQUIRED_CONFIG:
        if not isinstance(case["config"].get(key), int):
            raise ValueError(f"{path}: config.{key} is {case['config'].get(key)!r}. Give a whole number.")
    for index, request in enumerate(case["requests"]):
        for key in ("id", "arrival_step", "output_len"):
            if key not in request:
                raise ValueError(f"{path}: requests[{index}].{key} is missing.")
        if "prompt_len" not in request and "prompt_token_ids" not in request:
            raise ValueError(f"{path}: requests[{index}] has neither prompt_len nor prompt_token_ids.")
    return case


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first field in which two steps differ, with both values; None if they are equal."""
    if ours["iter"] != theirs.get("iter"):
        return f"iter: {ours['iter']}, recorded {theirs.get('iter')}"
    for field in COMPARED:
        if field not in theirs:
            continue
        if field == "scheduled":
            for place, (a, b) in enumerate(zip(ours[field], theirs[field], strict=False)):
                for key in COMPARED_ENTRY:
                    if key in b and a.get(key) != b[key]:
                        ours_is, recorded = f"{a.get(key)!r} for {a['id']}", f"{b[key]!r} for {b['id']}"
                        return f"scheduled[{place}].{key}: {ours_is}, recorded {recorded}"
            if len(ours[field]) != len(theirs[field]):
                names = [entry["id"] for entry in ours[field]], [entry["id"] for entry in theirs[field]]
                return f"scheduled: {names[0]}, recorded {names[1]}"
        elif ours[field] != theirs[field]:
            return f"{field}: {ours[field]!r}, recorded {theirs[field]!r}"
    return None


class Replay:
    """One case, driven turn by turn through the same engine and policy that simulations use, without their clock."""

    def __init__(self, case: dict[str, Any], source: str) -> None:
        config = case["config"]
        self.asynchronous = bool(config.get("async_scheduling", False))
        self.max_turns = int(config.get("max_iters", 10_000))
        block_tokens = config["block_size"]
        self.engine = Engine(
            VllmScheduler(
                policy=config.get("policy", "fcfs"),
                long_prefill_token_threshold=config.get("long_prefill_token_threshold", 0),
                watermark=config.get("watermark", 0.0),
                reserve_full_isl=config.get("scheduler_reserve_full_isl", True),
                enable_chunked_prefill=config.get("enable_chunked_prefill", True),
            ),
            KVCache(
                config["num_gpu_blocks"] - 1,
                block_tokens,
                prefix_caching=config.get("enable_prefix_caching", True),
                prefix_block_tokens=block_tokens,
            ),
            Limits(config["max_num_seqs"], config["max_num_batched_tokens"]),
            asynchronous=self.asynchronous,
        )
        limit = config.get("max_model_len")
        arrivals = [
            (int(entry["arrival_step"]), _request(i, entry, block_tokens, limit, source))
            for i, entry in enumerate(case["requests"])
        ]
        self.arrivals = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
        self.token_turns: dict[str, list[int]] = {}

    def run(self) -> list[dict[str, Any]]:
        """Turns that scheduled something, in the format of the recording."""
        engine = self.engine
        steps: list[dict[str, Any]] = []
        flying: deque[dict[str, Any]] = deque()
        for turn in range(self.max_turns):
            while self.arrivals and self.arrivals[0][0] <= turn:
                engine.waiting.append(self.arrivals.popleft()[1])
            if not (engine.waiting or engine.running or flying):
                if not self.arrivals:
                    break
                continue
            step = self._schedule(turn)
            if step["scheduled"] or step["preempted"]:
                steps.append(step)
            flying.append(step)
            has_tokens = bool(step["scheduled"])
            if self.asynchronous and len(flying) < 2 and (has_tokens or engine.running or engine.waiting):
                continue
            self._process(flying.popleft(), turn)
        return steps

    def _schedule(self, turn: int) -> dict[str, Any]:
        engine = self.engine
        before = {request: request.preemptions for request in engine.waiting}
        engine.begin(float(turn))
        chunks = {request: (tokens, computed) for request, tokens, computed in engine.chunks}
        scheduled = []
        makes_token: list[Request] = []
        for request in engine.running:
            if request in chunks:
                tokens, computed = chunks[request]
                samples = request.computed_tokens == request.prefill_tokens
                kind = "running"
                if request in before:
                    kind = "resumed" if before[request] else "new"
                entry = _entry(request, kind, computed, tokens, samples)
                if kind != "running":
                    entry["prefix_hit"] = computed
            elif request in engine.batch and engine.decoding:
                samples = True
                entry = _entry(request, "running", engine.batch.computed(request), 1, True)
            else:
                continue
            scheduled.append(entry)
            if samples:
                makes_token.append(request)
        step: dict[str, Any] = {
            "iter": turn,
            "scheduled": scheduled,
            "preempted": [request.name for request in engine.preempted_now],
            "running": [request.name for request in engine.running],
            "waiting": [request.name for request in engine.waiting],
            "free_blocks": engine.kv.free_blocks,
        }
        for request in makes_token:
            self.token_turns.setdefault(request.name, []).append(turn)
        step["_ended"] = engine.commit(1)
        step["_makes_token"] = makes_token
        return step

    def _process(self, step: dict[str, Any], turn: int) -> None:
        ended = step.pop("_ended")
        step["emitted"] = [
            [request.name, 1, "length" if request in ended else None] for request in step.pop("_makes_token")
        ]
        place = {name: i for i, (name, _, _) in enumerate(step["emitted"])}
        self.engine.free(sorted(ended, key=lambda request: place[request.name]))
        step["processed_iter"] = turn
        step["free_blocks_after_update"] = self.engine.kv.free_blocks


def _entry(request: Request, kind: str, computed: int, tokens: int, samples: bool) -> dict[str, Any]:
    return {"id": request.name, "kind": kind, "computed_before": computed, "tokens": tokens, "samples": samples}


def _request(index: int, entry: dict[str, Any], block_tokens: int, limit: int | None, source: str) -> Request:
    """The sequence's identity is its tokens: given ones, or tokens that no other request has."""
    name = str(entry["id"])
    given = entry.get("prompt_token_ids")
    prompt_tokens = len(given) if given is not None else int(entry["prompt_len"])
    output_tokens = int(entry["output_len"])
    if limit is not None:
        output_tokens = min(output_tokens, limit - prompt_tokens)  # vLLM ends a request at max_model_len
    if prompt_tokens < 1 or output_tokens < 1:
        raise ValueError(
            f"{source}: requests[{index}]: {prompt_tokens} prompt and {output_tokens} output tokens. Give 1 or more."
        )
    if given is not None:
        prompt: list[Any] = list(given)
    else:  # [[stem, tokens], ...]: the first tokens of named streams, then tokens of its own
        prompt = [(stem, i) for stem, tokens in entry.get("shared", ()) for i in range(tokens)]
        prompt += [(name, i) for i in range(prompt_tokens - len(prompt))]
    answer = entry.get("output_token_ids")
    answer = list(answer) if answer is not None else [(name, "out", i) for i in range(output_tokens)]
    sequence = (prompt + answer)[: prompt_tokens + output_tokens]
    blocks = tuple(
        tuple(sequence[i : i + block_tokens]) for i in range(0, len(sequence) - block_tokens + 1, block_tokens)
    )
    request = Request(index, float(entry["arrival_step"]), prompt_tokens, output_tokens, int(entry.get("priority", 0)))
    if "arrival_time" in entry:
        request.arrival_s = float(entry["arrival_time"])
    request.name, request.prefix_ids, request.identity_tokens = name, blocks, len(sequence)
    return request
