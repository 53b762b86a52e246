"""`llmsim rerun`: the same bytes from the manifest alone; what changed is said in one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsim import Scenario, cli, load_trace, simulate
from llmsim.choice import Replay, Synthesis, TraceChoice, replay
from llmsim.engines import ENGINES
from llmsim.rerun import rerun
from llmsim.runs import write_run
from llmsim.runs_origin import origin

ROOT = Path(__file__).parents[1]
MACHINE = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "traces" / "chat.csv", tmp_path / "chat.csv")
    shutil.copy(ROOT / "examples" / "short_prompts_first.py", tmp_path / "mine.py")
    (tmp_path / "mine.toml").write_text("[h100]\nusd_per_gpu_hour = 2.5\nsource = 'my contract'\ndate = 2026-02-01\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replayed(*words: str, trace: str = "chat.csv", out: str = "run") -> Path:
    assert cli.main(["replay", trace, *MACHINE, "--limit", "80", "--out", out, *words]) == 0
    return Path(out)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["rerun", *words])
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    return status, out.strip()


@pytest.mark.parametrize(
    "words",
    [
        ["--rate", "9.5", "--start", "3", "--seed", "4", "--goodput", "ttft:61.5", "--save-detailed", "--timeline"],
        ["--scheduler", "mine.py:ShortPromptsFirst", "--scheduler-arg", "prefill_tokens=300", "--closed-loop"],
        ["--columns", "arrival=arrival_time_s", "--assign-classes", "a:0.5:ttft=1s;b:0.5", "--predict", "sigma=0.4"],
        ["--rate", "inf", "--host-scale", "1.5", "--prices", "mine.toml"],
        ["--max-model-len", "900", "--over-context", "truncate", "--concurrency", "3"],
        [
            "--spread",
            "uniform",
            "--time-scale",
            "0.4",
            "--kv-tier",
            "cpu:8GiB:20GB/s:10us",
            "--enforce-eager",
            "--block-size",
            "32",
        ],
        ["--speculative-config", '{"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}'],
        *(["--engine", engine] for engine in ENGINES if engine != "vllm"),
    ],
)
def test_a_run_repeats_to_the_byte(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = replayed(*words)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    status, line = told(capsys, "run")
    assert line.startswith("run: the same bytes: iterations.parquet, requests.parquet, summary.json")
    assert status == 0
    assert ("trace.json.gz" in line) == ("--timeline" in words)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_price_of_ones_own_is_paid_and_named_also_after_its_file_has_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the price, twice the cost, in the intervals too; the words are those of `llmsim plan`."""
    words = ["--limit", "40", "--no-out", "--json", "--seeds", "19", "--jobs", "1"]
    cheap, dear = (folder / "mine.toml", folder / "twice.toml")
    dear.write_text(cheap.read_text().replace("2.5", "5.0"))
    found = []
    for prices in (cheap, dear):
        capsys.readouterr()
        assert cli.main(["replay", "chat.csv", *MACHINE, *words, "--prices", str(prices)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for key in ("cost_per_1m_output_tokens", "cost_per_1m_total_tokens"):
        assert found[1][key] == pytest.approx(2 * found[0][key])
        ends = [one["intervals"]["intervals"][key] for one in found]
        assert ends[1] == pytest.approx([2 * end for end in ends[0]])
    assert found[0]["price"] == "$2.50 per h100-sxm and hour (my contract, 2026-02-01)"
    capsys.readouterr()
    replayed("--prices", "mine.toml")
    assert "Price: $2.50 per h100-sxm and hour (my contract, 2026-02-01)" in capsys.readouterr().out
    cheap.unlink()
    assert told(capsys, "run")[0] == 0
    assert cli.main(["replay", "chat.csv", *MACHINE, "--prices", "gone.toml"]) == 2
    assert "--prices gone.toml: no such file" in capsys.readouterr().err


def test_from_another_folder_its_own_files_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed("--scheduler", "mine.py:ShortPromptsFirst")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = rerun("../run")
    assert found.equal
    assert found.folder == Path("../run")
    assert Path.cwd() == elsewhere
    assert list(elsewhere.iterdir()) == []


def test_what_has_changed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    replayed("--scheduler", "mine.py:ShortPromptsFirst")
    text = Path("mine.py").read_text()
    Path("mine.py").write_text(text.replace("prefill_tokens: int = 1024", "prefill_tokens: int = 64"))
    status, line = told(capsys, "run")
    assert status == 1
    assert line.startswith("run: differs in iterations.parquet, requests.parquet, summary.json: mine.py has changed; ")
    assert "first of all duration: " in line
    Path("mine.py").write_text(text + "# a comment\n")
    status, line = told(capsys, "run")
    assert status == 0
    assert line.endswith("MB); mine.py has changed")
    Path("mine.py").unlink()
    assert told(capsys, "run") == (1, "run: cannot be repeated: mine.py is gone, which its scenario names")


def test_another_version_is_said_also_where_it_makes_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    replayed()
    changed("run", lambda manifest: manifest["versions"].update(llmsim="0.0.9"))
    status, line = told(capsys, "run")
    assert status == 0
    assert line.endswith("; llmsim 0.0.9 then, 0.1.0 now")


def test_another_profile_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    profile = json.loads((ROOT / "llmsim/profiles/h100-sxm.json").read_text())
    Path("mine.json").write_text(json.dumps(profile))
    replayed("--cost", "mine.json")
    assert told(capsys, "run")[0] == 0
    profile["host_clock"]["schedule_s"] += 0.001
    Path("mine.json").write_text(json.dumps(profile))
    # A process reads a profile once, so another one has to look.
    command = [sys.executable, "-m", "llmsim", "rerun", "run"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "mine.json has changed; the profile has changed: " in done.stdout


def test_a_trace_that_is_gone_or_changed(capsys: pytest.CaptureFixture[str]) -> None:
    replayed()
    shutil.move("chat.csv", "moved.csv")
    assert told(capsys, "run") == (
        1,
        "run: cannot be repeated: its trace chat.csv is gone: give it with --trace FILE",
    )
    status, line = told(capsys, "run", "--trace", "moved.csv")
    # The summary does not name the file; the same bytes come from wherever it is.
    assert (status, line.split(":")[1]) == (0, " the same bytes")
    with open("moved.csv", "a") as trace:
        trace.write("1e4,5,5\n")
    shutil.copy("moved.csv", "chat.csv")
    status, line = told(capsys, "run")
    assert status == 1
    assert line.startswith("run: cannot be repeated: its trace chat.csv has changed: SHA-256 ")


def test_a_streamed_trace_has_to_be_given(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        buffer = io.BytesIO(Path("chat.csv").read_bytes())

    monkeypatch.setattr(sys, "stdin", Stream())
    replayed(trace="-")
    status, line = told(capsys, "run")
    assert status == 1
    assert line == "run: cannot be repeated: its trace came from standard input: give it with --trace FILE"
    assert told(capsys, "run", "--trace", "chat.csv")[0] == 0


def test_files_that_somebody_touched(capsys: pytest.CaptureFixture[str]) -> None:
    replayed()
    with open("run/summary.json", "a") as summary:
        summary.write(" ")
    Path("run/requests.parquet").unlink()
    status, line = told(capsys, "run")
    assert status == 1
    assert line == (
        "run: differs in requests.parquet, summary.json: requests.parquet was deleted after the run; summary.json was"
        " changed after the run"
    )


def test_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert cli.main(["rerun", "empty"]) == 2
    assert "empty: not a run folder (no manifest.json)" in capsys.readouterr().err
    Path("empty/manifest.json").write_text("{}")
    assert cli.main(["rerun", "empty"]) == 2
    replayed()
    changed("run", lambda manifest: manifest.pop("written"))
    assert "an llmsim before rerun wrote it" in told(capsys, "run")[1]


def test_runs_that_python_wrote_repeat_too(folder: Path) -> None:
    trace = load_trace("chat.csv", limit=50, rate=8)
    scenario = Scenario(model="llama-3.1-8b", gpu="h100-sxm", seed=5)
    result = simulate(load_trace("chat.csv", limit=50, rate=8, seed=5), scenario)
    extra = origin(trace, "chat.csv", {"limit": 50, "rate": 8}, scenario)
    write_run(result, folder / "mine", summary=result.summary(), manifest_extra=extra)
    assert rerun("mine").equal


@pytest.mark.parametrize("traffic", [1.0, 3.0])
def test_runs_of_the_dashboard_repeat(folder: Path, traffic: float) -> None:
    """Of a file and of a synthetic trace, faster and cut short."""
    scenario = Scenario(model="llama-3.1-8b", gpu="h100-sxm", seed=2)
    made = TraceChoice(synthesis=Synthesis(requests=90, seed=4), traffic=traffic)
    read = TraceChoice(path=str(folder / "chat.csv"), traffic=traffic, over_context="drop", requests=100)
    for name, choice in (("made", made), ("read", read)):
        replay(Replay(choice, scenario, folder / name, limit=60))
        assert rerun(name).in_words().startswith(f"{name}: the same bytes")
    refused = rerun("made", trace="chat.csv").in_words()
    assert refused == "made: cannot be repeated: its trace is synthetic: leave --trace chat.csv out"


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    replayed()
    status, line = told(capsys, "run", "--json")
    document: dict[str, Any] = json.loads(line)
    assert (status, document["equal"], document["different"], document["reasons"]) == (0, True, [], [])


def changed(run: str, change: Any) -> None:
    path = Path(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_folder_as_trace_is_checked_by_its_files(tmp_path: Path) -> None:
    from llmsim.runs_origin import digest

    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("1")
    before = digest(tmp_path / "a")
    assert before == digest(tmp_path / "a") != ""
    (tmp_path / "a/x").write_text("2")
    assert digest(tmp_path / "a") != before
    os.rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/x").write_text("1")
    assert digest(tmp_path / "b") == before
    assert digest(tmp_path / "none") == ""
