"""The plain twin of `llmsim.evicting`: numbered blocks in dicts, each with its own record, every rule by search.

Nothing is shared with llmsim: contents are tuples of names, a victim is found by looking at all idle blocks, the future
by reading the rest of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

Chain = tuple[object, ...]  # what is in a block: the names of all blocks up to it


@dataclass
class Block:
    content: Chain
    stored_s: float
    stored: int  # how many were stored before it
    references: int = 1
    hits: int = 0
    used_s: float = 0.0
    turn: int = 0  # how many became idle before it
    key: object = None


@dataclass
class Client:
    """One request: the content of its leading blocks, those that it may look for, and what it holds."""

    id: int
    chain: list[object]
    wanted: int
    tokens: int = 0
    held: list[Block] = field(default_factory=list)
    alone: int = 0  # blocks without shared content
    private: list[Chain] = field(default_factory=list)
    admitted: bool = False


class PlainCache:
    """`key(cache, block)` is the policy; `lifetime_s` drops what is idle for longer."""

    def __init__(self, blocks: int, key: Callable[[PlainCache, Block], object], lifetime_s: float = inf) -> None:
        self.total, self.key, self.lifetime_s = blocks, key, lifetime_s
        self.blocks: list[Block] = []  # with content, in the order in which they were stored
        self.now_s = 0.0
        self.age = 0.0
        self.turns = self.stores = 0
        self.future: list[Client] = []

    def idle(self) -> list[Block]:
        return [block for block in self.blocks if not block.references]

    def free(self, running: list[Client]) -> int:
        held = {id(block) for client in running for block in client.held}
        return self.total - len(held) - sum(client.alone for client in running)

    def next_use(self, content: Chain) -> float:
        for client in self.future:  # in order of the trace
            if not client.admitted:
                sequence = [tuple(client.chain[: i + 1]) for i in range(client.wanted)]
                if content in sequence or content in client.private:
                    return client.id
        return inf

    def expire(self) -> None:
        while True:
            dead = [b for b in self.tips() if b.used_s + self.lifetime_s < self.now_s]
            if not dead:
                return
            self.lose(dead[0])

    def tips(self) -> list[Block]:
        idle = self.idle()
        contents = {block.content for block in idle}
        longer = {content[:n] for content in contents for n in range(1, len(content))}
        return [block for block in idle if block.content not in longer]

    def lose(self, block: Block) -> None:
        self.blocks = [other for other in self.blocks if other is not block]

    def look_up(self, client: Client, limit: int) -> list[Block]:
        self.expire()
        found: list[Block] = []
        contents = [tuple(client.chain[: i + 1]) for i in range(len(client.chain))] + client.private
        for content in contents[:limit]:
            holders = [block for block in self.blocks if block.content == content]
            if not holders:
                break
            found.append(min(holders, key=lambda block: block.stored))
        return found

    def admit(self, client: Client, hits: list[Block]) -> None:
        client.admitted = True
        for block in hits:
            block.references += 1
            block.hits += 1
        client.held = list(hits)

    def make_room(self, running: list[Client]) -> None:
        """Lose content until no more blocks are in use than there are."""
        alone = sum(client.alone for client in running)
        while len(self.blocks) + alone > self.total:
            if self.lifetime_s < inf:
                self.expire()
                if len(self.blocks) + alone <= self.total:
                    return
            tips = self.tips()
            for tip in tips:
                tip.key = self.key(self, tip) if self.future else tip.key  # the future changes while it is idle
            victim = min(tips, key=lambda block: (block.key, block.turn))
            if isinstance(victim.key, float):
                self.age = max(self.age, victim.key)
            self.lose(victim)

    def store(self, client: Client, blocks: int) -> None:
        """The first `blocks` blocks of the client's sequence have content that others may find."""
        while len(client.held) < min(blocks, len(client.chain)):
            self.stores += 1
            block = Block(tuple(client.chain[: len(client.held) + 1]), self.now_s, self.stores)
            client.held.append(block)
            client.alone -= 1
            self.blocks.append(block)

    def release(self, client: Client, full_blocks: int, resumes: bool) -> None:
        self.store(client, full_blocks)
        own = full_blocks - len(client.held)
        start = len(client.held) - len(client.chain)
        client.admitted = not resumes
        if own > 0:  # content that only this request can find, and only if it comes back
            mark = ("own", client.id) if resumes else ("gone", client.id, self.turns)
            stem = tuple(client.chain)
            if not resumes:
                stem, start = client.held[-1].content if client.held else (), 0
            for i in range(start, start + own):
                self.stores += 1
                block = Block((*stem, *((*mark, j) for j in range(i + 1))), self.now_s, self.stores, 0)
                client.held.append(block)
                self.blocks.append(block)
            if resumes:
                client.private = [(*stem, *((*mark, j) for j in range(i + 1))) for i in range(start + own)]
        client.alone = 0
        for block in reversed(client.held):
            block.references -= block.references > 0
            if not block.references:
                self.turns += 1
                block.turn = self.turns
                block.used_s = self.now_s
                block.key = self.key(self, block)
        client.held = []
