"""`llmsim trace`: describe a trace, convert it, make one.

The report goes to stdout (`--json`: one document), what was guessed or dropped to stderr. Wrong input exits with 2 and
one line.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of everything that reads a trace, in the words of `load_trace`."""
    options = (
        click.option("--format", "format", help="Trace format; recognised by content if left out."),
        click.option("--columns", help="Column names: arrival=when,prompt=in,output=out."),
        click.option("--time-unit", type=click.Choice(["s", "ms", "us", "ns"]), help="Unit of numeric time stamps."),
        click.option("--time-scale", type=float, help="Stretch arrival times (2: half the rate)."),
        click.option("--rate", type=float, help="Rescale to a mean rate in requests/s, or draw arrivals at it."),
        click.option("--start", "start_s", type=float, help="Begin of the window in s."),
        click.option("--duration", "duration_s", type=float, help="Length of the window in s."),
        click.option("--limit", type=int, help="At most so many requests."),
        click.option("--failed", type=click.Choice(["drop", "keep"]), default="drop", help="Rows without output."),
        click.option("--model-filter", "model", help="Only rows of this model (BurstGPT)."),
        click.option("--log-type", help="Only rows of this log type (BurstGPT)."),
        click.option("--spread", type=click.Choice(["none", "uniform"]), default="none", help="Move ties apart."),
        click.option("--over-context", type=click.Choice(["error", "drop", "truncate"]), default="error",
                     help="Requests longer than --context-tokens."),
        click.option("--context-tokens", type=int, help="Context of the model in tokens."),
        click.option("--block-tokens", "--block-size", "block_tokens", type=int, help="Tokens a prefix id stands for."),
        click.option("--strict-order", is_flag=True, help="Refuse rows out of time order."),
        click.option("--sharegpt-mode", type=click.Choice(["first-pair", "multi-turn"]), default="multi-turn"),
        click.option("--closed-loop", is_flag=True, help="Later turns wait for their parents (Qwen-Bailian)."),
        click.option("--max-wait", "max_wait_s", type=float, help="Cap on waits between turns in s."),
        click.option("--rank-correlated", is_flag=True, help="ServeGen: one uniform for prompt and output."),
        click.option("--seed", type=int, default=0),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrong input ends with one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except (ValueError, FileNotFoundError) as error:
            click.echo(f"llmsim: {' '.join(str(error).splitlines())}", err=True)
            sys.exit(2)

    return run


def parse_columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    mapping: dict[str, str] = {}
    for part in text.split(","):
        kind, equals, name = part.partition("=")
        if not equals or not kind.strip() or not name.strip():
            raise ValueError(f"--columns {text}: {part!r} is not kind=name; write arrival=when,prompt=in,output=out")
        mapping[kind.strip()] = name.strip()
    return mapping


def _load(path: str, columns: str | None, options: dict[str, Any]) -> Any:
    from llmsim.trace import load_trace

    trace = load_trace(path, columns=parse_columns(columns), **options)
    for note in trace.notes:
        click.echo(f"note: {note}", err=True)
    return trace


@click.group()
def trace() -> None:
    """Look at traces, convert them, make them."""


@trace.command()
@click.argument("path")
@reading_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@one_line_errors
def describe(path: str, as_json: bool, columns: str | None, **options: Any) -> None:
    """Report what PATH holds: rows, rate, burstiness, lengths, prefixes."""
    from llmsim.readers.report import as_text
    from llmsim.readers.report import describe as report_of

    report = report_of(_load(path, columns, options))
    click.echo(json.dumps(report, indent=2) if as_json else as_text(report))


@trace.command()
@click.argument("path")
@click.option("-o", "--out", required=True, help="File to write (.csv, .jsonl, .parquet).")
@click.option("--to", type=click.Choice(["csv", "jsonl", "parquet", "mooncake"]), help="Format to write.")
@reading_options
@one_line_errors
def convert(path: str, out: str, to: str | None, columns: str | None, **options: Any) -> None:
    """Write PATH in llmsim's generic format, or as Mooncake JSON lines."""
    from llmsim.readers.write import write_trace

    read = _load(path, columns, options)
    kind = write_trace(read, out, to)
    click.echo(f"{out}: {len(read)} requests written as {kind}")


@trace.command()
@click.option("--requests", type=int, required=True, help="How many requests.")
@click.option(
    "--arrivals",
    default="poisson:rate=1",
    show_default=True,
    help="poisson, gamma, weibull, mmpp, on-off, diurnal, piecewise, ramp, spike, pulse, constant, batch, replay.",
)
@click.option(
    "--lengths",
    default="random:tokens=1024",
    show_default=True,
    help="Prompt lengths: fixed, uniform, "
    "random, normal, lognormal, exponential, pareto, zipf, histogram, cdf, mixture, empirical.",
)
@click.option("--output-lengths", help="Output lengths (also ratio:prompt_per_output=R).")
@click.option("--rho", type=float, default=0.0, help="Correlation of prompt and output (Gaussian copula).")
@click.option("--prefixes", help="repetition:..., groups:..., buckets:... or tree:path=...")
@click.option("--sessions", help="sessions:turns=(...),think=(...),... or closed:users=N,think=(...)")
@click.option("--classes", "classes_file", help="JSON list of classes: name, share, priority, slo_ttft_ms, ...")
@click.option("--clients", "clients_file", help="JSON list of clients: name, arrivals, lengths, ...")
@click.option("--block-tokens", type=int, default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--out", required=True, help="File to write (.csv, .jsonl, .parquet).")
@click.option("--to", type=click.Choice(["csv", "jsonl", "parquet", "mooncake"]), help="Format to write.")
@one_line_errors
def synth(
    requests: int, classes_file: str | None, clients_file: str | None, out: str, to: str | None, **options: Any
) -> None:
    """Make a workload, for example

    llmsim trace synth --requests 2000 --arrivals gamma:rate=10,cv=2 --lengths lognormal:median=900,sigma=1 -o out.csv
    """
    from llmsim.readers.write import write_trace
    from llmsim.synth import Client, RequestClass, mix, synthesise

    if clients_file is not None:
        made = mix(_labels(clients_file, Client), requests, seed=options["seed"], name=out)
    else:
        classes = _labels(classes_file, RequestClass) if classes_file is not None else ()
        made = synthesise(requests, classes=classes, name=out, **options)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    kind = write_trace(made, out, to)
    click.echo(f"{out}: {len(made)} requests written as {kind}")


def _labels(path: str, kind: Any) -> list[Any]:
    """A JSON list of classes or clients, checked field by field."""
    import msgspec

    from llmsim.readers.source import open_source

    data = open_source(path).data
    try:
        plain = msgspec.json.decode(data, type=list[dict[str, Any]])
        known = set(kind.__dataclass_fields__)
        for one in plain:
            unknown = sorted(set(one) - known)
            if unknown:
                raise ValueError(
                    f"{path}: {kind.__name__} does not know {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
                )
        made: list[Any] = msgspec.convert(plain, list[kind])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from None
    return made
