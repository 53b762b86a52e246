"""What a run came from, as its manifest records it: enough to repeat it, and to see what has changed since.

trace     name, sha256, requests; path as given (null: standard input), folder it was given in, options of load_trace
goodput   the targets (ms) that the summary has
price     of a GPU and hour, if it was not llmsim's own: the fields of `llmsim.prices.Price`
written   what was asked for beside the usual files: timeline, detailed
inputs    SHA-256 of every other file that the scenario names: policies, a model's config.json, a profile
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsim.scenario import Scenario

if TYPE_CHECKING:
    from llmsim.prices import Price
    from llmsim.trace import Trace

PLUGINS = tuple(name.removesuffix("_args") for name in Scenario.__dataclass_fields__ if name.endswith("_args"))


def origin(
    trace: Trace,
    path: str | Path,
    options: Mapping[str, Any],
    scenario: Scenario,
    *,
    goodput: Mapping[str, float] | None = None,
    price: Price | None = None,
    timeline: bool = False,
    detailed: bool = False,
    synthesis: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`manifest_extra` of write_run. `options`: the keyword arguments load_trace got, context_tokens and seed apart.

    `path` says nothing for a synthetic trace (`synthesis`: what it was made from).
    """
    nowhere = str(path) == "-" or synthesis is not None
    facts = {
        "name": trace.name,
        "sha256": trace.sha256 or ("" if nowhere else digest(path)),
        "requests": len(trace),
        "path": None if nowhere else str(path),
        "folder": os.getcwd(),
        "options": recorded(options),
    }
    return {
        "trace": facts if synthesis is None else facts | {"synthesis": dict(synthesis)},
        "goodput": None if goodput is None else dict(goodput),
        "price": None if price is None else asdict(price),
        "written": {"timeline": timeline, "detailed": detailed},
        "inputs": {file: digest(file) for file in scenario_files(scenario.to_dict())},
    }


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON has them: a rate of inf, which it lacks, as text."""
    return {name: "inf" if value == float("inf") else value for name, value in options.items()}


def options_from(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same back again."""
    return {name: float("inf") if value == "inf" else value for name, value in record.items()}


def scenario_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Paths among the fields of a scenario: file.py:Class of a plug-in, and what is a file of model and cost."""
    for name in PLUGINS:
        path, colon, _ = str(settings.get(name) or "").rpartition(":")
        if colon and path.endswith(".py"):
            yield path
    for name in ("model", "cost"):
        place = Path(str(settings.get(name) or ""))
        for file in (place, place / "config.json"):
            if file.is_file():
                yield str(file)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's names and files; empty if there is nothing."""
    place = Path(path)
    if place.is_dir():
        inside = [(str(file.relative_to(place)), digest(file)) for file in sorted(place.rglob("*")) if file.is_file()]
        return hashlib.sha256(repr(inside).encode()).hexdigest()
    try:
        return hashlib.sha256(place.read_bytes()).hexdigest()
    except OSError:
        return ""
