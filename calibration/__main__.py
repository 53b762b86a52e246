"""python -m calibration fit RECORDING_DIR... -o PROFILE.json, or check PROFILE RECORDING_DIR..."""

from __future__ import annotations

from pathlib import Path

import click

from calibration.alternatives import alternatives_command
from calibration.check import check_profile, draw, report, with_errors
from calibration.check_kernels_command import check_kernels_command
from calibration.console import run
from calibration.fit_command import fit_command
from calibration.imports.command import import_
from calibration.measure.command import measure
from calibration.profiles import write_profile
from calibration.record.command import engine_command, record_command, trace_command
from calibration.steps import read_recording
from calibration.touch_up_command import spread_command, touch_up_command
from llmsim.charts import check_plot
from llmsim.cost.profile import read_profile


@click.group()
def main() -> None:
    """Fit cost profiles to recordings of a real engine, and check them against others."""


@main.command()
@click.argument("profile")
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--scenarios", help="Only these, comma separated. Default: all in the folders.")
@click.option("--model", help="Of recordings whose engine.json names no known one.")
@click.option("--plot", type=click.Path(path_type=Path), help="Recorded against expected: .html, .svg or .png.")
@click.option(
    "--record", is_flag=True, help="Write the errors of scenarios it was not fitted to into the profile file."
)
def check(
    profile: str,
    recordings: tuple[Path, ...],
    scenarios: str | None,
    model: str | None,
    plot: Path | None,
    record: bool,
) -> None:
    """Step by step, how far a profile is from recordings: GPU seconds and launches.

    Recordings of another model, dtype or tensor-parallel size are judged by the profile scaled to that.
    """
    if plot is not None:
        check_plot(plot)
    wanted = scenarios.split(",") if scenarios else None
    loaded = read_profile(profile)
    checks = check_profile(loaded, [read_recording(path, wanted) for path in recordings], model)
    click.echo(report(loaded, checks))
    if plot is not None:
        draw(loaded, checks, plot)
        click.echo(str(plot))
    if record:
        path = Path(profile)
        if path.suffix != ".json":
            raise ValueError(f"profile={profile}: --record needs the path of the .json file to write into")
        write_profile(with_errors(loaded, checks), path)


main.add_command(import_)
main.add_command(alternatives_command)
main.add_command(measure)
main.add_command(touch_up_command)
main.add_command(spread_command)
main.add_command(record_command)
main.add_command(engine_command)
main.add_command(trace_command)
main.add_command(fit_command)
main.add_command(check_kernels_command)


if __name__ == "__main__":
    run(main)
