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
load. So, unless CUDA events timed the steps, no knot from `SUSTAINED_ROWS` up may cost less per row (with kernels: over
its kernels) than the largest, which long prefills have measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from calibration.fit_host import first_host, fit_host, stall_share
from calibration.observe import Seen, observe, timed_on_gpu
from calibration.steps import Recording, Scenario, StepRow
from llmsim.cost import FULL, WARM_S, Host
from llmsim.cost.basis import Basis, KernelBasis, ShapeBasis, StepClock, columns, power, with_prompts
from llmsim.cost.graphs import Graphs
from llmsim.cost.profile import FULL_ROWS, GpuClock, Shape, fitted_coefficients

Floats = NDArray[np.float64]

ROUNDS = 4
LARGE_KNOTS = (512, 1024, 2048, 4096, 8192, 16384)
SUSTAINED_ROWS = 1024
# w and its spread, by CUDA events on an H200 (calibration/recordings, mixed_grid and five loads). Logs of updates say
# little about it: they show GPU seconds of few chunks beside many decodes that were not in a burst.
POWER_SHARE, POWER_SHARE_SD = 0.18, 0.05
# The same of what a chunk loses right after another, and of cached tokens that decodes read beside a chunk (3 % more).
WARM_SHARE, WARM_SHARE_SD = 0.047, 0.02
MIXED_KV_SD = 0.1
LINEAR_SD = 0.01  # of what a layer takes from 512 rows on, over its kernels timed alone
ATTENTION_SD = 0.01  # of an engine's calls of attention over those timed alone: on an H200 equal within 1 %
STEP_SD = 0.06  # of a step's residual, 0.02, and its neighbours' that are alike
# What decodes lose after a chunk: on an H200, by CUDA events, 0.035 to 0.045 of its first 50 ms in five loads.
COOL_SHARE, COOL_STEPS, FEWEST_CHUNKS = 0.04, 12, 50
FEWEST = 4  # observations that a knot of a table needs
NEAR = 1.3  # a knot counts as seen if steps come this near to it


def robust(matrix: Floats, target: Floats, scale: float, weight: Floats | None = None, known: int = 0) -> Floats:
    """Least squares with Cauchy weights 1 / (1 + (residual / scale)^2); rows are weighted by `weight` as well.

    The last `known` rows are no observations, of which some may be stalls, and keep their weight.
    """
    base: Floats = np.ones(len(target)) if weight is None else weight
    weights = base
    coefficients: Floats = np.zeros(matrix.shape[1])
    for _ in range(60):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(matrix * root[:, None], target * root, rcond=None)[0]
        weights = base / (1.0 + ((target - matrix @ coefficients) / scale) ** 2)
        weights[len(target) - known :] = base[len(target) - known :]
    return coefficients


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


def alone_seconds(clock: StepClock, step: StepRow) -> float:
    """GPU seconds of a recorded step without stalls and what steps before leave, by `llmsim.cost.basis`."""
    read_tokens = step.read_tokens(clock.skew_share(step.seqs, bool(step.chunks)))
    if step.chunks:
        return clock.mixed_s(step.chunks, step.seqs, read_tokens, step.longest_tokens)
    first_s, kv_s = clock.decode(step.seqs)
    return first_s + kv_s * clock.in_windows(read_tokens, step.seqs)


def gpu_seconds(clock: StepClock, host: Host, step: StepRow) -> float:
    """The same where it stands among others, by the equations of `Host`."""
    alone_s = alone_seconds(clock, step)
    if step.chunks:
        return host.warmed_s(alone_s) if step.warm else alone_s
    return alone_s + (host.cooled_s(gpu_seconds(clock, host, step.after), step.low) if step.after else 0.0)


def first_guess(recordings: Sequence[Recording], basis: Basis) -> GpuClock:
    """The kernels as they are. Without any: steady decode without context is the floor, the rest follows from the
    slowest update gaps per token."""
    if isinstance(basis, KernelBasis):
        knots = (1, 256, 2048, 8192)
        body_s = tuple(basis.body_s(np.array(knots, float)).tolist())
        return GpuClock(knots, body_s, basis.pair_s, basis.kv_token_s, basis.kv_token_s, 0.0, 0.0, 1.0, 1.0, 1.0)
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


def fit_decode(seen: Sequence[tuple[str, Seen]], graphs: Graphs, basis: Basis) -> tuple[list[int], Floats, float]:
    """Knots, L and b_full from decode steps that follow decode steps on the GPU. Scenarios count alike."""
    rows = [(name, row) for name, row in seen if row.mode == FULL and row.steady if row.step.since_chunk > COOL_STEPS]
    padded = np.array([graphs.padded(row.step.tokens) for _, row in rows])
    knots = [int(size) for size in np.unique(padded) if np.sum(padded == size) >= FEWEST]
    seqs = np.array([row.step.seqs for _, row in rows], float)
    skew = basis.skew(seqs)
    read_tokens = [row.step.read_tokens(share) for (_, row), share in zip(rows, skew.tolist(), strict=True)]
    kv_tokens = np.array(read_tokens) * basis.uneven(seqs)
    target = np.array([row.gpu_s for _, row in rows]) - basis.head_s(seqs) - basis.base_s(seqs)
    groups: dict[tuple[str, int], int] = {}
    for (name, _), size in zip(rows, padded, strict=True):
        groups[name, size] = groups.get((name, size), 0) + 1
    weight = np.array([groups[name, size] ** -0.5 for (name, _), size in zip(rows, padded, strict=True)])
    matrix = np.column_stack([columns(basis, knots, padded.astype(float)), kv_tokens * 1e-6])
    coefficients = robust(matrix, target * 1e3, 0.1, weight)
    linear_s = coefficients[:-1] * 1e-3
    rising = monotone(linear_s, np.array([np.sum(padded == knot) for knot in knots], float))
    return knots, rising, float(coefficients[-1]) * 1e-9


