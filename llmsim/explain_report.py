"""An explanation as people read it: the path of one request, or the parts of a tail, then the cause and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import wrap

import numpy as np

from llmsim.explain import Explanation, Tail, by_cause, mean_parts
from llmsim.explain_knobs import Knob
from llmsim.explain_life import Life, Span

WIDTH = 116
FULL_LINES = 30  # lines of a path; a request that is preempted a thousand times has more
LISTED = 10  # requests of a tail that get a line
LEAST_SHARE = 0.0005  # parts below it are summed up
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
    "policy": "the policy's own rule, with nothing short", "host": "the GPU and the request waited for the host",
    "prefill": "its own prompt was being computed", "prompts": "other requests' prompts shared its iterations",
    "batch": "other requests' decodes shared its iterations", "decode": "its own tokens were being computed",
    "client": "the client side", "tier": "its KV was on its way from a lower tier",
}  # fmt: skip
KINDS = {
    "client": "on its way to the engine (client side)",
    "schedule": "waiting for the host to schedule next",
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


def report(explanation: Explanation) -> str:
    lines: list[str] = []
    if len(explanation.lives) == 1:
        lines += _path(explanation.lives[0], explanation.tail)
    else:
        lines += _tail(explanation)
    lines += ["", *_cause(explanation), *_knobs(explanation)]
    return "\n".join(lines)


# ---- one request ----------------------------------------------------------------------------------------------------


def _path(life: Life, tail: Tail) -> Iterator[str]:
    facts = life.facts
    e2el_s = facts["finish_s"] - facts["arrival_s"]
    ttft_s = facts["first_token_s"] - facts["arrival_s"]
    more = facts["output_tokens"] - 1
    tpot = f", TPOT {1e3 * (e2el_s - ttft_s) / more:,.2f} ms" if more else ""
    yield from _wrapped(
        f"Request {life.request}: {facts['prompt_tokens']:,} prompt + {facts['output_tokens']:,} output tokens, sent "
        f"at {facts['arrival_s']:.3f} s to replica {facts['replica']}: E2EL {_time(e2el_s)}, TTFT {_time(ttft_s)}{tpot}"
    )
    yield ""
    yield f"{'from':>12}{'seconds':>11}{'share':>8}  what"
    lines = [_stay(stay, life, e2el_s) for stay in _stays(life.spans)]
    for line in lines if len(lines) <= FULL_LINES else lines[: FULL_LINES - 1]:
        yield from line
    if len(lines) > FULL_LINES:
        yield f"{'':33}… {len(lines) - FULL_LINES + 1} more stays: see --json"
    yield f"{'':12}{e2el_s:>11.4f}{'100.0 %':>8}  in all: the request's E2EL"


def stays(life: Life) -> Iterator[tuple[list[Span], str]]:
    """What a request did, stay after stay, each in words."""
    for stay in _stays(life.spans):
        yield stay, _queued(stay, life) if stay[0].kind == "queue" else _done(stay[0])


def _stays(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """A wait whose reason changes to and fro is one stay."""
    for _, same in groupby(spans, key=lambda span: (span.phase, span.kind)):
        yield list(same)


def _stay(stay: list[Span], life: Life, e2el_s: float) -> list[str]:
    seconds = stay[-1].end_s - stay[0].start_s
    start = f"{stay[0].start_s:>10.3f} s{seconds:>11.4f}{_percent(seconds / e2el_s):>8}  "
    words = _queued(stay, life) if stay[0].kind == "queue" else _done(stay[0])
    first, *rest = wrap(words, WIDTH - len(start))
    return [start + first, *(" " * len(start) + line for line in rest)]


def _queued(stay: list[Span], life: Life) -> str:
    first = stay[0]
    if first.phase == "preempted":
        head = f"preempted ({_times(len(life.preempted_for))} in all{_for_whom(life)}), queued again"
    else:
        head = f"queued behind {life.ahead:,} requests" if life.ahead else "queued, first in line"
    return f"{head}: {'; '.join(_reasons(stay))}"


def _for_whom(life: Life) -> str:
    others = [str(one) for one in dict.fromkeys(life.preempted_for) if one >= 0]
    listed = f", for request {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else ""
    own = life.preempted_for.count(-1)
    return listed + (f", {_times(own)} as the one that found no block itself" if own else "")


def _reasons(stay: Sequence[Span]) -> Iterator[str]:
    """Each reason with its seconds, the longest first."""
    by_reason: dict[str, list[Span]] = {}
    for span in stay:
        by_reason.setdefault(span.reason, []).append(span)
    for reason, same in sorted(by_reason.items(), key=lambda item: -sum(span.length_s for span in item[1])):
        seconds = sum(span.length_s for span in same)
        facts = [f"t = {same[0].start_s:,.1f}-{same[-1].end_s:,.1f} s"]
        longest = max(same, key=lambda span: span.length_s)
        if reason == "kv" and longest.who >= 0:
            free, needed = longest.blocks
            facts.append(f"request {longest.who} at the head needs {needed:,} blocks, {free:,} are free")
        elif reason == "order" and longest.who >= 0:
            facts.append(f"request {longest.who} among them")
        preempted = sum(span.preemptions for span in same)
        if preempted:
            facts.append(f"{preempted:,} preemption{'s' if preempted > 1 else ''}")
        yield f"{REASONS[reason]} {_time(seconds)} ({', '.join(facts)})"


def _done(span: Span) -> str:
    if not span.iterations:
        return KINDS[span.kind]
    prompts = f" ({span.prompt_tokens:,} tokens)" if span.prompt_tokens else ""
    pieces = [
        f"{PIECES[name]} {_time(seconds)}{prompts if name == 'prompts' else ''}"
        for name, seconds in (
            ("own", span.own_s), ("decodes", span.decodes_s), ("prompts", span.prompts_s), ("host", span.host_s)
        )
        if seconds > 5e-5
    ]  # fmt: skip
    batch = f", {span.batch:,.1f} decodes in each" if span.decoded else ""
    times = "1 iteration" if span.iterations == 1 else f"{span.iterations:,} iterations"
    return f"{KINDS[span.kind]}, {times}{batch}: {', '.join(pieces)}"


# ---- a tail ---------------------------------------------------------------------------------------------------------


def _tail(explanation: Explanation) -> Iterator[str]:
    tail, latency_s = explanation.tail, explanation.latency_s
    name, unit = NAMES[tail.metric], _unit(float(np.mean(latency_s)))
    yield from _wrapped(
        f"{tail.words[0].upper()}{tail.words[1:]}, of {tail.of:,}: mean {name} {_in(float(np.mean(latency_s)), unit)},"
        f" {_in(min(latency_s), unit)} to {_in(max(latency_s), unit)}"
    )
    total_s = sum(explanation.parts_s.values())
    rest_s, small = 0.0, 0
    yield ""
    yield f"{'seconds':>11}{'share':>8}  of a mean request{' after its first token' if tail.metric == 'tpot' else ''}"
    for part, seconds in explanation.parts_s.items():
        if seconds < LEAST_SHARE * total_s:
            rest_s, small = rest_s + seconds, small + 1
            continue
        yield f"{seconds:>11.4f}{_percent(seconds / total_s):>8}  {part_words(part)}"
    if small:
        yield f"{rest_s:>11.4f}{_percent(rest_s / total_s):>8}  {small} parts of less than {LEAST_SHARE:.2%}"
    yield f"{total_s:>11.4f}{'100.0 %':>8}  in all"
    yield ""
    yield f"{'request':>10}{'sent at':>12}{name:>12}  prompt + output  most of it"
    for life, seconds in list(zip(explanation.lives, latency_s, strict=True))[:LISTED]:
        facts = life.facts
        causes_s = by_cause(mean_parts([life.parts_s(tail.metric)]))
        cause, most_s = next(iter(causes_s.items()))
        length = f"{facts['prompt_tokens']:,} + {facts['output_tokens']:,}"
        share = _percent(most_s / max(sum(causes_s.values()), 1e-12)).strip()
        sent = f"{facts['arrival_s']:.3f} s"
        yield f"{life.request:>10}{sent:>12}{_in(seconds, unit):>12}  {length:>15}  {share} {CAUSES[cause]}"
    if len(explanation.lives) > LISTED:
        yield f"{'…':>10} {len(explanation.lives) - LISTED} more: see --json"


def part_words(part: str) -> str:
    """`decode.decode.prompts` -> decode: others' prompts."""
    phase, kind, *rest = part.split(".")
    if kind == "queue":
        head = "queued" if phase == "queue" else "preempted, queued again"
        return f"{head}: {REASONS[rest[0]]}"
    words = KINDS[kind] if phase != "preempted" or kind == "recompute" else f"after a preemption: {KINDS[kind]}"
    return f"{words}: {PIECES[rest[0]]}" if rest else words


