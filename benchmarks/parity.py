"""Is our vLLM scheduler still vLLM's? `python -m benchmarks.parity [--cases 500] [--seed 0] [--case FILE]`.

Random scenarios (`benchmarks.parity_cases`) are given to our own scheduler (`--scheduler vllm`) and to the scheduler
class of whatever vLLM is installed, in two ways:

    steps    turn by turn, without a clock: requests in order with tokens, tokens computed before and prefix hits,
             preemptions, both queues in order, free blocks before and after the results, tokens handed out, contents
             lost to eviction. vLLM is driven here directly, by nothing of the simulator's.
    clock    `simulate` on the same case as a trace, with `vllm` and with `vllm-native`: every time of every request
             within 1e-9 s, everything that is counted exactly, every iteration's decodes and prompt tokens

The first difference is printed with its scenario as one JSON object that `--case` runs again. Exit status 1 if any case
differs. Needs vLLM (docs/policies/vllm-native.md).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np

from benchmarks.parity_cases import make_case, sequence_of
from llmsim.oracle import Replay, first_difference
from llmsim.plugins import PolicyError

TOLERANCE_S = 1e-9  # a run of iterations is one sum here and many additions there
MAX_TURNS = 3000  # of a case; some never end: requests that take each other's blocks for ever
SCENARIO = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
FIELDS = {"policy": "scheduling_policy", "scheduler_reserve_full_isl": "reserve_full_isl"}


class Steps:
    """What a schedule of turns comes to: the turns, and KV contents lost."""

    def __init__(self, turns: list[dict[str, Any]], evicted_blocks: int) -> None:
        self.turns, self.evicted_blocks = turns, evicted_blocks


def our_steps(case: dict[str, Any]) -> Steps:
    """The case by our own scheduler."""
    replay = Replay(_bounded(case), case.get("name", "case"))
    return Steps(replay.run(), replay.engine.kv.evicted_blocks)


def vllm_steps(case: dict[str, Any]) -> Steps:
    """The case by the installed vLLM's scheduler, driven as its engine core drives it."""
    from llmsim.schedulers.vllm_installed import InstalledVllm, Options

    config = {name: value for name, value in case["config"].items() if name in Options._fields}
    vllm = InstalledVllm(Options(**config))
    waiting = deque(sorted(case["requests"], key=lambda entry: int(entry["arrival_step"])))
    drive = _Drive(vllm)
    turns: list[dict[str, Any]] = []
    flying: deque[tuple[dict[str, Any], Any, dict[str, int]]] = deque()
    for turn in range(MAX_TURNS):
        while waiting and waiting[0]["arrival_step"] <= turn:
            drive.add(waiting.popleft())
        if not (drive.running or flying or vllm.waiting_names()):
            if not waiting:
                break
            continue
        step, raw, tokens = drive.schedule(turn)
        if step["scheduled"] or step["preempted"]:
            turns.append(step)
        flying.append((step, raw, tokens))
        unfinished = bool(drive.running or vllm.waiting_names())
        if config["async_scheduling"] and len(flying) < 2 and (step["scheduled"] or unfinished):
            continue
        drive.update(*flying.popleft())
    return Steps(turns, vllm.evicted_blocks)


class _Drive:
    """vLLM's scheduler and what is needed to play the model for it."""

    def __init__(self, vllm: Any) -> None:
        self.vllm = vllm
        self.running: list[str] = []
        self._ids: dict[Any, int] = {}  # token id of each named token
        self._requests: dict[str, tuple[int, list[int]]] = {}  # tokens of the prompt, ids of the whole sequence
        self._sampled: Counter[str] = Counter()
        self._admitted: set[str] = set()

    def add(self, entry: dict[str, Any]) -> None:
        ids = [self._ids.setdefault(token, len(self._ids)) for token in sequence_of(entry)]
        prompt = entry["prompt_len"]
        self._requests[entry["id"]] = prompt, ids
        arrival = float(entry.get("arrival_time", entry["arrival_step"]))
        self.vllm.add(entry["id"], ids[:prompt], entry["output_len"], arrival, entry.get("priority", 0))

    def schedule(self, turn: int) -> tuple[dict[str, Any], Any, dict[str, int]]:
        before = set(self.running)
        answer = self.vllm.schedule()
        scheduled, tokens = [], {}
        for name, count, computed in answer.scheduled:
            prompt, ids = self._requests[name]
            known = prompt + self._sampled[name]
            samples = computed + count == known
            if samples:
                tokens[name] = ids[known]
                self._sampled[name] += 1
            kind = "running" if name in before else "resumed" if name in self._admitted else "new"
            entry = {"id": name, "kind": kind, "computed_before": computed, "tokens": count, "samples": samples}
            if kind != "running":
                entry["prefix_hit"] = computed
                self._admitted.add(name)
            scheduled.append(entry)
        self.running = self.vllm.running_names()
        step = {
            "iter": turn,
            "scheduled": scheduled,
            "preempted": answer.preempted,
            "running": self.running,
            "waiting": self.vllm.waiting_names(),
            "free_blocks": self.vllm.free_blocks,
        }
        return step, answer.raw, tokens

    def update(self, step: dict[str, Any], raw: Any, tokens: dict[str, int]) -> None:
        step["emitted"] = [list(one) for one in self.vllm.update(raw, tokens)]
        step["free_blocks_after_update"] = self.vllm.free_blocks
        self.running = self.vllm.running_names()


