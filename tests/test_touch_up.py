"""Touch-up: planted factors come back, doubtful ones are believed in part, and what cannot be used is one line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from plain_engine import PlainEngine, PlainRequest, Settings

from calibration.__main__ import main
from calibration.observe import DISPATCH_S
from calibration.profiles import write_profile
from calibration.spread import spread_of
from calibration.steps import Recording, read_recording
from calibration.touch_up import (
    Load,
    Ratio,
    Seconds,
    believed,
    cost_for,
    first_part,
    observed,
    slower,
    touch_up,
    touched_profile,
)
from llmsim.cost import EAGER, FULL, LaunchNoise
from llmsim.cost.graphs import Graphs
from llmsim.cost.load import CostSettings
from llmsim.cost.profile import Deviation, Profile, ProfileCost, Spread, decode_profile, read_profile
from llmsim.hardware import find_gpu, find_model
from llmsim.recording import load_recording
from llmsim.validate import compare, predicted

SECOND = Path(__file__).parent / "data" / "recordings" / "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16_second-machine"
ENGINE = json.loads((SECOND / "engine.json").read_text())
SETTINGS = CostSettings(1, "bfloat16", "auto", Graphs.of_engine(256, 8192))
SHIPPED = msgspec.structs.replace(read_profile("h100-sxm"), spread=None)


def cost_of(profile: Profile) -> ProfileCost:
    return ProfileCost(profile, find_model("llama-3.1-8b"), find_gpu("h100-sxm"), SETTINGS)


def scaled(gpu: float, host: float) -> ProfileCost:
    kernels = None if SHIPPED.kernels is None else slower(SHIPPED.kernels, gpu)
    quiet = msgspec.structs.replace(SHIPPED.host_clock, stall_share=0.0)
    clock = slower(SHIPPED.gpu_clock, gpu)
    cost = cost_of(msgspec.structs.replace(SHIPPED, gpu_clock=clock, host_clock=quiet, kernels=kernels))
    cost.host = cost.host.scaled(host)
    return cost


def poisson(rate: float, count: int, longest: int = 3000, output: int = 64) -> list[PlainRequest]:
    rng = np.random.default_rng(7)
    arrival_s = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    return [PlainRequest(i, at_s, int(rng.integers(300, longest)), output) for i, at_s in enumerate(arrival_s)]


def record(folder: Path, cost: ProfileCost, requests: list[PlainRequest], **engine: Any) -> Path:
    """What a recorder would have left, had the machine this clock."""
    folder.mkdir(exist_ok=True)
    steps = PlainEngine(cost, Settings(num_gpu_blocks=28_000), LaunchNoise(cost.host, 1).draw).run(requests)
    lines: list[list[Any]] = [["e", -2.0], ["u", -1.0, 1e-4]]  # with empty schedules updates pair first in, first out
    for step in steps:
        took_s = step.launch_s - step.schedule_s - DISPATCH_S
        counts = [step.tokens, step.seqs, step.kv_tokens, step.chunks, step.running, step.waiting, 0.1]
        lines += [["s", step.schedule_s, took_s, *counts], ["u", step.update_s, 1e-4]]
    lines.sort(key=lambda line: line[1])
    rows = [
        {"prompt": r.prompt, "output": r.output, "submit": r.send_s, "t": [(at_s, 1) for at_s in r.token_s]}
        for r in requests
    ]
    (folder / "engine.json").write_text(json.dumps(ENGINE | engine))
    with gzip.open(folder / "load.requests.json.gz", "wt") as stream:
        json.dump({"scenario": {"name": "load"}, "requests": rows}, stream)
    with gzip.open(folder / "load.steps.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def load_of(folder: Path, first_s: float = 30.0) -> tuple[Recording, Load]:
    recording = read_recording(folder)
    cost = cost_for(recording, "h100-sxm", "llama-3.1-8b", "h100-sxm")
    return recording, observed(first_part(recording.scenarios[0], first_s), cost)


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["touch-up", *map(str, arguments)])


# ---- planted factors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "host"), [(1.0, 1.0), (1.06, 0.8), (0.93, 1.3), (1.2, 1.5)])
def test_planted_factors_are_recovered(tmp_path: Path, gpu: float, host: float) -> None:
    _, load = load_of(record(tmp_path / "mine", scaled(gpu, host), poisson(10, 350)))
    found = touch_up(load, SHIPPED)
    assert found.gpu == pytest.approx(gpu, rel=0.01)
    assert found.host == pytest.approx(host, rel=0.05)
    # a launch that ends before the GPU does not show, so those seen of a fast host are a little long
    assert abs(found.host - host) < 3 * load.host.sd + 0.02 * host
    assert found.gpu_sd < 0.01 and load.host.sd < 0.05 * host


def test_without_launches_the_host_is_that_of_its_schedules(tmp_path: Path) -> None:
    decodes = [PlainRequest(i, 0.2 * i, 200, 1500) for i in range(8)]
    _, load = load_of(record(tmp_path / "mine", scaled(1.05, 1.4), decodes))
    assert load.host.count == len(load.schedules.at_s)
    found = touch_up(load, SHIPPED)
    assert (found.gpu, found.host) == (pytest.approx(1.05, rel=0.01), pytest.approx(1.4, rel=0.03))
    assert load.host.sd >= 0.1  # schedules say less about launches
    assert load.weights == (1.0, 0.0)  # eight prompts are no ratio


def test_launches_of_requests_sent_at_once_are_not_the_hosts() -> None:
    """They wait for the GPU, here for six times as long as a launch takes."""
    folder = Path(__file__).parents[1] / "calibration" / "recordings"
    folder /= "vllm-0.25.1_h200-sxm_llama-3.1-8b_kv-fp8_eighth-machine"
    recording = read_recording(folder, ["offline_n250_chat"])
    load = observed(recording.scenarios[0], cost_for(recording, "h200-sxm", "llama-3.1-8b", "h200-sxm"))
    assert not load.launches.enough and load.schedules.enough and 0.8 < load.host.value < 1.6


def test_touched_profile_predicts_the_planted_machine_and_says_where_it_is_from(tmp_path: Path) -> None:
    folder = record(tmp_path / "mine", scaled(1.1, 1.3), poisson(10, 350))
    done = invoke(folder, "-o", tmp_path / "mine.json", "--first", "30s")
    assert done.exit_code == 0, done.output
    assert re.search(r"decode steps +\d\.\d+ +0\.\d+ +\d+", done.output)
    profile = read_profile(str(tmp_path / "mine.json"))
    shipped = read_profile("h100-sxm")
    assert profile.name == "h100-sxm@mine"
    source = profile.provenance
    assert f"touch-up of h100-sxm ({shipped.id})" in source.fitter
    own = {"mine/engine.json", "mine/load.requests.json.gz", "mine/load.steps.jsonl.gz"}
    assert set(source.recordings) == set(shipped.provenance.recordings) | own
    assert source.scenarios[-1] == "load"
    assert source.touched is not None
    assert sorted(source.touched) == ["gpu", "gpu_sd", "gpu_seen", "host", "host_sd", "host_seen"]
    assert source.touched["gpu_seen"] == pytest.approx(1.1, rel=0.01)
    assert 0 < profile.error["fit_decode_step_median"] < 0.02
    (recorded,) = load_recording(folder / "load.requests.json.gz")

    def error(cost: str) -> float:
        metrics = compare([predicted(recorded, cost=cost, seed=seed) for seed in range(4)], recorded)
        return abs(metrics["e2el_ms"]["mean"]["error"])

    assert error("auto") > 0.05
    assert error(str(tmp_path / "mine.json")) < 0.04


def test_a_profile_made_slower_is_slower_in_every_part() -> None:
    plain, slow = scaled(1.0, 1.0), scaled(1.25, 1.0)
    for seqs, kv_tokens in ((1, 0), (7, 5000), (64, 10**5), (256, 10**6)):
        expected_s = 1.25 * plain.decode_ramp(seqs, kv_tokens).first_s
        assert slow.decode_ramp(seqs, kv_tokens).first_s == pytest.approx(expected_s)
    for chunks in ([(100, 0)], [(1024, 0)], [(2, 100_000)], [(8192, 0)], [(100, 50), (700, 0)]):
        assert slow.mixed_s(chunks, 0, 0) == pytest.approx(1.25 * plain.mixed_s(chunks, 0, 0))


def test_another_model_is_scaled_by_the_same_factor() -> None:
    model, gpu = find_model("qwen3-14b"), find_gpu("h100-sxm")
    kernels = None if SHIPPED.kernels is None else slower(SHIPPED.kernels, 1.25)
    profile = msgspec.structs.replace(SHIPPED, gpu_clock=slower(SHIPPED.gpu_clock, 1.25), kernels=kernels)
    plain, slow = (ProfileCost(p, model, gpu, SETTINGS) for p in (SHIPPED, profile))
    assert slow.decode_ramp(64, 10**5).first_s == pytest.approx(1.25 * plain.decode_ramp(64, 10**5).first_s)
    assert slow.mixed_s([(9000, 0)], 0, 0) == pytest.approx(1.25 * plain.mixed_s([(9000, 0)], 0, 0))


def test_touched_host_is_the_host_scaled_without_what_does_not_depend_on_its_speed(tmp_path: Path) -> None:
    recording, load = load_of(record(tmp_path / "mine", scaled(1.0, 1.3), poisson(10, 200)))
    found = touch_up(load, SHIPPED)
    touched, plain = cost_of(touched_profile(SHIPPED, found, recording, "x")).host, cost_of(SHIPPED).host
    assert touched.launch_s[EAGER] == pytest.approx(found.host * plain.launch_s[EAGER], rel=1e-5)
    assert touched.launch_s[FULL] == pytest.approx(found.host * plain.launch_s[FULL], rel=1e-5)
    assert touched.drift_hold_s == pytest.approx(plain.drift_hold_s) and touched.warm_share == plain.warm_share


# ---- how much is believed -----------------------------------------------------------------------------------------


def test_what_loads_of_one_machine_differ_by_is_not_taken_for_the_machine() -> None:
    seen = Ratio(1.1, 0.02, 100)
    assert believed(seen, runs=0.0, machines=1.0) == pytest.approx(1.1, abs=1e-3)
    assert believed(seen, runs=0.1, machines=0.0) == 1.0
    assert believed(seen, runs=0.06, machines=0.06) == pytest.approx(1.1 - 0.1 * 0.04 / 0.076, abs=1e-9)


def test_a_difference_far_beyond_chance_is_the_machine() -> None:
    assert believed(Ratio(2.0, 0.02, 100), runs=0.02, machines=0.01) > 1.98
    halves = [believed(Ratio(1.0 + off, 0.0, 100), runs=0.1, machines=0.1) for off in np.linspace(0.0, 1.0, 101)]
    assert np.all(np.diff(halves) > 0.0)  # and no step on the way there


def test_the_profile_says_how_much_to_believe(tmp_path: Path) -> None:
    _, load = load_of(record(tmp_path / "mine", scaled(1.06, 1.3), poisson(10, 350)))
    doubtful = Deviation(gpu_decode=0.05, gpu_chunk=0.05, host=0.3, count=5)
    machines = Deviation(gpu_decode=0.05, gpu_chunk=0.05, host=0.3, count=2)
    found = touch_up(load, msgspec.structs.replace(SHIPPED, spread=Spread(doubtful, machines)))
    assert found.gpu == pytest.approx(1.03, abs=0.01)
    assert found.host == pytest.approx(1.15, abs=0.03)


# ---- spread -------------------------------------------------------------------------------------------------------


def load_with(decode: float, chunk: float, host: float) -> Load:
    def seconds(ratio: float) -> Seconds:
        return Seconds(np.arange(30.0), np.full(30, ratio), np.ones(30))

    return Load("x", seconds(decode), seconds(chunk), seconds(host), seconds(1.0), 0.5, 1.0)


def test_planted_spreads_are_recovered() -> None:
    def loads(machine: float) -> list[Load]:
        """Two loads, off the machine's mean by the same either way."""
        return [load_with(*np.exp([machine + off, 2 * machine + off, machine + 3 * off])) for off in (-0.01, 0.01)]

    found = spread_of([loads(0.05), loads(-0.05)])
    runs, machines = found.runs, found.machines
    within = [0.0002**0.5, 0.0002**0.5, 0.0018**0.5]
    assert [runs.gpu_decode, runs.gpu_chunk, runs.host] == pytest.approx(within, rel=0.02)
    between = [(0.1**2 / 2 - 0.01**2) ** 0.5, (0.2**2 / 2 - 0.01**2) ** 0.5, (0.1**2 / 2 - 0.03**2) ** 0.5]
    assert [machines.gpu_decode, machines.gpu_chunk, machines.host] == pytest.approx(between, rel=0.02)
    assert (runs.count, machines.count) == (4, 2)


