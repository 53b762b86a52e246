"""A replica that tells somebody what happens in it: the seam for everything that explains a run.

The loop of `llmsim.replica` knows nothing of observers: an observed fleet is made of another class, whose methods do
what they always did and then tell the `Observer`. So observing costs nothing when it is off, and as an observer may
only look, a run is the same to the byte with and without one.

    received    a request has passed the client side and is schedulable
    decided     the policy has answered for the iteration that begins to be scheduled now
    vacated     a running request has lost its slot and its KV blocks (preempted, or swapped out), and for whom
    parked      a running request has been set aside with its KV blocks, or goes on
    logged      an iteration, or a run of decodes, has been booked
    ended       ... and with it the last token of these requests
    seen        clients have seen the tokens of what was booked last

Per iteration k they come in the order of the engine's thread: decided(k), seen(k-1), logged(k), ended(k); received at
any time between two of them.
"""

from __future__ import annotations

from typing import Any

from llmsim.kvcache import Hit
from llmsim.macrostep import Step
from llmsim.replica import Replica
from llmsim.request import Request


class Observer:
    """What one replica tells; override what is wanted. What is passed may be looked at, and not changed."""

    def received(self, replica: Replica, request: Request, ready_s: float) -> None: ...

    def decided(self, replica: Replica, asked: Asked) -> None: ...

    def vacated(self, replica: Replica, request: Request, beneficiary: Request | None) -> None: ...

    def parked(self, replica: Replica, request: Request, on: bool) -> None: ...

    def logged(self, replica: Replica, step: Step, steps: int, gpu_end_s: float) -> None: ...

    def ended(self, replica: Replica, requests: list[Request]) -> None: ...

    def seen(self, replica: Replica, seen_s: float) -> None: ...


class Asked:
    """What the policy looked at and did in one answer, beside what the replica shows."""

    __slots__ = ("admitted", "hit", "looked_up", "refused")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.looked_up: Request | None = None  # in the prefix cache, last
        self.hit: Hit | None = None  # what was found of it
        self.refused: Request | None = None  # given tokens that had no room, last
        self.admitted: list[Request] = []


class Observed(Replica):
    """Stands before `Replica` or a subclass of it in a class made by `observed`."""

    def __init__(self, *args: Any, observer: Observer, **settings: Any) -> None:
        self._observer = observer
        self._asked = Asked()
        self._leaving: list[Request] = []  # whose blocks nobody has taken yet
        super().__init__(*args, **settings)

    # ---- what policies do

    def begin(self, now_s: float) -> bool:
        self._asked.clear()
        hold = super().begin(now_s)
        self._tell_leaving(None)
        self._observer.decided(self, self._asked)
        return hold

    def look_up(self, request: Request) -> Hit:
        hit = super().look_up(request)
        self._asked.looked_up, self._asked.hit = request, hit
        return hit

    def prefill(self, request: Request, tokens: int, hit: Hit | None = None, padding_tokens: int = 0) -> bool:
        running = request in self.running
        fits = super().prefill(request, tokens, hit, padding_tokens)
        if not fits:
            self._asked.refused = request
        elif not running:
            self._asked.admitted.append(request)
        if fits:
            self._tell_leaving(request)
        return fits

    def decode_one(self, request: Request) -> None:
        super().decode_one(request)
        self._tell_leaving(request)

    def decode_if_room(self) -> bool:
        needy = None
        if self._leaving:
            needy = next((member for member in self.batch if self.batch.needs_block(member)), None)
        fits = super().decode_if_room()
        if fits:
            self._tell_leaving(needy)
        return fits

    def swap_in(self, request: Request) -> bool:
        fits = super().swap_in(request)
        if fits:
            self._asked.admitted.append(request)
        return fits

    def _send_back(self, request: Request) -> None:
        self._leaving.append(request)
        super()._send_back(request)

    def _tell_leaving(self, beneficiary: Request | None) -> None:
        if self._leaving:
            for request in self._leaving:
                self._observer.vacated(self, request, None if beneficiary is request else beneficiary)
            self._leaving.clear()

    def pause(self, request: Request) -> None:
        super().pause(request)
        self._observer.parked(self, request, True)

    def resume(self, request: Request) -> None:
        super().resume(request)
        self._observer.parked(self, request, False)

    # ---- the loop

    def _receive(self) -> None:
        request, ready_s = self._next, self.next_ready_s
        assert request is not None
        super()._receive()
        self._observer.received(self, request, ready_s)

    def _log(self, step: Step, steps: int, gpu_end_s: float) -> None:
        super()._log(step, steps, gpu_end_s)
        self._observer.logged(self, step, steps, gpu_end_s)

    def commit(self, steps: int) -> list[Request]:
        ended = super().commit(steps)
        if ended:
            self._observer.ended(self, ended)
        return ended

    def _take(self, flight: Any, taken_s: float) -> float:
        updated_s = super()._take(flight, taken_s)
        self._observer.seen(self, self._emitted_s)
        return updated_s

    def _finish_run(self, step: Step, plan: Any, steps: int) -> None:
        super()._finish_run(step, plan, steps)
        if not self.asynchronous:  # else its last results are in flight
            self._observer.seen(self, self._emitted_s)


def observed(made: type[Replica]) -> type[Observed]:
    """The same kind of replica, observed: its constructor takes `observer` too."""
    return type(f"Observed{made.__name__}", (Observed,) if made is Replica else (Observed, made), {})
