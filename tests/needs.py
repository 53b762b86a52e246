"""What some tests need beyond the test extra: skipped without it at home, failing without it in CI."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require(module: str) -> None:
    """Call at the top of a test module that imports `module`."""
    if importlib.util.find_spec(module) is None:
        if os.environ.get("CI"):
            raise RuntimeError(f"{module} is not installed: CI installs it (.ci/run)")
        pytest.skip(f"{module} is not installed: pip install {module}", allow_module_level=True)
