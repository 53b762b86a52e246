"""How prefill and decode move and grow, as frames: what the charts of the phases draw.

    moves      the points of both phases on the roofline, as one thing changes and everything else stays:
               batch              of the decode step: 1, 2, 4, … as far as they fit; the prefill stays where it is
               context            tokens cached of each decode, and of the prompt: 128, 256, … as far as they fit
               precision          of weights and KV cache
               GPUs               of the replica (tensor parallelism); work and rates are those of one GPU
    prefill_growth, decode_by_context, decode_by_batch
               seconds over prompt length, context and batch: `rest_s` (linear layers and what lies between them, which
               grow with the tokens), `attention_s` (with the square of a prompt, and with the tokens cached),
               gpu_s = rest_s + attention_s, and wall_s on both clocks

Everything is `llmsim.phases`': a point of a curve is the point that `llmsim phases` prints. In `prefill_growth` the
chunks of a prompt are each taken on a rested GPU, so gpu_s of several chunks is a few per cent below the point's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmsim.phases import Engine, Point, check_decodes, decode_point, prefill_point
from llmsim.scenario import Scenario

if TYPE_CHECKING:
    import pandas as pd

BY = ("batch", "context", "precision", "GPUs")
PRECISIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {"quantization": None, "kv_cache_dtype": "auto"}),
    ("fp8", {"quantization": "fp8", "kv_cache_dtype": "auto"}),
    ("fp8, KV fp8", {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    ("int4", {"quantization": "int4", "kv_cache_dtype": "auto"}),
)
GPUS = (1, 2, 4, 8)
SHORTEST = 128  # tokens of a context or prompt that moves
POINTS = 48  # of a curve
REACH, REACH_AT_LEAST = 3, 8192  # how far curves go: times the setting, and tokens


class Moves(NamedTuple):
    """`frame`: the columns of a `Point`, and `by`, `value` (in words), `order`, `here` (the setting itself), and the
    roof: `peak_flops_per_s`, `peak_bytes_per_s`. `left_out`: settings that cannot be, with the reason, a line each."""

    frame: pd.DataFrame
    left_out: tuple[str, ...]
    prefill: Point  # the setting itself
    decode: Point


def moves(scenario: Scenario, by: str, *, prompt_tokens: int, batch: int, context_tokens: int) -> Moves:
    """Where both phases lie as `by`, one of `BY`, changes. The setting itself has to be possible."""
    import pandas as pd

    if by not in BY:
        raise ValueError(f"by={by!r} is not one of {', '.join(BY)}")
    engine = _engine(scenario, [batch], context_tokens)
    here = {"prefill": prefill_point(engine, prompt_tokens), "decode": decode_point(engine, batch, context_tokens)}
    left_out: list[str] = []
    rows: list[tuple[str, int, bool, Engine, Point]] = []
    if by in ("precision", "GPUs"):
        for order, (value, other) in enumerate(_other_engines(scenario, engine, by, batch, context_tokens, left_out)):
            same = other is engine
            points = here.values() if same else _both(other, prompt_tokens, batch, context_tokens)
            rows += [(value, order, same, other, point) for point in points]
    else:
        placed = _sizes(engine, by, prompt_tokens, batch, context_tokens)
        rows = [(value, order, point in here.values(), engine, point) for order, (value, point) in enumerate(placed)]
    records = [
        asdict(point)
        | {"by": by, "value": value, "order": order, "here": same}
        | {"peak_flops_per_s": of.peak_flops_per_s, "peak_bytes_per_s": of.gpu.bandwidth_bytes_per_s}
        for value, order, same, of, point in rows
    ]
    return Moves(pd.DataFrame(records), tuple(left_out), **here)


def prefill_growth(scenario: Scenario, prompt_tokens: int, points: int = POINTS) -> pd.DataFrame:
    """prompt_tokens and `GROWN`, to well beyond the given length or what fits."""
    import pandas as pd

    engine = _engine(scenario)
    most = min(_beyond(prompt_tokens), engine.context_tokens - 1, engine.kv_cache_tokens - 1)
    rows = []
    for tokens in _whole(np.linspace(max(most / points, 2), most, points)):
        gpu_s, attention_s = engine.prefill_s(tokens)
        point = prefill_point(engine, tokens)
        rows.append((tokens, gpu_s - attention_s, attention_s, gpu_s, point.wall_s, point.outside_measured))
    return pd.DataFrame(rows, columns=["prompt_tokens", *GROWN])


GROWN = ("rest_s", "attention_s", "gpu_s", "wall_s", "outside_measured")


def decode_by_context(scenario: Scenario, batch: int, context_tokens: int, points: int = POINTS) -> pd.DataFrame:
    """context_tokens and `GROWN` of a step of `batch` requests, to well beyond the given context or what fits."""
    engine = _engine(scenario, [batch])
    most = min(_beyond(context_tokens), engine.context_tokens - 1, _longest(engine, batch))
    contexts = _whole(np.linspace(max(most / points, 1), most, points))
    return _steps(engine, "context_tokens", contexts, [(batch, context) for context in contexts])


def decode_by_batch(scenario: Scenario, context_tokens: int, points: int = POINTS) -> pd.DataFrame:
    """batch, `GROWN` and tokens_per_s of steps with `context_tokens` cached each, for as many requests as fit."""
    engine = _engine(scenario, [1], context_tokens)
    batches = _whole(np.linspace(1, engine.largest_batch(context_tokens + 1), points))
    return _steps(engine, "batch", batches, [(batch, context_tokens) for batch in batches])


def _beyond(tokens: int) -> int:
    return max(REACH * tokens, REACH_AT_LEAST)


def _steps(engine: Engine, name: str, values: Sequence[int], steps: Sequence[tuple[int, int]]) -> pd.DataFrame:
    import pandas as pd

    decodes = [decode_point(engine, batch, context) for batch, context in steps]
    columns: dict[str, Any] = {name: values}
    columns["rest_s"] = [point.gpu_s * (1 - point.attention_share) for point in decodes]
    columns["attention_s"] = [point.gpu_s * point.attention_share for point in decodes]
    columns |= {field: [getattr(point, field) for point in decodes] for field in (*GROWN[2:], "tokens_per_s")}
    return pd.DataFrame(columns)


def _engine(scenario: Scenario, batches: Sequence[int] = (), context_tokens: int = 1) -> Engine:
    engine = Engine.of(scenario)
    if batches:
        check_decodes(engine, batches, context_tokens)
    return engine


def _both(engine: Engine, prompt_tokens: int, batch: int, context_tokens: int) -> tuple[Point, Point]:
    return prefill_point(engine, prompt_tokens), decode_point(engine, batch, context_tokens)


def _other_engines(
    scenario: Scenario, engine: Engine, by: str, batch: int, context_tokens: int, left_out: list[str]
) -> Iterator[tuple[str, Engine]]:
    """The engine at every precision or tensor-parallel size that can be, its own among them."""
    if by == "precision":
        changes = [(name, change) for name, change in PRECISIONS]
    else:
        changes = [(f"TP {gpus}", {"tensor_parallel": gpus}) for gpus in GPUS]
    seen = False
    for name, change in changes:
        own = _alike(scenario, change)
        seen |= own
        try:
            yield name, engine if own else _engine(replace(scenario, **change), [batch], context_tokens)
        except ValueError as error:
            left_out.append(f"{name}: {error}")
    if not seen:
        yield "as set", engine


def _alike(scenario: Scenario, change: dict[str, Any]) -> bool:
    """Whether the change is none, in what is stored."""
    changed = replace(scenario, **change)
    return all(
        getattr(changed, name) == getattr(scenario, name) for name in ("weight_dtype", "kv_dtype", "tensor_parallel")
    )


def _sizes(engine: Engine, by: str, prompt_tokens: int, batch: int, context_tokens: int) -> Iterator[tuple[str, Point]]:
    if by == "batch":
        yield f"{prompt_tokens:,} tokens", prefill_point(engine, prompt_tokens)
        for size in _doubling(1, engine.largest_batch(context_tokens + 1), batch):
            yield f"batch {size:,}", decode_point(engine, size, context_tokens)
        return
    for tokens in _doubling(SHORTEST, min(engine.context_tokens, engine.kv_cache_tokens) - 1, prompt_tokens):
        yield f"{tokens:,} tokens", prefill_point(engine, tokens)
    for tokens in _doubling(SHORTEST, min(engine.context_tokens - 1, _longest(engine, batch)), context_tokens):
        yield f"{tokens:,} cached", decode_point(engine, batch, tokens)


def _longest(engine: Engine, batch: int) -> int:
    """Cached tokens that each of `batch` requests can have, with room for one more."""
    block = engine.scenario.block_size
    return (engine.kv_blocks - 1) // batch * block - 1


def _doubling(least: int, most: int, also: int) -> list[int]:
    powers = [least << i for i in range(most.bit_length()) if least << i <= most]
    return sorted({*powers, also})


def _whole(values: np.ndarray[Any, Any]) -> list[int]:
    return sorted({int(value) for value in values})
