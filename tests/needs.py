"""What some tests need beyond the test extra: skipped without it at home, failing without it in CI."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def require(module: str) -> None:
    """Call at the top of a test module that imports `module`."""
    if importlib.util.find_spec(module) is None:
        if os.environ.get("CI"):
            raise RuntimeError(f"{module} is not installed: CI installs it (.ci/run)")
        pytest.skip(f"{module} is not installed: pip install {module}", allow_module_level=True)


def there(path: Path) -> pytest.MarkDecorator:
    """Marks a test that reads files which stand beside a checkout."""
    return pytest.mark.skipif(not path.exists() and not os.environ.get("CI"), reason=f"{path} is absent")
