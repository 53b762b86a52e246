"""The command `python -m calibration measure`, and on its own, with no more than torch, click and pyarrow installed,
`python -m calibration.measure`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from calibration.console import INTERRUPTED
from calibration.measure.linear import VARIANTS
from calibration.measure.points import Wanted
from llmsim.hardware import find_model
from llmsim.model import Model, dtype_name

DENSE_FAMILIES = (
    "llama-3.1-8b,qwen2.5-7b,llama-3.2-1b,llama-3.1-70b,qwen2.5-14b,qwen2.5-32b,qwen3-8b,mistral-small-24b,"
    "llama-3.2-3b,qwen2.5-0.5b,qwen2.5-72b,qwen3-0.6b,qwen3-4b,qwen3-14b,qwen3-32b,mistral-7b,mistral-nemo-12b,"
    "gemma-2-9b"
)
_UNITS_S = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|sec|m|min|h)", text.strip())
    if not found:
        raise ValueError(f"--budget {text!r}: a number and s, min or h, such as 20min")
    return float(found[1]) * _UNITS_S[found[2]]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _models(text: str) -> tuple[Model, ...]:
    models = tuple(find_model(name) for name in dict.fromkeys(_split(text)))
    for model in models:
        if model.mla or model.experts:
            raise ValueError(f"--models: {model.name} is not dense (experts or latent attention). Leave it out")
    if not models:
        raise ValueError("--models: none given. See: llmsim list models")
    return models


def _dtypes(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for name in _split(text):
        dtype = name
        if name not in known:
            try:
                dtype = dtype_name(name)
            except ValueError:
                dtype = ""
        if dtype not in known:
            raise ValueError(f"{option}: unknown dtype {name!r}. Use some of {', '.join(known)}")
        found.append(dtype)
    if not found:
        raise ValueError(f"{option}: none given. Use some of {', '.join(known)}")
    return tuple(dict.fromkeys(found))


def _tensor_parallel(text: str) -> tuple[int, ...]:
    sizes = _split(text)
    if not sizes or not all(re.fullmatch("[0-9]{1,4}", size) and int(size) for size in sizes):
        raise ValueError(f"--tp {text!r}: whole numbers above 0, such as 1,2,4,8")
    return tuple(dict.fromkeys(int(size) for size in sizes))


def _gpus(device: str) -> int:
    try:
        import torch
    except ImportError:
        raise ValueError("torch is not installed. Install it: pip install 'llmsim[calibrate]'") from None
    if device == "cpu":
        return 1
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is visible to torch. Check nvidia-smi, or try the tool out with --device cpu")
    return torch.cuda.device_count()


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder, or .parquet file, of the results.")
@click.option("--models", default=DENSE_FAMILIES, help="Comma separated. Default: dense families, 0.5B to 72B.")
@click.option("--dtypes", default=",".join(VARIANTS), show_default=True)
@click.option("--kv-dtypes", default="bfloat16,fp8", show_default=True)
@click.option("--tp", default="1,2,4,8", show_default=True, help="Tensor-parallel sizes whose shapes are measured.")
@click.option("--ops", help="Ops or families of ops, comma separated. Default: all.")
@click.option(
    "--budget", default="20min", show_default=True, help="Such as 90s, 20min, 1h. 0s: only write the Parquet."
)
@click.option(
    "--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]), help="cpu: tiny sizes."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def measure(
    out: Path,
    models: str,
    dtypes: str,
    kv_dtypes: str,
    tp: str,
    ops: str | None,
    budget: str,
    device: str,
    seed: int,
) -> None:
    """Time kernels, copies, collectives and whole layers on this GPU. Can be interrupted; the same command goes on."""
    from calibration.measure import run

    budget_s = seconds(budget)
    if not budget_s:
        for path, rows in run.finish_only(out):
            click.echo(f"{path}: {rows} rows")
        return
    wanted = Wanted(
        models=_models(models),
        dtypes=_dtypes("--dtypes", dtypes, tuple(VARIANTS)),
        kv_dtypes=_dtypes("--kv-dtypes", kv_dtypes, ("bfloat16", "float16", "fp8")),
        tensor_parallel=_tensor_parallel(tp),
        device=device,
        ops=None if ops is None else run.ops_of(_split(ops)),
        gpus=_gpus(device),
    )
    argv = [part.replace(str(out), out.name) for part in sys.argv[1:]]  # what is published names no folders
    outcome = run.measure(wanted, out, budget_s, seed, argv)
    if outcome.unwritten:
        raise ValueError(outcome.unwritten)
    click.echo(f"{outcome.path}: {outcome.rows} rows of {outcome.points} points, {outcome.new_points} of them new")
    if outcome.broken:
        raise ValueError(f"the GPU's context broke at {outcome.broken}. That point is skipped now: repeat the command")
    if outcome.interrupted:
        click.echo("interrupted, nothing is lost: the same command with the same --out goes on")
        raise click.exceptions.Exit(INTERRUPTED)
