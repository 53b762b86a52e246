"""Prefill and decode compared: the numbers of the textbook's table, for one model on one GPU.

A *point* is a prefill of n prompt tokens by itself, in the engine's chunks, or one decode step of requests with equal
contexts. Work is what `llmsim.cost.roofline` counts, per GPU; seconds come from the cost model:

    intensity    FLOPs / bytes;  ridge point = peak FLOP/s / peak bandwidth
    binds        compute if intensity is above the ridge point, else memory; bound_ratio: how many times as long the
                 binding resource needs, both at their peaks
    MFU, MBU     FLOPs / (GPU seconds * peak); bytes / (GPU seconds * peak bandwidth)
    wall_s       on both clocks. Prefill: from schedule to GPU end on an idle engine. Decode: the pace of steps,
                 max(T, schedule + launch + update), or without asynchronous scheduling their sum (llmsim.macrostep)
    paced_by     "host" if the launch, not the GPU's work, decides when most of it ends

Attention is what a step has beyond its linear layers. Of a decode those are the step without context. Of a chunk of n
tokens they are found from the cost model alone: after n cached tokens the same chunk has n^2 further (query, key)
pairs and the same linear layers, so its own n (n + 1) / 2 pairs cost that share of the difference. Where every layer
has a window below a tile of the attention kernels (`LEAST_WINDOW`), there are next to no further pairs to tell it by:
it is then counted with the linear layers, of which it is about one percent at most.

Where decode turns compute-bound is computed at the data sheet's peaks and at the rates the cost model reaches: linear
layers of the largest chunk, and the step of one request without context.

A request is served alone, and by an engine under the load of a closed loop (`simulate`, launch jitter off), where the
first and the last round of the clients are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import CostModel
from llmsim.cost.basis import pairs_of, windowed_pairs
from llmsim.cost.roofline import work
from llmsim.hardware import Gpu, Model, find_gpu, find_model
from llmsim.metrics import breakdown_s, json_safe, latencies_s
from llmsim.scenario import Scenario
from llmsim.simulate import blocks_of, cost_of, simulate
from llmsim.trace import Trace
from llmsim.utilisation import busy_seconds

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.metrics import Result

PREFILL_TOKENS = (128, 1024, 8192, 32768)
BATCHES = (1, 8, 64, 256)
LOAD = 64  # clients of the closed loop, if their requests fit
ROUNDS = 4  # requests of each client
MOST_REQUESTS = 1 << 16  # as far as a batch is looked for that turns compute-bound
LEAST_WINDOW = 64  # tokens; below, profiles of the same chunk differ by their tiles and not by its pairs
TEXTBOOK = {"prefill": (0.80, 0.95), "decode": (0.10, 0.30)}

Columns = dict[str, NDArray[Any]]
Chunk = tuple[int, int]  # new tokens, computed before


@dataclass(frozen=True)
class Point:
    """A prefill (size: prompt tokens) or a decode step (size: requests). FLOPs, bytes and their rates are one GPU's."""

    phase: str
    size: int
    context_tokens: int  # cached of each request before
    parallel_tokens: int  # of one request, computed at once
    flops_per_token: float
    bytes_per_token: float
    intensity_flops_per_byte: float
    flops_per_s: float
    bytes_per_s: float
    mfu: float
    mbu: float
    binds: str
    bound_ratio: float
    attention_share: float  # of GPU seconds
    gpu_s: float
    wall_s: float
    paced_by: str
    tokens_per_s: float  # of wall seconds
    outside_measured: bool


@dataclass(frozen=True)
class EqualContext:
    """The context of each request at which a decode step of `batch` requests is half attention."""

    batch: int
    bytes_context_tokens: int | None  # KV reads as many bytes as weights; None: beyond the longest context
    time_context_tokens: int | None  # and takes as long as everything else


