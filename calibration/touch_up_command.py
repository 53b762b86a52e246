"""python -m calibration touch-up and spread: one machine's two factors, and how far machines differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from calibration.console import check_once
from calibration.profiles import check_output, write_profile
from calibration.recorded_on import RECORDED, placed
from calibration.spread import KINDS, spread_of
from calibration.spread_roofline import roofline_spread, write
from calibration.steps import Recording, Scenario, read_recording
from calibration.touch_up import (
    Load,
    check_recorded,
    cost_for,
    first_part,
    observed,
    shipped_for,
    touch_up,
    touched_profile,
)
from llmsim.cost.profile import Deviation, ProfileCost, Spread, Within, read_profile, setup_name
from llmsim.hardware import model_names
from llmsim.recorded import load_files, load_name
from llmsim.recording import read_settings
from llmsim.scenario import Scenario as Settings
from llmsim.simulate import cost_of
from llmsim.uncertainty_sources import ROOFLINE
from llmsim.validate import named_in

UNITS_S = {"": 1.0, "s": 1.0, "min": 60.0}


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in click's newest releases
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|min)?", str(value))
        if found is None or float(found[1]) <= 0.0:
            self.fail(f"{value!r} is not a time above 0, as in 30s or 2min", param, ctx)
        return float(found[1]) * UNITS_S[found[2] or ""]


def one_load(folder: Path, name: str | None) -> tuple[Recording, Scenario]:
    """The load named, or the folder's only one."""
    loads = [load_name(file) for file in load_files(folder)]
    if folder.is_dir() and name is None and len(loads) != 1:
        held = f"its loads are {', '.join(loads)}: choose one with --scenario" if loads else "no load is in it"
        raise ValueError(f"{folder}: {held}. A touch-up needs NAME.requests.json.gz and NAME.steps.jsonl.gz")
    recording = read_recording(folder, [name or loads[0]] if folder.is_dir() else None)
    if len(recording.scenarios) != 1:
        raise ValueError(f"{folder}: {name} is {len(recording.scenarios)} batches. Touch up with a load")
    if recording.waits:
        raise ValueError(
            f"{folder / 'engine.json'}: async_scheduling=false: its steps hold waits, so their times are no "
            "kernel's and no launch's. Record the load with asynchronous scheduling"
        )
    return recording, recording.scenarios[0]


@click.command("touch-up")
@click.argument("folder", metavar="RECORDING", type=click.Path(path_type=Path))
@click.option("--scenario", help="Which load of the folder. Default: the only one.")
@click.option("--profile", help="Shipped, or the path of a .json file. Default: the shipped one of the recorded GPU.")
@click.option("--first", "first_s", type=Duration(), default="30s", show_default=True, help="Of the load.")
@click.option("--model", help="The recorded model, if another: the factors then hold the errors of scaling too.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile to write.")
def touch_up_command(
    folder: Path, scenario: str | None, profile: str | None, first_s: float, model: str | None, output: Path
) -> None:
    """Adapt a profile to one machine: two factors, GPU and host, from half a minute of recorded load."""
    check_output(output)
    recording, load = one_load(folder, scenario)
    profile = profile or shipped_for(recording)
    source = read_profile(profile)
    check_recorded(source, recording, model)
    cost = cost_for(recording, profile, model or source.model, source.gpu)
    found = touch_up(observed(first_part(load, first_s), cost), source)
    touched = touched_profile(source, found, recording, f"{source.name}@{output.stem}")
    write_profile(touched, output)
    click.echo(found.report())
    click.echo(f"{output}: profile {touched.name} ({touched.id})")


