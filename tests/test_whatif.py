"""`llmsim whatif`: what it runs, in which order it says it, and why."""

import json
import re
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from llmsim.cli import main
from llmsim.hardware import gpu_names
from llmsim.prices import find_price, read_prices
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.trace import Trace
from llmsim.whatif import what_if
from llmsim.whatif_changes import CHANGES, chosen
from llmsim.whatif_fields import Setting
from llmsim.whatif_reason import cause, step_terms_s
from llmsim.whatif_run import measure

BASE = Scenario(model="llama-3.1-8b", gpu="h200-sxm", launch_jitter=False)
PRICE = find_price("h200-sxm")


def steady(requests=120, rate=10.0, prompt=500, output=60, **columns):
    at_s = np.arange(requests) / rate
    return Trace("steady", at_s, np.full(requests, prompt), np.full(requests, output), **columns)


def effects(scenario, *names, trace=None):
    outcome = what_if(trace or steady(), scenario, chosen(names, ()), PRICE)
    return {effect.name: effect for effect in outcome.effects}, outcome


# ---- the table of changes -----------------------------------------------------------------------------------------


def test_every_change_applies_somewhere_and_is_named_once():
    names = [change.name for change in CHANGES]
    assert len(set(names)) == len(names)
    settings = [
        Setting.of(BASE, True),
        Setting.of(replace(BASE, tensor_parallel=2, quantization="fp8", kv_cache_dtype="fp8"), True),
    ]
    for change in CHANGES:
        assert any(isinstance(change.fields(setting), dict) for setting in settings), change.name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_a_change_taken_back_is_the_baseline_and_says_the_opposite(change):
    """Of those that switch something: the other run has what the baseline lacks, and the other way round."""
    setting = Setting.of(BASE, True)
    answer = change.fields(setting)
    if not change.on(setting) or isinstance(answer, str):
        return
    other = Setting.of(replace(BASE, **answer), True)
    assert not change.on(other)
    back = change.fields(other)
    assert isinstance(back, dict)
    again = replace(BASE, **answer, **{k: v for k, v in back.items() if k not in answer})
    shared = {} if change.name == "prefix-caching" else {"enable_prefix_caching": True}  # paging is needed for it
    assert replace(again, **back | shared).resolved() == BASE.resolved()


@pytest.mark.parametrize(
    ("fields", "name", "why"),
    [
        ({}, "prefix-caching", "names no blocks"),
        ({}, "tp-half", "cannot be halved"),
        ({}, "weights-bf16", "already"),
        ({"gpu": "a100-80gb-sxm"}, "weights-fp8", "does not multiply in fp8"),
        ({"model": "gemma-3-4b"}, "flash-attention", "full attention only"),
        ({"model": "llama-3.2-1b"}, "speculation-model", "a quarter of the size"),
        ({"cudagraph": "none"}, "full-graphs", "no piecewise graphs"),
        ({"scheduler": "chunked"}, "chunked-prefill", "an option of the scheduler vllm"),
        ({"engine": "sarathi"}, "async-scheduling", "the engine sarathi has no async_scheduling"),
    ],
)
def test_what_does_not_apply_is_listed_with_why(fields, name, why):
    outcome = what_if(steady(5), replace(BASE, **fields), chosen((name,), ()), PRICE)
    assert not outcome.effects
    assert why in outcome.left_out[name]


def test_prefix_caching_is_not_offered_to_an_engine_without():
    ids = [("system", i) for i in range(5)]
    shared = steady(5, block_ids=[tuple(ids[:3]) for _ in range(5)], block_tokens=64)
    outcome = what_if(shared, replace(BASE, engine="sarathi"), chosen(("prefix-caching",), ()), PRICE)
    assert outcome.left_out["prefix-caching"] == "the engine sarathi has no enable_prefix_caching"
    assert what_if(shared, BASE, chosen(("prefix-caching",), ()), PRICE).effects


def test_a_run_that_no_engine_would_start_is_listed_too():
    """70B in float32 does not fit one H200."""
    outcome = what_if(
        steady(5), replace(BASE, model="llama-3.1-70b", quantization="fp8"), chosen(("weights-fp32",), ()), PRICE
    )
    assert "llama-3.1-70b" in outcome.left_out["weights-fp32"]


