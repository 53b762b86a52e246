"""The dashboard without a browser: every page and widget by Streamlit's AppTest, and what hours of clicking leave."""

import json
import os
import time
from pathlib import Path

import pytest
from needs import require

from llmsim.cli_dashboard import app

require("streamlit")

from streamlit.testing.v1 import AppTest  # noqa: E402  # after it is known to be there

APP = app()
PARTS = Path(__file__).parent / "small_page.py"  # the shared parts without charts: many clicks a second
SMALL = "trace_from=synthetic&trace_n=60&trace_rate=20"


@pytest.fixture(autouse=True, scope="module")
def _folder_of_its_own(tmp_path_factory):
    """Stores of other tests that run at the same time are none of our business, nor ours theirs."""
    import tempfile

    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("store"))
    yield
    tempfile.tempdir = before


def opened(query="", page=None, file=APP):
    """The app as a link opens it."""
    test = AppTest.from_file(str(file), default_timeout=60)
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        test.query_params[name] = value
    test.run()
    if page is not None:
        test.switch_page(page).run()
    return clean(test)


def clean(test):
    assert not test.exception, [error.value for error in test.exception]
    return test


def numbers(test):
    return {metric.label: metric.value for metric in test.metric}


@pytest.mark.parametrize("path", sorted((APP.parent / "app_pages").glob("*.py")), ids=lambda path: path.stem)
def test_every_page_runs_without_an_exception(path):
    registered = {"what_if", "phases", "policies", "plan", "requests", "calibration"}
    if path.stem in registered:
        test = opened(SMALL, str(path))
        assert test.title[0].value
    else:  # what pages share: no page, and nothing to see when it is imported
        assert "st.title" not in path.read_text() or path.stem == "shared_output"


def test_baseline_and_candidate_alike_differ_in_nothing():
    test = opened(SMALL)
    assert {metric.delta for metric in test.metric} == {"same"}
    assert "Quick answer on all 60 requests." in [caption.value for caption in test.caption]


def test_words_around_charts_have_the_colours_of_the_theme():
    """A colour of the chart's own would win over it; notes below titles keep theirs, which a theme has none for."""
    test = opened(SMALL)
    specs = [json.loads(chart.proto.spec) for chart in test.get("vega_lite_chart")]
    assert len(specs) >= 10
    for spec in specs:
        parts = spec["config"]
        assert not {"labelColor", "titleColor"} & (parts["axis"].keys() | parts["legend"].keys())
        assert "color" not in parts["title"] and "subtitleColor" in parts["title"]


