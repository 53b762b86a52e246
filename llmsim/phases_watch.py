"""A replica that is watched: iterations one at a time, each noted as it is launched (symbols of docs/architecture.md).

schedule    of iteration k on the host, S(k) to x0(k)
launch      x0(k) to L(k); with tensor parallelism by a worker
update      taking an iteration's results, U(k-1) to S(k+1)
gpu         max(E(k-1), x0(k) + lead) to E(k); waits_for_launch: E(k) is the launch's end plus its tail
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llmsim.macrostep import Plan, Step
from llmsim.replica import Replica


class Chunk(NamedTuple):
    """What one request gets computed in an iteration."""

    request: int
    kind: str  # prefill or decode
    tokens: int
    computed_tokens: int  # before


class Noted(NamedTuple):
    """One iteration, seconds of the simulation."""

    schedule_s: float
    scheduled_s: float
    launch_s: float
    launched_s: float
    gpu_begin_s: float
    gpu_end_s: float
    gpu_s: float
    prefill_share: float  # of gpu_s: what the chunks take by themselves
    mode: int
    waits_for_launch: bool
    chunks: tuple[Chunk, ...]


class Watched(Replica):
    """A replica that takes iterations one at a time and notes them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.noted: list[Noted] = []
        self.updates: list[tuple[float, float]] = []

    def _long_run(self, step: Step, second_s: float) -> Plan | None:
        return None

    def _log(self, step: Step, steps: int, gpu_end_s: float) -> None:
        host, mode = self.cost.host, step.mode
        self.noted.append(
            Noted(
                schedule_s=step.schedule_s,
                scheduled_s=step.free_s if host.worker else step.launch_s,
                launch_s=step.launch_s,
                launched_s=step.launched_s,
                gpu_begin_s=max(self._gpu_s, step.launch_s + host.lead_s[mode]),
                gpu_end_s=gpu_end_s,
                gpu_s=step.gpu.first_s,
                prefill_share=self._prefill_share(step),
                mode=mode,
                waits_for_launch=gpu_end_s <= step.launched_s + host.tail_s[mode],
                chunks=tuple(self._computed()),
            )
        )
        super()._log(step, steps, gpu_end_s)

    def _prefill_share(self, step: Step) -> float:
        if not step.chunks:
            return 0.0
        alone_s = self.cost.mixed_s(step.chunks, 0, 0)
        return min(alone_s / self.cost.mixed_s(step.chunks, step.seqs, step.kv_tokens), 1.0)

    def _computed(self) -> Iterator[Chunk]:
        for request, tokens, computed in self.chunks:
            yield Chunk(request.id, "prefill", tokens, computed)
        if self.decoding:
            now = self.batch.iteration
            for request in self.batch:
                yield Chunk(request.id, "decode", 1, request.computed_tokens + now - request.joined)

    def _take(self, flight: Any, taken_s: float) -> float:
        done_s = super()._take(flight, taken_s)
        self.updates.append((taken_s, done_s))
        return done_s
