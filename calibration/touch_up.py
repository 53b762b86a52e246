"""Two factors, the GPU's and the host's, that adapt a profile to one machine, from half a minute of recorded load.

    GPU   recorded over expected GPU seconds of the steps whose end is seen (calibration.observe), decodes and steps
          with chunks apart; the two are weighted by their shares of GPU time
    host  recorded over expected seconds of piecewise and eager launches, each with its prompts and what arrives
          meanwhile; without its outermost tenths, so relative to the profile's own launch noise without them.
          Where fewer than `FEWEST` launches show, or all requests were sent at once: of schedule(), which says less
          (`SCHEDULE_SD`)

Every ratio is one of sums without the outermost tenths of the steps. Which ends are seen depends on both clocks, so
the steps are walked again with the scaled clocks until the factors stand still. Standard errors are by bootstrap over
blocks of a second, for neighbouring steps are alike.

Loads of one machine differ by what the profile misses and by the hour. Where the profile says by how much they and
machines differ (`Profile.spread`, relative standard deviations r and m), a ratio 1 + d with standard error e counts as

    1 + d * (1 - R^2 / max((d / 3)^2, R^2 + m^2))      R^2 = r^2 + e^2

the best guess for that machine's next load; a d beyond three standard deviations counts more the larger it is, for then
it is the machine (a power limit, another CPU) and not chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from math import hypot, nan, sqrt
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration import fit
from calibration.fit_host import BURST_REQUESTS
from calibration.observe import DISPATCH_S, observe
from calibration.profiles import rounded
from calibration.steps import Recording, Scenario, StepRow
from llmsim.cost import EAGER, FULL, CostModel
from llmsim.cost.profile import Profile, ProfileCost, profile_names, read_profile
from llmsim.hardware import find_model
from llmsim.recording import read_settings
from llmsim.scenario import Scenario as Settings
from llmsim.simulate import cost_of

Floats = NDArray[np.float64]

FEWEST = 20  # steps, or launches, that make a ratio
TRIM = 0.1
BLOCK_S = 1.0
RESAMPLES = 200
ROUNDS, STILL = 12, 1e-4
# How far schedule()'s ratio is from the launches' in one load: over 17 recorded loads of four machines and hours.
SCHEDULE_SD = 0.1
TOGETHER_S = 1.0  # a load whose requests were all sent within this is sent together
SIGMAS = 3.0  # from there on a difference is the machine's
NOT_SLOWER = ("drift_hold_s",)  # of the host's clock: a correlation time


@dataclass(frozen=True)
class Ratio:
    """Recorded over expected seconds, its standard error, and how many steps it rests on."""

    value: float
    sd: float
    count: int


@dataclass(frozen=True)
class Seconds:
    """Steps, launches or schedules: when they were, recorded seconds, and the profile's."""

    at_s: Floats
    recorded_s: Floats
    expected_s: Floats
    tokens: Floats = field(default_factory=lambda: np.zeros(0))  # of each step; launches and schedules have none

    @staticmethod
    def of(rows: Sequence[tuple[float, ...]], columns: int = 3) -> Seconds:
        return Seconds(*np.array(rows, float).reshape(-1, columns).T)

    @property
    def enough(self) -> bool:
        return len(self.at_s) >= FEWEST

    def ratio(self) -> float:
        return trimmed_ratio(self.recorded_s, self.expected_s) if self.enough else nan

    def estimate(self, typical: float = 1.0) -> Ratio:
        if not self.enough:
            return Ratio(nan, nan, len(self.at_s))
        _, block = np.unique(np.floor(self.at_s / BLOCK_S), return_inverse=True)
        members = [np.flatnonzero(block == i) for i in range(block.max() + 1)]
        draws = np.random.default_rng(0).integers(0, len(members), (RESAMPLES, len(members)))
        chosen = [np.concatenate([members[i] for i in draw]) for draw in draws]
        again = [trimmed_ratio(self.recorded_s[rows], self.expected_s[rows]) for rows in chosen]
        return Ratio(self.ratio() / typical, float(np.std(again)) / typical, len(self.at_s))

    def median_error(self, factor: float) -> float:
        return float(np.median(np.abs(factor * self.expected_s / self.recorded_s - 1.0)))


def trimmed_ratio(recorded_s: Floats, expected_s: Floats) -> float:
    order = np.argsort(recorded_s / expected_s)
    cut = int(TRIM * len(order))
    kept = order[cut : len(order) - cut]
    return float(recorded_s[kept].sum() / expected_s[kept].sum())


