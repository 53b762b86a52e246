"""Pages that run: every cell of the tutorial and of the page about sweeps runs, and prints the words it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from needs import require

from benchmarks.pages import BLOCK, PAGES, ROOT, refreshed, run_page

require("altair")
require("vl_convert")
Cells = list[tuple[str, str | None, str]]
CELLS = {"tutorial.md": 9, "sweep.md": 6}  # blocks, at least


def masked(text: str) -> str:
    """Words without numbers, what follows from them, and widths, which change with every cost model."""
    text = re.sub(r"\b(better|worse|unclear|True|False)\b", "~", re.sub(r"[-+−]?\d[\d.,]*", "#", text))
    return " ".join(text.replace("-", "").split())


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Cells]:
    folder = tmp_path_factory.mktemp("page")
    return request.param, folder, run_page((ROOT / "docs" / request.param).read_text(encoding="utf-8"), folder)


def test_cells_print_the_words_that_the_page_shows(page: tuple[str, Path, Cells]) -> None:
    name, _, cells = page
    assert len(cells) >= CELLS[name]
    for code, shown, printed in cells:
        if shown is not None:
            assert printed.strip(), code
            assert masked(printed) == masked(shown)


def test_the_pages_leave_what_they_say(page: tuple[str, Path, Cells]) -> None:
    name, folder, cells = page
    if name == "tutorial.md":
        assert "<svg" in (folder / "tutorial.svg").read_text()[:200]
        assert (ROOT / "docs" / "tutorial.svg").exists()
        assert any("ShortestPromptFirst keeps every rule" in printed for _, _, printed in cells)
    else:
        assert len(list((folder / "sweeps" / "chunks").glob("part-*.parquet"))) == 8


def test_the_mistake_of_the_page_about_sweeps_is_said_like_that(tmp_path: Path) -> None:
    from llmsim.sweep_yaml import read_spec

    text = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    spec = next(code for kind, code, _, _ in BLOCK.findall(text) if kind == "yaml")
    lines = spec.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("seeds"))
    lines.insert(at, "  max_num_seq: [64]")
    (tmp_path / "chunks.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        read_spec(tmp_path / "chunks.yaml")
    assert f"error: {str(caught.value).removeprefix(f'{tmp_path}/')}\n" in text


def test_a_page_is_printed_again_in_place(tmp_path: Path) -> None:
    page = "Say\n\n```python\nx = 3\nprint(x)\n```\n```text\nold\n```\n\n"
    page += "```python\ny = x + 1\n```\n\n```text\nstays\n```\n"
    page += "```python\n# more.py\nz = 5\n```\n```sh\nllmsim --version\n```\n```text\n```\n"
    (tmp_path / "a").mkdir()
    made = refreshed(page, tmp_path / "a")
    assert made == page.replace("old\n", "3\n").replace("```text\n```", "```text\nllmsim, version 0.1.0\n```")
    assert (tmp_path / "a" / "more.py").read_text() == "# more.py\nz = 5\n"
    (tmp_path / "b").mkdir()
    assert refreshed(made, tmp_path / "b") == made
