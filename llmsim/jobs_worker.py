"""The process that does one job of `llmsim.jobs`: python -m llmsim.jobs_worker FOLDER."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from llmsim.jobs import CALL, ERROR, PROGRESS, RESULT, kill_group

EVERY_S = 0.1  # between two words of progress
NICE = 5  # the server that waits for it answers first


def main(folder: Path) -> int:
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    os.nice(NICE)
    try:
        function, arguments, named = pickle.loads((folder / CALL).read_bytes())
        result = function(*arguments, progress=Progress(folder / PROGRESS), **named)
        _write(folder / RESULT, pickle.dumps(result))
    except Exception as error:
        traceback.print_exc()
        _write(folder / ERROR, json.dumps(_told(error)).encode())
        return 1
    return 0


class Progress:
    """`progress(done, total, …)`: kept in a file that the server reads now and then."""

    def __init__(self, path: Path) -> None:
        self.path, self.next_s = path, 0.0

    def __call__(self, done: float, total: float, *rest: Any) -> None:
        now_s = time.monotonic()
        if now_s < self.next_s and done < total:
            return
        self.next_s = now_s + EVERY_S
        _write(self.path, json.dumps([done, total, *rest], default=str).encode())


def _told(error: Exception) -> dict[str, Any]:
    """One line, and whether it is the user's input that is wrong."""
    from llmsim.plugins import PolicyError

    expected = isinstance(error, ValueError | FileNotFoundError | PolicyError)
    line = " ".join(str(error).split())
    return {"line": line if expected else f"{type(error).__name__}: {line}", "expected": expected}


def _end_with_the_server() -> None:
    """Its end of our standard input closes when it ends, however it ends."""
    sys.stdin.buffer.read()
    kill_group(os.getpid())


def _write(path: Path, data: bytes) -> None:
    """Complete or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
