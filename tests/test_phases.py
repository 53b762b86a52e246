"""`llmsim phases`: its numbers against hand arithmetic, its crossing points against their equations, its bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsim import cli
from llmsim.cost import EAGER, FULL, Host, Ramp
from llmsim.hardware import find_gpu, find_model
from llmsim.phases import (
    Engine,
    Phases,
    Point,
    _Noted,
    attention_half_tokens,
    compare,
    decode_point,
    prefill_point,
    textbook,
)
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

ROOT = Path(__file__).parents[1]
LLAMA, H200 = find_model("llama-3.1-8b"), find_gpu("h200-sxm")
MACHINE = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
ARGUMENTS = ["phases", "--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--cost", "constant:0.01"]
PER_TOKEN = 2 * (LLAMA.linear_params + LLAMA.lm_head_params)  # FLOPs of a decode's linear layers
PER_PAIR = 4 * 32 * 32 * 128  # layers, heads, head size
KV_BYTES = 2 * 32 * 8 * 128 * 2  # key and value, layers, KV heads, head size, bytes
WEIGHT_BYTES = 2 * (LLAMA.linear_params + LLAMA.lm_head_params)


class Made:
    """GPU seconds with every part known: base + row * rows + pair * pairs + cached * cached tokens."""

    kind, label = "made", "made for a test"

    def __init__(self, *, base: float, row: float, pair: float, cached: float, host: Host | None = None) -> None:
        self.base, self.row, self.pair, self.cached = base, row, pair, cached
        self.host = host or Host()

    def mode(self, tokens: int, chunks: int) -> int:
        return EAGER if chunks else FULL

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        return Ramp(self.base + self.row * seqs + self.cached * kv_tokens, self.cached * seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: int) -> float:
        rows = seqs + sum(new for new, _ in chunks)
        pairs = sum(new * done + new * (new + 1) / 2 for new, done in chunks)
        return self.base + self.row * rows + self.pair * pairs + self.cached * kv_tokens

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        return iterations["seqs"] + iterations["prefill_tokens"] > 5000


def made(**changes: Any) -> Made:
    return Made(**{"base": 3e-3, "row": 20e-6, "pair": 1e-9, "cached": 30e-9, **changes})


def by_size(outcome: Phases, phase: str) -> dict[int, Point]:
    return {point.size: point for point in outcome.points if point.phase == phase}


# ---- numbers by hand ------------------------------------------------------------------------------------------------


def test_a_prefill_by_hand() -> None:
    point = by_size(compare(replace(MACHINE, cost="constant:0.01")), "prefill")[1024]
    pairs = 1024 * 1025 / 2
    flops = 2 * (LLAMA.linear_params * 1024 + LLAMA.lm_head_params) + PER_PAIR * pairs
    moved = WEIGHT_BYTES + 1024 * KV_BYTES
    assert point.flops_per_token == pytest.approx(flops / 1024)
    assert point.bytes_per_token == pytest.approx(moved / 1024)
    assert point.intensity_flops_per_byte == pytest.approx(flops / moved)
    assert (point.parallel_tokens, point.context_tokens, point.binds) == (1024, 0, "compute")
    assert point.bound_ratio == pytest.approx((flops / 989.4e12) / (moved / 4.8e12))
    assert (point.gpu_s, point.wall_s, point.paced_by) == (pytest.approx(0.01), pytest.approx(0.01), "GPU")
    assert point.mfu == pytest.approx(flops / 0.01 / 989.4e12)
    assert point.mbu == pytest.approx(moved / 0.01 / 4.8e12)
    assert point.flops_per_s == pytest.approx(flops / 0.01)
    assert point.tokens_per_s == pytest.approx(102_400)
    assert point.attention_share == 0


def test_a_long_prefill_goes_in_chunks() -> None:
    point = by_size(compare(replace(MACHINE, cost="constant:0.01")), "prefill")[32768]
    assert (point.parallel_tokens, point.gpu_s, point.wall_s) == (8192, pytest.approx(0.04), pytest.approx(0.04))
    chunked = compare(replace(MACHINE, cost="constant:0.01", max_num_batched_tokens=2048))
    assert by_size(chunked, "prefill")[8192].gpu_s == pytest.approx(0.04)
    capped = compare(replace(MACHINE, cost="constant:0.01", long_prefill_token_threshold=1024))
    assert by_size(capped, "prefill")[8192].gpu_s == pytest.approx(0.08)
    assert capped.growth.chunk_tokens == 1024


def test_a_decode_by_hand() -> None:
    outcome = compare(replace(MACHINE, cost="constant:0.01"), prompt_tokens=1000, output_tokens=200)
    point = by_size(outcome, "decode")[8]
    assert point.context_tokens == 1100
    flops, moved = 8 * (PER_TOKEN + PER_PAIR * 1101), WEIGHT_BYTES + 8 * KV_BYTES * 1102  # itself read and written
    assert point.flops_per_token == pytest.approx(flops / 8)
    assert point.bytes_per_token == pytest.approx(moved / 8)
    assert point.mfu == pytest.approx(flops / 0.01 / 989.4e12)
    assert (point.parallel_tokens, point.binds, point.tokens_per_s) == (1, "memory", pytest.approx(800))


def test_numbers_are_those_of_one_gpu() -> None:
    one, two = (compare(replace(MACHINE, cost="roofline", tensor_parallel=tp)) for tp in (1, 2))
    for alone, shared in zip(one.points[:3], two.points[:3], strict=True):
        assert shared.flops_per_token == pytest.approx(alone.flops_per_token / 2)
        assert shared.bytes_per_token == pytest.approx(alone.bytes_per_token / 2, rel=1e-6)
        assert shared.gpu_s < alone.gpu_s


@pytest.mark.parametrize("cost", ["auto", "roofline"])
def test_rates_and_bounds_agree_with_each_other(cost: str) -> None:
    outcome = compare(replace(MACHINE, cost=cost))
    assert outcome.ridge_flops_per_byte == pytest.approx(989.4e12 / 4.8e12)
    for point in outcome.points:
        assert point.flops_per_s == pytest.approx(point.mfu * outcome.peak_flops_per_s)
        assert point.bytes_per_s == pytest.approx(point.mbu * outcome.peak_bytes_per_s)
        assert point.mfu / point.mbu == pytest.approx(point.intensity_flops_per_byte / outcome.ridge_flops_per_byte)
        assert (point.binds == "compute") == (point.intensity_flops_per_byte > outcome.ridge_flops_per_byte)
        assert point.bound_ratio >= 1 and max(point.mfu, point.mbu) < 1
        assert 0 <= point.attention_share < 1 and point.wall_s >= point.gpu_s


@pytest.mark.parametrize("cost", ["auto", "roofline"])
def test_more_tokens_take_longer_and_larger_batches_pay(cost: str) -> None:
    outcome = compare(replace(MACHINE, cost=cost))
    prefills, decodes = outcome.of_phase("prefill"), outcome.of_phase("decode")
    for name in ("gpu_s", "attention_share", "intensity_flops_per_byte"):
        values = [getattr(point, name) for point in prefills]
        assert values == sorted(values), name
    for name in ("gpu_s", "mfu", "intensity_flops_per_byte", "tokens_per_s", "attention_share"):
        values = [getattr(point, name) for point in decodes]
        assert values == sorted(values), name


def test_what_was_not_measured_is_marked() -> None:
    outcome = compare(MACHINE, cost=made())
    assert [point.size for point in outcome.points if point.outside_measured] == [8192, 32768]
    assert all(point.outside_measured for point in compare(replace(MACHINE, cost="roofline")).points)


# ---- both clocks ----------------------------------------------------------------------------------------------------

HOST = Host(
    schedule_s=1e-3,
    launch_s=(4e-3, 10e-3, 40e-3),
    update_s=0.5e-3,
    update_per_output_s=1e-5,
    lead_s=(1e-3, 2e-3, 2e-3),
    tail_s=(0.0, 1e-3, 1e-3),
)


def test_a_short_prefill_is_paced_by_its_launch() -> None:
    engine = Engine.of(MACHINE, made(host=HOST))
    short, long = prefill_point(engine, 512), prefill_point(engine, 4096)
    assert (short.paced_by, long.paced_by) == ("host", "GPU")
    assert short.wall_s == pytest.approx(1e-3 + 40e-3 + 1e-3)  # schedule, launch, tail
    assert long.wall_s == pytest.approx(1e-3 + 2e-3 + long.gpu_s)  # schedule, lead, GPU
    assert short.tokens_per_s == pytest.approx(512 / 42e-3)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("gpu_s", [1e-3, 4.2e-3, 20e-3])
def test_the_pace_of_decodes_is_that_of_a_simulation(asynchronous: bool, gpu_s: float) -> None:
    scenario = replace(MACHINE, async_scheduling=asynchronous, launch_jitter=False)
    cost = made(base=gpu_s, row=0.0, pair=0.0, cached=0.0, host=HOST)
    point = decode_point(Engine.of(scenario, cost), 4, 300)
    same = Trace("same", np.zeros(4), np.full(4, 64), np.full(4, 400))
    gaps = simulate(same, scenario, cost=cost).gaps
    longest = gaps["count"].argmax()
    assert point.wall_s == pytest.approx(gaps["gap_s"][longest])
    assert point.paced_by == ("host" if gpu_s < (5.54e-3 if asynchronous else 3e-3) else "GPU")


# ---- growth ---------------------------------------------------------------------------------------------------------


def test_linear_layers_and_attention_come_apart() -> None:
    engine = Engine.of(MACHINE, made())
    for tokens in (100, 1024, 8192):
        assert engine.linear_s(tokens) == pytest.approx(3e-3 + 20e-6 * tokens)
    total_s, attention_s = engine.prefill_s(20_000)  # chunks of 8192, 8192, 3616
    assert attention_s == pytest.approx(1e-9 * 20_000 * 20_001 / 2)
    assert total_s - attention_s == pytest.approx(3 * 3e-3 + 20e-6 * 20_000)
    outcome = compare(MACHINE, cost=made())
    assert outcome.growth.linear_s_per_1k_tokens == pytest.approx((3e-3 / 8192 + 20e-6) * 1000)
    assert outcome.growth.attention_s_per_1k_tokens_squared == pytest.approx(1e-9 * 1e6 / 2, rel=1e-3)
    assert outcome.growth.decode_s_per_1k_cached_tokens == pytest.approx(30e-6)


def test_windows_bound_what_attention_adds() -> None:
    engine = Engine.of(Scenario(model="gemma-2-9b", gpu="h200-sxm", cost="roofline"))
    assert 0 < engine.linear_s(8192) < engine.cost.mixed_s([(8192, 0)], 0, 0)


@pytest.mark.parametrize("cost", ["auto", "roofline"])
@pytest.mark.parametrize("window", [1, 2, 63, 64])
def test_attention_of_a_few_tokens_is_a_small_share(window: int, cost: str, tmp_path: Path) -> None:
    """A window of one token has no further pairs, and those of a few are lost in the tiles of a profile."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], **shape}))
    outcome = compare(Scenario(model=str(tmp_path), gpu="h200-sxm", cost=cost))
    assert all(0 <= point.attention_share < 0.06 for point in outcome.of_phase("prefill"))
    assert outcome.growth.linear_compute_bound_batch == pytest.approx(215, rel=0.03)


