"""Repeat a run from its manifest and compare the bytes of its files.

A run is repeated from what its manifest records (llmsim.runs_origin): the scenario with every default filled in, the
trace, whose SHA-256 has to be that of the run, the options it was read with, the targets and what was written. Nothing
else goes in, so files that differ mean that the manifest's versions or inputs, or llmsim itself, have changed; which of
them is said. A run whose trace came from standard input, or is gone, cannot be repeated without being given its trace.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmsim.prices import Price
from llmsim.runs import facts_of_files, versions, write_run
from llmsim.runs_check import read_manifest
from llmsim.runs_origin import digest, options_from, origin
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.synth import synthesise
from llmsim.trace import load_trace, time_scaled

MOST_NAMES = 8  # that a line says


@dataclass(frozen=True)
class Rerun:
    """`same` and `different`: names of files, or of a sweep's numbers; `reasons`: what has changed, most telling first;
    `repeated`: whether it could be."""

    folder: Path
    repeated: bool
    same: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    size_bytes: int = 0

    @property
    def equal(self) -> bool:
        return self.repeated and not self.different

    def in_words(self) -> str:
        """One line."""
        why = "; ".join(self.reasons)
        if not self.repeated:
            return f"{self.folder}: cannot be repeated: {why}"
        if self.equal and not self.size_bytes:  # a row of a sweep
            return f"{self.folder}: the same numbers: {len(self.same)} of its summary{f'; {why}' if why else ''}"
        if self.equal:
            size = f"{len(self.same)} files, {self.size_bytes / 1e6:.2f} MB"
            return f"{self.folder}: the same bytes: {', '.join(self.same)} ({size}){f'; {why}' if why else ''}"
        why = why or "the manifest's versions and inputs are as they were, so llmsim's own code has changed"
        names = [*self.different[:MOST_NAMES], *(["…"] if len(self.different) > MOST_NAMES else [])]
        return f"{self.folder}: differs in {', '.join(names)}: {why}"


def rerun(
    folder: str | Path,
    *,
    trace: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Rerun:
    """Repeat the run in `folder`; `trace`: where its trace is now. The folder is not touched.

    Raises FileNotFoundError or ValueError if there is no run folder with a manifest.
    """
    shown, folder = Path(folder), Path(folder).absolute()
    manifest = read_manifest(shown)
    known = manifest.get("trace", {})
    if "options" not in known or "written" not in manifest:
        why = "its manifest does not say how the trace was read: an llmsim before rerun wrote it"
        return Rerun(shown, False, reasons=(why,))
    at = Path(known["folder"])
    needed = [*([str(known["path"])] if known["path"] is not None else []), *manifest["inputs"]]
    elsewhere = trace is None and not all(Path(path).exists() for path in needed) and at.is_dir()
    with chdir(at) if elsewhere else nullcontext():
        lacking = _lacking(manifest, trace)
        if lacking:
            return Rerun(shown, False, reasons=(lacking,))
        return replace(_compared(folder, manifest, str(trace or known["path"]), progress), folder=shown)


def _lacking(manifest: dict[str, Any], trace: str | Path | None) -> str | None:
    """What a repetition would need and is not there, or not as it was."""
    known = manifest["trace"]
    if "synthesis" in known:
        return f"its trace is synthetic: leave --trace {trace} out" if trace is not None else _gone(manifest)
    if trace is None and known["path"] is None:
        return "its trace came from standard input: give it with --trace FILE"
    path = str(trace or known["path"])
    now = digest(path)
    if not now:
        return f"its trace {path} is gone: give it with --trace FILE"
    if now != known["sha256"]:
        return f"its trace {path} has changed: SHA-256 {now[:12]}…, then {known['sha256'][:12]}…"
    return _gone(manifest)


def _gone(manifest: dict[str, Any]) -> str | None:
    gone = [file for file in manifest["inputs"] if not digest(file)]
    return f"{gone[0]} is gone, which its scenario names" if gone else None


def _compared(
    folder: Path, manifest: dict[str, Any], path: str, progress: Callable[[int, int, float], None] | None
) -> Rerun:
    with tempfile.TemporaryDirectory(prefix="llmsim-rerun-") as place:
        again = Path(place) / "run"
        try:
            calibration = _repeat(manifest, path, again, progress)
        except (ValueError, FileNotFoundError) as error:  # settings that a changed llmsim or policy refuses
            return Rerun(folder, False, reasons=(*_changes(manifest, None), " ".join(str(error).split())))
        now = facts_of_files(again)
        names = [name for name in manifest["files"] if name != "manifest.json"]
        same = tuple(name for name in names if _bytes(folder / name) == _bytes(again / name))
        different = tuple(name for name in names if name not in same)
        reasons = [*_changes(manifest, calibration), *_touched(folder, manifest)]
        if different:
            reasons += _first_difference(folder / "summary.json", again / "summary.json")
    size_bytes = sum(now[name]["bytes"] for name in same)
    return Rerun(folder, True, same, different, tuple(reasons), size_bytes)


def _repeat(
    manifest: dict[str, Any], path: str, again: Path, progress: Callable[[int, int, float], None] | None
) -> dict[str, Any]:
    """Writes the run anew; returns what its cost model is now."""
    scenario = Scenario.from_dict(manifest["scenario"], source="manifest.json: scenario")
    options, written, goodput = options_from(manifest["trace"]["options"]), manifest["written"], manifest["goodput"]
    made = manifest["trace"].get("synthesis")
    if made is not None:
        loaded = synthesise(**made)
        loaded = time_scaled(loaded, options["time_scale"]) if "time_scale" in options else loaded
    else:
        loaded = load_trace(path, **options, context_tokens=scenario.max_model_len, seed=scenario.seed)
    result = simulate(loaded, scenario, progress)
    paid = manifest.get("price")
    price = None if paid is None else Price(**paid)
    summary = result.summary(goodput, price)
    extra = origin(loaded, path, options, scenario, goodput=goodput, price=price, synthesis=made, **written)
    write_run(result, again, summary=summary, manifest_extra=extra, **written)
    calibration: dict[str, Any] = summary["calibration"]
    return calibration


def changed_inputs(manifest: dict[str, Any]) -> Iterator[str]:
    """Versions, and files that the scenario names."""
    for name, now in versions().items():
        then = manifest["versions"].get(name)
        if then != now:
            yield f"{name} {then} then, {now} now"
    for file, then in manifest["inputs"].items():
        if digest(file) not in ("", then):
            yield f"{file} has changed"


def _changes(manifest: dict[str, Any], calibration: dict[str, Any] | None) -> Iterator[str]:
    """What the manifest names and is another now."""
    yield from changed_inputs(manifest)
    if calibration is not None and manifest["calibration"] != calibration:
        before, after = (one.get("id") or one["label"] for one in (manifest["calibration"], calibration))
        yield f"the profile has changed: {before} then, {after} now"


def _touched(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Files that are no longer what the run wrote."""
    for name, facts in manifest["files"].items():
        now = digest(folder / name)
        if now != facts["sha256"]:
            yield f"{name} was {'changed' if now else 'deleted'} after the run"


def _first_difference(before: Path, after: Path) -> Iterator[str]:
    """The first number of the summary that is another one."""
    try:
        then, now = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    except (OSError, ValueError):
        return
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return
    for key in {**then, **now}:
        if key != "calibration" and then.get(key) != now.get(key):
            yield f"first of all {key}: {_short(then.get(key))} then, {_short(now.get(key))} now"
            return


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
