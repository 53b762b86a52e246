"""Published CSV traces with fixed column names: Azure, BurstGPT, Vidur, Splitwise.

Read by name, never by position: BurstGPT's third file inserts columns in the middle, Azure's 2025 one NumImages.
Sources: Azure/AzurePublicDataset (LLM inference traces 2023, 2024, 2025), HPMLL/BurstGPT, microsoft/vidur,
mutinifni/splitwise-sim. Time stamps: Azure wall clock with up to seven digits and, from 2024, a UTC offset; BurstGPT
whole seconds since midnight of the first day; Vidur and Splitwise seconds.
"""

from __future__ import annotations

import numpy as np

from llmsim.readers.rows import ReadOptions, Rows, shown
from llmsim.readers.table import Table

BURST_TICK_S = 1.0


def require(table: Table, looks_like: str, *columns: str) -> list[str]:
    """The file's own spelling of each column; a missing one is an error that says what was guessed and found."""
    missing = [column for column in columns if table.find(column) is None]
    if missing:
        several = "columns " + ", ".join(missing) + " are" if len(missing) > 1 else f"column {missing[0]} is"
        raise ValueError(
            f"{table.name}: looks like {looks_like} trace but {several} missing (found {', '.join(table.names)}); add "
            "it, or map your columns with --columns arrival=...,prompt=...,output=..."
        )
    return [found for column in columns if (found := table.find(column)) is not None]


def fits_azure(keys: set[str]) -> bool:
    return "timestamp" in keys and bool(keys & {"contexttokens", "generatedtokens"})


def fits_burstgpt(keys: set[str]) -> bool:
    return bool(keys & {"request tokens", "response tokens"})


def fits_vidur(keys: set[str]) -> bool:
    return bool(keys & {"num_prefill_tokens", "num_decode_tokens"})


def fits_splitwise(keys: set[str]) -> bool:
    return {"prompt_size", "token_size"} <= keys or ("arrival_timestamp" in keys and bool(keys & {"prompt_size"}))


def read_azure(table: Table, options: ReadOptions) -> Rows:
    stamp, prompt, output = require(table, "an Azure LLM", "TIMESTAMP", "ContextTokens", "GeneratedTokens")
    rows = Rows("azure", table.lines, table.ints(prompt), table.ints(output))
    rows.arrival_s = table.times(stamp, options.unit_s("s"))
    images = table.find("NumImages")
    if images:
        counted = table.ints(images)
        rows.notes.append(
            f"NumImages ignored ({int((counted > 0).sum())} requests carry {int(counted.sum())} images): image tokens "
            "are not modelled"
        )
    return rows


def read_burstgpt(table: Table, options: ReadOptions) -> Rows:
    stamp, prompt, output = require(table, "a BurstGPT", "Timestamp", "Request tokens", "Response tokens")
    rows = Rows("burstgpt", table.lines, table.ints(prompt), table.ints(output), tick_s=BURST_TICK_S)
    rows.arrival_s = table.times(stamp, options.unit_s("s"))
    rows.time_unit = options.time_unit or "s"
    total, session, model = (table.find(name) for name in ("Total tokens", "Session ID", "Model"))
    if total:
        _check_total(table, rows, total)
    if session:
        rows.session = table.texts(session)
    if model:
        rows.model = table.texts(model)
    _keep_only(table, rows, "Model", options.model, "--model-filter")
    _keep_only(table, rows, "Log Type", options.log_type, "--log-type")
    failed = rows.output_tokens == 0
    if failed.any():
        what = "dropped by default" if options.failed == "drop" else "kept as one-token requests"
        rows.notes.append(
            f"{int(failed.sum())} of {len(table)} rows have Response tokens = 0 (failed requests): {what}; "
            "--failed keep|drop"
        )
    return rows


def _check_total(table: Table, rows: Rows, column: str) -> None:
    wrong = np.flatnonzero(table.ints(column) != rows.prompt_tokens + rows.output_tokens)
    if len(wrong):
        row = int(wrong[0])
        rows.notes.append(
            f"Total tokens is not Request + Response on {len(wrong)} rows (first: line {table.lines[row]}, "
            f"{table.texts(column)[row]} against {rows.prompt_tokens[row] + rows.output_tokens[row]}): "
            "the sum is not used"
        )


def _keep_only(table: Table, rows: Rows, column: str, wanted: str | None, option: str) -> None:
    if wanted is None:
        return
    found = table.find(column)
    if found is None:
        raise ValueError(f"{table.name}: {option} {wanted} needs a column {column}; found {', '.join(table.names)}")
    texts = table.texts(found)
    other = np.array([text.strip().casefold() != wanted.strip().casefold() for text in texts])
    if other.all():
        known = sorted(set(texts))[:8]
        raise ValueError(f"{table.name}: no row has {column} {shown(wanted)}; it holds {', '.join(known)}")
    rows.drop(other, f"{column} is not {wanted}")


def read_vidur(table: Table, options: ReadOptions) -> Rows:
    prompt, output = require(table, "a Vidur", "num_prefill_tokens", "num_decode_tokens")
    rows = Rows("vidur", table.lines, table.ints(prompt), table.ints(output))
    stamp = table.find("arrived_at")
    if stamp:
        rows.arrival_s = table.times(stamp, options.unit_s("s"))
        rows.time_unit = options.time_unit or "s"
    return rows


def read_splitwise(table: Table, options: ReadOptions) -> Rows:
    stamp, prompt, output = require(table, "a Splitwise", "arrival_timestamp", "prompt_size", "token_size")
    rows = Rows("splitwise", table.lines, table.ints(prompt), table.ints(output))
    rows.arrival_s = table.times(stamp, options.unit_s("s"))
    rows.time_unit = options.time_unit or "s"
    request = table.find("request_id")
    if request:
        rows.ids = table.texts(request)
    batch = table.find("batch_size")
    if batch and (table.ints(batch) != 1).any():
        rows.notes.append("batch_size is not 1 everywhere and is ignored: each row is one request")
    return rows
