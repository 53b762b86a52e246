"""Cached content as eviction policies see it: extents that know their history, in stretches that know their tips.

A *tip* is idle content with nothing idle behind it, in its own stretch or in any that continues it: what may be lost
without making other content impossible to find.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

from llmsim.kvcache import Extent, Node


class Content(Extent):
    """An extent as eviction policies see it: `llmsim.eviction` says what they may read."""

    __slots__ = (
        "block_tokens", "first_token", "gap_s", "hits", "key", "overdue", "queued", "stay", "stored_s", "turn",
        "used_s",
    )  # fmt: skip
    node: Stretch

    def __init__(self, node: Stretch, start: int, end: int, block_tokens: int, now_s: float) -> None:
        super().__init__(node, start, end)
        self.block_tokens = block_tokens
        self.first_token = (node.depth + start) * block_tokens
        self.hits = 0
        self.stored_s = self.used_s = now_s
        self.gap_s = nan
        self.key: Any = None
        self.turn = 0  # in which order extents became idle
        self.stay = 0  # how often it has been idle: entries of earlier stays are stale
        self.queued = False  # has an entry of this stay in the heap
        self.overdue = False  # its time is up, but not that of what lies behind it

    @property
    def blocks(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> int:
        return (self.end - self.start) * self.block_tokens


class Stretch(Node):
    """A node that knows where it is, what of it is idle, and where something idle goes on behind it.

    Children in the trie begin where it ends. A request's own content (`branch`) may begin in the middle.
    """

    __slots__ = ("branch", "branches", "depth", "idle", "idle_children", "parent", "uses")

    def __init__(self, parent: Stretch | None, depth: int, branch: int | None = None) -> None:
        super().__init__()
        self.parent = parent
        self.depth = depth  # blocks before it
        self.branch = branch  # of these, those in its parent, if not all of it
        self.idle: list[Content] = []
        self.idle_children = 0
        self.branches: list[int] = []  # where idle content of single requests begins
        self.uses: list[tuple[int, int]] = []  # future: (place of a request, blocks it looks for)

    @property
    def awake(self) -> bool:
        """Something of it, or behind it, is idle."""
        return bool(self.idle or self.idle_children or self.branches)

    def is_tip(self, extent: Content) -> bool:
        end = extent.end
        return not self.idle_children and self.floor < end and all(other.end <= end for other in self.idle)

    @property
    def floor(self) -> int:
        """Of its idle blocks those before this one have something idle behind them."""
        return max(self.branches, default=0)

    def child_wakes(self, child: Stretch) -> None:
        if child.branch is None:
            self.idle_children += 1
        else:
            self.branches.append(child.branch)

    def child_sleeps(self, child: Stretch) -> None:
        if child.branch is None:
            self.idle_children -= 1
        else:
            self.branches.remove(child.branch)


class Future:
    """The requests to come, by the stretches they will look for."""

    def next_use(self, extent: Content) -> float:
        """Place in the order foreseen of the next request that uses the extent's last block; inf if none does."""
        end = extent.end
        return next((request for request, reach in extent.node.uses if reach >= end), inf)

    def cut(self, extent: Content) -> int:
        """From which block on all of the extent is used again at the same time as its last block."""
        cut = extent.start
        for _, reach in extent.node.uses:
            if reach >= extent.end:
                break
            cut = max(cut, reach)
        return cut
