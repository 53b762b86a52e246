"""What pages say of the requests behind their numbers, and that the commands they offer are about the same ones."""

import json
import shlex
from pathlib import Path

import pytest
from pages import captions, errors, linked, warnings

from llmsim.choice import on_disk
from llmsim.cli import main
from llmsim.scenario import Scenario
from llmsim.trace import load_trace

SMALL = {"trace_from": "synthetic", "trace_n": "60", "trace_rate": "20"}
MODEL_TOKENS = 131_072  # of llama-3.1-8b
PAGES = {
    "what_if": {},
    "requests": {},
    "calibration": {"ca_tab": "This run"},
    "policies": {},
    "plan": {"plan_more": "cost=constant:0.02", "plan_rate": "20"},
}


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """40 requests, every fourth longer than the model's context."""
    path = tmp_path_factory.mktemp("long") / "long.csv"
    rows = (f"{0.2 * i},{MODEL_TOKENS if i % 4 == 0 else 100 + i},20" for i in range(40))
    path.write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


def test_a_model_s_context_counts_whether_or_not_the_scenario_names_it(long: Path):
    from dataclasses import replace

    choice, scenario = replace(on_disk(long), over_context="drop"), Scenario("llama-3.1-8b", "h100-sxm")
    expected = load_trace(long, over_context="drop", context_tokens=MODEL_TOKENS)
    for one in (scenario, scenario.resolved()):
        trace = choice.load(None, one)
        assert len(trace) == choice.size(one) == 30 and trace.prompt_tokens.tolist() == expected.prompt_tokens.tolist()
    assert "10 of 40 rows dropped: longer than the context of 131072 tokens" in choice.notes(scenario)
    assert choice.size() == 40 and choice.quick(scenario) == 30


@pytest.mark.parametrize("name", PAGES)
def test_rows_that_were_dropped_are_told_and_left_out_of_every_count(name: str, long: Path):
    test = linked(name, trace_from="file", trace_path=str(long), trace_over="drop", **PAGES[name])
    assert not errors(test) and "10 of 40 rows dropped: longer than the context of 131072 tokens." in captions(test)
    assert " 40 requests" not in captions(test)
    if name != "calibration":  # whose command is about a load of its own
        assert "--over-context drop" in test.code[-1].value


def test_requests_that_a_page_does_not_replay_are_not_called_faster():
    test = linked("what_if", **SMALL, cand_more="num_gpu_blocks_override=20")
    (line,) = warnings(test)
    rejected, of = line.split(" requests")[0].split(" of ")
    assert 0 < int(rejected) < int(of) == 60 and "latencies are those of the others" in line
    faster = next(metric for metric in test.metric if metric.label.startswith("TTFT, P99"))
    assert faster.delta != "same" and faster.proto.color == faster.proto.MetricColor.GRAY


def test_the_commands_of_a_quick_answer_give_its_numbers(tmp_path, monkeypatch, capsys):
    sample = {"trace_from": "synthetic", "trace_n": "3000", "trace_output": "1000", "trace_rate": "20"}
    test = linked("what_if", **sample, base_more="cost=constant:0.02")
    (said,) = [line for line in captions(test).splitlines() if line.startswith("Quick answer on the first")]
    requests = said.split()[5].replace(",", "")
    make, baseline, _ = (shlex.split(line) for line in test.code[0].value.splitlines())
    assert baseline[baseline.index("--limit") + 1] == requests
    monkeypatch.chdir(tmp_path)
    assert main(make[1:]) == 0
    capsys.readouterr()
    assert main([*baseline[1:], "--json", "--no-out"]) == 0
    summary = json.loads(capsys.readouterr().out)
    ttft = test.dataframe or test.table
    shown = ttft[0].value["baseline"]["TTFT, P99 (ms)"]
    assert float(shown.replace(",", "")) == pytest.approx(summary["p99_ttft_ms"], rel=0.005)


def test_commands_of_samples_say_so_on_other_pages():
    trace = {"trace_from": "synthetic", "trace_n": "4000"}
    test = linked("policies", **trace, pol_sides=["vllm", "static"], base_more="cost=constant:0.02")
    assert "The first 2,000 of 4,000 requests." in captions(test) and "--limit 2000" in test.code[-1].value
    test = linked("plan", **trace, plan_more="cost=constant:0.02", plan_rate="20")
    one, whole = (code.value for code in test.code)
    sample = one.split("--limit ")[1].split()[0]
    assert f"Planned on the first {int(sample):,} of 4,000 requests." in captions(test)
    assert one.replace(f" --limit {sample}", "") == whole


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("what_if", {"cand_more": "replicas=1000000000"}, "replicas=1,000,000,000 is more than this page tries, 256"),
        ("policies", {"pol_sides": ["vllm", "replicas=5000"]}, "replicas=5,000 is more than this page tries, 256"),
        ("plan", {"plan_replicas": "1000000"}, "Replicas=1,000,000 is more than this page tries, 64"),
        ("plan", {"plan_rate": "1e5"}, "Rate to hold=100,000 is more than this page tries, 10,000"),
        ("plan", {"plan_most": "10000"}, "GPUs at most=10,000 is more than this page tries, 512"),
    ],
)
def test_what_a_page_does_not_try_is_refused_with_its_limit(name, asked, words):
    (line,) = errors(linked(name, **SMALL, **asked))
    assert line.startswith(words) and "takes any" in line
