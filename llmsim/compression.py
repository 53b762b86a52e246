"""KV caches that drop tokens: sliding windows, attention sinks, a fixed budget per request.

    window:W     each token attends to the last W tokens (Mistral's sliding window, arXiv 2310.06825)
    sinks:S+W    to the first S and the last W (StreamingLLM, arXiv 2309.17453: S = 4)
    budget:B     the prompt is computed in full and cut to B tokens at its end; B are kept from then on (H2O, arXiv
                 2306.14048, which decides anew with every token; SnapKV, arXiv 2404.14469, which cuts the prompt)

With K = W, S + W or B tokens kept (rounded up to whole blocks, of which the last is being filled):

    blocks of a request   min(ceil(tokens / block), K / block); with a budget only once its prompt is computed
    decode attention      reads min(tokens, K)
    prefill attention     of a chunk behind `done` tokens: as behind min(done, K); a budget's: in full

Within a chunk all pairs are counted, also those that a window leaves out: at most new^2 / 2 too many. The chunk at hand
lies in scratch memory beside what is kept. Choosing what to drop takes no time here (H2O's scores are sums that its
attention kernel would have to write out). Dropped content cannot be shared, so there is no prefix cache.

**Accuracy is not modelled.** What a model answers once tokens are gone is another question, and no simulation of time
says how bad it is: `llmsim.kept.risk` is the line that results carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

from llmsim.batch import RunningBatch
from llmsim.cost import CostModel, Ramp
from llmsim.kept import Kept
from llmsim.kvcache import KVCache
from llmsim.request import Request

STEPS = 32  # of a run while somebody drops tokens: the log counts a run's cached tokens as if all of them grew


class DroppingKV(KVCache):
    """`total_blocks` blocks, of which a request never holds more than it keeps."""

    def __init__(self, total_blocks: int, block_tokens: int, kept: Kept) -> None:
        super().__init__(total_blocks, block_tokens, prefix_caching=False)
        self.kept = kept
        self.kept_blocks = -(-kept.tokens // block_tokens)
        self.late = kept.kind == "budget"  # dropped at the end of the prompt, not as it grows
        self._dropped: set[Request] = set()

    @property
    def kept_tokens(self) -> int:
        return self.kept_blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        blocks = -(-tokens // self.block_tokens)
        return blocks if self.late or blocks < self.kept_blocks else self.kept_blocks

    def drop(self, request: Request) -> None:
        """A request begins to decode: what a budget does not keep is free."""
        if self.late and request not in self._dropped:
            self._dropped.add(request)
            held = -(-request.computed_tokens // self.block_tokens)
            self.free_blocks += max(0, held - self.kept_blocks)

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        if request in self._dropped:
            self._dropped.remove(request)
            blocks = min(blocks, self.kept_blocks)
        super().release(request, blocks, full_tokens, resumes=resumes, keep_content=keep_content)


class DroppingBatch(RunningBatch):
    """A running batch whose members stop growing at `kv.kept_tokens`: they are *full* from then on.

    A full member takes no blocks and reads the same number of tokens every iteration. Becoming full is a change like
    a completion: another heap, of the iterations after which it happens.
    """

    __slots__ = ("_filling", "_full", "_kv")

    def __init__(self, kv: DroppingKV) -> None:
        super().__init__(kv.block_tokens)
        self._kv = kv
        self._full: set[Request] = set()
        self._filling: list[tuple[int, int, Request]] = []

    @property
    def growing(self) -> int:
        return self.size - len(self._full)

    def add(self, request: Request) -> None:
        self._kv.drop(request)
        super().add(request)
        left = self._kv.kept_tokens - request.computed_tokens
        if left > 0:
            heappush(self._filling, (self.iteration + left, request.ticket, request))
        else:
            self._fill(request)

    def _fill(self, request: Request) -> None:
        """It keeps no more than it has, or has more than it keeps."""
        self._full.add(request)
        self._wheel[(request.joined - request.computed_tokens) % self.block_tokens] -= 1
        self.kv_tokens -= self.computed(request) - self._kv.kept_tokens

    def _leave(self, request: Request, steps: int) -> None:
        if request in self._full:
            self._full.remove(request)
            self._wheel[(request.joined - request.computed_tokens) % self.block_tokens] += 1  # it is out already
            self.kv_tokens += request.computed_tokens + steps - self._kv.kept_tokens
        super()._leave(request, steps)

    def needs_block(self, request: Request) -> int:
        return 0 if request in self._full else super().needs_block(request)

    @property
    def squares(self) -> float:
        """Once some are full, as if all read alike: full members do, and a run's spread must not change."""
        return self.kv_tokens * self.kv_tokens / self.size if self._full else super().squares

    @property
    def longest(self) -> int:
        longest = super().longest
        return min(longest, self._kv.kept_tokens) if self._full else longest

    def steps_to_finish(self) -> int:
        steps = super().steps_to_finish()
        filling = self._filling
        while filling and filling[0][1] != filling[0][2].ticket:
            heappop(filling)
        if filling:
            steps = min(steps, filling[0][0] - self.iteration)
        return min(steps, STEPS) if self._full else steps

    def blocks_needed(self, steps: int) -> int:
        size, self.size = self.size, self.growing
        try:
            return super().blocks_needed(steps)
        finally:
            self.size = size

    def advance(self, steps: int) -> list[Request]:
        self.kv_tokens -= steps * len(self._full)  # of what the batch is about to grow by
        filling, after = self._filling, self.iteration + steps
        done = super().advance(steps)
        while filling and filling[0][0] <= after:
            _, ticket, request = heappop(filling)
            if ticket == request.ticket:
                self._fill(request)
        return done


class DroppingCost:
    """A cost model for such a batch; everything else is that of `cost`."""

    def __init__(self, cost: CostModel, batch: DroppingBatch, kv: DroppingKV) -> None:
        self._cost, self._batch = cost, batch
        self._done_tokens = None if kv.late else kv.kept_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cost, name)

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        first_s, growth_s = self._cost.decode_ramp(seqs, kv_tokens)
        return Ramp(first_s, growth_s * self._batch.growing / seqs if seqs else 0.0)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, *longest: float) -> float:
        most = self._done_tokens
        if most is not None:
            chunks = [(new, min(done, most)) for new, done in chunks]
        return self._cost.mixed_s(chunks, seqs, kv_tokens, *longest)
