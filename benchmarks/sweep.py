"""What `llmsim sweep` costs beside its runs: how throughput grows with processes, what Ray adds, memory over many runs.

    python -m benchmarks.sweep [--rounds 3] [--runs 14] [--many 10000] [--update]

Runs of about a second: a synthetic trace of so many requests that one takes that long. One process, as many as there
are cores, and as many under Ray take turns, `--rounds` times, so that what else the machine does falls on all of them.

    runs/s    runs / wall seconds, between two moments at which all workers are at work; the median of the rounds in
              which the machine was quiet, and of all of them if it never was
    by the clock    runs/s over the workers times runs/s of one process. Only where every way had a quiet round: other
              programs take from many processes more than from one
    others    what other programs took of the cores meanwhile (busy time of the cores in /proc/stat, less that of the
              sweep's processes); the lowest of the rounds. A round is quiet if that was at most 3 %
    at work   share of the workers' time in which they computed, or could have and waited for a core: the rest they were
              kept waiting by the sweep (from the kernel's account of each worker, /proc/PID/schedstat); median of the
              rounds
    CPU s     of a run, in the process that does it: the same work takes longer beside another one, which shares caches
              and memory with it; and of everything else that belongs to the sweep (its own process, Ray's daemons), for
              each run. Medians of the rounds
    by CPU seconds    at work x CPU s of one process alone / (CPU s of a run + CPU s of the rest): runs/s of n processes
              over n times those of one, on n cores that are shared with nobody. It needs no quiet machine, and where
              there is one `by the clock` has to say the same.

`--update` writes the tables into docs/sweep.md.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.accuracy import ROOT, update
from llmsim.readers.write import write_trace
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.sweep import sweep, work_of
from llmsim.sweep_files import digests
from llmsim.sweep_local import Done, in_process, in_processes
from llmsim.sweep_ray import on_ray
from llmsim.sweep_spec import Spec
from llmsim.sweep_yaml import read_spec
from llmsim.synth import synthesise
from llmsim.trace import Trace

PAGE, MARKS = ROOT / "docs" / "sweep.md", ("<!-- sweep -->", "<!-- /sweep -->")
MACHINE = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
QUIET = 0.03  # of the cores' time
WARM = 2  # runs of each worker that are not counted: it reads the profile, the trace, its modules
Executor = Callable[[Iterator[Any]], Iterator[Done]]
Way = tuple[Executor, int, Callable[[], list[int]]]


@dataclass(frozen=True)
class Taken:
    """Of one way: runs a second, share of the workers' time at work, CPU seconds of a run, and of the rest for each,
    and what others took of the cores' time."""

    runs_per_s: float
    at_work: float
    cpu_s: float
    rest_cpu_s: float
    others: float

    @property
    def quiet(self) -> bool:
        return self.others <= QUIET

    @property
    def per_core(self) -> float:
        """Runs a second of a worker and core, both shared with nobody."""
        return self.at_work / (self.cpu_s + self.rest_cpu_s)


def trace_of(seconds: float) -> Trace:
    """Requests that take about so long to replay."""
    lengths = "lognormal:median=600,sigma=1"
    few = synthesise(2000, arrivals="poisson:rate=8", lengths=lengths, name="few")
    simulate(few, Scenario(**MACHINE))
    started_s = time.process_time()
    simulate(few, Scenario(**MACHINE)).summary()
    requests = int(2000 * seconds / (time.process_time() - started_s))
    return synthesise(requests, arrivals="poisson:rate=8", lengths=lengths, name="load")