@pytest.mark.parametrize("pair", [0.5e-9, 1e-9, 10e-9])
def test_attention_is_half_at_the_length_that_is_told(pair: float) -> None:
    engine = Engine.of(MACHINE, made(pair=pair))
    tokens = attention_half_tokens(engine)
    assert tokens is not None
    for length, half in ((tokens, True), (tokens - 1, False)):
        total_s, attention_s = engine.prefill_s(length)
        assert (attention_s >= total_s / 2) == half


def test_attention_is_never_half_without_pairs() -> None:
    assert attention_half_tokens(Engine.of(MACHINE, made(pair=0.0))) is None
    assert attention_half_tokens(Engine.of(replace(MACHINE, max_model_len=4096), made())) is None


def test_contexts_at_which_a_step_is_half_attention() -> None:
    outcome = compare(MACHINE, cost=made())
    for equal in outcome.growth.equal_contexts:
        step_s = 3e-3 + 20e-6 * equal.batch
        assert equal.time_context_tokens == pytest.approx(step_s / 30e-9 / equal.batch, abs=1)
        fixed = WEIGHT_BYTES / equal.batch / KV_BYTES
        assert equal.bytes_context_tokens == pytest.approx(fixed, abs=3)  # its own token, read and written
    longest = compare(replace(MACHINE, max_model_len=50_000), cost=made()).growth.equal_contexts[0]
    assert (longest.bytes_context_tokens, longest.time_context_tokens) == (None, None)