def test_a_spread_needs_two_machines_and_two_loads_on_one() -> None:
    with pytest.raises(ValueError, match="2 loads by machine; a spread needs two machines"):
        spread_of([[load_with(1, 1, 1), load_with(1, 1, 1)]])
    with pytest.raises(ValueError, match="1, 1 loads by machine"):
        spread_of([[load_with(1, 1, 1)], [load_with(1, 1, 1)]])


def test_spread_is_recorded_in_a_profile_file_which_keeps_its_predictions(tmp_path: Path) -> None:
    first = SECOND.with_name(SECOND.name.removesuffix("_second-machine"))
    path = tmp_path / "p.json"
    write_profile(SHIPPED, path)
    done = CliRunner().invoke(
        main, ["spread", str(path), "--machine", str(first), "--machine", str(SECOND), "--record"]
    )
    assert done.exit_code == 0, done.output
    recorded = decode_profile(path.read_bytes(), "p")
    spread = recorded.spread
    assert spread is not None and (spread.runs.count, spread.machines.count) == (5, 2)
    assert 0.04 < spread.machines.host < 0.15
    assert recorded.gpu_clock == SHIPPED.gpu_clock


def test_a_profile_without_spread_or_touch_up_keeps_its_id() -> None:
    """Optional parts that are absent are not in the content that is hashed."""
    assert b"spread" not in msgspec.json.encode(SHIPPED)
    assert b"touched" not in msgspec.json.encode(SHIPPED)


