"""Raw logs of one engine -> a recording folder (its files: `calibration.record`).

The engine is idle between scenarios and its logs are then complete on disk, so all that was appended since the last
scenario belongs to this one. Files are replaced whole, after each scenario: what is recorded stays, whatever follows.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.record.hooks import STEPS, WORKER

Line = list[Any]
GRIDS = ("decode_grid", "mixed_grid")


@dataclass
class Served:
    """What the client saw of one scenario, in seconds of perf_counter."""

    name: str
    keep: str  # "requests", the name of a grid, or "" for nothing
    scenario: dict[str, Any]
    start_s: float
    requests: list[dict[str, Any]]
    unfinished: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def finished(self) -> int:
        return sum(sum(tokens for _, tokens in row["t"]) == row["output"] for row in self.requests)


class Tail:
    """New whole lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Line]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Exporter:
    def __init__(self, out: Path, raw: Path) -> None:
        self._out = out
        self._steps, self._worker = Tail(raw / STEPS), Tail(raw / WORKER)
        self._before = 0  # "s" lines of earlier scenarios
        self._grids: dict[str, list[dict[str, Any]]] = {name: [] for name in GRIDS}

    def add(self, served: Served) -> str:
        """Write the scenario; a line if there was nothing to write."""
        lines, worker = self._steps.read(), self._worker.read()
        first, steps = self._before, sum(line[0] == "s" for line in lines)
        self._before += steps
        if not served.keep:
            return ""
        if served.keep != "mixed_grid" and not served.finished:
            return f"{served.name}: not kept, none of its {len(served.requests)} requests finished"
        launches = [line for line in worker if line[0] in "wv"]
        gpu = [[line[1] - first, *line[2:]] for line in worker if line[0] == "g" and first <= line[1] < first + steps]
        queued = {line[3]: line[1] for line in lines if line[0] == "a"}
        log = [_from(line, served.start_s) for line in merged((line for line in lines if line[0] != "a"), launches)]
        requests = [_request(row, served.start_s) for row in served.requests]
        _add_queued(requests, served, queued)
        if served.keep in GRIDS:
            self._add_to_grid(served, requests, log, gpu)
            return ""
        content = {
            "scenario": served.scenario,
            "unfinished": served.unfinished,
            "errors": served.errors,
            "requests": requests,
            "engine": "engine.json",
        }
        put(self._out / f"{served.name}.steps.jsonl.gz", jsonl(log))
        if gpu:
            put(self._out / f"{served.name}.gpu.jsonl.gz", jsonl(gpu))
        put(self._out / f"{served.name}.requests.json.gz", dumped(content))
        return ""

    def _add_to_grid(self, served: Served, requests: list[dict[str, Any]], log: list[Line], gpu: list[Line]) -> None:
        part: dict[str, Any] = {"name": served.name, "requests": requests, "steps": log, "gpu": gpu}
        if served.keep == "mixed_grid":  # no client waited for these: they time steps
            part["scenario"] = served.scenario
            part["requests"] = [{key: row[key] for key in row if key not in ("t", "queued")} for row in requests]
        self._grids[served.keep].append(part)
        put(self._out / f"{served.keep}.json.gz", dumped(self._grids[served.keep]))


def merged(lines: Iterable[Line], launches: Sequence[Line]) -> list[Line]:
    """The workers' lines between the scheduler's, by time; the order of those is kept."""
    result: list[Line] = []
    waiting = iter(launches)
    launch = next(waiting, None)
    for line in lines:
        while launch is not None and launch[1] < line[1]:
            result.append(launch)
            launch = next(waiting, None)
        result.append(line)
    while launch is not None:
        result.append(launch)
        launch = next(waiting, None)
    return result


def _from(line: Line, start_s: float) -> Line:
    return [line[0], round(line[1] - start_s, 6), *line[2:]]


def _request(row: dict[str, Any], start_s: float) -> dict[str, Any]:
    shown = {key: value for key, value in row.items() if key != "id"}
    if "submit" in shown:
        shown["submit"] = round(shown["submit"] - start_s, 5)
    shown["t"] = [[round(at_s - start_s, 5), tokens] for at_s, tokens in row["t"]]
    return shown


def _add_queued(requests: Sequence[dict[str, Any]], served: Served, queued: dict[str, float]) -> None:
    """vLLM may append to the id it was given."""
    by_id = queued | {key.rpartition("-")[0]: at_s for key, at_s in queued.items()}
    for shown, row in zip(requests, served.requests, strict=True):
        if (at_s := by_id.get(row["id"])) is not None:
            shown["queued"] = round(at_s - served.start_s, 6)


def dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def jsonl(lines: Iterable[Line]) -> str:
    return "".join(dumped(line) + "\n" for line in lines)


def put(path: Path, text: str) -> None:
    """Whole or not at all; gzip if so named, the same bytes for the same text."""
    content = text.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, 9, mtime=0)
    half = path.with_name(path.name + ".part")
    half.write_bytes(content)
    os.replace(half, path)
