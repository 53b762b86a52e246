"""Runs of a sweep on a Ray cluster: `--executor ray`, with the extra `ray`.

The cluster is the one this process is connected to, else the one that RAY_ADDRESS names, else one started here for the
time of the sweep. A run is a task of one CPU; Ray starts it again elsewhere when its process or its machine dies. Every
machine needs the same llmsim; the files that the specification names by relative paths (traces, policies) are sent to
machines that do not have them, or have others under these names. No statistics of use are sent anywhere.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from llmsim.runs import versions
from llmsim.sweep_work import Row, Took, Traces, Work, lost, run_one

TRIES = 4  # machines of a cluster come and go
Done = tuple[Work, Row, Took]


def on_ray(works: Iterator[Work], jobs: int | None, files: Mapping[str, str]) -> Iterator[Done]:
    """`jobs` at a time (None: all CPUs of the cluster), as they are done. `files`: path -> SHA-256."""
    ray = _imported()
    with _connected(ray, jobs) as sends_files:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # Where CPUs are the limit, as many again wait at their workers; Ray's own delay is hidden.
        most = 2 * cpus if jobs is None or cpus <= jobs else jobs
        sent = {path: ray.put(Path(path).read_bytes()) for path in _relative_files(files)} if sends_files else {}
        home = (os.getcwd(), dict(files), sent)
        task = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_run)
        under_way: dict[Any, Work] = {}
        try:
            while True:
                while len(under_way) < most and (work := next(works, None)) is not None:
                    under_way[task.remote(work, [home])] = work  # in a list: files are fetched where they are missing
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1)
                for reference in ready:
                    yield _done(ray, reference, under_way.pop(reference))
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError:
        raise ValueError('executor=ray: Ray is not installed: pip install "llmsim[ray]"') from None


@contextmanager
def _connected(ray: Any, jobs: int | None) -> Iterator[bool]:
    """Yields whether other machines may be among the cluster's."""
    if ray.is_initialized():
        yield True
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"RAY_ADDRESS={address}: no Ray cluster there ({reason}): start one with ray start") from None
    try:
        yield bool(address)
    finally:
        ray.shutdown()


def _done(ray: Any, reference: Any, work: Work) -> Done:
    errors = ray.exceptions
    try:
        row, took = ray.get(reference)
    except errors.RayTaskError as error:  # runs turn their own errors into rows: this is llmsim not being there
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"executor=ray: a machine cannot do runs ({reason}): install the same llmsim there") from None
    except errors.RayError as error:
        return work, lost(work, f"its process died {TRIES} times (Ray: {type(error).__name__})"), Took()
    for name, here in versions().items():
        there = row.manifest["versions"].get(name)
        if there != here:
            raise ValueError(
                f"executor=ray: a machine has {name} {there}, this one {here}: results would depend on where a run is"
                " done: install the same on all of them"
            )
    return work, row, took


def _run(work: Work, home: list[tuple[str, dict[str, str], dict[str, Any]]]) -> tuple[Row, Took]:
    """On the worker."""
    folder, files, sent = home[0]
    os.chdir(_arrived(folder, files, lambda path: import_module("ray").get(sent[path])))
    return run_one(work, _traces())


@cache
def _traces() -> Traces:
    """Those of this worker process, which does many runs."""
    return Traces()


def _arrived(folder: str, files: dict[str, str], fetch: Callable[[str], bytes]) -> str:
    """`arrange`, once in the life of a worker process."""
    known, key = _folders(), (folder, *sorted(files.items()))
    if key not in known:
        known[key] = arrange(folder, files, fetch)
    return known[key]


@cache
def _folders() -> dict[Any, str]:
    return {}


def arrange(folder: str, files: Mapping[str, str], fetch: Callable[[str], bytes]) -> str:
    """A folder from which every path of `files` leads to its content: `folder`, if it is like that, else a new one.

    Absolute paths are left to the machine. Paths that lead upwards (../traces/x.csv) stay within the new folder.
    """
    relative = {path: digest for path, digest in files.items() if digest and not os.path.isabs(path)}
    if os.path.isdir(folder) and all(_digest(Path(folder) / path) == digest for path, digest in relative.items()):
        return folder
    root = Path(tempfile.mkdtemp(prefix="llmsim-sweep-"))
    up = max([os.path.normpath(path).split(os.sep).count("..") for path in relative], default=0)
    here = root.joinpath(*["here"] * (up + 1))
    for path in relative:
        target = Path(os.path.normpath(here / path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fetch(path))
    here.mkdir(parents=True, exist_ok=True)
    return str(here)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


def _relative_files(files: Mapping[str, str]) -> list[str]:
    return [path for path, digest in files.items() if digest and not os.path.isabs(path)]
