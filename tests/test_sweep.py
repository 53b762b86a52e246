"""Sweeps: rows are what a replay gives, the same bytes however they were made, nothing done is lost or done twice."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from llmsim import Scenario, cli, load_trace, simulate, sweep
from llmsim.cli_sweep import Line
from llmsim.sweep import SweepResult, read_sweep, work_of
from llmsim.sweep_columns import CONSTANT, METRICS
from llmsim.sweep_files import digests
from llmsim.sweep_local import in_process, in_processes
from llmsim.sweep_parts import parts_of
from llmsim.sweep_report import duration
from llmsim.sweep_work import Work
from llmsim.sweep_yaml import read_spec

ROOT = Path(__file__).parents[1]
MACHINE = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
KILLER = """
import os, signal, time
from pathlib import Path
from llmsim.schedulers.vllm import VllmScheduler


class Once(VllmScheduler):
    '''Ends its process the first time it is made, and never again.'''

    def __init__(self):
        super().__init__()
        if not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Always(VllmScheduler):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(VllmScheduler):
    def __init__(self, sleep_s=0.02):
        super().__init__()
        time.sleep(sleep_s)


class Broken(VllmScheduler):
    def schedule(self, replica, now_s):
        return 1 / 0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten requests, a second apart, 64 prompt tokens and 11 output tokens; and policies that do what none should."""
    lines = [f"{second},64,11" for second in range(10)]
    (tmp_path / "ten.csv").write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    (tmp_path / "odd.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(**more: Any) -> dict[str, Any]:
    return {"trace": "ten.csv", "scenario": MACHINE | {"cost": "constant:0.01"}} | more


def parts(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name.startswith("part")}


def test_rows_are_what_the_trace_says() -> None:
    found = sweep(spec(grid={"rate": [1, 2], "limit": [4, 10]}, goodput={"ttft": 5}), out="out")
    frame = found.frame()
    assert frame[["run", "rate", "limit", "completed", "total_input_tokens"]].to_numpy().tolist() == [
        [0, 1.0, 4, 4, 256], [1, 1.0, 10, 10, 640], [2, 2.0, 4, 4, 256], [3, 2.0, 10, 10, 640],
    ]  # fmt: skip
    # Iterations of 10 ms: each request has the machine for itself, so a token comes every 10 ms.
    assert frame["p99_tpot_ms"].tolist() == pytest.approx([10.0] * 4)
    assert frame["slo_attainment"].tolist() == [0.0] * 4  # a first token takes 10 ms and more
    assert frame["error"].isna().all()
    assert (found.runs, found.done, found.failed, found.columns) == (4, 4, 0, ("rate", "limit"))


def test_a_row_is_what_its_command_line_replays(capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest's command, run by the command line itself, gives every number of the row."""
    os.symlink(ROOT / "examples", "examples")
    os.symlink(ROOT / "traces", "traces")
    made = {
        "trace": {"path": "traces/chat.csv", "limit": 60, "time_unit": "s", "columns": {"arrival": "arrival_time_s"}},
        "scenario": MACHINE,
        "goodput": {"ttft": 61.5, "e2el": 1e3},
        "scenarios": [
            {"scheduler": "examples/short_prompts_first.py:ShortPromptsFirst", "scheduler.prefill_tokens": 300},
            {"engine": "sglang", "tensor_parallel": 2},
            {"kv_tiers": "cpu:8GiB:20GB/s:10us,ssd:1TB:5GB/s:100us", "max_num_seqs": 16, "block_size": 32},
            {"enable_prefix_caching": False, "host_scale": 1.1, "cudagraph": "none"},
            {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}},
        ],
        "grid": {"rate": [7.25]},
        "seeds": [3],
    }
    found = sweep(made, out="out")
    assert found.frame()["error"].dropna().tolist() == []
    for run in range(found.runs):
        command = found.manifest(run)["command"]
        assert cli.main([*command[1:], "--no-out", "--json"]) == 0, command
        printed = json.loads(capsys.readouterr().out)
        row = found.summary(run)
        assert {name: printed[name] for name in row} == row
        assert (
            found.manifest(run)["scenario"] == Scenario.from_dict(found.manifest(run)["scenario"]).resolved().to_dict()
        )


