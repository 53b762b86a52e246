"""A prefill batch of SGLang in the making: three budgets, and what is chosen (rules in `llmsim.schedulers.sglang`).

The radix cache locks what a request found when it is chosen, and takes pages when the whole batch is, so that no
request of a batch evicts what another one found. A cache that cannot lock has each request start as it is chosen.

Source: SGLang 0.5.23, managers/schedule_policy.py (PrefillAdder).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsim.kvcache import Hit
    from llmsim.replica import Replica
    from llmsim.request import Request

CLIP_TOKENS = 4096
ADMITTED, NO_TOKEN, OTHER = "admitted", "no token", "other"  # go on; no memory; another budget is used up


class PrefillBatch:
    """`total`, `input`, `chunk`: tokens left of each budget. `ends`: nothing may follow what is chosen."""

    def __init__(
        self, replica: Replica, total: float, input_tokens: int, chunk: float, allowed: Callable[[Request], int]
    ) -> None:
        self.replica, self.total, self.input, self.chunk, self.allowed = replica, total, input_tokens, chunk, allowed
        self.page = replica.kv.block_tokens
        self.chosen: list[tuple[Request, int, Any]] = []
        self.requests: dict[Request, None] = {}  # of them, those that waited
        self.ends = False
        self._lock = getattr(replica.kv, "lock", None)

    @property
    def started_now(self) -> int:
        """Of the chosen waiting requests, those that hold a slot already."""
        return len(self.requests) if self._lock is None else 0

    def longest_answer(self, request: Request) -> int:
        """What SGLang lets a request generate at most: the pool holds it all, with a page to spare."""
        return self.replica.kv.total_blocks * self.page - self.page - 1 - request.prompt_tokens

    def go_on(self, request: Request) -> bool:
        """The chunked request's next chunk; False if not a page of it fits."""
        left = request.prefill_tokens - request.computed_tokens
        tokens = int(min(left, self.chunk, self.total))
        if tokens <= 0:
            tokens = int(min(left, self.chunk))
        room = self.replica.kv.free_blocks * self.page + -request.computed_tokens % self.page
        tokens = min(tokens, room)
        if tokens <= 0:
            return False
        self.ends = tokens < left
        self.chosen.append((request, tokens, None))
        self._reserve(tokens, 0 if self.ends else min(self.allowed(request), CLIP_TOKENS))
        return True

    def add(self, request: Request) -> str:
        """Choose a waiting request, or say why not; the verdict is about the one after it."""
        page = self.page
        hit = self.replica.look_up(request)
        found = hit.blocks * page
        left = request.prefill_tokens - found
        most = min(self.allowed(request), self.longest_answer(request))
        total = self.total - hit.idle_blocks * page
        if left + min(max(most - request.generated_tokens, 0), CLIP_TOKENS) + page >= total:
            return NO_TOKEN
        tokens = left
        pages_tokens = -(-left // page) * page
        if self.chunk == float("inf"):
            if self.chosen and pages_tokens >= self.input:
                return OTHER
        elif pages_tokens > self.chunk:
            tokens = int(found + self.chunk) // page * page - found
            if tokens <= 0:
                return OTHER
            self.ends = True
        self._choose(request, tokens, hit, total)
        self._reserve(tokens, 0 if self.ends else min(most, CLIP_TOKENS))
        if self.total <= 0:
            return NO_TOKEN
        return OTHER if self.ends or self.input <= 0 or self.chunk <= 0 else ADMITTED

    def start(self) -> None:
        """Compute what is chosen, as far as it does not yet."""
        for request, tokens, hit in self.chosen:
            if self._lock is None and request in self.requests:
                continue
            fits = self.replica.prefill(request, tokens, hit)
            assert fits, "the budget counts free and evictable pages"

    def _choose(self, request: Request, tokens: int, hit: Hit, total: float) -> None:
        self.total = total
        if self._lock is not None:
            self._lock(hit)
        else:
            self.replica.prefill(request, tokens, hit)
        self.chosen.append((request, tokens, hit))
        self.requests[request] = None

    def _reserve(self, tokens: int, answer: int) -> None:
        pages_tokens = -(-tokens // self.page) * self.page
        self.total -= pages_tokens + self.page + answer
        self.input -= pages_tokens
        self.chunk -= pages_tokens
