"""What a page shows: headers, charts, errors, downloads, command lines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import streamlit as st

from llmsim.command_line import as_text
from llmsim.metrics import json_safe
from llmsim.plugins import PolicyError

Files = dict[str, Callable[[], bytes]]


def page_header(title: str, caption: str) -> None:
    st.title(title)
    st.caption(caption)


def show_error(error: Exception) -> None:
    """The library's own sentence, in place."""
    st.error(" ".join(str(error).split()), icon=":material/error:")


@contextmanager
def error_in_place() -> Iterator[None]:
    """What the user can put right is shown where it happened; the rest of the page goes on without it."""
    try:
        yield
    except (ValueError, FileNotFoundError, PolicyError) as error:
        show_error(error)


def chart(
    drawing: Any, *, alt: str, key: str, on_select: Callable[..., None] | str | None = None, **options: Any
) -> Any:
    """A chart in the page's width and theme. With `on_select="rerun"` it returns what is selected in it."""
    return st.altair_chart(drawing, width="stretch", alt=alt, key=key, on_select=on_select or "ignore", **options)


def figures(rows: Sequence[dict[str, Any]]) -> None:
    """A row of numbers: each `label`, `value` and, if known, `delta`, `delta_color`, `help`, `delta_description`."""
    for place, row in zip(st.columns(len(rows)), rows, strict=True):
        place.metric(border=True, height="stretch", **row)


def downloads(key: str, files: pd.DataFrame | Files, *, name: str = "llmsim", drawing: Any = None) -> None:
    """Buttons that save: a frame as CSV, Parquet and JSON, a `drawing` as PNG too; or any files by name.

    Nothing is made before it is asked for.
    """
    if isinstance(files, pd.DataFrame):
        files = _frame_files(files, name)
    if drawing is not None:
        files = files | {f"{name}.png": lambda: _png(drawing)}
    with st.popover("Download", icon=":material/download:", key=f"{key}_downloads"):
        for file, make in files.items():
            st.download_button(
                file, make, file_name=file, key=f"{key}_{file}", on_click="ignore", icon=":material/download:"
            )


def _frame_files(frame: pd.DataFrame, name: str) -> Files:
    def parquet() -> bytes:
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()

    def as_json() -> bytes:
        return (json.dumps(json_safe(frame.to_dict("records")), indent=1) + "\n").encode()

    return {
        f"{name}.csv": lambda: frame.to_csv(index=False).encode(),
        f"{name}.parquet": parquet,
        f"{name}.json": as_json,
    }


def _png(drawing: Any) -> bytes:
    from llmsim.charts import png

    return png(drawing)


def command_line(*commands: Sequence[str]) -> None:
    """What was done here, for a terminal: one line a command, with a button that copies them."""
    with st.expander("Copy as command line", icon=":material/terminal:"):
        st.code("\n".join(as_text(argv) for argv in commands), language="bash", wrap_lines=True)
