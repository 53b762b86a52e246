"""What the frames of `llmsim.views` are made from: the measures that every request has, facts of a run, the frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.metrics import Result, breakdown_s, latencies_s

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.runs import Run

POINTS = 20_000  # of any chart: beyond that a browser takes seconds to draw them
PARTS = ("queue", "prefill", "decode", "preempted")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Measure:
    """A number that every request has: what charts call it, and its unit."""

    title: str
    unit: str

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})"


MEASURES = {
    "ttft": Measure("Time to first token, TTFT", "ms"),
    "tpot": Measure("Time per output token, TPOT", "ms"),
    "e2el": Measure("End-to-end latency, E2EL", "ms"),
    "queue": Measure("Time in the queue", "ms"),
    "prefill": Measure("Time of prefill", "ms"),
    "decode": Measure("Time of decode", "ms"),
    "preempted": Measure("Time preempted", "ms"),
    "arrival_s": Measure("Sent at", "s of simulated time"),
    "prompt_tokens": Measure("Prompt", "tokens"),
    "output_tokens": Measure("Output", "tokens"),
    "cached_tokens": Measure("Prompt found in the prefix cache", "tokens"),
    "preemptions": Measure("Preemptions", "times"),
}


def values(run: Run | Result, measure: str) -> Floats:
    """The measure of every request, in the unit that `MEASURES` names; nan where it does not exist."""
    if measure not in MEASURES:
        raise ValueError(f"measure={measure}: unknown. Use {', '.join(MEASURES)}")
    requests = run.requests
    if measure in requests:
        return np.asarray(requests[measure], dtype=np.float64)
    if measure in PARTS:
        return np.asarray(1e3 * breakdown_s(requests)[measure], dtype=np.float64)
    return 1e3 * latencies_s(requests)[measure]


def summary_of(run: Run | Result) -> dict[str, Any]:
    """Summary of a run; a `Result` is summarised without goodput targets."""
    return run.summary() if isinstance(run, Result) else run.summary


def blocks_of(run: Run | Result) -> int:
    """KV blocks of one replica that requests can use (the null block is none of them)."""
    blocks = run.kv_blocks if isinstance(run, Result) else run.manifest["kv_blocks"]
    return max(int(blocks) - 1, 1)


def replicas_of(run: Run | Result) -> int:
    return run.scenario.replicas if isinstance(run, Result) else int(run.manifest["scenario"]["replicas"])


def frame_of(columns: Mapping[str, Any], notes: Sequence[str], **facts: Any) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(dict(columns.items()))
    frame.attrs.update(facts, notes=[note for note in notes if note])
    return frame
