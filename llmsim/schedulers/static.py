"""Static batching, as FasterTransformer serves: one batch at a time, from its first prompt to its last token.

    begin     `batch_size` requests wait, or the oldest has waited `timeout_s`, and the batch before is done
    prefill   every prompt padded to the longest of the batch; in one iteration, or several if the padded rows are more
              than max_num_batched_tokens (a single longer row runs alone)
    decode    all rows, until the longest answer is complete; rows that have finished go on computing, and every row
              reads the padded prompt
    answers   at the end of the batch, all at once; with `stream` token by token
    KV        rows * (padded prompt + longest answer), or rows * `reserve_tokens`, set aside for the whole batch; the
              batch is as large as that fits. No prefix is shared.

Source: FasterTransformer v5.3, docs/gpt_guide.md (padded inputs, request_output_len, all outputs returned together) and
src/fastertransformer/models/multi_gpu_gpt; the serving rules are those that Orca (OSDI'22, section 2) gives its
baseline. Left out: removal of padding before the linear layers (`remove_padding`, encoders only there) and beam search.
"""

from __future__ import annotations

from itertools import islice
from math import inf
from typing import TYPE_CHECKING

from llmsim.kvcache import NO_HIT
from llmsim.plugins import PolicyError
from llmsim.schedulers import HOLD

if TYPE_CHECKING:
    from llmsim.replica import Limits, Replica
    from llmsim.request import Request


LONGEST_WAIT_S = 1e6


class StaticBatching:
    """One padded batch at a time: `batch_size` rows at most, `timeout_s` to fill it, `stream` its answers or not.

    `reserve_tokens`: KV of a row, 0: what the batch needs.
    """

    pads = True  # prompts to the longest, and finished rows go on

    def __init__(
        self, batch_size: int = 32, timeout_s: float = 0.5, reserve_tokens: int = 0, stream: bool = False
    ) -> None:
        for name, count, least in (("batch_size", batch_size, 1), ("reserve_tokens", reserve_tokens, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name}={count!r} is not a whole number of {least} or more.")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
            raise ValueError(f"timeout_s={timeout_s!r} is not a number of seconds.")
        if not 0.0 <= timeout_s <= LONGEST_WAIT_S:
            raise ValueError(
                f"timeout_s={timeout_s} is no time to wait: give 0 or more seconds, at most {LONGEST_WAIT_S:.0f}."
            )
        self.batch_size, self.timeout_s, self.reserve_tokens = batch_size, float(timeout_s), reserve_tokens
        self.streams = bool(stream)
        self._since_s: dict[Request, float] = {}
        self._size = 0  # rows of the batch under way
        self._padded_tokens = 0  # its longest prompt
        self._to_prefill: list[Request] = []
        self._begun = -1  # batch iteration of its first decode

    def token_limit(self, limits: Limits) -> float:
        """None: padding and a single long prompt may go beyond max_num_batched_tokens."""
        return inf

    def arrived(self, request: Request, now_s: float) -> None:
        self._since_s[request] = now_s

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        if self._size and not self._to_prefill:
            if replica.batch.size:
                self._decode(replica)
                return HOLD if replica.batch.even or not self.pads else None
            self._size = 0
            if not self.streams:
                replica.hand_out()
        if not self._size and replica.waiting.size and not replica.running:
            self._form(replica, now_s)
        if self._to_prefill:
            self._prefill(replica)
        return None

    def _decode(self, replica: Replica) -> None:
        batch = replica.batch
        if self._begun < 0:
            self._begun = batch.iteration
        if self.pads:
            read_tokens = self._size * (self._padded_tokens + batch.iteration - self._begun)
            ghosts = self._size - batch.size
            replica.ghosts(ghosts, max(read_tokens - batch.kv_tokens, ghosts))  # rows with drafts run ahead of it
        replica.decode()

    def _form(self, replica: Replica, now_s: float) -> None:
        """A new batch, or a later time to look again."""
        most = min(self.batch_size, replica.limits.max_num_seqs)
        since_s = self._since_s.get(replica.waiting.head, -inf)  # one whose blocks drafts took is due at once
        due_s = since_s + self.timeout_s
        size = self.next_size(min(replica.waiting.size, most), most, due=now_s >= due_s)
        if not size:
            replica.wait_until(due_s)
            return
        chosen = self._that_fit(replica, list(islice(replica.waiting, size)))
        for request in chosen:
            self._since_s.pop(request, None)
        self._size, self._to_prefill, self._begun = len(chosen), chosen, -1
        self._padded_tokens = max(request.prefill_tokens for request in chosen)

    def next_size(self, waiting: int, most: int, due: bool) -> int:
        """Rows of the batch to begin now, 0: none yet. `waiting` requests, at most `most`; `due`: the time is up."""
        return waiting if waiting == most or due else 0

    def _that_fit(self, replica: Replica, requests: list[Request]) -> list[Request]:
        """The leading requests whose reserved rows fit the KV cache."""
        kv = replica.kv
        prompt_tokens = output_tokens = total_blocks = 0
        for count, request in enumerate(requests):
            prompt_tokens = max(prompt_tokens, request.prompt_tokens)
            output_tokens = max(output_tokens, request.output_tokens)
            if self.reserve_tokens:
                row_tokens = self.reserve_tokens
                self._check_reserve(request)
            elif self.pads:
                row_tokens = prompt_tokens + output_tokens - 1  # the last token's KV is never needed
            else:
                row_tokens = request.prompt_tokens + request.output_tokens - 1
            blocks = kv.blocks_for(row_tokens)
            total_blocks = blocks * (count + 1) if self.pads or self.reserve_tokens else total_blocks + blocks
            if total_blocks > kv.total_blocks:
                if not count:
                    raise PolicyError(
                        f"{type(self).__name__} reserves {row_tokens} tokens of KV for request {request.id}, of"
                        f" {kv.total_blocks * kv.block_tokens} there are. Lower reserve_tokens."
                    )
                return requests[:count]
        return requests

    def _check_reserve(self, request: Request) -> None:
        needed = request.prompt_tokens + request.output_tokens - 1
        if needed > self.reserve_tokens:
            raise PolicyError(
                f"{type(self).__name__} reserves reserve_tokens={self.reserve_tokens} for each row, of which request"
                f" {request.id} needs {needed}. Raise it."
            )

    def _prefill(self, replica: Replica) -> None:
        """As many of the batch's prompts, padded, as an iteration takes; at least one."""
        replica.ghosts(0, 0)
        budget = replica.limits.max_num_batched_tokens
        rows = 0
        for request in self._to_prefill:
            tokens = request.prefill_tokens
            padded = self._padded_tokens if self.pads else tokens
            if rows and padded > budget:
                break
            replica.prefill(request, tokens, NO_HIT, padded - tokens)
            budget -= padded
            rows += 1
        del self._to_prefill[:rows]
