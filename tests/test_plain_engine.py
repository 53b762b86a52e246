"""The plain twin against schedules recorded from vLLM's own scheduler, and its clocks against arithmetic by hand."""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from plain_engine import PlainEngine, PlainRequest, Scheduler, Settings, Step

from llmsim.cost import EAGER, FULL, Host, Ramp

ORACLE = Path(__file__).parent / "data" / "oracle"
SETTING_OF = {
    "num_gpu_blocks": "num_gpu_blocks",
    "block_size": "block_size",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_model_len": "max_model_len",
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "policy": "policy",
    "watermark": "watermark",
    "scheduler_reserve_full_isl": "reserve_full_isl",
    "async_scheduling": "async_scheduling",
}


def read_case(name: str) -> dict[str, Any]:
    path = ORACLE / name
    raw = path.read_bytes()
    case: dict[str, Any] = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return case


def content_keys(row: dict[str, Any], block_size: int) -> tuple[object, ...]:
    """Content of the blocks that may be shared: given token ids, or prompts that begin with pieces of shared texts."""
    tokens: list[object] = [*row.get("prompt_token_ids", ()), *row.get("output_token_ids", ())]
    if "shared" in row:
        tokens = [(text, i) for text, length in row["shared"] for i in range(length)][: row["prompt_len"]]
    return tuple(tuple(tokens[: end + block_size]) for end in range(0, len(tokens) - block_size + 1, block_size))


def as_requests(case: dict[str, Any]) -> list[PlainRequest]:
    size = case["config"]["block_size"]
    return [
        PlainRequest(
            id=row["id"],  # the oracle breaks ties by the text of the id
            send_s=float(row["arrival_step"]),
            prompt=row.get("prompt_len") or len(row["prompt_token_ids"]),
            output=row["output_len"],
            priority=row.get("priority", 0),
            block_keys=content_keys(row, size),
        )
        for row in case["requests"]
    ]


def turns(case: dict[str, Any]) -> list[tuple[int, Step, list[list[int]], list[int]]]:
    """The engine's loop without clocks: (turn, step, blocks of its requests, free list) for steps with tokens."""
    config = case["config"]
    settings = Settings(**{ours: config[theirs] for theirs, ours in SETTING_OF.items() if theirs in config})
    scheduler, coming = Scheduler(settings), deque(sorted(as_requests(case), key=lambda request: request.send_s))
    flying: deque[Step] = deque()
    depth, seen, turn = 2 if settings.async_scheduling else 1, [], 0
    while coming or scheduler.running or scheduler.waiting:
        while coming and coming[0].send_s <= turn:
            scheduler.add(coming.popleft())
        step = scheduler.schedule()
        if step.scheduled:
            held = [list(request.blocks) for request in step.scheduled]
            seen.append((turn, step, held, list(scheduler.blocks.free)))
        flying.append(step)
        if len(flying) == depth or not (step.scheduled or scheduler.running or scheduler.waiting):
            scheduler.update(flying.popleft())  # empty batches take their place in the queue too
        turn += 1
    return seen


@pytest.mark.parametrize("name", sorted(path.name for path in ORACLE.iterdir()))
def test_recorded_schedule_is_reproduced_block_by_block(name: str) -> None:
    case = read_case(name)
    mine = turns(case)
    assert len(mine) == len(case["steps"])
    for (_, step, held, free), theirs in zip(mine, case["steps"], strict=True):
        rows = zip(step.scheduled.items(), held, strict=True)
        assert [(request.id, done, new, blocks) for (request, (new, done)), blocks in rows] == [
            (row["id"], row["computed_before"], row["tokens"], row["blocks"]) for row in theirs["scheduled"]
        ], f"turn {theirs['iter']}"
        assert step.preempted == theirs["preempted"]
        assert len(free) == theirs["free_blocks"]
        assert free == theirs.get("free_queue", free)  # long cases keep only its length


# ---- the clocks, by hand ------------------------------------------------------------------------------------------


