"""Comparisons: the numbers are those of a replay, the intervals those of a paired block bootstrap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needs import require

from llmsim import cli
from llmsim.compare import (
    LATENCIES,
    PERCENTS,
    WHOLE_RUN,
    Side,
    compare,
    run_sides,
)
from llmsim.compare_bootstrap import block_length, draw_weights, interval, percentile, seed_draws
from llmsim.compare_report import changes, curves, document, report
from llmsim.compare_sides import changed, sides_of
from llmsim.scenario import Scenario
from llmsim.slo import Slo, of_requests_s
from llmsim.trace import Trace

SCENARIO = Scenario(model="llama-3.1-8b", gpu="h100-sxm", max_num_batched_tokens=512, max_num_seqs=16)
TARGETS = {"ttft": 200.0, "tpot": 20.0}


def a_trace(count: int = 120) -> Trace:
    random = np.random.default_rng(5)
    at_s = np.cumsum(random.exponential(0.05, count))
    return Trace("made", at_s - at_s[0], random.integers(1, 900, count), random.integers(1, 60, count))


@pytest.fixture(scope="module")
def sides() -> list[Side]:
    scenarios = {"vllm": SCENARIO, "small chunks": replace(SCENARIO, max_num_batched_tokens=256)}
    return run_sides(a_trace(), scenarios, TARGETS)


def shifted(side: Side, by_s: float, name: str = "shifted") -> Side:
    """The same run, every token later by so much."""
    later = {column: side.requests[column] + by_s for column in ("first_token_s", "finish_s")}
    return Side(name, side.scenario, side.summary, side.requests | later)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_summary(sides: list[Side]) -> None:
    outcome = compare(sides, TARGETS)
    for side in sides:
        numbers = outcome.numbers[side.name]
        assert len(numbers) == 4 * len(LATENCIES) + 4 + len(WHOLE_RUN)
        for key, value in numbers.items():
            expected = side.summary["median" + key[3:] if key.startswith("p50") else key]
            assert value == pytest.approx(expected, rel=1e-12), key
    for key, change in outcome.differences["small chunks"].items():
        first, second = (outcome.numbers[name][key] for name in ("vllm", "small chunks"))
        assert change.value == second - first, key


def test_a_weighted_percentile_is_that_of_the_repeated_sample() -> None:
    random = np.random.default_rng(1)
    for count in (1, 2, 7, 60):
        values = np.sort(random.normal(size=count))
        times = random.integers(0, 4, count)
        times[0] += 1
        upto = np.cumsum(times)
        for percent in PERCENTS:
            expected = np.percentile(np.repeat(values, times), percent)
            assert percentile(values, upto, int(upto[-1]), percent) == pytest.approx(expected, abs=1e-12)


def test_a_side_is_not_different_from_itself(sides: list[Side]) -> None:
    outcome = compare([sides[0], replace(sides[0], name="again")], TARGETS)
    for key, change in outcome.differences["again"].items():
        assert change.value == 0.0
        assert (change.low, change.high) == ((None, None) if key in WHOLE_RUN else (0.0, 0.0))
    assert outcome.shares["again"] == dict.fromkeys(LATENCIES, (0.0, 0.0))
    assert outcome.block == 1


def test_what_every_request_loses_is_known_for_sure(sides: list[Side]) -> None:
    """Pairing: 10 ms more for everybody, whatever else differs between requests."""
    outcome = compare([sides[0], shifted(sides[0], 0.010)])
    found = outcome.differences["shifted"]
    for name in ("ttft", "e2el"):
        for statistic in ("mean", "p50", "p90", "p99"):
            change = found[f"{statistic}_{name}_ms"]
            assert (change.value, change.low, change.high) == pytest.approx((10.0, 10.0, 10.0), abs=1e-6)
        assert outcome.shares["shifted"][name] == (0.0, 1.0)
    assert found["mean_tpot_ms"].high == pytest.approx(0.0, abs=1e-9)


def test_relative_differences_are_of_the_same_draw(sides: list[Side]) -> None:
    doubled = {"first_token_s": 2 * sides[0].requests["first_token_s"] - sides[0].requests["arrival_s"]}
    other = replace(sides[0], name="twice", requests=sides[0].requests | doubled)
    change = compare([sides[0], other]).differences["twice"]["mean_ttft_ms"]
    assert change.relative == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
    assert change.low is not None and change.low < change.value  # of the difference itself the size is not as sure


def test_rejected_requests_are_named_and_left_out(sides: list[Side]) -> None:
    requests = {name: column.copy() for name, column in sides[0].requests.items()}
    for name in ("scheduled_s", "first_token_s", "finish_s"):
        requests[name][:3] = np.nan
    outcome = compare([sides[0], replace(sides[0], name="sheds", requests=requests)], TARGETS)
    assert any(note.startswith("sheds rejected 3 of 120 requests") for note in outcome.notes)
    assert outcome.numbers["sheds"]["mean_ttft_ms"] == pytest.approx(
        1e3 * float(np.nanmean(requests["first_token_s"] - requests["arrival_s"]))
    )
    assert outcome.numbers["sheds"]["slo_attainment"] <= 117 / 120


def test_other_requests_are_no_pair(sides: list[Side]) -> None:
    with pytest.raises(ValueError, match="not runs of the same requests: they differ in id"):
        compare([sides[0], *run_sides(a_trace(20), {"short": SCENARIO})])
    with pytest.raises(ValueError, match="vllm is given twice"):
        compare([sides[0], sides[0]])


def test_the_same_seed_gives_the_same_bytes_however_many_jobs(sides: list[Side]) -> None:
    scenarios = {"vllm": SCENARIO, "small chunks": replace(SCENARIO, max_num_batched_tokens=256)}
    parallel = run_sides(a_trace(), scenarios, TARGETS, jobs=2)
    for one, other in zip(sides, parallel, strict=True):
        assert one.name == other.name
        assert all(one.requests[name].tobytes() == other.requests[name].tobytes() for name in one.requests)
    assert report(compare(sides, TARGETS)) == report(compare(parallel, TARGETS))
    assert (
        document(compare(sides, seed=1))["sides"][1]["differences"]
        != document(compare(sides))["sides"][1]["differences"]
    )


# ---- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "block"), [(10, 1), (10, 3), (7, 7), (100, 33)])
def test_draws_are_blocks_of_consecutive_arrivals(count: int, block: int) -> None:
    random = np.random.default_rng(2)
    total = np.zeros(count, dtype=np.int64)
    for _ in range(2000):
        weights = draw_weights(random, count, block)
        assert weights.sum() == count
        total += weights
    # Every request is drawn as often as any other: binomial scatter of 2,000 draws of `count`, in blocks.
    assert np.abs(total / 2000 - 1.0).max() < 6 * (block / count / 2000 * count) ** 0.5
    assert count < 8 or block > 1 or weights.max() >= 2


def test_a_block_is_drawn_whole() -> None:
    random = np.random.default_rng(3)
    for _ in range(200):
        weights = draw_weights(random, 40, 40)
        assert weights.tolist() == [1] * 40  # one block, wrapped around
        weights = draw_weights(random, 40, 20)
        borders = np.flatnonzero(weights != np.roll(weights, 1))  # where one of the two blocks of 20 begins or ends
        assert len(borders) in (0, 2, 4)
        assert len(borders) < 4 or (borders[2] - borders[0], borders[3] - borders[1]) == (20, 20)


def autoregressive(random: np.random.Generator, count: int, memory: float) -> Any:
    noise = random.normal(size=count + 200)
    values = np.zeros_like(noise)
    for at in range(1, len(noise)):
        values[at] = memory * values[at - 1] + noise[at]
    return values[200:]


def test_blocks_are_as_long_as_the_memory() -> None:
    """Of an AR(1) series with coefficient a, Politis & White's optimum is (2 (2a / (1 - a^2))^2 / (4/3))^(1/3) n^(1/3):
    with n = 4,000 and a = 0.7 it is 35."""
    random = np.random.default_rng(4)
    memoryless = [block_length(random.normal(size=4000)) for _ in range(40)]
    assert np.median(memoryless) <= 4
    lengths = [block_length(autoregressive(random, 4000, 0.7)) for _ in range(40)]
    optimum = (2 * (2 * 0.7 / (1 - 0.7**2)) ** 2 / (4 / 3)) ** (1 / 3) * 4000 ** (1 / 3)
    assert optimum == pytest.approx(35, abs=1)
    assert np.median(lengths) == pytest.approx(optimum, rel=0.3)
    assert block_length(np.ones(100)) == 1
    assert block_length(np.arange(5.0)) == 1
    assert block_length(np.arange(10_000.0)) == 300  # a trend: as long as is allowed, 3 sqrt(n)


def test_intervals_hold_what_they_promise_where_requests_depend_on_each_other() -> None:
    """A 95 % interval of the mean of a series with memory: blocks come near it, single requests do not."""
    random = np.random.default_rng(6)
    covered = {"blocks": 0, "single": 0}
    for _ in range(150):
        values = autoregressive(random, 600, 0.8)
        for name, block in (("blocks", block_length(values)), ("single", 1)):
            means = [float(draw_weights(random, 600, block) @ values) / 600 for _ in range(200)]
            low, high = np.percentile(means, (2.5, 97.5))
            covered[name] += low <= 0.0 <= high
    assert covered["blocks"] / 150 > 0.85
    assert covered["single"] / 150 < 0.65


def test_intervals_over_seeds_hold_what_they_promise() -> None:
    """Differences of 300 requests with memory and of a few seeds, both around 0: a 95 % interval has the truth, which
    is 0, about 95 times out of 100, with two seeds as with five. Requests alone, or resampled seeds, would not."""
    random = np.random.default_rng(8)
    trials = 200
    for seeds in (2, 3, 5):
        covered = {"interval": 0, "requests alone": 0, "resampled seeds": 0}
        for _ in range(trials):
            of_request = autoregressive(random, 300, 0.5)
            values = of_request + random.normal(0.0, 0.25, (seeds, 1)) + random.normal(0.0, 1.0, (seeds, 300))
            block = block_length(values.mean(axis=0))
            weights = np.array([draw_weights(random, 300, block) for _ in range(150)])
            drawn, whole = weights @ values.T / 300, values.mean(axis=1)
            bounds = {"interval": interval(whole, drawn, seed_draws(random, 150, seeds))}
            bounds["requests alone"] = interval(whole[:1], drawn.mean(axis=1, keepdims=True), np.zeros(150))
            again = random.integers(0, seeds, (150, seeds))
            bounds["resampled seeds"] = interval(whole[:1], np.take(whole, again).mean(axis=1)[:, None], np.zeros(150))
            for name, (low, high) in bounds.items():
                covered[name] += low <= 0.0 <= high
        assert 0.91 <= covered["interval"] / trials <= 1.0, (seeds, covered)
        assert covered["requests alone"] / trials < 0.85, (seeds, covered)
        assert covered["resampled seeds"] / trials < 0.88, (seeds, covered)


def test_seeds_are_paired_and_averaged(sides: list[Side]) -> None:
    """A side that is later than the first by 10 ms under one seed and by 30 ms under another."""
    repeats = [[replace(sides[0], scenario=sides[0].scenario | {"seed": 1000}), shifted(sides[0], 0.030)]]
    outcome = compare([sides[0], shifted(sides[0], 0.010)], TARGETS, repeats=repeats)
    assert outcome.seeds == (0, 1000)
    change = outcome.differences["shifted"]["mean_ttft_ms"]
    assert change.value == pytest.approx(20.0)
    # Student's t with one degree of freedom: 20 +- 12.7 * 10, as far as 1,000 draws of it say
    assert change.low is not None and change.high is not None
    assert change.low == pytest.approx(20 - 127, abs=60) and change.high == pytest.approx(20 + 127, abs=60)
    first = outcome.numbers["vllm"]["mean_ttft_ms"]
    assert outcome.numbers["shifted"]["mean_ttft_ms"] == pytest.approx((first or 0.0) + 20.0)
    assert "mean over the 2 seeds 0, 1000, paired" in " ".join(report(outcome).split())
    with pytest.raises(ValueError, match="not of the same sides"):
        compare(sides, repeats=repeats)


def test_seeds_and_promises_in_python() -> None:
    from llmsim import compare as in_python

    scenarios = {"vllm": SCENARIO, "small chunks": replace(SCENARIO, max_num_batched_tokens=256)}
    found = in_python(a_trace(), scenarios, seeds=2, slos=["ttft_mean=1s"])
    assert found.seeds == (0, 1000)
    each = [run_sides(a_trace(), {"vllm": replace(SCENARIO, seed=seed)})[0] for seed in found.seeds]
    means = [side.summary["mean_ttft_ms"] for side in each]
    assert means[0] != means[1], "launch times are drawn"
    assert found.numbers["vllm"]["mean_ttft_ms"] == pytest.approx(sum(means) / 2)
    assert found.promises["vllm"][0].value_s == pytest.approx(sum(means) / 2e3)
    with pytest.raises(ValueError, match="seeds=2 go with a trace"):
        in_python(each, seeds=2)


def test_a_promise_is_what_the_slo_says_of_the_run(sides: list[Side]) -> None:
    """Values by llmsim.slo itself; a side that is later by 10 s keeps none, whatever is drawn."""
    slos = [Slo.parse(f"{word}=1s") for word in ("ttft_p99", "ttft_mean", "tpot_p50", "e2el_p99.9", "itl_p99")]
    late = shifted(sides[0], 10.0)
    outcome = compare([*sides, late], slos=slos)
    for side in (*sides, late):
        expected = of_requests_s(side.requests, slos[:4])
        for promise, value_s in zip(outcome.promises[side.name], expected, strict=False):
            assert promise.value_s == pytest.approx(value_s, rel=1e-12), promise.slo
            assert promise.met == (value_s <= 1.0)
        assert outcome.promises[side.name][4].value_s == pytest.approx(side.summary["p99_itl_ms"] / 1e3)
        assert outcome.promises[side.name][4].share is None
    assert [promise.share for promise in outcome.promises["shifted"]][:2] == [0.0, 0.0]
    exactly = Slo("ttft", "mean", outcome.promises["vllm"][1].value_s)
    share = compare(sides, slos=[exactly]).promises["vllm"][0].share
    assert share is not None and 0.3 < share < 0.7, "of resamples about half have a mean above the sample's"


def test_rejected_requests_break_promises(sides: list[Side]) -> None:
    requests = {name: column.copy() for name, column in sides[0].requests.items()}
    for name in ("scheduled_s", "first_token_s", "finish_s"):
        requests[name][:3] = np.nan
    sheds = replace(sides[0], name="sheds", requests=requests)
    slos = [Slo.parse(text) for text in ("ttft_p50=10s", "ttft_p98=10s", "ttft_p99=10s", "ttft_mean=10s")]
    found = compare([sides[0], sheds], slos=slos).promises["sheds"]
    expected = of_requests_s(requests, slos)
    assert [promise.value_s for promise in found] == pytest.approx(list(expected))
    assert [promise.met for promise in found] == [True, False, False, False]
    good = [Slo.parse(f"goodput_p{percent}=ttft:10s,e2el:900s") for percent in (97.5, 98)]
    found = compare([sides[0], sheds], slos=good).promises["sheds"]
    assert [promise.value_s for promise in found] == pytest.approx(list(of_requests_s(requests, good)))
    assert [promise.met for promise in found] == [True, False], "117 of 120 are good: 97.5 %"
    assert found[0].share is not None and 0.3 < found[0].share < 0.9 and found[0].slo.shown(np.inf) == "rejected"
    text = report(compare([sides[0], sheds], slos=good))
    assert "97.5 % of requests with TTFT <= 10000 ms and E2EL <= 900000 ms  98 % of" in text, "columns stay apart"


def test_few_blocks_are_said_to_be_few(sides: list[Side]) -> None:
    outcome = compare([sides[0], shifted(sides[0], 0.0)])
    assert not any("blocks of" in note for note in outcome.notes)
    drifting = sides[0].requests | {"finish_s": sides[0].requests["finish_s"] + np.linspace(0, 5, 120)}
    outcome = compare([sides[0], replace(sides[0], name="drifts", requests=drifting)])
    assert any("120 requests are only 4 blocks of 33 that depend" in note for note in outcome.notes)


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_side_and_difference(sides: list[Side]) -> None:
    outcome = compare(
        [*sides, shifted(sides[0], 0.01, "a name that is much too long for the column of names")], TARGETS
    )
    text = report(outcome)
    assert max(map(len, text.splitlines())) <= 130
    for heading in ("TTFT (ms)", "TPOT (ms)", "E2EL (ms)", "req/s", "goodput req/s", "preemptions", "cache hits (%)"):
        assert heading in text
    assert text.count("  small chunks") == 5 + 3  # a line in each of five blocks, and its shares of three latencies
    change = outcome.differences["small chunks"]["mean_ttft_ms"]
    assert change.low is not None and change.high is not None
    largest = max(map(abs, (change.value, change.low, change.high)))
    digits = 2 if largest < 100 else 1 if largest < 1000 else 0
    assert f"{change.value:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]" in text
    assert "a name that is much too long for the column of names\n" in text
    assert f"blocks of {outcome.block} consecutive arrivals" in " ".join(text.split())


def test_curves_are_the_distributions(sides: list[Side]) -> None:
    rows = curves(compare(sides))
    mine = [
        (share, value)
        for side, name, value, share in zip(*rows.values(), strict=True)
        if (side, name) == ("vllm", "ttft")
    ]
    ttft_ms = 1e3 * (sides[0].requests["first_token_s"] - sides[0].requests["arrival_s"])
    assert mine[0] == (0.0, pytest.approx(ttft_ms.min()))
    assert mine[-1] == (1.0, pytest.approx(ttft_ms.max()))
    assert dict(mine)[0.5] == pytest.approx(np.median(ttft_ms))


def test_changes_are_fractions_of_the_first(sides: list[Side]) -> None:
    outcome = compare(sides)
    rows = [dict(zip(changes(outcome), row, strict=True)) for row in zip(*changes(outcome).values(), strict=True)]
    assert len(rows) == 12
    (mean,) = [row for row in rows if (row["latency"], row["statistic"]) == ("ttft", "mean")]
    first, second = (outcome.numbers[name]["mean_ttft_ms"] for name in ("vllm", "small chunks"))
    assert first and second
    assert mean["change"] == pytest.approx(second / first - 1)
    assert mean["low"] <= mean["change"] <= mean["high"]


# ---- the command ----------------------------------------------------------------------------------------------------

MACHINE = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", "constant:0.01"]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    lines = [f"{second},64,11" for second in range(40)]
    (tmp_path / "forty.csv").write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    return "forty.csv"


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(list(args)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_one_command_compares_policies_and_settings(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--scheduler", "vllm", "--scheduler", "chunked", "--set", "max_num_batched_tokens=32,max_num_seqs=16"]
    found = json.loads(printed(capsys, "compare", trace, *MACHINE, *flags, "--json", "--goodput", "ttft:30", "tpot:50"))
    assert [side["name"] for side in found["sides"]] == ["vllm", "chunked", "max_num_batched_tokens=32,max_num_seqs=16"]
    assert [side["scenario"]["scheduler"] for side in found["sides"]] == ["vllm", "chunked", "vllm"]
    # 10 ms an iteration, one prompt each second: the first token after one iteration, or after two of 32 tokens.
    assert found["sides"][0]["numbers"]["mean_ttft_ms"] == pytest.approx(10.0)
    change = found["sides"][2]["differences"]["mean_ttft_ms"]
    assert (change["value"], change["low"], change["high"]) == pytest.approx((10.0, 10.0, 10.0))
    assert found["sides"][0]["numbers"]["slo_attainment"] == 1.0
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition("## Comparison output")[2].partition("\n## ")[0]
    side = found["sides"][2]
    for key in (*found, *side, *side["differences"]["slo_attainment"], *side["shares"]["ttft"], *found["bootstrap"]):
        assert f"`{key}`" in section or key == "summary" or f"`{key}," in section, key
    assert found["bootstrap"] == {"resamples": 1000, "block": 1, "confidence": 0.95}


def test_rows_and_runs(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    from llmsim.runs import _read_parquet

    for name, more in (("a", []), ("b", ["--max-num-batched-tokens", "32", "--max-num-seqs", "16"])):
        printed(capsys, "replay", trace, *MACHINE, *more, "--out", name, "--goodput", "ttft:15")
    by_runs = json.loads(printed(capsys, "compare", "a", "b", "--json"))
    flags = ["--scheduler", "vllm", "--set", "max_num_batched_tokens=32,max_num_seqs=16", "--goodput", "ttft:15"]
    assert "Written: both" in printed(capsys, "compare", trace, *MACHINE, *flags, "--out", "both")
    by_trace = json.loads(Path("both/comparison.json").read_text())
    for one, other in zip(by_runs["sides"], by_trace["sides"], strict=True):
        assert one["numbers"] == pytest.approx(other["numbers"])
        assert one["differences"] == other["differences"]
    rows = _read_parquet(Path("both/requests.parquet"))
    assert len(rows["id"]) == 40
    assert rows["ttft_s[vllm]"] == pytest.approx(np.full(40, 0.01))
    assert rows["ttft_s[max_num_batched_tokens=32,max_num_seqs=16]"] == pytest.approx(np.full(40, 0.02))
    manifest = json.loads(Path("both/manifest.json").read_text())
    assert manifest["trace"]["requests"] == 40
    assert set(manifest["files"]) == {"requests.parquet", "comparison.json"}
    assert list(manifest["sides"]) == ["vllm", "max_num_batched_tokens=32,max_num_seqs=16"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["TRACE", *MACHINE], ["one side to compare", "--scheduler NAME", "--set FIELD=VALUE"]),
        (["TRACE", *MACHINE, "--scheduler", "vllm", "--scheduler", "vllm"], ["--scheduler vllm is given twice"]),
        (["TRACE", *MACHINE, "--set", "max_num_seqs"], ["--set max_num_seqs", "write FIELD=VALUE"]),
        (["TRACE", *MACHINE, "--set", "max_num_sqs=3"], ["unknown field 'max_num_sqs'", "'max_num_seqs'"]),
        (["TRACE", *MACHINE, "--set", "max_num_seqs=many"], ["'many'"]),
        (["TRACE", *MACHINE, "--set", "nothing.x=3"], ["unknown field 'nothing_args'"]),
        (["TRACE", *MACHINE, "--set", "scheduler=fastest"], ["unknown scheduler 'fastest'"]),
        (["TRACE", "other.csv", *MACHINE], ["TRACE: not a run folder"]),
        (["TRACE", *MACHINE, "--set", "seed=1", "--plot", "x.pdf"], ["plot=x.pdf"]),
        (
            ["TRACE", *MACHINE, "--scheduler", "vllm", "--scheduler", "chunked", "--scheduler-arg", "headroom=0.1"],
            ["scheduler_args={'headroom': 0.1} and 2 schedulers", "--set scheduler=NAME,scheduler.headroom=0.1"],
        ),
        (["TRACE", "--set", "seed=1"], ["no model: add --model NAME"]),
        (["TRACE", *MACHINE, "--engine", "orca", "--engine", "orca"], ["--engine orca is given twice"]),
        (
            ["TRACE", *MACHINE, "--engine", "vllm", "--engine", "sglang", "--scheduler", "sjf"],
            ["an engine brings its own scheduler", "--set engine=sglang,scheduler=sjf"],
        ),
        (
            ["TRACE", *MACHINE, "--engine", "vllm", "--engine", "orca", "--enable-prefix-caching"],
            ["enable_prefix_caching=True: the engine orca has none"],
        ),
        (["TRACE", *MACHINE, "--set", 'speculative_config={"method": "ngram"'], ["a bracket or a quote is not closed"]),
        (["TRACE", *MACHINE, "--set", "speculative_config=ngram"], ["speculative_config=ngram: not JSON"]),
        (["TRACE", *MACHINE, "--set", "seed=1", "--slo", "ttft=500ms"], ["slo 'ttft=500ms'", "ttft_p99=500ms"]),
        (["TRACE", *MACHINE, "--set", "seed=1", "--slo", "itl_p99.9=1s"], ["slo itl_p99.9=1000ms", "p90, p95, p99"]),
        (["TRACE", *MACHINE, "--set", "seed=1", "--md", "--json"], ["--json and --md"]),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    args: list[str], parts: list[str], trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "compare", *(arg.replace("TRACE", trace) for arg in args))
    for part in parts:
        assert part.replace("TRACE", trace) in line


def test_run_folders_are_compared_as_they_are(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        printed(capsys, "replay", trace, *MACHINE, "--out", name)
    assert "--set seed=1: run folders are compared as they are" in refused(
        capsys, "compare", "a", "b", "--set", "seed=1"
    )
    assert "--seeds 3: run folders" in refused(capsys, "compare", "a", "b", "--seeds", "3")
    assert "--engine orca: run folders" in refused(capsys, "compare", "a", "b", "--engine", "orca")
    assert "--limit: run folders" in refused(capsys, "compare", "a", "b", "--limit", "3")
    assert "a is given twice" in refused(capsys, "compare", "a", "a")


def test_arguments_of_a_variant_go_to_its_policy() -> None:
    fields = {"scheduler": "chunked", "scheduler_args": {"headroom": 0.1}, "max_num_seqs": 8}
    assert changed(fields, "scheduler.headroom=0.2")["scheduler_args"] == {"headroom": 0.2}
    assert changed(fields, "scheduler=vllm") == {"scheduler": "vllm", "max_num_seqs": 8}
    assert changed(fields, "scheduler=mine.py:A, scheduler.levels=[1]")["scheduler_args"] == {"levels": [1]}
    assert changed(fields, "max-model-len=32k, async_scheduling=False,quantization=none") == fields | {
        "max_model_len": 32000, "async_scheduling": False, "quantization": None,
    }  # fmt: skip
    assert fields["scheduler_args"] == {"headroom": 0.1}
    assert changed(fields, "engine=sglang") == {"engine": "sglang", "max_num_seqs": 8}
    table = 'speculative_config={"method": "ngram", "acceptance": [0.7, 0.5]},max_num_seqs=4'
    assert changed(fields, table) == fields | {
        "speculative_config": {"method": "ngram", "acceptance": [0.7, 0.5]}, "max_num_seqs": 4,
    }  # fmt: skip
    assert changed({}, 'scheduler.a="x,y}",scheduler.b=2') == {"scheduler_args": {"a": "x,y}", "b": 2}}


def test_every_engine_given_is_a_side(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*MACHINE, "--engine", "vllm", "--engine", "orca", "--set", "max_num_seqs=16", "--json"]
    sides = json.loads(printed(capsys, "compare", trace, *flags))["sides"]
    assert [side["name"] for side in sides] == ["vllm", "orca", "max_num_seqs=16"]
    assert [side["scenario"]["engine"] for side in sides] == ["vllm", "orca", "vllm"]
    assert [side["scenario"]["scheduler"] for side in sides] == ["vllm", "orca", "vllm"]
    one = json.loads(printed(capsys, "compare", trace, *MACHINE, "--engine", "orca", "--set", "seed=5", "--json"))
    assert [side["scenario"]["engine"] for side in one["sides"]] == ["orca", "orca"]


def test_seeds_redraw_what_is_drawn(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Launch times, and the classes that a trace without any is given: other seeds have other ones."""
    machine = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--assign-classes", "a:0.5:ttft=1s;b:0.5:ttft=9s"]
    flags = [*machine, "--set", "max_num_batched_tokens=32,max_num_seqs=16", "--seeds", "3", "--jobs", "2", "--json"]
    found = json.loads(printed(capsys, "compare", trace, *flags))
    assert found["seeds"] == [0, 1000, 2000]
    alone = [
        json.loads(printed(capsys, "replay", trace, *machine, "--no-out", "--json", "--seed", str(seed)))
        for seed in found["seeds"]
    ]
    assert len({run["mean_ttft_ms"] for run in alone}) == 3
    assert len({json.dumps(run["classes"]["a"]["requests"]) for run in alone}) > 1
    mean = sum(run["mean_ttft_ms"] for run in alone) / 3
    assert found["sides"][0]["numbers"]["mean_ttft_ms"] == pytest.approx(mean)


