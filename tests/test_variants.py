"""Cost variants: terms that add up, kernels that calibration timed, and what a variant must leave alone."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from calibration.alternatives import fit_alternatives
from calibration.fit_kernels import Judge
from calibration.kernel_profiles import read_rows
from llmsim.cost import EAGER, FULL, PIECEWISE
from llmsim.cost.alternatives import decode_alternatives, find_alternatives
from llmsim.cost.graphs import Graphs
from llmsim.cost.profile import ProfileCost
from llmsim.cost.roofline import RooflineCost
from llmsim.cost.terms import row_terms_s, termed
from llmsim.hardware import find_gpu, find_model
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate
from llmsim.trace import Trace

BASE = Scenario(model="llama-3.1-8b", gpu="h200-sxm", launch_jitter=False)
MATH = {"attention_kernel": "math"}
PLAIN = {"kernel_fusion": "none", "cudagraph": "full_decode_only"}
MEASUREMENTS = Path(__file__).parent.parent / "calibration" / "measurements" / "h200-sxm.parquet"


@pytest.fixture(scope="module")
def rows():
    return read_rows([MEASUREMENTS, MEASUREMENTS.with_name("h200-sxm-engine.parquet")], "h200-sxm")


# ---- the file -----------------------------------------------------------------------------------------------------


def test_the_shipped_file_is_what_the_command_makes_of_the_measurements(rows):
    """What is fitted with other libraries may differ in the last digit that is kept: 4."""
    made = fit_alternatives(rows.rows, "h200-sxm", rows.source, rows.digests, Judge())
    shipped, source = find_alternatives(find_gpu("h200-sxm"))
    assert source == f"timed on this GPU, h200-sxm.alternatives ({shipped.id})"
    assert made.measurements == shipped.measurements
    assert made.attention.score_s == pytest.approx(shipped.attention.score_s, rel=1e-3)
    assert made.attention.token_s == pytest.approx(shipped.attention.token_s, rel=1e-3)
    assert made.plain.keys() == shipped.plain.keys()
    for op, curve in made.plain.items():
        assert curve.seconds == pytest.approx(shipped.plain[op].seconds, rel=1e-3)


def test_unfused_attention_is_within_a_tenth_of_every_long_prompt_and_decode_that_was_timed(rows):
    """Prompts of 512 tokens and more, decodes with 1,024 cached and more: those that a what-if is about."""
    form = find_alternatives(find_gpu("h200-sxm"))[0].attention
    judged = 0
    for row in rows.rows:
        if row.variant != "sdpa_math":
            continue
        if row.op == "attention_prefill" and row.new_tokens >= 512:
            keys = row.new_tokens + (row.context_tokens or 0)
            seconds = form.call_s + form.span_s * keys + form.score_s * row.new_tokens * keys
        elif row.op == "attention_decode" and row.seq_context_tokens >= 1024:
            at = form.seqs.index(row.seqs)
            seconds = form.base_s[at] + form.token_s[at] * row.seqs * row.seq_context_tokens
        else:
            continue
        judged += 1
        assert seconds == pytest.approx(row.median_s, rel=0.1), row
    assert judged == 13


def test_fused_kernels_are_the_faster_ones():
    """Beyond 200 KB; below both are the latency of one or two launches in a graph."""
    known = find_alternatives(find_gpu("h200-sxm"))[0]
    for op in ("add_rms_norm", "rms_norm", "rope", "silu_mul"):  # a KV write fuses nothing
        sizes = np.geomspace(2e5, 5e8, 40)
        assert (known.plain[op].at(sizes) > known.fused[op].at(sizes)).all(), op


def test_a_gpu_without_a_file_takes_the_others_scaled_by_bandwidth():
    known, source = find_alternatives(find_gpu("a100-80gb-sxm"))
    own = find_alternatives(find_gpu("h200-sxm"))[0]
    ratio = find_gpu("h200-sxm").bandwidth_bytes_per_s / find_gpu("a100-80gb-sxm").bandwidth_bytes_per_s
    assert known.attention.score_s == pytest.approx(ratio * own.attention.score_s)
    assert known.attention.call_s == own.attention.call_s  # a latency
    assert "scaled by data-sheet bandwidth" in source


@pytest.mark.parametrize("broken", [b"{", b'{"format": "x"}', b"[]"])
def test_a_broken_file_says_how_to_make_it_again(broken):
    with pytest.raises(ValueError, match="python -m calibration alternatives"):
        decode_alternatives(broken, "x.json")


def test_a_file_of_another_version_is_refused():
    known = find_alternatives(find_gpu("h200-sxm"))[0]
    with pytest.raises(ValueError, match="version=2"):
        decode_alternatives(msgspec.json.encode(msgspec.structs.replace(known, version=2)), "x.json")


# ---- terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tensor_parallel": 2},
        {"quantization": "int4"},  # by shapes
        {"model": "qwen3-8b"},
        {"cost": "roofline"},
        {"cost": "roofline", "tensor_parallel": 2},
        MATH,
        PLAIN,
        MATH | PLAIN,
    ],
)
def test_the_terms_of_a_decode_add_up_to_it(fields):
    """Without context nothing but the stalls, 0.2 % of a profile's decodes, is left for clocks."""
    cost = termed(cost_of(replace(BASE, **fields)))
    for seqs in (1, 8, 100, 700):
        assert cost.parts(seqs, seqs, seqs).total_s == pytest.approx(cost.decode_ramp(seqs, 0).first_s, rel=0.01)
        parts = cost.parts(seqs, seqs, seqs)
        assert (
            parts.linear_s > 0 and parts.between_s > 0 and (parts.communication_s > 0) == ("tensor_parallel" in fields)
        )


