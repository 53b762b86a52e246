"""What a trace holds, in figures: the report every user should look at before replaying one.

Unit mistakes show up here. Mean rate = (arrivals - 1) / span; CV = standard deviation / mean of the gaps between
arrivals. The prefix-hit ceiling is what a prefix cache that never evicts could find: the longest leading run of block
ids seen before, over all blocks (last partial ones too, as published figures count them) and, in tokens, over full
blocks only, as engines cache.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmsim.trace import Trace


def describe(trace: Trace) -> dict[str, Any]:
    """The report as plain values; None where the trace has nothing to say."""
    sent_s = trace.arrival_s[~np.isnan(trace.arrival_s)]
    gaps_s = np.diff(sent_s)
    span_s = float(sent_s[-1]) if len(sent_s) else 0.0
    mean_s = float(gaps_s.mean()) if len(gaps_s) else 0.0
    report: dict[str, Any] = {
        "name": trace.name,
        "format": trace.format,
        "sha256": trace.sha256,
        "rows_read": trace.rows_read,
        "rows_kept": trace.rows_read - sum(trace.dropped.values()),
        "rows_dropped": dict(trace.dropped),
        "requests": len(trace),
        "span_s": span_s,
        "mean_rate_per_s": (len(sent_s) - 1) / span_s if span_s > 0 else None,
        "cv_gaps": float(gaps_s.std() / mean_s) if mean_s > 0 else None,
        "tied_arrivals": int((gaps_s == 0).sum()),
        "prompt_tokens": spread_of(trace.prompt_tokens),
        "output_tokens": spread_of(trace.output_tokens),
        "total_prompt_tokens": int(trace.prompt_tokens.sum()),
        "total_output_tokens": int(trace.output_tokens.sum()),
        "waiting_turns": int(np.isnan(trace.arrival_s).sum()),
        "sessions": len(set(trace.session) - {""}) if trace.session is not None else None,
        "block_tokens": trace.block_tokens or None,
        "prefix_hit_ceiling": prefix_hit_ceiling(trace),
        "notes": list(trace.notes),
    }
    for name in ("slo_class", "model", "tenant"):
        labels = getattr(trace, name)
        if labels is not None:
            kinds, counts = np.unique(np.array(labels), return_counts=True)
            most = np.argsort(-counts, kind="stable")[:10]
            report[name] = {str(kinds[place]): int(counts[place]) for place in most}
    return report


def spread_of(values: Any) -> dict[str, float]:
    """Mean, median, upper percentiles and maximum of a column."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "mean": float(values.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99),
        "max": float(values.max()),
    }  # fmt: skip


def prefix_hit_ceiling(trace: Trace) -> dict[str, float] | None:
    """Blocks and tokens a cache without limit would find, requests taken in order; None without prefix ids."""
    if trace.block_ids is None:
        return None
    seen: set[Hashable] = set()
    hits = blocks = hit_tokens = 0
    for row, ids in enumerate(trace.block_ids):
        run = 0
        for block in ids:
            if block not in seen:
                break
            run += 1
        hits += run
        blocks += len(ids)
        prompt = int(trace.prompt_tokens[row])
        # Whole blocks only, and at least the last prompt token is computed.
        hit_tokens += min(run, (prompt - 1) // trace.block_tokens) * trace.block_tokens
        seen.update(ids)
        if trace.output_block_ids is not None:
            seen.update(trace.output_block_ids[row])
    total = int(trace.prompt_tokens.sum())
    return {
        "hit_blocks": hits,
        "blocks": blocks,
        "block_share": hits / blocks if blocks else 0.0,
        "token_share": hit_tokens / total if total else 0.0,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["rows_dropped"].items())
    rate, cv = report["mean_rate_per_s"], report["cv_gaps"]
    lines = [
        ("trace", f"{report['name']} ({report['format']})"),
        ("rows", f"{report['rows_read']} read = {report['rows_kept']} kept + "
                 f"{report['rows_read'] - report['rows_kept']} dropped{f' ({dropped})' if dropped else ''}"),
        ("requests", f"{report['requests']}"),
        ("span", f"{report['span_s']:.6g} s"),
        ("mean rate", "all at once" if rate is None else f"{rate:.6g} requests/s"),
        ("CV of gaps", "undefined" if cv is None else f"{cv:.4g}"),
        ("tied arrivals", f"{report['tied_arrivals']}"),
    ]  # fmt: skip
    for name in ("prompt_tokens", "output_tokens"):
        figures = "  ".join(f"{key} {value:.6g}" for key, value in report[name].items())
        lines.append((name.replace("_", " "), figures))
    if report["sessions"] is not None or report["waiting_turns"]:
        count = report["sessions"]
        known = f"{count} sessions, " if count is not None else ""
        lines.append(("sessions", f"{known}{report['waiting_turns']} turns wait for the one before"))
    ceiling = report["prefix_hit_ceiling"]
    if ceiling is not None:
        lines.append(("block size", f"{report['block_tokens']} tokens"))
        lines.append(
            ("prefix-hit ceiling", f"{ceiling['block_share']:.1%} of blocks, {ceiling['token_share']:.1%} of tokens")
        )
    for name in ("slo_class", "model", "tenant"):
        if name in report:
            lines.append((name, ", ".join(f"{kind or '(none)'} {count}" for kind, count in report[name].items())))
    width = math.ceil(max(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
