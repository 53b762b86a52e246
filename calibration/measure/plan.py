"""Which point comes next: a coarse grid over everything first, then where the fit is least certain.

Points wait in queues, one for each operator and dtype. The queue that has had the least of its share of the time is
served next, a slice of points at once, so that a run that ends early has seen a part of everything. A queue gives its
grid in the operator's own order, then its refinements by need. A series is the points of a queue that differ in tokens
alone. Its fit interpolates log seconds over log tokens; how far a measured point lies from the line between its
neighbours (leave one out, less its own spread) tells the curvature there, and curvature times the distances to both
neighbours is the error expected in between. The refinement with the largest expected error times the operator's share
of a step comes first. A series whose errors are all expected under `ENOUGH` gets no more points.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import NamedTuple

from calibration.measure.points import Point
from calibration.measure.rows import Row

SLICE = 24  # points of one queue in a row
ENOUGH = 0.005  # expected error of an interpolation

# Of the time: by family of operators, and within it by dtype; what is not named has DEFAULT_SHARE.
SHARES = {
    "linear": 0.25,
    "attention": 0.35,
    "stacks": 0.1,
    "elementwise": 0.08,
    "layers": 0.08,
    "launch": 0.05,
    "communication": 0.05,
}
DTYPE_SHARES = {None: 1.0, "bfloat16": 1.0, "fp8": 0.5}
DEFAULT_SHARE = 0.03


class Measured(NamedTuple):
    """One point of a series, in logarithms."""

    tokens: float
    seconds: float
    spread: float


def leave_one_out(series: Sequence[Measured]) -> list[float]:
    """Error of the line between each inner point's neighbours, beyond the point's own spread."""
    errors = []
    for before, here, after in zip(series, series[1:], series[2:], strict=False):
        share = (here.tokens - before.tokens) / (after.tokens - before.tokens)
        line = before.seconds + share * (after.seconds - before.seconds)
        errors.append(max(0.0, abs(here.seconds - line) - here.spread))
    return errors


def expected_error(series: Sequence[Measured], tokens: float) -> float:
    """Of interpolating at log `tokens`: 1 where fewer than three points say nothing."""
    if len(series) < 3:
        return 1.0
    errors = [0.0, *leave_one_out(series), 0.0]
    after = min(max(bisect_left(series, (tokens,)), 1), len(series) - 1)
    worst = curvature = 0.0
    for place in (after - 1, after):
        if 0 < place < len(series) - 1:
            here = series[place].tokens
            span = (here - series[place - 1].tokens) * (series[place + 1].tokens - here)
            curvature = max(curvature, errors[place] / span)
            worst = max(worst, errors[place])
    if after == 1 or after == len(series) - 1:  # one end of the gap has no neighbour beyond: the nearest that has
        inner = 1 if after == 1 else len(series) - 2
        worst = max(worst, errors[inner])
    inside = series[after - 1].tokens < tokens < series[after].tokens
    error = curvature * abs(tokens - series[after - 1].tokens) * abs(series[after].tokens - tokens)
    return min(error, worst if inside else 1.0)


class _Series:
    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self.waiting: list[Point] = []
        self.best: tuple[float, Point] | None = None
        self.stale = True

    def add(self, tokens: int, row: Row) -> None:
        spread = ((row.p90_s or row.median_s) - (row.p10_s or row.median_s)) / row.median_s / 2
        place = log(tokens)
        if all(place != known.tokens for known in self.measured):
            insort(self.measured, Measured(place, log(row.median_s), spread))
        self.stale = True

    def score(self) -> float:
        if self.stale:
            self.stale, self.best = False, None
            for point in self.waiting:
                error = expected_error(self.measured, log(point["tokens"]))
                if error >= ENOUGH and (self.best is None or error * point.weight > self.best[0]):
                    self.best = error * point.weight, point
        return self.best[0] if self.best else 0.0


class _Queue:
    def __init__(self, share: float) -> None:
        self.share = share
        self.spent_s = 0.0
        self.grid: list[Point] = []  # the next one last
        self.series: dict[str, _Series] = {}

    def slice(self) -> list[Point]:
        if self.grid:
            taken = self.grid[-SLICE:][::-1]
            del self.grid[-SLICE:]
            return taken
        needy = sorted((series for series in self.series.values() if series.score() > 0), key=lambda s: -s.score())
        taken = []
        for series in needy[:SLICE]:
            assert series.best is not None
            point = series.best[1]
            series.waiting.remove(point)
            series.stale = True
            taken.append(point)
        return sorted(taken, key=lambda point: str(point.get("clocks")))  # the GPU cools down once


class Plan:
    def __init__(self, families: Mapping[str, Iterable[Point]], done: Mapping[str, Sequence[Row]]) -> None:
        """`done`: the rows of points that an earlier run measured, by key."""
        self._queues: dict[tuple[str, str | None], _Queue] = {}
        self._of: dict[str, _Queue] = {}
        for family, points in families.items():
            for point in points:
                self._add(family, point, done)
        for queue in self._queues.values():
            queue.grid.reverse()

    def _add(self, family: str, point: Point, done: Mapping[str, Sequence[Row]]) -> None:
        key, dtype = point.key, point.get("dtype")
        queue = self._queues.get((family, dtype))
        if queue is None:
            share = SHARES.get(family, DEFAULT_SHARE) * DTYPE_SHARES.get(dtype, 0.1)
            queue = self._queues[family, dtype] = _Queue(share)
        if key in self._of:
            return
        self._of[key] = queue
        if point.refine:
            queue.series.setdefault(point.series, _Series())
        if key in done:
            self.measured(point, done[key], 0.0)
        elif point.refine:
            queue.series[point.series].waiting.append(point)
        else:
            queue.grid.append(point)

    def drop(self, op: str, variant: str) -> None:
        """Gives up on a variant that this machine does not have."""
        for queue in self._queues.values():
            queue.grid = [point for point in queue.grid if (point.op, point.variant) != (op, variant)]
            prefix = f"{op}/{variant}/"
            queue.series = {key: series for key, series in queue.series.items() if not key.startswith(prefix)}

    def measured(self, point: Point, rows: Sequence[Row], spent_s: float) -> None:
        """No rows: it could not be measured."""
        queue = self._of[point.key]
        queue.spent_s += spent_s
        if rows and point.weight and point.get("tokens"):
            queue.series.setdefault(point.series, _Series()).add(point["tokens"], rows[0])

    @property
    def left(self) -> int:
        """Points of the grid that are not measured."""
        return sum(len(queue.grid) for queue in self._queues.values())

    def next(self) -> list[Point]:
        """A slice of points to measure; none when nothing is left that would help."""
        for queue in sorted(self._queues.values(), key=lambda queue: queue.spent_s / queue.share):
            points = queue.slice()
            if points:
                return points
        return []