# ---- what is measured ---------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_summary_and_dollars_by_hand():
    result = simulate(steady(), BASE)
    run, summary = measure(result, PRICE), result.summary()
    assert 1e3 * run.ttft_s == pytest.approx(summary["mean_ttft_ms"])
    assert 1e3 * run.tpot_s == pytest.approx(summary["mean_tpot_ms"])
    assert run.tokens_per_s == pytest.approx(summary["output_throughput"])
    dollars = PRICE.usd_per_gpu_hour * result.duration_s / 3600
    assert run.usd_per_1m_tokens == pytest.approx(dollars / (120 * 60) * 1e6)
    assert sum(run.terms_s.values()) == pytest.approx(run.gap_s)


def test_effects_come_in_order_of_gain_and_gain_is_the_geometric_mean():
    found, outcome = effects(BASE, "flash-attention", "cuda-graphs", "weights-fp8", "weights-fp32", "tp-double")
    assert [effect.gain for effect in outcome.effects] == sorted((e.gain for e in outcome.effects), reverse=True)
    ratios = found["tp-double"].ratios
    product = ratios["tokens_per_s"] / (ratios["ttft_s"] * ratios["tpot_s"] * ratios["usd_per_1m_tokens"])
    assert found["tp-double"].gain == pytest.approx(product**0.25)
    assert found["weights-fp32"].gain < 1 < found["weights-fp8"].gain
    assert ratios["usd_per_1m_tokens"] == pytest.approx(2, rel=0.05)  # twice the GPUs at a rate that one keeps up with


def test_an_optimisation_that_the_baseline_has_is_taken_away():
    found, outcome = effects(BASE, "cuda-graphs", "weights-fp8")
    graphs, weights = found["cuda-graphs"], found["weights-fp8"]
    assert graphs.on and graphs.with_ == outcome.baseline and graphs.without.tpot_s > graphs.with_.tpot_s
    assert not weights.on and weights.without == outcome.baseline and weights.with_.tpot_s < weights.without.tpot_s
    other, _ = effects(replace(BASE, cudagraph="none"), "cuda-graphs")
    assert not other["cuda-graphs"].on
    assert other["cuda-graphs"].gain == pytest.approx(graphs.gain, rel=1e-9)  # the same two runs


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("flash-attention", "attention"),
        ("operator-fusion", "kernels between them"),
        ("cuda-graphs", "launches and host"),
        ("async-scheduling", "launches and host"),
        ("weights-fp8", "linear layers"),
        ("kv-fp8", "attention"),
        ("speculation-eagle", "linear layers"),
    ],
)
def test_the_reason_names_the_term_that_shrank(name, term):
    found, _ = effects(BASE, name, trace=steady(prompt=3000, rate=5.0))
    assert found[name].reason.startswith(term), found[name].reason


def test_the_reason_for_more_gpus_where_they_hurt_is_communication():
    """One token at a time of a small model: less to read on each rank, but two all-reduces a layer."""
    small = replace(BASE, model="qwen2.5-0.5b")
    without, with_ = (
        step_terms_s(simulate(steady(10, 1.0), small).iterations, cost_of(s), s)
        for s in (small, replace(small, tensor_parallel=2))
    )
    assert with_["communication"] > without["communication"] == 0
    assert cause(without, with_, helps=False).startswith("communication 0.00")


def test_prefix_caching_is_explained_by_the_tokens_it_saves():
    blocks = [tuple(range(30)) for _ in range(40)]
    trace = replace(steady(40), block_ids=blocks, block_tokens=16)
    found, _ = effects(BASE, "prefix-caching", trace=trace)
    assert found["prefix-caching"].on
    assert "prompt tokens computed 20,000 →" in found["prefix-caching"].reason


def test_host_seconds_that_a_step_does_not_hide_are_by_hand():
    """Synchronous: schedule + max(lead + T, launch + tail) + update + return - T of a decode alone."""
    result = simulate(steady(1, output=50), BASE)
    rows = {name: column[-1:] for name, column in result.iterations.items()}
    cost = cost_of(BASE)
    host = cost.host
    gpu_s = cost.decode_ramp(1, int(rows["kv_tokens"][0])).first_s
    launch_s = host.launch_s[0] + host.launch_per_request_s[0]
    by_hand = host.schedule_s + host.schedule_per_request_s + max(host.lead_s[0] + gpu_s, launch_s + host.tail_s[0])
    by_hand += host.update_s + host.update_per_output_s + host.return_s - gpu_s
    found = step_terms_s(rows, cost, replace(BASE, async_scheduling=False))["launches and host"]
    assert found == pytest.approx(by_hand, rel=0.05)  # the stalls of a profile are no term


