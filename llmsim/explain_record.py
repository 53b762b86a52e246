"""The record that an explanation is made from: what happened in one replica, and to the requests in question.

Rows      one per logged iteration or run of decodes: when it was scheduled, when clients saw its (last) tokens, what it
          consisted of, how long the GPU took
Waits     one per answer of the policy that left requests waiting: which resource was short, and who is not let in
Trails    of each request in question: when it was schedulable, admitted, given chunks, preempted, set aside, ended

Which resource was short is asked of the engine after each answer, about the request that the policy looked at last and
did not admit, or else the head of the queue. The first of these that holds:

    kv       the answer preempted somebody, or found no room for a chunk
    seqs     as many requests run as max_num_seqs allows
    tokens   the iteration holds max_num_batched_tokens
    kv       the free KV blocks, less those the policy always keeps free (`watermark`, `headroom`), are fewer than that
             request's whole sequence so far needs beyond what the prefix cache has of it
    tokens   what is left of the iteration is less than its prompt
    policy   none of these: the policy's own rule
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from math import inf, nan
from typing import Any, NamedTuple

from llmsim.macrostep import Step
from llmsim.observed import Asked, Observer
from llmsim.queue import WaitingQueue
from llmsim.replica import Replica
from llmsim.request import Request
from llmsim.rowlog import RowLog

KV, SEQS, TOKENS, POLICY = range(4)
RESOURCES = ("kv", "seqs", "tokens", "policy")
ROW_COLUMNS = {
    "start_s": "f8", "steps": "i8", "decodes": "i4", "seqs": "i4", "kv_tokens": "i8", "drafts": "i4", "made": "i8",
    "gpu_s": "f8", "gpu_end_s": "f8", "first_chunk": "i8",
}  # fmt: skip
CHUNK_COLUMNS = {"request": "i8", "tokens": "i8", "computed": "i8"}
WAIT_COLUMNS = {
    "time_s": "f8", "resource": "i1", "blocked": "i8", "latest_s": "f8", "waiting": "i4", "running": "i4",
    "free_blocks": "i4", "needed_blocks": "i4", "preempted": "i4",
}  # fmt: skip


class Event(NamedTuple):
    what: str  # admitted, resumed, vacated, parked
    time_s: float  # the schedule
    row: int  # the first that it concerns
    decoding: bool  # admitted, resumed: goes on decoding; vacated: a token of its may be on its way
    computed: int  # tokens whose KV it has
    who: int = -1  # vacated: for whom


class Trail:
    """One request's events."""

    def __init__(self, ready_s: float, ahead: int) -> None:
        self.ready_s, self.ahead = ready_s, ahead
        self.events: list[Event] = []
        self.chunks: dict[int, tuple[int, int, bool]] = {}  # row: tokens, computed before, whether it is the last
        self.sat_out: set[int] = set()  # rows of others' tokens alone
        self.end_row = -1


