"""Where the seconds of a request, or of a tail, went, and what would help most.

A replay is repeated with an observer (`llmsim.observed`: same settings, same seed, same bytes) whose record is precise
enough to say of each second of the chosen requests what it was spent on (`llmsim.explain_life`). The parts of a request
add up to its latency. Of a tail they are averaged over its requests, and the cause that has most of them is named:

    cause     the parts it has
    kv        waits while KV blocks were short; all between a preemption and the next token
    seqs      waits while max_num_seqs requests ran
    tokens    waits while the iteration was full (max_num_batched_tokens), half-prefilled ones too
    order     waits while requests that came later went first; set aside by the policy
    policy    waits while nothing was short: the policy's own rule; complete answers that it withholds
    host      the GPU waiting for the host, in its iterations and before them
    prefill   computing its own prompt
    prompts   other requests' prompts in its iterations, and in those it waits for
    batch     other requests' decodes, likewise
    decode    computing its own tokens
    client    the client side;  tier: KV on its way from a lower tier

Then changes that fit the cause are tried, each by another replay of the same trace (`llmsim.explain_knobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.explain_knobs import Knob, tried
from llmsim.explain_life import Life, life_of
from llmsim.explain_prices import Prices
from llmsim.explain_record import Recorder
from llmsim.explain_source import check_repeated
from llmsim.metrics import TARGETS, Columns, Result, json_safe, latencies_s
from llmsim.runs import Run
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

MOST = 500  # requests of a tail that are explained
PREEMPTED = "preempted."
CAUSES = {  # endings of a part's name
    "client": "client", "host": "host", "kv": "kv", "seqs": "seqs", "tokens": "tokens",
    "order": "order", "policy": "policy", "loading": "tier", "own": "prefill", "prompts": "prompts",
    "decodes": "batch", "paused": "order", "handout": "policy",
}  # fmt: skip
SECOND = 0.2  # share of the seconds from which the changes for a second cause are tried too
SPAN_COLUMNS = (
    "request", "replica", "start_s", "end_s", "phase", "kind", "reason", "own_s", "decodes_s", "prompts_s", "host_s",
    "iterations", "batch", "prompt_tokens", "preemptions",
)  # fmt: skip


@dataclass(frozen=True)
class Tail:
    """Which requests are explained, and by which latency: ttft, tpot or e2el. `words` say how they were chosen."""

    metric: str
    ids: tuple[int, ...]  # slowest first
    words: str
    of: int  # requests that were answered
    missed: int  # requests that were meant, if not all of them are explained
    limit_s: float | None = None


@dataclass(frozen=True)
class Explanation:
    scenario: Scenario
    tail: Tail
    lives: tuple[Life, ...]
    latency_s: tuple[float, ...]  # of each, what `tail.metric` says
    parts_s: dict[str, float]  # seconds of a mean request of the tail
    causes_s: dict[str, float]  # the same by cause, largest first
    knobs: tuple[Knob, ...]  # best first
    left_out: dict[str, str]

    @property
    def best(self) -> Knob | None:
        """The change that helps most; None if none does."""
        return self.knobs[0] if self.knobs and self.knobs[0].helps else None

    def to_dict(self) -> dict[str, Any]:
        lives = [
            {"request": life.request, **life.facts, "ahead": life.ahead, "latency_s": latency_s,
             "parts_s": life.parts_s(self.tail.metric),
             "spans": [{name: getattr(span, name) for name in SPAN_COLUMNS[1:]} for span in life.spans]}
            for life, latency_s in zip(self.lives, self.latency_s, strict=True)
        ]  # fmt: skip
        document = {
            "scenario": self.scenario.to_dict(), "tail": asdict(self.tail), "parts_s": self.parts_s,
            "causes_s": self.causes_s, "knobs": [asdict(knob) | {"helps": knob.helps} for knob in self.knobs],
            "left_out": self.left_out, "requests": lives,
        }  # fmt: skip
        safe: dict[str, Any] = json_safe(document)
        return safe


def explain(
    trace: Trace,
    scenario: Scenario,
    tail: Tail | Callable[[Columns], Tail],
    *,
    run: Run | None = None,
    knobs: bool = True,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Explanation:
    """Explain the requests that `tail` names, or chooses when it is given the requests of a plain replay.

    `run`: the run that this is a repetition of, whose numbers have to come out again; `progress(done, total, words)`.
    Raises ValueError for a request that was rejected, and for a tail without requests.
    """
    tell = progress or (lambda done, total, words: None)
    if not isinstance(tail, Tail):
        tell(0, 2, "replay")
        tail = tail(simulate(trace, scenario).requests)
    tell(1, 2, "replay with an observer")
    result, lives = observed_lives(trace, scenario, tail.ids)
    if run is not None:
        check_repeated(run, result.requests)
    latency_s = latencies_s(result.requests)[tail.metric]
    parts_s = mean_parts([life.parts_s(tail.metric) for life in lives])
    causes_s = by_cause(parts_s)
    found: tuple[Sequence[Knob], dict[str, str]] = (), {}
    if knobs:
        total_s = sum(causes_s.values())
        worth = [cause for at, (cause, s) in enumerate(causes_s.items()) if not at or s >= SECOND * total_s]
        found = tried(trace, scenario, worth[:2], tail.metric, tail.ids, result, jobs=jobs, progress=tell)
    values = tuple(float(latency_s[i]) for i in tail.ids)
    return Explanation(scenario.resolved(), tail, lives, values, parts_s, causes_s, tuple(found[0]), found[1])


def spans(trace: Trace, scenario: Scenario, ids: Collection[int]) -> pd.DataFrame:
    """The lives of some requests as rows: what each did from when to when, and why (`llmsim.explain_life`).

    Columns as in `SPAN_COLUMNS`: request, replica, start_s, end_s; phase (queue, prefill, decode, preempted, as the
    metrics divide a latency), kind, reason; own_s, decodes_s, prompts_s, host_s of its iterations; iterations; batch,
    mean decodes of an iteration; prompt_tokens of others in them; preemptions in the replica meanwhile.
    Raises ValueError for an id that the trace does not have or that was rejected.
    """
    _, lives = observed_lives(trace, scenario, ids)
    return spans_frame(lives)


def spans_frame(lives: Sequence[Life]) -> pd.DataFrame:
    import pandas as pd

    rows = [[getattr(span, name) for name in SPAN_COLUMNS] for life in lives for span in life.spans]
    return pd.DataFrame(rows, columns=list(SPAN_COLUMNS))


def observed_lives(trace: Trace, scenario: Scenario, ids: Collection[int]) -> tuple[Result, tuple[Life, ...]]:
    """A replay, and the lives of those requests."""
    for one in ids:
        if not 0 <= one < len(trace):
            raise ValueError(f"request {one}: {trace.name} has requests 0 to {len(trace) - 1}: give one of them")
    recorders: dict[int, Recorder] = {}

    def observer(index: int) -> Recorder:
        return recorders.setdefault(index, Recorder(ids))

    result = simulate(trace, scenario, observer=observer)
    prices = {index: Prices(recorder, result.cost) for index, recorder in recorders.items()}
    replicas = result.requests["replica"]
    return result, tuple(life_of(int(i), result.requests, prices[int(replicas[i])]) for i in ids)


# ---- which requests -------------------------------------------------------------------------------------------------


def one_request(request: int) -> Callable[[Columns], Tail]:
    """A single request, by its number in the trace (from 0)."""

    def tail(requests: Columns) -> Tail:
        if not 0 <= request < len(requests["id"]):
            raise ValueError(f"request {request}: the trace has requests 0 to {len(requests['id']) - 1}: give another")
        return Tail("e2el", (request,), f"request {request}", int(np.isfinite(requests["finish_s"]).sum()), 1)

    return tail


def worst(count: int, metric: str = "e2el") -> Callable[[Columns], Tail]:
    """The `count` requests with the highest latency."""
    if count < 1:
        raise ValueError(f"worst={count}: give 1 or more requests")

    def tail(requests: Columns) -> Tail:
        latency_s = _latency_s(requests, metric)
        order = np.argsort(-latency_s, kind="stable")[: int(np.isfinite(latency_s).sum())]
        ids = tuple(int(i) for i in order[:count])
        words = f"the {len(ids)} requests with the highest {metric.upper()}"
        return _tail(metric, ids, words, latency_s)

    return tail


def missing(metric: str, limit_s: float | None) -> Callable[[Columns], Tail]:
    """The requests whose latency is above a limit; without a limit those above the 99th percentile."""

    def tail(requests: Columns) -> Tail:
        latency_s = _latency_s(requests, metric)
        known = latency_s[np.isfinite(latency_s)]
        above_s = float(np.percentile(known, 99)) if limit_s is None else limit_s
        slow = np.flatnonzero(latency_s > above_s)  # False for nan
        if not slow.size:
            raise ValueError(
                f"slo {metric}: no request is above {1e3 * above_s:.6g} ms (highest {1e3 * known.max():.6g} ms): "
                "give a lower limit, or --worst N"
            )
        order = slow[np.argsort(-latency_s[slow], kind="stable")]
        what = "the 99th percentile, " if limit_s is None else ""
        words = f"{slow.size} requests with {metric.upper()} above {what}{1e3 * above_s:,.6g} ms"
        return _tail(metric, tuple(int(i) for i in order), words, latency_s, limit_s)

    return tail


def _latency_s(requests: Columns, metric: str) -> Any:
    if metric not in TARGETS:
        raise ValueError(f"{metric!r} is not a latency of a request: give {', '.join(TARGETS)}")
    latency_s = latencies_s(requests)[metric]
    if not np.isfinite(latency_s).any():
        raise ValueError(f"no request has a {metric}: there is nothing to explain")
    return latency_s


def _tail(metric: str, ids: tuple[int, ...], words: str, latency_s: Any, limit_s: float | None = None) -> Tail:
    """Of a long tail, requests spread evenly over its ranks."""
    meant = len(ids)
    if meant > MOST:
        ids = tuple(ids[round(at)] for at in np.linspace(0, meant - 1, MOST))
        words += f" ({MOST} of them, evenly over their ranks)"
    return Tail(metric, ids, words, int(np.isfinite(latency_s).sum()), meant, limit_s)


# ---- causes ---------------------------------------------------------------------------------------------------------


def mean_parts(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over requests, largest first."""
    names = {name for one in parts for name in one}
    mean = {name: sum(one.get(name, 0.0) for one in parts) / len(parts) for name in names}
    return dict(sorted(mean.items(), key=lambda item: (-item[1], item[0])))


def cause_of(part: str) -> str:
    if part.startswith(PREEMPTED) and not part.endswith(".order"):
        return "kv"
    if part.endswith(".decode.own"):
        return "decode"
    if part.startswith("prefill.held"):
        return "tokens"
    return CAUSES[part.rpartition(".")[2]]


def by_cause(parts_s: dict[str, float]) -> dict[str, float]:
    causes_s: dict[str, float] = {}
    for part, seconds in parts_s.items():
        causes_s[cause_of(part)] = causes_s.get(cause_of(part), 0.0) + seconds
    return dict(sorted(causes_s.items(), key=lambda item: (-item[1], item[0])))
