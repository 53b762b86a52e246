"""A real browser on the real dashboard: a headless Chromium, driven by Playwright, against `llmsim dashboard`.

    python -m tests.browser.drive docs/dashboard    # takes the screenshots of every page

What a page does is checked in `tests/test_browser.py` and `tests/test_browser_*.py`, with what is here: `served` starts
a server, `opened` a window, `Window` drives it. A window remembers every request that left this machine and every error
in the browser's console; a server's log is kept, too.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LAPTOP = (1366, 900)
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"
CHART = "[data-testid=stVegaLiteChart]"
DRAWN = f"{CHART} canvas, {CHART} svg"
# Streamlit's front end looks for its server below a page's own path first, and goes on where it finds none
PROBED = re.compile(r"/\w+/_stcore/(health|host-config)")
# of the first chart of a page, or of the one with this text in its accessible name: enough to see that it changed
PICTURE = """(name) => {
  const all = [...document.querySelectorAll('[data-testid=stVegaLiteChart]')];
  const chart = name ? all.find(c => c.outerHTML.includes(name)) : all[0];
  const canvas = chart && chart.querySelector('canvas'), svg = chart && chart.querySelector('svg');
  return canvas ? canvas.toDataURL() : svg ? svg.outerHTML : '';
}"""


def chromium() -> str:
    for name in CHROMIUM:
        path = shutil.which(name)
        if path is not None:
            return path
    raise FileNotFoundError("no Chromium: apt-get install chromium (Debian), or put one of its names on the PATH")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def errors(self) -> list[str]:
        """Lines of the log that are no news of its start."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if re.search(r"error|warning|traceback|exception", line, re.I)]

    def workers(self) -> list[int]:
        """Processes that do its jobs."""
        mine = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended meanwhile
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.process.pid and state != "Z":
                    mine.append(int(stat.parent.name))
        return mine


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # Linux, prctl(2); kept over exec


