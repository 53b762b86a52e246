"""A heap of requests whose keys may be replaced: who is most, or least, urgent without a walk over all of them."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.request import Request

Key = tuple[float, ...]


class Heap:
    """Requests by a key, the smallest or (`sign` -1) the largest first; the latest entry of each counts."""

    def __init__(self, sign: int = 1) -> None:
        self._sign = sign
        self._entries: list[tuple[Key, int, Request]] = []
        self._tickets: dict[Request, int] = {}
        self._ticket = 0

    def put(self, request: Request, key: Key) -> None:
        self._ticket += 1
        self._tickets[request] = self._ticket
        if len(self._entries) > 4 * len(self._tickets) + 64:  # entries that were replaced may never come up
            self._entries = [entry for entry in self._entries if self._tickets.get(entry[2]) == entry[1]]
            heapify(self._entries)
        heappush(self._entries, (tuple(self._sign * part for part in key), self._ticket, request))

    def drop(self, request: Request) -> None:
        self._tickets.pop(request, None)

    def __contains__(self, request: object) -> bool:
        return request in self._tickets

    @property
    def top(self) -> Request | None:
        entries, tickets = self._entries, self._tickets
        while entries and tickets.get(entries[0][2]) != entries[0][1]:
            heappop(entries)
        return entries[0][2] if entries else None
