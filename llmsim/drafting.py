"""Speculative decoding: what it is set to, and how many tokens that makes.

Before each iteration a drafter proposes k tokens for every decoding request; the model computes 1 + k rows of it at
once and keeps the longest run of drafts that it would have made itself, and one token of its own. With p_i the chance
that the i-th draft is accepted if those before it were,

    tokens of a verification   1 + sum over i of p_1 ... p_i;  with all p = a: (1 - a^(k+1)) / (1 - a)
                               (Leviathan et al. 2023, arXiv 2211.17192, equation 1)

`speculative_config` is vLLM's, with what a simulation must be told besides:

    method                   "ngram": the drafts are looked up in the prompt, by the host; "draft_model": a small
                             model makes them one after another; "eagle", "mtp": a layer on the model's hidden states
                             does
    num_speculative_tokens   k
    model                    the draft model
    acceptance               a, or p_1, p_2, ... p_k: a property of model, drafter and text, so there is no default
    proposal_rate            share of verifications for which the drafter has a proposal (ngram: a match). [1]
    draft_layers             layers of the target that a drafting head is as heavy as. [1.2: one, and the projection
                             of its inputs]
    draft_host_s             host seconds of a request's drafts (ngram [20e-6, not measured]), of a step of others
                             [0.2e-3]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

METHODS = ("ngram", "draft_model", "eagle", "mtp")
MOST_DRAFTS = 64
HEAD_LAYERS = 1.2
NGRAM_HOST_S = 20e-6
DRAFT_LAUNCH_S = 0.2e-3
_KEYS = (
    "method", "num_speculative_tokens", "model", "acceptance", "proposal_rate", "draft_layers", "draft_host_s",
)  # fmt: skip


@dataclass(frozen=True)
class Speculation:
    method: str
    drafts: int  # k
    acceptance: tuple[float, ...]  # of each position, if those before were accepted
    model: str | None = None
    proposal_rate: float = 1.0
    draft_layers: float = HEAD_LAYERS
    draft_host_s: float = 0.0

    @property
    def survival(self) -> tuple[float, ...]:
        """Chance that the first i drafts are all accepted, i = 1 ... k."""
        chances, chance = [], 1.0
        for accepted in self.acceptance:
            chance *= accepted
            chances.append(chance)
        return tuple(chances)

    @property
    def tokens_per_step(self) -> float:
        return 1.0 + self.proposal_rate * sum(self.survival)

    @property
    def lookahead(self) -> int:
        """Slots beyond its drafts that a request's blocks are taken for: the drafter writes its own KV ahead."""
        return 0 if self.method == "ngram" else self.drafts

    @property
    def on_host(self) -> bool:
        return self.method == "ngram"


def speculation_of(config: dict[str, Any]) -> Speculation | None:
    """None for an empty table; ValueError names the key that is wrong."""
    if not config:
        return None
    for key in config:
        if key not in _KEYS:
            raise ValueError(f"speculative_config {key}: no such key. Known: {', '.join(_KEYS)}")
    method, drafts, model = config.get("method"), config.get("num_speculative_tokens"), config.get("model")
    if method not in METHODS:
        raise ValueError(f"speculative_config method={method!r} is not one of {', '.join(METHODS)}")
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 1 <= drafts <= MOST_DRAFTS:
        raise ValueError(
            f"speculative_config num_speculative_tokens={drafts!r}: give a whole number from 1 to {MOST_DRAFTS}"
        )
    if (model is None) == (method == "draft_model") or not isinstance(model, str | None):
        raise ValueError(
            f"speculative_config model={model!r}: "
            + (
                "name the draft model (llmsim list models)"
                if method == "draft_model"
                else f"{method} has none; leave it out"
            )
        )
    host_s = {"ngram": NGRAM_HOST_S}.get(method, DRAFT_LAUNCH_S)
    return Speculation(
        method,
        drafts,
        _acceptance(config.get("acceptance"), drafts),
        model,
        _number(config, "proposal_rate", 1.0, 0.0, 1.0),
        _number(config, "draft_layers", HEAD_LAYERS, 0.0, 1000.0),
        _number(config, "draft_host_s", host_s, 0.0, 1.0),
    )


def _acceptance(given: Any, drafts: int) -> tuple[float, ...]:
    chances = list(given) if isinstance(given, list | tuple) else [given] * drafts
    numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0.0 <= p <= 1.0 for p in chances)
    if not numbers or len(chances) != drafts:
        raise ValueError(
            f"speculative_config acceptance={given!r}: give the chance that a draft is accepted, from 0 to 1, or a "
            f"list of {drafts}, one for each position; it depends on model, drafter and text, so there is no default"
        )
    return tuple(float(p) for p in chances)


def _number(config: dict[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = config.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not isfinite(value)
        or not least <= value <= most
    ):
        raise ValueError(f"speculative_config {key}={value!r}: give a number from {least:g} to {most:g}")
    return float(value)
