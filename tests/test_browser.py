"""The dashboard in a real browser: what only a browser can show. `tests/browser/drive.py` drives it."""

import time
from pathlib import Path
from urllib.parse import quote

import pytest
from browser.drive import browsing, contention, opened, served
from needs import require

require("streamlit")
require("playwright")

PAINT_S, CHART_S, STOP_S = 3.0, 1.0, 1.0  # of a machine that does nothing else; times its contention where it does
MEASURED = 4  # times; the best counts


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(cwd=tmp_path_factory.mktemp("elsewhere")) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def window(server, browser):
    with opened(server, browser) as window:
        yield window
        assert window.elsewhere == [], "a request left this machine"
        assert window.complaints == []
        assert server.errors() == []


def test_every_page_opens_and_nothing_leaves_this_machine(window):
    window.open("/")
    titles = window.titles()
    assert titles[0] == "What if" and len(titles) == len(list_of_pages())
    for title in titles:
        window.go_to(title)
        assert window.exceptions() == [] and window.errors_shown() == [], title
    assert window.elsewhere == [] and window.complaints == []


def list_of_pages():
    from llmsim.cli_dashboard import app

    named = {"what_if", "phases", "policies", "plan", "requests", "calibration"}
    return [path for path in (app().parent / "app_pages").glob("*.py") if path.stem in named]


def test_the_first_paint_and_a_new_chart_are_quick(window):
    busy = contention()
    painted_s = min(window.open("/") for _ in range(2))
    before = window.numbers()
    taken_s = []
    for _ in range(MEASURED):
        taken_s.append(window.drag("Tokens of one iteration"))
        window.settle()
    busy = max(busy, contention())
    print(f"first paint {painted_s:.2f} s, slider to new chart {min(taken_s):.2f} s, contention {busy:.1f}")
    assert painted_s < PAINT_S * busy
    assert min(taken_s) < CHART_S * busy, taken_s
    assert window.numbers() != before
    assert "cand_tokens=2048" in window.page.url  # the fourth step: 256, 512, 1024, 2048


def test_a_shared_link_shows_what_was_shared(window):
    window.open("/?cand_gpu=h200-sxm&trace=bursty.csv&trace_traffic=1.5&slo_ttft=1000")
    assert {"h200-sxm", "bursty.csv"} <= set(window.chosen())
    shown = window.page.get_by_test_id("stSidebar").inner_text()
    assert "× 1.5" in shown and "1000" in shown
    numbers = window.numbers()
    window.go_to("Requests")  # the first page that the link did not name
    assert {"h200-sxm", "bursty.csv"} <= set(window.chosen())
    assert {"cand_gpu=h200-sxm", "trace=bursty.csv", "trace_traffic=1.5"} <= set(
        window.page.url.split("?")[1].split("&")
    )
    window.open("/?cand_gpu=no-such-gpu&trace_traffic=99")  # not ours: the defaults, and a line that says so
    window.page.get_by_text(
        "Not used of this link: cand_gpu=no-such-gpu (h100-sxm instead); trace_traffic=99"
    ).wait_for()
    assert window.exceptions() == [] and window.errors_shown() == []
    assert window.numbers() != numbers


def test_a_rectangle_over_the_dots_chooses_requests(window):
    window.open("/requests")
    window.page.get_by_text("Draw a rectangle over the dots").wait_for()
    below = window.picture("Phases of 40 requests")
    window.brush(0.4, 0.25, 0.7, 0.6)
    said = window.page.get_by_text("requests are in the rectangle.")
    said.wait_for()
    inside, whole = (int(word.replace(",", "")) for word in said.inner_text().split(" requests")[0].split(" of "))
    assert 0 < inside < whole == 2000
    window.settle()
    assert window.picture("Phases of 40 requests") not in ("", below)
    assert window.exceptions() == []


