"""Priority classes: the most urgent class first, within it in order of arrival.

    key = place of the request's class in `classes`, arrival          with classes="interactive,batch"
    key = the request's priority (lower first, as in vLLM), arrival    without

When KV blocks run short, the least urgent running request leaves, of equals the latest (vLLM V1's rule for
policy=priority, v1/core/sched/scheduler.py). Running requests are not preempted to make room for urgent ones: an
urgent request waits for a slot, at the front of the queue. Low classes starve for as long as high ones fill the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsim.plugins import PolicyError
from llmsim.schedulers.ordered import Ordered

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


class PriorityClasses(Ordered):
    """`classes`: the trace's classes, most urgent first, separated by commas; empty: by the trace's priorities."""

    def __init__(self, base: str = "vllm", base_args: dict[str, Any] | None = None, classes: str = "") -> None:
        super().__init__(base, base_args)
        names = [name.strip() for name in classes.split(",")] if classes else []
        if len(set(names)) != len(names) or not all(names):
            raise ValueError(f"classes={classes!r}: give different names, separated by commas, most urgent first")
        self._place = {name: place for place, name in enumerate(names)}

    def urgency(self, request: Request) -> int:
        """Lower is more urgent."""
        if not self._place:
            return request.priority
        try:
            return self._place[request.slo_class]
        except KeyError:
            known = ", ".join(self._place)
            raise PolicyError(
                f"PriorityClasses: request {request.id} has class {request.slo_class!r}, which is not among {known}:"
                " name every class of the trace in classes"
            ) from None

    def order(self, request: Request) -> tuple[float, ...]:
        return self.urgency(request), request.arrival_s, request.id

    def victim(self, replica: Replica) -> Request:
        """Who leaves when blocks run short."""
        return max(replica.running, key=lambda request: (self.urgency(request), request.arrival_s, request.id))
