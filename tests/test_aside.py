"""Setting requests aside, turning them away, waiting and holding: exact times by hand, and against a plain count.

Every iteration lasts 10 ms and the host takes no time, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import simpy
from test_replica import AskedEveryTime, Recorded, Rule, admit, some_requests, tokens_are_seen_when_iterations_end
from test_twin import HOSTS, SteppedCost, gaps_of

from llmsim.cost import Host
from llmsim.cost.constant import ConstantCost
from llmsim.cost.graphs import Graphs
from llmsim.kvcache import KVCache
from llmsim.plugins import PolicyError
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.runs import detailed_arrays
from llmsim.scenario import Scenario
from llmsim.schedulers import HOLD
from llmsim.simulate import simulate, swap_of
from llmsim.trace import Trace

ROUNDING_S = 1e-9
GRAPHS = Graphs.of_engine(256, 8192)
BOTH = pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
Act = Callable[[Any], None]


def served(
    policy: Any,
    requests: Iterable[Request],
    *,
    asynchronous: bool = False,
    blocks: int = 1000,
    swap: Swap | None = None,
    cost: Any = None,
    limits: Limits | None = None,
    kv: KVCache | None = None,
    online: bool = False,
) -> Replica:
    env = simpy.Environment()
    replica = Replica(
        env,
        policy,
        cost or ConstantCost(0.010, GRAPHS),
        kv or KVCache(blocks, 16),
        limits or Limits(256, 8192),
        asynchronous=asynchronous,
        swap=swap,
    )
    if online:
        replica.start()
        for request in requests:
            timer = env.timeout(request.arrival_s)
            timer.callbacks.append(lambda _, request=request: replica.submit(request))
    else:
        replica.start(iter(requests))
    env.run()
    return replica


def decode(replica: Any) -> None:
    if replica.batch.size:
        replica.decode()


def everything(replica: Any) -> None:
    """All that decode, and all that wait."""
    decode(replica)
    for request in list(replica.prefilling):
        replica.prefill(request, request.prefill_tokens - request.computed_tokens)
    for request in replica.waiting:
        replica.prefill(request, request.prefill_tokens)


class Script:
    """The acts of the first iterations, then `everything`. Keeps when it was asked."""

    def __init__(self, *acts: Act, then: Act = everything, hold: bool = False) -> None:
        self.acts, self.then, self.hold = list(acts), then, hold
        self.asked_s: list[float] = []

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.asked_s.append(now_s)
        act = self.acts.pop(0) if self.acts else self.then
        act(replica)
        return HOLD if self.hold else None


def two(output: int = 4) -> tuple[Request, Request]:
    return Request(0, 0.0, 100, output), Request(1, 0.0, 100, output)


def ms(*times_s: float) -> list[float]:
    return [round(1e3 * time_s, 6) for time_s in times_s]


# ---- pause and resume ----------------------------------------------------------------------------------------------


@BOTH
def test_a_paused_request_keeps_its_blocks_and_makes_no_token(asynchronous: bool) -> None:
    first, second = two()
    held: list[tuple[int, int, list[int]]] = []

    def pause(replica: Any) -> None:
        replica.pause(first)
        replica.decode()
        held.append(
            (replica.kv.total_blocks - replica.kv.free_blocks, replica.batch.size, [r.id for r in replica.paused])
        )

    def resume(replica: Any) -> None:
        replica.resume(first)
        replica.decode()

    replica = served(Script(everything, pause, decode, resume), [first, second], asynchronous=asynchronous)
    assert held == [(14, 1, [0])]  # 7 blocks each
    assert ms(second.first_token_s, second.finish_s) == [10, 40]  # in all of the first four iterations
    assert ms(first.first_token_s, first.finish_s) == [10, 60]  # 10, 40, 50, 60
    assert ms(*gaps_of(replica)) == [10, 10, 10, 10, 10, 30]
    assert first.preemptions == 0
    assert first.preempted_s == 0.0
    assert replica.kv.free_blocks == replica.kv.total_blocks


@BOTH
def test_a_half_prefilled_request_can_be_paused(asynchronous: bool) -> None:
    first, second = two(output=2)

    def some(replica: Any) -> None:
        replica.prefill(first, 60)

    def other(replica: Any) -> None:
        replica.pause(first)
        assert not replica.prefilling
        replica.prefill(second, 100)

    def rest(replica: Any) -> None:
        replica.resume(first)
        replica.decode()
        replica.prefill(first, 40)

    served(Script(some, other, rest), [first, second], asynchronous=asynchronous)
    assert ms(second.first_token_s, second.finish_s) == [20, 30]
    assert ms(first.first_token_s, first.finish_s) == [30, 40]


def test_paused_requests_leave_room_under_max_num_seqs() -> None:
    """The second is served in the first one's slot: 20, 30 and 40 ms; the first goes on at 50."""
    first, second = two(output=3)
    refusals: list[str] = []

    def pause_and_admit(replica: Any) -> None:
        replica.pause(first)
        assert replica.prefill(second, 100)
        assert list(replica.running) == [first, second]

    def back(replica: Any) -> None:
        if replica.paused:
            try:
                replica.resume(first)
            except PolicyError as error:
                refusals.append(str(error))
        decode(replica)

    script = Script(lambda replica: replica.prefill(first, 100), pause_and_admit, then=back)
    served(script, [first, second], limits=Limits(1, 8192))
    assert refusals == ["Script resumed request 0 beyond max_num_seqs=1."] * 2
    assert ms(second.finish_s, first.finish_s) == [40, 60]


