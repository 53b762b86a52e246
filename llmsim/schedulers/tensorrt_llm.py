"""TensorRT-LLM's scheduler: which requests have room (capacity), then what one iteration computes (micro-batch).

Capacity walks the active requests in order of arrival, `max_num_seqs` of them at most (max_batch_size):

    guaranteed_no_evict  every request in generation keeps the blocks it needs to the end of its answer; then each in
                         its context phase is let in if the blocks to its own end fit into what is left, and the first
                         that does not stops the walk. Nobody is ever paused.
    max_utilization      each request needs the blocks of its next step only: its whole prompt if it has not started,
                         one token otherwise. If they are not there, the last started request at or behind this one
                         is paused (recomputed later), and it and all behind it leave the walk.
    static_batch         as guaranteed_no_evict, but nobody is let in while a request is in generation
    prefill_first        as guaranteed_no_evict, but while any request has context to compute nobody generates

With prefix caching (static_batch excepted) a request whose first new block another request of this iteration is about
to compute sits the iteration out, and finds the block in the next.

An answer ends where the client allows: after `max_new_tokens`, or its own length if that is 0 or less than it.

The micro-batch has `max_num_batched_tokens` tokens (max_num_tokens): first one for each request in generation, then
contexts in order. Without chunked context a prompt goes in whole, the first that does not fit stops, and one that is
longer than the budget is refused when it arrives. With it:

    first_come_first_served  each takes what is left; a chunk that is not its last is cut to whole blocks
    equal_progress           one block after the other to each in turn, while they fit

Source: TensorRT-LLM, cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp and microBatchScheduler.cpp; the defaults
are those of the documentation (guaranteed_no_evict, chunked context off, first_come_first_served).
Where this differs, see docs/policies/tensorrt-llm.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import chain
from typing import TYPE_CHECKING, Any

from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

CAPACITY_POLICIES = ("guaranteed_no_evict", "max_utilization", "static_batch", "prefill_first")
CHUNKING_POLICIES = ("first_come_first_served", "equal_progress")
Context = tuple["Request", int]  # and the tokens of its prompt that are still to compute


class TensorRtLlm:
    """TensorRT-LLM: its options by their names; `max_new_tokens`: what clients allow, 0: as long as their answers."""

    def __init__(
        self,
        capacity_scheduler_policy: str = "guaranteed_no_evict",
        enable_chunked_prefill: bool = False,
        context_chunking_policy: str = "first_come_first_served",
        max_new_tokens: int = 0,
    ) -> None:
        for name, value, choices in (
            ("capacity_scheduler_policy", capacity_scheduler_policy, CAPACITY_POLICIES),
            ("context_chunking_policy", context_chunking_policy, CHUNKING_POLICIES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown. Choose {', '.join(choices)}.")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} is negative: give 0 for the length of each answer.")
        self.capacity, self.max_new_tokens = capacity_scheduler_policy, max_new_tokens
        self.chunked = enable_chunked_prefill
        self.equal_progress = context_chunking_policy == "equal_progress"

    @staticmethod
    def order(request: Request) -> tuple[Any, ...]:
        """Active requests stay in order of arrival, paused ones too."""
        return request.arrival_s, request.id

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        budget = replica.limits.max_num_batched_tokens
        if self.capacity == "max_utilization":
            contexts = self._next_step(replica, budget - replica.batch.size)
        elif self.capacity == "static_batch" and replica.batch.size:
            contexts = []
        else:
            rows = 0 if self.capacity == "prefill_first" else replica.batch.size
            contexts = self._to_completion(replica, budget - rows)
        if replica.batch.size and not (contexts and self.capacity == "prefill_first"):
            replica.decode()
        for request, tokens in self._chunks(contexts, budget, replica.decoding, replica.kv.block_tokens):
            if request in replica.running:
                replica.prefill(request, tokens)
            else:
                self._start(replica, request, tokens)
        return None if replica.preempted_now else HOLD

    @staticmethod
    def _start(replica: Replica, request: Request, tokens: int) -> None:
        """Admit; what the cache holds may have shrunk since the walk, as others took blocks."""
        hit = replica.look_up(request)
        left = request.prompt_tokens + request.generated_tokens - hit.blocks * replica.kv.block_tokens
        replica.prefill(request, min(tokens, left), hit)

    # ---- capacity

    def _to_completion(self, replica: Replica, budget: int) -> list[Context]:
        """Contexts whose blocks to the end of the answer fit beside those of all in generation."""
        kv, batch = replica.kv, replica.batch
        if not replica.prefilling and not replica.waiting:
            return []
        left = kv.free_blocks
        for request in batch:
            left -= self._blocks_to_end(replica, request) - kv.blocks_for(batch.computed(request))
        found: list[Context] = []
        for request, tokens in self._context_phase(replica, budget, found):
            blocks = self._blocks_to_end(replica, request) - kv.blocks_for(request.computed_tokens)
            if blocks > left:
                break
            left -= blocks
            found.append((request, tokens))
        return found

    def _blocks_to_end(self, replica: Replica, request: Request) -> int:
        kv = replica.kv
        longest = request.prompt_tokens + max(request.output_tokens, self.max_new_tokens)
        return min(kv.blocks_for(longest), kv.total_blocks)

    def _context_phase(self, replica: Replica, budget: int, found: list[Context]) -> Iterator[Context]:
        """Requests with context to compute, in order, for as long as slots and the token budget last.

        `found`: those that the caller has let in so far.
        """
        room = replica.limits.max_num_seqs - replica.batch.size
        slots = replica.limits.max_num_seqs - len(replica.running)
        for request in chain(tuple(replica.prefilling), replica.waiting):
            if len(found) >= room or not self._in_budget(found, budget):
                return
            if request in replica.prefilling:
                yield request, request.prefill_tokens - request.computed_tokens
            elif slots <= 0:
                return
            else:
                context = self._not_started(replica, request, found)
                if context is not None:
                    slots -= 1
                    yield context

    def _in_budget(self, found: list[Context], budget: int) -> bool:
        """Whether one more context could get a token."""
        if self.chunked and self.equal_progress:
            return len(found) < budget
        return sum(tokens for _, tokens in found) < budget

    def _not_started(self, replica: Replica, request: Request, found: list[Context]) -> Context | None:
        """A waiting request and what it has to compute; None if it must not start in this iteration."""
        kv = replica.kv
        if not self.chunked and request.prompt_tokens > replica.limits.max_num_batched_tokens:
            replica.reject(request)
            return None
        hit = replica.look_up(request)
        if self.capacity != "static_batch":
            computing = [*replica.prefilling, *(other for other, _ in found)]
            if kv.may_grow(request, hit, computing):
                return None
        return request, request.prefill_tokens - hit.blocks * kv.block_tokens

    def _next_step(self, replica: Replica, budget: int) -> list[Context]:
        """Pause until everybody that is left fits; the contexts among them."""
        kv, batch, most = replica.kv, replica.batch, replica.limits.max_num_seqs
        if not replica.waiting and not replica.prefilling and batch.blocks_needed(1) <= kv.free_blocks:
            return []
        started = sorted((r for r in replica.running if r in batch or r in replica.prefilling), key=self.order)
        newest = self.order(started[-1]) if started else ()
        found: list[Context] = []
        scheduled = starting = planned = 0  # requests, those of them that need a slot yet, and blocks they will take
        end: tuple[Any, ...] | None = None  # what was paused, and all behind it, has left the walk
        for request in merge(list(started), replica.waiting, key=self.order):
            here = self.order(request)
            if end is not None and here >= end:
                break
            if here > newest and not self._in_budget(found, budget):
                break
            starts = request not in replica.running
            context, blocks = self._step_of(replica, request, found)
            if context is None and request not in batch:
                continue
            while (
                scheduled >= most
                or planned + blocks > kv.free_blocks
                or (starts and len(replica.running) + starting >= most)
            ):
                if not started or self.order(started[-1]) < here:
                    return found
                paused = started.pop()
                end = self.order(paused)
                replica.preempt(paused)
                if paused is request:
                    return found
            if context is not None:
                found.append(context)
            planned += blocks
            scheduled += 1
            starting += starts
        return found

    def _step_of(self, replica: Replica, request: Request, found: list[Context]) -> tuple[Context | None, int]:
        """What a request computes of its context, if anything, and the blocks that its next step takes."""
        kv = replica.kv
        if request in replica.batch:
            return None, int(replica.batch.needs_block(request))
        known = request.prefill_tokens
        if request in replica.prefilling:  # all its blocks are its own in TensorRT-LLM, from its first chunk on
            context: Context | None = (request, known - request.computed_tokens)
        else:
            context = self._not_started(replica, request, found)
        return context, kv.blocks_for(known) - kv.blocks_for(request.computed_tokens)

    # ---- micro-batch

    def _chunks(self, contexts: list[Context], limit: int, decoding: int, unit: int) -> list[Context]:
        """What each context computes in this iteration."""
        if not contexts:
            return []
        budget = limit - decoding
        if not self.chunked:
            return self._whole(contexts, budget, limit)
        if sum(tokens for _, tokens in contexts) <= budget:
            return contexts
        return self._equal_progress(contexts, budget, unit) if self.equal_progress else _in_turn(contexts, budget, unit)

    @staticmethod
    def _whole(contexts: list[Context], budget: int, limit: int) -> list[Context]:
        """Prompts in order, up to the first that does not fit; one that grew beyond all budgets goes in parts."""
        chosen: list[Context] = []
        for request, tokens in contexts:
            if tokens > budget:
                if tokens > limit and not chosen and budget > 0:
                    chosen.append((request, budget))
                break
            chosen.append((request, tokens))
            budget -= tokens
        return chosen

    @staticmethod
    def _equal_progress(contexts: list[Context], budget: int, unit: int) -> list[Context]:
        """A block for each in turn, while the budget lasts."""
        sizes = [0] * len(contexts)
        grew = True
        while grew:
            grew = False
            for i, (_, tokens) in enumerate(contexts):
                more = min(unit, tokens - sizes[i])
                if 0 < more <= budget:
                    sizes[i] += more
                    budget -= more
                    grew = True
        return [(request, size) for (request, _), size in zip(contexts, sizes, strict=True) if size]


def _in_turn(contexts: list[Context], budget: int, unit: int) -> list[Context]:
    """Each takes what is left; what is cut is cut to whole blocks."""
    chosen: list[Context] = []
    for request, tokens in contexts:
        size = tokens if tokens <= budget else budget - budget % unit
        if size:
            chosen.append((request, size))
        budget -= size
    return chosen
