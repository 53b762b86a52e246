"""What a reader hands over: columns of requests in file order, before anything is dropped, sorted or rescaled.

`Rows` is to a file what `llmsim.trace.Trace` is to a replay. Times are seconds from any origin; `line` is where each
request stood in its file (1-based; the row number for formats without lines) so that later errors can name it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Blocks = list[tuple[Hashable, ...]]

LISTED = 5  # bad lines named in one message; the rest are counted
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
MAX_TOKENS = 1_000_000_000  # above this a token count is a mistake (a time stamp, an id), not a prompt


@dataclass(frozen=True)
class ReadOptions:
    """What the user may tell a reader; None means the format's own rule."""

    columns: Mapping[str, str] | None = None
    time_unit: str | None = None
    failed: str = "drop"
    model: str | None = None
    log_type: str | None = None
    block_tokens: int | None = None
    sharegpt_mode: str = "multi-turn"
    closed_loop: bool = False
    max_wait_s: float | None = None
    rate: float | None = None
    seed: int = 0
    tokenizer: Callable[[str], int] | None = None
    rank_correlated: bool = False
    start_s: float | None = None
    duration_s: float | None = None

    def unit_s(self, of_format: str) -> float:
        return UNITS_S[self.time_unit or of_format]


@dataclass
class Rows:
    """Requests as a file states them; optional columns are None when the file has none."""

    format: str
    line: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    arrival_s: FloatArray | None = None  # nan: waits for its parent; None: the file has no times
    unit: str = "line"  # what `line` counts
    ids: list[str] | None = None
    session: list[str] | None = None
    parent: IntArray | None = None
    delay_s: FloatArray | None = None
    block_tokens: int = 0
    block_ids: Blocks | None = None
    output_block_ids: Blocks | None = None
    priority: IntArray | None = None
    slo_class: list[str] | None = None
    tenant: list[str] | None = None
    model: list[str] | None = None
    slo_ttft_s: FloatArray | None = None
    slo_tpot_s: FloatArray | None = None
    deadline_s: FloatArray | None = None
    predicted_tokens: FloatArray | None = None
    time_unit: str | None = None  # unit of numeric stamps that no column name or date settles
    tick_s: float = 0.0  # resolution of the stamps where the format has a coarse one
    burstiness: float = 1.0  # gamma shape of arrivals that have to be regenerated
    rate: float | None = None  # their rate, where the file states it
    notes: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # conversations and rows that never became a request
    drops: list[tuple[NDArray[np.bool_], str]] = field(default_factory=list)  # (mask, reason) over these rows

    def drop(self, mask: NDArray[np.bool_], reason: str) -> None:
        """Mark rows to leave out; the first reason given for a row is the one counted."""
        if mask.any():
            self.drops.append((mask, reason))


def bad_rows(
    name: str, bad: Sequence[tuple[int, object]], column: str, expected: str, fix: str = "", unit: str = "line"
) -> ValueError:
    """One line for any number of bad values: the first in full, up to four more by line, then a count."""
    line, value = bad[0]
    more = ""
    if len(bad) > 1:
        more = " (also " + ", ".join(f"{unit} {at}: {shown(what)}" for at, what in bad[1:LISTED])
        more += f" and {len(bad) - LISTED} more)" if len(bad) > LISTED else ")"
    return ValueError(
        f"{name}: {unit} {line}, {column}: {shown(value)} is not {expected}{more}{'; ' + fix if fix else ''}"
    )


def shown(value: object) -> str:
    """A value as a message quotes it: never empty, never long, never with a line break."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    number_like = not isinstance(value, str) or (text and set(text) <= set("0123456789.,-+eE_"))
    return text if number_like and "\n" not in text else repr(text)


def listed(items: Sequence[Any]) -> str:
    head = ", ".join(str(item) for item in items[:LISTED])
    return head + (f" and {len(items) - LISTED} more" if len(items) > LISTED else "")
