"""What a page shows: headers, charts, errors, downloads, command lines."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any

import altair
import pandas as pd
import streamlit as st

from app_pages.shared_files import UnaskedError, ask
from app_pages.shared_words import plain
from llmsim.choice import SHIPPED
from llmsim.command_line import as_text
from llmsim.metrics import json_safe
from llmsim.plugins import PolicyError, users_line
from llmsim.runs import Run
from llmsim.views import Kpi, rejections

SAME = 0.0005  # relative: shown as no difference
WIDGETS = {  # options, and what they are called here
    "Give --over-context drop or truncate": "Choose drop or truncate for requests longer than the model's context",
    "give --over-context drop or truncate": "choose drop or truncate for requests longer than the model's context",
    "add another --scheduler NAME or --set FIELD=VALUE (--set engine=sglang)": "add a side, e.g. engine=sglang",
    "aise --max-model-len": "aise max_model_len (other settings)",
}
FLAG = re.compile(r"(?<![\w-])--(?:columns|format|time-unit|rate|failed|model-filter|log-type|block-tokens|start)\b")
Files = dict[str, Callable[[], bytes]]


def page_header(title: str, caption: str) -> None:
    st.title(title)
    st.caption(caption)


def show_error(error: Exception) -> None:
    """The library's own sentence, in place; what has to be asked first, as a question."""
    if isinstance(error, UnaskedError):
        ask(error.path)
    else:
        st.error(plain(in_words(error)), icon=":material/error:")


def say(notes: Iterable[str]) -> None:
    """What the library did to the requests, or found about them."""
    for note in dict.fromkeys(notes):
        st.caption(f":material/info: {plain(note).rstrip('.')}.")


def warn_of_rejections(runs: Mapping[str, Run]) -> None:
    """By what the runs are called."""
    for label, run in runs.items():
        if words := rejections(run):
            st.warning(plain(words), title=f"The {label} answers only some requests", icon=":material/block:")


@contextmanager
def error_in_place(*folders: Path) -> Iterator[None]:
    """What the user can put right is shown where it happened; the rest of the page goes on without it.

    That is what the library refuses, a full disk, an error in a user's own file, and, of run `folders` that the
    dashboard was started with, whatever is not as llmsim writes it.
    """
    try:
        yield
    except (ValueError, OSError, PolicyError) as error:
        show_error(error)
    except Exception as error:
        where = users_line(error)
        if where:
            show_error(PolicyError(f"{where}: {_told(error)}: repair the file"))
        elif folders and isinstance(error, LookupError | TypeError | AttributeError):
            named = ", ".join(map(str, folders))
            show_error(ValueError(f"{named}: not as llmsim writes a run ({_told(error)}): make the run again"))
        else:
            raise


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def for_pages(words: str) -> str:
    """Advice that names options of the command line, so that it can be followed here."""
    if words.startswith("synthetic:"):
        words = words.replace("Give --over-context drop or truncate", "Take shorter prompts and answers")
    if words.startswith(tuple(f"{name}:" for name in SHIPPED)):  # for which there is no widget
        words = words.replace("Give --over-context drop or truncate, or raise", "Raise")
    for option, widget in WIDGETS.items():
        words = words.replace(option, widget)
    if FLAG.search(words):
        words = words.rstrip(".") + "; such options belong to `llmsim trace convert`, whose file can be opened here"
    return words


def in_words(error: Exception) -> str:
    """The library's own sentence; of the system's refusals the file, and what can be done about it."""
    if not isinstance(error, OSError) or error.strerror is None:
        return for_pages(str(error))
    full = error.errno in (ENOSPC, EDQUOT)
    fix = "free some space, or set TMPDIR to a roomier folder" if full else "see whether it is there and yours"
    return f"{error.filename or 'a file'}: {error.strerror}: {fix}"


