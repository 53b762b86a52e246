"""SGLang's radix cache: the tokens of the KV cache as a tree of sequences, exact to the page.

A node is a stretch of consecutive pages of one sequence; its children go on differently. The tree is compressed: a
stretch is split where two sequences part, or where a look-up ends. With page = 1 token (the default) it is a tree of
tokens.

    match     the longest way from the root along a sequence, of whole pages, at most all but its last token; every
              node on the way is touched (its time of use is now), the one it ends in as well, which is split there
    insert    a chunk's tokens after the chunk has run, everything computed when a request ends; what the tree has
              already is kept and the request's own copy of it is free at once
    lock      a request locks the way to the last of its tokens in the tree; a node that nobody locks is evictable
    evict     whole leaves, the one used least recently first, until what is missing is free; a node becomes a leaf
              when its last child goes

Differences from `llmsim.kvcache` (vLLM): content can be found one iteration after it was computed instead of when it
was scheduled; answers when they end instead of block by block; two copies of the same content never last; eviction
takes leaves instead of a request's tail blocks.

The tree's time counts operations. Eviction asks a heap for the leaf used least recently; a touch does not move a
leaf's entry, which is put right when it comes to the top. So a touch costs nothing and an eviction O(log n).

The tokens of a sequence are named by the trace's prefix ids of `prefix_block_tokens` tokens each, up to
`identity_tokens`; what comes behind only the request itself can find again (after a retraction). Prefix ids and pages
need not divide each other: a page is shared if all ids that it touches are.

Source: SGLang 0.5.23, python/sglang/srt/mem_cache/radix_cache.py; mem_cache/common.py (only the shortfall is evicted).
Left out: host tiers (HiCache), other orders of eviction than LRU, bigram keys of EAGLE.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from heapq import heappop, heappush

from llmsim.kvcache import Hit, KVCache
from llmsim.request import Request


class Sequence:
    """What the tokens of a request are called, and how far it has locked the tree."""

    __slots__ = ("ids", "node", "public_tokens")

    def __init__(self, ids: tuple[Hashable, ...], public_tokens: int, root: Node) -> None:
        self.ids = ids
        self.public_tokens = public_tokens  # of whole pages, named by ids; behind them the sequence is its own name
        self.node = root  # the deepest node it locks; root: none


class Node:
    """Tokens [start, end) of a sequence, behind those of its parent. `locks`: requests that need them."""

    __slots__ = ("children", "end", "key", "locks", "parent", "queued", "sequence", "serial", "start", "used")

    def __init__(self, sequence: Sequence | None, start: int, end: int, parent: Node | None, key: Hashable) -> None:
        self.sequence = sequence
        self.start, self.end = start, end
        self.parent = parent  # None: the root, or evicted
        self.key = key  # its name among its parent's children: its first page
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.used = 0
        self.queued = False  # has an entry in the heap of leaves
        self.serial = 0


class RadixHit(Hit):
    """A hit that knows where in the tree it ends; `locked`: its content cannot be evicted any more."""

    __slots__ = ("locked", "node")

    def __init__(self, node: Node, blocks: int, idle_blocks: int) -> None:
        super().__init__()
        self.node = node
        self.blocks = blocks
        self.idle_blocks = idle_blocks
        self.locked = False


class RadixCache(KVCache):
    """`total_blocks` pages of `block_tokens` tokens; `free_blocks` counts the evictable ones (`idle_blocks`) too."""

    publishes = False  # answers are shared when they end

    def __init__(
        self, total_blocks: int, block_tokens: int = 1, *, prefix_caching: bool = True, prefix_block_tokens: int = 0
    ) -> None:
        super().__init__(total_blocks, block_tokens, prefix_caching=prefix_caching)
        self.prefix_block_tokens = prefix_block_tokens
        self._id_tokens = prefix_block_tokens or 1
        self.root = Node(None, 0, 0, None, None)
        self.root.locks = 1
        self._now = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap: used, serial, node; an entry may be out of date
        self._serial = 0
        # chunks whose tokens are to be inserted: how far, and whether their results are still in flight
        self.pending: dict[Request, tuple[int, bool]] = {}

    # ---- looking up
    def match(self, request: Request, tokens: int) -> Hit:
        """Leading pages in the tree, but for the one of the last token, which is always computed."""
        if not self.prefix_caching:
            return Hit()
        sequence = self._sequence(request)
        node = self._walk(sequence, (tokens - 1) // self.block_tokens * self.block_tokens)
        idle_tokens, above = 0, node
        while not above.locks:
            idle_tokens += above.end - above.start
            assert above.parent is not None, "the root is locked"
            above = above.parent
        return RadixHit(node, node.end // self.block_tokens, idle_tokens // self.block_tokens)

    def may_grow(self, request: Request, hit: Hit, storing: Iterable[Request]) -> bool:
        return False  # nothing is inserted while no prompt is computed and no request ends

    def _sequence(self, request: Request) -> Sequence:
        sequence: Sequence | None = request.held
        if sequence is None:
            named = min(request.identity_tokens, len(request.prefix_ids) * self._id_tokens)
            named -= named % self.block_tokens
            sequence = request.held = Sequence(request.prefix_ids, named, self.root)
        return sequence

    def _key(self, sequence: Sequence, at: int) -> Hashable:
        """The name of a sequence's page at token `at`; what comes before it is known to agree."""
        end = at + self.block_tokens
        if end > sequence.public_tokens:
            return sequence
        first, last = at // self._id_tokens, (end - 1) // self._id_tokens
        return sequence.ids[first] if first == last else sequence.ids[first : last + 1]

    def _agree(self, sequence: Sequence, node: Node, limit: int) -> int:
        """Where a sequence that agrees with the node's first page parts from it, `limit` at the latest."""
        its = node.sequence
        end = node.end if node.end < limit else limit
        if its is sequence:
            return end
        assert its is not None, "only the root has no sequence"
        end = min(end, sequence.public_tokens, its.public_tokens)
        at, upto = node.start // self._id_tokens, -(-end // self._id_tokens)
        if sequence.ids[at:upto] != its.ids[at:upto]:
            while sequence.ids[at] == its.ids[at]:
                at += 1
            tokens = at * self._id_tokens
            end = tokens - tokens % self.block_tokens
        return end

    def _walk(self, sequence: Sequence, limit: int) -> Node:
        """The node where the first `limit` tokens of a sequence, or as many as the tree has, end; touches the way."""
        self._now += 1
        node = self.root
        while node.end < limit:
            child = node.children.get(self._key(sequence, node.end))
            if child is None:
                break
            child.used = self._now
            end = self._agree(sequence, child, limit)
            if end < child.end:
                return self._part(child, end)
            node = child
        return node

    def _part(self, node: Node, at: int) -> Node:
        """Cut a node in two; returns the upper part, new, with the lower one as its child."""
        parent, sequence = node.parent, node.sequence
        assert parent is not None and sequence is not None, "the root is empty"
        upper = Node(sequence, node.start, at, parent, node.key)
        upper.locks, upper.used = node.locks, node.used
        parent.children[node.key] = upper
        node.key = self._key(sequence, at)
        node.start, node.parent = at, upper
        upper.children[node.key] = node
        return upper

    # ---- holding and letting go
    def lock(self, hit: Hit) -> None:
        """Keep a hit's content until a request is admitted with it, or `unlock`."""
        if isinstance(hit, RadixHit) and not hit.locked:
            self._lock(hit.node, self.root)
            hit.locked, hit.idle_blocks = True, 0

    def unlock(self, hit: Hit) -> None:
        if isinstance(hit, RadixHit) and hit.locked:
            self._unlock(hit.node)
            hit.locked = False

    def admit(self, request: Request, hit: Hit, tokens: int) -> None:
        if isinstance(hit, RadixHit):
            self.lock(hit)
            self._sequence(request).node = hit.node
        self.take(self.blocks_for(tokens) - hit.blocks)

    def _lock(self, node: Node, above: Node) -> None:
        """Lock the way from `above`, which is not locked again, down to `node`."""
        while node is not above:
            if not node.locks:
                pages = (node.end - node.start) // self.block_tokens
                self.free_blocks -= pages
                self.idle_blocks -= pages
            node.locks += 1
            assert node.parent is not None, "what is locked is in the tree"
            node = node.parent

    def _unlock(self, node: Node) -> None:
        while node is not self.root:
            node.locks -= 1
            if not node.locks:
                pages = (node.end - node.start) // self.block_tokens
                self.free_blocks += pages
                self.idle_blocks += pages
                if not node.children:
                    self._queue(node)
            assert node.parent is not None, "what is locked is in the tree"
            node = node.parent

    def _queue(self, leaf: Node) -> None:
        if not leaf.queued:
            leaf.queued = True
            self._serial = leaf.serial = self._serial + 1
            heappush(self._leaves, (leaf.used, leaf.serial, leaf))

    # ---- inserting
    def store(self, request: Request, tokens: int) -> None:
        """A chunk is scheduled that makes `tokens` tokens of the request's sequence: inserted once it has run."""
        if self.prefix_caching:
            self.pending[request] = tokens, tokens >= request.prompt_tokens + request.generated_tokens

    def settle(self, asynchronous: bool) -> None:
        """An iteration begins: insert what the chunks before it have computed.

        A prompt that is complete is inserted when the results of its last chunk are taken, with asynchronous
        scheduling one iteration later; one that is not is inserted before its next chunk is chosen.
        """
        for request, (tokens, in_flight) in list(self.pending.items()):
            if asynchronous and in_flight:
                self.pending[request] = tokens, False
            else:
                del self.pending[request]
                self._insert(self._sequence(request), tokens)

    def _insert(self, sequence: Sequence, tokens: int) -> None:
        """Put the first `tokens` tokens of a request, locked and its own, into the tree, and lock all of them."""
        upto = tokens - tokens % self.block_tokens
        held = sequence.node
        if upto <= held.end:
            return
        node = self._walk(sequence, upto)
        self._lock(node, held)
        self.free_blocks += (node.end - held.end) // self.block_tokens  # its own copies of what the tree had
        if node.end < upto:
            key = self._key(sequence, node.end)
            self._now += 1  # used later than what this insertion has split off
            new = node.children[key] = Node(sequence, node.end, upto, node, key)
            new.locks, new.used = 1, self._now
            node = new
        sequence.node = node

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        """Take back the `blocks` of a request; its first `full_tokens` tokens go into the tree.

        Without `keep_content` (a retraction) only what is in the tree already stays there.
        """
        if not self.prefix_caching:
            self.free_blocks += blocks
            return
        self.pending.pop(request, None)
        sequence = self._sequence(request)
        if keep_content:
            self._insert(sequence, full_tokens)
        self.free_blocks += blocks - sequence.node.end // self.block_tokens  # what nobody else can have
        self._unlock(sequence.node)
        sequence.node = self.root
        if not resumes:
            request.held = None

    # ---- evicting
    def _evict(self, blocks: int) -> None:
        while blocks > 0:
            used, _, leaf = heappop(self._leaves)
            if leaf.locks or leaf.children:  # queued again when it becomes an evictable leaf
                leaf.queued = False
                continue
            if leaf.used != used:
                heappush(self._leaves, (leaf.used, leaf.serial, leaf))
                continue
            pages = (leaf.end - leaf.start) // self.block_tokens
            blocks -= pages
            self.idle_blocks -= pages
            self.evicted_blocks += pages
            parent = leaf.parent
            assert parent is not None, "a leaf in the heap is in the tree"
            del parent.children[leaf.key]
            leaf.parent = None
            if not parent.children and not parent.locks:
                self._queue(parent)
