"""A request: what the client sent, and what happened to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import Any


@dataclass(slots=True, eq=False)  # eq=False: identity, so that it can be a dict key
class Request:
    """One request of the trace.

    `prefix_ids` name the content of the sequence (prompt, then answer as far as known) in blocks of the trace's
    `prefix_block_tokens`; two requests share a prefix as far as their leading ids agree.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    prefix_ids: tuple[Any, ...] = ()
    name: str = ""
    # Written by the replica.
    computed_tokens: int = 0  # tokens whose KV exists or is being computed; settled whenever it is not decoding
    generated_tokens: int = 0  # output tokens handed out or in flight; settled whenever it is not decoding
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    preemptions: int = 0
    scheduled_s: float = nan  # first scheduled
    first_token_s: float = nan  # as the client sees it
    finish_s: float = nan
    preempted_s: float = 0.0  # from each preemption to the next token

    kv: Any = field(default=None, repr=False)  # the cache's own record of what this request holds

    @property
    def prefill_tokens(self) -> int:
        """Tokens to compute before the next token comes out: after a preemption, prompt and generated ones."""
        return self.prompt_tokens + self.generated_tokens
