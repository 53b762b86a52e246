"""What the real machine may turn out to be: n draws of what a cost model's terms are off by.

    decode = exp(m_d z1 + h_d z3 + s_d z5)      seconds of iterations without prompts
    chunk  = exp(m_p z1 + h_p z4 + s_p z6)      seconds of iterations with prompts
    host   = exp(m_h z2 + h_h z7 + s_h z8)      every time of the host

z standard normal; m, h, s the deviations of machine, hour and model (`llmsim.uncertainty_sources`). On top of that
iterations of one size are off by something of their own, and so is every single iteration (`llmsim.cost.scaled`).
Each draw has a seed of its own for that, for launch noise and for whatever else is drawn. One draw is one machine in
one hour: all its replicas are alike. Draws are independent: spreading them evenly (a Latin hypercube) would pull the
outermost ones apart and make intervals of few draws too wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

import numpy as np

from llmsim.cost.scaled import Factors, Ripple, ScaledCost
from llmsim.simulate import cost_of
from llmsim.uncertainty_sources import Sources, sources_of

if TYPE_CHECKING:
    from llmsim.cost import CostModel
    from llmsim.scenario import Scenario

TAG = 0x756E73757265  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class Draw:
    """One of n: what the cost model's terms are off by, and the seed of the replay."""

    factors: Factors
    ripple: Ripple
    seed: int

    def of(self, cost: CostModel) -> ScaledCost:
        return ScaledCost(cost, self.factors, self.ripple)


def draws_of(scenario: Scenario, sources: Sources, n: int, seed: int | None = None) -> list[Draw]:
    """The draws that `predict` makes; the same z for the same n and seed, whatever the scenario."""
    if n < 1:
        raise ValueError(f"draws={n}: give 1 or more")
    rng = np.random.default_rng([TAG, scenario.seed if seed is None else seed, n])
    z = rng.standard_normal((8, n))
    seeds = rng.integers(0, 2**31, n).tolist()
    m, h, s = sources.machine, sources.hour, sources.model
    exponents = (
        m.decode * z[0] + h.decode * z[2] + s.decode * z[4],
        m.chunk * z[0] + h.chunk * z[3] + s.chunk * z[5],
        m.host * z[1] + h.host * z[6] + s.host * z[7],
    )
    return [
        Draw(
            Factors(*(exp(float(column[i])) for column in exponents)),
            Ripple(sources.sizes.decode, sources.sizes.chunk, sources.steps.decode, sources.steps.chunk, seed),
            seed,
        )
        for i, seed in enumerate(seeds)
    ]


def draw_costs(scenario: Scenario, n: int, seed: int | None = None) -> list[ScaledCost]:
    """Cost models of n machines that the scenario's may turn out to be: those that `predict` draws."""
    cost = cost_of(scenario)
    return [draw.of(cost) for draw in draws_of(scenario, sources_of(scenario, cost), n, seed)]
