"""How far a profile is from recordings, step by step: GPU seconds by kind of step, and launches by mode.

Only steps whose end is seen count (calibration.observe). A launch ratio away from 1 says how fast that host was at that
hour: it is the `host_scale` to simulate it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import msgspec
import numpy as np

from calibration.fit import gpu_seconds, walk
from calibration.fit_host import spread
from calibration.observe import Seen
from calibration.steps import Recording
from llmsim.cost import EAGER, FULL, PIECEWISE, Host
from llmsim.cost.graphs import Graphs
from llmsim.cost.profile import HostClock, Profile

FEWEST = 8  # steps that make a median


@dataclass(frozen=True)
class Check:
    scenario: str
    fitted: bool  # whether the profile was fitted to it
    decode_steps: int
    decode_median: float  # median absolute relative error of GPU seconds
    decode_bias: float  # relative error of their sum, the profile's less the recorded
    chunk_steps: int
    chunk_median: float
    chunk_bias: float
    launches: int
    launch_ratio: float  # recorded over the profile's, of piecewise and eager launches


def profile_host(profile: Profile) -> Host:
    fields = {name: getattr(profile.host_clock, name) for name in HostClock.__struct_fields__ if name != "stall_share"}
    return Host(**fields)


def check_profile(profile: Profile, recordings: Sequence[Recording]) -> list[Check]:
    checks = []
    host = profile_host(profile)
    for recording in recordings:
        graphs = Graphs(recording.engine["cudagraph_capture_sizes"], recording.engine["max_num_seqs"])
        groups: dict[str, list[Seen]] = {}
        own = set(recording.files.values()) & set(profile.provenance.recordings.values())
        fitted_names = set(profile.provenance.scenarios) if own or not recording.files else set()
        for name, row in walk(recording.scenarios, profile.gpu_clock, host, graphs):
            # the batches of a grid are one scenario's worth of steps
            known = name in profile.provenance.scenarios
            groups.setdefault("grid" if name.startswith("grid_") and known else name, []).append(row)
        bursts = {scenario.name for scenario in recording.scenarios if not spread(scenario)} | {"grid"}
        for name, rows in groups.items():
            fitted = bool(fitted_names) and (name == "grid" or name in fitted_names)
            checks.append(_check(profile, host, graphs, name, rows, fitted, name in bursts))
    return checks


def _check(
    profile: Profile, host: Host, graphs: Graphs, name: str, rows: Sequence[Seen], fitted: bool, burst: bool
) -> Check:
    clock, stalled = profile.gpu_clock, 1.0 + profile.host_clock.stall_share
    seen = [row for row in rows if row.gpu_s == row.gpu_s and row.gpu_s > 0.0]
    decodes = [row for row in seen if row.mode == FULL and row.follows_gpu and row.clean]
    chunks = [row for row in seen if row.step.chunks]
    decode = np.array([gpu_seconds(clock, host.warm_share, graphs, row.step) for row in decodes])
    chunk = np.array([gpu_seconds(clock, host.warm_share, graphs, row.step) for row in chunks])
    decode_s, chunk_s = np.array([row.gpu_s for row in decodes]), np.array([row.gpu_s for row in chunks])
    launches = [row for row in rows if row.mode in (PIECEWISE, EAGER) and row.launched_s == row.launched_s]
    recorded_s = sum(row.launched_s - row.launch_s for row in launches)
    expected_s = sum(
        host.launch_s[row.mode] + host.launch_per_chunk_s[row.mode] * len(row.step.chunks) for row in launches
    )
    return Check(
        scenario=name,
        fitted=fitted,
        decode_steps=len(decodes),
        decode_median=_median_error(decode, decode_s),
        decode_bias=_bias(decode * stalled, decode_s),
        chunk_steps=len(chunks),
        chunk_median=_median_error(chunk, chunk_s),
        chunk_bias=_bias(chunk, chunk_s),
        launches=len(launches),
        # in a burst the client and the engine's receiving thread compete with the launches
        launch_ratio=recorded_s / expected_s if len(launches) >= FEWEST and not burst else nan,
    )


def _median_error(expected: np.ndarray, seen: np.ndarray) -> float:
    return float(np.median(np.abs(expected / seen - 1.0))) if len(seen) >= FEWEST else nan


def _bias(expected: np.ndarray, seen: np.ndarray) -> float:
    return float(expected.sum() / seen.sum() - 1.0) if len(seen) >= FEWEST else nan


def with_errors(profile: Profile, checks: Sequence[Check]) -> Profile:
    """The profile with its errors noted: over all fitted scenarios, and by name for the others."""
    error = dict(profile.error)
    for kind in ("decode", "chunk"):
        fitted = [check for check in checks if check.fitted and getattr(check, f"{kind}_median") > 0.0]
        if fitted:
            count = np.array([getattr(check, f"{kind}_steps") for check in fitted], float)
            median = np.array([getattr(check, f"{kind}_median") for check in fitted])
            error[f"fit_{kind}_step_median"] = float(f"{np.sum(count * median) / np.sum(count):.4g}")
        for check in checks:
            if not check.fitted and getattr(check, f"{kind}_median") > 0.0:
                error[f"{check.scenario}_{kind}_step_median"] = float(f"{getattr(check, f'{kind}_median'):.4g}")
    return msgspec.structs.replace(profile, error=error)


def report(profile: Profile, checks: Sequence[Check]) -> str:
    lines = [
        f"{profile.name}: relative error of GPU seconds, and recorded over expected launches",
        f"{'scenario':<24}{'':8}{'decodes':>8}{'median':>8}{'bias':>8}{'chunks':>8}{'median':>8}{'bias':>8}"
        f"{'launches':>10}{'ratio':>8}",
    ]
    for check in checks:
        kind = "fitted" if check.fitted else "held out"
        lines.append(
            f"{check.scenario:<24}{kind:8}{check.decode_steps:>8}{_percent(check.decode_median)}"
            f"{_percent(check.decode_bias)}{check.chunk_steps:>8}{_percent(check.chunk_median)}"
            f"{_percent(check.chunk_bias)}{check.launches:>10}{check.launch_ratio:>8.3f}"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:>8.1%}" if share == share else f"{'-':>8}"