BROKEN: dict[str, Act] = {
    "Rule paused request 0 after it was to make a token in this iteration": lambda r: (r.decode(), r.pause(head(r))),
    "Rule paused request 2, which is neither decoding nor half-prefilled": lambda r: r.pause(r.waiting.head),
    "Rule resumed request 0, which is not paused": lambda r: r.resume(head(r)),
    "Rule resumed request 0 after decode() in the same iteration": lambda r: (
        r.pause(head(r)), r.decode(), r.resume(next(iter(r.paused)))
    ),
    "Rule resumed request 0 in the iteration in which it was set aside": lambda r: (
        r.pause(head(r)), r.resume(next(iter(r.paused)))
    ),
    "Rule swapped out request 0 to host memory, of which there is none: give swap_space_gib": lambda r: (
        r.swap_out(head(r))
    ),
    "Rule swapped in request 2, whose KV is not in host memory": lambda r: r.swap_in(r.waiting.head),
    "Rule rejected request 0, which is running: preempt it first": lambda r: r.reject(head(r)),
    "Rule asked for -1 ghosts that read 5 cached tokens, which is no batch": lambda r: r.ghosts(-1, 5),
    "Rule waits at 0.01 s until 0.01 s, which is not a later time": lambda r: r.wait_until(0.01),
    "Rule waits at 0.01 s until inf s, which is not a later time": lambda r: r.wait_until(float("inf")),
    "Rule holds for 0 iterations: give at least 1, this one": lambda r: r.hold_for(0),
    "Rule holds until nan s, which is no time": lambda r: r.hold_until(float("nan")),
    "Rule handed out answers that clients have seen already: set streams = False": lambda r: r.hand_out(),
    "Rule padded request 2 by -1 tokens": lambda r: r.prefill(r.waiting.head, 100, padding_tokens=-1),
    "Rule scheduled 8193 tokens in one iteration, beyond max_num_batched_tokens=8192": lambda r: r.prefill(
        r.waiting.head, 100, padding_tokens=8093
    ),
}  # fmt: skip


def head(replica: Any) -> Request:
    return next(iter(replica.batch))


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_policy_that_breaks_a_rule_is_named(sentence: str) -> None:
    def act(replica: Any) -> None:
        if not replica.batch.size:
            for request in list(replica.waiting)[:2]:
                replica.prefill(request, 100)
        else:
            BROKEN[sentence](replica)

    with pytest.raises(PolicyError) as error:
        served(Rule(act), [Request(i, 0.0, 100, 5) for i in range(3)])
    assert str(error.value) == sentence + "."


# ---- swap ----------------------------------------------------------------------------------------------------------


