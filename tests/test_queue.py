"""The waiting queue against a plain list, in order of arrival and in a policy's order."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from llmsim.queue import WaitingQueue
from llmsim.request import Request


def by_length(request: Request) -> tuple[int, int]:
    return request.prompt_tokens, request.id


def made(id_: int, prompt: int = 1) -> Request:
    return Request(id_, 0.0, prompt, 1)


def test_first_come_first_served() -> None:
    queue = WaitingQueue()
    a, b, c = made(0), made(1), made(2)
    for request in (a, b, c):
        queue.append(request)
    assert queue.head is a
    assert [queue.pop(), queue.pop()] == [a, b]
    assert list(queue) == [c]


def test_a_preempted_request_goes_to_the_very_front() -> None:
    queue = WaitingQueue()
    a, b, c = made(0), made(1), made(2)
    queue.append(b)
    queue.put_back(a)  # the front has not moved yet
    assert list(queue) == [a, b]
    queue.pop()
    queue.put_back(c)  # into the room that a left
    assert list(queue) == [c, b]


def test_with_an_order_arrivals_and_preempted_requests_go_to_their_place() -> None:
    queue = WaitingQueue(by_length)
    requests = [made(i, prompt) for i, prompt in enumerate([50, 10, 30, 10, 70])]
    for request in requests[:4]:
        queue.append(request)
    queue.put_back(requests[4])
    assert [request.id for request in queue] == [1, 3, 2, 0, 4]


def test_equal_keys_keep_the_order_of_arrival() -> None:
    queue = WaitingQueue(lambda request: request.prompt_tokens)
    requests = [made(i, 5) for i in range(4)]
    for request in requests:
        queue.append(request)
    queue.append(made(9, 1))
    assert [request.id for request in queue] == [9, 0, 1, 2, 3]
    queue.remove(requests[2])  # found among its equals
    assert [request.id for request in queue] == [9, 0, 1, 3]


def test_requests_may_leave_while_the_queue_is_read() -> None:
    queue = WaitingQueue()
    for i in range(6):
        queue.append(made(i))
    seen = []
    for request in queue:
        seen.append(request.id)
        queue.remove(request)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert len(queue) == 0


@pytest.mark.parametrize("order", [None, by_length], ids=["arrival", "shortest first"])
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_a_list(order: Callable[[Request], tuple[int, int]] | None, seed: int) -> None:
    """Deep enough, while it grows and while it drains, that the room of those who left is given back (beyond 1024)."""
    random = Random(seed)
    queue, plain, left = WaitingQueue(order), list[Request](), list[Request]()
    growing, deepest = True, 0
    for id_ in range(8000):
        if len(plain) in (0, 1600):
            growing = not plain
        act = random.choices(("append", "put back", "remove", "pop"), (6, 1, 1, 2) if growing else (1, 1, 1, 7))[0]
        if act == "append" or not plain:
            plain.append(made(id_, random.randrange(100)))
            queue.append(plain[-1])
        elif act == "put back" and left:
            plain.insert(0, left.pop())
            queue.put_back(plain[0])
        elif act == "remove":
            request = plain.pop(random.randrange(min(len(plain), 40)))
            queue.remove(request)
        else:
            left.append(plain.pop(0))
            assert queue.pop() is left[-1]
        if order is not None and act in ("append", "put back"):
            plain.sort(key=order)
        assert queue.size == len(queue) == len(plain)
        if plain:
            assert queue.head is plain[0]
        if id_ % 50 == 0:
            assert list(queue) == plain
        deepest = max(deepest, len(plain))
    assert deepest > 1500
    while plain:
        assert queue.pop() is plain.pop(0)
