"""python -m calibration fit RECORDING_DIR... -o PROFILE.json, or check PROFILE RECORDING_DIR..."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from calibration.check import check_profile, report, with_errors
from calibration.profiles import fit_profile, write_profile
from calibration.steps import read_recording
from llmsim.cost.profile import read_profile


@click.group()
def main() -> None:
    """Fit cost profiles to recordings of a real engine, and check them against others."""


@main.command()
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--scenarios", help="Only these, comma separated. Default: all in the folders.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile to write.")
@click.option("--name", help="Name of the profile. Default: the output's.")
@click.option("--gpu", required=True, help="As in: llmsim list gpus")
@click.option("--model", required=True, help="As in: llmsim list models, or a config.json")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--kv-dtype", default="auto", show_default=True)
def fit(
    recordings: tuple[Path, ...],
    scenarios: str | None,
    output: Path,
    name: str | None,
    gpu: str,
    model: str,
    dtype: str,
    kv_dtype: str,
) -> None:
    """Fit a profile to the step logs of one or more recordings."""
    wanted = scenarios.split(",") if scenarios else None
    read = [read_recording(path, wanted) for path in recordings]
    profile = fit_profile(read, name or output.stem, gpu, model, dtype, kv_dtype)
    write_profile(profile, output)
    click.echo(report(profile, check_profile(profile, read)))
    click.echo(f"{output}: profile {profile.name} ({profile.id})")


@main.command()
@click.argument("profile")
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--scenarios", help="Only these, comma separated. Default: all in the folders.")
@click.option(
    "--record", is_flag=True, help="Write the errors of scenarios it was not fitted to into the profile file."
)
def check(profile: str, recordings: tuple[Path, ...], scenarios: str | None, record: bool) -> None:
    """Step by step, how far a profile is from recordings: GPU seconds and launches."""
    wanted = scenarios.split(",") if scenarios else None
    loaded = read_profile(profile)
    checks = check_profile(loaded, [read_recording(path, wanted) for path in recordings])
    click.echo(report(loaded, checks))
    if record:
        path = Path(profile)
        if path.suffix != ".json":
            raise ValueError(f"profile={profile}: --record needs the path of the .json file to write into")
        write_profile(with_errors(loaded, checks), path)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
