"""calibration/measure/attention.py: every backend is attention, and FlashAttention 3 is called as vLLM calls it."""
# ruff: noqa: E402 - torch may be missing

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from math import log
from statistics import correlation, pstdev
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import require

require("torch")

import torch

from calibration.measure import attention
from calibration.measure.attention import BACKENDS, Attention, Batch, Group, Heads, Pool, batch_of, decodes
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.timing import Bench
from llmsim.hardware import find_model

SMALL = [Heads(4, 2, 32), Heads(7, 1, 64)]
LLAMA = find_model("llama-3.1-8b")


@pytest.fixture(autouse=True)
def _as_measured() -> Iterator[None]:
    """Without gradients, and on one thread: tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(Bench("cpu"), 1 << 21)


def point(op: str, variant: str, launch: str = "graph", **columns: Any) -> Point:
    columns = {"dtype": "bfloat16", "kv_dtype": "bfloat16", **SMALL[0]._asdict(), **columns}
    return Point.of(op, variant, launch, **columns)


def test_the_reference_sees_the_cached_tokens_and_the_new_ones_up_to_its_own() -> None:
    q, k, v = torch.randn(2, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    out = attention.reference(q, k, v)
    for row, keys in ((0, 4), (1, 5)):
        for head in range(2):
            weights = torch.softmax(k[:keys, 0] @ q[row, head] / 2.0, 0)
            assert torch.allclose(out[row, head], weights @ v[:keys, 0], atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa_math", "sdpa_flash", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_torch_backends_agree_with_plain_attention(backend: str, pool: Pool) -> None:
    points = list(attention.selftest_points(backend, "cpu", SMALL))
    assert {found.op for found in points} == set(attention.OPS)
    for found in points:
        assert attention.error(found, pool) < 0.02, found.key


class FakeFlashAttention(ModuleType):
    """`vllm.vllm_flash_attn` by its documentation, in plain float32; keeps how it was called."""

    def __init__(self) -> None:
        super().__init__("vllm.vllm_flash_attn")
        self.calls: list[dict[str, Any]] = []
        self.schedules: list[dict[str, Any]] = []

    def get_scheduler_metadata(self, **arguments: Any) -> Any:
        self.schedules.append(arguments)
        return torch.zeros(4 * arguments["batch_size"] + 1, dtype=torch.int32)

    def flash_attn_varlen_func(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        q, k, v, out = (arguments[name] for name in ("q", "k", "v", "out"))
        assert arguments["causal"] and arguments["fa_version"] == 3
        assert arguments["softmax_scale"] == pytest.approx(q.shape[-1] ** -0.5)
        starts = arguments["cu_seqlens_q"].tolist()
        assert arguments["max_seqlen_q"] == max(b - a for a, b in pairwise(starts))
        assert arguments["max_seqlen_k"] == int(arguments["seqused_k"].max())
        for row, used in enumerate(arguments["seqused_k"].tolist()):
            pages = arguments["block_table"][row, : -(-used // 16)].long()
            parts = [q[starts[row] : starts[row + 1]], *(cache[pages].flatten(0, 1)[:used] for cache in (k, v))]
            scales = [arguments[f"{name}_descale"] for name in "qkv"]
            wide = [x.float() * (1 if s is None else s[row, 0]) for x, s in zip(parts, scales, strict=True)]
            out[starts[row] : starts[row + 1]] = attention.reference(*wide)
        return out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    module = FakeFlashAttention()
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    monkeypatch.setattr(attention.FlashAttention3, "unavailable", lambda self, device: None)
    return module


def test_flash_attention_gets_pages_lengths_and_scales_that_belong_together(
    fake: FakeFlashAttention, pool: Pool
) -> None:
    for found in attention.selftest_points("fa3", "cpu", SMALL):
        assert attention.error(found, pool) < 0.02, found.key
    assert {call["q"].dtype for call in fake.calls} == {torch.bfloat16, torch.float8_e4m3fn}
    assert {call["out"].dtype for call in fake.calls} == {torch.bfloat16}
    assert all((call["q_descale"] is None) == (call["q"].dtype == torch.bfloat16) for call in fake.calls)


@pytest.mark.parametrize(
    ("launch", "new_tokens", "splits"), [("graph", 512, 32), ("graph", 513, 0), ("eager", 512, 0), ("eager", 16, 0)]
)
def test_kv_splits_are_bounded_where_vllm_bounds_them(
    fake: FakeFlashAttention, pool: Pool, launch: str, new_tokens: int, splits: int
) -> None:
    found = point("attention_prefill", "fa3", launch, chunks=1, new_tokens=new_tokens, context_tokens=0)
    (call,) = attention.prepare(found, pool, 1)
    call.run()
    assert fake.calls[-1]["num_splits"] == fake.schedules[-1]["num_splits"] == splits


def test_decodes_come_before_the_chunk_in_a_mixed_batch(fake: FakeFlashAttention, pool: Pool) -> None:
    columns = {"seqs": 3, "seq_context_tokens": 40, "skew": "uniform"}
    found = point("attention_mixed", "fa3", chunks=1, new_tokens=64, context_tokens=32, **columns)
    attention.prepare(found, pool, 1)[0].run()
    assert fake.calls[-1]["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 67]
    assert fake.calls[-1]["seqused_k"].tolist() == [41, 41, 41, 96]


def test_a_page_belongs_to_one_sequence_and_the_next_table_reads_others(pool: Pool) -> None:
    batch = Batch((Group(3, 1, 40), Group(1, 20, 30)))
    tables = pool.tables(batch, SMALL[0], 2)
    used = [[*table[:3, :3].flatten().tolist(), *table[3, :4].tolist()] for table in tables]
    assert all(len(set(pages)) == 13 for pages in used)
    assert not set(used[0]) & set(used[1])
    assert sorted(used[0]) != list(range(13)), "pages must lie scattered"


def test_a_batch_that_nearly_fills_the_pool_stays_in_it() -> None:
    small = Pool(Bench("cpu"), 2 * 16 * 64 * 10)  # ten pages
    (first, second) = small.tables(Batch((Group(3, 1, 47),)), SMALL[0], 2)
    assert sorted(first.flatten().tolist()) != sorted(second.flatten().tolist())
    assert max(*first.flatten().tolist(), *second.flatten().tolist()) < 10
    k, v = small.contiguous((1, 2, 150, 32), "bfloat16", 7)
    assert k.shape == v.shape == (1, 2, 150, 32)


@given(st.integers(2, 64).map(lambda seqs: 2 * seqs), st.integers(8, 70_000), st.sampled_from(["half", "one_long"]))
def test_a_skewed_batch_keeps_its_mean(seqs: int, mean: int, skew: str) -> None:
    groups = decodes(seqs, mean, skew)
    assert sum(group.count for group in groups) == seqs
    total = sum(group.count * group.context for group in groups)
    assert 0 <= seqs * mean - total < seqs
    assert max(group.context for group in groups) > 1.5 * mean


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 30))
def test_pairs_are_counted(count: int, new: int, context: int) -> None:
    assert Batch((Group(count, new, context),)).pairs == count * sum(context + place + 1 for place in range(new))


def test_flops_and_bytes_of_a_decode() -> None:
    found = point("attention_decode", "fa3", seqs=2, seq_context_tokens=99, skew="uniform")
    batch = batch_of(found)
    assert batch.flops(SMALL[0]) == 4 * 200 * 4 * 32
    assert batch.bytes(SMALL[0], "bfloat16") == 2 * (2 * 200 * 2 * 32 + 2 * 2 * 4 * 32)
    assert batch.bytes(SMALL[0], "fp8") == 2 * 200 * 2 * 32 + 3 * 2 * 4 * 32


def test_chat_s_contexts_are_spread_the_same_way_each_time() -> None:
    groups = decodes(128, 1024, "spread")
    contexts = [group.context for group in groups]
    assert groups == decodes(128, 1024, "spread") and all((count, new) == (1, 1) for count, new, _ in groups)
    assert len(groups) == 128 and sum(contexts) == pytest.approx(128 * 1024, abs=64)
    assert pstdev(log(context) for context in contexts) == pytest.approx(0.79, abs=0.02)
    assert abs(correlation(range(128), contexts)) < 0.3  # in no order
    assert min(group.context for group in decodes(256, 1, "spread")) == 1


def test_an_engine_s_contexts_nearly_agree() -> None:
    contexts = [group.context for group in decodes(67, 1100, "near")]
    assert len(contexts) == 67 and sum(contexts) == pytest.approx(67 * 1100, abs=34)
    assert pstdev(log(context) for context in contexts) == pytest.approx(0.05, abs=0.002)


def test_an_unknown_skew_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skew='odd': use uniform, half, one_long, spread or near"):
        decodes(2, 10, "odd")


def wanted(device: str, **more: Any) -> Wanted:
    return Wanted((find_model("qwen2.5-7b"), LLAMA), tensor_parallel=(1, 2, 4, 8), device=device, **more)


def test_head_shapes_are_those_of_one_rank_the_most_common_first() -> None:
    shapes = attention.head_shapes(wanted("cuda"))
    assert shapes[0] == (32, 8, 128)
    assert set(shapes) == {
        (28, 4, 128),
        (14, 2, 128),
        (7, 1, 128),
        (32, 8, 128),
        (16, 4, 128),
        (8, 2, 128),
        (4, 1, 128),
    }


def test_the_main_shape_is_measured_coarsely_before_anything_else(fake: FakeFlashAttention) -> None:
    points = list(Attention().points(wanted("cuda", kv_dtypes=("bfloat16", "fp8"))))
    keys = [found.key for found in points]
    assert len(keys) == len(set(keys))
    early = points[:60]
    assert {found.op for found in early} == set(attention.OPS)
    assert {(found.variant, found["q_heads"], found["kv_dtype"]) for found in early} == {("fa3", 32, "bfloat16")}
    assert {found.variant for found in points} == set(BACKENDS)
    assert {found["kv_dtype"] for found in points if found.variant != "fa3"} == {"bfloat16"}
    assert {found.get("skew") for found in points} == {None, "uniform", "half", "one_long", "spread", "near"}
    for found in points:
        batch, heads = batch_of(found), Heads(found["q_heads"], found["kv_heads"], found["head_dim"])
        assert batch.flops(heads) <= attention.MOST_FLOPS
        assert 2 * batch.keys * heads.kv_heads * heads.head_dim * 2 <= attention.POOL_BYTES
    small_beside_many = [f for f in points if f.op == "attention_mixed" and f["new_tokens"] <= 64 and f["seqs"] == 256]
    assert small_beside_many


def test_without_vllm_torch_is_measured_in_its_place_and_the_lack_is_said() -> None:
    operator = Attention()
    points = list(operator.points(wanted("cuda")))
    assert points[0].variant in ("varlen", "sdpa_flash")
    missing = [found for found in points if found.variant == "fa3"]
    assert 0 < len(missing) < 10
    with pytest.raises(Unavailable, match="fa3 needs a Hopper GPU"):
        operator.measure(missing[0], Bench("cpu"))


def test_only_wanted_ops_are_measured() -> None:
    assert {found.op for found in Attention().points(wanted("cpu", ops=("attention_decode",)))} == {"attention_decode"}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_op_is_measured_on_the_cpu() -> None:
    operator, bench = Attention(), Bench("cpu", cap_s=0.001)
    points = list(operator.points(wanted("cpu")))
    first = {(found.op, found.variant): found for found in points}
    assert {op for op, _ in first} == set(attention.OPS)
    for found in islice(first.values(), 6):
        row = operator.measure(found, bench)
        assert row.median_s > 0 and row.flops and row.bytes
        assert (row.q_heads, row.kv_heads, row.head_dim) == (32, 8, 128)
