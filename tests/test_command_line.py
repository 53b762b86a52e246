"""A scenario as a command line: parsed again, it is the same scenario. And the command that starts the dashboard."""

import json
from dataclasses import fields, replace

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsim import cli_dashboard
from llmsim.cli import main
from llmsim.cli_options import SectionedCommand, scenario_from, scenario_options
from llmsim.command_line import argv_of, as_text, scenario_flags
from llmsim.engines import ENGINES
from llmsim.scenario import Scenario

PLAIN = Scenario(model="llama-3.1-8b", gpu="h100-sxm")


def parsed(words):
    """What `llmsim replay` makes of these flags."""
    made = []

    @click.command(cls=SectionedCommand)
    @scenario_options
    def command(**flags):
        made.append(scenario_from(flags))

    command.main(args=words, standalone_mode=False)
    return made[0]


# another value of every field than the usual one, under the engine vllm
CHANGED = {
    "tensor_parallel": 2, "replicas": 3, "router": "least_outstanding", "scheduling_policy": "priority",
    "scheduler": "sjf", "max_num_seqs": 17, "max_num_batched_tokens": 512, "max_model_len": 4096, "block_size": 32,
    "gpu_memory_utilization": 0.7, "enable_prefix_caching": False, "kv_cache_dtype": "fp8", "dtype": "float16",
    "quantization": "fp8", "num_gpu_blocks_override": 1000, "long_prefill_token_threshold": 64, "watermark": 0.01,
    "reserve_full_isl": False, "async_scheduling": False, "cudagraph": "none", "cost": "constant:0.01",
    "launch_jitter": False, "host_scale": 1.5, "concurrency": 9, "seed": 3, "eviction": "lfu",
    "kv_allocation": "max", "kv_tiers": "cpu:64GiB:50GB/s:10us,ssd:1TiB:5GB/s:100us", "kv_tier_write": "on_eviction",
    "kv_tier_prefetch": True, "preemption": "swap", "kv_compression": "window:512", "admission": "deadline",
    "swap_space_gib": 4.0, "engine": "sglang", "attention_kernel": "math", "activation_dtype": "bfloat16",
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "acceptance": 0.5},
}  # fmt: skip
WITH = {  # what else a field needs
    "enable_chunked_prefill": {"enable_chunked_prefill": False, "max_num_batched_tokens": 131072},
    "kernel_fusion": {"kernel_fusion": "custom", "cudagraph": "none"},
    "scheduler_args": {"scheduler": "mlfq", "scheduler_args": {"quantum_s": 0.05}},
    "router_args": {"router": "examples/prefix_affinity.py:PrefixAffinity", "router_args": {"seed": "1"}},
    "eviction_args": {"eviction": "ttl", "eviction_args": {"seconds": 5}},
    "kv_allocation": {"kv_allocation": "max", "enable_prefix_caching": False},
    "kv_compression": {"kv_compression": "window:512", "enable_prefix_caching": False},
    "kv_tier_write": {"kv_tiers": "cpu:64GiB:50GB/s:10us", "kv_tier_write": "on_eviction"},
    "kv_tier_prefetch": {"kv_tiers": "cpu:64GiB:50GB/s:10us", "kv_tier_prefetch": True},
    "preemption": {"preemption": "swap", "swap_space_gib": 4.0},
    "admission_args": {"admission": "queue-depth", "admission_args": {"most": 7}},
}


@pytest.mark.parametrize("name", [field.name for field in fields(Scenario) if field.name not in ("model", "gpu")])
def test_every_field_survives_its_flag(name):
    changed = replace(PLAIN, **(WITH[name] if name in WITH else {name: CHANGED[name]}))
    assert parsed(scenario_flags(changed)) == changed != PLAIN


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_has_by_itself_is_left_out(engine):
    scenario = Scenario(model="llama-3.1-8b", gpu="h100-sxm", engine=engine)
    usual = [] if engine == "vllm" else ["--engine", engine]
    assert sorted(scenario_flags(scenario)) == sorted(["--model", "llama-3.1-8b", "--gpu", "h100-sxm", *usual])
    assert parsed(scenario_flags(scenario.resolved())).resolved() == scenario.resolved()


@given(st.dictionaries(st.sampled_from(sorted(CHANGED)), st.none(), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_of_them_together_survive(names):
    try:
        changed = replace(PLAIN, **{name: CHANGED[name] for name in names})
    except ValueError:
        return  # no engine would start so
    assert parsed(scenario_flags(changed)) == changed


def test_text_that_looks_like_a_number_stays_text():
    args = {"a": "5", "b": 5, "c": "true", "d": "plain", "e": [1, 2]}
    words = scenario_flags(replace(PLAIN, scheduler="mine.py:Mine", scheduler_args=args))
    assert parsed(words).scheduler_args == args


def test_the_line_is_one_for_a_shell():
    words = argv_of(PLAIN, trace=["a b.csv", "--time-scale", "0.5"], goodput={"ttft": 500.0, "tpot": 50.0})
    assert as_text(words) == (
        "llmsim replay 'a b.csv' --time-scale 0.5 --model llama-3.1-8b --gpu h100-sxm --goodput ttft:500 tpot:50"
    )


def test_the_dashboard_serves_this_machine_alone_and_calls_nobody():
    command = cli_dashboard.command_of(8650)
    assert {"--server.address=127.0.0.1", "--browser.gatherUsageStats=false", "--server.port=8650"} <= set(command)
    assert "--server.headless=true" in command and "--server.headless=false" in cli_dashboard.command_of(8650, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "99999"], "--port 99999: ports go from 1 to 65535"),
        (["no/such/run"], "no/such/run: not a run folder"),
    ],
)
def test_the_dashboard_is_refused_in_one_line(words, line, capsys):
    assert main(["dashboard", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_without_streamlit_the_dashboard_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli_dashboard, "find_spec", lambda name: None)
    assert main(["dashboard"]) == 2
    assert 'needs streamlit and altair: pip install "llmsim[dashboard]"' in capsys.readouterr().err


def test_the_dashboard_replaces_this_process_and_hands_the_runs_on(monkeypatch, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    called = []
    monkeypatch.setattr(cli_dashboard.os, "execve", lambda *call: called.append(call))
    monkeypatch.setattr(cli_dashboard, "_check_free", lambda port: None)  # somebody may look at a dashboard meanwhile
    assert main(["dashboard", str(tmp_path), "--no-browser"]) == 0
    ((program, command, environment),) = called
    assert program == command[0] and command[4].endswith("app.py")
    assert json.loads(environment[cli_dashboard.RUNS_VARIABLE]) == [str(tmp_path)]


def test_a_port_in_use_is_named(capsys, monkeypatch):
    import socket

    monkeypatch.setattr(cli_dashboard.os, "execve", lambda *_: pytest.fail("a server was started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["dashboard", "--port", str(port)]) == 2
    line = capsys.readouterr().err
    assert line == f"error: --port {port}: Address already in use on 127.0.0.1: give another one\n"
