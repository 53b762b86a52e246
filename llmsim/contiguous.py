"""KV cache without paging: every request gets one piece of memory, for its longest possible sequence, at admission.

The systems before vLLM (FasterTransformer, Orca) kept the KV of a request in consecutive memory, so it had to be
reserved before the answer's length was known. What is reserved, as the vLLM paper tells its three kinds of Orca apart
(SOSP'23, section 6.1):

    max       max_model_len tokens
    pow2      the prompt, and the answer's length rounded up to a power of two: a server that guesses well
    oracle    prompt and answer exactly: a server that knows

Where a piece lies is decided by buddy allocation (Knowlton 1965), as in that paper's Orca: pieces of 2^k blocks, split
in halves and put together again with the half they came from. So a reservation takes the next power of two, and one
may find no place though enough blocks are free (external fragmentation). The rules that follow:

    free_blocks    blocks that nobody has reserved; a request is admitted if a piece of its size is free
    decoding       takes no blocks, so nobody is ever preempted
    sharing        none: a prefix would have to lie in two places at once

Left out: compaction, which none of these systems had.
"""

from __future__ import annotations

from llmsim.kvcache import Hit, KVCache
from llmsim.request import Request

KINDS = ("max", "pow2", "oracle")


class Buddies:
    """`blocks` blocks as pieces of 2^k each, aligned to their size."""

    def __init__(self, blocks: int) -> None:
        self.free: list[set[int]] = [set() for _ in range(max(1, blocks.bit_length()))]
        start = 0
        while start < blocks:  # the largest aligned pieces that fit
            order = (blocks - start).bit_length() - 1
            self.free[order].add(start)
            start += 1 << order

    def fits(self, order: int) -> bool:
        return any(self.free[order:])

    def take(self, order: int) -> int:
        """Where a piece of 2^order blocks begins: the lowest of the smallest that will do."""
        found = next(o for o in range(order, len(self.free)) if self.free[o])
        start = min(self.free[found])
        self.free[found].remove(start)
        while found > order:
            found -= 1
            self.free[found].add(start + (1 << found))
        return start

    def give(self, start: int, order: int) -> None:
        while start ^ (1 << order) in self.free[order]:
            buddy = start ^ (1 << order)
            self.free[order].remove(buddy)
            start, order = min(start, buddy), order + 1
        self.free[order].add(start)


class ContiguousKV(KVCache):
    """`total_blocks` blocks of `unit_tokens` tokens, handed out in pieces; `kind` says how much each request gets."""

    def __init__(self, total_blocks: int, unit_tokens: int, *, kind: str, max_model_len: int) -> None:
        # The engine asks for blocks as sequences grow: one block holds any sequence, and it is never asked for.
        super().__init__(total_blocks, max_model_len + 1, prefix_caching=False)
        self.unit_tokens, self.kind, self.max_model_len = unit_tokens, kind, max_model_len
        self._buddies = Buddies(total_blocks)
        self._places: dict[Request, tuple[int, int]] = {}
        most = 1 << _order(-(-max_model_len // unit_tokens))
        if not self._buddies.fits(most.bit_length() - 1):
            raise ValueError(
                f"kv_allocation={kind!r}: a request of max_model_len={max_model_len} takes a piece of {most} blocks,"
                f" and of {total_blocks} none is so large. Lower max_model_len"
            )

    def reserved_blocks(self, request: Request) -> int:
        """What a request takes, rounded up as its piece is."""
        prompt, output = request.prompt_tokens, request.output_tokens
        tokens = self.max_model_len
        if self.kind == "oracle":
            tokens = prompt + output
        elif self.kind == "pow2":
            tokens = min(tokens, prompt + (1 << _order(output)))
        return 1 << _order(-(-tokens // self.unit_tokens))

    def blocks_for(self, tokens: int) -> int:
        return 0

    def match(self, request: Request, tokens: int) -> Hit:
        """Nothing is shared; what must be free for the request to come in, or more than there is if no piece is."""
        hit = Hit()
        blocks = self.reserved_blocks(request)
        hit.idle_blocks = blocks if self._buddies.fits(_order(blocks)) else self.total_blocks + 1
        return hit

    def admit(self, request: Request, hit: Hit, tokens: int) -> None:
        order = _order(self.reserved_blocks(request))
        self._places[request] = self._buddies.take(order), order
        self.free_blocks -= 1 << order

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        start, order = self._places.pop(request)
        self._buddies.give(start, order)
        self.free_blocks += 1 << order


def _order(count: int) -> int:
    """The least k with 2^k >= count."""
    return (count - 1).bit_length()
