"""Which requests a replay is fed: a choice of a trace that can be stored, compared and sent to another process.

A `TraceChoice` names a file (shipped with llmsim, uploaded, or any on this machine) or a synthetic workload, and what
becomes of it on the way in. `load` gives exactly what `llmsim.trace.load_trace` gives for the same file and options;
`command_line` and `before` are the same choice as words for `llmsim`.

The file is read once and kept (the last `KEPT` files), so that stretching a trace's time costs no reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llmsim.scenario import Scenario
from llmsim.trace import Trace, limited, load_trace, time_scaled

KEPT = 4  # traces in memory
SYNTHETIC = "synthetic.csv"  # where the command line puts a synthetic trace
SHIPPED = {
    "chat.csv": "2,000 chats at 5 a second",
    "bursty.csv": "code completion in bursts of 30 a second",
    "shared_prefixes.csv": "24 long system prompts, shared",
    "sessions.jsonl": "220 conversations whose turns wait for the answer",
}
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

    def make(self) -> Trace:
        """Raises ValueError for what no workload can be."""
        from llmsim.synth import synthesise

        options: dict[str, Any] = self.options()
        return synthesise(options.pop("requests"), name="synthetic", **options)


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

    @property
    def name(self) -> str:
        return self.shown_as or ("synthetic" if self.synthesis else Path(self.path).name)

    def load(self, limit: int | None = None, scenario: Scenario | None = None) -> Trace:
        """The requests; `scenario` says how long a context may be and seeds what is drawn.

        Raises ValueError or FileNotFoundError naming the file, the row and the fix.
        """
        context_tokens = None if self.over_context == "error" or scenario is None else scenario.max_model_len
        over = self.over_context if context_tokens is not None else "error"
        trace = _read(self.path, self.stamp, self.synthesis, over, context_tokens, scenario.seed if scenario else 0)
        fewest = min((n for n in (limit, self.requests) if n is not None), default=None)
        if fewest is not None:
            trace = limited(trace, fewest)
        return trace if self.traffic == 1.0 else time_scaled(trace, 1.0 / self.traffic)

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
        """`command_line`, with the path as it is seen from the current folder."""
        words = self.command_line()
        with suppress(ValueError):
            words[0] = str(Path(words[0]).relative_to(Path.cwd()))
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


def shipped(name: str) -> TraceChoice:
    return TraceChoice(str(shipped_folder() / name), shown_as=name)


def on_disk(path: str | Path, shown_as: str = "") -> TraceChoice:
    """A file of this machine, as it is now. Raises what reading it would."""
    path = Path(path).expanduser()
    stamp = ""
    if path.is_file():  # what is not there is for the reader to refuse, with its hint
        facts = path.stat()
        stamp = f"{facts.st_size}-{facts.st_mtime_ns}"
    return TraceChoice(str(path), stamp=stamp, shown_as=shown_as)


def shipped_folder() -> Path:
    """The example traces: beside the modules when installed, beside the package in a checkout."""
    package = Path(str(files("llmsim")))
    for folder in (package / "traces", package.parent / "traces"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the example traces are in neither {package}/traces nor {package.parent}/traces")


@lru_cache(maxsize=KEPT)
def _read(
    path: str, stamp: str, synthesis: Synthesis | None, over_context: str, context_tokens: int | None, seed: int
) -> Trace:
    """`stamp` is there to be part of what is remembered: a file that changed is read again."""
    if synthesis is not None:
        return synthesis.make()
    return load_trace(path, over_context=over_context, context_tokens=context_tokens, seed=seed)


def quick_requests(trace: Trace) -> int:
    """How many of the first requests are simulated in well under a second: all of them, or a round number."""
    work = np.cumsum(trace.output_tokens + 100)
    fit = min(int(np.searchsorted(work, QUICK_TOKENS, side="right")), QUICK_REQUESTS)
    if fit >= len(trace):
        return len(trace)
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
    sizes = [len(one.choice.load(one.limit, one.scenario)) for one in todo]
    folders = []
    for index, one in enumerate(todo):
        before, whole = sum(sizes[:index]), sum(sizes)

        def told(done: int, _: int, simulated_s: float, before: int = before, whole: int = whole) -> None:
            if progress is not None:
                progress(before + done, whole, f"requests answered, {simulated_s:,.0f} s simulated")

        folders.append(replay(one, told))
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
    extra = {
        "command": list(one.command),
        "trace": {"name": one.choice.name, "sha256": trace.sha256, "requests": len(trace)},
        "notes": list(trace.notes),
    }
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
