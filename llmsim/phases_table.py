"""What `llmsim phases` prints, as text: its tables, a row a quantity with its unit in the name, and its sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsim.phases import MOST_REQUESTS

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.phases import Phases, Point, Served


@dataclass(frozen=True)
class Table:
    """`columns[i]` has a head and a text for each of `names`."""

    names: tuple[str, ...]
    heads: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]

    def frame(self) -> pd.DataFrame:
        """Names as index; leading spaces, which indent what is part of the row before, are kept."""
        import pandas as pd

        cells = dict(zip(self.heads, self.columns, strict=True))
        return pd.DataFrame(cells, index=pd.Index(self.names, name="quantity"))


ROWS: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("tokens of a request at once", lambda p: f"{p.parallel_tokens:,}"),
    ("GFLOP per token", lambda p: digits(p.flops_per_token / 1e9)),
    ("MB per token", lambda p: digits(p.bytes_per_token / 1e6)),
    ("intensity (FLOP/byte)", lambda p: digits(p.intensity_flops_per_byte)),
    ("binds", lambda p: p.binds),
    ("  so many times as much", lambda p: digits(p.bound_ratio)),
    ("TFLOP/s", lambda p: digits(p.flops_per_s / 1e12)),
    ("TB/s", lambda p: f"{p.bytes_per_s / 1e12:.2f}"),
    ("MFU (%)", lambda p: f"{100 * p.mfu:.1f}"),
    ("MBU (%)", lambda p: f"{100 * p.mbu:.1f}"),
    ("GPU time (ms)", lambda p: f"{1e3 * p.gpu_s:,.2f}"),
    ("  of it attention (%)", lambda p: f"{100 * p.attention_share:.1f}"),
    ("wall time (ms)", lambda p: f"{1e3 * p.wall_s:,.2f}"),
    ("  paced by", lambda p: p.paced_by),
    ("tokens/s", lambda p: f"{p.tokens_per_s:,.0f}"),
)
EQUAL_ROWS = ("KV bytes = weight bytes at context", "attention half of the step at")
SERVED_ROWS: tuple[tuple[str, Callable[[Served], str]], ...] = (
    ("TTFT (ms)", lambda s: f"{1e3 * s.ttft_s:,.1f}"),
    ("  GPU: its own prompt (%)", lambda s: f"{100 * s.own_prefill_s / s.ttft_s:.1f}"),
    ("  GPU: prompts beside it (%)", lambda s: f"{100 * s.other_prefills_s / s.ttft_s:.1f}"),
    ("  GPU: decodes beside it (%)", lambda s: f"{100 * s.decodes_beside_s / s.ttft_s:.1f}"),
    ("  waiting, host, client (%)", lambda s: f"{100 * s.waiting_and_host_s / s.ttft_s:.1f}"),
    ("TPOT (ms)", lambda s: "-" if s.tpot_s is None else f"{1e3 * s.tpot_s:.2f}"),
    ("E2EL (ms)", lambda s: f"{1e3 * s.e2el_s:,.1f}"),
    ("  queue (%)", lambda s: f"{100 * s.queue_share:.1f}"),
    ("  prefill (%)", lambda s: f"{100 * s.prefill_share:.1f}"),
    ("  decode (%)", lambda s: f"{100 * s.decode_share:.1f}"),
    ("  preempted (%)", lambda s: f"{100 * s.preempted_share:.1f}"),
    ("GPU time with prompts (%)", lambda s: f"{100 * s.prompt_iterations_share:.1f}"),
)


def points_table(outcome: Phases) -> Table:
    """Prefills, then decodes: of one GPU."""
    equal = [[_count(e.bytes_context_tokens), _count(e.time_context_tokens)] for e in outcome.growth.equal_contexts]
    blank = [["", ""]] * (len(outcome.points) - len(equal))  # of prefills
    return Table(
        names=("prompt tokens, or batch", *(name for name, _ in ROWS), *EQUAL_ROWS),
        heads=tuple(f"{p.phase} {p.size:,}" for p in outcome.points),
        columns=tuple(
            (f"{p.size:,}", *(text(p) for _, text in ROWS), *more)
            for p, more in zip(outcome.points, blank + equal, strict=True)
        ),
    )


def served_table(outcome: Phases) -> Table:
    """A request alone, and under the load of a closed loop."""
    return Table(
        names=tuple(name for name, _ in SERVED_ROWS),
        heads=tuple(_clients(s.concurrency) for s in outcome.served),
        columns=tuple(tuple(text(s) for _, text in SERVED_ROWS) for s in outcome.served),
    )


BESIDE = (
    "binds",
    "intensity (FLOP/byte)",
    "MFU (%)",
    "MBU (%)",
    "GPU time (ms)",
    "wall time (ms)",
    "paced by",
    "tokens/s",
)


def beside(prefill: Point, decode: Point) -> pd.DataFrame:
    """One point of each phase, in the words of `points_table`."""
    import pandas as pd

    rows = {name.strip(): text for name, text in ROWS}
    heads = (f"prefill, {prefill.size:,} tokens", f"decode, batch {decode.size:,}")
    columns = {
        head: [rows[name](point) for name in BESIDE] for head, point in zip(heads, (prefill, decode), strict=True)
    }
    return pd.DataFrame(columns, index=pd.Index(BESIDE, name="of one GPU"))


def setting(outcome: Phases) -> tuple[str, ...]:
    """What was compared, on what, by which cost model."""
    return (
        f"{outcome.model}, weights in {outcome.weight_dtype}, on {outcome.tensor_parallel} x {outcome.gpu}: each GPU "
        f"{outcome.peak_flops_per_s / 1e12:,.4g} TFLOP/s and {outcome.peak_bytes_per_s / 1e12:.3g} TB/s, ridge point "
        f"{outcome.ridge_flops_per_byte:.0f} FLOP/byte; {outcome.kv_cache_tokens:,} tokens of KV cache",
        f"Cost model: {outcome.cost_label}",
        f"Outside the measured range: {_outside(outcome)}",
    )


def legend(outcome: Phases) -> str:
    """What the columns of `points_table` are."""
    return (
        "Of one GPU. Prefill: a prompt by itself. Decode: a step of so many requests, "
        f"{outcome.of_phase('decode')[0].context_tokens:,} tokens cached each. Paced by the host: its launch, not the "
        "GPU's work, decides when the step ends."
    )


def served_legend(outcome: Phases) -> str:
    """What the columns of `served_table` are."""
    return (
        f"Means of requests of {outcome.prompt_tokens:,} prompt and {outcome.output_tokens:,} answer tokens: one "
        "alone, and an engine that always has as many under way. Shares of TTFT, of E2EL, and of the GPU's busy time."
    )


def growing(outcome: Phases) -> tuple[str, ...]:
    """How times grow with prompt length, context and batch size, a sentence each."""
    growth = outcome.growth
    half = growth.attention_half_tokens
    here, linear = growth.step_compute_bound_batch, growth.linear_compute_bound_batch
    beyond = "" if linear and linear <= outcome.largest_batch else f", more than the {outcome.largest_batch:,} that fit"
    return (
        f"With prompt length: linear layers {1e3 * growth.linear_s_per_1k_tokens:.2f} ms per 1,000 tokens (chunks of "
        f"{growth.chunk_tokens:,}), attention {1e3 * growth.attention_s_per_1k_tokens_squared:.3f} ms times the square "
        f"of the thousands; attention is half of the prefill "
        + (f"from {half:,} tokens" if half else "at no length of this model"),
        f"With context: {1e3 * growth.decode_s_per_1k_cached_tokens:.4f} ms per step and 1,000 cached tokens",
        f"With batch size: {_speeds(outcome.of_phase('decode'))} tokens/s; the linear layers turn from bandwidth- to "
        f"compute-bound at batch {_batch(linear)}{beyond} (at the data sheet's peaks at "
        f"{_batch(growth.linear_compute_bound_batch_at_peak)}), the whole step with its KV reads "
        + (f"at batch {here:,}" if here else f"never below the capacity of {outcome.largest_batch:,} requests"),
    )


def _speeds(decodes: Sequence[Point]) -> str:
    return ", ".join(f"{p.tokens_per_s:,.0f}" for p in decodes)


def _batch(batch: int | None) -> str:
    return f"{MOST_REQUESTS:,} or more" if batch is None else f"{batch:,}"


def _outside(outcome: Phases) -> str:
    outside = [f"{p.phase} {p.size:,}" for p in outcome.points if p.outside_measured]
    if len(outside) == len(outcome.points):
        return "every point"
    return ", ".join(outside) or "no point"


def _count(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _clients(concurrency: int) -> str:
    return "alone" if concurrency == 1 else f"closed loop of {concurrency:,}"


def digits(value: float) -> str:
    """Three significant digits, none after the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
