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
# Beside decodes tiles are not placed where none but the longest decode's is longer than what each multiprocessor gets,
# and the last one short: all is shared out evenly then, and the longest or latest tile may end alone. Against every
# tile in its place, decodes uneven and in any order, nine of ten iterations with prompts are within 13 % so, of placed
# ones 12 (the place of the longest is not known), in 4 us instead of 16 to 30.
EVENLY, SHORT = 1.0, 0.4  # of what each multiprocessor gets
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
        even = self._tile.is_integer() and not self.keys % self._tile and not graph_tokens % self._tile
        self._step = int(self._tile) if even else 1  # tokens whose calls alone take as long
        self.pair_s = kv_heads * self.group * tiles.block_s / (tiles.processors * self.rows * self.keys)
        element_bytes = 1 if tiles.kv_dtype == "fp8" else 2
        self.kv_token_s = 2 * kv_heads * tiles.head_dim * element_bytes / tiles.bandwidth_bytes_per_s

    def seconds(
        self, chunks: Sequence[tuple[int, int]], seqs: int = 0, kv_tokens: float = 0.0, longest: float = 0.0
    ) -> float:
        """One call: chunks (new, cached) and `seqs` decodes that read `kv_tokens`, of which one reads `longest` (0 or
        too few: all read alike)."""
        if not seqs and len(chunks) == 1:
            new, done = chunks[0]
            if new > self._half_tile and done % self._step == 0:
                new += -new % self._step  # the last tile's rows that stay empty cost as much
            chunk = new, done
            if chunk not in self._alone:
                if len(self._alone) >= CALLS:
                    self._alone.clear()
                self._alone[chunk] = self._seconds([chunk], 0, 0.0, 0.0, 0.0)
            return self._alone[chunk]
        return self._seconds(chunks, seqs, kv_tokens, longest, EVENLY if seqs else 0.0)

    def placed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float) -> float:
        """The same, every tile in its place."""
        return self._seconds(chunks, seqs, kv_tokens, longest, 0.0)

    def _seconds(
        self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float, evenly: float
    ) -> float:
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

        # of one KV head; when the latest tile ends; the tile before; the longest but the longest decode's
        work_s, late_s, last_s, tile_most_s, pieces, cut = 0.0, 0.0, 0.0, 0.0, 1, False
        if seqs:
            long_pieces = 1
            if most > 1:
                pieces, long_pieces = _pieces(decode_blocks, share, most), _pieces(long_blocks, share, most)
                cut = long_pieces > 1
            last_s = tile_most_s = block_s * decode_blocks / pieces + tile_s
            work_s = seqs * pieces * last_s
            late_s = block_s * long_blocks / long_pieces + tile_s
            if 0.5 * seqs * pieces * even > 1.0:  # it does not start at once
                late_s += 0.5 * (even * work_s - last_s)
        for new, done in chunks:
            tiles, blocks, pieces = ceil(new / per_tile), ceil((new + done) / keys), 1
            if most > 1:
                pieces = _pieces(blocks, share, most)
                cut = cut or pieces > 1
            first_s = block_s * blocks / pieces + tile_s
            if first_s > tile_most_s:
                tile_most_s = first_s
            end_s = even * work_s + (first_s if first_s > 0.5 * last_s else 0.5 * last_s)
            if end_s > late_s:
                late_s = end_s
            shortest = new if tiles == 1 else per_tile
            last_s = block_s * ceil((done + shortest) / keys) / pieces + tile_s
            seen = done + (new if tiles == 1 else per_tile * (tiles + 1) / 2)
            work_s += tiles * (block_s * (seen / keys + 0.5) + tile_s * pieces)
        busy_s = even * work_s
        if tile_most_s <= evenly * busy_s and last_s <= SHORT * busy_s:
            busy_s += 0.5 * last_s
            if late_s > busy_s:
                busy_s = late_s
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
        block_s, tile_s, kv_heads, keys = self.tiles.block_s, self.tiles.tile_s, self.kv_heads, self.keys
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
            tiles, blocks = ceil(new / per_tile), ceil((new + done) / keys)  # of the longest tile
            pieces = _pieces(blocks, share, most)
            each, piece_s = kv_heads * pieces, block_s / pieces
            while tiles > 0:
                shorter = int(((blocks - 1) * keys - done) / per_tile)  # tiles that see a block less
                if shorter < 0:
                    shorter = 0
                if shorter < tiles:
                    groups.append((each * (tiles - shorter), piece_s * blocks + tile_s))
                    tiles = shorter
                blocks -= 1
        return groups

    def even_s(self, chunks: Any, tokens: Any, pairs: Any) -> Any:
        """Of calls with `chunks` of `tokens` new tokens and `pairs` (query, key) pairs in all, by sums alone: every
        multiprocessor gets as much."""
        own = self.tiles
        tiles = tokens * self.group / self.rows + 0.5 * chunks
        blocks = pairs * self.group / (self.rows * self.keys) + 0.5 * tiles
        shared_s = self.kv_heads * (own.block_s * blocks + own.tile_s * tiles) / own.processors
        return shared_s + own.call_s * (chunks > 0)