@BOTH
def test_swapped_kv_is_copied_before_the_iteration_that_follows(asynchronous: bool) -> None:
    """101 tokens with the first answer's: 7 blocks of 1 ms each way; in the two iterations it misses, 27 and 10 ms."""
    first, second = two()
    swap = Swap(7, 1e-3)

    def out(replica: Any) -> None:
        assert replica.swap_out(first)
        assert (first.swapped_tokens, swap.free_blocks) == (100, 0)
        assert list(replica.waiting) == [first]
        assert not replica.swap_out(second)  # no room in host memory
        replica.decode()

    def back(replica: Any) -> None:
        assert replica.swap_in(first)
        assert (first.swapped_tokens, swap.free_blocks) == (0, 7)
        replica.decode()

    replica = served(Script(everything, out, decode, back), [first, second], asynchronous=asynchronous, swap=swap)
    # ends of the iterations: 10, 10+7+10 = 27, 37, 37+7+10 = 54, 64, 74
    assert ms(second.first_token_s, second.finish_s) == [10, 54]
    assert ms(first.first_token_s, first.finish_s) == [10, 74]
    assert ms(*gaps_of(replica)) == [10, 10, 10, 17, 17, 44]
    assert (first.preemptions, second.preemptions) == (1, 0)
    assert ms(first.preempted_s) == [44]
    assert (swap.copied_out_blocks, swap.copied_in_blocks) == (7, 7)
    log = replica.iterations.table()
    assert log["prefill_tokens"].sum() == 200, "nothing was computed twice"
    assert replica.kv.free_blocks == replica.kv.total_blocks


def test_swap_in_without_free_blocks_is_answered_not_raised() -> None:
    first, second = two(output=3)

    def out(replica: Any) -> None:
        replica.swap_out(first)
        replica.decode()

    def back(replica: Any) -> None:
        replica.kv.take(4)
        assert not replica.swap_in(first)  # 7 blocks wanted, 6 of 17 free
        replica.kv.free_blocks += 4
        assert replica.swap_in(first)
        replica.decode()

    served(Script(everything, out, back), [first, second], blocks=17, swap=Swap(100, 0.0))
    assert ms(first.finish_s) == [40]


def test_what_is_in_host_memory_is_not_computed_again() -> None:
    first, second = two()

    def out(replica: Any) -> None:
        replica.swap_out(first)
        replica.decode()

    with pytest.raises(PolicyError, match=r"Script asked to prefill request 0, whose KV is in host memory: swap_in"):
        served(Script(everything, out), [first, second], swap=Swap(100, 0.0))


