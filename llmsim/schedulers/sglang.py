"""SGLang's scheduler (0.5.23): prompts first, decodes when no prompt can be taken.

One round either runs a prefill batch alone or one decode step of everybody. A prefill batch is the chunked request,
of which there is one at most, and then waiting requests in the order of `schedule_policy`, while budgets last:

    chunk  = chunked_prefill_size      input = max_prefill_tokens      (both less the decode rows if mixed)
    total  = free and evictable tokens - sum over decoding requests of min(allowed - generated, 4096) * ratio
    admit if to compute + min(allowed - generated, 4096) + one page < total; else nobody more, until somebody leaves
    a request that does not fit into what is left of `chunk` becomes the chunked one, cut to pages, and is the last
    an admitted one takes what it computes (in pages) from all three, and a page and, if it completes its prompt,
    min(allowed, 4096) more from `total`

`ratio`, the share of what it may still generate that a request is expected to, starts at 0.7 times
schedule_conservativeness, falls in 600 decode rounds to 0.14 of that, and is set anew by a retraction:

    retract  when a decode step lacks pages: the requests that have generated least, of those the longest prompts, go
             back to the end of the queue until the rest fits. What they generated is computed again.
             ratio = (generated + 20 requests) / (allowed + 1) over those that stay
             (`retraction_policy` priority: the least urgent first, and of them in this order)

`allowed` is the client's max_tokens: `max_new_tokens`, or the answer's own length if that is 0 or less than it.
`prefill_decode_interval` decode rounds follow every prefill batch. With `enable_mixed_chunk` everybody decodes beside
the prefill batch. With `enable_priority_scheduling` a waiting request that finds all slots taken retracts requests
whose priority is lower by more than `priority_scheduling_preemption_threshold`, the lowest and latest first.

Source: SGLang 0.5.23, managers/scheduler.py, schedule_policy.py, schedule_batch.py.
Where this differs, see docs/policies/sglang.md.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from llmsim.schedulers import HOLD
from llmsim.schedulers.sglang_batch import ADMITTED, NO_TOKEN, PrefillBatch
from llmsim.schedulers.sglang_queue import Order

if TYPE_CHECKING:
    from llmsim.engine import Limits
    from llmsim.replica import Replica
    from llmsim.request import Request

INIT_RATIO, MIN_RATIO_SHARE, DECAY_ROUNDS = 0.7, 0.14, 600
RETRACT_ROUNDS = 20  # decode rounds that those who stay shall have room for
CLIP_TOKENS = 4096  # no more of an answer is reserved


class Sglang:
    """SGLang: its options by their names; chunked_prefill_size 0 is max_num_batched_tokens, -1 is off."""

    def __init__(
        self,
        schedule_policy: str = "fcfs",
        schedule_conservativeness: float = 1.0,
        chunked_prefill_size: int = 0,
        max_prefill_tokens: int = 16384,
        enable_mixed_chunk: bool = False,
        prefill_decode_interval: int = 0,
        enable_priority_scheduling: bool = False,
        schedule_low_priority_values_first: bool = False,
        disable_priority_preemption: bool = False,
        priority_scheduling_preemption_threshold: int = 10,
        retraction_policy: str = "length",
        max_new_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        for name, least in (
            ("chunked_prefill_size", -1),
            ("max_prefill_tokens", 1),
            ("prefill_decode_interval", 0),
            ("max_new_tokens", 0),
        ):
            if locals()[name] < least:
                raise ValueError(f"{name}={locals()[name]} is too small: give {least} or more.")
        if schedule_conservativeness < 0:
            raise ValueError(f"schedule_conservativeness={schedule_conservativeness} is negative: give 0 or more.")
        if retraction_policy not in ("length", "priority"):
            raise ValueError(f"retraction_policy={retraction_policy!r} is unknown. Choose length or priority.")
        self.by_priority = retraction_policy == "priority"
        self.chunk_tokens, self.input_tokens = chunked_prefill_size, max_prefill_tokens
        self.mixed, self.interval = enable_mixed_chunk, prefill_decode_interval
        self.may_preempt = enable_priority_scheduling and not disable_priority_preemption
        self.threshold = priority_scheduling_preemption_threshold
        self.max_new_tokens = max_new_tokens
        self.ranks = Order(
            schedule_policy, enable_priority_scheduling, schedule_low_priority_values_first, self.allowed, seed
        )
        self.order = self.ranks.key
        if self.ranks.changes:
            self.arrived = self._arrived
        self.first_ratio = min(INIT_RATIO * schedule_conservativeness, 1.0)
        self.least_ratio = self.first_ratio * MIN_RATIO_SHARE
        self._ratio, self._decays = self.first_ratio, 0  # as last set, and decode rounds since
        self._full = False  # nobody is admitted before somebody leaves
        self._running = 0  # requests with a slot, after the round before
        self._iteration = -1  # of the batch, when the round before decoded; -1: it did not
        self._decodes_due = 0  # before the next prefill batch

    @staticmethod
    def token_limit(limits: Limits) -> float:
        """Decodes have no token budget."""
        return inf

    def allowed(self, request: Request) -> int:
        """Tokens that the client lets a request generate."""
        return max(self.max_new_tokens, request.output_tokens)

    @property
    def new_token_ratio(self) -> float:
        if not self._decays:
            return self._ratio
        fall = (self.first_ratio - self.least_ratio) / DECAY_ROUNDS
        return max(self._ratio - self._decays * fall, self.least_ratio)

    def _arrived(self, request: Request, now_s: float) -> None:
        self.ranks.joined(request)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        self._look_back(replica)
        prefilled = self._prefill(replica)
        if prefilled:
            self._decodes_due = self.interval
        if not prefilled or self.mixed:
            self._decode(replica, prefilled)
        self._running = len(replica.running)
        if prefilled or replica.preempted_now or replica.prefilling:
            return None
        return HOLD if not replica.waiting or (self._full and not self.may_preempt) else None

    def _look_back(self, replica: Replica) -> None:
        """What has happened since the round before: decode rounds, requests that left."""
        if self._iteration >= 0:
            rounds = replica.batch.iteration - self._iteration
            self._decays += rounds
            self._decodes_due = max(0, self._decodes_due - rounds)
            self._iteration = -1
        if len(replica.running) < self._running:
            self._full = False
        if not replica.running and not replica.waiting:
            self._ratio, self._decays = self.first_ratio, 0

    # ---- prefill

    def _prefill(self, replica: Replica) -> bool:
        """Run a prefill batch, if one can be made."""
        chunked = next(iter(replica.prefilling), None)
        if self.may_preempt:
            self._full = False
        if chunked is None and (self._full or not replica.waiting):
            return False
        if self._decodes_due and replica.batch.size:
            return False
        if chunked is None and len(replica.running) >= replica.limits.max_num_seqs and not self.may_preempt:
            self._full = True
            return False
        batch = self._prefill_batch(replica)
        if chunked is not None and not batch.go_on(chunked):
            return False
        taken = 0 if batch.ends else self._admit(replica, batch)
        batch.start()
        self.ranks.started(batch.requests, taken)
        self.ranks.computed_tokens += sum(tokens for _, tokens, _ in batch.chosen)
        return bool(batch.chosen)

    def _prefill_batch(self, replica: Replica) -> PrefillBatch:
        batch = replica.batch
        rows = batch.size if self.mixed else 0
        ratio, iteration = self.new_token_ratio, batch.iteration
        expected = 0
        for request in batch:
            left = self.allowed(request) - request.generated_tokens - iteration + request.joined
            expected += left if left < CLIP_TOKENS else CLIP_TOKENS
        page = replica.kv.block_tokens
        chunk = inf if self.chunk_tokens < 0 else (self.chunk_tokens or replica.limits.max_num_batched_tokens) - rows
        total = replica.kv.free_blocks * page - rows - expected * ratio
        return PrefillBatch(replica, total, self.input_tokens - rows, chunk, self.allowed)

    def _admit(self, replica: Replica, batch: PrefillBatch) -> int:
        """Waiting requests in order, while slots and budgets last; returns how many wait no more."""
        taken = 0
        for request in self.ranks.candidates(replica):
            if request.output_tokens > batch.longest_answer(request):
                replica.reject(request)
                taken += 1
                continue
            if len(batch.requests) + len(replica.running) - batch.started_now >= replica.limits.max_num_seqs:
                self._full = True
            if self._full and not (self.may_preempt and self._make_way(replica, batch, request)):
                break
            verdict = batch.add(request)
            if request in batch.requests:
                taken += 1
            if verdict is NO_TOKEN:
                self._full = bool(batch.requests or replica.running)
            if verdict is not ADMITTED:
                break
        return taken

    def _make_way(self, replica: Replica, batch: PrefillBatch, request: Request) -> bool:
        """Retract less urgent requests, if that gives this one a slot and room."""
        sign = -self.ranks.sign
        hit = replica.look_up(request)
        left = request.prefill_tokens - hit.blocks * replica.kv.block_tokens
        missing = left + min(self.allowed(request), CLIP_TOKENS) - batch.total
        chosen = []
        for other in sorted(replica.batch, key=lambda r: (sign * r.priority, -r.arrival_s, -r.id)):
            if (request.priority - other.priority) * sign <= self.threshold:
                break
            chosen.append(other)
            missing -= self._expected(replica, other)
            if missing <= 0:
                break
        if not chosen or missing > 0:
            return False
        for other in chosen:
            batch.total += self._expected(replica, other)
            before = replica.kv.free_blocks
            self._retract(replica, other)
            batch.total += (replica.kv.free_blocks - before) * replica.kv.block_tokens
        return True

    def _expected(self, replica: Replica, request: Request) -> float:
        """Tokens that a decoding request is expected to take yet."""
        left = self.allowed(request) - self._generated(replica, request)
        return min(left, CLIP_TOKENS) * self.new_token_ratio

    @staticmethod
    def _generated(replica: Replica, request: Request) -> int:
        return request.generated_tokens + replica.batch.iteration - request.joined

    # ---- decode

    def _decode(self, replica: Replica, prefilled: bool) -> None:
        """Everybody makes a token, less those who must be retracted for it."""
        batch = replica.batch
        if not batch.size:
            return
        if prefilled:  # mixed: only if there is room
            replica.decode_if_room()
            return
        if not replica.decode_if_room():
            self._retract_some(replica)
            if not replica.decode_if_room():  # the last one alone, beside a half-prefilled prompt
                self._retract(replica, next(iter(batch)))
            self._decays -= 1  # this round sets the ratio
        if replica.decoding:
            self._iteration = batch.iteration

    def _retract_some(self, replica: Replica) -> None:
        batch, kv = replica.batch, replica.kv
        sign = -self.ranks.sign if self.by_priority else 0  # the least urgent first
        leaving = sorted(batch, key=lambda r: (sign * r.priority, self._generated(replica, r), -r.prompt_tokens))
        for request in leaving[:-1]:
            self._retract(replica, request)
            if batch.blocks_needed(1) <= kv.free_blocks:
                break
        generated = sum(self._generated(replica, request) for request in batch)
        allowed = sum(map(self.allowed, batch))
        self._ratio = min(1.0, (generated + RETRACT_ROUNDS * batch.size) / (allowed + 1))
        self._decays = 0
        self._full = False

    def _retract(self, replica: Replica, request: Request) -> None:
        self.ranks.leaves(request)
        replica.preempt(request, keep_content=False)
        if self.ranks.changes:
            self.ranks.joined(request)
