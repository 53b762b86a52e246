"""What should be known of a plan beside its numbers: traces too short for the rates they were asked to show."""

from __future__ import annotations

from llmsim.plan_bench import own_rate
from llmsim.plan_contest import Contest
from llmsim.rescale import longest_s, starts_span_s
from llmsim.trace import Trace

FEW_LIVES, FEW_SESSIONS = 20, 3  # a trace should last so many mean answers, and so many of its longest sessions


def notes_of(trace: Trace, demand: float | None, contest: Contest) -> tuple[str, ...]:
    """At the demand, or at the lowest rate that a winner holds. One line each."""
    held = [one.held for one in contest.winners() if one is not None and one.held is not None]
    rate = demand or min((run.rate for run in held), default=None)
    if rate is None:
        return ()
    notes = []
    lasts_s = starts_span_s(trace) * own_rate(trace) / rate
    slowest_s = max((run.values["mean_e2el_ms"] / 1e3 for run in held), default=0.0)
    if lasts_s < FEW_LIVES * slowest_s:
        notes.append(
            f"At {rate:.4g}/s the trace lasts {lasts_s:.3g} s, {lasts_s / slowest_s:.2g} times a mean answer: batches "
            "hardly fill and queues hardly form; give a longer trace"
        )
    session_s = longest_s(trace)
    if session_s > lasts_s / FEW_SESSIONS:
        notes.append(
            f"At {rate:.4g}/s sessions start within {lasts_s:.3g} s and last up to {session_s:.3g} s: the load is not "
            "steady; give a longer trace"
        )
    return tuple(notes)
