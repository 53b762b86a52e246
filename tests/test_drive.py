"""What drives a browser leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARENT = """
import os, signal, subprocess, sys
from tests.browser.drive import _end_with_tests

child = subprocess.Popen(["sleep", "60"], start_new_session=True, preexec_fn=_end_with_tests)
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_ends_with_the_tests_that_were_killed() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = int(done.stdout)
    until_s = time.monotonic() + 10.0
    while alive(child) and time.monotonic() < until_s:
        time.sleep(0.02)
    ended = not alive(child)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended
