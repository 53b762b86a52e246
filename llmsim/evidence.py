"""What a result rests on: profiles, how far they are from measurements and recordings, and where a run leaves them.

    profiles     of the shipped ones: id, GPU, engine, what was recorded and timed, when, and their errors
    points       measured and predicted seconds: kernels, each predicted by what was fitted without that point, and engine
                 steps, of loads the profile was fitted to and of others
    errors       of all of them by operator or load: median, 90th percentile, the worst
    loads        latencies and throughput of recorded loads, predicted and measured
    extent       the largest iterations that the fit has seen beside those of a run, and the share of the run's GPU time
                 beyond each of them

points, errors and loads are files of the package (llmsim/data/evidence), made from the measurements and recordings of
the repository by `COMMAND`. They carry the ids of the profiles they were made with: `stale` says where the shipped
profile is another one. All errors are predicted / measured - 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost.profile import Profile, measured_error, profile_names, reached, read_profile, without_graph
from llmsim.utilisation import busy_seconds, extrapolated

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.cost import CostModel
    from llmsim.scenario import Scenario

FOLDER = Path(__file__).parent / "data" / "evidence"
META = b"llmsim.profiles"
TABLES = ("points", "errors", "loads")
COMMAND = "python -m benchmarks.evidence"
STEPS, KERNELS = "steps", "kernels"
RANGES = {  # of Measured: in words
    "tokens": "tokens of an iteration",
    "seqs": "decodes of an iteration",
    "kv_tokens": "cached tokens that its decodes read",
    "context_tokens": "context before the chunks of its prompts (tokens)",
}
NO_GRAPH = "decodes without a full CUDA graph"
TOGETHER = "any of these"
CLIP = 0.5  # relative errors beyond this are counted at the ends of a histogram
BINS = 50


@cache
def _table(name: str, folder: Path = FOLDER) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table and the ids of the profiles it was made with."""
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the errors of the shipped profiles are not there. Make them with: {COMMAND}")
    table = import_module("pyarrow.parquet").read_table(file)
    return table.to_pandas(), json.loads(table.schema.metadata[META])


def points(profile: str, source: str) -> pd.DataFrame:
    """panel, kind, fitted, what, measured_s, predicted_s, and error; a sample where there are many."""
    frame, _ = _table("points")
    own = frame[(frame["profile"] == profile) & (frame["source"] == source)]
    return own.assign(error=own["predicted_s"] / own["measured_s"] - 1.0).reset_index(drop=True)


def errors(profile: str, source: str) -> pd.DataFrame:
    """panel, kind, fitted, load (of steps), points, median, p90, bias, worst, worst_what, over all points there are."""
    frame, _ = _table("errors")
    return frame[(frame["profile"] == profile) & (frame["source"] == source)].reset_index(drop=True)


def loads(profile: str) -> pd.DataFrame:
    """recording, load, model, requests, fitted, metric, statistic, predicted, measured (ms; tokens/s), error."""
    frame, _ = _table("loads")
    return frame[frame["profile"] == profile].reset_index(drop=True)


def stale(profile: str) -> str | None:
    """In words, where the tables were made with another profile than the one shipped now."""
    _, made_with = _table("errors")
    now, then = read_profile(profile).id, made_with.get(profile)
    if now == then:
        return None
    return (
        f"The errors shown are of {profile} {then or '(none)'}, the profile in use is {now}. In a checkout, make them "
        f"again with: {COMMAND}"
    )


def histogram(shown: pd.DataFrame, by: str) -> pd.DataFrame:
    """Shares of points by relative error, for each value of the column `by`: low, high, share. Beyond `CLIP`: at the ends."""
    import pandas as pd

    edges = np.linspace(-CLIP, CLIP, BINS + 1)
    rows = []
    for value, own in shown.groupby(by, sort=False):
        counts, _ = np.histogram(np.clip(own["error"], -CLIP, CLIP), edges)
        rows += [(value, *row) for row in zip(edges[:-1], edges[1:], counts / len(own), strict=True)]
    return pd.DataFrame(rows, columns=[by, "low", "high", "share"])


def profiles() -> pd.DataFrame:
    """A row for each shipped profile: what it is of, what it rests on, how far off it is."""
    import pandas as pd

    return pd.DataFrame([facts(read_profile(name)) for name in profile_names()])


