"""Queueing theory: what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_twin import SteppedCost

from llmsim.cost import Host
from llmsim.cost.graphs import Graphs
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

STEP_S = 0.01
ONE_AT_A_TIME = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{STEP_S}", max_num_seqs=1)


def poisson(count: int, rate: float, prompt: int, output: int, seed: int) -> Trace:
    arrival_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    return Trace("poisson", arrival_s - arrival_s[0], np.full(count, prompt), np.full(count, output))


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("output", [1, 8])
def test_mean_sojourn_of_m_d_1(output: int, asynchronous: bool) -> None:
    """One request at a time, each `output` iterations of the same length, Poisson arrivals, load 0.7.

    Pollaczek and Khinchine: mean sojourn = d (1 + rho / (2 (1 - rho))) = 2.1667 d. Successive waits are correlated over
    some tens of requests, so the error of the mean is taken from 40 batches of 750 (a busy period at this load serves
    three on average); five standard errors, which must themselves be small, leave a chance of 1 in 100,000.
    """
    count, rho = 30_000, 0.7
    service_s = output * STEP_S
    work = poisson(count, rho / service_s, 100, output, seed=1)
    requests = simulate(work, replace(ONE_AT_A_TIME, async_scheduling=asynchronous)).requests
    sojourn_s = requests["finish_s"] - requests["arrival_s"]
    batches = sojourn_s.reshape(40, -1).mean(axis=1)
    error_s = batches.std(ddof=1) / np.sqrt(len(batches))
    expected_s = service_s * (1 + rho / (2 * (1 - rho)))
    assert error_s < 0.02 * expected_s
    assert abs(sojourn_s.mean() - expected_s) < 5 * error_s


def test_each_wait_of_m_d_1_follows_lindley() -> None:
    """W(n+1) = max(0, W(n) + d - A(n+1)), request by request; rounding adds up over a busy period."""
    work = poisson(5_000, 0.9 / (4 * STEP_S), 100, 4, seed=2)
    requests = simulate(work, ONE_AT_A_TIME).requests
    waited_s, waits_s = 0.0, []
    for gap_s in [0.0, *np.diff(work.arrival_s)]:
        waited_s = max(0.0, waited_s + 4 * STEP_S - gap_s) if waits_s else 0.0
        waits_s.append(waited_s)
    np.testing.assert_allclose(requests["scheduled_s"] - requests["arrival_s"], waits_s, rtol=0, atol=1e-8)
    np.testing.assert_allclose(requests["finish_s"] - requests["scheduled_s"], 4 * STEP_S, rtol=0, atol=1e-8)


@pytest.mark.parametrize("blocks", [None, 200], ids=["ample", "tight"])
def test_littles_law(blocks: int | None) -> None:
    """Mean number in the system, counted from the iteration log, against rate x mean sojourn from the requests.

    The log sees a request from the first schedule after its arrival on, so it misses at most one iteration of each.
    """
    rng = np.random.default_rng(3)
    count = 1500
    arrival_s = np.cumsum(rng.exponential(1 / 12.0, count))
    work = Trace("made", arrival_s - arrival_s[0], rng.integers(1, 600, count), rng.integers(1, 150, count))
    scenario = Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", max_num_seqs=64, num_gpu_blocks_override=blocks, async_scheduling=False
    )
    result = simulate(work, scenario, cost=SteppedCost(Host(), Graphs.of_engine(64, 8192), 1.0))
    log, requests = result.iterations, result.requests
    until_s = np.minimum(np.append(log["start_s"][1:], np.inf), log["gpu_end_s"])  # then it is idle, and empty
    in_system = log["running"] + log["waiting"]
    span_s = float(requests["finish_s"].max())
    from_log = float((in_system * (until_s - log["start_s"])).sum()) / span_s
    rate_per_s, sojourn_s = count / span_s, float((requests["finish_s"] - requests["arrival_s"]).mean())
    longest_s = float((log["gpu_first_s"] + log["gpu_growth_s"] * log["iterations"]).max())
    assert longest_s < 0.06 * sojourn_s, "the bound below would say little"
    assert rate_per_s * (sojourn_s - longest_s) < from_log <= rate_per_s * sojourn_s * (1 + 1e-9)
    assert (result.stats["preemptions"] > 0) == (blocks is not None)
