"""The conformance suite: every built-in passes it, and a policy that breaks a rule is told which, for whom, and how."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from llmsim import HOLD, PolicyError
from llmsim.eviction import BUILTIN as EVICTIONS
from llmsim.eviction import LeastFrequentlyUsed
from llmsim.replica import Limits
from llmsim.schedulers import BUILTIN
from llmsim.schedulers.chunked import Chunked
from llmsim.simulate import simulate
from llmsim.testing import FIXES, RuleBrokenError, check_eviction, check_scheduler
from llmsim.testing_cases import cases, eviction_cases

EXAMPLES = Path(__file__).parents[1] / "examples"


NATIVE = {"vllm-native": "vllm"}  # runs the code of a package that only `pip install llmsim[native]` brings
HOST_MEMORY = {"swap_space_gib": 1.0}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # scheduler, fields of the scenario, arguments
    ("vllm", {"reserve_full_isl": False, "watermark": 0.05}, {}),
    ("vllm", {"scheduling_policy": "priority"}, {}),
    ("vllm", {"long_prefill_token_threshold": 40}, {}),
    ("chunked", {}, {"headroom": 0.0}),
    ("static", {}, {"batch_size": 3, "timeout_s": 0.0}),
    ("static", {}, {"stream": True, "timeout_s": 0.01}),
    ("dynamic", {}, {"batch_size": 4}),
    ("orca", {}, {"reserve": "pow2"}),
    ("vllm-v0", HOST_MEMORY, {"preemption": "swap"}),
    ("sarathi", {}, {"token_budget": 32}),
    ("sglang", {}, {"schedule_policy": "lpm"}),
    ("sglang", {}, {"schedule_policy": "lof"}),
    ("sglang", {}, {"schedule_policy": "random"}),
    ("sglang", {}, {"enable_mixed_chunk": True}),
    ("sglang", {}, {"enable_priority_scheduling": True}),
    ("sglang", {}, {"schedule_conservativeness": 0.1, "chunked_prefill_size": 64}),
    ("tensorrt-llm", {}, {"capacity_scheduler_policy": "max_utilization"}),
    ("tensorrt-llm", {}, {"capacity_scheduler_policy": "static_batch"}),
    ("tensorrt-llm", {}, {"enable_chunked_prefill": True}),
    (
        "tensorrt-llm", {},
        {"enable_chunked_prefill": True, "capacity_scheduler_policy": "max_utilization",
         "context_chunking_policy": "equal_progress"},
    ),
    ("sjf", {}, {"base": "sarathi"}),
    ("sjf", {}, {"base": "orca"}),
    ("sjf", {}, {"starvation_iterations": 5}),
    ("srtf", {}, {"base": "chunked"}),
    ("srtf", {}, {"starvation_iterations": 5, "quantum_iterations": 3}),
    ("srtf", {}, {"when_full": "recompute"}),
    ("srtf", HOST_MEMORY, {}),
    ("mlfq", {}, {"base": "chunked", "quantum_s": 0.02, "levels": 3}),
    ("mlfq", {}, {"quantum_s": 0.01, "starvation_s": 0.05}),
    ("mlfq", HOST_MEMORY, {"quantum_s": 0.01}),
    ("vtc", {}, {"base": "sarathi"}),
    ("vtc", {}, {"weights": {"tenant-1": 3.0}}),
    ("edf", {}, {"shed": True}),
    ("least-slack", {}, {"base": "chunked", "shed": True}),
    ("slo-chunk", {}, {"base": "chunked", "tpot_ms": 10.0}),
    ("priority", {}, {"base": "sarathi", "classes": "interactive,standard,batch"}),
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BUILTIN if name not in NATIVE])
def test_every_built_in_scheduler_keeps_the_rules(name: str) -> None:
    outcome = check_scheduler(name)
    assert outcome.requests > 500
    assert outcome.asked < outcome.iterations, "nothing was held: the comparison says nothing"


@pytest.mark.parametrize("name", [name for name in BUILTIN if name in NATIVE])
def test_another_packages_scheduler_keeps_the_rules_where_it_is_installed(name: str) -> None:
    if find_spec(NATIVE[name]) is not None:
        assert check_scheduler(name).requests > 500
    else:
        with pytest.raises(Exception, match="not installed"):
            check_scheduler(name)


@pytest.mark.parametrize(("name", "scenario", "arguments"), [row for row in VARIANTS if row[0] in BUILTIN])
def test_their_variants_keep_the_rules(name: str, scenario: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert check_scheduler(name, scenario=scenario, **arguments).requests > 500


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_keeps_the_rules(path: Path) -> None:
    spec = f"{path}:{''.join(word.capitalize() for word in path.stem.split('_'))}"
    text = path.read_text(encoding="utf-8")
    if "def schedule(" in text:
        assert check_scheduler(spec).requests > 500
    elif "def key(" in text:
        assert check_eviction(spec).requests > 500
    else:
        case = cases()[0]
        result = simulate(case.trace, replace(case.scenario, replicas=3, router=spec))
        assert set(result.requests["replica"]) == {0, 1, 2}
        assert result.finished.all()


def test_arguments_reach_the_policy() -> None:
    assert check_scheduler(Chunked, headroom=0.05).policy == "Chunked"
    assert check_scheduler("chunked", headroom=0.0).preemptions > check_scheduler("chunked", headroom=0.3).preemptions
    with pytest.raises(ValueError, match="unknown argument 'room'"):
        check_scheduler("chunked", room=1)


def test_the_scenarios_hold_what_policies_stumble_over() -> None:
    """Little memory, preemptions, cached prefixes, waiting turns and both clocks: with the engine most people run."""
    made = cases()
    results = [simulate(case.trace, case.scenario) for case in made]
    assert sum(result.stats["preemptions"] > 0 for result in results) >= 6
    assert max(result.stats["preemptions"] for result in results) > len(made[0].trace), "no preemption storm"
    assert sum(result.stats["hit_tokens"] > 0 for result in results) >= 6
    assert sum(result.stats["evicted_blocks"] > 0 for result in results) >= 4
    for chosen in (
        lambda s: s.async_scheduling, lambda s: not s.async_scheduling, lambda s: s.concurrency is not None,
        lambda s: s.replicas > 1, lambda s: s.enable_prefix_caching, lambda s: not s.enable_prefix_caching,
    ):  # fmt: skip
        assert sum(chosen(case.scenario) for case in made) >= 1
    assert any((case.trace.arrival_s != case.trace.arrival_s).any() for case in made), "no turn waits for its parent"
    assert any(case.trace.prompt_tokens.max() > 10 * case.scenario.max_num_batched_tokens for case in made)


def test_the_same_seed_makes_the_same_scenarios() -> None:
    for one, other in zip(cases(), cases(), strict=True):
        assert one.name == other.name
        assert one.scenario == other.scenario
        assert one.trace.prompt_tokens.tolist() == other.trace.prompt_tokens.tolist()
    assert cases(1)[0].trace.prompt_tokens.tolist() != cases()[0].trace.prompt_tokens.tolist()


# ---- policies that break a rule -------------------------------------------------------------------------------------


class Forgets(Chunked):
    """finishes: request 7 is taken out of the queue and never heard of again."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in replica.waiting:
            if request.id == 7:
                replica.waiting.remove(request)
        return super().schedule(replica, now_s)


