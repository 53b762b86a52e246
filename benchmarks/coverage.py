"""Do prediction intervals hold the truth as often as they say: `python -m benchmarks.coverage [--update FILE]`.

Every recorded load is predicted as `llmsim validate` replays it, by draws as `llmsim.predict` makes them, and it is
counted how often what the client saw lies inside the interval. Widths come from recordings, so a load is judged with
deviations that have no part of it: for the model a profile was fitted to without all loads of its machine, for what the
profile is carried to without every setup of that model (Llama-3.1-8B in fp8 and on two GPUs together, for example), as
if it had never been run. Nothing is chosen to make the table come out.

The profiles' coefficients are fitted to a few of these loads; those are judged like the others, and are 4 of 46.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import click
import msgspec
import numpy as np

from benchmarks.accuracy import METRICS, STATISTICS, recordings, update
from calibration.recorded_on import RECORDED, Recorded, placed
from calibration.spread import spread_of
from calibration.touch_up import Load
from calibration.touch_up_command import carried_loads, own_loads
from llmsim.cost.profile import Deviation, Profile, Within, profile_names, read_profile
from llmsim.hardware import model_names
from llmsim.recorded import RecordedScenario, load_files
from llmsim.recording import load_recording, read_settings
from llmsim.simulate import cost_of, simulate
from llmsim.uncertainty import draws_of, fewest_draws, interval, sources_of
from llmsim.uncertainty_sources import roofline_spread
from llmsim.validate import compare, named_in, scenario_of

LEVELS = (0.5, 0.9, 0.99)
DRAWS = fewest_draws(max(LEVELS))
SHOWN = 0.9  # of the tables by recording and by load
START, END = "<!-- coverage -->", "<!-- /coverage -->"
SPREAD = "<!-- spread -->", "<!-- /spread -->"
Cell = tuple[str, str]  # metric, statistic


@dataclass(frozen=True)
class Judged:
    """What the client of one recorded load saw, and what each draw says."""

    folder: str
    load: str
    truth: dict[Cell, float]
    drawn: dict[Cell, tuple[float, ...]]

    def inside(self, cell: Cell, level: float) -> bool:
        low, _, high = interval(self.drawn[cell], level)
        return low <= self.truth[cell] <= high

    def half_width(self, cell: Cell, level: float) -> float:
        """Of the interval, as a part of its median."""
        low, middle, high = interval(self.drawn[cell], level)
        return (high - low) / 2 / middle


@cache
def _own(folder: Path, profile: str) -> tuple[Load, ...]:
    return tuple(own_loads(folder, profile))


@cache
def _carried(folder: Path, profile: str) -> dict[str, list[Load]]:
    return carried_loads([folder], profile)


def kept(folder: Path) -> dict[str, Recorded]:
    """By profile, the recordings that say how sure it may be of this one: of other machines, and of other models."""
    own = model_of(folder) if any(folder in held.carried for held in RECORDED.values()) else None
    return {
        name: Recorded(
            machines=tuple(group for group in held.machines if folder not in group),
            carried=tuple(path for path in held.carried if model_of(path) != own),
        )
        for name, held in RECORDED.items()
    }


@cache
def model_of(folder: Path) -> str:
    return named_in(str(folder), read_settings(folder / "engine.json")[1], "model", model_names())


def left_out(folder: Path) -> list[Profile]:
    """The shipped profiles, with the spread that `kept` gives."""
    found = []
    for name, held in kept(folder).items():
        if len(held.machines) < 2:
            continue  # one machine says nothing about machines; the other profiles stand in
        setups: dict[str, list[Load]] = {}
        for path in held.carried:
            for setup, loads in _carried(path, name).items():
                setups.setdefault(setup, []).extend(loads)
        machines = [[load for path in group for load in _own(path, name)] for group in held.machines]
        found.append(msgspec.structs.replace(read_profile(name), spread=spread_of(machines, setups)))
    return found


def judge(folder: Path, draws: int = DRAWS, profiles: Sequence[Profile] | None = None) -> list[Judged]:
    """Every load of a recording; grids of single batches are none. `profiles`: by default `left_out`."""
    profiles = left_out(folder) if profiles is None else profiles
    loads = [load for file in load_files(folder) for load in load_recording(file)]
    return [_judged(folder.name, load, profiles, draws) for load in loads]


def _judged(folder: str, recorded: RecordedScenario, profiles: Sequence[Profile], draws: int) -> Judged:
    scenario = scenario_of(recorded).resolved()
    cost = cost_of(scenario)
    truth: dict[Cell, float] = {}
    drawn: dict[Cell, list[float]] = {}
    for draw in draws_of(scenario, sources_of(scenario, cost, profiles), draws):
        result = simulate(recorded.trace, replace(scenario, seed=draw.seed), cost=draw.of(cost))
        for metric, statistics in compare([result], recorded).items():
            for statistic, found in statistics.items():
                if found["measured"] is not None and found["predicted"] is not None:
                    truth[metric, statistic] = found["measured"]
                    drawn.setdefault((metric, statistic), []).append(found["predicted"])
    whole = {cell: tuple(values) for cell, values in drawn.items() if len(values) == draws}
    return Judged(folder, recorded.name, {cell: truth[cell] for cell in whole}, whole)


def recorded_folders() -> list[Path]:
    """What there is to judge, whether or not it has its place."""
    return [folder for folder in recordings() if load_files(folder)]


def judge_all(draws: int = DRAWS, jobs: int = 1) -> list[Judged]:
    if jobs == 1:
        return [one for folder in placed() for one in judge(folder, draws)]
    with ProcessPoolExecutor(jobs) as pool:
        return [one for held in pool.map(judge, placed(), [draws] * len(placed())) for one in held]


# ---- tables ---------------------------------------------------------------------------------------------------------


def share_inside(loads: Iterable[Judged], level: float, wanted: Callable[[Cell], bool]) -> str:
    held = [load.inside(cell, level) for load in loads for cell in load.drawn if wanted(cell)]
    return f"{100 * float(np.mean(held)):.0f}" if held else "-"


def half_width(loads: Iterable[Judged], level: float, cell: Cell) -> str:
    widths = [load.half_width(cell, level) for load in loads if cell in load.drawn]
    return f"{100 * median(widths):.1f}" if widths else "-"


def table(loads: Sequence[Judged]) -> str:
    """Markdown: by number, by recording, by load."""
    return "\n\n".join([_by_number(loads), _by_folder(loads), _by_load(loads)])


def _by_number(loads: Sequence[Judged]) -> str:
    levels = [level for level in LEVELS if len(next(iter(loads[0].drawn.values()))) >= fewest_draws(level)]
    head = " | ".join(f"in {100 * level:g} %" for level in levels)
    lines = [f"| | {head} | half-width of {100 * SHOWN:g} % |", "|---|" + "---:|" * (len(levels) + 1)]
    for metric, name in METRICS.items():
        for statistic in STATISTICS:
            cell = metric, statistic
            if any(cell in load.drawn for load in loads):
                held = " | ".join(f"{share_inside(loads, level, lambda c, own=cell: c == own)} %" for level in levels)  # type: ignore[misc]
                lines.append(f"| {name} {statistic} | {held} | ±{half_width(loads, SHOWN, cell)} % |")
    for label, metrics in (("TTFT, TPOT, E2EL, tok/s", set(METRICS) - {"itl_ms"}), ("all of them", set(METRICS))):
        held = " | ".join(f"{share_inside(loads, level, lambda c, own=metrics: c[0] in own)} %" for level in levels)  # type: ignore[misc]
        lines.append(f"| **{label}** | {held} | |")
    return "\n".join(lines)


def _by_folder(loads: Sequence[Judged]) -> str:
    names = list(dict.fromkeys(load.folder for load in loads))
    return _grouped("recording", {f"`{name}`": [load for load in loads if load.folder == name] for name in names})


def _by_load(loads: Sequence[Judged]) -> str:
    kinds: dict[str, list[Judged]] = {}
    for load in sorted(loads, key=lambda one: one.load):
        kinds.setdefault(load.load.partition("_")[0], []).append(load)
    return _grouped("kind of load", kinds)


def _grouped(title: str, groups: dict[str, list[Judged]]) -> str:
    cells = [("ttft_ms", "mean"), ("ttft_ms", "p99"), ("tpot_ms", "mean"), ("e2el_ms", "mean")]
    names = " | ".join(f"{METRICS[metric]} {statistic}" for metric, statistic in cells)
    lines = [f"| {title} | loads | in {100 * SHOWN:g} % | {names} |", "|---|---:|---:|" + "---:|" * len(cells)]
    for name, own in groups.items():
        inside = share_inside(own, SHOWN, lambda cell: cell[0] != "itl_ms")
        widths = " | ".join(f"±{half_width(own, SHOWN, cell)} %" for cell in cells)
        lines.append(f"| {name} | {len(own)} | {inside} % | {widths} |")
    return "\n".join(lines)


def spread_table() -> str:
    """Markdown: what the shipped profiles and the roofline's file hold."""
    lines = ["| | | decode steps | steps with chunks | launches | rests on |", "|---|---|---:|---:|---:|---|"]
    for name in profile_names():
        spread = read_profile(name).spread
        if spread is not None:
            rows = [
                ("loads of one machine", spread.runs, "loads"),
                ("machines beyond that", spread.machines, "machines"),
            ]
            rows += [(f"carried to {setup}", held, "loads") for setup, held in spread.models.items()]
            within = (spread.sizes, spread.carried_sizes, spread.steps)
            lines += _spread_rows(f"`{name}`", rows, within)
    roofline = roofline_spread()
    rows = [(setup, held, "loads") for setup, held in roofline.models.items()]
    return "\n".join([*lines, *_spread_rows("`roofline`", rows, (roofline.sizes, None, roofline.steps))])


