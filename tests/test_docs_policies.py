"""The tutorial tells the truth: its files are saved, its commands run in order, and it shows what they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from needs import require

require("altair")
require("vl_convert")

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def masked(text: str) -> str:
    """Words without numbers and widths, which change with every cost model."""
    return " ".join(re.sub(r"[-+−]?\d[\d.,]*|(?<=\s)0(?=\s)", "#", text).replace("-", "").split())


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    words = [sys.executable, *(["-m", "llmsim"] if words[0] == "llmsim" else []), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that has what the tutorial reads of the checkout."""
    for name in ("traces", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def draft() -> str:
    return next(text for text in blocks("python") if "class NewestFirst" in text)


def mended() -> str:
    """The draft with the tutorial's diff applied."""
    (diff,) = blocks("diff")
    old = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " -")
    new = "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in " +")
    assert draft().count(old) == 1
    return draft().replace(old, new)


def test_the_policy_has_fewer_than_twenty_lines() -> None:
    lines = draft().partition("class NewestFirst")[2].splitlines()
    assert len([line for line in lines if line.strip()]) < 20


def test_the_draft_mended_is_the_example() -> None:
    example = (ROOT / "examples" / "newest_first.py").read_text(encoding="utf-8")
    assert example.partition("\n\n")[2] == mended()


@pytest.mark.parametrize("name", ["keep_beginnings", "prefix_affinity"])
def test_the_other_examples_are_the_files(name: str) -> None:
    assert (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8") in blocks("python")


def test_the_tutorial_from_the_idea_to_the_plot(checkout: Path) -> None:
    (checkout / "my_policy.py").write_text(draft(), encoding="utf-8")
    (checkout / "check.py").write_text(next(text for text in blocks("python") if "check_scheduler" in text))
    texts = iter(blocks("text"))

    done = run("python check.py", checkout)
    assert done.returncode == 1
    assert masked(done.stderr.splitlines()[-1]) == masked(next(texts))

    (checkout / "my_policy.py").write_text(mended(), encoding="utf-8")
    done = run("python check.py", checkout)
    assert done.returncode == 0, done.stderr
    assert masked(done.stdout) == masked(next(texts))

    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("llmsim ")]
    assert len(commands) == 5
    outputs = []
    for command in commands:
        done = run(command, checkout)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        outputs.append(done.stdout)
    shown = next(texts)
    assert [masked(line) for line in outputs[1].splitlines()][:-4] == [masked(line) for line in shown.splitlines()][:-4]
    assert (checkout / "newest-first.png").read_bytes().startswith(b"\x89PNG")
    assert (checkout / "compared" / "requests.parquet").exists()


def test_the_other_snippet_runs(checkout: Path) -> None:
    code = next(text for text in blocks("python") if "check_eviction" in text)
    (checkout / "more.py").write_text(code)
    done = run("python more.py", checkout)
    assert "keeps every rule" in done.stdout, done.stderr


def test_what_the_comparison_claims(checkout: Path) -> None:
    """More of the requests within a second, for the price of a longer tail; the mean does not move."""
    from llmsim import Scenario, load_trace
    from llmsim.compare import compare, run_sides

    trace = load_trace(ROOT / "traces" / "bursty.csv", rate=5)
    mine = Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", scheduler=f"{ROOT / 'examples' / 'newest_first.py'}:NewestFirst"
    )
    targets = {"ttft": 1000.0}
    sides = {"vllm": Scenario(model="llama-3.1-8b", gpu="h100-sxm"), "mine": mine}
    found = compare(run_sides(trace, sides, targets), targets).differences["mine"]
    attainment, mean = found["slo_attainment"], found["mean_ttft_ms"]
    assert attainment.low is not None and attainment.low > 0.1
    assert mean.low is not None and mean.high is not None and mean.low < 0 < mean.high
    assert found["p99_ttft_ms"].value > 2000.0


def test_every_action_and_rule_is_in_the_tables() -> None:
    from llmsim.engine import Engine
    from llmsim.testing import FIXES

    acts = [name for name, value in vars(Engine).items() if callable(value) and not name.startswith("_")]
    acts += [name for name in dir(Engine) if not name.startswith("_") and callable(getattr(Engine, name))]
    inner = {"begin", "commit", "free", "completed_prompts"}  # what the loop calls, not policies
    assert [name for name in sorted(set(acts) - inner) if f"replica.{name}(" not in PAGE] == []
    assert [rule for rule in FIXES if f"| `{rule}` |" not in PAGE] == []


def test_the_index_has_every_page() -> None:
    pages = sorted(path.name for path in (ROOT / "docs" / "policies").glob("*.md"))
    index = PAGE.partition("<!-- policies -->")[2].partition("<!-- /policies -->")[0]
    assert [page for page in pages if f"](policies/{page})" not in index] == []
