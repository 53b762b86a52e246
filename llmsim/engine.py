"""An engine without a clock: a queue, running requests, a KV cache, and what policies may do to them.

One iteration is `begin` (the policy decides), `commit` (its tokens are booked as scheduled) and, once the results
are known, `free` (blocks and slots of the requests that ended). `llmsim.replica` puts it on two clocks;
`llmsim.oracle` steps it by hand. Source of the order of events: vLLM 0.25.1, v1/core/sched/scheduler.py and
async_scheduler.py.
"""

from __future__ import annotations

from math import isnan
from operator import index
from typing import Any, NamedTuple

from llmsim.aside import Aside, Swap
from llmsim.batch import RunningBatch
from llmsim.kvcache import Hit, KVCache
from llmsim.plugins import PolicyError
from llmsim.queue import WaitingQueue
from llmsim.request import Request

FRUITLESS_PREEMPTIONS = 10_000  # without a token in between: requests take each other's blocks for ever


class Limits(NamedTuple):
    max_num_seqs: int
    max_num_batched_tokens: int


class Engine(Aside):
    """What policies read and act on. `asynchronous`: the results of an iteration are known one schedule later.

    `swap`: the host memory that `swap_out` may use.
    """

    def __init__(
        self, scheduler: Any, kv: KVCache, limits: Limits, *, asynchronous: bool = True, swap: Swap | None = None
    ) -> None:
        self.scheduler, self.kv, self.limits = scheduler, kv, limits
        self.asynchronous = asynchronous
        self.running: dict[Request, None] = {}  # all that hold a slot, in order of admission
        self.prefilling: dict[Request, None] = {}  # of them, the half-prefilled ones
        self.batch = RunningBatch(kv.block_tokens)
        # What the policy has decided for the iteration at hand.
        self.decoding = 0
        self.chunks: list[tuple[Request, int, int]] = []  # request, tokens, computed before
        self.preempted_now: list[Request] = []
        self.paused_now: list[Request] = []
        self.preemptions = 0
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._now_s = 0.0
        self._victim = getattr(scheduler, "victim", None)
        own_limit = getattr(scheduler, "token_limit", None)  # of one iteration, where the engine's is another
        self._token_limit: float = limits.max_num_batched_tokens if own_limit is None else own_limit(limits)
        self._blocks_taken = 0  # by this iteration's decodes
        self._granted: dict[Request, None] | None = None  # decodes of a one-by-one pass
        self._publishing: dict[Request, None] = {}  # running requests whose answer others may share
        self._hits_grow = False  # one of these is generating what the policy has looked for: its answer cannot last
        self._fruitless = 0  # preemptions since the last token
        self._rejoined: dict[Request, int] = {}  # sat an iteration out: the batch iteration at which they came back
        self._firsts: list[Request] = []  # whose prompt the iteration before completed
        self._late: dict[Request, None] = {}  # decode again after an iteration without them
        super().__init__(swap)
        queue = getattr(scheduler, "queue", None)
        self.waiting: WaitingQueue = queue(self) if queue else WaitingQueue(getattr(scheduler, "order", None))

    # ---------------------------------------------------------------------------------------------- what policies do

    def decode(self) -> None:
        """Every decoding request makes a token in this iteration; the newest are preempted while blocks run short."""
        while not self.decode_if_room():
            self.preempt(self._victim(self) if self._victim else next(reversed(self.running)))

    def decode_if_room(self) -> bool:
        """Every decoding request makes a token in this iteration, if all the KV blocks that takes are free."""
        if self.decoding:
            raise PolicyError(f"{self._policy} called decode() twice for one iteration.")
        batch, kv = self.batch, self.kv
        blocks = batch.blocks_needed(1)
        if blocks > kv.free_blocks:
            return False
        if blocks:
            kv.take(blocks)
        self._blocks_taken = blocks
        self.decoding = batch.size
        return True

    def decode_one(self, request: Request) -> None:
        """One decoding request makes a token; end the pass with `pause_others()`."""
        if self._granted is None:
            if self.decoding:
                raise self._error(f"asked to decode request {request.id} after decode() in the same iteration")
            self._granted = {}
        if request not in self.batch or request in self._granted:
            why = "makes a token in this iteration already" if request in self._granted else "is not decoding"
            raise self._error(f"asked to decode request {request.id}, which {why}")
        if self.batch.needs_block(request):
            if not self.kv.free_blocks:
                raise self._error(f"asked to decode request {request.id}, which needs a KV block, with none free")
            self.kv.take(1)
            self._blocks_taken += 1
        self._granted[request] = None
        self.decoding += 1

    def makes_token(self, request: Request) -> bool:
        """Whether a decoding request was named by `decode_one` in this iteration."""
        return self._granted is not None and request in self._granted

    def pause_others(self) -> None:
        """Decoding requests that `decode_one` did not name keep their blocks and sit this iteration out."""
        granted = self._granted or {}
        self._granted = None
        for request in [member for member in self.batch if member not in granted]:
            self.batch.remove(request)
            self.paused_now.append(request)
            self._cut(request)
            if request in self._late:  # out for a second time: its last token is not in flight
                del self._late[request]
                if request in self._publishing:
                    self.kv.store(request, request.computed_tokens)

    @property
    def publishes(self) -> bool:
        """Whether running requests generate what others may find."""
        return bool(self._publishing)

    def look_up(self, request: Request) -> Hit:
        """What the prefix cache holds of a waiting request's sequence."""
        known = request.prompt_tokens + request.generated_tokens
        if not self._publishing:
            return self.kv.match(request, known)
        self._publish()
        hit = self.kv.match(request, known)
        self._hits_grow = self._hits_grow or self.kv.may_grow(request, hit, self._publishing)
        return hit

    def prefill(self, request: Request, tokens: int, hit: Hit | None = None, padding_tokens: int = 0) -> bool:
        """Compute `tokens` more of a request's prompt in this iteration; False if its blocks do not fit.

        A waiting request is admitted by this; `hit` is what `look_up` returned for it in this iteration.
        `padding_tokens` more rows are computed with the chunk and thrown away.
        """
        kv = self.kv
        if type(tokens) is not int:
            tokens = self._whole(tokens, request)
        computed = request.computed_tokens
        left = request.prompt_tokens + request.generated_tokens - computed
        if request in self.running:
            if not 0 < tokens <= left or request not in self.prefilling:
                raise self._error(f"asked to prefill {tokens} tokens of request {request.id}, which has {left} left")
            blocks = kv.blocks_for(computed + tokens) - kv.blocks_for(computed)
            if blocks > kv.free_blocks:
                return False
            kv.take(blocks)
            if self._publishing:  # of equal blocks the one stored first is found
                self._publish(request)
        else:
            if request.swapped_tokens:
                raise self._error(f"asked to prefill request {request.id}, whose KV is in host memory: swap_in() it")
            if hit is None:
                hit = self.look_up(request)
            computed = hit.blocks * kv.block_tokens
            left -= computed
            if not 0 < tokens <= left:
                raise self._error(f"asked to prefill {tokens} tokens of request {request.id}, which has {left} left")
            most = self.limits.max_num_seqs
            if len(self.running) >= most and len(self.running) - len(self.paused) >= most:
                raise self._error(f"admitted request {request.id} beyond max_num_seqs={most}")
            if kv.blocks_for(computed + tokens) - hit.blocks + hit.idle_blocks > kv.free_blocks:
                return False
            self._admit(request, hit, computed, tokens)
        request.computed_tokens = computed + tokens
        if request.held is not None:
            kv.store(request, computed + tokens)
        self.chunks.append((request, tokens, computed))
        if padding_tokens:
            self._pad(request, padding_tokens)
        return True

    def _whole(self, tokens: Any, request: Request) -> int:
        """Of numpy's whole numbers; anything else is none."""
        try:
            return index(tokens)
        except TypeError:
            raise self._error(
                f"asked to prefill {tokens!r} tokens of request {request.id}: give a whole number"
            ) from None

    def _pad(self, request: Request, padding_tokens: int) -> None:
        if padding_tokens < 0:
            raise self._error(f"padded request {request.id} by {padding_tokens} tokens")
        self._padding[request] = padding_tokens
        self._special = True

    def _admit(self, request: Request, hit: Hit, computed: int, tokens: int) -> None:
        try:
            self.waiting.remove(request)
        except IndexError:
            raise self._error(f"asked to prefill request {request.id}, which is neither waiting nor running") from None
        self.kv.admit(request, hit, computed + tokens)
        self.running[request] = None
        self.prefilling[request] = None
        if isnan(request.scheduled_s):
            request.scheduled_s = self._now_s
            request.cached_tokens = computed
            self.queried_tokens += request.prompt_tokens
            self.hit_tokens += computed

    def preempt(self, request: Request, keep_content: bool = True) -> None:
        """Send a running request back to the queue; it will compute everything again (recompute).

        `keep_content=False`: what it computed itself cannot be found again, what it found still can.
        """
        if request not in self.running:
            raise self._error(f"preempted request {request.id}, which is not running")
        tokens, known = self._vacate(request)
        self.kv.release(request, self.kv.blocks_for(tokens), known, resumes=True, keep_content=keep_content)
        self._send_back(request)

    def _vacate(self, request: Request) -> tuple[int, int]:
        """Take a running request out of everything but its blocks: tokens they hold, and how many of them are known."""
        if self._publishing:  # before its own blocks: of equal ones the first stored is found
            self._publish()
        batch = self.batch
        if request in batch:
            decodes = batch.iteration - request.joined
            batch.remove(request)
            tokens = request.computed_tokens
            if self._granted is not None and request in self._granted:  # it was to make a token in this very iteration
                del self._granted[request]
                self.decoding -= 1
                self._blocks_taken -= tokens % self.kv.block_tokens == 0
                tokens += 1
                decodes += 1
            known = tokens - self._in_flight(request, decodes)
            self._cut(request)
        else:
            tokens = known = request.computed_tokens
            if request in self.paused:
                del self.paused[request]
                known -= self._left_now.get(request, False)
            elif request not in self.prefilling:  # its last token is in flight
                if request not in self._firsts:  # a prompt is known as a whole
                    known -= self._in_flight(request, batch.iteration - self._rejoined.get(request, -1))
            elif isnan(request.last_token_s):
                request.last_token_s = self._now_s
            self.chunks = [chunk for chunk in self.chunks if chunk[0] is not request]
        del self.running[request]
        self._late.pop(request, None)
        self.prefilling.pop(request, None)
        self._publishing.pop(request, None)
        self._rejoined.pop(request, None)
        return tokens, known

    def _in_flight(self, request: Request, decodes: int) -> int:
        """Of a request's tokens, those whose content is not registered yet, after `decodes` decodes in a row.

        Asynchronous: content is registered when its token is known on the host, one iteration later, unless the
        request sat an iteration out: then the token that it goes on with has come back meanwhile.
        """
        first = 2 if request in self._rejoined else 1
        return 1 if self.asynchronous and decodes >= first else 0

    def _send_back(self, request: Request) -> None:
        request.computed_tokens = 0
        request.preemptions += 1
        self.preemptions += 1
        self._fruitless += 1
        if self._fruitless > FRUITLESS_PREEMPTIONS:
            raise self._error(
                f"preempted {FRUITLESS_PREEMPTIONS} times without a token in between, request {request.id} last:"
                f" running requests take each other's KV blocks, of which there are {self.kv.total_blocks}. A real"
                " engine would hang too; reserve whole sequences at admission (reserve_full_isl) or give it more blocks"
            )
        self.preempted_now.append(request)
        self.waiting.put_back(request)

    def _publish(self, before: Request | None = None) -> None:
        """Register what running requests with a known answer have generated, as far as vLLM would know it by now.

        Of equal blocks the one stored first is found: who is ahead stored it before those who follow, and of those
        who are level the one admitted first. vLLM registers blocks in the order in which it schedules, so `before` a
        running request's chunk only those admitted before it have registered this iteration's.
        """
        batch = self.batch
        progress: list[tuple[int, int, Request]] = []
        behind = False
        for request in self.running:
            behind = behind or request is before
            if request not in self._publishing:
                continue
            lag = 1 if self.asynchronous else 0  # its last token is in flight
            tokens = request.computed_tokens
            if request in batch:
                decodes = batch.iteration - request.joined
                if self.decoding and not behind and (self._granted is None or request in self._granted):
                    decodes += 1
                tokens += decodes
                lag = self._in_flight(request, decodes)
            elif request in self.paused:
                lag = int(self._left_now.get(request, False))
            progress.append((lag - tokens, len(progress), request))
        for minus_tokens, _, request in sorted(progress):
            self.kv.store(request, -minus_tokens)

    # ----------------------------------------------------------------------------------------- one iteration, no clock

    @property
    def now_s(self) -> float:
        """When the iteration at hand began to be scheduled."""
        return self._now_s

    def begin(self, now_s: float) -> bool:
        """Let the policy decide the iteration that starts now; returns whether its answer lasts."""
        self._now_s = now_s
        self.decoding = self._blocks_taken = 0
        if self.chunks:
            self.chunks = []
        if self.preempted_now:
            self.preempted_now = []
        if self.paused_now:
            for request in self.paused_now:
                self.batch.add(request)
                self._late[request] = None
                self._rejoined[request] = self.batch.iteration
            self.paused_now = []
        if self._special:
            self._clear()
        if self.kv.pending:
            self.kv.settle(self.asynchronous)
        self._hits_grow = False
        hold = self.scheduler.schedule(self, now_s)
        if hold and hold is not True and hold != True:  # noqa: E712 - numpy's True is another one
            raise self._error(f"returned {hold!r}: return HOLD, or None to be asked before every iteration")
        if self.chunks or self._granted is not None:
            self._check_iteration()
        return bool(hold) and not (self._hits_grow or self.kv.pending)

    def completed_prompts(self) -> list[Request]:
        """Requests whose chunk of this iteration is their last: it makes a token."""
        return [
            request
            for request, _, _ in self.chunks
            if request.computed_tokens == request.prompt_tokens + request.generated_tokens
        ]

    def commit(self, steps: int) -> list[Request]:
        """Book `steps` iterations as scheduled; returns the requests whose last token they make."""
        batch = self.batch
        if self.decoding:
            if steps > 1:
                blocks = batch.blocks_needed(steps) - self._blocks_taken  # the first iteration's are taken
                if blocks:
                    self.kv.take(blocks)
            if self._special:
                self._ghost_kv_tokens += steps * self._ghost_seqs
            ended = batch.advance(steps)
            self._fruitless = 0
        else:
            ended = []
        self._firsts = self.completed_prompts()
        for request in self._firsts:
            request.generated_tokens += 1
            self._fruitless = 0
            del self.prefilling[request]
            if request.identity_tokens > request.prompt_tokens and self.kv.publishes:
                self._publishing[request] = None
            if request.generated_tokens < request.output_tokens:
                batch.add(request)
            else:
                ended.append(request)
        return ended

    def free(self, ended: list[Request], now_s: float | None = None) -> None:
        """The host has taken the last token of these: their blocks and slots are free."""
        kv, on_ended = self.kv, self._on_ended
        if len(ended) > 1 and any(request.held is not None for request in ended):
            place = {request: at for at, request in enumerate(self.running)}  # vLLM's order, and so that of eviction
            ended = sorted(ended, key=lambda request: place.get(request, 0))
        for request in ended:
            if request in self.running:
                del self.running[request]
                self._publishing.pop(request, None)
                if self._rejoined:
                    self._rejoined.pop(request, None)
                tokens = request.computed_tokens
                kv.release(request, kv.blocks_for(tokens), tokens)
            else:  # preempted while its last token was in flight
                self.waiting.remove(request)
                self._drop_host_copy(request)
                request.held = None
            if on_ended is not None:
                on_ended(request, self._now_s if now_s is None else now_s)

    # ----------------------------------------------------------------------------------------------------------- errors

    @property
    def _policy(self) -> str:
        return type(self.scheduler).__name__

    def _check_iteration(self) -> None:
        if self._granted is not None:
            raise self._error("ended its answer without pause_others() after decode_one()")
        tokens = self.decoding + sum(tokens for _, tokens, _ in self.chunks)
        if self._special:
            tokens += sum(self._padding.values()) + (self._ghost_seqs if self.decoding else 0)
        if tokens > self._token_limit:
            limit = self.limits.max_num_batched_tokens
            raise self._error(f"scheduled {tokens} tokens in one iteration, beyond max_num_batched_tokens={limit}")

    def _error(self, what: str) -> PolicyError:
        return PolicyError(f"{self._policy} {what}.")

    def _stuck(self) -> PolicyError:
        head = self.waiting.head if self.waiting else next(iter(self.running))
        blocks = self.kv.blocks_for(head.prefill_tokens)
        return PolicyError(
            f"{self._policy} schedules nothing although {len(self.waiting)} requests wait and {len(self.running)} hold"
            f" slots; the first is request {head.id}, which needs {blocks} KV blocks of the {self.kv.free_blocks} free."
        )
