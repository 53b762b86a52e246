"""What one run of a what-if measured.

The mean gap between two tokens is split by term, each iteration counting once for every decode in
it:

    gap = the GPU's terms + preempted + launches and host (what is left: the GPU waited)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsim.cost.terms import row_terms_s
from llmsim.metrics import Result, breakdown_s, latencies_s
from llmsim.prices import Price

HOST = "launches and host"


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
    context_tokens: float  # cached ones that a decode reads
    cost_kind: str
    cost_origin: str
    cost_label: str


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
        batch=_per_decode(result.iterations, result.iterations["seqs"]),
        context_tokens=_per_decode(result.iterations, _mean_context(result.iterations)),
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


def _per_decode(rows: dict[str, Any], column: Any) -> float:
    """Mean of a column over all decodes of a log."""
    decodes = rows["seqs"] * rows["iterations"]
    return float((decodes * column).sum() / decodes.sum()) if decodes.sum() else 0.0


def _mean_context(rows: dict[str, Any]) -> Any:
    """Cached tokens of a decode, in the first iteration of each row."""
    return rows["kv_tokens"] / np.maximum(rows["seqs"], 1)
