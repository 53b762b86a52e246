"""A policy on an engine without a clock, stepped by hand: what each iteration computes."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmsim.engine import Engine, Limits
from llmsim.kvcache import KVCache
from llmsim.request import Request


class Iteration(NamedTuple):
    decodes: list[int]  # ids, sorted
    chunks: dict[int, int]  # tokens by id
    preempted: list[int]
    held: bool


class Stepped:
    """Results are known one iteration later with `asynchronous`, as on a replica."""

    def __init__(
        self, policy: Any, kv: KVCache, *, seqs: int = 256, budget: int = 8192, asynchronous: bool = False
    ) -> None:
        self.engine = Engine(policy, kv, Limits(seqs, budget), asynchronous=asynchronous)
        self.asynchronous = asynchronous
        self.finished: list[int] = []
        self._in_flight: list[Request] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.engine.waiting.append(request)
            if self.engine._on_arrived is not None:
                self.engine._on_arrived(request, request.arrival_s)

    def step(self, now_s: float = 0.0) -> Iteration:
        engine = self.engine
        held = engine.begin(now_s)
        decodes = sorted(request.id for request in engine.batch) if engine.decoding else []
        chunks = {request.id: tokens for request, tokens, _ in engine.chunks}
        preempted = [request.id for request in engine.preempted_now]
        ended = engine.commit(1)
        taken, self._in_flight = (self._in_flight, ended) if self.asynchronous else (ended, [])
        engine.free(taken)
        self.finished += [request.id for request in taken]
        return Iteration(decodes, chunks, preempted, held)

    def run(self, limit: int = 10_000) -> list[Iteration]:
        """Until everybody has finished."""
        steps = []
        while self.engine.waiting or self.engine.running:
            steps.append(self.step())
            assert len(steps) < limit, "nothing moves"
        return steps


def request_of(id_: int, prompt: int, output: int, **more: Any) -> Request:
    return Request(id_, float(id_), prompt, output, **more)
