"""Synthetic workloads have the rate, burstiness, lengths and sharing they were asked for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from llmsim.readers.report import prefix_hit_ceiling
from llmsim.readers.write import write_trace
from llmsim.synth import Client, RequestClass, mix, synthesise
from llmsim.synth.arrivals import weibull_shape
from llmsim.synth.sharing import prefixes
from llmsim.trace import Trace, load_trace

N = 200_000


def rate_and_cv(trace: Trace) -> tuple[float, float]:
    gaps_s = np.diff(trace.arrival_s)
    return 1 / float(gaps_s.mean()), float(gaps_s.std() / gaps_s.mean())


@pytest.mark.parametrize(
    ("process", "rate", "cv"),
    [
        ("constant:rate=10", 10, 0.0),
        ("poisson:rate=10", 10, 1.0),
        ("gamma:rate=10,cv=0.5", 10, 0.5),
        ("gamma:rate=10,cv=2", 10, 2.0),
        ("gamma:rate=10,burstiness=0.25", 10, 2.0),
        ("weibull:rate=10,cv=0.5", 10, 0.5),
        ("weibull:rate=10,cv=2", 10, 2.0),
        ("ramp:start=10,end=10", 10, 1.0),
        ("piecewise:at=0/100,rates=10/10,cv=2", 10, 2.0),
    ],
)
def test_renewal_process_has_its_rate_within_1_percent_and_cv_within_3(process: str, rate: float, cv: float) -> None:
    found_rate, found_cv = rate_and_cv(synthesise(N, arrivals=process))
    assert found_rate == pytest.approx(rate, rel=0.01)
    assert found_cv == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_poisson_gaps_pass_kolmogorov_smirnov_at_1_percent() -> None:
    gaps_s = np.diff(synthesise(N, arrivals="poisson:rate=10").arrival_s)
    assert stats.kstest(gaps_s, "expon", args=(0, 0.1)).pvalue > 0.01
    # Gaps clipped at three means, as some generators do, must not pass: the test has power.
    assert stats.kstest(np.minimum(gaps_s, 0.3), "expon", args=(0, 0.1)).pvalue < 0.01


@pytest.mark.parametrize(
    ("process", "rate"),
    [
        # Time-weighted means: (2 * 3 + 20 * 0.5) / 3.5; half of 10, twice; the mean of the sinusoid.
        ("mmpp:rates=2/20,sojourns=3/0.5", (2 * 3 + 20 * 0.5) / 3.5),
        ("on-off:on_rate=10,on=0.5,off=0.5", 5.0),
        ("on-off:on_rate=10,on=5,off=5,fixed=1", 5.0),
        ("diurnal:rate=10,peak_to_trough=8,period=100", 10.0),
    ],
)
def test_modulated_process_has_its_time_weighted_rate(process: str, rate: float) -> None:
    assert rate_and_cv(synthesise(N, arrivals=process))[0] == pytest.approx(rate, rel=0.02)


def test_diurnal_peak_to_trough_is_as_asked() -> None:
    at_s = synthesise(N, arrivals="diurnal:rate=10,peak_to_trough=8,period=1000").arrival_s
    phase = np.histogram(at_s[at_s < 19_000] % 1000, bins=20)[0]
    assert phase.max() / phase.min() == pytest.approx(8, rel=0.15)  # bins average over a twentieth of the period


def test_spike_pulse_ramp_and_batch_put_requests_where_they_say() -> None:
    spike = synthesise(4000, arrivals="spike:base=5,extra=100,start=100,length=10").arrival_s
    assert ((spike >= 99.5) & (spike < 109.5)).sum() == pytest.approx(1050, rel=0.1)
    assert synthesise(6, arrivals="pulse:size=3,every=5").arrival_s.tolist() == [0, 0, 0, 5, 5, 5]
    assert synthesise(3, arrivals="batch").arrival_s.tolist() == [0, 0, 0]
    gaps_s = np.diff(synthesise(N, arrivals="ramp:start=1,end=10,shape=exponential").arrival_s)
    assert gaps_s[:2000].mean() / gaps_s[-2000:].mean() == pytest.approx(10, rel=0.1)


def test_exact_count_removes_the_variation_of_the_mean_rate() -> None:
    trace = synthesise(1000, arrivals="gamma:rate=10,cv=2,exact=1")
    assert trace.arrival_s[-1] == pytest.approx(999 / 10, rel=1e-12)


def test_weibull_shape_solves_the_cv() -> None:
    shape = weibull_shape(2.0)
    assert math.sqrt(math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1) == pytest.approx(2.0, rel=1e-9)
    assert weibull_shape(1.0) == pytest.approx(1.0, rel=1e-9)  # exponential


@pytest.mark.parametrize(
    ("lengths", "mean", "median"),
    [
        ("fixed:tokens=7", 7, 7),
        ("uniform:min=3,max=7", 5, 5),
        ("random:tokens=100,ratio=0.5", 100, 100),
        ("normal:mean=500,sd=50", 500, 500),
        ("lognormal:median=900,sigma=1", 900 * math.exp(0.5), 900),
        ("lognormal:mean=6000,median=4000", 6000, 4000),
        ("lognormal:mean=200,sd=300", 200, 200 / math.sqrt(1 + 1.5**2)),
        ("exponential:mean=200", 200, 200 * math.log(2)),
        ("pareto:least=1000,alpha=3", 1500, 1000 * 2 ** (1 / 3)),
        ("histogram:tokens=100/200/300,weights=1/1/2", 225, 200),
        ("cdf:tokens=1/1001,fractions=0/1", 501, 501),
        ("mixture:weights=0.7/0.3,parts=(fixed:tokens=100)/(fixed:tokens=1100)", 400, 100),
    ],
)
def test_lengths_have_their_mean_and_median(lengths: str, mean: float, median: float) -> None:
    tokens = synthesise(N, lengths=lengths).prompt_tokens
    assert tokens.mean() == pytest.approx(mean, rel=0.02)
    if not lengths.startswith("histogram"):
        assert np.median(tokens) == pytest.approx(median, rel=0.02)
    assert tokens.min() >= 1


def test_normal_does_not_pile_up_at_its_limits() -> None:
    tokens = synthesise(N, lengths="normal:mean=100,sd=50,min=50,max=150").prompt_tokens
    counts = np.bincount(tokens)
    assert tokens.min() >= 50 and tokens.max() <= 150 and counts[150] < counts[100]


def test_rho_sets_the_rank_correlation_of_prompt_and_output() -> None:
    spec = {"lengths": "lognormal:median=900,sigma=1", "output_lengths": "exponential:mean=2000"}
    for rho in (-0.5, 0.0, 0.8):
        trace = synthesise(N, rho=rho, **spec)  # type: ignore[arg-type]
        spearman = stats.spearmanr(trace.prompt_tokens, trace.output_tokens).statistic
        assert spearman == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.01)


def test_streams_are_independent_and_seeded() -> None:
    slow = synthesise(100, arrivals="poisson:rate=1", lengths="exponential:mean=100", seed=3)
    fast = synthesise(100, arrivals="gamma:rate=50,cv=3", lengths="exponential:mean=100", seed=3)
    other = synthesise(100, arrivals="poisson:rate=1", lengths="exponential:mean=100", seed=4)
    assert np.array_equal(slow.prompt_tokens, fast.prompt_tokens)
    assert not np.array_equal(slow.prompt_tokens, other.prompt_tokens)
    assert np.allclose(slow.arrival_s, 10 * synthesise(100, arrivals="poisson:rate=10", seed=3).arrival_s)


def test_exact_groups_reuse_what_the_closed_form_says() -> None:
    spec = "repetition:prefixes=10,tokens=256"
    trace = synthesise(1005, prefixes=spec, lengths="fixed:tokens=100")
    assert len(trace) == 1000  # floor(1005 / 10) of each
    # 99 repeats of 16 whole blocks in each of 10 groups.
    assert prefixes(spec).expected_hit_blocks(1005, 16) == 10 * 99 * 16
    ceiling = prefix_hit_ceiling(trace)
    assert ceiling is not None and ceiling["hit_blocks"] == 10 * 99 * 16


@pytest.mark.parametrize(
    "spec",
    [
        "groups:groups=64,tokens=2048",
        "groups:groups=64,tokens=2050,zipf=1",
        "buckets:weights=3/1,counts=5/50,tokens=512/64",
    ],
)
def test_random_groups_reuse_what_the_closed_form_expects(spec: str) -> None:
    trace = synthesise(3000, prefixes=spec, lengths="uniform:min=1,max=200")
    ceiling = prefix_hit_ceiling(trace)
    assert ceiling is not None
    assert ceiling["hit_blocks"] == pytest.approx(prefixes(spec).expected_hit_blocks(3000, 16), rel=0.02)


def test_session_prompts_are_their_history_and_share_it() -> None:
    spec = "sessions:turns=(uniform:min=2,max=4),think=(fixed:value=3),system=32"
    trace = synthesise(50, sessions=spec, lengths="fixed:tokens=10", output_lengths="fixed:tokens=20")
    assert trace.parent is not None and trace.delay_s is not None and trace.block_ids and trace.output_block_ids
    for row in range(50):
        before = int(trace.parent[row])
        assert np.isnan(trace.arrival_s[row]) == (before >= 0)
        if before < 0:
            assert trace.prompt_tokens[row] == 32 + 10
            continue
        assert trace.delay_s[row] == 3
        assert trace.prompt_tokens[row] == trace.prompt_tokens[before] + 20 + 10
        history = trace.block_ids[before] + trace.output_block_ids[before]
        shared = -(-(int(trace.prompt_tokens[before]) + 20) // 16)
        assert trace.block_ids[row][:shared] == history[:shared] and len(history) == shared
    assert len({ids[:2] for ids in trace.block_ids}) == 1  # the system prompt, two blocks


def test_closed_users_wait_for_their_own_answers() -> None:
    trace = synthesise(10, sessions="closed:users=4,think=(fixed:value=2),stagger=1")
    assert trace.parent is not None and trace.parent.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, 4, 5]
    assert trace.arrival_s[:4].tolist() == [0, 1, 2, 3] and np.isnan(trace.arrival_s[4:]).all()


def test_classes_have_their_shares_lengths_and_objectives() -> None:
    classes = [
        RequestClass("chat", 0.75, priority=0, slo_ttft_ms=500),
        RequestClass("batch", 0.25, priority=5, lengths="fixed:tokens=9000"),
    ]
    trace = synthesise(20_000, lengths="fixed:tokens=100", classes=classes)
    assert trace.slo_class is not None and trace.priority is not None and trace.slo_ttft_s is not None
    batch = np.array([name == "batch" for name in trace.slo_class])
    assert batch.mean() == pytest.approx(0.25, abs=0.01)
    assert set(trace.prompt_tokens[batch]) == {9000} and set(trace.prompt_tokens[~batch]) == {100}
    assert set(trace.priority[batch]) == {5} and set(trace.slo_ttft_s[~batch]) == {0.5}
    assert np.isnan(trace.slo_ttft_s[batch]).all()
    with pytest.raises(ValueError, match="sum to 1"):
        synthesise(10, classes=[RequestClass("a", 0.5)])


def test_clients_add_up() -> None:
    trace = mix([Client("a", "poisson:rate=9"), Client("b", "gamma:rate=1,cv=3", lengths="fixed:tokens=5")], 10_000)
    assert trace.tenant is not None and trace.tenant.count("a") == 9000
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert 9000 / float(trace.arrival_s[np.array(trace.tenant) == "a"].max()) == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_written_workload_reads_back_identical(tmp_path: Path, suffix: str) -> None:
    classes = [RequestClass("chat", 0.5, 0, 500, 50), RequestClass("batch", 0.5, 5, model="m")]
    made = [
        synthesise(200, arrivals="gamma:rate=7,cv=2", lengths="exponential:mean=100", classes=classes),
        synthesise(200, prefixes="groups:groups=5,tokens=64", lengths="exponential:mean=100"),
        synthesise(200, sessions="sessions:turns=(uniform:min=1,max=9),think=(exponential:mean=3),system=40"),
    ]
    for number, trace in enumerate(made):
        path = tmp_path / f"{number}.{suffix}"
        write_trace(trace, path)
        back = load_trace(path)
        for column in ("arrival_s", "prompt_tokens", "output_tokens", "parent", "delay_s", "priority", "slo_ttft_s"):
            one, two = getattr(trace, column), getattr(back, column)
            assert (one is None) == (two is None), column
            assert one is None or np.array_equal(one, two, equal_nan=True), column
        for column in ("block_tokens", "block_ids", "output_block_ids", "ids", "session", "slo_class", "model"):
            assert getattr(trace, column) == getattr(back, column), column


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arrivals": "gamma:rate=1"}, "needs cv"),
        ({"arrivals": "gamma:rate=1,cv=1,burstiness=1"}, "not both"),
        ({"arrivals": "poison:rate=1"}, "is not one of constant"),
        ({"arrivals": "poisson:rate=-1"}, "rate=-1 must be above 0"),
        ({"arrivals": "poisson:rate=1,cv=2"}, "does not know cv"),
        ({"lengths": "lognormal:mu=3"}, "needs sigma"),
        ({"lengths": "uniform:min=9,max=3"}, "below min"),
        ({"lengths": "mixture:weights=1,parts=(fixed:tokens=1"}, "parentheses"),
        ({"rho": 2.0}, "between -1 and 1"),
    ],
)
def test_wrong_generators_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        synthesise(10, **options)  # type: ignore[arg-type]


def test_tree_refit_keeps_the_sharing_of_its_trace_and_copies_dilute_it(tmp_path: Path) -> None:
    original = synthesise(2000, prefixes="groups:groups=10,tokens=160", lengths="fixed:tokens=40")
    write_trace(original, tmp_path / "original.csv")
    shares = []
    for roots in (1, 50):
        again = synthesise(2000, prefixes=f"tree:path={tmp_path / 'original.csv'},roots={roots}")
        ceiling = prefix_hit_ceiling(again)
        assert ceiling is not None
        shares.append(ceiling["block_share"])
    before = prefix_hit_ceiling(original)
    assert before is not None and shares[0] == pytest.approx(before["block_share"], abs=0.01)
    # 10 prefixes of 10 blocks in 50 copies: nearly 500 first sights among 2000 requests of 13 blocks.
    assert shares[1] == pytest.approx((2000 - 500 * (1 - math.exp(-4))) * 10 / (2000 * 13), abs=0.02)
