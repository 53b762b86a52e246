"""What the widths of intervals rest on: spreads by hand, planted ones, and which recording is judged without which."""

from __future__ import annotations

from dataclasses import replace as changed
from functools import cache
from math import sqrt
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import coverage
from calibration.__main__ import main
from calibration.recorded_on import RECORDED, placed
from calibration.spread import carried_spread, spread_of
from calibration.steps import RequestRow, read_recording
from calibration.steps import Scenario as Recorded
from calibration.touch_up import Load, Seconds, launches_told
from llmsim.cost import CostModel
from llmsim.cost.profile import Deviation, Profile, Spread, Within, profile_names, read_profile
from llmsim.recorded import load_files
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of
from llmsim.uncertainty_sources import NONE, Sources, roofline_spread, sources_of

FITTED = Scenario(model="llama-3.1-8b", gpu="h200-sxm")
RUN, NEVER = "qwen2.5-7b", "qwen2.5-72b"


@cache
def cost(**fields: str) -> CostModel:
    return cost_of(Scenario(**({"model": "llama-3.1-8b", "gpu": "h200-sxm"} | fields)))


def with_spread(name: str, spread: Spread | None) -> Profile:
    return msgspec.structs.replace(read_profile(name), spread=spread)


H200 = Spread(
    runs=Deviation(0.03, 0.04, 0.10, 12),
    machines=Deviation(0.02, 0.03, 0.05, 3),
    models={f"{RUN} bfloat16 tp1": Deviation(0.10, 0.20, 0.30, 3), "x fp8 tp1": Deviation(0.20, 0.10, 0.10, 1)},
    sizes=Within(0.01, 0.02, 12),
    carried_sizes=Within(0.03, 0.04, 4),
    steps=Within(0.05, 0.06, 16),
)
H100 = Spread(runs=Deviation(0.01, 0.02, 0.0, 4), machines=Deviation(0.0, 0.0, 0.09, 2))


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_machine_and_hour_are_pooled_by_degrees_of_freedom() -> None:
    """12 loads of 3 machines leave 9 and 2; 4 of 2 leave 2 and 1."""
    found = sources_of(FITTED, cost(), [with_spread("h200-sxm", H200), with_spread("h100-sxm", H100)])
    pooled = [sqrt((9 * a**2 + 2 * b**2) / 11) for a, b in ((0.03, 0.01), (0.04, 0.02), (0.10, 0.0))]
    assert found.hour == pytest.approx(pooled)
    pooled = [sqrt((2 * a**2 + 1 * b**2) / 3) for a, b in ((0.02, 0.0), (0.03, 0.0), (0.05, 0.09))]
    assert found.machine == pytest.approx(pooled)
    assert found.model == NONE and found.sizes[:2] == (0.01, 0.02) and found.steps[:2] == (0.05, 0.06)
    assert found.basis == "16 loads on 5 machines; llama-3.1-8b: what the profile was fitted to"


def test_a_model_never_run_is_off_by_what_the_others_are_beyond_machine_and_hour() -> None:
    never = sources_of(changed(FITTED, model=NEVER), cost(model=NEVER), [with_spread("h200-sxm", H200)])
    total = [sqrt((a**2 + b**2) / 2) for a, b in ((0.10, 0.20), (0.20, 0.10), (0.30, 0.10))]
    inside = [sqrt(a**2 + b**2) for a, b in zip(H200_OF["runs"], H200_OF["machines"], strict=True)]
    assert never.model == pytest.approx([sqrt(t**2 - i**2) for t, i in zip(total, inside, strict=True)])
    assert never.sizes[:2] == (0.03, 0.04)
    assert never.basis.endswith(f"{NEVER}: never run, 2 other setups were")


H200_OF = {"runs": (0.03, 0.04, 0.10), "machines": (0.02, 0.03, 0.05)}


