"""Measurements of what engines do not run as a file of alternatives (`llmsim.cost.alternatives`).

unfused attention   "sdpa_math" rows: decodes by relative least squares over contexts for each number of requests,
                    prompts by non-negative relative least squares over all; held out one point at a time
plain operations    "torch" rows in a CUDA graph, a curve over bytes; beside them "vllm" rows of the same operators, and
                    those of an engine's steps (`python -m calibration trace`)
launch              "eager" launches of whole forward passes over the operations they hold
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
import msgspec
import numpy as np

from calibration.fit_kernels import AFFINE_FROM_TOKENS, Judge, fit_curve, judge_held_out, moved_bytes, relative_fit
from calibration.kernel_profiles import read_rows
from calibration.record.kernels import LAUNCH, VARIANT
from llmsim.cost.alternatives import FORMAT, VERSION, Alternatives, UnfusedAttention, decode_alternatives
from llmsim.cost.kernels import Curve

if TYPE_CHECKING:
    from calibration.measure.rows import Row

OPERATORS = ("add_rms_norm", "rms_norm", "rope", "silu_mul", "kv_write")
# Operations of one layer of `calibration.measure.launch.Stack`: two additions, two norms, four products, two RoPEs of
# seven, two writes of the cache, attention, SiLU, a product.
LAUNCHED_OPERATIONS = 2 + 2 + 4 + 2 * 7 + 2 + 1 + 2


@click.command("alternatives")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--gpu", required=True, help="A name of 'llmsim list gpus'.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The .json file to write.")
def alternatives_command(files: tuple[Path, ...], gpu: str, out: Path) -> None:
    """Unfused attention and operations, from measurement FILES."""
    read = read_rows(files, gpu)
    judge = Judge()
    found = fit_alternatives(read.rows, gpu, read.source, read.digests, judge)
    text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    decode_alternatives(text, str(out))
    out.write_bytes(text)
    click.echo(judge.report())
    click.echo(f"{out}: {found.id}")


def fit_alternatives(rows: Sequence[Row], gpu: str, source: str, files: dict[str, str], judge: Judge) -> Alternatives:
    launched = {"torch": "graph", "vllm": "graph", VARIANT: LAUNCH}
    curves: dict[str, dict[str, Curve]] = {variant: {} for variant in launched}
    for variant, launch in launched.items():
        for op in OPERATORS:
            chosen = [r for r in rows if (r.op, r.variant, r.launch) == (op, variant, launch) and r.kv_dtype != "fp8"]
            if chosen or variant != VARIANT:
                points = ((moved_bytes(row), row.median_s) for row in chosen)
                curves[variant][op] = fit_curve(points, f"{op} {variant}", judge)
    eager = [row for row in rows if (row.op, row.variant) == ("launch", "eager")]
    if not eager:
        raise ValueError("measurements: no eager launch (op=launch). Measure it (--ops launch)")
    return Alternatives(
        format=FORMAT,
        version=VERSION,
        gpu=gpu,
        source=source,
        measurements=files,
        attention=fit_attention(rows, judge),
        plain=curves["torch"],
        fused=curves["vllm"],
        compiled=curves[VARIANT],
        operation_launch_s=_rounded(median(row.median_s / row.layers for row in eager) / LAUNCHED_OPERATIONS),
        error=judge.summary(),
    )


def fit_attention(rows: Sequence[Row], judge: Judge) -> UnfusedAttention:
    math = [row for row in rows if row.variant == "sdpa_math" and row.launch == "graph"]
    prompts = [row for row in math if row.op == "attention_prefill"]
    decodes = [row for row in math if row.op == "attention_decode" and row.seq_context_tokens >= AFFINE_FROM_TOKENS]
    shapes = {(row.q_heads, row.head_dim) for row in math}
    if len(shapes) != 1 or len(prompts) < 4 or not decodes:
        raise ValueError(
            f"measurements: unfused attention of {len(prompts)} prompts and {len(decodes)} decodes of {len(shapes)} "
            "head shapes, where at least 4, 2 and exactly 1 are needed. Measure attention (--ops attention)"
        )
    new = np.array([row.new_tokens for row in prompts], float)
    cached = np.array([row.context_tokens or 0 for row in prompts], float)
    matrix = np.column_stack([np.ones(len(new)), new + cached, new * (new + cached)])
    target = np.array([row.median_s for row in prompts])
    judge_held_out(
        judge,
        "unfused prompts",
        matrix,
        target,
        [f"new={n:.0f} cached={c:.0f}" for n, c in zip(new, cached, strict=True)],
    )
    call_s, span_s, score_s = (_rounded(value) for value in relative_fit(matrix, target))
    seqs, base, token = [], [], []
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in decodes:
        groups[row.seqs].append(row)
    for count, group in sorted(groups.items()):
        if len(group) < 2:
            continue
        matrix = np.array([(1.0, count * row.seq_context_tokens) for row in group])
        target = np.array([row.median_s for row in group])
        what = [f"seqs={count} context={row.seq_context_tokens}" for row in group]
        judge_held_out(judge, "unfused decodes", matrix, target, what)
        base_s, token_s = relative_fit(matrix, target)
        seqs.append(count)
        base.append(_rounded(base_s))
        token.append(_rounded(token_s))
    q_heads, head_dim = shapes.pop()
    return UnfusedAttention(q_heads, head_dim, call_s, span_s, score_s, tuple(seqs), tuple(base), tuple(token))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
