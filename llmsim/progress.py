"""How far a command has come, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

PROGRESS_AFTER_S = 2.0
LINES_EVERY_S = 10.0
WIDTH = 110  # a longer line would wrap, and could not be taken back


class StatusLine:
    """Once a command takes longer than two seconds: one line that changes on a terminal, a line every ten seconds
    elsewhere."""

    def __init__(self, live_every_s: float = 0.5) -> None:
        self.started_s = time.monotonic()
        self.next_s = self.started_s + PROGRESS_AFTER_S
        self.live_every_s = live_every_s
        self.live = sys.stderr.isatty()
        self.shown = False

    def say(self, words: Callable[[float], str]) -> None:
        """`words`: of the seconds so far, asked for when it is time to say them."""
        now_s = time.monotonic()
        if now_s < self.next_s:
            return
        self.next_s = now_s + (self.live_every_s if self.live else LINES_EVERY_S)
        text = words(now_s - self.started_s)
        line = f"\r\x1b[K{text[:WIDTH]}" if self.live else f"{text}\n"
        print(line, end="", file=sys.stderr, flush=True)
        self.shown = True

    def close(self) -> None:
        if self.shown and self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
