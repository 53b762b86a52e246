"""Fit a profile to recordings: the GPU's clock, the host's, and the way between client and engine.

    GPU   decode steps after decode steps: G at the captured sizes and b_full, by robust least squares, G made monotone;
          steps with chunks that wait for the GPU: G at its larger knots, a, and b_mixed, by robust least squares in
          relative error; then bandwidth (from b_full), rate and sharpness of the form that scales G to other models
    host  schedule and update by least squares; launches by mode; their slow drift (the body of the distribution, with
          the time it is held from the autocorrelation) and jitter (the stalls beyond it)
    both  walked and fitted in turn, `ROUNDS` times (calibration.observe)

Robust: iteratively reweighted least squares with Cauchy weights, so that a stalled launch does not bend a coefficient.
Not identifiable from such logs, hence assumed: `TAIL_S` and the lead of piecewise launches (that of eager ones).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.observe import Seen, observe
from calibration.steps import Recording, Scenario, StepRow
from llmsim.cost import FULL, Host
from llmsim.cost.graphs import Graphs
from llmsim.cost.profile import GpuClock, Shape

Floats = NDArray[np.float64]

ROUNDS = 4
LARGE_KNOTS = (512, 1024, 2048, 4096, 8192, 16384)
MIXED_KNOTS = (256, 1024, 8192)
FEWEST = 4  # observations that a knot of a table needs
MARGIN_TOKENS = 1.3  # a knot counts as seen if steps reach this near to it


def robust(matrix: Floats, target: Floats, scale: float, weight: Floats | None = None) -> Floats:
    """Least squares with Cauchy weights 1 / (1 + (residual / scale)^2); rows are weighted by `weight` as well."""
    base = np.ones(len(target)) if weight is None else weight
    weights = base
    coefficients = np.zeros(matrix.shape[1])
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


def gpu_seconds(clock: GpuClock, graphs: Graphs, step: StepRow) -> float:
    """GPU seconds of a recorded step, by the equation of llmsim.cost.profile."""
    linear_s = float(np.interp(graphs.padded(step.tokens), clock.tokens, clock.linear_s))
    if step.tokens > clock.tokens[-1]:
        linear_s = clock.linear_s[-1] * step.tokens / clock.tokens[-1]
    if not step.chunks:
        return linear_s + clock.full_kv_token_s * step.kv_tokens
    mixed_s = float(np.interp(step.new_tokens, clock.mixed_new_tokens, clock.mixed_kv_token_s))
    attention_s = sum(max(clock.pair_s * (n * c + 0.5 * n * (n + 1)), mixed_s * c) for n, c in step.chunks)
    return linear_s + mixed_s * step.kv_tokens + attention_s


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
        raise ValueError("recordings: no steady decode or no step with over 2000 new tokens. Record decode_grid as well")
    floor_s, token_s = float(np.median(gaps)), float(np.median(per_token))
    linear_s = (floor_s, floor_s * 1.5, max(2048 * token_s, floor_s * 2), max(8192 * token_s, floor_s * 3))
    return GpuClock((1, 256, 2048, 8192), linear_s, token_s / 1e5, token_s / 500, (1024,), (token_s / 400,), 0, 1, 1, 1)


def fit_decode(seen: Sequence[tuple[str, Seen]], graphs: Graphs) -> tuple[list[int], Floats, float]:
    """Knots, G and b_full from decode steps that follow decode steps on the GPU. Scenarios count alike."""
    rows = [
        (name, row)
        for name, row in seen
        if row.mode == FULL and row.follows_gpu and row.clean and row.gpu_s == row.gpu_s
    ]
    padded = np.array([graphs.padded(row.step.tokens) for _, row in rows])
    knots = [int(size) for size in np.unique(padded) if np.sum(padded == size) >= FEWEST]
    kv_tokens = np.array([row.step.kv_tokens for _, row in rows], float)
    target = np.array([row.gpu_s for _, row in rows])
    groups: dict[tuple[str, int], int] = {}
    for (name, _), size in zip(rows, padded, strict=True):
        groups[name, size] = groups.get((name, size), 0) + 1
    weight = np.array([groups[name, size] ** -0.5 for (name, _), size in zip(rows, padded, strict=True)])
    matrix = np.column_stack([hats(knots, padded), kv_tokens * 1e-6])
    coefficients = robust(matrix, target * 1e3, 0.1, weight)
    counts = np.array([np.sum(padded == size) for size in knots], float)
    return knots, monotone(coefficients[:-1] * 1e-3, counts), float(coefficients[-1] * 1e-9)


def fit_mixed(seen: Sequence[tuple[str, Seen]], small: GpuClock, graphs: Graphs) -> GpuClock:
    """The large knots of G, a and b_mixed, the small knots being given."""
    rows = [row for _, row in seen if row.step.chunks and row.gpu_s == row.gpu_s and row.gpu_s > 0]
    steps = [row.step for row in rows]
    tokens = np.array([graphs.padded(step.tokens) for step in steps], float)
    largest = small.tokens[-1]
    near = [knot for knot in LARGE_KNOTS if knot > largest]
    large = [k for k in near if np.sum((tokens > k / MARGIN_TOKENS) & (tokens < k * MARGIN_TOKENS)) >= FEWEST]
    linear = hats([*small.tokens, *large], tokens)
    known_s = linear[:, : len(small.tokens)] @ np.array(small.linear_s)
    new_tokens = np.array([step.new_tokens for step in steps], float)
    decode = hats(MIXED_KNOTS, new_tokens)
    pairs, kv_tokens = np.zeros(len(steps)), np.array([step.kv_tokens for step in steps], float)
    breakeven = small.mixed_kv_token_s[0] / small.pair_s
    for i, step in enumerate(steps):
        for new, done in step.chunks:
            if new * done + 0.5 * new * (new + 1) < breakeven * done:
                kv_tokens[i] += done
            else:
                pairs[i] += new * done + 0.5 * new * (new + 1)
    target = np.array([row.gpu_s for row in rows])
    matrix = np.column_stack([linear[:, len(small.tokens) :], pairs * 1e-9, decode * kv_tokens[:, None] * 1e-7])
    coefficients = robust(matrix / target[:, None], (target - known_s) / target, 0.02)
    values = monotone(np.array([*small.linear_s, *coefficients[: len(large)]]), np.ones(len(small.tokens) + len(large)))
    mixed = coefficients[len(large) + 1 :] * 1e-7
    return GpuClock(
        tokens=(*small.tokens, *large),
        linear_s=tuple(float(v) for v in values),
        pair_s=float(coefficients[len(large)] * 1e-9),
        full_kv_token_s=small.full_kv_token_s,
        # beside a chunk a decode never reads faster than alone in a full graph
        mixed_new_tokens=MIXED_KNOTS,
        mixed_kv_token_s=tuple(max(float(b), small.full_kv_token_s) for b in mixed),
        layer_overhead_s=0.0,
        bandwidth_bytes_per_s=1.0,
        flops_per_s=1.0,
        sharpness=1.0,
    )


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
        return np.array([shape.form_s(tried, n) for n in tokens]) / linear_s - 1.0

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


def fit_gpu(recordings: Sequence[Recording], graphs: Graphs, shape: Shape) -> tuple[GpuClock, Host]:
    from calibration.fit_host import fit_host, first_host

    clock, host = first_guess(recordings), first_host(recordings, graphs)
    scenarios = [scenario for recording in recordings for scenario in recording.scenarios]
    for _ in range(ROUNDS):
        seen = walk(scenarios, clock, host, graphs)
        knots, linear_s, full_kv_s = fit_decode(seen, graphs)
        given = replace_small(clock, knots, linear_s, full_kv_s)
        clock = fit_mixed(seen, given, graphs)
        seen = walk(scenarios, clock, host, graphs)
        host = fit_host(scenarios, seen, lambda step: gpu_seconds(clock, graphs, step))
    return fit_form(clock, shape), host


def replace_small(clock: GpuClock, knots: Sequence[int], linear_s: Floats, full_kv_s: float) -> GpuClock:
    fields = {name: getattr(clock, name) for name in clock.__struct_fields__}
    fields["tokens"], fields["linear_s"] = tuple(knots), tuple(float(v) for v in linear_s)
    fields["full_kv_token_s"] = full_kv_s
    return GpuClock(**fields)


def walk(scenarios: Sequence[Scenario], clock: GpuClock, host: Host, graphs: Graphs) -> list[tuple[str, Seen]]:
    return [
        (scenario.name, row)
        for scenario in scenarios
        for row in observe(scenario.steps, host, graphs.mode, lambda step: gpu_seconds(clock, graphs, step))
    ]
