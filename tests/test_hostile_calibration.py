"""Calibration and its files under bad input: one line that names the file or field, never a traceback or a NaN."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.fit_command import check_named, fit_command
from calibration.measure import rows as rows_module
from calibration.measure.command import measure
from calibration.measure.rows import FORMAT, Journal, Row, read_parquet, write_parquet
from calibration.measure.run import finish_only
from calibration.profiles import check_output, write_profile
from calibration.record.command import record_command
from calibration.record.plans import make_loads
from calibration.steps import read_recording
from calibration.touch_up_command import spread_command, touch_up_command
from llmsim.cost.graphs import Graphs
from llmsim.cost.load import CostSettings
from llmsim.cost.profile import ProfileCost, decode_profile, read_profile
from llmsim.hardware import find_gpu, find_model

RECORDINGS = Path(__file__).parents[1] / "calibration" / "recordings"
SECOND = RECORDINGS / "vllm-0.25.1_h200-sxm_llama-3.1-8b_bf16_second-machine"
LOAD = "poisson_1024_128_q8"
ABOUT = {"gpu": "NVIDIA H200", "torch": "2.11.0"}
POINT = {"op": "linear", "variant": "cublas", "launch": "graph", "median_s": 1e-6}
HEADER = {"format": FORMAT, "version": 1, **ABOUT}


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(str(part) in text for part in parts), text


# ---- rows: Parquet and journal --------------------------------------------------------------------------------------

WRONG_ROWS = [
    ({"median_s": float("nan")}, "median_s=nan"),
    ({"median_s": float("inf")}, "median_s=inf"),
    ({"median_s": -1.0}, "median_s=-1.0"),
    ({"median_s": 0.0}, "median_s=0.0"),
    ({"median_s": "fast"}, "median_s='fast'"),
    ({"op": 3}, "op=3"),
    ({"tokens": 1.5}, "tokens=1.5"),
    ({"tokens": -4}, "tokens=-4"),
    ({"tokens": "x"}, "tokens='x'"),
    ({"samples_s": 3}, "samples_s=3"),
    ({"samples_s": [None]}, "samples_s"),
]


@pytest.mark.parametrize(("change", "said"), WRONG_ROWS)
def test_a_parquet_file_with_a_value_no_measurement_has_is_refused(tmp_path, change, said):
    path = tmp_path / "x.parquet"
    table = pa.table({name: [value] for name, value in {**POINT, **change}.items()})
    pq.write_table(table.replace_schema_metadata({b"llmsim": json.dumps(HEADER)}), path)
    with pytest.raises(ValueError) as error:
        read_parquet(path)
    one_line(error, path, said)


@pytest.mark.parametrize(("change", "said"), [*WRONG_ROWS, ({"zzz": 1}, "'zzz'"), ({"op": None}, "op is missing")])
def test_a_journal_line_no_measurement_writes_is_refused(tmp_path, change, said):
    path = tmp_path / "x.journal.jsonl"
    lines = [HEADER, {"key": "a", "rows": [{**POINT, **change}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError) as error:
        Journal(path, ABOUT)
    one_line(error, f"{path}:2", said)


@pytest.mark.parametrize(
    "line", [{"key": "a"}, {"key": ["a"], "rows": []}, {"key": "a", "rows": 5}, {"key": "a", "rows": ["x"]}]
)
def test_a_journal_line_of_another_form_is_refused(tmp_path, line):
    path = tmp_path / "x.journal.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError) as error:
        Journal(path, ABOUT)
    one_line(error, f"{path}:2")


def test_a_foreign_file_is_no_half_written_journal(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    path.write_text("notes of mine, without a newline")
    with pytest.raises(ValueError, match="no journal"):
        Journal(path, ABOUT)
    assert path.read_text() == "notes of mine, without a newline"
    path.write_text(json.dumps(HEADER, separators=(",", ":"))[:40])
    journal = Journal(path, ABOUT)
    journal.append("a", [Row(**POINT)])
    journal.close()
    assert Journal(path, ABOUT).points["a"] == [Row(**POINT)]


def test_a_journal_in_use_is_refused(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    first = Journal(path, ABOUT)
    with pytest.raises(ValueError) as error:
        Journal(path, ABOUT)
    one_line(error, path, "another run")
    first.close()
    Journal(path, ABOUT).close()


def test_a_full_disk_keeps_every_whole_point(tmp_path, monkeypatch):
    path = tmp_path / "x.journal.jsonl"
    journal = Journal(path, ABOUT)
    journal.append("a", [Row(**POINT)])

    class Full:
        left = 20

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            taken, self.left = min(self.left, len(data)), 0
            with path.open("ab") as file:
                return file.write(data[:taken])

    file, journal._file = journal._file, Full()  # type: ignore[assignment]
    with pytest.raises(ValueError) as error:
        journal.append("b", [Row(**POINT)])
    one_line(error, path, "No space left")
    file.close()
    again = Journal(path, ABOUT)
    assert list(again.points) == ["a"] and "half-written" in again.notes[0]


def test_a_parquet_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.parquet"
    write_parquet(path, [Row(**POINT)], ABOUT)
    monkeypatch.setattr(rows_module.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_parquet(path, [Row(**POINT)] * 2, ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"] and len(read_parquet(path)[0]) == 1


def test_finishing_an_empty_journal_changes_nothing(tmp_path):
    journal = tmp_path / "x.journal.jsonl"
    journal.touch()
    with pytest.raises(ValueError, match="no point was measured"):
        finish_only(tmp_path)
    assert not journal.read_bytes() and not (tmp_path / "x.parquet").exists()


def test_finishing_onto_a_folder_is_one_line(tmp_path):
    journal = Journal(tmp_path / "x.journal.jsonl", ABOUT)
    journal.append("a", [Row(**POINT)])
    journal.close()
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(ValueError) as error:
        finish_only(tmp_path)
    one_line(error, tmp_path / "x.parquet", "cannot be written")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "²"], "--tp"),
        (["--tp", "3"], "--tp 3"),
        (["--tp", "1,1000"], "--tp 1000"),
        (["--ops", ","], "--ops"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "9" * 30], "--seed"),
    ],
)
def test_measure_refuses_what_would_measure_nothing(tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("calibration.measure.command._gpus", lambda device: 1)
    common = ["--out", str(tmp_path), "--device", "cpu", "--budget", "1s", "--models", "llama-3.1-8b"]
    result = CliRunner().invoke(measure, [*common, *arguments])
    assert result.exit_code and said in f"{result.output}{result.exception}"
    assert not list(tmp_path.iterdir())


# ---- profiles -------------------------------------------------------------------------------------------------------


@cache
def shipped() -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(read_profile("h200-sxm"))
    kernels = document["kernels"]
    for table in kernels["linears"].values():
        table["shapes"], table["slowness"] = table["shapes"][:6], table["slowness"][:6]
    return json.loads(json.dumps(document))


def changed(path: tuple[Any, ...], value: Any) -> bytes:
    document = deepcopy(shipped())
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return json.dumps(document).encode()


LINEAR = ("kernels", "linears", "bfloat16")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*LINEAR, "bandwidth_bytes_per_s"), 0, "kernels.linears.bfloat16.bandwidth_bytes_per_s=0"),
        ((*LINEAR, "flops_per_s"), -1, "flops_per_s=-1"),
        ((*LINEAR, "weight_bytes"), 0.0, "weight_bytes=0.0"),
        ((*LINEAR, "slowness", 2, 5), -0.5, "slowness=-0.5"),
        ((*LINEAR, "slowness", 0), [1.0], "linears.bfloat16.tokens"),
        ((*LINEAR, "slowness"), [], "linears.bfloat16.tokens"),
        ((*LINEAR, "tokens"), [], "linears.bfloat16.tokens"),
        ((*LINEAR, "tokens", 1), 10**400, "linears.bfloat16.tokens"),
        ((*LINEAR, "shapes", 0, 0), 0, "linears.bfloat16.shapes=0"),
        ((*LINEAR, "shapes"), [[64, 64]], "linears.bfloat16.shapes"),
        (("kernels", "linears"), {}, "kernels.linears"),
        (("kernels", "decodes"), [], "kernels.decodes"),
        (("kernels", "prefills"), [], "kernels.prefills"),
        (("kernels", "decodes", 0, "seqs"), [8, 4], "decodes.seqs"),
        (("kernels", "decodes", 0, "base_s", 0), -1e-6, "decodes.base_s"),
        (("kernels", "decodes", 0, "heads", "kv_heads"), 0, "heads.kv_heads=0"),
        (("kernels", "decodes", 0, "heads", "kv_dtype"), "fp6", "kv_dtype='fp6'"),
        (("kernels", "prefills", 0, "pair_s"), 0.0, "prefills.pair_s=0.0"),
        (("kernels", "prefills", 0, "cached_s"), 1e308, "prefills.cached_s"),
        (("kernels", "head_rows"), {"size_bytes": [], "seconds": []}, "head_rows.size_bytes"),
        (("kernels", "head_rows", "size_bytes"), [2.0, 1.0], "head_rows.size_bytes"),
        (("kernels", "all_reduce", "two"), {"size_bytes": [1.0], "seconds": [1e-6]}, "all_reduce.two"),
        (("kernels", "gpu"), "h100-sxm", "kernels.gpu=h100-sxm"),
        (("gpu_clock", "full_kv_token_s"), -1e-9, "gpu_clock.full_kv_token_s"),
        (("gpu_clock", "sharpness"), 0, "gpu_clock.sharpness=0"),
        (("host_clock", "stall_share"), -1, "host_clock.stall_share=-1"),
        (("tensor_parallel",), 0, "tensor_parallel=0"),
    ],
)
def test_a_profile_whose_numbers_cannot_be_is_refused(path, value, said):
    with pytest.raises(ValueError) as error:
        decode_profile(changed(path, value), "mine.json")
    one_line(error, "mine.json", said)


@pytest.mark.parametrize("deviation", [{"gpu_decode": -0.1}, {"host": 1e308}, {"count": 0}])
def test_a_spread_that_cannot_be_is_refused(deviation):
    good = {"gpu_decode": 0.01, "gpu_chunk": 0.0, "host": 0.1, "count": 3}
    decode_profile(changed(("spread",), {"runs": good, "machines": good}), "mine.json")
    with pytest.raises(ValueError) as error:
        decode_profile(changed(("spread",), {"runs": good, "machines": good | deviation}), "mine.json")
    one_line(error, "mine.json", f"spread.machines.{next(iter(deviation))}")


def _numbers(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(part, dict):
        return [found for key, held in part.items() for found in _numbers(held, (*path, key))]
    if isinstance(part, list):
        return [
            found for i in sorted({0, len(part) - 1} & set(range(len(part)))) for found in _numbers(part[i], (*path, i))
        ]
    return [path] if isinstance(part, int | float) and not isinstance(part, bool) else []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_changed_number_is_refused_or_gives_times(data):
    parts = {name: shipped()[name] for name in ("gpu_clock", "kernels")}
    path = data.draw(st.sampled_from(_numbers(parts)))
    value = data.draw(st.sampled_from([0, -1, -1e-9, 1, 2.5, 1e300]))
    try:
        profile = decode_profile(changed(path, value), "mine.json")
    except ValueError as error:
        assert "\n" not in str(error) and "mine.json" in str(error)
        return
    with np.errstate(all="raise", under="ignore"):
        for dtype, tensor_parallel in (("bfloat16", 1), ("fp8", 2)):
            chosen = CostSettings(tensor_parallel, dtype, "auto", Graphs((1, 8, 64, 256), 256))
            cost = ProfileCost(profile, find_model("qwen2.5-7b"), find_gpu("h200-sxm"), chosen)
            times = [cost.mixed_s([(512, 2000)], 8, 9000), *cost.decode_ramp(64, 64_000)]
            assert np.isfinite(times).all() and min(times) > 0.0


def test_a_profile_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    write_profile(read_profile("h200-sxm"), path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError) as error:
        write_profile(read_profile("h100-sxm"), path)
    one_line(error, path, "No space left")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("command", [touch_up_command, fit_command])
def test_an_output_that_cannot_be_used_is_refused_before_the_work(tmp_path, command):
    common = ["--gpu", "h200-sxm", "--model", "llama-3.1-8b"] if command is fit_command else []
    for output in (tmp_path / "mine.txt", tmp_path / "none" / "mine.json"):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            command.main(["no-such-folder", "-o", str(output), *common], standalone_mode=False)
        one_line(error, output)
    check_output(tmp_path / "mine.json")


# ---- recordings -----------------------------------------------------------------------------------------------------


def _write(file: Path, lines: list[Any]) -> None:
    with gzip.open(file, "wt", compresslevel=1) as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


STEP = ["s", 0.002, 0.0004, 1024, 0, 0, [[1024, 0]], 1, 0, 0.001]
STEPS = [STEP, ["x", 0.003, 0.02, 1024], ["y", 0.028, 0.001], ["u", 0.06, 0.0002]]
GPU = [0, 0.01, 1.0, 20.0, 0.3, "NONE", 1024, 0]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    folder = tmp_path / "recording"
    folder.mkdir()
    (folder / "engine.json").write_text("{}")
    _write(
        folder / "a.requests.json.gz", [{"requests": [{"submit": 0.0, "prompt": 1024, "output": 1, "t": [[0.06, 1]]}]}]
    )
    _write(folder / "a.steps.jsonl.gz", STEPS)
    _write(folder / "a.gpu.jsonl.gz", [GPU])
    assert len(read_recording(folder).scenarios[0].steps) == 1
    return folder


@pytest.mark.parametrize("name", ["a.requests.json.gz", "a.steps.jsonl.gz", "a.gpu.jsonl.gz", "engine.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "[]"])
def test_a_damaged_file_of_a_recording_is_named(recording, name, damage):
    file = recording / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9] if file.suffix == ".gz" else b"{")
    elif damage == "[]":
        _write(file, [5]) if file.suffix == ".gz" else file.write_text("[]")
    else:
        file.write_bytes(b"" if damage == "empty" else b"hello")
    if (name, damage) == ("a.gpu.jsonl.gz", "empty"):
        return  # GPU times are optional
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, recording, "damaged")


@pytest.mark.parametrize("name", ["a.requests.json", "a.steps.jsonl", "a.gpu.jsonl"])
def test_files_packed_with_xz_are_read_and_judged_alike(recording, name):
    (whole,) = read_recording(recording).scenarios
    file = recording / f"{name}.gz"
    packed = lzma.compress(gzip.decompress(file.read_bytes()))
    file.unlink()
    file.with_suffix(".xz").write_bytes(packed)
    (again,) = read_recording(recording).scenarios
    assert (again.steps, again.requests) == (whole.steps, whole.requests)
    file.with_suffix(".xz").write_bytes(packed[:-9])
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, recording, "damaged")
    file.with_suffix(".xz").write_bytes(packed)
    file.write_bytes(gzip.compress(lzma.decompress(packed)))
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, recording, f"{name}.gz is there as {name}.xz")
    file.unlink()
    file.with_suffix(".xz").unlink()
    file.with_suffix(".xz").mkdir()
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, f"{name}.xz", "Is a directory")


def test_a_folder_without_loads_is_no_recording(recording):
    (recording / "a.requests.json.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_recording(recording)
    one_line(error, recording, "no NAME.requests.json.gz")


@pytest.mark.parametrize("wrong", ["cut", "doubled", "another's"])
def test_a_step_log_of_other_requests_is_refused(tmp_path, wrong):
    engine, requests, steps, *_ = (
        SECOND / name
        for name in ("engine.json", f"{LOAD}.requests.json.xz", f"{LOAD}.steps.jsonl.xz", "chat_q20.steps.jsonl.xz")
    )
    for file in (engine, requests):
        shutil.copy(file, tmp_path)
    if wrong == "another's":
        steps = SECOND / "chat_q20.steps.jsonl.xz"
    lines = lzma.decompress(steps.read_bytes()).splitlines(keepends=True)
    lines = lines[: len(lines) // 2] if wrong == "cut" else 2 * lines if wrong == "doubled" else lines
    (tmp_path / f"{LOAD}.steps.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError) as error:
        read_recording(tmp_path)
    one_line(error, tmp_path, "decodes in the step log")


@pytest.mark.parametrize(
    "change", [{"submit": "soon"}, {"prompt": -1}, {"prompt": "x"}, {"output": 0}, {"t": [[1, -2]]}, {"submit": None}]
)
def test_requests_no_recorder_writes_are_refused(recording, change):
    request = {"submit": 0.0, "prompt": 1024, "output": 1, "t": [[0.06, 1]]} | change
    _write(recording / "a.requests.json.gz", [{"requests": [request]}])
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, recording, "damaged")


@pytest.mark.parametrize(
    "change", [{"cudagraph_capture_sizes": ["a"]}, {"cudagraph_capture_sizes": 5}, {"max_num_seqs": "x"}, {}]
)
def test_an_engine_whose_launches_are_not_known_is_refused(recording, change):
    (recording / "engine.json").write_text(json.dumps(change))
    with pytest.raises(ValueError) as error:
        _ = read_recording(recording).graphs
    one_line(error, recording / "engine.json", next(iter(change), "cudagraph_capture_sizes"))


def test_what_is_given_twice_is_refused(tmp_path):
    out = str(tmp_path / "x.json")
    about = ["-o", out, "--gpu", "h200-sxm", "--model", "llama-3.1-8b"]
    for command, words in (
        (fit_command, [f"{SECOND}:{LOAD}", f"{SECOND}/:{LOAD}", *about]),
        (spread_command, ["h200-sxm", "--machine", str(SECOND), "--machine", f"{SECOND}/"]),
    ):
        with pytest.raises(ValueError) as error:
            command.main(words, standalone_mode=False)
        one_line(error, SECOND, "given twice")


@pytest.mark.parametrize(
    ("steps", "gpu"),
    [
        ([*STEPS, ["s", 1.0]], [GPU]),
        ([*STEPS, []], [GPU]),
        ([*STEPS, {}], [GPU]),
        ([*STEPS, ["q", 1.0]], [GPU]),
        ([*STEPS, ["y", 0.2, -9.0]], [GPU]),
        ([["s", 1e999, *STEP[2:]]], []),
        ([["s", 0.0, 0.1, 1024, 2.5, *STEP[5:]]], []),
        (STEPS, [[0, 0.1, 1.0, 1e12, 0.3, "NONE", 1024, 0]]),
        ([*STEPS, ["w", 0.1, 0.1, 5], ["v", 0.2]], [GPU]),
        ([["s", 0.0, 0.1, -5, *STEP[4:]]], []),
        ([["s", 0.0, 0.1, 5, 0, 0, [[0, 0]], 1, 0, 0]], []),
        ([["s", 0.0, float("nan"), *STEP[3:]]], []),
        (STEPS, [[7, *GPU[1:]]]),
        (STEPS, [[-1, *GPU[1:]]]),
        (STEPS, [[0, 1.0]]),
        (STEPS, [[0, None, None, None, None, "FULL", 1, 0]]),
        (STEPS, [[0, 0.1, 1.0, -20.0, 0.3, "NONE", 1024, 0]]),
    ],
)
def test_lines_no_recorder_writes_are_refused(recording, steps, gpu):
    _write(recording / "a.steps.jsonl.gz", steps)
    _write(recording / "a.gpu.jsonl.gz", gpu)
    with pytest.raises(ValueError) as error:
        read_recording(recording)
    one_line(error, recording, "damaged")


def test_a_recording_of_another_gpu_or_model_is_not_fitted():
    path, engine = SECOND / "engine.json", json.loads((SECOND / "engine.json").read_text())
    check_named(path, engine, "h200-sxm", "llama-3.1-8b")
    check_named(path, {"model": "given config"}, "h200-sxm", "llama-3.1-8b")
    with pytest.raises(ValueError) as error:
        check_named(path, engine, "h100-sxm", "llama-3.1-8b")
    one_line(error, path, "h200-sxm", "h100-sxm")
    with pytest.raises(ValueError) as error:
        check_named(path, engine, "h200-sxm", "qwen3-8b")
    one_line(error, path, "llama-3.1-8b", "qwen3-8b")


def test_a_touch_up_needs_steps(tmp_path):
    folder = tmp_path / "recording"
    folder.mkdir()
    for file in SECOND.iterdir():
        if file.name.startswith(LOAD) or file.name == "engine.json":
            shutil.copy(file, folder)
    command = [str(folder), "-o", str(tmp_path / "mine.json"), "--first", "0.05s"]
    with pytest.raises(ValueError, match="steps; 20 or more"):
        touch_up_command.main(command, standalone_mode=False)
    assert not (tmp_path / "mine.json").exists()


@pytest.mark.parametrize(("option", "value"), [("--load-seed", "-1"), ("--time-limit", "nan")])
def test_record_names_the_option_that_is_wrong(tmp_path, option, value):
    common = ["--loads", "warm", "--model", "llama-3.1-8b", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(record_command, [*common, option, value])
    assert result.exit_code and option in f"{result.output}{result.exception}"


def test_a_load_of_more_requests_than_fit_is_refused_at_once():
    with pytest.raises(ValueError) as error:
        make_loads("poisson:10:1:q99999999999:99999999s")
    one_line(error, "poisson:10:1", "requests")
