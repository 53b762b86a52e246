"""Profiles with kernels: rows of measurement files compiled, and profiles of GPUs on which no engine was recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from calibration.fit_kernels import Judge, fit_kernels
from calibration.measure.rows import Row, read_parquet
from calibration.profiles import FITTER, rounded
from calibration.record.setup import gpu_text
from llmsim.cost.kernels import Forward, Kernels
from llmsim.cost.profile import Measured, Profile, Provenance, by_kernels
from llmsim.hardware import find_gpu, find_model, gpu_names
from llmsim.validate import named_in


class Measurements(NamedTuple):
    rows: list[Row]
    source: str  # who timed them, with what
    digests: dict[str, str]  # file -> sha256


def read_rows(files: Sequence[Path], gpu: str) -> Measurements:
    """Measurement files, all of one GPU."""
    rows: list[Row] = []
    digests: dict[str, str] = {}
    said = []
    wanted = find_gpu(gpu)
    for file in files:
        found, provenance = read_parquet(file)
        named = str(provenance.get("gpu", ""))
        if not same_gpu(named, wanted.name):
            raise ValueError(f"{file}: measured on {named or 'an unnamed GPU'}, not on {wanted.name}. Name its own GPU")
        if file.name in digests:
            raise ValueError(f"{file}: a file of this name was given already. Rename one of them")
        rows += found
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        said.append(f"{found[0].source} ({provenance.get('date', 'undated')})" if found else file.name)
    return Measurements(rows, ", ".join(dict.fromkeys(said)), digests)


def read_kernels(files: Sequence[Path], gpu: str, rest: Profile | None = None, judge: Judge | None = None) -> Kernels:
    """Kernels of measurement files; what they lack is that of the profile `rest`."""
    read = read_rows(files, gpu)
    return fit_kernels(read.rows, find_gpu(gpu), read.source, read.digests, rest.kernels if rest else None, judge)


def same_gpu(driver_name: str, gpu: str) -> bool:
    """Whether the driver's name ("NVIDIA H200") or our own ("h200-sxm") is that of `gpu`."""
    try:
        return find_gpu(driver_name).name == gpu
    except ValueError:
        pass
    try:
        return named_in("", {"gpu": gpu_text(driver_name)}, "gpu", gpu_names()) == gpu
    except ValueError:
        return False


def without_engine(kernels: Kernels, host_from: Profile, name: str, gpu: str) -> Profile:
    """A profile of a GPU that ran no engine: its kernels, and the engine's residual and host of another profile."""
    if host_from.kernels is None:
        raise ValueError(f"profile {host_from.name} has no kernels to compare its engine with. Use another")
    model = find_model(host_from.model)
    clock = host_from.gpu_clock
    forward = Forward(kernels, model, host_from.dtype, host_from.kv_dtype, host_from.tensor_parallel)
    _, ours = by_kernels(host_from, forward)
    gpus = find_gpu(gpu), find_gpu(host_from.gpu)
    flops = gpus[0].flops_per_s["bfloat16"] / gpus[1].flops_per_s["bfloat16"]
    engine = f"kernels of {find_gpu(gpu).name}, engine and host of profile {host_from.name} ({host_from.id})"
    profile = Profile(
        format=host_from.format,
        version=host_from.version,
        name=name,
        gpu=find_gpu(gpu).name,
        model=host_from.model,
        dtype=host_from.dtype,
        kv_dtype=host_from.kv_dtype,
        tensor_parallel=host_from.tensor_parallel,
        gpu_clock=msgspec.structs.replace(
            clock,
            linear_s=tuple(np.maximum.accumulate(ours.linear_s).tolist()),
            pair_s=ours.pair_s,
            full_kv_token_s=ours.full_kv_s,
            mixed_kv_token_s=ours.mixed_kv_s,
            bandwidth_bytes_per_s=clock.bandwidth_bytes_per_s * clock.full_kv_token_s / ours.full_kv_s,
            flops_per_s=clock.flops_per_s * flops,
        ),
        host_clock=host_from.host_clock,
        measured=Measured(tokens=0, seqs=0, kv_tokens=0, context_tokens=0),
        provenance=Provenance(
            engine=engine,
            gpu=find_gpu(gpu).name,
            recorded=host_from.provenance.recorded,
            fitter=FITTER,
            scenarios=(),
            recordings={},
        ),
        error={},
        kernels=kernels,
    )
    return rounded(profile)
