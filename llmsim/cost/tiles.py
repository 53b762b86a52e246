"""Attention of one layer as FlashAttention 3 schedules it on Hopper: tiles in turn on the multiprocessors.

    tile       `rows` queries (the heads that share a KV head packed together: n tokens are n * group rows) of one KV
               head against blocks of `keys` cached tokens: block_s * blocks + tile_s; a decode fills one like a chunk
    blocks     of the m-th tile of a chunk of n new tokens after c cached ones ceil((c + rows / group * m) / keys): the
               mask is causal; of a decode ceil(context / keys)
    order      decodes first, then chunks, a chunk's longest tiles first; each goes to the multiprocessor that is free
               first, so that a long tile that starts late ends alone
    splits     a sequence's blocks are cut into at most `most` pieces of about the blocks that one multiprocessor would
               get if all were shared out (plus 10 %); their results are combined afterwards
    most       32 where the batch fits into the largest CUDA graph (vLLM 0.25.1); else what fills the multiprocessors
               best for the longest new sequence alone, at least 0.85 of the best; 1 where its tiles fill 0.8 of them
    seconds    call_s + max(end of the last tile, KV bytes / bandwidth) + combine_s if anything was cut

So a decode over a long context beside a chunk of 600 tokens, which is not cut, is one chain of blocks per KV head and
takes a dozen times what its bytes say; chunks of several requests share one wave; and a short last chunk of a long
prompt waits for the decodes before it. Five constants for a head size hold for every number of heads: on an H200 2,800
timed calls of 33 head shapes, chunks alone and beside decodes, come out within 5 % in the median, 15 % for nine in ten.

Sources: FlashAttention 3, hopper/tile_size.h, heuristics.h (num_splits_heuristic), flash_prepare_scheduler.cu;
vLLM 0.25.1, v1/attention/backends/flash_attn.py (max_num_splits).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from heapq import heappush, heapreplace
from math import ceil, inf
from typing import Any

import msgspec

GRAPH_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
MOST_SPLITS = 128
FILLED, GOOD_ENOUGH = 0.8, 0.85  # of the multiprocessors; of the best efficiency
FEWEST_BLOCKS = 4  # keys of no more blocks are never cut
MARGIN = 1.1
ONE_GROUP_ROWS = 64  # rows up to which heads of 128 take tiles of half the rows
# Work whose last tile is this much shorter than all of it, and no sequence of which starts so late that it ends alone,
# is shared out evenly but for half of that tile (chat: nine of ten within 1 %; at worst, where the tiles of a long
# context just exceed a wave before another chunk, a quarter too short).
SHORT = 0.2
CALLS = 1 << 16  # of one chunk alone that are kept


class Tiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The constants of one head size and KV dtype."""

    head_dim: int
    kv_dtype: str
    processors: int
    block_s: float
    tile_s: float
    call_s: float
    combine_s: float
    bandwidth_bytes_per_s: float

    @property
    def shape(self) -> tuple[int, int]:
        return tile_shape(self.head_dim, self.kv_dtype)


def tile_shape(head_dim: int, kv_dtype: str) -> tuple[int, int]:
    """(query rows, keys of a block), causal, KV in pages."""
    if kv_dtype == "fp8":
        rows, keys = (192, 160 if head_dim <= 64 else 128) if head_dim <= 96 else (128, 160 if head_dim <= 192 else 128)
        return rows, keys
    if head_dim <= 96:
        return 192, 128
    return 128, 128 if head_dim <= 128 else 96 if head_dim <= 192 else 80


@cache
def most_splits(tiles: int, blocks: int, processors: int) -> int:
    """`tiles` of the longest new sequence, `blocks` of the longest context."""
    if tiles >= FILLED * processors or blocks <= FEWEST_BLOCKS:
        return 1
    filled = [tiles * splits / processors for splits in range(1, min(MOST_SPLITS, processors, blocks) + 1)]
    efficiency = [waves / ceil(waves) for waves in filled]
    best = max(efficiency)
    return next(i for i, value in enumerate(efficiency, 1) if value >= GOOD_ENOUGH * best)


