"""`llmsim phases`: prefill and decode of one model on one GPU, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import CONTEXT, INT, SectionedCommand, json_option, scenario_from, scenario_options
from llmsim.scenario_file import human_int

if TYPE_CHECKING:
    from llmsim.phases import Growth, Phases, Point, Served

WIDTH = 118


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@scenario_options
@click.option("--prompt", "prompt_tokens", type=INT, default=1024, help="Tokens of a request's prompt. [1024]")
@click.option("--output", "output_tokens", type=INT, default=256, help="Tokens of its answer. [256]")
@click.option("--batch", "batches", metavar="N,N,…", help="Decode batches. [1,8,64,256, as far as they fit]")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The roofline with both phases: .html, .svg or .png.",
)
@json_option
def phases(
    prompt_tokens: int, output_tokens: int, batches: str | None, plot: Path | None, as_json: bool, **flags: Any
) -> None:
    """Compare prefill and decode: work, intensity, what binds them, and how their times grow.

    Decodes are shown half-way through the answer. --concurrency: clients of the loaded engine. [64, or what fits]

    \b
    llmsim phases --model llama-3.1-8b --gpu h200-sxm --plot roofline.html
    """
    scenario = scenario_from(flags)
    if plot is not None:
        from llmsim.charts import check_plot

        check_plot(plot)
    from llmsim.phases import compare

    outcome = compare(
        scenario, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batches=_batches(batches or "")
    )
    if plot is not None:
        _draw(outcome, plot)
    click.echo(json.dumps(outcome.to_dict()) if as_json else "\n".join(_report(outcome)))


def _batches(text: str) -> list[int]:
    try:
        return [human_int(word.strip()) for word in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"batch={text}: give whole numbers with commas between, as in 1,8,64") from None


def _draw(outcome: Phases, path: Path) -> None:
    from llmsim.charts import roofline, save

    gpus = f"{outcome.tensor_parallel} × " if outcome.tensor_parallel > 1 else ""
    chart = roofline(
        outcome.frame(),
        peak_flops_per_s=outcome.peak_flops_per_s,
        peak_bytes_per_s=outcome.peak_bytes_per_s,
        title=f"Prefill and decode of {outcome.model} ({outcome.weight_dtype}) on {gpus}{outcome.gpu}",
        subtitle=outcome.cost_label.partition(", median error")[0],
    )
    save(chart, path)


# of a column of the table
ROWS: tuple[tuple[str, Callable[[Point], str]], ...] = (
    ("tokens of a request at once", lambda p: f"{p.parallel_tokens:,}"),
    ("GFLOP per token", lambda p: _digits(p.flops_per_token / 1e9)),
    ("MB per token", lambda p: _digits(p.bytes_per_token / 1e6)),
    ("intensity (FLOP/byte)", lambda p: _digits(p.intensity_flops_per_byte)),
    ("binds", lambda p: p.binds),
    ("  so many times as much", lambda p: _digits(p.bound_ratio)),
    ("TFLOP/s", lambda p: _digits(p.flops_per_s / 1e12)),
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


def _report(outcome: Phases) -> Iterator[str]:
    decodes, growth = outcome.of_phase("decode"), outcome.growth
    yield from _wrapped(
        f"{outcome.model}, weights in {outcome.weight_dtype}, on {outcome.tensor_parallel} x {outcome.gpu}: each GPU "
        f"{outcome.peak_flops_per_s / 1e12:,.4g} TFLOP/s and {outcome.peak_bytes_per_s / 1e12:.3g} TB/s, ridge point "
        f"{outcome.ridge_flops_per_byte:.0f} FLOP/byte; {outcome.kv_cache_tokens:,} tokens of KV cache"
    )
    yield from _wrapped(f"Cost model: {outcome.cost_label}")
    yield from _wrapped(f"Outside the measured range: {_outside(outcome)}")
    yield ""
    columns = [[p.phase, f"{p.size:,}", *(text(p) for _, text in ROWS)] for p in outcome.points]
    equal = [[_count(e.bytes_context_tokens), _count(e.time_context_tokens)] for e in growth.equal_contexts]
    for column, cells in zip(columns, [["", ""]] * (len(columns) - len(equal)) + equal, strict=True):
        column += cells
    yield from _table(["", "prompt tokens, or batch", *(name for name, _ in ROWS), *EQUAL_ROWS], columns)
    yield from _wrapped(
        f"Of one GPU. Prefill: a prompt by itself. Decode: a step of so many requests, {decodes[0].context_tokens:,} "
        "tokens cached each. Paced by the host: its launch, not the GPU's work, decides when the step ends."
    )
    yield ""
    yield from _growth(outcome, growth)
    yield ""
    served = [[_clients(s.concurrency), *(text(s) for _, text in SERVED_ROWS)] for s in outcome.served]
    head = f"{outcome.prompt_tokens:,} + {outcome.output_tokens:,} tokens"
    yield from _table([head, *(name for name, _ in SERVED_ROWS)], served)
    yield ""
    yield from _wrapped(outcome.textbook)


def _growth(outcome: Phases, growth: Growth) -> Iterator[str]:
    half = growth.attention_half_tokens
    yield from _wrapped(
        f"With prompt length: linear layers {1e3 * growth.linear_s_per_1k_tokens:.2f} ms per 1,000 tokens (chunks of "
        f"{growth.chunk_tokens:,}), attention {1e3 * growth.attention_s_per_1k_tokens_squared:.3f} ms times the square "
        f"of the thousands; attention is half of the prefill "
        + (f"from {half:,} tokens" if half else "at no length of this model")
    )
    yield from _wrapped(
        f"With context: {1e3 * growth.decode_s_per_1k_cached_tokens:.4f} ms per step and 1,000 cached tokens"
    )
    here, linear = growth.step_compute_bound_batch, growth.linear_compute_bound_batch
    beyond = "" if linear and linear <= outcome.largest_batch else f", more than the {outcome.largest_batch:,} that fit"
    yield from _wrapped(
        f"With batch size: {_speeds(outcome.of_phase('decode'))} tokens/s; the linear layers turn from bandwidth- to "
        f"compute-bound at batch {_batch(linear)}{beyond} (at the data sheet's peaks at "
        f"{_batch(growth.linear_compute_bound_batch_at_peak)}), the whole step with its KV reads "
        + (f"at batch {here:,}" if here else f"never below the capacity of {outcome.largest_batch:,} requests")
    )


def _speeds(decodes: Sequence[Point]) -> str:
    return ", ".join(f"{p.tokens_per_s:,.0f}" for p in decodes)


def _batch(batch: int | None) -> str:
    from llmsim.phases import MOST_REQUESTS

    return f"{MOST_REQUESTS:,} or more" if batch is None else f"{batch:,}"


def _count(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _clients(concurrency: int) -> str:
    return "alone" if concurrency == 1 else f"closed loop of {concurrency:,}"


def _outside(outcome: Phases) -> str:
    outside = [f"{p.phase} {p.size:,}" for p in outcome.points if p.outside_measured]
    if len(outside) == len(outcome.points):
        return "every point"
    return ", ".join(outside) or "no point"


def _digits(value: float) -> str:
    """Three significant digits, none after the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(names: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, names)), *(max(map(len, column)) for column in columns)]
    for cells in zip(names, *columns, strict=True):
        yield "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, subsequent_indent="  ")
