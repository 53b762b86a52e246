"""How far the real engine differs from itself: `python -m benchmarks.repeats [--update docs/accuracy.md]`.

The same requests were sent at the same times to the same engine on several machines. What clients saw of them differs;
the relative standard deviation of that is the spread of the real engine. A prediction further off than 3 % (99th
percentiles 6 %) and than `TIMES` that spread is off by more than chance and the machine. Loads sent once take the
spread of all repeated ones. Engines that launch every iteration from the host differ by a third and more, which would
excuse anything: their loads are shown, and not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.accuracy import METRICS as ALL_METRICS
from benchmarks.accuracy import STATISTICS, Load, judged, recordings, update
from llmsim.recorded import RecordedScenario, load_files
from llmsim.recording import load_recording
from llmsim.validate import measured_metrics

START, END = "<!-- repeats -->", "<!-- /repeats -->"
METRICS = {metric: ALL_METRICS[metric] for metric in ("ttft_ms", "tpot_ms", "e2el_ms")}
BOUNDS = {"mean": 0.03, "p50": 0.03, "p90": 0.03, "p99": 0.06}
TIMES = 1.5
SAME_S = 0.05  # arrivals that differ by less in the median are the same: now and then a client is late
ENGINE = ("tensor_parallel", "quantization", "kv_cache_dtype", "cudagraph", "async_scheduling")

Spread = dict[tuple[str, str], float]  # (metric, statistic) -> relative standard deviation


class Repeated(NamedTuple):
    name: str
    machines: int
    eager: bool
    spread: Spread


def repeated(folders: Iterable[Path]) -> list[Repeated]:
    """The loads that two or more recordings of one model and engine hold."""
    groups: dict[Any, list[tuple[Path, RecordedScenario]]] = defaultdict(list)
    for folder in folders:
        for file in load_files(folder):
            (scenario,) = load_recording(file)
            trace = scenario.trace
            sizes = trace.prompt_tokens.tobytes() + trace.output_tokens.tobytes()
            of = tuple(str(scenario.settings.get(name)) for name in ENGINE)
            groups[tuple(folder.name.split("_")[1:3]), scenario.name, scenario.concurrency, of, sizes].append(
                (folder, scenario)
            )
    found = []
    for ((_, model), name, _, _, _), group in groups.items():
        first = group[0][1].trace.arrival_s
        same = [one for _, one in group if np.median(np.abs(one.trace.arrival_s - first)) < SAME_S]
        if len(same) > 1:
            eager = is_eager(group[0][0])
            seen = [measured_metrics(scenario) for scenario in same]
            spread = {
                (metric, statistic): relative_sd([one[metric][statistic] for one in seen])
                for metric in METRICS
                for statistic in STATISTICS
            }
            dtype = " in fp8" if "_fp8" in group[0][0].name else ""
            found.append(Repeated(f"{model}{dtype}{', no graphs' if eager else ''}: {name}", len(same), eager, spread))
    return found


def is_eager(folder: Path) -> bool:
    return folder.name.endswith("_eager")


def relative_sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values))


def pooled(groups: Sequence[Repeated]) -> Spread:
    """Each group counts by its degrees of freedom."""
    free = np.array([group.machines - 1 for group in groups], float)
    return {
        key: float(np.sqrt(np.sum(free * np.array([group.spread[key] for group in groups]) ** 2) / free.sum()))
        for key in groups[0].spread
    }


def bound(statistic: str, spread: float) -> float:
    return max(BOUNDS[statistic], TIMES * spread)


def within(loads: Sequence[Load], groups: Sequence[Repeated]) -> dict[tuple[bool, str], list[bool]]:
    """(whether carried to another model, precision or number of GPUs, metric) -> of each number whether it is within
    its bound. Grids, loads that were fitted and engines without CUDA graphs do not count."""
    spread = pooled([group for group in groups if not group.eager])
    held: dict[tuple[bool, str], list[bool]] = defaultdict(list)
    for load in loads:
        if load.fitted or load.grid or is_eager(Path(load.folder)):
            continue
        for metric in METRICS:
            for statistic, error in load.errors[metric].items():
                if error == error:
                    most = bound(statistic, spread[metric, statistic])
                    held[load.carried, metric].append(abs(error) <= most)
    return held


def report(loads: Sequence[Load], groups: Sequence[Repeated]) -> str:
    lines = [f"| load | machines | {' | '.join(METRICS.values())} |", "|---|---:|" + "---|" * len(METRICS)]
    rows = [(group.name, str(group.machines), group.spread) for group in groups]
    rows.append(("**all with CUDA graphs**", "", pooled([group for group in groups if not group.eager])))
    for name, machines, spread in rows:
        cells = [" / ".join(f"{100 * spread[metric, name]:.1f}" for name in STATISTICS) for metric in METRICS]
        lines.append(f"| {name} | {machines} | {' | '.join(cells)} |")
    held = within(loads, groups)
    lines.append("")
    for carried, words in ((False, "the models the profiles were fitted to"), (True, "those it was carried to")):
        each = [f"{METRICS[metric]} {sum(held[carried, metric])} of {len(held[carried, metric])}" for metric in METRICS]
        every = [inside for metric in METRICS for inside in held[carried, metric]]
        told = f"* Within 3 % (p99 6 %) or {TIMES} times that, of {words}:"
        lines.append(f"{told} {', '.join(each)}; together {np.mean(every):.0%}.")
    return "\n".join(lines)


@click.command()
@click.option("--update", "page", type=click.Path(path_type=Path, exists=True), help="Write the table into this file.")
def main(page: Path | None) -> None:
    """Relative standard deviations in per cent, mean / p50 / p90 / p99."""
    folders = recordings()
    loads = [load for folder in folders for load in judged(folder, "auto", 1.0)]
    text = report(loads, repeated(folders))
    if page is not None:
        update(page, text, (START, END))
    click.echo(text)


if __name__ == "__main__":
    main()
