"""The running batch, advanced whole runs at a time, against a list of requests advanced one token at a time."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_batch import NaiveBatch

from llmsim.batch import RunningBatch
from llmsim.request import Request


def decoding(id_: int, computed: int, output: int, generated: int = 1) -> Request:
    request = Request(id_, 0.0, computed, output)
    request.computed_tokens, request.generated_tokens = computed, generated
    return request


class BatchMachine(RuleBasedStateMachine):
    """Joining, leaving, coming back and advancing in any order."""

    @initialize(block_tokens=st.sampled_from([1, 2, 3, 4, 16]))
    def start(self, block_tokens: int) -> None:
        self.fast, self.naive = RunningBatch(block_tokens), NaiveBatch(block_tokens)
        self.away: list[Request] = []
        self.made = 0

    def join(self, request: Request) -> None:
        self.fast.add(request)
        self.naive.add(request)

    @rule(computed=st.integers(1, 40), output=st.integers(2, 30))
    def join_new(self, computed: int, output: int) -> None:
        self.made += 1
        self.join(decoding(self.made, computed, output))

    @precondition(lambda self: self.naive.members)
    @rule(pick=st.integers(0, 1000), comes_back_at_once=st.booleans())
    def leave(self, pick: int, comes_back_at_once: bool) -> None:
        request = self.naive.members[pick % len(self.naive.members)]
        self.fast.remove(request)
        assert (request.computed_tokens, request.generated_tokens) == self.naive.remove(request)
        if comes_back_at_once:  # with the same last iteration as before
            self.join(request)
        else:
            self.away.append(request)

    @precondition(lambda self: self.away)
    @rule(pick=st.integers(0, 1000), recomputed=st.booleans())
    def come_back(self, pick: int, recomputed: bool) -> None:
        request = self.away.pop(pick % len(self.away))
        if recomputed and request.output_tokens - request.generated_tokens > 1:  # its recompute made one more token
            request.computed_tokens += 1
            request.generated_tokens += 1
        self.join(request)

    @precondition(lambda self: self.naive.members)
    @rule(part=st.floats(0.0, 1.0), free_blocks=st.integers(0, 40), asks_first=st.booleans())
    def advance(self, part: float, free_blocks: int, asks_first: bool) -> None:
        limit = self.naive.steps_to_finish()
        if asks_first:  # which clears stale entries from the front of the heap
            assert self.fast.steps_to_finish() == limit
        assert self.fast.steps_that_fit(limit, free_blocks) == self.naive.steps_that_fit(limit, free_blocks)
        steps = max(1, round(part * limit))
        expected = self.naive.advance(steps)
        finished = self.fast.advance(steps)
        assert finished == list(expected)
        for request in finished:
            assert (request.computed_tokens, request.generated_tokens) == expected[request]
            assert request.generated_tokens == request.output_tokens

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "fast"):
            return
        fast, naive = self.fast, self.naive
        assert list(fast) == naive.members
        assert len(fast) == len(naive.members)
        assert fast.kv_tokens == naive.kv_tokens
        assert fast.longest == naive.longest
        for steps in (1, 2, 3, 5, 16, 17, 40):
            assert fast.blocks_needed(steps) == naive.blocks_needed(steps)
        for request in naive.members:
            assert request in fast
            assert fast.computed(request) == naive.computed[request]
            assert fast.needs_block(request) == (naive.computed[request] % naive.block_tokens == 0)
        for request in self.away:
            assert request not in fast


BatchMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
test_running_batch_agrees_with_a_list_of_requests = BatchMachine.TestCase


def test_a_request_that_leaves_and_comes_back_finishes_once() -> None:
    batch = RunningBatch(16)
    other, request = decoding(0, 8, 20), decoding(1, 10, 10)
    batch.add(other)
    batch.add(request)
    batch.advance(4)
    batch.remove(request)
    batch.add(request)  # its last iteration is the one it had: two heap entries for iteration 9
    assert batch.steps_to_finish() == 5
    assert batch.advance(5) == [request]
    assert (request.computed_tokens, request.generated_tokens) == (19, 10)
    assert list(batch) == [other]
    assert batch.kv_tokens == 8 + 9
    assert batch.steps_to_finish() == 19 - 9


def test_a_request_that_left_does_not_finish() -> None:
    batch = RunningBatch(16)
    short, long = decoding(0, 5, 4), decoding(1, 5, 9)
    batch.add(short)
    batch.add(long)
    batch.remove(short)
    assert batch.steps_to_finish() == 8
    assert batch.advance(8) == [long]
    assert short.generated_tokens == 1


def test_blocks_are_taken_by_the_token_after_a_full_block() -> None:
    batch = RunningBatch(4)
    batch.add(decoding(0, 6, 50))  # tokens 7, 8 fit; the third one, token 9, opens block 3
    assert [batch.blocks_needed(n) for n in (1, 2, 3, 6, 7)] == [0, 0, 1, 1, 2]
    batch.add(decoding(1, 8, 50))  # opens one at once
    assert [batch.blocks_needed(n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert [batch.steps_that_fit(40, free) for free in (0, 1, 2, 3)] == [0, 2, 4, 6]


def test_those_that_finish_together_are_named_in_order_of_joining() -> None:
    batch = RunningBatch(16)
    first, second, third = decoding(0, 3, 6), decoding(1, 3, 4), decoding(2, 3, 4)
    batch.add(first)
    batch.advance(2)
    batch.add(third)
    batch.add(second)
    assert batch.advance(3) == [first, third, second]
    assert len(batch) == 0
    assert batch.kv_tokens == 0


def test_squares_are_those_of_the_contexts() -> None:
    """Through joining, growing and leaving; their spread stays as it is while all grow."""
    batch = RunningBatch(16)
    members = [decoding(i, 10 + 7 * i, 4 + i) for i in range(5)]
    for member in members:
        batch.add(member)

    def contexts() -> list[int]:
        return [batch.computed(member) for member in batch]

    spread = batch.size * batch.squares - batch.kv_tokens**2
    batch.advance(2)
    assert batch.squares == sum(c * c for c in contexts())
    assert batch.size * batch.squares - batch.kv_tokens**2 == spread
    batch.remove(members[4])
    batch.advance(1)
    assert members[0] not in batch and batch.squares == sum(c * c for c in contexts()) > 0
