"""The command line: what each command prints, and that wrong input is one sentence and exit status 2."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmsim import cli
from llmsim.cli_options import TRACE_PARAMETERS
from llmsim.cli_replay import Progress, demo_trace, replay
from llmsim.progress import PROGRESS_AFTER_S
from llmsim.scenario import Scenario

ROOT = Path(__file__).parents[1]
MACHINE = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", "constant:0.01"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Ten requests, a second apart: 64 prompt tokens, 11 output tokens."""
    path = tmp_path / "ten.csv"
    lines = [f"{second},64,11" for second in range(10)]
    path.write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default run folders are made in the working directory."""
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command wrote about wrong input."""
    assert cli.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.endswith(lines[0] + "\n")
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert cli.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmsim", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, text=True, capture_output=True, env=environment, timeout=60, check=False, **options)


# ---- help -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name}  ", text, re.MULTILINE)


@pytest.mark.parametrize("group", [[], ["trace"]])
def test_a_group_alone_prints_its_help(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Commands:" in printed(capsys, *group)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "trace"])  # a group: its commands have them
def test_help_of_a_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"llmsim {name} " in printed(capsys, name, "--help").partition("\n")[2]


def test_help_loads_no_library_but_click() -> None:
    code = "import sys; from llmsim.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = re.findall(r"'(\w+)'", done.stderr)
    assert "click" in loaded
    assert not {"numpy", "pandas", "pyarrow", "simpy", "msgspec", "scipy", "tomllib"} & set(loaded)


@pytest.mark.speed
def test_help_takes_less_than_150_ms_of_cpu() -> None:
    times = []
    for _ in range(3):  # the least of three: the machine may be busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert process("--help").returncode == 0
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(times) < 0.15


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version").startswith("llmsim, version ")


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_every_field_of_the_scenario_is_a_flag_without_a_default_of_its_own() -> None:
    params = {param.name: param for param in replay.params}
    for name in Scenario.__dataclass_fields__:
        assert name in params, name
    given_nothing: dict[str, Any] = {}
    with replay.make_context("replay", ["TRACE"]) as context:
        given_nothing = context.params
    assert {name: given_nothing[name] for name in Scenario.__dataclass_fields__ if given_nothing[name]} == {}


def test_every_trace_flag_is_a_parameter_of_load_trace() -> None:
    from llmsim.trace import load_trace

    known = set(inspect.signature(load_trace).parameters)
    assert {"model" if name == "trace_model" else name for name in TRACE_PARAMETERS} <= known
    assert {param.name for param in replay.params} >= TRACE_PARAMETERS


# ---- list -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpus", "h100-sxm"),
        ("models", "llama-3.1-8b"),
        ("schedulers", "vllm"),
        ("routers", "round_robin"),
        ("profiles", "h100-sxm"),
    ],
)
def test_list_as_a_table_and_as_json(kind: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, "list", kind, "--json"))
    assert expected in "".join(row["name"] for row in rows)
    lines = printed(capsys, "list", kind).splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].split()[0] == "name"


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["reply"], "Did you mean 'replay'"),
        (["xyzzy"], "Commands: replay, demo"),
        (["list", "gpu"], "'gpus'"),
        (["replay"], "TRACE"),
        (["replay", "TRACE", *MACHINE, "--max-num-seq", "8"], "Did you mean --max-num-seqs?"),
        (["replay", "TRACE", "--model", "llama-3.1-8b"], "no gpu: add --gpu NAME"),
        (["replay", "TRACE", "--gpu", "h100-sxm"], "no model: add --model NAME"),
        (["replay", "TRACE", "--gpu", "h10", "--model", "llama-3.1-8b"], "Did you mean h100-sxm"),
        (["replay", "TRACE", "--gpu", "h100-sxm", "--model", "lama-3.1-8b"], "Did you mean llama-3.1-8b"),
        (["replay", "TRACE", "--gpu", "h100-sxm", "--model", "none/config.json"], "none/config.json"),
        (["replay", "nothing.csv", *MACHINE], "nothing.csv"),
        (["replay", "TRACE", *MACHINE, "--max-num-seqs", "lots"], "'lots' is not a whole number"),
        (["replay", "TRACE", *MACHINE, "--max-num-seqs", "0"], "max_num_seqs=0"),
        (["replay", "TRACE", *MACHINE, "--gpu-memory-utilization", "nan"], "gpu_memory_utilization=nan"),
        (["replay", "TRACE", *MACHINE, "--gpu-memory-utilization", "0.1"], "does not fit on h100-sxm"),
        (["replay", "TRACE", *MACHINE, "--max-num-batched-tokens", "8", "--max-num-seqs", "16"], "max_num_seqs=16"),
        (["replay", "TRACE", *MACHINE, "-tp", "3"], "tensor_parallel=3"),
        (["replay", "TRACE", *MACHINE, "--cudagraph", "full"], "cudagraph='full'"),
        (["replay", "TRACE", *MACHINE, "--enforce-eager", "--cudagraph", "piecewise"], "--enforce-eager contradicts"),
        (["replay", "TRACE", *MACHINE, "--router", "nearest"], "'nearest'"),
        (["replay", "TRACE", *MACHINE, "--scheduler", "sjfq"], "'sjfq'"),
        (["replay", "TRACE", *MACHINE, "--scheduler", "mine.py:Mine"], "mine.py"),
        (["replay", "TRACE", *MACHINE, "--scheduler-arg", "policy"], "NAME=VALUE"),
        (["replay", "TRACE", *MACHINE, "--scheduler-arg", "colour=red"], "colour"),
        (["replay", "TRACE", *MACHINE, "--cost", "constant:x"], "constant:x"),
        (["replay", "TRACE", *MACHINE, "--cost", "guess"], "guess"),
        (["replay", "TRACE", *MACHINE, "--goodput", "ttft"], "ttft"),
        (["replay", "TRACE", *MACHINE, "--goodput", "latency:5"], "latency"),
        (["replay", "TRACE", *MACHINE, "--goodput", "ttft:-5"], "ttft:-5"),
        (["replay", "TRACE", *MACHINE, "--goodput", "ttft:1", "ttft:2"], "twice"),
        (["replay", "TRACE", *MACHINE, "--rate", "-1"], "rate"),
        (["replay", "TRACE", *MACHINE, "--rate", "fast"], "'fast'"),
        (["replay", "TRACE", *MACHINE, "--limit", "0"], "limit"),
        (["replay", "TRACE", *MACHINE, "--columns", "arrival"], "FIELD=COLUMN"),
        (["replay", "TRACE", *MACHINE, "--columns", "arrival=ts"], "ts"),
        (["replay", "TRACE", *MACHINE, "--format", "parquetto"], "parquetto"),
        (["replay", "TRACE", *MACHINE, "--scenario", "none.toml"], "none.toml"),
        (["replay", "TRACE", *MACHINE, "--no-out", "--timeline"], "--no-out contradicts --timeline"),
        (["replay", "TRACE", *MACHINE, "--out", "TRACE"], "not an empty folder"),
        (["replay", "TRACE", *MACHINE, "--out", "/proc/here"], "/proc"),
        (["replay", "TRACE", *MACHINE, "--max-model-len", "70"], "longer than the context of 70"),
        (["demo", "--gpu", "abacus"], "abacus"),
        (["from-vllm", "ls -l"], "no 'vllm serve'"),
        (["from-vllm"], "COMMAND"),
        (["validate"], "PATH"),
        (["validate", "nowhere"], "nowhere"),
        (["validate", "TRACE"], "ten.csv"),
        (["validate", "."], "requests.json.gz"),
    ],
)
def test_wrong_input_is_one_line(
    args: list[str], said: str, trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert said in refused(capsys, *(str(trace) if arg == "TRACE" else arg for arg in args))
    assert sorted(tmp_path.iterdir()) == before


def test_debug_shows_the_traceback_before_the_line(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(trace), *MACHINE, "--seed", "-1", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: seed=-1")


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["replay", "t.csv"], "read part of the trace with --limit N"),
        (["trace", "describe", "t.csv"], "read part of the trace with --limit N"),
        (["validate", "folder"], "give it smaller files, fewer of them, or more memory"),
    ],
)
def test_too_little_memory_names_the_command_and_a_fix_that_it_has(
    args: list[str], fix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: list[str]) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_run", full)
    said = f"error: not enough memory on this machine for llmsim {' '.join(args)}: {fix}"
    assert refused(capsys, *args) == said


