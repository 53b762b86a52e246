"""What a `kv_compression` keeps of each request, and what it risks: `llmsim.compression` says what follows from it."""

from __future__ import annotations

from typing import NamedTuple

NONE = "none"
RISKS = {
    "window": "nothing older than the window can be used, and a model not trained with one fails once the first tokens"
    " have left it (StreamingLLM, section 3.1)",
    "sinks": "the model stays fluent but cannot use what lies between sinks and window (StreamingLLM, section 5)",
    "budget": "tokens that a later one would have needed may be gone, most of all for retrieval from long contexts",
}


class Kept(NamedTuple):
    """A `kv_compression`: its kind and how many tokens of a request stay."""

    kind: str
    tokens: int


def parse(spec: str) -> Kept | None:
    """None for "none"; ValueError with the fix for what is no compression."""
    if spec == NONE:
        return None
    kind, _, size = spec.partition(":")
    parts = size.split("+") if kind == "sinks" else [size]
    if kind not in RISKS or len(parts) != (2 if kind == "sinks" else 1) or not all(part.isdigit() for part in parts):
        raise ValueError(f"kv_compression={spec!r}: write none, window:4096, sinks:4+2044 or budget:1024 (tokens)")
    tokens = sum(map(int, parts))
    if tokens < 1 or not int(parts[-1]):
        raise ValueError(f"kv_compression={spec!r} keeps nothing: give at least one token")
    return Kept(kind, tokens)


def risk(spec: str) -> str | None:
    """What a result says about a compression."""
    kept = parse(spec)
    if kept is None:
        return None
    return f"kv_compression={spec} drops context; its effect on the answers is not modelled: {RISKS[kept.kind]}"
