"""`llmsim rerun`: repeat a run from its manifest and compare bytes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmsim.cli import DIFFERS
from llmsim.cli_options import CONTEXT, json_option
from llmsim.cli_replay import Progress


@click.command(context_settings=CONTEXT)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--run", "number", type=click.IntRange(min=0), metavar="N", help="Of a sweep's folder: its run N.")
@click.option("--trace", metavar="FILE", help="Its trace, where it is not at its place any more or was streamed.")
@json_option
def rerun(run: Path, number: int | None, trace: str | None, as_json: bool) -> None:
    """Repeat RUN, a folder that 'llmsim replay' wrote, from its manifest, and compare the bytes of its files; or one
    run of a folder that 'llmsim sweep' wrote, and compare its numbers.

    Exit status 0: the same; 1: something differs, or it cannot be repeated, and what has changed is said.

    \b
    llmsim rerun runs/2026-01-31T12-00-00_0a1b2c
    llmsim rerun sweeps/chunks --run 7
    """
    from llmsim.rerun import rerun as repeat

    is_sweep = (run / "_sweep.json").is_file()
    if is_sweep != (number is not None):
        raise ValueError(
            f"{run}: the folder of a sweep: add --run N" if is_sweep else f"--run {number}: {run} is no sweep"
        )
    if number is not None:
        from llmsim.sweep_again import again

        if trace is not None:
            raise ValueError(f"--trace {trace}: a sweep's traces are where its specification has them: leave it out")
        found = again(run, number)
    else:
        progress = Progress()
        try:
            found = repeat(run, trace=trace, progress=progress)
        finally:
            progress.close()
    if as_json:
        facts = {"repeated": found.repeated, "equal": found.equal, "same": found.same, "different": found.different}
        click.echo(json.dumps({"folder": str(run), **facts, "reasons": found.reasons}))
    else:
        click.echo(found.in_words())
    if not found.equal:
        click.get_current_context().exit(DIFFERS)
