"""How the commands end: a wrong input is one line and exit status 2, an interruption 130."""

from __future__ import annotations

import sys

import click


def run(command: click.Command, interrupted: str = "interrupted") -> None:
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
