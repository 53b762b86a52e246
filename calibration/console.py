"""How the commands end: a wrong input is one line and exit status 2, an interruption 130."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable

import click

INTERRUPTED = 130


def run(command: click.Command, interrupted: str = "interrupted") -> None:
    try:
        status = command(standalone_mode=False)
        if isinstance(status, int) and status:  # of click's Exit
            sys.exit(status)
    except click.ClickException as error:
        _end(error.format_message())
    except click.Abort:
        print(interrupted, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError) as error:
        _end(str(error))
    except MemoryError as error:
        _end(f"not enough memory ({error or 'none left'}): give fewer recordings or measurements at a time")


def check_once(given: Iterable[tuple[str, Hashable]]) -> None:
    """Raises ValueError if two of what was given, (as it was named, what it is), are the same."""
    seen = set()
    for name, what in given:
        if what in seen:
            raise ValueError(f"{name}: is given twice, and would count as two. Give it once")
        seen.add(what)


def _end(error: str) -> None:
    print(f"Error: {' '.join(error.split())}", file=sys.stderr)
    sys.exit(2)