@dataclass(frozen=True)
class Growth:
    """How time grows with prompt length, context and batch size."""

    chunk_tokens: int  # largest chunk
    linear_s_per_1k_tokens: float  # prefill in such chunks, without attention
    attention_s_per_1k_tokens_squared: float
    attention_half_tokens: int | None  # prompt of which attention is half of the GPU seconds
    decode_s_per_1k_cached_tokens: float  # of one request
    equal_contexts: tuple[EqualContext, ...]
    linear_compute_bound_batch_at_peak: int | None  # data sheet; no context
    linear_compute_bound_batch: int | None  # at the rates the cost model reaches
    step_compute_bound_batch: int | None  # data sheet, with KV reads; None: not of those that fit


@dataclass(frozen=True)
class Served:
    """A request's mean times with so many clients in a closed loop. TTFT is the sum of the four after it."""

    concurrency: int
    ttft_s: float
    own_prefill_s: float  # GPU seconds of its own prompt
    other_prefills_s: float  # of prompts beside it in the same iterations
    decodes_beside_s: float  # what the decodes in these iterations add
    waiting_and_host_s: float  # the rest: queue, iterations under way, host, client
    tpot_s: float | None
    e2el_s: float
    queue_share: float  # of E2EL, as are the next three
    prefill_share: float
    decode_share: float
    preempted_share: float
    prompt_iterations_share: float  # of the GPU's busy time: iterations that hold prompts


@dataclass(frozen=True)
class Phases:
    model: str
    gpu: str
    tensor_parallel: int
    weight_dtype: str
    kv_dtype: str
    peak_flops_per_s: float
    peak_bytes_per_s: float
    ridge_flops_per_byte: float
    kv_cache_tokens: int
    prompt_tokens: int
    output_tokens: int
    largest_batch: int  # requests of prompt and output, or of the given context, that KV cache and max_num_seqs allow
    cost_kind: str
    cost_label: str
    points: tuple[Point, ...]
    growth: Growth
    served: tuple[Served, ...]
    textbook: str  # what is true of it here, in words

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = json_safe(asdict(self))
        return document

    def of_phase(self, phase: str) -> list[Point]:
        return [point for point in self.points if point.phase == phase]

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([asdict(point) for point in self.points])


