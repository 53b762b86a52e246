"""A request: what the client sent, and what happened to it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import nan
from typing import Any


@dataclass(slots=True, eq=False)  # eq=False: identity, so that it can be a dict key
class Request:
    """One request of the trace, and its progress on the replica that serves it.

    While it decodes, its progress is the number of iterations since it joined the running batch: `computed_tokens` and
    `generated_tokens` are settled when it leaves (finished, preempted, paused).
    """

    id: int
    arrival_s: float  # sent by the client
    prompt_tokens: int
    output_tokens: int
    priority: int = 0  # lower is more urgent, as in vLLM
    prefix_ids: tuple[Hashable, ...] = ()  # names of the sequence's blocks, prompt first; leading runs are shared
    identity_tokens: int = 0  # tokens of the sequence that prefix_ids describe (prompt, or prompt and answer)
    name: str = ""
    # Written by the replica.
    computed_tokens: int = 0  # tokens whose KV exists or is being computed
    generated_tokens: int = 0  # output tokens handed out or in flight
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    preemptions: int = 0
    scheduled_s: float = nan  # first scheduled
    first_token_s: float = nan  # as the client sees it
    finish_s: float = nan
    last_token_s: float = nan  # last token before a preemption
    preempted_s: float = 0.0  # from each preemption to the next token
    preempted_before_first_s: float = 0.0  # the part of it before the first token
    joined: int = field(default=-1, repr=False)  # batch iteration at which it began to decode, -1: not decoding
    ticket: int = field(default=0, repr=False)  # which of its stays in the batch this is; negative: was
    tenant: str | int = 0  # whose it is, for fairness
    slo_class: str = ""  # which targets it has
    predicted_tokens: float = nan  # output tokens somebody foretold
    swapped_tokens: int = 0  # while it waits: tokens whose KV is in host memory
    swapped_in: bool = field(default=False, repr=False)  # back from there, and no token since
    decoded: bool = field(default=False, repr=False)  # while paused or swapped out: what it was doing
    rejected_s: float = nan  # turned away by the policy
    held: Any = field(default=None, repr=False)  # the KV cache's record, for requests with an identity to share

    @property
    def prefill_tokens(self) -> int:
        """Tokens to compute before its next token: after a preemption the prompt and what it had generated."""
        return self.prompt_tokens + self.generated_tokens
