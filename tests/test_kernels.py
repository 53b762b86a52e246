"""Kernels: tables are exact where measured, and a forward pass is the sum that the docstring states."""

from __future__ import annotations

from dataclasses import replace
from math import hypot

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsim.cost.basis import Coefficients, KernelBasis, StepClock
from llmsim.cost.graphs import Graphs
from llmsim.cost.kernels import (
    CLOCKS_FALL_S,
    SKEW_SHARE,
    SKEW_SHARE_FP8,
    TILE_AT_ONCE,
    TILE_PAID,
    TILE_PAID_ROWS,
    Curve,
    DecodeTable,
    Forward,
    Heads,
    Kernels,
    LinearTable,
    NotTimedError,
    PrefillForm,
    Stack,
    decodes_like,
    nearest,
)
from llmsim.cost.load import CostSettings
from llmsim.cost.profile import Profile, ProfileCost, by_kernels, fitted_basis, read_profile
from llmsim.hardware import find_gpu, find_model

FLOPS, BANDWIDTH = 1e12, 1e12
TOY = replace(
    find_model("llama-3.1-8b"),
    name="toy",
    layers=3,
    hidden=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    intermediate=512,
    vocab=1024,
)
ROWS = np.array([1.0, 24.0, 1000.0])
TOKENS = (1, 64, 512, 1024, 2048)


def table(
    shapes: dict[tuple[int, int], tuple[float, ...]], tiled: bool = False, size: float = 2.0, quantises: bool = False
) -> LinearTable:
    return LinearTable(
        weight_bytes=size,
        activation_bytes=size,
        flops_per_s=FLOPS,
        bandwidth_bytes_per_s=BANDWIDTH,
        tiled=tiled,
        tokens=TOKENS,
        shapes=tuple(shapes),
        slowness=tuple(shapes.values()),
        quantises=quantises,
    )


def ridge_s(n: int, k: int, rows: float, size: float = 2.0) -> float:
    return hypot(2.0 * n * k * rows / FLOPS, (n * k * size + (n + k) * rows * size) / BANDWIDTH)


def line(first_s: float, per_byte_s: float) -> Curve:
    """Seconds of `first_s` and so much more for each byte, to a gigabyte."""
    return Curve((0.0, 1e9), (first_s, first_s + 1e9 * per_byte_s))


HEADS = Heads(4, 2, 64, "bfloat16")
LINES = {
    "add_rms_norm": (2e-6, 1e-12),
    "rope": (3e-6, 2e-12),
    "silu_mul": (4e-6, 3e-12),
    "kv_write": (5e-6, 4e-12),
    "quant_fp8": (6e-6, 5e-12),
    "rms_norm": (7e-6, 6e-12),
}
KERNELS = Kernels(
    gpu="toy",
    source="by hand",
    measurements={},
    linears={"bfloat16": table({(512, 256): (2.0,) * 5, (256, 256): (2.0,) * 5})},
    elementwise={op: line(*of) for op, of in LINES.items()},
    head_rows=line(8e-6, 7e-12),
    decodes=(DecodeTable(HEADS, (1, 9), (1e-5, 3e-5), (2e-9, 4e-9)),),
    prefills=(PrefillForm(HEADS, 1e-5, 1e-9, 2e-11, 32.0, 3e-6),),
    all_reduce={"2": line(9e-6, 8e-12)},
    error={},
)


def with_linear(dtype: str, quantises: bool = False) -> Kernels:
    flat = table({(512, 256): (2.0,) * 5, (256, 256): (2.0,) * 5}, size=1.0, quantises=quantises)
    return msgspec.structs.replace(KERNELS, linears={**KERNELS.linears, dtype: flat})


