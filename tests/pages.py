"""Pages of the dashboard by Streamlit's AppTest, opened with settings, and what tests ask of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from needs import require

require("streamlit")
require("altair")

from streamlit.testing.v1 import AppTest  # noqa: E402 - after the check

PAGES = Path(__file__).parent.parent / "app_pages"


def page(name: str, **state: Any) -> AppTest:
    """`app_pages/NAME.py`, its widgets set as a session has them."""
    test = AppTest.from_file(str(PAGES / f"{name}.py"), default_timeout=60)
    for key, value in state.items():
        test.session_state[key] = value
    return _ran(test)


def linked(name: str, **query: Any) -> AppTest:
    """The same from the address: what a shared link says."""
    test = AppTest.from_file(str(PAGES / f"{name}.py"), default_timeout=60)
    for key, value in query.items():
        test.query_params[key] = value
    return _ran(test)


def _ran(test: AppTest) -> AppTest:
    test.run()
    assert not test.exception, test.exception
    return test


def shown(text: str) -> str:
    """Markdown as it is read: without what keeps words from being taken for marks."""
    return re.sub(r"\\([^\w\s]|_)", r"\1", text).replace("\u2060", "")


def errors(test: AppTest) -> list[str]:
    return [shown(error.value) for error in test.error]


def warnings(test: AppTest) -> list[str]:
    return [shown(warning.value) for warning in test.warning]


def captions(test: AppTest) -> str:
    return "\n".join(shown(caption.value).removeprefix(":material/info: ") for caption in test.caption)


def charts(test: AppTest) -> int:
    return len(test.get("vega_lite_chart"))


def commands(test: AppTest) -> str:
    return "\n".join(code.value for code in test.code)
