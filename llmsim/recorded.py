"""One load that a real engine served, as any source of recordings gives it, and the decoding they share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmsim.readers.source import GZIP, XZ, gunzip, unxz
from llmsim.trace import Trace

Floats = NDArray[np.float64]
LARGEST = 1_000_000_000  # tokens of a request, or requests at a time: above it a count is a mistake
LONGEST_S = 1e10  # three hundred years: above it a time is a mistake
PACKED = ("", ".gz", ".xz")  # not at all, as it is recorded, as it may be kept in half the space
GRID = "decode_grid"  # the list of loads that is replayed like any load
Positive = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class RecordedScenario:
    """One load on one engine: the trace as it was sent, and what the client saw of each of its requests."""

    name: str
    trace: Trace
    concurrency: int | None  # closed loop: this many requests at a time
    settings: dict[str, Any]  # Scenario fields
    engine: dict[str, Any]  # engine.json as it is
    finished: NDArray[np.bool_]  # per request of the trace; the next three are nan or empty where it is False
    ttft_s: Floats
    e2el_s: Floats
    gaps_s: list[Floats]  # per request: between consecutive chunks
    duration_s: float  # first send to last completion
    notes: tuple[str, ...] = ()


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked if it is gzip or xz, whatever its name. FileNotFoundError: it is not there;
    ValueError: it cannot be read, is cut or damaged, or unpacks to far more than a recording does."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if stored.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if stored.startswith(GZIP):
        return gunzip(str(path), stored)
    if stored.startswith(XZ):
        return unxz(str(path), stored)
    return stored


def load_files(folder: Path) -> list[Path]:
    """The NAME.requests.json of a recording, packed or not. Raises ValueError if one is there twice."""
    return _once(folder, [file for packed in PACKED for file in folder.glob(f"*.requests.json{packed}")])


def list_files(folder: Path) -> list[Path]:
    """The NAME.json.gz of a recording, or .xz: lists of small loads with their steps, such as `GRID`."""
    files = [file for packed in PACKED if packed for file in folder.glob(f"*.json{packed}")]
    return _once(folder, [file for file in files if ".requests.json" not in file.name])


def replayed_files(folder: Path) -> list[Path]:
    """Those of both that hold loads to replay."""
    return [*load_files(folder), *(file for file in list_files(folder) if load_name(file) == GRID)]


def _once(folder: Path, files: list[Path]) -> list[Path]:
    names = [load_name(file) for file in files]
    twice = [file.name for file, name in zip(files, names, strict=True) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{folder}: {twice[0]} is there as {twice[1]}, too: remove one")
    return sorted(files)


def load_name(file: Path) -> str:
    """NAME of NAME.requests.json.gz and the like, and of lists of loads."""
    name = file.name.split(".requests.json")[0]
    return name.removesuffix(".gz").removesuffix(".xz").removesuffix(".json")


def packed_file(folder: Path, name: str) -> Path:
    """`name` with the ending it is packed under; .gz if it is not there. Raises ValueError if it is there twice."""
    files = _once(folder, [file for packed in PACKED if (file := folder / f"{name}{packed}").exists()])
    return files[0] if files else folder / f"{name}.gz"


def decoded(path: Path, kind: Any) -> Any:
    content = read_bytes(path)
    if not content.strip():
        raise ValueError(f"{path}: the file is empty; copy it again, or record it again")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
