"""Scenario files (.toml or .json, one field a line) and the integers people write in them and on command lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SUFFIXES: dict[str, int] = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}


def value_of(text: str) -> Any:
    """A number, true, false, null or a list as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def human_int(text: str) -> int:
    """vLLM's integers: 8192, 8k = 8000, 8K = 8192, 25.6k = 25600 (a fraction only before a decimal suffix)."""
    match = re.fullmatch(r"(-?\d+)|(\d+(?:\.\d+)?)([kmgt])|(\d+)([KMGT])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a whole number: write 32768, 32k (32000) or 32K (32768)")
    plain, decimal, small, binary, large = (str(group or "") for group in match.groups())
    if plain:
        return int(plain)
    if binary:
        return int(binary) * SUFFIXES[large]
    whole, _, fraction = decimal.partition(".")
    scale = SUFFIXES[small]
    tenths: int = 10 ** len(fraction)
    part, remainder = divmod(int(fraction or "0") * scale, tenths)
    if remainder:
        raise ValueError(f"{text!r} is not a whole number of tokens: write it out")
    return int(whole) * scale + part


def read_scenario(path: str | Path) -> dict[str, Any]:
    """The fields of a scenario file (.toml or .json). Not a Scenario yet: flags may add to them or override them."""
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(
            f"{path}: a scenario file ends in .toml or .json, not in {path.suffix!r}: rename or convert it"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    values = _parse(path, text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a scenario is one object of fields, not a {type(values).__name__}")
    return values


def _parse(path: Path, text: str) -> Any:
    kind = path.suffix[1:].upper()
    try:
        if kind == "TOML":
            import tomllib

            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ValueError(f"{path}: not valid {kind}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply: a scenario is one field a line") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"field {key!r} is given twice: keep one")
        values[key] = value
    return values


def toml_line(name: str, value: Any) -> str:
    return f"{name} = {_toml(value)}\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # a TOML basic string has JSON's escapes, and wants one for DEL too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
