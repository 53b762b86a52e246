"""Hit ratio against cache size: the LRU curve against stack distances, bounds, and the command."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from needs import there

from llmsim.cli import main
from llmsim.eviction import BUILTIN
from llmsim.reuse import UNLIMITED, curves, distinct_blocks
from llmsim.trace import Trace, load_trace

SHARED = Path(__file__).parents[2] / "shared" / "traces" / "mooncake"


def made(block_ids: list[tuple[int, ...]], answers: list[tuple[int, ...]] | None = None) -> Trace:
    n = len(block_ids)
    prompt = np.array([512 * len(ids) for ids in block_ids])
    return Trace(
        "made", np.arange(n, dtype=float), prompt, np.ones(n, dtype=np.int64), block_tokens=512, block_ids=block_ids,
        output_block_ids=answers,
    )  # fmt: skip


def conversations(seed: int, requests: int = 500) -> Trace:
    """Turns that continue one another, shared beginnings, and prompts of their own; ids name their whole prefix."""
    random = Random(seed)
    chains: list[tuple[int, ...]] = [(0,)]
    fresh = 1
    ids = []
    for _ in range(requests):
        parent = random.choice(chains[-40:]) if random.random() < 0.8 else random.choice(chains)[:1]
        kept = parent[: random.randrange(len(parent)) + 1]
        more = random.randrange(0, 8)
        ids.append(kept + tuple(range(fresh, fresh + more)))
        fresh += more
        chains.append(ids[-1])
    return made(ids)


def stack_distances(trace: Trace) -> list[list[float]]:
    """For each block of each prompt, how many distinct blocks were used since its last use, itself included.

    The stack is a row of marks, oldest first: every use takes the next place, and only a block's last use is marked. A
    request is used as a whole, its first block last, so that beginnings are never older than what follows them.
    """
    rows = trace.block_ids or ()
    marked = np.zeros(sum(map(len, rows)), dtype=bool)
    last: dict[int, int] = {}
    end = 0
    distances = []
    for ids in rows:
        distances.append([np.count_nonzero(marked[last[i] : end]) if i in last else float("inf") for i in ids])
        for i in reversed(ids):
            if i in last:
                marked[last[i]] = False
            last[i], marked[end] = end, True
            end += 1
    return distances


def hits_by_distance(distances: list[list[float]], blocks: int) -> int:
    """Leading blocks of each prompt that a cache of this size holds."""
    found = 0
    for row in distances:
        found += next((n for n, distance in enumerate(row) if distance > blocks), len(row))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_lru_curve_is_exactly_that_of_stack_distances(seed: int) -> None:
    trace = conversations(seed)
    distances = stack_distances(trace)
    longest = max(map(len, trace.block_ids or ()))
    sizes = [longest, longest + 1, 40, 60, 80, 100, 150, 400, UNLIMITED]
    found = [point.hit_blocks for point in curves(trace, sizes, ["lru"])]
    assert found == [hits_by_distance(distances, size or 10**9) for size in sizes]
    assert len(set(found)) > 5


@there(SHARED)
def test_the_lru_curve_of_the_mooncake_conversations_is_exact() -> None:
    trace = load_trace(SHARED / "conversation_trace.first2000.jsonl", limit=1000)
    distances, sizes = stack_distances(trace), [1000, 5000]
    found = [point.hit_blocks for point in curves(trace, sizes, ["lru"])]
    assert found == [hits_by_distance(distances, blocks) for blocks in sizes]
    assert 1000 < found[0] < found[1]


@there(SHARED)
def test_an_unlimited_cache_finds_what_a_set_of_seen_ids_finds() -> None:
    """64.0 % of the synthetic trace's blocks; ids of this trace name their whole prefix, so a set is enough."""
    path = SHARED / "synthetic_trace.jsonl.gz"
    seen: set[int] = set()
    found = every = 0
    with gzip.open(path, "rt") as file:
        for line in file:
            ids = json.loads(line)["hash_ids"]
            found += sum(i in seen for i in ids)
            every += len(ids)
            seen.update(ids)
    (point,) = curves(load_trace(path), [UNLIMITED], ["lru"])
    assert (point.hit_blocks, point.prompt_blocks) == (found, every)
    assert round(point.hit_ratio, 3) == 0.640


@pytest.mark.parametrize("seed", range(3))
def test_no_policy_finds_more_than_belady(seed: int) -> None:
    trace = conversations(seed, 250)
    points = curves(trace, [50, 100, 200], list(BUILTIN))
    best = {point.cache_blocks: point.hit_blocks for point in points if point.eviction == "belady"}
    assert all(point.hit_blocks <= best[point.cache_blocks] for point in points)
    lru = {point.cache_blocks: point.hit_blocks for point in points if point.eviction == "lru"}
    assert any(lru[blocks] < best[blocks] for blocks in best)