def test_batches_at_which_decode_turns_compute_bound() -> None:
    growth = compare(MACHINE, cost=made()).growth
    at_peak, reached = growth.linear_compute_bound_batch_at_peak, growth.linear_compute_bound_batch
    assert at_peak == pytest.approx(989.4e12 / 4.8e12, abs=2)  # two FLOPs and two bytes a weight
    # reading the weights takes 3.02 ms; a row of a full chunk 20.4 us, without the LM head, which a decode computes too
    row_s = (3e-3 + 20e-6 * 8192) / 8192 * (LLAMA.linear_params + LLAMA.lm_head_params) / LLAMA.linear_params
    assert reached == pytest.approx(3.02e-3 / row_s, abs=2)
    assert growth.step_compute_bound_batch is None  # with KV reads, 128 KiB against 0.5 MFLOP a cached token
    short = compare(MACHINE, prompt_tokens=8, output_tokens=8, cost=made())
    batch = short.growth.step_compute_bound_batch
    assert batch is not None
    points = [decode_point(Engine.of(MACHINE, made()), size, 12) for size in (batch - 1, batch)]
    assert [point.binds for point in points] == ["memory", "compute"]


# ---- requests -------------------------------------------------------------------------------------------------------


def test_a_request_alone_by_hand() -> None:
    (alone,) = compare(replace(MACHINE, cost="constant:0.01", concurrency=1)).served
    assert (alone.concurrency, alone.ttft_s, alone.own_prefill_s) == (1, pytest.approx(0.01), pytest.approx(0.01))
    assert alone.waiting_and_host_s == pytest.approx(0, abs=1e-12)
    assert (alone.tpot_s, alone.e2el_s) == (pytest.approx(0.01), pytest.approx(2.56))
    assert alone.prefill_share == pytest.approx(1 / 256)
    assert alone.prompt_iterations_share == pytest.approx(1 / 256)