def test_processes_change_nothing():
    alone = what_if(steady(30), BASE, chosen(("cuda-graphs", "kv-fp8"), ()), PRICE)
    together = what_if(steady(30), BASE, chosen(("cuda-graphs", "kv-fp8"), ()), PRICE, jobs=2)
    assert json.dumps(alone.to_dict()) == json.dumps(together.to_dict())


# ---- prices -------------------------------------------------------------------------------------------------------


def test_every_gpu_has_a_price_that_names_its_source_and_day():
    table = tomllib.loads(read_prices()[0])
    assert set(table) == set(gpu_names())
    for gpu in table:
        price = find_price(gpu)
        assert price.usd_per_gpu_hour > 0 and len(price.source) > 10
        assert price.date.startswith("2026-") or "indicative" in price.source or "guess" in price.source


def test_a_gpu_that_the_users_file_lacks_takes_the_shipped_price(tmp_path):
    file = tmp_path / "prices.toml"
    file.write_text("[h200-sxm]\nusd_per_gpu_hour = 2.10\nsource = 'my contract'\ndate = 2026-03-01\n")
    assert find_price("h200", file).usd_per_gpu_hour == 2.10
    assert find_price("h100", file) == find_price("h100")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[h200-sxm]\nusd_per_gpu_hour = -1\nsource = 'a'", "usd_per_gpu_hour=-1"),
        ("[h200-sxm]\nusd_per_gpu_hour = 2", "source=None"),
        ("[h200-sxm]\nusd_per_gpu_hour = 2\nsource = 'a'\ndate = 3", "date=3"),
        ("h200-sxm = 3", "is not a table"),
        ("[h300]\nusd_per_gpu_hour = 2", "unknown GPU"),
        ("[", "not TOML"),
        ("[h200-sxm]\nusd_per_gpu_hour = 2\nsource = 'a'\ndate = 'yesterday'", "date='yesterday' is not a date"),
        ("[h200-sxm]\nusd_per_gpu_hour = 1e308\nsource = 'a'", "usd_per_gpu_hour=1e+308 is not a price"),
        ("[h200-sxm]\nusd_per_gpu_hour = 2\nsource = 'a'\ncurrency = 'EUR'", "unknown key 'currency'"),
        ("[h100-sxm]\nusd_per_gpu_hour = -2\nsource = 'a'", "[h100-sxm]: usd_per_gpu_hour=-2"),  # another GPU's too
        (
            "[h100-sxm]\nusd_per_gpu_hour = 2\nsource = 'a'\n[h100]\nusd_per_gpu_hour = 3\nsource = 'a'",
            "[h100-sxm] and [h100] are both h100-sxm: keep one of them",
        ),
        (b"\xff\xfe\x00", "byte 0 is not UTF-8"),
    ],
)
def test_a_wrong_price_is_refused(tmp_path, text, said):
    file = tmp_path / "prices.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        find_price("h200-sxm", file)
    assert str(file) in str(error.value)


# ---- the command --------------------------------------------------------------------------------------------------


ARGUMENTS = [
    "whatif",
    "traces/chat.csv",
    "--model",
    "llama-3.1-8b",
    "--gpu",
    "h200-sxm",
    "--limit",
    "60",
    "--jobs",
    "1",
]


def test_the_command_prints_a_table_and_writes_the_document(capsys, tmp_path):
    prices = tmp_path / "mine.toml"
    prices.write_text("[h200]\nusd_per_gpu_hour = 36.0\nsource = 'my contract'\ndate = 2026-01-01\n")
    out = tmp_path / "whatif.json"
    options = ["--only", "cuda-graphs", "--only", "prefix-caching", "--only", "tp-half", "--prices", str(prices)]
    assert main([*ARGUMENTS, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "$36.00 per h200-sxm and hour (my contract, 2026-01-01)" in printed
    assert "launches and host" in printed
    assert "Not run: tp-half: one GPU cannot be halved" in printed
    document = json.loads(out.read_text())
    assert [effect["name"] for effect in document["effects"]] == ["cuda-graphs"]
    assert document["effects"][0]["with"] == document["baseline"]
    assert main([*ARGUMENTS, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "magic"], "--only magic: no such change"),
        (["--skip", "magic"], "--skip magic: no such change"),
        (["--jobs", "0"], "--jobs 0"),
        (["--prices", "nowhere.toml"], "--prices nowhere.toml: no such file"),
        (["--out", "no/where.json"], "there is no folder"),
        (["--cost", "constant:0.01", "--only", "tp-double"], "does not know its terms"),
    ],
)
def test_wrong_input_is_one_line(capsys, options, said):
    assert main([*ARGUMENTS, *options]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
