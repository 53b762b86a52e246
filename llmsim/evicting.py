"""The KV cache under any eviction policy: `llmsim.kvcache` with a heap of keys in place of vLLM's list.

Everything but the order in which content is lost is inherited. A policy (`llmsim.eviction`) is asked for a key when an
extent becomes idle; only *tips* are in the heap, that is idle extents with no idle content behind them: in their own
stretch, or in any that continues it. So what stays cached can always be found, as in SGLang's tree of leaves. Whether
an extent is a tip changes with its neighbours: each node counts the children below which something is idle, so one
change costs the way up to the next ancestor that has others, and a heap entry that is no tip any more, or whose extent
was used since, is recognised when it comes up.

Content that nobody can find again (the answers of a trace that does not name them) is behind its request's sequence
like any other: an engine would not know either.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from llmsim.content import Content, Future, Stretch
from llmsim.kvcache import Extent, Held, Hit, KVCache, Node
from llmsim.plugins import PolicyError
from llmsim.request import Request

ALL = 1 << 60  # blocks of a stretch, however many there are
STALE_ENTRIES = 1024  # a heap is made anew when it has so many more than twice the idle extents


class EvictingKVCache(KVCache):
    """A KV cache that loses content in the order of `eviction`'s keys. `clock()` is the simulation's time, s."""

    def __init__(
        self,
        total_blocks: int,
        block_tokens: int,
        *,
        eviction: Any,
        prefix_caching: bool = True,
        prefix_block_tokens: int = 0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        super().__init__(
            total_blocks, block_tokens, prefix_caching=prefix_caching, prefix_block_tokens=prefix_block_tokens
        )
        self.eviction, self.clock = eviction, clock
        self._root = Stretch(None, 0)
        self._tips: list[tuple[Any, int, int, int, Content]] = []  # heap: key, turn, ticket, stay, extent
        self._dying: list[tuple[float, int, int, Content]] = []  # heap: when its time is up, ticket, stay, extent
        self._ticket = self._turn = 0
        self._idle_extents = 0
        self._victim = getattr(eviction, "victim", None)
        self._evicted = getattr(eviction, "evicted", None)
        self._lifetime_s = getattr(eviction, "lifetime_s", None)
        self._future: Future | None = None
        self._places: dict[int, int] = {}  # of requests, by their ids, in the order foreseen
        self._returning = -1  # the place of who is being preempted
        self._away: set[int] = set()  # who was, and is not back

    def foresee(self, requests: Iterable[Request]) -> None:
        """Tell a clairvoyant policy which requests will be admitted, in the order in which they are likely to come."""
        if not hasattr(self.eviction, "foresee"):
            return
        for place, request in enumerate(requests):
            self._places[request.id] = place
            self._expect(request, self._identify(request), (request.prompt_tokens - 1) // self.block_tokens)
        self._future = Future()
        self.eviction.foresee(self._future)

    def _expect(self, request: Request, held: Held, blocks: int) -> None:
        """A request is to look for its first `blocks` blocks."""
        for index, node in enumerate(held.path):
            reach = min(self._blocks_per_id, min(blocks, held.public_blocks) - index * self._blocks_per_id)
            if reach > 0:
                assert isinstance(node, Stretch)
                insort(node.uses, (self._places[request.id], reach))

    # -------------------------------------------------------------------------------------- what the cache calls

    def match(self, request: Request, tokens: int) -> Hit:
        if self._dying:
            self._expire()
        return super().match(request, tokens)

    def admit(self, request: Request, hit: Hit, tokens: int) -> None:
        if self._future is not None and request.held is not None:
            self._arrived(request)
        super().admit(request, hit, tokens)

    def _arrived(self, request: Request) -> None:
        """The future has become the present: what it leaves idle is needed later, or never again."""
        self._away.discard(request.id)
        private, place = request.held.private, self._places[request.id]
        for node in [*request.held.path, *([private] if private is not None else [])]:
            if any(use[0] == place for use in node.uses):
                node.uses = [use for use in node.uses if use[0] != place]
                for extent in node.idle:
                    self._rekey(extent)

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        if resumes and self._future is not None and self.prefix_caching:
            self._returning = self._places[request.id]
            if request.held is not None:
                tokens = max(full_tokens, request.prompt_tokens - 1)
                self._expect(request, request.held, tokens // self.block_tokens)
                if request.held.private is not None:
                    request.held.private.uses = [(self._returning, ALL)]
        super().release(request, blocks, full_tokens, resumes=resumes, keep_content=keep_content)
        if resumes and self._future is not None:
            self._away.add(request.id)

    def store(self, request: Request, tokens: int) -> None:
        if request.id in self._away:
            self._arrived(request)  # swapped in: nothing was looked up
        super().store(request, tokens)

    def _hold(self, held: Held, hit: Hit) -> None:
        super()._hold(held, hit)
        for extent, _ in held.pieces:
            assert isinstance(extent, Content)
            extent.hits += 1

    def _store_piece(self, held: Held, node: Node, start: int, end: int) -> None:
        last = held.pieces[-1][0] if held.pieces else None
        if last is None or not last.hits:  # type: ignore[attr-defined]
            super()._store_piece(held, node, start, end)
            return
        held.stored_blocks += end - start  # what was just computed has no part in the uses of what was found
        extent = self._new_extent(node, start, end)
        extent.refs = 1
        node.extents.append(extent)
        held.pieces.append((extent, end - start))

    def _evict(self, blocks: int) -> None:
        if self._dying:
            self._expire()
            blocks = min(blocks, self.idle_blocks - self.free_blocks)
        while blocks > 0:
            extent = self._next_victim()
            size = min(extent.end - max(extent.start, extent.node.floor), blocks)
            if self._future is not None:
                size = min(size, extent.end - self._future.cut(extent))
            self._lose(extent, size)
            blocks -= size

    def _lose(self, extent: Content, blocks: int) -> None:
        """Drop the last blocks of an idle extent."""
        self.idle_blocks -= blocks
        self.evicted_blocks += blocks
        node = extent.node
        if blocks < extent.end - extent.start:
            extent.end -= blocks
            if self._future is not None:
                self._rekey(extent)
            self._offer_tips(node)
        else:
            self._no_longer_idle(extent)
            node.extents.remove(extent)
        if self._evicted is not None:
            self._evicted(extent, blocks, self.clock())

    def _split(self, extent: Extent, at: int) -> Extent:
        rest = super()._split(extent, at)
        assert isinstance(extent, Content) and isinstance(rest, Content)
        rest.hits, rest.gap_s, rest.stored_s, rest.used_s = extent.hits, extent.gap_s, extent.stored_s, extent.used_s
        if not extent.refs:
            rest.key, rest.turn, rest.stay, rest.overdue = extent.key, extent.turn, 1, extent.overdue
            rest.node.idle.append(rest)
            self._idle_extents += 1
            if self._lifetime_s is not None:
                self._await_end(rest)
            self._offer_tips(rest.node)
        return rest

    def _link(self, extent: Extent) -> None:
        """An extent becomes idle."""
        assert isinstance(extent, Content)
        self.idle_blocks += extent.end - extent.start
        self._turn += 1
        extent.turn = self._turn
        extent.stay += 1
        extent.used_s = self.clock()
        extent.queued = extent.overdue = False
        node = extent.node
        awake, below, above = node.awake, node, node.parent
        node.idle.append(extent)
        self._idle_extents += 1
        while above is not None and not awake:
            awake = above.awake
            above.child_wakes(below)
            below, above = above, above.parent
        extent.key = self._key(extent)
        if self._lifetime_s is not None:
            self._await_end(extent)
        if node.is_tip(extent):
            self._offer(extent)

    def _unlink(self, extent: Extent) -> None:
        """A request takes an idle extent."""
        assert isinstance(extent, Content)
        extent.gap_s = self.clock() - extent.used_s
        self._no_longer_idle(extent)

    def _forget(self, blocks: int, held: Held | None) -> None:
        if blocks:
            node = self._own_stretch(held, held.stored_blocks if held is not None else 0)
            extent = self._new_extent(node, 0, blocks)
            node.extents.append(extent)
            self._link(extent)

    def _new_node(self, parent: Node) -> Node:
        assert isinstance(parent, Stretch)
        return Stretch(parent, 0 if parent is self._root else parent.depth + self._blocks_per_id)

    def _private_node(self, held: Held) -> Node:
        node = self._own_stretch(held, held.public_blocks)
        if self._future is not None:
            node.uses = [(self._returning, ALL)]
        return node

    def _own_stretch(self, held: Held | None, depth: int) -> Stretch:
        """A stretch of one request's own, behind the first `depth` blocks of its sequence."""
        parent: Node = self._root
        if held is not None and held.private is not None and depth > held.public_blocks:
            parent = held.private
        elif held is not None and depth:
            parent = held.path[(depth - 1) // self._blocks_per_id]
        assert isinstance(parent, Stretch)
        return Stretch(parent, depth, depth - parent.depth)

    def _new_extent(self, node: Node | None, start: int, end: int) -> Extent:
        assert isinstance(node, Stretch)
        return Content(node, start, end, self.block_tokens, self.clock())

    # ------------------------------------------------------------------------------------------------------- tips

    def _offer_tips(self, node: Stretch) -> None:
        """Put those of a node's idle extents into the heap that are tips and not there."""
        if node.idle and not node.idle_children:
            end = max(extent.end for extent in node.idle)
            if node.floor < end:
                for extent in node.idle:
                    if extent.end == end:
                        self._offer(extent)

    def _offer(self, extent: Content) -> None:
        if extent.overdue:
            heappush(self._dying, (-inf, self._next_ticket(), extent.stay, extent))
        if extent.queued:
            return
        extent.queued = True
        self._push((extent.key, extent.turn, self._next_ticket(), extent.stay, extent))
        if len(self._tips) > 2 * self._idle_extents + STALE_ENTRIES:
            self._tips = [entry for entry in self._tips if entry[3] == entry[4].stay and entry[4].queued]
            heapify(self._tips)

    def _push(self, entry: tuple[Any, int, int, int, Content]) -> None:
        try:
            heappush(self._tips, entry)
        except TypeError as error:
            raise self._error(f"gave the key {entry[0]!r}, which does not compare with its others ({error})") from None

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def _no_longer_idle(self, extent: Content) -> None:
        extent.stay += 1
        extent.queued = extent.overdue = False
        self._idle_extents -= 1
        node = extent.node
        node.idle.remove(extent)
        while node.parent is not None and not node.awake:
            node.parent.child_sleeps(node)
            node = node.parent
        self._offer_tips(node)

    # ------------------------------------------------------------------------------------------- asking the policy

    def _key(self, extent: Content) -> Any:
        key = self.eviction.key(extent, self.clock())
        if key is None or key != key:
            raise self._error(f"gave the key {key!r} to {_named(extent)}. Give a number or a tuple of numbers")
        return key

    def _rekey(self, extent: Content) -> None:
        extent.key = self._key(extent)
        extent.stay += 1
        extent.queued = False
        if self._lifetime_s is not None and not extent.overdue:
            self._await_end(extent)
        if extent.node.is_tip(extent):
            self._offer(extent)

    def _next_victim(self) -> Content:
        if self._victim is not None:
            return self._chosen(self._victim)
        tips = self._tips
        while True:
            _, _, _, stay, extent = tips[0]
            if stay == extent.stay:
                if extent.node.is_tip(extent):
                    return extent
                extent.queued = False
            heappop(tips)

    def _chosen(self, victim: Callable[[Sequence[Content], float], Any]) -> Content:
        """The policy's own choice among the tips."""
        entries = [entry for entry in self._tips if entry[3] == entry[4].stay and entry[4].node.is_tip(entry[4])]
        offered = [entry[4] for entry in sorted(entries)]
        extent = victim(tuple(offered), self.clock())
        if extent not in offered:
            raise self._error(f"chose the victim {extent!r}, which is none of the {len(offered)} extents it was given")
        chosen: Content = extent
        return chosen

    def _await_end(self, extent: Content) -> None:
        assert self._lifetime_s is not None
        lifetime_s = self._lifetime_s(extent)
        if not lifetime_s >= 0:
            raise self._error(f"gave {_named(extent)} a lifetime of {lifetime_s!r} s. Give 0 or more")
        heappush(self._dying, (extent.used_s + lifetime_s, self._next_ticket(), extent.stay, extent))

    def _expire(self) -> None:
        """Drop what has been idle for longer than its lifetime, and has nothing behind it that lives longer."""
        now_s, dying = self.clock(), self._dying
        while dying and dying[0][0] < now_s:
            _, _, stay, extent = heappop(dying)
            if stay != extent.stay:
                continue
            if extent.node.is_tip(extent):
                floor = extent.node.floor
                if floor > extent.start:  # content of its last blocks only is no longer needed by any behind it
                    heappush(dying, (-inf, self._next_ticket(), extent.stay, extent))
                self._lose(extent, extent.end - max(extent.start, floor))
            else:
                extent.overdue = True

    def _error(self, what: str) -> PolicyError:
        return PolicyError(f"{type(self.eviction).__name__} {what}.")


def _named(extent: Content) -> str:
    return f"the {extent.blocks} blocks from token {extent.first_token} on"
