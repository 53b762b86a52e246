"""Scenario: vLLM's defaults for each GPU, and one sentence for every setting an engine would refuse."""

from __future__ import annotations

import json
import tomllib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsim.scenario import Scenario
from llmsim.scenario_file import human_int, read_scenario


def scenario(**changes: Any) -> Scenario:
    return Scenario(**{"model": "llama-3.1-8b", "gpu": "h100-sxm", **changes})


# vLLM 0.25, API server: 8192 / 1024 from 70 GiB on unless it is an A100, else 2048 / 256
@pytest.mark.parametrize(
    ("gpu", "tokens", "seqs"),
    [
        ("h100-sxm", 8192, 1024),
        ("h200-sxm", 8192, 1024),
        ("b200", 8192, 1024),
        ("mi300x", 8192, 1024),
        ("a100-80gb-sxm", 2048, 256),
        ("a100-40gb-sxm", 2048, 256),
        ("l40s", 2048, 256),
        ("rtx-4090", 2048, 256),
    ],
)
def test_default_limits_are_vllms_for_the_gpu(gpu: str, tokens: int, seqs: int) -> None:
    resolved = scenario(gpu=gpu).resolved()
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (tokens, seqs)


def test_context_defaults_to_the_models() -> None:
    assert scenario().resolved().max_model_len == 131072
    assert scenario(model="qwen3-8b").resolved().max_model_len == 40960


def test_default_tokens_cover_a_whole_prompt_when_chunked_prefill_is_off() -> None:
    resolved = scenario(enable_chunked_prefill=False, max_model_len=20000).resolved()
    assert resolved.max_num_batched_tokens == 20000


def test_default_tokens_are_clipped_to_what_the_requests_could_need() -> None:
    assert scenario(max_num_seqs=2, max_model_len=100).resolved().max_num_batched_tokens == 200


def test_default_seqs_are_clipped_to_the_token_budget() -> None:
    assert scenario(max_num_batched_tokens=512).resolved().max_num_seqs == 512


def test_given_limits_stay_as_given() -> None:
    resolved = scenario(max_num_seqs=256, max_num_batched_tokens=16384, max_model_len=4096).resolved()
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens, resolved.max_model_len) == (256, 16384, 4096)


def test_resolving_twice_changes_nothing() -> None:
    once = scenario(quantization="awq", kv_cache_dtype="fp8_e4m3").resolved()
    assert once.resolved() == once


def test_element_types() -> None:
    plain = scenario()
    assert (plain.weight_dtype, plain.kv_dtype) == ("bfloat16", "bfloat16")
    quantised = scenario(quantization="awq", kv_cache_dtype="fp8_e5m2", dtype="half")
    assert (quantised.weight_dtype, quantised.kv_dtype) == ("int4", "fp8")
    assert scenario(dtype="half").kv_dtype == "float16"
    assert scenario(dtype="float").resolved().kv_dtype == "float32"


def test_published_quantisation_is_taken_over() -> None:
    assert scenario(model="gpt-oss-20b").resolved().quantization == "mxfp4"


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_num_seqs": 0}, ["max_num_seqs=0", "1 or more"]),
    ({"max_num_seqs": 2**70}, ["max_num_seqs=", "less than 2**63"]),
    ({"max_num_seqs": "8"}, ["max_num_seqs='8'", "a whole number"]),
    ({"max_num_seqs": True}, ["max_num_seqs=True", "a whole number"]),
    ({"replicas": 1.5}, ["replicas=1.5", "a whole number"]),
    ({"replicas": None}, ["replicas=None", "a whole number"]),
    ({"replicas": 0}, ["replicas=0", "1 or more"]),
    ({"tensor_parallel": -1}, ["tensor_parallel=-1", "1 or more"]),
    ({"seed": -1}, ["seed=-1", "0 or more"]),
    ({"concurrency": 0}, ["concurrency=0", "1 or more"]),
    ({"num_gpu_blocks_override": 1}, ["num_gpu_blocks_override=1", "2 or more"]),
    ({"block_size": 12}, ["block_size=12", "multiple of 8"]),
    ({"block_size": 0}, ["block_size=0", "multiple of 8"]),
    ({"gpu_memory_utilization": 0.0}, ["gpu_memory_utilization=0.0", "more than 0"]),
    ({"gpu_memory_utilization": 90}, ["gpu_memory_utilization=90", "at most 1"]),
    ({"gpu_memory_utilization": float("nan")}, ["gpu_memory_utilization=nan", "not finite"]),
    ({"watermark": 1.0}, ["watermark=1.0", "less than 1"]),
    ({"watermark": -0.1}, ["watermark=-0.1", "0 or more"]),
    ({"host_scale": 0.0}, ["host_scale=0.0", "half its speed"]),
    ({"host_scale": 1e308}, ["host_scale=1e+308", "at most 1000"]),
    ({"host_scale": float("inf")}, ["host_scale=inf", "not finite"]),
    ({"scheduling_policy": "sjf"}, ["scheduling_policy='sjf'", "fcfs, priority"]),
    ({"cudagraph": "full"}, ["cudagraph='full'", "full_and_piecewise"]),
    ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
    ({"kv_cache_dtype": "int2"}, ["kv_cache_dtype='int2'", "fp8"]),
    ({"quantization": "q4_k_m"}, ["quantization='q4_k_m'", "awq"]),
    ({"enable_prefix_caching": "no"}, ["enable_prefix_caching='no'", "true or false"]),
    ({"scheduler": " "}, ["scheduler is empty"]),
    ({"scheduler_args": []}, ["scheduler_args=[]", "a table"]),
    ({"max_num_batched_tokens": 128, "max_num_seqs": 256}, ["max_num_batched_tokens=128", "max_num_seqs=256", "Raise"]),
    (
        {"max_num_batched_tokens": 2048, "max_model_len": 8192, "enable_chunked_prefill": False},
        ["max_num_batched_tokens=2048", "max_model_len=8192", "chunked prefill"],
    ),
    ({"long_prefill_token_threshold": 4097, "max_model_len": 4096}, ["long_prefill_token_threshold=4097", "4096"]),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[str(changes)[:60] for changes, _ in REFUSED])
