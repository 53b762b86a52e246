"""How far the roofline is from recordings: the deviations of `calibration.spread`, for GPUs without a profile.

Every recording of this repository counts, each setup on each GPU as one that the roofline is carried to. It was fitted
to none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import msgspec

from calibration import fit
from calibration.spread import carried_spread
from calibration.steps import Recording, StepRow, read_recording
from calibration.touch_up import Load, observed
from llmsim.cost import CostModel
from llmsim.cost.basis import StepClock
from llmsim.cost.profile import setup_name
from llmsim.hardware import gpu_names, model_names
from llmsim.recording import read_settings
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of
from llmsim.uncertainty_sources import ROOFLINE, Carried
from llmsim.validate import named_in

FAR_TOKENS = 4096  # of context, to read a decode's seconds per cached token


class Clock:
    """Any cost model, as `calibration.fit` asks a profile's clock."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.skew_share = getattr(cost, "skew_share", None) or (lambda seqs, beside_chunks: 0.0)

    def decode(self, seqs: int) -> tuple[float, float]:
        """Seconds without context, and per cached token."""
        first_s, far = self._cost.decode_ramp(seqs, 0).first_s, seqs * FAR_TOKENS
        return first_s, (self._cost.decode_ramp(seqs, far).first_s - first_s) / far

    def in_windows(self, kv_tokens: float, seqs: int) -> float:
        return kv_tokens

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float = 0.0) -> float:
        return self._cost.mixed_s(chunks, seqs, kv_tokens)


def gpu_seconds(cost: CostModel) -> Callable[[StepRow], float]:
    clock = cast(StepClock, Clock(cost))  # of which the fit asks no more
    return partial(fit.gpu_seconds, clock, cost.host)


def roofline_spread(paths: Iterable[Path]) -> Carried:
    setups: dict[str, list[Load]] = {}
    for path in paths:
        recording = read_recording(path)
        if recording.waits:
            continue
        name, cost = _setup(recording)
        loads = [load for load in recording.scenarios if not load.name.startswith(("grid_", "mix_"))]
        seen = [observed(load, cost, gpu_seconds(cost)) for load in loads]
        setups.setdefault(name, []).extend(seen)
    return carried_spread(setups)


def _setup(recording: Recording) -> tuple[str, CostModel]:
    where, engine = str(recording.path), recording.engine
    model, gpu = named_in(where, engine, "model", model_names()), named_in(where, engine, "gpu", gpu_names())
    settings, _, _ = read_settings(recording.path / "engine.json")
    scenario = Scenario.from_dict({"model": model, "gpu": gpu, "cost": "roofline"} | settings).resolved()
    name = setup_name(scenario.model, scenario.weight_dtype, scenario.tensor_parallel)
    return f"{name} on {gpu}", cost_of(scenario)


def write(found: Carried, path: Path = ROOFLINE) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
