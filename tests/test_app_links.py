"""What a link to the dashboard may do and what not: its words are shown as words, and no file runs because of it."""

from pathlib import Path

import pytest
from pages import errors, linked, shown

from app_pages.shared_words import plain

SMALL = {"trace_from": "synthetic", "trace_n": "60", "trace_rate": "20"}
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
