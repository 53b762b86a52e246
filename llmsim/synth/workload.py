"""`synthesise`: a workload from an arrival process, length distributions, shared prefixes, sessions and classes.

One seed fixes everything, and every part draws from its own stream of it, so that changing the rate leaves the n-th
request's lengths alone. The result is a `Trace` like any other; written in the generic format it reads back identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsim.readers.generic import prefix_blocks
from llmsim.readers.rows import IntArray
from llmsim.synth import sessions as turns_of
from llmsim.synth.arrivals import arrivals as arrivals_of
from llmsim.synth.lengths import correlated
from llmsim.synth.lengths import tokens as tokens_of
from llmsim.synth.sharing import prefixes as prefixes_of
from llmsim.synth.spec import parse
from llmsim.trace import Trace, load_trace

STREAMS = {
    name: number for number, name in enumerate(("arrivals", "prompts", "outputs", "prefixes", "sessions", "classes"))
}
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class RequestClass:
    """A share of the requests with its own service objective and, if given, its own lengths."""

    name: str
    share: float
    priority: int = 0
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    lengths: str | None = None
    output_lengths: str | None = None
    model: str | None = None


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream of one part of the workload."""
    return np.random.default_rng([seed, 100 + STREAMS[name]])


def synthesise(
    requests: int,
    *,
    arrivals: str = "poisson:rate=1",
    lengths: str = "random:tokens=1024",
    output_lengths: str | None = None,
    rho: float = 0.0,
    prefixes: str | None = None,
    sessions: str | None = None,
    classes: Sequence[RequestClass] = (),
    block_tokens: int = BLOCK_TOKENS,
    seed: int = 0,
    name: str = "synthetic",
) -> Trace:
    """`requests` requests; `lengths` are prompts (or what follows the prefix, or the new input of a turn)."""
    if requests < 1:
        raise ValueError(f"requests={requests} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if prefixes is not None and sessions is not None:
        raise ValueError("prefixes and sessions exclude each other: sessions share their system prompt and history")
    if block_tokens < 1:
        raise ValueError(f"block_tokens={block_tokens} must be at least 1")
    if prefixes is not None and parse(prefixes).name == "tree":
        return _tree(requests, arrivals, prefixes, seed, name)
    group = None
    if prefixes is not None:
        shared = prefixes_of(prefixes)
        group = shared.assign(requests, stream(seed, "prefixes"))
        requests = len(group)
    member = _assign(classes, requests, stream(seed, "classes"))
    own, outputs = _lengths(requests, lengths, output_lengths, rho, classes, member, seed)
    if sessions is not None:
        plan = turns_of.plan(sessions, arrivals, requests, stream(seed, "arrivals"), stream(seed, "sessions"))
        trace = _with_turns(name, plan, own, outputs, block_tokens)
    else:
        trace = Trace(name, arrivals_of(arrivals, requests, stream(seed, "arrivals")), own, outputs, rows_read=requests)
    if group is not None:
        sizes = shared.tokens[group]
        prompts = own + sizes
        blocks = prefix_blocks([str(g) for g in group.tolist()], sizes.tolist(), prompts.tolist(), block_tokens)
        trace = replace(trace, prompt_tokens=prompts, block_tokens=block_tokens, block_ids=blocks)
    if classes:
        # Under the contexts of sessions some requests may be gone: classes belong to the turns that stayed.
        trace = _labelled(trace, classes, member)
    return replace(trace, format="synthetic")


def _lengths(
    requests: int, lengths: str, output_lengths: str | None, rho: float, classes: Sequence[RequestClass],
    member: IntArray, seed: int,
) -> tuple[IntArray, IntArray]:  # fmt: skip
    u = stream(seed, "prompts").random(requests)
    v = correlated(u, stream(seed, "outputs").random(requests), rho)
    prompts, outputs = _pair(lengths, output_lengths, u, v)
    for number, one in enumerate(classes):
        if one.lengths is None and one.output_lengths is None:
            continue
        mine = member == number
        prompts[mine], outputs[mine] = _pair(
            one.lengths or lengths, one.output_lengths or output_lengths, u[mine], v[mine]
        )
    return prompts, outputs


def _pair(lengths: str, output_lengths: str | None, u: Any, v: Any) -> tuple[IntArray, IntArray]:
    """Prompts and outputs from their specs: empirical ones alone are drawn as pairs."""
    drawn: list[IntArray] = []
    for text, uniform, column in ((lengths, u, "prompt_tokens"), (output_lengths or "", v, "output_tokens")):
        spec = parse(text)
        if spec.name == "empirical":
            trace = load_trace(spec.text_of("path"))
            spec.done()
            row = np.minimum((uniform * len(trace)).astype(np.int64), len(trace) - 1)
            if column == "prompt_tokens" and output_lengths is None:
                return trace.prompt_tokens[row], trace.output_tokens[row]
            # Sorted, so that the uniform is a quantile and rho means what it says.
            drawn.append(np.sort(getattr(trace, column))[row])
        elif spec.name == "ratio" and drawn:
            per_output = spec.number("prompt_per_output", above=0)
            spec.done()
            drawn.append(np.maximum(np.rint(drawn[0] / per_output), 1).astype(np.int64))
        elif not text:
            drawn.append(tokens_of("random:tokens=128", uniform))
        else:
            drawn.append(tokens_of(text, uniform))
    return drawn[0], drawn[1]


def _with_turns(name: str, plan: turns_of.Turns, new: IntArray, outputs: IntArray, block_tokens: int) -> Trace:
    prompts = turns_of.prompts(plan, new, outputs)
    ids = [str(row) for row in range(len(new))]
    session = [str(number) for number in plan.session.tolist()]
    trace = Trace(
        name, plan.arrival_s, prompts, outputs, parent=plan.parent, delay_s=plan.delay_s, ids=ids, session=session,
        rows_read=len(new),
    )  # fmt: skip
    if plan.history or plan.system_tokens:
        asked, answered = turns_of.blocks(plan, prompts, outputs, block_tokens)
        trace = replace(trace, block_tokens=block_tokens, block_ids=asked, output_block_ids=answered)
    if plan.context_tokens is not None:
        trace = _within_context(trace, plan)
    if np.isfinite(plan.arrival_s).all():
        from llmsim.trace import in_time_order

        trace = in_time_order(trace)
    return trace


def _within_context(trace: Trace, plan: turns_of.Turns) -> Trace:
    """A session ends before the first turn that would not fit the context."""
    from llmsim.trace import subset

    over = np.asarray(trace.prompt_tokens + trace.output_tokens > (plan.context_tokens or 0))
    first = np.append(True, plan.session[1:] != plan.session[:-1])
    starts = np.flatnonzero(first)
    total = np.cumsum(over)
    before: IntArray = total[starts] - over[starts]
    ended = np.asarray(total - np.repeat(before, np.diff(np.append(starts, len(over)))) > 0)
    if not ended.any():
        return trace
    if ended.all():
        raise ValueError(f"context={plan.context_tokens}: not even the first turn of any session fits; raise it")
    kept = subset(trace, np.flatnonzero(~ended))
    kept = replace(kept, dropped={"beyond the context of its session": int(ended.sum())})
    return kept.with_notes(f"{int(ended.sum())} turns beyond the context of {plan.context_tokens} tokens not generated")


def _assign(classes: Sequence[RequestClass], requests: int, rng: np.random.Generator) -> IntArray:
    if not classes:
        return np.zeros(requests, dtype=np.int64)
    shares = [one.share for one in classes]
    if any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"classes: the shares {', '.join(f'{share:g}' for share in shares)} must be >= 0 and sum to 1")
    names = [one.name for one in classes]
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"classes: the names {', '.join(map(repr, names))} must be different and not empty")
    return np.searchsorted(np.cumsum(shares)[:-1], rng.random(requests), side="right").astype(np.int64)


