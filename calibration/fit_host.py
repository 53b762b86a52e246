"""Fit the host's clock and the client's side; see calibration.fit for the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from calibration.observe import DISPATCH_S, Seen
from calibration.steps import Recording, Scenario, StepRow
from llmsim.cost import EAGER, FULL, PIECEWISE, Host
from llmsim.cost.graphs import Graphs

Floats = NDArray[np.float64]

TAIL_S = 1e-3  # kernels still to run when a launch without full graph has ended: those of the sampler; not identifiable
STALL_QUANTILE = 0.95  # launches beyond it are stalls, drawn independently; the rest is the host's drifting speed
STALL_S = 1e-3  # a decode step this far from its GPU seconds (their spread is 0.1 ms) met a stall of the host
DRIFT_RANKS = 24
STALL_RANKS = 100
BURST_REQUESTS = 4  # launches during which as many arrive are left out: the client's burst, not load
FEWEST_LAUNCHES = 20
# A minute of load says little of two small effects, each about the size of the launches' own spread. What is known of
# them, as shares of a mean eager launch with standard errors: by regression over the 1,284 to 2,005 eager launches of
# eight open-loop loads on an H200 host, logged call by call (calibration/recordings). Where a recording has more to
# say, it outweighs this.
CHUNK_SHARE, CHUNK_SHARE_SD = 0.064, 0.012  # for each prompt in the launch: 1.12 of 17.5 ms
ARRIVAL_SHARE, ARRIVAL_SHARE_SD = 0.060, 0.013  # per 1,000 prompt tokens that arrive meanwhile: 1.0 of 16.7 ms
# An idle engine takes this long from a request at its queue to the schedule: what comes meanwhile is scheduled with it.
# In decode_grid the schedule follows the first of 1, 2 or 4 requests after 1.6 to 2.5 ms, 0.5 to 1.3 ms more than a
# request takes under load, and 4 requests sent within 1 ms are one step.
WAKE_S = 0.5e-3
WINDOW_S = 15e-3  # arrivals in this first part of a launch, which every launch has, cannot depend on its length


def first_host(recordings: Sequence[Recording], graphs: Graphs) -> Host:
    """Launches from idle: the host goes straight on to the next schedule, so the gap shows them."""
    gaps: dict[int, list[float]] = {PIECEWISE: [], EAGER: []}
    for scenario in (scenario for recording in recordings for scenario in recording.scenarios):
        for before, step in pairwise(scenario.steps):
            mode = graphs.mode(before.tokens, len(before.chunks))
            if mode != FULL and step.schedule_s < before.update_s:
                gaps[mode].append(step.schedule_s - before.schedule_s - before.schedule_took_s)
    for mode, label in ((PIECEWISE, "piecewise"), (EAGER, "eager")):
        if not gaps[mode]:
            raise ValueError(f"recordings: no {label} launch in any of them. Record short and long prompts")
    piecewise_s, eager_s = (float(np.quantile(gaps[mode], 0.3)) for mode in (PIECEWISE, EAGER))
    graph_s = min(3e-3, piecewise_s / 2)
    return Host(launch_s=(graph_s, piecewise_s, eager_s), lead_s=(graph_s / 2,) * 3, tail_s=(0.0, TAIL_S, TAIL_S))


def fit_host(
    scenarios: Sequence[Scenario], rows: Sequence[tuple[str, Seen]], gpu_s: Callable[[StepRow], float]
) -> Host:
    steps = [row.step for _, row in rows]
    matrix = np.array([(1.0, step.running, step.new_tokens) for step in steps])
    schedule = trimmed(matrix, np.array([step.schedule_took_s for step in steps]))
    update_s, update_per_output_s = fit_update(scenarios)
    launches, quiet_rows = collect_launches(scenarios, rows)
    lead_s = fit_lead(quiet_rows, gpu_s)
    interference = fit_interference(launches[EAGER])
    per_chunk_s = fit_per_chunk(launches[EAGER])
    quiet = np.array([took - interference * early - per_chunk_s * n for took, early, _, n in launches[EAGER]])
    drift, jitter, hold_s = fit_noise(quiet, np.array([at for _, _, at, _ in launches[EAGER]]))
    mean_s = float(np.mean(quiet))
    shrunk = per_chunk_s * float(np.median([took for took, *_ in launches[PIECEWISE]])) / (mean_s + per_chunk_s)
    piecewise = [took - interference * early - shrunk * n for took, early, _, n in launches[PIECEWISE]]
    graph_s = float(np.median([took for took, *_ in launches[FULL]]))
    # too few piecewise launches for a mean: their median, raised as stalls raise the eager ones'
    piecewise_s = float(np.median(piecewise)) * mean_s / float(np.median(quiet))
    share = piecewise_s / mean_s
    return replace(
        fit_client(scenarios),
        schedule_s=float(schedule[0]) + DISPATCH_S,
        schedule_per_request_s=float(schedule[1]),
        schedule_per_token_s=float(schedule[2]),
        launch_s=(graph_s, piecewise_s, mean_s),
        launch_per_chunk_s=(0.0, per_chunk_s * share, per_chunk_s),
        launch_drift_s=((), tuple(d * share for d in drift), tuple(drift)),
        launch_jitter_s=((), tuple(j * share for j in jitter), tuple(jitter)),
        drift_hold_s=hold_s,
        update_s=update_s,
        update_per_output_s=update_per_output_s,
        interference_per_token_s=interference,
        lead_s=lead_s,
        tail_s=(0.0, TAIL_S, TAIL_S),
    )


# Seconds it took, prompt tokens that arrived in its first part, when it began, prompts in it.
Launch = tuple[float, float, float, int]


def fit_per_chunk(launches: Sequence[Launch]) -> float:
    """Seconds of launch for each prompt in it: these launches and what is known of others, each by its certainty."""
    took = np.array([launch[0] for launch in launches])
    chunks = np.array([launch[3] for launch in launches], float)
    known_s, known_sd_s = CHUNK_SHARE * float(np.mean(took)), CHUNK_SHARE_SD * float(np.mean(took))
    return pooled_slope(chunks, took, known_s, known_sd_s)


def pooled_slope(at: Floats, took: Floats, known: float, known_sd: float) -> float:
    """Slope of `took` over `at`, 0 or more: from these points and from what is known, each by its certainty."""
    from_mean = at - np.mean(at)
    squares = float(np.sum(from_mean**2))
    slope = float(np.sum(from_mean * took)) / squares if squares > 0.0 else 0.0
    residual = took - np.mean(took) - slope * from_mean
    weight = squares / max(float(np.var(residual)), 1e-12)
    known_weight = known_sd**-2
    return max((slope * weight + known * known_weight) / (weight + known_weight), 0.0)


def collect_launches(
    scenarios: Sequence[Scenario], rows: Sequence[tuple[str, Seen]]
) -> tuple[dict[int, list[Launch]], list[tuple[Seen, Seen | None]]]:
    """Launches by mode, and the rows (each with the one before it) during whose launch no burst arrives.

    Of a mode that occurs often enough under an open-loop load only those launches count: in a burst the client and the
    engine's receiving thread compete with the launch.
    """
    sent = {scenario.name: np.sort([request.send_s for request in scenario.requests]) for scenario in scenarios}
    prompt = {scenario.name: mean_prompt(scenario) for scenario in scenarios}
    open_loop = {scenario.name for scenario in scenarios if spread(scenario)}
    steady: dict[int, list[Launch]] = {FULL: [], PIECEWISE: [], EAGER: []}
    anywhere: dict[int, list[Launch]] = {FULL: [], PIECEWISE: [], EAGER: []}
    quiet: list[tuple[Seen, Seen | None]] = []
    before: Seen | None = None
    for name, row in rows:
        end_s = row.launched_s if row.launched_s == row.launched_s else row.launch_s + WINDOW_S
        first, early, last = np.searchsorted(sent[name], [row.launch_s, row.launch_s + WINDOW_S, end_s])
        if last - first < BURST_REQUESTS:
            quiet.append((row, before))
            after_chunk = before is not None and bool(before.step.chunks)
            if row.launched_s == row.launched_s and (row.mode != FULL or after_chunk):
                took_s, arrived = row.launched_s - row.launch_s, (early - first) * prompt[name]
                launch = (took_s, arrived, row.launch_s, len(row.step.chunks))
                anywhere[row.mode].append(launch)
                if name in open_loop:
                    steady[row.mode].append(launch)
        before = row
    chosen = {mode: steady[mode] if len(steady[mode]) >= FEWEST_LAUNCHES else anywhere[mode] for mode in anywhere}
    for mode, label in ((FULL, "full-graph"), (PIECEWISE, "piecewise"), (EAGER, "eager")):
        if not chosen[mode]:
            raise ValueError(f"recordings: no {label} launch shows in any of them. Record short and long prompts")
    return chosen, quiet


def trimmed(matrix: Floats, target: Floats) -> Floats:
    """Least squares without the 0.5 % of rows farthest off: means that a stalled thread does not move."""
    keep = np.ones(len(target), bool)
    coefficients: Floats = np.zeros(matrix.shape[1])
    for _ in range(5):
        coefficients = np.linalg.lstsq(matrix[keep], target[keep], rcond=None)[0]
        off = np.abs(target - matrix @ coefficients)
        keep = off <= np.quantile(off, 0.995)
    return coefficients


def stall_share(scenarios: Sequence[Scenario], gpu_s: Callable[[StepRow], float]) -> float:
    """Share of decode time that is lost between updates: gaps far from the step's GPU seconds, catching up included.

    Of steps with a decode two before, one before and one after them, all overlapping, so that no launch paces the gap.
    """
    lost_s = total_s = 0.0
    for scenario in scenarios:
        if scenario.concurrency is not None or not spread(scenario):
            continue
        rows = scenario.steps
        for i in range(2, len(rows) - 1):
            before, step, after = rows[i - 1 : i + 2]
            if any(row.chunks for row in rows[i - 2 : i + 2]):
                continue
            if step.schedule_s > before.update_s or after.schedule_s > step.update_s:
                continue
            expected_s = gpu_s(step)
            excess_s = step.update_s - before.update_s - expected_s
            total_s += expected_s
            lost_s += excess_s if abs(excess_s) > STALL_S else 0.0
    return max(lost_s / total_s, 0.0) if total_s else 0.0


def mean_prompt(scenario: Scenario) -> float:
    return float(np.mean([request.prompt_tokens for request in scenario.requests]))


def fit_update(scenarios: Sequence[Scenario]) -> tuple[float, float]:
    """From the start of an update to the next schedule, over the outputs of the updated step."""
    gaps, outputs = [], []
    for scenario in scenarios:
        schedules = np.array([step.schedule_s for step in scenario.steps])
        for step in scenario.steps:
            i = np.searchsorted(schedules, step.update_s)
            if i < len(schedules) and schedules[i] - step.update_s - step.update_took_s < 1e-3:
                gaps.append(schedules[i] - step.update_s)
                outputs.append(step.seqs + len(step.chunks))
    found = trimmed(np.column_stack([np.ones(len(gaps)), outputs]), np.array(gaps))
    return float(found[0]), float(found[1])


def fit_lead(rows: Sequence[tuple[Seen, Seen | None]], gpu_s: Callable[[StepRow], float]) -> tuple[float, float, float]:
    """How long after its launch began a step started, where the GPU stood idle: its end less its GPU seconds.

    Full graphs after a launch-bound chunk; eager steps twice as long as their launch, whose end cannot bound theirs.
    """
    leads: dict[int, list[float]] = {FULL: [], EAGER: []}
    for row, before in rows:
        if row.gpu_s != row.gpu_s or row.follows_gpu or row.mode == PIECEWISE:
            continue
        after_chunk = before is not None and bool(before.step.chunks)
        long = row.mode == EAGER and gpu_s(row.step) > 2 * (row.launched_s - row.launch_s)
        if long or (row.mode == FULL and after_chunk):
            leads[row.mode].append(row.step.update_s - gpu_s(row.step) - row.launch_s)
    graph_s, eager_s = (max(float(np.median(leads[mode])), 0.0) if leads[mode] else 2e-3 for mode in (FULL, EAGER))
    return graph_s, eager_s, eager_s


def fit_interference(launches: Sequence[Launch]) -> float:
    """Seconds of launch per prompt token that arrives in its first part, without the stalls."""
    took, early = np.array([launch[0] for launch in launches]), np.array([launch[1] for launch in launches])
    body = took <= np.quantile(took, STALL_QUANTILE)
    mean_s = float(np.mean(took))
    return pooled_slope(early[body], took[body], ARRIVAL_SHARE * mean_s / 1e3, ARRIVAL_SHARE_SD * mean_s / 1e3)


def fit_noise(took_s: Floats, at_s: Floats) -> tuple[list[float], list[float], float]:
    """Drift and jitter tables whose sum has mean 0, and how long the drift holds."""
    threshold = np.quantile(took_s, STALL_QUANTILE)
    body, stalls = took_s[took_s <= threshold], took_s[took_s > threshold]
    ranks = (np.arange(DRIFT_RANKS) + 0.5) / DRIFT_RANKS
    drift = np.quantile(body, ranks) - np.mean(body)
    count = round(STALL_RANKS * (1 - STALL_QUANTILE))
    stalled = np.quantile(stalls, (np.arange(count) + 0.5) / count) - np.mean(body) if len(stalls) else np.zeros(count)
    jitter = np.concatenate([np.zeros(STALL_RANKS - count), stalled])
    jitter -= np.mean(jitter)
    drift -= np.mean(drift)
    return drift.tolist(), jitter.tolist(), hold_time_s(body - np.mean(body), at_s[took_s <= threshold])


def hold_time_s(deviation: Floats, at_s: Floats) -> float:
    """The time constant of exp(-lag / t) nearest to the products of deviations at lags below a second."""
    later, earlier = np.triu_indices(len(deviation), 1)
    lag = np.abs(at_s[earlier] - at_s[later])
    near = lag < 1.0
    if near.sum() < 50:
        return 0.0
    product = deviation[later][near] * deviation[earlier][near] / np.mean(deviation**2)
    candidates = np.geomspace(0.01, 1.0, 60)
    misfit = [float(np.sum((product - np.exp(-lag[near] / t)) ** 2)) for t in candidates]
    return float(candidates[int(np.argmin(misfit))])


def spread(scenario: Scenario) -> bool:
    """Whether its client sends requests over time, one at a time, rather than in bursts that occupy it."""
    sent = sorted(request.send_s for request in scenario.requests)
    return len(sent) == 1 or float(np.median(np.diff(sent))) > 5e-3


def fit_client(scenarios: Sequence[Scenario]) -> Host:
    """Send to schedulable, and update to client, both where the client is not busy with a burst."""
    open_loop = [scenario for scenario in scenarios if scenario.concurrency is None and spread(scenario)]
    if not open_loop:
        raise ValueError("recordings: no scenario whose requests are sent one at a time. Record an open-loop load")
    delays: list[float] = []
    outputs: list[int] = []
    for scenario in open_loop:
        steps = sorted(scenario.steps, key=lambda step: step.update_s)
        updates = np.array([step.update_s for step in steps])
        for request in scenario.requests:
            for at_s in request.token_s:
                i = int(np.searchsorted(updates, at_s)) - 1
                if i >= 0:
                    delays.append(at_s - updates[i])
                    outputs.append(steps[i].seqs + len(steps[i].chunks))
    respond = trimmed(np.column_stack([np.ones(len(delays)), outputs]), np.array(delays))
    receive_s, receive_per_token_s = fit_receive(open_loop)
    return Host(
        receive_s=receive_s,
        wake_s=WAKE_S,
        receive_per_token_s=receive_per_token_s,
        respond_s=float(respond[0]),
        respond_per_output_s=float(respond[1]),
    )


def fit_receive(scenarios: Sequence[Scenario]) -> tuple[float, float]:
    """Constant and per prompt token: a request was schedulable by the schedule that took it, not by the one before.

    The pair that breaks these bounds least, in sum; where the engine slept, the bound that took it is the instant.
    """
    bounds = np.array([bound for scenario in scenarios for bound in receive_bounds(scenario)])
    after_s, before_s, prompt = bounds[:, 0:1], bounds[:, 1:2], bounds[:, 2:3]
    constants, slopes = np.meshgrid(np.arange(0.2e-3, 3e-3, 0.05e-3), np.arange(0.0, 1.0e-6, 0.02e-6))
    took_s = constants.ravel() + slopes.ravel() * prompt
    broken = np.maximum(after_s - took_s, 0.0) + np.maximum(took_s - before_s, 0.0)
    best = int(np.argmin(np.sum(np.minimum(broken, 2e-3), axis=0)))  # a late wake-up counts no more than 2 ms
    return float(constants.ravel()[best]), float(slopes.ravel()[best])


def receive_bounds(scenario: Scenario) -> list[tuple[float, float, float]]:
    """(not yet, by then, prompt tokens) of requests, if all are taken uncached and in order of sending."""
    first = [step for step in scenario.steps for _, done in step.chunks if done == 0]
    requests = sorted(scenario.requests, key=lambda request: request.send_s)
    if len(first) != len(requests):
        return []
    before = {id(step): earlier for earlier, step in pairwise(scenario.steps)}
    bounds = []
    for request, step in zip(requests, first, strict=True):
        if step.waiting:
            continue  # it may have waited for room
        earlier = before.get(id(step))
        slept = earlier is None or earlier.update_s < request.send_s
        took_s = step.schedule_s - request.send_s
        if slept:
            took_s -= WAKE_S
        not_yet_s = took_s if slept else earlier.schedule_s - request.send_s if earlier is not None else 0.0
        bounds.append((not_yet_s, took_s, float(request.prompt_tokens)))
    return bounds
