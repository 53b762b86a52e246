"""Any scheduling policy over a KV cache with tiers: what a tier holds is loaded before the policy sees the request.

As vLLM does with an asynchronous KV connector (v1/core/sched/scheduler.py of 0.25.1; distributed/kv_transfer):

 1. A request at the head of the queue whose KV a tier could load gets blocks for its GPU hit and everything loaded, if
        the whole sequence fits, and waits for its load aside: it needs no token budget and no slot, and others go on.
 2. Less than one block to load: nothing is loaded.
 3. When the load is complete the request goes on in the next iteration, half-prefilled, with at least its last token
    to compute. Its blocks can be found by others from then on.
 4. Loads are not preempted.

The policy itself runs unchanged: requests being loaded are `replica.paused`, and one that should be loaded does not fit
until it is at the head of the queue. So a load begins one iteration after vLLM's, whose admission loop comes to it in
the iteration that admits the requests before it.
"""

from __future__ import annotations

from math import inf, isnan
from typing import TYPE_CHECKING, Any

from llmsim.tiers import TieredKV

if TYPE_CHECKING:
    from llmsim.kvcache import Hit, Node
    from llmsim.replica import Replica
    from llmsim.request import Request
    from llmsim.tiers import Tier

    Part = tuple[Tier, Node, int, int]


class Tiered:
    """`policy` over tiers; with `prefetch` lower tiers' content is moved to the first when a request arrives."""

    def __init__(self, policy: Any, kv: TieredKV, *, prefetch: bool) -> None:
        self._policy, self._kv = policy, kv
        self._loading: dict[Request, float] = {}  # when each load is complete
        self.loads = 0
        self._own_victim = getattr(policy, "victim", None)
        if self._own_victim is not None:
            policy.victim = self.victim
        if prefetch and len(kv.tiers) > 1:
            self.arrived = self._arrived

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        for request, done_s in list(self._loading.items()):
            if done_s <= now_s and len(replica.running) - len(replica.paused) < replica.limits.max_num_seqs:
                self._loaded(replica, request, now_s)
        while replica.waiting and self._begin(replica, replica.waiting.head):
            pass
        hold: bool | None = self._policy.schedule(replica, now_s)
        if replica.waiting and (replica.publishes or self._could_begin(replica.waiting.head)):
            hold = None  # what running requests generate is stored, and written to tiers, when somebody looks for it
        next_s = min((done_s for done_s in self._loading.values() if done_s > now_s), default=inf)
        if next_s < inf:
            if not replica.decoding and not replica.chunks:
                replica.wait_until(next_s)
            elif hold:
                replica.hold_until(next_s)
        return hold

    def victim(self, replica: Replica) -> Request:
        """Who leaves when blocks run short: never one that is being loaded, while others run."""
        if self._own_victim is not None:
            chosen: Request = self._own_victim(replica)
            if chosen not in self._loading:
                return chosen
        return next(request for request in reversed(replica.running) if request not in self._loading)

    def _plan(self, request: Request) -> tuple[Hit, list[Part], int]:
        """(GPU hit, what tiers add to it, blocks that must be free for the whole sequence)."""
        known = request.prefill_tokens
        hit = self._kv.gpu_match(request, known)
        parts = self._kv.extension(request, hit, known)
        return hit, parts, self._kv.blocks_for(known) - hit.blocks + hit.idle_blocks

    def _free_blocks(self) -> int:
        """Free blocks that requests being loaded will not need for the rest of their prompts."""
        blocks_for = self._kv.blocks_for
        return self._kv.free_blocks - sum(
            blocks_for(request.prefill_tokens) - blocks_for(request.computed_tokens) for request in self._loading
        )

    def _could_begin(self, request: Request) -> bool:
        """Now, or once decodes have taken blocks that the GPU's hit needs and a tier holds."""
        if request.swapped_tokens:
            return False
        hit, parts, blocks = self._plan(request)
        return bool(parts or hit.idle_blocks) and blocks <= self._free_blocks()

    def _begin(self, replica: Replica, request: Request) -> bool:
        """Give the head of the queue its blocks and begin to load; False: nothing to load, or no room."""
        if request.swapped_tokens:
            return False
        kv = self._kv
        hit, parts, blocks = self._plan(request)
        if not parts or blocks > self._free_blocks():
            return False
        tokens = (hit.blocks + sum(end - start for _, _, start, end in parts)) * kv.block_tokens
        done_s = kv.load(parts)
        replica.waiting.remove(request)
        kv.admit(request, hit, tokens)
        replica.running[request] = None
        replica.prefilling[request] = None
        request.computed_tokens = tokens
        replica.pause(request)
        self._loading[request] = done_s
        self.loads += 1
        return True

    def _loaded(self, replica: Replica, request: Request, now_s: float) -> None:
        del self._loading[request]
        replica.resume(request)
        self._kv.store(request, request.computed_tokens)
        if isnan(request.scheduled_s):
            request.scheduled_s = now_s
            request.cached_tokens = request.computed_tokens
            replica.queried_tokens += request.prompt_tokens
            replica.hit_tokens += request.cached_tokens

    def _arrived(self, request: Request, now_s: float) -> None:
        self._kv.prefetch(request, request.prompt_tokens)
        hook = getattr(self._policy, "arrived", None)
        if hook is not None:
            hook(request, now_s)
