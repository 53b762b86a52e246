"""Text for terminals: columns, paragraphs, numbers that may not exist, and the file that an error is about."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap

WIDTH = 118
TICK, CROSS = "✓", "✗"  # a promise that is kept, and one that is not


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> Iterator[str]:
    """Columns as wide as they need to be: those numbered in `left` (text) to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """Lines of a paragraph, all but the first indented."""
    return wrap(text, width, subsequent_indent="  ")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError inside is about `path`, the file that was asked for, and not about an unfinished one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error


def number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"
