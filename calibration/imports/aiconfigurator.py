"""Measurement rows from the tables of the package `aiconfigurator-core` 0.12.0 (NVIDIA, Apache-2.0).

    systems/data/<system>/gemm/<backend>/<version>/gemm_perf.parquet                         linear
    systems/data/<system>/attention/<backend>/<version>/context_attention_perf.parquet       attention_prefill
    systems/data/<system>/attention/<backend>/<version>/generation_attention_perf.parquet    attention_decode
    systems/data/<system>/quantize/<backend>/<version>/scale_matrix_perf.parquet             quant_fp8
    systems/data/<system>/comm/<backend>/<version>/custom_allreduce_perf.parquet             all_reduce
    systems/data/<system>/comm/nccl/<version>/nccl_perf.parquet         all_reduce, all_gather, reduce_scatter

What the columns mean, and where that is said: `sdk/` is in the package; `rust/` (its compiled part) and `collector/`
(what measured the tables) are in the repository ai-dynamo/aiconfigurator.

* latency: milliseconds of one operator on one GPU, the mean of a few replays of a CUDA graph
  (sdk/performance_result.py, collector/helper.py: benchmark_with_power). So `median_s` holds a mean, no spread is
  known, and clocks are not recorded (collector/README.md asks for the highest application clocks).
* gemm (collector/vllm/collect_gemm.py): m rows, n out, k in, of one linear layer of the engine. bfloat16 and fp8 pass
  through six layers with their own weights per graph: six weights that fit into the L2 together are read from there.
  All layers take bfloat16 rows: quantising them is in the time of fp8 (rust/.../operators/gemm.rs). vLLM's fp8_block
  is timed without a graph: launching it hides what takes less than 55 to 280 microseconds.
* attention (collector/vllm/collect_attn.py, rust/.../perf_database/attention.rs): batch_size sequences alike.
  Context: isl new tokens, nothing cached. Generation: one new token after `step` cached ones (before vLLM 0.24: after
  step - 1). The KV-cache write is in the time. One call per graph, on one cache: the launch of a graph is a floor
  under all (10 microseconds on H200), and a cache that fits into the L2 is read from there. With kv_cache_dtype fp8
  the queries are fp8 too, if the kernel can. window_size above zero is sliding-window attention.
* scale_matrix (collector/*/collect_computescale.py): m by k bfloat16 to fp8 with a given scale.
* custom_allreduce (collector/collect_all_reduce.py, rust/.../operators/communication.rs): message_size counts
  bfloat16 elements, and the engine chooses its method at every size. "_eager" rows are without a graph and copy the
  input first.
* nccl (collector/collect_nccl.py): nccl-tests, out of place, without a graph. message_size counts elements of the
  whole buffer: gathered output, scattered input. half is float16.

A directory's version is not always its rows' (the package reuses older data): `source` has the rows' own. Of rows
that differ in nothing but their time the first counts, as in the package. Bytes and FLOPs are computed here.

The collectors of trtllm and sglang fill the same columns through the same helper, and the package reads all three
alike; only vLLM's were read line by line.

Errors: FileNotFoundError (package missing), ValueError (unknown system, backend or version; a damaged table).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibration.measure.rows import Row
from llmsim.parquet import read_table

PACKAGE = "aiconfigurator-core"
VERSION = "0.12.0"
SYSTEMS = {  # the package's systems that have tables, and what llmsim calls them; b60 is Intel's, without these kernels
    "a100_sxm": "a100-80gb-sxm",
    "b200_sxm": "b200",
    "b300_sxm": "b300",
    "gb200": "gb200",
    "gb300": "gb300",
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
BACKENDS = ("vllm", "trtllm", "sglang")

_WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128}
_LINEAR = {  # gemm_dtype: (dtype of the weights, variant without its backend)
    "bfloat16": ("bfloat16", "cublas"),
    "fp8": ("fp8", "fp8"),
    "fp8_block": ("fp8", "fp8_block"),
    "int8_wo": ("int8", "int8_weight"),
    "int4_wo": ("int4", "int4_weight"),
    "sq": ("int8", "smooth_quant"),
}
_ALONE = ("cublas", "int8_weight", "int4_weight")  # variants that mean the same with every backend
_KERNELS = {
    "vllm_flash_attn": "fa2",  # vLLM's before 0.24, imported for Ampere only, where it has no other
    "vllm_flash_attn_fa2": "fa2",
    "vllm_flash_attn_fa3": "fa3",
    "vllm_flash_attn_fa4": "fa4",
    "vllm_flashinfer_trtllmprefill": "flashinfer_trtllm",
    "vllm_flashinfer_trtllmdecode": "flashinfer_trtllm",
    "vllm_flashinfer_fiprefill": "flashinfer",
    "vllm_flashinfer_fidecode": "flashinfer",
    "vllm_triton_attn": "triton",
    "torch_flow": "trtllm",
    "torch_flow_flashinfer": "flashinfer",
}
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")

Frame = pd.DataFrame


@dataclass(frozen=True)
class Count:
    """Rows of one table: `left_out` by reason."""

    table: str
    read: int
    kept: int
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    gpu: str
    device: str
    rows: list[Row]
    counts: list[Count]
    notes: list[str]


def systems_folder() -> Path:
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{PACKAGE} is not installed. pip install 'llmsim[aiconfigurator]'")
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError:
        installed = "of unknown version"
    if installed != VERSION:
        raise ValueError(
            f"{PACKAGE} {installed}: only the tables of {VERSION} are known. pip install {PACKAGE}=={VERSION}"
        )
    return Path(spec.submodule_search_locations[0]) / "systems"


def available(folder: Path) -> dict[str, dict[str, list[str]]]:
    """System -> backend -> versions that have both linear layers and attention, oldest first."""
    found: dict[str, dict[str, list[str]]] = {}
    for system in sorted(SYSTEMS):
        data = folder / "data" / system
        for backend in BACKENDS:
            both = _versions(data / "gemm" / backend) & _versions(data / "attention" / backend)
            if both:
                found.setdefault(system, {})[backend] = sorted(both, key=_order)
    return found


def _versions(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/*.parquet")}


def _order(version_name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version_name))


def read_tables(folder: Path, system: str, backend: str = "vllm", version_name: str | None = None) -> Imported:
    known = available(folder)
    if system not in known:
        raise ValueError(f"system={system}: not in {PACKAGE}. Use one of {', '.join(known)}")
    if backend not in known[system]:
        raise ValueError(f"backend={backend}: not there for {system}. Use one of {', '.join(known[system])}")
    versions = known[system][backend]
    version_name = version_name or versions[-1]
    if version_name not in versions:
        raise ValueError(f"version={version_name}: not there for {system} {backend}. Use one of {', '.join(versions)}")

    data = folder / "data" / system
    notes: list[str] = []
    counts: list[Count] = []
    rows: list[Row] = []
    devices: Counter[str] = Counter()
    for family, owner, name, convert in _TABLES:
        path = _table(data / family / (owner or backend), name, None if owner else version_name, notes)
        if path is None:
            notes.append(f"no {name} for {system} {owner or backend}")
            continue
        table = _read(path)
        devices.update(table.get("device", ()))
        kept, left_out = _once(convert(_complete(table, path), backend))
        rows += [Row(**row) for row in kept]
        counts.append(Count(_shown(path, data), len(table), len(kept), left_out))
    used = {count.table for count in counts}
    for path in sorted(data.glob(f"*/{backend}/{version_name}/*.parquet")):
        if _shown(path, data) not in used:
            size = len(_read(path, ["latency"]))
            counts.append(Count(_shown(path, data), size, 0, {"no operator of llmsim's": size}))
    device = devices.most_common(1)[0][0] if devices else system
    return Imported(SYSTEMS[system], device, rows, counts, notes)


def _table(folder: Path, name: str, version_name: str | None, notes: list[str]) -> Path | None:
    """The table of this version, or of the newest one before it: the package fills gaps in the same way."""
    there = sorted((path.parent.name for path in folder.glob(f"*/{name}.parquet")), key=_order)
    if version_name is not None:
        there = [other for other in there if _order(other) <= _order(version_name)]
    if not there:
        return None
    if version_name not in (None, there[-1]):
        notes.append(f"{name} of {there[-1]}: {version_name} has none")
    return folder / there[-1] / f"{name}.parquet"


def _shown(path: Path, data: Path) -> str:
    return path.relative_to(data).with_suffix("").as_posix()


def _read(path: Path, columns: list[str] | None = None) -> Frame:
    try:
        return read_table(path, columns).to_pandas()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable table ({str(error).splitlines()[0]}). "
            f"pip install --force-reinstall {PACKAGE}=={VERSION}"
        ) from None


def _complete(table: Frame, path: Path) -> Frame:
    """Checked; with `framework` and `version` of the path where the table names none."""
    needed = {
        "gemm_perf": ("gemm_dtype", "m", "n", "k"),
        "scale_matrix_perf": ("m", "k", "quant_dtype"),
        "custom_allreduce_perf": ("num_gpus", "message_size"),
        "nccl_perf": ("op_name", "nccl_dtype", "num_gpus", "message_size"),
    }.get(
        path.stem,
        ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "attn_dtype", "kv_cache_dtype"),
    )
    for column in ("latency", "kernel_source", *needed):
        if column not in table:
            raise ValueError(f"{path}: no column {column!r}. pip install --force-reinstall {PACKAGE}=={VERSION}")
        if table[column].isna().any():
            raise ValueError(f"{path}: {column!r} is empty in row {int(table[column].isna().argmax())}")
    bad = ~(np.isfinite(table["latency"]) & (table["latency"] > 0.0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{path}: latency {table['latency'].iloc[row]} in row {row} is not a positive number")
    framework = table["framework"].str.lower() if "framework" in table else path.parent.parent.name
    if path.stem == "nccl_perf":  # they are named after whoever ran nccl-tests
        framework = "nccl"
    measured = table.get("version", path.parent.name)
    return table.assign(framework=framework, version=measured)


# ---- one converter a table: rows as columns of a Row, and reasons of those left out -------------------------------

Converted = tuple[Frame, dict[str, int]]


def _common(table: Frame, **columns: Any) -> Frame:
    source = f"{PACKAGE} {VERSION} " + table["framework"] + " " + table["version"] + " " + table["kernel_source"]
    return pd.DataFrame({"median_s": table["latency"] * 1e-3, "source": source, **columns}, index=table.index)


def _keep(table: Frame, keep: pd.Series, reason: str | pd.Series) -> Converted:
    left = table[~keep]
    reasons = Counter([reason] * len(left) if isinstance(reason, str) else reason[~keep])
    return table[keep], dict(reasons)


def _linear(table: Frame, backend: str) -> Converted:
    dtypes = table["gemm_dtype"]
    table, left_out = _keep(table, dtypes.isin(list(_LINEAR)), "no dtype of llmsim's: " + dtypes)
    dtype = table["gemm_dtype"].map({name: dtype for name, (dtype, _) in _LINEAR.items()})
    variant = table["gemm_dtype"].map(
        {name: kind if kind in _ALONE else f"{backend}_{kind}" for name, (_, kind) in _LINEAR.items()}
    )
    m, n, k = (table[name].astype(float) for name in "mnk")
    eager = (table["gemm_dtype"] == "fp8_block") & (backend == "vllm")
    return _common(
        table,
        op="linear",
        variant=variant,
        launch=np.where(eager, "eager", "graph"),
        dtype=dtype,
        tokens=table["m"],
        n=table["n"],
        k=table["k"],
        flops=2.0 * m * n * k,
        bytes=n * k * dtype.map(_WEIGHT_BYTES) + 2.0 * m * (n + k),
    ), left_out


def _attention(table: Frame, decode: bool) -> Converted:
    window = table["window_size"] if "window_size" in table else pd.Series(0, index=table.index)
    table, left_out = _keep(table, window == 0, "sliding window")
    batch, new, step, q_heads, kv_heads, head_dim = (
        table[name].astype(float)
        for name in ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim")
    )
    pairs = new * step + new * (new + 1.0) / 2.0
    kv_dtype = table["kv_cache_dtype"]
    kv_bytes = kv_dtype.map(lambda name: 1.0 if "8" in name else 2.0)
    shape = (
        {"seqs": table["batch_size"], "seq_context_tokens": table["step"], "skew": "uniform"}
        if decode
        else {"chunks": table["batch_size"], "new_tokens": table["isl"], "context_tokens": table["step"]}
    )
    return _common(
        table,
        op="attention_decode" if decode else "attention_prefill",
        variant=table["kernel_source"].map(lambda kernel: _KERNELS.get(kernel, kernel)),
        launch="graph",
        dtype=table["attn_dtype"],
        kv_dtype=kv_dtype,
        q_heads=table["num_heads"],
        kv_heads=table["num_key_value_heads"],
        head_dim=table["head_dim"],
        **shape,
        flops=4.0 * batch * pairs * q_heads * head_dim,
        bytes=batch * head_dim * (4.0 * new * q_heads + 2.0 * (new + step) * kv_heads * kv_bytes),
    ), left_out


def _quantise(table: Frame, backend: str) -> Converted:
    dtypes = table["quant_dtype"]
    table, left_out = _keep(table, dtypes == "fp8", "no operator of llmsim's: to " + dtypes)
    return _common(
        table,
        op="quant_fp8",
        variant=backend,
        launch="graph",
        dtype="bfloat16",
        tokens=table["m"],
        n=table["k"],
        bytes=3.0 * table["m"] * table["k"],
    ), left_out


def _all_reduce(table: Frame, backend: str) -> Converted:
    return _common(
        table,
        op="all_reduce",
        variant=table["framework"] + "_custom",
        launch=np.where(table["kernel_source"].str.endswith("_eager"), "eager", "graph"),
        dtype="bfloat16",
        gpus=table["num_gpus"],
        size_bytes=2 * table["message_size"],
    ), {}


def _nccl(table: Frame, backend: str) -> Converted:
    ops = table["op_name"]
    table, left_out = _keep(table, ops.isin(_COLLECTIVES), "no operator of llmsim's: " + ops)
    return _common(
        table,
        op=table["op_name"],
        variant="nccl",
        launch="eager",
        dtype=table["nccl_dtype"].replace("half", "float16"),
        gpus=table["num_gpus"],
        size_bytes=table["message_size"] * np.where(table["nccl_dtype"] == "half", 2, 1),
    ), left_out


def _once(converted: Converted) -> tuple[list[dict[Any, Any]], dict[str, int]]:
    frame, left_out = converted
    again = frame.duplicated([name for name in frame.columns if name != "median_s"])
    if again.any():
        left_out = {**left_out, "measured again": int(again.sum())}
    return frame[~again].to_dict("records"), left_out


_TABLES: Sequence[tuple[str, str | None, str, Callable[[Frame, str], Converted]]] = (
    ("gemm", None, "gemm_perf", _linear),
    ("attention", None, "context_attention_perf", lambda table, _: _attention(table, decode=False)),
    ("attention", None, "generation_attention_perf", lambda table, _: _attention(table, decode=True)),
    ("quantize", None, "scale_matrix_perf", _quantise),
    ("comm", None, "custom_allreduce_perf", _all_reduce),
    ("comm", "nccl", "nccl_perf", _nccl),
)
