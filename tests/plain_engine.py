"""The plain twin: one vLLM V1 replica, one iteration at a time, written to be read against the specification.

Scheduling, KV blocks and prefix cache follow vLLM 0.25's V1 engine (scheduler.py, kv_cache_manager.py, block_pool.py);
the times follow the two-clock recurrences of docs/architecture.md. Lists and loops only: it is the oracle for the fast
engine and the judge of cost models, so nothing here is clever and nothing is shared with `llmsim` but the cost model.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, exp, inf, nan, sqrt

from llmsim.cost import FULL, RECOVERY_S, WARM_S, CostModel


@dataclass(frozen=True)
class Settings:
    num_gpu_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    long_prefill_token_threshold: int = 0
    chunked_prefill: bool = True
    prefix_caching: bool = True
    reserve_full_isl: bool = True
    watermark: float = 0.0
    policy: str = "fcfs"
    async_scheduling: bool = True
    concurrency: int | None = None  # closed loop: this many requests at a time, in order of their ids


@dataclass(eq=False)
class PlainRequest:
    id: int
    send_s: float  # when the client sends it; rewritten in a closed loop
    prompt: int
    output: int
    priority: int = 0
    block_keys: tuple[object, ...] = ()  # content of its leading engine blocks; equal keys share KV
    # state
    generated: int = 0  # output tokens the host knows of
    computed: int = 0
    placeholders: int = 0  # async: sampled, not yet returned
    partial: bool = False  # the last schedule left prompt tokens to compute
    blocks: list[int] = field(default_factory=list)
    registered: int = 0  # leading blocks of `blocks` whose hashes were offered to the prefix cache
    # result
    schedulable_s: float = nan
    scheduled_s: float = nan
    token_s: list[float] = field(default_factory=list)  # as the client sees them
    cached: int = 0
    preemptions: int = 0
    finished: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated

    def key(self, block: int) -> object:
        return self.block_keys[block] if block < len(self.block_keys) else (self.id, block)


class Blocks:
    """The block pool: block 0 is the null block; the free list also holds cached blocks nobody uses."""

    def __init__(self, settings: Settings) -> None:
        self.size, self.caching = settings.block_size, settings.prefix_caching
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, settings.num_gpu_blocks))
        self.references = [0] * settings.num_gpu_blocks
        self.hash_of: dict[int, object] = {}
        self.cached: dict[object, OrderedDict[int, None]] = {}

    def hit_blocks(self, request: PlainRequest) -> list[int]:
        hits: list[int] = []
        if self.caching:
            for i in range((request.tokens - 1) // self.size):
                holders = self.cached.get(request.key(i))
                if not holders:
                    break
                hits.append(next(iter(holders)))
        return hits

    def needed(self, request: PlainRequest, tokens: int, hits: Sequence[int]) -> int:
        idle_hits = sum(self.references[b] == 0 for b in hits)
        return max(ceil(tokens / self.size) - len(request.blocks) - len(hits), 0) + idle_hits

    def take(self, request: PlainRequest, tokens: int, hits: Sequence[int]) -> None:
        for b in hits:
            if self.references[b] == 0:
                del self.free[b]
            self.references[b] += 1
        request.blocks += hits
        request.registered = max(request.registered, len(hits))
        while len(request.blocks) * self.size < tokens:
            b, _ = self.free.popitem(last=False)
            if b in self.hash_of:
                key = self.hash_of.pop(b)
                del self.cached[key][b]
                if not self.cached[key]:
                    del self.cached[key]
            self.references[b] = 1
            request.blocks.append(b)

    def register(self, request: PlainRequest, tokens: int) -> None:
        """Offer the hashes of the full blocks among the first `tokens` tokens."""
        if self.caching and request.blocks:
            for i in range(request.registered, tokens // self.size):
                self.hash_of[request.blocks[i]] = request.key(i)
                self.cached.setdefault(request.key(i), OrderedDict())[request.blocks[i]] = None
                request.registered = i + 1

    def release(self, request: PlainRequest) -> None:
        idle = []  # tail first
        for b in reversed(request.blocks):
            self.references[b] -= 1
            if self.references[b] == 0:
                idle.append(b)
                self.free[b] = None
        for b in reversed(idle):  # unhashed ones go to the front, the tail before the others
            if b not in self.hash_of:
                self.free.move_to_end(b, last=False)
        request.blocks, request.registered = [], 0


@dataclass
class Step:
    scheduled: dict[PlainRequest, tuple[int, int]]  # request -> new tokens, tokens computed before
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    preempted: list[int] = field(default_factory=list)
    partial: set[PlainRequest] = field(default_factory=set)  # prefill chunks that give no token
    padding: dict[PlainRequest, int] = field(default_factory=dict)  # rows thrown away beside a prompt
    ghost_seqs: int = 0  # decode rows that nobody wants, and cached tokens that they and padding make the GPU read
    ghost_kv_tokens: int = 0
    copy_s: float = 0.0  # of swapped KV, before the GPU's work
    wait_s: float = inf  # nothing to schedule before, though requests wait
    mode: int = FULL
    schedule_s: float = nan  # the instants of the two clocks
    launch_s: float = nan
    launched_s: float = nan
    free_s: float = nan
    gpu_end_s: float = nan
    update_s: float = nan
    gpu_time_s: float = nan

    @property
    def tokens(self) -> int:
        return sum(n for n, _ in self.rows) + self.ghost_seqs

    @cached_property  # a step is asked once it is scheduled, and changes no more
    def rows(self) -> list[tuple[int, int]]:
        """What the GPU computes: new tokens, padding included, and tokens before them."""
        return [(n + self.padding.get(request, 0), c) for request, (n, c) in self.scheduled.items()]

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        return [(n, c) for n, c in self.rows if n > 1]

    @property
    def seqs(self) -> int:
        return sum(n == 1 for n, _ in self.rows) + self.ghost_seqs

    @property
    def kv_tokens(self) -> int:
        return sum(c for n, c in self.rows if n == 1) + self.ghost_kv_tokens

    def read_tokens(self, cost: object) -> float:
        """Cached tokens, and what uneven contexts cost more."""
        contexts = [c for n, c in self.rows if n == 1]
        skew_share = getattr(cost, "skew_share", None)
        if not contexts or skew_share is None:
            return self.kv_tokens
        mean = sum(contexts) / len(contexts)
        deviation = sqrt(sum((c - mean) ** 2 for c in contexts) / len(contexts))
        return self.kv_tokens + skew_share(self.seqs, bool(self.chunks)) * len(contexts) * deviation

    @property
    def longest(self) -> int:
        return max((c for n, c in self.rows if n == 1), default=0)

    @property
    def outputs(self) -> int:
        return len(self.scheduled) - len(self.partial)


class Scheduler:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.blocks = settings, Blocks(settings)
        self.running: list[PlainRequest] = []
        self.waiting: list[PlainRequest] = []
        self.now_s = 0.0

    def urgency(self, request: PlainRequest) -> tuple[int, float]:
        return request.priority, request.send_s

    def add(self, request: PlainRequest) -> None:
        self.waiting.append(request)
        if self.settings.policy == "priority":
            self.waiting.sort(key=lambda r: (*self.urgency(r), r.id))

    def allocate(self, request: PlainRequest, new: int, hits: Sequence[int], admission: bool) -> bool:
        s, blocks = self.settings, self.blocks
        spare = int(s.watermark * s.num_gpu_blocks) if admission and self.running else 0
        free = len(blocks.free)
        whole = min(request.tokens, s.max_model_len)
        if admission and s.reserve_full_isl and blocks.needed(request, whole, hits) + spare > free:
            return False
        before = request.computed + len(hits) * s.block_size
        slots = min(before + new, s.max_model_len)
        if blocks.needed(request, slots, hits) + spare > free:
            return False
        blocks.take(request, slots, hits)
        blocks.register(request, min(before + new, request.tokens))
        return True

    def preempt(self, victim: PlainRequest, step: Step) -> None:
        self.running.remove(victim)
        self.blocks.release(victim)
        victim.computed = 0
        victim.preemptions += 1
        step.preempted.append(victim.id)
        if self.settings.policy == "priority":
            self.add(victim)
        else:
            self.waiting.insert(0, victim)

    def schedule(self) -> Step:
        s = self.settings
        step = Step({})
        self.decide(step)
        for request, (n, _) in step.scheduled.items():
            request.computed += n
            if request.computed < request.tokens + request.placeholders:
                step.partial.add(request)
            elif s.async_scheduling:
                request.placeholders += 1
        step.running, step.waiting, step.free_blocks = len(self.running), len(self.waiting), len(self.blocks.free)
        return step

    def decide(self, step: Step) -> None:
        budget = self._running(step, self.settings.max_num_batched_tokens)
        if not step.preempted:
            self._waiting(step, budget)

    def _running(self, step: Step, budget: int) -> int:
        s, i = self.settings, 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            last_in_flight = request.computed + 2 - request.placeholders >= request.prompt + request.output
            if request.placeholders > 0 and last_in_flight:
                i += 1
                continue
            n = request.tokens + request.placeholders - request.computed
            if 0 < s.long_prefill_token_threshold < n:
                n = s.long_prefill_token_threshold
            n = min(n, budget, s.max_model_len - request.computed - 1)
            if n <= 0:
                i += 1
                continue
            while not self.allocate(request, n, (), admission=False):
                victim = self.running[-1]
                if s.policy == "priority":
                    victim = max(self.running, key=self.urgency)  # max keeps the first of ties
                if victim in step.scheduled:
                    budget += step.scheduled.pop(victim)[0]
                    i -= 1
                self.preempt(victim, step)
                if victim is request:
                    return budget
            step.scheduled[request] = (n, request.computed)
            budget -= n
            i += 1
        return budget

    def _waiting(self, step: Step, budget: int) -> None:
        s = self.settings
        while self.waiting and budget > 0 and len(self.running) < s.max_num_seqs:
            request = self.waiting[0]
            hits = self.blocks.hit_blocks(request)
            hit = len(hits) * s.block_size
            n = request.tokens - hit
            if 0 < s.long_prefill_token_threshold < n:
                n = s.long_prefill_token_threshold
            if not s.chunked_prefill and n > budget:
                return
            n = min(n, budget)
            if not self.allocate(request, n, hits, admission=True):
                return
            self.running.append(self.waiting.pop(0))
            if not request.preemptions:
                request.cached = hit
            request.computed = hit
            step.scheduled[request] = (n, hit)
            budget -= n

    def update(self, step: Step) -> list[PlainRequest]:
        """Apply the step's tokens; the requests that got one, in schedule order."""
        outputs = []
        for request in step.scheduled:
            if request in step.partial:
                continue
            request.generated += 1
            if self.settings.async_scheduling:
                request.placeholders -= 1
                self.blocks.register(request, request.computed - request.placeholders)
            if request.generated == request.output:
                request.finished = True
                self.blocks.release(request)
                (self.running if request in self.running else self.waiting).remove(request)
            outputs.append(request)
        return outputs


