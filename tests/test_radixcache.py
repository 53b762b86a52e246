"""SGLang's radix cache: its rules one at a time, and against full paths of tokens over random operations."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from plain_radix import PlainRadix

from llmsim.radixcache import Node, RadixCache
from llmsim.request import Request


def request_of(id_: int, prompt: int, ids: tuple[object, ...] = (), identity_tokens: int = 0) -> Request:
    return Request(id_, 0.0, prompt, 1, prefix_ids=ids, identity_tokens=identity_tokens or prompt)


def admitted(kv: RadixCache, request: Request, tokens: int) -> int:
    """Admit a request with its hit and as much more as makes `tokens` tokens; returns the tokens it found."""
    hit = kv.match(request, request.prompt_tokens)
    kv.admit(request, hit, tokens)
    return hit.blocks * kv.block_tokens


def served(kv: RadixCache, request: Request) -> int:
    """Prompt tokens that a request finds, which then runs alone and leaves."""
    found = admitted(kv, request, request.prompt_tokens)
    kv.release(request, kv.blocks_for(request.prompt_tokens), request.prompt_tokens)
    return found


def leaves(kv: RadixCache) -> list[tuple[int, int]]:
    """(start, end) of the leaves of the tree."""
    found, rest = [], list(kv.root.children.values())
    while rest:
        node = rest.pop()
        rest += node.children.values()
        if not node.children:
            found.append((node.start, node.end))
    return sorted(found)


# ---- rules, one at a time -------------------------------------------------------------------------------------------


def test_all_but_the_last_token_of_a_prompt_can_be_found() -> None:
    kv = RadixCache(1000, prefix_block_tokens=64)
    assert served(kv, request_of(0, 100, ("a", "b"))) == 0
    assert served(kv, request_of(1, 100, ("a", "b"))) == 99
    assert served(kv, request_of(2, 101, ("a", "b"))) == 100


def test_sharing_is_to_the_token_and_ends_where_names_part() -> None:
    kv = RadixCache(1000, prefix_block_tokens=64)
    served(kv, request_of(0, 100, ("a", "b")))
    assert served(kv, request_of(1, 90, ("a", "b"))) == 89
    assert served(kv, request_of(2, 128, ("a", "c"))) == 64
    assert served(kv, request_of(3, 128, ("c", "a"))) == 0


def test_pages_are_shared_whole() -> None:
    kv = RadixCache(100, 16, prefix_block_tokens=64)
    served(kv, request_of(0, 100, ("a", "b")))
    assert served(kv, request_of(1, 90, ("a", "b"))) == 80
    kv = RadixCache(100, 64, prefix_block_tokens=16)
    served(kv, request_of(0, 128, tuple("abcdefgh")))
    assert served(kv, request_of(1, 129, (*"abcdefgx", "y"))) == 64
    assert served(kv, request_of(2, 129, (*"xbcdefgh", "y"))) == 0


def test_what_is_not_named_is_found_by_nobody_else() -> None:
    kv = RadixCache(1000, prefix_block_tokens=64)
    served(kv, request_of(0, 100, ("a",), identity_tokens=64))
    assert served(kv, request_of(1, 100, ("a",), identity_tokens=64)) == 64
    served(kv, request_of(2, 100))
    assert served(kv, request_of(3, 100)) == 0


def test_a_chunk_is_shared_after_it_has_run_and_a_whole_prompt_when_its_results_are_taken() -> None:
    kv = RadixCache(1000, prefix_block_tokens=64)
    first, second = request_of(0, 128, ("a", "b")), request_of(1, 129, ("a", "b", "c"))
    admitted(kv, first, 64)
    kv.store(first, 64)
    assert kv.match(second, 129).blocks == 0  # vLLM would share it now
    kv.settle(asynchronous=True)
    assert kv.match(second, 129).blocks == 64
    kv.take(64)
    kv.store(first, 128)
    kv.settle(asynchronous=True)  # the last chunk is in flight
    assert kv.match(second, 129).blocks == 64
    kv.settle(asynchronous=True)
    assert kv.match(second, 129).blocks == 128
    third = request_of(2, 128, ("x", "y"))
    admitted(kv, third, 128)
    kv.store(third, 128)
    kv.settle(asynchronous=False)
    assert kv.match(request_of(3, 129, ("x", "y", "z")), 129).blocks == 128


def test_the_second_copy_of_a_prompt_is_free_once_it_has_run() -> None:
    kv = RadixCache(1000, prefix_block_tokens=100)
    both = [request_of(i, 300, ("a", "b", "c")) for i in range(2)]
    for request in both:
        admitted(kv, request, 300)
        kv.store(request, 300)
    assert kv.free_blocks == 400
    kv.settle(asynchronous=False)
    assert kv.free_blocks == 700
    assert kv.idle_blocks == 0
    kv.take(2)  # an answer's token each
    for request in both:
        kv.release(request, 301, 300)
    assert kv.free_blocks == 1000
    assert kv.idle_blocks == 300


def test_answers_are_shared_when_they_end() -> None:
    kv = RadixCache(1000, prefix_block_tokens=10)
    ids = tuple(range(20))
    first = request_of(0, 100, ids[:15], identity_tokens=150)
    admitted(kv, first, 100)
    kv.store(first, 100)
    kv.settle(asynchronous=False)
    kv.take(49)
    follower = request_of(1, 180, ids[:18])
    assert kv.match(follower, 180).blocks == 100
    kv.release(first, 149, 149)
    assert kv.match(follower, 180).blocks == 149


def test_a_locked_way_is_not_evicted_and_whole_leaves_are_least_recent_first() -> None:
    kv = RadixCache(400, prefix_block_tokens=100)
    for i, name in enumerate("abc"):
        served(kv, request_of(i, 100, (name,)))
    holder = request_of(3, 101, ("a", "x"))
    assert admitted(kv, holder, 101) == 100  # locks a, the one used least recently otherwise
    assert kv.free_blocks == 299
    kv.take(150)  # 99 are empty: b goes, all of it
    assert kv.evicted_blocks == 100
    assert kv.idle_blocks == 100
    assert kv.match(request_of(4, 101, ("b", "y")), 101).blocks == 0
    assert kv.match(request_of(5, 101, ("c", "y")), 101).blocks == 100


def test_looking_content_up_keeps_it() -> None:
    kv = RadixCache(300, prefix_block_tokens=100)
    for i, name in enumerate("abc"):
        served(kv, request_of(i, 100, (name,)))
    kv.match(request_of(3, 101, ("a", "x")), 101)
    kv.take(50)
    assert kv.match(request_of(4, 101, ("a", "x")), 101).blocks == 100
    assert kv.match(request_of(5, 101, ("b", "x")), 101).blocks == 0


def test_a_parent_becomes_a_leaf_when_its_last_child_is_evicted() -> None:
    kv = RadixCache(300, prefix_block_tokens=100)
    served(kv, request_of(0, 200, ("a", "b")))
    served(kv, request_of(1, 200, ("a", "c")))
    assert leaves(kv) == [(100, 200), (100, 200)]
    kv.take(100)
    assert leaves(kv) == [(100, 200)]
    kv.take(100)
    assert leaves(kv) == [(0, 100)]
    kv.take(100)
    assert leaves(kv) == []


def test_a_retracted_request_finds_its_prompt_but_not_what_it_had_generated() -> None:
    kv = RadixCache(1000)
    request = request_of(0, 100)
    admitted(kv, request, 100)
    kv.store(request, 100)
    kv.settle(asynchronous=False)
    kv.take(30)
    kv.release(request, 130, 130, resumes=True, keep_content=False)
    assert (kv.free_blocks, kv.idle_blocks) == (1000, 100)
    assert kv.match(request, 131).blocks == 100


def test_without_a_tree_nothing_is_found() -> None:
    kv = RadixCache(1000, prefix_caching=False, prefix_block_tokens=64)
    assert served(kv, request_of(0, 100, ("a", "b"))) == 0
    assert served(kv, request_of(1, 100, ("a", "b"))) == 0
    assert kv.free_blocks == 1000


# ---- random operations ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Both:
    """One request in both caches, with `tokens` tokens of its sequence computed."""

    request: Request
    sequence: tuple[object, ...]
    tokens: int = 0
    stored: tuple[int, bool] | None = None  # a chunk to be inserted: how far, whether it is in flight


class Pair:
    def __init__(self, pages: int, page: int, id_tokens: int) -> None:
        self.fast = RadixCache(pages, page, prefix_block_tokens=id_tokens)
        self.plain = PlainRadix(pages, page)
        self.id_tokens = id_tokens
        self.running: list[Both] = []
        self.known: list[Both] = []
        self.hits = 0

    def request(self, random: Random, id_: int, typical_tokens: int) -> Both:
        prompt = max(2, int(random.lognormvariate(0.0, 0.7) * typical_tokens))
        answer = random.randrange(1, typical_tokens)
        named = random.choice((prompt, prompt + answer, prompt // 2))
        ids = -(-named // self.id_tokens)
        family, common = random.randrange(3), random.choice((ids, random.randrange(ids + 1)))
        names = tuple(("family", family, i) if i < common else ("own", id_, i) for i in range(ids))
        request = Request(id_, 0.0, prompt, answer, prefix_ids=names, identity_tokens=named)
        sequence = tuple(
            (names[at // self.id_tokens], at) if at < named else (id_, at) for at in range(prompt + answer + 2)
        )
        return Both(request, sequence)

    def admit(self, both: Both, more_tokens: int) -> bool:
        prompt = both.request.prompt_tokens
        hit = self.fast.match(both.request, prompt)
        found = self.plain.match(both.sequence[: prompt - 1])
        assert hit.blocks * self.fast.block_tokens == len(found)
        self.check()
        tokens = min(prompt, len(found) + more_tokens)
        if self.fast.blocks_for(tokens) - hit.blocks + hit.idle_blocks > self.fast.free_blocks:
            return False
        self.hits += hit.blocks
        self.fast.admit(both.request, hit, tokens)
        self.plain.admit(both, found, tokens)
        self.running.append(both)
        self._computed(both, tokens)
        return True

    def _computed(self, both: Both, tokens: int) -> None:
        if both.tokens < both.request.prompt_tokens:  # by a chunk
            self.fast.store(both.request, tokens)
            both.stored = tokens, tokens == both.request.prompt_tokens
        both.tokens = tokens

    def grow(self, both: Both, more_tokens: int) -> None:
        prompt = both.request.prompt_tokens
        tokens = min(both.tokens + more_tokens, prompt if both.tokens < prompt else len(both.sequence) - 2)
        blocks = self.fast.blocks_for(tokens) - self.fast.blocks_for(both.tokens)
        if tokens > both.tokens and blocks <= self.fast.free_blocks:
            self.fast.take(blocks)
            self.plain.grow(both, tokens)
            self._computed(both, tokens)

    def settle(self, asynchronous: bool) -> None:
        for request, (tokens, _) in list(self.fast.pending.items()):
            both = next(both for both in self.running if both.request is request)
            assert both.stored is not None
            assert both.stored[0] == tokens
            if asynchronous and both.stored[1]:
                both.stored = tokens, False
            else:
                both.stored = None
                self.plain.insert(both, both.sequence[:tokens])
        self.fast.settle(asynchronous)

    def leave(self, both: Both, resumes: bool, keep: bool) -> None:
        self.running.remove(both)
        blocks = self.fast.blocks_for(both.tokens)
        self.fast.release(both.request, blocks, both.tokens, resumes=resumes, keep_content=keep)
        self.plain.leave(both, both.sequence[: both.tokens if keep else 0])
        both.tokens, both.stored = 0, None
        if resumes:
            self.known.append(both)

    def check(self) -> None:
        fast, plain = self.fast, self.plain
        assert fast.idle_blocks == plain.idle
        assert fast.free_blocks == plain.empty + plain.idle
        assert fast.evicted_blocks == plain.evicted
        nodes: list[Node] = []
        rest = list(fast.root.children.values())
        while rest:
            node = rest.pop()
            nodes.append(node)
            rest += node.children.values()
        spans = sorted((node.start, node.end, node.used, node.locks) for node in nodes)
        assert spans == sorted(
            (start, len(path), plain.used[path], plain.locks(path)) for path, start in plain.start.items()
        )


SHAPES = [  # tokens of a page, of a prefix id, pages, typical prompt
    pytest.param(1, 8, 150, 30, id="page 1"),
    pytest.param(1, 1, 100, 20, id="page 1, ids of 1"),
    pytest.param(4, 16, 40, 40, id="page 4, ids of 16"),
    pytest.param(16, 4, 14, 50, id="page 16, ids of 4"),
    pytest.param(4, 6, 50, 40, id="page 4, ids of 6"),
    pytest.param(1, 16, 2000, 30, id="room for all"),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("page", "id_tokens", "pages", "typical_tokens"), SHAPES)
def test_the_tree_agrees_with_full_paths_of_tokens(
    page: int, id_tokens: int, pages: int, typical_tokens: int, seed: int
) -> None:
    random = Random(seed)
    pair = Pair(pages, page, id_tokens)
    asynchronous = bool(seed % 2)
    for turn in range(250):
        pair.settle(asynchronous)
        pair.check()
        act = random.random()
        if act < 0.4 or not pair.running:
            if pair.known and random.random() < 0.4:
                both = pair.known.pop(random.randrange(len(pair.known)))
            else:
                both = pair.request(random, turn, typical_tokens)
            if not pair.admit(both, random.choice((1, 30, 10_000))):
                pair.known.append(both)
        elif act < 0.75:
            pair.grow(random.choice(pair.running), random.choice((1, 1, page, 20)))
        else:
            pair.leave(random.choice(pair.running), resumes=random.random() < 0.3, keep=random.random() < 0.7)
        pair.check()
    assert pair.hits > 0
    assert (pair.fast.evicted_blocks > 0) == (pages < 2000)
    while pair.running:
        pair.leave(pair.running[0], resumes=False, keep=True)
        pair.check()
    assert pair.fast.free_blocks == pages