def _spread_rows(name: str, rows: Sequence[tuple[str, Deviation, str]], within: Sequence[Within | None]) -> list[str]:
    cells = [
        f"| {what} | {100 * held.gpu_decode:.2g} % | {100 * held.gpu_chunk:.2g} % | {100 * held.host:.2g} % "
        f"| {held.count} {unit if held.count > 1 else unit[:-1]} |"
        for what, held, unit in rows
    ]
    inside = ("iterations of one size", "iterations of one size, carried", "single iterations")
    cells += [
        f"| {what} | {100 * held.decode:.2g} % | {100 * held.chunk:.2g} % | | {held.count} loads |"
        for what, held in zip(inside, within, strict=True)
        if held is not None
    ]
    return [f"| {name} {cell}" if i == 0 else f"| {cell}" for i, cell in enumerate(cells)]


@click.command()
@click.option("--draws", default=DRAWS, show_default=True, help="Of each load.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--update", "page", type=click.Path(path_type=Path, exists=True), help="Write the tables into this file.")
def main(draws: int, jobs: int, page: Path | None) -> None:
    """How often prediction intervals hold what recorded clients saw, and how wide they are."""
    if draws < fewest_draws(SHOWN):
        raise click.UsageError(f"--draws {draws}: give {fewest_draws(SHOWN)} or more, {DRAWS} for all levels")
    text = table(judge_all(draws, jobs))
    if page is not None:
        update(page, text, (START, END))
        update(page, spread_table(), SPREAD)
    click.echo(text)


if __name__ == "__main__":
    main()
