"""Skip-join multi-level feedback queue: FastServe (NSDI'26; arXiv 2305.05920, sections 4.1 and 4.2).

    quantum of level i     q_i = q_1 * 2^i, i = 0 .. levels - 1, q_1 the time of one iteration with one short request
    a request joins        the first level whose quantum its prompt's prefill fits (skip-join); the last if none does
    it runs                time passes from its quantum while it runs (all that run share an iteration); used up, it is
                           demoted by one level and has that level's quantum
    it does not run        for starvation_s: promoted to the first level, with its quantum
    each iteration         the requests of the highest levels run, up to max_num_seqs; within a level first come, first
                           served; preempted ones are paused: their KV stays

When a prompt finds no KV blocks, less urgent requests make room (`llmsim.schedulers.preemptive`): swap moves their KV
to host memory, as FastServe does; without swap space they keep it (defer), one of the paper's straw men. The other,
recompute, thrashes: paused requests hold most of the cache, and whoever comes back throws another out.
With swap, `reserve` of the blocks are kept free ahead of need by swapping out the least urgent paused requests.

Differences from the paper: copies overlap with the iteration that runs when they are asked for, not with later ones, so
nothing is swapped in ahead of need; the next time a request is scheduled is not estimated: its level and place in it
stand for that; prompts run in the base's chunks beside decodes. Whose quantum ends while nobody is kept waiting is
demoted all the same, at that very time, so the answer does not depend on how often the policy is asked.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import isfinite
from typing import TYPE_CHECKING, Any

from llmsim.schedulers.estimate import iteration_s, prefill_s
from llmsim.schedulers.heap import Key
from llmsim.schedulers.preemptive import Preemptive

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request


LEAST_QUANTUM_S = 1e-5  # a waiting policy counts every quantum that has passed


class _Job:
    """Where a request stands: its level, since when, what is left of its quantum, and since when it has not run."""

    __slots__ = ("idle_s", "left_s", "level", "runs_from_s", "since_s")

    def __init__(self, level: int, since_s: float, left_s: float) -> None:
        self.level, self.since_s, self.left_s = level, since_s, left_s
        self.runs_from_s: float | None = None
        self.idle_s = since_s


class SkipJoinMlfq(Preemptive):
    """`quantum_s` 0: one iteration of one request; `starvation_s` 0: nobody is promoted."""

    def __init__(
        self,
        base: str = "vllm",
        base_args: dict[str, Any] | None = None,
        when_full: str = "auto",
        levels: int = 16,
        quantum_s: float = 0.0,
        starvation_s: float = 60.0,
        reserve: float = 0.05,
    ) -> None:
        super().__init__(base, base_args, when_full)
        if not 1 <= levels <= 64:
            raise ValueError(f"SkipJoinMlfq: levels={levels}: give 1 to 64")
        for name, value in (("quantum_s", quantum_s), ("starvation_s", starvation_s)):
            if not (isfinite(value) and value >= 0.0):
                raise ValueError(f"SkipJoinMlfq: {name}={value} is no time: give seconds, 0 or more")
        if 0.0 < quantum_s < LEAST_QUANTUM_S:
            raise ValueError(
                f"SkipJoinMlfq: quantum_s={quantum_s} is far below an iteration: give {LEAST_QUANTUM_S} or more, or 0 "
                "for one iteration"
            )
        if not 0.0 <= reserve < 1.0:
            raise ValueError(f"SkipJoinMlfq: reserve={reserve} is no share of the KV blocks: give 0 or more, below 1")
        self._base_arrived = getattr(self.base, "arrived", None)
        self.levels, self.quantum_s, self.starvation_s, self.reserve = levels, quantum_s, starvation_s, reserve
        self.demotions = self.promotions = 0
        self._jobs: dict[Request, _Job] = {}
        self._expiring: list[tuple[float, int, Request]] = []  # when quanta of running requests are used up
        self._starving: list[tuple[float, int, Request]] = []  # when those that do not run are promoted
        self._now_s = 0.0

    def quantum(self, level: int) -> float:
        """Seconds of level 0, 1, ..."""
        if not self.quantum_s:
            self.quantum_s = iteration_s(self._engine, [], 1, 0)
        return self.quantum_s * float(1 << level)

    def level_for(self, request: Request) -> int:
        """The level that a request joins."""
        needs_s = prefill_s(self._engine, request.prompt_tokens)
        level = 0
        while level < self.levels - 1 and self.quantum(level) < needs_s:
            level += 1
        return level

    def key(self, request: Request) -> Key:
        job = self._jobs.get(request)
        if job is None:
            level = self.level_for(request)
            job = self._jobs[request] = _Job(level, request.arrival_s, self.quantum(level))
            self._may_starve(request, job)
        return job.level, job.since_s, request.id

    def arrived(self, request: Request, now_s: float) -> None:
        self.key(request)  # it joins its level, also if the queue had nothing to compare it with
        if self._base_arrived is not None:
            self._base_arrived(request, now_s)

    def ended(self, request: Request, now_s: float) -> None:
        super().ended(request, now_s)
        self._jobs.pop(request, None)

    # ---------------------------------------------------------------------------------------------- time passing

    def starts(self, request: Request) -> None:
        job = self._jobs[request]
        job.runs_from_s = self._now_s
        heappush(self._expiring, (self._now_s + job.left_s, request.id, request))

    def stops(self, request: Request) -> None:
        job = self._jobs[request]
        assert job.runs_from_s is not None
        job.left_s -= self._now_s - job.runs_from_s
        job.runs_from_s, job.idle_s = None, self._now_s
        self._may_starve(request, job)

    def _may_starve(self, request: Request, job: _Job) -> None:
        if self.starvation_s and job.level:  # from the first level nobody can be promoted
            heappush(self._starving, (job.idle_s + self.starvation_s, request.id, request))

    def update(self, replica: Replica, now_s: float) -> None:
        self._now_s = now_s
        while self._next_expiry_s() <= now_s:
            self._demote(*heappop(self._expiring))
        while self._next_starvation_s() <= now_s:
            at_s, _, request = heappop(self._starving)
            self._promote(replica, at_s, request)
        if self.when_full == "swap":
            self._keep_reserve(replica)

    def _next_expiry_s(self) -> float:
        expiring, jobs = self._expiring, self._jobs
        while expiring:
            at_s, _, request = expiring[0]
            job = jobs.get(request)
            if job is not None and job.runs_from_s is not None and job.runs_from_s + job.left_s == at_s:
                return at_s
            heappop(expiring)
        return float("inf")

    def _next_starvation_s(self) -> float:
        starving, jobs = self._starving, self._jobs
        while starving:
            at_s, _, request = starving[0]
            job = jobs.get(request)
            if job is not None and job.level and job.runs_from_s is None and job.idle_s + self.starvation_s == at_s:
                return at_s
            heappop(starving)
        return float("inf")

    def _demote(self, at_s: float, _: int, request: Request) -> None:
        job = self._jobs[request]
        if job.level < self.levels - 1:
            job.level, job.since_s = job.level + 1, at_s
            self.demotions += 1
        job.runs_from_s, job.left_s = at_s, self.quantum(job.level)
        heappush(self._expiring, (at_s + job.left_s, request.id, request))
        self.moved(request)

    def _promote(self, replica: Replica, at_s: float, request: Request) -> None:
        job = self._jobs[request]
        queued = request not in replica.paused
        if queued:
            replica.waiting.remove(request)
        job.level, job.since_s, job.left_s, job.idle_s = 0, at_s, self.quantum(0), at_s
        self.promotions += 1
        if queued:
            replica.waiting.put_back(request)
        else:
            self.moved(request)

    def lasts(self, replica: Replica) -> None:
        replica.hold_until(min(self._next_expiry_s(), self._next_starvation_s()))
        if self.when_full == "swap" and replica.paused:  # until so few blocks are left that the reserve is touched
            batch = replica.batch
            spare = replica.kv.free_blocks + batch.blocks_needed(1) - int(self.reserve * replica.kv.total_blocks)
            if batch.size:
                replica.hold_for(1 + (batch.steps_that_fit(1 << 30, spare) if spare >= 0 else 0))

    def _keep_reserve(self, replica: Replica) -> None:
        """Blocks for prompts to come, taken from the least urgent paused requests."""
        wanted = int(self.reserve * replica.kv.total_blocks)
        while replica.kv.free_blocks < wanted:
            least = self._least_paused()
            if least is None or not replica.swap_out(least):
                return
            self._stop(least)
