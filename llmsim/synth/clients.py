"""A workload as a sum of clients, each with its rate, its burstiness, its lengths and its labels.

Every client is a workload of its own (`synthesise`) with a share of the requests in proportion to its rate; their
requests are merged in time. ServeGen's published pools are such sums, window by window: `load_trace` reads their
directories directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmsim.synth.spec import parse
from llmsim.synth.workload import synthesise
from llmsim.trace import Trace


@dataclass(frozen=True)
class Client:
    """One source of requests; `arrivals` must state its rate."""

    name: str
    arrivals: str
    lengths: str = "random:tokens=1024"
    output_lengths: str | None = None
    rho: float = 0.0
    slo_class: str = ""
    priority: int = 0
    model: str = ""


def mix(clients: Sequence[Client], requests: int, *, seed: int = 0, name: str = "clients") -> Trace:
    """`requests` requests of all clients together (a client's share is rounded to whole requests)."""
    if not clients:
        raise ValueError("clients: the list is empty; give at least one client")
    rates = np.array([parse(one.arrivals).number("rate", above=0) for one in clients])
    counts = np.diff(np.rint(np.cumsum(rates) / rates.sum() * requests).astype(int), prepend=0)
    parts = []
    for number, (one, count) in enumerate(zip(clients, counts.tolist(), strict=True)):
        if count == 0:
            continue
        made = synthesise(
            count, arrivals=one.arrivals, lengths=one.lengths, output_lengths=one.output_lengths, rho=one.rho,
            seed=(seed + 1) * 1_000_003 + number,
        )  # fmt: skip
        parts.append((one, made))
    arrival_s = np.concatenate([made.arrival_s for _, made in parts])
    owner = np.concatenate([np.full(len(made), number) for number, (_, made) in enumerate(parts)])
    order = np.argsort(arrival_s, kind="stable")
    owners = [parts[number][0] for number in owner[order].tolist()]
    trace = Trace(
        name,
        arrival_s[order],
        np.concatenate([made.prompt_tokens for _, made in parts])[order],
        np.concatenate([made.output_tokens for _, made in parts])[order],
        tenant=[one.name for one in owners],
        format="synthetic",
        rows_read=len(order),
    )
    if any(one.slo_class for one in clients):
        lacking = [one.name for one in clients if not one.slo_class]
        if lacking:
            raise ValueError(f"clients: {lacking[0]} has no slo_class but others have one; name one for each")
        trace = replace(trace, slo_class=[one.slo_class for one in owners])
    if any(one.priority for one in clients):
        trace = replace(trace, priority=np.array([one.priority for one in owners], dtype=np.int64))
    if any(one.model for one in clients):
        trace = replace(trace, model=[one.model for one in owners])
    return trace
