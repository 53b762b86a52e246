"""One request's life as `llmsim explain` finds it: its run is replayed with an observer, so every wait has a reason.

`llmsim.views.life` tells what the run's columns alone can tell, and needs neither trace nor replay.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmsim.explain import observed_lives
from llmsim.explain_report import stays
from llmsim.explain_source import check_repeated, of_run
from llmsim.runs import read_run
from llmsim.views_base import frame_of, values
from llmsim.views_requests import rows_of

AT_ONCE = 20_000  # requests of a run that is replayed while somebody waits for it

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.choice import TraceChoice
    from llmsim.scenario import Scenario


def explained(
    folder: Path,
    request: int,
    choice: TraceChoice | None = None,
    scenario: Scenario | None = None,
    *,
    progress: Callable[[float, float, str], None] | None = None,
) -> pd.DataFrame:
    """The stays of one request in order, with the columns of `llmsim.views.life` and `kind`; `reason` says for what it
    waited, or what its iterations were spent on.

    `choice` and `scenario`: what the run in `folder` replayed; without them its manifest says it. Raises ValueError if
    that trace is gone or another one, if the replay gives other numbers, and for a request that was rejected.
    """
    run = read_run(folder)
    row = int(rows_of(run, [request])[0])
    if choice is not None and scenario is not None:
        trace, scenario = choice.load(len(run.requests["id"]), scenario.resolved()), scenario
    else:
        trace, scenario = of_run(run)
    if progress is not None:
        progress(0, 1, "replay, with an observer")
    result, lives = observed_lives(trace, scenario, [request])
    check_repeated(run, result.requests)
    facts = {name: run.requests[name][row] for name in ("id", "prompt_tokens", "output_tokens", "replica")}
    facts |= {f"{name}_ms": values(run, name)[row] for name in ("ttft", "tpot", "e2el")}
    whole_s = facts["e2el_ms"] / 1e3
    rows = [
        facts
        | {"phase": stay[0].phase, "kind": stay[0].kind, "begin_s": stay[0].start_s, "end_s": stay[-1].end_s}
        | {"reason": words[0].upper() + words[1:]}
        for stay, words in stays(lives[0])
    ]
    frame = frame_of({name: [one[name] for one in rows] for name in rows[0]}, ())
    frame["duration_ms"] = 1e3 * (frame["end_s"] - frame["begin_s"])
    frame["share"] = (frame["end_s"] - frame["begin_s"]) / whole_s if whole_s else 0.0
    return frame
