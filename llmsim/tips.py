"""Asking an eviction policy which idle content goes: a heap of the keys it gave to tips, and when content dies.

`Tips` is the part of `llmsim.evicting.EvictingKVCache` that talks to the policy; it lives apart so that each file can
be read at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from llmsim.content import Content, Future, Stretch
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError

STALE_ENTRIES = 1024  # a heap is made anew when it has so many more than twice the idle extents


class Tips(KVCache, ABC):
    """A cache with the heap, empty until `follow` names the policy."""

    def follow(self, eviction: Any, clock: Callable[[], float]) -> None:
        self.eviction, self.clock = eviction, clock
        self._tips: list[tuple[Any, int, int, int, Content]] = []  # heap: key, turn, ticket, stay, extent
        self._dying: list[tuple[float, int, int, Content]] = []  # heap: when its time is up, ticket, stay, extent
        self._ticket = self._idle_extents = 0
        self._victim = getattr(eviction, "victim", None)
        self._lifetime_s = getattr(eviction, "lifetime_s", None)
        self._future: Future | None = None

    @abstractmethod
    def _lose(self, extent: Content, blocks: int) -> None:
        """Drop the last blocks of an idle extent."""

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
