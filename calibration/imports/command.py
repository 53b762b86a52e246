"""`python -m calibration import`: measurement rows that others have published."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

import llmsim


@click.group("import")
def import_() -> None:
    """Write measurement rows out of other projects' published tables."""


@import_.command()
@click.option("--system", help="As --list shows, such as b200_sxm.")
@click.option("--backend", default="vllm", show_default=True, help="The engine whose kernels were timed.")
@click.option("--version", "version_name", help="The engine's. Default: the newest.")
@click.option("--out", type=click.Path(path_type=Path), help="The Parquet file to write.")
@click.option("--list", "only_list", is_flag=True, help="Systems, backends and versions there are.")
def aiconfigurator(
    system: str | None, backend: str, version_name: str | None, out: Path | None, only_list: bool
) -> None:
    """Rows of NVIDIA's aiconfigurator-core: linear layers, attention and communication of GPUs nobody here has.

    \b
    python -m calibration import aiconfigurator --list
    python -m calibration import aiconfigurator --system b200_sxm --out b200.parquet
    """
    from calibration.imports.aiconfigurator import PACKAGE, SYSTEMS, VERSION, available, read_tables, systems_folder
    from calibration.measure.rows import write_parquet

    folder = systems_folder()
    if only_list:
        for name, backends in available(folder).items():
            versions = "; ".join(f"{kind} {', '.join(there)}" for kind, there in backends.items())
            click.echo(f"{name:<20} {SYSTEMS[name]:<14} {versions}")
        return
    if system is None or out is None:
        raise click.UsageError("give --system and --out, or --list")
    imported = read_tables(folder, system, backend, version_name)
    click.echo(f"{'table':<60} {'read':>8} {'kept':>8}   left out")
    told = []
    for count in imported.counts:
        why = ", ".join(f"{number:,} {reason}" for reason, number in count.left_out.items())
        click.echo(f"{count.table:<60} {count.read:>8,} {count.kept:>8,}   {why}")
        told.append(f"{count.table}: {count.kept} of {count.read} rows{f'; left out: {why}' if why else ''}")
    for note in imported.notes:
        click.echo(f"note: {note}")
    write_parquet(
        out,
        imported.rows,
        {
            "gpu": imported.gpu,
            "device": imported.device,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "llmsim": llmsim.__version__,
            "package": f"{PACKAGE} {VERSION}",
            "argv": sys.argv[1:],
            "notes": [*imported.notes, *told],
        },
    )
    click.echo(f"{out}: {len(imported.rows):,} rows of {imported.device} ({imported.gpu})")