@click.command("spread")
@click.argument("profile")
@click.option(
    "--machine",
    "machines",
    multiple=True,
    help="Recording folders of one machine, comma separated. Repeatable. Default: those of this repository.",
)
@click.option(
    "--carried",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Recording folder of another model, precision or tensor-parallel size. Repeatable.",
)
@click.option("--record", is_flag=True, help="Write it into the profile file.")
def spread_command(profile: str, machines: tuple[str, ...], carried: tuple[Path, ...], record: bool) -> None:
    """How far machines, loads on one machine, and models it is carried to are from a profile: for touch-up, for
    intervals, and for reading errors."""
    if profile == "roofline":
        _spread_of_roofline(machines, carried, record)
        return
    path, source = Path(profile), read_profile(profile)
    if record and path.suffix != ".json":
        raise ValueError(f"profile={profile}: --record needs the path of the .json file to write into")
    groups = [tuple(map(Path, folders.split(","))) for folders in machines]
    check_once((str(folder), folder.resolve()) for folders in (*groups, carried) for folder in folders)
    if not groups:
        if source.name not in RECORDED or carried:
            known = ", ".join(RECORDED)
            raise ValueError(f"profile={profile}: no recordings here belong to it (to {known} they do). Give --machine")
        groups, carried = list(RECORDED[source.name].machines), RECORDED[source.name].carried
    setups = carried_loads(carried, profile)
    loads = [[load for folder in folders for load in own_loads(folder, profile)] for folders in groups]
    found = spread_of(loads, setups)
    click.echo(_table(found))
    if record:
        write_profile(msgspec.structs.replace(source, spread=found), path)


def _spread_of_roofline(machines: tuple[str, ...], carried: tuple[Path, ...], record: bool) -> None:
    if machines:
        raise ValueError(f"--machine {machines[0]}: the roofline was fitted to no machine. Give folders with --carried")
    found = roofline_spread(carried or placed())
    click.echo(_lines(found.models, {"sizes": found.sizes, "steps": found.steps}))
    if record:
        write(found)
        click.echo(str(ROOFLINE))


def own_loads(folder: Path, profile: str) -> list[Load]:
    """A recording of what the profile was fitted to."""
    source, recording = read_profile(profile), read_recording(folder)
    check_recorded(source, recording, None)
    return _observed(recording, cost_for(recording, profile, source.model, source.gpu))


def carried_loads(folders: Iterable[Path], profile: str) -> dict[str, list[Load]]:
    """Recordings of what it was not fitted to, by setup."""
    source = read_profile(profile)
    setups: dict[str, list[Load]] = {}
    for folder in folders:
        settings, engine, _ = read_settings(folder / "engine.json")
        model = named_in(str(folder), engine, "model", model_names())
        scenario = Settings.from_dict({"model": model, "gpu": source.gpu, "cost": profile} | settings).resolved()
        cost = cost_of(scenario)
        assert isinstance(cost, ProfileCost)
        if not cost.scaled:
            raise ValueError(f"{folder}: is of what profile {source.name} was fitted to. Give it with --machine")
        recording = read_recording(folder)
        check_recorded(source, recording, model)
        name = setup_name(model, scenario.weight_dtype, scenario.tensor_parallel)
        setups.setdefault(name, []).extend(_observed(recording, cost))
    return setups


def _observed(recording: Recording, cost: ProfileCost) -> list[Load]:
    """Its loads; grids of single batches are none, nor are those whose steps hold waits."""
    if recording.waits:
        return []
    loads = [load for load in recording.scenarios if not load.name.startswith(("grid_", "mix_"))]
    return [observed(load, cost) for load in loads]


def _table(found: Spread) -> str:
    within = {"sizes": found.sizes, "carried sizes": found.carried_sizes, "steps": found.steps}
    return _lines({"runs": found.runs, "machines": found.machines} | found.models, within)


def _lines(rows: Mapping[str, Deviation], inside: Mapping[str, Within | None]) -> str:
    width = max(len(name) for name in (*rows, *inside)) + 2
    lines = [f"{'relative sd':<{width}}" + "".join(f"{kind:>12}" for kind in KINDS) + f"{'of':>6}"]
    for name, deviation in rows.items():
        cells = "".join(f"{getattr(deviation, kind):>12.1%}" for kind in KINDS)
        lines.append(f"{name:<{width}}{cells}{deviation.count:>6}")
    for name, within in inside.items():
        if within is not None:
            lines.append(f"{name:<{width}}{within.decode:>12.1%}{within.chunk:>12.1%}{'-':>12}{within.count:>6}")
    return "\n".join(lines)
