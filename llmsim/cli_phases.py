"""`llmsim phases`: prefill and decode of one model on one GPU, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_options import CONTEXT, INT, SectionedCommand, json_option, scenario_from, scenario_options
from llmsim.scenario_file import human_int
from llmsim.text import aligned, wrapped

if TYPE_CHECKING:
    from llmsim.phases import Phases
    from llmsim.scenario import Scenario


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@scenario_options
@click.option("--prompt", "prompt_tokens", type=INT, default=1024, help="Tokens of a request's prompt. [1024]")
@click.option("--output", "output_tokens", type=INT, default=256, help="Tokens of its answer. [256]")
@click.option("--batch", "batches", metavar="N,N,…", help="Decode batches. [1,8,64,256, as far as they fit]")
@click.option(
    "--context", "context_tokens", type=INT, help="Cached tokens of each decode. [half-way through the answer]"
)
@click.option("--burst", "prompts", type=INT, help="Also: so many prompts at once, cut into chunks beside --decodes.")
@click.option("--decodes", type=INT, default=16, help="Requests that decode when the burst comes. [16]")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The roofline with both phases: .html, .svg or .png.",
)
@json_option
def phases(
    prompt_tokens: int,
    output_tokens: int,
    batches: str | None,
    context_tokens: int | None,
    prompts: int | None,
    decodes: int,
    plot: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare prefill and decode: work, intensity, what binds them, and how their times grow.

    --concurrency: clients of the loaded engine. [64, or what fits]

    \b
    llmsim phases --model llama-3.1-8b --gpu h200-sxm --plot roofline.html
    """
    scenario = scenario_from(flags)
    if plot is not None:
        from llmsim.charts import check_plot

        check_plot(plot)
    from llmsim.phases import compare

    outcome = compare(
        scenario,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batches=_batches(batches or ""),
        context_tokens=context_tokens,
    )
    met = None
    if prompts is not None:
        context = outcome.of_phase("decode")[0].context_tokens
        met = _met(scenario, prompts=prompts, prompt_tokens=prompt_tokens, decodes=decodes, context_tokens=context)
    if plot is not None:
        _draw(outcome, plot)
    if as_json:
        click.echo(json.dumps(outcome.to_dict() | ({} if met is None else {"burst": met})))
    else:
        click.echo("\n".join([*_report(outcome), *([] if met is None else _burst_report(met))]))


def _met(scenario: Scenario, **of: int) -> dict[str, Any]:
    """A burst at the scenario's token budget, and at others."""
    from llmsim.metrics import json_safe
    from llmsim.phases_burst import budgets, burst

    met: dict[str, Any] = json_safe(burst(scenario, **of).facts())
    return met | {"budgets": json_safe(budgets(scenario, **of).to_dict("records"))}


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


def _report(outcome: Phases) -> Iterator[str]:
    from llmsim.phases_table import growing, legend, points_table, served_table, setting

    for line in setting(outcome):
        yield from wrapped(line)
    yield ""
    table = points_table(outcome)
    columns = [[p.phase, *column] for p, column in zip(outcome.points, table.columns, strict=True)]
    yield from aligned(list(zip(["", *table.names], *columns, strict=True)), left={0})
    yield from wrapped(legend(outcome))
    yield ""
    for line in growing(outcome):
        yield from wrapped(line)
    yield ""
    served = served_table(outcome)
    head = f"{outcome.prompt_tokens:,} + {outcome.output_tokens:,} tokens"
    columns = [[top, *column] for top, column in zip(served.heads, served.columns, strict=True)]
    yield from aligned(list(zip([head, *served.names], *columns, strict=True)), left={0})
    yield ""
    yield from wrapped(outcome.textbook)


def _burst_report(met: dict[str, Any]) -> Iterator[str]:
    def ms(row: dict[str, Any], name: str) -> str:
        return "-" if row[name] is None else f"{1e3 * row[name]:,.1f}"

    yield ""
    yield from wrapped(
        f"A burst of {met['prompts']:,} prompts of {met['prompt_tokens']:,} tokens that meets {met['decodes']:,} "
        f"decodes of {met['context_tokens']:,} cached, by token budget (max_num_batched_tokens), of which "
        f"{met['token_budget']:,} cuts it into {met['chunks']:,} chunks; times in ms, the longest gap between two "
        "tokens until the last first token"
    )
    rows = sorted([met, *(row for row in met["budgets"] if row["token_budget"] != met["token_budget"])], key=_budget)
    columns = [
        [
            f"{_budget(row):,}",
            f"{row['iterations']:,}",
            *(ms(row, f"{name}_s") for name in ("mean_ttft", "last_ttft", "longest_gap")),
        ]
        for row in rows
    ]
    names = ["token budget", "iterations", "mean TTFT", "last TTFT", "longest gap"]
    yield from aligned(list(zip(names, *columns, strict=True)), left={0})


def _budget(row: dict[str, Any]) -> int:
    return int(row["token_budget"])
