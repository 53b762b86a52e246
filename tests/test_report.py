"""The printed block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_results import Served, made_result, random_served

from llmsim.metrics import fewest_samples
from llmsim.report import report

VLLM_LABELS = [
    "Successful requests",
    "Failed requests",
    "Maximum request concurrency",
    "Benchmark duration (s)",
    "Total input tokens",
    "Total generated tokens",
    "Request throughput (req/s)",
    "Request goodput (req/s)",
    "Output token throughput (tok/s)",
    "Peak output token throughput (tok/s)",
    "Peak concurrent requests",
    "Total token throughput (tok/s)",
]


def test_the_first_lines_are_those_of_the_vllm_benchmark_in_its_order_and_columns() -> None:
    lines = report(made_result(random_served(50, 0), concurrency=7).summary({"ttft": 500.0})).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert [line.rpartition(":")[0] for line in lines[1:13]] == VLLM_LABELS
    assert all(line[40] == " " and line[41] != " " for line in lines[1:13])
    assert lines[13] == "---------------Time to First Token----------------"
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert "----------------End-to-end Latency----------------" in lines
    assert lines[-1] == "=" * 50


def test_every_latency_line_is_the_summarys_number() -> None:
    summary = made_result(random_served(400, 3)).summary()
    text = report(summary)
    for name in ("ttft", "tpot", "itl", "e2el"):
        for word, key in (("Mean", "mean"), ("Median", "median"), ("P90", "p90"), ("P95", "p95"), ("P99", "p99")):
            printed = re.search(rf"^{word} {name.upper()} \(ms\): +([\d.]+)\*?$", text, re.M)
            assert printed is not None
            assert float(printed[1]) == pytest.approx(summary[f"{key}_{name}_ms"], abs=0.0051)


def test_a_percentile_of_too_few_samples_is_marked() -> None:
    """P99 needs 368: the smallest n with 0.99 ** n <= 0.025."""
    assert fewest_samples(99) == 368
    assert 0.99**368 <= 0.025 < 0.99**367
    few, enough = (report(made_result(random_served(n, 1)).summary()) for n in (367, 368))
    assert re.search(r"^P99 TTFT \(ms\): +[\d.]+\*$", few, re.M) and "too few samples" in few
    assert re.search(r"^P95 TTFT \(ms\): +[\d.]+$", few, re.M)
    assert re.search(r"^P99 TTFT \(ms\): +[\d.]+$", enough, re.M)


def test_what_does_not_exist_is_a_dash_and_what_was_not_asked_is_not_printed() -> None:
    text = report(made_result([Served(0.0, [])]).summary())
    assert re.search(r"^Mean TTFT \(ms\): +-$", text, re.M)
    assert "goodput" not in text and "concurrency:" not in text and "nan" not in text.lower()


def test_the_trust_lines_name_the_cost_model_and_its_share_outside_the_measured_range() -> None:
    summary = made_result(random_served(20, 0)).summary()
    assert "Cost model: every iteration lasts 0.01 s" in report(summary)
    assert "Outside the measured range" not in report(summary)
    summary["extrapolated"] = 0.0421
    assert "Outside the measured range: 4.2 % of GPU time\n" in report(summary)
    summary["extrapolated"] = 0.51
    assert "Outside the measured range: 51.0 % of GPU time: treat with care" in report(summary)


def test_footer_lines_close_the_block() -> None:
    lines = report(made_result(random_served(5, 0)).summary(), [f"Results: {Path('runs/a')}"]).splitlines()
    assert lines[-2:] == ["Results: runs/a", "=" * 50]