# ---- linear layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiled", [False, True])
def test_a_measured_shape_is_exact_at_measured_rows(tiled: bool) -> None:
    q = (1.1, 1.2, 1.3, 1.25, 1.4)
    known = table({(512, 256): q, (4096, 4096): (9.0,) * 5}, tiled)
    expected = [factor * ridge_s(512, 256, rows) for factor, rows in zip(q, TOKENS, strict=True)]
    assert known.seconds(512, 256, np.array(TOKENS, float)) == pytest.approx(expected, rel=1e-12)


def test_between_measured_rows_q_is_linear() -> None:
    known = table({(512, 256): (1.0, 2.0, 2.0, 2.0, 2.0)})
    at = 1 + 0.25 * 63
    assert known.seconds(512, 256, np.array([at]))[0] == pytest.approx(1.25 * ridge_s(512, 256, at))


def test_a_tile_just_begun_costs_a_quarter_and_half_a_tile_nearly_all_of_it() -> None:
    large = 1 << 15  # compute paces it from few rows on
    known = table({(large, large): (1.5,) * 5}, tiled=True)
    whole, begun, half, full = known.seconds(large, large, np.array([1024.0, 1025.0, 1024.0 + TILE_PAID_ROWS, 1152.0]))
    assert (half - whole) / (full - whole) == pytest.approx(TILE_PAID, abs=0.01)
    assert (begun - whole) / (full - whole) == pytest.approx(TILE_AT_ONCE, abs=0.02)
    plain = msgspec.structs.replace(known, tiled=False).seconds(large, large, np.array([1025.0]))[0]
    assert plain == pytest.approx(whole * 1025 / 1024, rel=1e-3)


def test_beyond_the_ends_time_goes_with_the_ridge() -> None:
    known = table({(512, 256): (1.0, 1.0, 1.0, 1.0, 3.0)})
    one, two = known.seconds(512, 256, np.array([8192.0, 16384.0]))
    assert one == pytest.approx(3.0 * ridge_s(512, 256, 8192))
    assert two / one == pytest.approx(2.0, rel=0.01)


def test_a_shape_held_out_is_the_weighted_mean_of_its_neighbours() -> None:
    known = table({(256, 256): (1.0,) * 5, (512, 256): (9.0,) * 5, (2048, 256): (3.0,) * 5})
    # one doubling away and two: weights 1 and 1/8
    expected = (1.0 + 3.0 / 8) / (1 + 1 / 8) * ridge_s(512, 256, 7)
    assert known.seconds(512, 256, np.array([7.0]), without=(512, 256))[0] == pytest.approx(expected)
    assert known.seconds(512, 256, np.array([7.0]))[0] == pytest.approx(9.0 * ridge_s(512, 256, 7))


def test_one_shape_predicts_no_other() -> None:
    with pytest.raises(ValueError, match="needs two shapes"):
        table({(512, 256): (1.0,) * 5}).weights(512, 256, without=(512, 256))


@given(st.integers(16, 1 << 17), st.integers(16, 1 << 17))
def test_weights_are_shares(n: int, k: int) -> None:
    shapes = {(1 << i, 1 << j): (1.0,) * 5 for i in range(6, 14, 2) for j in range(6, 14, 2)}
    weights = [weight for _, weight in table(shapes).weights(n, k)]
    assert min(weights) > 0.0 and sum(weights) == pytest.approx(1.0)


# ---- curves and heads ---------------------------------------------------------------------------------------------


def test_a_curve_is_flat_before_linear_between_and_proportional_beyond() -> None:
    curve = Curve((100.0, 200.0, 400.0), (1.0, 3.0, 4.0))
    assert curve.at(np.array([1.0, 100.0, 150.0, 400.0, 1200.0])).tolist() == [1.0, 1.0, 2.0, 4.0, 12.0]


def test_far_heads() -> None:
    main = Heads(32, 8, 128, "bfloat16")
    assert main.far_from(main) == 0.0
    assert main.far_from(Heads(16, 4, 128, "bfloat16")) == 1.0  # half the KV width, as many queries for each
    assert main.far_from(Heads(16, 8, 128, "bfloat16")) == 1.0  # half the queries
    assert main.far_from(Heads(32, 8, 64, "bfloat16")) == 3.0  # half the width by heads of another size
    assert main.far_from(Heads(32, 8, 128, "fp8")) > main.far_from(Heads(1, 1, 256, "bfloat16"))


