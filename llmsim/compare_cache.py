"""What the KV cache does under each side: where prompt tokens were found, what was evicted, what tiers moved.

    found      prompt tokens of the answered requests, by where they were at first admission: in the GPU's cache, loaded
               from a tier, or computed
    moved      bytes loaded from each tier and written to it, = tokens * bytes of one token's KV (all layers and GPUs of
               a replica, in the KV cache's precision)
    evicted    KV blocks whose content was lost for others

A request preempted after its admission loads again, and prefetching moves content between tiers before anybody is
admitted; then a tier loaded more than was found at admission and the two cannot be told apart. Such a side has one
row "GPU or tiers" instead of a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsim.hardware import find_model
from llmsim.metrics import Result, all_rejected
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

GPU, COMPUTED, UNDIVIDED = "GPU cache", "computed", "GPU or tiers"


@dataclass(frozen=True)
class TierUse:
    name: str
    loaded_tokens: int
    written_tokens: int
    loaded_bytes: float
    written_bytes: float


@dataclass(frozen=True)
class CacheUse:
    """One side's cache; numbers of the summary under its keys."""

    side: str
    prompt_tokens: int
    cached_tokens: int  # at first admission: in the GPU's cache or loaded
    tiers: tuple[TierUse, ...]
    divided: bool  # whether what tiers loaded is part of cached_tokens
    evicted_blocks: int
    block_tokens: int
    num_preemptions: int
    prefix_cache_hit_rate: float | None
    mean_ttft_ms: float | None
    p99_ttft_ms: float | None
    output_throughput: float | None


def cache_uses(
    trace: Trace, scenarios: Mapping[str, Scenario], *, progress: Callable[[int, int, str], None] | None = None
) -> list[CacheUse]:
    """Replay the trace under each side; `progress(done, total, what)` is told of each."""
    found: list[CacheUse] = []
    for name, scenario in scenarios.items():
        if progress is not None:
            progress(len(found), len(scenarios), name)
        result = simulate(trace, scenario)
        check_answered(name, result)
        found.append(cache_use(name, result))
    if progress is not None:
        progress(len(found), len(scenarios), "done")
    return found


def check_answered(name: str, result: Result) -> None:
    """Raises ValueError for a side that rejected every request: it has no number to show."""
    if not result.finished.any():
        raise ValueError(f"{name}: {all_rejected(result.requests, result.scenario.admission)}")


def cache_use(name: str, result: Result) -> CacheUse:
    summary, scenario = result.summary(), result.scenario
    model, tp = find_model(scenario.model), scenario.tensor_parallel
    token_bytes = model.layers * tp * model.kv_layer_bytes(scenario.kv_dtype, tp)
    tiers = tuple(
        TierUse(
            row["name"],
            row["loaded_tokens"],
            row["written_tokens"],
            row["loaded_tokens"] * token_bytes,
            row["written_tokens"] * token_bytes,
        )
        for row in summary["kv_tiers"]
    )
    cached = int(result.requests["cached_tokens"][result.finished].sum())
    again = summary["num_preemptions"] > 0 or scenario.kv_tier_prefetch
    return CacheUse(
        name,
        summary["total_input_tokens"],
        cached,
        tiers,
        not again and sum(tier.loaded_tokens for tier in tiers) <= cached,
        int(result.stats["evicted_blocks"]),
        scenario.block_size,
        summary["num_preemptions"],
        summary["prefix_cache_hit_rate"],
        summary["mean_ttft_ms"],
        summary["p99_ttft_ms"],
        summary["output_throughput"],
    )


def found_frame(uses: Iterable[CacheUse]) -> pd.DataFrame:
    """A row a side and place, fastest place first: side, place, tokens, share (of the side's prompt tokens), order."""
    import pandas as pd

    rows = []
    for use in uses:
        places: list[tuple[str, int]] = []
        if use.divided:
            places.append((GPU, use.cached_tokens - sum(tier.loaded_tokens for tier in use.tiers)))
            places += [(tier.name, tier.loaded_tokens) for tier in use.tiers]
        else:
            places.append((UNDIVIDED if use.tiers else GPU, use.cached_tokens))
        places.append((COMPUTED, use.prompt_tokens - use.cached_tokens))
        for order, (place, tokens) in enumerate(places):
            share = tokens / use.prompt_tokens if use.prompt_tokens else None
            rows.append((use.side, place, tokens, share, order))
    return pd.DataFrame(rows, columns=["side", "place", "tokens", "share", "order"])


def moved_frame(uses: Iterable[CacheUse]) -> pd.DataFrame:
    """A row a side, tier and direction: side, tier, direction (loaded, written), tokens, bytes."""
    import pandas as pd

    rows = []
    for use in uses:
        for tier in use.tiers:
            rows.append((use.side, tier.name, "loaded", tier.loaded_tokens, tier.loaded_bytes))
            rows.append((use.side, tier.name, "written", tier.written_tokens, tier.written_bytes))
    return pd.DataFrame(rows, columns=["side", "tier", "direction", "tokens", "bytes"])


def cache_frame(uses: Iterable[CacheUse]) -> pd.DataFrame:
    """A row a side: hit rate, evictions (blocks and tokens), preemptions, TTFT, throughput."""
    import pandas as pd

    rows = [
        {
            "side": use.side,
            "prefix_cache_hit_rate": use.prefix_cache_hit_rate,
            "evicted_blocks": use.evicted_blocks,
            "evicted_tokens": use.evicted_blocks * use.block_tokens,
            "num_preemptions": use.num_preemptions,
            "mean_ttft_ms": use.mean_ttft_ms,
            "p99_ttft_ms": use.p99_ttft_ms,
            "output_throughput": use.output_throughput,
        }
        for use in uses
    ]
    return pd.DataFrame(rows)
