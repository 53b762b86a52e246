"""Curves and bursts of `llmsim.phases_curves` and `llmsim.phases_burst` in words: for cards, captions and alt texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsim.phases_table import digits

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.phases_burst import Burst
    from llmsim.phases_curves import Moves


def moves_in_words(moves: Moves, by: str) -> str:
    """The roofline for who cannot see it."""
    told = []
    for phase, own in moves.frame.groupby("phase", sort=False):
        ends = [own.sort_values("order").iloc[place] for place in (0, -1)]
        told.append(
            f"{phase} from "
            + " to ".join(
                f"{end['value']} at {digits(end['intensity_flops_per_byte'])} FLOP/byte and "
                f"{digits(end['flops_per_s'] / 1e12)} TFLOP/s"
                for end in ends
            )
        )
    return f"Roofline, by {by.replace('_', ' ')}: {'; '.join(told)}"


def growth_in_words(growth: pd.DataFrame, across: str) -> str:
    """A chart of growth for who cannot see it."""
    first, last = growth.iloc[0], growth.iloc[-1]
    return (
        f"GPU time over {across.replace('_', ' ')}: {1e3 * first['gpu_s']:.3g} ms at {first[across]:,.0f}, "
        f"{1e3 * last['gpu_s']:.3g} ms at {last[across]:,.0f}, of it attention "
        f"{first['attention_s'] / first['gpu_s']:.0%} and {last['attention_s'] / last['gpu_s']:.0%}"
    )


def cards(one: Burst) -> list[dict[str, str]]:
    """A burst in six numbers: label, value, help."""
    told = (
        ("mean TTFT", _ms(one.mean_ttft_s), "Of the burst's prompts, from its arrival."),
        ("last TTFT", _ms(one.last_ttft_s), "Of the prompt that waits longest."),
        ("gap before", _ms(one.steady_gap_s), "Between two tokens of the decodes, just before the burst."),
        (
            "longest gap",
            _ms(one.longest_gap_s),
            "Between two tokens of anyone, from the burst to its last first token.",
        ),
        ("iterations", f"{one.iterations:,}", "That compute prompts of the burst."),
        ("chunks", f"{one.chunks:,}", "Into which its prompts are cut."),
    )
    return [{"label": label, "value": value, "help": why} for label, value, why in told]


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:,.1f} ms"


BURST = (
    "Bars of the GPU: how long the chunks of an iteration take by themselves, and what its decodes add. Below, what "
    "each request gets computed, with the tokens of its chunks; an iteration ends for all at once, so all wait for it."
)


def left_out(one: Burst) -> str:
    """That not all is shown, if so."""
    return f" {one.left_out:,} further iterations are not drawn." if one.left_out else ""


def burst_in_words(one: Burst) -> str:
    """For who cannot see the chart."""
    gaps = f", their longest gap {_ms(one.longest_gap_s)} instead of {_ms(one.steady_gap_s)}" if one.decodes else ""
    return (
        f"Timeline of a burst: {one.prompts} prompts of {one.prompt_tokens:,} tokens cut into {one.chunks} chunks over "
        f"{one.iterations} iterations by a budget of {one.token_budget:,} tokens, beside {one.decodes} decodes{gaps}"
    )


def budgets_in_words(table: pd.DataFrame) -> str:
    """For who cannot see the chart."""
    least, most = table.iloc[0], table.iloc[-1]
    gaps = ""
    if table["longest_gap_s"].notna().any():
        gaps = f", the longest gap from {_ms(least['longest_gap_s'])} to {_ms(most['longest_gap_s'])}"
    return (
        f"From a budget of {least['token_budget']:,.0f} tokens to {most['token_budget']:,.0f}, mean TTFT goes from "
        f"{_ms(least['mean_ttft_s'])} to {_ms(most['mean_ttft_s'])}{gaps}"
    )
