"""vLLM V0, the engine of the PagedAttention paper (SOSP'23): prompts first, paged KV, preemption by recompute or swap.

    1. prompts   if nothing is swapped out: waiting requests from the front, whole prompts, while they fit
                 max_num_batched_tokens and max_num_seqs and leave 1 % of the blocks free (`watermark`). If any was
                 admitted, the iteration is theirs alone: nobody decodes.
    2. decodes   otherwise all running ones in order of arrival; each may go on while a block is free, whether it needs
                 a new one or not (unless it is alone); if none is, the latest arrival among those still to come is
                 preempted, or itself
    3. swap-in   if nobody was preempted: what was swapped out, first the earliest arrival, while its blocks and one
                 more leave the watermark free; it decodes in the same iteration

    preemption   `recompute`: back to the front of the queue, prompt and answer so far computed again as one prompt;
                 `swap`: KV to host memory (swap_space_gib) and back. vLLM recomputes requests of one sequence and
                 swaps groups of several (beam search), unless preemption_mode says otherwise.

A prompt longer than max_num_batched_tokens runs alone (V0 demands max_num_batched_tokens >= max_model_len and ignores
longer ones). When host memory is full the victim is recomputed (V0 raises an error). V0 schedules synchronously and
counts a decode as 1 of the token budget only where prompts run, which is never here.
Source: vLLM 0.6.3, core/scheduler.py (_schedule_default, _schedule_prefills, _schedule_running, _schedule_swapped,
_preempt) and core/block_manager.py (can_allocate, can_append_slots, can_swap_in); SOSP'23, section 4.5.
"""

from __future__ import annotations

from bisect import insort
from math import inf
from typing import TYPE_CHECKING

from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Limits, Replica
    from llmsim.request import Request


def arrival(request: Request) -> tuple[float, int]:
    return request.arrival_s, request.id


class VllmV0:
    """Whole prompts first and alone; `preemption` by recompute or swap, `watermark` of the blocks left free."""

    def __init__(self, preemption: str = "recompute", watermark: float = 0.01) -> None:
        if preemption not in ("recompute", "swap"):
            raise ValueError(f"preemption={preemption!r} is unknown. Choose recompute or swap.")
        if isinstance(watermark, bool) or not isinstance(watermark, int | float) or not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark={watermark!r} is not a fraction. Give 0 <= watermark < 1.")
        self.preemption, self.watermark = preemption, watermark
        self._swapped: list[Request] = []  # by arrival

    def token_limit(self, limits: Limits) -> float:
        """None: a prompt longer than max_num_batched_tokens runs alone."""
        return inf

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        if replica.waiting.size and not self._swapped and self._prefill(replica):
            return None
        batch, kv = replica.batch, replica.kv
        if self._swapped and batch.blocks_needed(1) < kv.free_blocks:
            self._swap_in(replica)
        if not batch.size:
            return None
        if batch.blocks_needed(1) >= kv.free_blocks:
            self._one_by_one(replica)
            return None
        last = batch.steps_to_finish()
        steps = batch.steps_that_fit(last, kv.free_blocks - 1)
        replica.decode()
        if steps < last:
            replica.hold_for(max(1, steps))
        return HOLD

    def _prefill(self, replica: Replica) -> int:
        """Whole prompts from the front of the queue; returns how many."""
        waiting, running, kv, limits = replica.waiting, replica.running, replica.kv, replica.limits
        spare = int(self.watermark * kv.total_blocks)
        budget, admitted = limits.max_num_batched_tokens, 0
        while waiting.size and len(running) < limits.max_num_seqs:
            request = waiting.head
            hit = replica.look_up(request)
            tokens = request.prompt_tokens + request.generated_tokens - hit.blocks * kv.block_tokens
            if admitted and tokens > budget:
                break
            blocks = kv.blocks_for(request.prompt_tokens + request.generated_tokens) - hit.blocks + hit.idle_blocks
            # V0 ignores prompts that could not even be admitted to an empty cache; here the watermark gives way.
            if blocks + (spare if running else 0) > kv.free_blocks:
                break
            replica.prefill(request, tokens, hit)
            budget -= tokens
            admitted += 1
        return admitted

    def _swap_in(self, replica: Replica) -> None:
        kv, swapped = replica.kv, self._swapped
        spare = int(self.watermark * kv.total_blocks)
        while swapped and len(replica.running) < replica.limits.max_num_seqs:
            request = swapped[0]
            needed = replica.batch.blocks_needed(1) + kv.blocks_for(request.swapped_tokens)
            if needed + (1 + spare if replica.running else 0) > kv.free_blocks:
                return
            replica.swap_in(request)
            swapped.pop(0)

    def _one_by_one(self, replica: Replica) -> None:
        """The pass over running requests when blocks run short: some are preempted."""
        kv = replica.kv
        order = sorted(replica.batch, key=arrival)
        at = 0
        while at < len(order):
            request = order[at]
            while not kv.free_blocks and (len(order) > 1 or replica.batch.needs_block(request)):
                victim = order.pop()
                self._preempt(replica, victim)
                if victim is request:
                    break
            if at < len(order):
                replica.decode_one(request)
            at += 1
        replica.pause_others()

    def _preempt(self, replica: Replica, victim: Request) -> None:
        if self.preemption == "swap" and replica.swap_out(victim):
            insort(self._swapped, victim, key=arrival)
        else:
            replica.preempt(victim)
