"""What an iteration costs: two clocks, the GPU's and the host's.

A cost model answers for one replica (one tensor-parallel group) and one model. Given the composition of an
iteration it says how long the GPU runs; its `host` says how long the engine's host thread needs around it.

    composition     seqs       requests that decode one token each
                    kv_tokens  sum of their contexts before this iteration (tokens); if the model has a `skew_share`,
                               plus its share for so many decodes of seqs times their standard deviation, which stays
                               as it is while all grow: uneven contexts leave parts of the GPU idle, or fill them
                    chunks     [(new tokens, tokens already computed), ...] prompts being prefilled
                    longest    the longest of those contexts; only a model that `reads_longest` is told
    mode            how the iteration is launched: FULL (one CUDA graph), PIECEWISE (graphs with attention between
                    them) or EAGER (every kernel launched); vLLM's rules are in `llmsim.cost.graphs`

Within a run of pure-decode iterations the GPU time grows by the same amount each iteration (every request reads one
more cached token), hence `Ramp`: the time of n iterations is an arithmetic series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, exp, inf, sqrt
from random import Random
from typing import Any, NamedTuple, Protocol

FULL, PIECEWISE, EAGER = 0, 1, 2
WARM_S = 50e-3  # how long the GPU's clocks stay low after heavy work, and how much of it they stretch
# How long clocks take to come back from what a chunk cost them. On H200s decodes of Llama-3.1-8B lose 1.9 % right after
# a chunk of 23 ms, 1.1 % 30 ms later and 0.4 % after 75 ms; where chunks come every 30 ms 3.7 % at first.
RECOVERY_S = 35e-3
MODE_NAMES = ("full graph", "piecewise graph", "eager")


class Ramp(NamedTuple):
    """GPU seconds of consecutive decode iterations: the i-th (from 0) lasts `first_s + i * growth_s`."""

    first_s: float
    growth_s: float

    def elapsed_s(self, steps: int) -> float:
        first_s, growth_s = self
        return steps * first_s + growth_s * (steps * (steps - 1)) * 0.5

    def steps_within(self, elapsed_s: float) -> int:
        return steps_within(self.first_s, self.growth_s, elapsed_s)


def steps_within(first_s: float, growth_s: float, elapsed_s: float) -> int:
    """Smallest n whose sum of first_s + i * growth_s, i < n, is elapsed_s or more: iterations begun by then."""
    if elapsed_s <= 0.0:
        return 0
    half = 0.5 * growth_s
    if half <= 0.0:
        return ceil(elapsed_s / first_s)
    b = first_s - half
    n = ceil((sqrt(b * b + 4.0 * half * elapsed_s) - b) / (2.0 * half))
    while n * (b + half * n) < elapsed_s:  # the root is a float: step over its rounding
        n += 1
    while n > 1 and (n - 1) * (b + half * (n - 1)) >= elapsed_s:
        n -= 1
    return n


@dataclass(frozen=True)
class Host:
    """The host thread's clock, seconds. Tuples of three are indexed by mode: full graph, piecewise, eager.

    schedule = schedule_s + schedule_per_request_s * running + schedule_per_token_s * new prompt tokens
    launch   = launch_s[mode] + launch_per_request_s[mode] * requests in the step
               + launch_per_chunk_s[mode] * requests with more than one token + `LaunchNoise`
    update   = update_s + update_per_output_s * outputs of the step
    While a launch is under way, a request of p prompt tokens that becomes schedulable slows it by
    interference_per_token_s * p (one interpreter lock).
    The GPU can start `lead_s[mode]` after the launch began and ends no earlier than `tail_s[mode]` after it ended.
    The host takes results return_s after the GPU is done. `worker`: launches are made by processes of their own (tensor
    parallelism), so that the engine's thread is free as soon as it has scheduled; they queue up behind one another, and
    arrivals do not slow them.
    The client side: requests pass to the engine one at a time, each in receive_busy_s + receive_per_token_s * prompt,
    and are schedulable receive_s after that; an idle engine begins to schedule wake_s later, with all that have come by
    then; the client sees the tokens of a step
    respond_s + respond_per_output_s * outputs after its update began.
    A chunk whose iteration follows another with chunks within WARM_S finds the GPU's clocks still low: its first WARM_S
    of GPU time last longer by warm_share. The decodes after a chunk find the same: some 5 % more at first, falling by a
    factor of e in RECOVERY_S, which together is cool_share of the chunk's first WARM_S, counted in the first of them;
    less by the share of it that the clocks were still low by when the chunk began.
    """

    schedule_s: float = 0.0
    schedule_per_request_s: float = 0.0
    schedule_per_token_s: float = 0.0
    launch_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    launch_per_request_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    launch_per_chunk_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    launch_jitter_s: tuple[tuple[float, ...], ...] = ((), (), ())  # equally likely; drawn for every launch
    launch_drift_s: tuple[tuple[float, ...], ...] = ((), (), ())  # equally likely; the same rank in every mode, held
    drift_hold_s: float = 0.0  # mean time between two draws of the drift
    update_s: float = 0.0
    update_per_output_s: float = 0.0
    interference_per_token_s: float = 0.0
    lead_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tail_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    receive_busy_s: float = 0.0
    receive_per_token_s: float = 0.0
    receive_s: float = 0.0
    wake_s: float = 0.0
    respond_s: float = 0.0
    respond_per_output_s: float = 0.0
    warm_share: float = 0.0
    cool_share: float = 0.0
    return_s: float = 0.0
    worker: bool = False

    def warmed_s(self, gpu_s: float) -> float:
        """GPU seconds of a chunk that follows a chunk at once."""
        return gpu_s + self.warm_share * min(gpu_s, WARM_S)

    def cooled_s(self, chunk_s: float, low: float = 0.0) -> float:
        """GPU seconds that decodes lose after an iteration with chunks of `chunk_s`; `low`: how far clocks were down
        when it began."""
        return self.cool_share * min(chunk_s, WARM_S) * (1.0 - low)

    def scaled(self, factor: float) -> Host:
        """A host that takes `factor` times as long for everything; how long its drift is held does not change."""

        def times(value: Any) -> Any:
            return tuple(times(item) for item in value) if isinstance(value, tuple) else value * factor

        kept = ("drift_hold_s", "warm_share", "cool_share", "worker")  # no times of the host
        names = [item.name for item in fields(self) if item.name not in kept]
        return replace(self, **{name: times(getattr(self, name)) for name in names})


# Two H200s, vLLM 0.25.1: from schedule to launch 0.11 to 0.17 ms (0.03 to 0.05 in one process); a launch from idle to
# its results, less the GPU's work, 0.4 ms longer than in one process. Launches themselves take as long.
DISPATCH_S, WORKER_RETURN_S = 0.1e-3, 0.4e-3


def worker_host(host: Host) -> Host:
    """The same machine where workers launch (tensor parallelism), from its host where the engine's thread does."""
    return replace(
        host,
        worker=True,
        schedule_s=host.schedule_s + DISPATCH_S,
        return_s=host.return_s + WORKER_RETURN_S,
        interference_per_token_s=0.0,
    )


