"""`llmsim speculation`: at which batch size speculative decoding stops paying."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import CONTEXT, INT, SectionedCommand, json_option, scenario_from, scenario_options
from llmsim.scenario_file import human_int
from llmsim.text import wrapped

if TYPE_CHECKING:
    from llmsim.speculation import Table

LARGEST_BATCH = 65536


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@scenario_options
@click.option("--context", "context_tokens", type=INT, default=1024, help="Cached tokens of each request. [1024]")
@click.option("--batch", "batches", metavar="N,N,…", help="Batches to show. [1, 2, 4 … 512]")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Speedup by batch: .html, .svg or .png.")
@json_option
def speculation(context_tokens: int, batches: str | None, plot: Path | None, as_json: bool, **flags: Any) -> None:
    """Decode steps with and without drafts, by batch size.

    \b
    llmsim speculation --model llama-3.1-8b --gpu h200-sxm
      --speculative-config '{"method": "eagle", "num_speculative_tokens": 3, "acceptance": 0.7}'
    """
    from llmsim.speculation import table

    if plot is not None:
        from llmsim.charts import check_plot

        check_plot(plot)
    try:
        sizes = [human_int(word.strip()) for word in batches.split(",")] if batches else []
    except ValueError:
        raise ValueError(f"batch={batches}: give whole numbers with commas between, as in 1,8,64") from None
    if any(size < 1 for size in sizes):
        raise ValueError(f"batch={batches}: a batch has 1 request or more")
    if max(sizes, default=1) > LARGEST_BATCH:
        raise ValueError(f"batch={batches}: no engine runs that many requests at once: give at most {LARGEST_BATCH}")
    found = table(scenario_from(flags), context_tokens, sizes)
    if plot is not None:
        from llmsim.charts import save, speedup

        save(speedup(found.to_dict()["rows"], title=_title(found)), plot)
    click.echo(json.dumps(found.to_dict()) if as_json else "\n".join(report(found)))


def _title(found: Table) -> str:
    own, s = found.speculation, found.scenario
    drafter = f"{own.method} {own.model}" if own.model else own.method
    return f"{s.model} on {s.gpu}: {own.drafts} drafts by {drafter}, {found.context_tokens:,} tokens of context"


def report(found: Table) -> Iterator[str]:
    yield f"{_title(found)}, {found.speculation.tokens_per_step:.2f} tokens a verification"
    yield ""
    yield f"{'batch':>6}{'step (ms)':>12}{'with drafts (ms)':>18}{'speedup':>10}{'best drafts':>13}{'speedup':>10}"
    for row in found.rows:
        yield (
            f"{row.batch:>6}{1e3 * row.without_s:>12.2f}{1e3 * row.with_s:>18.2f}{row.speedup:>10.2f}"
            f"{row.best_drafts:>13}{row.best_speedup:>10.2f}"
        )
    yield ""
    most = found.scenario.max_num_seqs
    if not found.pays_up_to:
        yield "It does not even pay for a single request."
    elif found.pays_up_to == most:
        yield f"It pays at every batch up to max_num_seqs={most}."
    else:
        yield f"It pays up to a batch of {found.pays_up_to}."
    yield from wrapped(f"Cost model: {found.label}")