def test_an_answer_of_one_token_has_no_tpot() -> None:
    alone, _ = compare(replace(MACHINE, cost="roofline"), output_tokens=1).served
    assert alone.tpot_s is None and alone.decode_share == pytest.approx(0)


def test_parts_of_a_served_request_add_up() -> None:
    alone, loaded = compare(replace(MACHINE, concurrency=32), cost=made(host=HOST)).served
    assert (alone.concurrency, loaded.concurrency) == (1, 32)
    for served in (alone, loaded):
        parts = (served.own_prefill_s, served.other_prefills_s, served.decodes_beside_s, served.waiting_and_host_s)
        assert sum(parts) == pytest.approx(served.ttft_s) and min(parts) >= 0
        shares = (served.queue_share, served.prefill_share, served.decode_share, served.preempted_share)
        assert sum(shares) == pytest.approx(1)
    assert alone.own_prefill_s == pytest.approx(made().mixed_s([(1024, 0)], 0, 0))
    assert alone.other_prefills_s == alone.decodes_beside_s == 0
    assert min(loaded.other_prefills_s, loaded.decodes_beside_s) > 0
    assert loaded.ttft_s > alone.ttft_s and loaded.prompt_iterations_share > alone.prompt_iterations_share


def test_whose_gpu_seconds_a_prompt_waits_for() -> None:
    noted = _Noted(made())
    noted.mixed_s([(1000, 0), (500, 10)], 3, 600)
    first_s, second_s = 3e-3 + 20e-3 + 1e-9 * 500_500, 3e-3 + 10e-3 + 1e-9 * (5000 + 125_250)
    together_s, decodes_s = first_s + second_s - 3e-3, 3 * 20e-6 + 600 * 30e-9
    (parts,) = noted.parts_s
    assert parts == pytest.approx((first_s + second_s, 2 * together_s - first_s - second_s, 2 * decodes_s))


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_the_textbook_sentence_is_computed() -> None:
    outcome = compare(replace(MACHINE, cost="constant:0.01"))
    point = outcome.points[0]
    prefills = [replace(point, size=128, mfu=0.85, mbu=0.5), replace(point, size=1024, mfu=0.9, mbu=0.1)]
    decodes = [replace(point, size=1, mfu=0.01, mbu=0.7), replace(point, size=64, mfu=0.4, mbu=0.6)]
    assert textbook(prefills, decodes).endswith(
        "prefill of 128 to 1,024 tokens reaches 85–90 % of its peak FLOP/s (as they say) and decode at batch 1 to 64 "
        "reaches 1–40 % (1 of 2 points below that and 1 of 2 points above that), while of its peak bandwidth decode "
        "uses 60–70 % and prefill 10–50 %."
    )
    assert "(below that)" in textbook([replace(point, mfu=0.6)], decodes)


def test_default_points_stop_at_what_fits() -> None:
    small = compare(replace(MACHINE, max_model_len=5000, num_gpu_blocks_override=1001), cost=made())
    assert list(by_size(small, "prefill")) == [128, 1024, 4999]
    assert small.largest_batch == 12  # 80 blocks of 16 each
    assert list(by_size(small, "decode")) == [1, 8, 12]
    assert small.served[1].concurrency == 12
    assert list(by_size(compare(MACHINE, batches=[5, 3], prompt_tokens=700, cost=made()), "decode")) == [3, 5]