def test_a_model_that_was_run_is_off_by_its_own_error_and_a_load_of_the_others() -> None:
    run = sources_of(changed(FITTED, model=RUN), cost(model=RUN), [with_spread("h200-sxm", H200)])
    own, never = (0.10, 0.20, 0.30), [(a**2 + b**2) / 2 for a, b in ((0.10, 0.20), (0.20, 0.10), (0.30, 0.10))]
    total = [sqrt((v + 3 * a**2) / 4) for v, a in zip(never, own, strict=True)]
    inside = [sqrt(a**2 + b**2) for a, b in zip(H200_OF["runs"], H200_OF["machines"], strict=True)]
    assert run.model == pytest.approx([sqrt(t**2 - i**2) for t, i in zip(total, inside, strict=True)])
    assert run.basis.endswith("3 loads of it in the recordings")
    drafting = changed(
        FITTED, model=RUN, speculative_config={"method": "eagle", "num_speculative_tokens": 2, "acceptance": 0.5}
    )
    found = sources_of(drafting, cost_of(drafting), [with_spread("h200-sxm", H200)])
    assert found.basis.endswith("never run, 2 other setups were"), "not with drafts"


def test_a_touched_up_profile_knows_its_machine(tmp_path: Path) -> None:
    touched = {"gpu": 1.0, "gpu_seen": 1.0, "gpu_sd": 0.001, "host": 0.9, "host_seen": 0.88, "host_sd": 0.015}
    profile = with_spread("h200-sxm", H200)
    provenance = msgspec.structs.replace(profile.provenance, touched=touched)
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(profile, provenance=provenance)))
    found = sources_of(FITTED, cost(cost=str(path)), [profile])
    assert found.machine == (0.001, 0.001, 0.015)
    assert found.hour == pytest.approx(H200_OF["runs"])
    assert "touched up by this machine" in found.basis


def test_what_nothing_is_known_of_is_refused_and_a_constant_is_exact() -> None:
    with pytest.raises(ValueError, match="no spread is recorded in any profile"):
        sources_of(FITTED, cost(), [with_spread("h200-sxm", None)])
    single = msgspec.structs.replace(H200, machines=Deviation(0.1, 0.1, 0.1, 1))
    with pytest.raises(ValueError, match="rest on one machine each"):
        sources_of(FITTED, cost(), [with_spread("h200-sxm", single)])
    with pytest.raises(ValueError, match=r"carried to qwen2.5-72b bfloat16 tp1, and no profile says how far"):
        sources_of(changed(FITTED, model=NEVER), cost(model=NEVER), [with_spread("h100-sxm", H100)])
    assert sources_of(FITTED, cost(cost="constant:0.01")) == Sources()


# ---- what is shipped ------------------------------------------------------------------------------------------------


def shipped(**fields: object) -> Sources:
    scenario = Scenario(**({"model": "llama-3.1-8b", "gpu": "h200-sxm"} | fields))  # type: ignore[arg-type]
    return sources_of(scenario, cost_of(scenario))


def test_the_less_was_run_the_less_is_sure() -> None:
    fitted, never, roofline = shipped(), shipped(model=NEVER), shipped(gpu="a100-80gb-sxm")
    assert fitted.model == NONE and 0 < fitted.machine.decode < 0.05 and 0 < fitted.hour.host < 0.3
    # what carrying adds to the spread of runs and machines: decode steps of 17 setups show nothing
    assert 0 <= never.model.decode < roofline.model.decode and 0 < never.model.chunk < roofline.model.chunk
    assert never.sizes.decode > fitted.sizes.decode > 0 and fitted.steps.chunk > 0
    by_shapes = shipped(quantization="int4")
    assert by_shapes.model.decode == pytest.approx(roofline.model.decode)
    assert by_shapes.basis.endswith("carried by shapes, at most as sure as the roofline")
    assert "roofline" in roofline.basis


def test_every_recording_has_its_place_and_every_shipped_spread_says_so() -> None:
    found = placed()
    assert sorted(found) == sorted(set(found)) == sorted(coverage.recorded_folders())
    assert set(RECORDED) == set(profile_names())
    for name, recorded in RECORDED.items():
        spread = read_profile(name).spread
        assert spread is not None and spread.machines.count == len(recorded.machines)
        assert sum(held.count for held in spread.models.values()) == loads_of(recorded.carried)
        assert spread.runs.count == sum(loads_of(group) for group in recorded.machines)
    total = sum(loads_of(group) for held in RECORDED.values() for group in (*held.machines, held.carried))
    assert sum(held.count for held in roofline_spread().models.values()) == total


