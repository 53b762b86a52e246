"""What a run folder replayed: its trace and scenario, read back so that the run can be looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmsim.metrics import Columns
from llmsim.runs import Run
from llmsim.runs_origin import digest
from llmsim.scenario import Scenario
from llmsim.trace import Trace, load_trace


def of_run(run: Run, trace: str | Path | None = None) -> tuple[Trace, Scenario]:
    """`trace`: where its trace is now, if not where it was.

    Raises ValueError if the manifest does not say how the trace was read, or the trace is gone or another one.
    """
    known: dict[str, Any] = run.manifest.get("trace", {})
    instead = "explain the trace instead, with the flags of its replay"
    if "options" not in known:
        raise ValueError(f"{run.folder}: its manifest does not say how its trace was read: {instead}")
    path = _where(run, known, trace)
    found = digest(path)
    if found != known["sha256"]:
        what = f"has changed: SHA-256 {found[:12]}…, then {known['sha256'][:12]}…" if found else "is gone"
        raise ValueError(f"{run.folder}: its trace {path} {what}: {instead}")
    scenario = Scenario.from_dict(run.manifest["scenario"], source=f"{run.folder}/manifest.json: scenario")
    loaded = load_trace(path, **known["options"], context_tokens=scenario.max_model_len, seed=scenario.seed)
    return loaded, scenario


def _where(run: Run, known: dict[str, Any], trace: str | Path | None) -> str:
    if trace is not None:
        return str(trace)
    if known["path"] is None:
        raise ValueError(f"{run.folder}: its trace came from standard input: give it with --trace FILE")
    path = Path(known["path"])
    return str(path if path.exists() else Path(known["folder"]) / path)


def check_repeated(run: Run, requests: Columns) -> None:
    """Raises ValueError if a replay of the run's trace has other numbers than the run."""
    for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        then, now = run.requests[name], requests[name]
        same = (then == now) | (np.isnan(then) & np.isnan(now)) if len(then) == len(now) else np.zeros(1, dtype=bool)
        if not same.all():
            version = run.manifest.get("versions", {}).get("llmsim", "?")
            raise ValueError(
                f"{run.folder}: its replay by llmsim {version} had other numbers ({name} of request"
                f" {int(np.argmin(same))}), so what is found now is not what happened there: see llmsim rerun"
                f" {run.folder}, or explain the trace instead, with the flags of its replay"
            )