UNITS = (
    "_s", "_tokens", "_token", "_byte", "_per_s", "_share", "_squared", "_ratio", "_batch", "_batch_at_peak", "mfu",
    "mbu", "size", "batch", "concurrency", "tensor_parallel",
)  # fmt: skip


def numbers(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: found for name, item in value.items() for key, found in numbers(item, name).items()}
    if isinstance(value, list):
        return {key: found for item in value for key, found in numbers(item, name).items()}
    return {name: value} if not isinstance(value, str | bool) else {}


def test_json_has_units_in_its_keys_and_nothing_else_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cost_label"].startswith("every iteration lasts 0.01 s")
    assert [name for name in numbers(document) if not name.endswith(UNITS)] == []
    assert len(numbers(document)) > 40


def test_every_key_is_defined() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    from llmsim import phases

    classes = [
        c for c in vars(phases).values() if is_dataclass(c) and c.__module__ == phases.__name__ and c is not Engine
    ]
    names = [field.name for c in classes for field in fields(c)]
    assert len(names) > 50
    assert [name for name in names if f"`{name}`" not in page] == []


def test_a_mixture_of_experts_goes_by_the_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["phases", "--model", "qwen3-30b-a3b", "--gpu", "h100-sxm", "--tp", "2"]) == 0
    text = capsys.readouterr().out
    assert "Cost model: roofline of h100-sxm's data sheet, uncalibrated" in text
    assert "Outside the measured range: every point" in text
    assert "on 2 x h100-sxm" in text


@pytest.mark.parametrize(
    "spelling", ["--tp", "-tp", "--tensor-parallel", "--tensor-parallel-size", "--tensor_parallel"]
)
def test_spellings_of_tensor_parallel(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ARGUMENTS, spelling, "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensor_parallel"] == 2


def test_readme_shows_the_rows_that_are_printed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^(llmsim phases .*)\n```\n```text\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert shown is not None
    command = [sys.executable, "-m", "llmsim", *shlex.split(shown[1])[1:]]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout

    def rows(text: str) -> list[str]:
        return [line[:34].strip() for line in text.splitlines() if re.search(r"\S {3,}\S", line)]

    assert rows(shown[2]) == rows(printed)
    assert len(rows(printed)) > 25


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "nope"], "unknown model 'nope'. See: llmsim list models"),
        (["--tp", "3"], "tensor_parallel=3 does not divide"),
        (["--prompt", "200k"], "are 200256 tokens, above max_model_len=131072 of llama-3.1-8b: lower one of them"),
        (["--max-model-len", "1000"], "above max_model_len=1000"),
        (["--prompt", "1"], "prompt=1 is too small: give 2 or more"),
        (["--output", "0"], "output=0 is too small: give 1 or more"),
        (["--batch", "1,2000"], "batch=2000: the KV cache and max_num_seqs allow 1 to 715 requests of 1024 + 256"),
        (["--batch", "0"], "batch=0: the KV cache"),
        (["--batch", "1,many"], "batch=1,many: give whole numbers with commas between"),
        (["--num-gpu-blocks-override", "20"], "need 1280 tokens of KV cache, which has 304"),
        (["--replicas", "2"], "replicas=2: the phases are those of one replica"),
        (["--plot", "x.pdf"], "plot=x.pdf: no picture is written as .pdf. Use .html, .svg, .png"),
        (["--plot", "picture"], "plot=picture: no picture is written as a file without suffix"),
        (["--plot", "nowhere/x.png"], "plot=nowhere/x.png: there is no folder nowhere: make it first"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*ARGUMENTS, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and said in err
    assert list(tmp_path.iterdir()) == []


def test_plots_without_their_packages_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsim.charts.find_spec", lambda name: None)
    assert cli.main([*ARGUMENTS, "--plot", str(tmp_path / "x.html")]) == 2
    assert 'pip install "altair>=6,<7" "vl-convert-python>=1.7"' in capsys.readouterr().err


def test_help_and_numbers_load_no_plotting() -> None:
    code = (
        "import sys; from llmsim.cli import main; main(['phases', '--help']); help_ = set(sys.modules);"
        "from llmsim.phases import compare; from llmsim.scenario import Scenario;"
        "compare(Scenario(model='llama-3.1-8b', gpu='h200-sxm'));"
        "print(sorted({'altair', 'pandas', 'scipy', 'numpy', 'simpy'} & help_), 'altair' in sys.modules,"
        " 'pandas' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[] False False"
