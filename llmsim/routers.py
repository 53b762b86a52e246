"""Which replica takes a request.

A router is a class with one method, `route(request, replicas, now_s) -> Replica`, asked when the client sends the
request. `replica.outstanding` is the number of requests it has been sent and has not answered. A router whose answer
does not depend on the replicas' state says so with `stateless = True`: it may then be asked ahead of time.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from llmsim.plugins import load_plugin

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

BUILTIN = {
    "round_robin": "llmsim.routers:RoundRobin",
    "least_outstanding": "llmsim.routers:LeastOutstanding",
}


class Router(Protocol):
    def route(self, request: Request, replicas: list[Replica], now_s: float) -> Replica: ...


class RoundRobin:
    """Each replica in turn."""

    stateless = True

    def __init__(self) -> None:
        self._next = 0

    def route(self, request: Request, replicas: list[Replica], now_s: float) -> Replica:
        replica = replicas[self._next]
        self._next = (self._next + 1) % len(replicas)
        return replica


class LeastOutstanding:
    """The replica with the fewest unanswered requests; the first of those with equally many."""

    def route(self, request: Request, replicas: list[Replica], now_s: float) -> Replica:
        return min(replicas, key=attrgetter("outstanding"))


def load_router(spec: str, arguments: dict[str, Any] | None = None) -> Any:
    """A router by name, or from the user's own file."""
    return load_plugin(
        spec,
        arguments,
        kind="router",
        builtin=BUILTIN,
        method="route",
        signature="route(self, request, replicas, now_s)",
    )
