"""`llmsim sweep`: every run of a specification, into one Parquet data set."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli import INTERRUPTED
from llmsim.cli_options import CONTEXT, json_option
from llmsim.progress import StatusLine

if TYPE_CHECKING:
    from llmsim.sweep_spec import Spec

SWEEPS = "sweeps"
ALL_FAILED = 1
ENDING = (".yaml", ".yml")


@click.command(context_settings=CONTEXT)
@click.argument("spec_path", metavar="SPEC")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the results. [sweeps/SPEC]")
@click.option("--dry-run", is_flag=True, help="List the runs and about how long they take; do none.")
@click.option("--resume", is_flag=True, help="Go on where an earlier sweep into the folder stopped.")
@click.option("--shard", metavar="I/N", help="The I-th of N parts of the work; all may write to one folder.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time. [1; with Ray: the cluster's CPUs]")
@click.option("--executor", metavar="NAME", default="local", help="local or ray. [local]")
@json_option
def sweep(
    spec_path: str,
    out: Path | None,
    dry_run: bool,
    resume: bool,
    shard: str | None,
    jobs: int | None,
    executor: str,
    as_json: bool,
) -> None:
    """Do every run that SPEC (a YAML file) lists: grids, linked values, scenarios, traces, rates, seeds.

    \b
    llmsim sweep chunks.yaml --dry-run
    llmsim sweep chunks.yaml --jobs 4
    llmsim sweep chunks.yaml --shard 1/2 --executor ray
    """
    from llmsim.sweep import shard_of, sweep
    from llmsim.sweep_yaml import read_spec

    spec = read_spec(spec_path)
    folder = Path(SWEEPS) / _stem(spec_path) if out is None else out
    part = shard_of(shard)
    if dry_run:
        _outline(spec, folder, part, jobs or 1, as_json)
        return
    line = Line()
    try:
        with redirect_stdout(sys.stderr):  # Ray says there which of its processes died, and policies may print
            found = sweep(spec, out=folder, jobs=jobs, executor=executor, shard=part, resume=resume, progress=line)
    except KeyboardInterrupt:
        line.close()
        click.echo(f"interrupted: what was done is in {folder}; --resume goes on", err=True)
        click.get_current_context().exit(INTERRUPTED)
    finally:
        line.close()
    if as_json:
        facts = {"folder": str(folder), "runs": found.runs, "done": found.done, "failed": found.failed}
        click.echo(json.dumps(facts | {"columns": list(found.columns)}))
    else:
        from llmsim.sweep_report import report

        click.echo(report(found))
        failed = f", {found.failed} of them with an error" if found.failed else ""
        click.echo(f"{found.done} of {found.runs} runs done{failed}. Results: {folder}")
    if found.done and found.failed == found.done:
        click.get_current_context().exit(ALL_FAILED)


def _stem(spec_path: str) -> str:
    path = Path(spec_path)
    return path.stem if path.suffix in ENDING else path.name


def _outline(spec: Spec, folder: Path, part: tuple[int, int] | None, jobs: int, as_json: bool) -> None:
    from llmsim.sweep_outline import estimate, outline
    from llmsim.sweep_report import listing

    counted = {"runs": 0, "todo": 0, "impossible": 0}

    def counting() -> Any:
        for one in outline(spec, folder, part):
            counted["runs"] += 1
            counted["impossible"] += one.error is not None
            counted["todo"] += not one.done
            yield one

    if as_json:
        runs = [{"run": one.run, "done": one.done, "error": one.error} | _named(spec, one.labels) for one in counting()]
        timed = estimate(spec)
        click.echo(json.dumps(counted | {"list": runs, "seconds_per_run": timed.seconds_per_run}))
        return
    for line in listing(counting(), spec.columns):
        click.echo(line)
    states = [f"{counted['runs'] - counted['todo']} done"] if counted["todo"] < counted["runs"] else []
    states += [f"{counted['impossible']} impossible"] if counted["impossible"] else []
    stated = f" ({', '.join(states)})" if states else ""
    click.echo(f"{counted['runs']} runs{stated}; {_about(spec, counted, jobs)}")


def _about(spec: Spec, counted: dict[str, int], jobs: int) -> str:
    from llmsim.sweep_outline import estimate
    from llmsim.sweep_report import about

    return about(estimate(spec), counted["todo"], jobs) if counted["todo"] else "nothing is left to do"


def _named(spec: Spec, labels: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(spec.columns, labels, strict=True))


class Line(StatusLine):
    """Runs done and time left."""

    def __call__(self, done: int, total: int, left_s: float | None) -> None:
        if done < total:
            self.say(lambda _: f"{done} of {total} runs done{_left(left_s)}")


def _left(seconds: float | None) -> str:
    from llmsim.sweep_report import duration

    return "" if seconds is None else f", about {duration(seconds)} left"
