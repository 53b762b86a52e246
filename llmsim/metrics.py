"""What a run measured: a `Result` holds the columns, `Result.summary()` turns them into one JSON-ready dictionary.

The first keys, their names and their definitions are those of `vllm bench serve --save-result`
(vllm/benchmarks/serve.py):

    duration                  s, first send to last completion
    ttft                      first token - send, over completed requests
    tpot                      (e2el - ttft) / (output tokens - 1); a request of one token has none, and
                              meets any tpot target
    itl                       every gap between consecutive tokens of a request, pooled over all requests
    e2el                      last token - send
    {mean,median,std,p50,p90,p95,p99}_{ttft,tpot,itl,e2el}_ms     numpy's linear percentiles, population deviation
    request_throughput, output_throughput, total_token_throughput  completed requests' counts / duration
    max_output_tokens_per_s   largest count of tokens in a whole second, counted from the first send
    max_concurrent_requests   largest number of completed requests under way at one instant, [send, last token)
    request_goodput           completed requests per second that meet every target; None without targets

The others are llmsim's own:

    samples                   how many numbers each latency's statistics rest on
    slo_attainment            requests that meet every target / all requests sent, rejected ones included
    goodput_tok_s             output tokens of the requests that meet every target, per second
    queue_ms, prefill_ms, decode_ms, preempted_ms    where e2el went; per request the four add up to it:
                              queue = first scheduled - send; preempted = from each preemption to the next token;
                              prefill = first token - first scheduled - preempted before it; decode = the rest
    prefix_cache_hit_rate     prompt tokens found in the prefix cache at first admission / prompt tokens
    kv_tiers                  of each KV tier: tokens loaded from it and written to it; loaded / prompt tokens
    caveats                   what the setting risks that times do not show (dropped context), in words
    stable, stability         whether the queue kept growing (see `llmsim.rates`), and that in words
    sim_wall_s, sim_speedup   seconds the simulation took; simulated seconds per second. The only keys that differ
                              between two runs of the same version, seed, trace and scenario

and those of `llmsim.utilisation` (what the GPUs did) and `llmsim.groups` (classes and tenants, where there are any). A
number that does not exist is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, isfinite, log
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.gaps import GapRuns
from llmsim.groups import grouped
from llmsim.kept import risk
from llmsim.rates import peak_concurrency, stability, tokens_per_second
from llmsim.utilisation import utilisation

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.cost import CostModel
    from llmsim.prices import Price
    from llmsim.scenario import Scenario

PERCENTS = (50, 90, 95, 99)
TARGETS = ("ttft", "tpot", "e2el")  # what a goodput target may name: vLLM's three
WALL_KEYS = ("sim_wall_s", "sim_speedup")
REQUEST_COLUMNS = (
    "id", "arrival_s", "prompt_tokens", "output_tokens", "replica", "scheduled_s", "first_token_s", "finish_s",
    "preempted_s", "preempted_before_first_s", "cached_tokens", "preemptions",
)  # fmt: skip
ITERATION_COLUMNS = (
    "replica", "start_s", "iterations", "mode", "seqs", "kv_tokens", "prefill_requests", "prefill_tokens",
    "prefill_pairs", "prefill_context", "gpu_first_s", "gpu_growth_s", "gpu_end_s", "running", "waiting", "kv_blocks",
)  # fmt: skip
GAP_COLUMNS = ("gap_s", "growth_s", "count", "weight")
Columns = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Result:
    """One run.

    `requests` has a row per request sent (finish_s is nan for a rejected one), `iterations` a row per run of
    iterations, `gaps` a row per arithmetic run of inter-token gaps, with `end_s`, when the last of them ended, if the
    engine logs it.
    """

    requests: Columns
    iterations: Columns
    gaps: Columns
    scenario: Scenario
    cost: CostModel
    kv_blocks: int
    wall_s: float
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = (("requests", REQUEST_COLUMNS), ("iterations", ITERATION_COLUMNS), ("gaps", GAP_COLUMNS))
        for name, needed in tables:
            columns: Columns = getattr(self, name)
            missing = [column for column in needed if column not in columns]
            if missing:
                raise ValueError(f"Result.{name}: column {missing[0]} is missing (has {', '.join(columns)})")
            rows = {column: len(columns[column]) for column in columns}
            if len(set(rows.values())) > 1:
                raise ValueError(f"Result.{name}: columns differ in length: {rows}")

    @property
    def finished(self) -> NDArray[np.bool_]:
        return np.isfinite(self.requests["finish_s"])

    @property
    def duration_s(self) -> float:
        """First send to last completion; 0 when nothing completed."""
        if not self.finished.any():
            return 0.0
        return float(np.nanmax(self.requests["finish_s"]) - self.requests["arrival_s"].min())

    def summary(self, goodput: dict[str, float] | None = None, price: Price | None = None) -> dict[str, Any]:
        """vLLM's keys, then llmsim's own. `goodput`: targets in milliseconds, e.g. {"ttft": 500, "tpot": 50}; `price`:
        of a GPU and hour, by default the one that llmsim knows."""
        finished = self.finished
        done = self.requests  # a copy of a million rows only where some have to leave
        if not finished.all():
            done = {name: column[finished] for name, column in done.items()}
        latency_s, gaps = latencies_s(done), GapRuns.of(self.gaps)
        duration_s = self.duration_s
        summary = _setting(self) | _throughput(self, done, duration_s) | _goodput(self, done, latency_s, goodput)
        for name, values_s in latency_s.items():
            summary |= _spread(name, values_s)
            if name == "tpot":  # vLLM's order: ttft, tpot, itl, e2el
                summary |= _gap_spread(gaps)
        samples = {name: int(np.isfinite(values_s).sum()) for name, values_s in latency_s.items()}
        summary["samples"] = samples | {"itl": gaps.total}
        summary |= _where_it_went(done, latency_s["e2el"])
        summary["num_preemptions"] = int(self.requests["preemptions"].sum())
        summary["prefix_cache_hit_rate"] = _ratio(done["cached_tokens"].sum(), done["prompt_tokens"].sum())
        stable, words = stability(self.requests, self.scenario.concurrency)
        summary |= {"stable": stable, "stability": words}
        median_tpot_ms = summary["median_tpot_ms"]
        summary["tokens_per_s_per_user"] = 1000.0 / median_tpot_ms if median_tpot_ms else None
        summary |= utilisation(
            self.iterations, self.scenario, self.cost, self.kv_blocks, duration_s,
            output_tokens=summary["total_output_tokens"], input_tokens=summary["total_input_tokens"], price=price,
        )  # fmt: skip
        summary["kv_tiers"] = [self._tier(row) for row in self.stats.get("kv_tiers", ())]
        summary["caveats"] = [line for line in [risk(self.scenario.kv_compression)] if line is not None]
        summary |= grouped(self.requests, latencies_s(self.requests), self.stats)
        summary |= {"sim_wall_s": self.wall_s, "sim_speedup": _ratio(duration_s, self.wall_s)}
        return {name: json_safe(value) for name, value in summary.items()}

    def _tier(self, row: dict[str, Any]) -> dict[str, Any]:
        prompts = self.requests["prompt_tokens"][self.finished].sum()
        return {**row, "hit_rate": _ratio(row["loaded_tokens"], prompts)}

    def requests_frame(self) -> pd.DataFrame:
        """The requests as a pandas DataFrame, with ttft_s, tpot_s and e2el_s (nan where they do not exist)."""
        import pandas as pd

        latency_s = {f"{name}_s": values for name, values in latencies_s(self.requests).items()}
        return pd.DataFrame(self.requests | latency_s)

    def frame(self) -> pd.DataFrame:
        """A row per request: `requests_frame`."""
        return self.requests_frame()

    def iterations_frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.iterations)


def parse_goodput(words: Iterable[str]) -> dict[str, float]:
    """{"ttft": 500.0} from ["ttft:500"]: vLLM's KEY:MILLISECONDS words."""
    targets: dict[str, float] = {}
    for word in words:
        name, colon, text = word.partition(":")
        try:
            target_ms = float(text) if colon else float("nan")
        except ValueError:
            target_ms = float("nan")
        if name not in TARGETS:
            raise ValueError(f"goodput {word!r}: {name!r} is not a per-request latency; use {', '.join(TARGETS)}")
        if not (isfinite(target_ms) and target_ms >= 0.0):
            raise ValueError(f"goodput {word!r}: give milliseconds, e.g. {name}:500")
        if name in targets:
            raise ValueError(f"goodput {word!r}: {name} is given twice; keep one")
        targets[name] = target_ms
    return targets