def timed(executor: Executor, spec: Spec, workers: int, pids: Callable[[], list[int]]) -> Taken:
    """Between two moments at which all workers are at work: neither their start nor the end counts."""
    files = digests(spec)
    first, last = WARM * workers, spec.runs - workers
    took_s: list[float] = []
    began = ended = (0.0, 0.0, 0.0, 0.0)
    works = (work_of(spec, run, files) for run in range(spec.runs))
    for done, (_, row, took) in enumerate(executor(works), 1):
        assert row.error is None, row.error
        if done == first:
            began = time.monotonic(), *spent_s(pids())
        elif first < done <= last:
            took_s.append(took.cpu_s)
        if done == last:
            ended = time.monotonic(), *spent_s(pids())
    span_s, work_s, rest_s, others_s = (end - begin for begin, end in zip(began, ended, strict=True))
    share = min(1.0, work_s / (span_s * workers))
    others = max(0.0, others_s / (span_s * len(os.sched_getaffinity(0))))
    return Taken(len(took_s) / span_s, share, median(took_s), rest_s / len(took_s), others)


def spent_s(workers: list[int]) -> tuple[float, float, float]:
    """Seconds that workers were on a core or waited for one; CPU seconds of the other processes of the sweep, and of
    everything else on its cores."""
    on_core_ns, waited_ns = 0, 0
    for pid in workers:
        fields = Path(f"/proc/{pid}/schedstat").read_text().split()
        on_core_ns, waited_ns = on_core_ns + int(fields[0]), waited_ns + int(fields[1])
    rest_s = sum(map(cpu_s, {os.getpid(), *below(os.getpid())} - set(workers)))
    return (on_core_ns + waited_ns) / 1e9, rest_s, busy_s() - on_core_ns / 1e9 - rest_s