class Doubles(Chunked):
    """finishes: request 7 is put in the queue a second time."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        answer = super().schedule(replica, now_s)
        for request in replica.running:
            if request.id == 7:
                replica.waiting.append(request)
        return answer


class Skips(Chunked):
    """tokens: request 7 is said to have a token that nobody computed."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in replica.prefilling:
            if request.id == 7 and request.output_tokens > 1:
                request.generated_tokens += 1
        return super().schedule(replica, now_s)


class Shortens(Chunked):
    """tokens: long answers are cut."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in replica.waiting:
            request.output_tokens = min(request.output_tokens, 20)
        return super().schedule(replica, now_s)


class Postdates(Chunked):
    """times: what waits is said to have come only now."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in replica.waiting:
            request.arrival_s = now_s
        return super().schedule(replica, now_s)


class Leaks(Chunked):
    """blocks: takes one that it never gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.leaked = False

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        if not self.leaked and replica.kv.free_blocks > 50:
            replica.kv.take(1)
            self.leaked = True
        return super().schedule(replica, now_s)


class Prints(Chunked):
    """blocks: says there are more than there are."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        replica.kv.free_blocks += 1
        return super().schedule(replica, now_s)


class Oversubscribes(Chunked):
    """limits: writes itself larger ones."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        replica.limits = Limits(10_000, 10_000)
        return super().schedule(replica, now_s)


class Fidgets(Chunked):
    """queue: the key grows while a request waits."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def order(self, request: Any) -> tuple[int, int]:
        self.calls += 1
        return -self.calls if request.id % 2 else 0, request.id


