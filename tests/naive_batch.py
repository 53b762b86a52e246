"""The running batch as a list of requests, one iteration and one request at a time: the oracle for `RunningBatch`."""

from __future__ import annotations

from llmsim.request import Request


class NaiveBatch:
    """What each member has computed and generated is written down after every iteration."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.members: list[Request] = []
        self.computed: dict[Request, int] = {}
        self.generated: dict[Request, int] = {}

    def add(self, request: Request) -> None:
        self.members.append(request)
        self.computed[request] = request.computed_tokens
        self.generated[request] = request.generated_tokens

    def remove(self, request: Request) -> tuple[int, int]:
        """Its progress: computed and generated tokens."""
        self.members.remove(request)
        return self.computed.pop(request), self.generated.pop(request)

    def steps_to_finish(self) -> int:
        return min(request.output_tokens - self.generated[request] for request in self.members)

    def blocks_needed(self, steps: int) -> int:
        """A token goes into a new block when those before it fill theirs; nobody leaves meanwhile."""
        return sum(
            (self.computed[request] + step) % self.block_tokens == 0
            for request in self.members
            for step in range(steps)
        )

    def steps_that_fit(self, steps: int, free_blocks: int) -> int:
        fitting = 0
        while fitting < steps and self.blocks_needed(fitting + 1) <= free_blocks:
            fitting += 1
        return fitting

    def advance(self, steps: int) -> dict[Request, tuple[int, int]]:
        """Those that finished, in order of joining, with their progress."""
        for _ in range(steps):
            for request in self.members:
                self.computed[request] += 1
                self.generated[request] += 1
        finished = [request for request in self.members if self.generated[request] == request.output_tokens]
        return {request: self.remove(request) for request in finished}

    @property
    def longest(self) -> int:
        return max(self.computed.values(), default=0)

    @property
    def kv_tokens(self) -> int:
        return sum(self.computed.values())