def test_every_number_of_a_summary_is_a_column() -> None:
    trace = load_trace("ten.csv")
    summary = simulate(trace, Scenario(**MACHINE)).summary({"ttft": 500.0})
    single = [name for name, value in summary.items() if not isinstance(value, dict | list)]
    assert set(single) - {"sim_wall_s", "sim_speedup", *CONSTANT} <= set(METRICS)
    frame = sweep(spec(goodput={"ttft": 500}, seeds=1, scenario=MACHINE), out="out").frame()
    for name in single:
        if name in METRICS and summary[name] is not None:
            assert frame[name][0] == summary[name]
    assert json.loads(frame["summary"][0]) == {k: v for k, v in summary.items() if not k.startswith("sim_")}


@pytest.fixture(scope="module")
def many() -> dict[str, Any]:
    """Runs of every kind: other policies, traces of other sizes, an impossible one, launch jitter by seed."""
    impossible = {"name": "impossible", "max_num_batched_tokens": 64, "max_num_seqs": 128}
    return {
        "trace": "ten.csv",
        "scenario": MACHINE,
        "scenarios": [{"name": "vllm"}, impossible, {"name": "sglang", "engine": "sglang"}],
        "grid": {"limit": [5, 10]},
        "seeds": 2,
    }


def test_the_same_bytes_for_any_number_of_processes_and_shards(many: dict[str, Any]) -> None:
    sweep(many, out="one")
    sweep(many, out="two", jobs=2)
    assert len(parts("one")) == 12
    assert parts("one") == parts("two")
    for at in (3, 1, 2):
        sweep(many, out="shards", shard=f"{at}/3", jobs=2)
        sweep(many, out=f"apart{at}", shard=(at, 3))
    Path("merged").mkdir()
    for at in (1, 2, 3):
        for path in Path(f"apart{at}").iterdir():
            shutil.copy(path, "merged")
    assert parts("one") == parts("shards") == parts("merged")
    assert sweep(many, out="merged", resume=True, progress=lambda *_: pytest.fail("done")).frame().equals(
        read_sweep("one").frame()
    )  # fmt: skip
    assert not list(Path("one").glob("*.jsonl"))


def test_one_data_set_for_other_readers(many: dict[str, Any]) -> None:
    frame = sweep(many, out="out").frame()
    assert pd.read_parquet("out").sort_values("run").reset_index(drop=True).equals(frame)
    assert frame["scenario"].tolist() == ["vllm"] * 4 + ["impossible"] * 4 + ["sglang"] * 4


def test_a_run_that_cannot_be_is_a_row_with_its_error(many: dict[str, Any]) -> None:
    found = sweep(many, out="out")
    errors = found.frame().set_index("scenario")["error"]
    assert found.failed == 4
    assert errors[["vllm", "sglang"]].isna().all()
    assert errors["impossible"].str.startswith("max_num_batched_tokens=64 is below max_num_seqs=128").all()
    with pytest.raises(ValueError, match="run 4 failed: max_num_batched_tokens=64 is below"):
        found.summary(4)
    assert found.manifest(4)["scenario"]["max_num_seqs"] == 128


def test_a_policy_that_raises_is_an_error_with_its_place() -> None:
    found = sweep(spec(grid={"scheduler": ["odd.py:Broken", "vllm", "odd.py:Nobody"]}), out="out")
    errors = found.frame()["error"]
    assert errors[0] == "ZeroDivisionError: division by zero (odd.py, line 30)"
    assert pd.isna(errors[1])
    assert errors[2].startswith("scheduler 'odd.py:Nobody': no class Nobody in odd.py.")


