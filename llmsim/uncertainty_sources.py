"""How far a cost model may be off, by source: standard deviations of factors, from recordings, never typed in.

A profile's `spread` (made by `python -m calibration spread --record`) holds relative standard deviations of decode
steps, steps with prompts and launches:

    machine   `spread.machines`: machines of one kind. All factors of a draw come from the same machine: its GPU is off
              by one amount, in decodes and prompts alike (each by its own deviation), its host by another
    hour      `spread.runs`: loads on one machine: the hour, and what the profile misses from load to load
    model     `spread.models`: a model, precision or tensor-parallel size that the profile was carried to, beyond
              machine and hour. 0 for what it was fitted to
    sizes     `spread.sizes`, and where it is carried `spread.carried_sizes`: iterations of one size beyond their load
    steps     `spread.steps`: single iterations

Two to four machines say little, so deviations of machine and hour are pooled over the shipped profiles:
s^2 = sum of f_i s_i^2 / sum of f_i, with f_i degrees of freedom (machines less 1; loads less machines).
With V the mean over all recorded setups of their squared deviations, a setup is off by

    never run            V
    run in n loads       (V + n * own^2) / (1 + n)        all the others count as much as one load of its own

less machine^2 and hour^2, which are in them. A touched-up profile knows its machine: there `machine` is the standard
error of its factors. `constant:SECONDS` is exact by definition.

The roofline was fitted to nothing: its file of deviations (`python -m calibration spread roofline --record`) has every
recorded setup as one it is carried to, on GPUs that have a profile; others are taken to be like them. They also stand
in where a profile is carried by data-sheet shapes, which no recording shows, if they are larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from llmsim.cost.profile import Deviation, Profile, Within, profile_names, read_profile, setup_name

if TYPE_CHECKING:
    from llmsim.cost import CostModel
    from llmsim.scenario import Scenario

SOURCES = ("machine", "hour", "model", "sizes", "steps")
ROOFLINE = Path(__file__).parent / "data" / "roofline.spread.json"
KINDS = ("gpu_decode", "gpu_chunk", "host")


class Carried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a cost model that was fitted to no recording: as the fields of `llmsim.cost.profile.Spread`."""

    models: dict[str, Deviation]
    sizes: Within
    steps: Within


class Source(NamedTuple):
    """Relative standard deviations of decode steps, steps with prompts, and the host's times."""

    decode: float = 0.0
    chunk: float = 0.0
    host: float = 0.0


NONE = Source()


@dataclass(frozen=True)
class Sources:
    """Each source apart; `Sources()` is certain of everything but the seed."""

    machine: Source = NONE
    hour: Source = NONE
    model: Source = NONE
    sizes: Source = NONE
    steps: Source = NONE
    basis: str = "exact by definition"  # what they rest on, in words

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name)._asdict() for name in SOURCES} | {"basis": self.basis}


SEED_ALONE = Sources(basis="the seed alone")


def shipped_profiles() -> list[Profile]:
    return [read_profile(name) for name in profile_names()]


@cache
def roofline_spread() -> Carried:
    return msgspec.json.decode(ROOFLINE.read_bytes(), type=Carried)


def sources_of(scenario: Scenario, cost: CostModel, profiles: Sequence[Profile] | None = None) -> Sources:
    """`profiles`: those whose recordings count; default the shipped ones, and the cost model's own.

    ValueError where no recording says how far the cost model may be off.
    """
    if cost.kind == "constant":
        return Sources()
    own: Profile | None = getattr(cost, "profile", None)
    known = {profile.id: profile for profile in (shipped_profiles() if profiles is None else profiles)}
    if profiles is None and own is not None and own.provenance.touched is None:
        known[own.id] = own
    spreads = [profile for profile in known.values() if profile.spread is not None]
    if not spreads:
        raise ValueError(
            f"cost={scenario.cost}: no spread is recorded in any profile, so nothing says how far it may be off: write"
            " one with python -m calibration spread --record"
        )
    held = [profile.spread for profile in spreads if profile.spread is not None]
    hour = _pooled([(spread.runs, spread.runs.count - spread.machines.count) for spread in held])
    machine = _pooled([(spread.machines, spread.machines.count - 1) for spread in held])
    total, words = _total(scenario, cost, own, spreads)
    model = NONE if total is None else _beyond(total, machine, hour)
    basis = f"{sum(s.runs.count for s in held)} loads on {sum(s.machines.count for s in held)} machines"
    touched = None if own is None else own.provenance.touched
    if touched is not None:
        machine = Source(touched["gpu_sd"], touched["gpu_sd"], touched["host_sd"])
        basis += "; touched up by this machine"
    sizes, steps = _inside(cost, spreads)
    return Sources(machine, hour, model, sizes, steps, f"{basis}; {scenario.model}: {words}")


