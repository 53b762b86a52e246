"""The files that a specification names (traces, policies, profiles, model configurations) and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmsim.readers.source import open_source
from llmsim.sweep_spec import PLUGINS, Spec


def digests(spec: Spec) -> dict[str, str]:
    """SHA-256 of every file, by its path as written. FileNotFoundError for a trace that is not there."""
    found: dict[str, str] = {}
    for settings in (spec.settings, *(point.settings for axis in spec.axes for point in axis.points)):
        for path in used_files(settings):
            if path not in found:
                is_trace = path == settings.get("trace")
                found[path] = open_source(path).sha256 if is_trace else _digest(Path(path))
    return dict(sorted(found.items()))


def used_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Paths among the settings of a run: the trace, file.py:Class, and what exists of model and cost."""
    if "trace" in settings:
        yield settings["trace"]
    yield from setting_files(settings)


def setting_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Of a scenario's fields alone."""
    for name in PLUGINS:
        spec = settings.get(name)
        path, colon, _ = str(spec or "").rpartition(":")
        if colon and path.endswith(".py"):
            yield path
    for name in ("model", "cost"):
        place = Path(str(settings.get(name) or ""))
        for file in (place, place / "config.json"):
            if file.is_file():
                yield str(file)


def _digest(path: Path) -> str:
    """Empty for a file that is not there: the runs that need it say so."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