def test_an_error_in_a_users_policy_keeps_its_traceback(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def schedule(self, replica, now_s):\n        return {}['slot']\n"
    )
    done = process("replay", trace, *MACHINE, "--scheduler", f"{tmp_path}/mine.py:Mine", cwd=tmp_path)
    assert done.returncode == cli.INTERNAL
    assert "mine.py" in done.stderr
    assert "KeyError: 'slot'" in done.stderr


def test_a_policy_that_does_nothing_is_a_policy_error(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("idle.py").write_text("class Idle:\n    def schedule(self, replica, now_s):\n        return None\n")
    assert "Idle" in refused(capsys, "replay", trace, *MACHINE, "--no-out", "--scheduler", "idle.py:Idle")


# ---- replay ---------------------------------------------------------------------------------------------------------


def test_replay_prints_vllms_block_and_writes_a_run_folder(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "replay", trace, *MACHINE, "--out", "run", "--timeline", "--save-detailed")
    assert "Serving Benchmark Result" in text
    assert re.search(r"^Successful requests: +10$", text, re.MULTILINE)
    assert re.search(r"^Total generated tokens: +110$", text, re.MULTILINE)
    assert "Results: run" in text
    written = {path.name for path in Path("run").iterdir()}
    assert written == {"summary.json", "requests.parquet", "iterations.parquet", "manifest.json", "trace.json.gz"}
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["command"][:2] == ["llmsim", "replay"]
    assert manifest["trace"]["name"] == "ten.csv"
    assert manifest["scenario"]["max_num_seqs"] == 1024
    assert json.loads(Path("run/summary.json").read_text())["output_lens"] == [11] * 10


def test_a_constant_step_gives_the_latencies_one_can_add_up(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten requests that never meet: one step of 10 ms to the first token, ten more to the last."""
    summary = json.loads(printed(capsys, "replay", trace, *MACHINE, "--no-out", "--json"))
    assert summary["mean_ttft_ms"] == pytest.approx(10.0)
    assert summary["mean_tpot_ms"] == pytest.approx(10.0)
    assert summary["mean_e2el_ms"] == pytest.approx(110.0)
    assert summary["duration"] == pytest.approx(9.11)


def test_json_is_the_only_thing_on_stdout(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(trace), *MACHINE, "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert out.count("\n") == 1
    assert summary["completed"] == 10
    assert "ten.csv" in err  # what the reader guessed
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_[0-9a-f]{6}(-\d+)?", summary["run_folder"])
    assert Path(summary["run_folder"], "summary.json").is_file()


def test_no_out_writes_nothing(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "replay", trace, *MACHINE, "--no-out")
    assert list(tmp_path.iterdir()) == [trace]


def test_the_same_command_gives_the_same_bytes(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        printed(capsys, "replay", trace, "--model", "qwen3-8b", "--gpu", "h100-sxm", "--seed", 7, "--out", name)
    for name in ("summary.json", "requests.parquet", "iterations.parquet"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_goodput_takes_several_words_wherever_it_stands(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms: list[list[object]] = [
        ["--goodput", "ttft:500", "tpot:5", trace],
        [trace, "--goodput", "ttft:500", "tpot:5"],
        [trace, "--goodput", "ttft:500", "--goodput=tpot:5"],
    ]
    for form in forms:
        summary = json.loads(printed(capsys, "replay", *form, *MACHINE, "--no-out", "--json"))
        assert summary["slo"] == {"ttft": 500.0, "tpot": 5.0}
        assert summary["request_goodput"] == 0.0  # 10 ms a token: none within 5 ms


def test_underscores_and_suffixes_as_in_vllm(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max_num_seqs=16", "--max-model-len", "32k", "--no_enable_prefix_caching", "-tp", "2"]
    printed(capsys, "replay", trace, *MACHINE, *flags, "--out", "run")
    scenario = json.loads(Path("run/manifest.json").read_text())["scenario"]
    assert (scenario["max_num_seqs"], scenario["max_model_len"]) == (16, 32000)
    assert (scenario["enable_prefix_caching"], scenario["tensor_parallel"]) == (False, 2)


def test_a_trace_from_standard_input(trace: Path) -> None:
    done = process("replay", "-", *MACHINE, "--no-out", "--json", input=trace.read_text())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completed"] == 10


def test_flags_override_a_scenario_file(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(
        'model = "llama-3.1-8b"\ngpu = "h100-sxm"\ncost = "constant:0.01"\nmax_num_seqs = 4\nblock_size = 32\n'
    )
    printed(capsys, "replay", trace, "--scenario", "s.toml", "--max-num-seqs", 5, "--out", "run")
    scenario = json.loads(Path("run/manifest.json").read_text())["scenario"]
    assert (scenario["max_num_seqs"], scenario["block_size"]) == (5, 32)


def test_a_wrong_scenario_file_names_the_file_and_the_field(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text('model = "llama-3.1-8b"\ngpu = "h100-sxm"\nmax_num_seq = 4\n')
    line = refused(capsys, "replay", trace, "--scenario", "s.toml")
    assert "s.toml" in line
    assert "'max_num_seq'" in line
    assert "'max_num_seqs'" in line


def test_trace_options_reach_the_reader(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--limit", 4, "--rate", 10]
    summary = json.loads(printed(capsys, "replay", trace, *MACHINE, *flags, "--no-out", "--json"))
    assert summary["completed"] == 4
    assert summary["duration"] < 1.0  # four requests at 10 a second, not at 1


def test_columns_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.csv").write_text("when,a,b\n0,10,5\n1,10,5\n")
    flags = ["--columns", "arrival=when,prompt=a,output=b"]
    summary = json.loads(printed(capsys, "replay", "odd.csv", *MACHINE, *flags, "--no-out", "--json"))
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (20, 10)


def test_requests_over_the_context_are_refused_dropped_or_truncated(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trace.open("a") as file:
        file.write("10,5000,11\n")
    short = [*MACHINE, "--max-model-len", "4096", "--no-out"]
    line = refused(capsys, "replay", trace, *short)
    for part in ("ten.csv", "4096", "5000", "--over-context"):
        assert part in line
    for action, completed in (("drop", 10), ("truncate", 11)):
        out = printed(capsys, "replay", trace, *short, "--over-context", action, "--json")
        assert json.loads(out)["completed"] == completed


def test_strict_refuses_what_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.csv").write_text("arrival_time_s,prompt_tokens,output_tokens\n0,120000,5\n")
    shared = ["replay", "long.csv", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--no-out"]
    assert "Outside the measured range" in printed(capsys, *shared)
    assert "--strict" in refused(capsys, *shared, "--strict")


def test_own_policy_and_its_arguments(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--scheduler", "chunked", "--scheduler-arg", "headroom=0.02"]
    printed(capsys, "replay", trace, *MACHINE, *flags, "--out", "run")
    assert json.loads(Path("run/manifest.json").read_text())["scenario"]["scheduler_args"] == {"headroom": 0.02}


OWN_ROUTER = """
class Always:
    def __init__(self, index):
        self.index = index

    def route(self, request, replicas, now_s):
        return replicas[self.index]
"""


def test_own_router_and_its_arguments(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(OWN_ROUTER)
    flags = ["--replicas", "2", "--router", "mine.py:Always", "--router-arg", "index=1"]
    printed(capsys, "replay", trace, *MACHINE, *flags, "--out", "run")
    from llmsim.runs import read_run

    assert set(read_run(Path("run")).requests["replica"]) == {1}
    assert "write NAME=VALUE" in refused(capsys, "replay", trace, *MACHINE, "--router", "x", "--router-arg", "index")
    line = refused(capsys, "replay", trace, *MACHINE, "--router", "round_robin", "--router-arg", "index=1")
    assert "router round_robin: unknown argument 'index'" in line


def test_progress_is_told_on_stderr_only_after_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress(1000, 5000, 12.0)
    assert capsys.readouterr().err == ""
    progress.next_s -= PROGRESS_AFTER_S
    progress(2000, 5000, 24.0)
    progress(3000, 5000, 36.0)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "2000 of 5000 requests answered, 24 s simulated in 0 s\n"


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_demo_ends_with_commands_that_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, "demo")
    assert re.search(r"^Successful requests: +\d{4}$", text, re.MULTILINE)
    suggested = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  llmsim ")]
    assert [words[0] for words in suggested] == ["replay", "replay", "from-vllm"]
    for words in suggested:
        printed(capsys, *words, *(["--no-out", "--limit", "50"] if words[0] == "replay" else []))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_trace_is_the_package_s_own() -> None:
    assert demo_trace().is_relative_to(ROOT)


@pytest.mark.speed
def test_demo_takes_less_than_three_seconds() -> None:
    started_s = time.monotonic()
    assert process("demo").returncode == 0
    assert time.monotonic() - started_s < 3.0


# ---- from-vllm ------------------------------------------------------------------------------------------------------

SERVE = "vllm serve meta-llama/Llama-3.1-8B-Instruct -tp 2 --max-model-len 32k --port 80 --enable-lora"


def test_from_vllm_prints_a_scenario_that_replays(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["from-vllm", "--gpu", "h100-sxm", SERVE]) == 0
    out, err = capsys.readouterr()
    assert tomllib.loads(out) == {
        "model": "llama-3.1-8b",
        "gpu": "h100-sxm",
        "tensor_parallel": 2,
        "max_model_len": 32000,
    }
    assert re.search(r"^ignored +--port 80: ", err, re.MULTILINE)
    assert re.search(r"^NOT MODELLED +--enable-lora: ", err, re.MULTILINE)
    Path("s.toml").write_text(out)
    from_file = printed(
        capsys, "replay", trace, "--scenario", "s.toml", "--cost", "constant:0.01", "--json", "--no-out"
    )
    words = out.splitlines()[0].removeprefix("# llmsim replay TRACE ").split()
    from_flags = printed(capsys, "replay", trace, *words, "--cost", "constant:0.01", "--json", "--no-out")
    timing = ("sim_wall_s", "sim_speedup")
    first, second = ({k: v for k, v in json.loads(text).items() if k not in timing} for text in (from_file, from_flags))
    assert first == second


def test_from_vllm_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "from-vllm", *SERVE.split())
    assert "gpu" not in tomllib.loads(out)
    assert "--gpu GPU" in out
    assert "# gpu = " in out


def test_from_vllm_takes_its_options_on_either_side(capsys: pytest.CaptureFixture[str]) -> None:
    before = printed(capsys, "from-vllm", "--gpu", "h100-sxm", SERVE)
    assert printed(capsys, "from-vllm", SERVE, "--gpu", "h100-sxm") == before
    assert printed(capsys, "from-vllm", "--gpu", "h100-sxm", *SERVE.split()) == before


def test_from_vllm_as_json_from_standard_input() -> None:
    done = process("from-vllm", "--gpu", "h100-sxm", "--json", "-", input=SERVE)
    document = json.loads(done.stdout)
    assert document["scenario"]["tensor_parallel"] == 2
    assert [line.split(":")[0] for line in document["not_modelled"]] == ["--enable-lora"]


# ---- validate -------------------------------------------------------------------------------------------------------


def oracle_case() -> Path:
    found = sorted((ROOT / "tests").rglob("hand_01_single.json")) or sorted(
        (ROOT.parent / "shared" / "oracle").rglob("hand_01_single.json")
    )
    assert found, "no recorded schedule in tests/ or ../shared/oracle"
    return found[0]


def test_validate_an_equal_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1 of 1 schedules match" in printed(capsys, "validate", oracle_case())


def test_validate_a_changed_schedule_exits_1_and_names_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(oracle_case().read_text())
    document["steps"][-1]["scheduled"][0]["tokens"] += 1
    (tmp_path / "changed.json").write_text(json.dumps(document))
    shutil.copy(oracle_case(), tmp_path / "equal.json")
    assert cli.main(["validate", str(tmp_path), "--json"]) == 1
    cases = {Path(case["path"]).name: case["difference"] for case in json.loads(capsys.readouterr().out)["cases"]}
    assert cases["equal.json"] is None
    assert "step" in cases["changed.json"]


@pytest.mark.parametrize("field", ["config", "requests", "steps", "outputs"])
def test_a_damaged_schedule_is_refused(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(oracle_case().read_text())
    document[field] = 3
    (tmp_path / "damaged.json").write_text(json.dumps(document))
    assert "damaged.json" in refused(capsys, "validate", "damaged.json")


# ---- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["list models", "--help", "replay --help"])
def test_a_closed_pipe_is_quiet(what: str) -> None:
    command = f"{sys.executable} -m llmsim {what} | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", str(cli.PIPE_CLOSED))  # 0 if it had written before `true` ended


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "llmsim", "list", "gpus"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write: No space left on device\n"


def test_interrupting_a_replay_leaves_nothing_behind(tmp_path: Path) -> None:
    """The trace is longer than any machine replays in the seconds until the signal."""
    lines = [f"{i * 0.02:.2f},300,200" for i in range(400_000)]
    (tmp_path / "long.csv").write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    command = [sys.executable, "-m", "llmsim", "replay", "long.csv", *MACHINE, "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path, env=environment) as running:
        time.sleep(2.5)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted: nothing was written"
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["long.csv"]


def test_gpu_names_complete_in_the_shell() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_LLMSIM_COMPLETE": "bash_complete",
        "COMP_WORDS": "llmsim replay --gpu h1",
        "COMP_CWORD": "3",
    }
    code = "import sys; sys.argv[0] = 'llmsim'; from llmsim.cli import entry; entry()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "plain,h100-sxm" in done.stdout.splitlines()


# ---- the package ----------------------------------------------------------------------------------------------------


def test_simulate_is_the_function_whatever_was_imported_before() -> None:
    code = (
        "import llmsim.simulate; from llmsim import simulate; assert callable(simulate) and callable(llmsim.simulate)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_public_name_exists_and_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys, llmsim\n"
        "assert not [name for name in sys.modules if name.startswith('llmsim.')] and 'numpy' not in sys.modules\n"
        "for name in llmsim.__all__: getattr(llmsim, name)\n"
        "assert set(llmsim.__all__) <= set(dir(llmsim))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kv_flags_end_up_in_the_scenario(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = "--kv-tier cpu:1GiB:10GB/s:1us --kv-tier disk:8GiB:1GB/s:1ms --kv-tier-write on_eviction --kv-tier-prefetch"
    more = "--preemption swap --swap-space-gib 2 --kv-cache-dtype int4"
    printed(capsys, "replay", trace, *MACHINE, *flags.split(), *more.split(), "--out", out)
    saved = json.loads((out / "manifest.json").read_text())["scenario"]
    assert saved["kv_tiers"] == "cpu:1GiB:10GB/s:1us,disk:8GiB:1GB/s:1ms"
    assert (saved["kv_tier_write"], saved["kv_tier_prefetch"]) == ("on_eviction", True)
    assert (saved["preemption"], saved["kv_cache_dtype"]) == ("swap", "int4")
    tiers = json.loads((out / "summary.json").read_text())["kv_tiers"]
    assert [tier["name"] for tier in tiers] == ["cpu", "disk"]


def test_eviction_flags_end_up_in_the_scenario(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    printed(capsys, "replay", trace, *MACHINE, "--eviction", "ttl", "--eviction-arg", "ttl_s=60", "--out", out)
    saved = json.loads((out / "manifest.json").read_text())["scenario"]
    assert (saved["eviction"], saved["eviction_args"]) == ("ttl", {"ttl_s": 60})
    assert "belady" in printed(capsys, "list", "evictions")
    assert "eviction='lfu'" in refused(
        capsys, "replay", trace, *MACHINE, "--eviction", "lfu", "--no-enable-prefix-caching"
    )
