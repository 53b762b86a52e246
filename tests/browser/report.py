"""A picture of a report: `python -m tests.browser.report docs/report.png` makes runs, report and picture."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from llmsim.choice import shipped
from llmsim.cli import main
from tests.browser.drive import FLAGS, chromium, shrink

SETTING = ("--model", "llama-3.1-8b", "--goodput", "ttft:500", "tpot:50")
RUNS = {"H100, 16 requests/s": ("--gpu", "h100-sxm"), "H200, 16 requests/s": ("--gpu", "h200-sxm")}
SIZE = {"width": 1120, "height": 2010}  # down to the end of the strip


def take_picture(path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as place:
        words = []
        for at, (label, flags) in enumerate(RUNS.items()):
            trace, folder = shipped("chat.csv").path, f"{place}/{at}"
            assert main(["replay", trace, *SETTING, *flags, "--rate", "16", "--out", folder]) == 0
            words += [folder, "--label", label]
        report = Path(place) / "report.html"
        assert main(["report", *words, "-o", str(report)]) == 0
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
            tab = browser.new_page(viewport=SIZE)
            tab.goto(report.as_uri())
            tab.wait_for_function("document.querySelectorAll('figure svg.marks').length === 6")
            tab.screenshot(path=str(path), clip={"x": 0, "y": 0, **SIZE})
            browser.close()
        shrink(path)


if __name__ == "__main__":
    take_picture(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/report.png"))
