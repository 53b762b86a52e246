"""What the shipped profiles rest on, as data beside them: `python -m benchmarks.evidence`, after a fit or recording.

Writes llmsim/data/evidence/, three small Parquet files that `llmsim.evidence` reads, so that the dashboard shows them
where there are neither raw measurements nor recordings:

    points    measured and predicted seconds of kernels (each predicted without that point, calibration.check_kernels)
              and of engine steps (calibration.check); of many a sample, drawn with one seed
    errors    of all of them, by operator or load: how many, median, 90th percentile, the worst
    loads     latencies and throughput of every recorded load, predicted (mean over `DRAWS` draws of launch noise) and
              measured, as `llmsim validate` compares them: the same draws, so the same numbers

Each row names its profile, and the files carry the ids of the profiles they were made with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.accuracy import ROOT, recordings
from calibration.check import KINDS, Check, check_profile, described, recorded_gpu
from calibration.check_kernels import Checked, check_kernels, split
from calibration.steps import read_recording
from llmsim.cost.profile import Profile, profile_names, read_profile
from llmsim.evidence import FOLDER, META, TABLES
from llmsim.recorded import load_files
from llmsim.recording import load_recording
from llmsim.validate import SEEDS, compare, predicted

if TYPE_CHECKING:
    from calibration.steps import Recording

MEASUREMENTS = ROOT / "calibration" / "measurements"
COMPLETE = "h200-sxm"  # whose norms, sampling and attention stand in where they were not timed
DRAWS = SEEDS  # those of `llmsim validate` and benchmarks.accuracy: one number for one recording
MOST_KERNELS, MOST_STEPS = 220, 50  # points kept of an operator, and of a load and kind of step
Rows = list[dict[str, Any]]


def kernels(profile: Profile, seed: int = 0) -> tuple[Rows, Rows]:
    """Points and errors of the profile's own kernels, from the files that it names."""
    if profile.kernels is None:
        return [], []
    files = [_measured(profile, name, digest) for name, digest in profile.kernels.measurements.items()]
    rest = None if profile.name == COMPLETE else read_profile(COMPLETE)
    checked = check_kernels(files, profile.gpu, rest)
    groups: dict[tuple[str, str], Rows] = {}
    for panel, kind, what, measured_s, predicted_s in _operators(checked):
        about = {"profile": profile.name, "source": "kernels", "panel": panel, "kind": kind, "fitted": False}
        row = about | {"what": what, "measured_s": measured_s, "predicted_s": predicted_s}
        groups.setdefault((panel, kind), []).append(row)
    return _kept(groups.values(), MOST_KERNELS, seed), [_error(group) for group in groups.values()]


def _operators(checked: Checked) -> Iterator[tuple[str, str, str, float, float]]:
    for operator, measured_s, predicted_s, what in checked.operators.points:
        yield (*split(operator), what, measured_s, predicted_s)
    for one in checked.passes:
        what = f"{one.row.model} {one.what}"
        yield f"{one.row.op}, sum of parts", str(one.row.dtype), what, one.row.median_s, one.predicted_s


def _measured(profile: Profile, name: str, digest: str) -> Path:
    path = MEASUREMENTS / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise click.UsageError(f"{path}: not the file that profile {profile.name} was fitted to. Fit it again")
    return path


def steps(profile: Profile, loaded: list[Recording], seed: int = 0) -> tuple[Rows, Rows]:
    """Points and errors of the recorded steps of the profile's GPU."""
    groups: list[Rows] = []
    errors: Rows = []
    for check in check_profile(profile, loaded):
        for kind, points, bias in zip(KINDS, check.points, (check.decode_bias, check.chunk_bias), strict=True):
            group = [_step(profile, check, kind, *seconds) for seconds in points.tolist()]
            if group:
                groups.append(group)
                errors.append(_error(group) | {"bias": bias})  # decodes with the stalls that no single step has
    return _kept(groups, MOST_STEPS, seed), errors


def _step(profile: Profile, check: Check, kind: str, measured_s: float, predicted_s: float) -> dict[str, Any]:
    return {
        "profile": profile.name, "source": "steps", "panel": check.model, "kind": kind, "fitted": check.fitted,
        "what": f"{check.recording}/{check.scenario}", "measured_s": measured_s, "predicted_s": predicted_s,
    }  # fmt: skip