class Clocks:
    """How far chunks have pulled the GPU's clocks down for decodes: 0 to 1."""

    __slots__ = ("_low", "_then_s")

    def __init__(self) -> None:
        self._low = self._then_s = 0.0

    def after_chunk(self, end_s: float, chunk_s: float) -> float:
        """How far they were down when an iteration with chunks began that has ended at `end_s` after `chunk_s`."""
        low = self._low * exp(min(self._then_s - end_s + chunk_s, 0.0) / RECOVERY_S)
        self._low = low + min(chunk_s / WARM_S, 1.0) * (1.0 - low)
        self._then_s = end_s
        return low


class LaunchNoise:
    """How far each launch is from its mean: a drift of the host's speed, held for a while, plus independent jitter.

    Recorded launches 50 ms apart are alike (correlation 0.6 to 0.7), those half a second apart are not; and a few per
    cent stall on their own. Drift: a rank drawn uniformly and held for an exponentially distributed time.
    Full graphs are never asked: their launch hides behind the GPU.
    """

    def __init__(self, host: Host, seed: int) -> None:
        self._jitter, self._drift, self._hold_s = host.launch_jitter_s, host.launch_drift_s, host.drift_hold_s
        self._random = Random(seed)
        self._rank, self._until_s = 0.0, -inf

    def draw(self, mode: int, now_s: float) -> float:
        noise_s = 0.0
        drift, jitter = self._drift[mode], self._jitter[mode]
        if drift:
            if now_s >= self._until_s:
                self._rank = self._random.random()
                self._until_s = now_s + (self._random.expovariate(1.0 / self._hold_s) if self._hold_s > 0.0 else 0.0)
            noise_s = drift[int(self._rank * len(drift))]
        if jitter:
            noise_s += jitter[int(self._random.random() * len(jitter))]
        return noise_s


class CostModel(Protocol):
    """GPU seconds of iterations; `host` for the rest. Never returns 0 or less for an iteration that has tokens."""

    kind: str  # "profile", "roofline" or "constant": printed with every result
    label: str  # one line: which profile, its measured error; or which facts a roofline used
    host: Host

    def mode(self, tokens: int, chunks: int) -> int:
        """How an iteration of `tokens` tokens is launched, `chunks` of its requests being multi-token prefills."""

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        """Consecutive pure-decode iterations of `seqs` requests, `kv_tokens` cached before the first."""

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float) -> float:
        """An iteration with prefill chunks (new, already computed) beside `seqs` decodes."""

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        """Boolean array: which rows of the iteration log lie outside the range this model was measured on."""


class LongestCost(CostModel, Protocol):
    """One that asks for the longest context: it has `reads_longest` set."""

    reads_longest: bool

    def mixed_s(
        self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float = 0.0
    ) -> float: ...