@dataclass(frozen=True)
class Load:
    """What one load shows of both clocks."""

    name: str
    decodes: Seconds
    chunks: Seconds
    launches: Seconds
    schedules: Seconds
    chunk_share: float  # of its GPU seconds, steps with chunks
    typical_launch: float  # of the profile: without the outermost tenths, over the mean

    @property
    def weights(self) -> tuple[float, float]:
        """Of decode steps and steps with chunks in the GPU's factor; one that is hardly seen does not count."""
        chunk = 0.0 if not self.chunks.enough else self.chunk_share if self.decodes.enough else 1.0
        return 1.0 - chunk, chunk

    def weighted(self, decode: float, chunk: float) -> float:
        return sum(weight * value for weight, value in zip(self.weights, (decode, chunk), strict=True) if weight > 0.0)

    @cached_property
    def decode(self) -> Ratio:
        return self.decodes.estimate()

    @cached_property
    def chunk(self) -> Ratio:
        return self.chunks.estimate()

    @cached_property
    def host(self) -> Ratio:
        if self.launches.enough:
            return self.launches.estimate(self.typical_launch)
        schedule = self.schedules.estimate()
        return Ratio(schedule.value, hypot(schedule.sd, SCHEDULE_SD), schedule.count)

    def factors(self) -> tuple[float, float]:
        """GPU and host, as seen."""
        host = self.launches.ratio() / self.typical_launch if self.launches.enough else self.schedules.ratio()
        return self.weighted(self.decodes.ratio(), self.chunks.ratio()), host


def cost_for(recording: Recording, profile: str, model: str, gpu: str) -> ProfileCost:
    """The profile as it predicts the recorded engine: its tensor-parallel size, dtypes and graphs."""
    settings, _, _ = read_settings(recording.path / "engine.json")
    cost = cost_of(Settings.from_dict({"model": model, "gpu": gpu, "cost": profile} | settings))
    assert isinstance(cost, ProfileCost)
    return cost


def gpu_seconds(cost: ProfileCost) -> Callable[[StepRow], float]:
    """GPU seconds of a recorded step without stalls."""
    return partial(fit.gpu_seconds, cost.clock, cost.host)


def typical_launch(cost: CostModel) -> float:
    tables = cost.host.launch_drift_s[EAGER], cost.host.launch_jitter_s[EAGER]
    drift_s, jitter_s = (np.array(table or (0.0,)) for table in tables)
    mean_s = np.full(drift_s.size * jitter_s.size, cost.host.launch_s[EAGER])
    return trimmed_ratio(mean_s + (drift_s[:, None] + jitter_s[None, :]).ravel(), mean_s)


def first_part(scenario: Scenario, first_s: float) -> Scenario:
    end_s = min(request.send_s for request in scenario.requests) + first_s
    steps = [step for step in scenario.steps if step.schedule_s < end_s]
    return Scenario(scenario.name, scenario.requests, steps, concurrency=scenario.concurrency)


Expected = Callable[[StepRow], float]


def observed(scenario: Scenario, cost: CostModel, expected_s: Expected | None = None) -> Load:
    """Walked with both clocks scaled until their factors stand still.

    `expected_s`: GPU seconds of a step, of a cost model that is no profile.
    """
    if expected_s is None:
        assert isinstance(cost, ProfileCost)
        expected_s = gpu_seconds(cost)
    if len(scenario.steps) < FEWEST:
        raise ValueError(f"{scenario.name}: {len(scenario.steps)} steps; {FEWEST} or more say something. Record longer")
    load = _settled(scenario, cost, expected_s, 1.0)
    if not _enough(load):  # the GPU may be so much slower that its ends seemed those of launches
        load = _settled(scenario, cost, expected_s, gap_ratio(scenario, expected_s))
    if not _enough(load):
        most = max(len(load.decodes.at_s), len(load.chunks.at_s))
        raise ValueError(
            f"{scenario.name}: of {most} steps the GPU's end is seen; {FEWEST} or more say something. Record longer"
        )
    return launches_told(load, scenario)


def launches_told(load: Load, scenario: Scenario) -> Load:
    """The load, without its launches if those say nothing about the host: sent at once, they wait for the GPU."""
    sent_s = [request.send_s for request in scenario.requests]
    return load if max(sent_s) - min(sent_s) > TOGETHER_S else replace(load, launches=Seconds.of([]))


