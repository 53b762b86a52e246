"""What runs a sweep has: axes of settings, their product, and a run by its number. Files: llmsim.sweep_yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from llmsim.runs_origin import PLUGINS
from llmsim.scenario import Scenario

TRACE_OPTIONS = {  # of load_trace: the kind of value; its `model` is the scenario's here, so it is trace_model
    "format": "str", "columns": "dict[str, Any]", "time_unit": "str", "rate": "float", "time_scale": "float",
    "start_s": "float", "duration_s": "float", "limit": "int", "failed": "str", "trace_model": "str",
    "log_type": "str", "spread": "str", "over_context": "str", "block_tokens": "int", "strict_order": "bool",
    "sharegpt_mode": "str", "closed_loop": "bool", "max_wait_s": "float", "rank_correlated": "bool",
    "assign_classes": "str", "predict": "str",
}  # fmt: skip
KINDS = {
    name: str(one.type).removesuffix(" | None") for name, one in Scenario.__dataclass_fields__.items()
} | TRACE_OPTIONS


@dataclass(frozen=True)
class Point:
    """One position on an axis: what its columns show, and what it sets."""

    labels: tuple[Any, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    columns: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Spec:
    """A checked specification; `settings` are what all runs have."""

    source: str
    settings: dict[str, Any]
    axes: tuple[Axis, ...]
    goodput: dict[str, float] | None = None
    text: str = field(default="", compare=False, repr=False)

    @property
    def runs(self) -> int:
        return prod(len(axis.points) for axis in self.axes)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for axis in self.axes for column in axis.columns)

    def run(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(labels, settings) of a run: its digits in the mixed radix of the axes' lengths."""
        chosen: list[Point] = []
        for axis in reversed(self.axes):
            index, at = divmod(index, len(axis.points))
            chosen.append(axis.points[at])
        labels = tuple(label for point in reversed(chosen) for label in point.labels)
        given = {name: value for point in chosen for name, value in point.settings.items()}
        return labels, _replaced(self.settings, given)

    @property
    def digest(self) -> str:
        """Of what decides the runs; comments and layout of the file do not."""
        what = [self.settings, [asdict(axis) for axis in self.axes], self.goodput]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def named_traces(self) -> Iterator[str]:
        """The path of every trace, each once, in order of appearance."""
        seen: set[str] = set()
        for settings in (self.settings, *(point.settings for axis in self.axes for point in axis.points)):
            path = settings.get("trace")
            if path is not None and path not in seen:
                seen.add(path)
                yield path


def _replaced(settings: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """Another plug-in does not know the arguments of this one; another engine brings its own scheduler."""
    kept = dict(settings)
    for name in ("scheduler", *[name for name in by if name in PLUGINS]) if "engine" in by else by:
        if name in PLUGINS:
            kept = {key: value for key, value in kept.items() if not key.startswith(f"{name}.")}
    if "engine" in by:
        kept.pop("scheduler", None)
    return kept | by


def scenario_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Scenario among the settings of a run."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        kind, dot, argument = name.partition(".")
        if dot:
            fields[f"{kind}_args"] = fields.get(f"{kind}_args", {}) | {argument: value}
        elif name in Scenario.__dataclass_fields__:
            fields[name] = value
    return fields


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of load_trace among them, under its own names."""
    given = {name: settings[name] for name in TRACE_OPTIONS if settings.get(name) is not None}
    if "trace_model" in given:
        given["model"] = given.pop("trace_model")
    return given
