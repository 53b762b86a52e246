"""What becomes of a request that finds no KV block: two ways besides computing it again.

swap    the newest request's KV goes to host memory (`swap_space_gib`) and comes back once there is room for it and
        for the next token of everybody else; nobody is admitted ahead of it. With no room there it is recomputed,
        as is one that was to make a token in this very iteration. As in vLLM V0 (SOSP'23, section 4.5), whose
        copies delay the iteration that follows them.
pause   the request that needs the block sits out, keeping those it has; the others go on. Whoever sits out longest
        gets the first blocks that come free, and nobody is admitted before. If nobody can go on the newest is
        recomputed, or all would wait for one another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

PREEMPTIONS = ("recompute", "swap", "pause")


def setting_aside(preemption: str) -> Swapping | Pausing | None:
    if preemption not in PREEMPTIONS:
        raise ValueError(f"preemption={preemption!r} is unknown. Choose {', '.join(PREEMPTIONS)}.")
    if preemption == "recompute":
        return None
    return Swapping() if preemption == "swap" else Pausing()


class Swapping:
    def bring_back(self, replica: Replica) -> None:
        """Before anybody decodes: the KV of those at the head of the queue comes back."""
        waiting, kv = replica.waiting, replica.kv
        while waiting.size and waiting.head.swapped_tokens:
            tokens = waiting.head.swapped_tokens
            blocks = kv.blocks_for(tokens + 1) + replica.batch.blocks_needed(1)
            slots = replica.limits.max_num_seqs - len(replica.running)
            if blocks > kv.free_blocks or slots <= 0 or not replica.swap_in(waiting.head):
                return

    def blocks_admission(self, replica: Replica) -> bool:
        return bool(replica.waiting.size and replica.waiting.head.swapped_tokens)

    def sits_out(self, replica: Replica, request: Request) -> bool:
        return False

    def moved_out(self, replica: Replica, request: Request) -> bool:
        scheduled = any(chunk[0] is request for chunk in replica.chunks) or replica.makes_token(request)
        leaves = request in replica.batch or request in replica.prefilling
        return leaves and not scheduled and replica.swap_out(request)


class Pausing:
    def bring_back(self, replica: Replica) -> None:
        """Before anybody decodes: those who sit out go on while blocks last, the oldest first."""
        kv = replica.kv
        free = kv.free_blocks - replica.batch.blocks_needed(1)
        for request in [one for one in replica.running if one in replica.paused] if replica.paused else ():
            free -= kv.blocks_for(request.computed_tokens + 1) - kv.blocks_for(request.computed_tokens)
            if free < 0 or len(replica.running) - len(replica.paused) >= replica.limits.max_num_seqs:
                return
            replica.resume(request)

    def blocks_admission(self, replica: Replica) -> bool:
        if not replica.paused:
            return False
        if len(replica.paused) == len(replica.running):  # nobody can go on, and nobody is about to end
            replica.preempt(next(reversed(replica.running)))
        return True

    def sits_out(self, replica: Replica, request: Request) -> bool:
        replica.pause(request)
        return True

    def moved_out(self, replica: Replica, request: Request) -> bool:
        return False
