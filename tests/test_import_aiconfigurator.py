"""Rows out of aiconfigurator's tables: a small tree in its format, and the package itself where it is installed."""

from importlib.util import find_spec

import pandas as pd
import pytest

import calibration.imports.aiconfigurator as importer
from calibration.__main__ import main
from calibration.imports.aiconfigurator import SYSTEMS, VERSION, available, read_tables, systems_folder
from calibration.measure.rows import read_parquet
from llmsim.hardware import find_gpu

MS = 1e-3
STAMP = {"framework": "VLLM", "version": "0.24.0", "device": "NVIDIA B200"}
LINEAR = {"kernel_source": "torch.nn.functional.linear", "gemm_dtype": "bfloat16", "m": 16, "n": 4096, "k": 1024}
CONTEXT = {
    "kernel_source": "vllm_flashinfer_trtllmprefill",
    "batch_size": 2,
    "isl": 100,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attn_dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "step": 0,
    "window_size": 0,
}
DECODE = {**CONTEXT, "kernel_source": "vllm_flashinfer_trtllmdecode", "batch_size": 64, "isl": 1, "step": 1023}
CUSTOM = {"kernel_source": "vLLM_custom_graph", "op_name": "all_reduce", "num_gpus": 4, "message_size": 4096}
NCCL = {"kernel_source": "NCCL", "op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 8, "message_size": 1024}


def write(root, table, rows, stamp=STAMP):
    path = root / "data" / "b200_sxm" / f"{table}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([{**stamp, "latency": 0.5, **row} for row in rows]).to_parquet(path)
    return path


@pytest.fixture
def root(tmp_path):
    write(
        tmp_path,
        "gemm/vllm/0.24.0/gemm",
        [
            {**LINEAR, "latency": 0.0125},
            {**LINEAR, "latency": 9.0},
            {**LINEAR, "gemm_dtype": "fp8", "kernel_source": "CutlassFP8ScaledMMLinearKernel"},
            {**LINEAR, "gemm_dtype": "fp8_block", "kernel_source": "DeepGemmFp8BlockScaledMMKernel"},
            {**LINEAR, "gemm_dtype": "nvfp4", "kernel_source": "FlashInferCuteDslNvFp4LinearKernel"},
        ],
    )
    write(
        tmp_path,
        "attention/vllm/0.24.0/context_attention",
        [CONTEXT, {**CONTEXT, "window_size": 128}, {**CONTEXT, "window_size": 1024}],
    )
    write(tmp_path, "attention/vllm/0.24.0/generation_attention", [DECODE])
    write(
        tmp_path,
        "quantize/vllm/0.24.0/scale_matrix",
        [{"kernel_source": "static", "m": 8, "k": 4096, "quant_dtype": "fp8"}],
    )
    write(tmp_path, "moe/vllm/0.24.0/moe", [{"num_experts": 8}] * 3)
    stamp = {**STAMP, "version": "0.19.0"}
    write(
        tmp_path,
        "comm/vllm/0.19.0/custom_allreduce",
        [CUSTOM, {**CUSTOM, "kernel_source": "vLLM_custom_eager"}],
        stamp,
    )
    write(tmp_path, "comm/vllm/0.25.0/custom_allreduce", [CUSTOM])  # newer than what is asked for
    write(tmp_path, "comm/nccl/2.9.0/nccl", [NCCL], {})
    write(
        tmp_path,
        "comm/nccl/2.28.9/nccl",
        [NCCL, {**NCCL, "nccl_dtype": "int8"}, {**NCCL, "op_name": "alltoall"}],
        {},  # an old table: no framework, version or device
    )
    return tmp_path


def rows_of(root, op):
    return [row for row in read_tables(root, "b200_sxm").rows if row.op == op]


def test_linear_layers_in_seconds_with_their_least_work(root):
    bf16, fp8, block = rows_of(root, "linear")
    assert (bf16.variant, bf16.launch, bf16.dtype) == ("cublas", "graph", "bfloat16")
    assert (bf16.tokens, bf16.n, bf16.k) == (16, 4096, 1024)
    assert bf16.median_s == pytest.approx(0.0125 * MS)  # the first of two that differ in nothing else
    assert bf16.flops == 2 * 16 * 4096 * 1024
    assert bf16.bytes == 2 * (4096 * 1024 + 16 * 1024 + 16 * 4096)
    assert bf16.source == "aiconfigurator-core 0.12.0 vllm 0.24.0 torch.nn.functional.linear"
    assert (fp8.variant, fp8.launch, fp8.dtype) == ("vllm_fp8", "graph", "fp8")
    assert fp8.bytes == 4096 * 1024 + 2 * (16 * 1024 + 16 * 4096)
    assert (block.variant, block.launch, block.dtype) == ("vllm_fp8_block", "eager", "fp8")


def test_prefill_attention_counts_causal_pairs_and_one_byte_of_fp8_cache(root):
    (row,) = rows_of(root, "attention_prefill")
    assert (row.variant, row.launch, row.dtype, row.kv_dtype) == ("flashinfer_trtllm", "graph", "bfloat16", "fp8")
    assert (row.chunks, row.new_tokens, row.context_tokens, row.seqs) == (2, 100, 0, None)
    assert (row.q_heads, row.kv_heads, row.head_dim) == (32, 8, 128)
    assert row.flops == 4 * 2 * (100 * 101 / 2) * 32 * 128
    assert row.bytes == 2 * (2 * 2 * 100 * 32 * 128 + 2 * 100 * 8 * 128)
    assert row.median_s == pytest.approx(0.5 * MS)


def test_decode_attention_has_the_cached_tokens_and_reads_the_new_one_too(root):
    (row,) = rows_of(root, "attention_decode")
    assert (row.seqs, row.seq_context_tokens, row.skew, row.chunks) == (64, 1023, "uniform", None)
    assert row.flops == 4 * 64 * 1024 * 32 * 128
    assert row.bytes == 64 * (2 * 2 * 32 * 128 + 2 * 1024 * 8 * 128)


def test_messages_are_counted_in_elements(root):
    graph, eager, *nccl = rows_of(root, "all_reduce")
    assert (graph.variant, graph.launch, graph.gpus, graph.size_bytes) == ("vllm_custom", "graph", 4, 8192)
    assert (eager.launch, eager.size_bytes) == ("eager", 8192)
    assert not nccl
    half, int8 = rows_of(root, "all_gather")
    assert (half.variant, half.launch, half.dtype, half.size_bytes, half.gpus) == ("nccl", "eager", "float16", 2048, 8)
    assert (int8.dtype, int8.size_bytes) == ("int8", 1024)
    assert half.source == "aiconfigurator-core 0.12.0 nccl 2.28.9 NCCL"  # newer than 2.9.0


def test_quantisation_moves_three_bytes_an_element(root):
    (row,) = rows_of(root, "quant_fp8")
    assert (row.variant, row.tokens, row.n, row.bytes) == ("vllm", 8, 4096, 3 * 8 * 4096)


def test_a_gap_is_filled_from_an_older_version_and_said(root):
    imported = read_tables(root, "b200_sxm")
    assert imported.notes == ["custom_allreduce_perf of 0.19.0: 0.24.0 has none"]
    assert {row.source.split()[3] for row in imported.rows if row.op == "all_reduce"} == {"0.19.0"}


def test_every_row_read_is_kept_or_left_out_for_a_reason(root):
    imported = read_tables(root, "b200_sxm")
    counts = {count.table: count for count in imported.counts}
    assert all(count.read == count.kept + sum(count.left_out.values()) for count in imported.counts)
    assert sum(count.kept for count in imported.counts) == len(imported.rows)
    gemm = {"no dtype of llmsim's: nvfp4": 1, "measured again": 1}
    assert counts["gemm/vllm/0.24.0/gemm_perf"].left_out == gemm
    assert counts["attention/vllm/0.24.0/context_attention_perf"].left_out == {"sliding window": 2}
    assert counts["comm/nccl/2.28.9/nccl_perf"].left_out == {"no operator of llmsim's: alltoall": 1}
    assert counts["moe/vllm/0.24.0/moe_perf"].left_out == {"no operator of llmsim's": 3}
    assert (imported.gpu, imported.device) == ("b200", "NVIDIA B200")


def test_a_table_that_is_nowhere_is_noted(root):
    (root / "data/b200_sxm/quantize/vllm/0.24.0/scale_matrix_perf.parquet").unlink()
    assert "no scale_matrix_perf for b200_sxm vllm" in read_tables(root, "b200_sxm").notes


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("b100", "vllm", None), "system=b100: not in aiconfigurator-core. Use one of b200_sxm"),
        (("b200_sxm", "trtllm", None), "backend=trtllm: not there for b200_sxm. Use one of vllm"),
        (("b200_sxm", "vllm", "0.19.0"), "version=0.19.0: not there for b200_sxm vllm. Use one of 0.24.0"),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(root, wanted, message):
    with pytest.raises(ValueError) as error:
        read_tables(root, *wanted)
    assert str(error.value) == message