def check_targets(targets: Any) -> None:
    """Raises ValueError for what is no {latency of a request: milliseconds}."""
    if not isinstance(targets, Mapping):
        raise ValueError(f"goodput={targets!r}: give a dict of milliseconds by latency, e.g. {{'ttft': 500}}")
    for name, target_ms in targets.items():
        if name not in TARGETS:
            raise ValueError(f"goodput: {name!r} is not a per-request latency; use {', '.join(TARGETS)}")
        is_number = isinstance(target_ms, Real) and not isinstance(target_ms, bool)
        if not (is_number and isfinite(target_ms) and target_ms >= 0.0):
            raise ValueError(f"goodput: {name}={target_ms!r}: give milliseconds, 0 or more, e.g. {{{name!r}: 500}}")


def latencies_s(requests: Columns) -> dict[str, Floats]:
    """Seconds a client saw, per request; tpot is nan for a request of one token."""
    ttft_s = requests["first_token_s"] - requests["arrival_s"]
    e2el_s = requests["finish_s"] - requests["arrival_s"]
    gaps = requests["output_tokens"] - 1
    tpot_s = np.full(len(gaps), np.nan)
    np.divide(requests["finish_s"] - requests["first_token_s"], gaps, out=tpot_s, where=gaps > 0)
    return {"ttft": ttft_s, "tpot": tpot_s, "e2el": e2el_s}