# widget of the candidate: a value that changes what is simulated
CHANGES = {
    "model": "qwen2.5-14b", "gpu": "h200-sxm", "tp": 2, "replicas": 2, "engine": "orca", "scheduler": "static",
    "seqs": 4, "tokens": 256, "memory": 0.5, "weights": "fp8", "kv": "fp8", "prefixes": "off", "chunks": "off",
    "router": "least_outstanding", "more": "host_scale=3 watermark=0.1",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_reaches_the_scenario(name):
    """Each widget changes the candidate's command line, and that one alone."""
    test = opened(SMALL, file=PARTS)
    before = test.code[0].value.splitlines()
    test.get_by_key(f"cand_{name}").set_value(CHANGES[name]).run()
    clean(test)
    after = test.code[0].value.splitlines()
    assert after[:-1] == before[:-1] and after[-1] != before[-1]
    assert not test.error, [error.value for error in test.error]
    test.get_by_key(f"base_{name}").set_value(CHANGES[name]).run()
    clean(test)
    assert len(set(numbers(test).values())) == 1


def test_the_command_line_gives_the_number_on_the_page(tmp_path, monkeypatch, capsys):
    import json
    import shlex

    from llmsim.cli import main

    test = opened(SMALL + "&cand_tokens=512&cand_seqs=8&trace_traffic=2.5")
    make, _, candidate = (shlex.split(line) for line in test.code[0].value.splitlines())
    monkeypatch.chdir(tmp_path)
    assert main(make[1:]) == 0
    capsys.readouterr()
    assert main([*candidate[1:], "--json", "--no-out"]) == 0
    summary = json.loads(capsys.readouterr().out)
    shown = numbers(test)
    label = next(name for name in shown if name.startswith("TTFT, P99"))
    assert float(shown[label].replace(",", "")) == pytest.approx(summary["p99_ttft_ms"], rel=0.01)
    assert float(shown["SLO attainment (%)"]) == pytest.approx(100 * summary["slo_attainment"], abs=0.1)
    assert "\\*" in label  # 60 requests are too few for a P99


def test_the_candidate_follows_the_baseline_until_it_is_set_itself():
    test = opened(SMALL, file=PARTS)
    test.selectbox(key="base_gpu").set_value("h200-sxm").run()
    assert test.selectbox(key="cand_gpu").value == "h200-sxm"
    test.selectbox(key="cand_gpu").set_value("b200").run()
    test.selectbox(key="base_gpu").set_value("h100-sxm").run()
    assert test.selectbox(key="cand_gpu").value == "b200"
    clean(test)


def test_promises_are_judged_without_simulating_again():
    from app_pages.shared import store

    test = opened(SMALL)
    kept = set(store().runs.iterdir())
    before = numbers(test)["SLO attainment (%)"]
    test.select_slider(key="slo_ttft").set_value(50).run()
    test.select_slider(key="slo_tpot").set_value(5).run()
    assert numbers(clean(test))["SLO attainment (%)"] != before
    assert set(store().runs.iterdir()) == kept


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("cand_model=llama-3.1-70b&cand_gpu=l40s", "llama-3.1-70b"),
        ("cand_seqs=1024&cand_tokens=512", "max_num_batched_tokens=512 is below max_num_seqs=1024"),
        ("cand_more=watermrk=1", "Did you mean 'watermark'?"),
        ("cand_more=oops", "write FIELD=VALUE"),
        ("cand_more=scheduler=nobody", "unknown scheduler 'nobody'"),
        ("trace_from=file&trace_path=/no/such/trace.csv", "/no/such/trace.csv: no such file"),
        ("cand_tp=8&cand_model=qwen2.5-1.5b", "tensor_parallel=8"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(query, words):
    test = opened(query if "trace_from" in query else f"{SMALL}&{query}", file=PARTS)
    assert any(words in error.value for error in test.error), [error.value for error in test.error]
    assert all("\n" not in error.value for error in test.error)


def test_a_whole_trace_runs_in_a_worker_and_its_answer_stays():
    test = opened("trace_from=synthetic&trace_n=3000&trace_output=600&trace_rate=20&base_more=cost=constant:0.02")
    assert any("Quick answer on the first" in caption.value for caption in test.caption)
    quick = numbers(test)
    test.button(key="what_if_start").click().run()
    assert test.button(key="what_if_stop") and numbers(test) == quick
    deadline_s = time.monotonic() + 50
    while not any("On all 3,000 requests." in caption.value for caption in test.caption):
        assert time.monotonic() < deadline_s and not test.error
        time.sleep(0.2)
        clean(test.run())
    assert numbers(test) != quick
    test.select_slider(key="slo_ttft").set_value(50).run()
    assert any("On all 3,000 requests." in caption.value for caption in test.caption)


def test_a_stopped_run_leaves_the_quick_answer():
    test = opened("trace_from=synthetic&trace_n=300000&trace_rate=20", file=PARTS)
    test.button(key="small_start").click().run()
    test.button(key="small_stop").click().run()
    clean(test)
    assert any("stopped after" in error.value for error in test.error)
    assert test.button(key="small_start") and numbers(test)


def test_hundreds_of_clicks_leave_memory_disk_and_processes_as_they_were():
    """What an hour of clicking does, in seconds: settings that were never asked for before, long runs started and
    stopped."""
    from app_pages.shared import store

    test = opened(SMALL, file=PARTS)
    sizes = []
    for click in range(240):
        test.text_input(key="cand_more").set_value(f"seed={click}")
        if click % 40 == 39:
            test.number_input(key="trace_n").set_value(300_000 + click)
            test.run()
            test.button(key="small_start").click().run()
            test.button(key="small_stop").click()
            test.run()
            test.number_input(key="trace_n").set_value(60)
        clean(test.run())
        if click % 40 == 0:
            sizes.append(resident_bytes())
    assert store().jobs.running() == 0 and children() == []
    assert len(list(store().runs.iterdir())) <= 2 * store().most_runs
    assert sum(path.stat().st_size for path in store().root.rglob("*") if path.is_file()) < 50e6
    assert sizes[-1] - sizes[2] < 60e6, sizes  # the first ones fill the caches


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children():
    """Processes that this one started and that still run."""
    mine = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            mine.append(stat.parent.name)
    return mine
