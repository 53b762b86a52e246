"""The waiting requests of one replica, kept in the policy's order.

Requests mostly join at the end and leave at the front, so the queue is a list with a moving front: both ends cost the
same at any depth. Only a request that jumps the queue moves the ones behind it (one memmove).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any

from llmsim.request import Request


class WaitingQueue:
    """Requests in order of `order(request)` (a key fixed while it waits), or in order of arrival if there is none."""

    __slots__ = ("_first", "_order", "_requests", "prefill_tokens", "size")

    def __init__(self, order: Callable[[Request], Any] | None = None) -> None:
        self._order = order
        self._requests: list[Request] = []
        self._first = 0  # front of the queue in _requests; what lies before it has left
        self.size = 0  # = len(self), which costs a call
        self.prefill_tokens = 0  # of all of them, to compute before their next tokens

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Request]:
        """From the front; a copy, so that requests may leave meanwhile."""
        return iter(self._requests[self._first :])

    @property
    def head(self) -> Request:
        return self._requests[self._first]

    def first(self, count: int) -> list[Request]:
        """The `count` requests at the front, or as many as there are."""
        return self._requests[self._first : self._first + count]

    def append(self, request: Request) -> None:
        """A new arrival: to its place, or to the end if the policy has no order."""
        self.size += 1
        self.prefill_tokens += request.prompt_tokens
        if self._order is None:
            self._requests.append(request)
        else:
            self._insert(request)

    def _insert(self, request: Request) -> None:
        requests, order = self._requests, self._order
        if order is None or len(requests) == self._first or order(requests[-1]) <= order(request):
            requests.append(request)
        else:
            insort(requests, request, lo=self._first, key=order)

    def put_back(self, request: Request) -> None:
        """A preempted request: to its place, or to the very front if the policy has no order."""
        self.size += 1
        self.prefill_tokens += request.prefill_tokens
        if self._order is not None:
            self._insert(request)
        elif self._first:
            self._first -= 1
            self._requests[self._first] = request
        else:
            self._requests.insert(0, request)

    def pop(self) -> Request:
        """Take the front request."""
        first, requests = self._first, self._requests
        request = requests[first]
        self.size -= 1
        self.prefill_tokens -= request.prompt_tokens + request.generated_tokens
        first += 1
        if first > 1024 and first * 2 > len(requests):
            del requests[:first]
            first = 0
        self._first = first
        return request

    def remove(self, request: Request) -> None:
        """Take a request from anywhere in the queue."""
        if self.head is request:
            self.pop()
            return
        requests, order = self._requests, self._order
        at = bisect_left(requests, order(request), lo=self._first, key=order) if order is not None else self._first
        while requests[at] is not request:
            at += 1
        del requests[at]
        self.size -= 1
        self.prefill_tokens -= request.prefill_tokens
