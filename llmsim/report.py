"""A summary as people read it: the block `vllm bench serve` prints, line for line, then where the time went.

Every number is a key of `Result.summary()`, in the unit its line names; "-" stands for a number that does not exist.
A percentile is marked `*` when it rests on too few samples: the two-sided 95 % interval of the p-th percentile has both
ends among the samples only from n = ln(0.025) / ln(p) on (P99: 368, P95: 72, P90: 36), so below that the far tail was
possibly never seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from llmsim import groups
from llmsim.metrics import fewest_samples
from llmsim.text import CROSS, TICK

WIDTH = 50  # of vLLM's block
EXTRAPOLATED_WARNING = 0.05  # share of busy time outside the measured range from which a result is doubtful
LATENCIES = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
PRINTED_PERCENTS = (90, 95, 99)


def report(summary: dict[str, Any], footer: Sequence[str] = ()) -> str:
    """The whole block; `footer` lines (where the results are) close it."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "="), *_counts(summary)]
    for name, short, header in LATENCIES:
        lines += [header.center(WIDTH, "-"), *_latency(summary, name, short)]
    if any("*" in line for line in lines):
        needs = ", ".join(f"P{percent}: {fewest_samples(percent)}" for percent in PRINTED_PERCENTS)
        lines.append(f"* from too few samples to bound the percentile ({needs})")
    lines += [" Where it went ".center(WIDTH, "-"), *_where(summary), *_system(summary)]
    if "intervals" in summary:
        lines += [" How sure ".center(WIDTH, "-"), *_how_sure(summary["intervals"])]
    by_group = groups.lines(summary)
    if by_group:
        lines += [" Classes and tenants ".center(WIDTH, "-"), *by_group]
    lines += [" Trust ".center(WIDTH, "-"), *trust(summary), *footer]
    return "\n".join([*lines, "=" * WIDTH])


def _line(label: str, value: str, interval: str = "") -> str:
    return f"{label:<40} {value:<10} {interval}".rstrip()


def _interval(summary: dict[str, Any], key: str, digits: int = 2, scale: float = 1.0) -> str:
    """[low, high], where intervals were asked for."""
    ends = summary.get("intervals", {}).get("intervals", {}).get(key)
    return "" if ends is None else f"[{ends[0] * scale:.{digits}f}, {ends[2] * scale:.{digits}f}]"


def _held(summary: dict[str, Any], label: str, key: str, digits: int = 2) -> str:
    """A number of the summary, and its interval."""
    return _line(label, _number(summary[key], digits), _interval(summary, key, digits))


def _number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def _counts(summary: dict[str, Any]) -> Iterator[str]:
    yield _line("Successful requests:", str(summary["completed"]))
    yield _line("Failed requests:", str(summary["failed"]))
    if summary["max_concurrency"] is not None:
        yield _line("Maximum request concurrency:", str(summary["max_concurrency"]))
    yield _held(summary, "Benchmark duration (s):", "duration")
    yield _line("Total input tokens:", str(summary["total_input_tokens"]))
    yield _line("Total generated tokens:", str(summary["total_output_tokens"]))
    yield _held(summary, "Request throughput (req/s):", "request_throughput")
    if summary["request_goodput"] is not None:
        yield _held(summary, "Request goodput (req/s):", "request_goodput")
    yield _held(summary, "Output token throughput (tok/s):", "output_throughput")
    yield _line("Peak output token throughput (tok/s):", _number(summary["max_output_tokens_per_s"]))
    yield _line("Peak concurrent requests:", _number(summary["max_concurrent_requests"]))
    yield _held(summary, "Total token throughput (tok/s):", "total_token_throughput")


def _latency(summary: dict[str, Any], name: str, short: str) -> Iterator[str]:
    for word in ("mean", "median"):
        yield _held(summary, f"{word.capitalize()} {short} (ms):", f"{word}_{name}_ms")
    for percent in PRINTED_PERCENTS:
        key = f"p{percent}_{name}_ms"
        value, interval = summary[key], _interval(summary, key)
        mark = "*" if value is not None and summary["samples"][name] < fewest_samples(percent) else ""
        yield _line(f"P{percent} {short} (ms):", _number(value) + mark, interval and interval + mark)


def _where(summary: dict[str, Any]) -> Iterator[str]:
    parts = ("queue", "prefill", "decode", "preempted")
    shares = " / ".join(_number(summary[f"{part}_ms"]["share_of_e2el"], 1, 100) for part in parts)
    yield _line("Queue / prefill / decode / preempted (%):", shares)
    if summary["slo"]:
        targets = " & ".join(f"{name}<={target:g}" for name, target in summary["slo"].items())
        attained = _interval(summary, "slo_attainment", 1, 100)
        yield _line(f"SLO attainment ({targets}):", _number(summary["slo_attainment"], 1, 100) + " %", attained)
    for promise in summary.get("promises", ()):
        yield _line(f"{promise['words']}:", f"{TICK if promise['met'] else CROSS} {promise['shown']}")
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
    yield _held(summary, "Output tok/s/GPU:", "tokens_per_s_per_gpu")
    yield _held(summary, "Output tok/s/user (median):", "tokens_per_s_per_user", 1)
    yield _held(summary, "$/1M output tokens:", "cost_per_1m_output_tokens")


def _how_sure(found: dict[str, Any]) -> Iterator[str]:
    """What the intervals are of, and the probabilities that go with them: shares of the draws."""
    draws = found["draws"]
    for share, chance in found.get("attaining", {}).items():
        yield _line(f"P({100 * float(share):g} % of requests meet the targets):", _chance(chance, draws))
    promised = found.get("probability", {"each": {}, "all": 0.0})
    for name, chance in promised["each"].items():
        yield _line(f"P({name}):", _chance(chance, draws))
    if len(promised["each"]) > 1:
        yield _line("P(all of these SLOs are met):", _chance(promised["all"], draws))
    words = f"[low, high] holds {100 * found['level']:g} % of what {found['of']}, may give: {draws} draws"
    yield from wrap(f"{words}. Rests on {found['sources']['basis']}", 2 * WIDTH)


def _chance(share: float, draws: int) -> str:
    return f"{100 * share:.0f} % ({round(share * draws)} of {draws} draws)"


def trust(summary: dict[str, Any]) -> Iterator[str]:
    """What the numbers rest on, and how far they can be trusted."""
    if "price" in summary:  # runs of llmsim before it was kept have none
        yield from wrap(f"Price: {summary['price']}", 2 * WIDTH)
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
