"""What a result rests on: profiles, how far they are from measurements and recordings, and where a run leaves them.

    profiles        of the shipped ones: id, GPU, engine, what was recorded when, how much was timed, spread
    points          measured and predicted seconds: kernels, each predicted by what was fitted without that point, and
                    engine steps, of loads the profile was fitted to and of others
    errors          of all of them by operator or load: median, 90th percentile, the worst
    loads           latencies of recorded loads, predicted and measured
    measured_range  the largest iterations that the fit has seen, beside those of a run, and the share of its GPU time
                    beyond each of them

points, errors and loads are files of the package (llmsim/data/evidence), made from the measurements and recordings of
the repository by `python -m benchmarks.evidence`. They name the ids of the profiles they were made with: `stale` says
where the shipped profile is a newer one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.cost.profile import Profile, measured_error, profile_names, read_profile
from llmsim.metrics import Columns
from llmsim.utilisation import busy_seconds

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.cost import CostModel

FOLDER = Path(__file__).parent / "data" / "evidence"
META = b"llmsim.profiles"
TABLES = ("points", "errors", "loads")
COMMAND = "python -m benchmarks.evidence"
