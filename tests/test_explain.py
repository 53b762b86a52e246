"""Explanations: a request's path is whole, observing changes nothing, and reasons are those that were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conservation import POLICIES, ROWS, trace_of
from test_twin import HOSTS, SteppedCost

from llmsim.cost.graphs import Graphs
from llmsim.explain_life import Life, life_of
from llmsim.explain_prices import Prices
from llmsim.explain_record import Recorder
from llmsim.metrics import Result, breakdown_s
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace

ROUNDING_S = 1e-9
MORE_POLICIES: list[dict[str, Any]] = [
    *POLICIES,
    {"scheduler": "vllm", "preemption": "swap", "swap_space_gib": 0.05},
    {"scheduler": "vllm", "preemption": "pause"},
    {"scheduler": "sjf"},
    {"scheduler": "srtf"},
    {"scheduler": "mlfq"},
    {"scheduler": "mlfq", "swap_space_gib": 0.05},
    {"scheduler": "vtc"},
    {"scheduler": "edf"},
    {"scheduler": "sglang"},
    {"scheduler": "tensorrt-llm"},
    {"scheduler": "slo-chunk"},
    {"engine": "sglang"},
]


def explained(trace: Trace, scenario: Scenario, cost: Any = None) -> tuple[Result, list[Life]]:
    recorders: list[Recorder] = []

    def observer(index: int) -> Recorder:
        recorders.append(Recorder(range(len(trace))))
        return recorders[index]

    result = simulate(trace, scenario, cost=cost, observer=observer)
    prices = [Prices(recorder, result.cost) for recorder in recorders]
    replicas, done = result.requests["replica"], np.flatnonzero(result.finished)
    return result, [life_of(int(i), result.requests, prices[replicas[i]]) for i in done]


def check_whole(result: Result, lives: list[Life]) -> None:
    """Spans follow one another from send to last token; their phases are the metrics'; parts add up to each span."""
    parts = breakdown_s(result.requests)
    for life in lives:
        at_s, phases = life.facts["arrival_s"], dict.fromkeys(parts, 0.0)
        for span in life.spans:
            assert span.start_s == at_s < span.end_s, (life.request, span)
            at_s = span.end_s
            phases[span.phase] += span.length_s
            if span.iterations:
                pieces = (span.own_s, span.decodes_s, span.prompts_s, span.host_s)
                assert min(pieces) >= 0.0, span
                assert sum(pieces) == pytest.approx(span.length_s, abs=ROUNDING_S)
        assert at_s == life.facts["finish_s"], life.request
        for phase, seconds in phases.items():
            assert seconds == pytest.approx(parts[phase][life.request], abs=ROUNDING_S), (life.request, phase)


def check_same(one: Result, other: Result) -> None:
    for table in ("requests", "iterations", "gaps"):
        for name, column in getattr(one, table).items():
            assert column.tobytes() == getattr(other, table)[name].tobytes(), (table, name)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    policy=st.sampled_from(MORE_POLICIES),
    spare_blocks=st.sampled_from([1, 5, 30, 5000]),
    host=st.sampled_from(sorted(HOSTS)),
    asynchronous=st.booleans(),
    shared=st.booleans(),
    replicas=st.sampled_from([1, 1, 2]),
    concurrency=st.sampled_from([None, None, 4]),
    seqs=st.sampled_from([3, 64]),
)
def test_a_path_is_whole_and_looking_changes_nothing(
    rows: list[tuple[float, int, int, int, int]],
    policy: dict[str, Any],
    spare_blocks: int,
    host: str,
    asynchronous: bool,
    shared: bool,
    replicas: int,
    concurrency: int | None,
    seqs: int,
) -> None:
    longest = max(-(-(prompt + output) // 16) for _, prompt, output, _, _ in rows)
    fields = policy | {"enable_prefix_caching": shared} if "engine" not in policy else policy
    scenario = Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", num_gpu_blocks_override=(longest + 1 + spare_blocks) * (16 if "engine" in policy else 1),
        max_num_seqs=seqs, max_num_batched_tokens=300, async_scheduling=asynchronous, replicas=replicas,
        concurrency=concurrency, router="least_outstanding" if replicas > 1 else "round_robin", **fields,
    )  # fmt: skip
    trace = trace_of(rows, shared)

    def cost() -> SteppedCost:
        return SteppedCost(HOSTS[host], Graphs.of_engine(seqs, 300), 1.0)

    result, lives = explained(trace, scenario, cost())
    check_same(simulate(trace, scenario, cost=cost()), result)
    check_whole(result, lives)
