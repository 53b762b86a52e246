"""What is broken and no fault of the dashboard's: run folders, disks, users' own files. A line in place of each."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from made_results import made_result, random_served
from pages import errors, linked, page

from llmsim import runs
from llmsim.runs import write_run

SMALL = {"trace_from": "synthetic", "trace_n": "60", "trace_rate": "20"}
DAMAGES = {
    "no summary": lambda run: (run / "summary.json").unlink(),
    "half a summary": lambda run: (run / "summary.json").write_text('{"a":'),
    "another summary": lambda run: (run / "summary.json").write_text("[]"),
    "another manifest": lambda run: (run / "manifest.json").write_text("{}"),
    "half a table": lambda run: (run / "requests.parquet").write_bytes((run / "requests.parquet").read_bytes()[:500]),
    "other columns": lambda run: shutil.copy(run / "iterations.parquet", run / "requests.parquet"),
    "nothing": lambda run: shutil.rmtree(run),
}
# a page that does not look at what is damaged may show the rest
UNSEEN = {("requests", "another manifest"), ("calibration", "other columns")}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    result = made_result(random_served(50, 1))
    folder = tmp_path_factory.mktemp("runs") / "a"
    write_run(result, folder, summary=result.summary())
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_one_line_on_every_page(damage, good: Path, tmp_path: Path, monkeypatch):
    run = tmp_path / "damaged run"
    shutil.copytree(good, run)
    DAMAGES[damage](run)
    monkeypatch.setenv("LLMSIM_DASHBOARD_RUNS", json.dumps([str(run), str(good)]))
    for name, asked in {
        "what_if": {},
        "requests": {},
        "calibration": {"ca_tab": "This run", "ca_run": run.name},
    }.items():
        test = page(name, **asked)
        lines = errors(test)
        if not lines and (name, damage) in UNSEEN:
            continue
        assert len(lines) == 1 and "damaged run" in lines[0] and "\n" not in lines[0], (name, lines)


def test_runs_of_one_name_are_both_there(good: Path, tmp_path: Path, monkeypatch):
    other = tmp_path / "elsewhere" / good.name
    result = made_result(random_served(50, 2))
    write_run(result, other, summary=result.summary())
    monkeypatch.setenv("LLMSIM_DASHBOARD_RUNS", json.dumps([str(good), str(other)]))
    test = page("what_if")
    assert test.selectbox(key="shown_baseline").options == [str(good), str(other)]
    assert test.selectbox(key="shown_candidate").value == str(other)
    assert {metric.delta for metric in test.metric} != {"same"}
    assert page("calibration", ca_tab="This run").selectbox(key="ca_run").options[1:] == [str(good), str(other)]


def test_a_full_disk_is_said(monkeypatch):
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(runs, "write_parquet", full)
    (line,) = errors(linked("what_if", **SMALL, cand_more="seed=71"))
    assert "No space left on device: free some space, or set TMPDIR" in line and "llmsim-dashboard-" in line


def test_an_error_in_a_user_s_file_names_its_line(tmp_path: Path):
    file = tmp_path / "mine.py"
    for text, line, words in (
        ("x = 1 / 0\n", 1, "ZeroDivisionError"),
        ("class Mine:\n    def schedule(self, replica, now_s):\n        replica.nothing\n", 3, "AttributeError"),
    ):
        file.write_text(text)
        test = linked("what_if", **SMALL, cand_more=f"scheduler={file}:Mine", base_more=f"seed={line}")
        test.button[0].click().run()
        assert not test.exception and [f"{file}, line {line}: {words}" in one for one in errors(test)] == [True]


@pytest.mark.parametrize("path", ["~no-such-user-here/x", "/" + "x" * 5000, "-", "/dev/zero"])
def test_a_path_that_cannot_be_is_one_short_line(path):
    (line,) = errors(linked("what_if", trace_from="file", trace_path=path))
    assert len(line) < 300 and line.startswith(path[:20])
