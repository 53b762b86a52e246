"""An explanation as people read it: the path of one request, or the parts of a tail, then the cause and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import wrap

import numpy as np

from llmsim.explain import Explanation, by_cause, mean_parts
from llmsim.explain_advice import cause, knobs
from llmsim.explain_spans import Life, Span
from llmsim.explain_words import (
    CAUSES,
    KINDS,
    NAMES,
    PIECES,
    REASONS,
    percent,
    shown,
    time_of,
    times,
    unit_of,
)
from llmsim.text import WIDTH, wrapped

FULL_LINES = 30  # lines of a path; a request that is preempted a thousand times has more
LISTED = 10  # requests of a tail that get a line
LEAST_SHARE = 0.0005  # parts below it are summed up


def report(explanation: Explanation) -> str:
    lines: list[str] = []
    if len(explanation.lives) == 1:
        lines += _path(explanation.lives[0])
    else:
        lines += _tail(explanation)
    lines += ["", *cause(explanation), *knobs(explanation)]
    return "\n".join(lines)


# ---- one request ----------------------------------------------------------------------------------------------------


def _path(life: Life) -> Iterator[str]:
    facts = life.facts
    e2el_s = facts["finish_s"] - facts["arrival_s"]
    ttft_s = facts["first_token_s"] - facts["arrival_s"]
    more = facts["output_tokens"] - 1
    tpot = f", TPOT {1e3 * (e2el_s - ttft_s) / more:,.2f} ms" if more else ""
    yield from wrapped(
        f"Request {life.request}: {facts['prompt_tokens']:,} prompt + {facts['output_tokens']:,} output tokens, sent "
        f"at {facts['arrival_s']:.3f} s to replica {facts['replica']}: E2EL {time_of(e2el_s)}, "
        f"TTFT {time_of(ttft_s)}{tpot}"
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
    start = f"{stay[0].start_s:>10.3f} s{seconds:>11.4f}{percent(seconds / e2el_s):>8}  "
    words = _queued(stay, life) if stay[0].kind == "queue" else _done(stay[0])
    first, *rest = wrap(words, WIDTH - len(start))
    return [start + first, *(" " * len(start) + line for line in rest)]


def _queued(stay: list[Span], life: Life) -> str:
    first = stay[0]
    if first.phase == "preempted":
        head = f"preempted ({times(len(life.preempted_for))} in all{_for_whom(life)}), queued again"
    else:
        head = f"queued behind {life.ahead:,} requests" if life.ahead else "queued, first in line"
    return f"{head}: {'; '.join(_reasons(stay))}"


def _for_whom(life: Life) -> str:
    others = [str(one) for one in dict.fromkeys(life.preempted_for) if one >= 0]
    listed = f", for request {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else ""
    own = life.preempted_for.count(-1)
    return listed + (f", {times(own)} as the one that found no block itself" if own else "")


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
        yield f"{REASONS[reason]} {time_of(seconds)} ({', '.join(facts)})"


def _done(span: Span) -> str:
    if not span.divided:
        return KINDS[span.kind]
    prompts = f" ({span.prompt_tokens:,} tokens)" if span.prompt_tokens else ""
    pieces = [
        f"{PIECES[name]} {time_of(seconds)}{prompts if name == 'prompts' else ''}"
        for name, seconds in (
            ("own", span.own_s), ("decodes", span.decodes_s), ("prompts", span.prompts_s), ("host", span.host_s)
        )
        if seconds > 5e-5
    ]  # fmt: skip
    if not span.iterations:
        return f"{KINDS[span.kind]}: {', '.join(pieces)}" if pieces else KINDS[span.kind]
    kind = KINDS[span.kind]
    if span.kind == "recompute":
        kind += f" for request {span.who}" if span.who >= 0 else ", as it found no block for its own token"
    batch = f", {span.batch:,.1f} decodes in each" if span.decoded else ""
    count = "1 iteration" if span.iterations == 1 else f"{span.iterations:,} iterations"
    return f"{kind}, {count}{batch}: {', '.join(pieces)}"


# ---- a tail ---------------------------------------------------------------------------------------------------------


def _tail(explanation: Explanation) -> Iterator[str]:
    tail, latency_s = explanation.tail, explanation.latency_s
    mean_s = float(np.mean(latency_s))
    name, unit = NAMES[tail.metric], unit_of(mean_s)
    yield from wrapped(
        f"{tail.words[0].upper()}{tail.words[1:]}, of {tail.of:,}: mean {name} {shown(mean_s, unit)},"
        f" {shown(min(latency_s), unit)} to {shown(max(latency_s), unit)}"
    )
    total_s = sum(explanation.parts_s.values())
    rest_s, small = 0.0, 0
    yield ""
    yield f"{'seconds':>11}{'share':>8}  of a mean request{' after its first token' if tail.metric == 'tpot' else ''}"
    for part, seconds in explanation.parts_s.items():
        if seconds < LEAST_SHARE * total_s:
            rest_s, small = rest_s + seconds, small + 1
            continue
        yield f"{seconds:>11.4f}{percent(seconds / total_s):>8}  {part_words(part)}"
    if small:
        yield f"{rest_s:>11.4f}{percent(rest_s / total_s):>8}  {small} parts of less than {LEAST_SHARE:.2%}"
    yield f"{total_s:>11.4f}{'100.0 %':>8}  in all"
    yield ""
    yield f"{'request':>10}{'sent at':>12}{name:>12}  prompt + output  most of it"
    for life, seconds in list(zip(explanation.lives, latency_s, strict=True))[:LISTED]:
        facts = life.facts
        causes_s = by_cause(mean_parts([life.parts_s(tail.metric)]))
        most, most_s = next(iter(causes_s.items()))
        length = f"{facts['prompt_tokens']:,} + {facts['output_tokens']:,}"
        share = percent(most_s / max(sum(causes_s.values()), 1e-12))
        sent = f"{facts['arrival_s']:.3f} s"
        yield f"{life.request:>10}{sent:>12}{shown(seconds, unit):>12}  {length:>15}  {share} {CAUSES[most]}"
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
