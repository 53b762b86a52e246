"""vLLM V1's scheduler (0.25.1), exactly: v1/core/sched/scheduler.py and async_scheduler.py.

One call is one `schedule()`. There is no prefill or decode phase: each request gets tokens so that what is computed
catches up with what is known. Running requests come first, in the order in which they were admitted; a request that
finds no free KV block preempts the newest running one (policy `priority`: the one with the largest (priority,
arrival)), possibly itself, which ends the pass. Only if nobody was preempted are waiting requests admitted, from the
front of the queue, while token budget and slots last; the first that does not fit stops the admission of all behind
it.

    chunk            min(what is left to compute, long_prefill_token_threshold, budget left)
    admission        the whole sequence so far must fit (reserve_full_isl), with `watermark` of all blocks to spare
                     if anything runs
    preemption       by recompute; back to the front of the queue (priority: to its place)

V1 recomputes what it preempts. Two other ways can be chosen (`preemption`, `llmsim.schedulers.setting_aside`): swap,
as V0 had it, and pause.

With asynchronous scheduling the same rules see the world one step late; the replica's loop takes care of that.
Left out: LoRA limits, encoder budgets, connectors, structured output, speculation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.schedulers import HOLD
from llmsim.schedulers.setting_aside import setting_aside

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class VllmScheduler:
    """`policy`: fcfs or priority; `preemption`: recompute, swap or pause; the others are vLLM's own options."""

    def __init__(
        self,
        policy: str = "fcfs",
        long_prefill_token_threshold: int = 0,
        watermark: float = 0.0,
        reserve_full_isl: bool = True,
        enable_chunked_prefill: bool = True,
        preemption: str = "recompute",
    ) -> None:
        if policy not in ("fcfs", "priority"):
            raise ValueError(f"scheduling_policy={policy!r} is unknown. Choose fcfs or priority.")
        if long_prefill_token_threshold < 0:
            raise ValueError(
                f"long_prefill_token_threshold={long_prefill_token_threshold} is negative: give 0 for off."
            )
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark={watermark} is not a fraction. Give 0 <= watermark < 1.")
        self.priority = policy == "priority"
        self.threshold = long_prefill_token_threshold
        self.watermark = watermark
        self.reserve_full_isl = reserve_full_isl
        self.chunked = enable_chunked_prefill
        if self.priority:
            self.order = self._urgency
        self.aside = setting_aside(preemption)

    @staticmethod
    def _urgency(request: Request) -> tuple[Any, ...]:
        return request.priority, request.arrival_s, request.name, request.id

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        batch, aside = replica.batch, self.aside
        if aside is not None:
            aside.bring_back(replica)
        budget = replica.limits.max_num_batched_tokens
        size = batch.size
        if replica.prefilling or size > budget:
            budget = self._running(replica, budget)
        elif size:
            budget = budget - size if replica.decode_if_room() else self._one_by_one(replica, budget)
        if aside is not None and aside.blocks_admission(replica):
            return None if replica.preempted_now or replica.paused_now else HOLD
        if replica.preempted_now:
            return None
        if replica.waiting.size and budget > 0:
            self._admit(replica, budget)
        return None if replica.paused_now else HOLD

    def _running(self, replica: Replica, budget: int) -> int:
        """All running requests, some half-prefilled: at once if their order cannot matter. Returns the budget left."""
        batch, kv, prefilling = replica.batch, replica.kv, replica.prefilling
        left = budget - batch.size
        wanted = [self._chunk(request, budget) for request in prefilling]
        if len(wanted) == 1 and 0 <= left < wanted[0] and next(reversed(replica.running)) in prefilling:
            wanted[0] = left  # it comes last anyway
        blocks = batch.blocks_needed(1) + sum(
            kv.blocks_for(request.computed_tokens + tokens) - kv.blocks_for(request.computed_tokens)
            for request, tokens in zip(prefilling, wanted, strict=True)
        )
        if sum(wanted) > left or blocks > kv.free_blocks:
            return self._one_by_one(replica, budget)
        if batch.size:
            replica.decode()
        for request, tokens in zip(list(prefilling), wanted, strict=True):
            if tokens:
                replica.prefill(request, tokens)
        return left - sum(wanted)

    def _chunk(self, request: Request, budget: int) -> int:
        tokens = request.prompt_tokens + request.generated_tokens - request.computed_tokens
        if 0 < self.threshold < tokens:
            tokens = self.threshold
        return min(tokens, budget)

    def _one_by_one(self, replica: Replica, budget: int) -> int:
        """The pass over running requests as vLLM writes it, one at a time in list order. Returns the budget left."""
        batch, kv = replica.batch, replica.kv
        granted: dict[Request, int] = {}
        order = list(replica.running)
        at = 0
        while at < len(order) and budget > 0:
            request = order[at]
            at += 1
            if request in batch:
                tokens, blocks = 1, int(batch.needs_block(request))
            elif request in replica.prefilling:
                tokens = self._chunk(request, budget)
                blocks = kv.blocks_for(request.computed_tokens + tokens) - kv.blocks_for(request.computed_tokens)
            else:  # its last token is in flight
                continue
            if blocks > kv.free_blocks and self.aside is not None and self.aside.sits_out(replica, request):
                continue
            while blocks > kv.free_blocks and request in replica.running:
                victim = self.victim(replica)
                order.remove(victim)
                if victim in granted:
                    budget += granted.pop(victim)
                    at -= 1  # only then: vLLM passes over a request if one that got nothing leaves ahead of it
                if self.aside is None or not self.aside.moved_out(replica, victim):
                    replica.preempt(victim)
            if request not in replica.running:
                break
            if request in batch:
                replica.decode_one(request)
            else:
                replica.prefill(request, tokens)
            granted[request] = tokens
            budget -= tokens
        replica.pause_others()
        return budget

    def victim(self, replica: Replica) -> Request:
        """Who leaves when blocks run short."""
        if not self.priority:
            return next(reversed(replica.running))
        return max(replica.running, key=lambda request: (request.priority, request.arrival_s))

    def _admit(self, replica: Replica, budget: int) -> None:
        waiting, running, kv = replica.waiting, replica.running, replica.kv
        block_tokens = kv.block_tokens
        limits = replica.limits
        while waiting.size and budget > 0 and len(running) < limits.max_num_seqs:
            request = waiting.head
            if request.swapped_tokens:  # by priority it may wait behind others: its KV comes back first, next time
                return
            known = request.prompt_tokens + request.generated_tokens
            hit = replica.look_up(request)
            found = hit.blocks * block_tokens
            tokens = known - found
            if 0 < self.threshold < tokens:
                tokens = self.threshold
            if tokens > budget:
                if not self.chunked:
                    return
                tokens = budget
            spare = int(self.watermark * (kv.total_blocks + 1)) if running else 0  # + 1: vLLM counts its null block
            reserve = known if self.reserve_full_isl else found + tokens
            blocks = kv.blocks_for(reserve) - hit.blocks + hit.idle_blocks
            if blocks + spare > kv.free_blocks:
                return
            replica.prefill(request, tokens, hit)
            budget -= tokens