def busy_s() -> float:
    """Seconds that the cores we may use have worked for anybody: user, nice, system, irq, softirq, stolen."""
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    ticks = (int(row[at]) for row in rows if row[0] in own for at in (1, 2, 3, 6, 7, 8))
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_turns(ways: dict[str, Way], spec: Spec, rounds: int) -> dict[str, Taken]:
    """What the rounds of each come to: medians, of runs/s those of quiet rounds if there are any; the least disturbed
    round's share of others."""
    found: dict[str, list[Taken]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (executor, workers, pids) in ways.items():
            found[name].append(timed(executor, spec, workers, pids))
            click.echo(f"{name}: {found[name][-1]}, load {os.getloadavg()[0]:.1f}", err=True)
    return {
        name: Taken(
            median([one.runs_per_s for one in taken if one.quiet] or [one.runs_per_s for one in taken]),
            median(one.at_work for one in taken),
            median(one.cpu_s for one in taken),
            median(one.rest_cpu_s for one in taken),
            min(one.others for one in taken),
        )
        for name, taken in found.items()
    }


def scaling(rounds: int, runs: int, seconds: float) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    ways: dict[str, Way] = {
        "one process": (in_process, 1, lambda: [os.getpid()]),
        f"--jobs {cores}": (lambda works: in_processes(works, cores), cores, lambda: workers_of(os.getpid())),
        f"--executor ray --jobs {cores}": (lambda works: on_ray(works, cores, {}), cores, ray_workers),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "load.parquet"
        trace = trace_of(seconds)
        write_trace(trace, path)
        spec = read_spec({"trace": str(path), "scenario": MACHINE, "seeds": runs})
        found = in_turns(ways, spec, rounds)
    return table(found, {name: workers for name, (_, workers, _) in ways.items()}, len(trace), rounds)


def table(found: dict[str, Taken], workers: dict[str, int], requests: int, rounds: int) -> list[str]:
    """The table and what it means. Scaling by the clock only where every way had the machine to itself for a round."""
    alone, local, ray = found.values()
    quiet = all(one.quiet for one in found.values())
    heads = ("runs/s", "others", "by the clock", "at work", "CPU s of a run", "of the rest", "by CPU seconds")
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, one in found.items():
        clock = f"{one.runs_per_s / workers[name] / alone.runs_per_s:.0%}" if quiet else "-"
        cells = f"{one.runs_per_s:.2f} | {one.others:.1%} | {clock} | {one.at_work:.1%} | {one.cpu_s:.3f}"
        lines.append(f"| {name} | {cells} | {one.rest_cpu_s:.3f} | {one.per_core / alone.per_core:.0%} |")
    cores = max(workers.values())
    state = "quiet" if quiet else (
        "not quiet: runs/s say what was left of it, and how they scale by the clock is left out; try again when nothing"
        " else runs"
    )  # fmt: skip
    return [
        *lines, "",
        f"Runs of {requests:,} requests, {rounds} rounds in turns, {cores} cores, Python {platform.python_version()}."
        f" *Others*: the share of the cores that other programs took in the quietest round; the machine was {state}."
        " *At work*: share of the workers' time in which the sweep did not keep them waiting. *The rest*: the sweep's"
        " other processes, for each run. *By CPU seconds*: at work, times CPU seconds alone over those beside each"
        f" other and of the rest. A run takes {local.per_core / ray.per_core - 1:+.1%} more under Ray than in plain"
        " processes.",
    ]  # fmt: skip


def memory(runs: int) -> list[str]:
    """Resident memory of the sweep's own process and its workers while small runs go by."""
    told: list[tuple[int, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "few.csv"
        path.write_text("arrival_time_s,prompt_tokens,output_tokens\n" + "".join(f"{at},64,16\n" for at in range(20)))
        settings = MACHINE | {"cost": "constant:0.01"}
        spec = {"trace": str(path), "scenario": settings, "seeds": runs}
        started_s = time.monotonic()

        def progress(done: int, total: int, left_s: float | None) -> None:
            if done in (total // 100, total // 10, total // 2, total):
                told.append((done, resident_mb(os.getpid()), sum(map(resident_mb, workers_of(os.getpid())))))

        found = sweep(spec, out=Path(folder) / "out", jobs=2, progress=progress)
        wall_s = time.monotonic() - started_s
        size_mb = sum(file.stat().st_size for file in (Path(folder) / "out").iterdir()) / 1e6
    assert found.failed == 0
    rows = [f"| {done:,} | {own:.0f} | {workers:.0f} |" for done, own, workers in told]
    return [
        "| runs done | MB of the sweep | MB of its two workers |", "|---|---|---|", *rows, "",
        f"{runs:,} runs of 20 requests in {wall_s:.0f} s ({runs / wall_s:.0f} a second, two processes); the data set"
        f" has {size_mb:.0f} MB.",
    ]  # fmt: skip


def resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def workers_of(parent: int) -> list[int]:
    """The processes that do runs: those that the fork server made."""
    every = below(parent)
    inner = {above for pid in every if (above := parent_of(pid))}
    return [pid for pid in every if pid not in inner and "resource_tracker" not in title(pid)]


def below(parent: int) -> list[int]:
    """Every process that a process started, and those started."""
    parents = {pid: parent_of(pid) for pid in every_process()}
    found, todo = [], [parent]
    while todo:
        above = todo.pop()
        children = [pid for pid, its in parents.items() if its == above]
        found += children
        todo += children
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def ray_workers() -> list[int]:
    """Ray calls its worker processes by what they do: ray::_run."""
    return [pid for pid in every_process() if title(pid).startswith("ray::")]


def every_process() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--runs", default=14, show_default=True, help="Of each way in a round.")
@click.option("--seconds", default=1.0, show_default=True, help="Of a run, about.")
@click.option("--many", default=10_000, show_default=True, help="Small runs, for the memory.")
@click.option("--update", "into_page", is_flag=True, help="Write the tables into docs/sweep.md.")
def main(rounds: int, runs: int, seconds: float, many: int, into_page: bool) -> None:
    """How sweeps scale with processes, what Ray adds, and the memory over many runs."""
    text = "\n".join([*scaling(rounds, runs, seconds), "", *memory(many)])
    click.echo(text)
    if into_page:
        update(PAGE, text, MARKS)


if __name__ == "__main__":
    main()
