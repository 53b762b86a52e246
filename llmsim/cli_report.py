"""`llmsim report`: run folders as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmsim.cli_options import CONTEXT

if TYPE_CHECKING:
    from llmsim.runs import Run


@click.command(context_settings=CONTEXT)
@click.argument("folders", metavar="RUN…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The .html to write.")
@click.option(
    "--label", "labels", multiple=True, metavar="NAME", help="What to call a run, in their order. Repeatable."
)
@click.option("--title", metavar="TEXT", help="Heading of the page. [the trace's name]")
def report(folders: tuple[Path, ...], out: Path, labels: tuple[str, ...], title: str | None) -> None:
    """Write RUN folders as one page that needs no network: numbers, charts, settings; several are overlaid.

    \b
    llmsim report runs/a -o report.html
    llmsim report runs/a runs/b --label "one GPU" --label "two GPUs" -o report.html
    """
    from llmsim.charts import check_plot
    from llmsim.html_report import write_report

    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out}: a report is a page: give a name that ends in .html")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}: make it first")
    check_plot(out.with_suffix(".html"))
    write_report(named_runs(folders, labels), out, title)
    click.echo(f"Written: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def named_runs(folders: tuple[Path, ...], labels: tuple[str, ...] = ()) -> dict[str, Run]:
    """The runs by name: the labels, or the folders' own names, with their parents' where those are alike."""
    from llmsim.runs import read_run

    if labels and len(labels) != len(folders):
        raise ValueError(f"{len(labels)} --label for {len(folders)} runs: give one for each, in their order, or none")
    own = [folder.resolve().name for folder in folders]
    names = list(labels) or (own if len(set(own)) == len(own) else [str(folder) for folder in folders])
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice: leave one out, or tell them apart by --label")
    return {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
