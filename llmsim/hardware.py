"""What a GPU and a model are: facts, each with its source, found by name.

GPU facts are in `data/gpus.toml` (vendor data sheets), model facts in `data/models.toml` (the published config.json of
each model, in its own spelling); any other Hugging Face `config.json` of a known architecture is read the same way.
What follows from a model's shape is in `llmsim.model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmsim.model import ELEMENT_BYTES, Model, dtype_name
from llmsim.model_config import model_fields

__all__ = ["ELEMENT_BYTES", "Gpu", "Model", "dtype_name", "find_gpu", "find_model", "gpu_names", "model_names"]


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int  # what CUDA reports to an engine, below the number on the box and below nvidia-smi's
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float] = field(hash=False)  # dense peak by dtype, no sparsity
    l2_bytes: int
    link: str  # how it reaches another GPU of the same host
    link_bytes_per_s: float  # to another GPU, one direction
    pcie_bytes_per_s: float  # to the host, one direction
    sources: Mapping[str, str] = field(hash=False)
    measured_host_bytes_per_s: float | None = None  # large pinned copies to and from the host, where measured

    @property
    def host_bytes_per_s(self) -> float:
        """One direction, to and from pinned host memory: measured, or else the data sheet's."""
        return self.measured_host_bytes_per_s or self.pcie_bytes_per_s

    def compute_dtype(self, weights: str) -> str:
        """The dtype matmuls run in: 4-bit weights are expanded to bfloat16, fp8 too where the GPU has no fp8."""
        name = dtype_name(weights)
        return name if name in self.flops_per_s else "bfloat16"


@cache
def _facts(file: str) -> dict[str, dict[str, Any]]:
    import tomllib

    return tomllib.loads((files("llmsim") / "data" / file).read_text(encoding="utf-8"))


def gpu_names() -> list[str]:
    return list(_facts("gpus.toml"))


def model_names() -> list[str]:
    return list(_facts("models.toml"))


def _resolve(kind: str, name: str, table: dict[str, dict[str, Any]]) -> str:
    """The table's own name for `name`: itself or one of its aliases, upper or lower case."""
    known = {alias.lower(): key for key, facts in table.items() for alias in (key, *facts.get("aliases", ()))}
    wanted = name.lower()
    for candidate in (wanted, wanted.rpartition("/")[2]):  # "meta-llama/Llama-3.1-8B" as the hub writes it
        if candidate in known:
            return known[candidate]
    close = get_close_matches(wanted.rpartition("/")[2], known, n=1, cutoff=0.4)
    hint = f" Did you mean {known[close[0]]}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}.{hint} See: llmsim list {kind.lower()}s")


@cache
def find_gpu(name: str) -> Gpu:
    table = _facts("gpus.toml")
    key = _resolve("GPU", name, table)
    facts = {field_name: value for field_name, value in table[key].items() if field_name != "aliases"}
    return Gpu(name=key, **facts)


def find_model(name: str) -> Model:
    """A model by name, or by the path of a Hugging Face `config.json` or of the folder that holds one."""
    path = Path(name)
    if (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return _read_config(path)
    return _known_model(name)


@cache
def _known_model(name: str) -> Model:
    table = _facts("models.toml")
    key = _resolve("model", name, table)
    facts = table[key]
    config = {**table[facts["base"]], **facts} if "base" in facts else facts
    return Model(name=key, source=facts["source"], **model_fields(config, f"models.toml [{key}]"))


def _read_config(path: Path) -> Model:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a model name (llmsim list models) or a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, not the object of a Hugging Face config.json")
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return Model(name=name, source=str(path), **model_fields(config, str(path)))
