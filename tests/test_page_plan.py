"""The page of plans, every widget of it, without a browser."""

from __future__ import annotations

import time
from functools import partial

import pytest
from pages import AppTest, charts, commands, errors, linked, warnings

from llmsim.choice import shipped
from llmsim.plan_study import Demand, planned, quick_requests
from llmsim.scenario import Scenario

FAST = {"plan_more": "cost=constant:0.02 max_num_seqs=64", "plan_rate": "60"}
opened = partial(linked, "plan", **FAST)
DEMAND = Demand(
    shipped("chat.csv"),
    Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.02", max_num_seqs=64),
    ("ttft_p99=500ms", "tpot_p95=50ms"),
    rate=60.0,
    gpus=("h100-sxm", "h200-sxm"),
    tensor_parallels=(1, 2),
    engines=("vllm",),
)


def test_the_answers_are_the_librarys() -> None:
    from dataclasses import replace

    at = opened()
    assert not errors(at) and charts(at) == 2
    found = planned(replace(DEMAND, limit=quick_requests(DEMAND)))
    cheapest = found.cheapest
    assert cheapest is not None
    assert found.notes and warnings(at) == list(found.notes)
    assert any("queues hardly form" in note for note in found.notes)
    limits = [caption.value for caption in at.caption if caption.value.startswith("Holds up to")]
    assert cheapest.capacity_broken is not None and any(cheapest.capacity_broken.why_not in words for words in limits)
    assert f"{cheapest.gpus} GPUs · ${cheapest.usd_per_h:,.2f}/h" in [metric.value for metric in at.metric]
    assert at.dataframe[0].value["option"].tolist() == [option.name for option in found.options]
    assert len(at.dataframe[1].value) == len(found.runs)
    assert "llmsim plan" in commands(at) and "--rate 60" in commands(at) and "--tp 1,2" in commands(at)


