"""Make a profile of what was fitted, with where it comes from, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from calibration.check import check_profile, with_errors
from calibration.fit import fit_clocks
from calibration.steps import Recording
from llmsim.cost.basis import Basis, KernelBasis, ShapeBasis
from llmsim.cost.kernels import Forward, Kernels
from llmsim.cost.profile import FORMAT, VERSION, HostClock, Measured, Profile, Provenance, decode_profile, model_shape
from llmsim.hardware import find_gpu, find_model

FITTER = "llmsim calibration 1"


def fit_profile(
    recordings: Sequence[Recording],
    name: str,
    gpu: str,
    model: str,
    dtype: str = "bfloat16",
    kv_dtype: str = "auto",
    kernels: Kernels | None = None,
) -> Profile:
    first = recordings[0]
    tensor_parallel = int(first.engine.get("tensor_parallel_size", 1))
    for recording in recordings:
        if int(recording.engine.get("tensor_parallel_size", 1)) != tensor_parallel:
            raise ValueError(
                f"{recording.path}: tensor_parallel_size differs from that of {first.path}. Fit them apart"
            )
    shape = model_shape(find_model(model), find_gpu(gpu), dtype, kv_dtype, tensor_parallel, dtype)
    kv_heads = find_model(model).kv_heads
    basis: Basis = ShapeBasis(kv_heads / min(tensor_parallel, kv_heads))
    if kernels is not None:
        basis = KernelBasis(Forward(kernels, find_model(model), dtype, kv_dtype, tensor_parallel))
    gpu_clock, host, stalls = fit_clocks(recordings, first.graphs, shape, basis)
    fields = {field: getattr(host, field) for field in HostClock.__struct_fields__ if field != "stall_share"}
    profile = Profile(
        format=FORMAT,
        version=VERSION,
        name=name,
        gpu=find_gpu(gpu).name,
        model=find_model(model).name,
        dtype=dtype,
        kv_dtype=kv_dtype,
        tensor_parallel=tensor_parallel,
        gpu_clock=gpu_clock,
        host_clock=HostClock(stall_share=stalls, **fields),
        measured=measured_range(recordings),
        provenance=provenance(recordings),
        error={},
        kernels=kernels,
    )
    profile = rounded(profile)
    return with_errors(profile, check_profile(profile, recordings))


def measured_range(recordings: Sequence[Recording]) -> Measured:
    steps = [step for recording in recordings for scenario in recording.scenarios for step in scenario.steps]
    return Measured(
        tokens=max(step.tokens for step in steps),
        seqs=max(step.seqs for step in steps),
        kv_tokens=max(step.kv_tokens for step in steps),
        context_tokens=max((new + done for step in steps for new, done in step.chunks), default=0),
    )


def provenance(recordings: Sequence[Recording]) -> Provenance:
    engine = recordings[0].engine
    return Provenance(
        engine=engine.get("engine", "unknown engine"),
        gpu=engine.get("gpu", "unknown GPU"),
        recorded=engine.get("recorded", "unknown"),
        fitter=FITTER,
        scenarios=tuple(scenario.name for recording in recordings for scenario in recording.scenarios),
        recordings={f"{r.path.name}/{file}": digest for r in recordings for file, digest in r.files.items()},
    )


def rounded(profile: Profile) -> Profile:
    """Coefficients to seven digits: more is noise, and a fit repeated elsewhere gives the same file."""

    def short(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.7g}")
        if isinstance(value, dict):
            return {key: short(item) for key, item in value.items()}
        return [short(item) for item in value] if isinstance(value, list | tuple) else value

    return msgspec.convert(short(msgspec.to_builtins(profile, builtin_types=())), Profile)


def check_output(path: Path) -> None:
    """Before the work: that a profile written there can be, and can be named afterwards."""
    if path.suffix != ".json":
        raise ValueError(f"output={path}: a profile is a .json file. Name it so")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output={path}: there is no folder {path.parent}. Make it first")


def write_profile(profile: Profile, path: Path) -> None:
    """Replaces `path` at once or not at all. A line for each part: kernels are tens of thousands of numbers."""
    check_output(path)
    parts = msgspec.to_builtins(profile)
    lines = ",\n".join(f' "{name}": {msgspec.json.encode(part).decode()}' for name, part in parts.items())
    text = f"{{\n{lines}\n}}\n".encode()
    decode_profile(text, str(path))  # what is written can be read
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"output={path}: cannot be written ({error.strerror or error}). Give another") from None
