"""Kernels against what they were not fitted to: points held out, and batches and whole passes that were timed at once.

    operators   each prediction made without the point, by calibration.fit_kernels
    mixed       attention of a prompt chunk beside decodes, as the sum of both forms
    layer       one layer's linear layers, attention and what is between, against the layer
    forward     all layers, LM head and sampling, against the forward pass: embedding and last norm are not in the sum

Layers and passes were timed with torch's elementwise kernels (calibration.measure.layers), so those are summed here.
Only passes in CUDA graphs count: the parts were timed in graphs too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from calibration.fit_kernels import ATTENTION_VARIANTS, ELEMENTWISE, Judge, fit_kernels, heads_of, preferred
from calibration.kernel_profiles import read_rows
from calibration.measure.rows import Row
from llmsim.cost.basis import Coefficients, KernelBasis, StepClock
from llmsim.cost.kernels import DecodeTable, Forward, Kernels, PrefillForm
from llmsim.cost.profile import Profile
from llmsim.hardware import ELEMENT_BYTES, find_gpu, find_model

COLUMNS, PPI = 5, 72
BATCHES = ("decode", "prefill", "mixed")


@dataclass(frozen=True)
class Pass:
    row: Row
    predicted_s: float

    @property
    def deviation(self) -> float:
        """Of the sum of the parts from the whole."""
        return self.predicted_s / self.row.median_s - 1.0

    @property
    def batch(self) -> str:
        return "mixed" if self.row.seqs and self.row.chunks else "prefill" if self.row.chunks else "decode"

    @property
    def what(self) -> str:
        row = self.row
        chunk = f"{row.new_tokens} tokens after {row.context_tokens or 0}" if row.chunks else ""
        decodes = f"{row.seqs} decodes of {row.seq_context_tokens}" if row.seqs else ""
        return " + ".join(part for part in (chunk, decodes) if part)


@dataclass(frozen=True)
class Checked:
    gpu: str
    source: str
    operators: Judge
    passes: list[Pass]


def check_kernels(files: Sequence[Path], gpu: str, rest: Profile | None = None) -> Checked:
    read = read_rows(files, gpu)
    judge = Judge()
    others = rest.kernels if rest else None
    kernels = fit_kernels(read.rows, find_gpu(gpu), read.source, read.digests, others, judge)
    judge_mixed(read.rows, kernels, judge)
    alike = [row for row in read.rows if row.op not in ELEMENTWISE or row.variant == "torch"]
    summed = fit_kernels(alike, find_gpu(gpu), read.source, read.digests, others)
    return Checked(find_gpu(gpu).name, read.source, judge, sum_of_parts(read.rows, summed))


def judge_mixed(rows: Sequence[Row], kernels: Kernels, judge: Judge) -> None:
    """Of head shapes whose decodes and prefills were both timed, where tiles are not known."""
    if kernels.tiles:
        return
    decodes = {table.heads: table for table in kernels.decodes}
    prefills = {form.heads: form for form in kernels.prefills}
    groups = defaultdict(list)
    for row in rows:
        if row.op == "attention_mixed" and (row.chunks or 1) == 1 and row.skew in (None, "uniform"):
            groups[heads_of(row)].append(row)
    for heads, group in groups.items():
        if heads not in decodes or heads not in prefills:
            continue
        for row in preferred(group, ATTENTION_VARIANTS):
            predicted_s = attention_s(row, decodes[heads], prefills[heads])
            what = f"{Pass(row, predicted_s).what} heads={heads.q_heads}/{heads.kv_heads} of {heads.head_dim}"
            judge.add(f"mixed attention {heads.kv_dtype}", row.median_s, predicted_s, what)


def attention_s(row: Row, decode: DecodeTable, prefill: PrefillForm) -> float:
    """One chunk and the decodes, one after the other; a chunk costs at least what reading its context does."""
    assert row.seqs and row.seq_context_tokens is not None and row.new_tokens
    new, cached = row.new_tokens, row.context_tokens or 0
    base_s, token_s = (float(np.interp(row.seqs, decode.seqs, values)) for values in (decode.base_s, decode.token_s))
    return base_s + token_s * row.seqs * row.seq_context_tokens + prefill.seconds(new, cached, token_s * cached)


def sum_of_parts(rows: Sequence[Row], kernels: Kernels) -> list[Pass]:
    """Of passes with the real shapes of a known model."""

    @cache
    def clock(model: str, dtype: str, kv_dtype: str, tensor_parallel: int, layers: int) -> tuple[StepClock, Forward]:
        of = replace(find_model(model), layers=layers)
        basis = KernelBasis(Forward(kernels, of, dtype, kv_dtype, tensor_parallel))
        knots = tuple(float(size) for size in kernels.linear("bfloat16").tokens)
        body_s = tuple(basis.body_s(np.array(knots)).tolist())
        terms = Coefficients(knots, body_s, basis.kv_token_s, basis.kv_token_s, basis.pair_s, power_share=0.0)
        return StepClock(basis, terms, padded=lambda tokens: tokens), basis.forward

    found = []
    for row in rows:
        if row.op not in ("layer", "forward") or row.launch != "graph" or not row.model or not row.layers:
            continue
        model, tensor_parallel = find_model(row.model), row.tensor_parallel or 1
        if (row.q_heads, row.head_dim) != (model.heads // tensor_parallel, model.head_dim):
            continue  # tiny sizes of a CPU
        steps, forward = clock(row.model, row.dtype or "bfloat16", row.kv_dtype or "auto", tensor_parallel, row.layers)
        seqs, kv_tokens = row.seqs or 0, (row.seqs or 0) * (row.seq_context_tokens or 0)
        chunks = [(row.new_tokens or 0, row.context_tokens or 0)] * (row.chunks or 0)
        if chunks:
            predicted_s = steps.mixed_s(chunks, seqs, kv_tokens)
        else:
            first_s, kv_s = steps.decode(seqs)
            predicted_s = first_s + kv_s * kv_tokens
        if row.op == "layer":
            predicted_s -= float(forward.head_s(np.array([seqs + len(chunks)], float))[0])
        found.append(Pass(row, predicted_s))
    return found


def report(checked: Checked, worst: int = 3) -> str:
    lines = [
        f"{checked.gpu}: {checked.source}",
        "relative error of each operator on points that its prediction was not fitted to",
        checked.operators.report(worst),
    ]
    if not checked.passes:
        return "\n".join([*lines, "no layer or forward pass of a known model was timed in a CUDA graph"])
    lines += [
        "",
        "whole layers and forward passes: the sum of their parts over what was timed",
        f"{'':<10}{'model':<18}{'batch':<10}{'points':>8}{'median':>9}{'worst':>8}",
    ]
    groups: dict[tuple[str, str, str], list[Pass]] = defaultdict(list)
    for one in checked.passes:
        groups[one.row.op, str(one.row.model), one.batch].append(one)
    for (op, model, batch), group in sorted(groups.items(), key=lambda item: (*item[0][:2], BATCHES.index(item[0][2]))):
        far = max(group, key=lambda one: abs(one.deviation))
        middle = median(one.deviation for one in group)
        lines.append(f"{op:<10}{model:<18}{batch:<10}{len(group):>8}{middle:>+9.1%}{far.deviation:>+8.1%}   {far.what}")
    return "\n".join(lines)


def draw(checked: Checked, path: Path) -> None:
    import pandas as pd

    from llmsim.charts import parity, save

    rows = [(*split(operator), *values) for operator, *values in checked.operators.points]
    rows += [
        (f"{one.row.op}, sum of parts", one.row.dtype, one.row.median_s, one.predicted_s, f"{one.row.model} {one.what}")
        for one in checked.passes
    ]
    points = pd.DataFrame(rows, columns=["panel", "kind", "measured_s", "predicted_s", "what"])
    panels = {}
    for panel, group in points.groupby("panel", sort=False):
        errors = (group["predicted_s"] / group["measured_s"] - 1.0).abs()
        middle, p90 = errors.quantile([0.5, 0.9])
        panels[str(panel)] = [f"{len(group):,} points: median {middle:.1%}, p90 {p90:.1%}"]
    present = set(points["kind"])
    kinds = [dtype for dtype in ("bfloat16", "fp8", "float16", "float32", "int8", "int4") if dtype in present]
    title = f"{checked.gpu}: seconds measured, and predicted by what was fitted without that point"
    sources = dict.fromkeys(re.sub(r"T[\d:+]+\)", ")", source) for source in checked.source.split(", "))
    subtitle = [", ".join(sources), "dashed: 10 % off"]
    save(parity(points, panels, kinds, title=title, subtitle=subtitle, columns=COLUMNS), path, PPI)


def split(operator: str) -> tuple[str, str]:
    """A judged operator without its dtype, and the dtype: bfloat16 where it names none."""
    words = operator.split()
    dtypes = [word for word in words if word in ELEMENT_BYTES]
    return " ".join(word for word in words if word not in dtypes), dtypes[0] if dtypes else "bfloat16"