def attention_work(steps: Sequence[StepRow], breakeven_rows: float, least_rows: float) -> tuple[Floats, Floats]:
    """Pairs of chunks long enough to be paced by them; cached tokens read by decodes and by shorter chunks."""
    pairs = np.zeros(len(steps))
    kv_tokens = np.array([step.kv_tokens for step in steps], float)
    for i, step in enumerate(steps):
        for new, done in step.chunks:
            own = max(new, least_rows) * done + 0.5 * new * (new + 1)
            if own < breakeven_rows * done:
                kv_tokens[i] += done
            else:
                pairs[i] += own
    return pairs, kv_tokens


def fit_mixed(
    seen: Sequence[tuple[str, Seen]], small: GpuClock, graphs: Graphs, basis: Basis
) -> tuple[GpuClock, float]:
    """The large knots of L, a, b_mixed, w and the share of a warm GPU; the small knots and b_full are given."""
    rows = [row for _, row in seen if row.step.chunks and row.gpu_s == row.gpu_s and row.gpu_s > 0]
    steps = [row.step for row in rows]
    padded = np.array([graphs.padded(step.tokens) for step in steps], float)
    near = [knot for knot in LARGE_KNOTS if knot > small.tokens[-1]]
    large = [k for k in near if np.sum((padded > k / NEAR) & (padded < k * NEAR)) >= FEWEST]
    few = with_prompts(basis, np.array([*small.tokens, *large]))[: len(small.tokens)]
    linear = columns(basis, [*np.array(small.tokens)[few], *large], padded)
    known_s = linear[:, : few.sum()] @ np.array(small.linear_s)[few]
    requests = np.array([step.seqs + len(step.chunks) for step in steps], float)
    known_s += basis.head_s(requests)
    if isinstance(basis, KernelBasis) and basis.schedule is not None:
        calls_s = [
            basis.schedule.seconds(step.chunks, step.seqs, step.read_tokens(basis.mixed_skew), step.longest_tokens)
            for step in steps
        ]
        # in as many pairs as the kernel timed alone does in these seconds; no term of decodes beside them
        pairs, kv_tokens = basis.layers * np.array(calls_s) / basis.pair_s, np.zeros(len(steps))
        pair_prior = (basis.pair_s * 1e9, ATTENTION_SD * basis.pair_s * 1e9)
        large_s = basis.body_s(np.array(large, float)).tolist()
    else:
        seqs, pair_prior = np.array([step.seqs for step in steps], float), None
        known_s += basis.base_s(seqs) + basis.call_s
        known_s += basis.span_s * np.array([sum(new + done for new, done in step.chunks) for step in steps])
        known_s += basis.cached_s * np.array([any(done for _, done in step.chunks) for step in steps])
        pairs, kv_tokens = attention_work(steps, small.mixed_kv_token_s / max(small.pair_s, 1e-15), basis.least_rows)
        # b_mixed is b_full plus something not below 0: alone in a full graph a decode reads at its best
        known_s += small.full_kv_token_s * kv_tokens
    pulled = np.array([0.0 if step.held else power(step.seqs) for step in steps])
    target = np.array([row.gpu_s for row in rows])
    warm = np.array([step.warm for step in steps], float)
    plain = np.column_stack([linear[:, few.sum() :], pairs * 1e-9, kv_tokens * 1e-8])
    priors = [
        (-3, 0.0, MIXED_KV_SD * small.full_kv_token_s * 1e8),
        (-2, POWER_SHARE, POWER_SHARE_SD),
        (-1, WARM_SHARE, WARM_SHARE_SD),
    ]
    if pair_prior is not None:
        priors.append((-4, *pair_prior))
        priors += [(knot, seconds, LINEAR_SD * seconds) for knot, seconds in enumerate(large_s)]
    base_s = target
    used = np.ones(plain.shape[1] + 2, bool)
    coefficients = np.zeros(len(used))
    for _ in range(8):  # both shares stretch the others' sum; without what comes out below 0
        stretched_s = np.clip(base_s, 0.0, WARM_S)
        matrix = np.column_stack([plain, pulled * stretched_s, warm * stretched_s]) / target[:, None]
        known = np.zeros((len(priors), len(used)))  # more rows: what is known, as sure as its spread
        for row, (column, _, sd) in enumerate(priors):
            known[row, column] = STEP_SD / sd
        rows_and_known = np.vstack([matrix, known])
        wanted = np.append((target - known_s) / target, [value * STEP_SD / sd for _, value, sd in priors])
        used[:] = True
        while True:
            coefficients[:] = 0.0
            coefficients[used] = robust(rows_and_known[:, used], wanted, 0.02, known=len(priors))
            below = coefficients[len(large) :] < 0.0
            if not below.any():
                break
            used[len(large) :] &= ~below
        base_s = known_s + plain @ coefficients[:-2]
    fields = {name: getattr(small, name) for name in small.__struct_fields__}
    values = np.array([*small.linear_s, *coefficients[: len(large)]])
    if large and large[-1] > SUSTAINED_ROWS and not any(step.gpu_s == step.gpu_s for step in steps):
        knots = np.array([*small.tokens, *large], float)
        work = knots if isinstance(basis, ShapeBasis) else basis.body_s(knots)
        values = np.where(knots >= SUSTAINED_ROWS, np.maximum(values, values[-1] / work[-1] * work), values)
    fields["tokens"] = (*small.tokens, *large)
    fields["linear_s"] = tuple(float(v) for v in monotone(values, np.ones(len(values))))
    fields["pair_s"] = float(coefficients[-4] * 1e-9)
    fields["mixed_kv_token_s"] = small.full_kv_token_s + float(coefficients[-3] * 1e-8)
    fields["power_share"] = float(coefficients[-2])
    return GpuClock(**fields), float(coefficients[-1])


