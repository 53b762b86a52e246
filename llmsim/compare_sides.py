"""What is compared with what: schedulers and changed fields as scenarios, each under the name it was given by.

A side is written as for `llmsim compare`:

    NAME, file.py:Class          a scheduler: the scenario with it instead of its own
    FIELD=VALUE,…                the first side with these fields changed; KIND.NAME=VALUE is an argument of the plug-in
                                 KIND (scheduler.tpot_ms=40), and another engine brings its own scheduler

Schedulers come first, in the order given, or engines, each with the scheduler and the defaults it brings; without any
the first side is the scenario itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from llmsim.engines import Own, find_engine
from llmsim.scenario import Scenario
from llmsim.scenario_file import human_int, value_of

PLUGINS = ("scheduler", "router", "eviction", "admission")
DEFAULT_SIDE = "vllm"  # the scheduler of a scenario that names none


def sides_of(
    fields: dict[str, Any],
    schedulers: Sequence[str],
    variants: Sequence[str],
    *,
    engines: Sequence[str] = (),
    source: str = "flags",
) -> dict[str, Scenario]:
    """Name -> scenario of every side, each checked and resolved. Raises ValueError for fewer than two, or one twice.

    `engines`: two or more, each a side; one is a field like any other.
    """
    own = fields.get("scheduler_args")
    if own and len(schedulers) > 1:
        raise ValueError(
            f"scheduler_args={own} and {len(schedulers)} schedulers: which of them takes it? Give "
            f"--set scheduler=NAME,scheduler.{next(iter(own))}={own[next(iter(own))]} instead"
        )
    sides: dict[str, dict[str, Any]] = {}
    if engines and schedulers:
        raise ValueError(
            f"--engine {engines[0]} and {engines[1]} with --scheduler {schedulers[0]}: an engine brings its own"
            f" scheduler: give --set engine={engines[1]},scheduler={schedulers[0]} for such a side"
        )
    for name in engines:
        if name in sides:
            raise ValueError(f"--engine {name} is given twice: leave one out")
        sides[name] = changed(fields, f"engine={name}")
    if not schedulers and not engines:
        sides[str(fields.get("scheduler") or fields.get("engine") or DEFAULT_SIDE)] = fields
    for spec in schedulers:
        name = _short(spec, schedulers)
        if name in sides:
            raise ValueError(f"--scheduler {spec} is given twice: leave one out")
        sides[name] = fields | {"scheduler": spec}
    for text in variants:
        if text in sides:
            raise ValueError(f"--set {text} is given twice: leave one out")
        sides[text] = changed(next(iter(sides.values())), text)
    if len(sides) < 2:
        raise ValueError("one side to compare: add another --scheduler NAME or --set FIELD=VALUE (--set engine=sglang)")
    return {name: Scenario.from_dict(values, source=source).resolved() for name, values in sides.items()}


def parted(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(schedulers, variants) of sides written in one list."""
    schedulers: list[str] = []
    variants: list[str] = []
    for word in (text.strip() for text in words):
        (variants if "=" in word else schedulers).append(word)
    return schedulers, variants


def flags_of(words: Iterable[str]) -> list[str]:
    """The same sides as flags of `llmsim compare`."""
    schedulers, variants = parted(words)
    named = [word for spec in schedulers for word in ("--scheduler", spec)]
    return named + [word for text in variants for word in ("--set", text)]


def base_of(scenario: Scenario, words: Iterable[str]) -> Scenario:
    """The scenario whose flags stand beside those: without a scheduler of its own where sides name theirs."""
    fields = given(scenario)
    if parted(words)[0]:
        fields.pop("scheduler", None)
        fields.pop("scheduler_args", None)
    return Scenario.from_dict(fields)


def given(scenario: Scenario) -> dict[str, Any]:
    """The fields of a scenario that are not as its engine has them, so that a side may have another engine."""
    lacks = find_engine(scenario.engine).lacks
    return {
        field.name: value
        for field in dataclass_fields(scenario)
        if field.name not in lacks
        and not isinstance(value := getattr(scenario, field.name), Own)
        and not _usual(field, value)
    }


