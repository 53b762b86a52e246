"""What should be known of a plan beside its numbers: traces too short for the rates they were asked to show."""

from __future__ import annotations

from collections.abc import Sequence

from llmsim.plan_reach import REACHED, Reach, answer_of
from llmsim.plan_runs import Run
from llmsim.plan_types import Option

FEW_LIVES = 20  # a trace should last so many mean answers


def notes_of(reach: Reach, answers: Sequence[Option]) -> tuple[str, ...]:
    """Of each kind one: at the rate asked for, or else at the highest that an answer holds. One line each."""
    runs = [run for option in answers if not option.open and (run := option.run) is not None]
    runs += [option.capacity_run for option in answers if option.capacity_run is not None]
    notes = [next(filter(None, (note(reach, run) for run in runs)), "") for note in (_short, _unsteady, _saturated)]
    return tuple(note for note in notes if note)


def _short(reach: Reach, run: Run) -> str:
    lasts_s, answer_s = reach.window_s(run.rate), answer_of(run)
    if lasts_s >= FEW_LIVES * answer_s:
        return ""
    return (
        f"At {run.rate:.4g}/s the trace lasts {lasts_s:.3g} s, {lasts_s / answer_s:.2g} times a mean answer: batches "
        "hardly fill and queues hardly form; give a longer trace"
    )


def _unsteady(reach: Reach, run: Run) -> str:
    part = reach.part(run.rate, answer_of(run))
    if part >= REACHED:
        return ""
    sent, most, starts_s = run.values["request_rate"], reach.rate(answer_of(run)), reach.window_s(run.rate)
    return (
        f"At {run.rate:.4g}/s the sessions start within {starts_s:.3g} s and {100 * part:.0f} % of those "
        f"that the rate means are ever under way ({sent:.3g} requests/s are sent, first to last): the load is not "
        f"steady, and lighter than that rate for long; the trace can show {most:.3g}/s: give more sessions"
    )


def _saturated(_: Reach, run: Run) -> str:
    said = str(run.values["stability"])
    return f"At {run.rate:.4g}/s the fleet is {said}" if said.startswith("saturated") else ""
