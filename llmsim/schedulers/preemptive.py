"""Orders that take the engine away from who runs: the most urgent requests that fit run, the others wait.

A request runs, is paused (keeps its KV blocks and computes nothing), or waits in the queue. Before the base schedules
an iteration, the most urgent of those that do not run come in, one by one, as long as there is a slot
(max_num_seqs) or one less urgent runs, which is paused for it. A waiting request needs KV blocks for its whole sequence
as well; if they are not free, less urgent requests, the least urgent first, make room as `when_full` says:

    recompute    back to the queue; their KV is computed again
    swap         back to the queue; their KV goes to host memory (swap_space_gib), and comes back before they go on
    defer        they do not: the waiting request waits for blocks
    auto         swap if there is swap space, else defer

and none does if all of them together would not make room. How many of the queue the base may admit is told to it as
max_num_seqs; chunks and token budget stay its own business. Nothing here walks the queue, and the running requests only
to make room: who is least urgent is the top of a heap.

A subclass gives `key(request)`, smaller is more urgent, which may change in time for running requests only, and
`standing(request)`, by which running requests compare with each other and which does not change by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from llmsim.queue import WaitingQueue
from llmsim.schedulers.heap import Heap, Key
from llmsim.schedulers.ordered import Ordered, spare_blocks

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

WHEN_FULL = ("auto", "recompute", "swap", "defer")
UNSTOPPABLE = {  # built-ins that have no use for a paused request
    "orca": "it reserves the memory of whole sequences when it admits them",
    "vllm-v0": "it preempts and swaps by a rule of its own",
    "static": "its requests run until all of them are done",
    "dynamic": "its requests run until all of them are done",
}
LOOKED_AT = 64  # of the queue, for one iteration


class Preemptive(Ordered):
    """`when_full`: what less urgent requests do when a waiting one needs their KV blocks."""

    overlaps_copies = True  # swaps run beside the iteration before: FastServe's own stream for copies

    def __init__(self, base: str = "vllm", base_args: dict[str, Any] | None = None, when_full: str = "auto") -> None:
        if base in UNSTOPPABLE:
            name, why = type(self).__name__, UNSTOPPABLE[base]
            raise ValueError(f"{name}: base={base} cannot be preempted: {why}. Give another base.")
        super().__init__(base, base_args)
        if when_full not in WHEN_FULL:
            raise ValueError(f"{type(self).__name__}: when_full={when_full!r}: give one of {', '.join(WHEN_FULL)}")
        self.when_full = when_full
        self._active = Heap(-1)  # decoding requests, the least urgent first
        self._runs: set[Request] = set()  # looked up, never walked
        self._acted = False  # whether anything was started or stopped for the iteration at hand
        self._base_decides = False
        self._left_now: set[Request] = set()  # paused or sent back for the iteration at hand: not to come in again
        self._half: dict[Request, None] = {}  # half-prefilled ones: few, and their standing is none yet
        self._paused, self._paused_last = Heap(), Heap(-1)
        self._base_ended = getattr(self.base, "ended", None)

    # ------------------------------------------------------------------------------------------------ for subclasses

    @abstractmethod
    def key(self, request: Request) -> Key:
        """Smaller is more urgent."""

    def standing(self, request: Request) -> Key:
        """Among running requests; fixed while they run."""
        return self.key(request)

    def update(self, replica: Replica, now_s: float) -> None:
        """Called before every iteration is decided; say `moved` for requests whose key has changed."""

    def lasts(self, replica: Replica) -> None:
        """Called when the base holds its answer although requests are kept from running: bound the hold."""

    def starts(self, request: Request) -> None:
        """A request runs from now on."""

    def stops(self, request: Request) -> None:
        """It no longer does: paused, or back in the queue."""

    def moved(self, request: Request) -> None:
        """A running or paused request's key is another."""
        if request in self._active:
            self._active.put(request, self.standing(request))
        elif request in self._paused:
            self._set_aside(request)

    # -------------------------------------------------------------------------------------------------- for the engine

    def queue(self, engine: Replica) -> WaitingQueue:
        self._engine = engine
        has_swap = engine.swap is not None and engine.swap.blocks > 0
        if self.when_full == "auto":
            self.when_full = "swap" if has_swap else "defer"
        if self.when_full == "swap" and not has_swap:
            raise ValueError(
                f"{type(self).__name__}: when_full='swap' needs host memory: give swap_space_gib, or another when_full"
            )
        return WaitingQueue(self.order)

    def order(self, request: Request) -> Key:
        return self.key(request)

    def ended(self, request: Request, now_s: float) -> None:
        self._forget(request)
        if self._base_ended is not None:
            self._base_ended(request, now_s)

    def victim(self, replica: Replica) -> Request:
        """Who leaves when running requests need more blocks than are free: the least urgent."""
        least = [one for one in (self._least_active(), self._least_paused()) if one is not None]
        chosen = max(least, key=self.key) if least else next(reversed(replica.running))
        if self._base_decides and chosen in replica.paused:  # it leaves no slot for the base to give to another
            replica.limits = replica.limits._replace(max_num_seqs=replica.limits.max_num_seqs - 1)
        return chosen

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        for request in list(self._half):
            if request not in replica.prefilling:
                del self._half[request]
                if request.joined >= 0:
                    self._active.put(request, self.standing(request))
        self._left_now.clear()
        self._acted = False
        self.update(replica, now_s)
        admissions = self._choose(replica)
        self._free_for_decodes(replica)
        limits = replica.limits
        replica.limits = limits._replace(max_num_seqs=len(replica.running) + admissions)
        self._base_decides = True
        try:
            hold: bool | None = self.base.schedule(replica, now_s)
        finally:
            replica.limits, self._base_decides = limits, False
        for request, _, _ in replica.chunks:
            if request not in self._runs:
                self._start(request)
        for request in replica.preempted_now:
            self._stop(request)
        if self._acted or admissions:  # what it did, or was refused, may change what it would do next
            return None
        if hold and (replica.waiting.size or replica.paused):
            self.lasts(replica)
        return hold

    def _free_for_decodes(self, replica: Replica) -> None:
        """Blocks for the next token of all that decode. Not left to the base: where a paused request lost its blocks,
        it would take the shorter list of running ones for a free slot."""
        while replica.batch.size and replica.batch.blocks_needed(1) > replica.kv.free_blocks:
            least = self.victim(replica)
            if self.when_full != "swap" or not replica.swap_out(least):
                replica.preempt(least)
            self._stop(least)

    # ------------------------------------------------------------------------------------------------------- choosing

    def _start(self, request: Request) -> None:
        self._acted = True
        self._forget(request)
        self._runs.add(request)
        self.starts(request)
        if request.joined >= 0:
            self._active.put(request, self.standing(request))
        else:
            self._half[request] = None

    def _stop(self, request: Request) -> None:
        self._acted = True
        self._left_now.add(request)
        if request in self._runs:
            self.stops(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        for heap in (self._active, self._paused, self._paused_last):
            heap.drop(request)
        self._half.pop(request, None)
        self._runs.discard(request)

    def _set_aside(self, request: Request) -> None:
        key = self.key(request)
        self._paused.put(request, key)
        self._paused_last.put(request, key)

    def _least_active(self) -> Request | None:
        """The least urgent of those that compute; whose last token is on its way no longer does."""
        active = self._active
        least = active.top
        while least is not None and least.joined < 0:
            active.drop(least)
            least = active.top
        half = [one for one in self._half if one in self._engine.prefilling]
        if not half:
            return least
        return max([*half, least] if least is not None else half, key=self.key)

    def _least_paused(self) -> Request | None:
        """The least urgent of the paused; some may have lost their blocks since."""
        last = self._paused_last
        least = last.top
        while least is not None and least not in self._engine.paused:
            last.drop(least)
            least = last.top
        return least

    def _choose(self, replica: Replica) -> int:
        """Pause, resume and swap in as the rule says; returns how many of the queue's front may be admitted."""
        waiting, kv, limits = replica.waiting, replica.kv, replica.limits
        if not waiting.size and not replica.paused:
            return 0
        slots = limits.max_num_seqs - len(replica.running) + len(replica.paused)
        budget = min(limits.max_num_batched_tokens, getattr(self.base, "token_budget", None) or limits[1])
        budget -= replica.batch.size
        free = kv.free_blocks - replica.batch.blocks_needed(1)
        for half in replica.prefilling:
            budget -= half.prefill_tokens - half.computed_tokens
            free -= kv.blocks_for(half.prefill_tokens) - kv.blocks_for(half.computed_tokens)
        front = waiting.first(LOOKED_AT)[::-1]
        admissions = 0
        while True:
            waits, paused = front[-1] if front else None, self._paused.top
            if waits is not None and (paused is None or self.key(waits) < self.key(paused)):
                chosen = waits
                if slots <= 0 and not self._outranks(waits):  # nor does anybody who is less urgent
                    return admissions
                blocks = self._blocks_for(replica, waits)
                if blocks > free and not admissions:  # after those at the front: vLLM admits nobody when it preempts
                    free += self._make_room(replica, waits, blocks - free)
                    front = front[-1:]
                stays = waits in self._left_now or (budget <= 0 and not waits.swapped_tokens)
                if blocks > free or stays:
                    front = []  # nobody overtakes it in the queue; paused requests need no more blocks
                    continue
            elif paused is not None:
                chosen, blocks = paused, 0
            else:
                return admissions
            if chosen in self._left_now or (slots <= 0 and not self._pause_for(replica, chosen)):
                return admissions
            slots = max(0, slots - 1)
            free -= blocks
            if chosen is paused:
                replica.resume(chosen)
                self._start(chosen)
                continue
            front.pop()
            if chosen.swapped_tokens:
                replica.swap_in(chosen)
                self._start(chosen)
            else:
                budget -= chosen.prefill_tokens
                admissions += 1

    def _blocks_for(self, replica: Replica, request: Request) -> int:
        kv = replica.kv
        if request.swapped_tokens:
            return kv.blocks_for(request.swapped_tokens + 1)
        hit = replica.look_up(request)
        return kv.blocks_for(request.prefill_tokens) - hit.blocks + hit.idle_blocks + spare_blocks(self.base, replica)

    def _outranks(self, request: Request) -> bool:
        """Whether somebody runs who is less urgent."""
        least = self._least_active()
        return least is not None and self.key(least) > self.key(request)

    def _pause_for(self, replica: Replica, request: Request) -> bool:
        least = self._least_active()
        if least is None or not self._outranks(request):
            return False
        replica.pause(least)
        self._stop(least)
        self._set_aside(least)
        return True

    def _make_room(self, replica: Replica, request: Request, blocks: int) -> int:
        """Less urgent requests give up at least so many blocks, or nobody does; returns what they gave up."""
        if self.when_full == "defer":
            return 0
        limit = self.key(request)
        tops = (self._least_paused(), self._least_active())
        if not any(top is not None and self.key(top) > limit for top in tops):
            return 0
        others = [*replica.paused, *replica.batch, *replica.prefilling]
        before, leaving, promised = replica.kv.free_blocks, [], 0
        for one in sorted(others, key=self.key, reverse=True):
            if promised >= blocks or self.key(one) <= limit:
                break
            promised += replica.kv.blocks_for(replica.batch.computed(one) if one.joined >= 0 else one.computed_tokens)
            leaving.append(one)
        if promised < blocks:
            self._acted = True  # they grow: it may work out in the next iteration
            return 0
        for one in leaving:
            if self.when_full == "swap":
                if not replica.swap_out(one):
                    break
            else:
                replica.preempt(one)
            self._stop(one)
        return replica.kv.free_blocks - before
