"""What an iteration costs: two clocks, the GPU's and the host's.

A cost model answers for one replica (one tensor-parallel group) and one model. Given the composition of an
iteration it says how long the GPU runs; its `host` says how long the engine's host thread needs around it.

    composition     seqs       requests that decode one token each
                    kv_tokens  sum of their contexts before this iteration (tokens)
                    chunks     [(new tokens, tokens already computed), ...] prompts being prefilled
    mode            how the iteration is launched: FULL (one CUDA graph), PIECEWISE (graphs with attention between
                    them) or EAGER (every kernel launched); vLLM's rules are in `llmsim.cost.graphs`

Within a run of pure-decode iterations the GPU time grows by the same amount each iteration (every request reads one
more cached token), hence `Ramp`: the time of n iterations is an arithmetic series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, NamedTuple, Protocol

FULL, PIECEWISE, EAGER = 0, 1, 2
MODE_NAMES = ("full graph", "piecewise graph", "eager")


class Ramp(NamedTuple):
    """GPU seconds of consecutive decode iterations: the i-th (from 0) lasts `first_s + i * growth_s`."""

    first_s: float
    growth_s: float

    def elapsed_s(self, steps: int) -> float:
        return steps * self.first_s + self.growth_s * (steps * (steps - 1)) * 0.5

    def steps_within(self, elapsed_s: float) -> int:
        """Smallest n with elapsed_s(n) >= elapsed_s: iterations begun when that much time has passed."""
        if elapsed_s <= 0.0:
            return 0
        first, half = self.first_s, 0.5 * self.growth_s
        if half <= 0.0:
            return ceil(elapsed_s / first)
        b = first - half
        n = ceil((sqrt(b * b + 4.0 * half * elapsed_s) - b) / (2.0 * half))
        while self.elapsed_s(n) < elapsed_s:  # the root is a float: step over its rounding
            n += 1
        while n > 1 and self.elapsed_s(n - 1) >= elapsed_s:
            n -= 1
        return n


@dataclass(frozen=True)
class Host:
    """The host thread's clock, seconds. Tuples of three are indexed by mode: full graph, piecewise, eager.

    schedule = schedule_s + schedule_per_request_s * running + schedule_per_token_s * new prompt tokens
    launch   = launch_s[mode] + launch_per_request_s[mode] * requests in the step + one draw of launch_jitter_s[mode]
    update   = update_s + update_per_output_s * outputs of the step
    While a launch is under way, a request of p prompt tokens that reaches the engine slows it by
    interference_per_token_s * p (one interpreter lock).
    In piecewise and eager mode the GPU can start `lead_s` after the launch began and ends no earlier than `tail_s` after
    the launch ended; a full graph starts when its launch has ended.
    The client side: a request is schedulable receive_s + receive_per_token_s * prompt after it was sent (one at a
    time), and the client sees the tokens of a step respond_s + respond_per_output_s * outputs after its update began.
    """

    schedule_s: float = 0.0
    schedule_per_request_s: float = 0.0
    schedule_per_token_s: float = 0.0
    launch_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    launch_per_request_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    launch_jitter_s: tuple[tuple[float, ...], ...] = ((), (), ())  # equally likely deviations from the mean
    update_s: float = 0.0
    update_per_output_s: float = 0.0
    interference_per_token_s: float = 0.0
    lead_s: float = 0.0
    tail_s: float = 0.0
    receive_s: float = 0.0
    receive_per_token_s: float = 0.0
    respond_s: float = 0.0
    respond_per_output_s: float = 0.0


class CostModel(Protocol):
    """GPU seconds of iterations; `host` for the rest. Never returns 0 or less for an iteration that has tokens."""

    kind: str  # "profile", "roofline" or "constant": printed with every result
    label: str  # one line: which profile, its measured error; or which facts a roofline used
    host: Host

    def mode(self, tokens: int, chunks: int) -> int:
        """How an iteration of `tokens` tokens is launched, `chunks` of its requests being multi-token prefills."""

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        """Consecutive pure-decode iterations of `seqs` requests, `kv_tokens` cached before the first."""

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: int) -> float:
        """An iteration with prefill chunks (new, already computed) beside `seqs` decodes."""

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        """Boolean array: which rows of the iteration log lie outside the range this model was measured on."""
