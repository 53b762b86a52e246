"""One load that a real engine served, as any source of recordings gives it, and the decoding they share."""

from __future__ import annotations

import gzip
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmsim.trace import Trace

Floats = NDArray[np.float64]
LARGEST = 1_000_000_000  # tokens of a request, or requests at a time: above it a count is a mistake
LONGEST_S = 1e10  # three hundred years: above it a time is a mistake
PACKED = (".gz", ".xz")  # as it is recorded; as it may be kept, in half the space
XZ = b"\xfd7zXZ\x00"
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
    """The file's content, unpacked if it is gzip or xz; a cut or foreign file is one line of error."""
    raw = path.read_bytes()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if raw[:2] == b"\x1f\x8b":
        try:
            return gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: cut or damaged gzip file ({error}); copy it again") from None
    if raw[: len(XZ)] == XZ:
        try:
            return lzma.decompress(raw)
        except (EOFError, lzma.LZMAError) as error:
            raise ValueError(f"{path}: cut or damaged xz file ({error}); copy it again") from None
    return raw


def load_files(folder: Path) -> list[Path]:
    """The packed NAME.requests.json of a recording. Raises ValueError if one is there in both packings."""
    files = sorted(file for packed in PACKED for file in folder.glob(f"*.requests.json{packed}"))
    names = [load_name(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{folder}: {twice}.requests.json is there as .gz and as .xz: remove one")
    return files


def load_name(file: Path) -> str:
    """NAME of NAME.requests.json.gz and the like, and of lists of loads."""
    return file.name.split(".requests.json")[0].removesuffix(".json.gz")


def packed_file(folder: Path, name: str) -> Path:
    """`name` with the ending it is packed under; .gz if it is not there at all."""
    files = [folder / f"{name}{packed}" for packed in PACKED]
    return next((file for file in files if file.is_file()), files[0])


def decoded(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(read_bytes(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
