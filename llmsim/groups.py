"""The result by class and by tenant, where the trace has them (or they were assigned).

classes   per class of the trace: requests, completed, turned_away, mean and p99 TTFT, mean TPOT, and slo_attainment:
          requests that met every promise of their class (TTFT, TPOT) / requests sent, those turned away included;
          None if the class promises nothing
tenants   per tenant: requests, completed, share of the service (prompt tokens + 2 * output tokens of its completed
          requests / those of all: VTC's w_p = 1 and w_q = 2), mean and p99 TTFT
assigned  what the trace did not carry and was drawn for it, one line each
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmsim.metrics import Columns, Floats

SHOWN_TENANTS = 5


def grouped(requests: Columns, latency_s: dict[str, Floats], stats: dict[str, Any]) -> dict[str, Any]:
    """The keys that exist; `latency_s` of all requests, nan where there is none."""
    found: dict[str, Any] = {}
    if "slo_class" in requests:
        found["classes"] = _by_class(requests, latency_s)
    if "tenant" in requests:
        found["tenants"] = _by_tenant(requests, latency_s)
    if stats.get("turned_away"):
        found["turned_away"] = stats["turned_away"]
    if stats.get("assigned"):
        found["assigned"] = stats["assigned"]
    return found


def _groups(labels: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    names, member = np.unique(labels, return_inverse=True)
    order = np.argsort(member, kind="stable")
    ends = np.cumsum(np.bincount(member))
    for name, rows in zip(names.tolist(), np.split(order, ends[:-1]), strict=True):
        yield str(name), rows


def _by_class(requests: Columns, latency_s: dict[str, Floats]) -> dict[str, Any]:
    finished = np.isfinite(requests["finish_s"])
    away = requests.get("turned_away", np.zeros(len(finished), dtype=bool))
    good, promised = finished.copy(), np.zeros(len(finished), dtype=bool)
    for metric in ("ttft", "tpot"):
        target_s = requests.get(f"slo_{metric}_s")
        if target_s is not None:
            has = np.isfinite(target_s)
            promised |= has
            # an answer of one token has no TPOT, and meets any
            good &= ~has | (np.nan_to_num(latency_s[metric], nan=0.0) <= np.where(has, target_s, 0.0))
    made = {}
    for name, rows in _groups(requests["slo_class"]):
        made[name] = {
            "requests": len(rows),
            "completed": int(finished[rows].sum()),
            "turned_away": int(away[rows].sum()),
            **_latencies(latency_s, rows),
            "slo_attainment": float(good[rows].mean()) if promised[rows].any() else None,
        }
    return made


def _by_tenant(requests: Columns, latency_s: dict[str, Floats]) -> dict[str, Any]:
    finished = np.isfinite(requests["finish_s"])
    service = np.where(finished, requests["prompt_tokens"] + 2.0 * requests["output_tokens"], 0.0)
    total = float(service.sum())
    made = {}
    for name, rows in _groups(requests["tenant"]):
        made[name] = {
            "requests": len(rows),
            "completed": int(finished[rows].sum()),
            "service_share": float(service[rows].sum()) / total if total else None,
            **_latencies(latency_s, rows),
        }
    return made


def _latencies(latency_s: dict[str, Floats], rows: NDArray[np.int64]) -> dict[str, float | None]:
    made: dict[str, float | None] = {}
    for name, percents in (("ttft", (99,)), ("tpot", ())):
        values_ms = latency_s[name][rows] * 1e3
        values_ms = values_ms[np.isfinite(values_ms)]
        made[f"mean_{name}_ms"] = float(values_ms.mean()) if values_ms.size else None
        for percent in percents:
            made[f"p{percent}_{name}_ms"] = float(np.percentile(values_ms, percent)) if values_ms.size else None
    return made


def lines(summary: dict[str, Any]) -> list[str]:
    """The groups as people read them; nothing if there are none."""
    made = []
    for name, one in summary.get("classes", {}).items():
        attained = one["slo_attainment"]
        text = f"class {name or '(none)'}: {one['requests']} requests, {_seen(one)}, TPOT {_ms(one['mean_tpot_ms'])}"
        text += "" if attained is None else f"; SLO attained {attained:.1%}"
        made.append(text + (f"; {one['turned_away']} turned away" if one["turned_away"] else ""))
    tenants = sorted(summary.get("tenants", {}).items(), key=lambda item: (-item[1]["requests"], item[0]))
    for name, one in tenants[:SHOWN_TENANTS]:
        share = "-" if one["service_share"] is None else f"{one['service_share']:.1%}"
        made.append(f"tenant {name or '(none)'}: {one['requests']} requests, {share} of service, {_seen(one)}")
    if len(tenants) > SHOWN_TENANTS:
        made.append(f"... and {len(tenants) - SHOWN_TENANTS} tenants with fewer requests (summary.json has all)")
    return made


def _seen(one: dict[str, Any]) -> str:
    return f"TTFT mean {_ms(one['mean_ttft_ms'])}, P99 {_ms(one['p99_ttft_ms'])}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