def fit_cooling(seen: Sequence[tuple[str, Seen]], clock: StepClock) -> float:
    """What decodes lose after chunks, as a share of the chunks' first WARM_S: where the GPU timed the steps itself."""
    lost_s = chunk_s = 0.0
    chunks = 0
    for _, row in seen:
        step = row.step
        if step.gpu_s != step.gpu_s or step.chunks or step.held or step.since_chunk > COOL_STEPS:
            continue
        lost_s += step.gpu_s - alone_seconds(clock, step)
        if step.after is not None and not step.after.held:
            chunk_s += min(alone_seconds(clock, step.after), WARM_S) * (1.0 - step.low)
            chunks += 1
    return max(lost_s / chunk_s, 0.0) if chunks >= FEWEST_CHUNKS else COOL_SHARE


def fit_form(clock: GpuClock, shape: Shape, basis: Basis) -> GpuClock:
    """Overhead, rate and sharpness of the form that carries L to models whose kernels were not timed.

    The bandwidth is that of KV reads.
    """
    from scipy.optimize import least_squares

    bandwidth = shape.kv_token_bytes / clock.full_kv_token_s
    tokens = np.array(clock.tokens, float)
    linear_s = np.array(clock.linear_s) + basis.head_s(np.minimum(tokens, FULL_ROWS))
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


def fit_clocks(
    recordings: Sequence[Recording], graphs: Graphs, shape: Shape, basis: Basis
) -> tuple[GpuClock, Host, float]:
    """The GPU's clock, the host's, and the share of decode time lost to stalls."""
    clock, host = first_guess(recordings, basis), first_host(recordings, graphs)
    scenarios = [scenario for recording in recordings for scenario in recording.scenarios]
    grids = [scenario for recording in recordings for scenario in recording.timed]
    timed = [(grid.name, row) for grid in grids for row in timed_on_gpu(grid.steps, graphs.mode)]
    for _ in range(ROUNDS):
        seen = walk(scenarios, step_clock(clock, basis, graphs), host, graphs) + timed
        knots, linear_s, full_kv_s = fit_decode(seen, graphs, basis)
        clock, warm_share = fit_mixed(seen, replace_small(clock, knots, linear_s, full_kv_s), graphs, basis)
        steps = step_clock(clock, basis, graphs)
        shares = {"warm_share": warm_share, "cool_share": fit_cooling(seen, steps)}
        host = replace(host, **shares)
        seen = walk(scenarios, steps, host, graphs)
        host = replace(fit_host(scenarios, seen, partial(gpu_seconds, steps, host)), **shares)
    stalls = stall_share(scenarios, partial(gpu_seconds, step_clock(clock, basis, graphs), host))
    return fit_form(clock, shape, basis), host, stalls


def step_clock(clock: GpuClock, basis: Basis, graphs: Graphs) -> StepClock:
    """GPU seconds of the fitted model's steps."""
    return StepClock(basis, fitted_coefficients(clock), graphs.padded)


def replace_small(clock: GpuClock, knots: Sequence[int], linear_s: Floats, full_kv_s: float) -> GpuClock:
    fields = {name: getattr(clock, name) for name in clock.__struct_fields__}
    fields["tokens"], fields["linear_s"] = tuple(knots), tuple(float(v) for v in linear_s)
    fields["full_kv_token_s"] = full_kv_s
    return GpuClock(**fields)


def walk(scenarios: Sequence[Scenario], clock: StepClock, host: Host, graphs: Graphs) -> list[tuple[str, Seen]]:
    return [
        (scenario.name, row)
        for scenario in scenarios
        for row in observe(scenario.steps, host, graphs.mode, partial(gpu_seconds, clock, host))
    ]
