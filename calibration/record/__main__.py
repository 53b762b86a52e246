"""python -m calibration.record record|engine|trace: for a GPU machine without the simulator's packages."""

from __future__ import annotations

import click

from calibration.console import run
from calibration.record.command import engine_command, record_command, trace_command


@click.group()
def main() -> None:
    """Record a real vLLM. Needs vllm, numpy, msgspec and click."""


main.add_command(record_command)
main.add_command(engine_command)
main.add_command(trace_command)

if __name__ == "__main__":
    run(main)
