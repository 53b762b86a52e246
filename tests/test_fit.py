"""Calibration: planted clocks come back, and the recordings give the shipped profile and its stated errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from plain_engine import PlainEngine, PlainRequest, Settings, Step

from calibration.__main__ import main
from calibration.check import check_profile
from calibration.fit import fit_clocks, monotone, robust
from calibration.fit_host import WAKE_S
from calibration.kernel_profiles import read_kernels
from calibration.observe import DISPATCH_S
from calibration.profiles import fit_profile
from calibration.steps import Recording, RequestRow, Scenario, StepRow, pair_steps, read_recording
from llmsim.cost import EAGER, FULL, PIECEWISE, WARM_S, Host, LaunchNoise
from llmsim.cost.basis import ShapeBasis, power
from llmsim.cost.graphs import Graphs
from llmsim.cost.load import CostSettings
from llmsim.cost.profile import Profile, ProfileCost, model_shape, read_profile
from llmsim.hardware import find_gpu, find_model

RECORDINGS = Path(__file__).parent / "data" / "recordings"
FIRST = RECORDINGS / "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16"
KERNELS = Path(__file__).parent.parent / "calibration" / "measurements" / "h100-sxm-aiconfigurator.parquet"
FITTED = ("decode_grid", "poisson_1024_128_q8")
GRAPHS = Graphs.of_engine(256, 8192)


def cost_of(profile: Profile, host: Host | None = None) -> ProfileCost:
    settings = CostSettings(1, "bfloat16", "auto", GRAPHS)
    cost = ProfileCost(profile, find_model("llama-3.1-8b"), find_gpu("h100-sxm"), settings)
    if host is not None:
        cost.host = host
    return cost


def as_row(step: Step) -> StepRow:
    took_s = step.launch_s - step.schedule_s - DISPATCH_S
    chunks, seqs, kv_tokens = step.chunks, step.seqs, step.kv_tokens
    row = StepRow(step.schedule_s, took_s, step.tokens, seqs, kv_tokens, chunks, step.running, step.waiting)
    row.update_s, row.update_took_s = step.update_s, 1e-4
    return row


def played(name: str, cost: ProfileCost, requests: list[PlainRequest], seed: int | None) -> Scenario:
    """A scenario as a recorder would have logged it, had the engine these clocks."""
    noise = None if seed is None else LaunchNoise(cost.host, seed).draw
    steps = PlainEngine(cost, Settings(num_gpu_blocks=28_000), noise).run(requests)
    rows = [RequestRow(r.send_s, r.prompt, r.output, r.token_s) for r in requests]
    return Scenario(name, rows, [as_row(step) for step in steps])


def synthetic(cost: ProfileCost, seed: int | None) -> Recording:
    rng = np.random.default_rng(7)
    scenarios = []
    for context in (128, 1024, 4096, 16384):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            if context * batch <= 300_000:
                burst = [PlainRequest(i, 1e-4 * i, context, 24) for i in range(batch)]
                scenarios.append(played(f"grid_c{context}_b{batch}", cost, burst, seed))
    arrival_s = np.cumsum(rng.exponential(1 / 8, 250))
    load = [PlainRequest(i, float(at), int(rng.integers(300, 3000)), 64) for i, at in enumerate(arrival_s)]
    scenarios.append(played("poisson", cost, load, seed))
    return Recording(Path("synthetic"), {}, scenarios)


def planted() -> ProfileCost:
    profile = read_profile("h100-sxm")
    clock = msgspec.structs.replace(
        profile.gpu_clock,
        tokens=(1, 64, 128, 256, 1024, 2048, 4096, 8192),
        linear_s=(5e-3, 5.5e-3, 6e-3, 8e-3, 25e-3, 50e-3, 100e-3, 200e-3),
        pair_s=1.0e-9,
        full_kv_token_s=50e-9,
        mixed_kv_token_s=60e-9,
        power_share=0.15,
    )
    quiet = msgspec.structs.replace(profile.host_clock, stall_share=0.0)
    host = Host(
        schedule_s=0.3e-3,
        schedule_per_request_s=10e-6,
        schedule_per_token_s=0.2e-6,
        launch_s=(3e-3, 12e-3, 24e-3),
        launch_per_chunk_s=(0.0, 0.8e-3, 1.6e-3),
        interference_per_token_s=1.4e-6,
        warm_share=0.04,
        cool_share=0.04,
        wake_s=WAKE_S,
        launch_drift_s=((), (-1e-3, 0.0, 1e-3), (-3e-3, 0.0, 3e-3)),
        drift_hold_s=0.15,
        update_s=0.2e-3,
        update_per_output_s=5e-6,
        lead_s=(1.5e-3, 2e-3, 2e-3),
        tail_s=(0.0, 1e-3, 1e-3),
        receive_s=1e-3,
        receive_per_token_s=0.4e-6,
        respond_s=1.2e-3,
        respond_per_output_s=30e-6,
    )
    return cost_of(msgspec.structs.replace(profile, gpu_clock=clock, host_clock=quiet, kernels=None), host)


@pytest.fixture(scope="module")
def recovered() -> tuple[ProfileCost, Any, Host, float]:
    cost = planted()
    shape = model_shape(find_model("llama-3.1-8b"), find_gpu("h100-sxm"), "bfloat16", "auto", 1, "bfloat16")
    clock, host, stalls = fit_clocks([synthetic(cost, seed=3)], GRAPHS, shape, ShapeBasis(8))
    return cost, clock, host, stalls


def test_planted_gpu_clock_is_recovered(recovered: tuple[ProfileCost, Any, Host, float]) -> None:
    cost, clock, _, _ = recovered
    truth = cost.profile.gpu_clock
    for knot, value in zip(clock.tokens, clock.linear_s, strict=True):
        assert value == pytest.approx(np.interp(knot, truth.tokens, truth.linear_s), rel=0.02), f"G({knot})"
    assert clock.full_kv_token_s == pytest.approx(truth.full_kv_token_s, rel=0.02)
    assert clock.pair_s == pytest.approx(truth.pair_s, rel=0.05)
    # beside long chunks w and b_mixed are small parts of a step; what they add for 100 decodes of 1,000 tokens is seen
    added, planted_s = (1e5 * c.mixed_kv_token_s + c.power_share * power(100) * WARM_S for c in (clock, truth))
    assert added == pytest.approx(planted_s, rel=0.15)


def test_planted_host_clock_is_recovered(recovered: tuple[ProfileCost, Any, Host, float]) -> None:
    cost, _, host, stalls = recovered
    truth = cost.host
    # a launch that ends before the GPU does not show, so those seen are a little long; piecewise ones are a dozen
    for mode, within in ((EAGER, 0.04), (PIECEWISE, 0.1)):
        one_prompt_s, planted_s = (h.launch_s[mode] + h.launch_per_chunk_s[mode] for h in (host, truth))
        assert one_prompt_s == pytest.approx(planted_s, rel=within)
    assert host.launch_s[FULL] == pytest.approx(truth.launch_s[FULL], rel=0.05)
    assert host.lead_s[FULL] == pytest.approx(truth.lead_s[FULL], abs=0.5e-3)
    assert host.lead_s[EAGER] == pytest.approx(truth.lead_s[EAGER], abs=1e-3)
    assert host.schedule_s == pytest.approx(truth.schedule_s, rel=0.02)
    assert host.schedule_per_token_s == pytest.approx(truth.schedule_per_token_s, rel=0.02)
    assert host.update_s == pytest.approx(truth.update_s, rel=0.05)
    assert host.receive_s + 1000 * host.receive_per_token_s == pytest.approx(1.4e-3, abs=0.3e-3)
    assert host.respond_s == pytest.approx(truth.respond_s, rel=0.05)
    assert host.respond_per_output_s == pytest.approx(truth.respond_per_output_s, rel=0.1)
    spread = np.std(host.launch_drift_s[EAGER])
    assert spread == pytest.approx(np.std(truth.launch_drift_s[EAGER]), rel=0.3)
    assert 0.05 < host.drift_hold_s < 0.4
    assert stalls < 0.002


def test_a_stalled_row_bends_no_coefficient() -> None:
    x = np.arange(50.0)
    y = 3.0 + 2.0 * x
    y[7] += 1000.0
    found = robust(np.column_stack([np.ones(50), x]), y, scale=0.1)
    assert found == pytest.approx([3.0, 2.0], abs=1e-3)


def test_monotone_pools_what_falls() -> None:
    assert monotone(np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0, 1.0])).tolist() == [1.0, 2.5, 2.5, 4.0]


def log_line(at_s: float, tokens: int) -> list[Any]:
    return ["s", at_s, 1e-4, tokens, tokens, 10, [], tokens, 0, 0.1]


def test_updates_go_to_the_oldest_batch_in_flight() -> None:
    steps = pair_steps([log_line(0.0, 1), log_line(0.01, 2), ["u", 0.02, 1e-4], log_line(0.021, 3), ["u", 0.03, 1e-4]])
    assert [(step.tokens, step.update_s) for step in steps] == [(1, 0.02), (2, 0.03)]


def test_an_unlogged_empty_schedule_takes_its_own_update() -> None:
    lines = [log_line(0.0, 1), ["u", 0.02, 1e-4], log_line(0.021, 2), ["u", 0.0215, 1e-4], ["u", 0.05, 1e-4]]
    steps = pair_steps(lines)  # the second update comes 0.5 ms after the second schedule: it is the empty batch's
    assert [(step.tokens, step.update_s) for step in steps] == [(1, 0.02), (2, 0.05)]


def test_a_logged_empty_schedule_pairs_first_in_first_out() -> None:
    lines = [
        log_line(0.0, 1),
        ["e", 0.01],
        ["u", 0.02, 1e-4],
        log_line(0.021, 2),
        ["u", 0.0215, 1e-4],
        ["u", 0.05, 1e-4],
    ]
    assert [step.update_s for step in pair_steps(lines)] == [0.02, 0.05]


@pytest.fixture(scope="module")
def refitted() -> Profile:
    kernels = read_kernels([KERNELS], "h100-sxm", read_profile("h200-sxm"))
    return fit_profile([read_recording(FIRST, FITTED)], "h100-sxm", "h100-sxm", "llama-3.1-8b", kernels=kernels)


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, tuple) else [value]


def test_recordings_reproduce_the_shipped_profile(refitted: Profile) -> None:
    shipped = read_profile("h100-sxm")
    assert refitted.provenance == shipped.provenance
    assert refitted.measured == shipped.measured
    for part in ("gpu_clock", "host_clock"):
        ours, theirs = getattr(refitted, part), getattr(shipped, part)
        for field in ours.__struct_fields__:
            # least squares on another CPU or SciPy: the last digits may differ
            np.testing.assert_allclose(
                flat(getattr(ours, field)), flat(getattr(theirs, field)), rtol=1e-3, atol=1e-9, err_msg=field
            )


def test_profile_states_the_errors_it_has() -> None:
    shipped = read_profile("h100-sxm")
    checks = {check.scenario: check for check in check_profile(shipped, [read_recording(FIRST)])}
    for name in ("poisson_1024_128_q18", "azconv_x1", "closed64_1024_256"):
        assert not checks[name].fitted
        assert checks[name].decode_median == pytest.approx(shipped.error[f"{name}_decode_step_median"], rel=0.01)
        assert checks[name].decode_median < 0.02, "median error of decode steps held out"
        assert abs(checks[name].decode_bias) < 0.03
        assert checks[name].chunk_median < 0.07, "median error of steps with chunks held out"
        assert abs(checks[name].chunk_bias) < 0.05
    assert checks["grid"].decode_median < 0.01 and checks["grid"].chunk_median < 0.02


def test_second_machine_differs_by_its_host() -> None:
    second = RECORDINGS / "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16_second-machine"
    (check,) = check_profile(read_profile("h100-sxm"), [read_recording(second)])
    assert check.launch_ratio == pytest.approx(0.87, abs=0.03)
    assert abs(check.decode_bias) < 0.04 and abs(check.chunk_bias) < 0.05


def test_a_profile_is_not_checked_against_another_gpu() -> None:
    with pytest.raises(ValueError, match="recorded on h100-sxm, profile h200-sxm is of h200-sxm"):
        check_profile(read_profile("h200-sxm"), [read_recording(FIRST, ["closed64_1024_256"])])


def test_missing_recordings_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"engine\.json: no such file"):
        read_recording(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no scenario nothing\. It has azconv_x1"):
        read_recording(FIRST, ["nothing"])


def test_a_fit_needs_decode_and_long_chunks() -> None:
    empty = replace(read_recording(FIRST, FITTED), scenarios=[])
    with pytest.raises(ValueError, match="no steady decode"):
        fit_profile([empty], "x", "h100-sxm", "llama-3.1-8b")


def test_check_from_the_command_line_prints_every_scenario_and_its_errors() -> None:
    shown = CliRunner().invoke(main, ["check", "h100-sxm", str(FIRST), "--scenarios", "closed64_1024_256"])
    assert shown.exit_code == 0
    assert re.search(r"closed64_1024_256 +held out +\d+ +0\.\d% +-?\d\.\d%", shown.output)


def test_fit_from_the_command_line_writes_a_profile_that_can_be_read(tmp_path: Path) -> None:
    output = tmp_path / "mine.json"
    options = ["--scenarios", ",".join(FITTED), "-o", str(output), "--gpu", "h100-sxm", "--model", "llama-3.1-8b"]
    options += ["--kernels", str(KERNELS), "--rest-from", "h200-sxm"]
    shown = CliRunner().invoke(main, ["fit", str(FIRST), *options])
    assert shown.exit_code == 0
    assert read_profile(str(output)).name == "mine"
    assert read_profile(str(output)).gpu_clock.pair_s == pytest.approx(
        read_profile("h100-sxm").gpu_clock.pair_s, rel=1e-3
    )
