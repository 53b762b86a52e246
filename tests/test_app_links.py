"""What a link to the dashboard may do and what not: its words are shown as words, and no file runs because of it."""

from pathlib import Path

import pytest
from pages import AppTest, errors, linked, shown, warnings

from app_pages.shared_words import plain
from llmsim.cli_dashboard import app as app_file

SMALL = {"trace_from": "synthetic", "trace_n": "60", "trace_rate": "20"}
APP = app_file()
RUNS = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
SOURCES = {
    "scheduler": RUNS + "from llmsim.schedulers.static import StaticBatching as Mine\n",
    "eviction": RUNS + "from llmsim.eviction import FirstInFirstOut as Mine\n",
    "router": RUNS + "from llmsim.routers import LeastOutstanding as Mine\n",
}


@pytest.mark.parametrize(
    ("words", "markdown"),
    [
        ("![x](http://evil.example/x.png)", r"!\[x\](http:⁠//evil.example/x.png)"),
        ("<img src=x onerror=y>", r"\<img src=x onerror=y\>"),
        ("**a** `b` $c$ ~d~ a|b &amp; \\", r"\*\*a\*\* \`b\` \$c\$ \~d\~ a\|b \&amp; \\"),
        (":red[hi] :smile: :material/home:", r"\:red\[hi\] :⁠smile: :⁠material/home:"),
        ("www.evil.example", "www⁠.evil.example"),
        ("1. # 2", r"1\. # 2"),
        ("- a\n\n# b", r"\- a # b"),
        ("_a_ max_num_seqs=8: at 3:4", r"\_a\_ max_num_seqs=8: at 3:4"),
    ],
)
def test_words_stay_words(words, markdown):
    assert plain(words) == markdown and shown(markdown) == " ".join(words.split())


def test_what_a_link_says_is_quoted_as_words():
    words = "![x](http://evil.example/x.png)"
    test = linked("what_if", **SMALL, cand_more=f"scheduler={words}", trace_path=words)
    (line,) = errors(test)
    assert words in line and "![" not in test.error[0].value
    test = linked("what_if", trace_from="file", trace_path="/tmp/![x](y.png)")
    assert all("![" not in error.value for error in test.error) and "![x](y.png)" in errors(test)[0]


PLACES = {  # page and widget by which a file is named, as which plug-in
    "candidate": ("what_if", {"cand_more": "scheduler={}"}, "scheduler"),
    "baseline": ("what_if", {"base_more": "eviction={}"}, "eviction"),
    "router": ("what_if", {"cand_more": "router={} replicas=2"}, "router"),
    "fleet": ("plan", {"plan_more": "scheduler={}"}, "scheduler"),
    "side": ("policies", {"pol_sides": ["vllm", "{}"]}, "scheduler"),
    "evictions": ("policies", {"pol_view": "KV cache", "pol_evictions": ["lru", "{}"]}, "eviction"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_a_link_names_runs_on_a_click_only(place, tmp_path: Path):
    name, asked, kind = PLACES[place]
    file = tmp_path / "mine.py"
    file.write_text(SOURCES[kind])
    filled = {key: filled_in(value, f"{file}:Mine") for key, value in asked.items()}
    test = linked(name, **SMALL, **filled)
    ran = file.with_suffix(".ran")
    assert not ran.exists() and not test.error and len(test.warning) == 1
    assert str(file) in shown(test.warning[0].value)
    (button,) = [button for button in test.button if button.key.startswith("allow_")]
    assert shown(button.label) == "Run the policy file mine.py?"
    button.click().run()
    assert ran.exists() and not test.exception
    assert not [button for button in test.button if button.key.startswith("allow_")]


def filled_in(value, spec):
    return [one.format(spec) for one in value] if isinstance(value, list) else value.format(spec)


UNUSABLE = {
    "cand_model=nope": "cand_model=nope (llama-3.1-8b instead)",
    "trace_from=nope": "trace_from=nope (shipped instead)",
    "trace_traffic=100": "trace_traffic=100 (1.0 instead)",
    "cand_tp=3": "cand_tp=3 (1 instead)",
    "cand_replicas=257": "cand_replicas=257 (1 instead)",
    "cand_tokens=1000": "cand_tokens=1000 (auto instead)",
    "slo_ttft=123": "slo_ttft=123 (500 instead)",
    "cand_modle=qwen2.5-14b": "cand_modle (nothing is called so)",
    "nonsense=1": "nonsense (nothing is called so)",
}


def app(query):
    test = AppTest.from_file(str(APP), default_timeout=60)
    for key, value in query.items():
        test.query_params[key] = value
    test.run()
    assert not test.exception
    return test


def test_what_a_link_says_in_vain_is_named():
    """All of them at once, in the one line, for as long as the widgets show something else."""
    test = app(dict(pair.split("=") for pair in UNUSABLE))
    (line,) = warnings(test)
    assert line.startswith("Not used of this link: ") and set(UNUSABLE.values()) == set(
        line.removeprefix("Not used of this link: ").removesuffix(".").split("; ")
    )
    test.selectbox(key="cand_model").set_value("qwen2.5-14b").run()
    assert "cand_model" not in warnings(test)[0] and "cand_tp=3" in warnings(test)[0]


def test_a_page_that_ends_early_names_them_too():
    test = app({"cand_more": "oops", "cand_tp": "3"})
    assert warnings(test) == ["Not used of this link: cand_tp=3 (1 instead)."] and len(errors(test)) == 1


def test_repeated_settings_are_named_and_others_are_not():
    test = app(SMALL | {"cand_replicas": ["1", "2"]})
    assert warnings(test) == ["Not used of this link: cand_replicas=1 and cand_replicas=2 (2 instead)."]
    good = {"cand_gpu": "h200-sxm", "cand_tp": "2", "slo_ttft": "1000", "trace_traffic": "1.50", "cand_replicas": "1"}
    assert warnings(app(SMALL | good | {"plan_rate": "30", "trace_path": "a.csv", "cand_more": "seed=1"})) == []
