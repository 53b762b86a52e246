"""`llmsim list`: the names that flags accept, with the facts behind them."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from typing import Any

import click

from llmsim.cli_options import CONTEXT, json_option
from llmsim.text import aligned

GIB = 2**30
KINDS = ("gpus", "models", "engines", "schedulers", "admissions", "routers", "evictions", "profiles")
Row = dict[str, Any]


@click.command("list", context_settings=CONTEXT)
@click.argument("kind", metavar="|".join(KINDS), type=click.Choice(KINDS))
@json_option
def list_(kind: str, as_json: bool) -> None:
    """List what llmsim knows, one a line.

    \b
    llmsim list gpus
    """
    makers = {
        "gpus": gpus, "models": models, "engines": engines, "schedulers": schedulers, "admissions": admissions,
        "routers": routers, "evictions": evictions, "profiles": profiles,
    }  # fmt: skip
    rows = makers[kind]()
    click.echo(json.dumps(rows) if as_json else table(rows))


def gpus() -> list[Row]:
    from llmsim.hardware import find_gpu, gpu_names
    from llmsim.prices import find_price

    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.memory_bytes / GIB, 1),
            "bandwidth_tb_per_s": round(gpu.bandwidth_bytes_per_s / 1e12, 2),
            "bf16_tflop_per_s": round(gpu.flops_per_s["bfloat16"] / 1e12),
            "fp8_tflop_per_s": round(gpu.flops_per_s["fp8"] / 1e12) if "fp8" in gpu.flops_per_s else None,
            "link": gpu.link,
            "price_per_hour": price.usd_per_gpu_hour,
            "price_date": price.date,
            "price_source": price.source,
        }
        for gpu, price in ((find_gpu(name), find_price(name)) for name in gpu_names())
    ]


def models() -> list[Row]:
    from llmsim.hardware import find_model, model_names

    rows = []
    for model in map(find_model, model_names()):
        dtype = model.quantization or "bfloat16"
        rows.append(
            {
                "name": model.name,
                "weights_gib": round(model.weight_bytes(dtype) / GIB, 1),
                "dtype": dtype,
                "layers": model.layers,
                "max_context_tokens": model.max_context_tokens,
                "kv_kib_per_token": round(model.kv_bytes_per_token("bfloat16") / 1024, 1),
                "experts": model.experts or None,
                "source": model.source,
            }
        )
    return rows


def engines() -> list[Row]:
    from llmsim.engines import ENGINES

    return [
        {
            "name": engine.name,
            "scheduler": engine.own["scheduler"],
            "block_size": engine.own["block_size"],
            "prefix_caching": "no" if "enable_prefix_caching" in engine.lacks else "yes",
            "async_scheduling": "no" if "async_scheduling" in engine.lacks else "yes",
            "about": engine.about,
        }
        for engine in ENGINES.values()
    ]


def schedulers() -> list[Row]:
    from llmsim.schedulers import BUILTIN

    return [_described(name, home) for name, home in BUILTIN.items()]


def admissions() -> list[Row]:
    from llmsim.admission import BUILTIN

    return [_described(name, home) for name, home in BUILTIN.items()]


def routers() -> list[Row]:
    from llmsim.routers import BUILTIN

    return [_described(name, home) for name, home in BUILTIN.items()]


def evictions() -> list[Row]:
    from llmsim.eviction import BUILTIN

    return [_described(name, home) for name, home in BUILTIN.items()]


def profiles() -> list[Row]:
    from llmsim.cost.profile import profile_names, read_profile

    return [
        {
            "name": profile.name,
            "gpu": profile.gpu,
            "fitted_on": profile.model,
            "dtype": profile.dtype,
            "engine": profile.provenance.engine,
            "recorded": profile.provenance.recorded,
            "id": profile.id,
        }
        for profile in map(read_profile, profile_names())
    ]


def _described(name: str, home: str) -> Row:
    module, _, attribute = home.partition(":")
    text = inspect.getdoc(getattr(import_module(module), attribute)) or ""
    return {"name": name, "about": text.partition("\n")[0]}


def table(rows: list[Row]) -> str:
    """Columns as wide as they need to be; numbers to the right."""
    if not rows:
        return "none"
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    texts = {i for i, name in enumerate(columns) if not all(isinstance(row[name], int | float | None) for row in rows)}
    return "\n".join(aligned([columns, *cells], left=texts))


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
