"""A plan as people read it, as one JSON document, and as files.

options.parquet   a row for every option: `Plan.frame()`
runs.parquet      a row for every simulation, with the command that repeats it: `Plan.runs_frame()`
curve.parquet     the cheapest fleet's latencies by rate, if that was asked for
plan.json         the whole plan
manifest.json     command line, trace, versions, date, size and SHA-256 of the other files
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsim.metrics import json_safe
from llmsim.plan_capacity import curve_rows
from llmsim.plan_runs import Measured, Run
from llmsim.plan_types import Option, Plan
from llmsim.text import aligned, wrapped

if TYPE_CHECKING:
    import pandas as pd

Repeat = Callable[[Run], str]
ANSWERS = {"fewest": "fewest GPUs", "cheapest": "cheapest", "fastest": "fastest"}
FLEET_ANSWERS = {"fewest": "most per GPU", "cheapest": "most per dollar", "fastest": "highest rate"}
STATUS = {"holds": "", "dropped": "*", "breaks": "breaks"}


def document(plan: Plan, points: Sequence[Run], repeat: Repeat) -> dict[str, Any]:
    """`Plan.to_dict()`, with the curve, and with each simulation's command."""
    found = plan.to_dict()
    for row, run in zip(found["runs"], plan.runs, strict=True):
        row["command"] = repeat(run)
    return found | {"curve": json_safe(curve_rows(points))}


def write(plan: Plan, points: Sequence[Run], found: dict[str, Any], folder: Path, command: list[str]) -> None:
    from llmsim.runs import complete_folder, facts_of_files, versions, write_json

    runs = plan.runs_frame().assign(command=[row["command"] for row in found["runs"]])
    with complete_folder(folder) as partial:
        _parquet(plan.frame(), partial / "options.parquet")
        _parquet(runs, partial / "runs.parquet")
        if points:
            import pandas as pd

            _parquet(pd.DataFrame(curve_rows(points)), partial / "curve.parquet")
        write_json(partial / "plan.json", found)
        manifest = {
            "command": shlex.join(command),
            "trace": plan.trace,
            "prices": plan.prices,
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": facts_of_files(partial),
        }
        write_json(partial / "manifest.json", manifest)


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    frame.to_parquet(path, compression="zstd", index=False)


# ---- in words -------------------------------------------------------------------------------------------------------


def report(plan: Plan, points: Sequence[Run] = (), repeat: Repeat | None = None) -> Iterator[str]:
    yield from _head(plan)
    yield ""
    if plan.holds:
        yield from _answers(plan)
    else:
        yield from wrapped(_nothing(plan) + (" within the limits." if _limited(plan) else "."))
    yield ""
    yield from _options(plan)
    if points:
        yield ""
        yield from _curve(plan, points)
    yield ""
    yield from _foot(plan)
    if repeat is not None:
        yield ""
        yield from dict.fromkeys(f"{_verdict(run)}  {repeat(run)}" for run in plan.runs)


def _verdict(run: Run) -> str:
    if run.draws is not None:
        return "drawn "
    return "holds " if run.holds else "breaks"


def _nothing(plan: Plan) -> str:
    kept = [option for option in plan.options if option.run is not None and not option.run.breaks]
    if any(option.run is not None and not option.run.stable for option in kept):
        return f"Nothing holds this load: {kept[0].name} keeps every SLO of this trace, but falls behind"
    return "Nothing meets the SLOs"


def _limited(plan: Plan) -> bool:
    return any(option.status == "over budget" for option in plan.options)


def _head(plan: Plan) -> Iterator[str]:
    trace, model = plan.trace, plan.options[0].scenario.model
    what = f"{model} for {trace['name']}, {trace['requests']:,} requests"
    if plan.rate is None:
        yield from wrapped(f"{what}: the highest rate that each fleet holds ({trace['unit']})")
    else:
        times = plan.rate / trace["rate"]
        own = "" if abs(times - 1.0) < 1e-9 else f", {times:.3g} times the trace's own {trace['rate']:.3g}"
        yield from wrapped(f"{what} at {plan.rate:.4g} {trace['unit']}{own}")
    yield from wrapped("Promised: " + ", ".join(slo.words for slo in plan.slos))


def _answers(plan: Plan) -> Iterator[str]:
    names = FLEET_ANSWERS if plan.fleet else ANSWERS
    by_option: dict[int, tuple[Option, list[str]]] = {}
    for key, option in plan.answers.items():
        if option is not None:
            by_option.setdefault(id(option), (option, []))[1].append(names[key])
    heads = [f"{slo.metric.upper()} {slo.statistic}" for slo in plan.slos]
    sent = ["sent req/s"] if plan.trace["sessions"] else []
    rows = [("answer", "fleet", "GPUs", "$/h", *heads, *sent, "holds up to", "good/s/GPU", "good/$", "$/1M out")]
    for option, titles in by_option.values():
        assert option.run is not None
        rows.append((
            ", ".join(titles), option.name, str(option.gpus), f"{option.usd_per_h:.2f}",
            *(_with_margin(one) + _mark(one, option.run) for one in option.run.measured),
            *[_number(option.value("request_rate"), ".3g") for _ in sent],
            _number(option.capacity_rate, ".4g") + "/s" if option.capacity_rate else "untold",
            _number(option.goodput_per_gpu, ".3g"),
            _number(option.goodput_per_usd, ",.0f"), _number(option.usd_per_million_output_tokens, ".3f"),
        ))  # fmt: skip
    yield from aligned(rows, left={0, 1})
    for option, _ in by_option.values():
        yield from wrapped(f"{option.name}: {_surely(option)}{_next_break(plan, option)}{_above(plan, option)}")


