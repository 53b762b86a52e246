"""SGLang's scheduling round in plain lists over a tree of full token paths; no clock.

Written from the rules in docs/policies/sglang.md, sharing nothing with `llmsim.schedulers` and `llmsim.radixcache`.
Pages of `page` tokens; results are known one round later with `asynchronous`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plain_radix import PlainRadix

CLIP = 4096


@dataclass(eq=False)
class PlainRequest:
    id: int
    prompt: int
    output: int
    priority: int
    tokens: tuple[Any, ...]  # prompt and answer, one more
    generated: int = 0
    computed: int = 0
    seen: int = 0  # prompt tokens computed for others when it came

    @property
    def known(self) -> int:
        return self.prompt + self.generated


@dataclass
class PlainSglang:
    pages: int
    page: int
    seqs: int
    chunk: int
    asynchronous: bool = False
    policy: str = "fcfs"
    conservativeness: float = 1.0
    input_tokens: int = 16384
    mixed: bool = False
    interval: int = 0
    priorities: bool = False
    threshold: int = 10
    waiting: list[PlainRequest] = field(default_factory=list)
    running: list[PlainRequest] = field(default_factory=list)  # decoding
    chunked: PlainRequest | None = None
    finished: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = PlainRadix(self.pages, self.page)
        self.first = min(0.7 * self.conservativeness, 1.0)
        self.ratio = self.first
        self.full = False
        self.due = 0  # decode rounds before the next prefill
        self.computed = 0
        self.in_flight: list[PlainRequest] = []  # ended, results not taken
        self.stored: list[tuple[PlainRequest, int, bool]] = []
        self.left = False

    # ---- a round

    def step(self) -> tuple[list[int], dict[int, int], list[int]]:
        self._insert()
        if self.left:
            self.full = self.left = False
        if not self._held() and not self.waiting:
            self.ratio = self.first
        self.preempted: list[int] = []
        chunks = self._prefill()
        decodes: list[PlainRequest] = []
        if chunks and self.mixed and self._pages_for_a_step() <= self.tree.empty + self.tree.idle:
            decodes = list(self.running)
        if not chunks and self.running:
            self._make_room()
            decodes = list(self.running)
            self.due = max(0, self.due - 1)
        for request in decodes:
            request.computed += 1
            self.tree.grow(request, request.computed)
        ended = self._book(decodes, chunks)
        taken, self.in_flight = (self.in_flight, ended) if self.asynchronous else (ended, [])
        for request in taken:
            self.stored = [item for item in self.stored if item[0] is not request]
            self.tree.leave(request, request.tokens[: request.computed])
            self.finished.append(request.id)
            self.left = True
        return sorted(r.id for r in decodes), {r.id: n for r, n in chunks.items()}, self.preempted

    def _held(self) -> int:
        """Slots in use."""
        return len(self.running) + len(self.in_flight) + (self.chunked is not None)

    def _insert(self) -> None:
        again = []
        for request, tokens, in_flight in self.stored:
            if self.asynchronous and in_flight:
                again.append((request, tokens, False))
            else:
                self.tree.insert(request, request.tokens[:tokens])
        self.stored = again

    def _book(self, decodes: list[PlainRequest], chunks: dict[PlainRequest, int]) -> list[PlainRequest]:
        ended = []
        for request in decodes:
            request.generated += 1
            if request.generated == request.output:
                self.running.remove(request)
                ended.append(request)
        for request in chunks:
            complete = request.computed == request.known
            self.stored.append((request, request.computed, complete))
            if not complete:
                self.chunked = request
                continue
            if self.chunked is request:
                self.chunked = None
            request.generated += 1
            (self.running if request.generated < request.output else ended).append(request)
        self.computed += sum(chunks.values())
        if chunks:
            self.due = self.interval
        return ended

    # ---- prefill

    def _prefill(self) -> dict[PlainRequest, int]:
        if self.priorities:
            self.full = False
        if self.chunked is None and (self.full or not self.waiting):
            return {}
        if self.due and self.running:
            return {}
        if self.chunked is None and self._held() >= self.seqs and not self.priorities:
            self.full = True
            return {}
        rows = len(self.running) if self.mixed else 0
        self.rem_chunk, self.rem_input = self.chunk - rows, self.input_tokens - rows
        self.total = (self.tree.empty + self.tree.idle) * self.page - rows - sum(map(self._expected, self.running))
        chosen: dict[PlainRequest, int] = {}
        cut = False
        if self.chunked is not None:
            left = self.chunked.known - self.chunked.computed
            tokens = int(min(left, self.rem_chunk, self.total))
            if tokens <= 0:
                tokens = min(left, self.rem_chunk)
            room = (self.tree.empty + self.tree.idle) * self.page + -self.chunked.computed % self.page
            tokens = min(tokens, room)
            if tokens <= 0:
                return {}
            cut = tokens < left
            chosen[self.chunked] = tokens
            self._charge(tokens, 0 if cut else min(self.chunked.output, CLIP))
        if not cut:
            self._admit(chosen)
        for request, tokens in chosen.items():
            request.computed += tokens
            self.tree.grow(request, request.computed)
        return chosen

    def _expected(self, request: PlainRequest) -> float:
        return min(request.output - request.generated, CLIP) * self.ratio

    def _charge(self, tokens: int, answer: int) -> None:
        whole = -(-tokens // self.page) * self.page
        self.total -= whole + self.page + answer
        self.rem_input -= whole
        self.rem_chunk -= whole

    def _admit(self, chosen: dict[PlainRequest, int]) -> None:
        self._sort()
        held = self._held()
        new: list[PlainRequest] = []
        for request in list(self.waiting):
            if len(new) + self._held() >= self.seqs:
                self.full = True
            if self.full and not (self.priorities and self._make_way(request)):
                return
            found = self.tree.match(request.tokens[: request.known - 1])
            idle = self.tree.idle
            self.tree.locked[request], self.tree.total[request] = found, len(found) // self.page
            pinned = (idle - self.tree.idle) * self.page
            left = request.known - len(found)
            new_tokens = min(max(request.output - request.generated, 0), CLIP)
            tokens = left
            if -(-left // self.page) * self.page > self.rem_chunk:
                tokens = (len(found) + self.rem_chunk) // self.page * self.page - len(found)
            no_token = left + new_tokens + self.page >= self.total - pinned
            if no_token or tokens <= 0:
                del self.tree.locked[request], self.tree.total[request]
                if no_token:
                    self.full = bool(new or held)
                return
            self.total -= pinned
            self.waiting.remove(request)
            new.append(request)
            request.computed = len(found)
            chosen[request] = tokens
            self._charge(tokens, min(request.output, CLIP) if tokens == left else 0)
            if self.total <= 0:
                self.full = True
            if self.total <= 0 or tokens < left or self.rem_input <= 0 or self.rem_chunk <= 0:
                return

    def _make_way(self, request: PlainRequest) -> bool:
        found = self.tree.match(request.tokens[: request.known - 1])
        missing = request.known - len(found) + min(request.output, CLIP) - self.total
        victims: list[PlainRequest] = []
        for other in sorted(self.running, key=lambda r: (r.priority, -r.id)):
            if request.priority - other.priority <= self.threshold:
                break
            victims.append(other)
            missing -= self._expected(other)
            if missing <= 0:
                break
        if not victims or missing > 0:
            return False
        for other in victims:
            self.total += self._expected(other)
            before = self.tree.empty + self.tree.idle
            self._retract(other)
            self.total += (self.tree.empty + self.tree.idle - before) * self.page
        return True

    def _sort(self) -> None:
        if self.priorities:
            self.waiting.sort(key=lambda r: -r.priority)
        if self.policy == "lof":
            self.waiting.sort(key=lambda r: -r.output)
        if self.policy not in ("lpm", "hrrn") or len(self.waiting) > 128:
            return
        later, seen, cached = set(), [], {}
        for request in self.waiting:
            cached[request] = len(self.tree.match(request.tokens[: request.known - 1]))
            if cached[request] <= 32:
                known = request.tokens[: request.known]
                if any(other[:32] == known[:32] for other in seen if len(other) >= 32 and len(known) >= 32):
                    later.add(request)
                else:
                    seen.append(known)
        if self.policy == "lpm":
            self.waiting.sort(key=lambda r: (r in later, 0 if r in later else -cached[r]))
            return

        def response(request: PlainRequest) -> tuple[int, float, int]:
            left = request.prompt - cached[request]
            if request in later or left <= 0:
                return (1 if request in later else -1), 0.0, request.id
            return 0, -(self.computed - request.seen) / left, request.id

        self.waiting.sort(key=response)

    # ---- decode

    def _pages_for_a_step(self) -> int:
        return sum(request.computed % self.page == 0 for request in self.running)

    def _make_room(self) -> None:
        free = self.tree.empty + self.tree.idle
        if self._pages_for_a_step() <= free:
            self.ratio = max(self.ratio - self.first * (1 - 0.14) / 600, 0.14 * self.first)
            return
        leaving = sorted(self.running, key=lambda r: (r.generated, -r.prompt))
        while len(leaving) > 1:
            self._retract(leaving.pop(0))
            if self._pages_for_a_step() <= self.tree.empty + self.tree.idle:
                break
        stay = self.running
        self.ratio = min(1.0, (sum(r.generated for r in stay) + 20 * len(stay)) / (sum(r.output for r in stay) + 1))
        self.full = False
        if self._pages_for_a_step() > self.tree.empty + self.tree.idle:
            self._retract(leaving[0])

    def _retract(self, request: PlainRequest) -> None:
        self.running.remove(request)
        self.stored = [item for item in self.stored if item[0] is not request]
        del self.tree.locked[request], self.tree.total[request]  # what it had in the tree stays there
        request.computed = 0
        request.seen = self.computed
        self.preempted.append(request.id)
        self.waiting.append(request)