class Restless(Recorded):
    """Pauses, resumes, swaps, preempts and lets decode whom it likes: another choice every iteration."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)

    def decide(self, replica: Any) -> list[Request]:
        random = self.random
        members = list(replica.batch) + list(replica.prefilling)
        for request in members:
            lot = random.random()
            if lot < 0.05:
                replica.pause(request)
            elif lot < 0.10:
                replica.swap_out(request)
            elif lot < 0.12:
                replica.preempt(request, keep_content=random.random() < 0.5)
        left = set(members) - set(replica.running) | set(replica.paused)
        for request in list(replica.paused):
            if request not in left and random.random() < 0.3:
                replica.resume(request)
            elif random.random() < 0.05:
                replica.preempt(request)
            elif random.random() < 0.05:
                replica.swap_out(request)
        for request in list(replica.waiting):
            may_return = request not in left and request not in replica.preempted_now
            if request.swapped_tokens and may_return and random.random() < 0.4:
                replica.swap_in(request)
        decoding: list[Request] = []
        if replica.batch.size and random.random() < 0.85:
            replica.decode()
            decoding = list(replica.batch)
        self.prefill(replica)
        if not decoding and not replica.chunks and not replica.batch.size:
            for request in list(replica.paused):
                if request not in left:
                    replica.resume(request)
        if not decoding and replica.batch.size:
            replica.decode()
            decoding = list(replica.batch)
        if not decoding and not replica.chunks and (replica.paused or replica.waiting.size):
            replica.wait_until(self.now_s + 1e-3)
        return decoding

    def prefill(self, replica: Any) -> None:
        for request in list(replica.prefilling):
            left = request.prefill_tokens - request.computed_tokens
            replica.prefill(request, left if self.random.random() < 0.7 else self.random.randint(1, left))
        for request in replica.waiting:
            if len(replica.running) < 12 and not request.swapped_tokens:
                left = request.prefill_tokens - 16 * replica.look_up(request).blocks
                replica.prefill(request, left if self.random.random() < 0.5 else self.random.randint(1, left))

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.now_s = now_s
        return super().schedule(replica, now_s)


def share(requests: list[Request], seed: int) -> None:
    """Three families of prompts and answers, alike for up to ten blocks."""
    random = Random(seed)
    for request in requests:
        family, common = random.randrange(3), random.randrange(10)
        request.identity_tokens = request.prompt_tokens + request.output_tokens
        blocks = range(-(-request.identity_tokens // 16))
        request.prefix_ids = tuple((family, k) if k < common else (request.id, k) for k in blocks)


@BOTH
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("seed", range(8))
def test_gaps_of_requests_set_aside_are_those_of_each_request(seed: int, shared: bool, asynchronous: bool) -> None:
    """The host takes no time here, so a token is seen when its iteration ends on the GPU."""
    policy = Restless(seed)
    requests = some_requests(seed, count=60, output=30)
    if shared:
        share(requests, seed)
    cost = SteppedCost(Host(), GRAPHS, 1.0)
    kv = KVCache(2000, 16, prefix_block_tokens=16)
    replica = served(policy, requests, cost=cost, asynchronous=asynchronous, kv=kv, swap=Swap(120, 2e-4))
    tokens_are_seen_when_iterations_end(replica, requests, policy.tokens)
    assert replica.swap is not None
    assert replica.swap.free_blocks == replica.swap.blocks
    assert replica.swap.copied_out_blocks > replica.swap.copied_in_blocks - 1 > 0
    assert not (replica.paused or replica.running or replica.waiting)


def test_restless_means_what_it_says() -> None:
    """The test above would say little if hardly anything were set aside."""
    policy = Restless(1)
    replica = served(policy, some_requests(1, count=60, output=30), blocks=2000, swap=Swap(120, 2e-4))
    assert replica.preemptions > 50
    assert gaps_of(replica).max() > 5 * 0.010


# ---- turning away --------------------------------------------------------------------------------------------------


def test_a_rejected_request_leaves_now_and_without_times() -> None:
    told: list[tuple[int, float]] = []

    class Picky(Script):
        def ended(self, request: Request, now_s: float) -> None:
            told.append((request.id, round(now_s, 6)))

    first, second, third = (Request(i, at_s, 100, 3) for i, at_s in enumerate((0.0, 0.0, 0.015)))

    def turn_away(replica: Any) -> None:
        replica.decode()
        replica.reject(second)

    left: list[int] = []
    script = Picky(lambda replica: replica.prefill(first, 100), turn_away)
    env = simpy.Environment()
    replica = Replica(
        env, script, ConstantCost(0.010, GRAPHS), KVCache(100, 16), Limits(8, 512), asynchronous=False,
        on_finish=lambda request, _: left.append(request.id),
    )  # fmt: skip
    replica.start(iter([first, second, third]))
    env.run()
    assert (replica.rejections, second.rejected_s) == (1, pytest.approx(0.010))
    assert np.isnan([second.scheduled_s, second.first_token_s, second.finish_s]).all()
    assert left == [1, 0, 2]
    assert told == [(1, 0.010), (0, 0.030), (2, 0.050)]


def test_a_policy_that_only_turns_away_is_asked_again_and_not_stuck() -> None:
    requests = [Request(i, 0.0, 100, 3) for i in range(3)]
    script = Script(lambda replica: replica.reject(requests[0]), lambda replica: replica.reject(requests[1]))
    served(script, requests)
    assert ms(requests[2].scheduled_s, requests[2].finish_s) == [0, 30]


# ---- waiting and holding -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("online", [False, True], ids=["ahead", "online"])
def test_a_policy_that_waits_is_asked_in_time_and_at_arrivals(asynchronous: bool, online: bool) -> None:
    def wait(replica: Any) -> None:
        if script.asked_s[-1] >= 0.5:
            everything(replica)
        else:
            replica.wait_until(0.5)

    first, second, third = Request(0, 0.1, 100, 1), Request(1, 0.2, 100, 1), Request(2, 0.6, 100, 1)
    script = Script(then=wait)
    served(script, [first, second, third], asynchronous=asynchronous, online=online)
    assert ms(*sorted(set(script.asked_s)))[:3] == [100, 200, 500]
    assert ms(first.scheduled_s, second.scheduled_s, third.scheduled_s) == [500, 500, 600]
    assert ms(first.finish_s, third.finish_s) == [510, 610]


def test_an_arrival_wakes_a_waiting_policy_as_it_wakes_an_idle_engine() -> None:
    """wake_s after it is schedulable, which is receive_s after it was sent; what the policy named itself is exact."""
    host = Host(receive_s=5e-3, wake_s=20e-3)
    cost = ConstantCost(0.010, GRAPHS)
    cost.host = host
    script = Script(then=lambda replica: replica.wait_until(0.5) if script.asked_s[-1] < 0.5 else everything(replica))
    served(script, [Request(0, 0.1, 100, 1), Request(1, 0.2, 100, 1)], cost=cost)
    assert ms(*script.asked_s)[:3] == [125, 225, 500]


def test_nothing_to_wait_for_is_still_an_error() -> None:
    with pytest.raises(PolicyError, match="schedules nothing although 1 requests wait"):
        served(Script(then=lambda replica: None), [Request(0, 0.0, 100, 1)])


@BOTH
def test_a_hold_lasts_as_long_as_was_said(asynchronous: bool) -> None:
    """A prompt and 99 decodes from 10 ms on; asked again every 30 of them, or from 555 ms on."""

    def hold_for(replica: Any) -> None:
        everything(replica)
        replica.hold_for(30)

    def hold_until(replica: Any) -> None:
        everything(replica)
        if script.asked_s[-1] < 0.555:
            replica.hold_until(0.555)

    finish_s = []
    script = Script(then=hold_for, hold=True)
    request = Request(0, 0.0, 100, 100)
    replica = served(script, [request], asynchronous=asynchronous)
    finish_s.append(request.finish_s)
    assert max(replica.iterations.table()["iterations"]) == 30
    assert len(replica.iterations) <= 1 + 4 + 2  # the prompt, four runs, and what has no closed form in between
    request = Request(0, 0.0, 100, 100)
    script = Script(then=hold_until, hold=True)
    served(script, [request], asynchronous=asynchronous)
    finish_s.append(request.finish_s)
    after = [asked_s for asked_s in script.asked_s if asked_s >= 0.555 - ROUNDING_S]
    assert ms(after[0]) == [560]
    assert ms(*finish_s) == [1000, 1000]


# ---- ghosts and padding --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("host", [name for name in HOSTS if name != "slow worker"])
def test_ghosts_compute_and_make_nothing(host: str, asynchronous: bool) -> None:
    """Three more rows that read 500 tokens from the first decode on; a run equals its single iterations."""
    outcomes = []
    for hold in (True, False):
        wanted: list[tuple[int, int, int]] = []

        def act(replica: Any, wanted: list[tuple[int, int, int]] = wanted) -> None:
            everything(replica)
            if replica.decoding:
                if not wanted:
                    replica.ghosts(3, 500)
                begun = replica.batch.iteration
                wanted.append((replica.decoding, replica.batch.kv_tokens, begun))

        requests = [Request(i, 0.0, 100, 6 if i < 2 else 60) for i in range(4)]
        cost = SteppedCost(HOSTS[host], Graphs.of_engine(256, 512), 1.0)
        replica = served(Script(then=act, hold=hold), requests, cost=cost, asynchronous=asynchronous)
        log = replica.iterations.table()
        decodes = log[log["seqs"] > 0]
        assert [(seqs - 3, kv - 500 - 3 * begun, begun) for seqs, kv, (_, _, begun) in zip(
            decodes["seqs"], decodes["kv_tokens"], wanted, strict=True
        )] == wanted  # fmt: skip
        assert len(gaps_of(replica)) == 2 * 5 + 2 * 59
        outcomes.append((gaps_of(replica), [r.finish_s for r in requests], len(log)))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0], rtol=0, atol=2 * ROUNDING_S)
    np.testing.assert_allclose(outcomes[0][1], outcomes[1][1], rtol=0, atol=ROUNDING_S)
    assert outcomes[0][2] < outcomes[1][2]


def test_padding_is_computed_and_holds_no_blocks() -> None:
    request = Request(0, 0.0, 100, 1)
    cost = SteppedCost(Host(), GRAPHS, 1.0)
    replica = served(Script(lambda r: r.prefill(request, 100, padding_tokens=28)), [request], cost=cost)
    log = replica.iterations.table()[0]
    assert (log["prefill_tokens"], log["prefill_pairs"], log["kv_blocks"]) == (128, 128 * 129 // 2, 7)
    assert request.finish_s == pytest.approx(cost.mixed_s([(128, 0)], 0, 0))


# ---- answers withheld ----------------------------------------------------------------------------------------------


class AtTheEnd(Script):
    """Hands everything out once nothing decodes."""

    streams = False

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        if not replica.batch.size and replica.iterations:
            replica.hand_out()
        return super().schedule(replica, now_s)


@BOTH
@pytest.mark.parametrize("hold", [True, False], ids=["held", "asked"])
def test_withheld_answers_are_seen_at_once(asynchronous: bool, hold: bool) -> None:
    short, long = Request(0, 0.0, 100, 3), Request(1, 0.0, 100, 40)
    replica = served(AtTheEnd(hold=hold), [short, long], asynchronous=asynchronous)
    for request in (short, long):
        assert ms(request.first_token_s, request.finish_s) == [400, 400]
    assert gaps_of(replica).tolist() == [0.0] * (2 + 39)
    assert replica.kv.free_blocks == replica.kv.total_blocks
    assert not replica.unanswered()


@BOTH
def test_answers_pass_to_clients_on_the_host_clock(asynchronous: bool) -> None:
    """respond_s after the update of the iteration that made the last token began, whichever of the two waits."""
    cost = ConstantCost(0.010, GRAPHS)
    cost.host = Host(respond_s=4e-3, update_s=1e-3)
    short, long = Request(0, 0.0, 100, 2), Request(1, 0.0, 100, 5)
    served(AtTheEnd(), [short, long], asynchronous=asynchronous, cost=cost)
    end_ms = 5 * 10 + (0 if asynchronous else 4 * 1)  # synchronous scheduling: every update is waited for
    assert ms(short.finish_s, long.finish_s) == [end_ms + 4, end_ms + 4]


# ---- what policies are told ----------------------------------------------------------------------------------------


@BOTH
def test_policies_are_told_of_arrivals_and_ends(asynchronous: bool) -> None:
    told: list[tuple[str, int, float]] = []

    class Told(Script):
        def arrived(self, request: Request, now_s: float) -> None:
            told.append(("arrived", request.id, round(now_s, 6)))

        def ended(self, request: Request, now_s: float) -> None:
            told.append(("ended", request.id, round(now_s, 6)))

    requests = [Request(0, 0.0, 100, 3), Request(1, 0.012, 100, 8)]
    served(Told(hold=True), requests, asynchronous=asynchronous)
    # 0: 10, 20, 30 ms; 1 runs first from 20 to 30 ms, or one iteration later if that is scheduled ahead; 8 tokens
    end_s = 0.11 if asynchronous else 0.1
    assert told == [("arrived", 0, 0.0), ("arrived", 1, 0.012), ("ended", 0, 0.03), ("ended", 1, end_s)]


# ---- retraction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "found"), [(True, 6), (False, 3)], ids=["kept", "lost"])
def test_a_retracted_request_loses_its_own_blocks_and_not_those_it_found(keep: bool, found: int) -> None:
    """The second request found 3 of its 6 full blocks, stored by the first."""
    kv = KVCache(100, 16, prefix_block_tokens=16)
    first = Request(0, 0.0, 49, 9, prefix_ids=(1, 2, 3), identity_tokens=48)
    second = Request(1, 0.0, 97, 9, prefix_ids=(1, 2, 3, 4, 5, 6), identity_tokens=96)
    hits: list[int] = []

    def admit_second(replica: Any) -> None:
        replica.decode()
        hit = replica.look_up(second)
        hits.append(hit.blocks)
        replica.prefill(second, 97 - 48, hit)

    def retract(replica: Any) -> None:
        replica.preempt(second, keep_content=keep)
        hits.append(replica.look_up(second).blocks)
        replica.decode()

    def again(replica: Any) -> None:
        if replica.batch.size:
            replica.decode()
        admit(replica, 8)

    served(Script(lambda r: r.prefill(first, 49), admit_second, retract, then=again), [first, second], kv=kv)
    assert hits == [3, found]
    assert kv.free_blocks == kv.total_blocks


def test_the_held_and_the_asked_agree_when_ends_matter() -> None:
    """A paused request may go on when another ends: the policy is asked then, though nobody waits."""

    class OneAtATime:
        def schedule(self, replica: Any, now_s: float) -> bool | None:
            for request in list(replica.batch)[1:]:
                replica.pause(request)
            if not replica.batch.size and replica.paused:
                replica.resume(next(iter(replica.paused)))
            everything(replica)
            return HOLD

    finish = []
    for policy in (OneAtATime(), AskedEveryTime(OneAtATime())):
        requests = [Request(i, 0.0, 100, 20) for i in range(3)]
        served(policy, requests, asynchronous=True)
        finish.append(ms(*(request.finish_s for request in requests)))
    assert finish[0] == finish[1]


# ---- in a whole simulation -----------------------------------------------------------------------------------------

POLICY_FILE = """
from llmsim import HOLD

