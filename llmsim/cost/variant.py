"""A cost model with an optimisation taken away: attention unfused, kernels between the matrix products unfused.

It stands before the cost model of the engine as it is and exchanges terms (`llmsim.cost.terms`):

    attention_kernel="math"   attention is computed step by step, with the scores in memory: decodes and prompts take
                              what `llmsim.cost.alternatives` says of unfused attention, instead of theirs. One call a
                              chunk
    kernel_fusion="custom"    torch.compile is off. The kernels are the hand-written fused ones that calibration timed:
                              what they take beyond the compiler's, as an engine ran those, is added, layer by layer.
                              Piecewise graphs are cut out of compiled code: without it iterations with prompts are
                              launched eagerly
    kernel_fusion="none"      and every operation between the matrix products is a kernel of its own: the difference of
                              the plain and the compiler's kernels' times is added

Launches: an operation more in a layer is a launch more wherever no graph holds it (eager; attention's in piecewise
graphs too). Left out: padding of batches that unfused attention of unequal contexts needs, memory of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import EAGER, FULL, PIECEWISE, CostModel, Ramp
from llmsim.cost.alternatives import Alternatives, find_alternatives
from llmsim.cost.basis import pairs_of
from llmsim.cost.kernels import kv_write_width
from llmsim.cost.terms import Parts, termed
from llmsim.hardware import Gpu, Model

if TYPE_CHECKING:
    from llmsim.cost.load import CostSettings

Floats = NDArray[np.float64]

# Operations of a layer beyond those of the fused kernels, counted in `calibration/measure/elementwise.py` and
# `attention.py`: two norms of nine operations for one, RoPE of fifteen for one, SiLU and product for one, two writes
# for one; scores, scale, mask, softmax and values for one call, after keys and values were copied to the query heads.
PLAIN_OPERATIONS = 2 * 8 + 14 + 1 + 1
QK_NORM_OPERATIONS = 2 * 7
MATH_OPERATIONS = 6


class VariantCost:
    def __init__(self, inner: CostModel, model: Model, gpu: Gpu, settings: CostSettings) -> None:
        _check(model, settings)
        known, source = find_alternatives(gpu)
        self._inner = termed(inner)
        self.kind, self.mode = inner.kind, inner.mode
        self._padded = settings.graphs.padded
        self._unfused = settings.attention_kernel == "math"
        self._plain = settings.kernel_fusion == "none"
        heads = model.heads // settings.tensor_parallel
        ratio = heads * model.head_dim / (known.attention.q_heads * known.attention.head_dim)
        self._attention, self._layers, self._ratio = known.attention, model.layers, ratio
        self._extra_s = _Extra(known, model, settings) if settings.kernel_fusion != "compiled" else None
        self.host = inner.host
        self.skew_share = getattr(inner, "skew_share", None)
        self.reads_longest = getattr(inner, "reads_longest", False)
        operations = PLAIN_OPERATIONS + (QK_NORM_OPERATIONS if model.qk_norm else 0) if self._plain else 0
        self._more_launches(operations * known.operation_launch_s * settings.host_scale, eager_only=True)
        if self._unfused:
            self._more_launches(MATH_OPERATIONS * known.operation_launch_s * settings.host_scale, eager_only=False)
        self.label = f"{inner.label}; {_described(settings, source)}"
        self.origin = self._inner.origin
        if settings.attention_kernel == "math" or self._plain:
            self.origin += " + plain" if source.startswith("timed on this GPU") else " + plain, scaled"
        profile = getattr(inner, "profile", None)
        if profile is not None:
            self.profile = profile
        self.pair_s = self._scaled(known.attention.score_s) if self._unfused else self._inner.pair_s

    def _more_launches(self, layer_s: float, eager_only: bool) -> None:
        if not layer_s:
            return
        launch_s = list(self.host.launch_s)
        for mode in (EAGER,) if eager_only else (PIECEWISE, EAGER):
            launch_s[mode] += self._layers * layer_s
        self.host = replace(self.host, launch_s=(launch_s[FULL], launch_s[PIECEWISE], launch_s[EAGER]))

    def _scaled(self, layer_s: float) -> float:
        return self._layers * self._ratio * layer_s

    # ---- unfused attention ------------------------------------------------------------------------------------

    def _decode_base_s(self, seqs: int) -> float:
        """A latency: the same for any heads."""
        return self._layers * float(np.interp(seqs, self._attention.seqs, self._attention.base_s)) if seqs else 0.0

    def _decode_token_s(self, seqs: int) -> float:
        return self._scaled(float(np.interp(seqs, self._attention.seqs, self._attention.token_s)))

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        if not self._unfused:
            return self._inner.prompts_s(chunks, tokens, context_tokens, pairs)
        form = self._attention
        # Of one chunk the rectangle n (c + n) is pairs + n (n - 1) / 2; of several of a mean size nearly.
        scores = pairs + tokens * np.maximum(tokens / np.maximum(chunks, 1) - 1, 0.0) / 2
        moving_s = form.span_s * (tokens + context_tokens) + form.score_s * scores
        return self._layers * (form.call_s * chunks + self._ratio * moving_s)

    # ---- the cost model ---------------------------------------------------------------------------------------

    def parts(self, tokens: int, requests: int, seqs: int) -> Parts:
        parts = self._inner.parts(tokens, requests, seqs)
        if self._unfused:
            parts = parts._replace(attention_s=self._decode_base_s(seqs))
        if self._extra_s is not None:
            parts = parts._replace(between_s=parts.between_s + self._extra_s.of(self._padded(tokens)))
        return parts

    def rows_s(self, tokens: int, requests: int) -> float:
        extra_s = self._extra_s.of(self._padded(tokens)) if self._extra_s is not None else 0.0
        return self._inner.rows_s(tokens, requests) + extra_s

    def head_s(self, requests: int) -> float:
        return self._inner.head_s(requests)

    def clocked_s(self, seconds: float, seqs: int) -> float:
        return self._inner.clocked_s(seconds, seqs)

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        extra_s = self._extra_s.of(self._padded(seqs)) if self._extra_s is not None else 0.0
        if not self._unfused:
            first_s, growth_s = self._inner.decode_ramp(seqs, kv_tokens)
            return Ramp(first_s + extra_s, growth_s)
        fused_s = self._inner.parts(seqs, seqs, seqs).attention_s
        token_s = self._decode_token_s(seqs)
        first_s = self._inner.decode_ramp(seqs, 0).first_s - fused_s + self._decode_base_s(seqs)
        return Ramp(first_s + extra_s + token_s * kv_tokens, token_s * seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, *longest: float) -> float:
        tokens = seqs + sum(new for new, _ in chunks)
        extra_s = self._extra_s.of(self._padded(tokens)) if self._extra_s is not None else 0.0
        if not self._unfused:
            return self._inner.mixed_s(chunks, seqs, kv_tokens, *longest) + extra_s
        seconds = self.parts(tokens, seqs + len(chunks), seqs).total_s
        if seqs:
            seconds += self._decode_token_s(seqs) * kv_tokens
        for new, done in chunks:
            seconds += float(self.prompts_s(1, new, done, pairs_of(new, done)))
        return self.clocked_s(seconds, seqs)

    def outside_measured(self, iterations: dict[str, Any]) -> NDArray[np.bool_]:
        """All of them: its kernels were timed, but no engine was recorded with them."""
        return np.ones(len(iterations["seqs"]), dtype=bool)


class _Extra:
    """Seconds that plain operations, or hand-written fused ones, take beyond the compiler's kernels, by rows."""

    def __init__(self, known: Alternatives, model: Model, settings: CostSettings) -> None:
        size, tp = model.plain_bytes(settings.dtype), settings.tensor_parallel
        heads = model.heads // tp * model.head_dim
        kv = max(1, model.kv_heads // tp) * model.head_dim
        self._bytes = {
            "add_rms_norm": (model.norms_per_layer, 4 * model.hidden * size),
            "rope": (1, 2 * (heads + kv) * size),
            "silu_mul": (1, 3 * model.mlp_width / tp * size),
            "kv_write": (1, 4 * kv_write_width(kv) * size),
        }
        if model.qk_norm:
            self._bytes["rms_norm"] = (1, 2 * (heads + kv) * size)
        self._slow = known.plain if settings.kernel_fusion == "none" else known.fused
        self._fast = known.fused | known.compiled
        self._layers = model.layers
        self._by_rows: dict[int, float] = {}

    def of(self, rows: int) -> float:
        if rows not in self._by_rows:
            seconds = 0.0
            for op, (times, width) in self._bytes.items():
                moved = np.array([rows * width])
                seconds += times * float(self._slow[op].at(moved)[0] - self._fast[op].at(moved)[0])
            self._by_rows[rows] = self._layers * max(seconds, 0.0)
        return self._by_rows[rows]


def _check(model: Model, settings: CostSettings) -> None:
    if settings.attention_kernel == "math":
        if settings.kv_dtype not in ("auto", "bfloat16", "float16"):
            raise ValueError(
                f"attention_kernel=math reads a cache of 2-byte numbers, kv_cache_dtype={settings.kv_dtype} is none: "
                "leave one of them out"
            )
        if model.mla or model.sliding_layers:
            kind = "latent attention" if model.mla else "sliding windows"
            raise ValueError(f"attention_kernel=math was timed for full attention; {model.name} has {kind}: use flash")


def _described(settings: CostSettings, source: str) -> str:
    changes = []
    if settings.attention_kernel == "math":
        changes.append(f"attention unfused ({source})")
    if settings.kernel_fusion == "custom":
        changes.append(f"not compiled (hand-written kernels, {source})")
    if settings.kernel_fusion == "none":
        changes.append(f"operations unfused ({source})")
    return ", ".join(changes)
