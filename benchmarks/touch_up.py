"""What a touch-up is worth: `python -m benchmarks.touch_up [--as-seen] [--update FILE]`.

Every recorded load is predicted with the shipped profile and with that profile touched up (calibration.touch_up) by
the first 30 s of another load of the same machine, each other load in turn. Where a machine has one load it is touched
up by that load's own first 30 s and judged on the whole, which is easier. A folder of another model or tensor-parallel
size than the profile's is judged with the touch-ups of the folder named in `SAME_MACHINE`; without one it is left out.

The table gives mean |error| over mean, p50 and p90: without, and with, averaged over the loads touched up by, the worst
of them in brackets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from benchmarks.accuracy import METRICS, recordings, update
from calibration.profiles import write_profile
from calibration.steps import read_recording
from calibration.touch_up import check_recorded, cost_for, first_part, observed, shipped_for, touch_up, touched_profile
from llmsim.cost.profile import Profile, read_profile
from llmsim.recorded import RecordedScenario, load_files, load_name, packed_file
from llmsim.recording import load_recording
from llmsim.validate import compare, predicted

SAME_MACHINE = {"vllm-0.25.1_h200-sxm_qwen3-8b_bf16": "vllm-0.25.1_h200-sxm_llama-3.1-8b_bf16"}
FIRST_S = 30.0
SEEDS = 8
JUDGED = ("ttft_ms", "tpot_ms", "e2el_ms")
STATISTICS = ("mean", "p50", "p90")
START, END = "<!-- touch-up -->", "<!-- /touch-up -->"


@dataclass(frozen=True)
class Touched:
    """A profile file, touched up by a load."""

    load: str
    path: Path
    gpu: float
    host: float


@dataclass(frozen=True)
class Judged:
    folder: str
    load: str
    without: dict[str, float]  # metric -> mean |error|
    touched: dict[str, dict[str, float]]  # load touched up by -> metric -> mean |error|
    factors: list[tuple[float, float]]  # GPU, host
    itself: bool


def loads_of(folder: Path) -> list[str]:
    return [load_name(file) for file in load_files(folder)]


def touched_by(folder: Path, profile: Profile, out: Path) -> list[Touched]:
    """The profile touched up by each load of a folder."""
    found = []
    for name in loads_of(folder):
        recording = read_recording(folder, [name])
        check_recorded(profile, recording, None)
        cost = cost_for(recording, profile.name, profile.model, profile.gpu)
        factors = touch_up(observed(first_part(recording.scenarios[0], FIRST_S), cost), profile)
        path = out / f"{folder.name}_{name}.json"
        write_profile(touched_profile(profile, factors, recording, f"{profile.name}@{name}"), path)
        found.append(Touched(name, path, factors.gpu, factors.host))
    return found


def errors(recorded: RecordedScenario, cost: str, seeds: int) -> dict[str, float]:
    metrics: dict[str, Any] = compare([predicted(recorded, cost=cost, seed=seed) for seed in range(seeds)], recorded)
    return {
        metric: float(np.mean([abs(metrics[metric][statistic]["error"]) for statistic in STATISTICS]))
        for metric in JUDGED
    }


def judged(folder: Path, touches: list[Touched], seeds: int) -> Iterator[Judged]:
    for name in loads_of(folder):
        (recorded,) = load_recording(packed_file(folder, f"{name}.requests.json"))
        others = [touch for touch in touches if touch.load != name or touch.path.name != f"{folder.name}_{name}.json"]
        used = others or touches
        yield Judged(
            folder=folder.name,
            load=name,
            without=errors(recorded, "auto", seeds),
            touched={touch.load: errors(recorded, str(touch.path), seeds) for touch in used},
            factors=[(touch.gpu, touch.host) for touch in used],
            itself=not others,
        )


def table(rows: list[Judged]) -> str:
    lines: list[str] = []
    for folder in dict.fromkeys(row.folder for row in rows):
        names = " | ".join(METRICS[metric] for metric in JUDGED)
        lines += [f"`{folder}`", "", f"| load | touch-ups | GPU | host | {names} |", "|---|---:|---|---|---|---|---|"]
        for row in (row for row in rows if row.folder == folder):
            gpu, host = ([factors[i] for factors in row.factors] for i in (0, 1))
            cells = [_range(gpu), _range(host), *(_cell(row, metric) for metric in JUDGED)]
            note = " *(by its own first 30 s)*" if row.itself else ""
            lines.append(f"| {row.load}{note} | {len(row.touched)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, overall(rows)])


def overall(rows: list[Judged]) -> str:
    """Over all loads, those of a machine with one load apart: they are not judged on others."""
    lines = []
    for itself, label in ((False, "by another load of the same machine"), (True, "by its own first 30 s")):
        own = [row for row in rows if row.itself is itself]
        if own:
            cells = [
                f"{METRICS[m]} {_percent(np.mean([r.without[m] for r in own]))} → "
                f"{_percent(np.mean([np.mean([e[m] for e in r.touched.values()]) for r in own]))}"
                for m in JUDGED
            ]
            lines.append(f"Mean |error|, touched up {label}: {', '.join(cells)} %.")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _cell(row: Judged, metric: str) -> str:
    touched = [found[metric] for found in row.touched.values()]
    worst = f" ({_percent(max(touched))})" if len(touched) > 1 else ""
    return f"{_percent(row.without[metric])} → {_percent(np.mean(touched))}{worst}"


def _percent(share: Any) -> str:
    return f"{100 * share:.1f}"


def judge_all(seeds: int = SEEDS, as_seen: bool = False) -> list[Judged]:
    rows: list[Judged] = []
    folders = [folder for folder in recordings() if loads_of(folder)]
    with tempfile.TemporaryDirectory() as out:
        made: dict[str, list[Touched]] = {}
        for folder in folders:
            first = read_recording(folder, loads_of(folder)[:1])
            profile = read_profile(shipped_for(first))
            if as_seen:
                profile = msgspec.structs.replace(profile, spread=None)
            try:
                check_recorded(profile, first, None)
            except ValueError:
                continue
            if first.waits:
                continue  # touch-up refuses it
            made[folder.name] = touched_by(folder, profile, Path(out))
        for folder in folders:
            source = SAME_MACHINE.get(folder.name, folder.name)
            if source in made:
                rows += judged(folder, made[source], seeds)
    return rows


@click.command()
@click.option("--as-seen", is_flag=True, help="Factors as they were seen, whatever the profile's spread.")
@click.option("--seeds", default=SEEDS, show_default=True, help="Draws of the launch noise averaged in a prediction.")
@click.option("--update", "page", type=click.Path(path_type=Path, exists=True), help="Write the table into this file.")
def main(as_seen: bool, seeds: int, page: Path | None) -> None:
    """Mean |error| in per cent, with the shipped profile → touched up."""
    try:
        text = table(judge_all(seeds, as_seen))
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    if page is not None:
        update(page, text, (START, END))
    click.echo(text)


if __name__ == "__main__":
    main()
