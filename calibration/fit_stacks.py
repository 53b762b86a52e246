"""What a layer's products take together, over the sum of what a `LinearTable` says of each (`llmsim.cost.kernels`).

Of a point timed more than once, on several machines, the mean counts: two H200s differ by up to 4 % in what layers take
at a few rows, one model's either way.

At cold clocks by rows: waves of tiles show there, and the power limit does not. Beyond the rows timed cold the ratio
is the median from `LOADED_FROM` rows on, which is what load costs a product; a stack timed at none of them is left
out. From `STEADY_FROM` rows on the repeats of a point can pull the clocks down themselves (2,048 rows came out 6 to 10
% longer than 2,056 of some models): there the median of a point and its two neighbours on either side counts. Under
load one ratio for all rows, the median: a single point is off by 5 to 10 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from llmsim.cost.kernels import LinearTable, Stack
from llmsim.hardware import find_model

if TYPE_CHECKING:
    from calibration.fit_kernels import Judge
    from calibration.measure.rows import Row

Shapes = tuple[tuple[int, int], ...]

LOADED_FROM = 1024  # rows from which the tables hold times under sustained load and tiles of all widths are many
STEADY_FROM = 1280  # rows from which a point's own repeats can pull the clocks down
LONG_FROM = 2048  # rows from which a chunk lasts long enough to be under sustained load


def with_stacks(table: LinearTable, rows: Sequence[Row], dtype: str, judge: Judge) -> LinearTable:
    """`rows` are of one dtype and kernel. ValueError: of a model that `llmsim list models` does not have."""
    runs: dict[tuple[str, int, str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.clocks and row.model and row.tokens:
            runs[row.model, row.tensor_parallel or 1, row.clocks, row.tokens].append(row.median_s)
    timed: dict[tuple[str, int], dict[str, dict[int, float]]] = defaultdict(lambda: {"cold": {}, "sustained": {}})
    for (model, tensor_parallel, clocks, tokens), seconds in runs.items():
        timed[model, tensor_parallel][clocks][tokens] = fmean(seconds)
    stacks, measured = [], []
    for (model, tensor_parallel), by_clocks in timed.items():
        if max(by_clocks["cold"], default=0) >= LOADED_FROM:  # not of a run that was stopped before
            shapes = tuple(find_model(model).layer_linears(tensor_parallel).values())
            cold, loaded = (_ratios(table, shapes, by_clocks[clocks]) for clocks in ("cold", "sustained"))
            stacks.append(_stack(shapes, cold, loaded, table.tokens[-1]))
            at, seconds = (np.array(column, float) for column in zip(*sorted(by_clocks["cold"].items()), strict=True))
            measured.append((f"{model} tp={tensor_parallel}", at, seconds))
    table = msgspec.structs.replace(table, stacks=tuple(stacks))
    for stack, (name, at, seconds) in zip(stacks, measured, strict=True):
        predicted, _ = table.layer_s(stack.shapes, at, without=stack)
        for tokens, predicted_s, measured_s in zip(at, predicted, seconds, strict=True):
            judge.add(f"layer's linears {dtype}", float(measured_s), float(predicted_s), f"{name} tokens={tokens:.0f}")
    return table


def _ratios(table: LinearTable, shapes: Shapes, timed: dict[int, float]) -> dict[int, float]:
    alone_s, _ = table.layer_s(shapes, np.array(list(timed), float))
    return {tokens: timed[tokens] / float(seconds) for tokens, seconds in zip(timed, alone_s, strict=True)}


def _stack(shapes: Shapes, cold: dict[int, float], loaded: dict[int, float], last: int) -> Stack:
    at = sorted(cold)
    steady = {t: median(cold[near] for near in at[max(i - 2, 0) : i + 3]) for i, t in enumerate(at) if t >= STEADY_FROM}
    cold = cold | steady
    if max(cold) < last:
        cold = cold | {max(cold) + 1: median(ratio for tokens, ratio in cold.items() if tokens >= LOADED_FROM)}
    under_load = [ratio for tokens, ratio in loaded.items() if tokens >= LONG_FROM]
    tokens = tuple(sorted(cold))
    ratio = tuple(float(f"{cold[at]:.4g}") for at in tokens)
    return Stack(shapes, tokens, ratio, float(f"{median(under_load) if under_load else 1.0:.4g}"))
