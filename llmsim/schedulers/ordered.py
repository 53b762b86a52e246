"""Orders that wrap a base policy: who goes first is one question, what an iteration holds another.

    llmsim replay TRACE --scheduler sjf --scheduler-arg base=sarathi --scheduler-arg base_args='{"token_budget": 512}'

An order gives the queue's sort key (or the queue itself) and may act before and after the base's `schedule`; the base
decides admission, chunks and preemption as it always does, on the queue it finds. `base` is a built-in or the user's
own file.py:Class, `base_args` its arguments. What the order does not define is the base's: its `victim`, its hooks.

A base has to take requests from the front of `replica.waiting`. One that brings an order of its own (vllm with
policy=priority, or another order) or that keeps its own queue cannot be wrapped, and says so.

`fcfs` is here: order of arrival, whatever the base would do with preempted requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from llmsim.schedulers import load_scheduler

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

OWN_QUEUES = {  # built-ins that do not take requests from the front of replica.waiting
    "vllm-native": "it drives vLLM's own scheduler, which keeps its own queue",
}


class Ordered(ABC):
    """A base policy whose queue has another order; `base` and `base_args` as `--scheduler` and its arguments."""

    def __init__(self, base: str = "vllm", base_args: dict[str, Any] | None = None) -> None:
        self.base = load_base(type(self).__name__, base, base_args)
        victim = getattr(type(self), "victim", None)
        if victim is not None:  # a base that chooses its victims itself asks the order instead
            self.base.victim = self.victim

    def __getattr__(self, name: str) -> Any:
        """What an order does not define is the base's; an attribute that neither has does not exist."""
        if name == "base":  # not there yet: __init__ has failed
            raise AttributeError(name)
        return getattr(self.base, name)

    @abstractmethod
    def order(self, request: Request) -> Any:
        """The queue's sort key, fixed while a request waits."""

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        answer: bool | None = self.base.schedule(replica, now_s)
        return answer


class FirstCome(Ordered):
    """In order of arrival; a preempted request goes back to its place in it, not to the front."""

    def order(self, request: Request) -> tuple[float, int]:
        return request.arrival_s, request.id


def load_base(order: str, base: str, base_args: dict[str, Any] | None) -> Any:
    """The base policy, or a ValueError that says why `order` cannot wrap it."""
    if base_args is not None and not isinstance(base_args, dict):
        raise ValueError(f'{order}: base_args={base_args!r} is no table: give JSON such as {{"headroom": 0.02}}')
    if base in OWN_QUEUES:
        raise ValueError(f"{order}: base={base} cannot be given another order: {OWN_QUEUES[base]}. Give another base.")
    made = load_scheduler(base, base_args)
    if getattr(made, "order", None) is not None or getattr(made, "queue", None) is not None:
        raise ValueError(
            f"{order}: base={base} with {base_args or 'these arguments'} has an order of its own, and a queue has one:"
            " give a base that takes requests as they come"
        )
    return made


def predicted_tokens(request: Request) -> float:
    """How long its answer will be, as far as the policy knows; without predictions in the trace, exactly."""
    predicted = request.predicted_tokens
    return predicted if predicted == predicted else float(request.output_tokens)  # nan: nobody foretold it


def spare_blocks(base: Any, replica: Replica) -> int:
    """KV blocks that a base leaves free at admission (`watermark` of vllm, `headroom` of chunked)."""
    share = getattr(base, "watermark", None) or getattr(base, "headroom", None) or 0.0
    return int(share * (replica.kv.total_blocks + 1)) if replica.running else 0
