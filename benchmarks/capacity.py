"""The request rate at which the 99th percentile of TTFT crosses a limit: recorded against predicted.

    python -m benchmarks.capacity [--limit 1s] [RECORDING ...]

A recording counts if it has Poisson loads of one shape (`poisson_PROMPT_OUTPUT_qRATE`) at rates on both sides of the
limit. The crossing is read off the line through the two rates around it, in log seconds over the rate; predicted p99
are means over draws of the launch noise, of the same arrivals. `llmsim.plan.capacity` would answer another question: it
rescales one recording's arrivals, and half a minute of a Poisson process, rescaled, crosses anywhere from 28 to 36/s.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from math import log
from pathlib import Path

import click

from benchmarks.accuracy import recordings
from llmsim.recording import load_recording
from llmsim.validate import compare, predicted

SEEDS = range(16)
LOAD = re.compile(r"(poisson_\d+_\d+)_q([\d.]+)\.requests\.json\.gz")


def crossing(p99_s: dict[float, float], limit_s: float) -> float | None:
    """Rate at which `p99_s` (by rate) passes the limit for the first time; None if it does not, or always does."""
    rates = sorted(p99_s)
    for low, high in pairwise(rates):
        if p99_s[low] <= limit_s < p99_s[high]:
            share = (log(limit_s) - log(p99_s[low])) / (log(p99_s[high]) - log(p99_s[low]))
            return low + share * (high - low)
    return None


def p99_s(file: Path) -> tuple[float, float]:
    """(recorded, predicted) p99 of TTFT."""
    (scenario,) = load_recording(file)
    row = compare([predicted(scenario, seed=seed) for seed in SEEDS], scenario)["ttft_ms"]["p99"]
    return row["measured"] / 1e3, row["predicted"] / 1e3


def report(folders: list[Path], limit_s: float) -> list[str]:
    lines = []
    for folder in folders:
        files: dict[str, dict[float, Path]] = defaultdict(dict)
        for file in folder.glob("*.requests.json.gz"):
            if named := LOAD.fullmatch(file.name):
                files[named[1]][float(named[2])] = file
        for load, by_rate in sorted(files.items()):
            if len(by_rate) < 2:
                continue
            both = {rate: p99_s(file) for rate, file in sorted(by_rate.items())}
            recorded, simulated = (crossing({rate: pair[i] for rate, pair in both.items()}, limit_s) for i in range(2))
            if recorded is None or simulated is None:
                continue
            lines.append(
                f"{folder.name} {load}: p99 TTFT crosses {limit_s:g} s at {recorded:.2f} requests/s recorded,"
                f" {simulated:.2f} predicted ({simulated / recorded - 1:+.1%})"
            )
    return lines


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--limit", "limit_s", default=1.0, show_default=True, help="Seconds.")
def main(folders: tuple[Path, ...], limit_s: float) -> None:
    lines = report(list(folders) or recordings(), limit_s)
    click.echo("\n".join(lines) or "no recording has a load at rates on both sides of the limit")


if __name__ == "__main__":
    main()
