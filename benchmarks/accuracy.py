"""How close llmsim comes to recorded engines: `python -m benchmarks.accuracy [RECORDING ...] [--update FILE]`.

`--accept` instead writes the errors that CI holds predictions to (benchmarks.accepted).

Every recorded load is replayed as `llmsim validate` does it, and the signed errors are printed as a Markdown table, the
loads that the profile was fitted to apart from those it never saw. Which is which is not a list kept here: a profile
names the SHA-256 of each file it was fitted to. Without RECORDING: all recordings of this repository.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks import accepted
from calibration.console import run
from llmsim.recorded import GRID, load_name, replayed_files
from llmsim.recording import load_recording
from llmsim.validate import PERCENTS, SEEDS, compare, replays

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "tests" / "data" / "recordings", ROOT / "calibration" / "recordings")
METRICS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "E2EL", "output_throughput": "tok/s"}
STATISTICS = ("mean", *(f"p{percent}" for percent in PERCENTS))
START, END = "<!-- accuracy -->", "<!-- /accuracy -->"
CARRIED = ", scaled from "  # in the label of a profile that is used for another model than it was fitted to


@dataclass(frozen=True)
class Load:
    """One recorded load and its errors; the batches of a grid together, each error the median of their sizes."""

    folder: str
    name: str
    requests: int
    fitted: bool
    cost: str
    errors: dict[str, dict[str, float]]  # metric -> statistic -> (predicted - measured) / measured

    @property
    def grid(self) -> bool:
        return self.name.startswith(GRID)

    @property
    def carried(self) -> bool:
        """To another model, precision or number of GPUs than the profile was fitted to."""
        return CARRIED in self.cost


def recordings() -> list[Path]:
    return [path.parent for folder in FOLDERS for path in sorted(folder.glob("*/engine.json"))]


def judged(folder: Path, cost: str, host_scale: float) -> Iterator[Load]:
    """The loads of one recording folder, replayed."""
    files = replayed_files(folder)
    if not files:
        raise click.UsageError(f"{folder}: no NAME.requests.json.gz in it. Give a recording folder.")
    for file in files:
        scenarios = load_recording(file)
        outcomes = []
        for scenario in scenarios:
            draws = replays(scenario, range(SEEDS), cost=cost, host_scale=host_scale)
            outcomes.append(compare(draws, scenario))
        model = draws[0].cost
        profile = getattr(model, "profile", None)
        seen = [] if profile is None else profile.provenance.recordings.values()
        fitted = hashlib.sha256(file.read_bytes()).hexdigest() in seen
        grid = load_name(file) == GRID
        name = f"{GRID} ({len(scenarios)} batches)" if grid else scenarios[0].name
        requests = sum(len(scenario.trace) for scenario in scenarios)
        yield Load(folder.name, name, requests, fitted, model.label, _errors(outcomes, sizes=grid))


def _errors(outcomes: Sequence[dict[str, Any]], *, sizes: bool) -> dict[str, dict[str, float]]:
    errors: dict[str, dict[str, float]] = {}
    for metric, statistics in outcomes[0].items():
        for statistic in statistics:
            found = [outcome[metric][statistic]["error"] for outcome in outcomes]
            kept = [abs(error) if sizes else error for error in found if error is not None]
            errors.setdefault(metric, {})[statistic] = median(kept) if kept else float("nan")
    return errors


def table(loads: Sequence[Load]) -> str:
    """Markdown: a table for each recording, unseen loads first."""
    lines: list[str] = []
    for folder in dict.fromkeys(load.folder for load in loads):
        own = [load for load in loads if load.folder == folder]
        lines += [f"`{folder}`, {own[0].cost}", ""]
        lines += [f"| load | requests | {' | '.join(METRICS.values())} |", "|---|---:|" + "---|" * len(METRICS)]
        for fitted, words in ((False, ""), (True, " *(fitted)*")):
            lines += [
                f"| {load.name}{words} | {load.requests} | {' | '.join(cells(load, metric) for metric in METRICS)} |"
                for load in own
                if load.fitted is fitted
            ]
        lines.append("")
    return "\n".join(lines)


def cells(load: Load, metric: str) -> str:
    statistics = load.errors[metric]
    sign = "" if load.grid else "+"
    errors = [100 * statistics[name] for name in STATISTICS if name in statistics]
    return " / ".join("-" if error != error else f"{error:{sign}z.1f}" for error in errors)


def update(file: Path, text: str, markers: tuple[str, str] = (START, END)) -> None:
    """Put the table between the markers of a Markdown file."""
    page, (start, end) = file.read_text(encoding="utf-8"), markers
    if page.count(start) != 1 or page.count(end) != 1:
        raise click.UsageError(f"{file}: needs one {start} and one {end}. Put them where the table belongs.")
    before, _, rest = page.partition(start)
    file.write_text(f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


@click.command()
@click.argument("folders", metavar="[RECORDING]...", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--cost", default="auto", show_default=True, help="Cost model, as for llmsim replay.")
@click.option("--host-scale", default=1.0, show_default=True, help="2: a host half as fast as the measured one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
@click.option("--update", "page", type=click.Path(path_type=Path, exists=True), help="Write the table into this file.")
@click.option("--accept", is_flag=True, help="Write the errors of all recordings to tests/data/accuracy.json.")
def main(
    folders: tuple[Path, ...], cost: str, host_scale: float, as_json: bool, page: Path | None, accept: bool
) -> None:
    """Errors in per cent, mean / p50 / p90 / p99: + is predicted too long, for tok/s too many."""
    if accept:
        if folders or cost != "auto" or host_scale != 1.0 or as_json or page is not None:
            raise click.UsageError("--accept is of all recordings with the shipped profiles: give nothing else")
        accepted.write(recordings())
        return
    try:
        loads = [load for folder in folders or recordings() for load in judged(folder.resolve(), cost, host_scale)]
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    if page is not None:
        update(page, table(loads))
    click.echo(json.dumps([asdict(load) for load in loads]) if as_json else table(loads))


if __name__ == "__main__":
    run(main)
