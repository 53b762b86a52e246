"""The highest rate that an engine holds: recorded against predicted by `llmsim.plan.capacity`.

    python -m benchmarks.capacity [--jobs 2] [--update] [RECORDING ...]

A recording does not say at which rate an engine breaks a promise, but it says which promise it just kept: sent at R
requests/s, its TPOT p95 was so many milliseconds, so R is the highest rate at which *these* requests, at these
distances in time, keep TPOT p95 at that. `capacity` is asked for just that: the same requests, the promise as recorded;
it rescales the arrivals until the simulated engine just keeps it. Its answer over R is the error of the capacity, with
nothing interpolated and no arrivals but those that were sent.

Judged are all open loops of which the recorded engine kept up. One that fell behind holds no promise at that rate,
which is to be said of it too: both are judged by `llmsim.rates.stability`, the recorded one with the time to the first
token in place of the wait, which a client does not see. A promise about the p99 of TTFT says little where nothing
queues: TTFT is then the prompt's own time at any rate, and a few milliseconds of it are half of the rate. So the table
has, beside the mean error of all draws of the launch noise, the lowest and the highest of them.

Second, the rate at which p99 TTFT crosses a limit, where Poisson arrivals of one shape were recorded on both sides of
it (`poisson_PROMPT_OUTPUT_qRATE`): on the line through the two rates around it, in log seconds over the rate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import mean, median

import click
import numpy as np

from benchmarks.accuracy import CARRIED, ROOT, recordings, update
from llmsim.plan import Slo, capacity
from llmsim.rates import stability
from llmsim.recorded import RecordedScenario, load_files, load_name
from llmsim.recording import load_recording
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import mean_rate_per_s
from llmsim.validate import compare, predicted, scenario_of

PAGE, MARKS = ROOT / "docs" / "accuracy.md", ("<!-- capacity -->", "<!-- /capacity -->")
PROMISES = (("tpot", "p95"), ("ttft", "p99"))
SEEDS = range(4)  # of the launch noise: the mean of so many answers
TOLERANCE = 0.005  # of a rate
CROSSING_SEEDS = range(16)
LOAD = re.compile(r"(poisson_\d+_\d+)_q([\d.]+)")


@dataclass(frozen=True)
class Answer:
    """Of one promise: its limit, and the rates at which capacity() says it is just kept, one a draw; 0: at none."""

    limit_s: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """One recorded load: the rate sent, whether the profile is carried to it from another model, whether the engine and
    the simulation kept up, the answers by promise."""

    folder: str
    load: str
    rate: float
    carried: bool
    stable: bool | None
    predicted_stable: bool | None
    answers: dict[str, Answer]

    def errors(self, promise: str) -> list[float]:
        return [rate / self.rate - 1.0 for rate in self.answers[promise].rates]


def open_loops(folder: Path) -> list[RecordedScenario]:
    """Loads with a rate: nothing that waits for an answer, arrives at once, or was cut short."""
    loads = [one for file in load_files(folder) for one in load_recording(file)]
    sent_alone = [one for one in loads if one.concurrency is None and np.isfinite(one.trace.arrival_s).all()]
    return [one for one in sent_alone if np.ptp(one.trace.arrival_s) > 1.0 and np.isfinite(one.e2el_s).all()]


def promised(recorded: RecordedScenario, promises: Sequence[tuple[str, str]]) -> dict[str, Slo]:
    """What the recorded engine just kept."""
    several = recorded.trace.output_tokens > 1
    tpot_s = (recorded.e2el_s - recorded.ttft_s)[several] / (recorded.trace.output_tokens[several] - 1)
    values = {"ttft": recorded.ttft_s, "tpot": tpot_s}
    return {
        f"{metric}_{word}": Slo(metric, word, float(np.percentile(values[metric], float(word[1:]))))
        for metric, word in promises
    }


def judge(
    recorded: RecordedScenario,
    folder: str,
    *,
    promises: Sequence[tuple[str, str]] = PROMISES,
    seeds: Sequence[int] = SEEDS,
    cost: str = "auto",
) -> Judged:
    trace, scenario = recorded.trace, scenario_of(recorded, cost=cost)
    seen = {
        "arrival_s": trace.arrival_s,
        "scheduled_s": trace.arrival_s + recorded.ttft_s,
        "finish_s": trace.arrival_s + recorded.e2el_s,
    }
    stable = stability(seen, None)[0]
    answers = {}
    if stable is not False:
        for name, slo in promised(recorded, promises).items():
            rates = [_highest(recorded, replace(scenario, seed=seed), slo) for seed in seeds]
            if None not in rates:
                answers[name] = Answer(slo.limit_s, tuple(rate for rate in rates if rate is not None))
    simulated = simulate(trace, scenario).summary()
    carried = CARRIED in simulated["calibration"]["label"]
    return Judged(folder, recorded.name, mean_rate_per_s(trace), carried, stable, simulated["stable"], answers)


def _highest(recorded: RecordedScenario, scenario: Scenario, slo: Slo) -> float | None:
    """0: not even the lowest; None: the trace does not tell."""
    found = capacity(recorded.trace, scenario, [slo], tolerance=TOLERANCE)
    return None if found.untold else found.rate or 0.0


def judge_folder(folder: Path) -> list[Judged]:
    return [judge(one, folder.name) for one in open_loops(folder)]


def judge_all(folders: Sequence[Path], jobs: int) -> list[Judged]:
    with ProcessPoolExecutor(jobs) as pool:
        return [one for found in pool.map(judge_folder, folders) for one in found]


def table(loads: Sequence[Judged]) -> str:
    """Markdown: a row a load, then what they come to."""
    heads = [f"{metric.upper()} {word}" for metric, word in PROMISES]
    lines = [
        f"| recording | load | rate sent | {' | '.join(f'{head} promised | capacity' for head in heads)} |",
        "|---|---|---:|" + "---:|" * (2 * len(heads)),
    ]
    for one in loads:
        cells = [_cells(one, f"{metric}_{word}") for metric, word in PROMISES]
        if one.stable is False:
            cells = ["falls behind", "falls behind" if one.predicted_stable is False else "keeps up", "", ""]
        lines.append(f"| `{one.folder}` | {one.load} | {one.rate:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_summed(loads)])


def _cells(one: Judged, promise: str) -> str:
    if promise not in one.answers:
        return "- | the trace does not tell"
    errors = one.errors(promise)
    limit_ms = 1e3 * one.answers[promise].limit_s
    return f"{limit_ms:.4g} ms | {mean(errors):+.1%} ({min(errors):+.1%} to {max(errors):+.1%})"


def _summed(loads: Sequence[Judged]) -> list[str]:
    lines = []
    groups = (("of the models the profiles were fitted to", False), ("carried to others by kernels", True))
    for metric, word in PROMISES:
        said = []
        for name, carried in groups:
            promise = f"{metric}_{word}"
            kept = [one for one in loads if promise in one.answers and one.carried == carried]
            errors = [abs(mean(one.errors(promise))) for one in kept]
            if errors:
                within = sum(error <= 0.03 for error in errors)
                said.append(f"{name} median |error| {median(errors):.1%}, {within} of {len(errors)} loads within 3 %")
        lines.append(f"* Capacity under a promise of {metric.upper()} {word}: {'; '.join(said)}.")
    told = [one for one in loads if one.stable is not None and one.predicted_stable is not None]
    same = sum(one.stable == one.predicted_stable for one in told)
    return [*lines, f"* Whether the engine kept up with the rate is said rightly of {same} of {len(told)} loads."]


# ---- where p99 TTFT crosses a limit ---------------------------------------------------------------------------------


def crossing(p99_s: dict[float, float], limit_s: float) -> float | None:
    """Rate at which `p99_s` (by rate) passes the limit for the first time; None if it does not, or always does."""
    rates = sorted(p99_s)
    for low, high in pairwise(rates):
        if p99_s[low] <= limit_s < p99_s[high]:
            share = (log(limit_s) - log(p99_s[low])) / (log(p99_s[high]) - log(p99_s[low]))
            return low + share * (high - low)
    return None


def p99_s(file: Path) -> tuple[float, float]:
    """(recorded, predicted) p99 of TTFT; predicted: the mean over draws of the launch noise, of the same arrivals."""
    (scenario,) = load_recording(file)
    row = compare([predicted(scenario, seed=seed) for seed in CROSSING_SEEDS], scenario)["ttft_ms"]["p99"]
    return row["measured"] / 1e3, row["predicted"] / 1e3


def crossings(folders: Sequence[Path], limit_s: float) -> list[str]:
    lines = []
    for folder in folders:
        files: dict[str, dict[float, Path]] = defaultdict(dict)
        for file in load_files(folder):
            if named := LOAD.fullmatch(load_name(file)):
                files[named[1]][float(named[2])] = file
        for load, by_rate in sorted(files.items()):
            if len(by_rate) < 2:
                continue
            both = {rate: p99_s(file) for rate, file in sorted(by_rate.items())}
            recorded, simulated = (crossing({rate: pair[i] for rate, pair in both.items()}, limit_s) for i in range(2))
            if recorded is None or simulated is None:
                continue
            lines.append(
                f"* `{folder.name}` {load}: p99 TTFT crosses {limit_s:g} s at {recorded:.2f} requests/s recorded,"
                f" {simulated:.2f} predicted ({simulated / recorded - 1:+.1%})."
            )
    return lines


def report(folders: Sequence[Path], limit_s: float = 1.0, jobs: int = 1) -> str:
    return "\n".join([table(judge_all(folders, jobs)), *crossings(folders, limit_s)])


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--limit", "limit_s", default=1.0, show_default=True, help="Seconds, of the crossing.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--update", "into_page", is_flag=True, help="Put it into docs/accuracy.md.")
def main(folders: tuple[Path, ...], limit_s: float, jobs: int, into_page: bool) -> None:
    text = report(folders or recordings(), limit_s, jobs)
    click.echo(text)
    if into_page:
        update(PAGE, text, MARKS)


if __name__ == "__main__":
    main()