def test_a_damaged_table_is_named(root):
    path = write(root, "gemm/vllm/0.24.0/gemm", [LINEAR])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"gemm_perf\.parquet: not a readable table .*--force-reinstall") as error:
        read_tables(root, "b200_sxm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"latency": 0.0}, "latency 0.0 in row 1 is not a positive number"),
        ({"latency": float("inf")}, "latency inf in row 1 is not a positive number"),
        ({"latency": None}, "'latency' is empty in row 1"),
        ({"gemm_dtype": None}, "'gemm_dtype' is empty in row 1"),
    ],
)
def test_a_senseless_row_is_named(root, row, message):
    write(root, "gemm/vllm/0.24.0/gemm", [LINEAR, {**LINEAR, **row}])
    with pytest.raises(ValueError, match=f"gemm_perf.parquet: {message}"):
        read_tables(root, "b200_sxm")


def test_a_missing_column_is_named(root):
    write(root, "gemm/vllm/0.24.0/gemm", [{name: value for name, value in LINEAR.items() if name != "k"}])
    with pytest.raises(ValueError, match=r"gemm_perf\.parquet: no column 'k'"):
        read_tables(root, "b200_sxm")


def test_a_missing_or_another_package_is_told_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importer, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed\. pip install 'llmsim\[aiconfigurator\]'$"):
        systems_folder()

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importer, "find_spec", lambda name: Spec)
    monkeypatch.setattr(importer, "version", lambda name: "0.13.0")
    with pytest.raises(ValueError, match=r"^aiconfigurator-core 0\.13\.0: only the tables of 0\.12\.0 are known"):
        systems_folder()
    monkeypatch.setattr(importer, "version", lambda name: VERSION)
    assert systems_folder() == tmp_path / "systems"


