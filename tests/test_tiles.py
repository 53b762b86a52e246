"""FlashAttention 3's schedule: against a twin tile by tile, against cases done by hand, against timed calls."""

from __future__ import annotations

from dataclasses import replace
from heapq import heapreplace
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.fit_kernels import fit_tile, tiled_s
from calibration.measure.rows import read_parquet
from llmsim.cost.profile import read_profile
from llmsim.cost.tiles import Schedule, Tiles, last_end_s, most_splits, tile_shape

MEASUREMENTS = Path(__file__).parents[1] / "calibration" / "measurements"
BLOCK_S, TILE_S, CALL_S, COMBINE_S = 2e-6, 4e-6, 5e-6, 3e-6
TILES = Tiles(128, "bfloat16", 132, BLOCK_S, TILE_S, CALL_S, COMBINE_S, 4e12)
LLAMA = Schedule(TILES, 32, 8, 512)  # four query heads share a KV head: 32 tokens fill a tile
UNCUT = Schedule(TILES, 32, 8, 0)


def twin_s(schedule: Schedule, chunks: list[tuple[int, int]], contexts: list[int]) -> float:
    """Every tile of every head by itself, decodes alike in the middle of their order: no sums, no groups."""
    own = schedule.tiles
    rows = 64 if max([new for new, _ in chunks], default=1) * schedule.group <= 64 else 128
    per_tile = rows / schedule.group
    sequences = [(1, context) for context in contexts] + chunks
    blocks_of = [ceil((done + (new if new > 1 else 0)) / 128) for new, done in sequences]
    tokens = sum(new for new, _ in sequences)
    tiles_of = [ceil(new / per_tile) for new, _ in sequences]
    if tokens <= schedule.graph_tokens:
        most = 32
    else:
        longest_new = max(new for new, _ in sequences)
        most = most_splits(schedule.kv_heads * ceil(longest_new / per_tile), max(blocks_of), own.processors)
    everything = sum(tiles * blocks for tiles, blocks in zip(tiles_of, blocks_of, strict=True))
    share = ceil(1.1 * everything * schedule.kv_heads / own.processors)
    free_s = [0.0] * own.processors
    cut = False
    for (new, done), blocks, tiles in zip(sequences, blocks_of, tiles_of, strict=True):
        pieces = 1 if most == 1 else max(min(ceil(blocks / share), most), 1)
        cut = cut or pieces > 1
        for tile in range(tiles, 0, -1):
            seen = blocks if new == 1 else min(ceil((done + per_tile * tile) / 128), blocks)
            for _ in range(schedule.kv_heads * pieces):
                heapreplace(free_s, free_s[0] + own.block_s * seen / pieces + own.tile_s)
    read = sum(contexts) + sum(new + done for new, done in chunks)
    return own.call_s + max(max(free_s), schedule.kv_token_s * read) + (own.combine_s if cut else 0.0)


@given(
    chunks=st.lists(st.tuples(st.integers(2, 4000), st.integers(0, 20_000)), min_size=1, max_size=4),
    seqs=st.integers(0, 120),
    context=st.integers(1, 12_000),
    graph_tokens=st.sampled_from([0, 512]),
)
def test_tiles_in_groups_and_shared_out_evenly_are_near_the_schedule_tile_by_tile(
    chunks: list[tuple[int, int]], seqs: int, context: int, graph_tokens: int
) -> None:
    """Placed within 12 % (of decodes whose cut leaves a fraction of a block), shared out evenly within 30 % of equal
    tiles, whose waves are sharper than those of a real batch; and half a block's rounding."""
    schedule = Schedule(TILES, 32, 8, graph_tokens)
    context = 128 * ceil(context / 128) - 64  # a mean context is taken for half a block more
    exact_s = twin_s(schedule, chunks, [context] * seqs)
    rounding_s = 3 * (BLOCK_S + TILE_S)
    assert schedule.placed_s(chunks, seqs, context * seqs, 0.0) == pytest.approx(exact_s, rel=0.12, abs=rounding_s)
    assert schedule.seconds(chunks, seqs, context * seqs) == pytest.approx(exact_s, rel=0.3, abs=rounding_s)


