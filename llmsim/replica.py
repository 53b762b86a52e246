"""One replica: a queue, a running batch, a KV cache, and the engine's loop on two clocks.

The loop is vLLM's engine core (v1/engine/core.py) with asynchronous scheduling: the host schedules and launches
iteration k+1 while the GPU runs iteration k, at most two in flight. Per iteration k,

    S(k)   the host begins to schedule;  x0(k) the launch begins;  L(k) it ends;  E(k) the GPU ends
    U(k)   the host takes the results

    x0(k)  = S(k) + schedule
    L(k)   = x0(k) + launch + noise + interference of requests that become schedulable in (S, L]; a full graph's only if
             the host sets the pace, E(k-1) <= L(k) without it, and scheduling is asynchronous
    E(k)   = max(max(E(k-1), x0(k) + lead) + T(k), L(k) + tail)
    U(k-1) = max(E(k-1), L(k)),  S(k+1) = U(k-1) + update          if iteration k-1 is still in flight
    S(k+1) = L(k)                                                    otherwise
    synchronous scheduling: U(k) = max(E(k), L(k)),  S(k+1) = U(k) + update

(`llmsim.cost.Host` explains the terms; `tests/plain_engine.py` is the same in the plainest code.)

If the policy answers HOLD and no prompt is being computed, the iterations until the next completion, arrival or
shortage of blocks are one wake-up and one row in the log (`llmsim.macrostep`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from math import inf, isnan, nan, sqrt
from typing import Any, cast

import simpy

from llmsim.aside import Swap
from llmsim.cost import FULL, WARM_S, Clocks, CostModel, LaunchNoise, LongestCost, Ramp
from llmsim.engine import Engine, Limits
from llmsim.kvcache import KVCache
from llmsim.macrostep import Plan, Step, plan_run, plan_synchronous_run
from llmsim.plugins import PolicyError
from llmsim.request import Request
from llmsim.rowlog import RowLog

__all__ = ["GAP_COLUMNS", "ITERATION_COLUMNS", "Limits", "Replica", "Swap"]

ITERATION_COLUMNS = {
    "start_s": "f8", "iterations": "i8", "mode": "i1", "seqs": "i4", "kv_tokens": "i8", "prefill_requests": "i4",
    "prefill_tokens": "i4", "prefill_pairs": "i8", "prefill_context": "i8", "gpu_first_s": "f8", "gpu_growth_s": "f8",
    "gpu_end_s": "f8", "running": "i4", "waiting": "i4", "kv_blocks": "i4",
}  # fmt: skip
GAP_COLUMNS = {"gap_s": "f8", "growth_s": "f8", "count": "i4", "weight": "i4", "end_s": "f8"}


class _Flight:
    """An iteration (or the last of a run) whose results the host has not taken."""

    __slots__ = ("decodes", "ended", "firsts", "late", "outputs", "stalled")

    def __init__(self) -> None:
        self.outputs = 0
        self.decodes = 0  # of the outputs, those whose previous token came with the iteration before
        self.firsts: Sequence[Request] = ()  # whose prompt this iteration completed
        self.late: Collection[Request] = ()  # decodes whose previous token is older
        self.stalled: Sequence[list[float]] = ()  # the same for whole groups, see `_stall`
        self.ended: Sequence[Request] = ()


class Replica(Engine):
    """An engine on two clocks; `submit` is for sources, `outstanding` and `kv_in_use` are for routers."""

    def __init__(
        self,
        env: simpy.Environment,
        scheduler: Any,
        cost: CostModel,
        kv: KVCache,
        limits: Limits,
        *,
        asynchronous: bool = True,
        swap: Swap | None = None,
        noise: LaunchNoise | None = None,
        on_finish: Callable[[Request, Replica], None] | None = None,
        admission: Any = None,
        index: int = 0,
    ) -> None:
        super().__init__(scheduler, kv, limits, asynchronous=asynchronous, swap=swap)
        self.env, self.cost, self.index = env, cost, index
        self._skew_share: Callable[[int, bool], float] | None = getattr(cost, "skew_share", None)
        self._by_longest = cast(LongestCost, cost) if getattr(cost, "reads_longest", False) else None
        self.outstanding = 0  # requests sent here that their clients have no answer to; kept by who sends them
        self.iterations = RowLog(ITERATION_COLUMNS)
        self.gaps = RowLog(GAP_COLUMNS)
        self._noise = noise
        self._on_finish = on_finish
        self._admission = admission
        self._cut_off: list[Request] = []  # stopped decoding just now: their last token is in flight
        self._to_free: list[Request] = []  # ended, results taken: free at the next schedule
        self._flight: _Flight | None = None  # the iteration launched last, until its results are taken
        self._gpu_s = -inf  # when the GPU is done with it: E(k-1)
        self._chunk_s = 0.0  # of that iteration, if it had chunks
        self._clocks = Clocks()
        self._launched_s = -inf  # end of its launch, where workers launch: they queue up
        self._emitted_s = 0.0  # when clients saw the tokens of the iteration before
        self._woke_s = 0.0  # when it last had nothing to do
        # Answers that clients see only when the policy hands them out (`streams` False).
        self._streams = bool(getattr(scheduler, "streams", True))
        self._seen_gaps = self.gaps if self._streams else RowLog(GAP_COLUMNS, keep=False)
        self._stalled: list[list[float]] = []
        self._withheld: list[Request] = []
        self._hands_out = False
        # Swaps of a policy with `overlaps_copies` run beside the iteration before, from the schedule on.
        self._overlaps = bool(getattr(scheduler, "overlaps_copies", False))
        self._link_s = -inf  # when the last of them is done
        # Arrivals.
        self._feed: Iterator[Request] | None = None
        self._arriving: deque[Request] = deque()
        self._next: Request | None = None
        self.next_ready_s = inf  # when the next request becomes schedulable
        self._passed_s = 0.0
        self._timer: simpy.Event | None = None
        self._wake_s = inf
        self._waits = False  # for a time that the policy named
        self._plan: Plan | None = None
        # One of each is alive at a time; making new ones for every iteration cost a tenth of the run time.
        self._own_plan, self._own_flight, self._own_step = Plan(), _Flight(), Step()
        self._story = self._run()

    # --------------------------------------------------------------------------------------------- from the outside

    def start(self, feed: Iterator[Request] | None = None) -> None:
        """Begin. `feed`: this replica's requests in order of arrival, if they are known without asking a router."""
        self._feed = feed
        self._pull()
        self._sleep(next(self._story))

    def submit(self, request: Request) -> None:
        """A client sends a request, now."""
        if self._on_finish is not None and not self._can_fit(request):  # known at once, also while the engine is busy
            self._on_finish(request, self)
        self._arriving.append(request)
        if self._next is not None:
            return
        self._pull()
        plan = self._plan
        if plan is not None:
            wake_s = plan.scheduled_s(plan.steps_until(self.next_ready_s))
        elif self._wake_s == inf or self._waits:
            wake_s = self.next_ready_s
        else:
            return  # within a single iteration: seen at its end
        if wake_s < self._wake_s:
            self._sleep(wake_s)

    def kv_in_use(self) -> int:
        """KV blocks held by requests."""
        return self.kv.total_blocks - self.kv.free_blocks

    def unanswered(self) -> list[Request]:
        """Requests whose answers are complete but withheld (`hand_out`)."""
        return list(self._withheld)

    # ------------------------------------------------------------------------------------- what policies do with time

    def hand_out(self) -> None:
        """Clients see all withheld answers that are complete with the results of the iteration before."""
        if self._streams:
            raise self._error("handed out answers that clients have seen already: set streams = False")
        if self._flight is not None:
            self._hands_out = True
            return
        seen_s = self._emitted_s
        if self._woke_s > seen_s:
            host, outputs = self.cost.host, len(self._withheld)
            seen_s = self._woke_s + host.respond_s + host.respond_per_output_s * outputs
        self._deliver(seen_s)

    def _deliver(self, seen_s: float) -> None:
        """All tokens of the withheld answers are seen at once."""
        self._hands_out = False
        withheld, self._withheld = self._withheld, []
        gaps = self.gaps
        for request in withheld:
            if request.output_tokens > 1:
                gaps.add(gaps.pack(0.0, 0.0, request.output_tokens - 1, 1, seen_s))
            request.first_token_s = request.finish_s = seen_s
            request.preempted_before_first_s = request.preempted_s
            if self._on_finish is not None:
                self._on_finish(request, self)

    def _turned_away(self, request: Request) -> None:
        if self._on_finish is not None:
            self._on_finish(request, self)

    # ------------------------------------------------------------------------------------------------------- the loop

    def _run(self) -> Generator[float, None, None]:
        """The engine's loop; yields the time until which it sleeps."""
        host = self.cost.host
        peek = self.env.peek
        waiting, paused, heeds_ends = self.waiting, self.paused, self._on_ended is not None
        t = yield from self._idle(0.0)  # S(k)
        while True:
            while self.next_ready_s <= t:
                self._receive()
            if self._to_free:
                self._free(t)
            hold = self.begin(t)
            if self._overlaps and self._copying_s:
                self._link_s = max(self._link_s, t) + self._copying_s
                self._copying_s = 0.0
            if self.decoding or self.chunks:
                step = self._compose(t)
                if not host.worker:
                    if host.interference_per_token_s and (step.mode != FULL or self._paced_by_launch(step)):
                        received = yield from self._interfere(step)
                        hold = hold and not received
                    step.free_s = step.launched_s
                begin_s = step.launch_s + host.lead_s[step.mode]
                gpu_end_s = self._gpu_s if self._gpu_s > begin_s else begin_s
                if self._chunk_s and begin_s - self._gpu_s < WARM_S:
                    if step.chunks:
                        step.gpu = Ramp(host.warmed_s(step.gpu.first_s), 0.0)
                    else:
                        low = self._clocks.after_chunk(self._gpu_s, self._chunk_s)
                        gpu_end_s += host.cooled_s(self._chunk_s, low)
                if self._special:
                    gpu_end_s += self._copying_s
                    self._copying_s = 0.0
                if self._link_s > gpu_end_s:
                    gpu_end_s = self._link_s
                gpu_end_s += step.gpu.first_s
                launch_tail_s = step.launched_s + host.tail_s[step.mode]
                step.gpu_end_s = gpu_end_s if gpu_end_s > launch_tail_s else launch_tail_s
                t = self._launched_asynchronously(step) if self.asynchronous else self._launched(step)
                # Blocks that somebody may be waiting for, or a policy that wants to know who ended.
                ends_matter = self._to_free and (waiting.size or self.prefilling or paused or heeds_ends)
                if hold and step.mode == FULL and not (self.chunks or self._late or ends_matter):
                    plan = self._long_run(step, t)
                    if plan is not None:
                        steps = plan.steps_until(self.next_ready_s)
                        t = plan.scheduled_s(steps)
                        if peek() <= t:
                            self._plan = plan
                            yield t
                            self._plan = None
                            steps = plan.steps_until(self.next_ready_s)
                            t = plan.scheduled_s(steps)
                        if not plan.gpu_bound and self._slows_last(step, steps, t):
                            steps -= 1
                            t = plan.scheduled_s(steps)
                        if steps > 1:
                            self._finish_run(step, plan, steps)
                            continue
                self._finish_step(step)
            elif self._flight is not None:  # nothing to schedule: wait for the results in flight
                taken_s = max(self._gpu_s + host.return_s, t)
                flight, self._flight = self._flight, None
                t = self._take(flight, taken_s)
            elif self._to_free or self.preempted_now or self._rejected_now:  # blocks are free, or others come first
                continue
            elif self._wait_s < inf:
                t = yield from self._wait(t, self._wait_s)
                continue
            elif self.waiting or self.running:
                raise self._stuck()
            else:
                t = yield from self._idle(t)
                continue
            if peek() <= t:  # else nothing can happen before t: going on without sleeping saves a third of the time
                yield t

    def _idle(self, t: float) -> Generator[float, None, float]:
        """Nothing to do: the next request wakes the engine; returns S(k)."""
        while self.next_ready_s == inf:
            yield inf
        t = self._woke_s = max(t, self.next_ready_s + self.cost.host.wake_s)
        if self.env.peek() <= t:
            yield t
        return t

    def _wait(self, t: float, until_s: float) -> Generator[float, None, float]:
        """Nothing to do before `until_s`, unless a request arrives; returns S(k)."""
        while True:
            ready_s = self.next_ready_s
            wake_s = max(t, min(until_s, ready_s + self.cost.host.wake_s))
            if self.env.peek() <= wake_s:
                self._waits = True
                yield wake_s
                self._waits = False
            if self.next_ready_s == ready_s:  # else woken by an arrival, as far as its announcement
                self._woke_s = wake_s
                return wake_s

    def _compose(self, t: float) -> Step:
        """What the iteration consists of and when its launch begins and, arrivals apart, ends."""
        cost = self.cost
        host = cost.host
        step = self._own_step
        step.schedule_s = t
        step.running = running = len(self.running)
        step.waiting = self.waiting.size
        step.kv_blocks = self.kv.total_blocks - self.kv.free_blocks
        if step.chunks:
            step.chunks = []
        seqs = step.outputs = self.decoding
        kv_tokens = self.batch.kv_tokens if seqs else 0
        squares = self.batch.squares if seqs and self._skew_share is not None else 0
        members, member_tokens = seqs, kv_tokens
        if self._special and seqs:
            seqs += self._ghost_seqs
            kv_tokens += self._ghost_kv_tokens
        requests = seqs
        new_tokens = tail = 0
        if self.chunks:
            requests += len(self.chunks)
            chunks = self._padded() if self._special else self.chunks
            for _, tokens, computed in chunks:
                if tokens == 1:  # the tail of a prompt is a decode to the GPU
                    seqs += 1
                    kv_tokens += computed
                    members += 1
                    member_tokens += computed
                    squares += computed * computed
                    tail = max(tail, computed)
                else:
                    new_tokens += tokens
                    step.chunks.append((tokens, computed))
        read_tokens: float = kv_tokens
        if members > 1 and self._skew_share is not None:
            deviation = sqrt(max(members * squares - member_tokens * member_tokens, 0))
            read_tokens += self._skew_share(seqs, bool(step.chunks)) * deviation
        if step.chunks:
            mode = cost.mode(seqs + new_tokens, len(step.chunks))
            if self._by_longest is not None and seqs:
                longest = max(self.batch.longest, tail)
                step.gpu = Ramp(self._by_longest.mixed_s(step.chunks, seqs, read_tokens, longest), 0.0)
            else:
                step.gpu = Ramp(cost.mixed_s(step.chunks, seqs, read_tokens), 0.0)
        else:
            mode = cost.mode(seqs, 0)
            step.gpu = cost.decode_ramp(seqs, read_tokens)
        step.mode, step.seqs, step.kv_tokens, step.new_tokens = mode, seqs, kv_tokens, new_tokens
        launch_s = t + host.schedule_s + host.schedule_per_request_s * running
        if new_tokens:
            launch_s += host.schedule_per_token_s * new_tokens
        if host.worker:
            step.free_s = launch_s
            if self._launched_s > launch_s:
                launch_s = self._launched_s
        step.launch_s = launch_s
        step.launched_s = launch_s + host.launch_s[mode] + host.launch_per_request_s[mode] * requests
        if step.chunks:
            step.launched_s += host.launch_per_chunk_s[mode] * len(step.chunks)
        if mode != FULL and self._noise is not None:
            step.launched_s += self._noise.draw(mode, launch_s)
        return step

    def _padded(self) -> list[tuple[Request, int, int]]:
        """The chunks as the GPU computes them."""
        padding = self._padding
        return [(request, tokens + padding.get(request, 0), before) for request, tokens, before in self.chunks]

    def _interfere(self, step: Step) -> Generator[float, None, bool]:
        """Requests that become schedulable meanwhile slow a launch: one interpreter lock is shared. Were there any?"""
        per_token_s = self.cost.host.interference_per_token_s
        received = False
        while True:
            while self.next_ready_s <= step.launched_s:
                assert self._next is not None
                step.launched_s += per_token_s * self._next.prompt_tokens
                self._receive()
                received = True
            if self._feed is not None or self.env.peek() > step.launched_s:
                return received
            yield step.launched_s
            if self.next_ready_s > step.launched_s:
                return received

    def _paced_by_launch(self, step: Step) -> bool:
        """Whether the GPU is idle when the launch of a full graph is through."""
        return self.asynchronous and self._gpu_s <= step.launched_s

    def _slows_last(self, step: Step, steps: int, t: float) -> bool:
        """Whether the next request slows the launch of the last of `steps` iterations, which end with the schedule at
        `t`: it is then taken by itself."""
        host = self.cost.host
        update_s = host.update_s + host.update_per_output_s * step.outputs
        slows = steps > 1 and host.interference_per_token_s > 0.0
        return slows and self.next_ready_s <= t - update_s

    def _launched_asynchronously(self, step: Step) -> float:
        """The host takes the results before, if any; returns S(k+1)."""
        flight, self._flight = self._flight, None
        if flight is None:
            return step.free_s
        return self._take(flight, max(self._gpu_s + self.cost.host.return_s, step.free_s))

    def _launched(self, step: Step) -> float:
        """Synchronous scheduling: the host waits for this very step."""
        host = self.cost.host
        outputs = self.decoding + len(self.completed_prompts())
        taken_s = max(step.gpu_end_s + host.return_s, step.free_s)
        return taken_s + host.update_s + host.update_per_output_s * outputs

    def _finish_step(self, step: Step) -> None:
        """Book one iteration; its results are in flight, or taken at once if scheduling is synchronous."""
        self._log(step, 1, step.gpu_end_s)
        late: Collection[Request] = ()
        decodes = self.decoding
        if decodes and self._late:
            late, self._late = self._late, {}
            decodes -= len(late)
        stalled: Sequence[list[float]] = ()
        if self.batch.size:
            if not decodes and not late:
                self._stall()
            elif self._stalled:
                stalled, self._stalled = self._stalled, []
                decodes -= int(sum(count for _, count, _ in stalled))
        firsts = self.completed_prompts()
        ended = self.commit(1)
        self._gpu_s, self._launched_s = step.gpu_end_s, step.launched_s
        self._chunk_s = step.gpu.first_s if step.chunks else 0.0
        flight = self._own_flight
        flight.outputs = self.decoding + len(firsts)
        flight.decodes, flight.firsts, flight.late, flight.ended = decodes, firsts, late, ended
        flight.stalled = stalled
        if self.asynchronous:
            self._flight = flight
        else:
            self._take(flight, max(step.gpu_end_s + self.cost.host.return_s, step.free_s))

    def _long_run(self, step: Step, second_s: float) -> Plan | None:
        """A plan for more iterations like this one, if a closed form holds."""
        batch = self.batch
        # Synchronous scheduling takes results at once, so the iteration in which requests end is taken by itself.
        steps = batch.steps_to_finish() - (0 if self.asynchronous else 1)
        special = self._special
        if special and steps > self._hold_steps:
            steps = self._hold_steps
        if steps > 1:
            steps = batch.steps_that_fit(steps, self.kv.free_blocks + self._blocks_taken)
        if steps <= 1 or self._stalled:  # their next gap is another
            return None
        if self._to_free:
            self._free(second_s)
        plan = self._own_plan
        make = plan_run if self.asynchronous else plan_synchronous_run
        if not make(plan, step, second_s, steps, len(self.running), self.cost.host):
            return None
        if special and self._hold_s < inf:
            plan.steps = plan.steps_until(self._hold_s)
        return plan

    def _finish_run(self, step: Step, plan: Plan, steps: int) -> None:
        """Book a run of iterations; the last one's results are in flight, or taken if scheduling is synchronous."""
        self._chunk_s = 0.0
        host = self.cost.host
        seqs, outputs = step.seqs, step.outputs
        pace_s, pace_growth_s = plan.pace
        update_s = host.update_s + host.update_per_output_s * outputs
        respond_s = host.respond_s + host.respond_per_output_s * outputs
        gaps = self._seen_gaps
        if not self.asynchronous:
            first_seen_s = plan.second_s - update_s + respond_s
            gaps.add(gaps.pack(first_seen_s - self._emitted_s, 0.0, 1, outputs, first_seen_s))
            self._emitted_s = plan.scheduled_s(steps) - update_s + respond_s
            gaps.add(gaps.pack(pace_s - pace_growth_s, pace_growth_s, steps - 1, outputs, self._emitted_s))
            self._gpu_s = self._emitted_s - respond_s - host.return_s
            self._log(step, steps, self._gpu_s)
            self.commit(steps)
            return
        first_seen_s = plan.base_s - update_s + respond_s
        gaps.add(gaps.pack(first_seen_s - self._emitted_s, 0.0, 1, outputs, first_seen_s))
        more = steps - 2  # gaps between the iterations whose results are taken; the last one's are in flight
        before_last_s = more * pace_s + pace_growth_s * (more * (more - 1)) * 0.5
        self._emitted_s = first_seen_s + before_last_s
        if more:
            gaps.add(gaps.pack(pace_s, pace_growth_s, more, outputs, self._emitted_s))
        if plan.gpu_bound:
            gpu_s = step.gpu_end_s + before_last_s + pace_s + pace_growth_s * more
        else:
            first_s, growth_s = step.gpu
            last_s = first_s + growth_s * (steps - 1)
            launched_s = plan.base_s - update_s + more * pace_s
            launch_s = host.launch_s[FULL] + host.launch_per_request_s[FULL] * seqs
            gpu_s = launched_s + max(host.lead_s[FULL] + last_s - launch_s, host.tail_s[FULL])
        self._log(step, steps, gpu_s)
        self._gpu_s = gpu_s
        self._launched_s = -inf  # through before the next is scheduled
        flight = self._flight = self._own_flight
        flight.outputs = flight.decodes = outputs
        flight.firsts = flight.late = flight.stalled = ()
        flight.ended = self.commit(steps)

    def _take(self, flight: _Flight, taken_s: float) -> float:
        """The host takes an iteration's results: tokens go out; returns when it is done."""
        host = self.cost.host
        seen_s = taken_s + host.respond_s + host.respond_per_output_s * flight.outputs
        gaps = self._seen_gaps
        if flight.decodes:
            gaps.add(gaps.pack(seen_s - self._emitted_s, 0.0, 1, flight.decodes, seen_s))
        for _, count, before_s in flight.stalled:
            if count:
                gaps.add(gaps.pack(seen_s - before_s, 0.0, 1, int(count), seen_s))
        for request in flight.late:
            gaps.add(gaps.pack(seen_s - request.last_token_s, 0.0, 1, 1, seen_s))
            if request.swapped_in:
                request.preempted_s += seen_s - request.last_token_s
                request.swapped_in = False
            request.last_token_s = nan
        for request in flight.firsts:
            waited_s = seen_s - request.last_token_s  # nan unless it was preempted
            if isnan(request.first_token_s):
                request.first_token_s = seen_s
                if waited_s == waited_s:
                    request.preempted_s = request.preempted_before_first_s = waited_s
                    request.last_token_s = nan
            elif waited_s == waited_s:
                gaps.add(gaps.pack(waited_s, 0.0, 1, 1, seen_s))
                request.preempted_s += waited_s
                request.last_token_s = nan
        self._emitted_s = seen_s
        if self._cut_off:
            for request in self._cut_off:
                request.last_token_s = seen_s
            self._cut_off.clear()
        if flight.ended:
            self._to_free.extend(flight.ended)
            if not self._streams:
                self._withheld.extend(flight.ended)
            else:
                for request in flight.ended:
                    request.finish_s = seen_s
                    if self._on_finish is not None:
                        self._on_finish(request, self)
        if self._hands_out:
            self._deliver(seen_s)
        return taken_s + host.update_s + host.update_per_output_s * flight.outputs

    def _stall(self) -> None:
        """An iteration of prompts only: the next gap is longer for all who decode.

        Those who made a token in the iteration before become a group: the last ticket of its members (`RunningBatch`),
        how many they are, and when their last tokens were seen. One gap row a group, where policies that put prompts
        first would log a row for each request and prompt (a third of their time).
        """
        members = self.batch.size - len(self._late) - int(sum(count for _, count, _ in self._stalled))
        if members:
            self._stalled.append([self.batch.joins, members, self._emitted_s])

    def _log(self, step: Step, steps: int, gpu_end_s: float) -> None:
        pairs = context = 0
        chunks = step.chunks
        for tokens, computed in chunks:
            pairs += tokens * computed + tokens * (tokens + 1) // 2
            context += computed
        first_s, growth_s = step.gpu
        log = self.iterations
        log.add(log.pack(
            step.schedule_s, steps, step.mode, step.seqs, step.kv_tokens, len(chunks), step.new_tokens, pairs,
            context, first_s, growth_s, gpu_end_s, step.running, step.waiting, step.kv_blocks,
        ))  # fmt: skip

    # ------------------------------------------------------------------------------------------ arrivals and sleeping

    def _pull(self) -> None:
        """Look at the next request on its way; requests pass to the engine one at a time."""
        if self._feed is not None:
            request = next(self._feed, None)
        else:
            request = self._arriving.popleft() if self._arriving else None
        self._next = request
        if request is None:
            self.next_ready_s = inf
            return
        host = self.cost.host
        passed_s = max(request.arrival_s, self._passed_s)
        passed_s += host.receive_busy_s + host.receive_per_token_s * request.prompt_tokens
        self._passed_s = passed_s
        self.next_ready_s = passed_s + host.receive_s

    def _receive(self) -> None:
        """The next request becomes schedulable."""
        request = self._next
        assert request is not None
        if not self._can_fit(request):
            if self._on_finish is not None and self._feed is not None:  # else told by `submit`
                self._on_finish(request, self)
        elif self._admission is not None and not self._admits(request):
            request.rejected_s = self.next_ready_s
            self.rejections += 1
            self._turned_away(request)
        else:
            self.waiting.append(request)
            if self._on_arrived is not None:
                self._on_arrived(request, self.next_ready_s)
        self._pull()

    def _can_fit(self, request: Request) -> bool:
        """Whether its KV blocks could ever be free at once."""
        return self.kv.blocks_for(request.prompt_tokens + request.output_tokens - 1) <= self.kv.total_blocks

    def _admits(self, request: Request) -> bool:
        verdict = self._admission.admit(request, self, self.next_ready_s)
        if verdict not in (True, False):
            raise PolicyError(
                f"{type(self._admission).__name__} answered {verdict!r} for request {request.id}. Return True or False."
            )
        return bool(verdict)

    def _free(self, now_s: float) -> None:
        self.free(self._to_free, now_s)
        self._to_free = []

    def _sleep(self, until_s: float) -> None:
        """Wake the loop at `until_s`; an earlier timer is forgotten.

        A generator woken by its own timers, not a SimPy process: being cut short by an arrival costs a timer (0.8 µs)
        where interrupting a process costs 5 µs.
        """
        self._wake_s = until_s
        if until_s == inf:
            self._timer = None
            return
        delay_s = until_s - self.env.now
        timer = self._timer = simpy.Timeout(self.env, delay_s if delay_s > 0.0 else 0.0)
        timer.callbacks.append(self._wake)

    def _wake(self, timer: simpy.Event) -> None:
        if timer is self._timer:
            self._sleep(next(self._story))

    def _cut(self, request: Request) -> None:
        """A request stops decoding for now: remember when its last token was seen, once that is known."""
        if self._stalled and request not in self._late:
            ticket = abs(request.ticket)
            for group in self._stalled:
                if ticket <= group[0]:
                    group[1] -= 1
                    request.last_token_s = group[2]
                    return
        flight = self._flight
        if flight is None:
            if isnan(request.last_token_s):
                request.last_token_s = self._emitted_s
        elif isnan(request.last_token_s) or request in flight.late or request in flight.firsts:
            self._cut_off.append(request)
