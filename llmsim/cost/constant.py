"""Every iteration lasts the same, and the host takes no time: a server for tests and queueing theory.

    T = seconds, whatever the batch; no host clock

With one request at a time it is an M/D/1 or G/D/1 server, whose waiting times are known in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import Host, Ramp
from llmsim.cost.graphs import Graphs

LONGEST_S = 86_400.0  # nothing a server does takes a day


class ConstantCost:
    kind = "constant"

    def __init__(self, seconds: float, graphs: Graphs) -> None:
        if not (isfinite(seconds) and 0 < seconds <= LONGEST_S):
            raise ValueError(
                f"cost=constant:{seconds} must be more than 0 seconds and at most {LONGEST_S:g}, as in constant:0.01"
            )
        self.label = f"every iteration lasts {seconds:g} s, the host takes no time"
        self.host = Host()
        self.mode = graphs.mode
        self._ramp = Ramp(seconds, 0.0)

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        return self._ramp

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        return self._ramp.first_s

    def outside_measured(self, iterations: dict[str, Any]) -> NDArray[np.bool_]:
        """None: the constant is exact by definition."""
        return np.zeros(len(iterations["seqs"]), dtype=bool)
