"""Tenants and classes under each side: who was served how much by when, and who waited.

    service(t)  prompt tokens of the tenant's requests admitted by t + 2 * output tokens made by t: the service of VTC
                (Sheng et al., OSDI'24, w_p = 1 and w_q = 2). An answer's tokens are taken as evenly spread from its
                first to its last, so within an answer the curve is a straight line
    asked(t)    the same of all that had been sent by t, whole
    unfairness  the largest change of service_i - service_j over a stretch of time in which tenants i and j both had
                requests waiting: what VTC bounds by 2 max(w_p L, w_q M), L the longest prompt, M a batch's tokens

Rejected requests ask for nothing and get nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.metrics import Columns, Floats, latencies_s

if TYPE_CHECKING:
    import pandas as pd

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
SLICES = 160
SHOWN = 6  # tenants with curves of their own; the rest are one
OTHERS = "others"
PERCENTS = (50, 99)


def labels_of(requests: Columns, label: str) -> NDArray[Any]:
    """The column `tenant` or `slo_class`. Raises ValueError for a trace that has none, with the flag that draws it."""
    if label not in requests:
        example = "tenants:flood=0.8,small=0.2" if label == "tenant" else "interactive:0.7:ttft=500ms;batch:0.3"
        raise ValueError(f"the trace names no {label}: draw them with --assign-classes {example}")
    return requests[label]


def tenants_shown(requests: Columns, shown: int = SHOWN) -> list[str]:
    """Those that asked for most service, most first."""
    names, member = np.unique(labels_of(requests, "tenant"), return_inverse=True)
    asked = np.bincount(member, weights=_service(requests), minlength=len(names))
    return [str(names[at]) for at in np.argsort(-asked, kind="stable")[:shown]]


def _service(requests: Columns) -> Floats:
    """Of a request that is answered: all it asks for."""
    every: Floats = PROMPT_WEIGHT * requests["prompt_tokens"] + OUTPUT_WEIGHT * requests["output_tokens"]
    return np.where(np.isfinite(requests["finish_s"]), every, 0.0)


def service_by(requests: Columns, times_s: Floats) -> Floats:
    """Service given by each time."""
    done = np.isfinite(requests["finish_s"])
    scheduled_s, first_s, finish_s = (requests[name][done] for name in ("scheduled_s", "first_token_s", "finish_s"))
    more = OUTPUT_WEIGHT * (requests["output_tokens"][done] - 1.0)
    given = _steps(scheduled_s, PROMPT_WEIGHT * requests["prompt_tokens"][done], times_s)
    given += _steps(first_s, np.full(len(first_s), OUTPUT_WEIGHT), times_s)
    lasts_s = finish_s - first_s
    at_once = lasts_s <= 0.0
    given += _steps(first_s[at_once], more[at_once], times_s)
    slope = more[~at_once] / lasts_s[~at_once]
    return given + _ramps(first_s[~at_once], slope, times_s) - _ramps(finish_s[~at_once], slope, times_s)


def asked_by(requests: Columns, times_s: Floats) -> Floats:
    """Service asked for by each time."""
    return _steps(requests["arrival_s"], _service(requests), times_s)


def _steps(at_s: Floats, heights: Floats, times_s: Floats) -> Floats:
    order = np.argsort(at_s, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(heights[order])])
    found: Floats = sums[np.searchsorted(at_s[order], times_s, side="right")]
    return found


def _ramps(from_s: Floats, slopes: Floats, times_s: Floats) -> Floats:
    """Sum of slope * (t - from) over those that have begun."""
    return times_s * _steps(from_s, slopes, times_s) - _steps(from_s, slopes * from_s, times_s)


def service_frame(sides: Mapping[str, Columns], *, slices: int = SLICES, shown: int = SHOWN) -> pd.DataFrame:
    """A row a side, tenant and time (from the first request to the last token of all sides): side, tenant, time_s,
    service_tokens, asked_tokens. The `shown` tenants who asked for most, and the others together."""
    import pandas as pd

    first = next(iter(sides.values()))
    names = tenants_shown(first, shown)
    begin_s = min(float(requests["arrival_s"].min()) for requests in sides.values())
    end_s = max(float(np.nanmax(requests["finish_s"], initial=begin_s)) for requests in sides.values())
    times_s = np.linspace(begin_s, end_s, slices + 1)
    parts = []
    for side, requests in sides.items():
        label = labels_of(requests, "tenant")
        groups = [(name, label == name) for name in names]
        rest = ~np.isin(label, names)
        if rest.any():
            groups.append((OTHERS, rest))
        for name, rows in groups:
            mine = {column: values[rows] for column, values in requests.items()}
            columns = {
                "side": side, "tenant": name, "time_s": times_s - begin_s,
                "service_tokens": service_by(mine, times_s), "asked_tokens": asked_by(mine, times_s),
            }  # fmt: skip
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def latency_frame(sides: Mapping[str, Columns], label: str = "tenant", *, shown: int = 12) -> pd.DataFrame:
    """A row a side, group and latency: side, group, latency, requests, samples, mean_ms, p50_ms, p99_ms.

    `label`: tenant or slo_class. Only the `shown` groups with most requests.
    """
    import pandas as pd

    rows = []
    for side, requests in sides.items():
        labels = labels_of(requests, label)
        names, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
        latency_s = latencies_s(requests)
        for at in np.argsort(-counts, kind="stable")[:shown].tolist():
            mine = member == at
            for latency, values_s in latency_s.items():
                values_ms = 1e3 * values_s[mine]
                values_ms = values_ms[np.isfinite(values_ms)]
                numbers: list[float | None] = [None] * (1 + len(PERCENTS))
                if values_ms.size:
                    numbers = [float(values_ms.mean()), *np.percentile(values_ms, PERCENTS).tolist()]
                rows.append((side, str(names[at]), latency, int(counts[at]), int(values_ms.size), *numbers))
    columns = [
        "side",
        "group",
        "latency",
        "requests",
        "samples",
        "mean_ms",
        *(f"p{percent}_ms" for percent in PERCENTS),
    ]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[5:], "float64"))


def groups_frame(summaries: Mapping[str, Mapping[str, Any]], key: str) -> pd.DataFrame:
    """A row a side and group of summaries' `tenants` or `classes`, every number under its key."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"side": side, "group": name, **numbers}
            for side, summary in summaries.items()
            for name, numbers in (summary.get(key) or {}).items()
        ]
    )


