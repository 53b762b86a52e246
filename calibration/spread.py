"""How far machines of one kind, and loads on one machine, are from a profile: standard deviations from recordings.

Of every load three ratios of recorded to expected seconds are taken as a touch-up takes them (calibration.touch_up):
decode steps, steps with chunks, launches; schedules say nothing here. In logs, with loads j of machines i:

    runs      r^2  pooled variance of the loads about their machine's mean, less their squared standard errors
    machines  m^2  variance of the machines' means, less what loads alone make them differ by

r holds what the profile gets wrong from load to load as well as the hour's chance, so it is above the spread of
identical runs. From two machines m is hardly more than an order of magnitude; `count` says of how many it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

import numpy as np

from calibration.touch_up import Load, Ratio
from llmsim.cost.profile import Deviation, Spread

KINDS = ("gpu_decode", "gpu_chunk", "host")


def spread_of(machines: Sequence[Sequence[Load]]) -> Spread:
    """`machines`: the loads recorded on each."""
    if len(machines) < 2 or max(len(loads) for loads in machines) < 2:
        counts = ", ".join(str(len(loads)) for loads in machines)
        raise ValueError(f"recordings: {counts} loads by machine; a spread needs two machines, and one with two loads")
    both = {kind: _deviations([_ratios(loads, kind) for loads in machines], kind) for kind in KINDS}
    runs, between = ({kind: float(f"{both[kind][i]:.2g}") for kind in KINDS} for i in (0, 1))
    return Spread(
        runs=Deviation(**runs, count=sum(len(loads) for loads in machines)),
        machines=Deviation(**between, count=len(machines)),
    )


def _ratios(loads: Sequence[Load], kind: str) -> list[Ratio]:
    ratios = []
    for load in loads:
        if kind == "host" and not load.launches.enough:
            continue
        ratio = {"gpu_decode": load.decode, "gpu_chunk": load.chunk, "host": load.host}[kind]
        if ratio.value == ratio.value:
            ratios.append(ratio)
    return ratios


def _deviations(machines: Sequence[Sequence[Ratio]], kind: str) -> tuple[float, float]:
    """r and m."""
    logs = [np.array([log(ratio.value) for ratio in ratios]) for ratios in machines if ratios]
    freedom = sum(len(values) - 1 for values in logs)
    if len(logs) < 2 or freedom < 1:
        raise ValueError(f"recordings: {kind} is seen on {len(logs)} machines, in too few loads. Record more of them")
    within = sum(float(np.sum((values - values.mean()) ** 2)) for values in logs) / freedom
    errors = float(np.mean([(ratio.sd / ratio.value) ** 2 for ratios in machines for ratio in ratios]))
    by_chance = within * float(np.mean([1.0 / len(values) for values in logs]))
    between = float(np.var([values.mean() for values in logs], ddof=1)) - by_chance
    return sqrt(max(within - errors, 0.0)), sqrt(max(between, 0.0))
