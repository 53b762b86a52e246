"""A summary as people read it: the block `vllm bench serve` prints, line for line, then where the time went.

Every number is a key of `Result.summary()`, in the unit its line names; "-" stands for a number that does not exist.
A percentile is marked `*` when it rests on too few samples: the two-sided 95 % interval of the p-th percentile has both
ends among the samples only from n = ln(0.025) / ln(p) on (P99: 368, P95: 72, P90: 36), so below that the far tail was
possibly never seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, log
from textwrap import wrap
from typing import Any

from llmsim import groups

WIDTH = 50  # of vLLM's block
EXTRAPOLATED_WARNING = 0.05  # share of busy time outside the measured range from which a result is doubtful
LATENCIES = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
PRINTED_PERCENTS = (90, 95, 99)


def fewest_samples(percent: int) -> int:
    return ceil(log(0.025) / log(percent / 100))


def report(summary: dict[str, Any], footer: Sequence[str] = ()) -> str:
    """The whole block; `footer` lines (where the results are) close it."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "="), *_counts(summary)]
    for name, short, header in LATENCIES:
        lines += [header.center(WIDTH, "-"), *_latency(summary, name, short)]
    if any("*" in line for line in lines):
        needs = ", ".join(f"P{percent}: {fewest_samples(percent)}" for percent in PRINTED_PERCENTS)
        lines.append(f"* from too few samples to bound the percentile ({needs})")
    lines += [" Where it went ".center(WIDTH, "-"), *_where(summary), *_system(summary)]
    by_group = groups.lines(summary)
    if by_group:
        lines += [" Classes and tenants ".center(WIDTH, "-"), *by_group]
    lines += [" Trust ".center(WIDTH, "-"), *trust(summary), *footer]
    return "\n".join([*lines, "=" * WIDTH])


def _line(label: str, value: str) -> str:
    return f"{label:<40} {value:<10}".rstrip()


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _counts(summary: dict[str, Any]) -> Iterator[str]:
    yield _line("Successful requests:", str(summary["completed"]))
    yield _line("Failed requests:", str(summary["failed"]))
    if summary["max_concurrency"] is not None:
        yield _line("Maximum request concurrency:", str(summary["max_concurrency"]))
    yield _line("Benchmark duration (s):", _number(summary["duration"]))
    yield _line("Total input tokens:", str(summary["total_input_tokens"]))
    yield _line("Total generated tokens:", str(summary["total_output_tokens"]))
    yield _line("Request throughput (req/s):", _number(summary["request_throughput"]))
    if summary["request_goodput"] is not None:
        yield _line("Request goodput (req/s):", _number(summary["request_goodput"]))
    yield _line("Output token throughput (tok/s):", _number(summary["output_throughput"]))
    yield _line("Peak output token throughput (tok/s):", _number(summary["max_output_tokens_per_s"]))
    yield _line("Peak concurrent requests:", _number(summary["max_concurrent_requests"]))
    yield _line("Total token throughput (tok/s):", _number(summary["total_token_throughput"]))


def _latency(summary: dict[str, Any], name: str, short: str) -> Iterator[str]:
    yield _line(f"Mean {short} (ms):", _number(summary[f"mean_{name}_ms"]))
    yield _line(f"Median {short} (ms):", _number(summary[f"median_{name}_ms"]))
    for percent in PRINTED_PERCENTS:
        value = summary[f"p{percent}_{name}_ms"]
        mark = "*" if value is not None and summary["samples"][name] < fewest_samples(percent) else ""
        yield _line(f"P{percent} {short} (ms):", _number(value) + mark)


def _where(summary: dict[str, Any]) -> Iterator[str]:
    parts = ("queue", "prefill", "decode", "preempted")
    shares = " / ".join(_number(summary[f"{part}_ms"]["share_of_e2el"], 1, 100) for part in parts)
    yield _line("Queue / prefill / decode / preempted (%):", shares)
    if summary["slo"]:
        targets = " & ".join(f"{name}<={target:g}" for name, target in summary["slo"].items())
        yield _line(f"SLO attainment ({targets}):", _number(summary["slo_attainment"], 1, 100) + " %")
    yield _line("Preemptions:", str(summary["num_preemptions"]))
    yield _line("Prefix cache hit rate (%):", _number(summary["prefix_cache_hit_rate"], 1, 100))
    for tier in summary["kv_tiers"]:
        yield _line(f"Loaded from {tier['name']} (% of prompt tokens):", _number(tier["hit_rate"], 1, 100))
    usage = summary["kv_cache_usage_perc"]
    yield _line("KV cache usage mean / max (%):", f"{_number(usage['mean'], 1, 100)} / {_number(usage['max'], 1, 100)}")
    yield _line("Mean batch (requests/iteration):", _number(summary["batch_size"]["mean"], 1))


def _system(summary: dict[str, Any]) -> Iterator[str]:
    yield _line("GPU busy (%):", _number(summary["gpu_busy_frac"], 1, 100))
    yield _line("MFU / MBU while busy (%):", f"{_number(summary['mfu'], 1, 100)} / {_number(summary['mbu'], 1, 100)}")
    for name, phase in summary["phases"].items():
        share, waited = _number(phase["share_of_busy"], 0, 100), _number(phase["gpu_waited_frac"], 0, 100)
        text = f"{phase['bottleneck']} ({share} % of busy time; GPU waited {waited} %)"
        yield _line(f"Bottleneck of {name}:", text)
    fleet = f"{summary['replicas']} / {summary['gpus']} / {summary['gpu_hours']:.3g}"
    yield _line("Replicas / GPUs / GPU hours:", fleet)
    yield _line("Output tok/s/GPU:", _number(summary["tokens_per_s_per_gpu"]))
    yield _line("Output tok/s/user (median):", _number(summary["tokens_per_s_per_user"], 1))
    price = f"@ ${summary['price_per_gpu_hour']:.2f}/GPU hour"
    yield _line(f"$/1M output tokens ({price}):", _number(summary["cost_per_1m_output_tokens"]))


def trust(summary: dict[str, Any]) -> Iterator[str]:
    """What the numbers rest on, and how far they can be trusted."""
    yield f"Cost model: {summary['calibration']['label']}"
    share = summary["extrapolated"]
    if share is not None:
        warning = ": treat with care" if share > EXTRAPOLATED_WARNING else ""
        yield f"Outside the measured range: {share * 100:.1f} % of GPU time{warning}"
    for caveat in summary["caveats"]:
        yield from wrap(f"Caveat: {caveat}", 2 * WIDTH)
    for note in summary.get("assigned", ()):
        yield from wrap(note[0].upper() + note[1:], 2 * WIDTH)
    words = summary["stability"]
    yield from wrap(words[0].upper() + words[1:], 2 * WIDTH)
    simulated, wall_s = summary["duration"], summary["sim_wall_s"]
    speed = "" if summary["sim_speedup"] is None else f" ({summary['sim_speedup']:.0f}x)"
    yield f"Simulated {simulated:.1f} s in {wall_s:.2f} s{speed}, seed {summary['seed']}"
