"""The files that a specification names (traces, policies, profiles, model configurations) and their digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmsim.readers.source import open_source
from llmsim.runs_origin import digest, scenario_files
from llmsim.sweep_spec import Spec


def digests(spec: Spec) -> dict[str, str]:
    """SHA-256 of every file, by its path as written. FileNotFoundError for a trace that is not there."""
    found: dict[str, str] = {}
    for settings in (spec.settings, *(point.settings for axis in spec.axes for point in axis.points)):
        for path in used_files(settings):
            if path not in found:
                is_trace = path == settings.get("trace")
                found[path] = (open_source(path).sha256 if is_trace else "") or digest(path)
    return dict(sorted(found.items()))


def used_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Paths among the settings of a run: the trace, file.py:Class, and what exists of model and cost."""
    if "trace" in settings:
        yield settings["trace"]
    yield from scenario_files(settings)
