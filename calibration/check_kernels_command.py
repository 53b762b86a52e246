"""`python -m calibration check-kernels`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("check-kernels")
@click.argument("measurements", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--gpu", required=True, help="As in: llmsim list gpus")
@click.option("--rest-from", metavar="PROFILE", help="Whose kernels stand in for those not measured (norms, sampling).")
@click.option("--plot", type=click.Path(path_type=Path), help="Measured against predicted: .html, .svg or .png.")
@click.option("--worst", default=3, show_default=True, type=click.IntRange(min=1), help="Cases shown of each operator.")
def check_kernels_command(
    measurements: tuple[Path, ...], gpu: str, rest_from: str | None, plot: Path | None, worst: int
) -> None:
    """How far each operator's prediction is from points it was not fitted to, and whether the parts add up.

    \b
    python -m calibration check-kernels calibration/measurements/h200-sxm*.parquet --gpu h200-sxm --plot parity.html
    """
    from calibration.check_kernels import check_kernels, draw, report
    from llmsim.charts import check_plot
    from llmsim.cost.profile import read_profile

    if plot is not None:
        check_plot(plot)
    checked = check_kernels(measurements, gpu, read_profile(rest_from) if rest_from else None)
    click.echo(report(checked, worst))
    if plot is not None:
        draw(checked, plot)
        click.echo(str(plot))
