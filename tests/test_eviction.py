"""Eviction policies: extents and heap against numbered blocks and search; each policy's rule by hand; the bound."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import inf
from random import Random

import pytest
from plain_eviction import Client, PlainCache

from llmsim.evicting import EvictingKVCache
from llmsim.eviction import BUILTIN, load_eviction
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError
from llmsim.request import Request

BLOCK = 16
ATTENTION_TOKENS = 100.0


def gdsf(worth):
    return lambda cache, block: cache.age + (block.hits + 1) * worth(len(block.content) * BLOCK)


PLAIN_KEYS = {
    "lru": lambda cache, block: block.used_s,
    "lfu": lambda cache, block: (block.hits, block.used_s),
    "fifo": lambda cache, block: block.stored_s,
    "size": gdsf(lambda end: 1.0 / end),
    "cost": gdsf(lambda end: 1.0 + (end - BLOCK / 2) / ATTENTION_TOKENS),
    "length": lambda cache, block: (block.hits, -(len(block.content) - 1) * BLOCK),
    "ttl": lambda cache, block: block.used_s + 30.0,
    "belady": lambda cache, block: -cache.next_use(block.content),
}
ARGUMENTS = {"cost": {"attention_tokens": ATTENTION_TOKENS}, "ttl": {"ttl_s": 30.0}}
WHATEVER_THE_EXTENT = ("lru", "lfu", "ttl", "belady")  # keys that all blocks of an extent share


def test_every_built_in_policy_has_a_plain_twin():
    assert set(PLAIN_KEYS) == set(BUILTIN)


# ---- random operations on both -------------------------------------------------------------------------------------


class Pair:
    """The cache under test and its plain twin, with the requests that run in both."""

    def __init__(self, policy: str, blocks: int, id_tokens: int, requests: list[Request]) -> None:
        self.now_s = 0.0
        eviction = load_eviction(policy, ARGUMENTS.get(policy))
        self.fast = EvictingKVCache(
            blocks, BLOCK, eviction=eviction, prefix_block_tokens=id_tokens, clock=lambda: self.now_s
        )
        self.plain = PlainCache(blocks, PLAIN_KEYS[policy], 30.0 if policy == "ttl" else inf)
        self.fast.foresee(requests)
        self.clients = {request.id: client_of(request, id_tokens) for request in requests}
        if policy == "belady":
            self.plain.future = list(self.clients.values())
        self.running: list[Request] = []
        self.hits = 0

    def tick(self, seconds: float) -> None:
        self.now_s = self.plain.now_s = self.now_s + seconds

    def admit(self, request: Request, tokens_after_hit: int) -> bool:
        client = self.clients[request.id]
        known = max(request.prompt_tokens, client.tokens + 1)
        hit = self.fast.match(request, known)
        found = self.plain.look_up(client, (known - 1) // BLOCK)
        assert hit.blocks == len(found)
        assert hit.idle_blocks == sum(not block.references for block in found)
        tokens = min(known, hit.blocks * BLOCK + tokens_after_hit)
        blocks = -(-tokens // BLOCK)
        if blocks - hit.blocks + hit.idle_blocks > self.fast.free_blocks:
            return False
        self.hits += hit.blocks
        self.fast.admit(request, hit, tokens)
        self.running.append(request)
        self.plain.admit(client, found)
        client.alone = blocks - hit.blocks
        self.plain.make_room(self.here())
        self.store(request, tokens)
        return True

    def here(self) -> list[Client]:
        return [self.clients[request.id] for request in self.running]

    def store(self, request: Request, tokens: int) -> None:
        client = self.clients[request.id]
        client.tokens = tokens
        self.fast.store(request, tokens)
        if client.chain:
            self.plain.store(client, tokens // BLOCK)

    def grow(self, request: Request, tokens: int) -> None:
        client = self.clients[request.id]
        after = client.tokens + tokens
        blocks = -(-after // BLOCK) - -(-client.tokens // BLOCK)
        if blocks <= self.fast.free_blocks:
            self.fast.take(blocks)
            client.alone += blocks
            self.plain.make_room(self.here())
            self.store(request, after)

    def release(self, request: Request, resumes: bool) -> None:
        client = self.clients[request.id]
        self.running.remove(request)
        tokens = client.tokens
        client.wanted = min(max(tokens, request.prompt_tokens - 1) // BLOCK, len(client.chain))
        self.fast.release(request, -(-tokens // BLOCK), tokens, resumes=resumes)
        self.plain.release(client, tokens // BLOCK, resumes)

    def check(self) -> None:
        assert self.fast.free_blocks == self.plain.free(self.here())
        assert self.fast.idle_blocks == len(self.plain.idle())
        assert contents(self.fast) == Counter(len(block.content) for block in self.plain.idle())
        offered = {id(entry[4]) for entry in self.fast._tips if entry[3] == entry[4].stay}
        for extent in idle_extents(self.fast):
            assert not extent.node.is_tip(extent) or id(extent) in offered, "a tip is in the heap"


def idle_extents(kv: EvictingKVCache) -> list:
    entries = {}
    stack = [entry[4].node for entry in kv._tips]
    seen = set()
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            entries.update({id(extent): extent for extent in node.idle})
            stack += [node.parent] if node.parent is not None else []
    return list(entries.values())


def contents(kv: EvictingKVCache) -> Counter:
    """Idle blocks by their place in the sequence."""
    found = Counter()
    for extent in idle_extents(kv):
        found.update(range(extent.first_token // BLOCK + 1, extent.first_token // BLOCK + 1 + extent.blocks))
    return found


def client_of(request: Request, id_tokens: int) -> Client:
    chain = []
    for block in range(request.identity_tokens // BLOCK):
        reached = -(-(block + 1) * BLOCK // id_tokens)
        if reached > len(request.prefix_ids):
            break
        chain.append((request.prefix_ids[reached - 1], block))
    return Client(request.id, chain, min((request.prompt_tokens - 1) // BLOCK, len(chain)))


def made_requests(random: Random, count: int, id_tokens: int, all_named: bool) -> list[Request]:
    """Families with common beginnings, repetitions, some of no family, some without any names."""
    requests = []
    for i in range(count):
        tokens = random.randrange(1, 200)
        ids = -(-tokens // id_tokens)
        common = random.randrange(ids + 1)
        family = random.randrange(3)
        names = tuple(("family", family, j) if j < common else ("own", i, j) for j in range(ids))
        named = random.random() < 0.9 or all_named
        requests.append(
            Request(i, 0.0, tokens, 100, prefix_ids=names if named else (), identity_tokens=tokens if named else 0)
        )
    return requests


def operate(policy: str, id_tokens: int, seed: int, blocks: int = 40) -> Pair:
    """Where keys depend on the size of extents, nobody computes more than named blocks: each is an extent then."""
    random = Random(seed)
    all_named = policy not in WHATEVER_THE_EXTENT
    requests = made_requests(random, 150, id_tokens, all_named)
    pair = Pair(policy, blocks, id_tokens, requests)
    queue, preempted = list(requests), []
    for _ in range(700):
        pair.tick(random.choice((0.0, 0.5, 3.0)))
        act = random.random()
        if act < 0.45 and (queue or preempted):
            source = preempted if preempted and random.random() < 0.5 else queue or preempted
            at = random.randrange(min(3, len(source)))
            if pair.admit(source[at], random.choice((1, 30, 10_000))):
                source.pop(at)
        elif act < 0.7 and pair.running:
            request, tokens = random.choice(pair.running), random.choice((1, 1, 17, 60))
            if all_named:
                tokens = min(tokens, request.prompt_tokens - pair.clients[request.id].tokens)
            pair.grow(request, tokens)
        elif pair.running:
            request, resumes = random.choice(pair.running), random.random() < 0.25
            pair.release(request, resumes)
            if resumes:
                preempted.append(request)
        pair.check()
    while pair.running:
        pair.release(pair.running[0], resumes=False)
        pair.check()
    assert pair.fast.free_blocks == blocks
    return pair


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", BUILTIN)
def test_a_policy_loses_what_a_search_of_all_blocks_says(policy: str, seed: int) -> None:
    pair = operate(policy, BLOCK, seed)
    assert pair.hits > 20
    assert pair.fast.evicted_blocks > 100


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", WHATEVER_THE_EXTENT)
def test_extents_of_several_blocks_agree_too(policy: str, seed: int) -> None:
    assert operate(policy, 64, seed).fast.evicted_blocks > 100


# ---- rules, one at a time ------------------------------------------------------------------------------------------


class Shelf:
    """Requests that run one at a time, each sequence a word, each letter a block."""

    def __init__(self, blocks: int, eviction: object, future: tuple[str, ...] = ()) -> None:
        self.now_s = 0.0
        self.kv = EvictingKVCache(blocks, 1, eviction=eviction, prefix_block_tokens=1, clock=lambda: self.now_s)
        self.served = 0
        if future:
            self.kv.foresee([self._request(i, word) for i, word in enumerate(future)])

    @staticmethod
    def _request(i: int, word: str) -> Request:
        return Request(i, 0.0, len(word) + 1, 1, prefix_ids=tuple(word), identity_tokens=len(word))

    def serve(self, *words: str) -> int:
        """Blocks found, of all words together; each takes a second."""
        found = 0
        for word in words:
            request = self._request(self.served, word)
            hit = self.kv.match(request, len(word) + 1)
            self.kv.admit(request, hit, len(word))
            self.kv.store(request, len(word))
            self.kv.release(request, len(word), len(word))
            found += hit.blocks
            self.served += 1
            self.now_s += 1.0
        return found

    def holds(self, word: str) -> int:
        return self.kv.match(self._request(-1, word), len(word) + 1).blocks


def test_lru_loses_what_was_used_longest_ago() -> None:
    shelf = Shelf(4, load_eviction("lru"))
    shelf.serve("ab", "cd", "ab", "x")
    assert (shelf.holds("ab"), shelf.holds("cd"), shelf.holds("x")) == (2, 1, 1)


def test_lfu_keeps_what_was_found_often_however_long_ago() -> None:
    shelf = Shelf(4, load_eviction("lfu"))
    shelf.serve("ab", "ab", "ab", "c", "c", "d", "e", "f")
    assert (shelf.holds("ab"), shelf.holds("c"), shelf.holds("d"), shelf.holds("e"), shelf.holds("f")) == (
        2,
        1,
        0,
        0,
        1,
    )


def test_fifo_does_not_care_about_use() -> None:
    shelf = Shelf(3, load_eviction("fifo"))
    shelf.serve("a", "b", "c", "a", "a", "x")
    assert (shelf.holds("a"), shelf.holds("b"), shelf.holds("c")) == (0, 1, 1)


def test_size_loses_the_ends_of_long_sequences_first() -> None:
    shelf = Shelf(6, load_eviction("size"))
    shelf.serve("a", "bcdef", "xy")
    assert (shelf.holds("a"), shelf.holds("bcdef"), shelf.holds("xy")) == (1, 3, 2)


def test_cost_keeps_what_is_dear_to_compute_again() -> None:
    """Of unused content the beginnings are cheapest: the short prompts go, the long one stays whole."""
    shelf = Shelf(6, load_eviction("cost", {"attention_tokens": 1.0}))
    shelf.serve("bcde", "a", "f", "x")
    assert (shelf.holds("bcde"), shelf.holds("a"), shelf.holds("f")) == (4, 0, 1)


def test_greedy_dual_ages_what_was_used_in_the_past() -> None:
    """Used three times, then never again: with the key lost last as a floor it goes in the end, under LFU never."""
    for policy, stays in (("cost", 0), ("lfu", 1)):
        shelf = Shelf(2, load_eviction(policy))
        shelf.serve("a", "a", "a", *"bcdefgh")
        assert shelf.holds("a") == stays


def test_length_aware_loses_late_blocks_among_equally_used_ones() -> None:
    shelf = Shelf(5, load_eviction("length"))
    shelf.serve("abc", "abc", "de", "x")
    assert (shelf.holds("abc"), shelf.holds("de"), shelf.holds("x")) == (3, 1, 1)


def test_content_dies_when_its_time_is_up_though_there_is_room() -> None:
    shelf = Shelf(100, load_eviction("ttl", {"ttl_s": 10.0}))
    shelf.serve("ab")
    shelf.now_s = 10.0
    assert shelf.serve("ab") == 2  # which is a use
    shelf.now_s = 20.0
    assert shelf.holds("ab") == 2
    shelf.now_s = 20.1
    assert shelf.holds("ab") == 0
    assert shelf.kv.idle_blocks == 0


def test_a_session_lives_as_long_as_its_pace_asks_for() -> None:
    """Found after 9 s: kept for twice that; one that never came back is not."""
    shelf = Shelf(100, load_eviction("ttl", {"ttl_s": 10.0, "per_session": 2.0}))
    shelf.serve("ab")
    shelf.now_s = 9.0
    shelf.serve("ab", "cd")
    shelf.now_s = 25.0
    assert (shelf.holds("ab"), shelf.holds("cd")) == (2, 0)
    shelf.now_s = 28.0
    assert shelf.holds("ab") == 0


def test_belady_loses_what_is_needed_last() -> None:
    words = ("a", "b", "c", "x", "b", "c", "a")
    shelf = Shelf(3, load_eviction("belady"), words)
    assert shelf.serve(*words[:4]) == 0
    assert [shelf.holds(word) for word in "abcx"] == [0, 1, 1, 1]
    assert shelf.serve(*words[4:]) == 2


@pytest.mark.parametrize("seed", range(150))
def test_no_choice_of_victims_finds_more_than_beladys(seed: int) -> None:
    """Every sequence of choices, on small caches: the most blocks that can be found."""
    random = Random(seed)
    stems = ["", "a", "ab", "c"]
    words = tuple(
        random.choice(stems) + "".join(random.choice("pqr") for _ in range(random.randrange(1, 3))) for _ in range(9)
    )
    blocks = random.choice((4, 5))
    best = {(): 0}  # cached contents, as a sorted tuple of prefixes -> the most found so far
    for word in words:
        following: dict[tuple[str, ...], int] = {}
        for cached, found in best.items():
            hits = next((n for n in range(len(word)) if word[: n + 1] not in cached), len(word))
            mine = {word[: n + 1] for n in range(len(word))}
            others = [prefix for prefix in cached if prefix not in mine]
            for kept in combinations(others, min(len(others), blocks - len(mine))):
                state = tuple(sorted([*mine, *kept]))
                following[state] = max(following.get(state, 0), found + hits)
        best = following
    assert Shelf(blocks, load_eviction("belady"), words).serve(*words) == max(best.values())
    assert all(Shelf(blocks, load_eviction(name)).serve(*words) <= max(best.values()) for name in BUILTIN)


@pytest.mark.parametrize("seed", range(5))
def test_lru_as_a_policy_is_vllms_order(seed: int) -> None:
    """One after another, and no last block that is computed again though it is cached: nothing is there twice."""
    random = Random(seed)
    requests = [r for r in made_requests(random, 500, BLOCK, True) if r.prompt_tokens % BLOCK]
    now_s = 0.0
    seam = EvictingKVCache(40, BLOCK, eviction=load_eviction("lru"), prefix_block_tokens=BLOCK, clock=lambda: now_s)
    found = []
    for kv in (KVCache(40, BLOCK, prefix_block_tokens=BLOCK), seam):
        hits = []
        for request in requests:
            now_s += 1.0
            hit = kv.match(request, request.prompt_tokens)
            kv.admit(request, hit, request.prompt_tokens)
            kv.store(request, request.prompt_tokens)
            kv.release(request, kv.blocks_for(request.prompt_tokens), request.prompt_tokens)
            hits.append(hit.blocks)
        found.append((hits, kv.evicted_blocks))
    assert found[0] == found[1]
    assert found[0][1] > 100


# ---- a policy of one's own -----------------------------------------------------------------------------------------


class NewestFirst:
    def key(self, extent, now_s):
        return -extent.used_s


class Chooser(NewestFirst):
    """Loses the extent with the fewest tokens, whatever the keys say, and notes what it is asked."""

    def __init__(self):
        self.offers, self.lost = [], []

    def victim(self, extents, now_s):
        self.offers.append([extent.first_token for extent in extents])
        return min(extents, key=lambda extent: extent.tokens)

    def evicted(self, extent, blocks, now_s):
        self.lost.append((extent.first_token, blocks, now_s))


def test_a_policy_of_ones_own() -> None:
    shelf = Shelf(4, NewestFirst())
    shelf.serve("a", "b", "c", "d", "x", "y")
    assert [shelf.holds(word) for word in "abcdxy"] == [1, 1, 1, 0, 0, 1]


def test_a_policy_that_chooses_is_offered_tips_in_order_of_their_keys() -> None:
    policy = Chooser()
    shelf = Shelf(5, policy)
    shelf.serve("ab", "acd", "xy")
    assert policy.offers[0] == [2, 1]  # d, used last, before b; not c or a, which have something behind them
    assert policy.lost == [(2, 1, 2.0)]
    assert (shelf.holds("ab"), shelf.holds("acd"), shelf.holds("xy")) == (2, 2, 2)


@pytest.mark.parametrize("answer", [float("nan"), None])
def test_a_key_that_is_no_key_is_refused(answer) -> None:
    class Broken:
        def key(self, extent, now_s):
            return answer

    with pytest.raises(PolicyError, match=r"Broken gave the key (nan|None) to the 1 blocks from token 1 on"):
        Shelf(4, Broken()).serve("ab")


def test_keys_that_do_not_compare_are_refused() -> None:
    class Mixed:
        def key(self, extent, now_s):
            return 1.0 if now_s else "one"

    with pytest.raises(PolicyError, match=r"Mixed gave the key 1\.0, which does not compare with its others"):
        Shelf(4, Mixed()).serve("a", "b")


def test_a_victim_that_was_not_offered_is_refused() -> None:
    class Greedy(NewestFirst):
        def victim(self, extents, now_s):
            return None

    with pytest.raises(PolicyError, match="Greedy chose the victim None, which is none of the 2 extents"):
        Shelf(2, Greedy()).serve("a", "b", "c")


def test_a_lifetime_that_is_none_is_refused() -> None:
    class Undead(NewestFirst):
        def lifetime_s(self, extent):
            return -1

    with pytest.raises(PolicyError, match=r"Undead gave the 1 blocks from token 0 on a lifetime of -1 s"):
        Shelf(4, Undead()).serve("a")


def test_stale_entries_do_not_pile_up() -> None:
    shelf = Shelf(100, load_eviction("lru"))
    shelf.serve(*["ab"] * 3000)
    assert len(shelf.kv._tips) < 1100
    assert shelf.kv.idle_blocks == 2


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("lruu", {}, "unknown eviction 'lruu'. Built-in: lru, lfu, fifo, size, cost, length, ttl, belady"),
        ("ttl", {"ttl_s": -1.0}, "ttl_s=-1.0 is negative"),
        ("cost", {"attention_tokens": 0.0}, "attention_tokens=0.0 is not positive"),
        ("lfu", {"half_life": 3}, "unknown argument 'half_life'"),
    ],
)
def test_what_is_no_policy_is_refused(spec, arguments, message) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_eviction(spec, arguments)
