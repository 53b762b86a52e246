"""`compare(trace, scenarios)` and `compare(results)`: llmsim.compare with what one has at hand in Python.

from llmsim import compare

found = compare(trace, [Scenario(...), Scenario(...)], goodput={"ttft": 500})
found.frame()        # differences to the first side, with their 95 % intervals
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsim.compare import Comparison, Side, run_seeds, side_of, with_seeds
from llmsim.compare import compare as paired
from llmsim.metrics import Result, check_targets
from llmsim.scenario import Scenario
from llmsim.slo import Slo
from llmsim.trace import Trace

Sides = Sequence[Result | Side | str | Path] | Mapping[str, Result | Side | str | Path]


def compare(
    what: Trace | Sides,
    scenarios: Sequence[Scenario] | Mapping[str, Scenario] | None = None,
    *,
    goodput: dict[str, float] | None = None,
    seed: int = 0,
    seeds: int = 1,
    slos: Sequence[str | Slo] = (),
    jobs: int = 1,
) -> Comparison:
    """The same requests under several scenarios, paired one by one; differences are to the first.

    A trace with scenarios is replayed under each of them, `jobs` at a time. Else `what` are results, or run folders
    that `llmsim replay` wrote. Sides in a dict are called by its keys, others by what sets them apart from the first.
    `goodput`: targets in ms by metric; `seed`: of the bootstrap; `seeds`: of the replays of a trace, so many for each
    scenario; `slos`: promises such as "ttft_p99=500ms", found in `.promises`.

    Raises ValueError for fewer than two sides, two that are alike, and results of different requests;
    TypeError for arguments of another kind.
    """
    promises = [Slo.parse(slo) if isinstance(slo, str) else slo for slo in slos]
    for name, count in (("seeds", seeds), ("jobs", jobs)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"compare: {name}={count!r} is not a whole number: give 1 or more")
        if count < 1:
            raise ValueError(f"compare: {name}={count}: give 1 or more")
    if goodput:
        check_targets(goodput)
    if isinstance(what, Trace):
        _check_scenarios(scenarios)
        assert scenarios is not None
        named = dict(scenarios) if isinstance(scenarios, Mapping) else named_scenarios(scenarios)
        repeats = [(what, drawn) for drawn in with_seeds(named, seeds)]
        first, *more = run_seeds(repeats, goodput, jobs=jobs)
        return paired(first, goodput, seed=seed, repeats=more, slos=promises)
    if scenarios is not None:
        raise ValueError("compare(results): scenarios go with a trace: leave them out, or give a Trace first")
    if seeds > 1:
        raise ValueError(f"compare(results): seeds={seeds} go with a trace: leave them out, or give a Trace first")
    if isinstance(what, str) or not isinstance(what, Sequence | Mapping):
        raise TypeError(f"compare: {what!r} is neither a Trace nor a list of results: give a Trace with scenarios")
    if isinstance(what, Mapping):
        return paired([_side(one, goodput, name) for name, one in what.items()], goodput, seed=seed, slos=promises)
    sides = [_side(one, goodput) for one in what]
    if all(isinstance(one, Result) for one in what):
        names = named_scenarios([one.scenario for one in what if isinstance(one, Result)])
        sides = [Side(name, one.scenario, one.summary, one.requests) for name, one in zip(names, sides, strict=True)]
    return paired(sides, goodput, seed=seed, slos=promises)


def _check_scenarios(scenarios: Any) -> None:
    if scenarios is None or isinstance(scenarios, str) or not isinstance(scenarios, Sequence | Mapping):
        raise ValueError("compare(trace): give the scenarios to replay it under, as a list or a dict of names")
    for one in scenarios.values() if isinstance(scenarios, Mapping) else scenarios:
        if not isinstance(one, Scenario):
            raise TypeError(f"compare: scenarios: {one!r} is no Scenario: write Scenario(model=…, gpu=…)")
    if len(scenarios) < 2:
        raise ValueError(f"compare: scenarios: {len(scenarios)} given: a comparison needs two or more")


def _side(one: Result | Side | str | Path, goodput: dict[str, float] | None, name: str | None = None) -> Side:
    if isinstance(one, Result):
        return side_of(name or one.scenario.scheduler, one, goodput)
    if isinstance(one, Side):
        return one if name is None else Side(name, one.scenario, one.summary, one.requests)
    if isinstance(one, str | Path):
        from llmsim.runs import read_run

        run = read_run(Path(one))
        return Side(name or str(one), run.manifest["scenario"], run.summary, run.requests)
    raise ValueError(f"compare: {type(one).__name__} is not a Result: give what simulate returned, or run folders")


def named_scenarios(scenarios: Sequence[Scenario]) -> dict[str, Scenario]:
    """Called by the fields in which they are not all alike: `scheduler=chunked, max_num_seqs=64`."""
    values: list[dict[str, Any]] = [one.to_dict() for one in scenarios]
    apart = [name for name in values[0] if any(one[name] != values[0][name] for one in values)] if values else []
    named: dict[str, Scenario] = {}
    for one, scenario in zip(values, scenarios, strict=True):
        shown = (
            apart if len(apart) < 2 else [name for name in apart if one is values[0] or one[name] != values[0][name]]
        )
        name = ", ".join(f"{field}={one[field]}" for field in shown)
        if name in named:
            raise ValueError(f"compare: two scenarios are alike ({name or 'all fields'}): leave one out")
        named[name] = scenario
    return named