class Refuses(Chunked):
    """progress: request 7 is never let in."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        replica.decode()
        for request in list(replica.prefilling) + list(replica.waiting):
            left = replica.limits.max_num_batched_tokens - replica.decoding - sum(t for _, t, _ in replica.chunks)
            hit = None if request in replica.running else replica.look_up(request)
            done = hit.blocks * 16 if hit else request.computed_tokens
            fits = request in replica.running or len(replica.running) < replica.limits.max_num_seqs
            tokens = min(left, request.prefill_tokens - done)
            if request.id != 7 and tokens > 0 and fits:
                replica.prefill(request, tokens, hit)
        return None


class TugsOfWar(Chunked):
    """progress: what was begun is sent back for what waits."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in list(replica.prefilling):
            replica.preempt(request)
        return super().schedule(replica, now_s)


class Withholds(Chunked):
    """finishes: keeps all answers for itself."""

    streams = False


class LeavesPaused(Chunked):
    """progress: request 7 is set aside and never taken up again."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in list(replica.batch):
            if request.id == 7:
                replica.pause(request)
        return super().schedule(replica, now_s)


class HoldsTheClock(Chunked):
    """hold: holds though it lets prompts in only in even tenths of a second."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        if replica.batch and int(now_s * 10) % 2 and not replica.prefilling:
            replica.decode()
            return HOLD
        return super().schedule(replica, now_s)


