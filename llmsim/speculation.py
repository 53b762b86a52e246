"""At which batch size speculation stops paying: steps with and without drafts, side by side, from the cost model.

    without   wall seconds of a decode step of b requests with c cached tokens each: max(T, host) with asynchronous
              scheduling, as in `llmsim.macrostep`
    with      the same of a verification and its drafts; it makes E tokens a request (`Speculation.tokens_per_step`)
    speedup   E * without / with: how much sooner the next token comes, at the same batch
    best      the largest speedup over 0 ... k drafts (0: 1), and how many make it: what a server that adapts would do

Decodes alone: prompts beside them, queues and memory are a replay's business (`llmsim replay`, `llmsim whatif`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from llmsim.cost import CostModel
from llmsim.drafting import Speculation
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Row:
    batch: int
    without_s: float
    with_s: float
    tokens: float  # of a verification
    speedup: float
    best_drafts: int
    best_speedup: float


@dataclass(frozen=True)
class Table:
    scenario: Scenario
    speculation: Speculation
    context_tokens: int
    rows: tuple[Row, ...]
    pays_up_to: int  # every batch up to this one has a speedup above 1; 0: not even a single request
    label: str

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self)
        own["scenario"] = self.scenario.to_dict()
        return own


def table(scenario: Scenario, context_tokens: int, batches: Sequence[int] = ()) -> Table:
    s = scenario.resolved()
    own = s.speculation
    if own is None:
        raise ValueError("speculative_config is empty: say what to speculate with (docs/policies/speculation.md)")
    assert s.max_num_seqs is not None and s.max_model_len is not None
    if not 0 <= context_tokens < s.max_model_len:
        raise ValueError(f"context={context_tokens} is not within the model's {s.max_model_len} tokens")
    without, costs = cost_of(replace(scenario, speculative_config={})), _costs(scenario, own)
    asynchronous = scenario.async_scheduling

    def plain_s(batch: int) -> float:
        return step_s(without, batch, context_tokens, asynchronous)

    def speedup(batch: int, drafts: int) -> float:
        cost = costs[drafts - 1]
        drafted_s = step_s(cost, batch, context_tokens, s.async_scheduling)
        return float(cost.tokens_per_step) * plain_s(batch) / drafted_s

    rows = []
    for batch in batches or [size for size in BATCHES if size <= s.max_num_seqs]:
        by_drafts = [1.0, *(speedup(batch, drafts) for drafts in range(1, own.drafts + 1))]
        best = max(range(own.drafts + 1), key=lambda drafts: by_drafts[drafts])
        with_s = step_s(costs[-1], batch, context_tokens, s.async_scheduling)
        rows.append(Row(batch, plain_s(batch), with_s, own.tokens_per_step, by_drafts[-1], best, by_drafts[best]))
    paying = takewhile(lambda batch: speedup(batch, own.drafts) > 1.0, range(1, s.max_num_seqs + 1))
    return Table(s, own, context_tokens, tuple(rows), max(paying, default=0), costs[-1].label)


def _costs(scenario: Scenario, own: Speculation) -> list[Any]:
    """By drafts, 1 ... k, with the acceptance of the first positions."""
    costs = []
    for drafts in range(1, own.drafts + 1):
        config = scenario.speculative_config | {
            "num_speculative_tokens": drafts,
            "acceptance": list(own.acceptance[:drafts]),
        }
        costs.append(cost_of(replace(scenario, speculative_config=config)))
    return costs


def step_s(cost: CostModel, batch: int, context_tokens: int, asynchronous: bool) -> float:
    """Wall seconds from one decode step to the next."""
    host, mode = cost.host, cost.mode(batch, 0)
    gpu_s = cost.decode_ramp(batch, batch * context_tokens).first_s
    schedule_s = host.schedule_s + host.schedule_per_request_s * batch
    launch_s = host.launch_s[mode] + host.launch_per_request_s[mode] * batch
    update_s = host.update_s + host.update_per_output_s * batch
    if asynchronous:
        return max(gpu_s, schedule_s + launch_s + update_s)
    return schedule_s + max(host.lead_s[mode] + gpu_s, launch_s + host.tail_s[mode]) + host.return_s + update_s
