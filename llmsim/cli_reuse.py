"""`llmsim trace reuse`: how much of a trace a prefix cache finds, by its size and its eviction policy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsim.cli_list import table
from llmsim.cli_options import CONTEXT, MODEL, Known, builtins_of, json_option, tell, trace_arguments, trace_options
from llmsim.scenario_file import human_int

if TYPE_CHECKING:
    from llmsim.reuse import Point
    from llmsim.trace import Trace

SIZES = (1000, 3000, 10_000, 30_000, 50_000, 100_000)  # the Mooncake paper's, and one more
GIB = 2**30


@click.command(context_settings=CONTEXT)
@click.argument("path", metavar="TRACE")
@click.option(
    "--cache-blocks", metavar="N,…", help="Sizes, in the trace's blocks; inf: room for all. [1000…100000,inf]"
)
@click.option(
    "--eviction", "evictions", multiple=True, type=Known(builtins_of("llmsim.eviction")), metavar="NAME",
    help="Policy, or your own file.py:Class. Repeatable. [all built-in ones]",
)  # fmt: skip
@click.option("--eviction-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="For the policy, if it is one.")
@click.option("--model", type=MODEL, metavar="NAME", help="Add the GiB that a cache takes for this model's bf16 KV.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the curves (.html, .svg, .png).")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write every point as CSV.")
@trace_options
@json_option
def reuse(
    path: str, cache_blocks: str | None, evictions: tuple[str, ...], arguments: tuple[str, ...], model: str | None,
    plot: Path | None, out: Path | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Report the share of TRACE's prompt blocks that a prefix cache finds, by its size and its eviction policy.

    \b
    llmsim trace reuse conversation_trace.jsonl --cache-blocks 1000,10000,inf --eviction lru --eviction belady
    """
    from llmsim.eviction import BUILTIN
    from llmsim.reuse import UNLIMITED, curves
    from llmsim.trace import load_trace

    if plot is not None:
        from llmsim.charts import check_plot

        check_plot(plot)
    names = list(dict.fromkeys(evictions)) or list(BUILTIN)
    given = _arguments(arguments, names)
    trace = load_trace(path, **trace_arguments(flags))
    tell(trace.notes)
    sizes = _sizes(cache_blocks, trace)
    points = curves(trace, sizes, names, given)
    if plot is not None:
        unlimited = next((p for p in points if p.cache_blocks == UNLIMITED), None)
        _draw(points, (unlimited or curves(trace, [UNLIMITED], ["lru"])[0]).hit_ratio, trace, plot)
    if out is not None:
        _write(points, trace, out)
    rows = _rows(points, sizes, names, trace, model)
    click.echo(json.dumps(rows) if as_json else table(rows))


def _arguments(words: tuple[str, ...], names: list[str]) -> dict[str, Any]:
    from llmsim.cli_options import _argument

    if words and len(names) != 1:
        raise ValueError(f"--eviction-arg {words[0]}: is for one policy, not {len(names)}: give one --eviction")
    return dict(_argument("eviction_args", word) for word in words)


def _sizes(text: str | None, trace: Trace) -> list[int]:
    """Numbers of blocks, smallest first, UNLIMITED last."""
    from llmsim.reuse import UNLIMITED, distinct_blocks

    if text is None:
        longest = max((len(ids) for ids in trace.block_ids or ()), default=0)
        all_blocks = distinct_blocks(trace) if trace.block_ids is not None else 0
        return [size for size in SIZES if longest <= size < all_blocks] + [UNLIMITED]
    sizes = set()
    for word in text.split(","):
        size = UNLIMITED if word.strip() == "inf" else human_int(word.strip())
        if size < 1 and word.strip() != "inf":
            raise ValueError(f"--cache-blocks {word}: give whole numbers of blocks above 0, or inf")
        sizes.add(size)
    return sorted(sizes, key=lambda size: (size == UNLIMITED, size))


def _rows(
    points: list[Point], sizes: list[int], names: list[str], trace: Trace, model: str | None
) -> list[dict[str, Any]]:
    from llmsim.hardware import find_model
    from llmsim.reuse import UNLIMITED

    ratio = {(point.eviction, point.cache_blocks): point.hit_ratio for point in points}
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"blocks": "inf" if size == UNLIMITED else size}
        if model is not None:
            block_bytes = find_model(model).kv_bytes_per_token("bfloat16") * trace.block_tokens
            row["gib"] = None if size == UNLIMITED else round(size * block_bytes / GIB, 1)
        rows.append(row | {name: round(ratio[name, size], 4) for name in names})
    return rows


def _write(points: list[Point], trace: Trace, out: Path) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["eviction", "cache_blocks", "cache_tokens", "hit_blocks", "prompt_blocks", "hit_ratio"])
        for p in points:
            size = (p.cache_blocks, p.cache_blocks * trace.block_tokens) if p.cache_blocks else ("inf", "inf")
            writer.writerow([p.eviction, *size, p.hit_blocks, p.prompt_blocks, f"{p.hit_ratio:.6f}"])


def _draw(points: list[Point], unlimited: float, trace: Trace, path: Path) -> None:
    import pandas as pd

    from llmsim.charts import save
    from llmsim.charts_reuse import reuse_curves

    limited = [(p.eviction, p.cache_blocks, p.hit_ratio) for p in points if p.cache_blocks]
    if not limited:
        raise ValueError("--plot needs sizes to draw: give --cache-blocks with other values than inf")
    frame = pd.DataFrame(limited, columns=["eviction", "cache_blocks", "hit_ratio"])
    below = (
        f"{len(trace):,} requests, {points[0].prompt_blocks:,} prompt blocks of {trace.block_tokens} tokens;"
        f" dashed: room for everything ({unlimited:.1%})"
    )
    save(reuse_curves(frame, unlimited=unlimited, title=f"Prefix reuse of {trace.name}", subtitle=below), path)
