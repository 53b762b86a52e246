"""Pages that run: `python -m benchmarks.pages` runs the cells of docs/tutorial.md, sweep.md and explain.md and prints
again what stands below them. `tests/test_docs_pages.py` runs them too, and holds them to the words that they show.

A block of Python is run, one after the other in one namespace, as in a notebook; a block of sh has a command a line. If
a block of text follows, it is what they print. A block that begins with a comment that names a file (`# my_policy.py`,
`# chunks.yaml`) is saved under that name instead.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from llmsim import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("tutorial.md", "sweep.md")
REPORTS = ("explain.md",)  # what they find may change with a cost model, and so their words
READ = ("traces", "examples")  # what pages read of the checkout
BLOCK = re.compile(r"^```(python|sh|yaml)\n(.*?)^```\n(?:(```text\n)(.*?)^```\n)?", flags=re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")


def run_page(page: str, folder: Path) -> list[tuple[str, str | None, str]]:
    """(code, what is shown below it or None, what it printed) of every block; `folder` becomes what they leave."""
    for name in READ:
        (folder / name).symlink_to(ROOT / name)
    namespace: dict[str, Any] = {"__name__": "page"}
    done = []
    with chdir(folder):
        for kind, code, _, shown in BLOCK.findall(page):
            named = FILE.match(code)
            if named is not None:
                Path(named[1]).write_text(code, encoding="utf-8")
                printed = ""
            else:
                printed = (_python if kind == "python" else _commands)(code, namespace)
            done.append((code, shown if _shows(page, code) else None, printed))
    return done


def _shows(page: str, code: str) -> bool:
    return f"{code}```\n```text\n" in page


def _python(code: str, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "<page>", "exec"), namespace)
    return out.getvalue()


def _commands(code: str, _: dict[str, Any]) -> str:
    out = io.StringIO()
    for line in code.splitlines():
        program, *words = shlex.split(line)
        assert program == "llmsim", line
        with redirect_stdout(out), redirect_stderr(io.StringIO()) as said:
            status = cli.main(words)
        if status:
            raise RuntimeError(f"{line}: exit status {status}: {said.getvalue().strip()}")
    return out.getvalue()


def refreshed(page: str, folder: Path) -> str:
    """The page with what its blocks print now."""
    printed = iter(run_page(page, folder))

    def again(block: re.Match[str]) -> str:
        _, shown, text = next(printed)
        return block[0] if shown is None else f"```{block[1]}\n{block[2]}```\n```text\n{text.rstrip()}\n```\n"

    return BLOCK.sub(again, page)


def main(tell: Callable[[str], None] = print) -> None:
    for name in (*PAGES, *REPORTS):
        path = ROOT / "docs" / name
        with tempfile.TemporaryDirectory() as place:
            path.write_text(refreshed(path.read_text(encoding="utf-8"), Path(place)), encoding="utf-8")
            for picture in Path(place).glob("*.svg"):
                shutil.copy(picture, ROOT / "docs" / picture.name)
        tell(f"{path.relative_to(ROOT)}: printed again")


if __name__ == "__main__":
    main()
