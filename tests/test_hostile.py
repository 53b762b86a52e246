"""Input that is wrong, contradictory or broken at random: one line, nothing half-written, nothing silently ignored."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsim import cli
from llmsim.metrics import Result
from llmsim.rates import DENSE_SECONDS, tokens_per_second
from llmsim.readers.report import describe
from llmsim.trace import Trace, load_trace

ROOT = Path(__file__).parents[1]
TRACES = ROOT / "traces"
MACHINE = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", "constant:0.01")
GENERIC = "arrival_time_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n"
QWEN = (
    '{"chat_id":1,"parent_chat_id":-1,"timestamp":0.1,"input_length":20,"output_length":9,"turn":1,"hash_ids":[1,2]}\n'
    '{"chat_id":2,"parent_chat_id":1,"timestamp":9.1,"input_length":33,"output_length":12,"turn":2,"hash_ids":[1,3,4]}\n'
)
WEKA = (
    '{"id":"s","block_size":64,"hash_id_scope":"local","requests":['
    '{"t":0.0,"type":"n","in":100,"out":10,"hash_ids":[1,2],"think_time":0.0},'
    '{"t":5.0,"type":"s","in":130,"out":10,"hash_ids":[1,2,3],"think_time":2.0},'
    '{"t":9.0,"type":"s","in":64,"out":2,"hash_ids":[1],"think_time":1.0}]}'
)
AGENTIC = (
    '{"input_toks": 3, "output_toks": 5, "arrival_time_ns": 0, "input_tok_ids":[1,2,3]}\n'
    '{"session_id":"s","arrival_time_ns":2000000000,"sub_requests":['
    '{"input_toks":10,"output_toks":3,"tool_duration_ns":1000},{"input_toks":20,"output_toks":3}]}\n'
)
SEEDS = {
    "generic.csv": "request_id,session_id,parent_id,arrival_time_s,delay_s,prompt_tokens,output_tokens,priority\n"
    "a,s,,0,0,100,10,0\nb,s,a,,0.5,130,10,1\nc,t,,1,0,50,4,0\n",
    "prefix.csv": "arrival_ms,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n"
    "0,100,10,p,64\n5,80,2,p,64\n9,5,1,,\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 3000, "input_length": 512, "output_length": 5, "hash_ids": [46]}\n',
    "qwen.jsonl": QWEN,
    "weka.json": WEKA,
    "agentic.jsonl": AGENTIC,
    "sharegpt.json": '[{"id": "Q", "conversations": [{"from": "human", "value": "hello there my friend"}, '
    '{"from": "gpt", "value": "hello to you my dear friend"}]}]',
}
WEIRD = ("-1", "1e999", "NaN", "", "null", "true", "1.5", "9223372036854775808", "9" * 30, "abc", "[]", "{}", '"5"',
         "0", "0x10", "1e308", "[1,[3]]", "\\x00", "-5.5", '{"value":-1}')  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The error, having checked that there is nothing else."""
    assert cli.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- traces ---------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One thing wrong: cut, flipped, deleted, repeated, a number or a name replaced, lines swapped, damaged gzip."""
    kind, at = rng.randrange(8), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + rng.randrange(1, 20) :]
    if kind == 3:
        return data[:at] + data[at : at + 40] + data[at:]
    if kind in (4, 5):
        numbers = list(re.finditer(rb"(?<![\w-])-?\d+(\.\d+)?", data)) if kind == 4 else []
        found = rng.choice(numbers or list(re.finditer(rb'"[^"]*"|[A-Za-z_]+', data)))
        return data[: found.start()] + rng.choice(WEIRD).encode() + data[found.end() :]
    if kind == 6:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    packed = gzip.compress(data, mtime=0)
    return packed[: rng.randrange(2, len(packed))]


def consistent(trace: Trace) -> None:
    waits = np.isnan(trace.arrival_s)
    sent_s = trace.arrival_s[~waits]
    assert trace.prompt_tokens.min() >= 1 and trace.output_tokens.min() >= 1
    assert np.isfinite(sent_s).all() and (np.diff(sent_s) >= 0).all() and sent_s[0] == 0.0
    if waits.any():
        assert trace.parent is not None and trace.delay_s is not None
        assert (trace.parent[waits] >= 0).all() and np.isfinite(trace.delay_s[waits]).all()
    if trace.parent is not None:
        assert (trace.parent < np.arange(len(trace))).all()
    if trace.block_ids is not None:
        assert all(
            len(ids) == -(-tokens // trace.block_tokens)
            for ids, tokens in zip(trace.block_ids, trace.prompt_tokens.tolist(), strict=True)
        )
    assert trace.rows_read >= 1 and not any("\n" in note for note in trace.notes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SEEDS)
def test_a_broken_trace_is_a_sentence_or_a_trace(name: str, tmp_path: Path) -> None:
    rng = random.Random(f"17 {name}")
    consistent(load_trace(written(tmp_path / name, SEEDS[name])))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(150):
        written(tmp_path / name, mutated(rng, SEEDS[name].encode()))
        try:
            trace = load_trace(tmp_path / name)
            consistent(trace)
            describe(trace)
            outcomes["read"] += 1
        except (ValueError, FileNotFoundError) as error:
            assert not isinstance(error, UnicodeError | json.JSONDecodeError), error
            assert "\n" not in str(error) and name in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", GENERIC.replace("output_tokens", "output_tokens,priority").replace(",5\n", ",5,1e30\n"), "priority"),
        ("t.csv", "arrival_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n0,9,5,p,1.5\n", "prefix_tokens: 1.5"),
        ("t.csv", "\n" + GENERIC.replace("1,20", "1\xd2,20"), "line 1: blank where the header"),
        ("q.jsonl", QWEN.replace('"chat_id":2', '"chat_id":{}'), "chat_id: {} is not an id"),
        ("q.jsonl", QWEN.replace('"parent_chat_id":1', '"parent_chat_id":[1]'), "parent_chat_id: [1] is not an id"),
        ("q.jsonl", QWEN.replace('"turn":2,', '"turn":2,\n'), "line 2: not valid JSON"),
        ("w.json", WEKA.replace("[1,2]", "[[1],2]"), "hash_ids"),
        ("w.json", WEKA.replace('"block_size":64', '"block_size":[64]'), "block_size: [64]"),
        ("w.json", WEKA.replace('"in":64', '"in":65'), "needs ceil(65/64) = 2 hash_ids"),
        ("a.jsonl", AGENTIC.replace("[1,2,3]", "[1,[],3]"), "token ids of input_toks"),
        ("t.csv", GENERIC.replace("1,20", "1e12,20"), "--time-unit"),
        ("t.csv", b"TIMESTAMP,ContextTokens,GeneratedTokens\n\n2024-05-10 00:00:00,3\xff,4\n", "line 3: not UTF-8"),
    ],
)
def test_the_place_is_named(name: str, text: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        load_trace(written(tmp_path / name, text))
    assert name in str(caught.value)


def test_a_field_that_first_appears_far_down_a_file_is_read(tmp_path: Path) -> None:
    row = '{"arrival_time_s": 0, "prompt_tokens": 5, "output_tokens": 5}\n'
    last = '{"arrival_time_s": 0, "prompt_tokens": 5, "output_tokens": 5, "slo_class": "gold"}\n'
    trace = load_trace(written(tmp_path / "t.jsonl", row * 1500 + last))
    assert trace.slo_class is not None and trace.slo_class[-1] == "gold"


@pytest.mark.parametrize(("column", "last_s"), [("arrival_s", 2.0), ("arrival_ms", 2e-3), ("timestamp_us", 2e-6)])
def test_the_unit_in_the_name_of_the_arrival_decides(column: str, last_s: float, tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", f"{column},prompt_tokens,output_tokens\n0,10,5\n2,20,5\n")
    assert load_trace(path).span_s == pytest.approx(last_s)


def test_turns_of_a_dropped_parent_wait_for_the_one_before_it(tmp_path: Path) -> None:
    trace = load_trace(written(tmp_path / "w.json", WEKA.replace('"in":130,"out":10', '"in":130,"out":0')))
    assert trace.parent is not None and trace.delay_s is not None
    assert trace.parent.tolist() == [-1, 0] and trace.delay_s[1] == pytest.approx(3.0)


def test_a_session_without_a_name_still_links_its_calls(tmp_path: Path) -> None:
    trace = load_trace(written(tmp_path / "a.jsonl", AGENTIC.replace('"session_id":"s"', '"session_id":""')))
    assert trace.parent is not None and trace.parent.tolist() == [-1, -1, 1]


def test_a_row_of_millions_of_characters_is_read(tmp_path: Path) -> None:
    ids = ";".join(str(10**18 + i) for i in range(100_000))
    text = f"arrival_s,prompt_tokens,output_tokens,hash_ids,block_tokens\n0,1600000,5,{ids},16\n1,16,5,{10**18},16\n"
    trace = load_trace(written(tmp_path / "t.csv", text))
    assert trace.block_ids is not None and [len(one) for one in trace.block_ids] == [100_000, 1]


def test_spaces_that_end_the_last_row_are_part_of_it(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens,tenant\n0,5,5,a\n0,5,5, b \n  \n\n"
    assert load_trace(written(tmp_path / "t.csv", text)).tenant == ["a", " b "]


def test_filters_apply_to_every_trace_that_names_models(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "arrival_s,prompt_tokens,output_tokens,model\n0,5,5,a\n1,5,5,b\n2,5,5,A\n")
    assert len(load_trace(path, model="a")) == 2
    with pytest.raises(ValueError, match="no request has model 'c'; known: A, a, b"):
        load_trace(path, model="c")
    with pytest.raises(ValueError, match="does not name the model"):
        load_trace(written(tmp_path / "u.csv", GENERIC), model="a")
    with pytest.raises(ValueError, match="only BurstGPT traces have log types"):
        load_trace(tmp_path / "u.csv", log_type="API log")


def test_an_option_without_effect_is_said_to_have_none(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", GENERIC)
    notes = load_trace(path, closed_loop=True, max_wait_s=1.0, block_tokens=16, sharegpt_mode="first-pair").notes
    assert sum("has no effect on this generic trace" in note for note in notes) == 4
    assert not any("no effect" in note for note in load_trace(path).notes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_an_endless_device_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a device, not a trace" in refused(capsys, "trace", "describe", "/dev/full")


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--concurrency 4 --rate 3", "--rate 3.0"),
        ("--concurrency 4 --time-scale 2", "--time-scale"),
        ("--scheduler chunked --scheduler-arg headroom=abc", "headroom='abc' is not a number"),
        ("--scheduler chunked --scheduler-arg headroom=true", "headroom=True is not a number"),
        ("--scheduler chunked --watermark 0.1", "watermark=0.1 is an option of the scheduler vllm"),
        ("--scheduler vllm --scheduler-arg policy=priority", "give scheduling_policy instead"),
        ("--scheduler broken.py:Mine", "broken.py, line 2"),
        ("--cost constant:1e300", "at most 86400"),
        ("--cost constant:86400 --max-num-seqs 1", "cannot be meant"),
        ("--host-scale 2", "has no host"),
        ("--time-scale 1e300", "more than 1e+10 s (300 years): give a time scale below 1e+300"),
        ("--rate 1e-9", "more than 1e+10 s (300 years): give a rate above 1e-09"),
        ("--rate 1e-320", "rate=9.99989e-321 is too low to rescale to: give a higher one"),
        ("--num-gpu-blocks-override 2", "2000 of 2000 requests are rejected: a replica's 2 KV blocks hold 16 tokens"),
        ("--columns arrival=a,arrival=b", "given twice"),
        ("--out file/run", "is not a folder"),
    ],
)
def test_flags_that_cannot_be_meant(
    flags: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "broken.py", "class Mine:\n  def schedule(self, replica, now_s) return None\n")
    written(tmp_path / "file", "")
    assert says in refused(capsys, "replay", TRACES / "chat.csv", *MACHINE, *flags.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.py", "file"]


def test_a_closed_loop_of_sessions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--concurrency", 4, "--out", tmp_path / "run")
    assert "closed loop of its own" in refused(capsys, "replay", TRACES / "sessions.jsonl", *MACHINE, *flags)


def test_some_rejected_requests_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "t.csv", GENERIC.replace("1,20,5", "1,2000,5"))
    flags = ("--num-gpu-blocks-override", 10, "--no-out", "--json")
    assert cli.main([str(arg) for arg in ("replay", tmp_path / "t.csv", *MACHINE, *flags)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == 1
    assert "WARNING: 1 of 2 requests are rejected: a replica's 10 KV blocks hold 144 tokens" in err


def test_a_benchmark_result_takes_the_engines_settings_from_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {
        "input_lens": [10] * 8, "output_lens": [4] * 8, "ttfts": [0.1] * 8, "itls": [[0.01] * 3] * 8,
        "start_times": [100.0] * 8, "model_id": "meta-llama/Llama-3.1-8B-Instruct",
    }  # fmt: skip
    path = written(tmp_path / "result.json", json.dumps(result))

    def predicted_ms(*flags: str) -> float:
        assert cli.main(["validate", str(path), *MACHINE, "--json", *flags]) == 0
        metrics: dict[str, Any] = json.loads(capsys.readouterr().out)["scenarios"][0]["metrics"]
        return float(metrics["e2el_ms"]["mean"]["predicted"])

    assert predicted_ms("--max-num-seqs", "1") > 3 * predicted_ms()
    schedule = next((ROOT / "tests/data/oracle").glob("*.json"))
    assert "leave out what gives max_num_seqs" in refused(capsys, "validate", schedule, "--max-num-seqs", 4)


@pytest.mark.parametrize("field", ["input_lens", "ttfts", "start_times"])
def test_a_benchmark_result_of_centuries_is_damaged(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result: dict[str, Any] = {"input_lens": [10, 9], "output_lens": [2, 2], "ttfts": [0.1, 0.1], "itls": [[0.1], [0.1]]}
    result |= {"start_times": [0.0, 1.0]}
    result[field][1] = 10**18
    path = written(tmp_path / "result.json", json.dumps(result))
    assert field in refused(capsys, "validate", path, *MACHINE)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_a_failed_conversion_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import llmsim.readers.write as write

    source, out = written(tmp_path / "t.csv", GENERIC), written(tmp_path / "out.csv", "precious")
    assert "is the trace that is read" in refused(capsys, "trace", "convert", source, "-o", tmp_path / "." / "t.csv")

    def full(place: Path, made: object) -> None:
        place.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_csv", full)
    assert "out.csv: No space left on device" in refused(capsys, "trace", "convert", source, "-o", out)
    assert out.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_converting_to_mooncake_says_what_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(
        tmp_path / "t.csv", "arrival_s,prompt_tokens,output_tokens,model,session_id\n0,5,5,a,s\n1,5,5,b,s\n"
    )
    out = tmp_path / "t.jsonl"
    assert cli.main(["trace", "convert", str(source), "--to", "mooncake", "-o", str(out)]) == 0
    assert "no place for model" in capsys.readouterr().err
    assert load_trace(out).session == ["s", "s"]


def test_a_failed_run_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import llmsim.runs as runs

    def full(path: Path, columns: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "write_parquet", full)
    for out in ((), ("--out", "a/b/c")):
        arguments = ("replay", TRACES / "chat.csv", *MACHINE, "--limit", 5, *out)
        assert "No space left on device" in refused(capsys, *arguments)
        assert list(tmp_path.iterdir()) == []


def test_replays_that_end_together_keep_their_own_folders(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llmsim", "replay", str(TRACES / "chat.csv"), *MACHINE, "--limit", "5", "--json"]
    started = [subprocess.Popen(command, stdout=-1, stderr=-1, cwd=tmp_path, env=environment) for _ in range(3)]
    ended = [running.communicate(timeout=60) for running in started]
    assert [running.returncode for running in started] == [0, 0, 0], ended
    folders = {json.loads(out)["run_folder"] for out, _ in ended}
    assert len(folders) == 3 and all((tmp_path / folder / "manifest.json").is_file() for folder in folders)


def test_interrupting_a_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    lines = [f"{i * 0.02:.2f},300,200" for i in range(1_500_000)]
    written(tmp_path / "long.csv", "\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    command = [sys.executable, "-m", "llmsim", "trace", "convert", "long.csv", "-o", "out.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path, env=environment) as running:
        deadline_s = time.monotonic() + 30
        while not list(tmp_path.glob(".out.jsonl.partial-*")):  # being written
            assert time.monotonic() < deadline_s and running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and err.splitlines()[-1] == "error: interrupted: nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["long.csv"]


def test_a_closed_standard_output_is_one_line() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m llmsim list gpus >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "standard output is closed" in done.stderr


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.fixture
def replayed() -> Callable[..., Result]:
    from llmsim.scenario import Scenario
    from llmsim.simulate import simulate

    def run(arrival_s: list[float]) -> Result:
        count = len(arrival_s)
        trace = Trace("t", np.array(arrival_s), np.full(count, 10), np.full(count, 300))
        return simulate(trace, Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.01"))

    return run


def test_tokens_by_the_second_do_not_need_the_seconds_between(replayed: Callable[..., Result]) -> None:
    near, far = replayed([0.0, 0.25, 1000.0]), replayed([0.0, 0.25, 50.0 * DENSE_SECONDS])
    dense, sparse = (tokens_per_second(one.requests, one.iterations, one.gaps) for one in (near, far))
    assert sparse.sum() == dense.sum() == 900 and sparse.max() == dense.max()
    assert sparse.size < 20 < dense.size
