"""The recorder on a stand-in for vLLM: hooks, loads, export, and what is kept when something goes wrong."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from click.testing import CliRunner

from calibration.record import command, hooks, session, setup
from calibration.record.client import Client
from calibration.record.plans import Load, Mixed, Plan, Send, fitting, make_load, make_loads, of_trace, read_plan
from calibration.steps import read_recording
from llmsim.hardware import find_gpu, find_model, gpu_names, model_names
from llmsim.model_config import model_fields
from llmsim.recording import load_recording
from llmsim.trace import load_trace
from llmsim.validate import named_in, validate

MACHINE = {"name": "NVIDIA H200", "memory_mib": 143771, "driver": "580.159.04", "gpus": 2}
TRACES = Path(__file__).parent.parent / "traces"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.Engine:
    engine = fake_vllm.Engine()
    fake_vllm.install(monkeypatch, engine)
    monkeypatch.setattr(session, "nvidia_smi", lambda: MACHINE)
    for key, value in session.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    return engine


def run(out: Path, *loads: Load | Mixed, said: list[str] | None = None, **options: Any) -> session.Recorded:
    given = {
        key: options.pop(key) for key in ("tensor_parallel_size", "max_num_seqs", "quantization") if key in options
    }
    plan = Plan("llama-3.1-8b", given, loads)
    return session.record(plan, out, say=(said if said is not None else []).append, **options)


def lines(path: Path) -> list[list[Any]]:
    with gzip.open(path, "rt") as stream:
        return [json.loads(line) for line in stream]


def burst(name: str, count: int, prompt: int = 300, output: int = 6, **more: Any) -> Load:
    return Load(name, tuple(Send(0.004 * i, prompt, output) for i in range(count)), lead_s=0.02, **more)


MIXED = Mixed("mix_small", ((64, 3),), (16, 700), gap_steps=2)


def test_readers_take_the_folder(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    grid = Load("grid_c64_b3", (Send(0.0, 64, 5),) * 3, keep="decode_grid", lead_s=0.01)
    said: list[str] = []
    loads = [burst("warm", 2, keep=""), grid, MIXED, burst("open", 12), burst("closed", 9, concurrency=2)]
    done = run(tmp_path / "r", *loads, said=said)
    assert done.scenarios == ["grid_c64_b3", "mix_small", "open", "closed"] and not done.cause
    assert sorted(path.name for path in done.out.iterdir()) == sorted(
        ["engine.json", "decode_grid.json.gz", "mixed_grid.json.gz"]
        + [
            f"{name}.{kind}"
            for name in ("open", "closed")
            for kind in ("requests.json.gz", "steps.jsonl.gz", "gpu.jsonl.gz")
        ]
    )
    seen = {scenario.name: scenario for scenario in load_recording(done.out)}
    assert set(seen) == {"grid_c64_b3", "open", "closed"}
    assert {note.split(": ")[-2] for one in seen.values() for note in one.notes} <= {
        "batches for fitting, not replayed"
    }
    assert seen["open"].finished.all() and seen["closed"].concurrency == 2
    for scenario in read_recording(done.out).scenarios:
        assert sum(step.new_tokens for step in scenario.steps) == sum(r.prompt_tokens for r in scenario.requests)
        assert sum(step.seqs for step in scenario.steps) == sum(r.output_tokens - 1 for r in scenario.requests)
        for step in scenario.steps:
            assert step.schedule_s < step.launch_s < step.launched_s < step.update_s
        assert all(len(request.token_s) == request.output_tokens for request in scenario.requests)
    content = json.loads(gzip.decompress((done.out / "open.requests.json.gz").read_bytes()))
    for row in content["requests"]:  # in microseconds: a request may be queued in the one it was sent in
        assert 0 <= row["submit"] <= row["queued"] < row["t"][0][0] and "id" not in row


def test_gpu_times_belong_to_their_steps(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    done = run(tmp_path / "r", burst("warm", 3, keep=""), MIXED, burst("open", 12))
    scheduled = [line for line in lines(done.out / "open.steps.jsonl.gz") if line[0] == "s"]
    gpu = lines(done.out / "open.gpu.jsonl.gz")
    assert [row[0] for row in gpu] == list(range(len(scheduled)))
    assert [row[6] for row in gpu] == [line[3] for line in scheduled]  # padded = tokens in the fake
    assert all(min(row[2:5]) >= 0 and row[5] in ("FULL", "NONE") for row in gpu) and not any(row[7] for row in gpu)
    (mixed,) = json.loads(gzip.decompress((done.out / "mixed_grid.json.gz").read_bytes()))
    steps = [line for line in mixed["steps"] if line[0] == "s"]
    held = {steps[row[0]][6][0][0] for row in mixed["gpu"] if row[7]}
    assert held == {16, 700}
    assert {row["tag"] for row in mixed["requests"]} == {
        "background", "c64d3p0n16", "c64d3p0n700", "c64d3p0n16_spin", "c64d3p0n700_spin",
    }  # fmt: skip
    assert not any("t" in row for row in mixed["requests"])


def test_workers_launches_with_several_gpus(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    done = run(tmp_path / "r", burst("warm", 3, keep=""), burst("open", 12), tensor_parallel_size=2)
    log = lines(done.out / "open.steps.jsonl.gz")
    of = {kind: [line for line in log if line[0] == kind] for kind in "sxywv"}
    assert len(of["s"]) == len(of["w"]) == len(of["v"]) == len(lines(done.out / "open.gpu.jsonl.gz"))
    for step, send, launch, sample in zip(of["s"], of["x"], of["w"], of["v"], strict=True):
        assert step[3] == launch[3] and step[1] < send[1] <= launch[1] < sample[1]
    engine_json = json.loads((done.out / "engine.json").read_text())
    assert engine_json["tensor_parallel_size"] == 2 and engine_json["environment"]["NCCL_NVLS_ENABLE"] == "0"
    assert len(read_recording(done.out).scenarios[0].steps) == len(of["s"])


def test_engine_json_is_understood(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    done = run(tmp_path / "r", burst("open", 12), quantization="fp8")
    (recorded,) = load_recording(done.out)
    assert recorded.notes == () and recorded.settings["quantization"] == "fp8"
    assert recorded.settings["num_gpu_blocks_override"] == 56057 and recorded.settings["tensor_parallel"] == 1
    assert recorded.engine["gpu_memory_bytes"] == 150109880320
    assert recorded.engine["attention"] == "FLASH_ATTN (FlashAttention 3)" and recorded.engine["weights_gib"] == 15.0
    (compared,) = validate(done.out, seeds=1)["scenarios"]
    assert compared["metrics"]["ttft_ms"]["mean"]["predicted"] > 0


@pytest.mark.parametrize("missing", [None, ("Runner", "sample")])
def test_model_runner_v1_and_missing_gpu_points(
    monkeypatch: pytest.MonkeyPatch, engine: fake_vllm.Engine, tmp_path: Path, missing: tuple[str, str] | None
) -> None:
    if missing is None:
        engine.runner = "v1"
        mode = "PIECEWISE"
    else:
        engine.remove = (missing,)
        fake_vllm.install(monkeypatch, engine)
        monkeypatch.setattr(
            sys.modules["vllm.v1.executor.uniproc_executor"].UniProcExecutor, "sample_tokens", no_sample
        )
        mode = ""
    done = run(tmp_path / "r", burst("open", 5))
    told = json.loads((done.out / "engine.json").read_text())
    if mode:
        assert {row[5] for row in lines(done.out / "open.gpu.jsonl.gz")} == {mode} and told["model_runner"] == "v1"
    else:
        assert told["gpu_times"] == "not recorded: vllm 0.25.1 has no Runner.sample"
        assert not (done.out / "open.gpu.jsonl.gz").exists() and len(load_recording(done.out)) == 1


def no_sample(self: Any, grammar: Any, non_block: bool = False) -> None:
    pass


def test_preemptions_are_seen(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    engine.preempt = "open-3"
    done = run(tmp_path / "r", burst("open", 8))
    (scenario,) = read_recording(done.out).scenarios
    assert scenario.preemptions == 1 and sum(step.after_preemption for step in scenario.steps) == 1


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_version_without_a_method(monkeypatch: pytest.MonkeyPatch, engine: fake_vllm.Engine, tmp_path: Path) -> None:
    engine.remove = (("Scheduler", "_preempt_request"),)
    fake_vllm.install(monkeypatch, engine)
    with pytest.raises(ValueError, match=r"^vllm 0\.25\.1: Scheduler has no method _preempt_request\. This recorder"):
        run(tmp_path / "r", burst("open", 3))
    assert not (tmp_path / "r").exists()


def test_no_vllm_no_gpu_no_start(monkeypatch: pytest.MonkeyPatch, engine: fake_vllm.Engine, tmp_path: Path) -> None:
    engine.fail_start = "Engine core initialization failed.\nSee root cause above."
    with pytest.raises(ValueError, match=r"^vllm did not start: RuntimeError: Engine core .* cause above"):
        run(tmp_path / "r", burst("open", 3))
    with pytest.raises(ValueError, match=r"^engine option 'max_num_seq': vllm has none of that name; max_num_seqs\?"):
        session.record(Plan("llama-3.1-8b", {"max_num_seq": 3}, (burst("open", 3),)), tmp_path / "r")
    with pytest.raises(ValueError, match=r"^tensor_parallel_size=4: this machine has 2 GPUs"):
        run(tmp_path / "r", burst("open", 3), tensor_parallel_size=4)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"^vllm cannot be imported .*Install vllm 0\.25\.1"):
        run(tmp_path / "r", burst("open", 3))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^no NVIDIA GPU: nvidia-smi does not answer"):
        setup.nvidia_smi()
    assert not (tmp_path / "r").exists()


def test_a_folder_is_not_overwritten(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a recording already"):
        run(tmp_path, burst("open", 3))


def test_refused_requests_are_left_unfinished(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    refused = Load("some", (Send(0.0, 666, 4), *burst("x", 5).sends), lead_s=0.02)
    done = run(
        tmp_path / "r", refused, Load("none", (Send(0.0, 666, 4),), lead_s=0.02), burst("open", 4), said=(said := [])
    )
    assert done.scenarios == ["some", "open"]
    content = json.loads(gzip.decompress((done.out / "some.requests.json.gz").read_bytes()))
    assert content["errors"] == ["ValueError: this prompt is refused"]
    assert [int(one.finished.sum()) for one in load_recording(done.out)] == [4, 5]
    assert "none: not kept, none of its 1 requests finished" in said


def test_the_time_limit_keeps_what_was_served(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    said: list[str] = []
    slow = Load("slow", (Send(0.0, 100, 3), Send(0.1, 100, 100_000)), lead_s=0.02)
    done = run(tmp_path / "r", burst("open", 4), slow, burst("later", 4), time_limit_s=1.2, said=said)
    assert done.scenarios == ["open", "slow"] and "time limit of 1.2 s" in done.cause
    assert said[-1] == "the time limit of 1.2 s is reached; not recorded: later"
    by_name = {scenario.name: scenario for scenario in load_recording(done.out)}
    assert by_name["slow"].finished.tolist() == [True, False]
    assert len(read_recording(done.out).scenarios) == 2


def test_an_engine_that_dies_keeps_what_was_served(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    engine.die_after = 60
    done = run(tmp_path / "r", burst("open", 4), burst("long", 5, output=500), burst("later", 4), said=(said := []))
    assert done.scenarios == ["open"] and said[-1].startswith(
        "the engine died, its own log says why; not recorded: long"
    )
    assert len(load_recording(done.out)) == 1


def test_interrupted_keeps_what_was_served(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    slow = Load("slow", (Send(0.0, 100, 3), Send(0.1, 100, 100_000)), lead_s=0.02)
    done = run(tmp_path / "r", slow, burst("later", 4))
    assert done.scenarios == ["slow"] and done.cause == "stopped by SIGINT"
    assert len(load_recording(done.out)) == 1


def test_raw_logs_stay_if_asked(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    done = run(tmp_path / "r", burst("open", 4), keep_raw=True)
    assert (done.out / "raw" / hooks.STEPS).stat().st_size > 100
    assert load_recording(done.out)[0].notes == ()


# ---- loads --------------------------------------------------------------------------------------------------------


def test_loads_by_name() -> None:
    loads = make_loads(
        "warm,decode_grid,mixed_grid,poisson:1024:128:q8:30s,poisson:1024:128:q8:30s=again,chat:q8:n50,long:q0.7:60s,"
        "closed:64:1024:256:n384,offline:n40:chat,offline:n40:512:32,prefix_tree:q6:n300,prefix_turns:60"
    )
    by_name = {load.name: load for load in loads}
    assert {
        "warm",
        "grid_c16384_b16",
        "ctx_d64",
        "skew_3",
        "poisson_1024_128_q8",
        "again",
        "chat_q8",
        "long_q0.7",
    } < set(by_name)
    assert {"closed64_1024_256", "offline_n40_chat", "offline_n40_512_32", "prefix_tree_q6", "prefix_turns"} < set(
        by_name
    )
    poisson, again = by_name["poisson_1024_128_q8"], by_name["again"]
    assert isinstance(poisson, Load) and isinstance(again, Load)
    assert poisson.sends == again.sends == make_load("poisson:1024:128:q8:30s")[0].sends  # type: ignore[union-attr]
    assert 180 < len(poisson.sends) < 300 and max(send.arrival_s for send in poisson.sends) < 30
    assert poisson.sends != make_load("poisson:1024:128:q8:30s", seed=2)[0].sends  # type: ignore[union-attr]
    closed, chat = by_name["closed64_1024_256"], by_name["chat_q8"]
    assert isinstance(closed, Load) and closed.concurrency == 64 and len(closed.sends) == 384
    assert isinstance(chat, Load) and len({send.prompt_tokens for send in chat.sends}) > 40
    turns, tree = by_name["prefix_turns"], by_name["prefix_tree_q6"]
    assert isinstance(turns, Load) and isinstance(tree, Load)
    for load in (turns, tree):
        for send in load.sends:
            assert len(send.hash_ids) == -(-send.prompt_tokens // 512) and send.prompt_tokens % 16
    assert len({send.hash_ids[0] for send in tree.sends}) == 1
    assert (
        len({send.hash_ids[0] for send in turns.sends}) < 75 < len(turns.sends)
    )  # 60 sessions; short turns share nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no load given"),
        ("fast", "load 'fast': 'fast' is none of warm,"),
        ("chat:q8", "write it as chat:q8:30s"),
        ("chat:q8:30s:n5", "write it as chat:q8:30s"),
        ("chat:q0:30s", "write it as chat"),
        ("chat:q0.001:1s", "no request arrives"),
        ("poisson:1024:q8:30s", "write it as poisson:1024:128:q8:30s"),
        ("poisson:0:128:q8:30s", "write it as poisson"),
        ("closed:64:1024:256", "write it as closed"),
        ("offline:n400", "write it as offline"),
        ("offline:n400:music", "write it as offline"),
        ("decode_grid:tiny", "write it as decode_grid or decode_grid:small"),
        ("warm:3", "write it as warm"),
        ("poisson:1024:128:8/s:30s", "'8/s' is no number"),
        ("decode_grid=a", "cannot have one name"),
        ("chat:q8:30s,chat:q8:20s", "scenario chat_q8: named twice"),
        ("chat:q8:30s=../x", "cannot be a file's name"),
        ("recorded:/nowhere.json.gz", "/nowhere.json.gz: no such file"),
    ],
)
def test_bad_loads(text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make_loads(text)
    assert message in str(error.value) and "\n" not in str(error.value)


GOOD = {"model": "llama-3.1-8b", "scenarios": [{"name": "a", "requests": [[0, 10, 5], [0.5, 600, 5, [1, 2]]]}]}


def test_plan_file(tmp_path: Path) -> None:
    mixed = {"name": "m", "kind": "mixed", "levels": [[1024, 8]], "chunks": [16]}
    more = {"engine": {"max_num_seqs": 64}, "seed": 3, "scenarios": [*GOOD["scenarios"], {"load": "chat:q8:9s"}, mixed]}
    (tmp_path / "p.json").write_text(json.dumps(GOOD | more))
    plan = read_plan(tmp_path / "p.json")
    assert [load.name for load in plan.loads] == ["a", "chat_q8", "m"] and plan.seed == 3
    first = plan.loads[0]
    assert isinstance(first, Load) and first.sends[1] == Send(0.5, 600, 5, (1, 2))
    assert plan.loads[1] == make_load("chat:q8:9s", 3)[0] and isinstance(plan.loads[2], Mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "Expecting"),
        ({"model": 3}, "`$.model`"),
        ({"scenarios": []}, "no load given"),
        ({"scenarios": [{"name": "a", "requests": []}]}, "scenarios[0]: needs one of load, requests"),
        (
            {"scenarios": [{"name": "a", "requests": [[0, 0, 5]]}]},
            "scenarios[0]: requests[0]=[0, 0, 5]: Expected `int` >= 1",
        ),
        ({"scenarios": [{"name": "a", "requests": [[-1, 3, 5]]}]}, "requests[0]=[-1, 3, 5]: Expected `float` >= 0.0"),
        ({"scenarios": [{"name": "a", "rate": 4, "requests": [[0, 3, 5]]}]}, "rate"),
        ({"scenarios": [{"load": "chat:q8"}]}, "scenarios[0]: load 'chat:q8': write it as"),
        ({"scenarios": [{"kind": "mixed", "name": "m"}]}, "needs levels and chunks"),
        ({"scenarios": [{"requests": [[0, 3, 5]]}]}, "scenarios[0]: has no name"),
    ],
)
def test_bad_plans(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(change if isinstance(change, str) else json.dumps(GOOD | change))
    with pytest.raises(ValueError) as error:
        read_plan(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recorded_load_is_sent_again(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    shared = Load("shared", (Send(0.0, 700, 3, (1, 2)), Send(0.05, 900, 4, (1, 3))), lead_s=0.02)
    done = run(tmp_path / "r", shared)
    (again,) = make_load(f"recorded:{done.out / 'shared.requests.json.gz'}=again")
    assert isinstance(again, Load) and again.name == "again" and again.hash_block_tokens == 512
    assert [send[1:3] for send in again.sends] == [(700, 3), (900, 4)]
    assert again.sends[1].arrival_s == pytest.approx(0.05, abs=0.02)
    assert again.sends[0].hash_ids[0] == again.sends[1].hash_ids[0]
    assert again.sends[0].hash_ids[1] != again.sends[1].hash_ids[1]


def test_prompts_share_what_their_ids_share(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    run(
        tmp_path / "r",
        Load("s", (Send(0.0, 700, 2, (1, 2)), Send(0.0, 900, 2, (1, 3)), Send(0.0, 900, 2)), lead_s=0.02),
    )
    one, two, three = (ids for _, ids in sorted(engine.prompts))
    assert [len(ids) for ids in (one, two, three)] == [700, 900, 900]
    assert one[:512] == two[:512] and one[512:528] != two[512:528] and three[:16] != one[:16]
    client = Client(lambda: None, 200, 1, None, print)  # type: ignore[arg-type]
    assert max(client.prompt(1000)) < 200


def test_sessions_wait_for_the_turn_before(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    later = Send(float("nan"), 60, 3, parent=0, delay_s=0.1)
    done = run(tmp_path / "r", Load("turns", (Send(0.0, 50, 8), later), lead_s=0.02))
    first, second = json.loads(gzip.decompress((done.out / "turns.requests.json.gz").read_bytes()))["requests"]
    assert 0.1 <= second["submit"] - first["t"][-1][0] < 0.15 and second["arrival"] is None


@pytest.mark.parametrize(
    "path", sorted(path for path in TRACES.glob("*") if path.suffix != ".md"), ids=lambda path: path.name
)
def test_traces_become_loads(path: Path) -> None:
    trace = load_trace(path, limit=50)
    load = of_trace(trace, "t")
    assert len(load.sends) == len(trace) and all(send.parent < i for i, send in enumerate(load.sends))
    if trace.block_ids:
        blocks = [-(-send.prompt_tokens // load.hash_block_tokens) for send in load.sends]
        assert [len(send.hash_ids) for send in load.sends] == blocks


def test_what_the_engine_cannot_take_is_left_out_and_said() -> None:
    nan = float("nan")
    sends = (Send(0.0, 10, 5), Send(0.1, 2000, 5), Send(nan, 10, 5, parent=1), Send(nan, 10, 5, parent=0))
    part, note = fitting(Load("a", sends), 1024, 8)
    assert isinstance(part, Load) and [send.parent for send in part.sends] == [-1, 0] and "2 of 4 requests" in note
    grid = make_load("decode_grid:small")
    assert fitting(grid[4], 131072, 128)[1] == "grid_c1024_b256: left out, above max_num_seqs=128"
    mixed = next(load for load in make_load("mixed_grid") if load.name == "ctx_d0")
    part, note = fitting(mixed, 32768, 256)
    assert isinstance(part, Mixed) and part.prefixes == (4096, 16384) and "max_model_len=32768" in note
    many = Load("many", (Send(0.0, 4_000_000, 1),) * 6)
    assert fitting(many, 10**8, 8)[0] is None


# ---- models, machines, commands -----------------------------------------------------------------------------------

DENSE = [name for name in model_names() if find_model(name).architecture in setup.FAMILIES]


@pytest.mark.parametrize("name", DENSE)
def test_a_config_has_the_models_shapes_and_its_name_is_found(name: str) -> None:
    config, text = setup.model_config(name)
    again, model = model_fields(config, "config"), find_model(name)
    assert {key: getattr(model, key) for key in again} == again and config["model_type"]
    assert named_in("x", {"model": f"{text} architecture, random weights"}, "model", model_names()) == name


def test_models_without_a_known_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model=mixtral-8x7b: a config\.json can be made of dense Llama"):
        setup.model_config("mixtral-8x7b")
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(setup.model_config("qwen2.5-0.5b")[0] | {"extra": 1}))
    assert setup.model_config(str(path))[0]["extra"] == 1 and setup.model_config(str(path))[1] == "mine"


@pytest.mark.parametrize(
    ("said", "given", "found"),
    [
        ("NVIDIA H200", None, "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", None, "h100-sxm"),
        ("NVIDIA H100 PCIe", None, "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", None, "a100-80gb-sxm"),
        ("NVIDIA L40S", None, "l40s"),
        ("GRID thing", "h200", "h200-sxm"),
    ],
)
def test_gpu_names(said: str, given: str | None, found: str) -> None:
    recorded = {"gpu": setup.gpu_text(said, given)}
    assert named_in("x", recorded, "gpu", gpu_names()) == found == find_gpu(found).name
    assert setup.gpu_text(said, given).startswith(said)


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(
        command.record_command if arguments[0] == "record" else command.engine_command, arguments[1:]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_record_command(engine: fake_vllm.Engine, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i / 10},50,4\n" for i in range(9))
    )
    out = tmp_path / "r"
    result = invoke(
        "record", str(trace), "--model", "llama-3.1-8b", "--out", str(out), "--rate", "100", "--requests", "6",
        "--name", "mine", "--max-num-seqs", "64", "--engine", "num_gpu_blocks_override=900",
    )  # fmt: skip
    assert "Next: llmsim validate" in result.output
    (recorded,) = load_recording(out)
    assert recorded.name == "mine" and len(recorded.trace) == 6 and recorded.trace.arrival_s[-1] < 0.2
    assert recorded.settings["max_num_seqs"] == 64 and recorded.settings["num_gpu_blocks_override"] == 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "--model", "llama-3.1-8b"], "give one of TRACE, --loads and --plan"),
        (["--out", "x", "--loads", "warm"], "--model is missing"),
        (["--out", "x", "--loads", "warm", "--model", "llama-3.1-8b", "--rate", "3"], "are for a TRACE"),
        (["--out", "x", "--loads", "warm", "--model", "llama-3.1-8b", "--engine", "a"], "--engine a: write KEY=VALUE"),
        (
            ["--out", "x", "--loads", "warm", "--model", "l", "--dtype", "float16", "--engine", "dtype=a"],
            "dtype is given twice",
        ),
        (["--out", "x", "--plan", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_record_command_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        invoke("record", *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_engine_command_plans_by_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[tuple[Plan, float]] = []

    def fake(plan: Plan, out: Path, **options: Any) -> session.Recorded:
        plans.append((plan, options["time_limit_s"]))
        return session.Recorded(out, ["a"])

    monkeypatch.setattr(command, "record", fake)
    for budget in ("10min", "250s"):
        invoke("engine", "--model", "llama-3.1-8b", "--gpu", "h200", "--out", str(tmp_path), "--budget", budget)
    (large, large_s), (small, small_s) = plans
    assert len(large.loads) > len(small.loads) and (large_s, small_s) == (525, 175)
    assert large.engine == {"max_num_batched_tokens": 8192, "max_num_seqs": 256}
    for budget, message in (("2min", "at least 240 s"), ("soon", "write 90s or 10min")):
        with pytest.raises(ValueError, match=message):
            invoke("engine", "--model", "llama-3.1-8b", "--gpu", "h200", "--out", str(tmp_path), "--budget", budget)


def test_without_the_fitter_the_command_to_run_elsewhere_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "calibration.profiles", None)
    command._fit(tmp_path, tmp_path / "p.json", "qwen3-8b", "h200", {"quantization": "fp8"})
    told = capsys.readouterr().err
    assert "python -m calibration fit" in told and "--dtype fp8 --kv-dtype auto" in told and told.count("\n") == 1


def test_secrets_of_the_environment_stay_out(
    monkeypatch: pytest.MonkeyPatch, engine: fake_vllm.Engine, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    done = run(tmp_path / "r", burst("open", 3))
    assert "s3cret" not in (done.out / "engine.json").read_text()
