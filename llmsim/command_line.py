"""A scenario as a command line: the flags that, parsed, give the same scenario again.

Only what differs from the engine's own defaults is written. The flags are read off the options that
`llmsim.cli_options` defines, so a renamed flag cannot be forgotten here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import click

from llmsim.cli_options import scenario_options, value_of
from llmsim.scenario import Scenario

DECIDING = ("model", "gpu", "engine", "tensor_parallel", "max_num_batched_tokens")  # what the engine's own follows from
ALWAYS = ("model", "gpu")  # have no default


def argv_of(
    scenario: Scenario,
    *,
    command: str = "replay",
    trace: str | Sequence[str] = "TRACE",
    goodput: dict[str, float] | None = None,
    options: Iterable[str] = (),
) -> list[str]:
    """["llmsim", command, trace…, flags…]; `trace` may carry flags of its own, `options` come last."""
    words = ["llmsim", command, *([trace] if isinstance(trace, str) else trace), *scenario_flags(scenario)]
    if goodput:
        words += ["--goodput", *(f"{name}:{target_ms:g}" for name, target_ms in goodput.items())]
    return [*words, *options]


def as_text(argv: Sequence[str]) -> str:
    """For a shell, quoted where it must be."""
    return shlex.join(argv)


def scenario_flags(scenario: Scenario) -> list[str]:
    """The flags of every field that is not as the engine has it by itself."""
    plain = _plain(scenario)
    options = {option.name: option for option in _options()}
    words: list[str] = []
    for field in fields(scenario):
        value: Any = getattr(scenario, field.name)
        usual = field.default if field.name in DECIDING else getattr(plain, field.name)
        if field.name in ALWAYS or value != usual:
            words += _flag(options[field.name], value)
    return words


def _plain(scenario: Scenario) -> Scenario:
    """The same model, GPU and engine, left to themselves."""
    given = {name: getattr(scenario, name) for name in DECIDING}
    try:
        return Scenario(**given)
    except ValueError:  # so few tokens that the engine's own block would not fit, or fewer than its own requests
        return Scenario(**given | {"max_num_batched_tokens": None})


def _options() -> list[click.Option]:
    @click.command()
    @scenario_options
    def scenario_command(**_: Any) -> None:
        """Carries the options."""

    return [param for param in scenario_command.params if isinstance(param, click.Option)]


def _flag(option: click.Option, value: Any) -> list[str]:
    flag = next(name for name in option.opts if name.startswith("--"))
    if option.secondary_opts:
        return [flag if value else option.secondary_opts[0]]
    if option.name == "speculative_config":
        return [flag, json.dumps(value)]
    if isinstance(value, dict):
        return [word for name, item in value.items() for word in (flag, f"{name}={_argument(item)}")]
    if option.name == "kv_tiers":
        return [word for tier in value.split(",") for word in (flag, tier)]
    return [flag, repr(value) if isinstance(value, float) else str(value)]


def _argument(value: Any) -> str:
    """Text as it is, unless it would be read as something else."""
    if isinstance(value, str) and value_of(value) == value:
        return value
    return json.dumps(value)