def run(capsys, *arguments):
    main(["import", "aiconfigurator", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_writes_rows_with_their_provenance(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importer, "systems_folder", lambda: root)
    out = tmp_path / "b200.parquet"
    said = run(capsys, "--system", "b200_sxm", "--out", str(out))
    rows, provenance = read_parquet(out)
    assert rows == read_tables(root, "b200_sxm").rows
    assert (provenance["gpu"], provenance["package"]) == ("b200", "aiconfigurator-core 0.12.0")
    assert (
        "gemm/vllm/0.24.0/gemm_perf: 3 of 5 rows; left out: 1 no dtype of llmsim's: nvfp4, 1 measured again"
        in (provenance["notes"])
    )
    assert "note: custom_allreduce_perf of 0.19.0: 0.24.0 has none" in said
    assert said.splitlines()[-1] == f"{out}: 10 rows of NVIDIA B200 (b200)"
    assert run(capsys, "--list").split() == ["b200_sxm", "b200", "vllm", "0.24.0"]


def test_the_command_needs_a_system_and_a_file(root, monkeypatch, capsys):
    import click

    monkeypatch.setattr(importer, "systems_folder", lambda: root)
    with pytest.raises(click.UsageError, match="give --system and --out, or --list"):
        run(capsys, "--system", "b200_sxm")


def test_every_system_is_a_known_gpu():
    assert [find_gpu(name).name for name in SYSTEMS.values()] == list(SYSTEMS.values())


package = pytest.mark.skipif(
    find_spec("aiconfigurator_core") is None,
    reason="82 MB that CI does not install: pip install 'llmsim[aiconfigurator]'",
)


@package
def test_the_package_has_every_system():
    there = available(systems_folder())
    assert set(there) == set(SYSTEMS)
    assert all(set(backends) == {"vllm", "trtllm", "sglang"} for backends in there.values())


@package
@pytest.mark.parametrize("system", ["h200_sxm", "b200_sxm", "a100_sxm", "l40s"])
def test_the_package_stays_below_the_roofline_and_comes_near_it(system):
    """A wrong unit or a misread column would break one of the bounds: best cases are at 0.25 to 0.97 of the peaks."""
    imported = read_tables(systems_folder(), system)
    gpu = find_gpu(imported.gpu)
    best: dict[tuple[str, str | None], float] = {}
    for row in imported.rows:
        at = (row.op, row.dtype)
        if row.op == "linear" and row.launch == "graph":
            peak = row.flops / row.median_s / gpu.flops_per_s[row.dtype]
        elif row.op == "attention_decode" and row.bytes > 3 * gpu.l2_bytes:  # less is read from the L2
            peak = row.bytes / row.median_s / gpu.bandwidth_bytes_per_s
        elif row.op == "attention_prefill":
            at = (row.op, row.kv_dtype)
            peak = row.flops / row.median_s / gpu.flops_per_s[row.kv_dtype]
        else:
            continue
        best[at] = max(best.get(at, 0.0), peak)
    assert 0.75 < best["linear", "bfloat16"] < 1
    assert 0.85 < best["attention_decode", "bfloat16"] < 1
    assert 0.5 < best["attention_prefill", "bfloat16"] < 1
    if "fp8" in gpu.flops_per_s:
        assert 0.6 < best["linear", "fp8"] < 1
        assert 0.2 < best["attention_prefill", "fp8"] < 1


@package
@pytest.mark.parametrize("system", ["h200_sxm", "b200_sxm", "a100_sxm"])
def test_nccl_and_vllm_reduce_a_large_buffer_in_about_the_same_time(system):
    """vLLM leaves these to NCCL: elements taken for bytes, in either table, would make it a factor of two."""
    reduced = [row for row in read_tables(systems_folder(), system).rows if row.op == "all_reduce"]
    large = [row for row in reduced if row.size_bytes == 2**29]
    for gpus in (2, 4, 8):
        own = next(row for row in large if (row.gpus, row.variant, row.launch) == (gpus, "vllm_custom", "graph"))
        nccl = next(row for row in large if (row.gpus, row.variant, row.dtype) == (gpus, "nccl", "float16"))
        assert own.median_s == pytest.approx(nccl.median_s, rel=0.15)
