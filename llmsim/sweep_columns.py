"""The columns of a sweep's data set. They follow from the specification alone, so that all part files have the same.

    run, id                 the number of the run in the specification's order; of what decides its result
    AXES                    what varies: a column per name
    error                   null, or why there is no result, in one line
    METRICS                 every single number of a summary, as docs/metrics.md defines it, and some of its tables:
                            kv_cache_usage_mean, kv_cache_usage_max, batch_size_mean, queue_share, prefill_share,
                            decode_share, preempted_share (of E2EL), calibration_id
    summary, manifest       the whole summary, and what repeats the run, as JSON

An axis that is called like a metric (seed, replicas) is one column, the axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmsim.metrics import PERCENTS

if TYPE_CHECKING:
    from llmsim.sweep_spec import Spec
    from llmsim.sweep_work import Row

SPREADS = [
    f"{word}_{name}_ms"
    for name in ("ttft", "tpot", "itl", "e2el")
    for word in ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTS))
]
PARTS = ("queue", "prefill", "decode", "preempted")
METRICS: dict[str, str] = {
    "model_id": "string", "label": "string", "num_prompts": "int64", "request_rate": "float64",
    "max_concurrency": "int64", "seed": "int64", "duration": "float64", "completed": "int64", "failed": "int64",
    "total_input_tokens": "int64", "total_output_tokens": "int64", "request_throughput": "float64",
    "output_throughput": "float64", "total_token_throughput": "float64", "max_output_tokens_per_s": "float64",
    "max_concurrent_requests": "int64", "request_goodput": "float64", "slo_attainment": "float64",
    "goodput_tok_s": "float64", **dict.fromkeys(SPREADS, "float64"),
    **{f"{part}_share": "float64" for part in PARTS},
    "num_preemptions": "int64", "prefix_cache_hit_rate": "float64", "stable": "bool", "stability": "string",
    "tokens_per_s_per_user": "float64", "kv_cache_usage_mean": "float64", "kv_cache_usage_max": "float64",
    "kv_token_share": "float64", "batch_size_mean": "float64", "iterations": "int64", "gpu_busy_frac": "float64",
    "mfu": "float64", "mbu": "float64", "bottleneck": "string", "tokens_per_s_per_gpu": "float64",
    "price_per_gpu_hour": "float64", "price": "string", "cost_per_1m_output_tokens": "float64",
    "cost_per_1m_total_tokens": "float64",
    "replicas": "int64", "gpus": "int64", "gpu_hours": "float64", "extrapolated": "float64", "calibration_id": "string",
}  # fmt: skip
CONSTANT = ("backend", "endpoint_type", "tokenizer_id", "burstiness")  # vLLM's keys that say nothing here


def columns_of(spec: Spec) -> list[tuple[str, str]]:
    """(name, type) of every column."""
    axes = [(name, _kind([labels[at] for labels in _labels(spec, name)])) for name, at in _places(spec)]
    taken = {name for name, _ in axes}
    metrics = [(name, kind) for name, kind in METRICS.items() if name not in taken]
    ends = [("summary", "string"), ("manifest", "string")]
    return [("run", "int64"), ("id", "string"), *axes, ("error", "string"), *metrics, *ends]


def _places(spec: Spec) -> list[tuple[str, int]]:
    return [(name, at) for axis in spec.axes for at, name in enumerate(axis.columns)]


def _labels(spec: Spec, name: str) -> list[tuple[Any, ...]]:
    axis = next(axis for axis in spec.axes if name in axis.columns)
    return [point.labels for point in axis.points]


def _kind(values: Sequence[Any]) -> str:
    """The type that holds all of them; text (JSON) for anything mixed, and for whole numbers beyond 64 bits."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values if value is not None):
        return "int64"
    if float in kinds and kinds <= {int, float}:
        return "float64"
    return "string"


def table_of(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> Any:
    """A pyarrow table of rows in their order; a number that does not exist is null."""
    pa = import_module("pyarrow")
    axes = [name for name, _ in columns[2:]][: len(rows[0].labels)]
    values: dict[str, list[Any]] = {name: [] for name, _ in columns}
    for row in rows:
        given = dict(zip(axes, row.labels, strict=True))
        metrics = {} if row.summary is None else flat(row.summary)
        fixed = {
            "run": row.run,
            "id": row.id,
            "error": row.error,
            "summary": None if row.summary is None else json.dumps(row.summary, allow_nan=False),
            "manifest": json.dumps(row.manifest, allow_nan=False),
        }
        found = metrics | given | fixed
        for name, kind in columns:
            values[name].append(_as(found.get(name), kind))
    return pa.table({name: pa.array(values[name], type=kind) for name, kind in types_of(columns)})


def types_of(columns: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
    """(name, pyarrow's type) of every column."""
    pa = import_module("pyarrow")
    types = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}
    return [(name, types[kind]) for name, kind in columns]


def _as(value: Any, kind: str) -> Any:
    if value is None or kind != "string" or isinstance(value, str):
        return value
    return json.dumps(value)


def flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of METRICS that a summary has."""
    nested = {
        "kv_cache_usage_mean": summary["kv_cache_usage_perc"]["mean"],
        "kv_cache_usage_max": summary["kv_cache_usage_perc"]["max"],
        "batch_size_mean": summary["batch_size"]["mean"],
        "calibration_id": summary["calibration"].get("id"),
        **{f"{part}_share": summary[f"{part}_ms"]["share_of_e2el"] for part in PARTS},
    }
    return {name: nested[name] if name in nested else summary.get(name) for name in METRICS}
