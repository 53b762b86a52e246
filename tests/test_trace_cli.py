"""`llmsim trace` describes, converts and makes traces; wrong input ends with one line and exit code 2."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from llmsim.cli import main
from llmsim.trace import load_trace

TRACES = Path(__file__).parents[1] / "traces"


class Run(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Run:
    """The whole command, errors and all."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(["trace", *arguments])
    return Run(status, out.getvalue(), err.getvalue())


def test_describe_reports_on_stdout_and_notes_on_stderr() -> None:
    result = run("describe", str(TRACES / "chat.csv"))
    assert result.exit_code == 0
    assert "2000 read = 2000 kept + 0 dropped" in result.stdout and "note:" not in result.stdout
    assert "read as generic" in result.stderr
    report = json.loads(run("describe", "--json", str(TRACES / "chat.csv")).stdout)
    assert report["requests"] == 2000 and report["prompt_tokens"]["max"] >= report["prompt_tokens"]["p99"]


def test_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("when,who\n1,a\n")
    for arguments in (("describe", str(tmp_path / "bad.csv")), ("describe", str(tmp_path / "none.csv"))):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_convert_keeps_every_request(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    assert run("convert", str(TRACES / "sessions.jsonl"), "-o", str(out)).exit_code == 0
    one, two = load_trace(TRACES / "sessions.jsonl"), load_trace(out)
    assert np.array_equal(one.arrival_s, two.arrival_s, equal_nan=True)
    assert one.block_ids == two.block_ids and one.output_block_ids == two.output_block_ids


def test_convert_to_mooncake_and_back(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    path = TRACES / "shared_prefixes.csv"
    assert run("convert", str(path), "-o", str(out), "--to", "mooncake").exit_code == 0
    refused = run("describe", str(out))
    assert refused.exit_code == 2 and "--block-tokens 256" in refused.stderr
    back = load_trace(out, block_tokens=256)
    assert back.format == "mooncake" and back.block_ids == load_trace(path).block_ids
    assert np.allclose(back.arrival_s, load_trace(path).arrival_s)


def test_what_mooncake_cannot_hold_is_refused(tmp_path: Path) -> None:
    result = run("convert", str(TRACES / "sessions.jsonl"), "-o", str(tmp_path / "m.jsonl"), "--to", "mooncake")
    assert result.exit_code == 2 and "Mooncake lines hold only" in result.stderr


def commands() -> list[str]:
    return re.findall(r"^llmsim trace (synth .*)$", (TRACES / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.rsplit("/", 1)[-1])
def test_shipped_trace_is_what_its_command_makes(tmp_path: Path, command: str) -> None:
    arguments = shlex.split(command)
    shipped = arguments[-1]
    arguments[-1] = str(tmp_path / Path(shipped).name)
    assert run(*arguments).exit_code == 0
    assert Path(arguments[-1]).read_bytes() == (TRACES.parent / shipped).read_bytes()


def test_every_shipped_trace_has_its_command_and_all_are_small() -> None:
    files = {path.name for path in TRACES.iterdir()} - {"README.md"}
    assert files == {Path(shlex.split(command)[-1]).name for command in commands()}
    assert sum(path.stat().st_size for path in TRACES.iterdir()) < 1_000_000


def test_classes_come_from_a_file(tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text('[{"name": "a", "share": 0.5, "slo_ttft_ms": 200}, {"name": "b", "share": 0.5, "priority": 1}]')
    out = str(tmp_path / "out.csv")
    assert run("synth", "--requests", "100", "--classes", str(classes), "-o", out).exit_code == 0
    made = load_trace(out)
    assert made.slo_class is not None and set(made.slo_class) == {"a", "b"}
    classes.write_text('[{"name": "a", "share": 1, "prio": 3}]')
    result = run("synth", "--requests", "100", "--classes", str(classes), "-o", out)
    assert result.exit_code == 2 and "does not know prio" in result.stderr
