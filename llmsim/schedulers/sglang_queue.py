"""The orders in which SGLang takes its waiting requests (`schedule_policy`).

    fcfs                    order of arrival; a retracted request joins at the end
    lof                     longest output first: most tokens allowed (max_new_tokens)
    random                  shuffled before every prefill batch
    lpm                     longest prefix match: most cached tokens first
    dfs-weight              depth first through the radix tree, branches with more waiting requests first
    hrrn                    highest response ratio next: prompt tokens computed for others since it came, per token of
                            its own that is not cached
    shortest-prefill-first  fewest tokens to compute first

The last four ask the cache, which counts as use of what they find. lpm and hrrn leave the queue as it is while more
than 128 requests wait. Of several waiting requests that share 32 tokens or more, of which the cache has 32 at most,
lpm, hrrn and shortest-prefill-first put all but the first at the end, so that one fills the cache for the others.
Without prefix caching they are fcfs (shortest-prefill-first is refused).

With priority scheduling fcfs and lof sort by priority first; a larger number is more urgent unless
`schedule_low_priority_values_first` (vLLM's convention).

Source: SGLang 0.5.23, managers/schedule_policy.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

CACHE_AWARE = ("lpm", "dfs-weight", "hrrn", "shortest-prefill-first")
POLICIES = ("fcfs", "lof", "random", *CACHE_AWARE)
LONG_QUEUE = 128  # requests
IN_BATCH_TOKENS = 32


class Order:
    """Who comes first; `key` for orders that are fixed while a request waits, `queue` for those that change."""

    def __init__(self, policy: str, priority: bool, low_first: bool, max_new: Any, seed: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"schedule_policy={policy!r} is unknown. Choose {', '.join(POLICIES)}.")
        if priority and policy not in ("fcfs", "lof"):
            raise ValueError(f"schedule_policy={policy!r} contradicts enable_priority_scheduling: choose fcfs or lof.")
        self.policy, self.priority, self.sign, self.max_new = policy, priority, 1 if low_first else -1, max_new
        self.changes = policy not in ("fcfs", "lof")
        self.queue: list[Request] = []  # of changing orders
        self.computed_tokens = 0  # of prompts, so far
        self._came: dict[Request, int] = {}
        self._computed_before: dict[Request, int] = {}
        self._arrivals = 0
        self._random = Random(seed)

    # ---- the queue

    def key(self, request: Request) -> tuple[Any, ...]:
        """Of the replica's queue: urgency, and then when it joined, which its first comparison finds out."""
        came = self._came.get(request)
        if came is None:
            came = self._came[request] = self._arrivals = self._arrivals + 1
        if self.policy == "lof":
            return (*self.urgency(request), -self.max_new(request), came)
        return (*self.urgency(request), came)

    def urgency(self, request: Request) -> tuple[int, ...]:
        return (self.sign * request.priority,) if self.priority else ()

    def joined(self, request: Request) -> None:
        """A request waits now: a new one, or again."""
        self.queue.append(request)
        self._computed_before[request] = self.computed_tokens

    def leaves(self, request: Request) -> None:
        """It is about to be sent back to the queue, where it joins at the end."""
        self._came.pop(request, None)

    def started(self, requests: Iterable[Request], taken: int) -> None:
        """The first `taken` of the order wait no more, `requests` among them."""
        del self.queue[:taken]
        for request in requests:
            self._came.pop(request, None)
            self._computed_before.pop(request, None)

    def candidates(self, replica: Replica) -> Iterable[Request]:
        """The waiting requests, first come first."""
        if not self.changes:
            return replica.waiting
        if self.policy == "random":
            self._random.shuffle(self.queue)
        elif replica.kv.prefix_caching:
            if len(self.queue) <= LONG_QUEUE or self.policy not in ("lpm", "hrrn"):
                self._ask_the_cache(replica)
        elif self.policy == "shortest-prefill-first":
            raise ValueError(
                "schedule_policy='shortest-prefill-first' needs enable_prefix_caching, which is off: choose fcfs."
            )
        return list(self.queue)

    # ---- orders that ask the cache

    def _ask_the_cache(self, replica: Replica) -> None:
        hits = {request: replica.look_up(request) for request in self.queue}
        if self.policy == "dfs-weight":
            self._depth_first({request: getattr(hit, "node", None) for request, hit in hits.items()})
            return
        page = replica.kv.block_tokens
        cached = {request: hit.blocks * page for request, hit in hits.items()}
        later = self._later(cached, replica.kv.prefix_block_tokens)
        if self.policy == "lpm":
            self.queue.sort(key=lambda r: inf if r in later else -cached[r])
        elif self.policy == "hrrn":
            self.queue.sort(key=lambda r: (self._response(r, cached[r], r in later), r.id))
        else:
            self.queue.sort(key=lambda r: (r in later, max(1, r.prefill_tokens - cached[r]), self.key(r)))

    @staticmethod
    def _later(cached: dict[Request, int], id_tokens: int) -> set[Request]:
        """Those who had better wait for another to compute what they share."""
        seen: set[tuple[Any, ...]] = set()
        later: set[Request] = set()
        if not id_tokens:
            return later
        names = -(-IN_BATCH_TOKENS // id_tokens)
        for request, found in cached.items():
            named = min(request.identity_tokens, len(request.prefix_ids) * id_tokens, request.prefill_tokens)
            if found <= IN_BATCH_TOKENS <= named:
                beginning = request.prefix_ids[:names]
                if beginning in seen:
                    later.add(request)
                seen.add(beginning)
        return later

    def _response(self, request: Request, cached: int, later: bool) -> float:
        if later:
            return inf
        left = request.prompt_tokens - cached
        return -(self.computed_tokens - self._computed_before[request]) / left if left > 0 else -inf

    def _depth_first(self, ends: dict[Request, Any]) -> None:
        """Sort by where in the tree the requests' cached prefixes end; deeper ones of a branch first."""
        if None in ends.values():
            raise ValueError("schedule_policy='dfs-weight' needs the radix cache: give engine sglang, or choose lpm.")
        weight: dict[Any, int] = {}
        below: dict[Any, dict[Any, None]] = {}
        at: dict[Any, list[Request]] = {}
        for request, node in ends.items():
            at.setdefault(node, []).append(request)
            while node.parent is not None:
                weight[node] = weight.get(node, 0) + 1
                below.setdefault(node.parent, {})[node] = None
                node = node.parent
            root = node
        order: list[Request] = []
        stack = [(root, False)] if ends else []
        while stack:
            node, left = stack.pop()
            if left:
                order += at.get(node, [])
                continue
            stack.append((node, True))
            heaviest_first = sorted(below.get(node, ()), key=lambda child: -weight[child])
            stack += [(child, False) for child in reversed(heaviest_first)]
        self.queue = order