def loads_of(folders: tuple[Path, ...]) -> int:
    """But those whose steps hold the wait for results."""
    compared = [folder for folder in folders if not read_recording(folder, []).waits]
    return sum(len(load_files(folder)) for folder in compared)


# ---- planted spreads ------------------------------------------------------------------------------------------------


def seconds(logs: np.ndarray, tokens: np.ndarray) -> Seconds:
    return Seconds(np.arange(float(logs.size)), np.exp(logs), np.ones(logs.size), tokens)


def load(decode: float, chunk: float, host: float, launches: int = 30) -> Load:
    """Off by so much in every step; no size differs from another."""
    tokens = np.full(30, 8.0)
    parts = [seconds(np.full(30, off), tokens) for off in (decode, chunk)]
    return Load("x", *parts, seconds(np.full(launches, host), np.zeros(0)), Seconds.of([]), 0.5, 1.0)


def test_a_setups_error_is_about_no_error_and_not_about_its_mean() -> None:
    fitted = [[load(0.01, 0.01, 0.01), load(-0.01, -0.01, -0.01)], [load(0.0, 0.0, 0.0)]]
    found = spread_of(fitted, {"m bfloat16 tp1": [load(0.03, -0.05, 0.2), load(0.04, -0.05, 0.1)]})
    error = found.models["m bfloat16 tp1"]
    assert error.gpu_decode == pytest.approx(sqrt((0.03**2 + 0.04**2) / 2), rel=0.02)
    assert error.gpu_chunk == pytest.approx(0.05, rel=0.02)
    assert (error.host, error.count) == (pytest.approx(sqrt((0.2**2 + 0.1**2) / 2), rel=0.03), 2)
    unseen = load(0.03, 0.03, 0.2, launches=3)
    with pytest.raises(ValueError, match="host is seen in none of the loads of m bfloat16 tp1"):
        spread_of(fitted, {"m bfloat16 tp1": [unseen]})
    seen = {"a": [load(0.0, 0.0, 0.3)], "b": [load(0.0, 0.0, 0.1)], "m": [unseen]}
    models = spread_of(fitted, seen).models  # as wrong as the others
    assert models["m"].host == pytest.approx(sqrt((models["a"].host ** 2 + models["b"].host ** 2) / 2), rel=0.06)
    assert models["m"].gpu_decode == pytest.approx(0.03, rel=0.03)


def test_sizes_and_steps_are_told_apart() -> None:
    """Four octaves off by so much each, and steps that stray around them."""
    rng = np.random.default_rng(0)
    offsets = np.array([0.03, -0.01, 0.01, -0.03])
    tokens = np.repeat([4.0, 8.0, 16.0, 32.0], 500)
    logs = np.repeat(offsets, 500) + 0.02 * rng.standard_normal(2000)
    logs[::200] += 2.0  # a pause now and then is neither
    one = changed(load(0.0, 0.0, 0.1), decodes=seconds(logs, tokens), chunks=seconds(0.5 * logs, tokens))
    found = carried_spread({"m": [one]})
    assert found.sizes.decode == pytest.approx(float(np.std(offsets, ddof=1)), rel=0.1)
    assert found.steps.decode == pytest.approx(0.02, rel=0.1)
    assert found.steps.chunk == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match="1 loads say nothing of iterations of one size"):
        carried_spread({"m": [load(0.0, 0.0, 0.1)]})