def test_a_table_for_pull_requests(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*MACHINE, "--set", "max_num_batched_tokens=32,max_num_seqs=16", "--slo", "ttft_p99=15ms", "--md"]
    lines = printed(capsys, "compare", trace, *flags).splitlines()
    assert lines[:2] == ["|  | vllm | `max_num_batched_tokens=32,max_num_seqs=16` |", "| --- | ---: | ---: |"]
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in lines[2:] if line.startswith("|"))}
    assert rows["TTFT mean"] == [" 10.0 ms ", " 20.0 ms **(+10.0 [+10.0, +10.0])** ▼ "]
    assert rows["TPOT p50"] == [" 10.00 ms ", " 10.00 ms (0) "]
    assert rows["TTFT p99 <= 15 ms"] == [" ✓ 10.00 ms, 100% ", " ✗ 20.00 ms, 0% "]
    assert all(line.count("|") == 4 for line in lines[: len(rows) + 2])


def test_policies_of_files_are_called_by_their_class(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.py", "y.py"):
        Path(name).write_text("from llmsim.schedulers.chunked import Chunked\n\n\nclass Mine(Chunked):\n    pass\n")

    def names(*specs: str) -> list[str]:
        flags = [word for spec in specs for word in ("--scheduler", spec)]
        found = json.loads(printed(capsys, "compare", trace, *MACHINE, *flags, "--json"))
        return [side["name"] for side in found["sides"]]

    assert names("x.py:Mine", "vllm") == ["Mine", "vllm"]
    assert names("x.py:Mine", "y.py:Mine") == ["x.py:Mine", "y.py:Mine"]


def test_pictures(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    require("altair")
    require("vl_convert")
    flags = ["--set", "max_num_batched_tokens=32,max_num_seqs=16", "--goodput", "ttft:15"]
    for path, begins in (("x.svg", b"<svg "), ("x.png", b"\x89PNG")):
        assert f"Written: {path}" in printed(capsys, "compare", trace, *MACHINE, *flags, "--plot", path)
        assert Path(path).read_bytes().lstrip().startswith(begins)
    text = Path("x.svg").read_text()
    for part in ("share of requests", "TTFT (ms)", "TPOT: difference to vllm", "40 requests, the same for every side"):
        assert part in text


@pytest.mark.parametrize(("requests", "drawn"), [(1, False), (9, False), (10, True)])
def test_of_few_requests_nothing_is_certain(
    requests: int, drawn: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{at},100,10\n" for at in range(requests))
    Path("few.csv").write_text("arrival_time_s,prompt_tokens,output_tokens\n" + rows)
    text = printed(capsys, "compare", "few.csv", *MACHINE, "--set", "max_num_seqs=4", "--slo", "ttft_p99=1s")
    assert (" [95 % interval]" in text) == drawn
    assert ("there are no intervals: replay 10 or more" in text) != drawn
    assert (", 100%" in text) == drawn  # the share of draws that keep the promise
    assert f"{requests} request{'s' * (requests != 1)}, the same for every side" in text
    marked = printed(capsys, "compare", "few.csv", *MACHINE, "--set", "max_num_seqs=4", "--md")
    assert ("95 % interval" in marked) == drawn
    assert "1 requests" not in text + marked


@pytest.mark.parametrize(("change_s", "higher"), [(4e-6, 0.0), (6e-6, 1.0)])
def test_a_difference_that_is_printed_as_zero_is_neither_lower_nor_higher(
    sides: list[Side], change_s: float, higher: float
) -> None:
    """0.005 ms, half of the last digit, is where a difference begins."""
    assert compare([sides[0], shifted(sides[0], change_s)]).shares["shifted"]["ttft"] == (0.0, higher)


def test_who_turned_everybody_away_is_named(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("deny.py").write_text("class Deny:\n    def admit(self, request, replica, now_s):\n        return False\n")
    assert cli.main(["compare", trace, *MACHINE, "--set", "admission=deny.py:Deny"]) == 2
    told = capsys.readouterr().err
    assert "requests are turned away by admission=deny.py:Deny: give one that admits some" in told
    assert "KV blocks" not in told


def test_none_is_a_value_where_it_is_a_name() -> None:
    fields = {"model": "llama-3.1-8b", "gpu": "h100-sxm", "admission": "queue-depth"}
    made = sides_of(fields, (), ["admission=none", "quantization=none,kv_tiers=none"])
    assert made["admission=none"].admission == "none"
    assert made["quantization=none,kv_tiers=none"].quantization is None
    for text, said in (
        ("max_num_seqs=", "--set max_num_seqs=: no value"),
        ("max_num_seqs=x", "--set max_num_seqs=x: 'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            sides_of(fields, (), [text])
