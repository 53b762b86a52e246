"""Fit a profile to recordings: the GPU's clock, the host's, and the way between client and engine.

    GPU   decode steps after decode steps: G at the captured sizes and b_full, by robust least squares, G made monotone;
          steps with chunks that wait for the GPU: G at its larger knots, a, b_mixed and w, by robust least squares
          in relative error; then bandwidth (from b_full), rate and sharpness of the form that scales G to other models
    host  schedule and update by least squares; launches by mode; their slow drift (the body of the distribution, with
          the time it is held from the autocorrelation) and jitter (the stalls beyond it)
    both  walked and fitted in turn, `ROUNDS` times (calibration.observe)

Robust: iteratively reweighted least squares with Cauchy weights, so that a stalled launch does not bend a coefficient.
Not identifiable from such logs, hence assumed: `TAIL_S` and the lead of piecewise launches (that of eager ones).
Chunks under load meet a GPU at its power limit, short ones after idling do not; where the GPU paces chunks it is under
load. So no knot from `SUSTAINED_ROWS` up may cost less per row than the largest, which long prefills have measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from calibration.fit_host import first_host, fit_host, stall_share
from calibration.observe import Seen, observe
from calibration.steps import Recording, Scenario, StepRow
from llmsim.cost import FULL, WARM_S, Host
from llmsim.cost.graphs import Graphs
from llmsim.cost.profile import GpuClock, Shape, effective_rows, power, unevenness

Floats = NDArray[np.float64]

ROUNDS = 4
LARGE_KNOTS = (512, 1024, 2048, 4096, 8192, 16384)
SUSTAINED_ROWS = 1024
# w and its spread, by CUDA events on an H200 (calibration/recordings, mixed_grid and five loads). Logs of updates say
# little about it: they show GPU seconds of few chunks beside many decodes that were not in a burst.
POWER_SHARE, POWER_SHARE_SD = 0.18, 0.05
FITTED_KV_HEADS = 8  # of the models that profiles are fitted on (Llama-3.1-8B)
FEWEST = 4  # observations that a knot of a table needs
NEAR = 1.3  # a knot counts as seen if steps come this near to it


def robust(matrix: Floats, target: Floats, scale: float, weight: Floats | None = None) -> Floats:
    """Least squares with Cauchy weights 1 / (1 + (residual / scale)^2); rows are weighted by `weight` as well."""
    base: Floats = np.ones(len(target)) if weight is None else weight
    weights = base
    coefficients: Floats = np.zeros(matrix.shape[1])
    for _ in range(60):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(matrix * root[:, None], target * root, rcond=None)[0]
        weights = base / (1.0 + ((target - matrix @ coefficients) / scale) ** 2)
    return coefficients


def hats(knots: Sequence[float], at: Floats) -> Floats:
    """Rows of linear-interpolation weights; beyond the ends the outermost knot."""
    matrix = np.zeros((len(at), len(knots)))
    for column in range(len(knots)):
        matrix[:, column] = np.interp(at, knots, np.eye(len(knots))[column])
    return matrix


def monotone(values: Floats, weights: Floats) -> Floats:
    """Nearest rising sequence (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, total, length = blocks.pop()
            last = blocks[-1]
            blocks[-1] = [(last[0] * last[1] + mean * total) / (last[1] + total), last[1] + total, last[2] + length]
    return np.concatenate([np.full(int(length), mean) for mean, _, length in blocks])


# ---- the GPU ------------------------------------------------------------------------------------------------------


def gpu_seconds(clock: GpuClock, warm_share: float, graphs: Graphs, step: StepRow) -> float:
    """GPU seconds of a recorded step without stalls, by the equation of llmsim.cost.profile."""
    linear_s = between(clock.tokens, clock.linear_s, effective_rows(graphs.padded(step.tokens)))
    if not step.chunks:
        return linear_s + clock.full_kv_token_s * step.kv_tokens * (1.0 + unevenness(step.seqs, FITTED_KV_HEADS))
    kv_s, pair_s = clock.mixed_kv_token_s, clock.pair_s
    attention_s = sum(max(pair_s * (n * c + 0.5 * n * (n + 1)), kv_s * c) for n, c in step.chunks)
    base_s = linear_s + kv_s * step.kv_tokens + attention_s
    base_s += clock.power_share * power(step.seqs) * min(base_s, WARM_S)
    return base_s + (warm_share * min(base_s, WARM_S) if step.warm else 0.0)


def between(knots: Sequence[int], values: Sequence[float], at: float) -> float:
    """Linear between knots, flat below the first, in proportion above the last."""
    i = bisect_right(knots, at)
    if i == 0:
        return values[0]
    if i == len(knots):
        return values[-1] * at / knots[-1]
    return values[i - 1] + (values[i] - values[i - 1]) * (at - knots[i - 1]) / (knots[i] - knots[i - 1])


def first_guess(recordings: Sequence[Recording]) -> GpuClock:
    """Steady decode without context is the floor of G; the rest from the slowest update gaps per token."""
    gaps, per_token = [], []
    for scenario in (scenario for recording in recordings for scenario in recording.scenarios):
        for before, step in zip(scenario.steps, scenario.steps[1:], strict=False):
            gap_s = step.update_s - before.update_s
            if not before.chunks and not step.chunks and step.seqs < 9 and step.schedule_s < before.update_s:
                gaps.append(gap_s)
            if step.new_tokens > 2000:
                per_token.append(gap_s / step.tokens)
    if not gaps or not per_token:
        raise ValueError("recordings: no steady decode, or no step with over 2000 new tokens. Record decode_grid too")
    floor_s, token_s = float(np.median(gaps)), float(np.median(per_token))
    linear_s = (floor_s, floor_s * 1.5, max(2048 * token_s, floor_s * 2), max(8192 * token_s, floor_s * 3))
    return GpuClock(
        (1, 256, 2048, 8192), linear_s, token_s / 3e4, token_s / 500, token_s / 500, 0.0, 0.0, 1.0, 1.0, 1.0
    )


def fit_decode(seen: Sequence[tuple[str, Seen]], graphs: Graphs) -> tuple[list[int], Floats, float]:
    """Knots, G and b_full from decode steps that follow decode steps on the GPU. Scenarios count alike."""
    rows = [
        (name, row)
        for name, row in seen
        if row.mode == FULL and row.follows_gpu and row.clean and row.gpu_s == row.gpu_s
    ]
    padded = np.array([graphs.padded(row.step.tokens) for _, row in rows])
    knots = [int(size) for size in np.unique(padded) if np.sum(padded == size) >= FEWEST]
    uneven = np.array([unevenness(row.step.seqs, FITTED_KV_HEADS) for _, row in rows])
    kv_tokens = np.array([row.step.kv_tokens for _, row in rows], float) * (1.0 + uneven)
    target = np.array([row.gpu_s for _, row in rows])
    groups: dict[tuple[str, int], int] = {}
    for (name, _), size in zip(rows, padded, strict=True):
        groups[name, size] = groups.get((name, size), 0) + 1
    weight = np.array([groups[name, size] ** -0.5 for (name, _), size in zip(rows, padded, strict=True)])
    matrix = np.column_stack([hats(knots, padded), kv_tokens * 1e-6])
    coefficients = robust(matrix, target * 1e3, 0.1, weight)
    counts = np.array([np.sum(padded == size) for size in knots], float)
    return knots, monotone(coefficients[:-1] * 1e-3, counts), float(coefficients[-1] * 1e-9)


def attention_work(steps: Sequence[StepRow], breakeven_rows: float) -> tuple[Floats, Floats]:
    """Pairs of chunks long enough to be paced by them; cached tokens read by decodes and by shorter chunks."""
    pairs = np.zeros(len(steps))
    kv_tokens = np.array([step.kv_tokens for step in steps], float)
    for i, step in enumerate(steps):
        for new, done in step.chunks:
            own = new * done + 0.5 * new * (new + 1)
            if own < breakeven_rows * done:
                kv_tokens[i] += done
            else:
                pairs[i] += own
    return pairs, kv_tokens


def fit_mixed(seen: Sequence[tuple[str, Seen]], small: GpuClock, graphs: Graphs) -> tuple[GpuClock, float]:
    """The large knots of G, a, b_mixed, w and the share of a warm GPU; the small knots and b_full are given."""
    rows = [row for _, row in seen if row.step.chunks and row.gpu_s == row.gpu_s and row.gpu_s > 0]
    steps = [row.step for row in rows]
    gemm_rows = np.array([effective_rows(graphs.padded(step.tokens)) for step in steps])
    near = [knot for knot in LARGE_KNOTS if knot > small.tokens[-1]]
    large = [k for k in near if np.sum((gemm_rows > k / NEAR) & (gemm_rows < k * NEAR)) >= FEWEST]
    linear = hats([*small.tokens, *large], gemm_rows)
    known_s = linear[:, : len(small.tokens)] @ np.array(small.linear_s)
    pairs, kv_tokens = attention_work(steps, small.mixed_kv_token_s / small.pair_s)
    # b_mixed is b_full plus something not below 0: alone in a full graph a decode reads at its best
    known_s += small.full_kv_token_s * kv_tokens
    pulled = np.array([power(step.seqs) for step in steps])
    target = np.array([row.gpu_s for row in rows])
    warm = np.array([step.warm for step in steps], float)
    plain = np.column_stack([linear[:, len(small.tokens) :], pairs * 1e-9, kv_tokens * 1e-8])
    base_s = target
    used = np.ones(plain.shape[1] + 2, bool)
    coefficients = np.zeros(len(used))
    for _ in range(8):  # both shares stretch the others' sum; without what comes out below 0
        stretched_s = np.clip(base_s, 0.0, WARM_S)
        matrix = np.column_stack([plain, pulled * stretched_s, warm * stretched_s]) / target[:, None]
        known = np.zeros((1, len(used)))  # one more row: what is known of w, as sure as its spread
        known[0, -2] = 0.02 / POWER_SHARE_SD
        rows_and_known = np.vstack([matrix, known])[:, used]
        wanted = np.append((target - known_s) / target, POWER_SHARE * known[0, -2])
        coefficients[:] = 0.0
        coefficients[used] = robust(rows_and_known, wanted, 0.02)
        base_s = known_s + plain @ coefficients[:-2]
        used[len(large) :] &= coefficients[len(large) :] >= 0.0
    fields = {name: getattr(small, name) for name in small.__struct_fields__}
    values = np.array([*small.linear_s, *coefficients[: len(large)]])
    if large and large[-1] > SUSTAINED_ROWS:
        per_row_s = values[-1] / large[-1]
        knots = np.array([*small.tokens, *large])
        values = np.where(knots >= SUSTAINED_ROWS, np.maximum(values, per_row_s * knots), values)
    fields["tokens"] = (*small.tokens, *large)
    fields["linear_s"] = tuple(float(v) for v in monotone(values, np.ones(len(values))))
    fields["pair_s"] = float(coefficients[-4] * 1e-9)
    fields["mixed_kv_token_s"] = small.full_kv_token_s + float(coefficients[-3] * 1e-8)
    fields["power_share"] = float(coefficients[-2])
    return GpuClock(**fields), float(coefficients[-1])


def fit_form(clock: GpuClock, shape: Shape) -> GpuClock:
    """Overhead, rate and sharpness of the form that carries G to other models; the bandwidth is that of KV reads."""
    from scipy.optimize import least_squares

    bandwidth = shape.kv_token_bytes / clock.full_kv_token_s
    tokens, linear_s = np.array(clock.tokens, float), np.array(clock.linear_s)
    last_rate = tokens[-1] * shape.flops_per_token / linear_s[-1]

    def candidate(x: Floats) -> GpuClock:
        return replace_clock(clock, bandwidth, float(np.exp(x[0])), float(np.exp(x[1])) + 1.0, float(np.exp(x[2])))

    def misfit(x: Floats) -> Floats:
        tried = candidate(x)
        formed: Floats = np.array([shape.form_s(tried, n) for n in tokens])
        return formed / linear_s - 1.0

    start_overhead_s = max(linear_s[0] - shape.weight_bytes / bandwidth, 1e-4) / shape.layers
    found = least_squares(misfit, [np.log(last_rate), 0.0, np.log(start_overhead_s)], loss="soft_l1", f_scale=0.03)
    return candidate(found.x)


def replace_clock(
    clock: GpuClock, bandwidth_bytes_per_s: float, flops_per_s: float, sharpness: float, layer_overhead_s: float
) -> GpuClock:
    fields = {name: getattr(clock, name) for name in clock.__struct_fields__}
    fields["bandwidth_bytes_per_s"], fields["flops_per_s"] = bandwidth_bytes_per_s, flops_per_s
    fields["sharpness"], fields["layer_overhead_s"] = sharpness, layer_overhead_s
    return GpuClock(**fields)


def fit_clocks(recordings: Sequence[Recording], graphs: Graphs, shape: Shape) -> tuple[GpuClock, Host, float]:
    """The GPU's clock, the host's, and the share of decode time lost to stalls."""
    clock, host = first_guess(recordings), first_host(recordings, graphs)
    scenarios = [scenario for recording in recordings for scenario in recording.scenarios]
    for _ in range(ROUNDS):
        seen = walk(scenarios, clock, host, graphs)
        knots, linear_s, full_kv_s = fit_decode(seen, graphs)
        clock, warm_share = fit_mixed(seen, replace_small(clock, knots, linear_s, full_kv_s), graphs)
        host = replace(host, warm_share=warm_share)
        seen = walk(scenarios, clock, host, graphs)
        host = fit_host(scenarios, seen, partial(gpu_seconds, clock, warm_share, graphs))
        host = replace(host, warm_share=warm_share)
    stalls = stall_share(scenarios, partial(gpu_seconds, clock, host.warm_share, graphs))
    return fit_form(clock, shape), host, stalls


def replace_small(clock: GpuClock, knots: Sequence[int], linear_s: Floats, full_kv_s: float) -> GpuClock:
    fields = {name: getattr(clock, name) for name in clock.__struct_fields__}
    fields["tokens"], fields["linear_s"] = tuple(knots), tuple(float(v) for v in linear_s)
    fields["full_kv_token_s"] = full_kv_s
    return GpuClock(**fields)


def walk(scenarios: Sequence[Scenario], clock: GpuClock, host: Host, graphs: Graphs) -> list[tuple[str, Seen]]:
    return [
        (scenario.name, row)
        for scenario in scenarios
        for row in observe(scenario.steps, host, graphs.mode, partial(gpu_seconds, clock, host.warm_share, graphs))
    ]
