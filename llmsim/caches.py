"""The KV cache that a scenario names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmsim.compression import DroppingBatch, DroppingCost, DroppingKV
from llmsim.contiguous import ContiguousKV
from llmsim.evicting import EvictingKVCache
from llmsim.eviction import DEFAULT, load_eviction
from llmsim.hardware import find_model
from llmsim.kept import parse
from llmsim.kvcache import KVCache
from llmsim.schedulers.tiered import Tiered
from llmsim.tiers import TieredKV, parse_tiers

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request
    from llmsim.scenario import Scenario


def cache_of(scenario: Scenario, blocks: int, id_tokens: int) -> KVCache:
    """An empty cache of `blocks` blocks for a trace whose ids stand for `id_tokens` tokens each."""
    s = scenario
    if s.kv_allocation != "paged":
        assert s.max_model_len is not None, "a resolved scenario"
        return ContiguousKV(blocks, s.block_size, kind=s.kv_allocation, max_model_len=s.max_model_len)
    specs = parse_tiers(s.kv_tiers)
    if specs:
        model, tp = find_model(s.model), s.tensor_parallel
        block_bytes = s.block_size * model.layers * tp * model.kv_layer_bytes(s.kv_dtype, tp)
        return TieredKV(
            blocks, s.block_size, prefix_block_tokens=id_tokens, specs=specs, block_bytes=block_bytes,
            write=s.kv_tier_write,
        )  # fmt: skip
    kept = parse(s.kv_compression)
    if kept is not None:
        return DroppingKV(blocks, s.block_size, kept)
    if s.eviction == DEFAULT:
        return KVCache(blocks, s.block_size, prefix_caching=s.enable_prefix_caching, prefix_block_tokens=id_tokens)
    return EvictingKVCache(blocks, s.block_size, eviction=eviction_of(s), prefix_block_tokens=id_tokens)


def eviction_of(scenario: Scenario) -> Any:
    """A fresh instance of the scenario's eviction policy."""
    arguments: dict[str, Any] = {}
    if scenario.eviction == "cost":
        arguments = {"attention_tokens": attention_tokens(scenario.model)}
    return load_eviction(scenario.eviction, arguments | scenario.eviction_args)


def attention_tokens(model: str) -> float:
    """Context at which a token's attention takes as many FLOPs as its linear layers."""
    found = find_model(model)
    return found.linear_flops_per_token / found.attention_flops_per_pair


def policy_over(kv: KVCache, policy: Any, scenario: Scenario) -> Any:
    """The scheduling policy as the cache needs it: over tiers, loads come before it."""
    return Tiered(policy, kv, prefetch=scenario.kv_tier_prefetch) if isinstance(kv, TieredKV) else policy


def connect(replica: Replica, requests: Iterable[Request]) -> None:
    """Give a replica what its cache needs of it: a batch and a cost that know what is dropped, or the replica's clock
    and, if its policy is clairvoyant, the requests to come."""
    kv = replica.kv
    if isinstance(kv, DroppingKV):
        replica.batch = batch = DroppingBatch(kv)
        replica.cost = DroppingCost(replica.cost, batch, kv)
    if isinstance(kv, TieredKV):
        kv.clock = lambda: replica.now_s
    if isinstance(kv, EvictingKVCache):
        kv.clock = lambda: replica.now_s
        kv.foresee(
            request
            for request in requests
            if kv.blocks_for(request.prompt_tokens + request.output_tokens - 1) <= kv.total_blocks
        )


def tier_rows(caches: Iterable[KVCache]) -> list[dict[str, Any]]:
    """What each tier did, all replicas together."""
    rows: dict[str, dict[str, Any]] = {}
    for kv in caches:
        for tier in kv.tiers if isinstance(kv, TieredKV) else ():
            row = rows.setdefault(tier.spec.name, {"name": tier.spec.name, "loaded_tokens": 0, "written_tokens": 0})
            row["loaded_tokens"] += tier.loaded_blocks * kv.block_tokens
            row["written_tokens"] += tier.written_blocks * kv.block_tokens
    return list(rows.values())
