"""Shortest remaining first: who has the least (predicted) answer left runs; the others are preempted for them.

    remaining = predicted answer - tokens generated

At every iteration those with the least remaining, waiting or running, that fit are to run (arXiv 2408.15792,
algorithm 1). All decoding requests lose one remaining token an iteration, so their order stays; and waiting ones lose
none, so a running request is overtaken only by one that arrives or returns: the front of the queue. While that does not
fit (slots, KV blocks for its whole sequence), running requests with more remaining are preempted, the most first - none
if even all of them would not make room. Remaining may fall below 0 (the prediction was too short): ever more urgent.

Differences from the paper: a preempted request is recomputed (vLLM V1's way; the paper's vLLM could also swap); with
the base vllm, the shorter request is admitted an iteration later, since vLLM admits nobody in one that preempts.
Promoted requests (`starvation_iterations`) are preempted only once their quantum is used up. Needs lengths: ranks have
no remainder; with them use sjf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.plugins import PolicyError
from llmsim.schedulers.ordered import predicted_tokens, spare_blocks
from llmsim.schedulers.sjf import ShortestFirst

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class ShortestRemaining(ShortestFirst):
    """Arguments as ShortestFirst's."""

    preempts = True
    _longest: Request | None = None  # the decoding request with the most remaining, until it leaves the batch
    _decoding: Any = None  # the batch's members when it was found

    def length(self, request: Request) -> float:
        predicted = predicted_tokens(request)
        if predicted < 1.0:
            raise PolicyError(
                f"{type(self).__name__} needs lengths, and predicted_tokens={predicted:g} of request {request.id} is a"
                " rank: use sjf, or predictions in tokens."
            )
        return predicted - request.generated_tokens

    def remaining(self, replica: Replica, request: Request) -> float:
        """Of a running request, now."""
        batch = replica.batch
        return self.length(request) - (batch.iteration - request.joined if request.joined >= 0 else 0)

    def victim(self, replica: Replica) -> Request:
        """Who leaves when blocks run short: the one with the most remaining, promoted ones last."""
        promoted = self.guard.promoted
        return max(replica.running, key=lambda one: (one not in promoted, self.remaining(replica, one), one.id))

    def make_room(self, replica: Replica) -> None:
        waiting = replica.waiting
        if not waiting.size or not replica.running:
            return
        head = waiting.head
        if self._fits(replica, head, replica.kv.free_blocks, len(replica.running) - len(replica.paused)):
            return
        urgent = head in self.guard.promoted
        limit = float("-inf") if urgent else self.length(head)
        if not urgent and self._most_remaining(replica) <= limit:
            return
        promoted = self.guard.promoted
        longer = [
            (self.remaining(replica, one), one.id, one)
            for one in (*replica.batch, *replica.prefilling)
            if one not in promoted and self.remaining(replica, one) > limit
        ]
        longer.sort(reverse=True)
        free, slots = replica.kv.free_blocks, len(replica.running) - len(replica.paused)
        for count, (_, _, one) in enumerate(longer, 1):
            computed = replica.batch.computed(one) if one.joined >= 0 else one.computed_tokens
            free, slots = free + replica.kv.blocks_for(computed), slots - 1
            if self._fits(replica, head, free, slots):
                for _, _, leaving in longer[:count]:
                    replica.preempt(leaving)
                return

    def _fits(self, replica: Replica, request: Request, free_blocks: int, slots: int) -> bool:
        if slots >= replica.limits.max_num_seqs:
            return False
        hit = replica.look_up(request)
        needed = replica.kv.blocks_for(request.prefill_tokens) - hit.blocks + hit.idle_blocks
        return needed + replica.batch.blocks_needed(1) + spare_blocks(self.base, replica) <= free_blocks

    def _most_remaining(self, replica: Replica) -> float:
        """Of all running requests; found anew only when the one it was has left, or others have joined."""
        batch = replica.batch
        longest = self._longest
        newest = next(reversed(batch._members), None)
        if longest is None or longest.joined < 0 or newest is not self._decoding:
            self._decoding = newest
            longest = self._longest = max(batch, key=lambda one: self.remaining(replica, one), default=None)
        most = self.remaining(replica, longest) if longest is not None else float("-inf")
        return max([most, *(self.remaining(replica, one) for one in replica.prefilling)])
