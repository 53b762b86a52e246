"""Static batching, Orca, vLLM V0 and Sarathi-Serve in the plainest code, on the clocks of the plain engine.

Written from the papers' algorithms, one request at a time, with blocks in a list; nothing is shared with the policies
of `llmsim.schedulers`. Without prefix caching.
"""

from __future__ import annotations

from math import ceil

from plain_engine import PlainRequest, Scheduler, Settings, Step


def ends_in_flight(request: PlainRequest) -> bool:
    """Its last token is scheduled and not back."""
    return request.placeholders > 0 and request.computed + 2 - request.placeholders >= request.prompt + request.output


class Plain(Scheduler):
    """What the policies share: taking blocks, and the rows that decode."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.arrived_s: dict[PlainRequest, float] = {}

    def add(self, request: PlainRequest) -> None:
        super().add(request)
        self.arrived_s[request] = request.schedulable_s

    @property
    def free(self) -> int:
        return len(self.blocks.free)

    @property
    def total(self) -> int:
        return self.settings.num_gpu_blocks - 1

    def blocks_of(self, tokens: int) -> int:
        return ceil(tokens / self.settings.block_size)

    def decoding(self) -> list[PlainRequest]:
        return [r for r in self.running if r.computed >= r.tokens + r.placeholders - 1 and not ends_in_flight(r)]

    def partial(self) -> list[PlainRequest]:
        return [r for r in self.running if r.computed < r.tokens + r.placeholders - 1]

    def needs_block(self, request: PlainRequest) -> bool:
        return request.computed % self.settings.block_size == 0

    def grant(self, request: PlainRequest, tokens: int, step: Step) -> None:
        self.blocks.take(request, request.computed + tokens, ())
        step.scheduled[request] = (tokens, request.computed)

    def admit(self, request: PlainRequest, tokens: int, step: Step) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        self.grant(request, tokens, step)


class PlainOrca(Plain):
    def decide(self, step: Step) -> None:
        for request in self.decoding():
            self.grant(request, 1, step)
        s = self.settings
        tokens = 0
        while self.waiting and len(self.running) < s.max_num_seqs:
            request = self.waiting[0]
            reserved = sum(self.blocks_of(r.prompt + r.output - 1) for r in self.running)
            if reserved + self.blocks_of(request.prompt + request.output - 1) > self.total:
                break
            if tokens + request.prompt > s.max_num_batched_tokens and tokens > 0:
                break
            self.admit(request, request.prompt, step)
            tokens += request.prompt


class PlainV0(Plain):
    swaps = False
    copy_s = 0.0
    host_blocks = 0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.swapped: list[PlainRequest] = []
        self.spare = int(0.01 * self.total)

    def decide(self, step: Step) -> None:
        if not self.swapped:
            self.prompts(step)
        if not step.scheduled:
            self.decodes(step)
            if not step.preempted:
                self.swap_in(step)

    def prompts(self, step: Step) -> None:
        s = self.settings
        tokens = 0
        while self.waiting and len(self.running) < s.max_num_seqs:
            request = self.waiting[0]
            if tokens > 0 and tokens + request.tokens > s.max_num_batched_tokens:
                break
            left = self.free - self.blocks_of(request.tokens)
            if left < (self.spare if self.running else 0):
                break
            self.admit(request, request.tokens, step)
            tokens += request.tokens

    def decodes(self, step: Step) -> None:
        queue = sorted(self.decoding(), key=lambda r: (r.send_s, r.id))
        while queue:
            request = queue.pop(0)
            alone = not queue and not step.scheduled
            while self.free == 0 and not (alone and not self.needs_block(request)):
                victim = queue.pop() if queue else request
                self.evict(victim, step)
                if victim is request:
                    break
            if request in self.running:
                self.grant(request, 1, step)

    def evict(self, victim: PlainRequest, step: Step) -> None:
        held = len(victim.blocks)
        if not self.swaps or held > self.host_blocks:
            self.preempt(victim, step)
            return
        self.host_blocks -= held
        step.copy_s += held * self.copy_s
        self.running.remove(victim)
        self.blocks.release(victim)
        victim.preemptions += 1
        step.preempted.append(victim.id)
        self.swapped.append(victim)
        self.swapped.sort(key=lambda r: (r.send_s, r.id))

    def swap_in(self, step: Step) -> None:
        while self.swapped and len(self.running) < self.settings.max_num_seqs:
            request = self.swapped[0]
            blocks = self.blocks_of(request.computed)
            left = self.free - blocks - (1 if self.running else 0)
            if left < (self.spare if self.running else 0):
                break
            self.swapped.pop(0)
            self.host_blocks += blocks
            step.copy_s += blocks * self.copy_s
            self.running.append(request)
            self.grant(request, 1, step)


class PlainSarathi(Plain):
    token_budget = 512

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.spare = int(0.01 * self.total)

    def promised(self) -> int:
        return sum(self.blocks_of(r.tokens) - len(r.blocks) for r in self.partial())

    def decide(self, step: Step) -> None:
        while sum(self.needs_block(r) for r in self.decoding()) + self.promised() > self.free and self.decoding():
            victims = self.decoding() + self.partial()
            self.preempt(max(victims, key=lambda r: (r.send_s, r.id)), step)
        partial = self.partial()
        for request in self.decoding():
            self.grant(request, 1, step)
        budget = min(self.token_budget, self.settings.max_num_batched_tokens) - len(step.scheduled)
        for request in partial:
            tokens = min(request.tokens - request.computed, budget)
            if tokens > 0:
                self.grant(request, tokens, step)
                budget -= tokens
        while self.waiting and budget > 0 and not step.preempted and len(self.running) < self.settings.max_num_seqs:
            request = self.waiting[0]
            promised = sum(self.blocks_of(r.tokens) - len(r.blocks) for r in self.running if r in partial)
            partial.append(request)
            left = self.free - promised - self.blocks_of(request.tokens)
            if left < (self.spare if self.running else 0):
                break
            tokens = min(request.tokens, budget)
            self.admit(request, tokens, step)
            budget -= tokens


class PlainStatic(Plain):
    batch_size = 4
    timeout_s = 0.0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.members: list[PlainRequest] = []
        self.todo: list[PlainRequest] = []
        self.steps = 0

    def decide(self, step: Step) -> None:
        longest = max((r.prompt for r in self.members), default=0)
        if self.members and not self.todo:
            if rows := self.decoding():
                for request in rows:
                    self.grant(request, 1, step)
                step.ghost_seqs = len(self.members) - len(rows)
                read = sum(before for _, before in step.scheduled.values())
                step.ghost_kv_tokens = len(self.members) * (longest + self.steps) - read
                self.steps += 1
                return
            self.members = []
        if not self.members and self.waiting and not self.running:
            self.form(step)
        longest = max((r.prompt for r in self.members), default=0)
        rows_left = self.settings.max_num_batched_tokens // longest if longest else 0
        for request in self.todo[: max(1, rows_left)]:
            self.admit(request, request.prompt, step)
            step.padding[request] = longest - request.prompt
            self.todo = self.todo[1:]

    def form(self, step: Step) -> None:
        most = min(self.batch_size, self.settings.max_num_seqs)
        due_s = self.arrived_s[self.waiting[0]] + self.timeout_s
        if len(self.waiting) < most and self.now_s < due_s:
            step.wait_s = due_s
            return
        members = self.waiting[:most]
        while len(members) > 1:
            row = max(r.prompt for r in members) + max(r.output for r in members) - 1
            if self.blocks_of(row) * len(members) <= self.total:
                break
            members = members[:-1]
        self.members, self.todo, self.steps = members, list(members), 0
