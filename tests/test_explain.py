"""Explanations: a request's path is whole, observing changes nothing, and reasons are those that were planted."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from test_conservation import POLICIES, trace_of
from test_twin import HOSTS, SteppedCost

from llmsim import cli
from llmsim.cost.graphs import Graphs
from llmsim.explain import SPAN_COLUMNS, by_cause, explain, missing, spans, worst
from llmsim.explain_life import Life, life_of
from llmsim.explain_prices import Prices
from llmsim.explain_record import Recorder
from llmsim.metrics import Result, breakdown_s, latencies_s
from llmsim.replica import Replica
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet, simulate
from llmsim.trace import Trace

ROUNDING_S = 1e-9
MORE_POLICIES: list[dict[str, Any]] = [
    *POLICIES,
    {"scheduler": "vllm", "preemption": "swap", "swap_space_gib": 0.05},
    {"scheduler": "vllm", "preemption": "pause"},
    {"scheduler": "sjf"},
    {"scheduler": "srtf"},
    {"scheduler": "mlfq"},
    {"scheduler": "mlfq", "swap_space_gib": 0.05},
    {"scheduler": "vtc"},
    {"scheduler": "edf"},
    {"scheduler": "sglang"},
    {"scheduler": "tensorrt-llm"},
    {"scheduler": "slo-chunk"},
    {"engine": "sglang"},
    {"scheduler": "vllm", "enable_prefix_caching": True, "kv_tiers": "cpu:1GiB:2GB/s:10us"},
]


def explained(trace: Trace, scenario: Scenario, cost: Any = None) -> tuple[Result, list[Life]]:
    recorders: list[Recorder] = []

    def observer(index: int) -> Recorder:
        recorders.append(Recorder(range(len(trace))))
        return recorders[index]

    result = simulate(trace, scenario, cost=cost, observer=observer)
    prices = [Prices(recorder, result.cost) for recorder in recorders]
    replicas, done = result.requests["replica"], np.flatnonzero(result.finished)
    return result, [life_of(int(i), result.requests, prices[replicas[i]]) for i in done]


def check_whole(result: Result, lives: list[Life]) -> None:
    """Spans follow one another from send to last token; their phases are the metrics'; parts add up to each span."""
    parts = breakdown_s(result.requests)
    for life in lives:
        at_s, phases = life.facts["arrival_s"], dict.fromkeys(parts, 0.0)
        for span in life.spans:
            assert span.start_s == at_s < span.end_s, (life.request, span)
            at_s = span.end_s
            phases[span.phase] += span.length_s
            if span.divided:
                pieces = (span.own_s, span.decodes_s, span.prompts_s, span.host_s)
                assert min(pieces) >= 0.0, span
                assert sum(pieces) == pytest.approx(span.length_s, abs=ROUNDING_S)
        assert at_s == life.facts["finish_s"], life.request
        lengths = [Fraction(span.end_s) - Fraction(span.start_s) for span in life.spans]
        assert sum(lengths) == Fraction(life.facts["finish_s"]) - Fraction(life.facts["arrival_s"]), "exactly"
        for phase, seconds in phases.items():
            assert seconds == pytest.approx(parts[phase][life.request], abs=ROUNDING_S), (life.request, phase)


def check_same(one: Result, other: Result) -> None:
    for table in ("requests", "iterations", "gaps"):
        for name, column in getattr(one, table).items():
            assert column.tobytes() == getattr(other, table)[name].tobytes(), (table, name)


