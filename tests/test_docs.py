"""The README tells the truth: its commands run, its output has the lines it shows, its code is the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import accuracy
from benchmarks.accuracy import update
from llmsim.cli import main
from llmsim.cost.profile import read_profile
from llmsim.readers import FORMATS
from llmsim.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "traces" / "README.md"])


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("llmsim ")]


def python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def run(command):
    return python("-m", "llmsim", *shlex.split(command)[1:])


def labels(text):
    """What stands before the numbers of each line."""
    return [re.split(r":|\s\d", line)[0].strip() for line in text.strip().splitlines()]


def test_readme_has_commands_to_run():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if "../shared" not in c])
def test_command_of_the_readme_runs(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_replay_of_the_readme_prints_the_lines_it_shows(tmp_path):
    (command,) = [c for c in COMMANDS if "../shared" in c]
    trace = (ROOT / shlex.split(command)[2]).resolve()
    if not trace.exists():
        assert not os.environ.get("CI"), f"CI is set and {trace} is missing"
        pytest.skip(f"{trace} is not there")
    done = run(command.replace(shlex.split(command)[2], shlex.quote(str(trace))) + f" --out {tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("text")[:1]
    assert labels(done.stdout) == labels(shown)
    # What does not depend on the profile is the very number.
    for name in ("Successful requests", "Total input tokens", "Total generated tokens"):
        pattern = rf"{name}:\s+(\d+)"
        assert re.search(pattern, done.stdout)[1] == re.search(pattern, shown)[1]


def test_example_policy_is_the_file():
    example = (ROOT / "examples" / "short_prompts_first.py").read_text(encoding="utf-8")
    assert example in blocks("python")


def test_python_of_the_readme_runs():
    (code,) = [block for block in blocks("python") if "simulate(" in block]
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.0


def test_example_policy_changes_what_it_claims_to():
    from llmsim import Scenario, load_trace, simulate

    trace = load_trace(ROOT / "traces" / "bursty.csv")
    mine = f"{ROOT / 'examples' / 'short_prompts_first.py'}:ShortPromptsFirst"

    def summary(scheduler):
        return simulate(trace, Scenario(model="llama-3.1-8b", gpu="h100-sxm", scheduler=scheduler)).summary()

    theirs, ours = summary("vllm"), summary(mine)
    assert ours["completed"] == theirs["completed"] == len(trace)
    assert ours["p99_itl_ms"] < theirs["p99_itl_ms"]  # small chunks beside the decodes
    assert ours["mean_ttft_ms"] < theirs["mean_ttft_ms"]  # shortest first, in bursts


def test_every_format_is_named():
    missing = [f.name for f in FORMATS if f"`{f.name}`" not in README]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert all((page.parent / target).exists() for target in targets), targets


def test_every_key_and_column_is_defined(tmp_path):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    spread = re.compile(r"(mean|median|std|p\d\d)_(ttft|tpot|itl|e2el)_ms")
    command = "llmsim replay traces/chat.csv --model llama-3.1-8b --gpu h100-sxm --limit 20 --save-detailed --json"
    done = run(f"{command} --goodput ttft:500 --out {shlex.quote(str(tmp_path / 'run'))}")
    assert done.returncode == 0, done.stderr
    written = read_run(tmp_path / "run")
    names = [*json.loads(done.stdout), *written.summary, *written.manifest, *written.requests, *written.iterations]
    assert len(names) > 100
    assert [name for name in names if f"`{name}`" not in page and not spread.fullmatch(name)] == []


def test_table_of_accuracy_holds_every_recorded_load_apart_by_fit(monkeypatch):
    monkeypatch.setattr(accuracy, "SEEDS", 2)  # the numbers are the matter of test_accuracy.py
    folder = ROOT / "tests" / "data" / "recordings" / "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16"
    lines = CliRunner().invoke(accuracy.main, [str(folder)], catch_exceptions=False).stdout.splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| load")]
    assert rows == [
        "azconv_x1",
        "closed64_1024_256",
        "poisson_1024_128_q18",
        "poisson_1024_128_q8 *(fitted)*",
        "decode_grid (30 batches) *(fitted)*",
    ]


def test_table_goes_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nb\n", encoding="utf-8")
    update(page, "| new |")
    assert page.read_text(encoding="utf-8") == "a\n<!-- accuracy -->\n| new |\n<!-- /accuracy -->\nb\n"
    with pytest.raises(click.UsageError, match="needs one <!-- accuracy -->"):
        update(ROOT / "LICENSE", "| new |")


def test_every_module_has_its_room_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Rooms and floors")[2].partition("## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    package = ROOT / "llmsim"
    rooms = {path.stem for path in package.glob("*.py") if not path.stem.startswith(("_", "cli_"))}
    rooms |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(name for name in rooms if f"`{name}`" not in " ".join(rows)) == []
    assert sorted(name for row in rows for name in re.findall(r"`([a-z_]+/?)`", row) if name not in rooms) == []


@pytest.mark.parametrize("page", ["README.md", "docs/accuracy.md"])
def test_printed_numbers_are_those_of_the_shipped_profile(page):
    """After a new fit: python -m benchmarks.refresh."""
    named = re.findall(r"profile ([\w.-]+) \(([0-9a-f]{12})\)", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert set(named) == {(name, read_profile(name).id) for name, _ in named}
