"""What an engine's optimised kernels replaced: seconds of the plain versions, timed on a GPU.

    unfused attention   of one layer, q query heads of size d, a call for each chunk:
                        prefill  call + span * (c + n) + score * n * (c + n)         n new tokens after c cached ones
                        decode   base(s) + token(s) * cached tokens                  s requests
                        Scores are a whole rectangle, nothing above the diagonal is skipped, and each key and value is
                        copied out to the query heads that share it: other heads cost in proportion to q * d,
                        latencies (call, base) apart
    plain operations    seconds over bytes, as the fused kernels they stand for (llmsim.cost.kernels.Curve): what
                        PyTorch does for a norm, RoPE, SiLU * up and the KV write, one kernel for each operation; and
                        the hand-written fused kernels timed in the same session; and those that the compiler makes,
                        of an engine's own steps
    launch              host seconds of one more operation

The files are `llmsim/data/GPU.alternatives.json`, made by `python -m calibration alternatives` from measurements;
`id` is a hash of the content. A GPU without one takes that of `SCALED_FROM`, its times beyond the latency scaled by
the ratio of data-sheet bandwidths: all of these kernels move bytes.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmsim.cost.kernels import Curve
from llmsim.hardware import Gpu, find_gpu

Floats = NDArray[np.float64]

FORMAT = "llmsim-alternatives"
VERSION = 1
SCALED_FROM = "h200-sxm"


class UnfusedAttention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    q_heads: int
    head_dim: int
    call_s: float
    span_s: float
    score_s: float
    seqs: tuple[int, ...]
    base_s: tuple[float, ...]
    token_s: tuple[float, ...]

    def slowed(self, ratio: float) -> UnfusedAttention:
        """The same on memory that is slower by `ratio`; latencies stay."""
        return msgspec.structs.replace(
            self,
            span_s=self.span_s * ratio,
            score_s=self.score_s * ratio,
            token_s=tuple(s * ratio for s in self.token_s),
        )


class Alternatives(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    gpu: str
    source: str  # who timed them, with what, when
    measurements: dict[str, str]  # file -> sha256
    attention: UnfusedAttention
    plain: dict[str, Curve]  # by operator
    fused: dict[str, Curve]
    operation_launch_s: float
    error: dict[str, float]  # operator -> median relative error, held out
    compiled: dict[str, Curve] = {}  # of the operators that were traced in an engine

    @property
    def id(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]

    def scaled_to(self, gpu: Gpu) -> Alternatives:
        ratio = find_gpu(self.gpu).bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s
        return msgspec.structs.replace(
            self,
            gpu=gpu.name,
            attention=self.attention.slowed(ratio),
            plain={op: slowed(curve, ratio) for op, curve in self.plain.items()},
            fused={op: slowed(curve, ratio) for op, curve in self.fused.items()},
            compiled={op: slowed(curve, ratio) for op, curve in self.compiled.items()},
        )


def slowed(curve: Curve, ratio: float) -> Curve:
    latency_s = min(curve.seconds)
    return Curve(curve.size_bytes, tuple(latency_s + (s - latency_s) * ratio for s in curve.seconds))


def find_alternatives(gpu: Gpu) -> tuple[Alternatives, str]:
    """The plain kernels of a GPU, and in words where their times are from."""
    own = _read(gpu.name)
    if own is not None:
        return own, f"timed on this GPU, {gpu.name}.alternatives ({own.id})"
    other = _read(SCALED_FROM)
    assert other is not None
    return other.scaled_to(gpu), f"timed on {SCALED_FROM} ({other.id}), scaled by data-sheet bandwidth"


@cache
def _read(gpu: str) -> Alternatives | None:
    file = files("llmsim").joinpath("data", f"{gpu}.alternatives.json")
    if not file.is_file():
        return None
    return decode_alternatives(file.read_bytes(), f"{gpu}.alternatives.json")


def decode_alternatives(text: bytes, where: str) -> Alternatives:
    again = "Make it again with: python -m calibration alternatives"
    try:
        found = msgspec.json.decode(text, type=Alternatives)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a file of alternatives: {error}. {again}") from None
    if found.format != FORMAT or found.version != VERSION:
        raise ValueError(f"{where}: format={found.format!r} version={found.version}, not {FORMAT} {VERSION}. {again}")
    attention = found.attention
    if not attention.seqs or not len(attention.seqs) == len(attention.base_s) == len(attention.token_s):
        raise ValueError(f"{where}: attention.seqs={attention.seqs} needs a base_s and a token_s each. {again}")
    if set(found.plain) != set(found.fused):
        raise ValueError(f"{where}: plain has {sorted(found.plain)}, fused {sorted(found.fused)}. {again}")
    if not set(found.compiled) <= set(found.fused):
        raise ValueError(f"{where}: compiled has {sorted(found.compiled)}, fused {sorted(found.fused)}. {again}")
    return found
