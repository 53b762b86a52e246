"""Python files of this machine that settings name: run on a click in this session, never because of a link."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.errors import StreamlitDuplicateElementKey
from streamlit.runtime.scriptrunner import get_script_run_ctx

from app_pages.shared_words import plain
from llmsim import plugins

SPEC = re.compile(r"(?P<path>.+\.py):\w*", re.DOTALL)
ALLOWED = "files_allowed"  # of the session's state: those that its person let run


class UnaskedError(ValueError):
    """A file that nobody let run in this session."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: a Python file of this machine, which has not run in this session: let it run first")
        self.path = path


def ask_for_files(*values: Any) -> None:
    """Raises `UnaskedError` for the first file that settings name (in fields, dictionaries, lists or as text)."""
    for path in _paths(values):
        _check(path)


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, str):
        found = SPEC.fullmatch(value)
        if found is not None:
            yield Path(found["path"])
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        for one in value:
            yield from _paths(one)


def _check(path: Path) -> None:
    """Of a page only: `llmsim` itself, its tests and workers run what they are given."""
    if get_script_run_ctx(suppress_warning=True) is None or _named(path) in st.session_state.get(ALLOWED, ()):
        return
    if path.is_file():  # of another the loader has more to say
        raise UnaskedError(path)


def _named(path: Path) -> str:
    return str(path.resolve())


def ask(path: Path) -> None:
    """The question, and the button that answers it."""
    name = _named(path)
    st.warning(
        f"This runs a Python file of this machine, with all that you may do: {plain(name)}. Look at it first if a link "
        "brought it here.",
        icon=":material/security:",
    )
    try:
        st.button(
            f"Run the policy file {plain(path.name)}?",
            key=f"allow_{sha256(name.encode()).hexdigest()[:16]}",
            on_click=lambda: st.session_state.setdefault(ALLOWED, set()).add(name),
        )
    except StreamlitDuplicateElementKey:  # both sides name it: one button is enough
        return


plugins.checks.add(_check)
