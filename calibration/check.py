"""How far a profile is from recordings, step by step: GPU seconds by kind of step, and launches by mode.

Only steps whose end is seen count (calibration.observe); where CUDA events timed a load, only those they timed, for the
launch set the pace of the others. A recording of another model, dtype or tensor-parallel size than the profile was
fitted to is judged by the profile scaled to it; its engine.json says which that is. A launch ratio away from 1 says how
fast that host was at that hour: it is the `host_scale` to simulate it with. Steps of an engine that schedules
synchronously are not judged one by one, for they hold the wait for their own results; `llmsim validate` judges them by
what clients saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.fit import gpu_seconds, walk
from calibration.fit_host import spread
from calibration.observe import Seen
from calibration.steps import Recording
from llmsim.cost import EAGER, FULL, PIECEWISE
from llmsim.cost.load import CostSettings
from llmsim.cost.profile import Profile, ProfileCost
from llmsim.hardware import find_gpu, find_model, gpu_names, model_names
from llmsim.recorded import GRID, PACKED
from llmsim.scenario import Scenario as Settings
from llmsim.validate import named_in

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

FEWEST = 8  # steps that make a median
MOST_POINTS = 5_000  # of a plot
KINDS = ("decodes only", "with prompts")


@dataclass(frozen=True)
class Check:
    recording: str
    model: str  # with dtype and tensor-parallel size where they are not the usual ones
    scenario: str
    fitted: bool  # whether the profile was fitted to it
    decode_steps: int
    decode_median: float  # median absolute relative error of GPU seconds
    decode_p90: float
    decode_bias: float  # relative error of their sum, the profile's less the recorded
    chunk_steps: int
    chunk_median: float
    chunk_p90: float
    chunk_bias: float
    launches: int
    launch_ratio: float  # recorded over the profile's, of piecewise and eager launches
    points: tuple[Floats, Floats] = field(repr=False, compare=False)  # decodes, chunks: recorded and expected seconds


def recorded_gpu(recording: Recording) -> str | None:
    """None where it names no GPU that llmsim has facts of."""
    try:
        return named_in(str(recording.path), recording.engine, "gpu", gpu_names())
    except ValueError:
        return None


def was_fitted(profile: Profile, recording: Recording, scenario: str) -> bool:
    """By the hash of its file. What has no files was made in memory, for the fit."""
    if not recording.files:
        return scenario in profile.provenance.scenarios
    names = [f"{name}{packed}" for name in (f"{scenario}.steps.jsonl", f"{GRID}.json") for packed in PACKED]
    digest = next((recording.files[name] for name in names if name in recording.files), None)
    return scenario in profile.provenance.scenarios and digest in profile.provenance.recordings.values()


def cost_of_recorded(profile: Profile, recording: Recording, model: str | None = None) -> tuple[ProfileCost, str]:
    """The profile as it predicts the recorded engine, and what that runs."""
    engine, graphs = recording.engine, recording.graphs
    if any(was_fitted(profile, recording, scenario.name) for scenario in recording.scenarios):
        name, dtype, kv_dtype, tensor_parallel = profile.model, profile.dtype, profile.kv_dtype, profile.tensor_parallel
    else:
        said = recorded_gpu(recording)
        if said not in (None, profile.gpu):
            raise ValueError(f"{recording.path}: recorded on {said}, profile {profile.name} is of {profile.gpu}")
        name = model or named_in(str(recording.path), engine, "model", model_names())
        stated = Settings(
            model=name,
            gpu=profile.gpu,
            dtype=engine.get("dtype") or "auto",
            quantization=engine.get("quantization"),
            kv_cache_dtype=engine.get("kv_dtype") or "auto",
        )
        dtype, kv_dtype = stated.weight_dtype, stated.kv_dtype
        tensor_parallel = engine.get("tensor_parallel_size") or 1
    # asynchronous=False: launches as they were fitted, where the GPU paced the steps; those it did not are left out
    settings = CostSettings(tensor_parallel, dtype, kv_dtype, graphs, asynchronous=False)
    cost = ProfileCost(profile, find_model(name), find_gpu(profile.gpu), settings)
    return cost, described(name, dtype, tensor_parallel)


def described(model: str, dtype: str, tensor_parallel: int) -> str:
    found = find_model(model)
    stored = found.weight_format(dtype)
    words = [found.name, stored if stored != "bfloat16" else "", f"TP {tensor_parallel}" if tensor_parallel > 1 else ""]
    return " ".join(word for word in words if word)


def check_profile(profile: Profile, recordings: Sequence[Recording], model: str | None = None) -> list[Check]:
    """`model`: of recordings that do not name theirs."""
    checks = []
    for recording in recordings:
        cost, told = cost_of_recorded(profile, recording, model)
        groups: dict[str, list[Seen]] = {}
        for name, row in walk(recording.scenarios, cost.clock, cost.host, recording.graphs):
            # the batches of a grid are one scenario's worth of steps
            groups.setdefault("grid" if name.startswith("grid_") else name, []).append(row)
        fitted = {scenario.name for scenario in recording.scenarios if was_fitted(profile, recording, scenario.name)}
        if any(name.startswith("grid_") for name in fitted):
            fitted.add("grid")
        bursts = {scenario.name for scenario in recording.scenarios if not spread(scenario)} | {"grid"}
        for name, rows in groups.items():
            about = (recording.path.name, told, name, name in fitted)
            checks.append(_check(cost, about, [] if recording.waits else rows, name in bursts))
    return checks


def _check(cost: ProfileCost, about: tuple[str, str, str, bool], rows: Sequence[Seen], burst: bool) -> Check:
    clock, host = cost.clock, cost.host
    stalled = 1.0 + cost.profile.host_clock.stall_share
    seen = [row for row in rows if row.step.gpu_s == row.step.gpu_s]
    seen = seen or [row for row in rows if row.gpu_s == row.gpu_s and row.gpu_s > 0.0]
    decodes, chunks = (
        np.array([(row.gpu_s, gpu_seconds(clock, host, row.step)) for row in chosen]).reshape(-1, 2)
        for chosen in (
            [row for row in seen if row.mode == FULL and row.steady],
            [row for row in seen if row.step.chunks],
        )
    )
    launches = [row for row in rows if row.mode in (PIECEWISE, EAGER) and row.launched_s == row.launched_s]
    recorded_s = sum(row.launched_s - row.launch_s for row in launches)
    expected_s = sum(
        host.launch_s[row.mode] + host.launch_per_chunk_s[row.mode] * len(row.step.chunks) for row in launches
    )
    return Check(
        *about,
        decode_steps=len(decodes),
        decode_median=_error(decodes, 0.5),
        decode_p90=_error(decodes, 0.9),
        decode_bias=_bias(decodes, stalled),
        chunk_steps=len(chunks),
        chunk_median=_error(chunks, 0.5),
        chunk_p90=_error(chunks, 0.9),
        chunk_bias=_bias(chunks),
        launches=len(launches),
        # in a burst the client and the engine's receiving thread compete with the launches
        launch_ratio=recorded_s / expected_s if len(launches) >= FEWEST and not burst else nan,
        points=(decodes, chunks),
    )


def _error(points: Floats, share: float) -> float:
    return float(np.quantile(np.abs(points[:, 1] / points[:, 0] - 1.0), share)) if len(points) >= FEWEST else nan


def _bias(points: Floats, stalled: float = 1.0) -> float:
    return float(stalled * points[:, 1].sum() / points[:, 0].sum() - 1.0) if len(points) >= FEWEST else nan


def with_errors(profile: Profile, checks: Sequence[Check]) -> Profile:
    """The profile with its errors noted: over all fitted scenarios, and by name for the others of the same model.

    Where recordings of two machines share a scenario's name, the worse one counts.
    """
    error = dict(profile.error)
    model = described(profile.model, profile.dtype, profile.tensor_parallel)
    own = [check for check in checks if check.model == model]
    for kind in ("decode", "chunk"):
        medians = [(check, getattr(check, f"{kind}_median")) for check in own if getattr(check, f"{kind}_median") > 0.0]
        fitted = [(getattr(check, f"{kind}_steps"), median) for check, median in medians if check.fitted]
        if fitted:
            count, median = np.array(fitted, float).T
            error[f"fit_{kind}_step_median"] = float(f"{np.sum(count * median) / np.sum(count):.4g}")
        others: dict[str, float] = {}
        for check, median in medians:
            if not check.fitted:
                others[check.scenario] = max(median, others.get(check.scenario, 0.0))
        error |= {f"{name}_{kind}_step_median": float(f"{median:.4g}") for name, median in others.items()}
    return msgspec.structs.replace(profile, error=error)


def report(profile: Profile, checks: Sequence[Check]) -> str:
    kinds = "".join(f"{name:>8}{'median':>8}{'p90':>8}{'bias':>8}" for name in ("decodes", "chunks"))
    lines = [
        f"{profile.name}: relative error of GPU seconds, and recorded over expected launches",
        f"{'scenario':<24}{'':8}{kinds}{'launches':>10}{'ratio':>8}",
    ]
    before = None
    for check in checks:
        if before != (check.recording, check.model):
            before = check.recording, check.model
            lines.append(f"{check.recording}: {check.model}")
        kind = "fitted" if check.fitted else "held out"
        lines.append(
            f"{check.scenario:<24}{kind:8}{check.decode_steps:>8}{_percent(check.decode_median)}"
            f"{_percent(check.decode_p90)}{_percent(check.decode_bias)}{check.chunk_steps:>8}"
            f"{_percent(check.chunk_median)}{_percent(check.chunk_p90)}{_percent(check.chunk_bias)}"
            f"{check.launches:>10}{_ratio(check.launch_ratio)}"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:>8.1%}" if share == share else f"{'-':>8}"


def _ratio(value: float) -> str:
    return f"{value:>8.3f}" if value == value else f"{'-':>8}"


def step_points(checks: Sequence[Check], seed: int = 0) -> pd.DataFrame:
    """At most `MOST_POINTS` of the steps, drawn at random: panel, kind, what, measured_s and predicted_s."""
    import pandas as pd

    frames = []
    for check in checks:
        panel = "fitted" if check.fitted else f"held out: {check.model}"
        for kind, points in zip(KINDS, check.points, strict=True):
            about = {"panel": panel, "kind": kind, "what": f"{check.recording} {check.scenario}"}
            frames.append(pd.DataFrame(points, columns=["measured_s", "predicted_s"]).assign(**about))
    both = pd.concat(frames, ignore_index=True)
    return both if len(both) <= MOST_POINTS else both.sample(MOST_POINTS, random_state=seed).sort_index()


def draw(profile: Profile, checks: Sequence[Check], path: Path) -> None:
    """Every panel's errors are of all its steps, drawn or not."""
    from llmsim.charts import parity, save

    points = step_points(checks)
    panels = {}
    for panel in sorted(points["panel"].unique()):
        of = [check for check in checks if panel == ("fitted" if check.fitted else f"held out: {check.model}")]
        told = []
        for i, kind in enumerate(KINDS):
            errors = np.concatenate([np.abs(check.points[i][:, 1] / check.points[i][:, 0] - 1.0) for check in of])
            if len(errors):
                median, p90 = np.quantile(errors, (0.5, 0.9))
                told.append(f"{kind}: {len(errors):,}, median {median:.1%}, p90 {p90:.1%}")
        panels[panel] = told
    title = f"{profile.name} ({profile.id}): GPU seconds of recorded steps"
    subtitle = [f"{profile.provenance.engine}; a point is a step, {len(points):,} drawn; dashed: 10 % off"]
    save(parity(points, panels, KINDS, title=title, subtitle=subtitle, columns=3), path)
