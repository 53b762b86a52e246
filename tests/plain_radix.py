"""The radix cache in its plainest form: full paths of tokens in one dictionary, everything found by looking at all.

A node is known by the tokens from the root to its end. Shares nothing with `llmsim.radixcache`; the tests run both on
the same operations.
"""

from __future__ import annotations

from collections.abc import Hashable

Path = tuple[Hashable, ...]


class PlainRadix:
    def __init__(self, pages: int, page: int) -> None:
        self.pages, self.page = pages, page
        self.start: dict[Path, int] = {}
        self.used: dict[Path, int] = {}
        self.locked: dict[object, Path] = {}  # request -> the path that it keeps
        self.total: dict[object, int] = {}  # request -> pages that it has, those in the tree included
        self.now = 0
        self.evicted = 0

    # ---- what there is

    def locks(self, node: Path) -> int:
        return sum(path[: len(node)] == node for path in self.locked.values())

    def size(self, node: Path) -> int:
        return (len(node) - self.start[node]) // self.page

    @property
    def idle(self) -> int:
        return sum(self.size(node) for node in self.start if not self.locks(node))

    @property
    def empty(self) -> int:
        in_tree = sum(map(self.size, self.start))
        alone = sum(self.total[holder] - len(self.locked[holder]) // self.page for holder in self.total)
        return self.pages - in_tree - alone

    # ---- what happens

    def match(self, tokens: Path) -> Path:
        """The longest cached beginning of `tokens`, of whole pages; touches and splits as it goes."""
        self.now += 1
        tokens = tokens[: len(tokens) // self.page * self.page]
        best = 0
        for node in self.start:
            common = 0
            while common < min(len(node), len(tokens)) and (
                node[common : common + self.page] == tokens[common : common + self.page]
            ):
                common += self.page
            best = max(best, common)
        found = tokens[:best]
        for node in list(self.start):
            if node[: len(found)] == found and self.start[node] < best:  # the one it ends in
                self.used[node] = self.now
                if len(node) > best:
                    self.start[found], self.used[found] = self.start[node], self.now
                    self.start[node] = best
            elif found[: len(node)] == node:
                self.used[node] = self.now
        return found

    def admit(self, holder: object, found: Path, tokens: int) -> None:
        self.locked[holder] = found
        self.total[holder] = len(found) // self.page
        self.grow(holder, tokens)

    def grow(self, holder: object, tokens: int) -> None:
        pages = -(-tokens // self.page)
        missing = pages - self.total[holder] - self.empty
        while missing > 0:
            leaves = [
                node
                for node in self.start
                if not self.locks(node) and not any(len(o) > len(node) and o[: len(node)] == node for o in self.start)
            ]
            oldest = min(leaves, key=self.used.__getitem__)
            missing -= self.size(oldest)
            self.evicted += self.size(oldest)
            del self.start[oldest], self.used[oldest]
        self.total[holder] = pages

    def insert(self, holder: object, tokens: Path) -> None:
        tokens = tokens[: len(tokens) // self.page * self.page]
        if len(tokens) <= len(self.locked[holder]):
            return
        found = self.match(tokens)
        if len(found) < len(tokens):
            self.now += 1
            self.start[tokens], self.used[tokens] = len(found), self.now
        # its own copies of what was there already are free: total counts each page once
        self.locked[holder] = tokens

    def leave(self, holder: object, tokens: Path) -> None:
        self.insert(holder, tokens)
        del self.locked[holder], self.total[holder]
