"""Options that a format has no use for: a filter that cannot filter is an error, an idle option is said to be idle."""

from __future__ import annotations

import numpy as np

from llmsim.readers.rows import ReadOptions, Rows, listed, shown


def apply_filters(name: str, rows: Rows, options: ReadOptions) -> None:
    """`model` on any trace that names models, `log_type` on BurstGPT only; BurstGPT's reader has applied both."""
    if rows.format == "burstgpt":
        return
    if options.log_type is not None:
        raise ValueError(
            f"{name}: --log-type {options.log_type}: only BurstGPT traces have log types, this is {rows.format}; "
            "leave it out"
        )
    if options.model is None:
        return
    if rows.model is None:
        raise ValueError(
            f"{name}: --model-filter {options.model}: this {rows.format} trace does not name the model of a request; "
            "leave it out"
        )
    wanted = options.model.strip().casefold()
    other = np.array([text.strip().casefold() != wanted for text in rows.model])
    if other.all():
        raise ValueError(
            f"{name}: no request has model {shown(options.model)}; known: {listed(sorted(set(rows.model)))}"
        )
    rows.drop(other, f"model is not {options.model}")


def idle_options(rows: Rows, options: ReadOptions) -> list[str]:
    """Notes on options given that change nothing in this trace."""
    waits = rows.delay_s is not None
    idle = {
        "--closed-loop": options.closed_loop and rows.format != "qwen-bailian",
        "--rank-correlated": options.rank_correlated and rows.format != "servegen",
        f"--sharegpt-mode {options.sharegpt_mode}": options.sharegpt_mode != "multi-turn" and rows.format != "sharegpt",
        f"--block-tokens {options.block_tokens}": options.block_tokens is not None and rows.block_ids is None,
        f"--max-wait {options.max_wait_s}": options.max_wait_s is not None and not waits,
    }
    return [f"{flag} has no effect on this {rows.format} trace" for flag, is_idle in idle.items() if is_idle]
