"""Which requests a replay is fed: a choice of a trace that can be stored, compared and sent to another process.

A `TraceChoice` names a file (shipped with llmsim, uploaded, or any on this machine) or a synthetic workload, and what
becomes of it on the way in. `load` gives exactly what `llmsim.trace.load_trace` gives for the same file and options;
`command_line` and `before` are the same choice as words for `llmsim`.

The file is read once and kept (the last `KEPT` files), so that stretching a trace's time costs no reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import numpy as np

from llmsim.hardware import find_model
from llmsim.runs_origin import origin
from llmsim.scenario import Scenario
from llmsim.trace import Trace, limited, load_trace, time_scaled

KEPT = 4  # traces in memory
SHOWN = 80  # characters of a path in a message
SYNTHETIC = "synthetic.csv"  # where the command line puts a synthetic trace
SHIPPED = {
    "chat.csv": "2,000 chats at 5 a second",
    "busy.csv": "6,000 chats at 40 a second",
    "bursty.csv": "code completion in bursts of 30 a second",
    "shared_prefixes.csv": "24 long system prompts, shared",
    "sessions.jsonl": "220 conversations whose turns wait for the answer",
}
AS_SHIPPED = {name: (f"{name}: read as", "columns: ") for name in SHIPPED}  # what need not be said of them
QUICK_REQUESTS = 20_000  # of a quick answer, at most
QUICK_TOKENS = 2_000_000  # output tokens + 100 a request: 0.3 s on one core
OVER_CONTEXT = ("error", "drop", "truncate")


@dataclass(frozen=True)
class Synthesis:
    """A workload made by `llmsim.synth`: arrivals of a gamma process, log-normal lengths."""

    requests: int = 2000
    rate: float = 5.0  # requests/s
    burstiness: float = 1.0  # coefficient of variation of the gaps: 1 is Poisson
    prompt_tokens: int = 900  # median
    output_tokens: int = 160  # median
    spread: float = 0.8  # sigma of both lengths' logarithm
    seed: int = 0

    def options(self) -> dict[str, str | int]:
        """The words that `llmsim trace synth` takes, by flag."""
        return {
            "requests": self.requests,
            "arrivals": f"gamma:rate={self.rate:g},cv={self.burstiness:g}",
            "lengths": f"lognormal:median={self.prompt_tokens},sigma={self.spread:g}",
            "output_lengths": f"lognormal:median={self.output_tokens},sigma={self.spread:g}",
            "seed": self.seed,
        }

    def make(self, limit: int | None = None) -> Trace:
        """The first `limit` requests are the same however many there are. Raises ValueError for what cannot be."""
        from llmsim.synth import synthesise

        options: dict[str, Any] = self.options()
        requests = options.pop("requests")
        return synthesise(requests if limit is None else min(limit, requests), name="synthetic", **options)


@dataclass(frozen=True)
class TraceChoice:
    """A file or a synthesis, and what is done to it. `stamp` tells two states of one file apart."""

    path: str = ""  # empty: `synthesis` makes the trace
    synthesis: Synthesis | None = None
    traffic: float = 1.0  # 2: the same requests in half the time
    over_context: str = "error"
    requests: int | None = None  # the first N of the trace; None: all
    stamp: str = ""
    shown_as: str = field(default="", compare=False)  # what people call it
    uploaded: bool = False

    @property
    def name(self) -> str:
        return self.shown_as or ("synthetic" if self.synthesis else Path(self.path).name)

    def load(self, limit: int | None = None, scenario: Scenario | None = None) -> Trace:
        """The requests; `scenario` says how long a context may be and seeds what is drawn.

        Raises ValueError or FileNotFoundError naming the file, the row and the fix.
        """
        context_tokens = None if self.over_context == "error" or scenario is None else _context_tokens(scenario)
        over = self.over_context if context_tokens is not None else "error"
        seed = scenario.seed if scenario is not None else 0
        fewest = min((n for n in (limit, self.requests) if n is not None), default=None)
        if self.synthesis is not None:
            trace = _made(self.synthesis, fewest)
        else:
            trace = _read(self.path, self.stamp, over, context_tokens, seed)
            trace = trace if fewest is None else limited(trace, fewest)
        return trace if self.traffic == 1.0 else time_scaled(trace, 1.0 / self.traffic)

    def origin(self, trace: Trace, limit: int | None, scenario: Scenario) -> dict[str, Any]:
        """What `llmsim rerun` needs of the trace that `load` gave."""
        fewest = min((n for n in (limit, self.requests) if n is not None), default=None)
        options: dict[str, Any] = {} if self.traffic == 1.0 else {"time_scale": 1.0 / self.traffic}
        if self.synthesis is not None:
            made = self.synthesis.options() | {"name": trace.name, "requests": len(trace)}
            return origin(trace, "", options, scenario, synthesis=made)
        options |= {} if self.over_context == "error" else {"over_context": self.over_context}
        options |= {} if fewest is None else {"limit": fewest}
        return origin(trace, self.path, options, scenario)

    def size(self, scenario: Scenario | None = None) -> int:
        """Requests in all; for a scenario: those that are left once what its model cannot take is dropped."""
        if self.synthesis is not None:
            return min(self.synthesis.requests, self.requests or self.synthesis.requests)
        return len(self.load(None, scenario))

    def quick(self, scenario: Scenario | None = None) -> int:
        """How many of the first requests are simulated in well under a second: all of them, or a round number."""
        return quick_requests(self.load(QUICK_REQUESTS, scenario), self.size(scenario))

    def first(self, requests: int | None) -> TraceChoice:
        """The same, of which only the first requests are taken."""
        return self if requests is None else replace(self, requests=requests)

    def notes(self, scenario: Scenario | None = None) -> tuple[str, ...]:
        """What the reader did to the file, a line each: how it was read, what was dropped or cut. None of our own."""
        if self.synthesis is not None:
            return ()
        notes = replace(self, traffic=1.0, requests=None).load(None, scenario).notes
        return tuple(note for note in notes if self.name not in SHIPPED or not note.startswith(AS_SHIPPED[self.name]))

    def command_line(self) -> list[str]:
        """The words of `llmsim replay` that name this trace."""
        words = [self.path or SYNTHETIC]
        if self.requests is not None:
            words += ["--limit", str(self.requests)]
        if self.traffic != 1.0:
            words += ["--time-scale", repr(1.0 / self.traffic)]
        if self.over_context != "error":
            words += ["--over-context", self.over_context]
        return words

    def shown(self) -> list[str]:
        """`command_line`, with the path as it is seen from the current folder; of an upload, its name."""
        words = self.command_line()
        if self.uploaded:
            words[0] = self.shown_as
        with suppress(ValueError):
            words[0] = str(Path(words[0]).relative_to(Path.cwd()))
        if words[0].startswith("-"):  # or it would be taken for an option
            words[0] = f"./{words[0]}"
        return words

    def before(self) -> list[str] | None:
        """The command that makes the trace first, if it has to be made."""
        if self.synthesis is None:
            return None
        words = ["llmsim", "trace", "synth"]
        for name, value in self.synthesis.options().items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return [*words, "-o", SYNTHETIC]

    def facts(self) -> dict[str, Any]:
        """What decides the requests, JSON-ready."""
        made = None if self.synthesis is None else self.synthesis.options()
        return {
            "path": self.path, "stamp": self.stamp, "synthesis": made, "traffic": self.traffic,
            "over_context": self.over_context, "requests": self.requests,
        }  # fmt: skip


def _context_tokens(scenario: Scenario) -> int:
    return scenario.max_model_len or find_model(scenario.model).max_context_tokens


def shipped(name: str) -> TraceChoice:
    return TraceChoice(str(shipped_folder() / name), shown_as=name)


def on_disk(path: str | Path, shown_as: str = "") -> TraceChoice:
    """A file (or folder) of this machine, as it is now. What is not there is for the reader to refuse, with its hint.

    Raises ValueError for what never ends or cannot be looked at: standard input, pipes and devices, somebody else's.
    """
    words = str(path) if len(str(path)) <= SHOWN else f"{str(path)[:SHOWN]}…"
    stamp = ""
    try:
        path = Path(path).expanduser()
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{words}: cannot be read: {error.strerror}; give the path of a file") from None
    except (RuntimeError, ValueError):  # ~nobody, a null character
        raise ValueError(f"{words}: no such path; give that of a file, from its root") from None
    else:
        if not (S_ISREG(facts.st_mode) or S_ISDIR(facts.st_mode)):
            raise ValueError(f"{words}: a pipe or a device, which may never end; give the path of a file")
        if S_ISREG(facts.st_mode) and not facts.st_size:
            raise ValueError(f"{words}: the file is empty; a trace needs at least one request")
        stamp = f"{facts.st_size}-{facts.st_mtime_ns}"
    if str(path) == "-":
        raise ValueError("-: standard input is the server's; give the path of a file")
    return TraceChoice(str(path), stamp=stamp, shown_as=shown_as, uploaded=bool(shown_as))


def shipped_folder() -> Path:
    """The example traces: beside the modules when installed, beside the package in a checkout."""
    package = Path(str(files("llmsim")))
    for folder in (package / "traces", package.parent / "traces"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the example traces are in neither {package}/traces nor {package.parent}/traces")


@lru_cache(maxsize=KEPT)
def _read(path: str, stamp: str, over_context: str, context_tokens: int | None, seed: int) -> Trace:
    """`stamp` is there to be part of what is remembered: a file that changed is read again."""
    return load_trace(path, over_context=over_context, context_tokens=context_tokens, seed=seed)


@lru_cache(maxsize=KEPT)
def _made(synthesis: Synthesis, limit: int | None) -> Trace:
    return synthesis.make(limit)


def quick_requests(first: Trace, size: int) -> int:
    """How many of a trace of `size` requests, which begins with `first`, make a quick answer."""
    work = np.cumsum(first.output_tokens + 100)
    fit = int(np.searchsorted(work, QUICK_TOKENS, side="right"))
    if fit >= size:
        return size
    rounded = int(10 ** max(len(str(fit)) - 2, 0))
    return max(fit // rounded * rounded, 1)


@dataclass(frozen=True)
class Replay:
    """One run to be made: what, where to, and the same as words for a terminal."""

    choice: TraceChoice
    scenario: Scenario
    folder: Path
    command: tuple[str, ...] = ()
    limit: int | None = None


def replay_all(todo: Sequence[Replay], progress: Callable[[float, float, str], None] | None = None) -> list[Path]:
    """One after the other; `progress(requests answered, requests in all, words)`."""
    whole = [one.choice.size(one.scenario) for one in todo]
    sizes = [min(size, one.limit or size) for size, one in zip(whole, todo, strict=True)]
    folders: list[Path] = []

    def told(done: int, _: int = 0, simulated_s: float = 0.0) -> None:
        if progress is not None:
            words = f"requests answered, {simulated_s:,.0f} s simulated"
            progress(sum(sizes[: len(folders)]) + done, sum(sizes), words)

    for one in todo:
        told(0)
        folders.append(replay(one, told))
    told(0)
    return folders


def replay(one: Replay, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """Simulate and write a run folder, unless it is there already; returns it.

    Raises ValueError or FileNotFoundError for a bad trace or an impossible setting, PolicyError for a bad policy.
    """
    from llmsim.runs import write_run
    from llmsim.simulate import simulate

    if (one.folder / "manifest.json").is_file():
        return one.folder
    scenario = one.scenario.resolved()
    trace = one.choice.load(one.limit, scenario)
    result = simulate(trace, scenario, progress)
    _check_answered(result)
    extra = {"command": list(one.command), **one.choice.origin(trace, one.limit, scenario), "notes": list(trace.notes)}
    try:
        write_run(result, one.folder, summary=result.summary(), manifest_extra=extra)
    except (ValueError, OSError):
        if not (one.folder / "manifest.json").is_file():  # not another process that was faster
            raise
    return one.folder


def _check_answered(result: Any) -> None:
    if result.finished.any():
        return
    tokens = (result.kv_blocks - 1) * result.scenario.block_size
    raise ValueError(
        f"none of {len(result.finished)} requests can be answered: a replica's {result.kv_blocks} KV blocks hold "
        f"{tokens} tokens: raise gpu_memory_utilization, or take a larger GPU or a smaller model"
    )
