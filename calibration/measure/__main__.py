"""python -m calibration.measure: the command alone."""

from calibration.console import run
from calibration.measure.command import measure

if __name__ == "__main__":
    run(measure, interrupted="interrupted before anything was measured")