def fewest_samples(percent: float) -> int:
    """Of fewer the largest is below the percentile with a probability above 2.5 %: nothing bounds it from above."""
    return ceil(log(0.025) / log(percent / 100))


def all_rejected(requests: Columns, admission: str) -> str:
    """Why a run has no number: nobody was answered. Who turned them away, and what to change."""
    total = len(requests["finish_s"])
    away = int(np.sum(requests.get("turned_away", False)))
    if away == total:
        return (
            f"all {total} requests are turned away by admission={admission}: give one that admits some, or leave it out"
        )
    also = f" ({away} of them turned away by admission={admission})" if away else ""
    return (
        f"all {total} requests are rejected{also}: a replica's KV blocks hold too few tokens: raise"
        " num_gpu_blocks_override or gpu_memory_utilization, or leave them out"
    )


def json_safe(value: Any) -> Any:
    """Plain Python values; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {name: json_safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not isfinite(value) else value


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _setting(result: Result) -> dict[str, Any]:
    scenario, sent_s = result.scenario, result.requests["arrival_s"]
    span_s = float(np.ptp(sent_s)) if sent_s.size else 0.0
    return {
        "backend": "llmsim",
        "endpoint_type": "llmsim",
        "label": scenario.scheduler,
        "model_id": scenario.model,
        "tokenizer_id": None,  # lengths come from the trace: nothing is tokenised
        "num_prompts": int(sent_s.size),
        # The rate offered; in a closed loop the sends follow the system and there is none.
        "request_rate": _ratio(sent_s.size - 1, span_s) if scenario.concurrency is None else None,
        "burstiness": None,
        "max_concurrency": scenario.concurrency,
        "seed": scenario.seed,
    }


def _throughput(result: Result, done: Columns, duration_s: float) -> dict[str, Any]:
    completed, sent = int(done["id"].size), int(result.requests["id"].size)
    per_second = tokens_per_second(result.requests, result.iterations, result.gaps)
    inputs, outputs = int(done["prompt_tokens"].sum()), int(done["output_tokens"].sum())
    return {
        "duration": duration_s,
        "completed": completed,
        "failed": sent - completed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _ratio(completed, duration_s),
        "output_throughput": _ratio(outputs, duration_s),
        "total_token_throughput": _ratio(inputs + outputs, duration_s),
        "max_output_tokens_per_s": float(per_second.max(initial=0.0)),
        "max_concurrent_requests": peak_concurrency(done),
    }


def _goodput(
    result: Result, done: Columns, latency_s: dict[str, Floats], targets: dict[str, float] | None
) -> dict[str, Any]:
    return goodput_of(done, latency_s, targets, result.requests["id"].size, result.duration_s)


def goodput_of(
    done: Columns, latency_s: dict[str, Floats], targets: dict[str, float] | None, sent: int, duration_s: float
) -> dict[str, Any]:
    """What `targets` (milliseconds) make of the requests that completed, `done`, of all that were `sent`."""
    if not targets:
        return {"request_goodput": None, "slo": None, "slo_attainment": None, "goodput_tok_s": None}
    good = np.ones(done["id"].size, dtype=bool)
    check_targets(targets)
    for name, target_ms in targets.items():
        good &= np.nan_to_num(latency_s[name], nan=0.0) * 1e3 <= target_ms
    return {
        "request_goodput": _ratio(good.sum(), duration_s),
        "slo": dict(targets),
        "slo_attainment": _ratio(good.sum(), sent),
        "goodput_tok_s": _ratio(done["output_tokens"][good].sum(), duration_s),
    }


def _spread(name: str, values_s: Floats) -> dict[str, float | None]:
    values_ms = values_s[np.isfinite(values_s)] * 1e3
    if not values_ms.size:
        return _spread_keys(name, [None] * (3 + len(PERCENTS)))
    percentiles = np.percentile(values_ms, PERCENTS).tolist()
    return _spread_keys(name, [float(values_ms.mean()), percentiles[0], float(values_ms.std()), *percentiles])


def _gap_spread(gaps: GapRuns) -> dict[str, float | None]:
    if not gaps.total:
        return _spread_keys("itl", [None] * (3 + len(PERCENTS)))
    percentiles = [1e3 * value for value in gaps.percentiles_s(PERCENTS)]
    return _spread_keys("itl", [1e3 * gaps.mean_s(), percentiles[0], 1e3 * gaps.std_s(), *percentiles])


def _spread_keys(name: str, values: list[float | None]) -> dict[str, float | None]:
    words = ["mean", "median", "std", *(f"p{percent}" for percent in PERCENTS)]
    return {f"{word}_{name}_ms": value for word, value in zip(words, values, strict=True)}


def breakdown_s(requests: Columns) -> dict[str, Floats]:
    """Where each request's e2el went, seconds; the four add up to it."""
    before_s = requests["preempted_before_first_s"]
    return {
        "queue": requests["scheduled_s"] - requests["arrival_s"],
        "prefill": requests["first_token_s"] - requests["scheduled_s"] - before_s,
        "decode": requests["finish_s"] - requests["first_token_s"] - (requests["preempted_s"] - before_s),
        "preempted": requests["preempted_s"],
    }


def _where_it_went(done: Columns, e2el_s: Floats) -> dict[str, Any]:
    words = ["mean", *(f"p{percent}" for percent in PERCENTS)]
    keys: dict[str, Any] = {}
    for name, values_s in breakdown_s(done).items():
        values_ms: list[float | None] = [None] * len(words)
        if values_s.size:
            values_ms = [1e3 * float(values_s.mean()), *(1e3 * np.percentile(values_s, PERCENTS)).tolist()]
        keys[f"{name}_ms"] = dict(zip(words, values_ms, strict=True))
        keys[f"{name}_ms"]["share_of_e2el"] = _ratio(values_s.sum(), e2el_s.sum())
    return keys