@pytest.mark.parametrize(
    ("most_seqs", "context", "prompts", "prompt", "cached"),
    [(80, 800, 2, 760, 0), (60, 2500, 1, 2200, 0), (250, 900, 8, 760, 0), (60, 3000, 5, 200, 2500)],
    ids=["chat", "long prompts", "busy", "shared prefixes"],
)
def test_iterations_as_they_come_are_near_the_schedule(
    most_seqs: int, context: int, prompts: int, prompt: int, cached: int
) -> None:
    """Uneven decodes in any order: nine of ten within 16 % of every tile in its place, and hardly worse than placed."""
    rng = np.random.default_rng(0)
    evenly, placed = [], []
    for _ in range(300):
        contexts = np.clip(rng.lognormal(np.log(context), 0.7, rng.integers(0, most_seqs)), 20, 12_000).astype(int)
        news = np.clip(rng.lognormal(np.log(prompt), 0.8, rng.integers(1, prompts + 1)), 10, 8000).astype(int)
        chunks = [(int(new), int(cached * rng.uniform(0.2, 3.0))) for new in news]
        exact_s = twin_s(LLAMA, chunks, contexts.tolist())
        batch = chunks, len(contexts), float(contexts.sum()), float(contexts.max(initial=0))
        evenly.append(LLAMA.seconds(*batch) / exact_s - 1.0)
        placed.append(LLAMA.placed_s(*batch) / exact_s - 1.0)
    for errors in (evenly, placed):
        assert np.quantile(np.abs(errors), 0.9) < 0.16 and np.median(np.abs(errors)) < 0.04
        assert abs(np.mean(errors)) < 0.03
    assert np.quantile(np.abs(evenly), 0.9) < np.quantile(np.abs(placed), 0.9) + 0.03


def test_a_chunk_alone() -> None:
    # 32 tiles for each of 8 KV heads, of 1 to 8 blocks in fours; 256 tiles on 132 processors, the longest first
    sizes = [BLOCK_S * blocks + TILE_S for blocks in range(8, 0, -1) for _ in range(4 * 8)]
    assert UNCUT.seconds([(1024, 0)]) == pytest.approx(CALL_S + last_end_s([(1, size) for size in sizes], 132))
    # one tile for each head sees its own 32 tokens after 4,096: 33 blocks in one go
    assert Schedule(TILES, 512, 128, 0).seconds([(32, 4096)]) == pytest.approx(CALL_S + 33 * BLOCK_S + TILE_S)


def test_chunks_of_several_requests_share_a_wave() -> None:
    one_s = UNCUT.seconds([(64, 448)])  # of four blocks, which are not cut
    assert UNCUT.seconds([(64, 448)] * 8) == pytest.approx(one_s)  # 2 x 8 tiles each: 128 on 132 processors
    assert UNCUT.seconds([(64, 448)] * 9) > 1.8 * one_s - CALL_S


def test_a_long_context_beside_a_chunk_is_one_chain_of_blocks() -> None:
    beside_s = LLAMA.seconds([(600, 0)], 1, 16_384)
    assert beside_s == pytest.approx(CALL_S + (16_384 / 128 + 0.5) * BLOCK_S + TILE_S)
    cut_s = LLAMA.seconds([(500, 0)], 1, 16_384)  # 501 tokens fit into the largest graph: pieces
    assert cut_s < 0.4 * beside_s
    assert LLAMA.seconds([(600, 0)], 16, 16 * 2048, 16_384) > LLAMA.seconds([(600, 0)], 16, 16 * 2048) + 0.4 * beside_s


def test_a_short_chunk_of_a_long_prompt_waits_for_the_decodes_before_it() -> None:
    decodes_s, chunk_s = UNCUT.seconds([], 64, 64 * 2048) - CALL_S, UNCUT.seconds([(500, 8192)]) - CALL_S
    assert UNCUT.seconds([(500, 8192)], 64, 64 * 2048) == pytest.approx(CALL_S + decodes_s + chunk_s, rel=0.1)


