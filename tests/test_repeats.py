"""The spread of the real engine: the same load on several machines, and what is further off than it explains."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import STATISTICS, Load
from benchmarks.repeats import (
    BOUNDS,
    METRICS,
    Repeated,
    bound,
    pooled,
    relative_sd,
    repeated,
    report,
    within,
)

RECORDINGS = Path(__file__).parents[1] / "calibration" / "recordings"
NAME = "vllm-0.25.1_h200-sxm_llama-3.1-8b_bf16"


def group(machines: int, spread: float, eager: bool = False) -> Repeated:
    each = {(metric, statistic): spread for metric in METRICS for statistic in STATISTICS}
    return Repeated("load", machines, eager, each)


def load(error: float, cost: str = "profile", name: str = "q8", folder: str = "x", fitted: bool = False) -> Load:
    errors = {metric: dict.fromkeys(STATISTICS, error) for metric in METRICS}
    return Load(folder, name, 10, fitted, cost, errors)


def test_the_recorded_loads_that_were_sent_again_are_found() -> None:
    folders = [
        RECORDINGS / f"{NAME}{more}" for more in ("", "_second-machine", "_fifth-machine", "_fifth-machine_eager")
    ]
    folders.append(RECORDINGS / "vllm-0.25.1_h200-sxm_llama-3.1-8b_fp8")
    found = {one.name: one for one in repeated(folders)}
    assert {name: one.machines for name, one in found.items()} == {
        "llama-3.1-8b: chat_q20": 3,
        "llama-3.1-8b: poisson_1024_128_q8": 3,
    }, "fp8's chat_q20 has other requests, the eager engine's q8 other arrivals"
    assert not any(one.eager for one in found.values())
    spread = found["llama-3.1-8b: poisson_1024_128_q8"].spread
    assert 0.02 < spread["ttft_ms", "mean"] < 0.06 and spread["tpot_ms", "mean"] < 0.01


def test_spread_is_that_of_a_sample_and_groups_count_by_their_freedom() -> None:
    assert relative_sd([9.0, 11.0]) == pytest.approx(2**0.5 / 10)
    together = pooled([group(2, 0.1), group(4, 0.02)])
    assert together["ttft_ms", "p50"] == pytest.approx(((1 * 0.01 + 3 * 0.0004) / 4) ** 0.5)


def test_a_bound_is_a_share_or_the_engines_own_spread() -> None:
    assert [bound(statistic, 0.01) for statistic in STATISTICS] == list(BOUNDS.values())
    assert [bound(statistic, 0.1) for statistic in STATISTICS] == pytest.approx([0.15] * 4)


def test_fitted_loads_grids_and_engines_without_graphs_do_not_count() -> None:
    loads = [
        load(-0.029),
        load(0.05),
        load(0.05, cost="profile, scaled from x"),
        load(0.5, name="decode_grid (8 batches)"),
        load(0.5, folder="x_eager"),
        load(0.5, fitted=True),
        load(float("nan")),
    ]
    held = within(loads, [group(2, 0.01), group(2, 0.4, eager=True)])
    assert held[False, "ttft_ms"] == [True] * 4 + [False] * 3 + [True]  # 5 % is within 6 % of a p99
    assert held[True, "ttft_ms"] == [False] * 3 + [True]
    told = report(loads, [group(2, 0.01), group(2, 0.4, eager=True)])
    assert "TTFT 5 of 8, TPOT 5 of 8, E2EL 5 of 8; together 62%" in told
    assert "1.0 / 1.0 / 1.0 / 1.0" in told.splitlines()[-4]