class Recorder(Observer):
    """The record of one replica; `ids`: the requests in question."""

    def __init__(self, ids: Collection[int]) -> None:
        self.ids = frozenset(ids)
        self.rows, self.chunks, self.waits = RowLog(ROW_COLUMNS), RowLog(CHUNK_COLUMNS), RowLog(WAIT_COLUMNS)
        self.seen_s: list[float] = []
        self.trails: dict[int, Trail] = {}
        self._count = self._chunk_count = 0
        self._tables: tuple[Any, Any, Any] | None = None

    # ---- what the replica tells

    def received(self, replica: Replica, request: Request, ready_s: float) -> None:
        if request.id in self.ids:
            self.trails[request.id] = Trail(ready_s, max(replica.waiting.size - 1, 0))

    def decided(self, replica: Replica, asked: Asked) -> None:
        for request in asked.admitted:
            self._note(replica, request, "admitted")
        if replica.waiting.size:
            self._note_wait(replica, asked)

    def vacated(self, replica: Replica, request: Request, beneficiary: Request | None) -> None:
        self._note(replica, request, "vacated", -1 if beneficiary is None else beneficiary.id)

    def parked(self, replica: Replica, request: Request, on: bool) -> None:
        self._note(replica, request, "parked" if on else "resumed")

    def logged(self, replica: Replica, step: Step, steps: int, gpu_end_s: float) -> None:
        made, drafts = getattr(replica, "_coming", (replica.decoding * steps, 0))  # of an engine that speculates
        rows, chunks = self.rows, self.chunks
        rows.add(rows.pack(
            step.schedule_s, steps, replica.decoding, step.seqs, step.kv_tokens, drafts, made,
            step.gpu.elapsed_s(steps), gpu_end_s, self._chunk_count,
        ))  # fmt: skip
        row = self._count
        for request, tokens, computed in replica.chunks:
            chunks.add(chunks.pack(request.id, tokens, computed))
            if request.id in self.trails:
                last = request.computed_tokens == request.prompt_tokens + request.generated_tokens
                self.trails[request.id].chunks[row] = tokens, computed, last
        self._chunk_count += len(replica.chunks)
        for request in replica.paused_now:
            if request.id in self.trails:
                self.trails[request.id].sat_out.add(row)
        self.seen_s.append(nan)
        self._count += 1

    def ended(self, replica: Replica, requests: list[Request]) -> None:
        for request in requests:
            if request.id in self.trails:
                self.trails[request.id].end_row = self._count - 1

    def seen(self, replica: Replica, seen_s: float) -> None:
        self.seen_s[-1] = seen_s

    def _note(self, replica: Replica, request: Request, what: str, who: int = -1) -> None:
        trail = self.trails.get(request.id)
        if trail is None:
            return
        decoding = request in replica.batch
        computed = int(replica.batch.computed(request)) if decoding else request.computed_tokens
        trail.events.append(Event(what, replica.now_s, self._count, decoding, computed, who))

    def _note_wait(self, replica: Replica, asked: Asked) -> None:
        blocked = _blocked(replica, asked)
        needed = 0 if blocked is None else _needed_blocks(replica, blocked, asked)
        latest_s = max((request.arrival_s for request in asked.admitted), default=-inf)
        if blocked is not None:
            latest_s = max(latest_s, blocked.arrival_s)
        waits = self.waits
        waits.add(waits.pack(
            replica.now_s, shortage(replica, asked, blocked, needed), -1 if blocked is None else blocked.id, latest_s,
            replica.waiting.size, len(replica.running), replica.kv.free_blocks, needed, len(replica.preempted_now),
        ))  # fmt: skip

    # ---- read back

    def tables(self) -> tuple[Any, Any, Any]:
        """Rows, chunks and waits as structured arrays."""
        if self._tables is None:
            self._tables = self.rows.table(), self.chunks.table(), self.waits.table()
        return self._tables

    def chunks_of(self, row: int) -> list[tuple[int, int, int]]:
        """(request, tokens, computed before) of the prompts in a row."""
        rows, chunks, _ = self.tables()
        first = int(rows["first_chunk"][row])
        stop = int(rows["first_chunk"][row + 1]) if row + 1 < len(rows) else len(chunks)
        return [tuple(chunk) for chunk in chunks[first:stop].tolist()]

    def waits_between(self, start_s: float, stop_s: float) -> slice:
        """The waits that began at start_s or later, before stop_s."""
        times_s = self.tables()[2]["time_s"]
        return slice(bisect_left(times_s, start_s), bisect_left(times_s, stop_s))


def _blocked(replica: Replica, asked: Asked) -> Request | None:
    """Who is not let in. A queue of the policy's own is not asked: looking may be what fixes its order."""
    for request in (asked.refused, asked.looked_up):
        if request is not None and request not in replica.running:
            return request
    return replica.waiting.head if type(replica.waiting) is WaitingQueue else None


def _needed_blocks(replica: Replica, request: Request, asked: Asked) -> int:
    """Free KV blocks without which it cannot be admitted as a whole."""
    kv = replica.kv
    if request.swapped_tokens:
        return kv.blocks_for(request.swapped_tokens + 1) + int(replica.batch.blocks_needed(1))
    found = 0
    if asked.looked_up is request and asked.hit is not None:
        found = asked.hit.blocks - asked.hit.idle_blocks
    policy = getattr(replica.scheduler, "base", replica.scheduler)
    share = getattr(policy, "watermark", None) or getattr(policy, "headroom", None) or 0.0
    spare = int(share * (kv.total_blocks + 1)) if replica.running else 0
    return int(kv.blocks_for(request.prefill_tokens)) - found + spare


def shortage(replica: Replica, asked: Asked, blocked: Request | None, needed_blocks: int) -> int:
    """Which resource kept requests waiting, as the module says."""
    limits = replica.limits
    if replica.preempted_now or asked.refused is not None:
        return KV
    if len(replica.running) - len(replica.paused) >= limits.max_num_seqs:
        return SEQS
    prompts = sum(tokens for _, tokens, _ in replica.chunks)
    decodes = 0 if hasattr(replica.scheduler, "token_limit") else replica.decoding  # a limit of prompts alone
    left = limits.max_num_batched_tokens - decodes - prompts
    if left <= 0:
        return TOKENS
    if needed_blocks > replica.kv.free_blocks:
        return KV
    if blocked is not None and prompts and blocked.prefill_tokens > left:
        return TOKENS
    if replica.paused and getattr(replica.scheduler, "aside", None) is not None:  # vLLM's: they wait for blocks
        return KV
    return POLICY
