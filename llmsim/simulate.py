"""`simulate(trace, scenario) -> Result`: build the fleet, send the requests, collect what happened.

Requests are sent at the trace's own times (open loop), when a turn's parent has finished (sessions), or, with
`scenario.concurrency`, when one of that many clients has its answer (closed loop, in the trace's order). Where a
request goes and when it is sent does not depend on the simulation if the loop is open and the router stateless; then
each replica reads its own requests ahead, and none needs waking by an arrival.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from heapq import heappop, heappush
from itertools import islice
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy

from llmsim.admission import load_admission
from llmsim.caches import cache_of, connect, policy_over, tier_rows
from llmsim.cost import CostModel, LaunchNoise
from llmsim.cost.load import CostSettings, load_cost
from llmsim.cost.scaled import ScaledCost
from llmsim.cost.speculative import drafter_bytes
from llmsim.engines import find_engine, graphs_of, pool_blocks
from llmsim.hardware import find_gpu, find_model
from llmsim.memory import block_copy_s, host_blocks
from llmsim.metrics import Result
from llmsim.plugins import PolicyError
from llmsim.replica import Limits, Replica, Swap
from llmsim.request import Request
from llmsim.routers import load_router
from llmsim.rowlog import drained
from llmsim.scenario import VLLM_SCHEDULERS, Scenario
from llmsim.schedulers import load_scheduler
from llmsim.trace_order import likely_times_s

if TYPE_CHECKING:
    from llmsim.drafting import Speculation
    from llmsim.observed import Observer
    from llmsim.trace import Trace

FLOAT_COLUMNS = ("arrival_s", "scheduled_s", "first_token_s", "finish_s", "preempted_s", "preempted_before_first_s")
INT_COLUMNS = ("replica", "cached_tokens", "preemptions")
LABELS = ("tenant", "slo_class", "predicted_tokens", "slo_ttft_s", "slo_tpot_s")  # of a trace, for policies
PROGRESS_EVERY = 1000  # requests
READ_AHEAD = 1 << 16  # requests whose numbers are unpacked at a time: bounds the memory of long traces


def simulate(
    trace: Trace,
    scenario: Scenario,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    cost: CostModel | None = None,
    observer: Callable[[int], Observer] | None = None,
) -> Result:
    """Replay a trace. `progress(finished, total, simulated_s)` is called now and then; `cost` replaces scenario.cost.

    `observer(index)` makes what is told of all that happens in replica `index` (llmsim.observed); it costs nothing when
    there is none, and the result is the same to the byte.

    Raises ValueError for settings that no engine would start with, TypeError for arguments of
    another kind, PolicyError for a policy that breaks a rule.
    """
    if isinstance(trace, str | Path):
        raise TypeError(f"simulate: trace={str(trace)!r} is a path: give load_trace({str(trace)!r})")
    if not isinstance(scenario, Scenario):
        raise TypeError(f"simulate: scenario={scenario!r} is no Scenario: write Scenario(model=…, gpu=…)")
    if cost is not None and not hasattr(cost, "decode_ramp"):
        raise TypeError(f"simulate: cost={cost!r} is no cost model: name one by Scenario(cost=…), or leave it out")
    return Fleet(trace, scenario, cost=cost, progress=progress, observer=observer).run()


def blocks_of(scenario: Scenario) -> int:
    """KV blocks of one replica, as the engine would report them (the null block included)."""
    s = scenario.resolved()
    assert s.max_num_batched_tokens is not None and s.max_num_seqs is not None and s.max_model_len is not None
    blocks = pool_blocks(
        s.engine,
        find_model(s.model),
        find_gpu(s.gpu),
        tensor_parallel=s.tensor_parallel,
        dtype=s.weight_dtype,
        kv_dtype=s.kv_dtype,
        block_tokens=s.block_size,
        gpu_memory_utilization=s.gpu_memory_utilization,
        max_num_batched_tokens=s.max_num_batched_tokens,
        max_num_seqs=s.max_num_seqs,
        max_model_len=s.max_model_len,
        override=s.num_gpu_blocks_override,
    )
    if s.speculation is None or s.num_gpu_blocks_override is not None:
        return blocks
    return _beside_drafter(s, s.speculation, blocks)


def _beside_drafter(s: Scenario, speculation: Speculation, blocks: int) -> int:
    """Blocks that are left beside the drafter's weights, when each block holds its KV too."""
    model, tp = find_model(s.model), s.tensor_parallel
    block_bytes = s.block_size * model.kv_bytes_per_token(s.kv_dtype, tp)
    weight_bytes, kv_bytes = drafter_bytes(model, speculation, s.kv_dtype, tp)
    left = int((blocks * block_bytes - weight_bytes) // (block_bytes + s.block_size * kv_bytes))
    if left < 2:
        raise ValueError(
            f"speculative_config method={speculation.method}: the drafter's {weight_bytes / 2**30:.1f} GiB leave no "
            f"room for KV cache on {s.gpu}. Take a smaller draft model, or raise gpu_memory_utilization"
        )
    return left


def cost_of(scenario: Scenario) -> CostModel:
    """The cost model that a scenario names."""
    s = scenario.resolved()
    assert s.max_num_batched_tokens is not None and s.max_num_seqs is not None
    settings = CostSettings(
        tensor_parallel=s.tensor_parallel,
        dtype=s.weight_dtype,
        kv_dtype=s.kv_dtype,
        graphs=graphs_of(
            s.engine,
            find_gpu(s.gpu),
            s.tensor_parallel,
            s.max_num_seqs * _rows(s),
            s.max_num_batched_tokens,
            s.cudagraph,
        ),
        host_scale=s.host_scale,
        attention_kernel=s.attention_kernel,
        kernel_fusion=s.kernel_fusion,
        activation_dtype=s.activation_dtype,
        speculation=s.speculation,
        asynchronous=s.async_scheduling,
    )
    cost = load_cost(s.cost, find_model(s.model), find_gpu(s.gpu), settings)
    engine = find_engine(s.engine)
    if engine.whose and cost.kind != "constant":
        cost.label += f"; calibrated on vLLM: the kernels and host of {engine.whose} assumed alike"
    return cost


def _rows(scenario: Scenario) -> int:
    """Of a decode: its token, and the drafts that are verified with it."""
    speculation = scenario.speculation
    return 1 if speculation is None else 1 + speculation.drafts


def replica_class(scenario: Scenario, is_observed: bool = False) -> Callable[..., Replica]:
    """What the fleet is made of."""
    made: type[Replica] = Replica
    settings: dict[str, Any] = {}
    if scenario.speculation is not None:
        from llmsim.replica_speculative import SpeculatingReplica

        made, settings = SpeculatingReplica, {"seed": scenario.seed}
    if is_observed:
        from llmsim.observed import observed

        made = observed(made)
    return partial(made, **settings) if settings else made


def swap_of(scenario: Scenario) -> Swap | None:
    """The host memory of one replica for swapped KV; None if the scenario has none."""
    s = scenario
    if not s.swap_space_gib:
        return None
    model, tp = find_model(s.model), s.tensor_parallel
    kind: dict[str, Any] = {"tensor_parallel": tp, "kv_dtype": s.kv_dtype, "block_tokens": s.block_size}
    blocks = host_blocks(model, swap_space_gib=s.swap_space_gib, **kind)
    if not blocks:
        raise ValueError(f"swap_space_gib={s.swap_space_gib} is less than one KV block: give more, or 0 for none")
    return Swap(blocks, block_copy_s(model, find_gpu(s.gpu), **kind))


def admission_of(scenario: Scenario) -> Any:
    """A fresh instance of the scenario's admission control; None if every request is taken."""
    if scenario.admission == "none" and not scenario.admission_args:
        return None
    return load_admission(scenario.admission, scenario.admission_args)


def scheduler_of(scenario: Scenario) -> Any:
    """A fresh instance of the scenario's scheduling policy."""
    arguments: dict[str, Any] = {}
    if scenario.scheduler in VLLM_SCHEDULERS:
        arguments = {
            "policy": scenario.scheduling_policy,
            "long_prefill_token_threshold": scenario.long_prefill_token_threshold,
            "watermark": scenario.watermark,
            "reserve_full_isl": scenario.reserve_full_isl,
            "enable_chunked_prefill": scenario.enable_chunked_prefill,
        }
    if scenario.scheduler == "vllm":
        arguments["preemption"] = scenario.preemption
    if scenario.scheduler == "vllm-native":
        arguments["max_model_len"] = scenario.max_model_len or 0
    return load_scheduler(scenario.scheduler, arguments | scenario.scheduler_args)


class Fleet:
    """The replicas of one scenario and the clients that send them one trace."""

    def __init__(
        self,
        trace: Trace,
        scenario: Scenario,
        *,
        cost: CostModel | None = None,
        progress: Callable[[int, int, float], None] | None = None,
        policy: Callable[[], Any] | None = None,
        make: Callable[..., Replica] | None = None,
        observer: Callable[[int], Observer] | None = None,
    ) -> None:
        """`policy` makes a scheduler for each replica instead of the one that the scenario names, `make` the replicas;
        `observer`: who is told what happens there."""
        self.trace, self.scenario = trace, scenario.resolved()
        s = self.scenario
        assert s.max_num_seqs is not None and s.max_num_batched_tokens is not None and s.max_model_len is not None
        self._check_lengths(s.max_model_len)
        self.cost = cost.restarted() if isinstance(cost, ScaledCost) else cost or cost_of(s)
        self.blocks = blocks_of(s)
        self.router = load_router(s.router, s.router_args)
        self.env = simpy.Environment()
        self.progress = progress
        self._finished = 0
        self._children = _children(trace)
        if s.concurrency is not None and self._children is not None:
            raise ValueError(
                f"concurrency={s.concurrency}: {trace.name} has turns that wait for their parents, a closed loop"
                " of its own. Leave concurrency out."
            )
        labels = {name: getattr(trace, name, None) for name in LABELS}
        self._labelled = {
            name: column if isinstance(column, list) else column.tolist()
            for name, column in labels.items()
            if column is not None
        }
        self._ahead = s.concurrency is None and self._children is None and getattr(self.router, "stateless", False)
        self._answers: list[tuple[float, int]] = []  # heap: when clients have answers still to come, and from whom
        self._waiting_clients: Iterator[Request] = iter(())
        self._turned_away: list[int] = []  # by the policy
        self._slots = 0  # closed loop: clients without a request under way
        n = len(trace)
        self._floats = {name: array("d", [nan]) * n for name in FLOAT_COLUMNS}
        self._ints = {name: array("q", [0]) * n for name in INT_COLUMNS}
        limits = Limits(s.max_num_seqs, s.max_num_batched_tokens)
        self.replicas: list[Replica] = []
        make = make or replica_class(s, observer is not None)
        for index in range(s.replicas):
            kv = cache_of(s, self.blocks - 1, trace.block_tokens)  # block 0 is vLLM's null block
            self.replicas.append(
                make(
                    self.env,
                    policy_over(kv, policy() if policy is not None else scheduler_of(s), s),
                    self.cost,
                    kv,
                    limits,
                    asynchronous=s.async_scheduling,
                    swap=swap_of(s),
                    noise=LaunchNoise(self.cost.host, s.seed + index) if s.launch_jitter else None,
                    on_finish=self._record,
                    admission=admission_of(s),
                    index=index,
                    **({} if observer is None else {"observer": observer(index)}),
                )
            )
            connect(self.replicas[-1], self._foreseen())

    def _check_lengths(self, limit_tokens: int) -> None:
        total = self.trace.prompt_tokens + self.trace.output_tokens
        long = np.flatnonzero(total > limit_tokens)
        if long.size:
            first = int(long[0])
            raise ValueError(
                f"{self.trace.name}: {long.size} of {len(total)} requests are longer than max_model_len={limit_tokens};"
                f" the first is request {first + 1} with {self.trace.prompt_tokens[first]} prompt +"
                f" {self.trace.output_tokens[first]} output tokens. Give --over-context drop or truncate, or raise"
                " --max-model-len."
            )

    # ---------------------------------------------------------------------------------------------------- sending

    def run(self) -> Result:
        started_s = time.perf_counter()
        requests = self._requests()
        if self._ahead:
            feeds = [requests] if len(self.replicas) == 1 else self._dealt(requests)
            for replica, feed in zip(self.replicas, feeds, strict=True):
                replica.start(feed)
        else:
            for replica in self.replicas:
                replica.start()
            if self.scenario.concurrency is None:
                self.env.process(self._open_loop(requests))
            else:
                self._waiting_clients = requests
                self._slots = self.scenario.concurrency
                self.env.process(self._first_round())
        self.env.run()
        for replica in self.replicas:
            self._check_answered(replica)
        return self._result(time.perf_counter() - started_s)

    @staticmethod
    def _check_answered(replica: Replica) -> None:
        withheld = replica.unanswered()
        if withheld:
            raise PolicyError(
                f"{type(replica.scheduler).__name__} ended with {len(withheld)} answers withheld; the first is that of"
                f" request {withheld[0].id}. Call replica.hand_out() when they are complete."
            )

    def _requests(self) -> Iterator[Request]:
        """Requests in order of arrival, made as they are needed."""
        trace = self.trace
        for first in range(0, len(trace), READ_AHEAD):
            part = slice(first, first + READ_AHEAD)
            arrival_s = trace.arrival_s[part].tolist()
            prompt, output = trace.prompt_tokens[part].tolist(), trace.output_tokens[part].tolist()
            yield from map(self._request, range(first, first + len(prompt)), arrival_s, prompt, output)

    def _foreseen(self) -> Iterator[Request]:
        """The same, in the order in which they are likely to come, for who reads the future."""
        requests, times_s = list(self._requests()), likely_times_s(self.trace)
        yield from sorted(requests, key=lambda request: times_s[request.id])

    def _request(self, i: int, arrival_s: float, prompt_tokens: int, output_tokens: int) -> Request:
        """Request i of the trace, as it is before it is sent."""
        trace = self.trace
        request = Request(i, arrival_s, prompt_tokens, output_tokens)
        if trace.priority is not None:
            request.priority = int(trace.priority[i])
        if self._labelled:
            self._label(request)
        if trace.block_ids is not None:
            request.prefix_ids, request.identity_tokens = trace.block_ids[i], prompt_tokens
            if trace.output_block_ids is not None and trace.output_block_ids[i]:
                request.prefix_ids += trace.output_block_ids[i]
                request.identity_tokens += output_tokens
        return request

    def _label(self, request: Request) -> None:
        """What policies may want to know of a request, where the trace says it."""
        for name, column in self._labelled.items():
            setattr(request, name, column[request.id])

    def _dealt(self, requests: Iterator[Request]) -> list[Iterator[Request]]:
        """What a stateless router gives each replica, routed as far ahead as some replica reads."""
        dealt: list[deque[Request]] = [deque() for _ in self.replicas]

        def feed(index: int) -> Iterator[Request]:
            mine = dealt[index]
            while True:
                while not mine:
                    request = next(requests, None)
                    if request is None:
                        return
                    dealt[self._routed(request, request.arrival_s).index].append(request)
                yield mine.popleft()

        return [feed(index) for index in range(len(self.replicas))]

    def _open_loop(self, requests: Iterator[Request]) -> Generator[simpy.Event, None, None]:
        env = self.env
        for request in requests:
            if isnan(request.arrival_s):
                continue  # `_send_turn` sends it when its parent has finished
            if request.arrival_s > env.now:
                yield env.timeout(request.arrival_s - env.now)
            self._send(request)

    def _first_round(self) -> Generator[simpy.Event, None, None]:
        yield self.env.timeout(0.0)
        for request in islice(self._waiting_clients, self._slots):
            request.arrival_s = self.env.now
            self._send(request)

    def _send(self, request: Request) -> None:
        now_s, answers = request.arrival_s, self._answers  # env.now may be a rounding before it
        while answers and answers[0][0] <= now_s:
            self.replicas[heappop(answers)[1]].outstanding -= 1
        replica = self._routed(request, now_s)
        replica.outstanding += 1
        self._ints["replica"][request.id] = replica.index
        replica.submit(request)

    def _routed(self, request: Request, now_s: float) -> Replica:
        replica = self.router.route(request, self.replicas, now_s)
        if not isinstance(replica, Replica):
            name = type(self.router).__name__
            raise PolicyError(f"{name} routed request {request.id} to {replica!r}. Return one of the replicas given.")
        return replica

    def _send_at(self, request: Request, at_s: float) -> None:
        def send(_: simpy.Event) -> None:
            request.arrival_s = at_s
            self._send(request)

        timer = self.env.timeout(max(0.0, at_s - self.env.now))
        assert timer.callbacks is not None
        timer.callbacks.append(send)

    def _send_turn(self, i: int, parent_known_s: float) -> None:
        """Request i waited for its parent; it may stand anywhere in the trace."""
        trace = self.trace
        think_s = 0.0 if trace.delay_s is None or isnan(trace.delay_s[i]) else float(trace.delay_s[i])
        request = self._request(i, nan, int(trace.prompt_tokens[i]), int(trace.output_tokens[i]))
        self._send_at(request, parent_known_s + think_s)

    # ------------------------------------------------------------------------------------------------- collecting

    def _record(self, request: Request, replica: Replica) -> None:
        """A request has been answered, or rejected (its times stay nan)."""
        i, floats, ints = request.id, self._floats, self._ints
        floats["arrival_s"][i] = request.arrival_s
        floats["scheduled_s"][i] = request.scheduled_s
        floats["first_token_s"][i] = request.first_token_s
        floats["finish_s"][i] = request.finish_s
        floats["preempted_s"][i] = request.preempted_s
        floats["preempted_before_first_s"][i] = request.preempted_before_first_s
        ints["replica"][i] = replica.index
        ints["cached_tokens"][i] = request.cached_tokens
        ints["preemptions"][i] = request.preemptions
        if request.rejected_s == request.rejected_s:
            self._turned_away.append(i)
        if not self._ahead:
            heappush(self._answers, (_known(request), replica.index))
        self._finished += 1
        if self.progress is not None and self._finished % PROGRESS_EVERY == 0:
            self.progress(self._finished, len(self.trace), request.finish_s)
        if self._slots:
            follower = next(self._waiting_clients, None)
            if follower is not None:
                self._send_at(follower, _known(request))
        elif self._children is not None:
            for child in self._children.get(i, ()):
                self._send_turn(child, _known(request))

    def _result(self, wall_s: float) -> Result:
        trace = self.trace
        requests: dict[str, Any] = {
            "id": np.arange(len(trace)),
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
        }
        requests |= {name: np.frombuffer(column, dtype=np.float64) for name, column in self._floats.items()}
        requests |= {name: np.frombuffer(column, dtype=np.int64) for name, column in self._ints.items()}
        requests |= {name: np.array(column) for name, column in self._labelled.items()}
        if self._turned_away:  # a column only where there is one to tell
            turned_away = requests["turned_away"] = np.zeros(len(trace), dtype=bool)
            turned_away[self._turned_away] = True
        rows = [len(r.iterations) for r in self.replicas]
        iterations = drained([r.iterations for r in self.replicas])
        iterations["replica"] = np.repeat(np.arange(len(self.replicas), dtype=np.int16), rows)
        stats = {
            "preemptions": sum(r.preemptions for r in self.replicas),
            "queried_tokens": sum(r.queried_tokens for r in self.replicas),
            "hit_tokens": sum(r.hit_tokens for r in self.replicas),
            "evicted_blocks": sum(r.kv.evicted_blocks for r in self.replicas),
            "kv_tiers": tier_rows(r.kv for r in self.replicas),
            "rejected": int(np.isnan(requests["finish_s"]).sum()),
            "turned_away": len(self._turned_away),
            "assigned": list(trace.assigned),
        }
        gaps = drained([r.gaps for r in self.replicas])
        return Result(requests, iterations, gaps, self.scenario, self.cost, self.blocks, wall_s, stats)


def _known(request: Request) -> float:
    """When the client knows that a request has ended; one that can never fit, at once."""
    if isnan(request.finish_s):
        return request.arrival_s if isnan(request.rejected_s) else request.rejected_s
    return request.finish_s


def _children(trace: Trace) -> dict[int, list[int]] | None:
    """Turns that wait for each request; None if no request waits."""
    if trace.parent is None or not np.isnan(trace.arrival_s).any():
        return None
    children: dict[int, list[int]] = {}
    for child in np.flatnonzero(np.isnan(trace.arrival_s)):
        children.setdefault(int(trace.parent[child]), []).append(int(child))
    return children