@pytest.mark.parametrize("fields", [{}, {"cost": "roofline"}, {"quantization": "int4"}, MATH, PLAIN])
def test_the_terms_of_a_prompt_add_up_to_it(fields):
    """On a rested GPU, a chunk alone; several chunks are counted as if alike."""
    cost = termed(cost_of(replace(BASE, **fields)))
    for new, done in ((512, 0), (2048, 0), (1000, 8000), (8192, 0)):
        pairs = new * done + new * (new + 1) // 2
        total_s = cost.parts(new, 1, 0).total_s + cost.prompts_s(1, new, done, pairs)
        assert total_s == pytest.approx(cost.mixed_s([(new, done)], 0, 0), rel=1e-6)


def test_the_terms_of_a_run_add_up_to_its_gpu_seconds():
    trace = Trace("t", np.linspace(0, 5, 200), np.full(200, 700), np.full(200, 100))
    result = simulate(trace, BASE)
    terms_s = row_terms_s(result.cost, result.iterations)
    log = result.iterations
    n = log["iterations"]
    busy_s = n * log["gpu_first_s"] + log["gpu_growth_s"] * n * (n - 1) / 2
    assert sum(terms_s.values()) == pytest.approx(busy_s)
    # What no other term explains is small: stalls, and chunks beside decodes or after chunks, whose clocks are low.
    assert 0 <= terms_s["clocks"].sum() < 0.1 * busy_s.sum()
    assert terms_s["communication"].sum() == 0


def test_a_cost_model_without_terms_is_named():
    with pytest.raises(ValueError, match="the cost model constant does not know its terms"):
        termed(cost_of(replace(BASE, cost="constant:0.01")))


# ---- attention unfused --------------------------------------------------------------------------------------------


def test_only_attention_changes_and_only_as_timed():
    """By hand: 128 decodes of 1,024 cached tokens, one layer timed at 3.58 ms; 32 layers. FlashAttention: 0.15 ms."""
    plain, math = termed(cost_of(BASE)), termed(cost_of(replace(BASE, **MATH)))
    seconds = math.decode_ramp(128, 128 * 1024).first_s - (
        plain.decode_ramp(128, 0).first_s - plain.parts(128, 128, 128).attention_s
    )
    assert seconds == pytest.approx(32 * 3.58e-3, rel=0.01)
    assert math.decode_ramp(128, 5).growth_s == pytest.approx(128 * 32 * 2.693e-8, rel=1e-3)
    before, after = plain.parts(1000, 10, 0), math.parts(1000, 10, 0)
    assert before._replace(attention_s=0.0) == after._replace(attention_s=0.0)


def test_a_long_prompt_pays_for_its_whole_square():
    """4,096 tokens: one layer timed at 6.497 ms, FlashAttention 3 at 0.28; 32 layers."""
    plain, math = cost_of(BASE), cost_of(replace(BASE, **MATH))
    more_s = math.mixed_s([(4096, 0)], 0, 0) - plain.mixed_s([(4096, 0)], 0, 0)
    assert more_s == pytest.approx(32 * (6.497e-3 - 0.283e-3), rel=0.05)


def test_flash_attention_gains_as_much_as_its_authors_report():
    """FlashAttention-3 (arXiv 2407.08608, section 4.1): 3 to 16 times as fast as standard attention, 512 to 16k tokens.
    Of a causal mask standard attention computes the other half of the square too: another factor of 2 n / (n + 1)."""
    plain, math = termed(cost_of(BASE)), termed(cost_of(replace(BASE, **MATH)))
    for n in (512, 1024, 2048, 4096, 8192, 16384):
        times = math.prompts_s(1, n, 0, n * (n + 1) // 2) / plain.prompts_s(1, n, 0, n * (n + 1) // 2)
        assert 3 <= times / (2 * n / (n + 1)) <= 16, n


def test_half_the_heads_on_a_rank_take_half_the_time():
    one, two = (termed(cost_of(replace(BASE, tensor_parallel=tp, **MATH))) for tp in (1, 2))
    assert two.decode_ramp(64, 0).growth_s == pytest.approx(one.decode_ramp(64, 0).growth_s / 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
        ({"model": "gemma-3-4b"}, "sliding windows"),
        ({"model": "deepseek-v3", "tensor_parallel": 8}, "latent attention"),
        ({"cost": "constant:0.01"}, "has no kernels to exchange"),
    ],
)
def test_what_unfused_attention_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        cost_of(replace(BASE, **MATH, **fields))


