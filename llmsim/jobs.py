"""Long work in processes of their own, for a server that must stay quick: start, watch, stop.

`Jobs.start(function, …)` runs `function(*arguments, progress=…)` in a fresh Python process (`llmsim.jobs_worker`): a
thread cannot be stopped, and would hold the interpreter's lock. Call and result travel as pickles in the job's folder,
progress as a small file that is replaced as a whole. Whatever the worker starts belongs to its process group:

    stop    kills the group at once; nothing is asked of the function
    the server ends, however it ends    the worker's standard input closes, and the worker kills its own group

A function must be importable where the worker runs: a public function of llmsim.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

CALL, RESULT, ERROR, PROGRESS, LOG = "call.pickle", "result.pickle", "error.json", "progress.json", "log.txt"
MOST_LOG_BYTES = 4000  # of what a worker that died unexpectedly printed last


class JobError(ValueError):
    """What a job's function refused, in its own words."""


@dataclass
class Job:
    """One piece of work under way or done; `state` is running, done, failed or stopped."""

    folder: Path
    process: subprocess.Popen[bytes]
    started_s: float = field(default_factory=time.monotonic)
    _ended: str = ""

    @property
    def state(self) -> str:
        if not self._ended and self.process.poll() is not None:
            self._ended = "done" if (self.folder / RESULT).is_file() else "failed"
        return self._ended or "running"

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def progress(self) -> tuple[int, int, str]:
        """(steps done, steps in all, what is said about it); zeros before the first word."""
        try:
            done, total, *rest = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0, 0, ""
        return int(done), int(total), " ".join(str(item) for item in rest if isinstance(item, str))

    def result(self) -> Any:
        """What the function returned. Raises JobError with its one line if it raised, RuntimeError if it died."""
        if self.state == "done":
            return pickle.loads((self.folder / RESULT).read_bytes())  # written by our own worker into our own folder
        if self.state == "failed":
            raise self._failure()
        raise RuntimeError(f"the job is {self.state}: it has no result")

    def _failure(self) -> Exception:
        try:
            error = json.loads((self.folder / ERROR).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            code = self.process.returncode
            said = self.log()
            return RuntimeError(f"the worker process ended with status {code}" + (f": {said}" if said else ""))
        return JobError(error["line"]) if error["expected"] else RuntimeError(error["line"])

    def log(self) -> str:
        """The end of what the worker printed."""
        try:
            return (self.folder / LOG).read_bytes()[-MOST_LOG_BYTES:].decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def stop(self) -> None:
        """Kill the worker and all it started; returns when they are gone."""
        if self.state == "running":
            kill_group(self.process.pid)
            self.process.wait()
            self._ended = "stopped"
        self._close()

    def _close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()


class Jobs:
    """The jobs of one server; at most `at_once` run at a time."""

    def __init__(self, folder: Path, at_once: int | None = None) -> None:
        self.folder = folder
        self.at_once = at_once or max(2, os.cpu_count() or 2)
        self._numbers = count()
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    def start(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Job:
        """Raises ValueError when as many jobs are under way as this machine takes."""
        call = pickle.dumps((function, arguments, named))
        with self._lock:
            if self.running() >= self.at_once:
                raise ValueError(
                    f"{self.at_once} long runs are under way on this machine, as many as it takes at once: "
                    "wait for one to end, or stop it"
                )
            folder = self.folder / f"job-{next(self._numbers)}"
            folder.mkdir(parents=True)
            (folder / CALL).write_bytes(call)
            job = Job(folder, _worker(folder))
            self._jobs.append(job)
        return job

    def running(self) -> int:
        return sum(job.state == "running" for job in self._jobs)

    def forget(self, job: Job) -> None:
        """Stop it if it runs, and remove its folder."""
        job.stop()
        shutil.rmtree(job.folder, ignore_errors=True)
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        for job in list(self._jobs):
            self.forget(job)


def _worker(folder: Path) -> subprocess.Popen[bytes]:
    """A Python process that imports the same llmsim as this one, in a group of its own."""
    import llmsim

    home = str(Path(llmsim.__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "llmsim.jobs_worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