def facts(profile: Profile) -> dict[str, Any]:
    """One profile in words and numbers, JSON-ready."""
    origin, kernels = profile.provenance, profile.kernels
    own: dict[str, Any] = {
        "profile": profile.name,
        "id": profile.id,
        "gpu": profile.gpu,
        "fitted on": f"{profile.model}, {profile.dtype}, {profile.tensor_parallel} GPU",
        "engine": origin.engine,
        "recorded on": origin.gpu,
        "recorded": origin.recorded,
        "recordings": len({file.partition("/")[0] for file in origin.recordings}),
        "loads fitted": len([name for name in origin.scenarios if not name.startswith(GRIDS)]),
        "error": measured_error(profile).removeprefix(", "),
    }
    if kernels is not None:
        own["kernels from"] = kernels.source
        own["linear layers timed"] = {dtype: len(table.shapes) for dtype, table in kernels.linears.items()}
        own["attention shapes timed"] = len(kernels.decodes)
        own["all-reduce over GPUs"] = sorted(int(gpus) for gpus in kernels.all_reduce)
    return own


GRIDS = ("grid_", "mix_")  # batches of a grid that were served one after the other


def spread(profile: Profile) -> pd.DataFrame:
    """Relative standard deviations of recordings about the profile, of loads and of machines; empty if unknown."""
    import pandas as pd

    columns = ["between", "decode steps", "steps with prompts", "launches", "rests on"]
    if profile.spread is None:
        return pd.DataFrame(columns=columns)
    rows = [
        (name, one.gpu_decode, one.gpu_chunk, one.host, f"{one.count} {of}")
        for name, one, of in (
            ("loads of one machine", profile.spread.runs, "loads"),
            ("machines, beyond that", profile.spread.machines, "machines"),
        )
    ]
    return pd.DataFrame(rows, columns=columns)


def extent(iterations: Mapping[str, NDArray[Any]], cost: CostModel, scenario: Scenario) -> pd.DataFrame:
    """range, measured, run (the largest of each), share (of the run's GPU time beyond); the last row is all together.

    The shares overlap. Without asynchronous scheduling all of it is outside, as in a summary's `extrapolated`.
    """
    import pandas as pd

    profile = profile_of(cost)
    busy_s = busy_seconds(dict(iterations))
    whole_s = float(busy_s.sum()) or 1.0
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    for name, values in reached(iterations).items():
        most = getattr(profile.measured, name)
        largest = float(values.max()) if len(values) else None
        rows.append((RANGES[name], float(most), largest, float(busy_s[values > most].sum()) / whole_s))
    rows.append((NO_GRAPH, None, None, float(busy_s[without_graph(iterations)].sum()) / whole_s))
    rows.append((TOGETHER, None, None, extrapolated(dict(iterations), cost, busy_s, scenario.async_scheduling)))
    return pd.DataFrame(rows, columns=["range", "measured", "run", "share"])


def profile_of(cost: CostModel) -> Profile:
    profile = getattr(cost, "profile", None)
    if profile is None:
        raise ValueError(
            f"cost model {cost.kind}: it was not measured, so nothing is inside a measured range: {cost.label}"
        )
    assert isinstance(profile, Profile)
    return profile


def extent_in_words(table: pd.DataFrame) -> str:
    """Which ranges a run leaves, and for how much of its GPU time."""
    *parts, together = table.to_dict("records")
    beyond = [f"{row['range']} ({100 * row['share']:.1f} %)" for row in parts if row["share"]]
    share = together["share"] or 0.0
    if not share:
        return "All GPU time of the run is inside the measured range."
    told = f", by {'; '.join(beyond)}" if beyond else ": it is not scheduled asynchronously, as all recordings are"
    return f"{100 * share:.1f} % of the run's GPU time is outside the measured range{told}."


def errors_in_words(table: pd.DataFrame) -> str:
    """A chart of errors for who cannot see it: the best and the worst median."""
    ordered = table.sort_values("median")
    best, worst = ordered.iloc[0], ordered.iloc[-1]
    name = "load" if table["load"].any() else "panel"
    return (
        f"Median error of {len(table)} groups: from {best['median']:.1%} ({best[name]}, {best['kind']}) to "
        f"{worst['median']:.1%} ({worst[name]}, {worst['kind']})"
    )


def checkout() -> str | None:
    """In words, where the raw measurements are if this is no checkout of the repository; else None."""
    if (Path(__file__).parent.parent / "calibration" / "measurements" / "README.md").is_file():
        return None
    return (
        "The raw measurements and recordings are not installed with llmsim: they are in calibration/measurements, "
        "calibration/recordings and tests/data/recordings of its repository."
    )