# ---- operations unfused, no compiler ------------------------------------------------------------------------------


def test_plain_operations_cost_the_timed_difference():
    """By hand at 1,024 rows of Llama-3.1-8B (µs): two norms 65 - 10, RoPE 64 - 14, SiLU 82 - 25, KV write 11 - 8."""
    fused, plain = termed(cost_of(BASE)), termed(cost_of(replace(BASE, **PLAIN)))
    more_s = plain.parts(1024, 1, 0).between_s - fused.parts(1024, 1, 0).between_s
    assert more_s == pytest.approx(32 * (2 * 55 + 50 + 57 + 3) * 1e-6, rel=0.05)
    assert plain.parts(1024, 1, 0).linear_s == fused.parts(1024, 1, 0).linear_s


def test_every_more_operation_is_a_launch_more_unless_a_graph_holds_it():
    fused, plain = cost_of(BASE).host, cost_of(replace(BASE, **PLAIN)).host
    assert plain.launch_s[FULL] == fused.launch_s[FULL]
    assert plain.launch_s[PIECEWISE] == fused.launch_s[PIECEWISE]
    each_s = find_alternatives(find_gpu("h200-sxm"))[0].operation_launch_s
    assert plain.launch_s[EAGER] - fused.launch_s[EAGER] == pytest.approx(32 * 32 * each_s)  # operations, layers


def test_without_the_compiler_there_are_no_piecewise_graphs():
    for cudagraph in ("full_and_piecewise", "piecewise"):
        with pytest.raises(ValueError, match="full_decode_only or none"):
            replace(BASE, kernel_fusion="custom", cudagraph=cudagraph)
    graphs = Graphs.of_engine(256, 8192, "full_decode_only")
    assert [graphs.mode(8, 0), graphs.mode(8, 1), graphs.mode(300, 1), graphs.mode(256, 0)] == [
        FULL,
        EAGER,
        EAGER,
        FULL,
    ]


def test_hand_written_kernels_take_what_they_take_beyond_the_compilers():
    """RoPE of 1,024 rows on an H200: 14 us by hand, 10 compiled, in each layer; all four operations 71 and 57."""
    compiled, custom = cost_of(BASE), cost_of(replace(BASE, kernel_fusion="custom", cudagraph="full_decode_only"))
    assert custom.decode_ramp(8, 1000).growth_s == compiled.decode_ramp(8, 1000).growth_s
    more_s = custom.mixed_s([(1024, 0)], 0, 0) - compiled.mixed_s([(1024, 0)], 0, 0)
    known = find_alternatives(find_gpu("h200-sxm"))[0]
    at = np.array([1024 * 2 * 40 * 128 * 2.0])
    rope_s = float(known.fused["rope"].at(at)[0] - known.compiled["rope"].at(at)[0])
    assert 3e-6 < rope_s < 6e-6 and 32 * rope_s < more_s < 32 * 20e-6
    assert "hand-written kernels, timed on this GPU" in custom.label


def test_a_variant_says_what_it_rests_on_and_that_no_engine_was_recorded_with_it():
    cost = cost_of(replace(BASE, **MATH))
    assert "attention unfused (timed on this GPU" in cost.label
    assert cost.kind == "profile"
    result = simulate(Trace("t", np.zeros(4), np.full(4, 64), np.full(4, 8)), replace(BASE, **MATH))
    assert result.summary()["extrapolated"] == 1.0
    assert "scaled by data-sheet bandwidth" in cost_of(replace(BASE, gpu="a100-80gb-sxm", **MATH)).label


def test_the_cost_models_of_a_usual_scenario_are_the_usual_ones():
    assert type(cost_of(BASE)) is ProfileCost
    assert type(cost_of(replace(BASE, cost="roofline"))) is RooflineCost


# ---- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["auto", "roofline"])
def test_wide_activations_keep_the_small_weights_and_lose_the_fast_products(cost):
    """8,192 rows are paced by the matrix units, one row by the weights."""
    fast, wide = (
        termed(cost_of(replace(BASE, cost=cost, quantization="fp8", activation_dtype=dtype)))
        for dtype in ("auto", "bfloat16")
    )
    plain = termed(cost_of(replace(BASE, cost=cost)))
    assert wide.rows_s(8192, 1) == pytest.approx(plain.rows_s(8192, 1), rel=0.1)
    assert wide.rows_s(8192, 1) > 1.3 * fast.rows_s(8192, 1)
    assert wide.rows_s(1, 1) < 0.75 * plain.rows_s(1, 1)


def test_activations_in_bfloat16_change_nothing_for_weights_in_bfloat16():
    model = find_model("llama-3.1-8b")
    assert cost_of(replace(BASE, activation_dtype="bfloat16")).mixed_s([(100, 0)], 3, 50) == cost_of(BASE).mixed_s(
        [(100, 0)], 3, 50
    )
    assert model.weight_format("bfloat16") == "bfloat16"
