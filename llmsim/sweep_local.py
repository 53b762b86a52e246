"""Runs of a sweep in this process, or in worker processes of this machine.

The pool is our own, and small, because the standard library's cannot do what a long sweep needs: say which run a dead
worker had, go on with the other workers, and leave no process behind when the parent is killed. Each worker has a pipe;
it ends when the pipe does. Work is drawn from an iterator as workers become free, so a sweep of any length takes the
memory of the runs under way; each worker has the next run in its pipe already, which hides the parent's own work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from llmsim.sweep_work import Row, Took, Traces, Work, lost, run_one

AHEAD = 2  # runs in a worker's pipe: the one under way, and the next
TRIES = 2  # a run whose process dies as often is given up
DIED = "its process died {times} times ({how}): it may need more memory than there is, or its policy ends the process"
Done = tuple[Work, Row, Took]


def in_process(works: Iterator[Work]) -> Iterator[Done]:
    """One after the other, here."""
    traces = Traces()
    for work in works:
        yield (work, *run_one(work, traces))


def in_processes(works: Iterator[Work], jobs: int) -> Iterator[Done]:
    """`jobs` at a time, as they are done."""
    pool = _Pool(jobs)
    try:
        yield from pool.run(works)
    finally:
        pool.stop()


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    given: deque[Work] = field(default_factory=deque)  # the first of them is under way

    def give(self, work: Work) -> None:
        self.given.append(work)
        self.pipe.send(work)


class _Pool:
    def __init__(self, jobs: int) -> None:
        # forkserver: imports are paid once, and no lock is copied in a held state; spawn where there is none
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["llmsim.sweep_local"])
        self.jobs = jobs
        self.workers: list[_Worker] = []
        self.again: deque[Work] = deque()  # what dead workers had
        self.deaths: dict[int, int] = {}

    def run(self, works: Iterator[Work]) -> Iterator[Done]:
        while True:
            self._fill(works)
            busy = {worker.pipe: worker for worker in self.workers if worker.given}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]  # only pipes were waited for
                try:
                    row, took = worker.pipe.recv()
                except (EOFError, OSError):
                    yield from self._buried(worker)
                    continue
                yield worker.given.popleft(), row, took

    def _fill(self, works: Iterator[Work]) -> None:
        """Every worker its next run, those with nothing to do first."""
        for depth in range(AHEAD):
            for at in range(self.jobs):
                while at >= len(self.workers) or len(self.workers[at].given) <= depth:
                    work = self.again.popleft() if self.again else next(works, None)
                    if work is None:
                        return
                    if at >= len(self.workers):
                        self.workers.append(self._started())
                    try:
                        self.workers[at].give(work)
                    except OSError:  # it died idle or with this run: what it had is found when its pipe is read
                        break

    def _started(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True, name="llmsim-sweep")
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _buried(self, worker: _Worker) -> Iterator[Done]:
        """The run that a dead worker had is tried again, those that waited behind it too."""
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        first = worker.given.popleft()
        self.again.extend(worker.given)
        times = self.deaths.get(first.run, 0) + 1
        self.deaths[first.run] = times
        if times < TRIES:
            self.again.append(first)
            return
        yield first, lost(first, DIED.format(times=times, how=_how(worker.process.exitcode))), Took()

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers.clear()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return signal.Signals(-exitcode).name
        except ValueError:
            return f"signal {-exitcode}"
    return f"exit status {exitcode}"


def _serve(pipe: Connection) -> None:
    """A worker: does the runs of its pipe until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.dup2(2, 1)  # what a policy prints is no result
    traces = Traces()
    while True:
        try:
            work: Work = pipe.recv()
        except (EOFError, OSError):
            return
        done = run_one(work, traces)
        try:
            pipe.send(done)
        except OSError:  # nobody is there any more
            return