def test_a_good_upload_is_answered_and_a_bad_one_refused_in_one_line(window, tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    rows = "\n".join(f"{i * 0.1},{100 + i},20" for i in range(50))
    good.write_text(f"arrival_time_s,prompt_tokens,output_tokens\n{rows}\n")
    bad.write_text("arrival_time_s,prompt_tokens,output_tokens\n0.0,100,20\n0.1,many,20\n")
    window.open("/?trace_from=upload", charts=False)
    window.page.get_by_text("Columns such as arrival_time_s").wait_for()  # the page is there as a whole
    window.settle()
    window.page.locator("input[type=file]").set_input_files(str(good))
    window.page.get_by_text("Quick answer on all 50 requests.").wait_for()
    window.settle(charts=True)
    window.go_to("Requests")  # the file goes along
    window.page.get_by_text("good.csv, which you uploaded before").wait_for()
    window.page.get_by_text("Quick answer on all 50 requests.").wait_for()
    window.page.locator("input[type=file]").set_input_files(str(bad))
    window.page.get_by_test_id("stAlertContentError").wait_for()
    window.settle()
    (line,) = window.errors_shown()
    assert "bad.csv" in line and "many" in line and "\n" not in line.strip().removeprefix("error").strip()
    assert window.exceptions() == []


def test_a_link_shows_words_only_and_fetches_nothing(window):
    words = "![x](http://evil.example/x.png) <img src=http://evil.example/y.png> :material/home: $a$"
    for query in (f'cand_more=scheduler="{words}"', f"plan_more=kv_cache_dtype='{words}'"):
        window.open(f"/{'plan' if 'plan' in query else ''}?{quote(query, safe='=')}", charts=False)
        assert any(words in line.replace("\u2060", "") for line in window.errors_shown()), window.errors_shown()
        window.settle()
    assert window.elsewhere == [] and window.exceptions() == []


def test_an_impossible_setting_is_said_in_place(window):
    window.open("/?cand_model=llama-3.1-70b&cand_gpu=l40s", charts=False)
    (line,) = window.errors_shown()
    assert "l40s" in line and "llama-3.1-70b" in line
    assert window.exceptions() == []


def test_a_run_is_stopped_within_a_second(window, server):
    window.open("/?trace_from=synthetic&trace_n=1000000&trace_rate=20")
    page = window.page
    page.get_by_text("Quick answer on the first").wait_for()
    assert server.workers() == []
    page.get_by_role("button", name="Run the whole trace").click()
    stop = page.locator(".st-key-what_if_stop button")
    stop.wait_for()
    deadline_s = time.monotonic() + 20
    while "requests answered" not in page.get_by_test_id("stProgress").inner_text() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert len(server.workers()) == 1
    started_s = time.monotonic()
    stop.click()
    while server.workers() and time.monotonic() - started_s < 10:
        time.sleep(0.02)
    assert time.monotonic() - started_s < STOP_S * contention()
    page.get_by_text("stopped after").wait_for()
    page.get_by_role("button", name="Run the whole trace").wait_for()


def test_the_theme_can_be_dark(window):
    window.open("/")
    window.choose_theme("Light")
    light = window.background()
    window.choose_theme("Dark")
    window.settle(charts=True)
    assert (light, window.background()) == ("rgb(255, 255, 255)", "rgb(15, 23, 42)")
    window.choose_theme("Light")


def test_two_sessions_do_not_disturb_each_other(window, server, browser):
    window.open("/?cand_gpu=h200-sxm")
    one = window.numbers()
    with opened(server, browser) as other:
        other.open("/?cand_gpu=l40s")
        two = other.numbers()
        window.drag("TTFT at most")
        window.settle()
        assert other.numbers() == two
    assert window.numbers()[0] == one[0] != two[0]


def test_a_million_requests_are_shown_with_few_points(tmp_path, browser):
    from million import million_run

    folder = million_run(tmp_path / "million")
    with served(cwd=tmp_path, runs=[folder]) as server, opened(server, browser) as window:
        received = []
        window.page.on("websocket", lambda socket: socket.on("framereceived", lambda data: received.append(len(data))))
        window.open("/")
        assert window.numbers() and window.exceptions() == []
        # 20,000 points of a chart are about 0.5 MB on the wire; a million would be 20 MB and more
        assert sum(received) < 6e6
        busy = contention()
        started_s = time.monotonic()
        window.open("/requests")
        window.page.wait_for_function("document.querySelectorAll('[data-testid=stVegaLiteChart] .marks').length >= 4")
        drawn_s = time.monotonic() - started_s
        busy = max(busy, contention())
        print(f"requests of a million drawn after {drawn_s:.2f} s, contention {busy:.1f}")
        assert drawn_s < PAINT_S * busy and window.exceptions() == []
        assert server.errors() == [] and window.elsewhere == []


def test_the_log_lies_where_the_server_was_started(server):
    assert Path(server.log).is_file() and "127.0.0.1" in server.log.read_text()