def test_without_the_kv_dtype_the_nearest_shape_counts() -> None:
    forms = [PrefillForm(Heads(q, kv, 128, "bfloat16"), 1e-5, 0.0, 1e-11, 1.0, 0.0) for q, kv in ((8, 1), (32, 8))]
    assert nearest(forms, Heads(32, 8, 128, "fp8")) is forms[1]
    with pytest.raises(NotTimedError, match="no attention"):
        nearest([], HEADS)


# ---- a forward pass -----------------------------------------------------------------------------------------------


def by_hand(tensor_parallel: int, rows: float) -> float:
    """Body of the toy: 256 hidden, 4/2 heads of 64, MLP of 512, 3 layers."""
    tp = tensor_parallel
    shapes = [((4 + 2 * 2) * 64 // tp, 256), (256, 256 // tp), (2 * 512 // tp, 256), (256, 512 // tp)]
    layer_s = sum(2.0 * ridge_s(n, k, rows) for n, k in shapes)

    def kernel_s(op: str, elements: float) -> float:
        first_s, per_byte_s = LINES[op]
        return first_s + per_byte_s * 2 * rows * elements

    layer_s += 2 * kernel_s("add_rms_norm", 4 * 256)
    layer_s += kernel_s("rope", 2 * (4 + 2) * 64 / tp)
    layer_s += kernel_s("silu_mul", 3 * 512 / tp)
    layer_s += kernel_s("kv_write", 4 * 2 * 64 / tp)
    if tp > 1:
        layer_s += 2 * (9e-6 + 8e-12 * 2 * rows * 256)
    return 3 * layer_s


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_body_is_the_sum_of_its_kernels(tensor_parallel: int) -> None:
    body_s = Forward(KERNELS, TOY, "bfloat16", "auto", tensor_parallel).body_s(ROWS)
    assert body_s == pytest.approx([by_hand(tensor_parallel, rows) for rows in ROWS], rel=1e-12)


TOGETHER = tuple(Forward(KERNELS, TOY, "bfloat16", "auto", 1).layer_linears)


def stacked(*stacks: Stack) -> LinearTable:
    return msgspec.structs.replace(KERNELS.linears["bfloat16"], stacks=stacks)


def test_a_layers_products_take_what_was_timed_of_them_together() -> None:
    alone, both = KERNELS.linears["bfloat16"], stacked(Stack(TOGETHER, (1, 100), (0.9, 1.1), loaded=1.3))
    rows = np.array([1.0, 10.0, 100.0, 5000.0])
    summed = sum(alone.seconds(n, k, rows) for n, k in TOGETHER)
    assert alone.layer_s(TOGETHER, rows)[0] == pytest.approx(summed)
    cold_s, loaded_s = both.layer_s(TOGETHER, rows)
    assert cold_s == pytest.approx(summed * [0.9, 1.0, 1.1, 1.1])
    assert loaded_s == pytest.approx(summed * 1.3)


def test_a_layer_that_was_not_timed_lies_between_its_neighbours() -> None:
    twice, eight_times = (tuple((n * far, k) for n, k in TOGETHER) for far in (2, 8))
    table = stacked(Stack(twice, (1,), (0.8,), loaded=1.0), Stack(eight_times, (1,), (1.0,), loaded=1.0))
    summed = sum(table.seconds(n, k, ROWS) for n, k in TOGETHER)
    near, far = 4.0**-3, 12.0**-3  # four products, log2 of 2 and of 8 away
    assert table.layer_s(TOGETHER, ROWS)[0] == pytest.approx(summed * 0.8 ** (near / (near + far)))
    assert table.layer_s(twice, ROWS, without=table.stacks[0])[0] == pytest.approx(
        sum(table.seconds(n, k, ROWS) for n, k in twice)
    )


def test_long_iterations_run_at_the_clocks_of_sustained_load() -> None:
    table = stacked(Stack(TOGETHER, (1,), (0.9,), loaded=1.2))
    kernels = msgspec.structs.replace(KERNELS, linears={"bfloat16": table})
    forward, rows = Forward(kernels, TOY, "bfloat16", "auto", 1), np.geomspace(1.0, 1e8, 200)
    cold_s = 3 * table.layer_s(TOGETHER, rows)[0]
    ratio = forward.body_parts(rows)["linear"] / cold_s
    short, long = cold_s <= CLOCKS_FALL_S[0], cold_s >= CLOCKS_FALL_S[1]
    assert short.any() and long.any()
    assert ratio[short] == pytest.approx(1.0) and ratio[long] == pytest.approx(1.2 / 0.9)
    assert (np.diff(ratio) >= -1e-12).all()
    middle = np.interp(0.1, cold_s, ratio)  # half-way between 50 and 200 ms, in logarithms
    assert middle == pytest.approx((1.2 / 0.9) ** 0.5, rel=0.01)


def test_a_layer_timed_together_is_not_of_its_neighbours() -> None:
    other = replace(TOY, intermediate=640)
    before = Forward(KERNELS, other, "bfloat16", "auto", 1)
    assert [name for name in before.extrapolated if "linear" in name] == [
        "linear 1280x256",
        "linear 256x640",
    ]
    table = stacked(Stack(tuple(before.layer_linears), (1,), (1.0,), loaded=1.0))
    after = Forward(msgspec.structs.replace(KERNELS, linears={"bfloat16": table}), other, "bfloat16", "auto", 1)
    assert not [name for name in after.extrapolated if "linear" in name]


def test_two_all_reduces_a_layer_and_half_of_one_for_the_logits() -> None:
    slower = msgspec.structs.replace(KERNELS, all_reduce={"2": line(9e-6 + 1e-4, 8e-12)})
    before, after = (Forward(kernels, TOY, "bfloat16", "auto", 2) for kernels in (KERNELS, slower))
    assert after.body_s(ROWS) - before.body_s(ROWS) == pytest.approx(2 * 3 * 1e-4)
    assert after.head_s(ROWS) - before.head_s(ROWS) == pytest.approx(0.5e-4)


def test_head_of_all_requests_and_of_none() -> None:
    head_s = Forward(KERNELS, TOY, "bfloat16", "auto", 1).head_s(np.array([0.0, 5.0]))
    assert head_s.tolist() == [0.0, pytest.approx(2.0 * ridge_s(1024, 256, 5) + 8e-6 + 7e-12 * 2 * 5 * 1024)]


def test_qk_norms_are_counted() -> None:
    plain, normed = (
        Forward(KERNELS, replace(TOY, qk_norm=norm), "bfloat16", "auto", 1).body_s(ROWS) for norm in (False, True)
    )
    first_s, per_byte_s = LINES["rms_norm"]
    assert normed - plain == pytest.approx(3 * (first_s + per_byte_s * 2 * ROWS * 2 * (4 + 2) * 64))


def test_attention_by_hand() -> None:
    forward = Forward(KERNELS, TOY, "bfloat16", "auto", 1)
    assert forward.decode_base_s(np.array([1.0, 5.0, 99.0])) == pytest.approx([3e-5, 6e-5, 9e-5])
    assert forward.decode_token_s(np.array([1.0, 5.0, 99.0])) == pytest.approx([6e-9, 9e-9, 12e-9])
    chunk = forward.chunk()
    assert (chunk.call_s, chunk.span_s, chunk.pair_s) == pytest.approx((3e-5, 3e-9, 6e-11))
    assert (chunk.least_rows, chunk.cached_s) == pytest.approx((32.0, 9e-6))
    assert forward.extrapolated == ["linear 1024x256", "linear 256x512"]


def test_other_heads_go_by_kv_bytes_and_query_width() -> None:
    wide = replace(TOY, heads=16, kv_heads=4)
    own, other = (Forward(KERNELS, model, "bfloat16", "auto", 1) for model in (TOY, wide))
    twice = np.array([1.0, 2.0, 3.0])  # as many tiles as of twice the requests with half the heads
    assert other.decode_token_s(twice) == pytest.approx(2 * own.decode_token_s(2 * twice))
    assert other.decode_base_s(twice) == pytest.approx(own.decode_base_s(2 * twice))
    assert other.chunk().pair_s == pytest.approx(4 * own.chunk().pair_s)
    eight_bits = Forward(KERNELS, TOY, "bfloat16", "fp8", 1)
    assert eight_bits.decode_token_s(ROWS) == pytest.approx(0.5 * own.decode_token_s(ROWS))
    assert "attention of 4/2 heads of 64" in eight_bits.extrapolated


def test_quantising_the_input_is_counted_once() -> None:
    apart, inside = (
        Forward(with_linear("fp8", quantises), TOY, "fp8", "auto", 1).body_s(ROWS) for quantises in (False, True)
    )
    inputs = (256, 256, 256, 512)
    first_s, per_byte_s = LINES["quant_fp8"]
    # a kernel of its own for attention's output; in those of two norms and the activation no launch
    assert apart - inside == pytest.approx(3 * (first_s + sum(per_byte_s * ROWS * k * 3 for k in inputs)))


def test_weights_alone_in_eight_bits_quantise_no_input() -> None:
    eight = Forward(with_linear("int8"), TOY, "int8", "auto", 1).body_s(ROWS)
    assert eight == pytest.approx(Forward(with_linear("fp8", quantises=True), TOY, "fp8", "auto", 1).body_s(ROWS))


def test_one_call_of_attention_serves_all_chunks_of_an_iteration() -> None:
    basis = KernelBasis(Forward(KERNELS, TOY, "bfloat16", "auto", 1))
    clock = StepClock(basis, Coefficients((1, 4096), (1e-3, 2e-3), 1e-8, 1e-8, 2e-11, 0.0), lambda rows: rows)
    form = basis.forward.chunk()

    def attention_s(*chunks: tuple[int, int]) -> float:
        return clock.mixed_s(chunks, 0, 0) - clock.rows_s(sum(new for new, _ in chunks), len(chunks))

    assert attention_s((256, 0)) > form.call_s > 0
    assert attention_s((256, 0), (256, 0)) == pytest.approx(2 * attention_s((256, 0)) - form.call_s)
    assert attention_s((256, 64), (256, 64)) == pytest.approx(2 * attention_s((256, 64)) - form.call_s - form.cached_s)
    assert attention_s((256, 0), (256, 64)) == pytest.approx(
        attention_s((256, 0)) + attention_s((256, 64)) - form.call_s
    )


def test_decodes_go_with_tiles_whatever_the_heads() -> None:
    """16 KV heads were not timed: as many tiles as twice the requests with 8."""
    shipped = read_profile("h200-sxm").kernels
    assert shipped
    timed = Heads(32, 8, 128, "bfloat16")
    assert decodes_like(shipped.decodes, timed).heads == timed
    untimed = decodes_like(shipped.decodes, Heads(32, 16, 128, "bfloat16"))
    assert untimed.heads.kv_heads == 8 and len(untimed.seqs) > 50
    few = decodes_like(shipped.decodes, Heads(16, 8, 128, "bfloat16"))  # timed at four numbers of requests
    assert len(few.seqs) > 50 and few.heads.kv_heads == 8
    llama, wide = find_model("llama-3.1-8b"), replace(find_model("llama-3.1-8b"), kv_heads=16, name="wide")
    ours, theirs = (Forward(shipped, model, "bfloat16", "auto", 1) for model in (llama, wide))
    seqs = np.array([4.0, 8.0, 16.0, 17.0])
    twice_s = ours.decode_base_s(2 * seqs) + ours.decode_token_s(2 * seqs) * 2 * seqs * 1100
    assert theirs.decode_base_s(seqs) + theirs.decode_token_s(seqs) * seqs * 1100 == pytest.approx(twice_s, rel=0.08)


def test_uneven_contexts_fill_the_last_wave() -> None:
    shipped = read_profile("h200-sxm").kernels
    assert shipped
    forward = Forward(shipped, find_model("llama-3.1-8b"), "bfloat16", "auto", 1)
    assert forward.mixed_skew == pytest.approx(SKEW_SHARE / 8)
    waves = forward.decode_skew(np.array([17.0, 34.0]))  # just past one and two waves of 132 tiles, 8 heads each
    assert (waves < -0.05).all()
    full = forward.decode_skew(np.array([33.0, 66.0, 300.0]))
    assert (full > 0.04).all() and full[2] == pytest.approx(SKEW_SHARE / 8, abs=0.02)
    tile_less = Forward(msgspec.structs.replace(shipped, tiles=()), find_model("llama-3.1-8b"), "bfloat16", "fp8", 1)
    assert tile_less.decode_skew(np.array([17.0])) == pytest.approx([SKEW_SHARE / 8 + SKEW_SHARE_FP8])


def test_rows_beside_chunks_leave_the_knots_of_many_decodes_out() -> None:
    forward = Forward(KERNELS, TOY, "bfloat16", "auto", 1)
    basis = KernelBasis(forward)
    knots = (1.0, 64.0, 256.0, 512.0)
    linear_s = tuple((basis.body_s(np.array(knots)) * [1.0, 1.0, 1.5, 1.0]).tolist())
    clock = StepClock(basis, Coefficients(knots, linear_s, 1e-9, 1e-9, 1e-12, 0.0), lambda n: n)
    for rows in (40, 256, 500, 512):
        alone, beside = clock.linear_s(rows), clock.mixed_linear_s(rows)
        assert beside == pytest.approx(float(basis.body_s(np.array([float(rows)]))[0]))
        assert alone == pytest.approx(beside * (1.5 if rows == 256 else 1.0), rel=0.02 if rows == 500 else 1e-6)
    assert clock.rows_s(256, 3) - clock.head_s(3) == pytest.approx(clock.mixed_linear_s(256))
    assert clock.rows_s(256, 256) - clock.head_s(256) == pytest.approx(clock.linear_s(256))


def test_pairs_of_norms_are_a_kernel_where_it_was_timed() -> None:
    gemma = replace(find_model("gemma-2-9b"), layers=2)
    shipped = read_profile("h200-sxm").kernels
    assert shipped
    pairs = {op: curve for op, curve in shipped.elementwise.items() if op != "norm_add_norm"}
    ours, apart = (
        Forward(kernels, gemma, "bfloat16", "auto", 1)
        for kernels in (shipped, msgspec.structs.replace(shipped, elementwise=pairs))
    )
    moved = np.array([1024.0 * 4 * gemma.hidden * 2])
    norms = {op: float(shipped.elementwise[op].at(moved)[0]) for op in ("add_rms_norm", "norm_add_norm")}
    saved_s = 4 * norms["add_rms_norm"] - 2 * norms["norm_add_norm"]
    assert saved_s > 5e-6
    rows = np.array([1024.0])
    assert apart.body_s(rows) - ours.body_s(rows) == pytest.approx([2 * saved_s])


@pytest.mark.parametrize("excess", [1.1, 0.9])
def test_what_the_engine_adds_is_a_gap_a_layer_and_beyond_that_a_ratio(excess: float) -> None:
    """A profile whose L is `excess` times its kernels' body at few rows, and twice that at 256."""
    shipped = read_profile("h200-sxm")
    knots = np.array([1.0, 8.0, 64.0, 256.0])
    body_s, layers = fitted_basis(shipped).body_s(knots), find_model(shipped.model).layers
    clock = msgspec.structs.replace(
        shipped.gpu_clock,
        tokens=tuple(map(int, knots)),
        linear_s=tuple(body_s * np.array([excess, excess, excess, 2.0])),
    )
    assert shipped.kernels
    forward = Forward(shipped.kernels, find_model("qwen2.5-32b"), "bfloat16", "auto", 1)
    _, coefficients = by_kernels(msgspec.structs.replace(shipped, gpu_clock=clock), forward)
    linear_s, own_s = np.array(coefficients.linear_s), forward.body_s(knots)
    if excess < 1.0:  # nothing to add: kernels were timed too slow
        assert linear_s == pytest.approx(own_s * [0.9, 0.9, 0.9, 2.0])
        return
    usual_s = float(np.median(0.1 * body_s[:2])) / layers  # of 16 rows and fewer
    gap_s = np.minimum(0.1 * body_s / layers, usual_s)
    assert linear_s[0] == pytest.approx((own_s + 64 * gap_s)[0])
    beyond = (0.1 * body_s / layers - gap_s)[1] * layers / body_s[1]  # a ratio
    assert linear_s[1] == pytest.approx(own_s[1] * (1.0 + beyond) + 64 * gap_s[1])
    assert linear_s[3] == pytest.approx(own_s[3] * (2.0 - layers * usual_s / body_s[3]) + 64 * usual_s)


def test_more_gpus_than_were_timed_take_the_links_share() -> None:
    model = replace(TOY, heads=8, kv_heads=8, head_dim=32)
    two, four = (Forward(KERNELS, model, "bfloat16", "auto", tp) for tp in (2, 4))
    assert four._all_reduce().seconds[0] / two._all_reduce().seconds[0] == pytest.approx((3 / 4) / (1 / 2))
    assert "all-reduce over 4 GPUs" in four.extrapolated and not any("reduce" in told for told in two.extrapolated)


# ---- what was not timed -------------------------------------------------------------------------------------------


def scaled(kernels: Kernels | None, model: str, dtype: str = "bfloat16", tensor_parallel: int = 1) -> ProfileCost:
    profile: Profile = msgspec.structs.replace(read_profile("h200-sxm"), kernels=kernels)
    settings = CostSettings(tensor_parallel, dtype, "auto", Graphs.of_engine(256, 8192))
    return ProfileCost(profile, find_model(model), find_gpu("h200-sxm"), settings)


def test_kernels_that_were_not_timed_leave_shapes_with_the_reason() -> None:
    shipped = read_profile("h200-sxm").kernels
    assert shipped is not None
    plain = msgspec.structs.replace(shipped, linears={"bfloat16": shipped.linears["bfloat16"]}, all_reduce={})
    assert ", scaled from llama-3.1-8b by kernels to qwen3-8b" in scaled(shipped, "qwen3-8b").label
    for told, cost in (
        ("dtype=fp8: linear layers in it were not timed on h200-sxm (only bfloat16)", scaled(plain, "qwen3-8b", "fp8")),
        ("tensor_parallel=2: no all-reduce was timed on h200-sxm", scaled(plain, "qwen3-8b", tensor_parallel=2)),
    ):
        assert f"by shapes ({told}) to qwen3-8b" in cost.label
        assert cost.decode_ramp(8, 8000).first_s > 0.0 and cost.mixed_s([(512, 0)], 8, 8000) > 0.0


def test_shapes_and_kernels_agree_on_the_fitted_model_within_reason() -> None:
    shipped = read_profile("h200-sxm").kernels
    by_kernels, by_shapes = (scaled(kernels, "qwen3-8b") for kernels in (shipped, None))
    ratio = by_kernels.mixed_s([(2048, 0)], 8, 8000) / by_shapes.mixed_s([(2048, 0)], 8, 8000)
    assert 0.8 < ratio < 1.25