class PlainEngine:
    """`noise(mode, launch begin)` is a launch's deviation from its mean, asked for every step but full graphs."""

    def __init__(
        self,
        cost: CostModel,
        settings: Settings,
        noise: Callable[[int, float], float] | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.cost, self.host, self.settings = cost, cost.host, settings
        self.noise = noise or (lambda mode, now_s: 0.0)
        self.scheduler = scheduler or Scheduler(settings)
        self.sent: list[tuple[float, int, PlainRequest]] = []  # heap: on their way to the engine
        self.held: deque[PlainRequest] = deque()  # closed loop: not sent yet
        self.received: list[PlainRequest] = []  # with their schedulable_s, not yet drained
        self.passed_s = -inf
        self.gpu_free_s = -inf
        self.low = self.low_s = 0.0  # how far chunks had pulled the clocks down, and when
        self.log: list[Step] = []

    def run(self, requests: Sequence[PlainRequest]) -> list[Step]:
        for request in sorted(requests, key=lambda r: (r.send_s, r.id)):
            if self.settings.concurrency is None or len(self.sent) < self.settings.concurrency:
                self._send(request, request.send_s)
            else:
                self.held.append(request)
        turn = self._asynchronous if self.settings.async_scheduling else self._synchronous
        turn()
        return self.log

    # The client and the way to the engine.

    def _send(self, request: PlainRequest, at_s: float) -> None:
        request.send_s = at_s
        heapq.heappush(self.sent, (at_s, request.id, request))

    def _receive(self, until_s: float) -> None:
        """Requests come in one at a time; work out when those sent by `until_s` are schedulable."""
        while self.sent and self.sent[0][0] <= until_s:
            request = heapq.heappop(self.sent)[2]
            start_s = max(request.send_s, self.passed_s)
            self.passed_s = start_s + self.host.receive_busy_s + self.host.receive_per_token_s * request.prompt
            request.schedulable_s = self.passed_s + self.host.receive_s
            self.received.append(request)

    def _drain(self, now_s: float) -> None:
        self._receive(now_s)
        while self.received and self.received[0].schedulable_s <= now_s:
            self.scheduler.add(self.received.pop(0))

    def _next_arrival_s(self) -> float:
        if not self.received and self.sent:
            self._receive(self.sent[0][0])
        return self.received[0].schedulable_s if self.received else inf

    # One step on the two clocks.

    def _schedule(self, now_s: float) -> Step:
        self._drain(now_s)
        self.scheduler.now_s = now_s
        step = self.scheduler.schedule()
        step.schedule_s = now_s
        for request in step.scheduled:
            if request.scheduled_s != request.scheduled_s:
                request.scheduled_s = now_s
        return step

    def _launch(self, step: Step) -> None:
        host, requests, chunks = self.host, len(step.scheduled) + step.ghost_seqs, step.chunks
        step.mode = mode = self.cost.mode(step.tokens, len(chunks))
        new_tokens = sum(n for n, _ in chunks)
        step.launch_s = (
            step.schedule_s
            + host.schedule_s
            + host.schedule_per_request_s * step.running
            + host.schedule_per_token_s * new_tokens
        )
        launch_s = host.launch_s[mode] + host.launch_per_request_s[mode] * requests
        launch_s += host.launch_per_chunk_s[mode] * len(chunks)
        step.free_s = step.launch_s
        if host.worker and self.log:
            step.launch_s = max(step.launch_s, self.log[-1].launched_s)
        step.launched_s = step.launch_s + launch_s
        # a full graph's short launch hides behind the GPU: no noise, interference only where the GPU waits for it
        if mode != FULL:
            step.launched_s += self.noise(mode, step.launch_s)
        exposed = self.scheduler.settings.async_scheduling and self.gpu_free_s <= step.launched_s
        if (mode != FULL or exposed) and not host.worker:
            step.launched_s = self._slowed(step.schedule_s, step.launched_s)
        if not host.worker:
            step.free_s = step.launched_s
        if chunks:
            read_tokens = step.read_tokens(self.cost)
            longest = [step.longest] if step.seqs and getattr(self.cost, "reads_longest", False) else []
            step.gpu_time_s = self.cost.mixed_s(chunks, step.seqs, read_tokens, *longest)
        else:
            step.gpu_time_s = self.cost.decode_ramp(step.seqs, step.read_tokens(self.cost)).first_s
        start_s = max(self.gpu_free_s, step.launch_s + host.lead_s[mode])
        if self.log and self.log[-1].chunks and step.launch_s + host.lead_s[mode] - self.gpu_free_s < WARM_S:
            if chunks:
                step.gpu_time_s = host.warmed_s(step.gpu_time_s)
            else:
                chunk_s = self.log[-1].gpu_time_s
                low = self.low * exp(min(self.low_s - (self.gpu_free_s - chunk_s), 0.0) / RECOVERY_S)
                self.low, self.low_s = low + min(chunk_s / WARM_S, 1.0) * (1.0 - low), self.gpu_free_s
                start_s += host.cooled_s(chunk_s, low)
        step.gpu_end_s = max(start_s + step.copy_s + step.gpu_time_s, step.launched_s + host.tail_s[mode])
        self.gpu_free_s = step.gpu_end_s
        self.log.append(step)

    def _slowed(self, begin_s: float, end_s: float) -> float:
        """What ends at `end_s` lasts longer for each request that becomes schedulable in it, after `begin_s`."""
        i = 0
        while True:
            self._receive(end_s)
            if i == len(self.received) or self.received[i].schedulable_s > end_s:
                return end_s
            if self.received[i].schedulable_s > begin_s:
                end_s += self.host.interference_per_token_s * self.received[i].prompt
            i += 1

    def _update(self, step: Step, at_s: float) -> float:
        """Hand out the step's tokens; when the host is free again."""
        step.update_s = at_s
        seen_s = at_s + self.host.respond_s + self.host.respond_per_output_s * step.outputs
        for request in self.scheduler.update(step):
            request.token_s.append(seen_s)
            if request.finished and self.held:
                self._send(self.held.popleft(), seen_s)
        return at_s + self.host.update_s + self.host.update_per_output_s * step.outputs

    def _synchronous(self) -> None:
        now_s = self._next_arrival_s() + self.host.wake_s
        while now_s < inf:
            step = self._schedule(now_s)
            if step.scheduled:
                self._launch(step)
                now_s = self._update(step, max(step.gpu_end_s + self.host.return_s, step.free_s))
            else:
                now_s = now_s if step.preempted else self._idle(now_s, step.wait_s)  # preempted: may be admitted

    def _asynchronous(self) -> None:
        in_flight: Step | None = None
        now_s = self._next_arrival_s() + self.host.wake_s
        while now_s < inf:
            step = self._schedule(now_s)
            if step.scheduled:
                self._launch(step)
                if in_flight is None:
                    now_s = step.free_s
                else:
                    now_s = self._update(in_flight, max(in_flight.gpu_end_s + self.host.return_s, step.free_s))
                in_flight = step
            elif in_flight is not None:
                now_s = self._update(in_flight, max(in_flight.gpu_end_s + self.host.return_s, now_s))
                in_flight = None
            else:
                now_s = now_s if step.preempted else self._idle(now_s, step.wait_s)  # preempted: may be admitted

    def _idle(self, now_s: float, wait_s: float) -> float:
        """Nothing scheduled, nothing in flight: the next arrival wakes the engine, or the time that was named."""
        if wait_s < inf:
            return max(now_s, min(wait_s, self._next_arrival_s() + self.host.wake_s))
        if self.scheduler.waiting:
            request = self.scheduler.waiting[0]
            raise ValueError(f"request {request.id} with {request.tokens} tokens never fits the KV cache")
        return max(now_s, self._next_arrival_s() + self.host.wake_s)