# ---- the real second machine --------------------------------------------------------------------------------------


def test_the_second_machine_is_predicted_better_after_half_a_minute_of_it(tmp_path: Path) -> None:
    done = invoke(SECOND, "-o", tmp_path / "mine.json")
    assert done.exit_code == 0, done.output
    touched = read_profile(str(tmp_path / "mine.json")).provenance.touched
    assert touched is not None and touched["host_seen"] == pytest.approx(0.88, abs=0.04)
    (recorded,) = load_recording(SECOND / "poisson_q14_r1.requests.json.gz")

    def error(cost: str) -> float:
        metrics = compare([predicted(recorded, cost=cost, seed=seed) for seed in range(6)], recorded)
        return sum(abs(metrics[m]["mean"]["error"]) for m in ("ttft_ms", "tpot_ms", "e2el_ms"))

    assert error(str(tmp_path / "mine.json")) < 0.6 * error("auto")


# ---- what cannot be used ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "mine", scaled(1.0, 1.0), poisson(10, 60))


def with_engine(folder: Path, tmp_path: Path, **engine: Any) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "engine.json").write_text(json.dumps(ENGINE | engine))
    return tmp_path


def refused(*arguments: str | Path) -> str:
    output = Path(gettempdir()) / "never-written.json"
    done = invoke(*arguments, "-o", output)
    assert done.exit_code == 1 and isinstance(done.exception, (ValueError, FileNotFoundError))
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_a_folder_without_steps_is_refused(folder: Path, tmp_path: Path) -> None:
    (with_engine(folder, tmp_path) / "load.steps.jsonl.gz").unlink()
    assert re.search(r"load\.steps\.jsonl\.gz: no such file\. load\.requests\.json\.gz needs", refused(tmp_path))
    (tmp_path / "load.requests.json.gz").unlink()
    assert "no load is in it" in refused(tmp_path)
    assert "engine.json: no such file" in refused(tmp_path / "nowhere")


