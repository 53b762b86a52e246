"""What no policy, load or memory may break: tokens, blocks, order of events, and time add up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_twin import HOSTS, SteppedCost

from llmsim.cost.graphs import Graphs
from llmsim.metrics import Result, breakdown_s
from llmsim.replica import Replica
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet
from llmsim.trace import Trace

ROUNDING_S = 1e-9
ID_TOKENS = 64

ROWS = st.lists(  # wait before it, prompt, output, family of the prompt, ids that it shares with its family
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.05, 1.0]),
        st.integers(1, 600),
        st.integers(1, 120),
        st.integers(0, 2),
        st.integers(0, 10),
    ),
    min_size=1,
    max_size=40,
)
POLICIES: list[dict[str, Any]] = [
    {"scheduler": "vllm"},
    {"scheduler": "vllm", "scheduling_policy": "priority"},
    {"scheduler": "vllm", "reserve_full_isl": False, "long_prefill_token_threshold": 50},
    {"scheduler": "chunked"},
    {"scheduler": "chunked", "scheduler_args": {"headroom": 0.0}},
    {"scheduler": "static", "scheduler_args": {"batch_size": 4, "timeout_s": 0.1}},
    {"scheduler": "static", "scheduler_args": {"batch_size": 4, "timeout_s": 0.0, "stream": True}},
    {"scheduler": "dynamic", "scheduler_args": {"batch_size": 8, "preferred_batch_sizes": "2,4"}},
    {"scheduler": "orca"},
    {"scheduler": "orca", "scheduler_args": {"reserve": "pow2"}},
    {"scheduler": "vllm-v0"},
    {"scheduler": "vllm-v0", "scheduler_args": {"preemption": "swap"}, "swap_space_gib": 0.05},
    {"scheduler": "sarathi", "scheduler_args": {"token_budget": 40}},
]


class Counting(Fleet):
    """Keeps what each replica reports as answered."""

    def __init__(self, trace: Trace, scenario: Scenario, cost: Any) -> None:
        self.answered: list[tuple[int, int]] = []
        super().__init__(trace, scenario, cost=cost)

    def _record(self, request: Request, replica: Replica) -> None:
        self.answered.append((request.id, request.generated_tokens))
        super()._record(request, replica)


def trace_of(rows: list[tuple[float, int, int, int, int]], shared: bool) -> Trace:
    wait_s, prompt, output, family, common = (np.array(column) for column in zip(*rows, strict=True))
    ids = [
        tuple((family[i], k) if k < common[i] else ("own", i, k) for k in range(-(-prompt[i] // ID_TOKENS)))
        for i in range(len(rows))
    ]
    arrival_s = np.cumsum(wait_s) - wait_s[0]
    columns: dict[str, Any] = {"block_tokens": ID_TOKENS, "block_ids": ids} if shared else {}
    return Trace("made", arrival_s, prompt, output, priority=family, **columns)


def check_times(requests: dict[str, Any]) -> None:
    events = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
    for before, after in pairwise(events):
        assert (requests[after] >= requests[before] - ROUNDING_S).all(), (before, after)
    parts = breakdown_s(requests)
    for name, values_s in parts.items():
        assert (values_s >= -ROUNDING_S).all(), name
    e2el_s = requests["finish_s"] - requests["arrival_s"]
    np.testing.assert_allclose(sum(parts.values()), e2el_s, rtol=0, atol=ROUNDING_S)
    # one that is preempted with its last token in flight loses no time
    assert (requests["preemptions"][requests["preempted_s"] > 0] > 0).all()
    single = requests["output_tokens"] == 1
    np.testing.assert_allclose(requests["finish_s"][single], requests["first_token_s"][single], rtol=0, atol=ROUNDING_S)


def check_gaps(result: Result) -> None:
    """One gap per token but the first of each request; together they fill the time from first tokens to last ones."""
    gaps, requests = result.gaps, result.requests
    assert (gaps["count"] * gaps["weight"]).sum() == (requests["output_tokens"] - 1).sum()
    c = gaps["count"]
    total_s = (gaps["weight"] * (c * gaps["gap_s"] + gaps["growth_s"] * c * (c - 1) / 2)).sum()
    expected_s = (requests["finish_s"] - requests["first_token_s"]).sum()
    np.testing.assert_allclose(total_s, expected_s, rtol=1e-9, atol=1e-6)


def check_log(result: Result) -> None:
    """The tokens that were computed, and when the GPU was busy."""
    log, requests = result.iterations, result.requests
    computed = (log["prefill_tokens"] + log["seqs"] * log["iterations"]).sum()
    needed = (requests["prompt_tokens"] - requests["cached_tokens"] + requests["output_tokens"] - 1).sum()
    if result.scenario.scheduler == "static":  # padding and finished rows are computed too
        assert computed >= needed
    elif not result.stats["preemptions"]:
        assert computed == needed
    elif not result.scenario.enable_prefix_caching:  # else what is preempted may come back to blocks that others stored
        assert computed >= needed
    for replica in np.unique(log["replica"]):
        own = {name: column[log["replica"] == replica] for name, column in log.items()}
        n = own["iterations"]
        busy_s = (n * own["gpu_first_s"] + own["gpu_growth_s"] * n * (n - 1) / 2).sum()
        assert busy_s <= own["gpu_end_s"].max() - own["start_s"].min() + ROUNDING_S * n.size
        assert (np.diff(own["start_s"]) >= -ROUNDING_S).all()
    assert log["kv_blocks"].max() < result.kv_blocks
    assert log["running"].max() <= result.scenario.max_num_seqs


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    policy=st.sampled_from(POLICIES),
    spare_blocks=st.sampled_from([1, 5, 30, 5000]),
    host=st.sampled_from(sorted(HOSTS)),
    asynchronous=st.booleans(),
    caching=st.booleans(),
    shared=st.booleans(),
    replicas=st.sampled_from([1, 1, 2]),
    concurrency=st.sampled_from([None, None, 4]),
    seqs=st.sampled_from([3, 64]),
)
def test_nothing_is_lost_or_made_up(
    rows: list[tuple[float, int, int, int, int]],
    policy: dict[str, Any],
    spare_blocks: int,
    host: str,
    asynchronous: bool,
    caching: bool,
    shared: bool,
    replicas: int,
    concurrency: int | None,
    seqs: int,
) -> None:
    longest = max(-(-(prompt + output) // 16) for _, prompt, output, _, _ in rows)
    scenario = Scenario(
        model="llama-3.1-8b", gpu="h100-sxm", num_gpu_blocks_override=longest + 1 + spare_blocks, max_num_seqs=seqs,
        max_num_batched_tokens=300, async_scheduling=asynchronous, enable_prefix_caching=caching, replicas=replicas,
        concurrency=concurrency, router="least_outstanding" if replicas > 1 else "round_robin", **policy,
    )  # fmt: skip
    trace = trace_of(rows, shared)
    fleet = Counting(trace, scenario, SteppedCost(HOSTS[host], Graphs.of_engine(seqs, 300), 1.0))
    result = fleet.run()
    assert sorted(fleet.answered) == list(enumerate(trace.output_tokens.tolist())), "once each, with all their tokens"
    for replica in fleet.replicas:
        assert replica.kv.free_blocks == replica.kv.total_blocks
        assert not (replica.waiting or replica.running or replica.prefilling or replica.batch)
    check_times(result.requests)
    check_gaps(result)
    check_log(result)