def _origin(cost: CostModel) -> str:
    return str(getattr(cost, "origin", cost.kind))


def _total(
    scenario: Scenario, cost: CostModel, own: Profile | None, spreads: Sequence[Profile]
) -> tuple[Source | None, str]:
    """Everything that a setup is off by, machine and hour included, and what that rests on; None: what was fitted."""
    if own is None:
        setups = roofline_spread().models
        return _mean_of(setups.values()), f"roofline, {len(setups)} setups of other GPUs or of this one were run"
    if _origin(cost) == "recorded":
        return None, "what the profile was fitted to"
    name = setup_name(scenario.resolved().model, scenario.weight_dtype, scenario.tensor_parallel)
    varied = " + " in _origin(cost)  # drafts, or kernels exchanged: no engine was recorded with them
    total, words = _carried(own, name, spreads, varied)
    if _origin(cost).startswith("shapes"):
        worst = _mean_of(roofline_spread().models.values())
        return Source(*map(max, total, worst)), f"{words}; carried by shapes, at most as sure as the roofline"
    return total, words


def _mean_of(deviations: Iterable[Deviation]) -> Source:
    held = list(deviations)
    return Source(*(sqrt(sum(getattr(d, kind) ** 2 for d in held) / len(held)) for kind in KINDS))


def _inside(cost: CostModel, spreads: Sequence[Profile]) -> tuple[Source, Source]:
    """Of sizes and of steps inside a load."""
    if cost.kind == "roofline":
        found = roofline_spread()
        return Source(found.sizes.decode, found.sizes.chunk), Source(found.steps.decode, found.steps.chunk)
    sizes = "sizes" if _origin(cost) == "recorded" else "carried_sizes"
    return _typical(spreads, sizes), _typical(spreads, "steps")


def _typical(spreads: Sequence[Profile], name: str) -> Source:
    """Pooled over the profiles that know it; 0 where none does."""
    found = [within for p in spreads if (within := getattr(p.spread, name)) is not None]
    loads = sum(within.count for within in found)
    if not loads:
        return NONE
    return Source(*(sqrt(sum(w.count * getattr(w, kind) ** 2 for w in found) / loads) for kind in ("decode", "chunk")))


def _pooled(deviations: Sequence[tuple[Deviation, int]]) -> Source:
    """Weighted by degrees of freedom."""
    freedom = sum(max(count, 0) for _, count in deviations)
    if not freedom:
        raise ValueError("profiles: their spreads rest on one machine each, so nothing says how far machines differ")
    squares = [sum(max(n, 0) * getattr(d, kind) ** 2 for d, n in deviations) / freedom for kind in KINDS]
    return Source(*(sqrt(square) for square in squares))


def _carried(own: Profile, name: str, spreads: Sequence[Profile], varied: bool) -> tuple[Source, str]:
    """Everything that such a setup is off by, and what that rests on."""
    all_of_them = [deviation for p in spreads if p.spread for deviation in p.spread.models.values()]
    if not all_of_them:
        raise ValueError(
            f"profile {own.name} is carried to {name}, and no profile says how far it is off when carried: record that"
            " with python -m calibration spread --carried FOLDER --record"
        )
    never = _mean_of(all_of_them)
    same = [p for p in spreads if p.gpu == own.gpu]
    seen = next((p.spread.models[name] for p in same if p.spread and name in p.spread.models), None)
    if seen is None or varied:
        return never, f"never run, {len(all_of_them)} other setups were"
    n = seen.count
    squares = [(sd**2 + n * getattr(seen, kind) ** 2) / (1 + n) for sd, kind in zip(never, KINDS, strict=True)]
    return Source(*map(sqrt, squares)), f"{n} load{'s' * (n > 1)} of it in the recordings"


def _beyond(total: Source, machine: Source, hour: Source) -> Source:
    inside = [hypot(a, b) for a, b in zip(machine, hour, strict=True)]
    return Source(*(sqrt(max(t * t - i * i, 0.0)) for t, i in zip(total, inside, strict=True)))
