"""`llmsim report`: one file that needs nothing else, also in a real browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser.drive import browsing
from made_results import made_result, random_served
from needs import require

from llmsim.cli import main
from llmsim.html_report import common_targets, page
from llmsim.runs import read_run, write_run

require("altair")
require("vl_convert")

TARGETS = {"ttft": 500.0, "tpot": 50.0}


def run_folder(folder: Path, seed: int, *, goodput: dict[str, float] | None = None, slower: float = 1.0) -> Path:
    served = [
        replace(one, token_s=[one.arrival_s + slower * (at_s - one.arrival_s) for at_s in one.token_s])
        for one in random_served(400, seed)
    ]
    result = made_result(served)
    extra = {"command": ["llmsim", "replay", "my trace.csv", "--gpu", "h100-sxm"], "trace": {"name": "my trace.csv"}}
    write_run(result, folder, summary=result.summary(goodput), manifest_extra=extra)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    return [run_folder(place / "a", 1, goodput=TARGETS), run_folder(place / "b", 1, goodput=TARGETS, slower=2.0)]


@pytest.fixture(scope="module")
def report(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", *map(str, folders), "--label", "one", "--label", "<two>", "-o", str(path)]) == 0
    return path


class Seen(HTMLParser):
    """Links, headings and the documents of charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.charts: list[str] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [str(given[name]) for name in ("src", "href", "data", "action") if name in given]
        if tag == "script" and given.get("type") == "application/json":
            tag = "chart"
            self.charts.append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "chart":
            self.charts[-1] += data
        elif self.open:
            self.words.setdefault(self.open[-1], []).append(data)


def test_the_file_loads_nothing_and_forbids_it(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert Seen(text.replace("<meta ", "<br><meta ")).loads == []
    assert "url(" not in text.partition("<script>")[0] and "@import" not in text.partition("<script>")[0]
    assert "default-src 'none'" in text
    assert 0.9e6 < report.stat().st_size < 2e6


def test_its_charts_have_data_of_both_runs_and_stay_small(report: Path) -> None:
    documents = [json.loads(chart) for chart in Seen(report.read_text(encoding="utf-8")).charts]
    assert len(documents) == 6
    for document in documents:
        rows = [row for dataset in document["datasets"].values() for row in dataset]
        assert len(rows) <= 20_000
        assert {row["label"] for row in rows if "label" in row} == {"one", "<two>"}
    assert [len(document["description"]) > 40 for document in documents] == [True] * 6


def test_its_numbers_are_those_of_the_summaries(report: Path, folders: list[Path]) -> None:
    text = report.read_text(encoding="utf-8")
    first, second = (read_run(folder).summary for folder in folders)
    row = re.search(r"<tr><th scope='row'>TTFT, P99 \(ms\).*?</tr>", text)
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row[0])
    assert cells[0] == f"{first['p99_ttft_ms']:,.0f}" or cells[0] == f"{first['p99_ttft_ms']:.3g}"
    change = second["p99_ttft_ms"] / first["p99_ttft_ms"] - 1.0
    assert f"{change:+.1%} worse" in cells[1]
    assert change == pytest.approx(1.0, abs=1e-6)  # twice as slow
    assert f"P99 TTFT (ms):                           {second['p99_ttft_ms']:.2f}" in text


def test_it_says_what_made_it_and_what_it_rests_on(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "llmsim replay &#x27;my trace.csv&#x27; --gpu h100-sxm" in text
    assert "<title>llmsim: my trace.csv</title>" in text
    assert "Cost model: constant 0.01 s" in text or "Cost model: " in text
    assert "&lt;two&gt;" in text and "<strong><two>" not in text


def test_slo_lines_are_drawn_only_where_all_runs_were_judged_alike(folders: list[Path], tmp_path: Path) -> None:
    runs = {folder.name: read_run(folder) for folder in folders}
    assert common_targets(runs) == TARGETS
    runs["c"] = read_run(run_folder(tmp_path / "c", 2))
    assert common_targets(runs) == {}


def test_wrong_input_is_one_line(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folders[0])
    for arguments, words in (
        ([run, "-o", "x.pdf"], "--out x.pdf: a report is a page: give a name that ends in .html"),
        ([run, "-o", str(tmp_path / "none" / "x.html")], "there is no folder"),
        ([str(tmp_path), "-o", "x.html"], "not a run folder (no manifest.json)"),
        ([run, run, "-o", "x.html"], f"{run} is given twice: leave one out"),
        ([run, "--label", "a", "--label", "b", "-o", "x.html"], "2 --label for 1 runs: give one for each"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="no run to report"):
        page({})


def test_a_browser_draws_it_and_asks_nobody(report: Path) -> None:
    require("playwright")
    asked: list[str] = []
    errors: list[str] = []
    with browsing() as browser:
        tab = browser.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(report.as_uri())
        tab.wait_for_function("document.querySelectorAll('figure svg.marks').length === 6", timeout=20_000)
        dots = tab.locator("#chart-requests .mark-symbol path[aria-roledescription]")
        lines = tab.locator("#chart-requests path[aria-roledescription=bar]")
        assert dots.count() >= 400
        lines.first.wait_for()
        before = [lines.count(), lines.first.get_attribute("aria-label")]
        tab.locator("#chart-requests").scroll_into_view_if_needed()
        tab.evaluate("document.querySelector('#chart-requests').scrollIntoView()")
        box = tab.locator("#chart-requests svg.marks").bounding_box()
        assert box is not None
        tab.mouse.move(box["x"] + 500, box["y"] + 90)
        tab.mouse.down()
        tab.mouse.move(box["x"] + 640, box["y"] + 280, steps=4)
        tab.mouse.up()
        tab.wait_for_timeout(300)
        assert [lines.count(), lines.first.get_attribute("aria-label")] != before  # the brush chose others
    assert asked == [report.as_uri()]
    assert errors == []
