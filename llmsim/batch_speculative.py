"""The decoding requests of a speculating replica: each makes 1 to 1 + k tokens an iteration.

How many drafts of each verification are accepted is drawn when a request first decodes, from a generator seeded by
(seed, request id): what happens to it does not depend on what runs beside it. So its iterations to come are known, as
`llmsim.batch` has it: the last one sits in the same heap, and a *calendar* holds for each iteration to come the sums
over members of

    tokens    made, and so added to the cache
    blocks    of KV cache newly taken
    drafts    to be verified

A request's blocks cover its tokens, 1 + d scheduled ones and `lookahead` slots (vLLM's allocate_slots); rejected
drafts give none back. Joining and leaving cost a few vector operations, an iteration costs the same however large the
batch.

`truncate` cuts drafts that a token budget has no room for, newest requests first; what they accept is cut with them,
and their calendar is written anew.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from llmsim.batch import RunningBatch
from llmsim.drafting import Speculation
from llmsim.request import Request

Whole = NDArray[np.int64]
TOKENS, BLOCKS, DRAFTS = 0, 1, 2


class Calendar:
    """Sums for iterations to come: a ring of columns that grows where a plan reaches beyond it."""

    def __init__(self, columns: int = 1024) -> None:
        self._ring: Whole = np.zeros((3, columns), dtype=np.int64)

    def add(self, first: int, plan: Whole, now: int, sign: int = 1) -> None:
        """`plan` has a column for each iteration from `first` on; none of them lies before `now`."""
        length = plan.shape[1]
        while first + length - now > self._ring.shape[1]:
            self._grow(now)
        columns = self._ring.shape[1]
        at = first % columns
        room = columns - at
        if length <= room:
            self._ring[:, at : at + length] += sign * plan
        else:
            self._ring[:, at:] += sign * plan[:, :room]
            self._ring[:, : length - room] += sign * plan[:, room:]

    @property
    def reach(self) -> int:
        """Iterations from now on beyond which nothing is planned."""
        columns: int = self._ring.shape[1]
        return columns

    def _grow(self, now: int) -> None:
        columns = self._ring.shape[1]
        order = (now + np.arange(columns)) % columns
        wider: Whole = np.zeros((3, 2 * columns), dtype=np.int64)
        wider[:, (now + np.arange(columns)) % (2 * columns)] = self._ring[:, order]
        self._ring = wider

    def read(self, iteration: int) -> list[int]:
        column: list[int] = self._ring[:, iteration % self._ring.shape[1]].tolist()
        return column

    def clear(self, iteration: int) -> None:
        self._ring[:, iteration % self._ring.shape[1]] = 0


class _Member:
    """One request's stay."""

    __slots__ = ("blocks_before", "first", "offset", "plan", "totals")

    def __init__(self, first: int, plan: Whole, blocks_before: int, offset: float) -> None:
        self.first, self.plan, self.blocks_before, self.offset = first, plan, blocks_before, offset
        self.totals = np.cumsum(plan[TOKENS])

    def extend(self, past: Whole, anew: Whole) -> None:
        """Another plan from now on."""
        self.plan = np.concatenate((past, anew), axis=1)
        self.totals = np.cumsum(self.plan[TOKENS])

    def tokens_by(self, iteration: int) -> int:
        """Made before `iteration`."""
        steps = iteration - self.first
        return int(self.totals[steps - 1]) if steps > 0 else 0


