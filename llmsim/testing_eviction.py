"""Conformance of eviction policies: `check_eviction(Mine)`, by the scheme of `llmsim.testing`.

A policy is put behind vLLM's scheduler in a cache that is too small: open and closed loops and sessions, shared
prefixes, both clocks, with two sizes of memory. What can go wrong there:

    actions    a key that is nan or does not compare, a victim that was not offered, a negative lifetime (PolicyError)
    content    an extent is changed: policies read extents, the cache alone changes them
    seed       the same seed gives the same bytes
    hold       the same is lost whether blocks are taken one iteration at a time or for many at once; not asked of a
               policy with `victim`, which may look at the clock
    finishes, tokens, times, blocks, progress    as for schedulers
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from llmsim.caches import connect
from llmsim.evicting import EvictingKVCache
from llmsim.simulate import Fleet
from llmsim.testing_rules import Breach

ASKED = ("key", "victim", "evicted", "lifetime_s")
READ = ("start", "end", "refs", "first_token", "hits", "stored_s", "used_s", "gap_s", "node")
_facts = attrgetter(*READ)


def guarded(policy: Any) -> Any:
    """The same policy, made to leave the extents that it is shown as they are."""
    made = type(policy)

    def guard(name: str) -> Callable[..., Any]:
        method = getattr(made, name)

        def asked(self: Any, shown: Any, *more: Any) -> Any:
            extents = shown if isinstance(shown, tuple) else (shown,)
            before = [_facts(extent) for extent in extents]
            answer = method(self, shown, *more)
            for extent, facts in zip(extents, before, strict=True):
                _check_same(name, facts, _facts(extent))
            return answer

        return asked

    methods = {name: guard(name) for name in ASKED if callable(getattr(made, name, None))}
    policy.__class__ = type(made.__name__, (made,), {"__slots__": (), **methods})
    return policy


def _check_same(method: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    for name, was, now in zip(READ, before, after, strict=True):
        if was is not now and not (was == now or (was != was and now != now)):
            what = f"{method}() changed {name} of the extent at token {before[READ.index('first_token')]}"
            raise Breach("content", None, now, f"{what} from {was} to {now}")


def put_behind(fleet: Fleet, make: Callable[[], Any]) -> None:
    """Give the replicas of a fleet that has not run a cache under the policy that `make` makes."""
    for replica in fleet.replicas:
        replica.kv = EvictingKVCache(
            replica.kv.total_blocks,
            replica.kv.block_tokens,
            eviction=guarded(make()),
            prefix_block_tokens=fleet.trace.block_tokens,
        )
        connect(replica, fleet._requests())
