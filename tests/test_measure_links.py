"""calibration/measure: collectives, copies, launches and memory, at sizes that a CPU has."""
# ruff: noqa: E402 - torch may be missing

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from needs import require

require("torch")

import torch

from calibration.measure import communication, copies, launch
from calibration.measure.communication import CUSTOM_BYTES, Communication, Job, Ranks, sent_bytes
from calibration.measure.copies import Copies
from calibration.measure.launch import Launch, Stack, handle, prompt_body
from calibration.measure.memory import Memory
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.timing import Bench
from llmsim.hardware import find_model

LLAMA = find_model("llama-3.1-8b")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench() -> Bench:
    return Bench("cpu", cap_s=0.001)


def wanted(device: str = "cpu", **more: Any) -> Wanted:
    return Wanted((LLAMA,), device=device, **more)


# ---- communication --------------------------------------------------------------------------------------------------


def test_collectives_are_measured_between_processes_and_a_dead_rank_is_one_line(bench: Bench) -> None:
    operator = Communication()
    try:
        rows = [operator.measure(found, bench) for found in operator.points(wanted())]
        assert {row.op for row in rows} == {"all_reduce", "all_gather", "reduce_scatter", "send_recv"}
        for row in rows:
            assert (row.variant, row.gpus, row.dtype) == ("gloo", 2, "bfloat16")
            assert 0 < row.p10_s <= row.median_s <= row.p90_s < 1
            assert row.bytes == row.size_bytes / (2 if row.op in ("all_gather", "reduce_scatter") else 1)
        ranks = operator._ranks
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        ranks.processes[1].join(5)
        with pytest.raises(Unavailable, match=r"^rank [01] of 2: .*$") as reason:
            ranks.seconds(Job("all_reduce", "gloo", "eager", 4096, 2, 3))
        assert "\n" not in str(reason.value)
        assert not ranks.alive and not any(process.is_alive() for process in ranks.processes)
    finally:
        operator.close()


def test_silent_ranks_are_one_line_and_tried_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def begin(count: int, device: str) -> Ranks:
        started.append(count)
        return Ranks(count, device, start_s=0.1)  # importing torch takes longer

    monkeypatch.setattr(communication, "Ranks", begin)
    operator = Communication()
    for found in list(operator.points(wanted()))[:2]:
        with pytest.raises(Unavailable, match=r"^no answer from rank 0, 1 of 2 within 0.1 s: ranks ended$"):
            operator.measure(found, bench)
    assert started == [2]


def test_more_gpus_than_there_are(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="4 GPUs are needed, 2 there"):
        Communication().measure(Point.of("all_reduce", "nccl", "graph", gpus=4, size_bytes=4096), bench)


def test_points_of_a_machine_with_four_gpus() -> None:
    points = list(Communication().points(wanted("cuda", gpus=4)))
    assert len({found.key for found in points}) == len(points)
    assert {found["gpus"] for found in points} == {2, 4}
    assert {found["size_bytes"] for found in points} >= {4096, 4 << 20, 256 << 20}
    custom = [found for found in points if found.variant == "vllm_custom"]
    assert {found.op for found in custom} == {"all_reduce"}
    assert max(found["size_bytes"] for found in custom) < CUSTOM_BYTES
    assert {found["gpus"] for found in points if found.op == "send_recv"} == {2}
    assert not list(Communication().points(wanted("cuda", gpus=1)))


@pytest.mark.parametrize(("op", "sent"), [("all_reduce", 1.75), ("all_gather", 0.875), ("send_recv", 1.0)])
def test_least_bytes_that_a_gpu_sends(op: str, sent: float) -> None:
    assert sent_bytes(op, 1000, 8) == 1000 * sent


# ---- copies ---------------------------------------------------------------------------------------------------------


def test_copies_are_measured(bench: Bench) -> None:
    operator = Copies()
    rows = [operator.measure(found, bench) for found in operator.points(wanted())]
    found = {(row.op, row.variant) for row in rows}
    both_ways = {(op, how) for op in ("copy_h2d", "copy_d2h") for how in ("pinned", "pageable", "blocks")}
    assert found == {("copy_d2d", "torch"), *both_ways}
    for row in rows:
        assert row.median_s > 0
        assert row.bytes == row.size_bytes * (2 if row.op == "copy_d2d" else 1)
        assert (row.n is not None) == (row.variant == "blocks")


