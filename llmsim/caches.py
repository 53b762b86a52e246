"""The KV cache that a scenario names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmsim.evicting import EvictingKVCache
from llmsim.eviction import DEFAULT, load_eviction
from llmsim.hardware import find_model
from llmsim.kvcache import KVCache

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request
    from llmsim.scenario import Scenario


def cache_of(scenario: Scenario, blocks: int, id_tokens: int) -> KVCache:
    """An empty cache of `blocks` blocks for a trace whose ids stand for `id_tokens` tokens each."""
    s = scenario
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


def connect(replica: Replica, requests: Iterable[Request]) -> None:
    """Give a replica's cache the replica's clock and, if its policy is clairvoyant, the requests to come."""
    kv = replica.kv
    if isinstance(kv, EvictingKVCache):
        kv.clock = lambda: replica.now_s
        kv.foresee(
            request
            for request in requests
            if kv.blocks_for(request.prompt_tokens + request.output_tokens - 1) <= kv.total_blocks
        )