class Picky:
    def schedule(self, replica, now_s):
        if replica.batch:
            replica.decode()
        for request in replica.waiting:
            if request.tenant == "b" or request.slo_class == "no":
                replica.reject(request)
            else:
                replica.prefill(request, request.prefill_tokens)
        return HOLD

class Silent:
    streams = False
    def schedule(self, replica, now_s):
        if replica.batch:
            replica.decode()
        for request in replica.waiting:
            replica.prefill(request, request.prefill_tokens)
        return HOLD
"""


def scenario(tmp_path: Path, policy: str, **settings: Any) -> Scenario:
    path = tmp_path / "mine.py"
    path.write_text(POLICY_FILE)
    return Scenario(
        model="llama-3.1-8b", gpu="h200-sxm", cost="constant:0.01", scheduler=f"{path}:{policy}", **settings
    )


def test_what_a_trace_says_of_requests_reaches_the_policy_and_who_is_turned_away_the_result(tmp_path: Path) -> None:
    n = 4
    lengths = np.full(n, 100), np.full(n, 3)
    labels: dict[str, Any] = {"tenant": ["a", "b", "a", "a"], "slo_class": ["", "", "no", ""]}
    trace = Trace("labelled", np.arange(n) * 1.0, *lengths, **labels)
    result = simulate(trace, scenario(tmp_path, "Picky"))
    assert result.requests["turned_away"].tolist() == [False, True, True, False]
    assert np.isfinite(result.requests["finish_s"]).tolist() == [True, False, False, True]
    assert detailed_arrays(result.requests)["errors"][1] == "rejected: turned away by the policy"
    unlabelled = simulate(Trace("plain", np.arange(n) * 1.0, *lengths), scenario(tmp_path, "Picky"))
    assert "turned_away" not in unlabelled.requests


def test_a_closed_loop_goes_on_when_a_request_is_turned_away(tmp_path: Path) -> None:
    """One client, three requests: 0 to 30 ms, turned away at once, 30 to 60 ms."""
    trace = Trace("loop", np.zeros(3), np.full(3, 100), np.full(3, 3), tenant=["a", "b", "a"])
    result = simulate(trace, scenario(tmp_path, "Picky", concurrency=1))
    assert ms(*result.requests["arrival_s"]) == [0, 30, 30]
    assert ms(result.requests["finish_s"][2]) == [60]


def test_answers_withheld_for_ever_are_an_error(tmp_path: Path) -> None:
    trace = Trace("silent", np.zeros(2), np.full(2, 100), np.full(2, 3))
    with pytest.raises(
        PolicyError, match=r"Silent ended with 2 answers withheld; the first is that of request 0\. Call"
    ):
        simulate(trace, scenario(tmp_path, "Silent"))


def test_swap_space_is_counted_in_blocks_and_copied_over_the_measured_link() -> None:
    """Llama-3.1-8B: a block of 16 tokens is 2 MiB in 64 pieces; an H200 copies 55.4 GB/s and 2.4 us a piece."""
    swap = swap_of(Scenario(model="llama-3.1-8b", gpu="h200-sxm", swap_space_gib=4.0))
    assert swap is not None
    assert swap.blocks == 2048
    assert swap.seconds_per_block == pytest.approx(2**21 / 55.4e9 + 64 * 2.4e-6)
    measured_s = 6.1e-3 / 32  # 64 MiB, in pieces of 32 KiB
    assert swap.seconds_per_block == pytest.approx(measured_s, rel=0.03)
    halved = swap_of(Scenario(model="llama-3.1-8b", gpu="h100-sxm", tensor_parallel=2, swap_space_gib=4.0))
    assert halved is not None
    assert halved.blocks == 4096
    assert halved.seconds_per_block == pytest.approx(2**20 / 64e9 + 64 * 2.4e-6)
    assert swap_of(Scenario(model="llama-3.1-8b", gpu="h200-sxm")) is None
    with pytest.raises(ValueError, match=r"swap_space_gib=-1\.0 is no host memory: give GiB per GPU, 0 for none"):
        Scenario(model="llama-3.1-8b", gpu="h200-sxm", swap_space_gib=-1.0)
