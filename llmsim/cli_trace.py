"""`llmsim trace`: describe a trace, convert it, make one.

The report goes to stdout (`--json`: one document), what was guessed or dropped to stderr.
"""

from __future__ import annotations

import json
import os
from typing import Any

import click

from llmsim.cli_options import CONTEXT, INT, json_option, tell, trace_arguments, trace_options
from llmsim.cli_reuse import reuse

WRITABLE = ("csv", "jsonl", "parquet", "mooncake")


def _reading(command: Any) -> Any:
    """What a replay takes from its scenario, a trace alone has to be told."""
    context = click.option("--context-tokens", type=INT, help="Context of the model, for --over-context.")
    seed = click.option("--seed", type=INT, default=0, help="Of arrivals that are drawn or spread. [0]")
    return trace_options(context(seed(command)))


def _writing(command: Any) -> Any:
    out = click.option("-o", "--out", metavar="FILE", required=True, help="File to write (.csv, .jsonl, .parquet).")
    to = click.option("--to", type=click.Choice(WRITABLE), help="Format to write. [by the file's ending]")
    return out(to(command))


def _load(path: str, flags: dict[str, Any]) -> Any:
    from llmsim.trace import load_trace

    context_tokens, seed = flags["context_tokens"], flags["seed"]
    if flags["over_context"] is not None and context_tokens is None:
        raise ValueError(f"--over-context {flags['over_context']} needs a limit: add --context-tokens N")
    trace = load_trace(path, **trace_arguments(flags), context_tokens=context_tokens, seed=seed)
    tell(trace.notes)
    return trace


@click.group(context_settings=CONTEXT)
def trace() -> None:
    """Look at traces, convert them, make them."""


trace.add_command(reuse)


@trace.command(context_settings=CONTEXT)
@click.argument("path", metavar="TRACE")
@_reading
@json_option
def describe(path: str, as_json: bool, **flags: Any) -> None:
    """Report what TRACE (a file, a folder, or - for standard input) holds: rows, rate, burstiness, lengths, prefixes.

    \b
    llmsim trace describe chat.csv
    llmsim trace describe AzureLLMInferenceTrace_conv.csv --start 600 --duration 60 --json
    """
    from llmsim.readers.report import as_text
    from llmsim.readers.report import describe as report_of

    report = report_of(_load(path, flags))
    click.echo(json.dumps(report, allow_nan=False) if as_json else as_text(report))


@trace.command(context_settings=CONTEXT)
@click.argument("path", metavar="TRACE")
@_writing
@_reading
def convert(path: str, out: str, to: str | None, **flags: Any) -> None:
    """Write TRACE in llmsim's generic format, or as Mooncake JSON lines.

    \b
    llmsim trace convert BurstGPT_1.csv --model-filter GPT-4 -o gpt4.parquet
    llmsim trace convert chat.csv --rate 20 --limit 500 -o faster.csv
    llmsim trace convert chat.csv --to mooncake -o chat.jsonl
    """
    from llmsim.readers.write import check_writable, left_out, write_trace

    check_writable(out, to)
    if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
        raise ValueError(f"--out {out}: is the trace that is read: give another name")
    read = _load(path, flags)
    kind = write_trace(read, out, to)
    tell(left_out(read, kind))
    click.echo(f"{out}: {len(read)} requests written as {kind}")


@trace.command(context_settings=CONTEXT)
@click.option("--requests", type=INT, required=True, help="How many requests.")
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
@click.option("--block-tokens", type=INT, default=16, show_default=True, help="Tokens of one prefix hash.")
@click.option("--seed", type=INT, default=0, show_default=True)
@_writing
def synth(
    requests: int, classes_file: str | None, clients_file: str | None, out: str, to: str | None, **options: Any
) -> None:
    """Make a workload.

    \b
    llmsim trace synth --requests 2000 --arrivals gamma:rate=10,cv=2 --lengths lognormal:median=900,sigma=1 -o out.csv
    """
    from llmsim.readers.write import check_writable, write_trace
    from llmsim.synth import Client, RequestClass, mix, synthesise

    check_writable(out, to)
    if clients_file is not None:
        made = mix(_labels(clients_file, Client), requests, seed=options["seed"], name=out)
    else:
        classes = _labels(classes_file, RequestClass) if classes_file is not None else ()
        made = synthesise(requests, classes=classes, name=out, **options)
    tell(made.notes)
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
