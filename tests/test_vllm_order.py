"""Small orders of events that decide which KV contents survive, as vLLM 0.25.1 has them.

Each was found by `benchmarks.parity` and is rebuilt here with numbers that fit on paper. Blocks are counted as in
`llmsim.kvcache`: free ones, and among them idle ones that still hold content.
"""

from __future__ import annotations

from llmsim.engine import Engine, Limits
from llmsim.kvcache import KVCache
from llmsim.request import Request
from llmsim.schedulers.vllm import VllmScheduler


def engine(blocks: int, block_tokens: int, *, asynchronous: bool, budget: int = 64, threshold: int = 0) -> Engine:
    kv = KVCache(blocks, block_tokens, prefix_block_tokens=block_tokens)
    policy = VllmScheduler(long_prefill_token_threshold=threshold)
    return Engine(policy, kv, Limits(8, budget), asynchronous=asynchronous)


def request(number: int, prompt: int, output: int, ids: tuple[object, ...] = (), identity_tokens: int = 0) -> Request:
    made = Request(number, 0.0, prompt, output)
    made.prefix_ids, made.identity_tokens = ids, identity_tokens
    return made


def iterate(engine: Engine) -> list[Request]:
    """One iteration; returns who ended."""
    engine.begin(0.0)
    return engine.commit(1)


def test_level_copies_are_stored_in_order_of_admission() -> None:
    """a and b find x; in iteration 2 a decodes token 8, b's chunk computes it: a's y is found by c."""
    e = engine(20, 4, asynchronous=False, threshold=3)
    first = request(9, 4, 1, ("x",), 4)
    e.scheduler.threshold = 0
    e.waiting.append(first)
    e.free(iterate(e))
    e.scheduler.threshold = 3
    a, b, c = (request(i, prompt, 4, ("x", "y"), 8) for i, prompt in enumerate((7, 9, 9)))
    e.waiting.append(a)
    e.waiting.append(b)
    e.begin(0.0)
    assert [(r.id, tokens, before) for r, tokens, before in e.chunks] == [(0, 3, 4), (1, 3, 4)]
    e.commit(1)
    iterate(e)  # a: token 8 by a decode; b: tokens 8 and 9 by a chunk
    e.waiting.append(c)
    iterate(e)
    assert c.cached_tokens == 8
    free = e.kv.free_blocks
    e.preempt(b)  # its x is shared, its y and its third block are its own
    assert e.kv.free_blocks - free == 2


def test_requests_that_end_together_are_freed_in_order_of_admission() -> None:
    """a's only token comes with its last chunk, b's last with a decode: a's content is the first to go."""
    e = engine(9, 4, asynchronous=False, budget=8, threshold=4)
    a, b = request(0, 8, 1, ("a1", "a2"), 8), request(1, 3, 2, ("b1",), 4)
    e.waiting.append(a)
    e.waiting.append(b)
    assert iterate(e) == []  # a: 4 of 8; b: its prompt
    ended = iterate(e)
    assert set(ended) == {a, b}
    e.free(ended)
    assert (e.kv.free_blocks, e.kv.idle_blocks) == (9, 3)
    e.kv.take(7)  # 6 empty ones, then the oldest content: a's tail
    assert e.kv.match(request(2, 9, 1, ("a1", "a2"), 8), 9).blocks == 1
    assert e.kv.match(request(3, 9, 1, ("b1",), 4), 9).blocks == 1


def test_all_blocks_of_a_prompt_keep_their_content_if_its_only_token_is_in_flight() -> None:
    """Asynchronous: the prompt's 8 tokens were known when they were scheduled, so both blocks are registered."""
    e = engine(9, 4, asynchronous=True)
    a = request(0, 8, 1)
    e.waiting.append(a)
    assert iterate(e) == [a]
    e.preempt(a)
    assert (e.kv.free_blocks, e.kv.idle_blocks) == (9, 2)


def test_a_decode_in_flight_keeps_its_last_block_unregistered() -> None:
    """Asynchronous: the token behind position 7 is in flight, so the second block has no name yet."""
    e = engine(9, 4, asynchronous=True)
    a = request(0, 7, 9)
    e.waiting.append(a)
    iterate(e)
    iterate(e)  # 8 tokens computed
    e.preempt(a)
    assert (e.kv.free_blocks, e.kv.idle_blocks) == (9, 1)


def test_a_decode_that_sat_an_iteration_out_has_its_block_registered() -> None:
    """Asynchronous: a's first token came back while it waited, so its decode is scheduled with a known token."""
    e = engine(9, 4, asynchronous=True)
    a = request(0, 7, 9)
    e.waiting.append(a)
    iterate(e)
    e.scheduler, policy = Idle(), e.scheduler
    iterate(e)  # a sits out
    e.scheduler = policy
    iterate(e)  # 8 tokens computed
    e.preempt(a)
    assert (e.kv.free_blocks, e.kv.idle_blocks) == (9, 2)


class Idle:
    """Lets nobody decode."""

    def schedule(self, replica: Engine, now_s: float) -> None:
        replica.pause_others()
