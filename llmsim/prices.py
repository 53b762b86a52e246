"""What a GPU costs per hour: `llmsim/prices.toml`, or a file of the user's in the same form.

[h100-sxm]
usd_per_gpu_hour = 3.99
source = "where it says so"
date = 2026-09-20
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

from llmsim.hardware import find_gpu


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
        table, where = read_prices(path)
        if name in table:
            return _price(name, table[name], f"{where} [{name}]")
    return _shipped(name)


@cache
def _shipped(name: str) -> Price:
    table, where = read_prices()
    if name not in table:
        raise ValueError(f"{where} has no price of {name}: add one, or give a file with --prices")
    return _price(name, table[name], f"{where} [{name}]")


def read_prices(path: Path | None = None) -> tuple[dict[str, Any], str]:
    """(entries by GPU, not yet checked; where they stand)."""
    if path is None:
        text, where = files("llmsim").joinpath("prices.toml").read_text(encoding="utf-8"), "prices.toml"
    else:
        if not path.is_file():
            raise FileNotFoundError(f"--prices {path}: no such file. Give a .toml with a table for each GPU")
        text, where = path.read_text(encoding="utf-8"), str(path)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not TOML ({error})") from None
    return {find_gpu(name).name: entry for name, entry in table.items()}, where


def _price(gpu: str, entry: Any, where: str) -> Price:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {entry!r} is not a table: write [{gpu}] with usd_per_gpu_hour, source and date")
    dollars = entry.get("usd_per_gpu_hour")
    if isinstance(dollars, bool) or not isinstance(dollars, int | float) or not isfinite(dollars) or dollars < 0:
        raise ValueError(f"{where}: usd_per_gpu_hour={dollars!r} is not a price: give dollars, 0 or more")
    source, when = entry.get("source"), entry.get("date", "")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{where}: source={source!r}: say where the price is from")
    if not isinstance(when, date | str):
        raise ValueError(f"{where}: date={when!r} is not a date: write 2026-09-20")
    return Price(gpu, float(dollars), source, str(when))