def test_the_command_line_asks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed by the command itself, up to where it would plan."""
    from importlib import import_module

    from llmsim.cli import main

    at = opened(plan_budget="50", plan_most="16")
    seen: dict[str, object] = {}

    def stop(trace: object, scenario: Scenario, slos: object, **asked: object) -> None:
        seen.update(asked, scenario=scenario, slos=tuple(map(str, slos)))
        raise ValueError("stop here")

    # the module: on the package that name is the public function
    monkeypatch.setattr(import_module("llmsim.plan"), "plan", stop)
    import shlex

    assert main(shlex.split(at.code[-1].value)[1:]) == 2
    assert seen["slos"] == DEMAND.slos and seen["rate"] == 60.0 and seen["budget_usd_per_h"] == 50.0
    assert seen["gpus"] == DEMAND.gpus and tuple(seen["tensor_parallels"]) == (1, 2) and seen["max_gpus"] == 16
    assert seen["scenario"] == DEMAND.scenario


def test_the_knee_of_any_option() -> None:
    at = opened(plan_view="Knee")
    assert not errors(at) and charts(at) == 2 and commands(at).endswith("--curve")
    names = at.selectbox(key="plan_option").options
    at.selectbox(key="plan_option").set_value(names[-1]).run()
    assert not at.exception and any(names[-1] in caption.value for caption in at.caption)


def test_how_sure_waits_to_be_asked() -> None:
    at = opened(plan_view="How sure")
    at.slider(key="plan_draws").set_value(39).run()
    at.slider(key="plan_confidence").set_value(90).run()
    assert not errors(at) and charts(at) == 0 and at.button(key="plan_sure_job_start").label == "How sure is that?"


def test_confidence_and_the_machine_change_how_sure_it_is() -> None:
    at = opened(plan_view="How sure", trace_from="synthetic", trace_n="100", plan_more="max_num_seqs=64")
    at.multiselect(key="plan_gpus").set_value(["h100-sxm"])
    at.multiselect(key="plan_tp").set_value([1]).run()
    held, *kept = answered(at).items()
    assert charts(at) == 2 and held[0] == "Kept with 90%" and not errors(at)
    at.slider(key="plan_confidence").set_value(50).run()
    held, *same = answered(at).items()
    assert held[0] == "Kept with 50%" and same == kept
    at.slider(key="plan_confidence").set_value(99).run()
    assert charts(at) == 0 and ["needs 199 or more" in error for error in errors(at)] == [True]
    at.slider(key="plan_confidence").set_value(90).run()
    assert any("machine" in caption.value.partition("; ")[2][:80] for caption in at.caption)
    at.toggle(key="plan_machine").set_value(False).run()
    assert charts(at) == 0 and at.button(key="plan_sure_job_start")  # another question


def answered(at: AppTest) -> dict[str, str]:
    """What the page says of how sure it is, once its job is done."""
    if any(button.key == "plan_sure_job_start" for button in at.button):
        at.button(key="plan_sure_job_start").click().run()
    deadline_s = time.monotonic() + 60
    while not any(metric.label.startswith("Kept with") for metric in at.metric):
        assert time.monotonic() < deadline_s and not errors(at), errors(at)
        time.sleep(0.1)
        at.run()
    labels = [metric.label for metric in at.metric]
    first = next(place for place, label in enumerate(labels) if label.startswith("Kept with"))
    return {metric.label: metric.value for metric in at.metric[first:]}


def test_nothing_meets_the_promises() -> None:
    at = opened(plan_most="1", plan_rate="500")
    assert errors(at) == ["Nothing that was tried meets the promises; below is what breaks in each."]
    assert not at.dataframe[0].value["answers"].any() and at.dataframe[0].value["breaks_next"].all()


def test_a_given_fleet_is_asked_for_its_highest_rate() -> None:
    at = opened()
    at.number_input(key="plan_rate").set_value(0.0)
    at.number_input(key="plan_replicas").set_value(2)
    at.multiselect(key="plan_gpus").set_value(["h100-sxm"])
    at.multiselect(key="plan_tp").set_value([1])
    at.multiselect(key="plan_engines").set_value(["sglang"]).run()
    assert not errors(at) and not at.exception
    assert at.dataframe[0].value["option"].tolist() == ["2 x h100-sxm TP1 sglang"]
    assert "--replicas 2" in commands(at) and "--rate" not in commands(at)


def test_confidence_is_looked_at_on_the_whole_trace_only() -> None:
    at = opened()
    at.selectbox(key="plan_sure").set_value("0.95").run()
    assert not errors(at) and "--confidence 0.95" in commands(at)
    assert at.button(key="plan_job_start").label == "Plan on the whole trace"
    assert at.dataframe[0].value["probability"].isna().all()


@pytest.mark.parametrize(
    ("widget", "value", "said"),
    [
        ("plan_slos", ["ttft_p99=fast"], "slo 'ttft_p99=fast'"),
        ("plan_slos", [], "no slo"),
        ("plan_gpus", [], "no GPU: choose one or more"),
        ("plan_tp", [], "no number of GPUs of a replica"),
        ("plan_engines", [], "no engine"),
    ],
)
def test_what_is_no_question_is_refused_in_place(widget: str, value: list[str], said: str) -> None:
    at = opened()
    at.multiselect(key=widget).set_value(value).run()
    assert not at.exception and any(said in error for error in errors(at)), errors(at)
    assert charts(at) == 0


def test_impossible_settings_are_refused_in_place() -> None:
    at = opened()
    at.text_input(key="plan_more").set_value("max_num_seqs=0").run()
    assert not at.exception and any("max_num_seqs=0" in error for error in errors(at))
    at.text_input(key="plan_more").set_value("colour=red").run()
    assert any("unknown field 'colour'" in error for error in errors(at))
    at.text_input(key="plan_more").set_value("cost=constant:0.02").run()
    at.selectbox(key="plan_weights").set_value("fp8").run()
    at.selectbox(key="plan_model").set_value("llama-3.1-70b").run()
    assert not at.exception
