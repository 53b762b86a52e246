"""The page of policies, every widget of it, without a browser."""

from __future__ import annotations

from functools import partial

import pytest
from pages import charts, commands, errors, linked

SESSIONS = "sessions.jsonl"
opened = partial(linked, "policies", base_more="cost=constant:0.02")  # no profile is read


def test_differences_and_their_command_line() -> None:
    at = opened()
    assert not errors(at) and charts(at) == 6
    assert at.multiselect(key="pol_sides").value == ["vllm", "vllm-v0", "vtc", "engine=sglang"]
    table = at.dataframe[0].value
    assert list(table["side"]) == at.multiselect(key="pol_sides").value
    assert "--scheduler vllm --scheduler vllm-v0 --scheduler vtc --set engine=sglang" in commands(at)
    assert "--goodput ttft:500 tpot:50" in commands(at)
    at.multiselect(key="pol_sides").set_value(["vllm", "max_num_seqs=2"])
    at.slider(key="pol_seeds").set_value(2).run()
    assert "--seeds 2" in commands(at)
    assert not at.exception and not errors(at)
    assert list(at.dataframe[0].value["side"]) == ["vllm", "max_num_seqs=2"]


def test_a_percentile_from_few_requests_is_said_to_be() -> None:
    at = opened(pol_view="Fairness", pol_classes="tenants:flood=0.9,small=0.1", trace_from="synthetic", trace_n="400")
    said = "\n".join(caption.value for caption in at.caption)
    small = at.dataframe[1].value.set_index("group").loc["small", "completed"].min()
    assert f"P99 of small from {small} requests; 368 are needed to bound it" in said
    assert "P99 of flood" in said and "P99 from" not in said  # 0.9 of 400 are too few as well, 400 are not


def test_promises_are_those_of_the_sliders() -> None:
    at = opened()
    at.select_slider(key="slo_ttft").set_value(1000).run()
    at.select_slider(key="slo_tpot").set_value(20).run()
    assert "--goodput ttft:1000 tpot:20" in commands(at)


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (["vllm", "no-such-policy"], "unknown scheduler 'no-such-policy'"),
        (["vllm", "missing.py:Mine"], "no file missing.py"),
        (["vllm", "max_num_seqs=many"], "not a whole number"),
        (["vllm", "engine=vlm"], "engine='vlm' is unknown"),
        (["vllm"], "one side to compare"),
        (["scheduler=sjf,scheduler.nonsense=1"], "unknown argument 'nonsense'"),
    ],
)
def test_what_is_no_side_is_refused_in_place(sides: list[str], said: str) -> None:
    at = opened()
    at.multiselect(key="pol_sides").set_value(sides).run()
    assert not at.exception
    assert any(said in error for error in errors(at)), errors(at)
    assert charts(at) == 0


def test_goodput_against_rate() -> None:
    at = opened(pol_view="Goodput", pol_low="1", pol_high="9")
    assert not errors(at) and charts(at) == 2
    at.slider(key="pol_rates").set_value(3).run()
    assert [line.rpartition(" ")[2] for line in commands(at).splitlines()] == ["1.0", "5.0", "9.0"]
    before = at.dataframe[0].value["carried_rate"].tolist()
    at.slider(key="pol_share").set_value(50.0).run()
    assert (at.dataframe[0].value["carried_rate"].fillna(0) >= before).all()
    at.number_input(key="pol_high").set_value(0.5).run()
    assert any("the lower one first" in error for error in errors(at))
    assert at.button(key="pol_rates_job_start").label == "Run the whole trace"


def test_fairness_draws_tenants_where_there_are_none() -> None:
    at = opened(pol_view="Fairness")
    assert not errors(at) and charts(at) == 4 + 2  # service under each side; latency by tenant
    assert any("assigned, not in the trace: 2 tenants" in caption.value for caption in at.caption)
    assert "--assign-classes tenants:flood=0.8,small=0.2" in commands(at)
    at.text_input(key="pol_classes").set_value("gold:0.2:ttft=100ms;free:0.8:ttft=1s").run()
    assert not errors(at) and charts(at) == 2
    assert set(at.dataframe[0].value["group"]) == {"gold", "free"}
    at.text_input(key="pol_classes").set_value("").run()
    assert any("names no tenant and no class" in error for error in errors(at))
    at.text_input(key="pol_classes").set_value("tenants:a=0.5,b=0.6").run()
    assert any("add up to 1.1" in error for error in errors(at))


def test_the_cache_of_a_trace_with_prefixes() -> None:
    at = opened(pol_view="KV cache", trace=SESSIONS, pol_blocks="3000", pol_sizes="3")
    assert not errors(at) and charts(at) == 3
    assert "llmsim trace reuse" in commands(at) and "--eviction belady" in commands(at)
    assert "--num-gpu-blocks-override 3000" in commands(at) and "--kv-tier cpu:16GiB:50GB/s:10us" in commands(at)
    assert list(at.dataframe[0].value["side"]) == ["lru", "lfu", "belady", "lru + cpu"]
    at.multiselect(key="pol_evictions").set_value(["lru"])
    at.text_input(key="pol_tiers").set_value("").run()
    assert not errors(at) and list(at.dataframe[0].value["side"]) == ["lru"] and charts(at) == 2
    at.text_input(key="pol_tiers").set_value("cpu:lots").run()
    assert any("write name:capacity:bandwidth:latency" in error for error in errors(at))
    at.text_input(key="pol_tiers").set_value("")
    at.number_input(key="pol_blocks").set_value(3).run()
    assert any("requests are rejected" in error for error in errors(at)) and not at.exception
    at.multiselect(key="pol_evictions").set_value(["most-recent"]).run()
    assert any("unknown eviction 'most-recent'" in error for error in errors(at))


def test_a_trace_without_prefixes_says_so_and_is_replayed_all_the_same() -> None:
    at = opened(pol_view="KV cache")
    assert errors(at) == ["chat.csv: names no prefix blocks, so nothing is shared: use a trace with hash ids"]
    assert charts(at) == 2 and at.dataframe[0].value["prefix_cache_hit_rate"].max() == 0.0


def test_an_impossible_set_up_is_said_in_the_sidebar() -> None:
    at = opened()
    at.text_input(key="base_more").set_value("max_num_seqs=0").run()
    assert not at.exception and any("max_num_seqs=0" in error for error in errors(at))
    assert charts(at) == 0