@dataclass(frozen=True)
class Engine:
    """One replica by itself: what the numbers are computed from."""

    scenario: Scenario  # resolved, without launch jitter
    model: Model
    gpu: Gpu
    cost: CostModel
    kv_blocks: int

    @classmethod
    def of(cls, scenario: Scenario, cost: CostModel | None = None) -> Engine:
        s = replace(scenario.resolved(), launch_jitter=False)
        return cls(s, find_model(s.model), find_gpu(s.gpu), cost or cost_of(s), blocks_of(s))

    @property
    def peak_flops_per_s(self) -> float:
        return self.gpu.flops_per_s[self.gpu.compute_dtype(self.model.weight_format(self.scenario.weight_dtype))]

    @property
    def context_tokens(self) -> int:
        assert self.scenario.max_model_len is not None
        return self.scenario.max_model_len

    @property
    def kv_cache_tokens(self) -> int:
        return (self.kv_blocks - 1) * self.scenario.block_size  # block 0 is vLLM's null block

    @property
    def chunk_tokens(self) -> int:
        """The most tokens of one prompt in an iteration."""
        s = self.scenario
        assert s.max_num_batched_tokens is not None
        return min(s.max_num_batched_tokens, s.long_prefill_token_threshold or self.context_tokens, self.context_tokens)

    def largest_batch(self, request_tokens: int) -> int:
        assert self.scenario.max_num_seqs is not None
        blocks = ceil(request_tokens / self.scenario.block_size)
        return min((self.kv_blocks - 1) // blocks, self.scenario.max_num_seqs)

    # ---- GPU seconds of parts, from the cost model alone --------------------------------------------------------

    def linear_s(self, tokens: int) -> float:
        """A chunk of `tokens` without its attention, which stays in if no layer sees `LEAST_WINDOW` tokens."""
        alone_s = self.cost.mixed_s([(tokens, 0)], 0, 0)
        if not self.model.full_layers and self.model.sliding_window < LEAST_WINDOW:
            return alone_s
        own = self._pairs(tokens, 0)
        further = self._pairs(tokens, tokens) - own
        return alone_s - (self.cost.mixed_s([(tokens, tokens)], 0, 0) - alone_s) * own / further

    def prefill_s(self, tokens: int) -> tuple[float, float]:
        """(GPU seconds of a prompt in chunks, those of its attention), each chunk on a rested GPU."""
        step = self.chunk_tokens
        sizes = [min(step, tokens - done) for done in range(0, tokens, step)]
        linear_s = (len(sizes) - 1) * self.linear_s(step) + self.linear_s(sizes[-1])
        total_s = sum(self.cost.mixed_s([(size, i * step)], 0, 0) for i, size in enumerate(sizes))
        return total_s, total_s - linear_s

    def _pairs(self, new: int, done: int) -> float:
        """(query, key) pairs of a chunk, times layers."""
        model = self.model
        every = model.full_layers * pairs_of(new, done)
        if not model.sliding_layers:
            return every
        return every + model.sliding_layers * windowed_pairs(new, done, model.sliding_window)

    # ---- useful work ------------------------------------------------------------------------------------------

    def decode_work(self, batch: int, kv_tokens: int) -> tuple[float, float]:
        """FLOPs and bytes of a decode step on one GPU."""
        return self.work_of(self.decode_row(batch, kv_tokens))

    def work_of(self, rows: Columns) -> tuple[float, float]:
        flops, moved_bytes = work(self.model, self.scenario, rows)
        return float(flops.sum()), float(moved_bytes.sum())

    def decode_row(self, batch: int, kv_tokens: int) -> Columns:
        return _row(mode=self.cost.mode(batch, 0), seqs=batch, kv_tokens=kv_tokens)


def compare(
    scenario: Scenario,
    *,
    prompt_tokens: int = 1024,
    output_tokens: int = 256,
    batches: Sequence[int] = (),
    context_tokens: int | None = None,
    cost: CostModel | None = None,
) -> Phases:
    """Everything `llmsim phases` prints. `batches`: of decode steps, else BATCHES as far as their requests fit;
    `context_tokens`: cached of each decode, else half-way through the answer; scenario.concurrency: clients of the
    loaded engine; `cost` replaces scenario.cost."""
    for name, tokens, least in (("prompt", prompt_tokens, 2), ("output", output_tokens, 1)):  # one token is a decode
        if tokens < least:
            raise ValueError(f"{name}={tokens} is too small: give {least} or more")
    if scenario.replicas != 1:
        raise ValueError(f"replicas={scenario.replicas}: the phases are those of one replica. Leave replicas out")
    if scenario.speculative_config:
        raise ValueError("speculative_config: the phases are those of an engine without drafts. Leave it out")
    engine = Engine.of(scenario, cost)
    largest = _largest_batch(engine, prompt_tokens, output_tokens)
    context = prompt_tokens + output_tokens // 2 if context_tokens is None else context_tokens
    if context_tokens is None:
        _check_batches(batches, largest, prompt_tokens, output_tokens)
    else:
        check_decodes(engine, [1, *batches], context)
    most = largest if context_tokens is None else engine.largest_batch(context + 1)
    sizes = sorted(set(batches)) or _within(BATCHES, most)
    longest = min(engine.context_tokens, engine.kv_cache_tokens) - 1  # one token is for the answer
    lengths = _within(sorted({*PREFILL_TOKENS, prompt_tokens}), longest)
    prefills = [prefill_point(engine, tokens) for tokens in lengths]
    decodes = [decode_point(engine, batch, context) for batch in sizes]
    load = scenario.concurrency or min(LOAD, largest)
    served = [serve(engine, clients, prompt_tokens, output_tokens) for clients in sorted({1, load})]
    s, peak_flops_per_s, peak_bytes_per_s = engine.scenario, engine.peak_flops_per_s, engine.gpu.bandwidth_bytes_per_s
    return Phases(
        model=engine.model.name,
        gpu=engine.gpu.name,
        tensor_parallel=s.tensor_parallel,
        weight_dtype=engine.model.weight_format(s.weight_dtype),
        kv_dtype=s.kv_dtype,
        peak_flops_per_s=peak_flops_per_s,
        peak_bytes_per_s=peak_bytes_per_s,
        ridge_flops_per_byte=peak_flops_per_s / peak_bytes_per_s,
        kv_cache_tokens=engine.kv_cache_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        largest_batch=most,
        cost_kind=engine.cost.kind,
        cost_label=engine.cost.label,
        points=(*prefills, *decodes),
        growth=growth(engine, sizes, context, most),
        served=tuple(served),
        textbook=textbook(prefills, decodes),
    )


def batches_beside(scenario: Scenario, batch: int, context_tokens: int) -> list[int]:
    """`batch` among the usual ones that fit with so many tokens cached each."""
    engine = Engine.of(scenario)
    check_decodes(engine, [batch], context_tokens)
    return sorted({batch, *_within(BATCHES, engine.largest_batch(context_tokens + 1))})


def prefill_point(engine: Engine, tokens: int) -> Point:
    """A prompt by itself, on an idle engine."""
    log = _replay(engine, 1, 1, tokens, 1).iterations
    total_s, attention_s = engine.prefill_s(tokens)
    return _point(
        engine,
        log,
        phase="prefill",
        size=tokens,
        context_tokens=0,
        tokens=tokens,
        parallel_tokens=int(log["prefill_tokens"].max()),
        attention_share=attention_s / total_s,
        gpu_s=float(busy_seconds(log).sum()),
        wall_s=float(log["gpu_end_s"][-1] - log["start_s"][0]),
        paced_by=_paced_by(engine, log),
    )


def decode_point(engine: Engine, batch: int, context_tokens: int) -> Point:
    """A step of `batch` requests with `context_tokens` cached each."""
    cost, host = engine.cost, engine.cost.host
    mode = cost.mode(batch, 0)
    gpu_s = cost.decode_ramp(batch, batch * context_tokens).first_s
    schedule_s = host.schedule_s + host.schedule_per_request_s * batch
    launch_s = host.launch_s[mode] + host.launch_per_request_s[mode] * batch
    update_s = host.update_s + host.update_per_output_s * batch
    if engine.scenario.async_scheduling:
        host_s = schedule_s + launch_s + update_s
        wall_s = max(gpu_s, host_s)
    else:
        host_s = launch_s + host.tail_s[mode] - host.lead_s[mode]
        wall_s = schedule_s + host.lead_s[mode] + max(gpu_s, host_s) + update_s
    return _point(
        engine,
        engine.decode_row(batch, batch * context_tokens),
        phase="decode",
        size=batch,
        context_tokens=context_tokens,
        tokens=batch,
        parallel_tokens=1,
        attention_share=1 - cost.decode_ramp(batch, 0).first_s / gpu_s,
        gpu_s=gpu_s,
        wall_s=wall_s,
        paced_by="host" if host_s > gpu_s else "GPU",
    )


def growth(engine: Engine, batches: Sequence[int], context_tokens: int, largest_batch: int) -> Growth:
    cost, chunk = engine.cost, engine.chunk_tokens
    linear_s = engine.linear_s(chunk)
    step_s = cost.decode_ramp(1, 0).first_s
    linear_flops, _ = engine.work_of(_row(prefill_requests=1, prefill_tokens=chunk))
    _, weight_bytes = engine.decode_work(1, 0)
    peak, bandwidth = engine.peak_flops_per_s, engine.gpu.bandwidth_bytes_per_s

    def compute_bound(flops_per_s: float, bytes_per_s: float, context: int = 0) -> Callable[[int], bool]:
        def holds(batch: int) -> bool:
            flops, moved_bytes = engine.decode_work(batch, batch * context)
            return flops / flops_per_s >= moved_bytes / bytes_per_s

        return holds

    attention_s = cost.mixed_s([(chunk, 0)], 0, 0) - linear_s
    further_s = cost.decode_ramp(1, 2 * context_tokens).first_s - cost.decode_ramp(1, context_tokens).first_s
    return Growth(
        chunk_tokens=chunk,
        linear_s_per_1k_tokens=linear_s / chunk * 1e3,
        attention_s_per_1k_tokens_squared=attention_s / chunk**2 * 1e6,
        attention_half_tokens=attention_half_tokens(engine),
        decode_s_per_1k_cached_tokens=further_s / context_tokens * 1e3,
        equal_contexts=tuple(equal_context(engine, batch) for batch in batches),
        linear_compute_bound_batch_at_peak=_first(range(1, MOST_REQUESTS), compute_bound(peak, bandwidth)),
        linear_compute_bound_batch=_first(
            range(1, MOST_REQUESTS), compute_bound(linear_flops / linear_s, weight_bytes / step_s)
        ),
        step_compute_bound_batch=_first(range(1, largest_batch + 1), compute_bound(peak, bandwidth, context_tokens)),
    )


def attention_half_tokens(engine: Engine) -> int | None:
    """The shortest prompt of which attention is half, among multiples of the chunk and in the chunk before that."""

    def half(tokens: int) -> bool:
        total_s, attention_s = engine.prefill_s(tokens)
        return 2 * attention_s >= total_s

    chunk, longest = engine.chunk_tokens, engine.context_tokens - 1
    whole = _first(range(chunk, longest + 1, chunk), half)
    before = longest // chunk * chunk if whole is None else whole - chunk
    return _first(range(before + 1, min(before + chunk, longest) + 1), half)


def equal_context(engine: Engine, batch: int) -> EqualContext:
    _, weight_bytes = engine.decode_work(batch, 0)
    step_s = engine.cost.decode_ramp(batch, 0).first_s
    contexts = range(1, engine.context_tokens + 1)
    return EqualContext(
        batch,
        _first(contexts, lambda context: engine.decode_work(batch, batch * context)[1] >= 2 * weight_bytes),
        _first(contexts, lambda context: engine.cost.decode_ramp(batch, batch * context).first_s >= 2 * step_s),
    )


def serve(engine: Engine, clients: int, prompt_tokens: int, output_tokens: int) -> Served:
    """Identical requests in a closed loop; of more than one client the rounds between the first and the last."""
    noted = _Noted(engine.cost)
    result = _replay(replace(engine, cost=noted), clients, ROUNDS if clients > 1 else 1, prompt_tokens, output_tokens)
    scheduled_s = np.sort(result.requests["scheduled_s"])
    begin_s, end_s = (scheduled_s[clients], scheduled_s[-clients]) if clients > 1 else (-np.inf, np.inf)
    chosen = (result.requests["scheduled_s"] >= begin_s) & (result.requests["scheduled_s"] < end_s)
    requests = {name: column[chosen] for name, column in result.requests.items()}
    log = result.iterations
    inside, prompts = (log["start_s"] >= begin_s) & (log["start_s"] < end_s), log["prefill_requests"] > 0
    parts_s = np.array(noted.parts_s)[inside[prompts]].sum(axis=0) / chosen.sum()
    own_s, others_s, decodes_s = parts_s.tolist()
    busy_s = busy_seconds(log)
    latency_s = {name: float(values.mean()) for name, values in latencies_s(requests).items()}
    where_s = {name: float(values.mean()) for name, values in breakdown_s(requests).items()}
    return Served(
        concurrency=clients,
        ttft_s=latency_s["ttft"],
        own_prefill_s=own_s,
        other_prefills_s=others_s,
        decodes_beside_s=decodes_s,
        waiting_and_host_s=latency_s["ttft"] - own_s - others_s - decodes_s,
        tpot_s=latency_s["tpot"] if output_tokens > 1 else None,
        e2el_s=latency_s["e2el"],
        prompt_iterations_share=float(busy_s[inside & prompts].sum() / busy_s[inside].sum()),
        **{f"{name}_share": seconds / latency_s["e2el"] for name, seconds in where_s.items()},
    )


def textbook(prefills: Sequence[Point], decodes: Sequence[Point]) -> str:
    """What textbooks say of the phases, held against these points."""

    def span(values: Sequence[float]) -> str:
        low, high = (
            f"{share:,.0f}" if share >= 100 else f"{share:.2g}" for share in (100 * min(values), 100 * max(values))
        )
        return f"{low} %" if low == high else f"{low}–{high} %"

    def verdict(phase: str, values: Sequence[float]) -> str:
        low, high = TEXTBOOK[phase]
        sides = (("below", sum(value < low for value in values)), ("above", sum(value > high for value in values)))
        words = [
            f"{word} that" if n == len(values) else f"{n} of {len(values)} points {word} that" for word, n in sides if n
        ]
        return " and ".join(words) or "as they say"

    def sizes(points: Sequence[Point]) -> str:
        low, high = f"{points[0].size:,}", f"{points[-1].size:,}"
        return low if low == high else f"{low} to {high}"

    prefill, decode = [p.mfu for p in prefills], [p.mfu for p in decodes]
    return (
        "Textbooks say that prefill uses 80–95 % of a GPU and decode 10–30 %; here, while the GPU is busy, prefill of "
        f"{sizes(prefills)} tokens reaches {span(prefill)} of its peak FLOP/s ({verdict('prefill', prefill)}) and "
        f"decode at batch {sizes(decodes)} reaches {span(decode)} ({verdict('decode', decode)}), while of its peak "
        f"bandwidth decode uses {span([p.mbu for p in decodes])} and prefill {span([p.mbu for p in prefills])}."
    )


class _Noted:
    """A cost model that notes, for each iteration with prompts, whose GPU seconds a prompt in it waits for.

    parts_s: summed over its chunks, (the chunk by itself, the other chunks beside it, what the decodes add).
    """

    def __init__(self, cost: CostModel) -> None:
        self.kind, self.label, self.host = cost.kind, cost.label, cost.host
        self.mode, self.decode_ramp, self.outside_measured = cost.mode, cost.decode_ramp, cost.outside_measured
        self._mixed_s: Callable[..., float] = cost.mixed_s
        self.reads_longest = getattr(cost, "reads_longest", False)
        self.parts_s: list[tuple[float, float, float]] = []

    def mixed_s(self, chunks: Sequence[Chunk], seqs: int, kv_tokens: float, *longest: float) -> float:
        seconds, prompts_s = self._mixed_s(chunks, seqs, kv_tokens, *longest), self._mixed_s(chunks, 0, 0)
        own_s = sum(self._mixed_s([chunk], 0, 0) for chunk in chunks)
        self.parts_s.append((own_s, len(chunks) * prompts_s - own_s, len(chunks) * (seconds - prompts_s)))
        return seconds


def _replay(engine: Engine, clients: int, rounds: int, prompt_tokens: int, output_tokens: int) -> Result:
    count = clients * rounds
    trace = Trace(
        name="identical requests",
        arrival_s=np.zeros(count),
        prompt_tokens=np.full(count, prompt_tokens),
        output_tokens=np.full(count, output_tokens),
    )
    return simulate(trace, replace(engine.scenario, concurrency=clients), cost=engine.cost)


def _row(**columns: int) -> Columns:
    """One iteration as a row of the log; columns not given are 0."""
    names = ("seqs", "kv_tokens", "prefill_requests", "prefill_tokens", "prefill_pairs", "prefill_context", "mode")
    return {name: np.array([columns.get(name, 0)]) for name in names} | {"iterations": np.array([1])}


def _point(
    engine: Engine,
    rows: Columns,
    *,
    tokens: int,
    gpu_s: float,
    wall_s: float,
    **given: Any,
) -> Point:
    flops, moved_bytes = engine.work_of(rows)
    compute_s, memory_s = flops / engine.peak_flops_per_s, moved_bytes / engine.gpu.bandwidth_bytes_per_s
    return Point(
        **given,
        flops_per_token=flops / tokens,
        bytes_per_token=moved_bytes / tokens,
        intensity_flops_per_byte=flops / moved_bytes,
        flops_per_s=flops / gpu_s,
        bytes_per_s=moved_bytes / gpu_s,
        mfu=compute_s / gpu_s,
        mbu=memory_s / gpu_s,
        binds="compute" if compute_s > memory_s else "memory",
        bound_ratio=max(compute_s, memory_s) / min(compute_s, memory_s),
        gpu_s=gpu_s,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s,
        outside_measured=bool(np.any(engine.cost.outside_measured(rows))),
    )


def _paced_by(engine: Engine, log: Columns) -> str:
    """Whether the GPU ended most of these iterations when its work was done, or later, when their launches were."""
    host, mode, end_s = engine.cost.host, log["mode"], log["gpu_end_s"]
    begin_s = log["start_s"] + host.schedule_s + host.schedule_per_request_s * log["running"]
    begin_s = begin_s + host.schedule_per_token_s * log["prefill_tokens"] + np.array(host.lead_s)[mode]
    before_s = np.concatenate(([-np.inf], end_s[:-1]))
    late = end_s > np.maximum(before_s, begin_s) + log["gpu_first_s"] + 1e-9
    spans_s = np.diff(end_s, prepend=log["start_s"][0])
    return "host" if 2 * spans_s[late].sum() > spans_s.sum() else "GPU"


def _first(candidates: range, holds: Callable[[int], bool]) -> int | None:
    """The least candidate from which on `holds` is true; None if it is true of none."""
    index = bisect_left(candidates, True, key=holds)
    return candidates[index] if index < len(candidates) else None


def _within(sizes: Sequence[int], most: int) -> list[int]:
    """Those up to `most`; and `most` itself where larger ones are left out."""
    kept = [size for size in sizes if size <= most]
    return kept if len(kept) == len(sizes) else sorted({*kept, most})


def _largest_batch(engine: Engine, prompt_tokens: int, output_tokens: int) -> int:
    total, longest = prompt_tokens + output_tokens, engine.context_tokens
    if total > longest:
        raise ValueError(
            f"prompt={prompt_tokens} and output={output_tokens} are {total} tokens, above max_model_len={longest} of "
            f"{engine.model.name}: lower one of them"
        )
    largest = engine.largest_batch(total)
    if largest < 1:
        raise ValueError(
            f"prompt={prompt_tokens} and output={output_tokens} need {total} tokens of KV cache, which has "
            f"{engine.kv_cache_tokens}: lower one of them"
        )
    return largest


def check_decodes(engine: Engine, batches: Sequence[int], context_tokens: int) -> None:
    """That steps of so many requests with `context_tokens` cached each, and one to come, can be."""
    if context_tokens < 1:
        raise ValueError(f"context={context_tokens} is too small: give 1 or more")
    if context_tokens >= engine.context_tokens:
        raise ValueError(
            f"context={context_tokens} leaves no room for an answer below max_model_len={engine.context_tokens} of "
            f"{engine.model.name}: give less"
        )
    most = engine.largest_batch(context_tokens + 1)
    for batch in batches:
        if not 1 <= batch <= most:
            raise ValueError(
                f"batch={batch}: the KV cache ({engine.kv_cache_tokens:,} tokens) and max_num_seqs allow 1 to {most} "
                f"requests of {context_tokens:,} cached tokens each. Give a batch of that range, or less context"
            )


def _check_batches(batches: Sequence[int], largest: int, prompt_tokens: int, output_tokens: int) -> None:
    for batch in batches:
        if not 1 <= batch <= largest:
            raise ValueError(
                f"batch={batch}: the KV cache and max_num_seqs allow 1 to {largest} requests of {prompt_tokens} + "
                f"{output_tokens} tokens. Give a batch of that range, or shorter requests"
            )
