"""A burst met by a decoding batch: chunks by hand, times and gaps against the plain twin, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any

import numpy as np
import pytest
from plain_engine import PlainEngine, PlainRequest, Settings

from llmsim import cli
from llmsim.phases import Engine
from llmsim.phases_burst import (
    ANSWER_TOKENS,
    BUDGETS,
    MOST_SHOWN,
    Burst,
    _arrival_s,
    _decoding,
    _with_prompts,
    budgets,
    burst,
)
from llmsim.phases_words import budgets_in_words, burst_in_words, cards, left_out
from llmsim.scenario import Scenario

MACHINE = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
CONSTANT = replace(MACHINE, cost="constant:0.01")
SMALL = {"prompts": 3, "prompt_tokens": 700, "decodes": 5, "context_tokens": 300}


def test_chunks_fill_what_the_decodes_leave_of_the_budget() -> None:
    one = burst(CONSTANT, prompts=2, prompt_tokens=600, decodes=6, context_tokens=100, token_budget=256)
    work = one.requests()
    prefills = work[work["kind"] == "prefill"]
    chunks = [tuple(row) for row in prefills[["request", "tokens", "computed_tokens"]].to_numpy().tolist()]
    # 250 beside six decodes; 100 end the first prompt and leave 150, then its own decode takes one more
    assert chunks == [(1, 250, 0), (1, 250, 250), (1, 100, 500), (2, 150, 0), (2, 249, 150), (2, 201, 399)]
    assert (one.iterations, one.chunks) == (5, 6)
    assert work.groupby("iteration")["tokens"].sum().max() == 256
    spans = prefills["end_s"] - prefills["begin_s"]
    np.testing.assert_allclose(spans, 0.01)
    # no host: the first prompt's answer begins with its third iteration, the other's with its last
    first_s = work[(work["request"] == 1) & (work["tokens"] == 100)]["end_s"].item()
    assert one.mean_ttft_s == pytest.approx((first_s + one.last_ttft_s) / 2)
    assert (one.steady_gap_s, one.longest_gap_s) == pytest.approx((0.01, 0.01))


def test_answers_go_on_a_token_an_iteration() -> None:
    one = burst(CONSTANT, prompts=1, prompt_tokens=500, decodes=4, context_tokens=100, token_budget=128)
    decodes = one.requests().query("lane == '4 decodes'")
    assert decodes["tokens"].eq(4).all()
    assert np.diff(decodes["computed_tokens"]).tolist() == [4] * (len(decodes) - 1)
    own = one.requests().query("request == 1 and kind == 'decode'")
    assert own["computed_tokens"].tolist() == list(range(500, 500 + ANSWER_TOKENS - 1))[: len(own)]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_instants_and_gaps_are_those_of_the_plain_twin(tensor_parallel: int, asynchronous: bool) -> None:
    scenario = replace(MACHINE, tensor_parallel=tensor_parallel, async_scheduling=asynchronous)
    one = burst(scenario, token_budget=512, **SMALL)
    engine = Engine.of(replace(scenario, max_num_batched_tokens=512))
    trace = _decoding(engine, *SMALL.values())
    arrival_s = _arrival_s(engine, trace, SMALL["context_tokens"])
    trace = _with_prompts(trace, SMALL["prompts"], SMALL["prompt_tokens"], arrival_s)
    s = engine.scenario
    settings = Settings(engine.kv_blocks, s.block_size, s.max_num_seqs, 512, async_scheduling=asynchronous)
    columns = trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
    requests = [PlainRequest(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
    log = PlainEngine(engine.cost, settings).run(requests)
    first = next(i for i, step in enumerate(log) if abs(step.schedule_s - arrival_s - one.shown[0].schedule_s) < 1e-9)
    for ours, theirs in zip(one.shown, log[first:], strict=False):
        assert ours.schedule_s == pytest.approx(theirs.schedule_s - arrival_s, abs=1e-9)
        assert ours.launched_s == pytest.approx(theirs.launched_s - arrival_s, abs=1e-9)
        assert ours.gpu_end_s == pytest.approx(theirs.gpu_end_s - arrival_s, abs=1e-9)
    ttft_s = [request.token_s[0] - arrival_s for request in requests[SMALL["decodes"] :]]
    assert (one.mean_ttft_s, one.last_ttft_s) == pytest.approx((np.mean(ttft_s), max(ttft_s)))
    pairs = [pair for request in requests for pair in pairwise(request.token_s)]
    during = [b - a for a, b in pairs if arrival_s < b <= arrival_s + max(ttft_s) + 1e-9]
    assert one.longest_gap_s == pytest.approx(max(during))
    assert one.worker is (tensor_parallel > 1)


def test_host_and_gpu_do_one_thing_at_a_time() -> None:
    for scenario in (MACHINE, replace(MACHINE, tensor_parallel=2)):
        clocks = burst(scenario, token_budget=512, **SMALL).clocks()
        lanes = {"host", "GPU"} | ({"worker"} if scenario.tensor_parallel > 1 else set())
        assert set(clocks["lane"]) == lanes
        for _, own in clocks.groupby("lane"):
            ordered = own.sort_values(["begin_s", "end_s"])
            assert (ordered["end_s"] >= ordered["begin_s"]).all()
            assert (ordered["begin_s"].to_numpy()[1:] >= ordered["end_s"].to_numpy()[:-1] - 1e-9).all()


def test_the_gpus_bars_are_split_by_what_the_chunks_take_alone() -> None:
    one = burst(MACHINE, token_budget=512, **SMALL)
    cost = Engine.of(replace(MACHINE, max_num_batched_tokens=512)).cost
    mixed = next(step for step in one.shown if step.prefill_share)
    chunks = [(c.tokens, c.computed_tokens) for c in mixed.chunks if c.kind == "prefill"]
    others = [c.computed_tokens for c in mixed.chunks if c.kind == "decode"]
    expected = cost.mixed_s(chunks, 0, 0) / cost.mixed_s(chunks, len(others), sum(others))
    assert 0.5 < mixed.prefill_share < 1 and mixed.prefill_share == pytest.approx(expected)
    assert all(step.prefill_share == 0 for step in one.shown if all(c.kind == "decode" for c in step.chunks))


def test_small_chunks_delay_prompts_and_large_ones_stall_answers() -> None:
    table = budgets(MACHINE, prompts=3, prompt_tokens=2048, decodes=64, context_tokens=256)
    assert table["token_budget"].tolist() == [budget for budget in BUDGETS if budget > 64]
    assert (np.diff(table["iterations"]) <= 0).all()
    assert (np.diff(table["longest_gap_s"]) >= -1e-4).all() and table["longest_gap_s"].iloc[-1] > 0.03
    assert table["last_ttft_s"].iloc[0] > 2 * table["last_ttft_s"].iloc[-1]
    told = budgets_in_words(table)
    assert "128 tokens to 16,384" in told and f"{1e3 * table['longest_gap_s'].iloc[-1]:,.1f} ms" in told


def test_budgets_have_the_numbers_of_the_bursts() -> None:
    table = budgets(MACHINE, **SMALL).astype(object).to_dict("records")
    for row in table[::3]:
        one = burst(MACHINE, token_budget=row["token_budget"], **SMALL).facts()
        assert row == {name: pytest.approx(one[name], rel=1e-9) for name in row}


def test_without_decodes_there_are_no_gaps() -> None:
    one = burst(MACHINE, decodes=0, token_budget=1024)
    assert one.steady_gap_s is None and one.longest_gap_s is None
    assert one.requests().query("kind == 'prefill'")["tokens"].sum() == 4 * 1024
    assert [card["value"] for card in cards(one)][2:4] == ["–", "–"]
    assert "longest gap" not in burst_in_words(one)
    assert "gap" not in budgets_in_words(budgets(MACHINE, decodes=0, prompts=1, prompt_tokens=64))


def test_what_is_drawn_is_bounded_and_says_so() -> None:
    one = burst(CONSTANT, prompts=8, prompt_tokens=8192, decodes=0, token_budget=128)
    # 8 * 8,192 tokens, and of seven answers that have begun the tokens after the first, 128 at a time
    assert len(one.shown) == MOST_SHOWN and one.iterations == ceil((8 * 8192 + 7 * (ANSWER_TOKENS - 1)) / 128)
    assert left_out(one) == f" {one.left_out} further iterations are not drawn." and one.left_out > 100
    assert left_out(burst(CONSTANT, token_budget=4096)) == ""
    assert len(one.clocks()) + len(one.requests()) < 5_000


BAD: list[tuple[dict[str, Any], str]] = [
    ({"decodes": 64, "token_budget": 64}, "decodes=64 fill an iteration: max_num_batched_tokens=64"),
    ({"prompts": 0}, "prompts=0 is too small: give 1 or more"),
    ({"decodes": -1}, "decodes=-1 is too small: give 0 or more"),
    ({"prompt_tokens": 131_072, "prompts": 8, "token_budget": 32}, "more than 20,000: raise it"),
    ({"context_tokens": 131_072}, "context=131072 leaves no room for an answer"),
    ({"decodes": 900, "context_tokens": 8192}, "the KV cache (916,112 tokens)"),
]


@pytest.mark.parametrize(("given", "told"), BAD)
def test_what_cannot_be_is_refused_in_a_line(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        burst(MACHINE, **given)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_command_prints_a_column_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["phases", "--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--cost", "constant:0.01", "--burst", "2"]
    assert cli.main([*argv, "--max-num-batched-tokens", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = next(line for line in lines if line.startswith("token budget")).split()[2:]
    assert heads == [f"{budget:,}" for budget in sorted({*BUDGETS, 300})]
    iterations = next(line for line in lines if line.startswith("iterations")).split()[1:]
    assert iterations[heads.index("300")] == "8"  # 2 * 1,024 tokens, 284 beside sixteen decodes
    assert cli.main([*argv, "--decodes", "0", "--json"]) == 0
    met = json.loads(capsys.readouterr().out)["burst"]
    assert (
        met["longest_gap_s"] is None and met["budgets"][0]["iterations"] == 33
    )  # 64 at a time, and an answer's tokens
    assert cli.main([*argv, "--decodes", "1024"]) == 2
    assert "decodes=1024 fill an iteration" in capsys.readouterr().err


def test_the_numbers_are_plain() -> None:
    facts = burst(MACHINE, token_budget=512, **SMALL).facts()
    assert facts["token_budget"] == 512 and set(facts) < set(Burst.__dataclass_fields__)
    assert all(isinstance(value, int | float) for value in facts.values())