def _surely(option: Option) -> str:
    if option.probability is None or option.draws is None:
        return ""
    kept, least = round(option.probability * option.draws), option.probability_at_least
    said = f"{kept} of {option.draws} draws hold, which supports a probability of {least:.2f} or more (at 95 %)"
    return f"{said}; {option.doubts + '; ' if option.doubts else ''}"


def _next_break(plan: Plan, option: Option) -> str:
    """What breaks first, with less or with more."""
    broken = option.broken
    if broken is None:
        if plan.fleet:
            return option.untold or "holds"
        return "one replica is enough" if option.replicas == 1 else "is given, and holds"
    if plan.fleet:
        return f"breaks at {broken.rate:.4g}/s: {broken.why_not}"
    return f"breaks with {broken.scenario.replicas} replica{'s' * (broken.scenario.replicas > 1)}: {broken.why_not}"


def _above(plan: Plan, option: Option) -> str:
    """What limits the fleet that holds a demand, above that demand."""
    if plan.fleet:
        return ""
    if option.capacity_broken is not None:
        return f"; above that rate at {option.capacity_broken.rate:.4g}/s: {option.capacity_broken.why_not}"
    return f"; {option.untold}" if option.untold else ""


def _with_margin(one: Measured) -> str:
    if one.value_s != one.value_s:
        return "-"
    return f"{one.figure} ({100 * one.margin:+.0f} %)"


def _mark(one: Measured, run: Run) -> str:
    """Too few requests to bound this percentile."""
    return "*" if run.too_few(one.slo) else ""


def _options(plan: Plan) -> Iterator[str]:
    last = "breaks at" if plan.fleet else "breaks with one fewer"
    rows: list[tuple[str, ...]] = [
        (
            "",
            "fleet",
            "GPUs",
            "$/h",
            "holds" if plan.fleet else "mean E2EL",
            "tok/s/GPU",
            "tok/s/user",
            "$/1M out",
            last,
        )
    ]
    others = []
    for option in plan.options:
        if option.status not in ("holds", "dropped"):
            others.append(f"{option.name if option.run else option.kind}: {option.status}: {option.reason}")
            continue
        held = "untold" if option.rate is None else f"{option.rate:.4g}/s"
        figure = held if plan.fleet else f"{_number(option.value('mean_e2el_ms'), ',.0f')} ms"
        rows.append((
            "~" if not option.verified else "", option.name, str(option.gpus), f"{option.usd_per_h:.2f}", figure,
            _number(option.tokens_per_s_per_gpu, ",.0f"), _number(option.tokens_per_s_per_user, ".1f"),
            _number(option.usd_per_million_output_tokens, ".3f"), _short_break(plan, option),
        ))  # fmt: skip
    if len(rows) > 1:
        yield from aligned(rows, left={0, 1, 8})
    for line in others:
        yield from wrapped(line)


def _short_break(plan: Plan, option: Option) -> str:
    if option.doubts:
        return option.doubts
    broken = option.broken
    if broken is None:
        return "-"
    worst = max(broken.breaks, key=lambda one: -one.margin, default=None)
    words = str(worst) if worst is not None else "the queue grows"
    return f"{broken.rate:.4g}/s: {words}" if plan.fleet else words


def _curve(plan: Plan, points: Sequence[Run]) -> Iterator[str]:
    best = plan.cheapest
    assert best is not None
    yield f"{best.name} as the rate rises:"
    rows: list[tuple[str, ...]] = [("rate/s", "TTFT p50", "p99", "TPOT p50", "p99 (ms)", "attained", "tok/s/GPU", "")]
    for run in points:
        v = run.values
        rows.append((
            f"{run.rate:.4g}", *(_number(v[key], ",.1f") for key in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
                                                                      "p99_tpot_ms")),
            _number(v["slo_attainment"], ".1%"), _number(v["tokens_per_s_per_gpu"], ",.0f"),
            "holds" if run.holds else "unstable" if not run.stable else "breaks",
        ))  # fmt: skip
    yield from aligned(rows, left={7})


def _foot(plan: Plan) -> Iterator[str]:
    whole = sum(run.window is None for run in plan.runs)
    made = f"{len(plan.runs)} simulation{'s' * (len(plan.runs) != 1)}"
    lines = [f"{made}, {whole} of the whole trace; good: requests that meet every limit."]
    short = next((run.requests for run in plan.runs if run.window is not None), None)
    if any(not option.verified and option.run for option in plan.options):
        lines.append(f"~: cannot win, as the busiest {short:,} requests show; its numbers are theirs.")
    if any(_mark(one, option.run) for option in plan.options if option.run for one in option.run.measured):
        lines.append("*: from too few requests to bound the percentile.")
    lines += plan.notes
    lines += [f"Price: {price}" for price in plan.prices.values()]
    labels = dict.fromkeys(
        f"{option.gpu} TP{option.tensor_parallel}: {option.run.values['cost_model']}"
        for option in plan.options
        if option.run is not None
    )
    lines += [f"Cost model of {label}" for label in labels]
    for line in lines:
        yield from wrapped(line)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