def unfairness(requests: Columns, tenants: Sequence[str] | None = None) -> float | None:
    """The largest of all pairs (of the `SHOWN` tenants who asked for most), in service tokens.

    None if no two of them ever had requests waiting at once.
    """
    label = labels_of(requests, "tenant")
    names = list(tenants) if tenants is not None else tenants_shown(requests)
    done = np.isfinite(requests["finish_s"])
    own = {name: {column: values[done & (label == name)] for column, values in requests.items()} for name in names}
    worst: float | None = None
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            found = _worst_of_pair(own[one], own[other])
            if found is not None:
                worst = found if worst is None else max(worst, found)
    return worst


def _worst_of_pair(one: Columns, other: Columns) -> float | None:
    """Service changes linearly between events, so its extremes are at events, just before a step or after it."""
    events_s = np.unique(
        np.concatenate(
            [mine[name] for mine in (one, other) for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s")]
        )
    )
    if len(events_s) < 2:
        return None
    both = (_waiting_after(one, events_s) > 0) & (_waiting_after(other, events_s) > 0)  # from this event to the next
    if not both.any():
        return None
    after = service_by(one, events_s) - service_by(other, events_s)
    edges_s = np.nextafter(events_s, -np.inf)
    before = service_by(one, edges_s) - service_by(other, edges_s)
    worst = 0.0
    starts = np.flatnonzero(both & ~np.concatenate([[False], both[:-1]]))
    ends = np.flatnonzero(both & ~np.concatenate([both[1:], [False]])) + 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        values = np.concatenate([after[start:end], before[start + 1 : end + 1]])
        worst = max(worst, float(np.ptp(values)))
    return worst


def _waiting_after(mine: Columns, times_s: Floats) -> NDArray[np.int64]:
    """Requests sent and not yet scheduled, just after each time."""
    sent = np.searchsorted(np.sort(mine["arrival_s"]), times_s, side="right")
    left = np.searchsorted(np.sort(mine["scheduled_s"]), times_s, side="right")
    return sent - left


def fairness_frame(sides: Mapping[str, Columns]) -> pd.DataFrame:
    """A row a side: side, unfairness_tokens (None: no two tenants waited at once)."""
    import pandas as pd

    made = pd.DataFrame([(name, unfairness(requests)) for name, requests in sides.items()],
                        columns=["side", "unfairness_tokens"])  # fmt: skip
    return made.astype({"unfairness_tokens": "float64"})


def has_groups(requests: Columns, labels: Iterable[str] = ("tenant", "slo_class")) -> list[str]:
    """Which of the labels the requests carry."""
    return [label for label in labels if label in requests]
