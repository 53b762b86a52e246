"""Sarathi-Serve (OSDI'24): stall-free batches of decodes and prompt chunks under a token budget.

Each iteration (algorithm 3 of the paper)

    1. all decodes; if a new KV block is wanted and none is free, the latest arrival is preempted (recompute)
    2. half-prefilled prompts, oldest first, each with the chunk min(what is left, `token_budget` left)
    3. new requests from the front of the queue while the budget lasts, each chunked likewise; one is admitted only if
       blocks for its whole prompt are free, 1 % of all to spare (`watermark`), and they are kept for it

so a decode never waits for a prompt, and an iteration lasts no longer than the budget makes it. The budget follows from
the target for time between tokens: 512 for strict ones, 2048 for relaxed ones in the paper (section 5.1).
Differs from vLLM V1: decodes come strictly first, wherever they stand in the list, and memory for the entire prompt is
taken at admission. Left out: rounding chunks to GEMM tiles.
Source: OSDI'24, sections 4.2 and 4.3; memory and preemption as in its code, a fork of vLLM V0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class Sarathi:
    """All decodes, then prompt chunks, within `token_budget` tokens; `watermark` of the blocks left free."""

    def __init__(self, token_budget: int = 512, watermark: float = 0.01) -> None:
        if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
            raise ValueError(f"token_budget={token_budget!r} is not a whole number of 1 or more.")
        if isinstance(watermark, bool) or not isinstance(watermark, int | float) or not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark={watermark!r} is not a fraction. Give 0 <= watermark < 1.")
        self.token_budget, self.watermark = token_budget, watermark

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        kv, prefilling = replica.kv, replica.prefilling
        kept = self._kept_blocks(replica) if prefilling else 0
        while replica.batch.size and replica.batch.blocks_needed(1) + kept > kv.free_blocks:
            replica.preempt(self._victim(replica))
            kept = self._kept_blocks(replica)
        if replica.batch.size:
            replica.decode()
        budget = min(self.token_budget, replica.limits.max_num_batched_tokens) - replica.decoding
        for request in list(prefilling) if prefilling else ():
            tokens = min(request.prompt_tokens + request.generated_tokens - request.computed_tokens, budget)
            if tokens > 0:
                replica.prefill(request, tokens)
                budget -= tokens
        if replica.waiting.size and budget > 0 and not replica.preempted_now:
            self._admit(replica, budget)
        return None if prefilling or replica.preempted_now else HOLD

    def _admit(self, replica: Replica, budget: int) -> None:
        waiting, kv, running = replica.waiting, replica.kv, replica.running
        spare = int(self.watermark * kv.total_blocks)  # nothing is kept for anybody while the budget lasts
        while waiting.size and budget > 0 and len(running) < replica.limits.max_num_seqs:
            request = waiting.head
            known = request.prompt_tokens + request.generated_tokens
            hit = replica.look_up(request)
            blocks = kv.blocks_for(known) - hit.blocks + hit.idle_blocks
            if blocks + (spare if running else 0) > kv.free_blocks:
                return
            tokens = min(known - hit.blocks * kv.block_tokens, budget)
            replica.prefill(request, tokens, hit)
            budget -= tokens

    @staticmethod
    def _kept_blocks(replica: Replica) -> int:
        """Blocks that half-prefilled prompts were promised and have not taken."""
        kv = replica.kv
        return sum(
            kv.blocks_for(request.prompt_tokens + request.generated_tokens) - kv.blocks_for(request.computed_tokens)
            for request in replica.prefilling
        )

    @staticmethod
    def _victim(replica: Replica) -> Request:
        """The latest arrival of those that compute."""
        candidates: list[Request] = [*replica.batch, *replica.prefilling]
        return max(candidates, key=lambda request: (request.arrival_s, request.id))