def _usual(field: Any, value: Any) -> bool:
    usual = (
        field.default_factory() if field.default is MISSING and field.default_factory is not MISSING else field.default
    )
    return usual is not MISSING and not isinstance(usual, Own) and bool(value == usual)


def stamps(scenarios: Iterable[Scenario]) -> tuple[tuple[str, int], ...]:
    """(path, time of change in ns) of every file that a plug-in of a side is in, where it is."""
    found: dict[str, int] = {}
    for scenario in scenarios:
        for kind in PLUGINS:
            path, colon, _ = str(getattr(scenario, kind)).rpartition(":")
            if colon and path.endswith(".py") and Path(path).is_file():
                found[path] = Path(path).stat().st_mtime_ns
    return tuple(sorted(found.items()))


def _short(spec: str, specs: Sequence[str]) -> str:
    """The class of a user's file, unless two of them are called the same."""
    name = spec.rpartition(":")[2]
    return spec if len([other for other in specs if other.rpartition(":")[2] == name]) > 1 else name


def changed(fields: dict[str, Any], text: str) -> dict[str, Any]:
    """Scenario fields with those of FIELD=VALUE,… changed; KIND.NAME=VALUE is an argument of the plug-in KIND."""
    values = dict(fields)
    seen: set[str] = set()
    for pair in pairs_of(text):
        name, sign, word = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        kind, dot, argument = name.partition(".")
        if not sign or not name or (dot and not argument):
            raise ValueError(f"--set {pair}: write FIELD=VALUE, e.g. max_num_seqs=64 or scheduler.headroom=0.05")
        if name in seen:
            raise ValueError(f"--set {text}: {name} is given twice: leave one out, or give a --set for each side")
        seen.add(name)
        if dot:
            values[f"{kind}_args"] = values.get(f"{kind}_args", {}) | {argument: value_of(word)}
            continue
        if f"{name}_args" in Scenario.__dataclass_fields__:  # another plug-in does not know the arguments of this one
            values.pop(f"{name}_args", None)
        if name == "engine":  # it brings its own scheduler
            values.pop("scheduler", None)
            values.pop("scheduler_args", None)
        values[name] = _typed(name, word)
    return values


def pairs_of(text: str) -> list[str]:
    """FIELD=VALUE,… cut at its commas, but for those within brackets, braces and quotes of a value."""
    pairs, depth, quoted, start = [], 0, False, 0
    for at, letter in enumerate(text):
        if letter == '"' and text[at - 1 : at] != "\\":
            quoted = not quoted
        elif not quoted and letter in "[{":
            depth += 1
        elif not quoted and letter in "]}":
            depth -= 1
        elif letter == "," and not quoted and depth == 0:
            pairs.append(text[start:at])
            start = at + 1
    if depth or quoted:
        raise ValueError(f"--set {text}: a bracket or a quote is not closed: write a table as JSON has it")
    return [*pairs, text[start:]]


def _typed(name: str, word: str) -> Any:
    """The value as the field has it: text stays text, 32k is a number where a number is wanted."""
    field = Scenario.__dataclass_fields__.get(name)
    kind = "" if field is None else str(field.type).removesuffix(" | None")
    if not word:
        raise ValueError(f"--set {name}=: no value: write {name}=VALUE, or leave it out")
    is_none = field is not None and word.lower() in ("null", "none") and "None" in str(field.type)
    if kind == "int" and not is_none:
        try:
            return human_int(word)
        except ValueError as error:
            raise ValueError(f"--set {name}={word}: {error}") from None
    if kind == "str" and not is_none:
        return word
    value = value_of(word.lower() if kind == "bool" else word)
    if kind.startswith("dict") and isinstance(value, str):
        raise ValueError(f'--set {name}={word}: not JSON: write a table, e.g. {name}={{"name": 1}}')
    return None if isinstance(value, str) and value.lower() == "none" else value
