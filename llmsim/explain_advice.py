"""The end of an explanation: the cause that has most of the time, what was tried, and what helps most."""

from __future__ import annotations

from collections.abc import Iterator

from llmsim.explain import Explanation
from llmsim.explain_knobs import Knob
from llmsim.explain_words import CAUSES, NAMES, percent, shown, unit_of
from llmsim.text import wrapped


def cause(explanation: Explanation) -> Iterator[str]:
    total_s = sum(explanation.causes_s.values())
    most, seconds = next(iter(explanation.causes_s.items()))
    others = [
        f"{percent(s / total_s)} {CAUSES[name]}"
        for name, s in list(explanation.causes_s.items())[1:3]
        if s >= 0.05 * total_s
    ]
    more = f"; then {', '.join(others)}" if others else ""
    share = percent(seconds / total_s)
    yield from wrapped(f"Cause: {CAUSES[most]}: {share} of the time{_when(explanation, most)}{more}.")


def _when(explanation: Explanation, cause: str) -> str:
    """When requests were queued for it, and what happened meanwhile."""
    waits = [span for life in explanation.lives for span in life.spans if span.kind == "queue" and span.reason == cause]
    if not waits:
        return ""
    start_s, end_s = min(span.start_s for span in waits), max(span.end_s for span in waits)
    preempted = max(span.preemptions for span in waits)
    preemptions = f", up to {preempted:,} preemptions in one wait" if preempted else ""
    return f" (waits for it between t = {start_s:,.1f} and {end_s:,.1f} s{preemptions})"


def knobs(explanation: Explanation) -> Iterator[str]:
    tried, name = explanation.knobs, NAMES[explanation.tail.metric]
    if not tried:
        if explanation.left_out:
            yield from wrapped("No change was tried." + _left_out(explanation))
        return
    whose = "its" if len(explanation.lives) == 1 else "their mean"
    yield ""
    yield from wrapped(f"Tried, each by a replay of the same trace: {whose} {name}, and the P99 {name} of all requests")
    yield ""
    width = max(len(knob.setting) for knob in tried)
    unit, unit99 = unit_of(tried[0].before_s), unit_of(tried[0].p99_before_s)
    yield f"  {'change':<{width}}{'GPUs':>6}{name:>24}{'':>9}{'P99 of all':>24}"
    for knob in tried:
        after = f"{shown(knob.before_s, unit)} -> {shown(knob.after_s, unit)}"
        p99 = f"{shown(knob.p99_before_s, unit99)} -> {shown(knob.p99_after_s, unit99)}"
        yield f"  {knob.setting:<{width}}{knob.gpus:>6}{after:>24}{_change(knob):>9}{p99:>24}"
    yield ""
    yield from wrapped(_verdict(explanation))
    if any(knob.lossy for knob in tried):
        yield from wrapped("Not modelled: what the model answers with weights or KV cache in another precision.")
    left_out = _left_out(explanation)
    if left_out:
        yield from wrapped(left_out.strip())


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