class Rolls(Chunked):
    """seed: a die without one."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        if replica.batch and not replica.prefilling and random.random() < 0.2:
            replica.decode()
            return None
        super().schedule(replica, now_s)
        return None


class Remembers(Chunked):
    """seed: what one run has learnt another one knows."""

    seen: list[int] = []  # noqa: RUF012 - the mistake

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        self.seen.append(len(replica.running))
        if len(self.seen) % 5 == 0 and replica.batch and not replica.prefilling:
            replica.decode()
            return None
        super().schedule(replica, now_s)
        return None


class Overreaches(Chunked):
    """actions: more tokens of a prompt than it has."""

    def schedule(self, replica: Any, now_s: float) -> bool | None:
        for request in replica.waiting:
            replica.prefill(request, request.prefill_tokens + 1)
        return super().schedule(replica, now_s)


BROKEN = [
    (Forgets, "finishes", "request 7 ended 0 times"),
    (Doubles, "finishes", "request 7 waits and runs at once"),
    (Withholds, "finishes", "answers withheld; the first is that of request "),
    (Skips, "tokens", "request 7 "),
    (Shortens, "tokens", "output_tokens of request "),
    (Postdates, "times", "arrival_s of request "),
    (Leaks, "blocks", "4999 of 5000 KV blocks are free when every request has ended"),
    (Prints, "blocks", "of 5000 KV blocks are free. Let"),
    (Oversubscribes, "limits", "beyond max_num_"),
    (Fidgets, "queue", ", waits before request "),
    (Refuses, "progress", "the first is request 7"),
    (LeavesPaused, "progress", "the first is request 7"),
    (TugsOfWar, "progress", "without a token in between"),
    (HoldsTheClock, "hold", "when its answers are held and when it is asked every time"),
    (Rolls, "seed", "in two runs of the same seed"),
    (Remembers, "seed", "in two runs of the same seed"),
    (Overreaches, "actions", "tokens of request "),
]


@pytest.mark.parametrize(("policy", "rule", "sentence"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_policy_is_told_its_rule(policy: Any, rule: str, sentence: str) -> None:
    random.seed(0)  # of the dice: two runs can be the same by chance
    with pytest.raises(RuleBrokenError) as caught:
        check_scheduler(policy)
    error, text = caught.value, str(caught.value)
    assert (error.rule, error.policy) == (rule, policy.__name__)
    assert sentence in text
    assert text.startswith(f"{policy.__name__} breaks the rule {rule!r} (")
    assert text.lower().endswith(FIXES[rule].lower() + ".")
    assert "\n" not in text
    if rule != "blocks":
        assert error.request in range(len(error.case.trace))
        assert f"request {error.request}" in text
    assert error.value is not None
    assert isinstance(error, PolicyError)


def test_every_rule_has_a_policy_that_breaks_it() -> None:
    assert {rule for _, rule, _ in BROKEN} == set(FIXES) - {"content"}
    assert {rule for _, rule, _ in BROKEN_EVICTIONS} == {"actions", "content", "seed", "hold"}


def test_the_case_of_a_broken_rule_can_be_replayed() -> None:
    with pytest.raises(RuleBrokenError) as caught:
        check_scheduler(Refuses)
    case = caught.value.case
    assert len(simulate(case.trace, case.scenario).requests["id"]) == len(case.trace)


class Raises(Chunked):
    def schedule(self, replica: Any, now_s: float) -> bool | None:
        return replica.no_such_thing


def test_an_exception_inside_a_policy_surfaces_with_its_scenario() -> None:
    with pytest.raises(AttributeError, match="no_such_thing") as caught:
        check_scheduler(Raises)
    assert caught.value.__notes__ == ["while Raises was checked (open loop, ample memory, async, prefix caching)"]


# ---- eviction -------------------------------------------------------------------------------------------------------


built_in_eviction = cache(check_eviction)  # asked for again where two are compared


@pytest.mark.parametrize("name", EVICTIONS)
def test_every_built_in_eviction_keeps_the_rules(name: str) -> None:
    outcome = built_in_eviction(name)
    assert outcome.requests > 500
    assert outcome.evicted_blocks > 1000 and outcome.hit_tokens > 10_000, "nothing was at stake"


def test_a_short_time_to_live_keeps_the_rules_and_finds_less() -> None:
    assert check_eviction("ttl", ttl_s=0.1).hit_tokens < built_in_eviction("ttl").hit_tokens


def test_scenarios_tell_evictions_apart() -> None:
    found = {name: built_in_eviction(name).hit_tokens for name in ("lru", "fifo", "belady")}
    assert found["fifo"] < found["belady"] > found["lru"]
    assert all(case.scenario.enable_prefix_caching for case in eviction_cases())


class Undecided(LeastFrequentlyUsed):
    """actions: has no key for what was found."""

    def key(self, extent: Any, now_s: float) -> Any:
        return float("nan") if extent.hits else 0.0


class Mixes(LeastFrequentlyUsed):
    """actions: keys that do not compare."""

    def key(self, extent: Any, now_s: float) -> Any:
        return "old" if extent.hits else 0.0


class Invents(LeastFrequentlyUsed):
    """actions: a victim of its own."""

    def victim(self, extents: Any, now_s: float) -> Any:
        return extents


class Flatters(LeastFrequentlyUsed):
    """content: what it likes it makes look better."""

    def key(self, extent: Any, now_s: float) -> Any:
        extent.hits += extent.first_token == 0
        return super().key(extent, now_s)


class Dices(LeastFrequentlyUsed):
    """seed: a die without one."""

    def key(self, extent: Any, now_s: float) -> Any:
        return random.random()


class CountsCalls(LeastFrequentlyUsed):
    """hold: ages by how often it is told of a loss, which is once for many blocks or once for each."""

    def __init__(self) -> None:
        self.calls = 0

    def evicted(self, extent: Any, blocks: int, now_s: float) -> None:
        self.calls += 1

    def key(self, extent: Any, now_s: float) -> Any:
        return self.calls % 3, extent.used_s


BROKEN_EVICTIONS = [
    (Undecided, "actions", "gave the key nan to the "),
    (Mixes, "actions", "which does not compare with its others"),
    (Invents, "actions", "which is none of the "),
    (Flatters, "content", "key() changed hits of the extent at token 0 from 0 to 1"),
    (Dices, "seed", "in two runs of the same seed"),
    (CountsCalls, "hold", "when its answers are held and when it is asked every time"),
]


@pytest.mark.parametrize(
    ("policy", "rule", "sentence"), BROKEN_EVICTIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_eviction_is_told_its_rule(policy: Any, rule: str, sentence: str) -> None:
    random.seed(0)  # of the dice: in one of twelve two runs are the same by chance
    with pytest.raises(RuleBrokenError) as caught:
        check_eviction(policy)
    error, text = caught.value, str(caught.value)
    assert (error.rule, error.policy) == (rule, policy.__name__)
    assert sentence in text
    assert error.value is not None
    assert text.startswith(f"{policy.__name__} breaks the rule {rule!r} (")
    assert "\n" not in text


OWN_EVICTION = """
class Mine:
    def __init__(self, weight=1.0):
        self.weight = weight

    def key(self, extent, now_s):
        return extent.used_s + self.weight * extent.hits
"""


def test_an_eviction_of_a_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_EVICTION)
    assert check_eviction(f"{tmp_path}/mine.py:Mine", weight=2.0).evicted_blocks > 0
