"""The terms of an iteration's GPU seconds, by name: what a what-if says has shrunk.

    linear          the matrix products of the layers
    between         norms, RoPE, activation, KV write, quantising, latencies of the layers' kernels
    head            LM head and sampling (within `linear` where a profile has no kernels)
    attention       decodes and prompts, all of it
    communication   all-reduces and all-gathers
    draft           a speculating engine's drafts
    clocks          what lower clocks and stalls add to the rest

A cost model that knows its terms has `parts(tokens, requests, seqs)`, an iteration of so many rows, sampled requests
and decodes as if none had context, and `prompts_s(...)`, the attention of prompt chunks. Rows of a profile share its
L (which was fitted as a whole) in proportion to what its kernels, or its form of data-sheet shapes, take by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import CostModel

Floats = NDArray[np.float64]
Columns = Mapping[str, NDArray[Any]]

TERMS = ("linear", "between", "head", "attention", "communication", "draft", "clocks")


class Parts(NamedTuple):
    """Seconds of an iteration without context."""

    linear_s: float
    between_s: float
    head_s: float
    attention_s: float
    communication_s: float
    draft_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self)


class Termed(CostModel, Protocol):
    """A cost model that can name its terms."""

    @property
    def origin(self) -> str:
        """What its seconds rest on, in a word."""

    def parts(self, tokens: int, requests: int, seqs: int) -> Parts: ...

    def rows_s(self, tokens: int, requests: int) -> float:
        """An iteration without attention and clocks, from tables: for the loop."""

    def head_s(self, requests: int) -> float:
        """LM head and sampling of so many rows; 0 where that is a part of the linear layers."""

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        """Attention of chunks (sums over those of an iteration: numbers, or columns of them)."""

    def clocked_s(self, seconds: float, seqs: int) -> float:
        """An iteration with chunks that takes `seconds` at full clocks, beside so many decodes."""

    @property
    def pair_s(self) -> float:
        """Attention of a (query, key) pair, all layers."""


def termed(cost: CostModel) -> Termed:
    """The same cost model, if it can name its terms."""
    if not hasattr(cost, "parts"):
        raise ValueError(f"the cost model {cost.kind} does not know its terms: use a profile or the roofline")
    return cast(Termed, cost)


def row_terms_s(model: CostModel, iterations: Columns) -> dict[str, Floats]:
    """GPU seconds of each row of an iteration log by term."""
    cost = termed(model)
    n = iterations["iterations"].astype(float)
    busy_s = n * iterations["gpu_first_s"] + iterations["gpu_growth_s"] * (n * (n - 1) / 2)
    prompts = iterations["prefill_requests"]
    seqs, rows = iterations["seqs"], iterations["seqs"] + iterations["prefill_tokens"]
    keys, places = np.unique(np.stack([rows, seqs + prompts, seqs]), axis=1, return_inverse=True)
    fixed = np.array([cost.parts(*(int(value) for value in key)) for key in keys.T]).reshape(-1, len(Parts._fields))
    terms: dict[str, Floats] = dict(zip(TERMS, (fixed[places.ravel()] * n[:, None]).T, strict=False))
    cached = n * iterations["kv_tokens"] + seqs * (n * (n - 1) / 2)
    values, places = np.unique(seqs, return_inverse=True)
    slopes = np.array([_token_s(cost, int(value)) if value else 0.0 for value in values])
    prompts_s = cost.prompts_s(
        prompts, iterations["prefill_tokens"], iterations["prefill_context"], iterations["prefill_pairs"]
    )
    terms["attention"] = terms["attention"] + slopes[places.ravel()] * cached + np.where(prompts > 0, prompts_s, 0.0)
    terms["clocks"] = busy_s - sum(terms.values())
    return terms


def _token_s(cost: CostModel, seqs: int) -> float:
    """Seconds per cached token."""
    ramp = cost.decode_ramp(seqs, seqs * 4096)
    return (ramp.first_s - cost.decode_ramp(seqs, 0).first_s) / (seqs * 4096)


def shared(total_s: float, weights: Mapping[str, float]) -> dict[str, float]:
    """`total_s` in proportion to the weights."""
    whole = sum(weights.values())
    return {name: total_s * weight / whole for name, weight in weights.items()}
