"""No prediction of a recorded load becomes worse than what was accepted (benchmarks.accepted)."""

from __future__ import annotations

import warnings
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import accepted, accuracy
from calibration.profiles import write_profile
from calibration.touch_up import slower
from llmsim.cost.profile import read_profile

LOADS = {name: file for folder in accuracy.recordings() for name, file in accepted.loads(folder)}
HELD = accepted.read()
LIGHT = "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16/closed64_1024_256"


@pytest.mark.parametrize("name", LOADS)
def test_no_error_has_grown(name: str) -> None:
    worse, better = accepted.changes(name, LOADS[name], HELD)
    for line in better:
        warnings.warn(line, stacklevel=1)
    assert not worse, "\n".join(worse)


def test_accepted_loads_are_those_recorded() -> None:
    assert sorted(HELD) == sorted(LOADS), f"take them over with: {accepted.COMMAND}"


def test_noise_is_below_a_third_of_the_tolerance_or_all_draws_are_used() -> None:
    for name, held in HELD.items():
        most = accepted.MOST_OF_GRID if name.endswith("decode_grid") else accepted.MOST
        assert accepted.LEAST <= held.seeds <= most
        quiet = all(
            accepted.NOISE_SHARE * noise <= accepted.TOLERANCE[statistic] + 1e-5
            for statistics in held.noise.values()
            for statistic, noise in statistics.items()
        )
        assert quiet or held.seeds == most, name


def test_a_spoiled_profile_fails_with_what_became_worse(tmp_path: Path) -> None:
    profile = read_profile("h100-sxm")
    spoiled = tmp_path / "spoiled.json"
    kernels = None if profile.kernels is None else slower(profile.kernels, 1.03)
    clock = slower(profile.gpu_clock, 1.03)
    write_profile(msgspec.structs.replace(profile, gpu_clock=clock, kernels=kernels), spoiled)
    worse, _ = accepted.changes(LIGHT, LOADS[LIGHT], HELD, cost=str(spoiled))
    line = next(line for line in worse if "mean TPOT" in line)
    assert line.startswith(f"{LIGHT}: mean TPOT error was ") and "points worse" in line
    assert line.endswith("python -m benchmarks.accuracy --accept")


def test_what_was_never_accepted_fails_and_what_became_better_is_a_hint() -> None:
    worse, _ = accepted.changes(LIGHT, LOADS[LIGHT], {})
    assert worse == [f"{LIGHT}: no accepted errors. Take its own with: {accepted.COMMAND}"]
    bad = msgspec.structs.replace(HELD[LIGHT], errors={"tpot_ms": {"mean": -0.2}})
    worse, better = accepted.changes(LIGHT, LOADS[LIGHT], {LIGHT: bad})
    assert not worse and "mean TPOT error was -20.0%" in better[0] and "better" in better[0]


def test_accept_writes_what_then_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepted, "ACCEPTED", tmp_path / "accuracy.json")
    folder = tmp_path / LIGHT.split("/")[0]
    folder.mkdir()
    for file in (LOADS[LIGHT], LOADS[LIGHT].parent / "engine.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(accuracy, "recordings", lambda: [folder])
    done = CliRunner().invoke(accuracy.main, ["--accept"])
    assert done.exit_code == 0, done.output
    assert list(accepted.read()) == [LIGHT]
    assert accepted.changes(LIGHT, LOADS[LIGHT], accepted.read()) == ([], [])


def test_accept_takes_all_recordings_as_they_are() -> None:
    done = CliRunner().invoke(accuracy.main, ["--accept", "--host-scale", "2"])
    assert done.exit_code == 2
    assert "--accept is of all recordings with the shipped profiles" in done.output
