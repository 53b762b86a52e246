"""`llmsim from-vllm` and `llmsim validate`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from llmsim.cli_options import (
    CONTEXT,
    GPU,
    SectionedCommand,
    json_option,
    scenario_fields,
    scenario_options,
    tell,
)

RAW = {**CONTEXT, "ignore_unknown_options": True, "allow_interspersed_args": False, "token_normalize_func": None}


class PastedCommand(click.Command):
    """Its own options may stand before the pasted line or, if that is quoted, behind it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and any(space in args[0].strip() for space in " \n\t"):
            args = [*args[1:], args[0]]
        return super().parse_args(ctx, args)


@click.command("from-vllm", cls=PastedCommand, context_settings=RAW)
@click.option("--gpu", type=GPU, metavar="NAME", help="The GPU the command runs on: no vllm command names it.")
@json_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def from_vllm(gpu: str | None, as_json: bool, command: tuple[str, ...]) -> None:
    """Translate COMMAND, a 'vllm serve' line (quoted, bare, or - for standard input), into a scenario.

    Prints a scenario file and the same as flags of 'llmsim replay'; what has no counterpart is named on stderr.

    \b
    llmsim from-vllm --gpu h100-sxm 'vllm serve meta-llama/Llama-3.1-8B-Instruct -tp 2 --max-model-len 32k'
    """
    from llmsim.fromvllm import as_flags, check, translate

    words = sys.stdin.read() if command == ("-",) else command[0] if len(command) == 1 else list(command)
    translation = translate(words)
    scenario = check(translation.fields, gpu)
    fields = {"model": scenario.model, "gpu": gpu, **translation.fields}
    shown = {name: value for name, value in fields.items() if value is not None}
    flags = as_flags(shown) if gpu else [*as_flags(shown), "--gpu", "GPU"]
    if as_json:
        document = {"scenario": shown, "flags": flags}
        document |= {"not_modelled": translation.not_modelled, "ignored": translation.ignored}
        click.echo(json.dumps(document))
        return
    for line in translation.ignored:
        click.echo(f"ignored       {line}", err=True)
    for line in translation.not_modelled:
        click.echo(f"NOT MODELLED  {line}", err=True)
    click.echo(_scenario_text(shown, flags, translation.not_modelled))


def _scenario_text(fields: dict[str, Any], flags: list[str], not_modelled: list[str]) -> str:
    from llmsim.scenario_file import toml_line

    lines = [f"# {shlex.join(['llmsim', 'replay', 'TRACE', *flags])}"]
    lines += [f"# not modelled: {' '.join(line.split())}" for line in not_modelled]
    if "gpu" not in fields:
        lines.append('# gpu = "…"  a vllm command does not name it: llmsim list gpus')
    return "\n".join(lines) + "\n" + "".join(toml_line(*item) for item in fields.items()).rstrip()


@click.command(cls=SectionedCommand, context_settings=CONTEXT)
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path(path_type=Path))
@scenario_options
@json_option
def validate(paths: tuple[Path, ...], as_json: bool, **flags: Any) -> int:
    """Check llmsim against what real engines did.

    PATH is a recorded schedule (JSON: every step must match), a recording folder, or the result file of
    'vllm bench serve --save-detailed'; a folder of schedules is checked file by file. Exit status 1 if a schedule
    differs. The scenario flags say what a recording does not (a benchmark result holds no engine settings) or what
    is to differ from it.

    \b
    llmsim validate tests/data/oracle
    llmsim validate result.json --model llama-3.1-8b --gpu h100-sxm --max-num-seqs 128
    """
    overrides = scenario_fields(flags)
    from llmsim.oracle import is_case_file

    cases: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for path in paths:
        for file in _expand(path):
            if is_case_file(file):
                _refuse_overrides(file, overrides)
                cases.append(_replayed(file, as_json))
            else:
                measured += _measured(file, overrides, as_json)
    differs = [case for case in cases if case["difference"] is not None]
    if as_json:
        click.echo(json.dumps({**({"cases": cases} if cases else {}), **({"scenarios": measured} if measured else {})}))
    elif cases:
        click.echo(f"{len(cases) - len(differs)} of {len(cases)} schedules match")
    return 1 if differs else 0


def _expand(path: Path) -> list[Path]:
    """A folder of recorded schedules is its files; any other folder is a recording and stays one path."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder: give a recorded schedule or a recording")
    from llmsim.oracle import is_case_file

    files = sorted([*path.glob("*.json"), *path.glob("*.json.gz")]) if path.is_dir() else []
    return [file for file in files if is_case_file(file)] or [path]


def _replayed(path: Path, as_json: bool) -> dict[str, Any]:
    from llmsim.oracle import replay_case

    try:
        difference = replay_case(path)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # a field of another kind than recorders write
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}): record the schedule again") from error
    if not as_json:
        click.echo(f"{path}: {difference or 'match'}")
    return {"path": str(path), "difference": difference}


def _refuse_overrides(path: Path, overrides: dict[str, Any]) -> None:
    if overrides:
        names = ", ".join(overrides)
        raise ValueError(f"{path}: a recorded schedule states all its settings: leave out what gives {names}")


def _measured(path: Path, overrides: dict[str, Any], as_json: bool) -> list[dict[str, Any]]:
    from llmsim.validate import report, validate

    notes: list[str] = []
    outcome = validate(path, notes=notes, **overrides)
    tell(notes)
    if not as_json:
        click.echo(report(outcome))
    scenarios: list[dict[str, Any]] = outcome["scenarios"]
    return scenarios
