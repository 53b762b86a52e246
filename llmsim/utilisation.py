"""What the GPUs did during a run, from its iteration log.

    busy                GPU seconds of a row = n * gpu_first_s + gpu_growth_s * n (n - 1) / 2, n = its iterations
    gpu_busy_frac       busy / (replicas * duration)
    batch_size          requests of an iteration (decodes and prefills), over iterations
    kv_cache_usage_perc fraction of KV blocks in use (vLLM's gauge of that name: 1 is all of them), over time, an idle
                        replica counting as 0; block 0, vLLM's null block, is not counted as usable
    kv_token_share      cached tokens that the iterations read or wrote / tokens that the KV memory holds, over time; a
                        prefix that several requests share counts for each. Beside kv_cache_usage_perc it says how
                        much of what is held is of use
    mfu, mbu            FLOPs of the work / (busy * peak FLOP/s); bytes it must move / (busy * peak bandwidth)
    phases              the same for iterations that hold prefill chunks ("prefill", the decodes beside them included)
                        and for pure decode ("decode"), each with its bottleneck: "host" when the GPU waited more than
                        half of the time requests were under way, else the larger of compute (FLOPs / peak) and
                        memory bandwidth (bytes / peak)
    extrapolated        share of busy time in iterations outside the range the cost model was measured on; None for a
                        cost model that was not measured
    price               of a GPU and hour, with its source: the one given, else that of `llmsim/prices.toml`
    cost_per_1m_*       US dollars at that price

FLOPs and bytes are those of `llmsim.cost.roofline`: the work the model asks for, not what kernels add to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llmsim.cost import CostModel
    from llmsim.hardware import Gpu
    from llmsim.prices import Price
    from llmsim.scenario import Scenario

ROWS_AT_ONCE = 1 << 18
Columns = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]


def utilisation(
    iterations: Columns,
    scenario: Scenario,
    cost: CostModel,
    kv_blocks: int,
    duration_s: float,
    *,
    output_tokens: int,
    input_tokens: int,
    price: Price | None = None,
) -> dict[str, Any]:
    from llmsim.hardware import find_gpu
    from llmsim.prices import find_price

    gpu, price = find_gpu(scenario.gpu), price or find_price(scenario.gpu)
    busy_s, active_s = busy_seconds(iterations), active_seconds(iterations)
    gpus = scenario.replicas * scenario.tensor_parallel
    gpu_hours = gpus * duration_s / 3600.0
    dollars = gpu_hours * price.usd_per_gpu_hour
    replica_s = scenario.replicas * duration_s
    return {
        "kv_cache_usage_perc": _kv_usage(iterations, active_s, kv_blocks, replica_s),
        "kv_token_share": _kv_tokens(iterations, active_s, max(kv_blocks - 1, 1) * scenario.block_size, replica_s),
        "batch_size": _batch_size(iterations),
        "iterations": int(iterations["iterations"].sum()),
        "gpu_busy_frac": _ratio(busy_s.sum(), scenario.replicas * duration_s),
        **_work(iterations, scenario, gpu, busy_s, active_s),
        "tokens_per_s_per_gpu": _ratio(output_tokens, gpus * duration_s),
        "price_per_gpu_hour": price.usd_per_gpu_hour,
        "price": str(price),
        "cost_per_1m_output_tokens": _ratio(1e6 * dollars, output_tokens),
        "cost_per_1m_total_tokens": _ratio(1e6 * dollars, output_tokens + input_tokens),
        "replicas": scenario.replicas,
        "gpus": gpus,
        "gpu_hours": gpu_hours,
        "calibration": _calibration(cost),
        "extrapolated": extrapolated(iterations, cost, busy_s, scenario.async_scheduling),
    }


def _calibration(cost: CostModel) -> dict[str, Any]:
    """What the result rests on; for a profile also the hash of its content and the errors it was measured to have."""
    profile = getattr(cost, "profile", None)
    return {
        "id": None if profile is None else profile.id,
        "kind": cost.kind,
        "label": cost.label,
        "error": None if profile is None else dict(profile.error),
    }


def busy_seconds(iterations: Columns) -> Floats:
    """GPU seconds of each row."""
    n = iterations["iterations"]
    busy_s: Floats = n * iterations["gpu_first_s"] + iterations["gpu_growth_s"] * (n * (n - 1) / 2)
    return busy_s


def active_seconds(iterations: Columns) -> Floats:
    """Seconds each row had its GPU to itself: from its start, or the end of the row before it if that is later (under
    asynchronous scheduling the next iteration is scheduled while this one runs), to its end."""
    begin_s: Floats = iterations["start_s"].copy()
    order = np.lexsort((iterations["gpu_end_s"], iterations["replica"]))
    before, after = order[:-1], order[1:]
    same = iterations["replica"][before] == iterations["replica"][after]
    begin_s[after] = np.where(same, np.maximum(begin_s[after], iterations["gpu_end_s"][before]), begin_s[after])
    active_s: Floats = iterations["gpu_end_s"] - begin_s
    return active_s


def extrapolated(iterations: Columns, cost: CostModel, busy_s: Floats, asynchronous: bool = True) -> float | None:
    """Profiles come from recordings of asynchronous scheduling; without it every iteration is outside."""
    if cost.kind != "profile":
        return None
    if not asynchronous:
        return 1.0 if busy_s.sum() else None
    return _ratio(busy_s[np.asarray(cost.outside_measured(iterations), dtype=bool)].sum(), busy_s.sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _kv_usage(iterations: Columns, active_s: Floats, kv_blocks: int, replica_s: float) -> dict[str, float | None]:
    usable = max(kv_blocks - 1, 1)
    blocks = iterations["kv_blocks"]
    return {
        "mean": _ratio((blocks * active_s).sum(), usable * replica_s),
        "max": float(blocks.max()) / usable if blocks.size else None,
    }


def _kv_tokens(iterations: Columns, active_s: Floats, usable_tokens: int, replica_s: float) -> float | None:
    decodes = iterations["kv_tokens"] + iterations["seqs"] * (iterations["iterations"] - 1) / 2
    tokens = decodes + iterations["prefill_context"] + iterations["prefill_tokens"]
    return _ratio((tokens * active_s).sum(), usable_tokens * replica_s)


def _batch_size(iterations: Columns) -> dict[str, float | None]:
    sizes = (iterations["seqs"] + iterations["prefill_requests"]).astype(np.int64)
    times = iterations["iterations"]
    total = int(times.sum())
    if not total:
        return {"mean": None, "p50": None, "p99": None}
    ends = np.cumsum(np.bincount(sizes, weights=times))  # iterations of at most this many requests

    def percentile(percent: float) -> float:
        rank = (total - 1) * percent / 100.0
        low, high = np.searchsorted(ends, [int(rank), min(int(rank) + 1, total - 1)], side="right").tolist()
        return float(low + (high - low) * (rank - int(rank)))

    return {"mean": float((sizes * times).sum() / total), "p50": percentile(50), "p99": percentile(99)}


def _work(iterations: Columns, scenario: Scenario, gpu: Gpu, busy_s: Floats, active_s: Floats) -> dict[str, Any]:
    from llmsim.hardware import find_model

    totals = _phase_totals(iterations, scenario, busy_s, active_s)
    weights = find_model(scenario.model).weight_format(scenario.weight_dtype)
    peak_flops_per_s = gpu.flops_per_s[gpu.compute_dtype(weights)]
    peak_bytes_per_s = gpu.bandwidth_bytes_per_s
    all_busy_s = sum(float(total[2]) for total in totals.values())
    phases: dict[str, Any] = {}
    for name, (flops, moved_bytes, seconds, under_way_s) in totals.items():
        if not seconds:
            continue
        compute_s, memory_s = flops / peak_flops_per_s, moved_bytes / peak_bytes_per_s
        waited = 1.0 - seconds / max(under_way_s, seconds)
        phases[name] = {
            "share_of_busy": seconds / all_busy_s,
            "mfu": compute_s / seconds,
            "mbu": memory_s / seconds,
            "gpu_waited_frac": waited,
            "bottleneck": "host" if waited > 0.5 else "compute" if compute_s > memory_s else "memory bandwidth",
        }
    main = max(phases, key=lambda name: phases[name]["share_of_busy"], default=None)
    return {
        "mfu": _ratio(sum(total[0] for total in totals.values()) / peak_flops_per_s, all_busy_s),
        "mbu": _ratio(sum(total[1] for total in totals.values()) / peak_bytes_per_s, all_busy_s),
        "phases": phases,
        "bottleneck": None if main is None else f"{main} {phases[main]['bottleneck']}",
    }


def _phase_totals(
    iterations: Columns, scenario: Scenario, busy_s: Floats, active_s: Floats
) -> dict[str, tuple[float, float, float, float]]:
    """By phase: FLOPs, bytes, busy seconds, seconds under way. In parts: the work of a row takes many temporaries."""
    from llmsim.cost.roofline import work
    from llmsim.hardware import find_model

    model = find_model(scenario.model)
    sums = {"prefill": np.zeros(4), "decode": np.zeros(4)}
    for first in range(0, busy_s.size, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        flops, moved_bytes = work(model, scenario, {name: column[part] for name, column in iterations.items()})
        prefill = iterations["prefill_tokens"][part] > 0
        for name, rows in (("prefill", prefill), ("decode", ~prefill)):
            columns = (flops, moved_bytes, busy_s[part], active_s[part])
            sums[name] += [float(column[rows].sum()) for column in columns]
    return {name: (float(a), float(b), float(c), float(d)) for name, (a, b, c, d) in sums.items()}
