"""Whether a load is more than a system serves, against queueing theory: a queue runs away just where the utilisation
is above 1."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest

from llmsim.plan import curve
from llmsim.rates import plateau, stability
from llmsim.scenario import Scenario
from llmsim.trace import Trace

SEEDS = range(25)
Columns = dict[str, np.ndarray]


def queue(utilisation: float, seed: int, *, count: int = 1000, servers: int = 1, burst: float = 1.0) -> Columns:
    """First come first served, one second of work each; gaps of a gamma law, `burst` times a Poisson process's
    variance."""
    gaps = np.random.default_rng(seed).gamma(1.0 / burst, burst, count)
    sent_s = np.cumsum(gaps) / (utilisation * servers)
    free_s, scheduled_s = [0.0] * servers, np.empty(count)
    for i, at_s in enumerate(sent_s.tolist()):
        scheduled_s[i] = max(at_s, heapq.heappop(free_s))
        heapq.heappush(free_s, scheduled_s[i] + 1.0)
    return {"arrival_s": sent_s, "scheduled_s": scheduled_s, "finish_s": scheduled_s + 1.0}


def share(said: bool | None, utilisation: float, **kind: float) -> float:
    return float(np.mean([stability(queue(utilisation, seed, **kind), None)[0] is said for seed in SEEDS]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [{}, {"servers": 16}, {"burst": 4.0}], ids=["m/d/1", "m/d/16", "bursts"])
def test_verdicts_follow_the_utilisation(kind: dict[str, float]) -> None:
    assert share(True, 0.5, **kind) == 1.0
    assert share(False, 0.9, **kind) <= 0.04 and share(True, 0.9, **kind) >= 0.6
    assert share(True, 1.3, **kind) <= 0.04 and share(False, 1.3, **kind) >= 0.8
    assert share(True, 1.05, **kind) <= 0.4, "1,000 arrivals stray by 3 %, in bursts by 6 %"


def test_just_above_the_capacity_takes_a_long_trace() -> None:
    assert share(True, 1.05, count=3000) == 0.0 and share(False, 1.05, count=3000) >= 0.7
    words = [stability(queue(1.05, seed), None)[1] for seed in SEEDS]
    assert any(one.startswith("saturated: in one half of") and one.endswith("give a longer trace") for one in words)


def test_an_overload_that_ends_is_not_called_stable() -> None:
    """Two thirds of the arrivals come at 1.2 times what is served, the rest at a third of it: all is served in the end,
    after waits that grew for most of the trace. A short rush, of a tenth of them, is caught up with."""
    for rushing, calm in ((0.66, False), (0.1, True)):
        pace = np.where(np.arange(3000) < 3000 * rushing, 1.2, 0.33)
        sent_s = np.cumsum(1.0 / pace)
        scheduled_s, free_s = np.empty(3000), 0.0
        for i, at_s in enumerate(sent_s.tolist()):
            scheduled_s[i] = max(at_s, free_s)
            free_s = scheduled_s[i] + 1.0
        columns = {"arrival_s": sent_s, "scheduled_s": scheduled_s, "finish_s": scheduled_s + 1.0}
        stable, words = stability(columns, None)
        assert (stable is True) is calm, words


def test_growth_names_more_in_the_end_than_at_the_start() -> None:
    for seed in SEEDS:
        stable, words = stability(queue(1.3, seed), None)
        if stable is False:
            first, last = (int(words.partition(word)[2].split()[0]) for word in (", from ", " arrivals to "))
            assert last > first + 50, words


def test_the_plateau_ends_where_arrivals_trickle() -> None:
    steady = np.arange(800.0)
    assert plateau(np.concatenate([steady, 800.0 + 40.0 * np.arange(200.0)])) == pytest.approx(800, abs=2)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        assert plateau(np.cumsum(rng.exponential(1.0, 500))) == 500
        assert plateau(np.cumsum(rng.gamma(0.25, 4.0, 2000))) == 2000


def sessions(count: int, turns: int, delay_s: float, seed: int) -> Trace:
    """Poisson starts, a session a second; each turn `delay_s` after the answer before it, more or less."""
    rng = np.random.default_rng(seed)
    at, starts_s = np.arange(count * turns), np.cumsum(rng.exponential(1.0, count))
    first = at % turns == 0
    delays_s = rng.exponential(delay_s, at.size)
    return Trace(
        "sessions", np.where(first, np.repeat(starts_s, turns), np.nan), np.full(at.size, 50), np.full(at.size, 4),
        parent=np.where(first, -1, at - 1), delay_s=np.where(first, 0.0, delays_s),
    )  # fmt: skip


def test_sessions_that_trickle_are_not_called_unstable() -> None:
    """25 requests/s are served, 4 turns a session. Short sessions: stable at half of that, and not said to be stable at
    1.4 times it, where turns wait for answers and so hold back. Long ones, all at once: the last turns come alone."""
    base = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="constant:0.01", max_num_seqs=1)
    for seed in range(3):
        trace = sessions(250, 4, 1.0, seed)
        calm, hot = curve(trace, base, ["ttft_p99=1s"], [25 / 4 * 0.5, 25 / 4 * 1.4])
        assert calm.values["stable"] is True, calm.values["stability"]
        assert hot.values["stable"] is not True, hot.values["stability"]
        long = sessions(250, 4, 40.0, seed)
        (tail,) = curve(long, replace(base, max_num_seqs=8), ["ttft_p99=1s"], [30.0])
        assert tail.stable and tail.measured[0].met, tail.values["stability"]
