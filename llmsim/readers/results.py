"""Benchmark results as workloads: replay what was measured, with the arrivals and lengths it had.

vLLM `bench serve --save-detailed` (lists; `start_times` on a monotonic clock in seconds), AIPerf `profile_export.jsonl`
(nanoseconds of the wall clock), GuideLLM `benchmarks.json` (epoch seconds), LLMServingSim's bench log. Failed requests
are dropped and counted. Start times of a closed-loop run depend on the system measured: that is said.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmsim.readers.rows import FloatArray, IntArray, ReadOptions, Rows
from llmsim.readers.table import Records
from llmsim.readers.values import counts, numbers, seconds_of


def fits_vllm(keys: set[str]) -> bool:
    return "input_lens" in keys or {"request_throughput", "total_input_tokens"} <= keys


def fits_guidellm(keys: set[str]) -> bool:
    return "benchmarks" in keys


def fits_aiperf(keys: set[str]) -> bool:
    return {"metadata", "metrics"} <= keys


def fits_bench(keys: set[str]) -> bool:
    return {"queued_ts", "first_token_ts"} <= keys


def read_vllm(table: Records, options: ReadOptions) -> Rows:
    if len(table) > 1:
        raise ValueError(
            f"{table.name}: {len(table)} benchmark results in one file (--append-result); keep the line "
            "of the run to replay"
        )
    result = table.records[0]
    prompts, outputs = result.get("input_lens"), result.get("output_lens")
    if not isinstance(prompts, list) or not isinstance(outputs, list):
        raise ValueError(
            f"{table.name}: a vLLM benchmark summary only: no input_lens/output_lens/ttfts. Re-run vllm bench serve "
            "with --save-result --save-detailed"
        )
    if not prompts:
        raise ValueError(f"{table.name}: input_lens is empty: the benchmark measured no requests")
    starts, errors = result.get("start_times"), result.get("errors")
    for field, column in (("output_lens", outputs), ("start_times", starts), ("errors", errors)):
        if column is not None and (not isinstance(column, list) or len(column) != len(prompts)):
            held = len(column) if isinstance(column, list) else "no list"
            raise ValueError(
                f"{table.name}: input_lens has {len(prompts)} entries but {field} has {held}; the file is damaged"
            )
    line = np.arange(1, len(prompts) + 1, dtype=np.int64)
    rows = Rows("vllm-result", line, *_pair(table.name, line, prompts, outputs), unit="entry")
    if errors is not None:
        rows.drop(np.array([bool(error) for error in errors]), "failed in the benchmark")
    if starts is not None:
        rows.arrival_s = _seconds(table.name, "start_times", starts, line)
    else:
        rate, burstiness = seconds_of(result.get("request_rate"), text=True), result.get("burstiness")
        rows.rate = rate if rate else None
        if burstiness is not None:
            shape = seconds_of(burstiness, text=False)
            if shape is None or shape <= 0:
                raise ValueError(f"{table.name}: burstiness {burstiness!r} is not a number above 0; repair the file")
            rows.burstiness = shape
        rows.notes.append("the result has no start_times (older vLLM): arrivals are drawn again, not those measured")
    _closed(rows, result.get("max_concurrency"))
    if isinstance(result.get("model_id"), str):
        rows.notes.append(f"measured with model {result['model_id']}")
    return rows


def _pair(name: str, line: IntArray, prompts: list[Any], outputs: list[Any]) -> tuple[IntArray, IntArray]:
    return (
        counts(name, "input_lens", prompts, line, text=False, unit="entry"),
        counts(name, "output_lens", outputs, line, text=False, unit="entry"),
    )


def _seconds(name: str, field: str, values: list[Any], line: IntArray, unit: str = "entry") -> FloatArray:
    at = numbers(name, field, values, line, text=False, unit=unit)
    return np.asarray(at - at.min())


def _closed(rows: Rows, concurrency: object) -> None:
    if isinstance(concurrency, int) and not isinstance(concurrency, bool) and concurrency > 0:
        rows.notes.append(
            f"measured in closed loop (max_concurrency {concurrency}): its start times depend on the system measured "
            f"and hide queueing; --concurrency {concurrency} replays it closed"
        )


def read_guidellm(table: Records, options: ReadOptions) -> Rows:
    document = table.records[0]
    benchmarks = document.get("benchmarks")
    if not isinstance(benchmarks, list) or len(benchmarks) != 1 or not isinstance(benchmarks[0], dict):
        held = len(benchmarks) if isinstance(benchmarks, list) else "no list of"
        raise ValueError(f"{table.name}: {held} benchmarks in one GuideLLM file; keep the one to replay")
    requests = benchmarks[0].get("requests")
    done = requests.get("successful") if isinstance(requests, dict) else None
    if not isinstance(done, list) or not done or not all(isinstance(one, dict) for one in done):
        raise ValueError(f"{table.name}: benchmarks[0].requests.successful holds no requests; nothing to replay")
    line = np.arange(1, len(done) + 1, dtype=np.int64)
    prompts = [_suffix(one, "prompt_tokens") for one in done]
    outputs = [_suffix(one, "output_tokens") for one in done]
    rows = Rows("guidellm", line, *_pair(table.name, line, prompts, outputs), unit="entry")
    starts = [_suffix(one, "request_start_time", "start_time") for one in done]
    rows.arrival_s = _seconds(table.name, "request_start_time", starts, line)
    for kind in ("errored", "incomplete"):
        failed = requests.get(kind) if isinstance(requests, dict) else None
        if isinstance(failed, list) and failed:
            rows.dropped[f"{kind} in the benchmark"] = len(failed)
    version = (
        document.get("metadata", {}).get("guidellm_version") if isinstance(document.get("metadata"), dict) else None
    )
    rows.notes.append(f"GuideLLM version {version or 'not stated'}; fields matched by the end of their names")
    return rows


def _suffix(record: dict[str, Any], *endings: str) -> Any:
    """A field by the end of its name: spellings move between versions. Exact names first."""
    for ending in endings:
        if record.get(ending) is not None:
            return record[ending]
    return next((value for name, value in record.items() if name.endswith(endings) and value is not None), None)


def read_aiperf(table: Records, options: ReadOptions) -> Rows:
    starts, prompts, outputs, failed = [], [], [], []
    for record in table.records:
        metadata = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
        metrics = record.get("metrics") if isinstance(record.get("metrics"), dict) else {}
        assert isinstance(metadata, dict) and isinstance(metrics, dict)
        failed.append(bool(record.get("error")))
        starts.append(_suffix(metadata, "credit_issued_ns", "request_start_ns"))
        prompts.append(0 if failed[-1] else _value(_suffix(metrics, "input_sequence_length")))
        outputs.append(0 if failed[-1] else _value(_suffix(metrics, "output_sequence_length")))
    rows = Rows(
        "aiperf-result",
        table.lines,
        counts(table.name, "input_sequence_length", prompts, table.lines, text=False, unit=table.unit),
        counts(table.name, "output_sequence_length", outputs, table.lines, text=False, unit=table.unit),
        unit=table.unit,
    )
    rows.drop(np.array(failed), "failed in the benchmark")
    stamped = Records(table.name, [{"request_start_ns": start} for start in starts], table.lines, table.unit)
    rows.arrival_s = stamped.times("request_start_ns", 1e-9)
    return rows


def _value(metric: object) -> object:
    return metric.get("value") if isinstance(metric, dict) else metric


def read_bench(table: Records, options: ReadOptions) -> Rows:
    rows = Rows(
        "llmservingsim-bench", table.lines, table.ints("input_toks"), table.ints("output_toks"), unit=table.unit
    )
    rows.arrival_s = table.times(table.find("arrival_time") or "queued_ts", 1.0)
    if table.find("request_id"):
        rows.ids = table.texts("request_id")
    assert math.isfinite(float(rows.arrival_s.max()))
    return rows
