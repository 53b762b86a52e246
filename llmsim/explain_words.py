"""What an explanation is told in: reasons, causes, kinds, and numbers with their units."""

from __future__ import annotations

REASONS = {
    "kv": "KV cache full",
    "seqs": "max_num_seqs reached",
    "tokens": "iterations full (max_num_batched_tokens)",
    "order": "requests that came later went first (the policy's order)",
    "policy": "nothing was short: the policy's own rule",
}
CAUSES = {
    "kv": "the KV cache was full", "seqs": "max_num_seqs requests ran already",
    "tokens": "iterations were full (max_num_batched_tokens)", "order": "the policy's order put others first",
    "policy": "the policy's own rule, with nothing short", "host": "the GPU waited for the host",
    "prefill": "its own prompt was being computed", "prompts": "other requests' prompts shared its iterations",
    "batch": "other requests' decodes shared its iterations", "decode": "its own tokens were being computed",
    "client": "the client side", "tier": "its KV was on its way from a lower tier",
}  # fmt: skip
KINDS = {
    "client": "on its way to the engine (client side)",
    "schedule": "waiting for the next schedule, iterations under way",
    "loading": "KV on its way from a lower tier",
    "paused": "set aside by the policy",
    "handout": "answer complete, not handed out yet",
    "prefill": "prefill",
    "recompute": "recompute after preemption",
    "decode": "decode",
    "held": "half-prefilled, no tokens in the iteration",
    "sat-out": "no token in the iteration, though others got one",
}
PIECES = {"own": "own", "decodes": "others' decodes", "prompts": "others' prompts", "host": "host and launches"}
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def unit_of(seconds: float) -> str:
    return "s" if seconds >= 1.0 else "ms"


def shown(seconds: float, unit: str) -> str:
    if seconds == float("inf"):
        return "never"
    return f"{seconds:,.2f} s" if unit == "s" else f"{1e3 * seconds:,.1f} ms"


def time_of(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:,.1f} ms"


def times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