def test_launches_of_a_load_that_was_sent_all_at_once_say_nothing_of_the_host() -> None:
    def sent(*times_s: float) -> Recorded:
        return Recorded("x", [RequestRow(time_s, 10, 10, []) for time_s in times_s], [])

    assert not launches_told(load(0.0, 0.0, 0.9), sent(0.0, 0.1, 0.9)).launches.enough
    assert launches_told(load(0.0, 0.0, 0.9), sent(0.0, 0.1, 9.0)).launches.enough


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["roofline", "--machine", "here"], "--machine here: the roofline was fitted to no machine"),
        (["h200-sxm", "--carried", "nowhere"], "no recordings here belong to it"),
        (["h200-sxm", "--record"], "--record needs the path of the .json file"),
        (
            ["h200-sxm", "--machine", "here", "--carried", str(RECORDED["h200-sxm"].machines[3][0])],
            "is of what profile h200-sxm was fitted to. Give it with --machine",
        ),
    ],
)
def test_spread_refuses_what_it_cannot_use(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["spread", *arguments])
    assert done.exit_code and said in str(done.exception)


# ---- coverage -------------------------------------------------------------------------------------------------------


def test_a_recording_is_judged_without_its_machine_or_its_model() -> None:
    machines, carried = RECORDED["h200-sxm"].machines, RECORDED["h200-sxm"].carried
    third = coverage.kept(machines[2][0])
    assert third["h200-sxm"].machines == (*machines[:2], *machines[3:]) and third["h200-sxm"].carried == carried
    assert third["h100-sxm"] == RECORDED["h100-sxm"]
    two_gpus = coverage.kept(next(path for path in carried if path.name.endswith("qwen2.5-14b_bf16_tp2")))
    assert {coverage.model_of(path) for path in two_gpus["h200-sxm"].carried} == {
        "gemma-2-27b",
        "gemma-2-9b",
        "gemma-3-12b",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "llama-3.2-3b",
        "mistral-nemo-12b",
        "mistral-small-24b",
        "qwen2.5-1.5b",
        "qwen2.5-32b",
        "qwen2.5-3b",
        "qwen2.5-7b",
        "qwen3-1.7b",
        "qwen3-14b",
        "qwen3-32b",
        "qwen3-4b",
        "qwen3-8b",
    }
    assert two_gpus["h200-sxm"].machines == machines
    assert len(coverage.kept(RECORDED["h100-sxm"].machines[0][0])["h100-sxm"].machines) == 1


def test_a_recorded_load_is_compared_with_draws_of_the_same_load() -> None:
    profiles = [read_profile(name) for name in profile_names()]
    light = coverage.judge(RECORDED["h200-sxm"].machines[0][1], 19, profiles)
    assert [one.load for one in light] == ["tight_1024_256_q8", "tight_chat_q5"]
    for one in light:
        assert len(one.drawn) == 17 and {len(values) for values in one.drawn.values()} == {19}
        assert np.mean([one.inside(cell, 0.9) for cell in one.drawn]) > 0.6
        assert 0.005 < one.half_width(("tpot_ms", "mean"), 0.9) < 0.2


def test_shares_and_widths_of_the_table_by_hand() -> None:
    drawn = {("ttft_ms", "mean"): tuple(float(v) for v in range(1, 20)), ("itl_ms", "p50"): (1.0,) * 10 + (2.0,) * 9}
    loads = [
        coverage.Judged("a", "chat_q1", {("ttft_ms", "mean"): 19.0, ("itl_ms", "p50"): 2.5}, drawn),
        coverage.Judged("b", "chat_q2", {("ttft_ms", "mean"): 19.5, ("itl_ms", "p50"): 1.5}, drawn),
    ]
    lines = coverage.table(loads).splitlines()
    assert "| | in 50 % | in 90 % | half-width of 90 % |" in lines
    assert "| TTFT mean | 0 % | 50 % | ±90.0 % |" in lines  # 1 to 19 around 10; at 50 % from 5 to 15
    assert "| ITL p50 | 50 % | 50 % | ±50.0 % |" in lines
    assert "| **all of them** | 25 % | 50 % | |" in lines
    assert "| `a` | 1 | 100 % | ±90.0 % | ±- % | ±- % | ±- % |" in lines
    assert "| chat | 2 | 50 % | ±90.0 % | ±- % | ±- % | ±- % |" in lines
