"""Compile measurement rows into the tables of `llmsim.cost.kernels`, each with its error on what it was not fitted to.

    linear      q = measured / ridge on the rows that the densely timed shapes have; held out: one (n, k) at a time
    decode      base and token by relative least squares over contexts, for each number of requests; held out: one
                context at a time
    tiles       of FlashAttention 3 by head size, robust least squares on log seconds over all head shapes, chunks alone
                and beside decodes; held out: one half of the points from the other, both ways
    prefill     call, pair, cached by non-negative relative least squares, the query tile by search; held out: one
                (new, cached) at a time
    elementwise, all-reduce      medians of what was timed, made to rise; held out: one size at a time, from its
                neighbours

Where several implementations were timed the one that vLLM runs on the GPU counts: its own kernels, FlashAttention 3,
its CUTLASS product for fp8, cuBLAS for bf16; its custom all-reduce up to the sizes it takes.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from calibration.fit import monotone
from calibration.fit_stacks import with_stacks
from calibration.measure import attention
from calibration.record.kernels import LAUNCH, VARIANT
from llmsim.cost.kernels import (
    TILE_ROWS,
    Curve,
    DecodeTable,
    Heads,
    Kernels,
    LinearTable,
    PrefillForm,
    effective_rows,
    kv_write_width,
    nearest,
)
from llmsim.cost.tiles import Schedule, Tiles
from llmsim.hardware import ELEMENT_BYTES, Gpu, find_gpu

if TYPE_CHECKING:
    from calibration.measure.rows import Row

Floats = NDArray[np.float64]

# Not among them: torch's int4 and int8 products, which engines do not run, and tf32, which is no format of weights.
LINEAR_VARIANTS = ("vllm_cutlass", "vllm_fp8", "cublas", "scaled_mm")
ATTENTION_VARIANTS = ("fa3", "flashinfer_trtllm", "fa2", "varlen", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient")
ELEMENTWISE_VARIANTS = (VARIANT, "vllm", "torch")  # those of an engine's own steps first
LAUNCHES = (LAUNCH, "graph", "compiled_graph", "eager", "compiled", "host")
LEAST_ROWS = (1.0, 16.0, 32.0, 64.0, 128.0, 256.0)
ELEMENTWISE = ("rms_norm", "add_rms_norm", "norm_add_norm", "rope", "silu_mul", "kv_write", "quant_fp8")
LEAST_WIDTH, MOST_TOKENS = 512, 16_384  # of imported linear layers: no layer of a language model is narrower
FEWEST_PREFILLS = 12  # points that make a form of their own
FEWEST_TILED = 24
PROCESSORS = {"h100-sxm": 132, "h200-sxm": 132}  # multiprocessors of GPUs that run FlashAttention 3 (data sheets)
# Where the search for a head size's constants begins: block, tile, call, combine (seconds), bandwidth (bytes/s).
FIRST_TILES = (1.8e-6, 4e-6, 5e-6, 3e-6, 4e12)
MMA_TOKENS = 8  # tensor cores take so many rows at once: below, time is that of eight
SUSTAINED_TOKENS = 512  # from here up `measure` times linear layers under load
COMMON = 0.3  # share of the shapes that must have been timed at a number of rows for it to be in the table
DENSE_ROWS, FEWEST_DENSE = 24, 6  # rows of a shape timed densely; such shapes that say how time goes between rows
REACH = 1.5  # times the longest context
AFFINE_FROM_TOKENS = 128  # contexts below say nothing of the cost per cached token


def fit_kernels(
    rows: Sequence[Row],
    gpu: Gpu,
    source: str,
    files: dict[str, str],
    rest: Kernels | None = None,
    judge: Judge | None = None,
) -> Kernels:
    """`rest`: where norms, activation, sampling and the like come from if `rows` lack them, by memory bandwidth."""
    judge = judge or Judge()
    linears = {
        dtype: fit_linear(group, dtype, gpu, judge)
        for dtype, group in _by(rows, "linear", lambda r: r.dtype).items()
        if dtype in ELEMENT_BYTES and any(row.variant in LINEAR_VARIANTS for row in group)
    }
    for dtype, group in _by(rows, "linear_stack", lambda r: r.dtype).items():
        if dtype in linears:
            linears[dtype] = with_stacks(linears[dtype], preferred(group, LINEAR_VARIANTS), dtype, judge)
    if "bfloat16" not in linears:
        raise ValueError("measurements: no linear layer in bfloat16 (op=linear). Measure some first")
    decodes, prefills = fit_attention(rows, gpu, judge, rest)
    tiles = fit_tiles(rows, PROCESSORS.get(gpu.name), judge) or (tiles_of(rest, gpu) if rest is not None else ())
    curves = {}
    for op in ELEMENTWISE:
        # a cache in fp8 takes as long as one of twice its bytes
        group = preferred([row for row in rows if row.op == op and row.kv_dtype != "fp8"], ELEMENTWISE_VARIANTS)
        if group:
            curves[op] = fit_curve(((moved_bytes(row), row.median_s) for row in group), op, judge)
        elif rest is not None and op in rest.elementwise:
            curves[op] = slowed(rest.elementwise[op], rest.gpu, gpu)
    sampling = preferred([row for row in rows if row.op == "sample_greedy"], ELEMENTWISE_VARIANTS)
    if sampling or rest is None:
        head_rows = fit_curve(((2.0 * row.tokens * row.n, row.median_s) for row in sampling), "sample_greedy", judge)
    else:
        head_rows = slowed(rest.head_rows, rest.gpu, gpu)
    links = {}
    for gpus, group in _by(rows, "all_reduce", lambda r: r.gpus).items():
        best: dict[float, float] = {}
        for row in group:  # what the engine takes at each size is the faster one
            best[row.size_bytes] = min(row.median_s, best.get(row.size_bytes, row.median_s))
        links[str(gpus)] = fit_curve(best.items(), f"all_reduce_{gpus}", judge)
    return Kernels(
        gpu=gpu.name,
        source=source,
        measurements=files,
        linears=linears,
        elementwise=curves,
        head_rows=head_rows,
        decodes=tuple(sorted(decodes, key=lambda table: str(table.heads))),
        prefills=tuple(sorted(prefills, key=lambda form: str(form.heads))),
        all_reduce=links,
        error=judge.summary(),
        tiles=tiles,
    )


@dataclass
class Judge:
    """What was predicted of points that had no part in the prediction."""

    points: list[tuple[str, float, float, str]] = field(default_factory=list)  # operator, measured, predicted, what

    def add(self, operator: str, measured_s: float, predicted_s: float, what: str) -> None:
        self.points.append((operator, measured_s, predicted_s, what))

    def operators(self) -> dict[str, Floats]:
        """Absolute relative errors by operator."""
        names = dict.fromkeys(point[0] for point in self.points)
        return {name: np.array([abs(p[2] / p[1] - 1.0) for p in self.points if p[0] == name]) for name in names}

    def summary(self) -> dict[str, float]:
        found = {}
        for name, errors in sorted(self.operators().items()):
            found[name] = float(f"{np.median(errors):.3g}")
            found[f"{name} p90"] = float(f"{np.quantile(errors, 0.9):.3g}")
        return found

    def report(self, worst: int = 3) -> str:
        lines = [f"{'operator':<28}{'points':>8}{'median':>9}{'p90':>8}   worst"]
        for name, errors in self.operators().items():
            own = [point for point in self.points if point[0] == name]
            far = sorted(zip(errors, own, strict=True), key=lambda pair: -pair[0])[:worst]
            told = "; ".join(f"{point[3]} {point[2] / point[1] - 1.0:+.0%}" for _, point in far)
            lines.append(f"{name:<28}{len(own):>8}{np.median(errors):>9.1%}{np.quantile(errors, 0.9):>8.1%}   {told}")
        return "\n".join(lines)


def preferred(rows: Sequence[Row], variants: Sequence[str]) -> list[Row]:
    """The rows of the first variant there is, launched in the first way there is."""
    for variant in variants:
        own = [row for row in rows if row.variant == variant]
        for launch in LAUNCHES:
            if chosen := [row for row in own if row.launch == launch]:
                return chosen
    return []


def moved_bytes(row: Row) -> float:
    """What time goes with."""
    if row.op == "kv_write" and row.kv_heads:
        kv = row.kv_heads * row.head_dim
        return float(row.bytes * kv_write_width(kv) / kv)
    return float(row.bytes)


def heads_of(row: Row) -> Heads:
    return Heads(row.q_heads, row.kv_heads, row.head_dim, "fp8" if "fp8" in (row.kv_dtype or "") else "bfloat16")


def _by(rows: Iterable[Row], op: str, key: Callable[[Row], object]) -> dict:
    groups = defaultdict(list)
    for row in rows:
        if row.op == op:
            groups[key(row)].append(row)
    return dict(groups)


# ---- linear layers ------------------------------------------------------------------------------------------------


def fit_linear(rows: Sequence[Row], dtype: str, gpu: Gpu, judge: Judge) -> LinearTable:
    """Our own measurements; others' tables, and our shapes timed at many rows, say how time goes between the rows."""
    own = linear_seconds([row for row in rows if row.source == "measured"])
    imported = [row for row in rows if row.source != "measured" and min(row.n, row.k) >= LEAST_WIDTH]
    theirs = linear_seconds([row for row in imported if row.tokens <= MOST_TOKENS])
    if len(own) < 2 and len(theirs) < 2:
        raise ValueError(f"measurements: linear layers in {dtype} need two shapes of three row counts. Measure more")
    if not theirs:
        own = {shape: steadier(times) for shape, times in own.items()}
    dense = {shape: times for shape, times in own.items() if len(times) >= DENSE_ROWS}
    empty = LinearTable(
        weight_bytes=ELEMENT_BYTES[dtype],
        activation_bytes=ELEMENT_BYTES[dtype if dtype == "fp8" else "float32" if dtype == "float32" else "bfloat16"],
        flops_per_s=gpu.flops_per_s[gpu.compute_dtype(dtype)],
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s,
        tiled=not theirs,
        tokens=(),
        shapes=(),
        slowness=(),
        quantises=not own and any(row.variant == "vllm_fp8" for row in rows),
    )
    if theirs:
        table = linear_table(empty, theirs)
        if len(dense) >= FEWEST_DENSE:
            table = follow(refined(table, common_tokens(dense)), dense)
        if own:
            table = follow(table, own)
    elif len(dense) >= FEWEST_DENSE:
        table = follow(linear_table(empty, dense), own, steady=True)
    else:
        table = steadied(linear_table(empty, own))
    for (n, k), times in (own or theirs).items():
        at, truth = (np.array(column, float) for column in zip(*sorted(times.items()), strict=True))
        for tokens, predicted_s, measured_s in zip(at, table.seconds(n, k, at, without=(n, k)), truth, strict=True):
            judge.add(f"linear {dtype}", measured_s, predicted_s, f"n={n} k={k} tokens={tokens:.0f}")
    return table


