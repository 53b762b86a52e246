"""Chunked prefill in its plainest form: decodes first, then prompts in order, as many tokens as the budget leaves.

The textbook policy of Sarathi-Serve (OSDI'24, section 4.2) without its refinements, and the shortest example of a
policy. A prompt is admitted when its whole sequence so far fits with a little headroom, so that a full cache does not
make running requests evict each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Replica


class Chunked:
    """`headroom`: fraction of the KV blocks that admission leaves free."""

    def __init__(self, headroom: float = 0.01) -> None:
        if isinstance(headroom, bool) or not isinstance(headroom, int | float) or not 0.0 <= headroom < 1.0:
            raise ValueError(f"headroom={headroom!r} is not a fraction. Give 0 <= headroom < 1.")
        self.headroom = headroom

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        replica.decode()
        budget = replica.limits.max_num_batched_tokens - replica.decoding
        for request in list(replica.prefilling):
            tokens = min(budget, request.prefill_tokens - request.computed_tokens)
            if tokens > 0 and replica.prefill(request, tokens):
                budget -= tokens
        spare = int(self.headroom * replica.kv.total_blocks)
        while replica.waiting and budget > 0 and len(replica.running) < replica.limits.max_num_seqs:
            request = replica.waiting.head
            hit = replica.look_up(request)
            whole = replica.kv.blocks_for(request.prefill_tokens) - hit.blocks + hit.idle_blocks
            if replica.running and whole + spare > replica.kv.free_blocks:
                break
            tokens = min(budget, request.prefill_tokens - hit.blocks * replica.kv.block_tokens)
            if not replica.prefill(request, tokens, hit):
                break
            budget -= tokens
        return HOLD
