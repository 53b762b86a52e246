"""The rules of `llmsim.testing`: what is watched while a policy acts, and what is looked up when a run is over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from llmsim.metrics import Result
from llmsim.replica import Limits, Replica
from llmsim.request import Request
from llmsim.testing_cases import Case

ROUNDING_S = 1e-9  # two ways to add the same series
FACTS = ("id", "arrival_s", "prompt_tokens", "output_tokens", "priority")
_facts = attrgetter(*FACTS)  # of every request after every answer: a third of a check when it is a loop
EVENTS = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
EVENT_NAMES = ("arrival", "first scheduled", "first token", "last token")


class Breach(Exception):  # noqa: N818 - a finding on its way to the caller, who makes an error of it
    """`rule`, the `request` it is about, the `value` that breaks it, and both in words."""

    def __init__(self, rule: str, request: int | None, value: Any, what: str) -> None:
        super().__init__(what)
        self.rule, self.request, self.value, self.what = rule, request, value, what


class Watch:
    """Looks at the replica before and after every answer of one policy; with `hold` False no answer is held."""

    def __init__(self, case: Case, hold: bool) -> None:
        self.hold = hold
        self.asked = 0
        self.facts: dict[Request, tuple[Any, ...]] = {}
        s = case.scenario
        self.seqs = s.max_num_seqs or 0
        self.budget: float = s.max_num_batched_tokens or 0
        # Most iterations that some progress can take: every token alone, four times over, and as many idle ones.
        self.most = 10_000 + 4 * int(case.trace.prompt_tokens.sum() + case.trace.output_tokens.sum())

    def around(self, policy: Any) -> Any:
        """The same policy, watched: its class is replaced by a subclass of the same name and layout."""
        made = type(policy)
        watch = self
        own_limit = getattr(policy, "token_limit", None)
        if own_limit is not None:
            self.budget = own_limit(Limits(self.seqs, int(self.budget)))

        def schedule(self: Any, replica: Any, now_s: float) -> bool | None:
            before = watch.before(self, replica)
            hold = made.schedule(self, replica, now_s)
            watch.after(replica, before)
            return hold if watch.hold else None

        policy.__class__ = type(made.__name__, (made,), {"__slots__": (), "schedule": schedule})
        return policy

    def before(self, policy: Any, replica: Any) -> dict[Request, int]:
        """Tokens that each running request has so far.

        The queue is read here and not behind the policy's back: one that computes its order when it is asked may keep
        it until the end of its answer.
        """
        self.asked += 1
        if self.asked > self.most:
            head = replica.waiting.head if replica.waiting else next(iter(replica.running), None)
            request = None if head is None else head.id
            raise Breach("progress", request, self.asked, f"asked {self.asked} times, request {request} is still there")
        waiting = list(replica.waiting)
        for request in (*waiting, *replica.running):
            if request not in self.facts:
                self.facts[request] = _facts(request)
        self._check_states(waiting, replica)
        self._check_order(policy, waiting)
        return {request: _tokens(replica, request) for request in replica.running}

    def after(self, replica: Any, before: dict[Request, int]) -> None:
        self._check_limits(replica)
        free, total = replica.kv.free_blocks, replica.kv.total_blocks
        if not 0 <= free <= total:
            raise Breach("blocks", None, free, f"{free} of {total} KV blocks are free")
        for request, tokens in before.items():
            now = _tokens(replica, request)
            if now != tokens:
                raise Breach("tokens", request.id, now, f"request {request.id} had {tokens} tokens and now has {now}")
        for request, facts in self.facts.items():
            if _facts(request) != facts:
                raise self._changed(request, facts)

    def _check_limits(self, replica: Any) -> None:
        running = len(replica.running) - len(replica.paused)
        if running > self.seqs:
            last = next(reversed(replica.running)).id
            what = f"{running} requests run, beyond max_num_seqs={self.seqs}, request {last} last"
            raise Breach("limits", last, running, what)
        tokens = replica.decoding + sum(tokens for _, tokens, _ in replica.chunks)
        if tokens > self.budget:
            last = replica.chunks[-1][0].id if replica.chunks else None
            what = (
                f"an iteration of {tokens} tokens, beyond max_num_batched_tokens={self.budget:g}, request {last} last"
            )
            raise Breach("limits", last, tokens, what)

    @staticmethod
    def _check_states(waiting: list[Request], replica: Any) -> None:
        for request in waiting:
            if request in replica.running:
                raise Breach("finishes", request.id, "waiting", f"request {request.id} waits and runs at once")
        for name in ("prefilling", "batch", "paused"):
            for request in getattr(replica, name):
                if request not in replica.running:
                    what = f"request {request.id} is in replica.{name} and does not run"
                    raise Breach("finishes", request.id, name, what)

    @staticmethod
    def _check_order(policy: Any, waiting: list[Request]) -> None:
        """A policy may change a key if it takes the request out and puts it back; then the queue is in order still."""
        order = getattr(policy, "order", None)
        if order is None or hasattr(policy, "queue"):
            return
        for request, after in pairwise(waiting):
            key, next_key = order(request), order(after)
            if next_key < key:
                what = f"request {request.id}, order {key}, waits before request {after.id}, order {next_key}"
                raise Breach("queue", request.id, key, what)

    @staticmethod
    def _changed(request: Request, facts: tuple[Any, ...]) -> Breach:
        name, was, now = next(
            (name, was, now) for name, was, now in zip(FACTS, facts, _facts(request), strict=True) if was != now
        )
        rule = "times" if name == "arrival_s" else "tokens"
        return Breach(rule, facts[0], now, f"{name} of request {facts[0]} was {was} and is {now}")


def _tokens(replica: Any, request: Request) -> int:
    """Tokens generated so far, settled or not."""
    under_way = replica.batch.iteration - request.joined if request in replica.batch else 0
    return request.generated_tokens + under_way


def after_run(result: Result, answers: Sequence[tuple[Request, int]], replicas: Sequence[Replica]) -> None:
    """Everything that must hold once the simulation has nothing left to do."""
    _check_ends(result, answers)
    _check_times(result)
    _check_work(result)
    for replica in replicas:
        left = [*replica.waiting, *replica.running]
        if left:
            what = f"request {left[0].id} is still there when nothing is left to happen"
            raise Breach("progress", left[0].id, len(left), what)
        free, total = replica.kv.free_blocks, replica.kv.total_blocks
        if free != total:
            raise Breach("blocks", None, free, f"{free} of {total} KV blocks are free when every request has ended")
        swap = replica.swap
        if swap is not None and swap.free_blocks != swap.blocks:
            what = f"{swap.free_blocks} of {swap.blocks} host blocks are free when every request has ended"
            raise Breach("blocks", None, swap.free_blocks, what)


def _check_ends(result: Result, answers: Sequence[tuple[Request, int]]) -> None:
    requests = result.requests
    ends = np.zeros(len(requests["id"]), dtype=int)
    for request, tokens in answers:
        ends[request.id] += 1
        if np.isnan(request.finish_s):
            continue
        asked = int(requests["output_tokens"][request.id])
        if tokens != asked:
            what = f"request {request.id} ended with {tokens} of its {asked} tokens"
            raise Breach("tokens", request.id, tokens, what)
    for request_id in np.flatnonzero(ends != 1).tolist():
        count = int(ends[request_id])
        raise Breach("finishes", request_id, count, f"request {request_id} ended {count} times")
    turned_away = requests.get("turned_away", np.zeros(len(ends), dtype=bool))
    block = result.scenario.block_size
    for at in np.flatnonzero(~result.finished & ~turned_away).tolist():
        blocks = -(-int(requests["prompt_tokens"][at] + requests["output_tokens"][at] - 1) // block)
        if blocks < result.kv_blocks:
            raise Breach("finishes", at, "nan", f"request {at} ended without an answer and without a reason")


def _check_times(result: Result) -> None:
    done = {name: column[result.finished] for name, column in result.requests.items()}
    for before, after, first, second in zip(EVENTS, EVENTS[1:], EVENT_NAMES, EVENT_NAMES[1:], strict=False):
        wrong = np.flatnonzero(~(done[after] >= done[before] - ROUNDING_S))
        if wrong.size:
            at = int(wrong[0])
            request, early, late = int(done["id"][at]), float(done[before][at]), float(done[after][at])
            what = f"request {request}: {second} at {late:.6g} s, {first} at {early:.6g} s"
            raise Breach("times", request, late, what)


def _check_work(result: Result) -> None:
    """What was answered was computed: prompts but for what was cached, and answers but for the last token."""
    done = {name: column[result.finished] for name, column in result.requests.items()}
    log = result.iterations
    computed = int((log["prefill_tokens"] + log["seqs"] * log["iterations"]).sum())
    needed = int((done["prompt_tokens"] - done["cached_tokens"] + done["output_tokens"] - 1).sum())
    if computed < needed and not (result.scenario.enable_prefix_caching and result.stats["preemptions"]):
        raise Breach("tokens", None, computed, f"{computed} tokens were computed of the {needed} that were answered")


def first_difference(one: Result, other: Result, *, exact: bool) -> tuple[int | None, Any, str] | None:
    """The earliest request whose numbers differ between two runs: (request, value, words); None if none does.

    `exact`: to the byte, iterations and gaps too; else times to a billionth of a second.
    """
    worst: tuple[float, int, str, Any, Any] | None = None
    for name, column in one.requests.items():
        theirs = other.requests[name]
        if column.dtype.kind == "f":
            slack_s = 0.0 if exact else ROUNDING_S * np.maximum(1.0, np.abs(np.nan_to_num(column)))
            same = (np.abs(column - theirs) <= slack_s) | (np.isnan(column) & np.isnan(theirs))
        else:
            same = column == theirs
        for at in np.flatnonzero(~same)[:1].tolist():
            found = (float(one.requests["arrival_s"][at]), at, name, column[at].item(), theirs[at].item())
            if worst is None or found[:2] < worst[:2]:
                worst = found
    if worst is not None:
        _, at, name, mine, theirs_value = worst
        return at, mine, f"{name} of request {at} is {_shown(mine)} and {_shown(theirs_value)}"
    for table in ("iterations", "gaps") if exact else ():
        for name, column in getattr(one, table).items():
            if column.tobytes() != getattr(other, table)[name].tobytes():
                return None, name, f"the {table} log differs in {name}"
    return None


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