def test_bytes_bind_where_tiles_do_not() -> None:
    quick = Schedule(Tiles(128, "bfloat16", 132, 1e-9, 1e-9, CALL_S, COMBINE_S, 4e12), 32, 8, 0)
    assert quick.seconds([(1024, 0)], 64, 64 * 4096) == pytest.approx(CALL_S + 4096 * (64 * 4096 + 1024) / 4e12)


@pytest.mark.parametrize(
    ("tiles", "blocks", "most"),
    [(106, 64, 1), (8, 4, 1), (8, 64, 15), (64, 64, 2), (100, 64, 5), (1, 8, 7), (1, 500, 109)],
)
def test_as_many_pieces_as_fill_the_processors_well(tiles: int, blocks: int, most: int) -> None:
    """num_splits_heuristic of FlashAttention 3 by hand: tiles * n / 132 in whole waves, 0.85 of the best is enough."""
    assert most_splits(tiles, blocks, 132) == most


def test_tile_shapes() -> None:
    shapes = {size: tile_shape(size, "bfloat16") for size in (64, 80, 96, 128, 192, 256)}
    assert shapes == {
        64: (192, 128), 80: (192, 128), 96: (192, 128), 128: (128, 128), 192: (128, 96), 256: (128, 80)
    }  # fmt: skip
    assert [tile_shape(size, "fp8") for size in (64, 96, 128, 256)] == [(192, 160), (192, 128), (128, 160), (128, 128)]


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-6, 1e-3)), min_size=1, max_size=12), st.integers(1, 140))
def test_groups_end_when_their_tiles_do(groups: list[tuple[int, float]], processors: int) -> None:
    free_s = [0.0] * processors
    for number, seconds in groups:
        for _ in range(number):
            heapreplace(free_s, free_s[0] + seconds)
    assert last_end_s(groups, processors) == pytest.approx(max(free_s))


def test_constants_are_found_again() -> None:
    rows, _ = read_parquet(MEASUREMENTS / "h200-sxm-attention.parquet")
    own = [row for row in rows if (row.head_dim, row.kv_dtype) == (64, "bfloat16")][::3]
    made = Tiles(64, "bfloat16", 132, 1.5e-6, 6e-6, 4e-6, 2e-6, 3.5e12)
    found = fit_tile([replace(row, median_s=tiled_s(made, row)) for row in own], 64, "bfloat16", 132)
    assert (found.block_s, found.tile_s, found.call_s) == pytest.approx((1.5e-6, 6e-6, 4e-6), rel=0.03)


def test_shipped_constants_hold_for_every_head_shape() -> None:
    """H200: calls of chunks, beside decodes or not, of 14 head shapes."""
    rows, _ = read_parquet(MEASUREMENTS / "h200-sxm-attention.parquet")
    tiles = {(own.head_dim, own.kv_dtype): own for own in read_profile("h200-sxm").kernels.tiles}
    assert set(tiles) == {(size, kv) for size in (64, 128, 256) for kv in ("bfloat16", "fp8")}
    errors: dict[tuple[int, int, int], list[float]] = {}
    for row in rows:
        if row.variant == "fa3" and row.kv_dtype == "bfloat16":
            heads = (row.q_heads, row.kv_heads, row.head_dim)
            errors.setdefault(heads, []).append(abs(tiled_s(tiles[row.head_dim, row.kv_dtype], row) / row.median_s - 1))
    assert len(errors) >= 14
    assert max(median(found) for found in errors.values()) < 0.08


def test_shipped_constants_are_those_of_an_engine() -> None:
    """Llama-3.1-8B in vLLM 0.25.1 on an H200, by torch's profiler: us of a layer's attention for prompts of 1 x 1,024,
    2 x 1,024, 8 x 1,024 and 4 x 256 tokens."""
    (tiles,) = (t for t in read_profile("h200-sxm").kernels.tiles if (t.head_dim, t.kv_dtype) == (128, "bfloat16"))
    schedule = Schedule(tiles, 32, 8, 512)
    seconds = [schedule.seconds([(new, 0)] * count) for new, count in ((1024, 1), (1024, 2), (1024, 8), (256, 4))]
    assert seconds == pytest.approx([31.8e-6, 58.5e-6, 217.7e-6, 22.0e-6], rel=0.05)