def _end_with_tests() -> None:
    """Tests that are killed do not get to their `finally`: the kernel ends their server instead."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def served(*, cwd: Path, runs: Sequence[Path] = ()) -> Iterator[Server]:
    """`llmsim dashboard`, started in `cwd` as a user would."""
    port = free_port()
    log = cwd / "server.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "llmsim", "dashboard", "--port", str(port), "--no-browser", *map(str, runs)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_tests,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(lambda: _healthy(server), 60, f"the server does not answer: {log.read_text()}")
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(server: Server) -> bool:
    if server.process.poll() is not None:
        raise RuntimeError(f"the server ended: {server.log.read_text()}")
    try:
        with urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait(there: Any, most_s: float, complaint: str, every_s: float = 0.05) -> float:
    """Seconds until `there()` holds."""
    started_s = time.monotonic()
    while not there():
        if time.monotonic() - started_s > most_s:
            raise TimeoutError(complaint)
        time.sleep(every_s)
    return time.monotonic() - started_s


def contention() -> float:
    """How many times as long as alone this process takes now for what it does: 1 on a machine that is idle."""
    started_s, cpu_s = time.monotonic(), time.process_time()
    while time.process_time() - cpu_s < 0.2:
        pass
    return max((time.monotonic() - started_s) / (time.process_time() - cpu_s), 1.0)


@dataclass
class Window:
    """A page in a browser."""

    page: Any
    server: Server
    elsewhere: list[str] = field(default_factory=list)  # requests to other hosts
    complaints: list[str] = field(default_factory=list)  # of the console

    def watch(self) -> None:
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _requested(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1":
            self.elsewhere.append(request.url)

    def _said(self, message: Any) -> None:
        where = urlsplit(message.location.get("url", "")).path
        if message.type == "error" and not PROBED.fullmatch(where):
            self.complaints.append(f"{message.text} {where}")

    def open(self, path: str = "/", *, charts: bool = True) -> float:
        """Seconds until the heading stands there; returns when everything is drawn."""
        started_s = time.monotonic()
        self.page.goto(self.server.url + path, wait_until="commit")
        self.page.wait_for_selector("h1", timeout=60_000)
        painted_s = time.monotonic() - started_s
        self.settle(charts=charts)
        return painted_s

    def settle(self, *, charts: bool = False) -> None:
        self.page.wait_for_selector(IDLE, timeout=60_000)
        if charts:
            self.page.wait_for_selector(DRAWN, timeout=60_000)

    def titles(self) -> list[str]:
        links = self.page.get_by_test_id("stTopNavLink")
        return [link.inner_text().splitlines()[-1] for link in links.all()]

    def go_to(self, title: str) -> None:
        self.page.get_by_test_id("stTopNavLink").filter(has_text=title).first.click()
        self.page.wait_for_function(
            "t => document.querySelector('h1')?.innerText.includes(t)", arg=title, timeout=60_000
        )
        self.settle()

    def picture(self, name: str = "") -> str:
        return str(self.page.evaluate(PICTURE, name))

    def drag(self, slider: str, key: str = "ArrowRight") -> float:
        """Seconds from a step of a slider to the first chart of the page drawn anew."""
        handle = self.page.get_by_role("slider", name=slider).first
        before = self.picture()
        handle.focus()
        started_s = time.monotonic()
        self.page.keyboard.press(key)
        _wait(lambda: self.picture() not in (before, ""), 20, f"no new chart after {slider}", 0.01)
        return time.monotonic() - started_s

    def brush(self, left: float, top: float, right: float, bottom: float) -> None:
        """Draw a rectangle over the first chart of the page; corners as shares of its width and height."""
        box = self.page.locator(CHART).first.bounding_box()
        corners = [
            (box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in ((left, top), (right, bottom))
        ]
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        self.page.mouse.move(*corners[1], steps=8)
        self.page.mouse.up()

    def numbers(self) -> list[str]:
        return [place.inner_text() for place in self.page.get_by_test_id("stMetricValue").all()]

    def chosen(self) -> list[str]:
        """What the boxes of the side bar show."""
        boxes = self.page.get_by_test_id("stSidebar").locator("input")
        return [box.input_value() for box in boxes.all() if box.get_attribute("type") != "file"]

    def errors_shown(self) -> list[str]:
        """What the page itself says is wrong."""
        return [place.inner_text() for place in self.page.get_by_test_id("stAlertContentError").all()]

    def exceptions(self) -> list[str]:
        return [place.inner_text() for place in self.page.get_by_test_id("stException").all()]

    def choose_theme(self, name: str) -> None:
        self.page.get_by_test_id("stMainMenu").click()
        self.page.get_by_test_id(f"stMainMenuItem-theme-{name}").click()
        self.page.keyboard.press("Escape")
        self.page.wait_for_timeout(500)

    def background(self) -> str:
        return str(
            self.page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        )

    def whole(self, path: Path, *, most_height: int = 2400) -> None:
        """A screenshot of all of the page, in as few bytes as its colours need."""
        width, usual = self.page.viewport_size["width"], self.page.viewport_size["height"]
        inside = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": width, "height": min(max(inside, usual), most_height)})
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=str(path))
        self.page.set_viewport_size({"width": width, "height": usual})
        shrink(path)


def shrink(path: Path) -> None:
    """The 256 colours that are seen most are enough for text, lines and areas, and keep theirs, however small."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    counts: Any = picture.getcolors(picture.width * picture.height)
    most = sorted(counts, reverse=True)[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for _, colour in most for part in colour])
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser; one at a time in a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(server: Server, browser: Any = None, size: tuple[int, int] = LAPTOP) -> Iterator[Window]:
    """A window with cookies and settings of its own; in a browser of its own, too, unless one is given."""
    if browser is None:
        with browsing() as own, opened(server, own, size) as window:
            yield window
        return
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.set_default_timeout(60_000)  # as the other waits: two cores share all tests
    window = Window(context.new_page(), server)
    window.watch()
    try:
        yield window
    finally:
        context.close()


# page title: file, where it is looked at
PICTURES = {
    "What if": ("what-if", "/?cand_tokens=512&trace_traffic=2.5"),
    "Prefill vs decode": ("phases", "/phases"),
    "Policies": ("policies", "/policies?trace_traffic=3.5"),
    "Plan": ("plan", "/plan"),
    "Requests": ("requests", "/requests?trace=bursty.csv&trace_traffic=0.7&requests_rows=60"),
    "Calibration": ("calibration", "/calibration?ca_profile=h200-sxm"),
}


def take_pictures(folder: Path) -> None:
    """Every page that is there, and the first one dark."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as cwd,
        served(cwd=Path(cwd)) as server,
        browsing() as browser,
        opened(server, browser) as window,
    ):
        window.open(charts=False)
        there = window.titles()
        for title, (name, path) in PICTURES.items():
            if there and title not in there:
                continue
            window.open(path, charts=False)
            window.page.wait_for_timeout(1500)
            window.whole(folder / f"{name}.png")
        window.open(PICTURES["What if"][1])
        window.choose_theme("Dark")
        window.page.wait_for_timeout(1000)
        window.whole(folder / "what-if-dark.png")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/dashboard"))