def linear_seconds(rows: Sequence[Row]) -> dict[tuple[int, int], dict[int, float]]:
    """(n, k) -> rows -> seconds; sustained clocks, where timed, replace cold ones.

    Of a shape timed in several runs the first says how long it takes cold, so that all shapes are of one run (the
    largest differ by 8 % from one to another); under load, where runs differ by chance, the mean does. What lies
    between the rows of all runs comes from the last, corrected alike; below eight rows, where all take the same, it is
    no slower than the slower of the two it lies between (a run can be slow for a while: (55296, 5120) took 133 us at 1
    and 8 rows, 149 at 2 and 4).
    """
    timed: dict[tuple[int, int], dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in preferred(rows, LINEAR_VARIANTS):
        timed[row.n, row.k][row.clocks or "cold"].setdefault(row.tokens, []).append(row.median_s)
    seconds: dict[tuple[int, int], dict[int, float]] = {}
    for shape, by_clocks in timed.items():
        seconds[shape] = {}
        for clocks in sorted(by_clocks):  # cold, sustained
            runs = by_clocks[clocks]
            twice = sorted(tokens for tokens, times in runs.items() if len(times) > 1)
            levels = {t: runs[t][0] if clocks == "cold" else float(np.exp(np.mean(np.log(runs[t])))) for t in runs}
            ratios = [levels[tokens] / runs[tokens][-1] for tokens in twice]
            for tokens, times in runs.items():
                other = float(np.interp(np.log(tokens), np.log(twice), ratios)) if twice and len(times) == 1 else 1.0
                seconds[shape][tokens] = levels[tokens] * other
                at = bisect(twice, tokens)
                if tokens < MMA_TOKENS and len(times) == 1 and 0 < at < len(twice):
                    seconds[shape][tokens] = min(levels[tokens] * other, max(levels[t] for t in twice[at - 1 : at + 1]))
    return {shape: times for shape, times in sorted(seconds.items()) if len(times) >= 3}


def steadier(times: dict[int, float]) -> dict[int, float]:
    """Under sustained load the median of seconds per effective row over the rows within half a tile of each.

    A row timed at the power limit is off by some 5 %, one in twenty by 10 %, more than neighbours within a tile differ.
    """
    rows = [tokens for tokens in times if tokens >= SUSTAINED_TOKENS]
    if len(times) < DENSE_ROWS:
        return times
    each = {tokens: times[tokens] / float(effective_rows(np.array([tokens]))[0]) for tokens in rows}
    near = {at: [each[tokens] for tokens in rows if abs(tokens - at) <= TILE_ROWS // 2] for at in rows}
    return times | {at: times[at] / each[at] * median(near[at]) for at in rows}


def common_tokens(seconds: dict[tuple[int, int], dict[int, float]]) -> tuple[int, ...]:
    counts = Counter(tokens for times in seconds.values() for tokens in times)
    return tuple(sorted(tokens for tokens, count in counts.items() if count >= COMMON * len(seconds)))


def linear_table(empty: LinearTable, seconds: dict[tuple[int, int], dict[int, float]]) -> LinearTable:
    grid = common_tokens(seconds)
    slowness = []
    for (n, k), times in seconds.items():
        at, measured_s = (np.array(column, float) for column in zip(*sorted(times.items()), strict=True))
        q = np.interp(empty.rows(np.array(grid, float)), empty.rows(at), measured_s / empty.ridge_s(n, k, at))
        slowness.append(tuple(round(float(value), 4) for value in q))
    return msgspec.structs.replace(empty, tokens=grid, shapes=tuple(seconds), slowness=tuple(slowness))


def steadied(table: LinearTable) -> LinearTable:
    """Half of each q under sustained load from the shape itself, half from its neighbours.

    At the power limit clocks wander: one shape timed twice differs by some 5 % (p10 to p90 of a single measurement up
    to 9 %), as much as neighbouring shapes differ.
    """
    slowness = [list(row) for row in table.slowness]
    for column, tokens in enumerate(table.tokens):
        if tokens < SUSTAINED_TOKENS:
            continue
        for i, shape in enumerate(table.shapes):
            near = sum(weight * table.slowness[j][column] for j, weight in table.weights(*shape, without=shape))
            slowness[i][column] = round((table.slowness[i][column] * near) ** 0.5, 4)
    return msgspec.structs.replace(table, slowness=tuple(tuple(row) for row in slowness))


def refined(table: LinearTable, tokens: Sequence[int]) -> LinearTable:
    """The same table with more rows, so that what is timed there can be told."""
    grid = sorted({*table.tokens, *(t for t in tokens if table.tokens[0] <= t <= table.tokens[-1])})
    at, known = table.rows(np.array(grid, float)), table.rows(np.array(table.tokens, float))
    slowness = tuple(tuple(np.round(np.interp(at, known, q), 4).tolist()) for q in table.slowness)
    return msgspec.structs.replace(table, tokens=tuple(grid), slowness=slowness)


def follow(table: LinearTable, own: dict[tuple[int, int], dict[int, float]], steady: bool = False) -> LinearTable:
    """Our shapes at all rows of `table`: its predictions, corrected by what we timed.

    `steady`: by half of it where a shape was timed at few rows under sustained load (see `steadied`).
    """
    grid = np.array(table.tokens, float)
    slowness = []
    for shape, times in own.items():
        timed, seconds = (np.array(column, float) for column in zip(*sorted(times.items()), strict=True))
        known = seconds / table.seconds(*shape, timed)
        if steady and len(times) < DENSE_ROWS:
            known = np.where(timed >= SUSTAINED_TOKENS, np.sqrt(known), known)
        correction = np.interp(np.log(grid), np.log(timed), known)
        q = table.seconds(*shape, grid) / table.ridge_s(*shape, grid)
        slowness.append(tuple(np.round(q * correction, 4).tolist()))
    return msgspec.structs.replace(table, shapes=tuple(own), slowness=tuple(slowness))


# ---- attention ----------------------------------------------------------------------------------------------------


def relative_fit(matrix: Floats, target: Floats) -> Floats:
    """Non-negative least squares in relative error."""
    scale = np.abs(matrix / target[:, None]).max(axis=0)
    scale[scale == 0.0] = 1.0
    coefficients: Floats = nnls(matrix / target[:, None] / scale, np.ones(len(target)))[0] / scale
    return coefficients


def judge_held_out(judge: Judge, operator: str, matrix: Floats, target: Floats, what: Sequence[str]) -> None:
    """Each row against a fit to the others."""
    for i in range(len(target)):
        others = np.arange(len(target)) != i
        if others.sum() > matrix.shape[1]:
            predicted_s = float(matrix[i] @ relative_fit(matrix[others], target[others]))
            judge.add(operator, float(target[i]), predicted_s, what[i])


def fit_attention(
    rows: Sequence[Row], gpu: Gpu, judge: Judge, rest: Kernels | None
) -> tuple[tuple[DecodeTable, ...], tuple[PrefillForm, ...]]:
    decodes, prefills = _by(rows, "attention_decode", heads_of), _by(rows, "attention_prefill", heads_of)
    if decodes or prefills or rest is None:
        tables = [table for heads, group in decodes.items() if (table := fit_decode(group, heads, judge))]
        if not tables:
            raise ValueError("measurements: no decode attention at two contexts for a batch. Measure more")
        return tuple(tables), fit_prefills(prefills, judge)
    # cached tokens at the ratio of bandwidths, the rest as it is: the same kernels on as many multiprocessors
    ratio = find_gpu(rest.gpu).bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s
    scaled = [
        msgspec.structs.replace(table, token_s=tuple(float(f"{s * ratio:.4g}") for s in table.token_s))
        for table in rest.decodes
    ]
    return tuple(scaled), rest.prefills


def fit_decode(rows: Sequence[Row], heads: Heads, judge: Judge) -> DecodeTable | None:
    """None where too little was timed, or only kernels that the engine does not run. Contexts nearly alike count where
    they were timed: even ones, whose tiles all end together, only beyond them."""
    even, near = (
        preferred([row for row in rows if (row.skew or "uniform") == skew], ATTENTION_VARIANTS)
        for skew in ("uniform", "near")
    )
    longest = {row.seqs: row.seq_context_tokens for row in sorted(near, key=lambda row: row.seq_context_tokens)}
    seqs, base, token = [], [], []
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in near + [row for row in even if row.seq_context_tokens > REACH * longest.get(row.seqs, 0)]:
        if row.seq_context_tokens >= AFFINE_FROM_TOKENS:
            groups[row.seqs].append(row)
    for count, group in sorted(groups.items()):
        if len(group) < 2:
            continue
        matrix = np.array([(1.0, row.seqs * row.seq_context_tokens) for row in group])
        target = np.array([row.median_s for row in group])
        base_s, token_s = relative_fit(matrix, target)
        seqs.append(count)
        base.append(float(f"{base_s:.4g}"))
        token.append(float(f"{token_s:.4g}"))
        what = [f"seqs={row.seqs} context={row.seq_context_tokens} {label(heads)}" for row in group]
        judge_held_out(judge, f"decode attention {heads.kv_dtype}", matrix, target, what)
    return DecodeTable(heads, tuple(seqs), tuple(base), tuple(token)) if seqs else None


def tiles_of(rest: Kernels, gpu: Gpu) -> tuple[Tiles, ...]:
    """Those of a GPU with as many of the same multiprocessors, at this one's bandwidth."""
    timed_on = find_gpu(rest.gpu)
    if timed_on.flops_per_s != gpu.flops_per_s:
        return ()
    ratio = gpu.bandwidth_bytes_per_s / timed_on.bandwidth_bytes_per_s
    return tuple(
        msgspec.structs.replace(tiles, bandwidth_bytes_per_s=float(f"{tiles.bandwidth_bytes_per_s * ratio:.4g}"))
        for tiles in rest.tiles
    )


def fit_tiles(rows: Sequence[Row], processors: int | None, judge: Judge) -> tuple[Tiles, ...]:
    """Of every head size and KV dtype with enough calls of FlashAttention 3 that hold chunks; of a GPU whose number of
    multiprocessors is not known none."""
    if processors is None:
        return ()
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.op in ("attention_prefill", "attention_mixed") and (row.variant, row.launch) == ("fa3", "graph"):
            groups[row.head_dim, heads_of(row).kv_dtype].append(row)
    found = []
    for (head_dim, kv_dtype), group in sorted(groups.items()):
        if len(group) >= FEWEST_TILED:
            for kept, judged in ((group[::2], group[1::2]), (group[1::2], group[::2])):
                half = fit_tile(kept, head_dim, kv_dtype, processors)
                for row in judged:
                    what = f"{batch_text(row)} {label(heads_of(row))}"
                    judge.add(f"tiled attention {kv_dtype}", row.median_s, tiled_s(half, row), what)
            found.append(fit_tile(group, head_dim, kv_dtype, processors))
    return tuple(found)


def fit_tile(rows: Sequence[Row], head_dim: int, kv_dtype: str, processors: int) -> Tiles:
    from scipy.optimize import least_squares

    measured_s = np.array([row.median_s for row in rows])

    def misfit(logs: Floats) -> Floats:
        own = Tiles(head_dim, kv_dtype, processors, *np.exp(logs).tolist())
        formed: Floats = np.log(np.array([tiled_s(own, row) for row in rows]) / measured_s)
        return formed

    found = least_squares(misfit, np.log(FIRST_TILES), loss="soft_l1", f_scale=0.05, max_nfev=40, diff_step=1e-3)
    return Tiles(head_dim, kv_dtype, processors, *(float(f"{value:.4g}") for value in np.exp(found.x)))


def tiled_s(tiles: Tiles, row: Row) -> float:
    schedule = Schedule(tiles, row.q_heads, row.kv_heads, attention.GRAPH_TOKENS)
    chunks = [(row.new_tokens, row.context_tokens or 0)] * (row.chunks or 1)
    seqs = row.seqs or 0
    groups = attention.decodes(seqs, row.seq_context_tokens, row.skew or "uniform") if seqs else []
    read = sum(group.count * group.keys for group in groups)
    return schedule.placed_s(chunks, seqs, read, max((group.keys for group in groups), default=0))


def batch_text(row: Row) -> str:
    beside = f" beside {row.seqs} of {row.seq_context_tokens} {row.skew}" if row.seqs else ""
    return f"{row.chunks or 1} x {row.new_tokens} after {row.context_tokens or 0}{beside}"


def fit_prefills(groups: dict[Heads, list[Row]], judge: Judge) -> tuple[PrefillForm, ...]:
    """Heads timed at few points take the nearest well-timed form, its pairs scaled to fit those."""
    single = {
        heads: [row for row in preferred(group, ATTENTION_VARIANTS) if (row.chunks or 1) == 1]
        for heads, group in groups.items()
    }
    fitted = [fit_prefill(group, heads, judge) for heads, group in single.items() if len(group) >= FEWEST_PREFILLS]
    full = [form for form in fitted if form.pair_s > 0.0]  # a head or two never keep the GPU busy: nothing per pair
    if not full:
        raise ValueError(f"measurements: no prefill attention at {FEWEST_PREFILLS} points (new, cached). Measure more")
    done = {form.heads for form in full}
    few = {heads: group for heads, group in single.items() if group and heads not in done}
    return (*full, *(scaled_prefill(group, heads, nearest(full, heads), judge) for heads, group in few.items()))


def scaled_prefill(rows: Sequence[Row], heads: Heads, form: PrefillForm, judge: Judge) -> PrefillForm:
    known = form.heads
    pair_s = form.pair_s * heads.q_heads * heads.head_dim / (known.q_heads * known.head_dim)
    guess = msgspec.structs.replace(form, heads=heads, pair_s=pair_s)

    def seconds(form: PrefillForm, row: Row) -> float:
        return form.seconds(row.new_tokens, row.context_tokens or 0)

    for row in rows:
        what = f"new={row.new_tokens} cached={row.context_tokens} {label(heads)}"
        judge.add(f"prefill attention {heads.kv_dtype} (other heads)", row.median_s, seconds(guess, row), what)
    slowest = max(rows, key=lambda row: row.median_s)
    rest_s = seconds(msgspec.structs.replace(guess, pair_s=0.0), slowest)
    pair_s *= max(slowest.median_s - rest_s, 0.1 * slowest.median_s) / (seconds(guess, slowest) - rest_s)
    return msgspec.structs.replace(guess, pair_s=float(f"{pair_s:.4g}"))


def fit_prefill(chosen: Sequence[Row], heads: Heads, judge: Judge) -> PrefillForm:
    new = np.array([row.new_tokens for row in chosen], float)
    cached = np.array([row.context_tokens or 0 for row in chosen], float)
    target = np.array([row.median_s for row in chosen])

    def matrix(least: float) -> Floats:
        pairs = cached * np.maximum(new, least) + new * (new + 1) / 2
        columns: Floats = np.column_stack([np.ones(len(new)), new + cached, pairs, cached > 0])
        return columns

    def misfit(least: float) -> float:
        return float(np.mean(np.abs(matrix(least) @ relative_fit(matrix(least), target) / target - 1.0)))

    least = min(LEAST_ROWS, key=misfit)
    call_s, span_s, pair_s, cached_s = (float(f"{value:.4g}") for value in relative_fit(matrix(least), target))
    what = [f"new={n:.0f} cached={c:.0f} {label(heads)}" for n, c in zip(new, cached, strict=True)]
    judge_held_out(judge, f"prefill attention {heads.kv_dtype}", matrix(least), target, what)
    return PrefillForm(heads, call_s, span_s, pair_s, least, cached_s)


def label(heads: Heads) -> str:
    return f"heads={heads.q_heads}/{heads.kv_heads} of {heads.head_dim}"


def slowed(curve: Curve, timed_on: str, gpu: Gpu) -> Curve:
    """A memory-bound kernel on another GPU: its latency as it is, the rest by the ratio of bandwidths."""
    ratio = find_gpu(timed_on).bandwidth_bytes_per_s / gpu.bandwidth_bytes_per_s
    latency_s = min(curve.seconds)
    return Curve(curve.size_bytes, tuple(latency_s + (s - latency_s) * ratio for s in curve.seconds))


# ---- curves -------------------------------------------------------------------------------------------------------


def fit_curve(points: Iterable[tuple[float, float]], name: str, judge: Judge) -> Curve:
    by_size: dict[float, list[float]] = defaultdict(list)
    for size, seconds in points:
        by_size[float(size)].append(seconds)
    if not by_size:
        raise ValueError(f"measurements: no {name}. Measure it (--ops {name})")
    sizes = sorted(by_size)
    seconds = [median(by_size[size]) for size in sizes]
    for i in range(1, len(sizes) - 1):
        predicted_s = np.interp(sizes[i], [sizes[i - 1], sizes[i + 1]], [seconds[i - 1], seconds[i + 1]])
        judge.add(name, seconds[i], float(predicted_s), f"bytes={sizes[i]:.0f}")
    rising = monotone(np.array(seconds), np.ones(len(seconds)))
    return Curve(tuple(sizes), tuple(float(f"{value:.4g}") for value in rising))
