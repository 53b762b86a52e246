"""Options of policies that are wrong or contradict each other, and policies that do what none may: one line each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsim import cli
from llmsim.batch_speculative import SpeculatingBatch
from llmsim.drafting import Speculation
from llmsim.request import Request
from llmsim.schedulers.vllm import VllmScheduler
from llmsim.simulate import Fleet, simulate
from llmsim.testing_cases import cases
from llmsim.testing_rules import first_difference

TRACE = str(Path(__file__).parents[1] / "traces" / "chat.csv")
MACHINE = ("--limit", "20", "--no-out", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
EAGLE = {"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}
EAGLE_JSON = '{"method":"eagle","num_speculative_tokens":3,"acceptance":0.7}'
MINE = """
class Nonsense:
    def schedule(self, replica, now_s):
        if replica.batch.size: replica.decode()
        for request in list(replica.waiting): replica.prefill(request, request.prefill_tokens)
        return "banana"

class HalfTokens:
    def schedule(self, replica, now_s):
        replica.prefill(replica.waiting.head, 1.5)

class Silent:
    def admit(self, request, replica, now_s): pass
"""


def refused(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    """The one line on stderr, besides what is noted of the trace."""
    assert cli.main(["replay", TRACE, *MACHINE, *flags.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--scheduler vtc --scheduler-arg weights=5", "weights=5 is no table"),
        ('--scheduler vtc --scheduler-arg weights={"a":1', "is no table"),
        ("--scheduler mlfq --scheduler-arg quantum_s=1e-300", "quantum_s=1e-300 is far below an iteration"),
        ("--scheduler static --scheduler-arg timeout_s=1e308", "timeout_s=1e+308 is no time to wait"),
        ('--scheduler priority --scheduler-arg base_args={"watermark":-3}', "watermark=-3 is not a fraction"),
        ("--scheduler sglang --scheduler-arg max_new_tokens=-1", "max_new_tokens=-1 is too small"),
        ("--scheduler sglang --scheduler-arg chunked_prefill_size=1", "chunked_prefill_size=1 is below block_size=16"),
        ("--engine sglang --block-size 64 --max-num-batched-tokens 32", "max_num_batched_tokens=32 is below block_"),
        (
            "--engine tensorrt-llm --max-num-seqs 8 --max-num-batched-tokens 16 "
            "--scheduler-arg enable_chunked_prefill=true",
            "max_num_batched_tokens=16 is below block_size=32",
        ),
        (f"--cost constant:0.01 --speculative-config {EAGLE_JSON}", "cost=constant:0.01 takes the same time"),
        ("--engine static --kv-compression window:64", "the scheduler static pads its rows"),
        ("--preemption swap --swap-space-gib 1e-6", "swap_space_gib=1e-06 is less than one KV block"),
        ("--assign-classes :1", "class ':1' has no name"),
        ("--scheduler exit.py:A", "exit.py ends the process"),
        ("--scheduler nul.py:A", "nul.py: source code string cannot contain null bytes"),
        ("--scheduler mine.py:Nonsense", "Nonsense returned 'banana'"),
        ("--scheduler mine.py:HalfTokens", "asked to prefill 1.5 tokens of request 0"),
        ("--admission mine.py:Silent", "Silent answered None for request 0"),
    ],
)
def test_what_cannot_be_meant_of_a_policy(
    flags: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"mine.py": MINE, "exit.py": "raise SystemExit\n", "nul.py": "a=\0\n"}.items():
        (tmp_path / name).write_text(text)
    assert says in refused(capsys, flags)


@pytest.mark.parametrize("sizes", ["4", "[4,8]", "4,8"])
def test_batch_sizes_are_written_in_any_way(sizes: str) -> None:
    flags = f"--scheduler dynamic --scheduler-arg preferred_batch_sizes={sizes}"
    assert cli.main(["replay", TRACE, *MACHINE, *flags.split()]) == 0


def test_one_request_has_no_rank_correlation(recwarn: pytest.WarningsRecorder) -> None:
    assert cli.main(["replay", TRACE, "--limit", "1", *MACHINE[2:], "--predict", "sigma=1"]) == 0
    assert not list(recwarn)


def test_mlfq_looks_ahead_only_as_far_as_drafts_are_planned() -> None:
    """It asks how many of 2**30 iterations fit: with speculation each was looked up."""
    case = next(case for case in cases() if case.name.startswith("preemption storm, host memory"))
    scenario = replace(case.scenario, scheduler="mlfq", speculative_config=EAGLE, swap_space_gib=1.0, max_num_seqs=1)
    assert simulate(case.trace, scenario).finished.all()


@pytest.mark.parametrize("scheduler", ["static", "dynamic", "orca"])
@pytest.mark.parametrize("clock", ["async", "sync"])
def test_drafts_may_take_more_than_was_reserved(scheduler: str, clock: str) -> None:
    """Reservations are of answers; drafts and their slots come on top, rows run ahead of padded ones."""
    drafts = {"method": "eagle", "num_speculative_tokens": 7, "acceptance": 0.9}
    for case in (case for case in cases() if clock in case.name and "memory" in case.name):
        scenario = replace(case.scenario, scheduler=scheduler, speculative_config=drafts)
        result = simulate(case.trace, scenario)
        assert result.finished.all(), case.name


def test_steps_that_fit_with_drafts() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        batch = SpeculatingBatch(16, Speculation("eagle", 3, (0.6, 0.6, 0.6)), 1, 10_000)
        for number in range(int(random.integers(1, 5))):
            request: Any = Request(number, 0.0, int(random.integers(1, 90)), int(random.integers(2, 60)))
            request.computed_tokens, request.generated_tokens = request.prompt_tokens, 1
            batch.add(request)
        for free in (0, 1, 3, 8, 10_000):
            steps = batch.steps_that_fit(40, free)
            assert batch.blocks_needed(steps) <= free and (steps == 40 or batch.blocks_needed(steps + 1) > free)
        assert batch.steps_that_fit(1 << 30, 10_000) == 1 << 30


def test_a_swapped_request_behind_a_more_urgent_one_is_not_admitted_anew() -> None:
    for case in (case for case in cases() if "tight" in case.name or "storm" in case.name):
        scenario = replace(
            case.scenario, scheduling_policy="priority", preemption="swap", swap_space_gib=0.01, reserve_full_isl=False
        )
        assert simulate(case.trace, scenario).finished.all(), case.name


class Asked(VllmScheduler):
    """Its answers are never held."""

    def schedule(self, replica: Any, now_s: float) -> None:
        super().schedule(replica, now_s)


@pytest.mark.parametrize("write", ["write_through", "on_eviction"])
def test_a_load_begins_when_it_can_also_while_an_answer_is_held(write: str) -> None:
    """Answers are stored when somebody looks for them, and decodes take blocks of what a waiting request had found."""
    for seed in range(6):
        for case in (case for case in cases(seed) if "sessions" in case.name and "ample" not in case.name):
            scenario = replace(
                case.scenario, enable_prefix_caching=True, max_num_seqs=4, block_size=8, reserve_full_isl=False,
                kv_tiers="cpu:1GiB:5GB/s:100us", kv_tier_write=write, launch_jitter=False,
            )  # fmt: skip
            held = Fleet(case.trace, scenario, policy=lambda: VllmScheduler(reserve_full_isl=False)).run()
            every = Fleet(case.trace, scenario, policy=lambda: Asked(reserve_full_isl=False)).run()
            assert first_difference(held, every, exact=False) is None, (seed, case.name)


@pytest.mark.parametrize("flags", ["--prices free.toml --only cuda-graphs", "--engine static --only speculation-eagle"])
@pytest.mark.parametrize("shown", ["", "--json"])
def test_what_is_nothing_has_no_ratio(
    flags: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPUs that cost nothing, and answers that come as a whole and so have no time per token."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "free.toml").write_text('[h100-sxm]\nusd_per_gpu_hour = 0\nsource = "ours"\ndate = 2026-01-01\n')
    machine = [flag for flag in MACHINE if flag != "--no-out"]
    assert cli.main(["whatif", TRACE, *machine, *flags.split(), "--jobs", "1", *shown.split()]) == 0
    assert "nan" not in capsys.readouterr().out.lower()


def test_a_batch_that_no_engine_runs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--batch", "99999999", "--speculative-config", EAGLE_JSON)
    assert cli.main(["speculation", *MACHINE[3:], *flags]) == 2
    assert "batch=99999999: no engine runs that many" in capsys.readouterr().err


def test_a_side_has_a_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    machine = [flag for flag in MACHINE if flag != "--no-out"]
    assert cli.main(["compare", TRACE, *machine, "--set", "max_num_seqs=4,max_num_seqs=5"]) == 2
    assert "max_num_seqs is given twice" in capsys.readouterr().err
