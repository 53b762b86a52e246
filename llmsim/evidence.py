"""What a result rests on: profiles, how far they are from measurements and recordings, and where a run leaves them.

    profiles     of the shipped ones: id, GPU, engine, what was recorded and timed, when, and their errors
    points       measured and predicted seconds: kernels, each predicted by what was fitted without that point, and
                 engine steps, of loads the profile was fitted to and of others
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
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost.profile import Profile, measured_error, profile_names, reached, read_profile, without_graph
from llmsim.parquet import read_table
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
GRIDS = ("grid_", "mix_")  # names of batches of a grid, which were served one after the other
METRICS = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "E2EL": "e2el_ms", "tokens/s": "output_throughput"}
ALL = "all"
STATISTICS = ("mean", "p50", "p90", "p99")
CLIP = 0.5  # relative errors beyond this are counted at the ends of a histogram
BINS = 50


@cache
def _table(name: str, folder: Path = FOLDER) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table and the ids of the profiles it was made with."""
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the errors of the shipped profiles are not there. Make them with: {COMMAND}")
    table = read_table(file)
    return table.to_pandas(), json.loads(table.schema.metadata[META])


def points(profile: str, source: str) -> pd.DataFrame:
    """panel, kind, fitted, what, measured_s, predicted_s, and error; a sample where there are many."""
    frame, _ = _table("points")
    own = frame[(frame["profile"] == profile) & (frame["source"] == source)]
    return own.assign(error=own["predicted_s"] / own["measured_s"] - 1.0).reset_index(drop=True)


def errors(profile: str, source: str) -> pd.DataFrame:
    """label, panel, kind, fitted, load (of steps), points, median, p90, bias, worst, worst_what, over all there are."""
    frame, _ = _table("errors")
    own = frame[(frame["profile"] == profile) & (frame["source"] == source)].reset_index(drop=True)
    names = own[["load", "panel", "kind"]].itertuples(index=False)
    labels = [_load(*load.split("/")) if load else _operator(panel, kind) for load, panel, kind in names]
    return own.assign(label=labels)


def loads(profile: str) -> pd.DataFrame:
    """label, recording, load, model, requests, fitted, metric, statistic, predicted, measured (ms; tokens/s), error."""
    frame, _ = _table("loads")
    own = frame[frame["profile"] == profile].reset_index(drop=True)
    return own.assign(label=[_load(*names) for names in own[["recording", "load"]].values])


def _operator(panel: str, dtype: str) -> str:
    return panel if dtype == "bfloat16" else f"{panel}, {dtype}"


def _load(recording: str, load: str) -> str:
    """A load's name, and what its recording's name says beyond engine, GPU, model and the precision of weights."""
    more = "_".join(word for at, word in enumerate(recording.split("_")) if at > 3 or word.startswith("kv-"))
    return f"{load} ({more})" if more else load


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
    """low, high, share: of the points with each value of column `by`, by relative error; beyond `CLIP` at the ends."""
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
        own["kernels from"] = ", ".join(dict.fromkeys(re.sub(r"T[\d:+]+\)", ")", kernels.source).split(", ")))
        own["linear layers timed"] = {dtype: len(table.shapes) for dtype, table in kernels.linears.items()}
        own["attention shapes timed"] = len(kernels.decodes)
        own["all-reduce over GPUs"] = sorted(int(gpus) for gpus in kernels.all_reduce)
    return own


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


def loads_of(profile: str, metric: str, statistic: str, model: str = ALL) -> pd.DataFrame:
    """One number of every recorded load of a model; of tokens/s there is the mean alone. Held out loads come first."""
    own = loads(profile)
    name = "mean" if metric == "tokens/s" else statistic
    chosen = own[(own["metric"] == METRICS[metric]) & (own["statistic"] == name)].dropna(subset="error")
    if model != ALL:
        chosen = chosen[chosen["model"] == model]
    return chosen.sort_values(["fitted", "model", "label"], kind="stable").reset_index(drop=True)


def as_points(loads: pd.DataFrame) -> pd.DataFrame:
    """Loads for a plot: measured and predicted in s or tokens/s, what, and `rests`: held out, or fitted to."""
    rests = loads["fitted"].map({True: "fitted to", False: "held out"})
    base = loads["metric"].map(lambda name: 1e-3 if name.endswith("_ms") else 1.0)
    what = loads["label"] + ", " + loads["model"]
    return loads.assign(measured=base * loads["measured"], predicted=base * loads["predicted"], what=what, rests=rests)


def typical(profile: str) -> dict[str, float | None]:
    """Median size of errors on what the profile was not fitted to: steps by kind, and means of recorded loads."""
    own, served = errors(profile, STEPS), loads(profile)
    own, served = own[~own["fitted"]], served[~served["fitted"] & (served["statistic"] == "mean")]
    found = {kind: _middle(own.loc[own["kind"] == kind, "median"]) for kind in ("decodes only", "with prompts")}
    for name, metric in METRICS.items():
        found[name] = _middle(served.loc[served["metric"] == metric, "error"].abs())
    return found


def worst(profile: str) -> tuple[float, str] | None:
    """Of the means of TTFT, TPOT and E2EL of loads that the profile was not fitted to: the error furthest off, and in
    words of which load; None if there are none."""
    own = loads(profile)
    held = own[~own["fitted"] & (own["statistic"] == "mean") & own["metric"].isin(["ttft_ms", "tpot_ms", "e2el_ms"])]
    held = held.dropna(subset="error")
    if not len(held):
        return None
    row = held.iloc[int(held["error"].abs().to_numpy().argmax())]
    return float(
        row["error"]
    ), f"mean {str(row['metric']).removesuffix('_ms').upper()} of {row['label']}, {row['model']}"


def _middle(values: pd.Series[Any]) -> float | None:
    return float(values.median()) if len(values) else None