def test_a_larger_lru_cache_never_finds_less() -> None:
    points = curves(conversations(5), [50, 70, 100, 150, 300, UNLIMITED], ["lru"])
    found = [point.hit_blocks for point in points]
    assert found == sorted(found)


def test_every_id_is_a_block_the_last_one_too_and_answers_are_cached() -> None:
    trace = made([(1, 2), (1, 2), (1, 2, 3, 4)], [(3,), (9,), ()])
    (point,) = curves(trace, [UNLIMITED], ["lru"])
    assert (point.hit_blocks, point.prompt_blocks) == (0 + 2 + 3, 8)
    assert distinct_blocks(trace) == 5


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "chats.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(([1, 2], [3, 4], [1, 2], [5], [3, 4]))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_table_csv_and_plot(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "points.csv", tmp_path / "curves.svg"
    command = ["trace", "reuse", path, "--cache-blocks", "4,inf", "--eviction", "lru", "--eviction", "belady"]
    assert main([*command, "--model", "llama-3.1-8b", "-o", str(out), "--plot", str(plot)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "blocks  gib     lru  belady",
        "4       0.2  0.3333  0.4444",
        "inf       -  0.4444  0.4444",
    ]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "eviction": "lru", "cache_blocks": "4", "cache_tokens": "2048", "hit_blocks": "3", "prompt_blocks": "9",
        "hit_ratio": "0.333333",
    }  # fmt: skip
    assert len(rows) == 4
    drawn = plot.read_text()
    assert "Cache size (blocks)" in drawn
    assert "belady" in drawn


def test_json_has_a_row_for_every_size(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "reuse", path, "--cache-blocks", "2,4", "--eviction", "lfu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"blocks": 2, "lfu": 0.0}, {"blocks": 4, "lfu": 0.3333}]


def test_a_policy_of_ones_own_has_a_curve(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "class Mine:\n"
        "    def __init__(self, sign=1):\n"
        "        self.sign = sign\n"
        "    def key(self, extent, now_s):\n"
        "        return self.sign * extent.used_s\n"
    )
    command = ["trace", "reuse", path, "--cache-blocks", "4", "--eviction", f"{mine}:Mine", "--json"]
    assert main(command) == 0
    assert main([*command, "--eviction-arg", "sign=-1"]) == 0
    lru, mru = [json.loads(line)[0] for line in capsys.readouterr().out.splitlines()]
    assert list(lru.values())[1] == 0.3333
    assert list(mru.values())[1] == 0.4444


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache-blocks", "1"], "cache_blocks=1 is below the longest sequence of .*, 2 blocks of 512 tokens"),
        (["--cache-blocks", "-3"], "--cache-blocks -3"),
        (["--eviction", "lur"], "unknown eviction 'lur'"),
        (["--eviction-arg", "ttl_s=3"], "--eviction-arg ttl_s=3: is for one policy, not 8"),
        (["--cache-blocks", "inf", "--plot", "x.svg"], "--plot needs sizes to draw"),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, arguments, message, capsys) -> None:
    assert main(["trace", "reuse", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_trace_without_ids_has_no_reuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plain.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,200,10\n")
    assert main(["trace", "reuse", str(file)]) == 2
    assert "names no prefix blocks" in capsys.readouterr().err


def test_a_turn_that_waits_comes_its_think_time_after_the_one_before() -> None:
    """Two conversations of two turns each, written one after the other, take turns in a cache that holds one."""
    trace = made([(1, 2), (1, 2, 3), (5, 6), (5, 6, 7)])
    nan = float("nan")
    turns = Trace(
        "turns", np.array([0.0, nan, 1.0, nan]), trace.prompt_tokens, trace.output_tokens, block_tokens=512,
        block_ids=trace.block_ids, parent=np.array([-1, 0, -1, 2]), delay_s=np.array([nan, 10.0, nan, 10.0]),
    )  # fmt: skip
    found = [curves(one, [3], ["lru"])[0].hit_blocks for one in (trace, turns)]
    assert found == [4, 1]
    assert curves(turns, [5], ["lru"])[0].hit_blocks == 4


@there(SHARED)
def test_the_order_of_the_mooncake_paper() -> None:
    """Its Table 1 at 10,000 blocks: LRU 0.40, LFU 0.35, LengthAware 0.35. Another trace of theirs, the same order."""
    trace = load_trace(SHARED / "synthetic_trace.jsonl.gz")
    lru, lfu, length = (point.hit_ratio for point in curves(trace, [10_000], ["lru", "lfu", "length"]))
    assert [round(ratio, 2) for ratio in (lru, lfu, length)] == [0.42, 0.36, 0.21]
