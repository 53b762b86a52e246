"""Classes, tenants and predictions that a trace does not carry: drawn as asked, said so, and never over its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmsim.classes import assign_classes, parse_classes
from llmsim.predictions import kendall_tau, noisy, predict, rank_shares
from llmsim.readers.write import write_trace
from llmsim.trace import Trace, load_trace

SPEC = "interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:4:zipf=1"


def trace(requests: int = 4000) -> Trace:
    lengths = np.random.default_rng(5).lognormal(5.0, 1.0, requests).astype(np.int64) + 1
    return Trace("t", np.arange(requests, dtype=float), np.full(requests, 100), lengths)


def test_shares_promises_and_tenants_are_those_asked_for() -> None:
    made = assign_classes(trace(), SPEC, seed=3)
    assert made.slo_class is not None and made.tenant is not None
    assert made.slo_ttft_s is not None and made.slo_tpot_s is not None
    interactive = np.array(made.slo_class) == "interactive"
    assert abs(interactive.mean() - 0.7) < 0.03  # 4 standard deviations of 4,000 draws
    assert set(made.slo_ttft_s[interactive]) == {0.5} and set(made.slo_ttft_s[~interactive]) == {10.0}
    assert set(made.slo_tpot_s[interactive]) == {0.05} and np.isnan(made.slo_tpot_s[~interactive]).all()
    # zipf=1 over 4: 1, 1/2, 1/3, 1/4 of 25/12
    assert abs(made.tenant.count("t0") / 4000 - 12 / 25) < 0.035
    assert abs(made.tenant.count("t3") / 4000 - 3 / 25) < 0.025
    assert made.priority is None
    (note,) = made.assigned
    assert note in made.notes and "interactive 0.7" in note and "seed 3" in note


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    assert assign_classes(trace(), SPEC, seed=1).tenant == assign_classes(trace(), SPEC, seed=1).tenant
    assert assign_classes(trace(), SPEC, seed=1).tenant != assign_classes(trace(), SPEC, seed=2).tenant


def test_priorities_and_tenants_by_name() -> None:
    made = assign_classes(trace(100), "a:0.5:priority=0;b:0.5:priority=7;tenants:x=0.9,y=0.1")
    assert made.priority is not None and made.slo_class is not None and made.tenant is not None
    assert set(zip(made.slo_class, made.priority.tolist(), strict=True)) == {("a", 0), ("b", 7)}
    assert set(made.tenant) == {"x", "y"}
    assert made.slo_ttft_s is None and made.slo_tpot_s is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("a:0.5;b:0.4", "the shares of the classes add up to 0.9: make them add up to 1"),
        ("a:0.5;a:0.5", "class a is given twice"),
        ("a:1:ttft=500", "class a: ttft='500' is not a time with its unit: write 500ms or 10s"),
        ("a:1:speed=3", "class a: 'speed=3' is no key"),
        ("a:1:ttft=1s,ttft=2s", "class a: ttft is given twice"),
        ("a:0.5:priority=1;b:0.5", "class b has no priority but a has"),
        ("a:much", "class a: share='much' is not a number above 0"),
        ("a:1;;tenants:2", "a part is empty"),
        ("tenants:0", "tenants:0 is no number of tenants"),
        ("tenants:4;tenants:2", "tenants is given twice"),
        ("tenants:4:even", "tenants: 'even' is no way to share"),
        ("tenants:x=0.9", "the shares of the tenants add up to 0.9"),
    ],
)
def test_what_cannot_be_meant_is_one_line(spec: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_classes(spec)
    assert says in str(error.value) and spec in str(error.value) and "\n" not in str(error.value)


def test_labels_of_the_trace_are_kept_and_not_drawn_over(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = "0,5,5,gold,acme,200,40,6.5\n1,5,9,bronze,zeta,,,0.25\n"
    path.write_text(
        "arrival_time_s,prompt_tokens,output_tokens,slo_class,tenant,slo_ttft_ms,slo_tpot_ms,predicted_tokens\n" + rows
    )
    made = load_trace(path)
    assert made.slo_class == ["gold", "bronze"] and made.tenant == ["acme", "zeta"] and not made.assigned
    assert made.predicted_tokens is not None and made.predicted_tokens.tolist() == [6.5, 0.25]
    write_trace(made, tmp_path / "again.jsonl")
    again = load_trace(tmp_path / "again.jsonl")
    assert again.predicted_tokens is not None and again.predicted_tokens.tolist() == [6.5, 0.25]
    for options, says in (
        ({"assign_classes": "tenants:3"}, "carries tenant of its own"),
        ({"assign_classes": "a:1"}, "carries slo_class of its own"),
        ({"predict": "rank"}, "carries predicted_tokens of its own"),
    ):
        with pytest.raises(ValueError, match=says):
            load_trace(path, **options)  # type: ignore[arg-type]


def test_perfect_predictions_are_the_lengths() -> None:
    made = predict(trace(), "perfect")
    assert made.predicted_tokens is not None and (made.predicted_tokens == made.output_tokens).all()


@pytest.mark.parametrize("tau", [0.2, 0.54, 0.9])
def test_a_target_tau_is_reached_and_the_achieved_one_reported(tau: float) -> None:
    made = predict(trace(), f"tau={tau}", seed=1)
    assert made.predicted_tokens is not None
    achieved = kendall_tau(made.output_tokens.astype(float), made.predicted_tokens)
    assert abs(achieved - tau) < 2e-4
    assert f"Kendall's tau {achieved:.4f}" in made.notes[-1]


def test_log_normal_noise_has_the_sigma_asked_for() -> None:
    made = predict(trace(20_000), "sigma=0.5")
    assert made.predicted_tokens is not None
    errors = np.log(made.predicted_tokens / made.output_tokens)
    assert abs(errors.std() - 0.5) < 0.02 and abs(np.median(errors)) < 0.02


def test_kendalls_tau_of_four_pairs_by_hand() -> None:
    # pairs of (1,2,3,4) against (1,3,2,4): five concordant, one discordant of six
    assert kendall_tau(np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(4 / 6)


def test_ranks_keep_the_order_and_nothing_else() -> None:
    assert rank_shares(np.array([10.0, 500, 20, 20])).tolist() == [0.0, 0.75, 0.25, 0.25]
    lengths, ranks = predict(trace(), "tau=0.6"), predict(trace(), "rank,tau=0.6")
    assert lengths.predicted_tokens is not None and ranks.predicted_tokens is not None
    assert (np.argsort(lengths.predicted_tokens) == np.argsort(ranks.predicted_tokens)).all()
    assert ranks.predicted_tokens.min() >= 0.0 and ranks.predicted_tokens.max() < 1.0


def test_no_prediction_is_below_one_token() -> None:
    assert noisy(np.array([1.0, 2.0]), np.array([-50.0, 1.0]), 1.0).min() == 1.0


@pytest.mark.parametrize("spec", ["tau=0", "tau=1.5", "sigma=-1", "rank,3", "good", "tau=0.5,rank", "sigma=nan"])
def test_predictions_that_cannot_be_meant(spec: str) -> None:
    with pytest.raises(ValueError, match="is no prediction: give perfect"):
        predict(trace(10), spec)


def test_a_tau_that_tied_lengths_cannot_have_is_refused() -> None:
    tied = Trace("t", np.arange(100.0), np.full(100, 5), np.repeat([10, 1000], 50))
    with pytest.raises(ValueError, match="lengths of this trace are tied"):
        predict(tied, "tau=0.95")
