"""Orca (OSDI'22): iteration-level scheduling with reserved memory.

    each iteration   requests in order of arrival, up to `batch_size`: all running ones make a token, and new ones
                     compute their whole prompt beside them (selective batching: linear layers see all tokens at once,
                     attention each request)
    admission        a request is scheduled for the first time only if `max_tokens` slots of KV are still unreserved
                     (algorithm 1 of the paper); the first that does not fit stops all behind it
    then             no preemption, no chunks: a prompt is computed at once, alone if it is longer than
                     max_num_batched_tokens

What is reserved is what vLLM's paper (SOSP'23, section 6.1) calls

    oracle   the request's own prompt and answer, as if its length were known
    pow2     its prompt, and its answer's length rounded up to a power of two
    max      `max_tokens`, the longest sequence that the model serves (2048 for their OPT)

rounded up to whole KV blocks; with `buddy` to a power of two of them, as the buddy allocator rounds that vLLM's paper
gives Orca, which says nothing of its own. Left out: pipeline stages (several batches in flight), fragmentation between
reservations, prefix sharing.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from llmsim.kvcache import NO_HIT
from llmsim.plugins import PolicyError
from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Limits, Replica
    from llmsim.request import Request

RESERVES = ("oracle", "pow2", "max")


class Orca:
    """Batches by iteration, memory reserved at admission: `reserve` oracle, pow2 or max (of `max_tokens`).

    `batch_size`: requests at most, 0: max_num_seqs; `buddy`: see above.
    """

    def __init__(
        self, reserve: str = "oracle", max_tokens: int = 2048, batch_size: int = 0, buddy: bool = False
    ) -> None:
        if reserve not in RESERVES:
            raise ValueError(f"reserve={reserve!r} is unknown. Choose {', '.join(RESERVES)}.")
        for name, count, least in (("max_tokens", max_tokens, 1), ("batch_size", batch_size, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name}={count!r} is not a whole number of {least} or more.")
        self.reserve, self.max_tokens, self.batch_size, self.buddy = reserve, max_tokens, batch_size, bool(buddy)
        self._reserved: dict[Request, int] = {}
        self._reserved_blocks = 0

    def token_limit(self, limits: Limits) -> float:
        """None: a prompt longer than max_num_batched_tokens runs at once."""
        return inf

    def ended(self, request: Request, now_s: float) -> None:
        self._reserved_blocks -= self._reserved.pop(request, 0)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        if replica.batch.size:
            replica.decode()
        waiting = replica.waiting
        if waiting.size:
            self._admit(replica)
        return HOLD

    def _admit(self, replica: Replica) -> None:
        waiting, running, total_blocks = replica.waiting, replica.running, replica.kv.total_blocks
        most = min(self.batch_size or replica.limits.max_num_seqs, replica.limits.max_num_seqs)
        left = budget = replica.limits.max_num_batched_tokens
        while waiting.size and len(running) < most:
            request = waiting.head
            tokens = request.prefill_tokens  # its prompt, and its answer so far if drafts took more than was reserved
            if tokens > left and not (left == budget and tokens > budget):
                return
            blocks = replica.kv.blocks_for(self._tokens(request))
            if blocks > total_blocks:
                blocks = self._all_of(total_blocks, request)
            if self.buddy:
                blocks = min(1 << (blocks - 1).bit_length(), total_blocks)
            more = blocks - self._reserved.get(request, 0)
            if self._reserved_blocks + more > total_blocks or not replica.prefill(request, tokens, NO_HIT):
                return
            self._reserved[request] = blocks
            self._reserved_blocks += more
            left -= tokens

    def _all_of(self, total_blocks: int, request: Request) -> int:
        """More than there is, though the request itself fits: all of it will do where the length was a guess."""
        if self.reserve == "pow2":
            return total_blocks
        raise PolicyError(
            f"Orca reserves max_tokens={self.max_tokens} for request {request.id}, more than the {total_blocks} KV"
            " blocks there are. Lower it."
        )

    def _tokens(self, request: Request) -> int:
        needed = request.prompt_tokens + request.output_tokens - 1  # the last token's KV is never needed
        if self.reserve == "oracle":
            return needed
        if self.reserve == "pow2":
            return request.prompt_tokens + (1 << (request.output_tokens - 1).bit_length())
        if needed > self.max_tokens:
            raise PolicyError(
                f"Orca reserves max_tokens={self.max_tokens} for each request, of which request {request.id} needs"
                f" {needed}. Raise it."
            )
        return self.max_tokens
