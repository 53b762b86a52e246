"""What a GPU costs per hour: `llmsim/prices.toml`, or a file of the user's in the same form.

[h100-sxm]
usd_per_gpu_hour = 3.99
source = "where it says so"
date = 2026-09-20
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmsim.hardware import find_gpu

KEYS = ("usd_per_gpu_hour", "source", "date")
MOST_USD = 1_000_000


@dataclass(frozen=True)
class Price:
    gpu: str
    usd_per_gpu_hour: float
    source: str
    date: str  # "" if the source names none

    def __str__(self) -> str:
        when = f", {self.date}" if self.date else ""
        return f"${self.usd_per_gpu_hour:.2f} per {self.gpu} and hour ({self.source}{when})"


def find_price(gpu: str, path: Path | None = None) -> Price:
    """The price of a GPU in the file, or, if that has none, in llmsim's own table."""
    name = find_gpu(gpu).name
    if path is not None:
        found = _prices(*read_prices(path))  # all of them: a mistake is told whichever GPU is asked for
        if name in found:
            return found[name]
    return _shipped(name)


@cache
def _shipped(name: str) -> Price:
    text, where = read_prices()
    found = _prices(text, where)
    if name not in found:
        raise ValueError(f"{where} has no price of {name}: add one, or give a file with --prices")
    return found[name]


def read_prices(path: Path | None = None) -> tuple[str, str]:
    """(text of the file, what it is called in messages)."""
    if path is None:
        return files("llmsim").joinpath("prices.toml").read_text(encoding="utf-8"), "prices.toml"
    if not path.is_file():
        raise FileNotFoundError(f"--prices {path}: no such file. Give a .toml with a table for each GPU")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"--prices {path}: byte {error.start} is not UTF-8: give a .toml file of text") from None


def _prices(text: str, where: str) -> dict[str, Price]:
    """Every price of a file, checked, by the GPU's own name."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not TOML ({error})") from None
    found: dict[str, Price] = {}
    heads: dict[str, str] = {}
    for head, entry in table.items():
        try:
            gpu = find_gpu(head).name
        except ValueError as error:
            raise ValueError(f"{where} [{head}]: {error}") from None
        if gpu in found:
            raise ValueError(f"{where}: [{heads[gpu]}] and [{head}] are both {gpu}: keep one of them")
        found[gpu], heads[gpu] = _price(gpu, entry, f"{where} [{head}]"), head
    return found


def _price(gpu: str, entry: Any, where: str) -> Price:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {entry!r} is not a table: write [{gpu}] with usd_per_gpu_hour, source and date")
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: write {', '.join(KEYS)}")
    dollars = entry.get("usd_per_gpu_hour")
    if isinstance(dollars, bool) or not isinstance(dollars, int | float) or not 0 <= dollars <= MOST_USD:
        raise ValueError(f"{where}: usd_per_gpu_hour={dollars!r} is not a price: give dollars, 0 to {MOST_USD:,}")
    source, when = entry.get("source"), entry.get("date", "")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{where}: source={source!r}: say where the price is from")
    if not _is_day(when):
        raise ValueError(f"{where}: date={when!r} is not a date: write 2026-09-20")
    return Price(gpu, float(dollars), source, str(when))


def _is_day(when: Any) -> bool:
    """A date of TOML's, text that names at least the year ("end of 2025"), or "" where the source names none."""
    return isinstance(when, date) or (isinstance(when, str) and (not when or bool(re.search(r"\b20\d\d\b", when))))
