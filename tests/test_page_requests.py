"""The dashboard's page of requests: every widget, what cannot be shown, and why a request waited."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from made_results import Served, made_result, random_served
from pages import AppTest
from pages import page as named_page

from llmsim import views, views_life
from llmsim.choice import Replay, replay, shipped
from llmsim.cli import main
from llmsim.explain import spans
from llmsim.runs import read_run, write_run
from llmsim.scenario import Scenario
from llmsim.views_life import explained

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
    return named_page("requests", **asked)


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


def test_a_long_run_is_replayed_on_a_button_to_explain_a_request(
    monkeypatch: pytest.MonkeyPatch, crowded: Path
) -> None:
    run = read_run(crowded)
    request = int(np.nanargmax(run.requests["ttft_s"]))
    monkeypatch.setattr(views_life, "AT_ONCE", len(run.requests["id"]) - 1)
    test = page(monkeypatch, crowded, requests_id=request)
    assert reasons(test) == views.life(run, request)["reason"].tolist()  # what the columns tell
    test.button(key="requests_explain_start").click().run()
    deadline_s = time.monotonic() + 60
    while len(reasons(test)) == 3:
        assert time.monotonic() < deadline_s and not test.error
        time.sleep(0.1)
        test.run()
    assert reasons(test) == explained(crowded, request)["reason"].tolist()[:30]
    assert not [button for button in test.button if button.key == "requests_explain_start"]
    test.number_input(key="requests_id").set_value(0).run()  # another request is asked for anew
    assert test.button(key="requests_explain_start") and reasons(test) == views.life(run, 0)["reason"].tolist()
    assert not test.exception and not test.error


def reasons(test: AppTest) -> list[str]:
    return list(test.table[0].value["what"])


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
    # the same of a run that a page made
    made = replay(Replay(shipped("bursty.csv"), CROWDED, tmp_path / "made"))
    assert explained(made, request).equals(frame)
    again = explained(made, request, shipped("bursty.csv"), CROWDED)
    assert again.equals(frame)
    with pytest.raises(ValueError, match="had other numbers"):
        explained(made, request, shipped("bursty.csv"), Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.01"))