def test_values_that_json_and_columns_have_no_place_for() -> None:
    found = sweep(
        spec(grid={"rate": [float("inf"), 2], "max_num_seqs": [2**70, 8], "concurrency": [None, 2]}), out="out"
    )
    frame = found.frame()
    assert frame["rate"].tolist() == [float("inf")] * 4 + [2.0] * 4
    assert frame["max_num_seqs"].tolist() == [str(2**70)] * 2 + ["8"] * 2 + [str(2**70)] * 2 + ["8"] * 2
    assert frame["error"][0].startswith(f"max_num_seqs={2**70} is too large")
    assert found.manifest(2)["trace"]["options"] == {"rate": "inf"}
    assert pd.isna(frame["error"][2])
    assert frame["error"][7].startswith("concurrency=2 ignores arrival times, which rate=2.0 changes")
    assert frame["completed"].tolist()[2::4] == [10, 10]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_policy_prints_is_no_result(jobs: str) -> None:
    Path("loud.py").write_text(
        "from llmsim.schedulers.vllm import VllmScheduler\nclass Loud(VllmScheduler):\n    def __init__(self):\n"
        "        super().__init__()\n        print('hear me', flush=True)\n"
    )
    Path("s.yaml").write_text(json.dumps(spec(grid={"scheduler": ["loud.py:Loud"]}, seeds=2)))
    command = [sys.executable, "-m", "llmsim", "sweep", "s.yaml", "--json", "--jobs", jobs]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["failed"] == 0
    assert done.stderr.count("hear me") == 2


