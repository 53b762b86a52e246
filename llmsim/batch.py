"""The decoding requests of one replica, advanced whole iterations at a time.

Every member makes one token per iteration, so nothing about an individual member needs computing between two changes of
membership. With c = iterations so far:

* a request joining with r tokens to go leaves after iteration c + r - 1: a heap of those iterations;
* it takes a new KV block in every iteration that begins with its context at a multiple of `block_tokens`: a wheel of
  `block_tokens` counters, indexed by the iteration modulo `block_tokens` in which that happens;
* the cached tokens that an iteration reads grow by the number of members each iteration, and their squares likewise:
  a member's context less the iteration's number stays as it was when it joined.

A request can leave and come back with the same last iteration, so heap entries carry the ticket of the stay they belong
to, and an entry whose ticket is not the request's current one is stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from llmsim.request import Request


class RunningBatch:
    """`iteration`: iterations so far; `kv_tokens`: cached tokens the next iteration reads; `len()`: members."""

    __slots__ = (
        "_heap", "_largest", "_members", "_offsets", "_squares", "_tickets", "_wheel", "block_tokens", "iteration",
        "kv_tokens", "size",
    )  # fmt: skip
    even = True  # every member makes one token an iteration

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.iteration = 0
        self.kv_tokens = 0
        self.size = 0
        self._offsets = self._squares = 0  # sums over members of context less iteration, and of its square
        self._largest: int | None = None  # context less iteration of a member; None: not known
        self._wheel = [0] * block_tokens
        self._heap: list[tuple[int, int, Request]] = []
        self._members: dict[Request, None] = {}
        self._tickets = 0

    def __len__(self) -> int:
        return self.size

    @property
    def joins(self) -> int:
        """Stays begun so far: changes whenever a request joins."""
        return self._tickets

    def __iter__(self) -> Iterator[Request]:
        """Oldest member first."""
        return iter(self._members)

    def __contains__(self, request: object) -> bool:
        return request in self._members

    def add(self, request: Request) -> None:
        """Let a request decode from the next iteration on; it must have at least one token to go. O(log n)."""
        now = self.iteration
        computed = request.computed_tokens
        ticket = self._tickets = self._tickets + 1
        request.joined = now
        request.ticket = ticket
        heappush(self._heap, (now + request.output_tokens - request.generated_tokens, ticket, request))
        self._wheel[(now - computed) % self.block_tokens] += 1
        self._members[request] = None
        self.kv_tokens += computed
        self.size += 1
        offset = computed - now
        self._offsets += offset
        self._squares += offset * offset
        if self._largest is not None and offset > self._largest:
            self._largest = offset

    def remove(self, request: Request) -> None:
        """Take a request out before its end and settle its progress. O(1)."""
        self._leave(request, self.iteration - request.joined)

    def _leave(self, request: Request, steps: int) -> None:
        offset = request.computed_tokens - request.joined
        self._wheel[-offset % self.block_tokens] -= 1
        self._offsets -= offset
        self._squares -= offset * offset
        if offset == self._largest:
            self._largest = None
        request.computed_tokens += steps
        request.generated_tokens += steps
        request.joined = -1
        request.ticket = -request.ticket  # which stay it was can still be told
        del self._members[request]
        self.kv_tokens -= request.computed_tokens
        self.size -= 1

    @property
    def squares(self) -> float:
        """Sum of the squares of the contexts that the next iteration reads."""
        now = self.iteration
        return self._squares + now * (2 * self._offsets + now * self.size)

    @property
    def longest(self) -> int:
        """The longest context that the next iteration reads. O(n) after the member that had it has left, else O(1)."""
        if not self._members:
            return 0
        if self._largest is None:
            self._largest = max(member.computed_tokens - member.joined for member in self._members)
        return self._largest + self.iteration

    def computed(self, request: Request) -> int:
        """Tokens of a member whose KV exists once the iterations so far have run."""
        return request.computed_tokens + self.iteration - request.joined

    def needs_block(self, request: Request) -> int:
        """New KV blocks for the member's next token: 1 or 0."""
        return self.computed(request) % self.block_tokens == 0

    def steps_to_finish(self) -> int:
        """Iterations until the next member is done. The batch must not be empty."""
        heap = self._heap
        while heap[0][1] != heap[0][2].ticket:
            heappop(heap)
        return heap[0][0] - self.iteration

    def blocks_needed(self, steps: int) -> int:
        """KV blocks that the next `steps` iterations take."""
        wheel, turn = self._wheel, self.block_tokens
        at = self.iteration % turn
        if steps == 1:
            return wheel[at]
        turns, rest = divmod(steps, turn)
        part = sum(wheel[at : at + rest]) + (sum(wheel[: at + rest - turn]) if at + rest > turn else 0)
        return turns * self.size + part

    def steps_that_fit(self, steps: int, free_blocks: int) -> int:
        """The largest n <= steps whose KV blocks fit into `free_blocks`."""
        if self.size * (steps // self.block_tokens + 1) <= free_blocks or self.blocks_needed(steps) <= free_blocks:
            return steps
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            if self.blocks_needed(middle) <= free_blocks:
                low = middle
            else:
                high = middle
        return low

    def advance(self, steps: int) -> list[Request]:
        """Run `steps` iterations, none beyond the next completion; returns those whose last token this made."""
        now = self.iteration = self.iteration + steps
        self.kv_tokens += steps * self.size
        heap = self._heap
        done: list[Request] = []
        while heap and heap[0][0] <= now:
            _, ticket, request = heappop(heap)
            if ticket == request.ticket:
                self._leave(request, now - request.joined)
                done.append(request)
        return done
