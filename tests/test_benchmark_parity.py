"""Scenarios of `benchmarks.parity`; a difference is found and named. The stand-in plays vLLM (`plain_vllm`)."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from plain_vllm import PlainVllm

from benchmarks import parity
from benchmarks.parity_cases import KINDS, make_case, sequence_of
from llmsim.schedulers import vllm_installed, vllm_native

EMPTY_CLOCK = {
    "turn_s": 0.01, "jitter": False, "id_blocks": 1, "answers": True, "concurrency": None, "replicas": 1,
}  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_installed, vllm_native):
        monkeypatch.setattr(module, "InstalledVllm", PlainVllm)
        monkeypatch.setattr(module, "vllm_version", lambda: "plain")


# ---- scenarios -----------------------------------------------------------------------------------------------------


def test_seed_and_number_name_a_case() -> None:
    assert make_case(3, 7) == make_case(3, 7)
    assert make_case(3, 7) != make_case(3, 8)
    assert make_case(3, 7) != make_case(4, 7)
    assert json.loads(json.dumps(make_case(3, 7))) == make_case(3, 7)


def test_every_request_of_a_case_can_run_alone() -> None:
    """Blocks for the longest, a context it fits in, a budget that chunked prefill off needs."""
    for number in range(200):
        case = make_case(0, number)
        config = case["config"]
        for entry in case["requests"]:
            total = entry["prompt_len"] + entry["output_len"]
            assert entry["output_len"] >= 1
            assert total <= config["max_model_len"]
            assert total <= (config["num_gpu_blocks"] - 1) * config["block_size"]
        assert config["max_num_batched_tokens"] >= config["max_num_seqs"]
        assert config["enable_chunked_prefill"] or config["max_num_batched_tokens"] >= config["max_model_len"]


def test_the_cases_cover_what_they_are_for() -> None:
    cases = [make_case(0, number) for number in range(100)]
    assert {case["kind"] for case in cases} == set(KINDS)
    for name, values in {
        "async_scheduling": {True, False}, "policy": {"fcfs", "priority"}, "enable_prefix_caching": {True, False},
        "scheduler_reserve_full_isl": {True, False}, "enable_chunked_prefill": {True, False},
    }.items():  # fmt: skip
        assert {case["config"][name] for case in cases} == values
    assert len({case["config"]["long_prefill_token_threshold"] for case in cases}) >= 5
    assert len({case["config"]["watermark"] for case in cases}) >= 3
    assert any(case["clock"]["concurrency"] for case in cases)
    assert any("shared" in entry for case in cases for entry in case["requests"])


def test_shared_streams_lie_one_behind_the_other_and_the_rest_is_the_requests_own() -> None:
    entry = {"id": "r1", "prompt_len": 3, "output_len": 2, "shared": [["s", 2], ["t", 1]]}
    assert sequence_of(entry) == [("s", 0), ("s", 1), ("t", 0), ("r1", ("own", 0)), ("r1", ("own", 1))]
    assert sequence_of(entry | {"output_len": 1, "prompt_len": 1}) == [("s", 0), ("s", 1)]


# ---- comparison ----------------------------------------------------------------------------------------------------


def test_the_plain_twin_agrees_step_by_step_and_on_the_clock(stand_in: None) -> None:
    tally: Counter[str] = Counter()
    for number in range(30):
        case = make_case(11, number)
        assert parity.check(case, tally) is None, case["name"]
    assert tally["cases"] == 30
    assert min(tally["preemptions"], tally["prefix hits"], tally["partial chunks"], tally["evicted blocks"]) > 50


class Greedy(PlainVllm):
    """Ignores the watermark."""

    def __init__(self, options: Any) -> None:
        super().__init__(options._replace(watermark=0.0))


class Forgetful(PlainVllm):
    """Finds no prefix."""

    def __init__(self, options: Any) -> None:
        super().__init__(options._replace(enable_prefix_caching=False))


class Eager(PlainVllm):
    """Ignores long_prefill_token_threshold."""

    def __init__(self, options: Any) -> None:
        super().__init__(options._replace(long_prefill_token_threshold=0))


def case_of(requests: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    settings = {
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "block_size": 8, "num_gpu_blocks": 9,
        "async_scheduling": False, "enable_prefix_caching": True, "watermark": 0.0, "policy": "fcfs",
        "scheduler_reserve_full_isl": True, "enable_chunked_prefill": True, "long_prefill_token_threshold": 0,
    }  # fmt: skip
    return {"name": "hand", "config": settings | config, "requests": requests, "clock": EMPTY_CLOCK}


def entry(name: str, prompt: int, output: int, **more: Any) -> dict[str, Any]:
    return {"id": name, "arrival_step": 0, "prompt_len": prompt, "output_len": output, **more}


TWO = [entry("a", 24, 2), entry("b", 24, 2)]
SAME = [entry("a", 24, 2, shared=[["s", 24]]), entry("b", 24, 2, shared=[["s", 24]])]


@pytest.mark.parametrize(
    ("stranger", "case", "steps", "clock"),
    [
        (  # 8 blocks: a takes 3; b needs 3 of the 5 free and 3 to spare
            Greedy,
            case_of(TWO, watermark=0.4),
            "step 0 (turn 0): scheduled: ['a'], vLLM ['a', 'b']",
            "clock: scheduled_s of request 1: ",
        ),
        (  # b finds 2 of a's 3 blocks, the one of its last token is computed again
            Forgetful,
            case_of(SAME),
            "step 0 (turn 0): scheduled[1].computed_before: 16 for b, vLLM 0 for b",
            "clock: stats {'preemptions': 0, 'queried_tokens': 48, 'hit_tokens': 16,",
        ),
        (
            Eager,
            case_of(TWO, long_prefill_token_threshold=10),
            "step 0 (turn 0): scheduled[0].tokens: 10 for a, vLLM 24 for a",
            "clock: first_token_s of request 0: ",
        ),
    ],
)
def test_a_differing_scheduler_is_named(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, stranger: type, case: dict[str, Any], steps: str, clock: str
) -> None:
    for module in (vllm_installed, vllm_native):
        monkeypatch.setattr(module, "InstalledVllm", stranger)
    assert (parity.check(case, Counter(), clock=False) or "equal").startswith(steps)
    ours, theirs = parity.replayed(case, "vllm"), parity.replayed(case, "vllm-native")
    assert (parity.compare_results(ours, theirs) or "equal").startswith(clock)


def test_missing_steps_and_evictions_are_named() -> None:
    steps = parity.our_steps(case_of(TWO))
    fewer = parity.Steps(steps.turns[:-1], steps.evicted_blocks)
    assert parity.compare_steps(steps, fewer) == f"step {len(steps.turns) - 1}: {len(steps.turns)} steps, vLLM 1"
    more = parity.Steps(steps.turns, steps.evicted_blocks + 1)
    assert parity.compare_steps(steps, more) == "at the end: 0 cached blocks evicted, vLLM 1"


def test_a_simulation_that_gives_up_differs_from_one_that_ends() -> None:
    assert parity.compare_results("no room", "no room") is None
    assert parity.compare_results("no room", object()) == "clock: ours gave up (no room), vLLM's came to an end"


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(parity.main, list(arguments))


def test_the_command_counts_and_exits_0_when_all_agree(stand_in: None) -> None:
    done = run("--cases", "3", "--seed", "11", "--no-clock")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("vLLM plain, seed 11: 3 cases, 0 differ (")
    assert "\nsteps compared in " in done.output


def test_the_first_difference_is_printed_with_a_scenario_that_runs_again(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_installed, "InstalledVllm", Forgetful)
    done = run("--cases", "6", "--no-clock")
    assert done.exit_code == 1
    sentence, scenario, summary = done.output.splitlines()[:3]
    assert sentence.startswith("first difference: case 0/0, step ")
    assert "6 cases, " in summary
    path = tmp_path / "case.json"
    path.write_text(scenario)
    again = run("--case", str(path), "--no-clock")
    assert again.exit_code == 1
    assert again.output.splitlines()[0] == sentence


def test_a_broken_scenario_is_refused_in_one_line(stand_in: None, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    for text, sentence in {"{": "line 1: not JSON", '{"name": "x"}': "no config", "[]": "no name"}.items():
        path.write_text(text)
        done = run("--case", str(path))
        assert done.exit_code == 1
        assert sentence in done.output
        assert len(done.output.strip().splitlines()) == 1


def test_without_vllm_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    vllm_installed._vllm.cache_clear()
    done = run("--cases", "1")
    assert done.exit_code == 1
    assert "needs vLLM, which is not installed here. pip install 'llmsim[native]'" in done.output


def test_the_installed_vllm_agrees() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: docs/policies/vllm-native.md says how")
    vllm_installed._vllm.cache_clear()
    tally: Counter[str] = Counter()
    for number in range(10):
        assert parity.check(make_case(5, number), tally) is None
