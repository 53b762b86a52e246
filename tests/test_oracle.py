"""Schedules recorded from vLLM's own scheduler are reproduced step by step, and a difference is named.

The cases are recordings made for this project (vLLM 0.25.1, V1 scheduler and KV cache manager): `hand_*` small enough
to follow on paper, the others random. The larger ones are kept compressed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsim.oracle import load_case, replay_case

ORACLE = Path(__file__).parent / "data" / "oracle"
CASES = sorted(path.name for path in ORACLE.iterdir())


def case_text(name: str) -> str:
    path = ORACLE / name
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text()


def plain(name: str, folder: Path) -> Path:
    path = folder / name.removesuffix(".gz")
    path.write_text(case_text(name))
    return path


def test_all_recorded_schedules_are_here() -> None:
    kinds = Counter(name.partition("_")[0] for name in CASES)
    assert kinds == {"hand": 15, "prefix": 7, "preempt": 7, "chunk": 7, "priority": 3, "async": 4}


@pytest.mark.parametrize("name", CASES)
def test_recorded_schedule_is_reproduced(name: str, tmp_path: Path) -> None:
    assert replay_case(plain(name, tmp_path)) is None


def test_the_cases_preempt_hit_prefixes_and_chunk_prompts() -> None:
    """Agreement says something only if the rules were at work."""
    preempted = hits = chunks = 0
    for name in CASES:
        for step in json.loads(case_text(name))["steps"]:
            preempted += len(step["preempted"])
            hits += sum(entry.get("prefix_hit", 0) > 0 for entry in step["scheduled"])
            chunks += sum(not entry["samples"] for entry in step["scheduled"])
    assert preempted > 100
    assert hits > 100
    assert chunks > 50


# ---- a changed number is found -------------------------------------------------------------------------------------


def entry_plus_1(field: str) -> Callable[[dict[str, Any]], None]:
    def change(step: dict[str, Any]) -> None:
        step["scheduled"][0][field] += 1

    return change


def more_free_blocks(step: dict[str, Any]) -> None:
    step["free_blocks"] += 1


def fewer_free_blocks_after(step: dict[str, Any]) -> None:
    step["free_blocks_after_update"] -= 1


def nobody_preempted(step: dict[str, Any]) -> None:
    step["preempted"] = ["z"]


def other_order(step: dict[str, Any]) -> None:
    step["running"] = step["running"][::-1]


def longer_queue(step: dict[str, Any]) -> None:
    step["waiting"] = [*step["waiting"], "z"]


def no_tokens(step: dict[str, Any]) -> None:
    step["emitted"] = []


def later(step: dict[str, Any]) -> None:
    step["iter"] += 1


def one_less_scheduled(step: dict[str, Any]) -> None:
    step["scheduled"] = step["scheduled"][:-1]


CHANGES = {
    r"scheduled\[0\]\.tokens: 1 for a, recorded 2 for a": entry_plus_1("tokens"),
    r"scheduled\[0\]\.computed_before: 15 for a, recorded 16 for a": entry_plus_1("computed_before"),
    r"free_blocks: 2, recorded 3": more_free_blocks,
    r"free_blocks_after_update: 2, recorded 1": fewer_free_blocks_after,
    r"preempted: \['c'\], recorded \['z'\]": nobody_preempted,
    r"running: \['a', 'b'\], recorded \['b', 'a'\]": other_order,
    r"waiting: \['c'\], recorded \['c', 'z'\]": longer_queue,
    r"emitted: .*, recorded \[\]": no_tokens,
    r"iter: 4, recorded 5": later,
    r"scheduled: \['a', 'b'\], recorded \['a'\]": one_less_scheduled,
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_one_changed_number_is_reported_with_its_step_and_field(sentence: str, tmp_path: Path) -> None:
    """Step 4 of the case: a and b decode, c is preempted."""
    case = json.loads(case_text("hand_09_preempt_fcfs.json"))
    CHANGES[sentence](case["steps"][4])
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(case))
    assert re.fullmatch(rf"step 4 \(turn [45]\): {sentence}", replay_case(path) or "equal")


def test_missing_and_surplus_steps_are_reported(tmp_path: Path) -> None:
    case = json.loads(case_text("hand_01_single.json"))
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(case | {"steps": case["steps"][:-1]}))
    assert replay_case(path) == "step 3: 4 steps, recorded 3"
    path.write_text(json.dumps(case | {"steps": [*case["steps"], case["steps"][-1]]}))
    assert replay_case(path) == "step 4: 4 steps, recorded 5"


def test_wrong_totals_are_reported(tmp_path: Path) -> None:
    case = json.loads(case_text("hand_09_preempt_fcfs.json"))
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(case | {"total_preemptions": 2}))
    assert replay_case(path) == "total_preemptions: 1, recorded 2"
    case["outputs"]["c"]["token_steps"][-1] += 1
    path.write_text(json.dumps(case))
    assert (replay_case(path) or "").startswith("outputs of c: token_steps [1, 2, 3, 6, 7], recorded [1, 2, 3, 6, 8]")


# ---- broken files --------------------------------------------------------------------------------------------------


def hand_case(**changes: Any) -> dict[str, Any]:
    return json.loads(case_text("hand_01_single.json")) | changes


def without(case: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name != key}


BROKEN = {
    "line 1: not JSON": '{"config": ',
    "not a recorded schedule: it needs the keys config, requests and steps": json.dumps(without(hand_case(), "steps")),
    "not a recorded schedule": "[1, 2]",
    "config.block_size is None. Give a whole number": json.dumps(
        hand_case(config=without(hand_case()["config"], "block_size"))
    ),
    "config.max_num_seqs is 'many'": json.dumps(hand_case(config=hand_case()["config"] | {"max_num_seqs": "many"})),
    "requests[0].output_len is missing": json.dumps(
        hand_case(requests=[{"id": "a", "arrival_step": 0, "prompt_len": 10}])
    ),
    "requests[0] has neither prompt_len nor prompt_token_ids": json.dumps(
        hand_case(requests=[{"id": "a", "arrival_step": 0, "output_len": 10}])
    ),
    "requests[0]: 0 prompt and 4 output tokens. Give 1 or more": json.dumps(
        hand_case(requests=[{"id": "a", "arrival_step": 0, "prompt_len": 0, "output_len": 4}])
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_case_is_refused_in_one_line(sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(BROKEN[sentence])
    with pytest.raises(ValueError) as error:
        replay_case(path)
    assert str(error.value).startswith(f"{path}: {sentence}")
    assert "\n" not in str(error.value)


def test_case_that_is_not_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(b'{"config": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 at byte 12"):
        load_case(path)


def test_missing_case_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        replay_case(tmp_path / "nowhere.json")
