"""What policies may do besides giving requests tokens: set requests aside, turn them away, and say how long to wait.

    pause, resume       a running request keeps its KV blocks and its slot in `running` and computes nothing meanwhile
    swap_out, swap_in   its KV moves to host memory and back; both copies delay the GPU work of the iteration that
                        follows them by blocks * `Swap.seconds_per_block` (one queue of work, as in vLLM V0, where
                        copies are issued before the forward pass: worker/worker.py, prepare_worker_input)
    reject              a waiting request leaves unserved
    ghosts              rows that are computed though nobody wants their tokens (finished rows of a static batch)
    wait_until          nothing to schedule before a time, although requests wait
    hold_for, hold_until  how far a HOLD reaches at most

`Engine` is the one class that builds on this; it lives apart so that each file can be read at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf, isfinite, isnan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsim.batch import RunningBatch
    from llmsim.kvcache import KVCache
    from llmsim.plugins import PolicyError
    from llmsim.queue import WaitingQueue
    from llmsim.replica import Limits
    from llmsim.request import Request

UNLIMITED = 1 << 60  # iterations


class Swap:
    """Host memory for KV blocks: `blocks` of them, each copied either way in `seconds_per_block`."""

    __slots__ = ("blocks", "copied_in_blocks", "copied_out_blocks", "free_blocks", "seconds_per_block")

    def __init__(self, blocks: int, seconds_per_block: float) -> None:
        self.blocks = self.free_blocks = blocks
        self.seconds_per_block = seconds_per_block
        self.copied_out_blocks = self.copied_in_blocks = 0


class Aside(ABC):
    """The part of `Engine` described above."""

    scheduler: Any
    kv: KVCache
    limits: Limits
    waiting: WaitingQueue
    running: dict[Request, None]
    prefilling: dict[Request, None]
    batch: RunningBatch
    decoding: int
    chunks: list[tuple[Request, int, int]]
    asynchronous: bool
    _now_s: float
    _granted: dict[Request, None] | None
    _late: dict[Request, None]
    _rejoined: dict[Request, int]
    _publishing: dict[Request, None]

    def __init__(self, swap: Swap | None) -> None:
        self.swap = swap
        self.paused: dict[Request, None] = {}  # part of `running`, oldest pause first
        self.rejections = 0
        self._copying_s = 0.0  # of swaps that no iteration has waited for yet
        self._ghost_seqs = self._ghost_kv_tokens = 0
        self._on_ended = getattr(self.scheduler, "ended", None)
        self._on_arrived = getattr(self.scheduler, "arrived", None)
        self._clear()

    def _clear(self) -> None:
        """Forget what was said about the iteration before; `_special` spares the usual iteration all of this (2 %)."""
        self._special = self._ghost_kv_tokens > 0 or self._copying_s > 0.0
        self._left_now: dict[Request, bool] = {}  # paused or swapped out now; True: its last token is in flight
        self._padding: dict[Request, int] = {}
        self._rejected_now = False
        self._hold_steps = UNLIMITED
        self._hold_s = self._wait_s = inf

    # ------------------------------------------------------------------------------------------------ pause and swap

    def pause(self, request: Request) -> None:
        """A decoding or half-prefilled request keeps its blocks and computes nothing until `resume`."""
        self._check_free_to_leave(request, "paused")
        self._step_out(request)
        self.paused[request] = None

    def resume(self, request: Request) -> None:
        """A paused request goes on in this iteration: a decoding one decodes, another is half-prefilled again."""
        if request not in self.paused:
            raise self._error(f"resumed request {request.id}, which is not paused")
        self._check_may_return(request, "resumed")
        del self.paused[request]
        self._step_in(request)

    def swap_out(self, request: Request) -> bool:
        """Move a running request's KV to host memory and the request to the queue; False: no room there."""
        swap = self.swap
        if swap is None or not swap.blocks:
            raise self._error(
                f"swapped out request {request.id} to host memory, of which there is none: give swap_space_gib"
            )
        if request not in self.paused:
            self._check_free_to_leave(request, "swapped out")
        tokens = request.computed_tokens if request not in self.batch else self.batch.computed(request)
        blocks = self.kv.blocks_for(tokens)
        if blocks > swap.free_blocks:
            return False
        request.decoded = request in self.batch or (request in self.paused and request.decoded)
        tokens, known = self._vacate(request)
        self._left_now[request] = False
        self._special = True
        self.kv.release(request, blocks, known, resumes=True)
        swap.free_blocks -= blocks
        swap.copied_out_blocks += blocks
        self._copying_s += blocks * swap.seconds_per_block
        request.swapped_tokens = tokens
        self._send_back(request)
        return True

    def swap_in(self, request: Request) -> bool:
        """Bring a waiting request's KV back, and the request into this iteration; False: not enough free blocks."""
        swap, kv, tokens = self.swap, self.kv, request.swapped_tokens
        if not tokens or swap is None:
            raise self._error(f"swapped in request {request.id}, whose KV is not in host memory")
        self._check_may_return(request, "swapped in")
        blocks = kv.blocks_for(tokens)
        if blocks > kv.free_blocks:
            return False
        self.waiting.remove(request)
        kv.take(blocks)
        swap.copied_in_blocks += blocks
        self._copying_s += blocks * swap.seconds_per_block
        self._drop_host_copy(request)
        self._special = True
        request.computed_tokens = tokens
        request.swapped_in = True
        if request.held is not None:
            kv.store(request, tokens)
        self.running[request] = None
        self._step_in(request)
        if request in self.batch and request.identity_tokens > request.prompt_tokens and kv.publishes:
            self._publishing[request] = None
        return True

    def _drop_host_copy(self, request: Request) -> None:
        if request.swapped_tokens and self.swap is not None:
            self.swap.free_blocks += self.kv.blocks_for(request.swapped_tokens)
            request.swapped_tokens = 0

    def _check_free_to_leave(self, request: Request, done: str) -> None:
        if request in self.batch:
            if self.decoding and (self._granted is None or request in self._granted):
                raise self._error(f"{done} request {request.id} after it was to make a token in this iteration")
        elif request not in self.prefilling:
            raise self._error(f"{done} request {request.id}, which is neither decoding nor half-prefilled")
        elif any(chunk[0] is request for chunk in self.chunks):
            raise self._error(f"{done} request {request.id} after it was given a chunk of this iteration")

    def _check_may_return(self, request: Request, done: str) -> None:
        if self.decoding:
            raise self._error(f"{done} request {request.id} after decode() in the same iteration")
        if request in self._left_now:
            raise self._error(f"{done} request {request.id} in the iteration in which it was set aside")
        if len(self.running) - len(self.paused) >= self.limits.max_num_seqs:
            raise self._error(f"{done} request {request.id} beyond max_num_seqs={self.limits.max_num_seqs}")

    def _step_out(self, request: Request) -> None:
        """Out of the batch or of the half-prefilled ones, keeping its blocks."""
        in_flight = False
        request.decoded = request in self.batch
        if request.decoded:
            # One that joined just now, or sat the iteration before out, has no generated token in flight.
            in_flight = self.asynchronous and self.batch.iteration > request.joined
            self.batch.remove(request)
            self._cut(request)
            self._late.pop(request, None)
        else:
            del self.prefilling[request]
        self._left_now[request] = in_flight
        self._special = True

    def _step_in(self, request: Request) -> None:
        if request.decoded:
            self.batch.add(request)
            self._late[request] = None
            self._rejoined[request] = self.batch.iteration
        else:
            self.prefilling[request] = None

    # -------------------------------------------------------------------------------------- turning away and padding

    def reject(self, request: Request) -> None:
        """A waiting request is turned away: its client gets no answer, or no more of it."""
        if request in self.running:
            raise self._error(f"rejected request {request.id}, which is running: preempt it first")
        if request.generated_tokens >= request.output_tokens:
            raise self._error(f"rejected request {request.id}, whose last token is on its way")
        try:
            self.waiting.remove(request)
        except IndexError:
            raise self._error(f"rejected request {request.id}, which is not waiting") from None
        self._drop_host_copy(request)
        request.held = None
        request.rejected_s = self._now_s
        self.rejections += 1
        self._rejected_now = self._special = True
        self._turned_away(request)
        if self._on_ended is not None:
            self._on_ended(request, self._now_s)

    def ghosts(self, seqs: int, kv_tokens: int) -> None:
        """From this iteration on, `seqs` more rows decode than requests want, reading `kv_tokens` cached tokens.

        Each reads one token more every iteration in which anything decodes. `seqs` may be 0: padding that is read.
        """
        if seqs < 0 or kv_tokens < seqs:
            raise self._error(f"asked for {seqs} ghosts that read {kv_tokens} cached tokens, which is no batch")
        self._ghost_seqs, self._ghost_kv_tokens = seqs, kv_tokens
        self._special = True

    # -------------------------------------------------------------------------------------------------- how long

    def wait_until(self, time_s: float) -> None:
        """Nothing to schedule although requests wait: ask again at `time_s`, or when something arrives or ends.

        If results are in flight the host waits for them first, as it does whenever there is nothing to schedule.
        """
        if not isfinite(time_s) or time_s <= self._now_s:
            raise self._error(f"waits at {self._now_s} s until {time_s} s, which is not a later time")
        self._wait_s = time_s
        self._special = True

    def hold_for(self, iterations: int) -> None:
        """With HOLD: the answer lasts at most so many iterations, this one included."""
        if iterations < 1:
            raise self._error(f"holds for {iterations} iterations: give at least 1, this one")
        self._hold_steps = min(self._hold_steps, iterations)
        self._special = True

    def hold_until(self, time_s: float) -> None:
        """With HOLD: ask again at the first iteration that is scheduled at `time_s` or later."""
        if isnan(time_s):
            raise self._error("holds until nan s, which is no time")
        self._hold_s = min(self._hold_s, time_s)
        self._special = True

    # ------------------------------------------------------------------------------------ what Engine and Replica add

    @abstractmethod
    def _vacate(self, request: Request) -> tuple[int, int]:
        """Take a running request's slot; (tokens it holds blocks for, of them with known content)."""

    @abstractmethod
    def _send_back(self, request: Request) -> None:
        """A request that has given its blocks back waits again."""

    def _cut(self, request: Request) -> None:  # noqa: B027 - a hook: without a clock there is nothing to note
        """Called when a request stops decoding for now."""

    def _turned_away(self, request: Request) -> None:  # noqa: B027 - a hook, as above
        """Called when a waiting request leaves unserved."""

    @abstractmethod
    def _error(self, what: str) -> PolicyError:
        """Names the policy."""