def test_interrupting_keeps_what_is_done(folder: Path) -> None:
    """Ctrl-C goes to all processes of a terminal: no traceback, the workers end, and --resume goes on."""
    Path("slow.json").write_text(json.dumps(spec(grid={"scheduler": ["odd.py:Slow"]}, seeds=70)))
    command = [sys.executable, "-m", "llmsim", "sweep", "slow.json", "--out", "out", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    while finished_runs(folder / "out") < 6:
        assert process.poll() is None
        time.sleep(0.01)
    below = processes_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "interrupted: what was done is in out; --resume goes on"
    assert b"Traceback" not in err
    while any(alive(pid) for pid in below):
        time.sleep(0.02)
    assert finished_runs(folder / "out") >= 6


def test_a_killed_worker_loses_only_its_run_which_is_done_again() -> None:
    lost = sweep(spec(grid={"scheduler": ["odd.py:Once"]}, seeds=6), out="out", jobs=2)
    assert Path("killed").exists()
    assert (lost.done, lost.failed) == (6, 0)
    never = sweep(spec(grid={"scheduler": ["odd.py:Once"]}, seeds=6), out="never", jobs=2)
    assert parts("out") == parts("never")
    assert never.frame()["completed"].tolist() == [10] * 6


def test_a_run_that_kills_every_process_is_given_up_and_the_others_go_on() -> None:
    found = sweep(spec(grid={"scheduler": ["vllm", "odd.py:Always", "chunked"]}, seeds=2), out="out", jobs=2)
    frame = found.frame()
    assert (found.done, found.failed) == (6, 2)
    assert set(frame["scheduler"][frame["error"].notna()]) == {"odd.py:Always"}
    assert frame["error"].dropna().str.startswith("its process died 2 times (SIGKILL): ").all()


def processes_of(parent: int) -> list[int]:
    """Processes below another one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found += [int(entry.name), *processes_of(int(entry.name))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finished_runs(folder: Path) -> int:
    lines = 0
    for path in folder.glob("_part*.jsonl"):
        with suppress(FileNotFoundError):  # its part was done between looking and reading
            lines += path.read_bytes().count(b"\n")
    return lines + 2 * len(list(folder.glob("part-*")))


def test_a_killed_sweep_goes_on_where_it_was(folder: Path) -> None:
    """kill -9 in the middle: what was done is not done again, half-written files are no results, no process stays."""
    made = spec(grid={"scheduler": ["odd.py:Slow"]}, seeds=70)  # parts of two runs
    Path("slow.json").write_text(json.dumps(made))  # JSON is YAML
    command = [sys.executable, "-m", "llmsim", "sweep", "slow.json", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    out = folder / "out"
    while finished_runs(out) < 16:
        assert process.poll() is None
        time.sleep(0.01)
    below = processes_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert below
    while any(alive(pid) for pid in below):  # workers notice by themselves
        time.sleep(0.02)
    kept = finished_runs(out)
    whole = sorted(out.glob("part-*"))
    assert len(whole) >= 6
    # What a machine that goes at once may leave: a file cut short, half a line.
    whole[2].write_bytes(whole[2].read_bytes()[:-100])
    with open(out / "_part-00034.jsonl", "ab") as journal:
        journal.write(b'{"run": 69, "id": "00')
    done: list[int] = []
    found = sweep("slow.json", out="out", jobs=2, resume=True, progress=lambda now, total, left: done.append(now))
    assert len(done) == 70 - (kept - 2)
    assert done[-1] == found.done == 70
    sweep("slow.json", out="undisturbed", jobs=2)
    assert parts("out") == parts("undisturbed")


def test_a_folder_belongs_to_one_sweep() -> None:
    sweep(spec(seeds=2), out="out")
    with pytest.raises(ValueError, match=r"out=out: holds results of this sweep: add --resume"):
        sweep(spec(seeds=2), out="out")
    with pytest.raises(ValueError, match=r"out=out: was made from another specification: give another --out"):
        sweep(spec(seeds=3), out="out", resume=True)
    with open("ten.csv", "a") as trace:
        trace.write("10,64,11\n")
    with pytest.raises(ValueError, match=r"out=out: ten\.csv changed since it was made"):
        sweep(spec(seeds=2), out="out", resume=True)
    Path("other").mkdir()
    Path("other/file").touch()
    with pytest.raises(ValueError, match="out=other: exists and is not the folder of a sweep"):
        sweep(spec(seeds=2), out="other")
    with pytest.raises(FileNotFoundError, match=r"other: not the folder of a sweep"):
        read_sweep("other")


def test_two_sweeps_do_not_write_one_part() -> None:
    made = spec(seeds=2)
    sweep(made, out="out", shard="2/2")
    with open("out/_part-00000.jsonl", "ab") as held_by_another:
        fcntl.flock(held_by_another, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"_part-00000\.jsonl: another sweep is writing it"):
            sweep(made, out="out", resume=True)
    assert sweep(made, out="out", resume=True).done == 2


@pytest.mark.parametrize("runs", [1, 2, 63, 64, 65, 1000, 10_000])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_are_disjoint_and_complete(runs: int, shards: int) -> None:
    if shards > len(parts_of(runs)):
        with pytest.raises(ValueError, match=f"give at most {len(parts_of(runs))} shards"):
            parts_of(runs, (1, shards))
        return
    counted = np.zeros(runs, dtype=int)
    for at in range(1, shards + 1):
        for part in parts_of(runs, (at, shards)):
            counted[part.first : part.last] += 1
    assert (counted == 1).all()
    assert len(parts_of(runs)) <= 64


def test_runs_are_drawn_as_they_are_needed() -> None:
    """So that ten thousand take no more memory than ten."""
    checked = read_spec(spec(seeds=40))
    files, drawn = digests(checked), 0

    def works() -> Iterator[Work]:
        nonlocal drawn
        for run in range(checked.runs):
            drawn += 1
            yield work_of(checked, run, files)

    for finished, _ in enumerate(in_processes(works(), 2)):
        assert drawn - finished <= 4  # two under way, and two in their pipes
    assert drawn == 40
    drawn = 0
    for finished, _ in enumerate(in_process(works())):
        assert drawn == finished + 1


# ---- the command ----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["sweep", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_dry_run_lists_and_estimates_and_does_nothing(
    many: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("many.yaml").write_text(json.dumps(many))
    status, out, _ = command(capsys, "many.yaml", "--dry-run", "--jobs", "2")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "run  scenario, limit, seed"
    assert lines[1] == "0    scenario=vllm, limit=5, seed=0"
    assert lines[5].startswith("4    scenario=impossible, limit=5, seed=0  impossible: max_num_batched_tokens=64 is")
    assert len(lines) == 14
    assert lines[-1].startswith("12 runs (4 impossible); about 0.")
    assert sorted(path.name for path in folder.iterdir()) == ["many.yaml", "odd.py", "ten.csv"]
    sweep(many, out="sweeps/many", shard="1/2")
    status, out, _ = command(capsys, "many.yaml", "--dry-run", "--json")
    document = json.loads(out)
    assert (document["runs"], document["todo"], document["impossible"]) == (12, 6, 4)
    assert document["list"][1] == {"run": 1, "done": False, "error": None, "scenario": "vllm", "limit": 5, "seed": 1}
    assert document["list"][2]["done"]


def test_the_command_prints_a_table_and_the_folder(many: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("many.yaml").write_text(json.dumps(many))
    status, out, err = command(capsys, "many.yaml")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split()[:5] == ["run", "scenario", "limit", "seed", "req/s"]
    assert "error: max_num_batched_tokens=64" in lines[5]
    assert lines[-1] == "12 of 12 runs done, 4 of them with an error. Results: sweeps/many"
    status, out, err = command(capsys, "many.yaml", "--resume", "--json")
    assert json.loads(out) == {
        "folder": "sweeps/many", "runs": 12, "done": 12, "failed": 4, "columns": ["scenario", "limit", "seed"],
    }  # fmt: skip


def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(json.dumps(spec(seeds=2)))
    for words, message in (
        (["none.yaml"], "none.yaml: no such file"),
        (["s.yaml", "--shard", "3/2"], "shard 3/2: give 1/2 to 2/2"),
        (["s.yaml", "--shard", "half"], "shard 'half': write i/n"),
        (["s.yaml", "--shard", "1/9"], "shard 1/9: 2 runs make 2 parts"),
        (["s.yaml", "--executor", "slurm"], "executor='slurm' is not one of local, ray"),
    ):
        status, out, err = command(capsys, *words)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
    Path("t.yaml").write_text(json.dumps(spec(seeds=2) | {"trace": "tenn.csv"}))
    assert "tenn.csv: no such file; did you mean ten.csv?" in command(capsys, "t.yaml")[2]


def test_exit_status_1_if_no_run_works(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(json.dumps(spec(grid={"replicas": [0, -1]})))
    status, out, _ = command(capsys, "s.yaml")
    assert status == 1
    assert "error: replicas=0 is too small: give 1 or more" in out


def test_a_line_says_how_many_are_done_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("llmsim.progress.time.monotonic", lambda: clock[0])
    line = Line()
    for at, done, left_s in (
        (101.0, 1, None),
        (103.0, 3, 250.0),
        (104.0, 4, 200.0),
        (113.5, 90, 8.25),
        (120.0, 100, 0.0),
    ):
        clock[0] = at
        line(done, 100, left_s)
    line.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "3 of 100 runs done, about 4 min 10 s left\n90 of 100 runs done, about 8.2 s left\n"


def test_a_run_of_a_sweep_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    made = spec(grid={"rate": [float("inf"), 2], "scheduler": ["odd.py:Slow", "vllm"]}, goodput={"ttft": 15})
    sweep(made | {"scenario": MACHINE}, out="out")
    for run in range(4):
        assert cli.main(["rerun", "out", "--run", str(run)]) == 0
        assert capsys.readouterr().out.startswith(f"out, run {run}: the same numbers: ")
    Path("odd.py").write_text(KILLER + "# a comment\n")
    assert cli.main(["rerun", "out", "--run", "2"]) == 0
    assert capsys.readouterr().out.endswith("of its summary; odd.py has changed\n")
    with open("ten.csv", "a") as trace:
        trace.write("10,64,11\n")
    assert cli.main(["rerun", "out", "--run", "1"]) == 1
    assert "cannot be repeated: its trace ten.csv has changed: SHA-256" in capsys.readouterr().out
    assert cli.main(["rerun", "out"]) == 2
    assert capsys.readouterr().err == "error: out: the folder of a sweep: add --run N\n"


def test_durations_as_people_say_them() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 99.4, 200, 7500)] == [
        "0.0 s", "9.9 s", "10 s", "99 s", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip


def test_a_result_says_what_it_lacks() -> None:
    found = sweep(spec(seeds=4), out="out", shard="2/2")
    assert isinstance(found, SweepResult)
    assert (found.runs, found.done) == (4, 2)
    assert found.frame()["seed"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="out: run 0 is not done"):
        found.manifest(0)
