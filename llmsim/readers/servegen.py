"""ServeGen pools: a directory of clients, each with windows of rate and burstiness and of token histograms.

``chunk-<i>-trace.csv`` (no header): start_s, rate_rps, cv, Gamma | Weibull | empty (silent), shape, scale, every 600 s.
``chunk-<i>-dataset.json``: {start_s: {"input_tokens": "{tokens: weight, ...}", "output_tokens": ...}}, every 21,600 s;
a window of arrivals uses the latest histogram that begins at or before it. In a window a client sends ceil(rate * 600)
requests, with gaps from its distribution scaled to fill the window exactly, as the reference generator does.

The reference draws one uniform for all fields of a request, so prompt and output are fully rank-correlated inside a
client; here they are independent unless `rank_correlated` is set. Source: alibaba/ServeGen (Xiang et al., 2025).
"""

from __future__ import annotations

import ast
import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from llmsim.readers.rows import FloatArray, IntArray, ReadOptions, Rows
from llmsim.readers.source import Source
from llmsim.readers.values import seconds_of

WINDOW_S = 600.0
CHUNK = re.compile(r"chunk-(\d+)-trace\.csv")
PATTERNS = ("Gamma", "Weibull", "")


@dataclass(frozen=True)
class Window:
    """One client for 600 seconds."""

    start_s: float
    rate_per_s: float
    pattern: str
    shape: float


@dataclass(frozen=True)
class Histogram:
    tokens: IntArray
    cumulative: FloatArray

    def draw(self, uniform: FloatArray) -> IntArray:
        return self.tokens[np.minimum(np.searchsorted(self.cumulative, uniform, side="right"), len(self.tokens) - 1)]


def chunks(directory: Path) -> list[tuple[int, Path]]:
    """(client, its trace file), by client number."""
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := CHUNK.fullmatch(path.name))]
    return sorted(found)


def read_windows(path: Path) -> list[Window]:
    windows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            where = f"{path.name}: line {number}"
            if len(row) != 6 or row[3] not in PATTERNS:
                raise ValueError(f"{where}: {row} is not start_s,rate_rps,cv,Gamma|Weibull|,shape,scale")
            values = [seconds_of(row[place], text=True) for place in (0, 1, 4)]
            if any(value is None or value < 0 for value in values):
                raise ValueError(f"{where}: {row} holds a number that is not finite and at least 0")
            start_s, rate, shape = (float(value or 0.0) for value in values)
            if row[3] and rate > 0:
                if shape <= 0:
                    raise ValueError(f"{where}: shape {shape:g} of {row[3]} must be above 0")
                windows.append(Window(start_s, rate, row[3], shape))
    return windows