def drawn(random: Random, policy: dict[str, Any]) -> tuple[Trace, Scenario, Any]:
    """A trace of bursts, a scenario of that policy, and what makes its cost model."""
    rows = [
        (random.choice([0.0, 0.0, 0.001, 0.01, 0.05, 1.0]), random.randint(1, 600), random.randint(1, 120),
         random.randrange(3), random.randrange(11))
        for _ in range(random.randint(1, 60))
    ]  # fmt: skip
    shared, seqs, replicas = random.random() < 0.5, random.choice([3, 64]), random.choice([1, 1, 2])
    longest = max(-(-(prompt + output) // 16) for _, prompt, output, _, _ in rows)
    blocks = longest + 1 + random.choice([1, 5, 30, 30, 5000])
    own = {} if "engine" in policy else {"enable_prefix_caching": shared, "async_scheduling": random.random() < 0.7}
    scenario = Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", num_gpu_blocks_override=blocks * (16 if "engine" in policy else 1),
        max_num_seqs=seqs, max_num_batched_tokens=300, replicas=replicas,
        concurrency=random.choice([None, None, 4]), router="least_outstanding" if replicas > 1 else "round_robin",
        **(own | policy),
    )  # fmt: skip
    host = HOSTS[random.choice(sorted(HOSTS))]
    return trace_of(rows, shared), scenario, lambda: SteppedCost(host, Graphs.of_engine(seqs, 300), 1.0)


@pytest.mark.parametrize("policy", MORE_POLICIES, ids=str)
def test_a_path_is_whole_and_looking_changes_nothing(policy: dict[str, Any]) -> None:
    for seed in range(8):
        trace, scenario, cost = drawn(Random(f"{policy} {seed}"), policy)
        result, lives = explained(trace, scenario, cost())
        check_same(simulate(trace, scenario, cost=cost()), result)
        check_whole(result, lives)


SPECULATIONS = [
    {"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7},
    {"method": "ngram", "num_speculative_tokens": 4, "acceptance": 0.4},
    {"method": "draft_model", "model": "llama-3.2-1b", "num_speculative_tokens": 2, "acceptance": 0.9},
]


@pytest.mark.parametrize("config", SPECULATIONS, ids=lambda config: config["method"])
def test_a_path_of_an_engine_that_speculates_is_whole_too(config: dict[str, Any]) -> None:
    """Several tokens an iteration, drafts that cost time of their own: it adds up, and looking changes nothing."""
    for seed in range(4):
        trace, scenario, _ = drawn(Random(f"{config} {seed}"), {"speculative_config": config})
        result, lives = explained(trace, scenario)
        check_same(simulate(trace, scenario), result)
        check_whole(result, lives)


# ---- causes that were planted ---------------------------------------------------------------------------------------


STEP_S = 0.01
PLAIN = Scenario(
    model="llama-3.1-8b", gpu="h100-sxm", cost=f"constant:{STEP_S}", async_scheduling=False, max_num_batched_tokens=512,
    max_num_seqs=8, enable_prefix_caching=False,
)  # fmt: skip


def a_trace(*requests: tuple[float, int, int]) -> Trace:
    arrival_s, prompt, output = (np.array(column) for column in zip(*requests, strict=True))
    return Trace("made", arrival_s.astype(float), prompt, output)


def waits(life: Life) -> dict[str, float]:
    """Seconds in the queue by reason."""
    return {span.reason: span.length_s for span in life.spans if span.kind == "queue"}


def test_a_request_waits_for_a_slot() -> None:
    _, (first, second) = explained(a_trace((0.0, 100, 5), (0.0, 100, 5)), replace(PLAIN, max_num_seqs=1))
    assert waits(first) == {}
    assert waits(second) == {"seqs": pytest.approx(5 * STEP_S)}, "five iterations of the first one"
    assert [span.kind for span in second.spans] == ["queue", "prefill", "decode"]
    assert second.parts_s()["decode.decode.own"] == pytest.approx(4 * STEP_S)


def test_a_request_waits_for_tokens_of_the_iteration() -> None:
    """1,200 tokens take three iterations of 512, the third of which has room for 336 of the second prompt."""
    _, (first, second) = explained(a_trace((0.0, 1200, 1), (0.0, 400, 1)), PLAIN)
    assert waits(second) == {"tokens": pytest.approx(2 * STEP_S)}
    prompts = [span for span in second.spans if span.kind == "prefill"]
    assert len(prompts) == 1 and prompts[0].iterations == 2
    assert prompts[0].prompt_tokens == 1200 - 2 * 512
    assert first.parts_s()["prefill.prefill.own"] == pytest.approx(3 * STEP_S)


def test_a_request_waits_for_kv_blocks() -> None:
    """20 blocks of 16 tokens: 160 + 40 tokens take 13 of them, and another such prompt needs 10."""
    trace = a_trace((0.0, 160, 40), (0.0, 160, 40))
    _, (_, second) = explained(trace, replace(PLAIN, num_gpu_blocks_override=20))
    (wait,) = [span for span in second.spans if span.kind == "queue"]
    assert wait.reason == "kv" and wait.length_s == pytest.approx(40 * STEP_S)
    assert wait.who == 1 and wait.blocks == (9, 10)


def test_a_request_waits_because_shorter_ones_that_came_later_go_first() -> None:
    trace = a_trace((0.0, 100, 10), (0.001, 400, 30), (0.002, 100, 5), (0.003, 100, 5))
    result, lives = explained(trace, replace(PLAIN, scheduler="sjf", max_num_seqs=1))
    # 9 iterations of the first, 5 of the next, 1 that admits the last: then it stands at the head itself
    assert waits(lives[1]) == {"order": pytest.approx(15 * STEP_S), "seqs": pytest.approx(4 * STEP_S)}
    assert waits(lives[2]).keys() == {"seqs"}
    assert result.requests["finish_s"][1] == result.requests["finish_s"].max()


def test_a_request_waits_for_a_batch_under_way() -> None:
    scenario = replace(PLAIN, scheduler="static", scheduler_args={"batch_size": 2, "timeout_s": 0.0})
    _, lives = explained(a_trace((0.0, 100, 10), (0.001, 100, 5)), scenario)
    assert set(waits(lives[1])) == {"policy"}


def test_who_is_preempted_for_whom() -> None:
    """18 blocks are full with 137 + 129 tokens: eight tokens later the older one needs its tenth, the newer leaves."""
    trace = a_trace((0.0, 88, 96), (0.0, 80, 96))
    result, (first, second) = explained(trace, replace(PLAIN, num_gpu_blocks_override=19))
    assert result.requests["preemptions"].tolist() == [0, 1]
    assert second.preempted_for == (0,)
    assert not first.preempted_for
    kinds = [(span.phase, span.kind) for span in second.spans]
    assert kinds[-3:] == [("preempted", "queue"), ("preempted", "recompute"), ("decode", "decode")]
    wait = second.spans[-3]
    assert wait.reason == "kv" and wait.preemptions == 1
    _, (_, alone) = explained(trace, replace(PLAIN, num_gpu_blocks_override=20))
    assert alone.preempted_for == (-1,), "of 19 blocks it is the newer one that finds none for its own token"


def test_an_iteration_is_divided_by_what_each_part_adds() -> None:
    """Two decodes beside a chunk: priced by hand with the cost model of the twin, no host."""
    cost = SteppedCost(HOSTS["none"], Graphs.of_engine(8, 512), 1.0)
    trace = a_trace((0.0, 64, 4), (0.0, 64, 4), (0.0005, 1000, 1))
    _, lives = explained(trace, replace(PLAIN, max_num_batched_tokens=300), cost)
    alone, both = (cost.decode_ramp(n, n * 64).first_s for n in (1, 2))
    whole = cost.mixed_s([(298, 0)], 2, 128)
    parts = next(span for span in lives[0].spans if span.kind == "decode")
    assert parts.iterations == 3 and parts.prompt_tokens == 298 * 3
    chunked = [cost.mixed_s([(298, 298 * i)], 2, 128 + 2 * i) for i in range(3)]
    singles = [cost.decode_ramp(1, 64 + i).first_s for i in range(3)]
    doubles = [cost.decode_ramp(2, 128 + 2 * i).first_s for i in range(3)]
    assert (singles[0], doubles[0], chunked[0]) == (alone, both, whole)
    assert parts.own_s == pytest.approx(sum(singles))
    assert parts.decodes_s == pytest.approx(sum(doubles) - sum(singles))
    assert parts.prompts_s == pytest.approx(sum(chunked) - sum(doubles))
    assert parts.host_s == pytest.approx(0.0, abs=ROUNDING_S)


def test_a_wait_for_the_next_schedule_is_what_the_gpu_computes_meanwhile() -> None:
    """At 4 ms the first prompt's iteration is under way until 10 ms, at 24 ms the third until 30 ms: a decode."""
    _, (_, second, third) = explained(a_trace((0.0, 100, 9), (0.004, 100, 1), (0.024, 100, 1)), PLAIN)
    (wait,) = [span for span in second.spans if span.kind == "schedule"]
    assert (wait.prompts_s, wait.decodes_s, wait.host_s) == pytest.approx((0.006, 0.0, 0.0), abs=ROUNDING_S)
    (wait,) = [span for span in third.spans if span.kind == "schedule"]
    assert (wait.prompts_s, wait.decodes_s, wait.host_s) == pytest.approx((0.0, 0.006, 0.0), abs=ROUNDING_S)
    causes_s = {cause: seconds for cause, seconds in by_cause(second.parts_s("ttft")).items() if seconds}
    assert causes_s == pytest.approx({"prefill": STEP_S, "prompts": 0.006})


def test_first_come_first_served_is_never_a_matter_of_order() -> None:
    for seed in range(20):
        policy = {"scheduler": "vllm", "reserve_full_isl": bool(seed % 2)}
        trace, scenario, cost = drawn(Random(seed), policy)
        _, lives = explained(trace, scenario, cost())
        reasons = {span.reason for life in lives for span in life.spans if span.phase == "queue"}
        assert "order" not in reasons


def test_a_plain_replay_is_not_observed() -> None:
    fleet = Fleet(a_trace((0.0, 100, 5)), PLAIN)
    assert [type(replica) for replica in fleet.replicas] == [Replica]


# ---- tails and knobs ------------------------------------------------------------------------------------------------


def test_the_change_that_helps_is_found_by_replaying_it() -> None:
    trace = a_trace(*((0.05 * i, 100, 20) for i in range(40)))
    scenario = replace(PLAIN, max_num_seqs=1)
    found = explain(trace, scenario, worst(5))
    latency_s = latencies_s(simulate(trace, scenario).requests)["e2el"]
    slowest = np.argsort(-latency_s, kind="stable")[:5]
    assert found.tail.ids == tuple(slowest)
    assert found.latency_s == pytest.approx(latency_s[slowest])
    assert next(iter(found.causes_s)) == "seqs"
    assert sum(found.parts_s.values()) == pytest.approx(latency_s[slowest].mean())
    knobs = {knob.name: knob for knob in found.knobs}
    assert {"seqs-double", "replica-more"} <= knobs.keys()
    for knob in found.knobs:
        again = latencies_s(simulate(trace, replace(scenario, **knob.fields)).requests)["e2el"]
        assert knob.after_s == again[slowest].mean(), knob.name
        assert knob.before_s == pytest.approx(latency_s[slowest].mean())
    assert found.best is not None and found.best.after_s == min(knob.after_s for knob in found.knobs)
    assert knobs["seqs-double"].helps and knobs["seqs-double"].gpus == 1
    assert knobs["replica-more"].more_gpus == 1


def test_a_tail_of_first_tokens_leaves_decodes_out() -> None:
    trace = a_trace(*((0.05 * i, 100, 20) for i in range(40)))
    found = explain(trace, replace(PLAIN, max_num_seqs=1), missing("ttft", 2.0), knobs=False)
    ttft_s = latencies_s(simulate(trace, replace(PLAIN, max_num_seqs=1)).requests)["ttft"]
    assert set(found.tail.ids) == set(np.flatnonzero(ttft_s > 2.0))
    assert sum(found.parts_s.values()) == pytest.approx(ttft_s[ttft_s > 2.0].mean())
    assert not any(part.startswith("decode") for part in found.parts_s)


def test_a_long_tail_is_thinned_out_evenly_and_says_so() -> None:
    requests = {name: np.zeros(1200) for name in ("arrival_s", "first_token_s", "finish_s")}
    requests |= {"id": np.arange(1200), "output_tokens": np.full(1200, 2)}
    requests["first_token_s"] = requests["finish_s"] = 1.0 + np.arange(1200)
    tail = missing("ttft", 0.5)(requests)
    assert (tail.missed, len(tail.ids), tail.ids[0], tail.ids[-1]) == (1200, 500, 1199, 0)
    assert "500 of them, evenly" in tail.words


def test_spans_are_a_frame() -> None:
    trace = a_trace((0.0, 100, 5), (0.0, 100, 5))
    frame = spans(trace, replace(PLAIN, max_num_seqs=1), [1])
    assert list(frame.columns) == list(SPAN_COLUMNS)
    assert frame["kind"].tolist() == ["queue", "prefill", "decode"]
    assert frame["end_s"].tolist()[:-1] == frame["start_s"].tolist()[1:]


# ---- the command ----------------------------------------------------------------------------------------------------


FLAGS = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--cost", f"constant:{STEP_S}", "--max-num-seqs", "1"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    rows = "\n".join(f"{0.05 * i:.2f},100,20" for i in range(30))
    path = tmp_path / "made.csv"
    path.write_text(f"arrival_time_s,prompt_tokens,output_tokens\n{rows}\n", encoding="utf-8")
    return path


def test_a_run_is_explained_as_its_trace_is(csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["replay", str(csv), *FLAGS, "--out", str(run), "--goodput", "ttft:3000"]) == cli.OK
    capsys.readouterr()
    assert cli.main(["explain", str(run), "--request", "29"]) == cli.OK
    of_run = capsys.readouterr().out
    assert cli.main(["explain", str(csv), *FLAGS, "--request", "29"]) == cli.OK
    assert capsys.readouterr().out == of_run
    assert "Request 29: 100 prompt + 20 output tokens" in of_run
    assert "max_num_seqs reached" in of_run and "Helps most:" in of_run
    assert cli.main(["explain", str(run), "--slo", "ttft", "--no-knobs", "--json"]) == cli.OK
    document = json.loads(capsys.readouterr().out)
    assert document["tail"]["limit_s"] == 3.0, "the run's own goodput target"
    for one in document["requests"]:
        assert one["spans"][0]["start_s"] == one["arrival_s"] and one["spans"][-1]["end_s"] == one["finish_s"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--request", "30"], "request 30: the trace has requests 0 to 29"),
        (["--request", "1", "--worst", "3"], "--request 1 and --worst 3: give one of them"),
        (["--slo", "itl=5ms"], "'itl' is not a latency of a request"),
        (["--slo", "ttft=500"], "write METRIC=LIMIT with its unit"),
        (["--slo", "ttft=500s"], "no request is above 500000 ms"),
        (["--request", "1", "--by", "ttft"], "--by ttft: says what --worst goes by"),
        (["--out", "spans.txt"], "written as .parquet or .csv"),
    ],
)
def test_what_cannot_be_explained_is_one_line(
    words: list[str], says: str, csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", str(csv), *FLAGS, "--no-knobs", *words]) == cli.WRONG_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error


def test_a_run_that_speculates_is_explained(csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["--speculative-config", '{"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}']
    assert cli.main(["replay", str(csv), *FLAGS[:4], "--max-num-seqs", "1", *words, "--out", str(run)]) == cli.OK
    capsys.readouterr()
    assert cli.main(["explain", str(run), "--request", "29", "--json"]) == cli.OK
    document = json.loads(capsys.readouterr().out)
    (one,) = document["requests"]
    assert one["spans"][-1]["end_s"] == one["finish_s"] and document["knobs"]


def test_a_folder_that_is_no_run_is_not_taken_for_a_trace(
    csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, *words: str) -> str:
        assert cli.main(["explain", str(path), *words]) == cli.WRONG_INPUT
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and "give a RUN folder that 'llmsim replay' wrote, or a TRACE" in error
        return error

    assert refused(tmp_path).startswith(f"error: {tmp_path}: not a run folder (no manifest.json)")
    assert refused(tmp_path / "gone").startswith(f"error: {tmp_path / 'gone'}: no such file or folder")
    run = tmp_path / "run"
    assert cli.main(["replay", str(csv), *FLAGS, "--out", str(run)]) == cli.OK
    (run / "manifest.json").unlink()
    capsys.readouterr()
    for words in ([], FLAGS):  # also with a model: a run's own tables are no trace
        said = refused(run, *words)
        assert "has summary.json, requests.parquet and iterations.parquet and no manifest.json" in said


def test_a_run_whose_trace_or_numbers_changed_is_refused(
    csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["replay", str(csv), *FLAGS, "--out", str(run)]) == cli.OK
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["scenario"]["max_num_seqs"] = 2
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert cli.main(["explain", str(run)]) == cli.WRONG_INPUT
    assert "had other numbers" in capsys.readouterr().err
    csv.write_text(csv.read_text(encoding="utf-8") + "9,100,20\n", encoding="utf-8")
    assert cli.main(["explain", str(run)]) == cli.WRONG_INPUT
    assert "has changed: SHA-256" in capsys.readouterr().err
