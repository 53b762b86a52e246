"""One run of a sweep: settings in, a row out, in whatever process it is done.

A run that cannot be (a model that does not fit, a policy that breaks a rule or raises) is a row too, with the error in
one line. Nothing in a row depends on where, when or beside what it was made: what it took is told apart from it.
"""

from __future__ import annotations

import json
import traceback
from collections import OrderedDict
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, NamedTuple

from llmsim.metrics import WALL_KEYS, all_rejected
from llmsim.plugins import PolicyError
from llmsim.runs import versions
from llmsim.runs_origin import recorded
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.sweep_command import replay_command
from llmsim.sweep_spec import options_of, scenario_of
from llmsim.trace import load_trace

if TYPE_CHECKING:
    from llmsim.trace import Trace

# A worker keeps the traces it read last: the next run mostly wants one of them again.
KEPT_TRACES, KEPT_REQUESTS = 16, 500_000


@dataclass(frozen=True)
class Work:
    """A run to do. `id` is that of everything that decides its result."""

    run: int
    id: str
    labels: tuple[Any, ...]
    settings: dict[str, Any]
    goodput: dict[str, float] | None
    sha256: str  # of the trace's file, as it was when the sweep began
    inputs: dict[str, str]  # the same of every other file that the scenario names


@dataclass(frozen=True)
class Row:
    """What a run gave: `summary` is None if `error` says why there is none."""

    run: int
    id: str
    labels: tuple[Any, ...]
    manifest: dict[str, Any]
    summary: dict[str, Any] | None
    error: str | None

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> Row:
        values = json.loads(text)
        return cls(**values | {"labels": tuple(values["labels"])})


class Traces:
    """Traces by how they were read, the last ones kept."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Trace] = OrderedDict()

    def load(self, path: str, options: dict[str, Any], context_tokens: int | None, seed: int) -> Trace:
        key = json.dumps([path, options, context_tokens, seed], sort_keys=True)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        trace = load_trace(path, **options, context_tokens=context_tokens, seed=seed)
        self.kept[key] = trace
        while len(self.kept) > 1 and self._too_many():
            self.kept.popitem(last=False)
        return trace

    def _too_many(self) -> bool:
        return len(self.kept) > KEPT_TRACES or sum(len(one) for one in self.kept.values()) > KEPT_REQUESTS


class Took(NamedTuple):
    """Seconds of a run, in the process that did it."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


def run_one(work: Work, traces: Traces) -> tuple[Row, Took]:
    """The row of a run, and what it took."""
    wall_s, cpu_s = perf_counter(), process_time()
    manifest: dict[str, Any] = {}
    summary: dict[str, Any] | None = None
    error: str | None = None
    try:
        summary = _summary(work, traces, manifest)
    except (Exception, SystemExit) as raised:  # of the user's policy too: the other runs go on
        error = in_one_line(raised)
    row = Row(work.run, work.id, work.labels, _manifest(work, manifest), summary, error)
    return row, Took(perf_counter() - wall_s, process_time() - cpu_s)


def lost(work: Work, reason: str) -> Row:
    """The row of a run whose process died."""
    return Row(work.run, work.id, work.labels, _manifest(work, {}), None, reason)


def _summary(work: Work, traces: Traces, manifest: dict[str, Any]) -> dict[str, Any]:
    given = Scenario.from_dict(scenario_of(work.settings), source=f"run {work.run}")
    scenario = given.resolved()
    manifest["scenario"] = scenario.to_dict()
    options = options_of(work.settings)
    _check_closed_loop(scenario, options)
    path = work.settings["trace"]
    manifest["command"] = replay_command(given, path, options, work.goodput)
    # A seed makes another trace only where something is drawn; the file alone decides the rest.
    trace = traces.load(path, options, scenario.max_model_len, scenario.seed)
    if trace.sha256 not in ("", work.sha256):  # a folder has none
        raise ValueError(f"{path}: changed while the sweep ran: start it again with another --out")
    facts = {"path": path, "sha256": work.sha256, "options": recorded(options), "requests": len(trace)}
    manifest["trace"] = facts | {"notes": list(trace.notes)}
    result = simulate(trace, scenario)
    if not result.finished.any():
        raise ValueError(all_rejected(result.requests, scenario.admission))
    summary = result.summary(work.goodput)
    manifest["calibration"] = summary["calibration"]
    return {name: value for name, value in summary.items() if name not in WALL_KEYS}


def _check_closed_loop(scenario: Scenario, options: dict[str, Any]) -> None:
    """What shifts arrival times says nothing where they are ignored; `llmsim replay` refuses it too."""
    for name in ("rate", "time_scale", "spread"):
        if scenario.concurrency is not None and options.get(name) is not None:
            raise ValueError(
                f"concurrency={scenario.concurrency} ignores arrival times, which {name}={options[name]} changes: leave"
                " one of them out"
            )


def _manifest(work: Work, found: dict[str, Any]) -> dict[str, Any]:
    """What repeats the run, as far as it came."""
    settings = scenario_of(work.settings)
    trace = {"path": work.settings["trace"], "sha256": work.sha256, "options": recorded(options_of(work.settings))}
    known = {"scenario": settings, "seed": settings.get("seed", 0), "trace": trace, "goodput": work.goodput}
    known |= {"inputs": work.inputs, "command": None}
    return known | found | {"versions": versions()}


def in_one_line(error: BaseException) -> str:
    """As the command line would say it; an exception of other code with its type and the line it came from."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | FileNotFoundError | PolicyError):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"
