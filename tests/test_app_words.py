"""Small words of the dashboard: settings typed in, advice that a page can follow, commands, axes."""

from pathlib import Path

import pytest
from pages import errors, linked

from app_pages.shared_output import for_pages
from app_pages.shared_scenario import other_fields
from llmsim.charts import _ticks
from llmsim.charts_run import ecdf_chart, strip_panels
from llmsim.choice import on_disk, shipped
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.views import ecdf, strip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('a="b', "a quote or a backslash is left open"),
        ("a=1\\", "a quote or a backslash is left open"),
        ("engine=orca engine=vllm", "engine is given twice, 'orca' and 'vllm'"),
        ("watermark", "write FIELD=VALUE"),
    ],
)
def test_other_settings_are_refused_with_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=r"^other settings") as caught:
        other_fields(text)
    assert words in str(caught.value)


def test_advice_is_about_the_page(tmp_path: Path):
    long = {"trace_from": "synthetic", "trace_n": "60", "trace_prompt": "120000"}
    (line,) = errors(linked("what_if", **long))
    assert "--" not in line and "Take shorter prompts and answers, or raise max_model_len (other settings)" in line
    path = tmp_path / "odd.csv"
    path.write_text("a,b,c\n1,2,3\n")
    (line,) = errors(linked("what_if", trace_from="file", trace_path=str(path)))
    assert "llmsim trace convert" in line
    path.write_text("arrival_time_s,prompt_tokens,output_tokens\n0,200000,20\n")
    (line,) = errors(linked("what_if", trace_from="file", trace_path=str(path)))
    assert "Choose drop or truncate for requests longer" in line
    assert for_pages("x.csv: no such file") == "x.csv: no such file"


def test_an_upload_that_begins_like_an_option_is_a_file_in_commands(tmp_path: Path):
    path = tmp_path / "-rf.csv"
    path.write_text("arrival_time_s,prompt_tokens,output_tokens\n0,20,20\n")
    assert on_disk(path, "-rf.csv").shown() == ["./-rf.csv"]
    assert on_disk(path).shown() == [str(path)]


@pytest.mark.parametrize(("low", "high"), [(310.0, 390.0), (11.2, 11.9), (0.00912, 0.00913), (230.0, 460.0)])
def test_a_short_axis_has_ticks_in_it(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks) and ticks == sorted(set(ticks))


def test_curves_and_strips_have_ticks_that_differ():
    alike = Scenario("llama-3.1-8b", "h100-sxm", cost="constant:0.02")
    result = simulate(shipped("chat.csv").load(30), alike)
    frame = ecdf({"run": result}, "e2el")
    frame["value"] = 310.0 + 60.0 * frame["value"].rank(pct=True)
    axis = ecdf_chart(frame).to_dict()["layer"][0]["encoding"]["x"]["axis"]
    assert len(axis["values"]) >= 2 and all(310 / 1.1 <= tick <= 370 * 1.1 for tick in axis["values"])
    waiting = strip_panels(strip({"run": result}))[1].to_dict()
    assert {layer["encoding"]["y"]["axis"]["tickMinStep"] for layer in waiting["layer"]} == {1}