def last_end_s(groups: Iterable[tuple[int, float]], processors: int) -> float:
    """When the last of (number, seconds) ends, each in turn on the processor that is free first."""
    free = [(0.0, processors)]  # (seconds, processors free from then)
    last_s = 0.0
    for number, seconds in groups:
        while number:
            at_s, there = free[0]
            end_s = at_s + seconds
            if end_s > last_s:
                last_s = end_s
            if there <= number:
                heapreplace(free, (end_s, there))
                number -= there
            else:
                heapreplace(free, (at_s, there - number))
                heappush(free, (end_s, number))
                number = 0
    return last_s


def _pieces(blocks: float, share: float, most: int) -> int:
    return min(ceil(blocks / share), most) or 1


class Schedule:
    """Seconds of attention calls of one head shape on a rank. `graph_tokens`: of the largest CUDA graph, 0 where no
    graph holds attention."""

    def __init__(self, tiles: Tiles, q_heads: int, kv_heads: int, graph_tokens: int) -> None:
        self.tiles, self.kv_heads, self.group = tiles, kv_heads, q_heads / kv_heads
        self.graph_tokens = graph_tokens
        self._alone: dict[tuple[int, int], float] = {}  # calls of one chunk
        self.rows, self.keys = tiles.shape
        self._tile = self.rows / self.group  # tokens of a tile
        self._half_tile = ONE_GROUP_ROWS / self.group if tiles.head_dim == 128 else 0.0
        self.pair_s = kv_heads * self.group * tiles.block_s / (tiles.processors * self.rows * self.keys)
        element_bytes = 1 if tiles.kv_dtype == "fp8" else 2
        self.kv_token_s = 2 * kv_heads * tiles.head_dim * element_bytes / tiles.bandwidth_bytes_per_s

    def seconds(
        self, chunks: Sequence[tuple[int, int]], seqs: int = 0, kv_tokens: float = 0.0, longest: float = 0.0
    ) -> float:
        """One call: chunks (new, cached) and `seqs` decodes that read `kv_tokens`, of which one reads `longest` (0 or
        too few: all read alike)."""
        if not seqs and len(chunks) == 1:
            (chunk,) = chunks
            if chunk not in self._alone:
                if len(self._alone) >= CALLS:
                    self._alone.clear()
                self._alone[chunk] = self._seconds(chunks, 0, 0.0, 0.0)
            return self._alone[chunk]
        return self._seconds(chunks, seqs, kv_tokens, longest)

    def _seconds(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float) -> float:
        """Asked for in most iterations with prompts, hence without lists and `max` where all is shared out evenly."""
        own, keys, kv_heads, most = self.tiles, self.keys, self.kv_heads, GRAPH_SPLITS
        block_s, tile_s, even = own.block_s, own.tile_s, kv_heads / own.processors
        mean = kv_tokens / seqs if seqs else 0.0
        if longest < mean:
            longest = mean
        tokens, read, new_most, keys_most = seqs, kv_tokens, 1, longest
        for new, done in chunks:
            tokens += new
            read += new + done
            if new > new_most:
                new_most = new
            if new + done > keys_most:
                keys_most = new + done
        per_tile = self._half_tile if new_most <= self._half_tile else self._tile
        if tokens > self.graph_tokens:
            most = most_splits(kv_heads * ceil(new_most / per_tile), ceil(keys_most / keys), own.processors)
        decode_blocks, long_blocks = mean / keys + 0.5, longest / keys + 0.5
        share = inf  # blocks of a piece
        if most > 1:
            blocks = seqs * decode_blocks
            for new, done in chunks:
                blocks += ceil(new / per_tile) * ceil((new + done) / keys)
            share = ceil(blocks * MARGIN * even)

        # of one KV head; when the latest long tile ends; the last tile; pieces of a sequence
        work_s, late_s, last_s, pieces, cut = 0.0, 0.0, 0.0, 1, False
        if seqs:
            long_pieces = 1
            if most > 1:
                pieces, long_pieces = _pieces(decode_blocks, share, most), _pieces(long_blocks, share, most)
                cut = long_pieces > 1
            work_s = seqs * (block_s * decode_blocks + tile_s * pieces)
            late_s = 0.5 * even * work_s + block_s * long_blocks / long_pieces + tile_s
        for new, done in chunks:
            tiles, blocks, pieces = ceil(new / per_tile), ceil((new + done) / keys), 1
            if most > 1:
                pieces = _pieces(blocks, share, most)
                cut = cut or pieces > 1
            end_s = even * work_s + block_s * blocks / pieces + tile_s
            if end_s > late_s:
                late_s = end_s
            first = new if tiles == 1 else per_tile
            last_s = block_s * ceil((done + first) / keys) / pieces + tile_s
            seen = done + (new if tiles == 1 else per_tile * (tiles + 1) / 2)
            work_s += tiles * (block_s * (seen / keys + 0.5) + tile_s * pieces)
        busy_s = even * work_s
        if last_s <= SHORT * busy_s and late_s <= busy_s + 0.5 * last_s:
            busy_s += 0.5 * last_s
        else:
            groups = self._groups(chunks, seqs, decode_blocks, long_blocks, per_tile, share, most)
            busy_s = last_end_s(groups, own.processors)
        bytes_s = self.kv_token_s * read
        seconds = own.call_s + (busy_s if busy_s > bytes_s else bytes_s)
        return seconds + own.combine_s if cut else seconds

    def _groups(
        self,
        chunks: Sequence[tuple[int, int]],
        seqs: int,
        decode_blocks: float,
        long_blocks: float,
        per_tile: float,
        share: float,
        most: int,
    ) -> list[tuple[int, float]]:
        """(number, seconds) of tiles in the order they start. Where among the decodes the longest is, is not known: in
        the middle."""
        block_s, tile_s, kv_heads = self.tiles.block_s, self.tiles.tile_s, self.kv_heads
        groups = []
        if seqs:
            pieces, long_pieces = _pieces(decode_blocks, share, most), _pieces(long_blocks, share, most)
            rest_s = block_s * (seqs * decode_blocks - long_blocks) / max(seqs - 1, 1) / pieces + tile_s
            before = (seqs - 1) // 2
            groups = [
                (kv_heads * before * pieces, rest_s),
                (kv_heads * long_pieces, block_s * long_blocks / long_pieces + tile_s),
                (kv_heads * (seqs - 1 - before) * pieces, rest_s),
            ]
        for new, done in chunks:
            pieces = _pieces(ceil((new + done) / self.keys), share, most)
            for number, blocks in self._rows_of_tiles(ceil(new / per_tile), done, per_tile):
                groups.append((kv_heads * number * pieces, block_s * blocks / pieces + tile_s))
        return groups

    def _rows_of_tiles(self, tiles: int, done: int, per_tile: float) -> list[tuple[int, int]]:
        """(tiles of one KV head, blocks of each) of a chunk after `done` cached tokens, the longest first."""
        found = []
        while tiles > 0:
            blocks = ceil((done + per_tile * tiles) / self.keys)
            shorter = max(int(((blocks - 1) * self.keys - done) / per_tile), 0)  # tiles that see a block less
            found.append((tiles - shorter, blocks))
            tiles = shorter
        return found

    def even_s(self, chunks: Any, tokens: Any, pairs: Any) -> Any:
        """Of calls with `chunks` of `tokens` new tokens and `pairs` (query, key) pairs in all, by sums alone: every
        multiprocessor gets as much."""
        own = self.tiles
        tiles = tokens * self.group / self.rows + 0.5 * chunks
        blocks = pairs * self.group / (self.rows * self.keys) + 0.5 * tiles
        shared_s = self.kv_heads * (own.block_s * blocks + own.tile_s * tiles) / own.processors
        return shared_s + own.call_s * (chunks > 0)
