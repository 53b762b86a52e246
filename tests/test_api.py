"""The small Python API: four functions, light to import, and everything as frames."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

import llmsim
from llmsim import Scenario, compare, load_trace, simulate, sweep
from llmsim.comparing import named_scenarios

ROOT = Path(__file__).parents[1]
MACHINE = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
FUNCTIONS = ("simulate", "compare", "plan", "sweep")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_llmsim_imports_nothing_else() -> None:
    heavy = "numpy pandas simpy click yaml pyarrow ray"
    code = f"import sys, llmsim; print([name for name in sys.modules if name.partition('.')[0] in {heavy.split()}"
    assert python(f"{code} or name.startswith('llmsim.')])") == "[]"


def test_sweeping_here_imports_no_ray() -> None:
    assert python("import sys; from llmsim import sweep; sweep; print('ray' in sys.modules)") == "False"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_functions_when_their_modules_are_imported(name: str) -> None:
    """`import llmsim.sweep` binds the module to the package, where the function has to stay."""
    code = f"""
import importlib, llmsim
before = llmsim.{name}
module = importlib.import_module("llmsim.{name}")
from llmsim import {name}
assert callable({name}) and {name} is before is llmsim.{name} and {name} is not module
from llmsim.{name} import {name} as of_the_module
assert "{name}" in dir(llmsim) and "{name}" in llmsim.__all__
"""
    python(code)


@pytest.fixture(scope="module")
def trace() -> llmsim.Trace:
    return load_trace(ROOT / "traces" / "chat.csv", limit=120, rate=12)


def test_a_trace_and_a_result_are_frames(trace: llmsim.Trace) -> None:
    assert trace.frame()["prompt_tokens"].tolist() == trace.prompt_tokens.tolist()
    assert trace.frame()["arrival_s"].max() == trace.span_s
    result = simulate(trace, Scenario(**MACHINE))
    frame = result.frame()
    assert len(frame) == 120
    assert 1e3 * frame["ttft_s"].mean() == pytest.approx(result.summary()["mean_ttft_ms"])
    with pytest.raises(FrozenInstanceError):
        result.kv_blocks = 3  # type: ignore[misc]


def test_compare_takes_a_trace_results_and_folders(trace: llmsim.Trace, tmp_path: Path) -> None:
    from llmsim.runs import write_run

    scenarios = [Scenario(**MACHINE), Scenario(**MACHINE, max_num_batched_tokens=256, max_num_seqs=256)]
    names = ["max_num_seqs=None, max_num_batched_tokens=None", "max_num_seqs=256, max_num_batched_tokens=256"]
    replayed = compare(trace, scenarios, goodput={"ttft": 100.0})
    assert [side.name for side in replayed.sides] == names
    results = [simulate(trace, scenario) for scenario in scenarios]
    named = compare(dict(zip(names, results, strict=True)), goodput={"ttft": 100.0})
    assert named.differences == replayed.differences
    assert named.frame().equals(replayed.frame())
    plain = compare(results)
    assert plain.sides[0].name == "max_num_seqs=1024, max_num_batched_tokens=8192"
    for at, result in enumerate(results):
        write_run(result, tmp_path / str(at), summary=result.summary())
    folders = compare([tmp_path / "0", tmp_path / "1"])
    key = "p99_ttft_ms"
    changes = [one.differences[one.sides[1].name][key] for one in (replayed, named, plain, folders)]
    assert changes == [changes[0]] * 4
    means = [result.summary()["mean_tpot_ms"] for result in results]
    frame = plain.frame().set_index("key")
    assert frame["change"]["mean_tpot_ms"] == pytest.approx(means[1] - means[0])


def test_compare_refuses_what_cannot_be_compared(trace: llmsim.Trace) -> None:
    one = Scenario(**MACHINE)
    with pytest.raises(ValueError, match="give the scenarios"):
        compare(trace)
    with pytest.raises(ValueError, match="two scenarios are alike"):
        compare(trace, [one, one])
    with pytest.raises(ValueError, match="scenarios: 1 given: a comparison needs two or more"):
        compare(trace, [one])
    with pytest.raises(ValueError, match="scenarios go with a trace"):
        compare([simulate(trace, one)], [one])
    with pytest.raises(ValueError, match="int is not a Result"):
        compare([3, 4])  # type: ignore[list-item]


def test_scenarios_are_called_by_what_sets_them_apart() -> None:
    def names(*more: dict[str, object]) -> list[str]:
        return list(named_scenarios([Scenario(**MACHINE | one) for one in more]))  # type: ignore[arg-type]

    assert names({}, {"scheduler": "chunked"}) == ["scheduler=vllm", "scheduler=chunked"]
    assert names({}, {"replicas": 2}, {"seed": 3}) == ["replicas=1, seed=0", "replicas=2", "seed=3"]
    assert names({"replicas": 2}) == [""]


def test_a_sweep_gives_what_simulate_gives(trace: llmsim.Trace, tmp_path: Path) -> None:
    spec = {
        "trace": {"path": str(ROOT / "traces" / "chat.csv"), "limit": 120, "rate": 12},
        "scenario": MACHINE,
        "grid": {"max_num_batched_tokens": [512, 2048]},
    }
    frame = sweep(spec, out=tmp_path / "out").frame()
    for tokens, ttft_ms in zip(frame["max_num_batched_tokens"], frame["p99_ttft_ms"], strict=True):
        summary = simulate(trace, Scenario(**MACHINE, max_num_batched_tokens=int(tokens))).summary()
        assert summary["p99_ttft_ms"] == ttft_ms
    assert np.isfinite(frame["cost_per_1m_output_tokens"]).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("result.summary({'ttft': -5})", "goodput: ttft=-5: give milliseconds, 0 or more"),
        ("result.summary({'ttft': float('nan')})", "goodput: ttft=nan: give milliseconds"),
        ("result.summary({'ttft': '500'})", "goodput: ttft='500': give milliseconds"),
        ("result.summary('ttft:500')", "goodput='ttft:500': give a dict of milliseconds"),
        ("simulate('x.csv', setting)", "simulate: trace='x.csv' is a path: give load_trace('x.csv')"),
        ("simulate(trace, {'model': 'x'})", "simulate: scenario={'model': 'x'} is no Scenario"),
        ("simulate(trace, setting, cost='foo')", "simulate: cost='foo' is no cost model"),
        ("compare(trace, [setting, 5])", "compare: scenarios: 5 is no Scenario"),
        ("compare(trace, [])", "compare: scenarios: 0 given: a comparison needs two or more"),
        ("compare(trace, [setting, setting], seeds='2')", "compare: seeds='2' is not a whole number"),
        ("compare(trace, [setting, setting], jobs=0)", "compare: jobs=0: give 1 or more"),
        ("compare(7)", "compare: 7 is neither a Trace nor a list of results"),
        ("sweep(None, out='x')", "sweep: spec=None is no specification"),
        ("load_trace(chat, limit=1.5)", "limit=1.5 is not a number of requests"),
        ("load_trace(chat, limit=True)", "limit=True is not a number of requests"),
    ],
)
def test_arguments_of_another_kind_are_named_in_one_line(trace: llmsim.Trace, call: str, said: str) -> None:
    setting = Scenario(**MACHINE)  # type: ignore[arg-type]
    names = {"simulate": simulate, "compare": compare, "sweep": sweep, "load_trace": load_trace, "trace": trace}
    names |= {"setting": setting, "chat": ROOT / "traces" / "chat.csv"}
    if "result" in call.partition(".")[0]:
        names["result"] = simulate(trace, setting)
    with pytest.raises((ValueError, TypeError)) as error:
        eval(call, names)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