class SpeculatingBatch(RunningBatch):
    __slots__ = (
        "_blocks", "_calendar", "_drawn", "_grown", "_now", "_plans", "_seed", "_speculation", "_steps_taken",
        "_sum", "_sum_squares", "_survival", "_total_blocks",
    )  # fmt: skip
    even = False

    def __init__(self, block_tokens: int, speculation: Speculation, seed: int, total_blocks: int) -> None:
        super().__init__(block_tokens)
        self._speculation, self._seed, self._total_blocks = speculation, seed, total_blocks
        self._survival = np.array(speculation.survival)
        self._calendar = Calendar()
        self._plans: dict[Request, _Member] = {}
        self._drawn: dict[Request, Whole] = {}  # accepted drafts of each verification, -1: nothing proposed
        self._steps_taken: dict[Request, int] = {}  # verifications that are over
        self._blocks: dict[Request, int] = {}  # held, while it is out of the batch
        # As if all members grew by the mean of each iteration: what that makes of the spread of their contexts.
        self._grown = self._sum = self._sum_squares = 0.0
        self._now: list[int] | None = None  # the calendar's column of the next iteration, once it was read

    # ---- joining and leaving ----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        if request not in self._drawn:
            self._drawn[request] = self._draw(request)
            self._steps_taken[request] = 0
        held = self._blocks.pop(request, 0) or -(-request.computed_tokens // self.block_tokens)
        now = self.iteration
        ticket = self._tickets = self._tickets + 1
        request.joined, request.ticket = now, ticket
        offset = request.computed_tokens - self._grown
        plan = self._plan(request, 0, request.generated_tokens, held)
        member = self._plans[request] = _Member(now, plan, held, offset)
        self._sum += offset
        self._sum_squares += offset * offset
        self._calendar.add(now, member.plan, now)
        self._now = None
        heappush(self._heap, (now + member.plan.shape[1], ticket, request))
        self._members[request] = None
        self.kv_tokens += request.computed_tokens
        self.size += 1

    @property
    def longest(self) -> int:
        return max(map(self.computed, self._members), default=0)

    def _draw(self, request: Request) -> Whole:
        """Accepted drafts of as many verifications as it can have; at least one token each."""
        generator = np.random.default_rng((self._seed, request.id))
        own = self._speculation
        count = request.output_tokens
        accepted: Whole = np.searchsorted(-self._survival, -generator.random(count))  # chances above what was drawn
        if own.proposal_rate < 1.0:
            accepted[generator.random(count) >= own.proposal_rate] = -1
        return accepted

    def _plan(self, request: Request, steps: int, generated: int, held: int, first_drafts: int | None = None) -> Whole:
        """Tokens, blocks and drafts of its iterations from now on, `steps` into its stay, `held` blocks being its own.

        `first_drafts`: at most so many in the first of them.
        """
        own, left = self._speculation, request.output_tokens - generated
        drawn = self._drawn[request][self._steps_taken[request] + steps :][:left]
        accepted = np.maximum(drawn, 0)
        drafts = np.where(drawn >= 0, own.drafts, 0)
        if first_drafts is not None:
            drafts[0] = min(int(drafts[0]), first_drafts)
            accepted[0] = min(int(accepted[0]), first_drafts)
        totals = np.cumsum(accepted + 1)
        count = int(np.searchsorted(totals, left)) + 1
        plan = np.empty((3, count), dtype=np.int64)
        plan[TOKENS] = accepted[:count] + 1
        before = request.prompt_tokens + generated - 1 + totals[:count] - plan[TOKENS]  # computed
        plan[TOKENS, -1] -= totals[count - 1] - left  # what is accepted beyond its end is thrown away
        plan[DRAFTS] = drafts[:count]
        reach = before + 1 + plan[DRAFTS] + own.lookahead
        need = np.minimum(-(-reach // self.block_tokens), self._total_blocks)
        need = np.maximum.accumulate(np.maximum(need, held))
        plan[BLOCKS, 0] = need[0] - held
        plan[BLOCKS, 1:] = np.diff(need)
        return plan

    def _leave(self, request: Request, steps: int) -> None:
        member = self._plans.pop(request)
        if steps < member.plan.shape[1]:
            self._calendar.add(self.iteration, member.plan[:, steps:], self.iteration, -1)
            self._now = None
        self._sum -= member.offset
        self._sum_squares -= member.offset * member.offset
        tokens = member.tokens_by(self.iteration)
        self._steps_taken[request] += steps
        self._blocks[request] = member.blocks_before + int(member.plan[BLOCKS, :steps].sum())
        request.computed_tokens += tokens
        request.generated_tokens += tokens
        request.joined = -1
        request.ticket = -request.ticket  # which stay it was can still be told
        del self._members[request]
        self.kv_tokens -= request.computed_tokens
        self.size -= 1

    def give_up(self, request: Request) -> int:
        """Blocks a request outside the batch holds beyond those of its computed tokens; they are its own no longer."""
        held = self._blocks.pop(request, None)
        return 0 if held is None else held - -(-request.computed_tokens // self.block_tokens)

    def forget(self, request: Request) -> None:
        """It will not decode again."""
        self._drawn.pop(request, None)
        self._steps_taken.pop(request, None)

    @property
    def squares(self) -> float:
        if not self.size:
            self._grown = self._sum = self._sum_squares = 0.0
            return 0.0
        spread = max(self.size * self._sum_squares - self._sum * self._sum, 0.0)
        return (self.kv_tokens * self.kv_tokens + spread) / self.size

    # ---- what the next iteration takes ------------------------------------------------------------------------

    def computed(self, request: Request) -> int:
        return request.computed_tokens + self._plans[request].tokens_by(self.iteration)

    def needs_block(self, request: Request) -> int:
        """New blocks for the member's next iteration: with few tokens a block there may be more than one."""
        member = self._plans[request]
        return int(member.plan[BLOCKS, self.iteration - member.first])

    def blocks_needed(self, steps: int) -> int:
        if steps == 1:
            return self._next()[BLOCKS]
        return sum(
            self._calendar.read(self.iteration + step)[BLOCKS] for step in range(min(steps, self._calendar.reach))
        )

    def steps_that_fit(self, steps: int, free_blocks: int) -> int:
        """The largest n <= steps whose KV blocks fit into `free_blocks`."""
        for step in range(min(steps, self._calendar.reach)):
            free_blocks -= self._calendar.read(self.iteration + step)[BLOCKS]
            if free_blocks < 0:
                return step
        return steps

    def _next(self) -> list[int]:
        now = self._now
        if now is None:
            now = self._now = self._calendar.read(self.iteration)
        return now

    def coming(self) -> tuple[int, int]:
        """Tokens that the next iteration makes, drafts that it verifies."""
        tokens, _, drafts = self._next()
        return tokens, drafts

    def truncate(self, most: int) -> None:
        """At most so many drafts in the next iteration: the newest requests do with fewer."""
        over = self.coming()[1] - most
        for request in reversed(list(self._members)):
            if over <= 0:
                return
            member = self._plans[request]
            drafts = int(member.plan[DRAFTS, self.iteration - member.first])
            cut = min(drafts, over)
            if cut:
                self._cut(request, drafts - cut)
                over -= cut

    def _cut(self, request: Request, drafts: int) -> None:
        """Only `drafts` of its next verification: what it accepts, and all that follows, is planned anew."""
        member, now = self._plans[request], self.iteration
        steps = now - member.first
        past, rest = member.plan[:, :steps], member.plan[:, steps:]
        held = member.blocks_before + int(past[BLOCKS].sum())
        anew = self._plan(request, steps, request.generated_tokens + member.tokens_by(now), held, drafts)
        self._calendar.add(now, rest, now, -1)
        self._calendar.add(now, anew, now)
        self._now = None
        member.extend(past, anew)
        heappush(self._heap, (now + anew.shape[1], request.ticket, request))  # the entry before is stale by its time

    def _current(self, end: int, ticket: int, request: Request) -> bool:
        """Whether a heap entry is of a stay that goes on, and not of a plan from before drafts were cut."""
        if ticket != request.ticket:
            return False
        member = self._plans[request]
        return bool(end == member.first + member.plan.shape[1])

    def steps_to_finish(self) -> int:
        heap = self._heap
        while not self._current(*heap[0]):
            heappop(heap)
        return heap[0][0] - self.iteration

    def advance(self, steps: int) -> list[Request]:
        """One iteration: what it costs differs from one to the next."""
        assert steps == 1, "a speculating batch takes its iterations one at a time"
        tokens = self._next()[TOKENS]
        self._now = None
        self._calendar.clear(self.iteration)
        now = self.iteration = self.iteration + 1
        self.kv_tokens += tokens
        self._grown += tokens / self.size
        heap, done = self._heap, []
        while heap and heap[0][0] <= now:
            end, ticket, request = heappop(heap)
            if self._current(end, ticket, request):
                self._leave(request, now - request.joined)
                done.append(request)
        return done
