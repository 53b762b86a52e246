"""One run of a sweep repeated from its manifest: are its numbers the same?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsim.rerun import Rerun, changed_inputs
from llmsim.runs_origin import digest, options_from
from llmsim.sweep import read_sweep
from llmsim.sweep_work import Traces, Work, run_one


def again(folder: str | Path, run: int) -> Rerun:
    """Repeat run `run` of the sweep in `folder`. ValueError if that run failed or is not there."""
    found = read_sweep(folder)
    manifest, before = found.manifest(run), found.summary(run)
    shown = Path(f"{folder}, run {run}")
    path, then = manifest["trace"]["path"], manifest["trace"]["sha256"]
    now = digest(path)
    if now != then:
        why = f"its trace {path} has changed: SHA-256 {now[:12]}…, then {then[:12]}…" if now else f"{path} is gone"
        return Rerun(shown, False, reasons=(why,))
    row, _ = run_one(_work(run, manifest), Traces())
    changes = list(changed_inputs(manifest))
    if row.summary is None:
        return Rerun(shown, False, reasons=(*changes, str(row.error)))
    different = [name for name in {**before, **row.summary} if before.get(name) != row.summary.get(name)]
    if "calibration" in different:
        ids = [one["calibration"].get("id") or one["calibration"]["label"] for one in (before, row.summary)]
        changes.append(f"the profile has changed: {ids[0]} then, {ids[1]} now")
    same = tuple(name for name in before if name not in different)
    return Rerun(shown, True, same, tuple(different), tuple(changes))


def _work(run: int, manifest: dict[str, Any]) -> Work:
    """The run, every setting as it was resolved."""
    options = options_from(manifest["trace"]["options"])
    if "model" in options:
        options["trace_model"] = options.pop("model")
    settings = manifest["scenario"] | options | {"trace": manifest["trace"]["path"]}
    return Work(run, "", (), settings, manifest["goodput"], manifest["trace"]["sha256"], manifest["inputs"])
