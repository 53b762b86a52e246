"""python -m calibration.measure: the command alone."""

import sys

import click

from calibration.measure.command import measure

if __name__ == "__main__":
    try:
        measure(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        print("interrupted before anything was measured", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
