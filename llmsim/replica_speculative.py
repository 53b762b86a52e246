"""A replica whose engine speculates: the loop of `llmsim.replica`, with requests that make several tokens an iteration.

What differs (ENGINES: vLLM 0.25.1, v1/core/sched/scheduler.py):

* a decoding request is scheduled for 1 + d tokens. All count towards max_num_batched_tokens, so a policy sees the
  limit less the drafts of its decodes; where even these do not fit, the newest requests' drafts are cut (vLLM would
  not schedule those at all);
* prompt chunks have no drafts;
* it takes KV blocks for its drafts and the drafter's lookahead slots, and keeps them until it ends or is preempted;
* the tokens of one verification come at once: one gap, then gaps of 0;
* iterations are taken one at a time: none costs what the one before did.

Left out: the row that an asynchronous engine computes for a request whose accepted drafts end it before that is known.
"""

from __future__ import annotations

from typing import Any

from llmsim.batch_speculative import SpeculatingBatch
from llmsim.cost.speculative import SpeculativeCost
from llmsim.macrostep import Plan, Step
from llmsim.replica import ITERATION_COLUMNS, Replica
from llmsim.request import Request
from llmsim.rowlog import RowLog

SPECULATING_COLUMNS = {**ITERATION_COLUMNS, "drafts": "i4", "decoded_tokens": "i8"}


class SpeculatingReplica(Replica):
    cost: SpeculativeCost

    def __init__(self, *args: Any, seed: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not hasattr(self.cost, "speculation"):  # a scaled one has it too
            raise ValueError(
                f"cost={self.cost.kind}: a speculating replica needs the cost of drafts (llmsim.cost.speculative)"
            )
        self._batch = SpeculatingBatch(self.kv.block_tokens, self.cost.speculation, seed, self.kv.total_blocks)
        self.batch = self._batch
        self.iterations = RowLog(SPECULATING_COLUMNS)
        self._all = self.limits
        self._drafts = 0  # that `limits` leaves room for
        self._coming = (0, 0)  # tokens and drafts of the iteration at hand
        self._more_tokens = 0  # of the iteration in flight, beyond one for each decode

    def begin(self, now_s: float) -> bool:
        if self.paused_now:
            for request in self.paused_now:
                self.batch.add(request)
                self._late[request] = None
            self.paused_now = []
        batch, budget = self._batch, self._all.max_num_batched_tokens
        _, drafts = batch.coming()
        if batch.size + drafts > budget:
            batch.truncate(max(budget - batch.size, 0))
            _, drafts = batch.coming()
        if drafts != self._drafts:
            self.limits = self._all._replace(max_num_batched_tokens=budget - drafts)
            self._drafts = drafts
        return super().begin(now_s)

    def decode_one(self, request: Request) -> None:
        more = self.batch.needs_block(request) - 1 if request in self.batch else 0
        if more > 0:
            if more + 1 > self.kv.free_blocks:
                raise self._error(
                    f"asked to decode request {request.id}, which needs {more + 1} KV blocks of the "
                    f"{self.kv.free_blocks} free"
                )
            self.kv.take(more)
        super().decode_one(request)

    def _vacate(self, request: Request) -> tuple[int, int]:
        granted = self._granted is not None and request in self._granted
        taken = self.batch.needs_block(request) if granted else 0
        tokens, known = super()._vacate(request)
        blocks_for = self.kv.blocks_for
        settled = blocks_for(request.computed_tokens)
        self.kv.free_blocks += self._batch.give_up(request) + taken - (blocks_for(tokens) - settled)
        return tokens, known

    def free(self, ended: list[Request], now_s: float | None = None) -> None:
        for request in ended:
            self.kv.free_blocks += self._batch.give_up(request)
            self._batch.forget(request)
        super().free(ended, now_s)

    def commit(self, steps: int) -> list[Request]:
        self._more_tokens = self._coming[0] - self.decoding
        return super().commit(steps)

    def _compose(self, t: float) -> Step:
        self._coming = self._batch.coming() if self.decoding else (0, 0)
        self.cost.drafts = self._coming[1]
        step = super()._compose(t)
        self.cost.drafts = None
        return step

    def _long_run(self, step: Step, second_s: float) -> Plan | None:
        """None: the next iteration costs something else."""
        return None

    def _take(self, flight: Any, taken_s: float) -> float:
        more, self._more_tokens = self._more_tokens, 0
        updated_s = super()._take(flight, taken_s)
        if more:
            gaps = self._seen_gaps
            gaps.add(gaps.pack(0.0, 0.0, 1, more, self._emitted_s))
        return updated_s

    def _log(self, step: Step, steps: int, gpu_end_s: float) -> None:
        pairs = context = 0
        for tokens, computed in step.chunks:
            pairs += tokens * computed + tokens * (tokens + 1) // 2
            context += computed
        made, drafts = self._coming
        log = self.iterations
        log.add(log.pack(
            step.schedule_s, steps, step.mode, step.seqs, step.kv_tokens, len(step.chunks), step.new_tokens, pairs,
            context, step.gpu.first_s, step.gpu.growth_s, gpu_end_s, step.running, step.waiting, step.kv_blocks,
            drafts, made,
        ))  # fmt: skip
