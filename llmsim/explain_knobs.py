"""Which single change would help some requests most: a short list by cause, each tried by a replay of the same trace.

The changes are those of `llmsim.whatif_changes`, and a few that only make sense for a cause. One that the scenario has
already, that does not apply, or that no engine would start with is left out, with the reason.

    before, after   mean latency of the requests in question, seconds; a request that the change rejects counts as
                    never answered, so such a change does not help
    p99             of all requests of the trace, by the same latency
    gpus            of the fleet with the change; one that buys GPUs is compared with the others all the same, and
                    marked
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import numpy as np

from llmsim.metrics import Result, latencies_s
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace
from llmsim.whatif_changes import CHANGES
from llmsim.whatif_fields import Answer, Change, Setting, ignored

HELPS = 0.01  # relative change of the latency from which a change is said to help
MOST = 8  # changes that are tried
FULL_MEMORY = 0.95  # share of the GPU's memory beyond which little is left for what is not counted
LOSSY = {"quantization", "kv_cache_dtype", "kv_compression"}  # fields that answers depend on


@dataclass(frozen=True)
class Knob:
    """A change that was tried, and what became of the requests in question."""

    name: str
    about: str
    fields: dict[str, Any]
    gpus: int
    more_gpus: int
    before_s: float
    after_s: float
    p99_before_s: float
    p99_after_s: float
    lossy: bool  # the model's answers may change

    @property
    def helps(self) -> bool:
        return self.after_s < (1.0 - HELPS) * self.before_s

    @property
    def setting(self) -> str:
        """The fields as `llmsim compare --set` takes them."""
        return ",".join(f"{name}={_word(value)}" for name, value in self.fields.items())


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# ---- changes that the table of what-ifs does not have ---------------------------------------------------------------


def _replica(setting: Setting) -> Answer:
    return {"replicas": setting.scenario.replicas + 1}


def _memory(setting: Setting) -> Answer:
    share, blocks = setting.scenario.gpu_memory_utilization, setting.scenario.num_gpu_blocks_override
    if blocks is not None:
        return {"num_gpu_blocks_override": None}
    if share >= FULL_MEMORY:
        return f"gpu_memory_utilization is {share:g} already"
    return {"gpu_memory_utilization": FULL_MEMORY}


def _half_seqs(peak: int) -> Change:
    """A limit that binds: half of what ran at once."""

    def fields(setting: Setting) -> Answer:
        most = min(peak, setting.scenario.max_num_seqs or peak)
        return {"max_num_seqs": most // 2} if most > 1 else "one request runs at a time already"

    return Change("seqs-half", "half as many requests at once", fields)


def _threshold(setting: Setting) -> Answer:
    s = setting.scenario
    assert s.max_num_batched_tokens is not None
    if s.scheduler not in ("vllm", "vllm-native") or not s.enable_chunked_prefill:
        return f"an option of the scheduler vllm with chunked prefill; this is {s.scheduler}"
    wanted = max(s.max_num_batched_tokens // 4, s.block_size)
    if 0 < s.long_prefill_token_threshold <= wanted:
        return f"long_prefill_token_threshold is {s.long_prefill_token_threshold} already"
    return {"long_prefill_token_threshold": min(wanted, s.max_model_len or wanted)}


def _scheduler(name: str) -> Callable[[Setting], Answer]:
    def fields(setting: Setting) -> Answer:
        s = setting.scenario
        if s.scheduler == name:
            return f"the scheduler is {name} already"
        return {"scheduler": name, "scheduler_args": {}}

    return fields


OWN = (
    Change("replica-more", "one more replica", _replica),
    Change("memory-more", "all KV blocks that fit the GPU", _memory),
    Change("prefill-threshold", "long prompts in smaller chunks", _threshold),
    Change("scheduler-vllm", "the scheduler vllm", _scheduler("vllm")),
    Change("scheduler-sjf", "shortest prompts and answers first", _scheduler("sjf")),
    Change("scheduler-fcfs", "strictly in order of arrival", _scheduler("fcfs")),
)
KNOWN = {change.name: change for change in (*CHANGES, *OWN)}
BY_CAUSE: dict[str, tuple[str, ...]] = {
    "kv": ("memory-more", "kv-fp8", "seqs-half", "preemption-swap", "weights-fp8", "tp-double", "replica-more"),
    "seqs": ("seqs-double", "tp-double", "replica-more"),
    "tokens": ("budget-double", "prefix-caching", "weights-fp8", "tp-double", "replica-more"),
    "order": ("scheduler-fcfs", "scheduler-vllm", "replica-more"),
    "policy": ("scheduler-vllm", "replica-more"),
    "host": ("async-scheduling", "cuda-graphs", "full-graphs", "torch-compile", "budget-quarter", "replica-more"),
    "prefill": ("prefix-caching", "weights-fp8", "tp-double"),
    "prompts": ("budget-quarter", "prefill-threshold", "chunked-prefill", "weights-fp8", "tp-double", "replica-more"),
    "batch": ("seqs-half", "kv-fp8", "tp-double", "replica-more"),
    "decode": ("weights-fp8", "kv-fp8", "tp-double"),
    "tier": ("memory-more", "kv-fp8", "replica-more"),
    "client": (),
}


def tried(
    trace: Trace,
    scenario: Scenario,
    causes: Sequence[str],
    metric: str,
    ids: Sequence[int],
    baseline: Result,
    *,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[tuple[Knob, ...], dict[str, str]]:
    """The changes for these causes, best first; and those that were left out, with the reason."""
    peak = int(baseline.iterations["running"].max(initial=1))
    wanted, left_out = candidates(trace, scenario, causes, peak)
    before_s, p99_before_s = _latency(baseline, metric, ids)
    gpus = _gpus(scenario.resolved())
    knobs = []
    outcomes = _outcomes(trace, [other for _, _, other in wanted], metric, ids, jobs)
    for (change, fields, other), outcome in zip(wanted, outcomes, strict=True):
        if isinstance(outcome, str):
            left_out[change.name] = outcome
            continue
        now = _gpus(other.resolved())
        lossy = bool(LOSSY & fields.keys())
        knobs.append(
            Knob(change.name, change.about, fields, now, now - gpus, before_s, outcome[0], p99_before_s, outcome[1],
                 lossy)
        )  # fmt: skip
        if progress is not None:
            progress(2 + len(knobs), 2 + len(wanted), f"replay with {change.about}")
    knobs.sort(key=lambda knob: (knob.after_s, knob.gpus, knob.name))
    return tuple(knobs), left_out


def candidates(
    trace: Trace, scenario: Scenario, causes: Iterable[str], peak: int
) -> tuple[list[tuple[Change, dict[str, Any], Scenario]], dict[str, str]]:
    """What to try for these causes, those for the first one first: (change, its fields, scenario).

    `peak`: most requests that ran at once; fewer than that is what a lower max_num_seqs has to mean.
    """
    setting = Setting.of(scenario, trace.block_ids is not None)
    wanted: list[tuple[Change, dict[str, Any], Scenario]] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(name for cause in causes for name in BY_CAUSE[cause]):
        change = _half_seqs(peak) if name == "seqs-half" else KNOWN[name]
        answer: Answer = "the scenario has it" if change.on(setting) else change.fields(setting)
        if isinstance(answer, str):
            left_out[name] = answer
            continue
        if len(wanted) == MOST:
            left_out[name] = f"{MOST} changes are tried at most"
            continue
        try:
            other = replace(scenario, **answer)
            other.resolved()
        except ValueError as refused:
            left_out[name] = str(refused)
            continue
        lacking = ignored(other, answer)
        if lacking is not None:
            left_out[name] = lacking
            continue
        wanted.append((change, answer, other))
    return wanted, left_out


def _gpus(scenario: Scenario) -> int:
    return scenario.replicas * scenario.tensor_parallel


def _latency(result: Result, metric: str, ids: Sequence[int]) -> tuple[float, float]:
    """Mean of those requests (inf if one of them was not answered), and the 99th percentile of all."""
    latency_s = latencies_s(result.requests)[metric]
    chosen = latency_s[list(ids)]
    known = latency_s[np.isfinite(latency_s)]
    mean_s = float(chosen.mean()) if np.isfinite(chosen).all() else inf
    return mean_s, float(np.percentile(known, 99)) if known.size else inf


# ---- replays --------------------------------------------------------------------------------------------------------

Outcome = tuple[float, float] | str
_shared: dict[str, Any] = {}  # of a worker process: what is the same in every replay, sent once


def _begin(trace: Trace, metric: str, ids: Sequence[int]) -> None:
    _shared.update(trace=trace, metric=metric, ids=ids)


def _run(scenario: Scenario) -> Outcome:
    return _outcome(_shared["trace"], scenario, _shared["metric"], _shared["ids"])


def _outcome(trace: Trace, scenario: Scenario, metric: str, ids: Sequence[int]) -> Outcome:
    try:
        result = simulate(trace, scenario)
    except ValueError as refused:  # what no engine would start with
        return str(refused)
    found = _latency(result, metric, ids)
    return found if isfinite(found[1]) else "no request fits the KV cache"


def _outcomes(
    trace: Trace, scenarios: Sequence[Scenario], metric: str, ids: Sequence[int], jobs: int
) -> Iterable[Outcome]:
    if jobs <= 1 or len(scenarios) <= 1:
        for scenario in scenarios:
            yield _outcome(trace, scenario, metric, ids)
        return
    with ProcessPoolExecutor(min(jobs, len(scenarios)), initializer=_begin, initargs=(trace, metric, ids)) as pool:
        yield from pool.map(_run, scenarios)
