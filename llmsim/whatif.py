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
The mean gap between two tokens of the baseline is split by term too, each iteration counting once for every decode in
it:

    gap = the GPU's terms + preempted + launches and host (what is left: the GPU waited)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import exp, log
from typing import Any

import numpy as np

from llmsim.cost.terms import row_terms_s, termed
from llmsim.metrics import Result, breakdown_s, json_safe, latencies_s
from llmsim.prices import Price
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.trace import Trace
from llmsim.whatif_changes import Change, Setting
from llmsim.whatif_reason import HOST, cause, step_terms_s

METRICS = ("ttft_s", "tpot_s", "tokens_per_s", "usd_per_1m_tokens")
WAIT_SHARE = 0.5  # of a change of TTFT from which the queue is named
SHOWS = 0.01  # a relative change from which scheduling is named


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    ttft_s: float
    p99_ttft_s: float
    tpot_s: float
    tokens_per_s: float
    usd_per_1m_tokens: float
    queue_s: float
    gap_s: float  # mean between two tokens
    terms_s: dict[str, float]  # of the gap
    completed: int
    preemptions: int
    prompt_tokens: int  # computed, again after preemptions, not those found in the prefix cache
    batch: float  # decodes in the step of a mean token
    cost_kind: str
    cost_origin: str
    cost_label: str


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


def measure(result: Result, price: Price) -> Run:
    done = {name: column[result.finished] for name, column in result.requests.items()}
    latency_s, parts_s = latencies_s(done), breakdown_s(done)
    tokens = int(done["output_tokens"].sum())
    scenario = result.scenario
    dollars = price.usd_per_gpu_hour * scenario.replicas * scenario.tensor_parallel * result.duration_s / 3600.0
    gap_s, terms_s = _gap_terms(result, done)
    return Run(
        ttft_s=float(latency_s["ttft"].mean()),
        p99_ttft_s=float(np.percentile(latency_s["ttft"], 99)),
        tpot_s=float(np.nanmean(latency_s["tpot"])) if np.isfinite(latency_s["tpot"]).any() else float("nan"),
        tokens_per_s=tokens / result.duration_s,
        usd_per_1m_tokens=1e6 * dollars / tokens,
        queue_s=float(parts_s["queue"].mean()),
        gap_s=gap_s,
        terms_s=terms_s,
        completed=int(result.finished.sum()),
        preemptions=int(result.requests["preemptions"].sum()),
        prompt_tokens=int(result.iterations["prefill_tokens"].sum()),
        batch=_batch(result.iterations),
        cost_kind=result.cost.kind,
        cost_origin=str(getattr(result.cost, "origin", result.cost.kind)),
        cost_label=result.cost.label,
    )


def _gap_terms(result: Result, done: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The mean gap between two tokens, and its terms."""
    gaps = int((done["output_tokens"] - 1).sum())
    if not gaps:
        return float("nan"), {}
    gap_s = float((done["finish_s"] - done["first_token_s"]).sum()) / gaps
    rows = result.iterations
    tokens = rows.get("decoded_tokens", rows["seqs"] * rows["iterations"])
    weight = np.divide(rows["seqs"], tokens.sum())
    terms_s = {name: float((seconds * weight).sum()) for name, seconds in row_terms_s(result.cost, rows).items()}
    preempted_s = float((done["preempted_s"] - done["preempted_before_first_s"]).sum()) / gaps
    terms_s["preempted"] = preempted_s
    terms_s[HOST] = gap_s - sum(terms_s.values())
    return gap_s, terms_s


def _batch(rows: dict[str, Any]) -> float:
    tokens = rows["seqs"] * rows["iterations"]
    return float((tokens * rows["seqs"]).sum() / tokens.sum()) if tokens.sum() else 0.0


# ---- what it bought -----------------------------------------------------------------------------------------------


Priced = tuple[Run, dict[str, float]]  # a run, and the baseline's steps by its cost model


def _effect(change: Change, fields: dict[str, Any], setting: Setting, baseline: Priced, other: Priced) -> Effect:
    on = change.on(setting)
    without, with_ = (other, baseline) if on else (baseline, other)
    ratios = {name: getattr(with_[0], name) / getattr(without[0], name) for name in METRICS}
    better = [ratio if name == "tokens_per_s" else 1.0 / ratio for name, ratio in ratios.items() if ratio == ratio]
    gain = exp(sum(log(value) for value in better) / len(better))
    why = reason(without, with_, gain >= 1.0)
    return Effect(change.name, change.about, on, fields, without[0], with_[0], gain, ratios, why)


def reason(without: Priced, with_: Priced, helps: bool) -> str:
    before, after = without[0], with_[0]
    said = [cause(without[1], with_[1], helps) or _scheduling(before, after)]
    ttft_s, queue_s = after.ttft_s - before.ttft_s, after.queue_s - before.queue_s
    if abs(ttft_s) > 0.01 * before.ttft_s and queue_s * ttft_s > 0 and abs(queue_s) >= WAIT_SHARE * abs(ttft_s):
        said.append(f"queue {_time(before.queue_s)} → {_time(after.queue_s)}")
    if after.completed != before.completed:
        said.append(f"requests that fit {before.completed:,} → {after.completed:,}")
    return "; ".join(part for part in said if part) or "nothing that shows"


def _scheduling(before: Run, after: Run) -> str | None:
    """What changed between two runs whose steps cost the same."""
    for name, then, now in (
        ("prompt tokens computed", before.prompt_tokens, after.prompt_tokens),
        ("preemptions", before.preemptions, after.preemptions),
    ):
        if abs(now - then) > SHOWS * max(now, then):
            return f"{name} {then:,} → {now:,}"
    if abs(after.batch - before.batch) > SHOWS * before.batch:
        return f"decodes in a step {before.batch:.1f} → {after.batch:.1f}"
    return None


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