def chart(
    drawing: Any, *, key: str, alt: str = "", on_select: Callable[..., None] | str | None = None, **options: Any
) -> Any:
    """A chart in the page's width and theme. With `on_select="rerun"` it returns what is selected in it.

    `alt`: what a screen reader says; the chart's own description unless given. Panels on top of each other are drawn
    one by one, since a browser stretches no chart of several.
    """
    own = getattr(drawing, "description", "")
    said = alt or (own if isinstance(own, str) else "")
    if isinstance(drawing, altair.VConcatChart):
        drawing = panels(drawing)
    if isinstance(drawing, Sequence):
        with st.container(gap=None):
            for number, panel in enumerate(drawing):
                chart(panel, key=f"{key}_{number}", alt=said and f"{said}, panel {number + 1}")
        return None
    drawn = drawing.copy(deep=False)
    drawn.description = altair.Undefined  # `alt` says it
    drawn.config = _of_theme(drawn.config)
    if drawn.autosize is altair.Undefined:  # the height that the chart was given is that of its plot
        drawn.autosize = altair.AutoSizeParams(type="fit-x", contains="padding")
    drawn.padding = {"left": 0, "top": 5, "right": 16, "bottom": 5}  # the last label of an axis reaches beyond it
    return st.altair_chart(drawn, width="stretch", alt=said, key=key, on_select=on_select or "ignore", **options)


TEXTS = ("labelColor", "titleColor", "color")  # a theme has no colour of subtitles


def _of_theme(config: Any) -> Any:
    """Words around a chart in the colour of those on the page: the chart's own have to be read on any background."""
    if config is altair.Undefined:
        return config
    config = config.copy(deep=True)
    for part in (config[name] for name in ("axis", "legend", "title")):
        for name in TEXTS if part is not altair.Undefined else ():
            part[name] = altair.Undefined
    return config


def panels(stack: altair.VConcatChart) -> list[Any]:
    """The charts of a stack, each with the look of the whole; its title goes on top of the first."""
    look = {"config": stack.config, "background": stack.background}
    parts = []
    for number, part in enumerate(stack.vconcat):
        alone = part.copy(deep=False)
        for name, value in look.items():
            alone[name] = value
        if number == 0 and stack.title is not altair.Undefined and alone.title is altair.Undefined:
            alone.title = stack.title
        parts.append(alone)
    return parts


def table(
    frame: pd.DataFrame,
    key: str,
    columns: Mapping[str, tuple[str, str | None]],
    colours: Mapping[str, str] | None = None,
) -> None:
    """The columns of a frame that have a heading (and a number's format) in `columns`, in that order.

    `colours`: of the names in its column `side`.
    """
    there = [name for name in columns if name in frame.columns]
    shown = {
        name: st.column_config.Column(columns[name][0])
        if columns[name][1] is None
        else st.column_config.NumberColumn(columns[name][0], format=columns[name][1])
        for name in there
    }
    drawn: Any = frame
    if colours:
        drawn = frame.style.map(lambda side: f"color: {colours[side]}; font-weight: bold", subset=["side"])
    st.dataframe(drawn, hide_index=True, column_config=shown, column_order=there, key=key, placeholder="–")


def figures(rows: Sequence[dict[str, Any]]) -> None:
    """A row of numbers: each `label`, `value` and, if known, `delta`, `delta_color`, `help`, `delta_description`."""
    with st.container(horizontal=True):  # as many beside each other as can be read
        for row in rows:
            st.metric(border=True, height="stretch", width="stretch", **row)


def kpi_row(numbers: Sequence[Kpi]) -> None:
    """The candidate's headline numbers and how far they are from the baseline's."""
    figures([_metric(number) for number in numbers])


def _metric(number: Kpi) -> dict[str, Any]:
    colours = {"lower": "inverse", "higher": "normal", None: "off"}
    small = number.relative is None or abs(number.relative) < SAME
    now = number.baseline if number.candidate is None else number.candidate
    words = "same" if number.candidate is not None else None
    return {
        "label": f"{number.title} ({number.unit})" + ("\\*" if number.few else ""),
        "value": _shown(now),
        "delta": words if small else f"{number.relative:+.1%}",
        "delta_color": "off" if small else colours[number.better],
        "delta_arrow": "off" if small else "auto",
        "delta_description": None if number.candidate is None else f"from {_shown(number.baseline)}",
        "help": number.few or None,
    }


