"""`python -m calibration fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calibration.console import check_once
from llmsim.hardware import find_gpu, find_model, gpu_names, model_names
from llmsim.validate import named_in


def check_named(path: Path, engine: dict[str, Any], gpu: str, model: str) -> None:
    """That what a recording says it is of is not another GPU or model than is to be fitted."""
    for field, known, wanted in (
        ("gpu", gpu_names(), find_gpu(gpu).name),
        ("model", model_names(), find_model(model).name),
    ):
        try:
            said = named_in(str(path), engine, field, known)
        except ValueError:  # names none, as a config.json of one's own
            continue
        if said != wanted:
            raise ValueError(f"{path}: {field}={engine[field]!r} is {said}, not {wanted}. Fit it as what it is")


@click.command("fit")
@click.argument("recordings", nargs=-1)
@click.option("--scenarios", help="Only these, comma separated. Default: all in the folders; or FOLDER:NAME,NAME.")
@click.option("--kernels", multiple=True, type=click.Path(path_type=Path), help="Measurements (Parquet). Repeatable.")
@click.option("--rest-from", metavar="PROFILE", help="Whose kernels stand in for those not measured (norms, sampling).")
@click.option("--host-from", metavar="PROFILE", help="Without recordings: whose engine and host clock to take.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile to write.")
@click.option("--name", help="Name of the profile. Default: the output's.")
@click.option("--gpu", required=True, help="As in: llmsim list gpus")
@click.option("--model", help="The recordings' model, as in: llmsim list models, or a config.json")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--kv-dtype", default="auto", show_default=True)
def fit_command(
    recordings: tuple[str, ...],
    scenarios: str | None,
    kernels: tuple[Path, ...],
    rest_from: str | None,
    host_from: str | None,
    output: Path,
    name: str | None,
    gpu: str,
    model: str | None,
    dtype: str,
    kv_dtype: str,
) -> None:
    """Fit a profile to recordings of an engine, to measured kernels, or to both.

    Recordings alone: other models follow by data-sheet shapes. With --kernels: by their own kernels. Kernels alone need
    --host-from, a profile of another GPU whose engine and host stand in.
    """
    from calibration.check import check_profile, report
    from calibration.kernel_profiles import read_kernels, without_engine
    from calibration.profiles import check_output, fit_profile, write_profile
    from calibration.steps import read_recording
    from llmsim.cost.profile import read_profile

    if not recordings and not (kernels and host_from):
        raise click.UsageError("give recordings, or --kernels with --host-from")
    if recordings and (host_from or model is None):
        raise click.UsageError("recordings need --model, and have a host clock of their own: leave --host-from out")
    check_output(output)
    rest = read_profile(rest_from or host_from) if rest_from or host_from else None
    compiled = read_kernels(kernels, gpu, rest) if kernels else None
    if host_from is not None and compiled is not None:
        profile = without_engine(compiled, read_profile(host_from), name or output.stem, gpu)
        write_profile(profile, output)
    else:
        assert model is not None
        read = []
        for recording in recordings:
            folder, _, names = recording.partition(":")
            wanted = names or scenarios
            read.append(read_recording(Path(folder), wanted.split(",") if wanted else None))
            check_named(read[-1].path / "engine.json", read[-1].engine, gpu, model)
        check_once((f"{one.path}:{load}", (one.path.resolve(), load)) for one in read for load in one.loads)
        profile = fit_profile(read, name or output.stem, gpu, model, dtype, kv_dtype, compiled)
        write_profile(profile, output)
        click.echo(report(profile, check_profile(profile, read)))
    click.echo(f"{output}: profile {profile.name} ({profile.id})")
