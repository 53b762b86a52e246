"""Which settings of the KV cache go together: what only a prefix cache can do needs one, and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.kept import parse as parse_compression
from llmsim.tiers import parse_tiers

if TYPE_CHECKING:
    from llmsim.scenario import Scenario


def check_kv_cache(s: Scenario) -> None:
    """Raises ValueError with the fix for what cannot be meant."""
    _check_tiers(s)
    if s.eviction != "lru" and not s.enable_prefix_caching:
        raise ValueError(f"eviction={s.eviction!r}: without prefix caching nothing is cached: leave it out")
    if s.eviction == "lru" and s.eviction_args:
        raise ValueError(
            f"eviction_args {', '.join(s.eviction_args)}: the eviction lru has no arguments: leave them out"
        )
    for name, plain, what in (("kv_allocation", "paged", "contiguous"), ("kv_compression", "none", "dropped")):
        value = getattr(s, name)
        if value != plain and s.enable_prefix_caching:
            raise ValueError(f"{name}={value!r}: {what} KV cannot be shared: give enable_prefix_caching=false as well")
        if value != plain and s.swap_space_gib:
            raise ValueError(f"{name}={value!r}: {what} KV is not swapped: leave swap_space_gib out")
    if parse_compression(s.kv_compression) is not None and s.kv_allocation != "paged":
        raise ValueError(f"kv_compression={s.kv_compression!r} needs blocks to drop: leave kv_allocation out")
    if s.kv_compression != "none" and "static" in (s.scheduler, s.scheduler_args.get("base")):
        raise ValueError(
            f"kv_compression={s.kv_compression!r}: the scheduler static pads its rows to one length, so there is "
            "nothing to drop: choose another scheduler"
        )
    if s.preemption == "swap" and not s.swap_space_gib:
        raise ValueError("preemption='swap' needs host memory: give swap_space_gib, e.g. 16")
    _check_swapping(s)
    if s.eviction == "belady" and s.replicas > 1:
        raise ValueError(
            f"eviction='belady' reads the future of one replica, and of {s.replicas} none knows which requests it will"
            " get: give replicas=1"
        )


def _check_swapping(s: Scenario) -> None:
    """vLLM V0's own way to preempt, also below another order."""
    args = s.scheduler_args
    names = ((s.scheduler, args), (args.get("base"), args.get("base_args")))
    for name, own in names:
        if name == "vllm-v0" and isinstance(own, dict) and own.get("preemption") == "swap" and not s.swap_space_gib:
            raise ValueError("scheduler_args preemption='swap' needs host memory: give swap_space_gib, e.g. 16")


def _check_tiers(s: Scenario) -> None:
    tiers = parse_tiers(s.kv_tiers)
    if tiers and not s.enable_prefix_caching:
        raise ValueError(f"kv_tiers={s.kv_tiers!r}: without prefix caching nothing is found in a tier: leave one out")
    if tiers and s.eviction != "lru":
        raise ValueError(f"eviction={s.eviction!r} and kv_tiers: tiers are below vLLM's order only: leave one out")
    if tiers and s.preemption == "pause":
        raise ValueError("preemption='pause' and kv_tiers: both set requests aside: leave one of them out")
    for name, there, schedulers in (
        ("kv_tiers", bool(tiers), ("vllm", "chunked")),  # others do not go on with what was loaded
        (
            "kv_allocation",
            s.kv_allocation != "paged",
            ("vllm", "chunked", "vllm-v0", "sarathi"),
        ),  # or reserve themselves
    ):
        if there and s.scheduler not in schedulers and ".py:" not in s.scheduler:
            raise ValueError(
                f"{name}={getattr(s, name)!r} is not for the scheduler {s.scheduler}: choose {', '.join(schedulers)},"
                " or your own"
            )
    if not tiers and (s.kv_tier_prefetch or s.kv_tier_write != "write_through"):
        raise ValueError("kv_tier_prefetch and kv_tier_write say what happens in tiers: give kv_tiers")