def _bounded(case: dict[str, Any]) -> dict[str, Any]:
    return case | {"config": case["config"] | {"max_iters": MAX_TURNS}}


def compare_steps(ours: Steps, theirs: Steps) -> str | None:
    """The first difference of two schedules in one line, or None."""
    for number, (mine, its) in enumerate(zip(ours.turns, theirs.turns, strict=False)):
        difference = first_difference(mine, its)
        if difference is not None:
            return f"step {number} (turn {its['iter']}): {difference}".replace("recorded", "vLLM")
    if len(ours.turns) != len(theirs.turns):
        return f"step {min(len(ours.turns), len(theirs.turns))}: {len(ours.turns)} steps, vLLM {len(theirs.turns)}"
    if ours.evicted_blocks != theirs.evicted_blocks:
        return f"at the end: {ours.evicted_blocks} cached blocks evicted, vLLM {theirs.evicted_blocks}"
    return None


# ------------------------------------------------------------------------------------------------------ with the clock


def trace_of(case: dict[str, Any]) -> Any:
    """The case as a trace: turns become seconds, tokens become prefix ids."""
    from llmsim.trace import Trace

    clock, random = case["clock"], Random(case["name"])
    late = [random.random() if clock["jitter"] else 0.0 for _ in case["requests"]]
    entries = sorted(
        ((entry["arrival_step"] + after) * clock["turn_s"], number)
        for number, (entry, after) in enumerate(zip(case["requests"], late, strict=True))
    )
    requests = [case["requests"][number] for _, number in entries]
    size = max(1, int(clock["id_blocks"] * case["config"]["block_size"]))
    prompts, answers = [], []
    for entry in requests:
        sequence = sequence_of(entry)
        ids = [tuple(sequence[i : i + size]) for i in range(0, len(sequence), size)]
        inside = -(-entry["prompt_len"] // size)
        prompts.append(tuple(ids[:inside]))
        answers.append(tuple(ids[inside:]))
    first_s = entries[0][0]
    return Trace(
        name=case["name"],
        arrival_s=np.array([at_s - first_s for at_s, _ in entries]),
        prompt_tokens=np.array([entry["prompt_len"] for entry in requests]),
        output_tokens=np.array([entry["output_len"] for entry in requests]),
        block_tokens=size,
        block_ids=prompts,
        output_block_ids=answers if clock["answers"] else None,
        priority=np.array([entry.get("priority", 0) for entry in requests]),
    )


def scenario_of(case: dict[str, Any], scheduler: str) -> Any:
    """The case's settings as a scenario."""
    from llmsim.scenario import Scenario

    config = {FIELDS.get(name, name): value for name, value in case["config"].items() if name != "num_gpu_blocks"}
    blocks = case["config"]["num_gpu_blocks"]
    clock = case["clock"]
    fleet = {"replicas": clock["replicas"], "router": "least_outstanding", "concurrency": clock["concurrency"]}
    return Scenario(**SCENARIO, **config, **fleet, scheduler=scheduler, num_gpu_blocks_override=blocks)


def replayed(case: dict[str, Any], scheduler: str) -> Any:
    """The result of `simulate`, or the one line with which it gave up."""
    from llmsim.simulate import simulate

    try:
        return simulate(trace_of(case), scenario_of(case, scheduler))
    except PolicyError as error:
        return str(error).partition(" ")[2]  # without the policy's name


def compare_results(ours: Any, theirs: Any) -> str | None:
    """The first difference of two simulations of one trace in one line, or None."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return None if ours == theirs else f"clock: ours {_shown(ours)}, vLLM's {_shown(theirs)}"
    if ours.stats != theirs.stats:
        return f"clock: stats {ours.stats}, vLLM's {theirs.stats}"
    for name, mine in ours.requests.items():
        its = theirs.requests[name]
        differ = np.flatnonzero(~np.isclose(mine, its, rtol=0.0, atol=TOLERANCE_S, equal_nan=True))
        if differ.size:
            at = int(differ[0])
            return f"clock: {name} of request {at}: {mine[at]}, vLLM's {its[at]}"
    for name in ("seqs", "prefill_tokens", "prefill_context", "mode"):
        mine, its = (np.repeat(r.iterations[name], r.iterations["iterations"]) for r in (ours, theirs))
        if len(mine) != len(its) or (mine != its).any():
            at = int(np.flatnonzero(mine != its)[0]) if len(mine) == len(its) else min(len(mine), len(its))
            return f"clock: {name} from iteration {at} of {len(mine)} on, vLLM's {len(its)} iterations"
    return None


def _shown(result: Any) -> str:
    return f"gave up ({result})" if isinstance(result, str) else "came to an end"


# ----------------------------------------------------------------------------------------------------------- reporting


def check(
    case: dict[str, Any],
    tally: Counter[str],
    theirs: Callable[[dict[str, Any]], Steps] = vllm_steps,
    *,
    clock: bool = True,
) -> str | None:
    """Run one case both ways, count what it exercised, and name its first difference."""
    try:
        ours: Steps | str = our_steps(case)
    except PolicyError as error:
        ours = str(error)
    made = theirs(case)
    count(case, made, tally)
    if isinstance(ours, str):
        if len(made.turns) < MAX_TURNS // 2:
            return f"ours gave up ({ours}), vLLM did not"
        tally["without end"] += 1
    else:
        difference = compare_steps(ours, made)
        if difference is not None:
            return difference
    return compare_results(replayed(case, "vllm"), replayed(case, "vllm-native")) if clock else None


def count(case: dict[str, Any], steps: Steps, tally: Counter[str]) -> None:
    """What a case puts to the test."""
    entries = [entry for turn in steps.turns for entry in turn["scheduled"]]
    config = case["config"]
    tally.update({
        "cases": 1,
        "asynchronous": int(config.get("async_scheduling", False)),
        "priority": int(config.get("policy") == "priority"),
        "steps": len(steps.turns),
        "scheduled": len(entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "partial chunks": sum(not entry["samples"] for entry in entries),
        "preemptions": sum(len(turn["preempted"]) for turn in steps.turns),
        "prefix hits": sum(entry.get("prefix_hit", 0) > 0 for entry in entries),
        "evicted blocks": steps.evicted_blocks,
    })  # fmt: skip


def read_case(path: str) -> dict[str, Any]:
    """A scenario as printed with a difference; `-` is standard input."""
    text = sys.stdin.read() if path == "-" else Path(path).read_text()
    try:
        case: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise click.ClickException(f"{path}: line {error.lineno}: not JSON ({error.msg}).") from None
    for key in ("name", "config", "requests", "clock"):
        if not isinstance(case, dict) or key not in case:
            raise click.ClickException(f"{path}: no {key}. Give the JSON object that a difference was printed with.")
    return case


@click.command()
@click.option("--cases", type=click.IntRange(min=1), default=500, show_default=True, help="How many scenarios.")
@click.option("--seed", default=0, show_default=True, help="Which series of scenarios.")
@click.option("--case", "path", help="Run the scenario of this file again (- for standard input).")
@click.option(
    "--clock/--no-clock", default=True, show_default=True, help="Also compare simulations, not only schedules."
)
def main(cases: int, seed: int, path: str | None, clock: bool) -> None:
    """Compare our vLLM scheduler with the installed vLLM's on random scenarios."""
    from llmsim.schedulers.vllm_installed import VllmMissingError, vllm_version

    try:
        version = vllm_version()
    except VllmMissingError as error:
        raise click.ClickException(str(error)) from None
    started_s = time.process_time()
    tally: Counter[str] = Counter()
    different: list[str] = []
    for case in [read_case(path)] if path else (make_case(seed, number) for number in range(cases)):
        difference = check(case, tally, clock=clock)
        if difference is not None:
            different.append(case["name"])
            if len(different) == 1:
                print(f"first difference: case {case['name']}, {difference}\n{json.dumps(case)}", flush=True)
    figures = ", ".join(f"{tally[name]:,} {name}" for name in tally if name != "cases")
    print(f"vLLM {version}, seed {seed}: {tally['cases']} cases, {len(different)} differ ({figures})")
    print(f"{'steps and clock' if clock else 'steps'} compared in {time.process_time() - started_s:.0f} CPU s")
    if different:
        print(f"differ: {', '.join(different)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
