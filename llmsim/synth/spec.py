"""The spelling of a generator: ``name:key=value,key=value``.

Lists are separated by ``/`` (``rates=2/20``), a generator inside another stands in parentheses
(``think=(exponential:mean=5)``). Every key not used by the generator is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Spec:
    """A parsed generator; values are taken out one by one, `done` refuses what is left."""

    text: str
    name: str
    values: dict[str, str]
    used: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        return key in self.values

    def text_of(self, key: str, default: str | None = None) -> str:
        self.used.add(key)
        if key in self.values:
            return self.values[key]
        if default is None:
            raise ValueError(f"{self.text!r}: {self.name} needs {key}=...; for example {self.name}:{key}=10")
        return default

    def number(
        self, key: str, default: float | None = None, *, least: float = -math.inf, above: float = -math.inf
    ) -> float:
        text = self.text_of(key, None if default is None else repr(default))
        return _number(self.text, key, text, least, above)

    def numbers(self, key: str, default: str | None = None, *, least: float = 0.0) -> list[float]:
        return [_number(self.text, key, text, least, -math.inf) for text in split(self.text_of(key, default), "/")]

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        number = self.number(key, default, least=least)
        if number != int(number):
            raise ValueError(f"{self.text!r}: {key}={number:g} must be a whole number")
        return int(number)

    def done(self) -> None:
        left = [key for key in self.values if key not in self.used]
        if left:
            known = ", ".join(sorted(self.used)) or "no keys"
            raise ValueError(f"{self.text!r}: {self.name} does not know {', '.join(left)}; it takes {known}")


def _number(text: str, key: str, value: str, least: float, above: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or (math.isinf(number) and key != "rate"):
        raise ValueError(f"{text!r}: {key}={value} is not a finite number")
    if number < least or number <= above:
        limit = f"at least {least:g}" if number < least else f"above {above:g}"
        raise ValueError(f"{text!r}: {key}={value} must be {limit}")
    return number


def split(text: str, mark: str) -> list[str]:
    """Split at `mark` outside parentheses; parentheses around a whole part are taken off."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == mark and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise ValueError(f"{text!r}: parentheses do not match")
    parts.append(text[start:])
    return [part.strip() for part in parts]


def bare(text: str) -> str:
    return text[1:-1] if text.startswith("(") and text.endswith(")") else text


def parse(text: str) -> Spec:
    name, _, rest = bare(text.strip()).partition(":")
    values: dict[str, str] = {}
    for part in split(rest, ",") if rest.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(f"{text!r}: {part!r} is not key=value; write {name}:key=value,key=value")
        if key.strip() in values:
            raise ValueError(f"{text!r}: {key.strip()} is given twice")
        values[key.strip()] = value.strip()
    return Spec(text, name.strip(), values)
