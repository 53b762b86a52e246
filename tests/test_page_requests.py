"""The dashboard's page of requests: every widget, what cannot be shown, and what only a browser can do with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browser.drive import opened, served
from made_results import Served, made_result, random_served
from needs import require

from llmsim import views
from llmsim.choice import Replay, replay, shipped
from llmsim.cli import main
from llmsim.explain import spans
from llmsim.runs import read_run, write_run
from llmsim.scenario import Scenario
from llmsim.views_life import explained

require("streamlit")

from streamlit.testing.v1 import AppTest  # noqa: E402 - after the check

PAGE = Path(__file__).parent.parent / "app_pages" / "requests.py"
CROWDED = Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.02", num_gpu_blocks_override=2500)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped bursts on an engine that is too small for them, as `llmsim replay` writes it."""
    folder = tmp_path_factory.mktemp("runs") / "crowded"
    trace = str(Path(shipped("bursty.csv").path))
    flags = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", "constant:0.02"]
    assert main(["replay", trace, *flags, "--num-gpu-blocks-override", "2500", "--out", str(folder)]) == 0
    return folder


def page(monkeypatch: pytest.MonkeyPatch, *runs: Path, **asked: object) -> AppTest:
    monkeypatch.setenv("LLMSIM_DASHBOARD_RUNS", json.dumps([str(run) for run in runs]))
    test = AppTest.from_file(str(PAGE), default_timeout=60)
    for name, value in asked.items():
        test.session_state[name] = value
    test.run()
    assert not test.exception
    return test


def captions(test: AppTest) -> str:
    return "\n".join(caption.value for caption in test.caption)


def test_it_opens_on_the_shipped_trace_and_every_widget_works(monkeypatch: pytest.MonkeyPatch) -> None:
    test = page(monkeypatch)
    assert test.title[0].value == "Requests"
    assert test.selectbox(key="requests_run").value == "candidate"
    assert "Quick answer on all 2,000 requests." in captions(test)
    assert "Draw a rectangle over the dots" in captions(test)
    test.selectbox(key="requests_run").select("baseline").run()
    test.segmented_control(key="requests_measure").set_value("e2el").run()
    test.slider(key="requests_rows").set_value(100).run()
    test.number_input(key="requests_id").set_value(17).run()
    assert not test.exception and not test.error
    commands = test.code[0].value.splitlines()
    assert commands[0].startswith("llmsim replay ") and commands[-1].endswith("--request 17")


def test_it_opens_on_the_runs_it_was_given(monkeypatch: pytest.MonkeyPatch, crowded: Path, tmp_path: Path) -> None:
    result = made_result([*random_served(50, 1), Served(1.0, [])])  # of no trace, and one request is rejected
    write_run(result, tmp_path / "other", summary=result.summary())
    test = page(monkeypatch, crowded, tmp_path / "other")
    assert test.selectbox(key="requests_run").value == "crowded"
    assert f"llmsim explain {crowded} --request" in test.code[0].value
    test.selectbox(key="requests_run").select("other").run()
    assert "What the run's columns tell; no more, since" in captions(test)
    test.number_input(key="requests_id").set_value(50).run()
    assert [error.value for error in test.error] == [
        "request 50 was rejected: it has no phases; choose one that was answered"
    ]


def test_a_life_explained_is_that_of_llmsim_explain(crowded: Path, tmp_path: Path) -> None:
    run = read_run(crowded)
    request = int(np.nanargmax(run.requests["ttft_s"]))
    frame = explained(crowded, request)
    expected = spans(shipped("bursty.csv").load(), CROWDED, [request])
    assert frame["begin_s"].iloc[0] == expected["start_s"].iloc[0] == run.requests["arrival_s"][request]
    assert frame["end_s"].iloc[-1] == expected["end_s"].iloc[-1] == run.requests["finish_s"][request]
    assert frame["share"].sum() == pytest.approx(1.0)
    for phase in ("queue", "prefill", "decode"):
        seconds = (expected["end_s"] - expected["start_s"])[expected["phase"] == phase].sum()
        assert frame["duration_ms"][frame["phase"] == phase].sum() == pytest.approx(1e3 * seconds)
    assert "KV cache full" in frame["reason"][frame["duration_ms"].idxmax()]
    plain = views.life(run, request)
    assert plain["e2el_ms"].iloc[0] == frame["e2el_ms"].iloc[0]
    # the same of a run that a page made, whose manifest does not know the trace
    made = replay(Replay(shipped("bursty.csv"), CROWDED, tmp_path / "made"))
    with pytest.raises(ValueError, match="its manifest does not say how its trace was read"):
        explained(made, request)
    again = explained(made, request, shipped("bursty.csv"), CROWDED)
    assert again.equals(frame)
    with pytest.raises(ValueError, match="had other numbers"):
        explained(made, request, shipped("bursty.csv"), Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.01"))


def test_in_a_browser_a_brush_a_click_and_a_download(crowded: Path, tmp_path: Path) -> None:
    require("playwright")
    with served(cwd=tmp_path, runs=[crowded]) as server, opened(server, (1400, 1300)) as window:
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
