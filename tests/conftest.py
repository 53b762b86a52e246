"""What every process of the tests does once."""

from __future__ import annotations

import sys
from functools import cache


def pytest_collection_finish() -> None:
    """Every AppTest looks through the metadata of all installed packages for components: a third of its time.

    What is installed stays, so one look is enough for a process. Only where a test has imported Streamlit.
    """
    if "streamlit.testing.v1" in sys.modules:
        from streamlit.components.v2 import manifest_scanner

        manifest_scanner.scan_component_manifests = cache(manifest_scanner.scan_component_manifests)
