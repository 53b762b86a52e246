"""Paged KV cache of one replica with vLLM V1's prefix cache, exact to the block.

Blocks are counted, not numbered: which physical block a request gets never matters, except through the order in which
cached contents are lost. vLLM's free list [v1/core/block_pool.py; kv_cache_utils.py] is, from the front,

    blocks without content (freed ones last in first out, then never used ones)  |  blocks with content, oldest first

because freed blocks without a hash go to the front and freed blocks with one go to the back. So the state is a number
of free blocks and, for those that still hold content, a list in the order of their eviction.

Content is kept as *extents*: runs of consecutive blocks of one stretch of a sequence that were stored by the same
request and not touched separately since. A stretch (`Node`) is one prefix id of the trace below its parent's (a trie,
so equal ids behind different prefixes stay apart), or the rest of one request's own sequence that nobody else can
know. Several extents may cover the same blocks (two requests that computed the same prefix at the same time); look-up
takes the one stored first, as vLLM's map does. An extent is split only when a hit takes a part of it, and shrinks
from its end when evicted: a request's blocks are freed tail first, so its tail is lost first.
Source: vLLM 0.25.1, v1/core/single_type_kv_cache_manager.py and kv_cache_manager.py; tested against recorded schedules.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from llmsim.request import Request


class Extent:
    """Blocks [start, end) of a node. `refs` requests hold it; with none it is in the eviction list."""

    __slots__ = ("end", "newer", "node", "older", "refs", "start", "tail")

    def __init__(self, node: Node | None, start: int, end: int) -> None:
        self.node = node
        self.start = start
        self.end = end
        self.refs = 0
        self.tail: Extent | None = None  # what was split off its end while held: its holders hold that too
        self.older: Extent = self
        self.newer: Extent = self


class Node:
    """A stretch of a sequence whose blocks can be found again; extents in the order they were stored."""

    __slots__ = ("children", "extents")

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.children: dict[Hashable, Node] = {}


class Held:
    """What a request with an identity holds: `pieces` = (first extent, blocks) from the start of its sequence."""

    __slots__ = ("found_blocks", "path", "pieces", "private", "public_blocks", "stored_blocks")

    def __init__(self, path: list[Node], public_blocks: int) -> None:
        self.path = path
        self.public_blocks = public_blocks  # blocks that other requests can share, by prefix ids
        self.private: Node | None = None  # the blocks behind them, known to this request alone
        self.pieces: list[tuple[Extent, int]] = []
        self.stored_blocks = 0  # leading blocks whose content is registered
        self.found_blocks = 0  # of them, those it found when it was admitted


class Hit:
    """Result of a look-up: `blocks` found, of which `idle_blocks` sit in the free list and must be taken from it."""

    __slots__ = ("blocks", "idle_blocks", "parts")

    def __init__(self) -> None:
        self.blocks = 0
        self.idle_blocks = 0
        self.parts: list[tuple[Extent, int, int]] = []


NO_HIT = Hit()


class KVCache:
    """`total_blocks` usable blocks of `block_tokens` tokens.

    `prefix_block_tokens` is what one prefix id of the trace stands for; it must be a multiple of `block_tokens`, or
    divide it (then several ids make one block).
    """

    def __init__(
        self, total_blocks: int, block_tokens: int, *, prefix_caching: bool = True, prefix_block_tokens: int = 0
    ) -> None:
        if prefix_block_tokens and prefix_block_tokens % block_tokens and block_tokens % prefix_block_tokens:
            raise ValueError(
                f"block_size={block_tokens} and the trace's prefix blocks of {prefix_block_tokens} tokens do not divide"
                f" each other. Choose a block_size that divides {prefix_block_tokens}."
            )
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self.prefix_caching = prefix_caching
        self.free_blocks = total_blocks
        self.idle_blocks = 0  # free blocks that still hold content
        self.evicted_blocks = 0
        self._ids_per_block = max(1, block_tokens // prefix_block_tokens) if prefix_block_tokens else 1
        self._blocks_per_id = max(1, prefix_block_tokens // block_tokens) if prefix_block_tokens else 1
        self._root = Node()
        self._end = Extent(None, 0, 0)  # sentinel of the eviction list: .newer is the first to go, .older the last

    # ------------------------------------------------------------------------------------------------ counting blocks

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self, blocks: int) -> None:
        """Give out `blocks` free blocks; contents are lost, oldest first, once the empty ones are used up."""
        assert blocks <= self.free_blocks, "callers ask first"
        self.free_blocks -= blocks
        if self.free_blocks < self.idle_blocks:
            self._evict(self.idle_blocks - self.free_blocks)

    def _evict(self, blocks: int) -> None:
        self.idle_blocks -= blocks
        self.evicted_blocks += blocks
        while blocks:
            oldest = self._end.newer
            size = oldest.end - oldest.start
            if size > blocks:
                oldest.end -= blocks
                return
            blocks -= size
            self._unlink(oldest)
            if oldest.node is not None:
                oldest.node.extents.remove(oldest)

    # ------------------------------------------------------------------------------------------- finding and admitting

    def match(self, request: Request, tokens: int) -> Hit:
        """Leading blocks already cached, but for the one of the last token, which is always computed."""
        if not self.prefix_caching or (request.held is None and not request.prefix_ids):
            return NO_HIT
        held = request.held
        if held is None:
            held = request.held = self._identify(request)
        hit = Hit()
        limit = (tokens - 1) // self.block_tokens
        public = min(limit, held.public_blocks)
        per_node = self._blocks_per_id
        for index, node in enumerate(held.path):
            base = index * per_node
            if base >= public:
                break
            upto = min(per_node, public - base)
            if self._find(node, upto, hit) < upto:
                return hit
        if held.private is not None and limit > held.public_blocks:
            self._find(held.private, limit - held.public_blocks, hit)
        return hit

    def may_grow(self, request: Request, hit: Hit, storing: Iterable[Request]) -> bool:
        """Whether blocks that running requests are still to store could follow those of a hit."""
        if request.held is None:
            return False
        path, index = request.held.path, hit.blocks // self._blocks_per_id
        if index >= len(path):
            return False
        node = path[index]
        paths = (other.held.path for other in storing if other.held is not None)
        return any(index < len(other) and other[index] is node for other in paths)

    @staticmethod
    def _find(node: Node, upto: int, hit: Hit) -> int:
        """Collect the extents that cover the node's blocks [0, upto) from its start; returns how far they reach."""
        at = 0
        while at < upto:
            before = upto  # where an extent stored earlier takes over
            for extent in node.extents:
                if extent.start <= at < extent.end:
                    break
                if at < extent.start < before:
                    before = extent.start
            else:
                break
            until = min(extent.end, before)
            hit.parts.append((extent, at, until))
            hit.blocks += until - at
            if not extent.refs:
                hit.idle_blocks += until - at
            at = until
        return at

    def _identify(self, request: Request) -> Held:
        """The request's path in the trie of prefix ids."""
        blocks = request.identity_tokens // self.block_tokens
        group = self._ids_per_block
        ids = request.prefix_ids
        if group > 1:
            ids = tuple(ids[i : i + group] for i in range(0, len(ids) - group + 1, group))
        per_node = self._blocks_per_id
        blocks = min(blocks, len(ids) * per_node)
        path: list[Node] = []
        node = self._root
        for name in ids[: -(-blocks // per_node)]:
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = self._new_node(node)
            path.append(child)
            node = child
        return Held(path, blocks)

    def admit(self, request: Request, hit: Hit, tokens: int) -> None:
        """Give a request that holds nothing its hit and the blocks for its first `tokens` tokens, hit included."""
        if hit.blocks:
            self._hold(request.held, hit)
        self.take(self.blocks_for(tokens) - hit.blocks)

    def _hold(self, held: Held, hit: Hit) -> None:
        for extent, start, end in hit.parts:
            if start > extent.start:
                extent = self._split(extent, start)
            if end < extent.end:
                self._split(extent, end)
            if not extent.refs:
                self._unlink(extent)
                self.free_blocks -= end - start
                self.idle_blocks -= end - start
            extent.refs += 1
            held.pieces.append((extent, end - start))
        held.stored_blocks = held.found_blocks = hit.blocks

    def _split(self, extent: Extent, at: int) -> Extent:
        """Cut an extent in two; returns the part from `at` on. Both keep holders, place of storage and of eviction."""
        rest = self._new_extent(extent.node, at, extent.end)
        extent.end = at
        rest.refs = extent.refs
        node = extent.node
        assert node is not None, "nobody can look up content without a node"
        node.extents.insert(node.extents.index(extent) + 1, rest)
        if extent.refs:
            rest.tail, extent.tail = extent.tail, rest
        else:  # freed tail first, so the rest goes just before it
            rest.older, rest.newer = extent.older, extent
            extent.older.newer = rest
            extent.older = rest
        return rest

    def store(self, request: Request, tokens: int) -> None:
        """Register the full blocks of the first `tokens` tokens that others can share; vLLM does when it schedules."""
        held = request.held
        if held is None or not self.prefix_caching:
            return
        upto = min(tokens // self.block_tokens, held.public_blocks)
        per_node = self._blocks_per_id
        while held.stored_blocks < upto:
            index, start = divmod(held.stored_blocks, per_node)
            end = min(per_node, upto - index * per_node)
            self._store_piece(held, held.path[index], start, end)

    def _store_piece(self, held: Held, node: Node, start: int, end: int) -> None:
        held.stored_blocks += end - start
        if held.pieces:  # grow the extent it stored last, if nothing has happened to it since
            extent, blocks = held.pieces[-1]
            grows = extent.node is node and extent.end == start and extent.refs == 1 and extent.tail is None
            if grows and extent is node.extents[-1]:
                extent.end = end
                held.pieces[-1] = (extent, blocks + end - start)
                return
        extent = self._new_extent(node, start, end)
        extent.refs = 1
        node.extents.append(extent)
        held.pieces.append((extent, end - start))

    # ------------------------------------------------------------------------------------------------------- releasing

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        """Take back the `blocks` of a request; the full ones of its first `full_tokens` tokens keep their content.

        A request that `resumes` (preempted) will look for its own blocks again. Without `keep_content` the blocks that
        it stored itself, and that nobody else holds, are empty from now on.
        """
        if not self.prefix_caching:
            self.free_blocks += blocks
            return
        if not keep_content:
            full_tokens = self._forget_own(request)
        stored = full_tokens // self.block_tokens
        held: Held | None = request.held
        if held is None:
            if not resumes:
                self.free_blocks += blocks
                self._forget(stored, None)
                return
            held = request.held = Held([], 0)
        self.store(request, full_tokens)
        self.free_blocks += blocks - held.stored_blocks  # of the stored ones, those that nobody else holds, below
        own = stored - held.stored_blocks
        if own > 0 and resumes:
            if held.private is None:
                held.private = self._private_node(held)
            start, end = held.stored_blocks - held.public_blocks, stored - held.public_blocks
            extent = self._new_extent(held.private, start, end)
            held.private.extents.append(extent)
            self._link(extent)
        elif own > 0:
            self._forget(own, held)
        for extent, count in reversed(held.pieces):
            self._let_go(extent, count)
        held.pieces.clear()
        held.stored_blocks = held.found_blocks = 0
        if not resumes:
            request.held = None

    def _forget_own(self, request: Request) -> int:
        """Unregister what a request stored itself and nobody else holds; returns the tokens still registered."""
        held: Held | None = request.held
        if held is None:
            return 0
        while held.pieces and held.stored_blocks > held.found_blocks:
            extent, count = held.pieces[-1]
            if extent.refs > 1 or extent.tail is not None:
                break  # others have found it since
            own = min(count, held.stored_blocks - held.found_blocks)  # it may have grown an extent that it had found
            held.stored_blocks -= own
            if own < count:
                extent.end -= own
                held.pieces[-1] = (extent, count - own)
                break
            held.pieces.pop()
            assert extent.node is not None, "only content that can be found is stored"
            extent.node.extents.remove(extent)
        return held.stored_blocks * self.block_tokens

    def _let_go(self, extent: Extent, count: int) -> None:
        parts = [extent]
        left = count - (extent.end - extent.start)
        while left > 0:
            assert extent.tail is not None, "what was split off a held extent stays linked to it"
            extent = extent.tail
            parts.append(extent)
            left -= extent.end - extent.start
        for part in reversed(parts):
            part.refs -= 1
            if not part.refs:
                self.free_blocks += part.end - part.start
                self._link(part)

    def _forget(self, blocks: int, held: Held | None) -> None:
        """Put content that nobody can find again at the end of the eviction list."""
        if not blocks:
            return
        newest = self._end.older
        if newest.node is None and newest is not self._end:
            newest.end += blocks
            self.idle_blocks += blocks
        else:
            self._link(Extent(None, 0, blocks))

    # ---- what `llmsim.evicting` replaces: its nodes and extents know more, and it has no list

    def _new_node(self, parent: Node) -> Node:
        return Node()

    def _private_node(self, held: Held) -> Node:
        return Node()

    def _new_extent(self, node: Node | None, start: int, end: int) -> Extent:
        return Extent(node, start, end)

    def _link(self, extent: Extent) -> None:
        """Append to the eviction list."""
        end = self._end
        extent.older, extent.newer = end.older, end
        end.older.newer = extent
        end.older = extent
        self.idle_blocks += extent.end - extent.start

    def _unlink(self, extent: Extent) -> None:
        extent.older.newer = extent.newer
        extent.newer.older = extent.older