def test_too_few_steps_are_refused(folder: Path) -> None:
    assert re.search(r"load: \d+ steps; 20 or more say something", refused(folder, "--first", "0.1s"))


def test_another_gpu_model_or_size_is_refused(folder: Path, tmp_path: Path) -> None:
    a100 = with_engine(folder, tmp_path, gpu="NVIDIA A100 80GB")
    assert "engine.json: gpu='NVIDIA A100 80GB' is that of 0 shipped profiles. Give --profile" in refused(a100)
    assert "but profile h100-sxm is of h100-sxm" in refused(a100, "--profile", "h100-sxm")
    qwen = with_engine(folder, tmp_path, model="Qwen3-8B")
    assert "model='Qwen3-8B', but profile h100-sxm is of llama-3.1-8b. Record that, or name" in refused(qwen)
    waits = with_engine(folder, tmp_path, async_scheduling=False)
    assert "async_scheduling=false: its steps hold waits" in refused(waits)
    wide = with_engine(folder, tmp_path, tensor_parallel_size=2)
    assert "tensor_parallel_size=2, but profile h100-sxm is of 1. Record that, or name" in refused(wide)


def test_another_model_can_be_named(folder: Path, tmp_path: Path) -> None:
    qwen = with_engine(folder, tmp_path, model="Qwen3-8B", max_model_len=40960)
    assert invoke(qwen, "--model", "qwen3-8b", "-o", tmp_path / "mine.json").exit_code == 0


def test_several_loads_need_a_name_and_a_grid_is_none(tmp_path: Path) -> None:
    first = SECOND.with_name(SECOND.name.removesuffix("_second-machine"))
    assert "its loads are azconv_x1, closed64_1024_256, poisson_1024_128_q18" in refused(first)
    assert "decode_grid is 30 batches. Touch up with a load" in refused(first, "--scenario", "decode_grid")


@pytest.mark.parametrize("time", ["0s", "soon", "-3s", "3h"])
def test_a_time_is_above_zero(folder: Path, time: str) -> None:
    done = invoke(folder, "--first", time, "-o", "x.json")
    assert done.exit_code == 2 and "is not a time above 0, as in 30s or 2min" in done.output
