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
@click.option("--trace", metavar="FILE", help="Its trace, where it is not at its place any more or was streamed.")
@json_option
def rerun(run: Path, trace: str | None, as_json: bool) -> None:
    """Repeat RUN, a folder that 'llmsim replay' wrote, from its manifest, and compare the bytes of its files.

    Exit status 0: the same; 1: something differs, or it cannot be repeated, and what has changed is said.

    \b
    llmsim rerun runs/2026-01-31T12-00-00_0a1b2c
    """
    from llmsim.rerun import rerun as repeat

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
