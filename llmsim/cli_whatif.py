"""`llmsim whatif`: what each optimisation buys on a trace, in order, and why."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import (
    CONTEXT,
    INT,
    Known,
    SectionedCommand,
    json_option,
    scenario_from,
    scenario_options,
    tell,
    trace_arguments,
    trace_options,
)
from llmsim.text import aligned, wrapped

if TYPE_CHECKING:
    from llmsim.whatif import Effect, Outcome


def _names() -> list[str]:
    from llmsim.whatif_changes import CHANGES

    return [change.name for change in CHANGES]


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@click.argument("trace_path", metavar="TRACE")
@scenario_options
@trace_options
@click.option("--only", multiple=True, type=Known(_names), metavar="NAME", help="Only this change. Repeatable.")
@click.option("--skip", multiple=True, type=Known(_names), metavar="NAME", help="Not this change. Repeatable.")
@click.option("--prices", type=click.Path(path_type=Path), metavar="FILE", help="Dollars per GPU and hour. [llmsim's]")
@click.option("--jobs", type=INT, help="Processes. [one a core]")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON document there as well.")
@json_option
def whatif(
    trace_path: str,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    prices: Path | None,
    jobs: int | None,
    out: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Replay TRACE once as it is and once for every single optimisation taken away or added.

    \b
    llmsim whatif chat.csv --model llama-3.1-8b --gpu h200-sxm --rate 20
    """
    from llmsim.prices import find_price
    from llmsim.trace import load_trace
    from llmsim.whatif import what_if
    from llmsim.whatif_changes import chosen

    changes = chosen(only, skip)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: give 1 or more processes")
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.absolute().parent}")
    scenario = scenario_from(flags)
    resolved = scenario.resolved()
    price = find_price(resolved.gpu, prices)
    options = trace_arguments(flags)
    trace = load_trace(trace_path, **options, context_tokens=resolved.max_model_len, seed=scenario.seed)
    tell(trace.notes)
    processes = jobs or len(os.sched_getaffinity(0))
    outcome = what_if(trace, scenario, changes, price, jobs=processes, progress=_progress)
    document = json.dumps(outcome.to_dict(), allow_nan=False)
    if out is not None:
        out.write_text(document + "\n", encoding="utf-8")
    click.echo(document if as_json else "\n".join(report(outcome)))


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done} of {total} runs" if done < total else "\r\x1b[K", end="", file=sys.stderr, flush=True)


ORIGINS = {
    "recorded": "steps of the recorded engine",
    "kernels": "composed of kernels timed on the GPU, scaled from the recorded engine",
    "shapes": "scaled from the recorded engine by data-sheet shapes",
    "roofline": "data sheet only",
    "plain": "with unfused kernels timed on the GPU",
    "scaled": "on another GPU, scaled by bandwidth",
    "drafts": "with drafts, whose acceptance is assumed",
}
LOSSY = {"quantization", "kv_cache_dtype", "kv_compression"}  # what answers depend on
HEAD = ("gain", "optimisation", "", "TTFT", "TPOT", "tokens/s", "$/1M", "cost")


def report(outcome: Outcome) -> Iterator[str]:
    base, s = outcome.baseline, outcome.scenario
    gpus = f"{s.replicas * s.tensor_parallel} x {s.gpu}"
    yield from wrapped(
        f"Baseline: {s.model} on {gpus}, {outcome.trace}, {base.completed:,} requests: TTFT {1e3 * base.ttft_s:,.1f} "
        f"ms, TPOT {1e3 * base.tpot_s:.2f} ms, {base.tokens_per_s:,.0f} tokens/s, ${base.usd_per_1m_tokens:.3f} per "
        "million output tokens"
    )
    parts = sorted(base.terms_s.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {1e3 * s_:.2f}" for name, s_ in parts if abs(s_) >= 0.005 * base.gap_s)
    yield from wrapped(f"Its gaps between tokens, {1e3 * base.gap_s:.2f} ms: {shown}")
    yield ""
    rows = [(*HEAD, "why"), *((*_row(effect), effect.reason) for effect in outcome.effects)]
    yield from aligned(rows, left={1, 2, *range(7, len(HEAD) + 1)})
    yield ""
    yield from wrapped(
        "What each buys: the run with it over the run without. on: the baseline has it, and the other run goes "
        "without; +: the other run adds it. gain: geometric mean of the four."
    )
    origins = " + ".join(effect.changed.cost_origin for effect in outcome.effects)
    told = [f"{word}: {meaning}" for word, meaning in ORIGINS.items() if word in origins]
    yield from wrapped(f"Cost of the other run: {'; '.join(told)}")
    changed = [effect.about for effect in outcome.effects if LOSSY & effect.fields.keys()]
    if changed:
        yield from wrapped(f"Not modelled: what the model answers with {', '.join(changed)}")
    for name, why in outcome.left_out.items():
        yield from wrapped(f"Not run: {name}: {why}")
    yield from wrapped(f"Price: {outcome.price}")
    yield from wrapped(f"Cost model: {base.cost_label}")


def _row(effect: Effect) -> tuple[str, ...]:
    ratios = effect.ratios
    return (
        f"×{effect.gain:.2f}",
        effect.about,
        "on" if effect.on else "+",
        *(factor(ratios[name]) for name in ("ttft_s", "tpot_s", "tokens_per_s", "usd_per_1m_tokens")),
        effect.changed.cost_origin,
    )


def factor(ratio: float) -> str:
    """Small changes as per cent, large ones as factors."""
    if ratio != ratio:
        return "-"
    if 0.5 < ratio < 2.0:
        return f"{100 * (ratio - 1):+.1f} %"
    return f"×{ratio:.3g}" if ratio >= 1 else f"÷{1 / ratio:.3g}"
