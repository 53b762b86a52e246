"""The KV cache's extents against numbered blocks with an LRU list, and its books after every operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
from plain_engine import Blocks, PlainRequest, Settings

from llmsim.kvcache import Extent, KVCache, Node
from llmsim.request import Request

# ---- the two caches side by side ------------------------------------------------------------------------------------


def keys_of(ids: tuple[object, ...], identity_tokens: int, id_tokens: int, block_tokens: int) -> tuple[object, ...]:
    """What is in each full engine block of the sequence: everything up to its end, named by the ids it reaches into."""
    keys = []
    for block in range(identity_tokens // block_tokens):
        end = (block + 1) * block_tokens
        reached = -(-end // id_tokens)
        if reached > len(ids):
            break
        keys.append((ids[:reached], end))
    return tuple(keys)


@dataclass
class Twin:
    """One request in both caches, holding blocks for `tokens` tokens."""

    request: Request
    plain: PlainRequest
    tokens: int = 0


class Pair:
    """An operation on both caches, and everything that must agree after it."""

    def __init__(self, blocks: int, block_tokens: int, id_tokens: int) -> None:
        self.fast = KVCache(blocks, block_tokens, prefix_block_tokens=id_tokens)
        self.plain = Blocks(Settings(num_gpu_blocks=blocks + 1, block_size=block_tokens))
        self.id_tokens = id_tokens
        self.running: list[Twin] = []
        self.known: list[Twin] = []  # all whose private content may still be looked for
        self.hits = 0

    def twin(self, id_: int, prompt: int, ids: tuple[object, ...], identity_tokens: int) -> Twin:
        request = Request(id_, 0.0, prompt, 1, prefix_ids=ids, identity_tokens=identity_tokens)
        keys = keys_of(ids, identity_tokens, self.id_tokens, self.fast.block_tokens)
        return Twin(request, PlainRequest(id_, 0.0, prompt, 1, block_keys=keys))

    def admit(self, twin: Twin, tokens_after_hit: int) -> bool:
        hit = self.fast.match(twin.request, twin.request.prompt_tokens)
        plain_hit = self.plain.hit_blocks(twin.plain)
        assert hit.blocks == len(plain_hit)
        assert hit.idle_blocks == sum(self.plain.references[block] == 0 for block in plain_hit)
        tokens = min(twin.request.prompt_tokens, hit.blocks * self.fast.block_tokens + tokens_after_hit)
        if self.plain.needed(twin.plain, tokens, plain_hit) > len(self.plain.free):
            return False
        self.hits += hit.blocks
        self.fast.admit(twin.request, hit, tokens)
        self.plain.take(twin.plain, tokens, plain_hit)
        self.running.append(twin)
        self._store(twin, tokens)
        return True

    def grow(self, twin: Twin, tokens: int) -> bool:
        blocks = self.fast.blocks_for(twin.tokens + tokens) - self.fast.blocks_for(twin.tokens)
        assert blocks == self.plain.needed(twin.plain, twin.tokens + tokens, ())
        if blocks > self.fast.free_blocks:
            return False
        self.fast.take(blocks)
        self.plain.take(twin.plain, twin.tokens + tokens, ())
        self._store(twin, twin.tokens + tokens)
        return True

    def _store(self, twin: Twin, tokens: int) -> None:
        twin.tokens = tokens
        self.fast.store(twin.request, tokens)
        self.plain.register(twin.plain, tokens)

    def release(self, twin: Twin, resumes: bool) -> None:
        self.running.remove(twin)
        self.fast.release(twin.request, self.fast.blocks_for(twin.tokens), twin.tokens, resumes=resumes)
        self.plain.release(twin.plain)
        twin.tokens = 0
        if resumes:
            self.known.append(twin)

    def check(self) -> None:
        fast, plain = self.fast, self.plain
        assert fast.free_blocks == len(plain.free)
        assert fast.idle_blocks == sum(block in plain.hash_of for block in plain.free)
        assert sum(references > 0 for references in plain.references) == fast.total_blocks - fast.free_blocks
        private = [twin.request.held.private for twin in self.running + self.known if twin.request.held is not None]
        check_books(fast, [twin.request for twin in self.running], [twin.tokens for twin in self.running], private)


def nodes_below(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children.values():
        yield from nodes_below(child)


def check_books(kv: KVCache, running: list[Request], tokens: list[int], private: list[Node | None]) -> None:
    """Every block is free, or held by a request alone, or part of an extent that somebody holds."""
    idle: list[Extent] = []
    extent = kv._end.newer
    while extent is not kv._end:
        assert extent.newer.older is extent
        assert extent.refs == 0
        assert extent.end > extent.start
        idle.append(extent)
        extent = extent.newer
    assert sum(e.end - e.start for e in idle) == kv.idle_blocks <= kv.free_blocks <= kv.total_blocks
    nodes = [*nodes_below(kv._root), *(node for node in private if node is not None)]
    found = [extent for node in nodes for extent in node.extents]
    assert all(extent.refs or extent in idle for extent in found)
    shared = sum(extent.end - extent.start for extent in found if extent.refs)
    alone = 0
    for request, held_tokens in zip(running, tokens, strict=True):
        alone += kv.blocks_for(held_tokens) - (request.held.stored_blocks if request.held is not None else 0)
    assert kv.free_blocks + shared + alone == kv.total_blocks


# ---- random operations ----------------------------------------------------------------------------------------------


def prompt_of(random: Random, id_: int, id_tokens: int, typical_tokens: int) -> tuple[int, tuple[object, ...]]:
    """A few families with common beginnings, exact repetitions, and prompts of no family."""
    tokens = max(1, int(random.lognormvariate(0.0, 0.7) * typical_tokens))
    ids = -(-tokens // id_tokens)
    family, common = random.randrange(4), random.randrange(ids + 1) if random.random() < 0.6 else ids
    return tokens, tuple(("family", family, i) if i < common else ("own", id_, i) for i in range(ids))


SHAPES = [  # engine block, tokens of a prefix id, blocks, typical prompt
    pytest.param(16, 16, 60, 150, id="ids of one block"),
    pytest.param(16, 512, 300, 1200, id="ids of 512, blocks of 16"),
    pytest.param(16, 64, 48, 150, id="ids of 64, blocks of 16, tight"),
    pytest.param(16, 1024, 70, 300, id="ids of 1024, blocks of 16, tight"),
    pytest.param(64, 16, 40, 500, id="blocks of 64, ids of 16"),
    pytest.param(4, 4, 4000, 60, id="room for all"),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block_tokens", "id_tokens", "blocks", "typical_tokens"), SHAPES)
def test_extents_agree_with_numbered_blocks(
    block_tokens: int, id_tokens: int, blocks: int, typical_tokens: int, seed: int
) -> None:
    random = Random(seed)
    pair = Pair(blocks, block_tokens, id_tokens)
    for turn in range(400):
        act = random.random()
        if act < 0.4 or not pair.running:
            if pair.known and random.random() < 0.4:  # a preempted one comes back
                twin = pair.known.pop(random.randrange(len(pair.known)))
            else:
                tokens, ids = prompt_of(random, turn, id_tokens, typical_tokens)
                identity = tokens if random.random() < 0.8 else tokens + random.randrange(2 * id_tokens)
                ids += tuple(("family", turn % 4, i) for i in range(len(ids), -(-identity // id_tokens)))
                twin = pair.twin(turn, tokens, ids, identity)
            if not pair.admit(twin, random.choice((1, 30, 10_000))) and twin.request.held is not None:
                pair.known.append(twin)  # keeps waiting
        elif act < 0.75:
            pair.grow(random.choice(pair.running), random.choice((1, 1, block_tokens, 100)))
        else:
            pair.release(random.choice(pair.running), resumes=random.random() < 0.3)
        pair.check()
    assert pair.hits > 0
    assert (pair.fast.evicted_blocks > 0) == (blocks < 4000)
    while pair.running:
        pair.release(pair.running[0], resumes=False)
        pair.check()
    assert pair.fast.free_blocks == blocks


# ---- rules, one at a time -------------------------------------------------------------------------------------------


def served(kv: KVCache, id_: int, prompt: int, ids: tuple[object, ...] = (), identity_tokens: int = 0) -> int:
    """Prompt tokens that a request finds, which then runs alone and leaves."""
    request = Request(id_, 0.0, prompt, 1, prefix_ids=ids, identity_tokens=identity_tokens or prompt)
    hit = kv.match(request, prompt)
    kv.admit(request, hit, prompt)
    kv.store(request, prompt)
    kv.release(request, kv.blocks_for(prompt), prompt)
    assert kv.free_blocks == kv.total_blocks
    return hit.blocks * kv.block_tokens


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    kv = KVCache(100, 16, prefix_block_tokens=16)
    assert served(kv, 0, 64, ("a", "b", "c", "d")) == 0
    assert served(kv, 1, 64, ("a", "b", "c", "d")) == 48
    assert served(kv, 2, 65, ("a", "b", "c", "d", "e")) == 64


def test_equal_ids_behind_different_prefixes_are_different_content() -> None:
    kv = KVCache(100, 16, prefix_block_tokens=16)
    served(kv, 0, 48, ("a", "x", "y"))
    assert served(kv, 1, 48, ("b", "x", "y")) == 0
    assert served(kv, 2, 49, ("a", "x", "z", "w")) == 32


def test_a_part_of_a_coarse_id_is_found_in_whole_engine_blocks() -> None:
    kv = KVCache(1000, 16, prefix_block_tokens=512)
    served(kv, 0, 600, ("a", "b"))  # 37 full blocks: 32 of a, 5 of b
    assert served(kv, 1, 600, ("a", "b")) == 37 * 16
    assert served(kv, 2, 1024, ("a", "b")) == 37 * 16
    assert served(kv, 3, 1024, ("a", "b")) == 63 * 16


def test_several_ids_make_one_larger_engine_block() -> None:
    kv = KVCache(100, 64, prefix_block_tokens=16)
    served(kv, 0, 200, tuple(range(13)))
    assert served(kv, 1, 200, (*range(7), "other", *range(8, 13))) == 64  # the eighth id differs: its whole block does


def test_the_tail_of_the_oldest_content_is_evicted_first() -> None:
    kv = KVCache(10, 16, prefix_block_tokens=16)
    served(kv, 0, 64, ("a0", "a1", "a2", "a3"))
    served(kv, 1, 64, ("b0", "b1", "b2", "b3"))
    assert kv.idle_blocks == 8
    kv.take(4)  # two empty blocks, then a3 and a2
    assert (kv.free_blocks, kv.idle_blocks, kv.evicted_blocks) == (6, 6, 2)
    old = Request(2, 0.0, 80, 1, prefix_ids=("a0", "a1", "a2", "a3", "a4"), identity_tokens=80)
    new = Request(3, 0.0, 80, 1, prefix_ids=("b0", "b1", "b2", "b3", "b4"), identity_tokens=80)
    assert kv.match(old, 80).blocks == 2
    assert kv.match(new, 80).blocks == 4


def test_content_that_was_split_while_held_still_loses_its_tail_first() -> None:
    kv = KVCache(10, 16, prefix_block_tokens=1024)
    whole = Request(0, 0.0, 128, 1, prefix_ids=("a",), identity_tokens=128)
    part = Request(1, 0.0, 65, 1, prefix_ids=("a",), identity_tokens=65)
    kv.admit(whole, kv.match(whole, 128), 128)
    kv.store(whole, 128)
    hit = kv.match(part, 65)
    kv.admit(part, hit, 65)  # holds the first four of the eight blocks, and one of its own
    assert (hit.blocks, kv.free_blocks) == (4, 1)
    kv.release(part, 5, 65)
    kv.release(whole, 8, 128)
    assert (kv.free_blocks, kv.idle_blocks) == (10, 8)
    kv.take(5)  # two empty ones, and the last three of the eight
    again = Request(2, 0.0, 128, 1, prefix_ids=("a",), identity_tokens=128)
    assert kv.match(again, 128).blocks == 5


def test_a_preempted_request_finds_its_own_blocks_and_nobody_else_does() -> None:
    kv = KVCache(100, 16)
    mine, other = Request(0, 0.0, 100, 50), Request(1, 0.0, 100, 50)
    kv.admit(mine, kv.match(mine, 100), 100)
    kv.take(1)
    kv.release(mine, 8, 120, resumes=True)
    assert kv.match(mine, 120).blocks == 7
    assert kv.match(other, 120).blocks == 0


def test_without_prefix_caching_nothing_is_found() -> None:
    kv = KVCache(100, 16, prefix_caching=False, prefix_block_tokens=16)
    served(kv, 0, 64, ("a", "b", "c", "d"))
    assert served(kv, 1, 64, ("a", "b", "c", "d")) == 0
    assert kv.idle_blocks == 0


@pytest.mark.parametrize(("block_tokens", "id_tokens"), [(16, 24), (48, 64)])
def test_blocks_that_do_not_divide_each_other_are_refused(block_tokens: int, id_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"block_size={block_tokens} .* prefix blocks of {id_tokens} tokens") as error:
        KVCache(10, block_tokens, prefix_block_tokens=id_tokens)
    assert "\n" not in str(error.value)


# ---- what a cache of unlimited size finds ---------------------------------------------------------------------------


@pytest.mark.parametrize("block_tokens", [16, 128, 512])
def test_unlimited_cache_finds_what_an_independent_count_finds(block_tokens: int) -> None:
    """Chains of ids of 512 tokens as in a conversation trace: turns that continue, shared documents, new prompts."""
    random = Random(5)
    kv = KVCache(10**7, block_tokens, prefix_block_tokens=512)
    chains: list[tuple[list[int], int]] = []
    seen: dict[tuple[int, ...], int] = {}  # chain of ids -> the longest part of its last id that was computed
    fresh = found = expected = 0
    for number in range(600):
        parent, parent_tokens = random.choice(chains) if chains and random.random() < 0.7 else ([], 0)
        kept = random.randrange(len(parent) + 1)
        tokens = max(1, kept * 512 + random.randrange(1, 3000))
        ids = parent[:kept]
        while len(ids) * 512 < tokens:
            ids.append(fresh)
            fresh += 1
        if number % 7 == 0 and parent:  # an exact repetition
            ids, tokens = parent, parent_tokens
        chains.append((ids, tokens))
        found += served(kv, number, tokens, tuple(ids))
        reach = 0
        for i in range(len(ids)):
            known = seen.get(tuple(ids[: i + 1]), 0)
            reach += known
            if known < 512:
                break
        expected += min(reach // block_tokens, (tokens - 1) // block_tokens) * block_tokens
        for i in range(len(ids)):
            here = min(512, tokens - 512 * i)
            seen[tuple(ids[: i + 1])] = max(seen.get(tuple(ids[: i + 1]), 0), here)
    assert found == expected
    assert found > 100_000