def test_blocks_are_all_moved_to_shuffled_places(bench: Bench) -> None:
    source, target = torch.arange(1024), torch.zeros(1024, dtype=torch.int64)
    copies._in_blocks(source, target, 16, bench)()
    assert sorted(target.tolist()) == source.tolist()
    assert not torch.equal(target, source)
    assert all(torch.equal(piece, piece[0] + torch.arange(64)) for piece in target.chunk(16))


def test_between_gpus_only_where_there_are_two() -> None:
    assert "copy_p2p" in {found.op for found in Copies().points(wanted("cuda", gpus=2))}
    assert "copy_p2p" not in {found.op for found in Copies().points(wanted("cuda", gpus=1))}


# ---- launches -------------------------------------------------------------------------------------------------------


def test_launches_are_a_distribution_and_a_request_arrives_at_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled = []
    monkeypatch.setattr(launch, "handle", lambda body, vocabulary: handled.append(len(body)))
    operator = Launch()
    rows = {}
    for found in operator.points(wanted()):
        assert not handled
        rows[found.variant] = operator.measure(found, bench)
    assert set(rows) == {"eager", "eager+arrivals"}
    for row in rows.values():
        assert row.launch == "host" and row.model == LLAMA.name and row.layers == 2
        assert len(row.samples_s) == row.repeats >= 10
        assert row.p10_s <= row.median_s <= row.p90_s
    assert len(handled) == rows["eager+arrivals"].repeats + 5


def test_every_mode_is_wanted_on_a_gpu() -> None:
    operator = Launch()
    points = list(operator.points(wanted("cuda")))
    modes = {"eager", "piecewise", "full"}
    assert {found.variant for found in points} == modes | {f"{mode}+arrivals" for mode in modes}
    assert {found["layers"] for found in points} == {32}
    graph = next(found for found in points if found.variant == "full")
    with pytest.raises(Unavailable, match="CUDA graphs need a GPU"):
        operator.measure(graph, Bench("cpu"))


def test_a_request_is_read_checked_and_hashed_block_by_block() -> None:
    body = prompt_body()
    ids = json.loads(body)["prompt_token_ids"]
    vocabulary = {f"w{number}": number for number in ids}
    hashes = handle(body, vocabulary)
    assert len(hashes) == len(set(hashes)) == 63
    request = {"prompt": " ".join(f"w{number}" for number in ids[:40]), "prompt_token_ids": ids[:40]}
    shorter = handle(json.dumps(request).encode(), vocabulary)
    assert shorter[:2] == hashes[:2] and shorter[2] != hashes[2]
    request["prompt_token_ids"] = ids[1:41]
    with pytest.raises(ValueError, match="prompt: its words and its token ids differ"):
        handle(json.dumps(request).encode(), vocabulary)


def test_a_stack_runs_its_layers(bench: Bench) -> None:
    with torch.inference_mode():
        stack = Stack(launch._tiny(LLAMA), 2, 3, bench)
        out = stack.forward(3)
        assert out.shape == (3, 64) and bool(out.isfinite().all())
        _, key, value, _ = stack.before(stack.x, stack.x)
        stack.attend(key, value)
        assert torch.equal(stack.cache[0][stack.slots], key)
        assert torch.equal(stack.cache[1][stack.slots], value)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_of_the_host(bench: Bench) -> None:
    operator = Memory()
    (point,) = operator.points(wanted())
    (row,) = operator.measure(point, bench)
    assert row.variant == "total" and row.size_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_points_of_a_machine_with_two_gpus(bench: Bench) -> None:
    operator = Memory()
    points = {found.variant: found for found in operator.points(wanted("cuda", gpus=2))}
    assert set(points) == {"total", "context", "cublas_workspace", "graph_per_size", "nccl"}
    assert points["nccl"]["gpus"] == 2
    with pytest.raises(Unavailable, match="it needs a GPU"):
        operator.measure(points["context"], bench)
