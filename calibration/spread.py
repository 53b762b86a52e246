"""How far machines of one kind, loads on one machine, and other models are from a profile: deviations from recordings.

Of every load three ratios of recorded to expected seconds are taken as a touch-up takes them (calibration.touch_up):
decode steps, steps with chunks, launches; schedules say nothing here. In logs, with loads j of machines i:

    runs      r^2  pooled variance of the loads about their machine's mean, less their squared standard errors
    machines  m^2  variance of the machines' means, less what loads alone make them differ by
    models         of a model, precision or tensor-parallel size the profile was not fitted to but is carried to:
                   mean square of its loads' logs (about no error, not about their mean: a prediction is not
                   corrected by it), less their squared standard errors. Machine and hour are in it
    sizes          iterations of one size (octaves of their tokens) beyond their load: variance of the medians of the
                   octaves with 20 steps or more. The typical load's: the median over loads
    steps          single iterations beyond their octave: a normal distribution's deviation with the same 5th and 95th
                   percentile, so that a pause now and then does not count. The typical load's

r holds what the profile gets wrong from load to load as well as the hour's chance, so it is above the spread of
identical runs. From two machines m is hardly more than an order of magnitude; `count` says of how many it is.

Where all requests were sent together no launch is counted: the GPU's queue is full then, launches wait for it (they
took 0.7 to 5.9 times the profile's in five recorded loads of the kind), and say nothing about the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log, nan, sqrt
from statistics import NormalDist

import numpy as np

from calibration.touch_up import FEWEST, Floats, Load, Ratio, Seconds
from llmsim.cost.profile import Deviation, Spread, Within
from llmsim.uncertainty_sources import Carried

KINDS = ("gpu_decode", "gpu_chunk", "host")


def spread_of(machines: Sequence[Sequence[Load]], setups: Mapping[str, Sequence[Load]] | None = None) -> Spread:
    """`machines`: the loads recorded on each; `setups`: of each setup the profile was carried to."""
    if len(machines) < 2 or max(len(loads) for loads in machines) < 2:
        counts = ", ".join(str(len(loads)) for loads in machines)
        raise ValueError(f"recordings: {counts} loads by machine; a spread needs two machines, and one with two loads")
    both = {kind: _deviations([_ratios(loads, kind) for loads in machines], kind) for kind in KINDS}
    own, carried = ([load for loads in group for load in loads] for group in (machines, (setups or {}).values()))
    runs, between = ({kind: _short(both[kind][i]) for kind in KINDS} for i in (0, 1))
    return Spread(
        runs=Deviation(**runs, count=sum(len(loads) for loads in machines)),
        machines=Deviation(**between, count=len(machines)),
        models=_errors(setups or {}),
        sizes=_within(own, _between_sizes),
        carried_sizes=_within(carried, _between_sizes),
        steps=_within([*own, *carried], _of_one_size),
    )


def carried_spread(setups: Mapping[str, Sequence[Load]]) -> Carried:
    """Of a cost model that was fitted to no recording."""
    loads = [load for held in setups.values() for load in held]
    sizes, steps = _within(loads, _between_sizes), _within(loads, _of_one_size)
    if sizes is None or steps is None:
        raise ValueError(f"recordings: {len(loads)} loads say nothing of iterations of one size. Record more of them")
    return Carried(_errors(setups), sizes, steps)


def _within(loads: Sequence[Load], deviation: Callable[[Seconds], float]) -> Within | None:
    """None where no load shows it."""
    found = {}
    for kind, part in (("decode", "decodes"), ("chunk", "chunks")):
        values = [deviation(getattr(load, part)) for load in loads]
        squares = [value**2 for value in values if value == value]
        if not squares:
            return None
        found[kind] = _short(sqrt(float(np.median(squares))))
    return Within(**found, count=len(loads))


def _octaves(steps: Seconds) -> list[Floats]:
    """Logs of recorded over expected seconds, for each octave of tokens that has enough steps."""
    if not len(steps.tokens):
        return []
    ratios, octave = np.log(steps.recorded_s / steps.expected_s), np.round(np.log2(steps.tokens))
    return [own for own in (ratios[octave == one] for one in np.unique(octave)) if len(own) >= FEWEST]


def _between_sizes(steps: Seconds) -> float:
    medians = [float(np.median(own)) for own in _octaves(steps)]
    return float(np.std(medians, ddof=1)) if len(medians) > 1 else nan


def _of_one_size(steps: Seconds) -> float:
    octaves = _octaves(steps)
    if not octaves:
        return nan
    low, high = np.percentile(np.concatenate([own - np.median(own) for own in octaves]), (5, 95))
    return float(high - low) / (2 * NormalDist().inv_cdf(0.95))


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def _errors(setups: Mapping[str, Sequence[Load]]) -> dict[str, Deviation]:
    """By setup. What none of a setup's loads shows (small models' steps with chunks are paced by the host) is taken to
    be as wrong as that of the others, root mean square."""
    shown = {name: {kind: _error(_ratios(loads, kind)) for kind in KINDS} for name, loads in sorted(setups.items())}
    others = {}
    for kind in KINDS:
        known = [errors[kind] for errors in shown.values() if errors[kind] == errors[kind]]
        if shown and not known:
            raise ValueError(f"recordings: {kind} is seen in none of the loads of {', '.join(shown)}. Record more")
        others[kind] = sqrt(float(np.mean(np.square(known)))) if known else nan
    return {
        name: Deviation(
            **{kind: _short(error if error == error else others[kind]) for kind, error in errors.items()},
            count=len(setups[name]),
        )
        for name, errors in shown.items()
    }


def _error(ratios: Sequence[Ratio]) -> float:
    squares = [log(ratio.value) ** 2 - (ratio.sd / ratio.value) ** 2 for ratio in ratios]
    return sqrt(max(float(np.mean(squares)), 0.0)) if squares else nan


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