# ---- cause and knobs ------------------------------------------------------------------------------------------------


def _cause(explanation: Explanation) -> Iterator[str]:
    total_s = sum(explanation.causes_s.values())
    cause, seconds = next(iter(explanation.causes_s.items()))
    others = [
        f"{_percent(s / total_s).strip()} {CAUSES[name]}"
        for name, s in list(explanation.causes_s.items())[1:3]
        if s >= 0.05 * total_s
    ]
    more = f"; then {', '.join(others)}" if others else ""
    text = (
        f"Cause: {CAUSES[cause]}: {_percent(seconds / total_s).strip()} of the time{_when(explanation, cause)}{more}."
    )
    yield from _wrapped(text)


def _when(explanation: Explanation, cause: str) -> str:
    """When requests were queued for it, and what happened meanwhile."""
    waits = [span for life in explanation.lives for span in life.spans if span.kind == "queue" and span.reason == cause]
    if not waits:
        return ""
    start_s, end_s = min(span.start_s for span in waits), max(span.end_s for span in waits)
    preempted = max(span.preemptions for span in waits)
    preemptions = f", up to {preempted:,} preemptions in one wait" if preempted else ""
    return f" (waits for it between t = {start_s:,.1f} and {end_s:,.1f} s{preemptions})"


def _knobs(explanation: Explanation) -> Iterator[str]:
    knobs, name = explanation.knobs, NAMES[explanation.tail.metric]
    if not knobs:
        yield from _wrapped("No change was tried." + _left_out(explanation))
        return
    whose = "its" if len(explanation.lives) == 1 else "their mean"
    yield ""
    yield from _wrapped(
        f"Tried, each by a replay of the same trace: {whose} {name}, and the P99 {name} of all requests"
    )
    yield ""
    width = max(len(knob.setting) for knob in knobs)
    unit, unit99 = _unit(knobs[0].before_s), _unit(knobs[0].p99_before_s)
    yield f"  {'change':<{width}}{'GPUs':>6}{name:>24}{'':>9}{'P99 of all':>24}"
    for knob in knobs:
        after = f"{_in(knob.before_s, unit)} -> {_in(knob.after_s, unit)}"
        p99 = f"{_in(knob.p99_before_s, unit99)} -> {_in(knob.p99_after_s, unit99)}"
        yield f"  {knob.setting:<{width}}{knob.gpus:>6}{after:>24}{_change(knob):>9}{p99:>24}"
    yield ""
    yield from _wrapped(_verdict(explanation))
    if any(knob.lossy for knob in knobs):
        yield from _wrapped("Not modelled: what the model answers with weights or KV cache in another precision.")
    left_out = _left_out(explanation)
    if left_out:
        yield from _wrapped(left_out.strip())


