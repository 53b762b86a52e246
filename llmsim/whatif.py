"""What each optimisation buys on a trace: the baseline, and one run for every single change of `llmsim.whatif_changes`.

An optimisation that the baseline has is taken away, one that it lacks is added; "without" and "with" are the two
runs, one of which is the baseline. All runs replay the same requests.

    ttft, tpot    means over requests;  throughput  output tokens per second;  cost  US dollars per million output
                  tokens, price per GPU and hour * GPUs * duration
    gain          geometric mean of the four improvements (without over with; throughput the other way round): above 1
                  the optimisation helps. At a rate that the baseline keeps up with, throughput and cost stay as they
                  are

Why: `llmsim.whatif_reason` prices the baseline's steps by both cost models and names the term that changes most; where
scheduling changes instead, it is the prompt tokens computed, preemptions or the decodes in a step. The wait for the
first schedule is named beside it where it is most of what TTFT changed by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import exp, log, nan
from typing import Any

from llmsim.cost.terms import termed
from llmsim.metrics import Result, json_safe
from llmsim.prices import Price
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.trace import Trace
from llmsim.whatif_fields import Change, Setting, ignored
from llmsim.whatif_reason import Priced, reason, step_terms_s
from llmsim.whatif_run import Run, measure

METRICS = ("ttft_s", "tpot_s", "tokens_per_s", "usd_per_1m_tokens")


@dataclass(frozen=True)
class Effect:
    """One optimisation: the run without it, the run with it."""

    name: str
    about: str
    on: bool  # whether the baseline has it
    fields: dict[str, Any]  # what the other run changed
    without: Run
    with_: Run
    gain: float
    ratios: dict[str, float]  # with over without
    reason: str

    @property
    def changed(self) -> Run:
        return self.without if self.on else self.with_


@dataclass(frozen=True)
class Outcome:
    scenario: Scenario
    trace: str
    price: Price
    baseline: Run
    effects: tuple[Effect, ...]  # in order of gain
    left_out: dict[str, str]  # name: why

    def to_dict(self) -> dict[str, Any]:
        document = {
            "trace": self.trace,
            "scenario": self.scenario.to_dict(),
            "price": asdict(self.price),
            "baseline": asdict(self.baseline),
            "effects": [{name.rstrip("_"): value for name, value in asdict(effect).items()} for effect in self.effects],
            "left_out": self.left_out,
        }
        safe: dict[str, Any] = json_safe(document)
        return safe


def what_if(
    trace: Trace,
    scenario: Scenario,
    changes: Sequence[Change],
    price: Price,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """`progress(done, total)` after every run."""
    setting = Setting.of(scenario, trace.block_ids is not None)
    wanted: list[tuple[Change, Scenario, dict[str, Any]]] = []
    left_out: dict[str, str] = {}
    for change in changes:
        answer = change.fields(setting)
        if isinstance(answer, str):
            left_out[change.name] = answer
            continue
        try:
            other = _checked(replace(scenario, **answer))
        except ValueError as refused:
            left_out[change.name] = str(refused)
            continue
        lacking = ignored(other, answer)
        if lacking is not None:
            left_out[change.name] = lacking
            continue
        wanted.append((change, other, answer))
    result, found = _run_all(trace, scenario, [item[1] for item in wanted], price, jobs, progress)
    baseline, log = measure(result, price), result.iterations
    terms_s = step_terms_s(log, result.cost, result.scenario)
    effects = []
    for (change, other, answer), run in zip(wanted, found, strict=True):
        if isinstance(run, str):
            left_out[change.name] = run
            continue
        other_s = step_terms_s(log, cost_of(other), other.resolved())
        effects.append(_effect(change, answer, setting, (baseline, terms_s), (run, other_s)))
    effects.sort(key=lambda effect: (-effect.gain, effect.name))
    return Outcome(setting.scenario, trace.name, price, baseline, tuple(effects), left_out)


def _checked(scenario: Scenario) -> Scenario:
    scenario.resolved()
    return scenario


# ---- runs ---------------------------------------------------------------------------------------------------------

_shared: dict[str, Any] = {}  # of a worker process: the trace, sent once


def _begin(trace: Trace, price: Price) -> None:
    _shared.update(trace=trace, price=price)


def _run(scenario: Scenario) -> Run | str:
    return run_one(_shared["trace"], scenario, _shared["price"])


def _run_all(
    trace: Trace,
    baseline: Scenario,
    others: Sequence[Scenario],
    price: Price,
    jobs: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Result, list[Run | str]]:
    """The baseline here, whose log is looked into; the others by as many processes."""
    tell = progress or (lambda done, total: None)
    found: list[Run | str] = []

    def collect(runs: Iterable[Run | str]) -> None:
        for run in runs:
            found.append(run)
            tell(1 + len(found), 1 + len(others))

    if jobs == 1 or not others:
        result = _baseline(trace, baseline)
        tell(1, 1 + len(others))
        collect(run_one(trace, scenario, price) for scenario in others)
        return result, found
    with ProcessPoolExecutor(jobs, initializer=_begin, initargs=(trace, price)) as pool:
        runs = pool.map(_run, others)
        result = _baseline(trace, baseline)
        collect(runs)
    return result, found


def _baseline(trace: Trace, scenario: Scenario) -> Result:
    result = simulate(trace, scenario)
    if not result.finished.any():
        raise ValueError(f"no request of {trace.name} fits the baseline's {result.kv_blocks} KV blocks")
    termed(result.cost)
    return result


def run_one(trace: Trace, scenario: Scenario, price: Price) -> Run | str:
    """A run, or why no engine would start with it."""
    try:
        result = simulate(trace, scenario)
    except ValueError as refused:
        return str(refused)
    if not result.finished.any():
        return "no request fits the KV cache"
    return measure(result, price)


# ---- what it bought -----------------------------------------------------------------------------------------------


def _ratio(with_: float, without: float) -> float:
    """nan where one is nothing: GPUs that cost nothing, answers that come as a whole."""
    return with_ / without if with_ and without else nan


def _effect(change: Change, fields: dict[str, Any], setting: Setting, baseline: Priced, other: Priced) -> Effect:
    on = change.on(setting)
    without, with_ = (other, baseline) if on else (baseline, other)
    ratios = {name: _ratio(getattr(with_[0], name), getattr(without[0], name)) for name in METRICS}
    better = [ratio if name == "tokens_per_s" else 1.0 / ratio for name, ratio in ratios.items() if ratio == ratio]
    gain = exp(sum(log(value) for value in better) / len(better))
    why = reason(without, with_, gain >= 1.0)
    return Effect(change.name, change.about, on, fields, without[0], with_[0], gain, ratios, why)
