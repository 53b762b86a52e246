"""Shortest remaining first: who has the least (predicted) answer left runs; the others are preempted for them.

    remaining = predicted answer - tokens generated

At every iteration those with the least remaining that fit are to run, whether they wait or run (arXiv 2408.15792,
algorithm 1). All that decode lose one remaining token an iteration, so their order stays; those that wait lose none. So
a running request is overtaken only by one that arrives or comes back: no work in between. Remaining may fall below 0
(the prediction was too short): ever more urgent. Needs lengths: of a rank there is no remainder; with ranks use sjf.

A preempted request is paused where a slot was wanted; where KV blocks were, `when_full` decides
(`llmsim.schedulers.preemptive`). What recomputing or copying costs is no part of the key, so with a full KV cache
recompute can do far worse than sjf, which preempts nobody. The guard against starvation is that
of section 4.3 (`llmsim.schedulers.starvation`); a promoted request is not preempted before its quantum is used up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.plugins import PolicyError
from llmsim.schedulers.heap import Key
from llmsim.schedulers.ordered import predicted_tokens
from llmsim.schedulers.preemptive import Preemptive
from llmsim.schedulers.starvation import Guard

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class ShortestRemaining(Preemptive):
    """`starvation_iterations`: passed over so often in a row (0: never), it goes first for `quantum_iterations`."""

    def __init__(
        self,
        base: str = "vllm",
        base_args: dict[str, Any] | None = None,
        when_full: str = "auto",
        starvation_iterations: int = 0,
        quantum_iterations: int = 100,
    ) -> None:
        super().__init__(base, base_args, when_full)
        self.guard = Guard(starvation_iterations, quantum_iterations)
        self._base_arrived = getattr(self.base, "arrived", None)

    def key(self, request: Request) -> Key:
        made = self._engine.batch.iteration - request.joined if request.joined >= 0 else 0
        return self._key(request, made)

    def standing(self, request: Request) -> Key:
        """What will be left when the batch's iteration is 0, as it were: the same for as long as it decodes."""
        return self._key(request, -(request.joined if request.joined >= 0 else self._engine.batch.iteration))

    def _key(self, request: Request, made: int) -> Key:
        promotion = self.guard.promoted.get(request)
        if promotion is not None:
            return 0, promotion, 0.0, 0
        predicted = predicted_tokens(request)
        if predicted < 1.0:
            raise PolicyError(
                f"{type(self).__name__} needs lengths, and predicted_tokens={predicted:g} of request {request.id} is a"
                " rank: use sjf, or predictions in tokens."
            )
        return 1, predicted - request.generated_tokens - made, request.arrival_s, request.id

    def arrived(self, request: Request, now_s: float) -> None:
        self.guard.waits(request)
        if self._base_arrived is not None:
            self._base_arrived(request, now_s)

    def ended(self, request: Request, now_s: float) -> None:
        self.guard.forget(request)
        super().ended(request, now_s)

    def starts(self, request: Request) -> None:
        self.guard.runs(request)

    def stops(self, request: Request) -> None:
        self.guard.waits(request)

    def update(self, replica: Replica, now_s: float) -> None:
        self.guard.before(replica, self.moved)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        hold = super().schedule(replica, now_s)
        self.guard.after(replica)
        return hold

    def lasts(self, replica: Replica) -> None:
        iterations = self.guard.lasts(quanta=True) if self.guard.threshold else 0
        if iterations:
            replica.hold_for(iterations)