class FixedCost:
    """10 ms for a decode, 40 ms for an iteration with chunks."""

    kind, label = "constant", "by hand"

    def __init__(self, host: Host) -> None:
        self.host = host

    def mode(self, tokens: int, chunks: int) -> int:
        return EAGER if chunks else FULL

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        return Ramp(0.010, 0.0)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: int) -> float:
        return 0.040

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        return [False] * len(iterations["seqs"])


HOST = Host(
    schedule_s=0.001,
    launch_s=(0.003, 0.010, 0.030),
    update_s=0.0005,
    lead_s=(0.002, 0.004, 0.004),
    tail_s=(0.0, 0.001, 0.001),
    receive_s=0.001,
    respond_s=0.0002,
)


def test_asynchronous_clocks_by_hand() -> None:
    request = PlainRequest(0, 0.0, prompt=100, output=3)
    log = PlainEngine(FixedCost(HOST), Settings(num_gpu_blocks=100)).run([request])
    prefill, first, second = log
    assert prefill.schedule_s == pytest.approx(0.001)  # received
    assert prefill.gpu_end_s == pytest.approx(0.002 + 0.004 + 0.040)  # the GPU starts 4 ms into the launch
    assert first.schedule_s == pytest.approx(0.032)  # at once after the prefill's launch
    assert first.gpu_end_s == pytest.approx(0.046 + 0.010)
    assert prefill.update_s == pytest.approx(0.046)  # the launch of the first decode ended at 36 ms
    assert second.schedule_s == pytest.approx(0.0465)
    assert second.gpu_end_s == pytest.approx(0.066)
    assert first.update_s == pytest.approx(0.056)
    assert request.token_s == pytest.approx([0.0462, 0.0562, 0.0662])


def test_synchronous_clocks_by_hand() -> None:
    request = PlainRequest(0, 0.0, prompt=100, output=2)
    settings = Settings(num_gpu_blocks=100, async_scheduling=False)
    prefill, decode = PlainEngine(FixedCost(HOST), settings).run([request])
    assert prefill.update_s == pytest.approx(0.046)
    assert decode.schedule_s == pytest.approx(0.0465)
    assert decode.gpu_end_s == pytest.approx(0.0475 + 0.002 + 0.010)
    assert request.token_s == pytest.approx([0.0462, 0.0597])


def test_a_launch_holds_back_the_tokens_of_the_step_before() -> None:
    first = PlainRequest(0, 0.0, prompt=100, output=10)
    second = PlainRequest(1, 0.060, prompt=100, output=1)
    PlainEngine(FixedCost(HOST), Settings(num_gpu_blocks=100)).run([first, second])
    gaps = [after - before for before, after in zip(first.token_s, first.token_s[1:], strict=False)]
    assert max(gaps) == pytest.approx(0.0315, abs=1e-9)  # update, schedule and the launch of 30 ms
    assert gaps[gaps.index(max(gaps)) + 1] < 0.020  # the prefill itself was nearly done by then


def test_a_request_that_arrives_during_a_launch_slows_it() -> None:
    host = Host(launch_s=(0.003, 0.010, 0.030), interference_per_token_s=1e-5)
    first, second = PlainRequest(0, 0.0, prompt=100, output=1), PlainRequest(1, 0.010, prompt=500, output=1)
    log = PlainEngine(FixedCost(host), Settings(num_gpu_blocks=100)).run([first, second])
    assert log[0].launched_s == pytest.approx(0.035)


def test_a_closed_loop_sends_the_next_request_when_one_is_answered() -> None:
    requests = [PlainRequest(i, 0.0, prompt=100, output=2) for i in range(3)]
    PlainEngine(FixedCost(HOST), Settings(num_gpu_blocks=100, concurrency=1)).run(requests)
    assert requests[1].send_s == requests[0].token_s[-1]
    assert requests[2].send_s == requests[1].token_s[-1]


def test_a_request_that_never_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="request 0 with 1000 tokens never fits the KV cache"):
        PlainEngine(FixedCost(HOST), Settings(num_gpu_blocks=10)).run([PlainRequest(0, 0.0, prompt=1000, output=1)])
