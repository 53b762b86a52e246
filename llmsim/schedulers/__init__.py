"""Scheduling policies: one per file, plain classes, no registration.

A policy is a class with one method, `schedule(replica, now_s)`, called before every iteration. It says what the
iteration does by acting on the replica:

    replica.decode()                  every decoding request makes a token (preempting the newest if blocks run short)
    replica.prefill(request, tokens)  compute that many more of a waiting or half-prefilled prompt; False: no room
    replica.preempt(request)          back to the queue; its blocks are free at once
    replica.pause(request)            it keeps its blocks and computes nothing until resume(request), before decode()
    replica.swap_out(request)         back to the queue, its KV in host memory until swap_in(request); False: no room
    replica.reject(request)           a waiting request is turned away
    replica.ghosts(seqs, kv_tokens)   rows that decode from now on though nobody wants their tokens
    replica.hand_out()                of a policy with `streams = False`: clients see the answers that are complete

and reads `replica.waiting` (queue, in order), `replica.prefilling` (half-prefilled, oldest first), `replica.batch`
(decoding), `replica.running` (all that hold a slot, oldest first), `replica.kv` and `replica.limits`.
It may return HOLD: "my answer stays the same until a request arrives or ends, or blocks run short"; the replica then
runs many iterations at once, or at most `replica.hold_for(iterations)`, or until `replica.hold_until(time_s)`. Without
HOLD it is asked before each one: slower, and never wrong. If it schedules nothing although requests wait, it says until
when: `replica.wait_until(time_s)`.

Optional: `order(request)`, the queue's sort key, fixed while a request waits (default: order of arrival, preempted ones
first), `victim(replica)`, who leaves when blocks run short (default: the newest), `arrived(request, now_s)` and
`ended(request, now_s)`: a request became schedulable; its blocks are free, or it was rejected.

`load_scheduler("vllm")` finds a built-in; `load_scheduler("my_policy.py:Mine")` a class in the user's own file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from llmsim.plugins import PolicyError, load_plugin

if TYPE_CHECKING:
    from llmsim.replica import Replica

__all__ = ["BUILTIN", "HOLD", "PolicyError", "Scheduler", "load_scheduler"]

HOLD = True

BUILTIN = {
    "vllm": "llmsim.schedulers.vllm:VllmScheduler",
    "chunked": "llmsim.schedulers.chunked:Chunked",
    "static": "llmsim.schedulers.static:StaticBatching",
    "dynamic": "llmsim.schedulers.dynamic:DynamicBatching",
    "orca": "llmsim.schedulers.orca:Orca",
    "vllm-v0": "llmsim.schedulers.vllm_v0:VllmV0",
    "sarathi": "llmsim.schedulers.sarathi:Sarathi",
}


class Scheduler(Protocol):
    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        """Act on the replica for the next iteration; return HOLD if the answer lasts."""


def load_scheduler(spec: str, arguments: dict[str, Any] | None = None) -> Any:
    """A policy by name, or from the user's own file."""
    return load_plugin(
        spec,
        arguments,
        kind="scheduler",
        builtin=BUILTIN,
        method="schedule",
        signature="schedule(self, replica, now_s)",
    )