def _verdict(explanation: Explanation) -> str:
    best = explanation.best
    if best is None:
        return "None of them helps."
    text = f"Helps most: {best.about} ({best.setting}), {_change(best)}"
    same = next((knob for knob in explanation.knobs if knob.helps and knob.more_gpus <= 0), None)
    if best.more_gpus > 0:
        text += f", with {best.more_gpus} more GPU{'s' if best.more_gpus > 1 else ''}"
        text += (
            f"; without more: {same.about} ({same.setting}), {_change(same)}"
            if same
            else "; without more GPUs none does"
        )
    return text + "."


def _left_out(explanation: Explanation) -> str:
    if not explanation.left_out:
        return ""
    return " Not tried: " + "; ".join(f"{name}: {why}" for name, why in explanation.left_out.items()) + "."


def _change(knob: Knob) -> str:
    if knob.after_s == float("inf"):
        return "rejected"
    return f"{100 * (knob.after_s / knob.before_s - 1):+.1f} %" if knob.before_s else "-"


# ---- numbers --------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _unit(seconds: float) -> str:
    return "s" if seconds >= 1.0 else "ms"


def _in(seconds: float, unit: str) -> str:
    if seconds == float("inf"):
        return "never"
    return f"{seconds:,.2f} s" if unit == "s" else f"{1e3 * seconds:,.1f} ms"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:,.1f} ms"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent="  ")