def test_refused_settings_are_named_with_their_value_and_the_fix(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        scenario(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


# these need the model's or the GPU's facts
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_model_len": 131073}, ["max_model_len=131073", "131072"]),
        ({"tensor_parallel": 3}, ["tensor_parallel=3", "1, 2, 4, 8"]),
        ({"gpu": "l40s", "max_num_seqs": 4096}, ["max_num_batched_tokens=2048", "max_num_seqs=4096"]),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}, ["max_model_len=131072"]),
        ({"long_prefill_token_threshold": 200000}, ["long_prefill_token_threshold=200000", "131072"]),
        ({"gpu": "h10"}, ["h10", "Did you mean"]),
        ({"model": "lama-3.1-8b"}, ["lama-3.1-8b", "Did you mean llama-3.1-8b"]),
    ],
)
def test_settings_that_contradict_the_model_or_gpu_are_refused(changes: dict[str, Any], said: list[str]) -> None:
    unresolved = scenario(**changes)
    with pytest.raises(ValueError) as caught:
        unresolved.resolved()
    for part in said:
        assert part in str(caught.value)


def test_a_scenario_cannot_be_changed_and_can_be_a_key() -> None:
    one = scenario(scheduler_args={"quantum_s": 0.1})
    with pytest.raises(FrozenInstanceError):
        one.seed = 1  # type: ignore[misc]
    assert {one: "a"}[replace(one)] == "a"


def test_two_scenarios_do_not_share_their_arguments() -> None:
    scenario().scheduler_args["x"] = 1
    assert scenario().scheduler_args == {}


def test_dict_round_trip() -> None:
    one = scenario(max_num_seqs=64, scheduler_args={"headroom": 0.02}, quantization="fp8")
    assert Scenario.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"fleet\.toml: unknown field 'max_num_seq'.*'max_num_seqs'"):
        Scenario.from_dict({"model": "llama-3.1-8b", "gpu": "h100", "max_num_seq": 3}, source="fleet.toml")


def test_model_and_gpu_are_required() -> None:
    with pytest.raises(ValueError, match="no gpu: add gpu = NAME"):
        Scenario.from_dict({"model": "llama-3.1-8b"})


names = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(model=names, args=st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-9, 9), st.booleans(), names)))
def test_toml_round_trip_of_any_text(model: str, args: dict[str, Any]) -> None:
    one = Scenario(model=model, gpu="h100-sxm", scheduler_args=args, host_scale=1.25)
    assert Scenario.from_dict(tomllib.loads(one.to_toml())) == one


def test_files_in_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('model = "qwen3-8b"\ngpu = "h200"\nmax_num_seqs = 8\n[scheduler_args]\nx = 1\n')
    (tmp_path / "a.json").write_text(json.dumps(read_scenario(tmp_path / "a.toml")))
    assert read_scenario(tmp_path / "a.json") == {
        "model": "qwen3-8b",
        "gpu": "h200",
        "max_num_seqs": 8,
        "scheduler_args": {"x": 1},
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.toml", b"model = ", "not valid TOML"),
        ("a.json", b'{"model": 1', "not valid JSON"),
        ("a.json", b'{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("a.json", b"[1]", "not a list"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.yaml", b"model: x", ".toml or .json"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.(toml|json|yaml)") as caught:
        read_scenario(tmp_path / name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("25.6k", 25600),
        ("1M", 2**20),
        ("1m", 10**6),
        ("-1", -1),
        ("2g", 2 * 10**9),
    ],
)
def test_human_integers_are_vllms(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.5K", "1e3", "8 k", "8kb", "0x10", "1.2345k", "١k!"])
def test_other_integers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        human_int(text)