def _enough(load: Load) -> bool:
    return load.decodes.enough or load.chunks.enough


def _settled(scenario: Scenario, cost: CostModel, expected_s: Expected, gpu: float) -> Load:
    host = 1.0
    for _ in range(ROUNDS):
        load = _walked(scenario, cost, expected_s, gpu, host)
        if not _enough(load):
            break
        before, (gpu, host) = (gpu, host), load.factors()
        if abs(gpu - before[0]) + abs(host - before[1]) < STILL:
            break
    return load


def gap_ratio(scenario: Scenario, expected_s: Expected) -> float:
    """Recorded over expected time between the updates of decodes in flight together: the GPU's, if that paces them."""
    ratios = [
        (step.update_s - before.update_s) / expected_s(step)
        for before, step in pairwise(scenario.steps)
        if not before.chunks and not step.chunks and step.schedule_s < before.update_s
    ]
    return float(np.median(ratios)) if ratios else 1.0


def _walked(scenario: Scenario, cost: CostModel, expected_s: Expected, gpu: float, host: float) -> Load:
    base = cost.host
    rows = observe(scenario.steps, base.scaled(host), cost.mode, lambda step: gpu * expected_s(step))
    requests = sorted(scenario.requests, key=lambda request: request.send_s)
    sent_s = np.array([request.send_s for request in requests])
    prompts = np.cumsum([0, *(request.prompt_tokens for request in requests)])
    decodes, chunks, launches, schedules = [], [], [], []
    total_s = chunk_s = 0.0
    for row in rows:
        step, took_s = row.step, expected_s(row.step)
        total_s += took_s
        chunk_s += took_s if step.chunks else 0.0
        if row.gpu_s > 0.0:
            if step.chunks:
                chunks.append((row.launch_s, row.gpu_s, took_s, step.tokens))
            elif row.mode == FULL and row.steady:
                decodes.append((row.launch_s, row.gpu_s, took_s, step.tokens))
        if row.mode != FULL and row.launched_s == row.launched_s:
            first, last = np.searchsorted(sent_s, [row.launch_s, row.launched_s])
            if last - first < BURST_REQUESTS:  # in a burst the client and the receiving thread compete with the launch
                launch_s = base.launch_s[row.mode] + base.launch_per_chunk_s[row.mode] * len(step.chunks)
                launch_s += base.interference_per_token_s * float(prompts[last] - prompts[first])
                launches.append((row.launch_s, row.launched_s - row.launch_s, launch_s))
        schedule_s = base.schedule_s + base.schedule_per_request_s * step.running
        schedule_s += base.schedule_per_token_s * step.new_tokens
        schedules.append((step.schedule_s, step.schedule_took_s + DISPATCH_S, schedule_s))
    return Load(
        scenario.name,
        Seconds.of(decodes, 4),
        Seconds.of(chunks, 4),
        Seconds.of(launches),
        Seconds.of(schedules),
        chunk_s / total_s,
        typical_launch(cost),
    )


def believed(seen: Ratio, runs: float, machines: float) -> float:
    """What to scale by, given what was seen and how far loads of one machine, and machines, differ."""
    off, noise = seen.value - 1.0, runs**2 + seen.sd**2
    return 1.0 + off * (1.0 - noise / max((off / SIGMAS) ** 2, noise + machines**2))


@dataclass(frozen=True)
class TouchUp:
    gpu: float
    host: float
    load: Load

    @property
    def gpu_sd(self) -> float:
        """Of the GPU's factor as it was seen."""
        (decode, chunk), load = self.load.weights, self.load
        return sqrt(load.weighted(decode * load.decode.sd**2, chunk * load.chunk.sd**2))

    def report(self) -> str:
        load = self.load
        host = "launches" if load.launches.enough else "schedules"
        rows = (("decode steps", load.decode), ("steps with chunks", load.chunk), (host, load.host))
        lines = [f"{'recorded over profile':<24}{'ratio':>8}{'s.e.':>8}{'of':>8}"]
        for name, seen in rows:
            ratio = f"{seen.value:>8.3f}{seen.sd:>8.3f}" if seen.count >= FEWEST else f"{'-':>8}{'-':>8}"
            lines.append(f"{name:<24}{ratio}{seen.count:>8}")
        return "\n".join([*lines, f"factors: GPU {self.gpu:.3f}, host {self.host:.3f}"])


