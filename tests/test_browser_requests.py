"""The dashboard's page of requests in a real browser: what is drawn with the mouse, and what can be taken along."""

from __future__ import annotations

from pathlib import Path

from browser.drive import browsing, opened, served
from needs import require

from llmsim.choice import Replay, replay, shipped
from llmsim.scenario import Scenario

require("streamlit")
require("playwright")

CROWDED = Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.02", num_gpu_blocks_override=2500)


def test_a_brush_a_click_and_downloads(tmp_path: Path) -> None:
    run = replay(Replay(shipped("bursty.csv"), CROWDED, tmp_path / "run"))
    with (
        served(cwd=tmp_path, runs=[run]) as server,
        browsing() as browser,
        opened(server, browser, (1400, 1300)) as window,
    ):
        window.open("/")
        window.go_to("Requests")
        tab = window.page
        tab.wait_for_function("document.querySelectorAll('[data-testid=stVegaLiteChart] .marks').length >= 4")
        dots = tab.locator("[class*=st-key-requests_dots] .marks").first.bounding_box()
        assert dots is not None
        tab.mouse.move(dots["x"] + 0.4 * dots["width"], dots["y"] + 70)
        tab.mouse.down()
        tab.mouse.move(dots["x"] + 0.9 * dots["width"], dots["y"] + 200, steps=4)
        tab.mouse.up()
        tab.get_by_text("requests are in the rectangle").wait_for()
        words = tab.get_by_text("requests are in the rectangle").inner_text()
        inside, whole = (int(word.replace(",", "")) for word in words.split() if word[0].isdigit())
        assert 0 < inside < whole == 1500
        window.settle()
        bar = tab.locator(".st-key-requests_gantt [aria-roledescription=bar]").first
        box = bar.bounding_box()
        assert box is not None
        tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tab.wait_for_url("**requests_id=*")
        window.settle()
        assert tab.url.endswith(tab.locator(".st-key-requests_id input").input_value())
        tab.get_by_text("Download", exact=True).click()
        with tab.expect_download() as saved:
            tab.get_by_role("button", name="requests.csv").click()
        rows = Path(saved.value.path()).read_text().splitlines()
        assert len(rows) == inside + 1 and rows[0].startswith("id,arrival_s,prompt_tokens")
        with tab.expect_download() as saved:
            tab.get_by_role("button", name="perfetto.json.gz").click()
        assert Path(saved.value.path()).read_bytes()[:2] == b"\x1f\x8b"
        assert window.exceptions() == [] and window.elsewhere == [] and window.complaints == []
        assert server.errors() == []