def _kept(groups: Any, most: int, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    kept: Rows = []
    for group in groups:
        chosen = sorted(generator.choice(len(group), min(most, len(group)), replace=False))
        kept += [group[i] for i in chosen]
    return kept


def _error(group: Rows) -> dict[str, Any]:
    errors = np.array([row["predicted_s"] / row["measured_s"] - 1.0 for row in group])
    worst = int(np.abs(errors).argmax())
    bias = sum(row["predicted_s"] for row in group) / sum(row["measured_s"] for row in group) - 1.0
    about = {name: group[0][name] for name in ("profile", "source", "panel", "kind", "fitted")}
    median, p90 = np.quantile(np.abs(errors), (0.5, 0.9))
    load = group[0]["what"] if about["source"] == "steps" else ""
    return about | {
        "load": load, "points": len(group), "median": median, "p90": p90, "bias": bias,
        "worst": errors[worst], "worst_what": group[worst]["what"] if not load else "",
    }  # fmt: skip


def loads(profile: Profile, loaded: list[Recording], draws: int, jobs: int = 1) -> Rows:
    """Every recorded load of the profile's GPU but grids of batches, which `steps` covers; `jobs` files at a time."""
    files = [(one, file) for one in loaded for file in load_files(one.path)]
    work = [(profile.name, one.path.name, one.engine, file, draws) for one, file in files]
    if jobs == 1:
        return [row for one in work for row in _loads_of(one)]
    with ProcessPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(_loads_of, work) for row in rows]


def _loads_of(work: tuple[str, str, dict[str, Any], Path, int]) -> Rows:
    """Those of one file."""
    name, recording, engine, file, draws = work
    fitted = hashlib.sha256(file.read_bytes()).hexdigest() in read_profile(name).provenance.recordings.values()
    rows: Rows = []
    for scenario in load_recording(file):
        replays = [predicted(scenario, cost=name, seed=seed) for seed in range(draws)]
        settings = replays[0].scenario
        about = {
            "profile": name, "recording": recording, "load": scenario.name,
            "engine": engine.get("engine", ""), "recorded": engine.get("recorded", ""),
            "model": described(settings.model, settings.weight_dtype, settings.tensor_parallel),
            "requests": len(scenario.trace), "fitted": fitted,
        }  # fmt: skip
        for metric, statistics in compare(replays, scenario).items():
            rows += [about | {"metric": metric, "statistic": one} | told for one, told in statistics.items()]
    return rows


def made(names: list[str], draws: int = DRAWS, jobs: int = 1) -> dict[str, pd.DataFrame]:
    """The three tables of these profiles."""
    tables: dict[str, Rows] = {name: [] for name in TABLES}
    for name in names:
        profile = read_profile(name)
        loaded = [read_recording(path) for path in recordings()]
        loaded = [recording for recording in loaded if recorded_gpu(recording) == profile.gpu]
        for points, errors in (kernels(profile), steps(profile, loaded)):
            tables["points"] += points
            tables["errors"] += errors
        tables["loads"] += loads(profile, loaded, draws, jobs)
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def write(folder: Path, tables: dict[str, pd.DataFrame], ids: dict[str, str]) -> None:
    """Floats to single precision: points of a plot."""
    folder.mkdir(exist_ok=True)
    for name, frame in tables.items():
        small = frame.astype(dict.fromkeys(frame.select_dtypes("float64"), "float32"))
        table = pa.Table.from_pandas(small, preserve_index=False)
        table = table.replace_schema_metadata({META: json.dumps(ids)})
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", compression_level=19)


@click.command()
@click.option("--draws", default=DRAWS, show_default=True, help="Draws of launch noise of each recorded load.")
def main(draws: int) -> None:
    """Write llmsim/data/evidence/ for the shipped profiles."""
    names = profile_names()
    write(FOLDER, made(names, draws, len(os.sched_getaffinity(0))), {name: read_profile(name).id for name in names})
    for table in TABLES:
        file = FOLDER / f"{table}.parquet"
        click.echo(f"{file.relative_to(ROOT)}: {pq.read_metadata(file).num_rows:,} rows, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
