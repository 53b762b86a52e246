"""What a link asked for and did not get: Streamlit drops a value that a widget cannot show, and says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from app_pages.shared_scenario import WIDGETS
from app_pages.shared_words import plain

PAGES = ("trace_", "slo_", "plan_", "pol_", "ph_", "ca_", "requests_", "shown_", "embed")  # how keys begin
WHOLE = {"trace", "shown", *(f"{side}_{name}" for side in ("base", "cand") for name in WIDGETS)}
ASKED = "link_asked"  # of the session's state: what its link said
UNUSED = "link_unused"  # of the session's state: by key what the link said, and what the widget showed instead


@contextmanager
def checked_link() -> Iterator[None]:
    """Around a page: a line above it names what of its link was not used, for as long as the widget shows the same."""
    state, place = st.session_state, st.container()
    if ASKED not in state:  # as it came: what is not used is gone from the address in the next run
        state[ASKED] = {key: st.query_params.get_all(key) for key in st.query_params}
    with suppress(StopException):  # of a page that ends early, by `end_page`
        yield
    _tell(place)


def end_page() -> NoReturn:
    """No more of this page. Unlike `st.stop`, which lets nothing be drawn any more, around the page either."""
    raise StopException


def _tell(place: Any) -> None:
    state = st.session_state
    if UNUSED not in state:
        state[UNUSED] = {key: (raw, _now(key)) for key, raw in state[ASKED].items() if not _used(key, raw)}
    lines = [_told(key, raw) for key, (raw, instead) in state[UNUSED].items() if _now(key) == instead]
    if lines:
        place.warning("Not used of this link: " + "; ".join(lines) + ".", icon=":material/link_off:")


def _now(key: str) -> Any:
    return st.session_state.get(key)


def _used(key: str, raw: list[str]) -> bool:
    """Also what another page will use."""
    if key not in st.session_state:
        return key in WHOLE or key.startswith(PAGES)
    now = _now(key)
    values = list(now) if isinstance(now, list | tuple) else [now]
    if st.query_params.get_all(key) == raw and (len(raw) == 1 or isinstance(now, list | tuple)):
        return True
    return len(values) == len(raw) and all(map(_alike, raw, values))


def _alike(word: str, value: Any) -> bool:
    """Whether a link's word means the value of a widget (which is its usual one, or it would be in the address)."""
    if value is None or isinstance(value, bool):
        return word.lower() in ({"", "none"} if value is None else {str(value).lower()})
    try:
        return float(word) == float(value)
    except (TypeError, ValueError):
        return word.casefold() == str(value).casefold()


def _told(key: str, raw: list[str]) -> str:
    if key not in st.session_state:
        return f"{plain(key)} (nothing is called so)"
    now = _now(key)
    shown = ", ".join(map(str, now)) if isinstance(now, list | tuple) else now
    given = " and ".join(f"{key}={word}" for word in raw)
    return f"{plain(given)} ({'nothing' if shown in (None, '') else plain(shown)} instead)"