def kpi_table(numbers: Sequence[Kpi]) -> pd.DataFrame:
    """All numbers, side by side; returns what is shown."""
    columns = ["number", "baseline", "candidate", "difference", "note"]
    rows = [(f"{n.title} ({n.unit})", n.baseline, n.candidate, n.delta, n.few) for n in numbers]
    table = pd.DataFrame(rows, columns=columns)
    shown = table.assign(**{name: table[name].map(_shown) for name in columns[1:4]})
    shown["number"] += ["\\*" if n.few else "" for n in numbers]
    st.table(
        shown.drop(columns="note").set_index("number"), alt="All headline numbers of both set-ups, with differences"
    )
    for note in dict.fromkeys(n.few for n in numbers if n.few):
        st.caption(f"\\* {note}.")
    return table


def _shown(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    if value and abs(value) < 10:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def footer(
    key: str,
    *,
    commands: Sequence[Sequence[str] | None],
    whole: Sequence[Sequence[str] | None] = (),
    frames: dict[str, pd.DataFrame],
    drawings: Mapping[str, Any] | None = None,
) -> None:
    """What every page ends with: the same for a terminal, and everything to take along."""
    left, right = st.columns([4, 1])
    with left:
        command_line(*commands, whole=whole)
    with right:
        files: Files = {}
        for name, frame in frames.items():
            files |= _frame_files(frame, f"{key}_{name}")
        for name, drawing in (drawings or {}).items():
            files[f"{key}_{name}.png"] = partial(_png, drawing)
        downloads(key, files)


def drawn_with_downloads(frame: pd.DataFrame, drawing: Any, key: str, name: str, alt: str = "") -> None:
    """A chart, and below it what it is drawn from to take along."""
    chart(drawing, alt=alt, key=f"{key}_chart")
    downloads(key, frame, name=name, drawing=drawing)


def downloads(
    key: str,
    files: pd.DataFrame | Callable[[], pd.DataFrame] | Files,
    *,
    name: str = "llmsim",
    drawing: Any = None,
    more: Files | None = None,
) -> None:
    """Buttons that save: a frame (or what makes it) as CSV, Parquet and JSON, a `drawing` as PNG too; or any files by
    name; and `more` of them.

    Nothing is made before it is asked for.
    """
    if isinstance(files, pd.DataFrame) or callable(files):
        files = _frame_files(files, name)
    if drawing is not None:
        files = files | {f"{name}.png": lambda: _png(drawing)}
    files = files | (more or {})
    with st.popover("Download", icon=":material/download:", key=f"{key}_downloads"):
        for file, make in files.items():
            st.download_button(
                plain(file), make, file_name=file, key=f"{key}_{file}", on_click="ignore", icon=":material/download:"
            )


def _frame_files(given: pd.DataFrame | Callable[[], pd.DataFrame], name: str) -> Files:
    def frame() -> pd.DataFrame:
        return given() if callable(given) else given

    def parquet() -> bytes:
        buffer = io.BytesIO()
        frame().to_parquet(buffer, index=False)
        return buffer.getvalue()

    def as_json() -> bytes:
        return (json.dumps(json_safe(frame().to_dict("records")), indent=1) + "\n").encode()

    return {
        f"{name}.csv": lambda: frame().to_csv(index=False).encode(),
        f"{name}.parquet": parquet,
        f"{name}.json": as_json,
    }


def _png(drawing: Any) -> bytes:
    from llmsim.charts import png

    return png(drawing)


def command_line(*commands: Sequence[str] | None, whole: Sequence[Sequence[str] | None] = ()) -> None:
    """What was done here, for a terminal: one line a command, with a button that copies them.

    `whole`: what would be asked of the whole trace, where this answer is a quick one.
    """
    with st.expander("Copy as command line", icon=":material/terminal:"):
        _code(commands)
        if whole:
            st.caption("This gives what is shown. All that was asked, on the whole trace:")
            _code(whole)


def _code(commands: Sequence[Sequence[str] | None]) -> None:
    st.code("\n".join(as_text(argv) for argv in commands if argv), language="bash", wrap_lines=True)
