"""The accepted errors of predictions, kept in tests/data/accuracy.json: a change that makes one worse is seen by CI.

Every load of every recording in the repository is replayed as `llmsim validate` does it, with fewer draws of the launch
noise: as few as keep the noise of each error below a third of its tolerance, `LEAST` to `MOST`. Where `MOST` draws are
not enough the tolerance is three times the noise. The batches of a grid count together, by the median size of errors.

    tolerance   how much the size of an error may grow: mean and throughput 1, p50 and p90 2 percentage points
    accepted    signed errors, (predicted - measured) / measured, the draws they rest on and their standard errors

`python -m benchmarks.accuracy --accept` writes the file anew: after a change for the better, and after one for the
worse that is worth it, with the reason in the commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import msgspec

from llmsim.recorded import GRID, RecordedScenario, load_name, replayed_files
from llmsim.recording import load_recording
from llmsim.validate import LABELS, compare, replays

ACCEPTED = Path(__file__).resolve().parent.parent / "tests" / "data" / "accuracy.json"
COMMAND = "python -m benchmarks.accuracy --accept"
METRICS = ("ttft_ms", "tpot_ms", "e2el_ms", "output_throughput")
TOLERANCE = {"mean": 0.01, "p50": 0.02, "p90": 0.02}
NOISE_SHARE = 3  # tolerances are at least so many standard errors
LEAST, MOST, MOST_OF_GRID = 4, 32, 8

Errors = dict[str, dict[str, float]]  # metric -> statistic -> signed error, or of a grid the median size


class Accepted(msgspec.Struct, forbid_unknown_fields=True):
    seeds: int
    errors: Errors
    noise: Errors


def loads(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every load of a recording."""
    for file in replayed_files(folder):
        yield f"{folder.name}/{load_name(file)}", file


def errors(file: Path, seeds: Sequence[int], cost: str = "auto") -> Errors:
    """Those that there are: of answers of one token there is no TPOT."""
    outcomes = [_outcome(scenario, seeds, cost) for scenario in load_recording(file)]
    found: Errors = {}
    for metric in METRICS:
        for statistic in (name for name in TOLERANCE if name in outcomes[0][metric]):
            signed = [outcome[metric][statistic]["error"] for outcome in outcomes]
            kept = [abs(error) if load_name(file) == GRID else error for error in signed if error is not None]
            if kept:
                found.setdefault(metric, {})[statistic] = median(kept)
    return found


def _outcome(scenario: RecordedScenario, seeds: Sequence[int], cost: str) -> dict[str, Any]:
    return compare(replays(scenario, seeds, cost=cost), scenario)


def accept(file: Path) -> Accepted:
    """The errors as they are, with the draws they need."""
    most = MOST_OF_GRID if load_name(file) == GRID else MOST
    single = [errors(file, [seed]) for seed in range(most)]
    spread = {m: {name: stdev(one[m][name] for one in single) for name in single[0][m]} for m in single[0]}
    needed = max((NOISE_SHARE * sd / TOLERANCE[name]) ** 2 for held in spread.values() for name, sd in held.items())
    seeds = min(max(math.ceil(needed), LEAST), most)
    noise = {m: {name: round(sd / math.sqrt(seeds), 5) for name, sd in held.items()} for m, held in spread.items()}
    found = errors(file, range(seeds))
    return Accepted(seeds, {m: {name: round(e, 5) for name, e in held.items()} for m, held in found.items()}, noise)


def read() -> dict[str, Accepted]:
    return msgspec.json.decode(ACCEPTED.read_bytes(), type=dict[str, Accepted])


def write(folders: Sequence[Path]) -> None:
    found = {name: accept(file) for folder in folders for name, file in loads(folder)}
    ACCEPTED.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def changes(name: str, file: Path, accepted: dict[str, Accepted], cost: str = "auto") -> tuple[list[str], list[str]]:
    """What became worse than accepted, and better, by more than the tolerance: a line each."""
    if name not in accepted:
        return [f"{name}: no accepted errors. Take its own with: {COMMAND}"], []
    held = accepted[name]
    now = errors(file, range(held.seeds), cost)
    worse, better = [], []
    for metric, statistics in held.errors.items():
        for statistic, old in statistics.items():
            new = now[metric][statistic]
            tolerance = max(TOLERANCE[statistic], NOISE_SHARE * held.noise[metric][statistic])
            line = f"{name}: {statistic} {LABELS[metric]} error was {old:+.1%}, is {new:+.1%}"
            if not abs(new) <= abs(old) + tolerance:
                worse.append(f"{line}, more than {100 * tolerance:.1f} points worse. Accept it with: {COMMAND}")
            elif abs(new) < abs(old) - tolerance:
                better.append(f"{line}: better. Hold on to it with: {COMMAND}")
    return worse, better
