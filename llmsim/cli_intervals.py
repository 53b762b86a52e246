"""`llmsim replay --intervals`: the replay again on machines that the scenario's may turn out to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import DRAWS, HumanInt, apply
from llmsim.progress import StatusLine

if TYPE_CHECKING:
    from llmsim.metrics import Result
    from llmsim.prices import Price
    from llmsim.scenario import Scenario
    from llmsim.trace import Trace


FLAGS: list[Callable[[Any], Any]] = [
    click.option(
        "--intervals",
        type=HumanInt(),
        is_flag=False,
        flag_value=str(DRAWS),
        metavar="[N]",
        help=f"Print prediction intervals, from N replays on other machines of the kind. [{DRAWS}]",
    ),
    click.option("--seeds", type=HumanInt(), metavar="N", help="The same, but only the seed differs between replays."),
    click.option("--level", type=float, help="What the intervals hold. [0.9]"),
    click.option(
        "--slo",
        "slos",
        multiple=True,
        metavar="TARGET",
        help="Say whether it is met, e.g. ttft_p99=500ms; with --intervals, how probably. Repeatable.",
    ),
    click.option("--jobs", type=HumanInt(), help="Processes for --intervals and --seeds. [the cores there are]"),
]


def interval_options(command: Any) -> Any:
    return apply(FLAGS, command)


def taken(flags: dict[str, Any]) -> dict[str, Any]:
    """This module's flags, taken out of `flags` and checked against each other before anything is simulated."""
    from llmsim.slo import parse_slos

    own = {name: flags.pop(name) for name in ("intervals", "seeds", "level", "slos", "jobs")}
    if own["intervals"] is not None and own["seeds"] is not None:
        raise ValueError("--intervals contradicts --seeds: its draws have a seed each. Give one of them")
    if own["intervals"] is None and own["seeds"] is None:
        for name, value in (("--level", own["level"]), ("--jobs", own["jobs"])):
            if value or value == 0:
                raise ValueError(f"{name} needs --intervals or --seeds: add one of them, or leave {name} out")
        own["slos"] = parse_slos(own["slos"]) if own["slos"] else ()
        return own
    from llmsim.uncertainty import LEVEL, check_level

    own["level"] = LEVEL if own["level"] is None else own["level"]
    name = "--intervals" if own["seeds"] is None else "--seeds"
    own["draws"] = own["intervals"] if own["seeds"] is None else own["seeds"]
    check_level(own["level"], own["draws"], name)
    own["slos"] = parse_slos(own["slos"])
    own["jobs"] = cores() if own["jobs"] is None else own["jobs"]
    if own["jobs"] < 1:
        raise ValueError(f"jobs={own['jobs']}: give 1 or more processes")
    return own


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary_part(
    trace: Trace,
    scenario: Scenario,
    goodput: dict[str, float] | None,
    own: dict[str, Any],
    price: Price | None = None,
) -> dict[str, Any]:
    """{"intervals": …} for the summary, as `Prediction.to_dict` gives it; nothing if it was not asked for."""
    if "draws" not in own:
        return {}
    from llmsim.uncertainty import SEED_ALONE, predict

    told = _Told()
    try:
        found = predict(
            trace,
            scenario,
            draws=own["draws"],
            goodput=goodput,
            slos=own["slos"],
            level=own["level"],
            jobs=own["jobs"],
            progress=told,
            price=price,
            sources=SEED_ALONE if own["seeds"] is not None else None,
        )
    finally:
        told.close()
    return {"intervals": found.to_dict()}


class _Told(StatusLine):
    """Draws done."""

    def __call__(self, done: int, draws: int) -> None:
        self.say(lambda _: f"{done} of {draws} draws replayed")


def kept_part(result: Result, own: dict[str, Any]) -> dict[str, Any]:
    """{"promises": …} for what is printed: each --slo, what was measured (s), whether it is met. Nothing if there is no
    --slo, or if intervals say how probably."""
    if "draws" in own or not own["slos"]:
        return {}
    from llmsim.metrics import json_safe
    from llmsim.slo import values_s

    measured = zip(own["slos"], values_s(result, own["slos"]), strict=True)
    rows = [
        {"slo": str(slo), "words": slo.words, "shown": slo.shown(value_s), "value_s": value_s, "met": slo.met(value_s)}
        for slo, value_s in measured
    ]
    found: dict[str, Any] = json_safe({"promises": rows})
    return found
