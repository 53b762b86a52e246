"""`llmsim replay --intervals`: beside the numbers where it is asked for, nothing changed where it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmsim import cli

MACHINE = ["--model", "llama-3.1-8b", "--gpu", "h200-sxm"]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forty requests, five a second."""
    path = tmp_path / "forty.csv"
    lines = [f"{0.2 * i:.1f},{100 + 20 * i},{5 + i % 7}" for i in range(40)]
    path.write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert cli.main([*arguments]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def replay(capsys: pytest.CaptureFixture[str], trace: str, *arguments: str) -> str:
    return run(capsys, "replay", trace, *MACHINE, *arguments)


def test_json_gains_one_key_and_all_else_stays(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(replay(capsys, trace, "--no-out", "--json"))
    asked = json.loads(replay(capsys, trace, "--no-out", "--json", "--intervals", "19", "--jobs", "1"))
    found = asked.pop("intervals")
    for document in (plain, asked):
        del document["sim_wall_s"], document["sim_speedup"]
    assert asked == plain
    assert (found["level"], found["draws"], found["seed"]) == (0.9, 19, 0)
    low, middle, high = found["intervals"]["mean_ttft_ms"]
    assert low < middle < high and low < plain["mean_ttft_ms"] < high
    assert {"p99_e2el_ms", "median_tpot_ms", "p90_itl_ms", "request_throughput", "cost_per_1m_output_tokens"} <= set(
        found["intervals"]
    )
    assert "slo_attainment" not in found["intervals"], "no targets, no attainment"
    assert found["sources"]["machine"]["host"] > 0.0


def test_the_block_has_them_beside_the_numbers_and_marks_both(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = replay(
        capsys, trace, "--no-out", "--intervals", "19", "--jobs", "1", "--goodput", "ttft:1000", "tpot:1000",
        "--slo", "ttft_p99=10s", "--slo", "tpot_mean=1us",
    )  # fmt: skip
    assert re.search(r"^Mean TTFT \(ms\): +[\d.]+ +\[[\d.]+, [\d.]+\]$", out, re.M)
    assert re.search(r"^P99 TTFT \(ms\): +[\d.]+\* +\[[\d.]+, [\d.]+\]\*$", out, re.M), "40 requests are too few"
    assert re.search(r"^Request goodput \(req/s\): +[\d.]+ +\[[\d.]+, [\d.]+\]$", out, re.M)
    assert re.search(r"^SLO attainment .*: +100\.0 % +\[100\.0, 100\.0\]$", out, re.M)
    assert "P(99 % of requests meet the targets):    100 % (19 of 19 draws)\n" in out
    assert "P(ttft_p99=10s):                         100 % (19 of 19 draws)\n" in out
    assert "P(tpot_mean=1us):                        0 % (0 of 19 draws)\n" in out
    assert "P(all of these SLOs are met):            0 % (0 of 19 draws)\n" in out
    assert "[low, high] holds 90 % of what this trace, on another machine of the kind in another hour" in out
    assert "[" not in replay(capsys, trace, "--no-out"), "nothing of it where it was not asked for"


def test_a_run_folder_keeps_them(trace: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    replay(capsys, trace, "--out", str(tmp_path / "with"), "--seeds", "19", "--jobs", "1")
    replay(capsys, trace, "--out", str(tmp_path / "without"))
    held, plain = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("with", "without"))
    found = held.pop("intervals")
    assert held == plain
    assert found["of"] == "this trace, on the same machine again"
    assert found["sources"]["hour"] == {"decode": 0.0, "chunk": 0.0, "host": 0.0}


def test_the_number_may_be_left_out_before_anything(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    constant = [*MACHINE, "--cost", "constant:0.01", "--no-out", "--json"]
    for order in (["--intervals", trace], ["--intervals", "32", trace], [trace, "--intervals"]):
        assert json.loads(run(capsys, "replay", *order, *constant))["intervals"]["draws"] == 32
    seven = json.loads(run(capsys, "replay", trace, *constant, "--intervals=7", "--level", "0.75"))["intervals"]
    assert (seven["draws"], seven["level"]) == (7, 0.75)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--intervals", "5"], "--intervals=5: an interval that holds 90 % needs 19 or more"),
        (["--seeds", "5"], "--seeds=5: an interval that holds 90 % needs 19 or more"),
        (["--intervals", "--level", "0.99"], "an interval that holds 99 % needs 199 or more"),
        (["--intervals", "--level", "90"], "level=90.0: give a share between 0 and 1"),
        (["--intervals", "--seeds", "20"], "--intervals contradicts --seeds"),
        (["--slo", "ttft=1s"], "slo 'ttft=1s': write METRIC_STATISTIC=LIMIT"),
        (["--level", "0.5"], "--level needs --intervals or --seeds"),
        (["--jobs", "2"], "--jobs needs --intervals or --seeds"),
        (["--intervals", "--slo", "ttft=1s"], "slo 'ttft=1s'"),
        (["--intervals", "--jobs", "0"], "jobs=0: give 1 or more processes"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_simulated(
    trace: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    err = run(capsys, "replay", trace, *MACHINE, "--no-out", *arguments, status=2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]


def test_a_promise_is_kept_or_broken_without_draws(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = replay(capsys, trace, "--out", "run", "--slo", "ttft_p99=10s", "--slo", "tpot_mean=1us")
    assert re.search(r"^TTFT p99 <= 10000 ms: +✓ [\d.]+ ms$", out, re.M)
    assert re.search(r"^TPOT mean <= 0\.001 ms: +✗ [\d.]+ ms$", out, re.M)
    assert "promises" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    found = json.loads(replay(capsys, trace, "--no-out", "--json", "--slo", "ttft_p99=10s"))
    assert [(row["slo"], row["met"]) for row in found["promises"]] == [("ttft_p99=10s", True)]
    assert found["promises"][0]["value_s"] == pytest.approx(found["p99_ttft_ms"] / 1e3, rel=0.2)
