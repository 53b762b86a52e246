"""Specifications of sweeps: which runs they list, and that every mistake is one line that says where."""

from __future__ import annotations

import itertools
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from llmsim.scenario import Scenario
from llmsim.sweep_spec import options_of, scenario_of
from llmsim.sweep_yaml import read_spec

BASE = {"trace": "a.csv", "scenario": {"model": "llama-3.1-8b", "gpu": "h100-sxm"}}


def refusal(tmp_path: Path, text: str) -> str:
    """The message about a file, without the folder."""
    path = tmp_path / "s.yaml"
    path.write_text(dedent(text).lstrip(), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_spec(path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")


def test_runs_are_the_product_of_the_axes_the_last_one_fastest() -> None:
    spec = read_spec(
        BASE
        | {
            "seeds": [7, 9],
            "grid": {"rate": [4, 8.5], "trace": ["a.csv", "b.csv"]},
            "linked": [{"gpu": ["h100-sxm", "h200-sxm"], "max_num_seqs": [64, "1k"]}],
            "scenarios": [{"name": "big", "max_num_batched_tokens": 8192}, {"engine": "sglang"}],
        }
    )
    assert spec.columns == ("scenario", "gpu", "max_num_seqs", "rate", "trace", "seed")
    gpus = [("h100-sxm", 64), ("h200-sxm", 1000)]
    expected = [
        (name, *gpu, rate, trace, seed)
        for name in ("big", "engine=sglang")
        for gpu in gpus
        for rate in (4.0, 8.5)
        for trace in ("a.csv", "b.csv")
        for seed in (7, 9)
    ]
    assert spec.runs == len(expected) == 32
    assert [spec.run(at)[0] for at in range(32)] == expected
    settings = spec.run(13)[1]  # big, h200-sxm, 8.5, a.csv, 9... counted by hand: 13 = 0·16 + 1·8 + 1·4 + 0·2 + 1
    assert scenario_of(settings) == {
        "model": "llama-3.1-8b", "gpu": "h200-sxm", "max_num_seqs": 1000, "max_num_batched_tokens": 8192, "seed": 9,
    }  # fmt: skip
    assert options_of(settings) == {"rate": 8.5}
    assert settings["trace"] == "a.csv"


def test_a_file_and_a_dict_of_its_shape_are_the_same_specification(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "# a comment\ntrace: a.csv\nscenario: {model: llama-3.1-8b,\n   gpu: h100-sxm}\n\ngrid:\n  rate: [1e0, 2]\n"
    )
    assert read_spec(path).digest == read_spec(BASE | {"grid": {"rate": [1, 2.0]}}).digest
    assert read_spec(path).digest != read_spec(BASE | {"grid": {"rate": [2, 1]}}).digest


def test_another_scheduler_does_not_take_the_arguments_of_the_first() -> None:
    base = {"trace": "a.csv", "scenario": BASE["scenario"] | {"scheduler": "chunked", "scheduler.headroom": 0.5}}
    spec = read_spec(base | {"grid": {"scheduler": ["vllm", "chunked"]}})
    assert [scenario_of(spec.run(at)[1]).get("scheduler_args") for at in range(2)] == [None, None]
    spec = read_spec(base | {"grid": {"scheduler.headroom": [0.1, 0.2], "scheduler": ["chunked"]}})
    assert [scenario_of(spec.run(at)[1])["scheduler_args"] for at in range(2)] == [{"headroom": 0.1}, {"headroom": 0.2}]
    spec = read_spec(base | {"grid": {"engine": ["sglang"]}})
    assert "scheduler" not in scenario_of(spec.run(0)[1])


def test_a_scenario_file_is_what_all_runs_have(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "llama-3.1-8b"\ngpu = "h100-sxm"\nscheduler = "chunked"\nscheduler_args = {headroom = 0.2}\n'
    )
    spec = read_spec({"trace": {"path": "a.csv", "limit": "2k"}, "scenario": str(path), "seeds": 3})
    assert Scenario.from_dict(scenario_of(spec.run(2)[1])) == Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", scheduler="chunked", scheduler_args={"headroom": 0.2}, seed=2
    )
    assert options_of(spec.run(2)[1]) == {"limit": 2000}


def test_a_specification_without_axes_is_one_run() -> None:
    spec = read_spec(BASE)
    assert (spec.runs, spec.columns, spec.run(0)[0]) == (1, (), ())


def test_every_combination_of_a_large_grid_once() -> None:
    spec = read_spec(BASE | {"grid": {"max_num_seqs": list(range(1, 101)), "rate": list(range(1, 11))}, "seeds": 10})
    assert spec.runs == 10_000
    found = {spec.run(at)[0] for at in range(spec.runs)}
    assert found == set(itertools.product(range(1, 101), map(float, range(1, 11)), range(10)))


HEAD = """
    trace: a.csv
    scenario: {model: llama-3.1-8b, gpu: h100-sxm}
    """


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("grids:\n      rate: [1]", 3, "unknown key 'grids'. Did you mean 'grid'?"),
        ("grid:\n      max_num_seq: [1]", 4, "grid: unknown field 'max_num_seq'. Did you mean 'max_num_seqs'?"),
        ("grid:\n      rate: 8", 4, "grid: rate is not a list: write [8, …]"),
        ("grid:\n      rate: []", 4, "grid: rate is an empty list: give values, or leave it out"),
        ("grid:\n      rate:\n      - 4\n      - fast", 6, "grid: rate: 'fast' is not a number"),
        ("grid:\n      max_num_seqs: [4, 2.5]", 4, "grid: max_num_seqs: 2.5 is not a whole number"),
        ("grid:\n      max_num_seqs: [true]", 4, "grid: max_num_seqs: True is not a whole number"),
        ("grid:\n      rate: [4, 8, 4]", 4, "grid: rate: 4.0 is given twice: leave one out"),
        ("grid:\n      rate: [4]\n      rate: [8]", 5, "grid: rate is given twice: keep one"),
        ("grid:\n      seed: [4]", 4, "grid: seeds have a place of their own: write seeds: [0, 1, 2]"),
        ("grid:\n      schedular.headroom: [4]", 4,
         "grid: unknown field 'schedular.headroom'. Arguments are written KIND.NAME, with router,"
         " scheduler, eviction, admission"),
        ("linked:\n      - {gpu: [a, b], rate: [1]}", 4,
         "linked: lists of one length are taken together, and gpu has 2, rate has 1 values"),
        ("linked:\n      - {gpu: [a, b]}", 4, "linked: fewer than two names: one alone belongs into grid"),
        ("scenarios:\n      - {max_num_seqs: 1}\n      - {max_num_seqs: 1}", 5,
         "scenarios: max_num_seqs=1 is given twice: give them names of their own"),
        ("seeds: 0", 3, "seeds: 0: give how many, 1 to 10000000, or a list of them"),
        ("seeds: [1, 1]", 3, "seeds: 1 is given twice: keep one"),
        ("goodput: {tttf: 500}", 3, "goodput: 'tttf' is not one of ttft, tpot, e2el. Did you mean 'ttft'?"),
        ("goodput: {ttft: 500ms}", 3, "goodput: ttft: '500ms' is not milliseconds: write ttft: 500"),
        ("grid:\n      trace: [{path: b.csv, rat: 3}]", 4, "trace: unknown option 'rat'. Did you mean 'rate'?"),
        ("grid:\n      trace: ['-']", 4, "trace: standard input cannot be read once for each run: save it to a file"),
        ("grid: {rate: [1]}\n    scenarios: [{max_num_seqs: 4, rate: 2}]", 0,
         "rate is set by scenario and by rate: leave one of them out"),
        ("grid: [", 3, "not valid YAML: expected the node content, but found '<stream end>'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    where = f"s.yaml, line {line}" if line else "s.yaml"
    assert refusal(tmp_path, dedent(HEAD).lstrip() + dedent("    " + text)) == f"{where}: {message}"


def test_what_every_run_needs_is_asked_for(tmp_path: Path) -> None:
    assert refusal(tmp_path, "trace: a.csv\nscenario: {model: x}") == (
        "s.yaml: no gpu for every run: add scenario: {gpu: NAME}"
    )
    assert refusal(tmp_path, "scenario: {model: x, gpu: y}") == "s.yaml: no trace for every run: add trace: PATH"
    assert "scenarios" in refusal(tmp_path, "# nothing\n")
    assert refusal(tmp_path, "scenario: nowhere.toml\ntrace: a").startswith(
        "s.yaml, line 1: scenario: nowhere.toml: no such file"
    )
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml: no such file"):
        read_spec(tmp_path / "nowhere.yaml")


def test_a_dict_has_no_lines() -> None:
    with pytest.raises(ValueError, match=r"^spec: grid: rate is not a list: write \[8, …\]$"):
        read_spec(BASE | {"grid": {"rate": 8}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": {"rate": [float("nan")]}}, "grid: rate: nan is not a number: give one"),
        ({"grid": {"rate": [float("-inf")]}}, "grid: rate: -inf is not finite: give one"),
        ({"seeds": 1_000_000_000}, "seeds: 1000000000: give how many, 1 to 10000000, or a list of them"),
        ({"scenario": 7}, "scenario: 7 is neither a table of fields nor a file of them"),
    ],
)
def test_values_that_cannot_be_meant(change: dict[str, Any], said: str) -> None:
    given = {"trace": "x.csv", "scenario": {"model": "llama-3.1-8b", "gpu": "h100-sxm"}} | change
    with pytest.raises(ValueError, match=said):
        read_spec(given)


def test_no_shards_are_no_shard() -> None:
    from llmsim.sweep import shard_of

    with pytest.raises(ValueError, match="shard 1/0: there are no 0 shards: write i/n, the first of four is 1/4"):
        shard_of("1/0")
