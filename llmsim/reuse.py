"""How much of a trace's prompts a prefix cache of a given size would find, under every eviction policy.

Requests come one at a time, in order of time; each is looked up, computed and let go before the next. A turn that
waits for the one before comes its think time later, as if answers took none. Every
prefix id is a block, the last one of a prompt too, however few of its tokens it holds (an engine finds full blocks of
its own size only, and always computes the last token: replay the trace for that).

    hit ratio = blocks found / blocks of all prompts

This is how the Mooncake paper counts (arXiv 2407.00079, Table 1). Answers that the trace names are cached as well.
The caches are those of the replays. That the LRU curve is exact is checked against stack distances (Mattson et al.
1970) in tests/test_reuse.py: with LRU a block is found if and only if fewer than C distinct blocks were used since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING, Any

from llmsim.evicting import EvictingKVCache
from llmsim.eviction import DEFAULT, load_eviction
from llmsim.kvcache import KVCache
from llmsim.request import Request
from llmsim.trace_order import likely_times_s

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.trace import Trace

UNLIMITED = 0  # as a number of blocks: all that the trace has


@dataclass(frozen=True)
class Point:
    """One replay of the prompts' ids."""

    eviction: str
    cache_blocks: int  # UNLIMITED: room for everything
    hit_blocks: int
    prompt_blocks: int

    @property
    def hit_ratio(self) -> float:
        return self.hit_blocks / self.prompt_blocks


def curves(
    trace: Trace,
    cache_blocks: Sequence[int],
    evictions: Sequence[str],
    arguments: dict[str, Any] | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Point]:
    """Every policy with every size of cache. Raises ValueError for a trace without ids, or a cache below a prompt.

    `progress(done, total, what)` is told of each point.
    """
    if trace.block_ids is None:
        raise ValueError(f"{trace.name}: names no prefix blocks, so nothing is shared: use a trace with hash ids")
    longest = max(len(request.prefix_ids) for request in _requests(trace))
    for blocks in cache_blocks:
        if blocks != UNLIMITED and blocks < longest:
            raise ValueError(
                f"cache_blocks={blocks} is below the longest sequence of {trace.name}, {longest} blocks of"
                f" {trace.block_tokens} tokens: give {longest} or more"
            )
    wanted = [(name, blocks) for name in evictions for blocks in cache_blocks]
    points: list[Point] = []
    for name, blocks in wanted:
        if progress is not None:
            progress(len(points), len(wanted), f"{name}, {blocks or 'all'} blocks")
        points.append(_replayed(trace, name, blocks, arguments or {}))
    if progress is not None:
        progress(len(wanted), len(wanted), "done")
    return points


def size_grid(trace: Trace, points: int = 8) -> list[int]:
    """Sizes worth trying, smallest first: from the longest sequence to all blocks there are, evenly on a log scale."""
    if trace.block_ids is None:
        raise ValueError(f"{trace.name}: names no prefix blocks, so nothing is shared: use a trace with hash ids")
    if points < 2:
        raise ValueError(f"{points} sizes of a cache: give 2 or more")
    smallest = max(len(request.prefix_ids) for request in _requests(trace))
    largest = max(distinct_blocks(trace), smallest + 1)
    ratio = (largest / smallest) ** (1.0 / (points - 1))
    return sorted({round(smallest * ratio**at) for at in range(points)})


def frame(points: Iterable[Point], *, block_tokens: int, token_bytes: float | None = None) -> pd.DataFrame:
    """A row a point: eviction, cache_blocks (inf: room for all), cache_tokens, cache_bytes (nan without
    `token_bytes`, the KV of one token), hit_blocks, prompt_blocks, hit_ratio."""
    import pandas as pd

    rows = []
    for point in points:
        blocks = float(point.cache_blocks) if point.cache_blocks != UNLIMITED else inf
        tokens = blocks * block_tokens
        room_bytes = nan if token_bytes is None else tokens * token_bytes
        rows.append(
            (point.eviction, blocks, tokens, room_bytes, point.hit_blocks, point.prompt_blocks, point.hit_ratio)
        )
    columns = ["eviction", "cache_blocks", "cache_tokens", "cache_bytes", "hit_blocks", "prompt_blocks", "hit_ratio"]
    return pd.DataFrame(rows, columns=columns)


def distinct_blocks(trace: Trace) -> int:
    """Blocks that an unlimited cache ends up with."""
    cache = KVCache(1 << 60, 1, prefix_block_tokens=1)
    _serve(trace, cache, [0.0])
    return cache.idle_blocks


def _replayed(trace: Trace, name: str, blocks: int, arguments: dict[str, Any]) -> Point:
    now_s = [0.0]
    total = blocks if blocks != UNLIMITED else 1 << 60
    cache: KVCache
    if name == DEFAULT:
        cache = KVCache(total, 1, prefix_block_tokens=1)
    else:
        policy = load_eviction(name, arguments)
        cache = EvictingKVCache(total, 1, eviction=policy, prefix_block_tokens=1, clock=lambda: now_s[0])
        cache.foresee(_requests(trace))
    found = _serve(trace, cache, now_s)
    assert trace.block_ids is not None
    return Point(name, blocks, found, sum(map(len, trace.block_ids)))


def _serve(trace: Trace, cache: KVCache, now_s: list[float]) -> int:
    found = 0
    for request in _requests(trace):
        now_s[0] = request.arrival_s
        hit = cache.match(request, request.prompt_tokens)
        found += hit.blocks
        every = request.identity_tokens
        cache.admit(request, hit, every)
        cache.store(request, every)
        cache.release(request, every, every)
    return found


def _requests(trace: Trace) -> Iterator[Request]:
    """The trace with a token for every id; one token more is asked for, so that the last id can be found too."""
    assert trace.block_ids is not None
    answers = trace.output_block_ids
    times_s = likely_times_s(trace)
    for place, i in enumerate(sorted(range(len(times_s)), key=times_s.__getitem__)):
        ids = trace.block_ids[i]
        whole = ids + answers[i] if answers is not None else ids
        yield Request(place, times_s[i], len(ids) + 1, 1, prefix_ids=whole, identity_tokens=len(whole))
