"""Conformance: `check_scheduler(Mine)` runs a policy through seeded scenarios and holds it to the rules of serving.

    rule       what it says
    finishes   every request ends once: answered, or rejected with a reason
    tokens     an answered request got all its tokens, and each of them was computed
    times      arrival <= first scheduled <= first token <= last token
    blocks     KV blocks in use are never below none or above all, and all come back
    limits     max_num_seqs and max_num_batched_tokens (or the policy's own `token_limit`) are kept in every iteration
    queue      requests wait in the order of `order(request)`: its key stays the same while a request waits
    progress   whatever waits is served in the end, also with little memory: no deadlock, no endless preempting
    hold       an answer that is held is the one it would give if asked before every iteration
    seed       the same seed gives the same bytes
    actions    what the policy asks for is possible (the engine refuses the rest: PolicyError)

`check_eviction(Mine)` does the same for eviction policies (`llmsim.testing_eviction`).
The first rule that is broken raises `RuleBrokenError`, one line with the rule, the request and the value; its `case`
holds the trace and the scenario it happened in. The scenarios are those of `llmsim.testing_cases`. An exception inside
the policy surfaces untouched, with a note that names the scenario.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmsim.cost import CostModel
from llmsim.eviction import load_eviction
from llmsim.metrics import Result
from llmsim.plugins import PolicyError
from llmsim.replica import Replica
from llmsim.request import Request
from llmsim.schedulers import BUILTIN, load_scheduler
from llmsim.simulate import Fleet, cost_of, scheduler_of
from llmsim.testing_cases import Case, cases, eviction_cases
from llmsim.testing_eviction import put_behind
from llmsim.testing_rules import Breach, Watch, after_run, first_difference

__all__ = ["Conformance", "RuleBrokenError", "check_eviction", "check_scheduler"]

FIXES = {
    "finishes": "answer it, or turn it away with replica.reject(request)",
    "tokens": "a policy schedules; only the engine counts tokens",
    "times": "leave a request's times to the engine",
    "blocks": "let prefill, decode and preempt take and free blocks",
    "limits": "read replica.limits and stay within them",
    "queue": "make the key of what never changes while it waits, or sort inside schedule without HOLD",
    "progress": "admit the head of the queue when nothing runs; preempt only to let another make a token",
    "hold": "return HOLD only if the answer changes at an arrival, an end or a shortage of blocks alone",
    "seed": "draw from a generator made in __init__ with a seed, keep no state outside the instance, order no sets",
    "actions": "ask for what the engine can do",
    "content": "read extents, and keep what you note about them in a dictionary of your own",
}
REFUSALS = {  # what a PolicyError says: the rule it is about, if not `actions`
    "schedules nothing although": "progress",
    "without a token in between": "progress",
    "answers withheld": "finishes",
}


class RuleBrokenError(PolicyError):
    """A policy broke a rule: `rule`, `policy`, `request` (its id, None if it is about none), `value`, `case`.

    `value` is what the engine said where the engine refused.
    """

    def __init__(self, breach: Breach, policy: str, case: Case) -> None:
        self.rule, self.request, self.value = breach.rule, breach.request, breach.value
        self.policy, self.case = policy, case
        fix = FIXES[breach.rule]
        fix = fix[0].upper() + fix[1:]
        super().__init__(f"{policy} breaks the rule {breach.rule!r} ({case.name}): {breach.what}. {fix}.")


@dataclass(frozen=True)
class Conformance:
    """What a policy was put through; all of it kept to the rules."""

    policy: str
    scenarios: int
    requests: int
    iterations: int
    asked: int  # how often it was asked, with HOLD
    preemptions: int
    hit_tokens: int
    evicted_blocks: int
    rejected: int

    def __str__(self) -> str:
        return (
            f"{self.policy} keeps every rule: {self.scenarios} scenarios, {self.requests} requests,"
            f" {self.iterations:,} iterations of which it was asked for {self.asked:,}, {self.preemptions} preemptions,"
            f" {self.hit_tokens:,} tokens from the prefix cache, {self.evicted_blocks} blocks evicted, {self.rejected}"
            " rejected"
        )


def check_scheduler(policy: Any, /, scenario: dict[str, Any] | None = None, **arguments: Any) -> Conformance:
    """Hold a scheduling policy to the rules: a class, a built-in's name, or "file.py:ClassName", with its arguments.

    `scenario`: fields of `Scenario` that the policy needs, the same in every case, e.g. {"swap_space_gib": 1}.
    Raises RuleBrokenError for the first rule that is broken; takes seconds.
    """
    name = policy if isinstance(policy, str) else policy.__name__
    if isinstance(policy, str) and policy not in BUILTIN:
        policy = type(load_scheduler(policy, arguments))  # once: what its module remembers is there in the next run

    def with_policy(case: Case) -> Case:
        fields = dict(scenario or {})
        if isinstance(policy, str):
            fields |= {"scheduler": policy, "scheduler_args": arguments}
        return replace(case, scenario=replace(case.scenario, **fields))

    def fleet(case: Case, cost: CostModel, hold: bool) -> _Watched:
        if isinstance(policy, str):
            return _Watched(case, cost, hold, lambda: scheduler_of(case.scenario))
        return _Watched(case, cost, hold, lambda: policy(**arguments))

    return _hold_to_the_rules(name, [with_policy(case) for case in cases()], fleet)


def check_eviction(policy: Any, /, **arguments: Any) -> Conformance:
    """Hold an eviction policy to the rules (`llmsim.testing_eviction`): a class, a name, or "file.py:ClassName"."""
    name = policy if isinstance(policy, str) else policy.__name__
    made = policy if not isinstance(policy, str) else type(load_eviction(policy, arguments))

    def fleet(case: Case, cost: CostModel, hold: bool) -> _Watched:
        watched = _Watched(case, cost, hold, lambda: scheduler_of(case.scenario))
        put_behind(watched, lambda: made(**arguments))
        return watched

    return _hold_to_the_rules(name, eviction_cases(), fleet, held_too=not hasattr(made, "victim"))


def _hold_to_the_rules(
    name: str, trials: list[Case], fleet: Callable[[Case, CostModel, bool], _Watched], *, held_too: bool = True
) -> Conformance:
    costs: dict[tuple[Any, ...], CostModel] = {}
    counted = ("preemptions", "hit_tokens", "evicted_blocks", "rejected")
    totals = dict.fromkeys(("scenarios", "requests", "iterations", "asked", *counted), 0)
    for case in trials:
        key = (case.scenario.max_num_seqs, case.scenario.max_num_batched_tokens)
        if key not in costs:
            costs[key] = cost_of(case.scenario)
        try:
            first, again, every = (fleet(case, costs[key], hold) for hold in (True, True, False))
            outcome = first.run()
            _judge(first, outcome, again.run(), every.run() if held_too else None)
        except Breach as breach:
            raise RuleBrokenError(breach, name, case) from None
        except PolicyError as error:
            raise RuleBrokenError(_refused(error), name, case) from error
        except Exception as error:
            error.add_note(f"while {name} was checked ({case.name})")
            raise
        totals["scenarios"] += 1
        totals["requests"] += len(case.trace)
        totals["iterations"] += int(outcome.iterations["iterations"].sum())
        totals["asked"] += sum(watch.asked for watch in first.watches)
        for key_word in counted:
            totals[key_word] += int(outcome.stats[key_word])
    return Conformance(name, **totals)


def _judge(first: _Watched, outcome: Result, again: Result, every: Result | None) -> None:
    """`again`: a second run; `every`: one in which no answer was held."""
    after_run(outcome, first.answers, first.replicas)
    difference = first_difference(outcome, again, exact=True)
    if difference is not None:
        request, value, what = difference
        raise Breach("seed", request, value, f"{what} in two runs of the same seed")
    difference = None if every is None else first_difference(outcome, every, exact=False)
    if difference is not None:
        request, value, what = difference
        raise Breach("hold", request, value, f"{what} when its answers are held and when it is asked every time")


def _refused(error: PolicyError) -> Breach:
    """What the engine said no to, as a rule that is broken."""
    text = str(error)
    rule = next((rule for part, rule in REFUSALS.items() if part in text), "actions")
    found = re.search(r"request (\d+)", text)
    return Breach(rule, int(found[1]) if found else None, text, text.rstrip("."))


class _Watched(Fleet):
    """A fleet whose policies are watched while they act; `answers`: the requests as they ended and their tokens."""

    def __init__(self, case: Case, cost: CostModel, hold: bool, make: Callable[[], Any]) -> None:
        self.answers: list[tuple[Request, int]] = []
        self.watches: list[Watch] = []

        def watched() -> Any:
            watch = Watch(case, hold)
            self.watches.append(watch)
            return watch.around(make())

        super().__init__(case.trace, case.scenario, cost=cost, policy=watched)

    def _record(self, request: Request, replica: Replica) -> None:
        self.answers.append((request, request.generated_tokens))
        super()._record(request, replica)