def _labelled(trace: Trace, classes: Sequence[RequestClass], member: IntArray) -> Trace:
    if trace.ids is not None:
        member = member[np.array([int(text) for text in trace.ids])]

    def seconds(values: list[float | None]) -> Any:
        if all(value is None for value in values):
            return None
        return np.array([np.nan if value is None else value / 1e3 for value in values])[member]

    labels = [classes[number] for number in member.tolist()]
    return replace(
        trace,
        slo_class=[one.name for one in labels],
        priority=np.array([one.priority for one in classes], dtype=np.int64)[member],
        slo_ttft_s=seconds([one.slo_ttft_ms for one in classes]),
        slo_tpot_s=seconds([one.slo_tpot_ms for one in classes]),
        model=[one.model or "" for one in labels] if any(one.model for one in classes) else None,
    )


def _tree(requests: int, arrivals: str, prefixes: str, seed: int, name: str) -> Trace:
    from llmsim.synth.tree import refit

    prompts, outputs, block_tokens, blocks = refit(prefixes, requests, stream(seed, "prefixes"))
    at_s = arrivals_of(arrivals, requests, stream(seed, "arrivals"))
    return Trace(
        name,
        at_s,
        prompts,
        outputs,
        block_tokens=block_tokens,
        block_ids=blocks,
        format="synthetic",
        rows_read=requests,
    )
