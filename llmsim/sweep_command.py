"""The command line that repeats one run."""

from __future__ import annotations

from functools import cache
from typing import Any

import click

from llmsim.cli_options import trace_options
from llmsim.command_line import argv_of
from llmsim.scenario import Scenario


def replay_command(
    scenario: Scenario, path: str, options: dict[str, Any], goodput: dict[str, float] | None
) -> list[str]:
    """`llmsim replay` with the trace as it was read, the scenario and the targets."""
    targets = ["--goodput", *(f"{name}:{target_ms!r}" for name, target_ms in goodput.items())] if goodput else []
    return argv_of(scenario, trace=[path, *trace_flags(options)], options=targets)


def trace_flags(options: dict[str, Any]) -> list[str]:
    """Options of load_trace, under its own names, as flags."""
    words: list[str] = []
    for name, value in options.items():
        flag = _flags()["trace_model" if name == "model" else name]
        if isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, dict):
            words += [flag, ",".join(f"{key}={column}" for key, column in value.items())]
        else:
            words += [flag, repr(value) if isinstance(value, float) else str(value)]
    return words


@cache
def _flags() -> dict[str, str]:
    """Parameter -> its long flag, as llmsim.cli_options defines them."""

    @click.command()
    @trace_options
    def trace_command(**_: Any) -> None:
        """Carries the options."""

    options = [param for param in trace_command.params if isinstance(param, click.Option)]
    return {str(one.name): next(flag for flag in one.opts if flag.startswith("--")) for one in options}