def read_histograms(path: Path) -> dict[float, dict[str, Histogram]]:
    """Histograms of each field by the second they begin at; fields without data are left out."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, str]])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing; every chunk-<i>-trace.csv needs its chunk-<i>-dataset.json"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a ServeGen data set ({error})") from None
    windows: dict[float, dict[str, Histogram]] = {}
    for start, columns in document.items():
        at = seconds_of(start, text=True)
        if at is None:
            raise ValueError(f"{path.name}: window {start!r} is not a number of seconds")
        read = {
            field: _histogram(path, start, field, text) for field, text in columns.items() if field.endswith("_tokens")
        }
        windows[at] = {field: histogram for field, histogram in read.items() if histogram is not None}
    return windows


def _histogram(path: Path, start: str, field: str, text: str) -> Histogram | None:
    where = f"{path.name}: window {start}, {field}"
    try:
        weights = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{where}: {text[:40]!r} is not a dictionary of tokens and weights") from None
    numeric = isinstance(weights, dict) and all(
        isinstance(tokens, int) and isinstance(weight, int | float) and tokens >= 0 and weight >= 0
        for tokens, weight in weights.items()
    )
    if not numeric:
        raise ValueError(f"{where}: {text[:40]!r} is not a dictionary of tokens and weights")
    if not weights:
        return None
    total = math.fsum(weights.values())
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"{where}: the weights sum to {total:.9g}, not to 1")
    return Histogram(np.array(list(weights), dtype=np.int64), np.cumsum(list(weights.values())) / total)


def read(source: Source, options: ReadOptions) -> Rows:
    directory = source.directory
    assert directory is not None
    clients = [(client, read_windows(path), path) for client, path in chunks(directory)]
    windows = [window for _, mine, _ in clients for window in mine]
    begin_s = options.start_s or 0.0
    end_s = max((window.start_s + WINDOW_S for window in windows), default=0.0)
    if options.duration_s is not None:
        end_s = min(end_s, begin_s + options.duration_s)
    inside_s = end_s - begin_s
    native = sum(w.rate_per_s * max(0.0, min(end_s, w.start_s + WINDOW_S) - max(begin_s, w.start_s)) for w in windows)
    if inside_s <= 0 or native <= 0:
        raise ValueError(
            f"{source.name}: no client sends anything in [{begin_s:g}, {end_s:g}) s; choose another window"
        )
    factor = 1.0 if options.rate is None else options.rate * inside_s / native
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"rate={options.rate} must be finite and above 0 requests/s for a pool of clients")
    parts = []
    skipped = 0
    for client, mine, path in clients:
        rng = np.random.default_rng([options.seed, client])
        active = [w for w in mine if w.start_s < end_s and w.start_s + WINDOW_S > begin_s]
        histograms = read_histograms(path.with_name(f"chunk-{client}-dataset.json")) if active else {}
        for window in active:
            drawn = _draw(window, histograms, factor, rng, options.rank_correlated)
            if drawn is None:
                skipped += 1
                continue
            inside = (drawn[0] >= begin_s) & (drawn[0] < end_s)
            parts.append((drawn[0][inside], drawn[1][inside], drawn[2][inside], client))
    if not parts:
        raise ValueError(f"{source.name}: the clients have no token data for [{begin_s:g}, {end_s:g}) s")
    return _rows(parts, skipped, len(clients), begin_s, end_s, options)


def _draw(
    window: Window, histograms: dict[float, dict[str, Histogram]], factor: float, rng: np.random.Generator, ranked: bool
) -> tuple[FloatArray, IntArray, IntArray] | None:
    begun = [start for start in histograms if start <= window.start_s]
    fields = histograms[max(begun)] if begun else {}
    prompt, output = fields.get("input_tokens") or fields.get("text_tokens"), fields.get("output_tokens")
    if prompt is None or output is None:
        return None
    count = math.ceil(window.rate_per_s * factor * WINDOW_S)
    gaps = rng.gamma(window.shape, size=count) if window.pattern == "Gamma" else rng.weibull(window.shape, size=count)
    total = float(gaps.sum())
    # Very bursty shapes can underflow to nothing but zeros: then the requests come together, at the start.
    at_s = np.cumsum(gaps) * (WINDOW_S / total) if total > 0 else np.zeros(count)
    uniform = rng.random(count)
    return window.start_s + at_s, prompt.draw(uniform), output.draw(uniform if ranked else rng.random(count))


def _rows(
    parts: list[tuple[FloatArray, IntArray, IntArray, int]],
    skipped: int, clients: int, begin_s: float, end_s: float, options: ReadOptions,
) -> Rows:  # fmt: skip
    arrival_s = np.concatenate([part[0] for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    tenants = np.concatenate([np.full(len(part[0]), part[3]) for part in parts])[order]
    rows = Rows(
        "servegen",
        np.arange(1, len(order) + 1, dtype=np.int64),
        np.concatenate([part[1] for part in parts])[order],
        np.concatenate([part[2] for part in parts])[order],
        unit="request",
    )
    rows.arrival_s = arrival_s[order]
    rows.tenant = [f"client-{client}" for client in tenants.tolist()]
    how = "one uniform for prompt and output (rank-correlated)" if options.rank_correlated else "independent"
    rows.notes.append(
        f"{clients} clients, window [{begin_s:g}, {end_s:g}) s, seed {options.seed}; prompt and output of a "
        f"client: {how}"
    )
    if skipped:
        rows.notes.append(f"{skipped} client windows have a rate but no token data: nothing sent")
    return rows