def touch_up(load: Load, profile: Profile) -> TouchUp:
    spread = profile.spread
    if spread is None:
        return TouchUp(*load.factors(), load)
    runs, machines = spread.runs, spread.machines
    decode, chunk = (
        believed(seen, getattr(runs, kind), getattr(machines, kind)) if seen.count >= FEWEST else nan
        for seen, kind in ((load.decode, "gpu_decode"), (load.chunk, "gpu_chunk"))
    )
    return TouchUp(load.weighted(decode, chunk), believed(load.host, runs.host, machines.host), load)


def touched_profile(profile: Profile, found: TouchUp, recording: Recording, name: str) -> Profile:
    """The profile with both clocks scaled, and where the factors come from."""
    load, source = found.load, profile.provenance
    seen_gpu, seen_host = load.factors()
    provenance = msgspec.structs.replace(
        source,
        gpu=recording.engine.get("gpu", "unknown GPU"),
        recorded=recording.engine.get("recorded", "unknown"),
        fitter=f"{source.fitter}; touch-up of {profile.name} ({profile.id})",
        scenarios=(*source.scenarios, load.name),
        recordings=source.recordings | {f"{recording.path.name}/{file}": sha for file, sha in recording.files.items()},
        touched={
            "gpu": found.gpu,
            "gpu_seen": seen_gpu,
            "gpu_sd": found.gpu_sd,
            "host": found.host,
            "host_seen": seen_host,
            "host_sd": load.host.sd,
        },
    )
    kinds = (("decode", load.decodes), ("chunk", load.chunks))
    error = {f"fit_{kind}_step_median": steps.median_error(found.gpu) for kind, steps in kinds if steps.enough}
    return rounded(
        msgspec.structs.replace(
            profile,
            name=name,
            gpu_clock=slower(profile.gpu_clock, found.gpu),
            kernels=None if profile.kernels is None else slower(profile.kernels, found.gpu),
            host_clock=slower(profile.host_clock, found.host, NOT_SLOWER),
            provenance=provenance,
            error=error,
        )
    )


def slower(clock: Any, factor: float, kept: Sequence[str] = ()) -> Any:
    """A clock whose seconds are `factor` times as long and whose rates as much lower; the fields' names say which."""

    def part(name: str, held: Any) -> Any:
        if isinstance(held, tuple):
            return tuple(part(name, item) for item in held)
        if isinstance(held, dict):
            return {key: part(name, item) for key, item in held.items()}
        if isinstance(held, msgspec.Struct):
            return slower(held, factor, kept)
        if name in kept or not name.endswith(("_s", "seconds")):
            return held
        return held / factor if name.endswith("_per_s") else held * factor

    fields = clock.__struct_fields__
    return msgspec.structs.replace(clock, **{name: part(name, getattr(clock, name)) for name in fields})


def shipped_for(recording: Recording) -> str:
    """The shipped profile of the recorded GPU."""
    gpu = recording.engine.get("gpu", "")
    found = [name for name in profile_names() if _names(read_profile(name).gpu, gpu)]
    if len(found) != 1:
        raise ValueError(
            f"{recording.path / 'engine.json'}: gpu={gpu!r} is that of {len(found)} shipped profiles. Give --profile"
        )
    return found[0]


def check_recorded(profile: Profile, recording: Recording, model: str | None) -> None:
    """That the recording is of what the profile is of; with `model`, another model or size is meant."""
    engine, path = recording.engine, recording.path / "engine.json"
    if not _names(profile.gpu, engine.get("gpu", "")):
        raise ValueError(f"{path}: gpu={engine.get('gpu')!r}, but profile {profile.name} is of {profile.gpu}")
    other = "Record that, or name the recorded model (--model) to have errors of scaling in the factors"
    if model is None and not _names(find_model(profile.model).name, engine.get("model", "")):
        raise ValueError(
            f"{path}: model={engine.get('model')!r}, but profile {profile.name} is of {profile.model}. {other}"
        )
    tensor_parallel = engine.get("tensor_parallel_size", 1)
    if model is None and tensor_parallel != profile.tensor_parallel:
        raise ValueError(
            f"{path}: tensor_parallel_size={tensor_parallel}, but profile {profile.name} is of "
            f"{profile.tensor_parallel}. {other}"
        )


def _names(name: str, text: object) -> bool:
    """Whether a description holds every part of a known name, as `llmsim validate` looks for it."""
    words = str(text).lower().replace("_", "-")
    return all(part in words for part in name.lower().split("-"))
