"""Run folders: what is in them, that they repeat byte for byte, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_results import Served, made_result, random_served

import llmsim.runs
from llmsim import cli
from llmsim.metrics import Result
from llmsim.runs import read_run, write_run


def written(folder: Path, result: Result | None = None, **options: object) -> Path:
    result = result or made_result([*random_served(40, 2), Served(5.0, [])])
    write_run(result, folder, summary=result.summary(), **options)  # type: ignore[arg-type]
    return folder


def test_a_run_folder_reads_back_as_it_was_written(tmp_path: Path) -> None:
    result = made_result([*random_served(40, 2), Served(5.0, [])])
    run = read_run(written(tmp_path / "run", result, manifest_extra={"command": ["llmsim", "replay", "x.csv"]}))
    assert run.manifest["command"] == ["llmsim", "replay", "x.csv"]
    assert run.manifest["scenario"] == result.scenario.to_dict()
    for name, column in result.requests.items():
        np.testing.assert_array_equal(run.requests[name], column)
    for name, column in result.iterations.items():
        np.testing.assert_array_equal(run.iterations[name], column)
    expected = {name: v for name, v in result.summary().items() if name not in ("sim_wall_s", "sim_speedup")}
    assert run.summary == expected


def test_equal_runs_have_equal_bytes_however_long_they_took(tmp_path: Path) -> None:
    first = written(tmp_path / "a", timeline=True)
    slower = replace(made_result([*random_served(40, 2), Served(5.0, [])]), wall_s=99.0)
    second = written(tmp_path / "b", slower, timeline=True)
    for name in ("summary.json", "requests.parquet", "iterations.parquet", "trace.json.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    times = [json.loads((folder / "manifest.json").read_text())["sim_wall_s"] for folder in (first, second)]
    assert times == [0.5, 99.0]


def test_the_manifest_has_the_hash_of_every_other_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    for name, facts in listed.items():
        assert facts["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_detailed_arrays_carry_vllms_names(tmp_path: Path) -> None:
    served = [Served(0.0, [1.0, 1.5], prompt_tokens=7), Served(2.0, [], prompt_tokens=9)]
    detailed = read_run(written(tmp_path / "run", made_result(served), detailed=True)).summary
    assert detailed["input_lens"] == [7, 9]
    assert detailed["output_lens"] == [2, 0]
    assert detailed["ttfts"] == [1.0, 0.0]
    assert detailed["latencies"] == [1.5, 0.0]
    assert detailed["start_times"] == [0.0, 2.0]
    assert [bool(error) for error in detailed["errors"]] == [False, True]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr(llmsim.runs, "_manifest", fails)  # the last file: all the others are written by then
    with pytest.raises(type(failure)):
        written(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    written(tmp_path / "run")  # empty: fine
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="not an empty folder"):
        written(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a run folder \(no manifest.json\)"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "requests.parquet", "iterations.parquet"])
@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "null", "object", "gone", "other"])
def test_a_file_that_the_run_did_not_write_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = written(tmp_path / "run")
    path = folder / name
    content = path.read_bytes()
    other = written(tmp_path / "other", made_result([*random_served(40, 3), Served(5.0, [])])) / name
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes({
            "cut": content[:100], "byte": content[:middle] + b"\x00" + content[middle + 1 :], "empty": b"",
            "null": b"null", "object": b"{}", "other": other.read_bytes() + b" " * (name == "iterations.parquet"),
        }[damage])  # fmt: skip
    said = "cannot be read" if damage == "gone" else "not the file that this run wrote"
    with pytest.raises(ValueError, match=rf"run/{name}: {said} .*bring the file back, or make the run again$") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scenario": None}, r"scenario is None, which no run writes"),
        ({"scenario": {"model": "x"}}, r"scenario: has no 'gpu'"),
        ({"files": []}, r"files is \[\], which no run writes"),
        ({"files": {"summary.json": {}}}, r"files: has no sha256 of summary.json"),
        ({"versions": 1}, r"versions is 1, which no run writes"),
        ({"trace": "chat.csv"}, r"trace is 'chat.csv', which no run writes"),
        ({"trace": {"path": 1}}, r"trace: path is 1, which no run writes"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    folder = written(tmp_path / "run")
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"run/manifest\.json: {said}: bring the file back"):
        read_run(folder)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "{"])
@pytest.mark.parametrize("command", ["report", "compare", "explain", "rerun"])
def test_commands_refuse_what_is_no_manifest_in_one_line(
    tmp_path: Path, text: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "run")
    (folder / "manifest.json").write_text(text)
    end = {"report": ["-o", str(tmp_path / "x.html")], "compare": [str(written(tmp_path / "good"))]}.get(command, [])
    assert cli.main([command, str(folder), *end]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {folder}/manifest.json: ") and told.count("\n") == 1
