"""Attention of one layer: chunks of prompts, decodes, and both in one call, by backend, head shape and KV dtype.

A batch is `seqs` decodes (one query token each after `seq_context_tokens` cached ones: their mean) and `chunks` prompt
chunks of `new_tokens` after `context_tokens` cached ones; a sequence's keys are its cached tokens and its new ones.

    pairs   n c + n (n + 1) / 2 (query, key) pairs for n new tokens after c cached ones
    flops   4 pairs q_heads head_dim
    bytes   keys and values once, queries in, output out

Skew of the decodes' contexts about their mean m: "half" of them m/4 and the other half 7m/4; "one_long" holds half of
all cached tokens; "spread" is chat's: log-normal, the quantiles of a sigma of 0.8, in an order drawn once; "near" is
what requests alike come to, each further on than the next: the same with a sigma of 0.05. Of an even batch the tiles of
all sequences end together, so that one tile too many costs a whole wave; an engine's batches are never that even.

Backends. "fa3": FlashAttention 3 as vLLM 0.25.1 calls it on Hopper: KV in pages of 16 tokens through a shuffled block
table, one ragged call for the whole batch, decodes first, with scheduler metadata made once per step. launch="graph"
does as vLLM does by default: at most 32 KV splits up to 512 tokens (its largest CUDA graph), FA3's own choice above;
"eager" as vLLM does with enforce_eager: always FA3's choice, and called from Python. With fp8 KV the queries are fp8
too and the output is bf16. "varlen": torch's ragged FlashAttention on contiguous KV. "sdpa_*": torch's scaled dot
product attention, one call per group of equal sequences, contiguous KV; "sdpa_math" is unfused (scores in memory, in
the inputs' dtype), the baseline for what FlashAttention gains. "flex": FlexAttention, compiled on the GPU.

KV lies in one pool of random data that all points share; block tables and offsets rotate through it. Chunks of 512
tokens or more are timed at sustained clocks.

`python -m calibration.measure.attention --selftest [--device cpu]` compares every backend with plain float32 attention.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from math import exp
from random import Random
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

from calibration.measure.points import Point, Unavailable, Wanted

if TYPE_CHECKING:
    from calibration.measure.rows import Row
    from calibration.measure.timing import Bench

PAGE_TOKENS = 16
SPLITS_IN_GRAPHS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
GRAPH_TOKENS = 512  # vLLM's largest CUDA graph
POOL_BYTES = 20e9  # of bf16 KV; fp8 has the same number of elements
MOST_FLOPS = 6e12  # of one point: about 10 ms
MOST_CONTEXT_TOKENS = 131_072
SUSTAINED_FROM = 512  # new tokens of a chunk: below, memory binds and the clocks stay up
FP8_DESCALE = 0.5
SIGMAS = {"spread": 0.8, "near": 0.05}  # of the logarithm of context lengths

OPS = ("attention_prefill", "attention_decode", "attention_mixed")
MAIN_HEADS = (32, 8, 128)


class Heads(NamedTuple):
    q_heads: int
    kv_heads: int
    head_dim: int


class Group(NamedTuple):
    """`count` sequences alike: `new` query tokens each, after `context` cached ones."""

    count: int
    new: int
    context: int

    @property
    def keys(self) -> int:
        return self.context + self.new


@dataclass(frozen=True)
class Batch:
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        return sum(group.count * group.new for group in self.groups)

    @property
    def keys(self) -> int:
        return sum(group.count * group.keys for group in self.groups)

    @property
    def pairs(self) -> int:
        return sum(count * (new * context + new * (new + 1) // 2) for count, new, context in self.groups)

    @property
    def sequences(self) -> list[Group]:
        return [Group(1, new, context) for count, new, context in self.groups for _ in range(count)]

    def flops(self, heads: Heads) -> float:
        return 4.0 * self.pairs * heads.q_heads * heads.head_dim

    def bytes(self, heads: Heads, kv_dtype: str) -> float:
        element = 1 if kv_dtype == "fp8" else 2
        kv = 2 * self.keys * heads.kv_heads * element
        return float((kv + self.tokens * heads.q_heads * (element + 2)) * heads.head_dim)


def decodes(seqs: int, mean: int, skew: str) -> list[Group]:
    if skew == "uniform":
        return [Group(seqs, 1, mean)]
    if skew == "half":
        low = mean // 4
        return [Group(seqs - seqs // 2, 1, low), Group(seqs // 2, 1, 2 * mean - low)]
    if skew == "one_long":
        long = seqs * mean // 2
        return [Group(seqs - 1, 1, (seqs * mean - long) // (seqs - 1)), Group(1, 1, long)]
    if skew in SIGMAS:
        normal = NormalDist(0.0, SIGMAS[skew])
        shares = [exp(normal.inv_cdf((at + 0.5) / seqs)) for at in range(seqs)]
        Random(seqs).shuffle(shares)
        return [Group(1, 1, max(round(seqs * mean * share / sum(shares)), 1)) for share in shares]
    raise ValueError(f"skew={skew!r}: use uniform, half, one_long, spread or near")


def batch_of(point: Point) -> Batch:
    groups: list[Group] = []
    if point.get("seqs"):
        groups += decodes(point["seqs"], point["seq_context_tokens"], point["skew"])
    if point.get("chunks"):
        groups.append(Group(point["chunks"], point["new_tokens"], point["context_tokens"]))
    return Batch(tuple(groups))


# ---- what is measured ---------------------------------------------------------------------------------------------


def head_shapes(wanted: Wanted) -> list[Heads]:
    """Those of one rank of every model and tensor-parallel size wanted; the most common shape first."""
    shapes = dict.fromkeys(
        Heads(model.heads // tp, max(1, model.kv_heads // tp), model.head_dim)
        for tp in sorted(wanted.tensor_parallel)
        for model in wanted.models
        if not model.mla and tp in model.tensor_parallel_sizes(max(wanted.tensor_parallel))
    )
    return sorted(shapes, key=lambda heads: heads != MAIN_HEADS)


def pool_elements(device: str) -> int:
    """Elements of the KV pool: 20 GB in bf16, at most a quarter of the GPU's memory."""
    import torch

    if device == "cpu":
        return 1 << 22
    limit = torch.cuda.get_device_properties(0).total_memory / 4 if torch.cuda.is_available() else POOL_BYTES
    return int(min(POOL_BYTES, limit)) // 2


@dataclass(frozen=True)
class _Grid:
    """Points of one backend, head shape and dtypes that fit into the pool and the time of one point."""

    backend: str
    heads: Heads
    dtype: str
    kv_dtype: str
    elements: int
    launch: str = "graph"

    def _point(self, op: str, **columns: Any) -> Iterator[Point]:
        if columns.get("new_tokens", 0) >= SUSTAINED_FROM:
            columns["clocks"] = "sustained"
        point = Point.of(
            op,
            self.backend,
            self.launch,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            **self.heads._asdict(),
            **columns,
        )
        batch = batch_of(point)
        held = batch.keys + PAGE_TOKENS * sum(group.count for group in batch.groups)  # the last page is not full
        kv_elements = 2 * held * self.heads.kv_heads * self.heads.head_dim
        longest = max(group.keys for group in batch.groups)
        if kv_elements <= self.elements and batch.flops(self.heads) <= MOST_FLOPS and longest <= MOST_CONTEXT_TOKENS:
            yield point

    def prefill(self, new: Iterable[int], context: Iterable[int], chunks: Iterable[int] = (1,)) -> Iterator[Point]:
        for k, c, n in product(chunks, context, new):
            yield from self._point("attention_prefill", chunks=k, new_tokens=n, context_tokens=c)

    def decode(self, seqs: Iterable[int], context: Iterable[int], skew: str = "uniform") -> Iterator[Point]:
        for c, s in product(context, seqs):
            yield from self._point("attention_decode", seqs=s, seq_context_tokens=c, skew=skew)

    def mixed(
        self,
        new: Iterable[int],
        context: Iterable[int],
        seqs: Iterable[int],
        seq_context: Iterable[int],
        chunks: Iterable[int] = (1,),
        skew: str = "uniform",
    ) -> Iterator[Point]:
        for k, sc, c, s, n in product(chunks, seq_context, context, seqs, new):
            yield from self._point(
                "attention_mixed",
                chunks=k,
                new_tokens=n,
                context_tokens=c,
                seqs=s,
                seq_context_tokens=sc,
                skew=skew,
            )


def _powers(first: int, last: int) -> list[int]:
    return [1 << power for power in range(first.bit_length() - 1, last.bit_length())]


SEQS = (*range(1, 17), 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (0, 1024, 4096, 16384, 32768, 65536)
# On both sides of 1, 2, .. waves of tiles on 132 multiprocessors, at 2 to 16 KV heads, and of the largest CUDA graph.
NEAR_SEQS = (
    *range(1, 18), 18, 20, 22, 24, 25, 26, 28, 30, 32, 33, 34, 36, 40, 44, 48, 50, 52, 56, 60, 64, 66, 67, 68, 72, 80,
    88, 96, 99, 100, 112, 128, 132, 133, 144, 160, 176, 192, 200, 224, 256, 320, 384, 512, 640, 1024,
)  # fmt: skip
NEAR_CONTEXTS = (300, 1100, 4000)


def _coarse(grid: _Grid) -> Iterator[Point]:
    yield from grid.decode((1, 8, 32, 128, 256), (16, 256, 1024, 4096, 16384, 65536))
    yield from grid.prefill((16, 128, 512, 2048, 8192), (0, 4096, 32768))
    yield from grid.mixed((64, 512, 2048, 8192), (0, 4096), (8, 64, 256), (512, 4096))


def _scheduled(grid: _Grid) -> Iterator[Point]:
    """What shows how tiles are scheduled: several chunks in a call, edges of tiles and waves, contexts that differ."""
    yield from grid.prefill((32, 256, 1024), (0, 4096), (2, 8))
    yield from grid.mixed((32, 256, 1024), (0, 4096), (8, 64), (1024,), (2, 8))
    yield from grid.mixed((64, 512, 2048), (0,), (4, 16, 64), (2048,), skew="one_long")
    yield from grid.mixed((64, 512, 2048), (0,), (16, 64, 192), (1024,), skew="spread")
    yield from grid.mixed((128, 1024), (0,), (1, 2, 6), (24576,))
    yield from grid.prefill((96, 300, 450, 640, 900, 1300, 1800), (0, 2048))
    yield from grid.mixed((300, 640, 1300), (0,), (8, 40, 120), (1024,))


def _skewed(grid: _Grid) -> Iterator[Point]:
    for skew in ("one_long", "half"):
        yield from grid.decode((8, 32, 128, 256), (256, 1024, 4096), skew)
    yield from grid.decode((8, 16, 32, 64, 96, 128, 192, 256), (512, 1024, 2048), "spread")


def _near(grid: _Grid) -> Iterator[Point]:
    """What an engine's decodes take: contexts that are nearly, not quite, alike."""
    yield from grid.decode(NEAR_SEQS, NEAR_CONTEXTS, "near")


def _sparse(grid: _Grid) -> Iterator[Point]:
    """For head shapes other than the main one."""
    yield from grid.decode((1, 8, 64, 256), (256, 2048, 16384))
    yield from grid.prefill((128, 1024, 4096), (0, 8192))
    yield from grid.mixed((128, 2048), (0, 4096), (16, 128), (1024,))


def _dense(grid: _Grid) -> Iterator[Point]:
    yield from grid.mixed((16, 128, 1024, 4096), (0, 2048, 16384), (2, 16, 128), (128, 1024, 8192))
    yield from grid.prefill(_powers(16, 16384), CONTEXTS)
    yield from grid.prefill((192, 384, 768, 1536, 3072, 6144, 12288), (0, 1024, 4096))
    yield from grid.decode(SEQS, (128, 512, 2048, 8192, 32768))
    yield from grid.decode(SEQS, (16, 64, 256, 1024, 4096, 16384, 65536))
    yield from grid.mixed((32, 256, 512, 2048, 8192), (0, 1024, 8192, 32768), (1, 4, 32, 64, 256), (256, 2048, 16384))


def _torch_backend(grid: _Grid) -> Iterator[Point]:
    yield from grid.prefill((128, 512, 1024, 2048, 4096), (0,))
    yield from grid.decode((1, 8, 32, 128), (256, 1024))
    yield from grid.decode((1, 8, 32), (4096,))
    yield from grid.prefill((512, 2048), (4096,))


def _tiny(grid: _Grid) -> Iterator[Point]:
    yield from grid.prefill((1, 16), (0, 40))
    yield from grid.decode((1, 4), (16, 64))
    yield from grid.decode((4,), (64,), "half")
    yield from grid.mixed((16,), (24,), (3,), (40,))


# ---- the pool -----------------------------------------------------------------------------------------------------


class Pool:
    """Random keys and values of a device, seen as pages or as contiguous sequences: the large one that all points
    share, or, with `elements`, a small one for whoever keeps it."""

    def __init__(self, bench: Bench, elements: int | None = None) -> None:
        self.bench = bench
        self.elements = elements or pool_elements(bench.device)
        self._use = "kv" if elements is None else "few_kv"
        self._tables: tuple[int, Any] = (0, None)

    def _flat(self, kv_dtype: str) -> Any:
        return self.bench.views(1, (self.elements,), kv_dtype, self._use)[0]

    def paged(self, heads: Heads, kv_dtype: str) -> tuple[Any, Any]:
        """Keys and values, each (pages, PAGE_TOKENS, kv_heads, head_dim), a page's values behind its keys."""
        page = 2 * PAGE_TOKENS * heads.kv_heads * heads.head_dim
        pages = self.elements // page
        cache = self._flat(kv_dtype)[: pages * page].view(pages, 2, PAGE_TOKENS, heads.kv_heads, heads.head_dim)
        return cache[:, 0], cache[:, 1]

    def tables(self, batch: Batch, heads: Heads, count: int) -> list[Any]:
        """`count` block tables (sequences, most pages of one): other pages in each as far as there are enough."""
        torch = self.bench.torch
        pages = self.elements // (2 * PAGE_TOKENS * heads.kv_heads * heads.head_dim)
        if self._tables[0] != pages:
            generator = torch.Generator(self.bench.device).manual_seed(self.bench.seed)
            shuffled = torch.randperm(pages, dtype=torch.int32, device=self.bench.device, generator=generator)
            self._tables = pages, shuffled
        shuffled = self._tables[1]
        needed = [-(-group.keys // PAGE_TOKENS) for group in batch.groups]
        total = sum(group.count * each for group, each in zip(batch.groups, needed, strict=True))
        shape = (sum(group.count for group in batch.groups), max(needed))
        made = []
        for index in range(count):
            start = index * total % (pages - total + 1)
            table = torch.zeros(shape, dtype=torch.int32, device=self.bench.device)
            row = 0
            for group, each in zip(batch.groups, needed, strict=True):
                end = start + group.count * each
                table[row : row + group.count, :each] = shuffled[start:end].view(group.count, each)
                row, start = row + group.count, end
            made.append(table)
        return made

    def contiguous(self, shape: tuple[int, ...], kv_dtype: str, index: int) -> tuple[Any, Any]:
        """Keys and values of `shape`; another `index`: elsewhere in the pool as far as it reaches."""
        size = 1
        for extent in shape:
            size *= extent
        pair = 2 * size
        start = index * pair % (self.elements - pair + 1) // 8 * 8
        flat = self._flat(kv_dtype)[start : start + pair]
        return flat[:size].view(shape), flat[size:].view(shape)


# ---- backends -----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """`run` the operation. `inputs`: (q, k, v) of each sequence in batch order, each (tokens, heads, head_dim) in
    float32; `output` turns what `run` returns into (tokens, q_heads, head_dim)."""

    run: Callable[[], Any]
    inputs: Callable[[], list[tuple[Any, Any, Any]]]
    output: Callable[[Any], Any]


class Request(NamedTuple):
    batch: Batch
    heads: Heads
    dtype: str
    kv_dtype: str
    launch: str
    copies: int


class Backend(ABC):
    name: str
    kv_dtypes: tuple[str, ...] = ("bfloat16",)
    launch = "graph"

    @abstractmethod
    def unavailable(self, device: str) -> str | None:
        """Why it cannot run here."""

    @abstractmethod
    def calls(self, request: Request, pool: Pool) -> list[Call]:
        """The same batch, once for each of `request.copies` inputs."""


def _starts(lengths: Sequence[int], bench: Bench) -> Any:
    torch = bench.torch
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(bench.device)


class FlashAttention3(Backend):
    name = "fa3"
    kv_dtypes = ("bfloat16", "fp8")

    def unavailable(self, device: str) -> str | None:
        if device != "cuda":
            return "fa3 needs a Hopper GPU"
        try:
            from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported
        except Exception as error:  # vllm's extensions fail in many ways on a machine they were not built for
            return f"vllm.vllm_flash_attn is not importable ({str(error).splitlines()[0] if str(error) else error!r})"
        return None if is_fa_version_supported(3) else str(fa_version_unsupported_reason(3))

    def calls(self, request: Request, pool: Pool) -> list[Call]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        bench, batch, heads = pool.bench, request.batch, request.heads
        torch = bench.torch
        fp8 = request.kv_dtype == "fp8"
        sequences = batch.sequences
        starts = _starts([sequence.new for sequence in sequences], bench)
        used = torch.tensor([sequence.keys for sequence in sequences], dtype=torch.int32, device=bench.device)
        longest_q = max(group.new for group in batch.groups)
        longest_k = max(group.keys for group in batch.groups)
        splits = SPLITS_IN_GRAPHS if request.launch == "graph" and batch.tokens <= GRAPH_TOKENS else 0
        q_dtype = "fp8" if fp8 else request.dtype
        metadata = get_scheduler_metadata(
            batch_size=len(sequences),
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            num_heads_q=heads.q_heads,
            num_heads_kv=heads.kv_heads,
            headdim=heads.head_dim,
            cache_seqlens=used,
            qkv_dtype=bench.dtype(q_dtype),
            cu_seqlens_q=starts,
            page_size=PAGE_TOKENS,
            causal=True,
            window_size=(-1, -1),
            num_splits=splits,
        )
        scale = torch.full((1,), FP8_DESCALE, dtype=torch.float32, device=bench.device)
        descale = scale.expand(len(sequences), heads.kv_heads) if fp8 else None
        keys, values = pool.paged(heads, request.kv_dtype)
        shape = (batch.tokens, heads.q_heads, heads.head_dim)
        queries = bench.views(request.copies, shape, q_dtype, "query")
        outputs = bench.views(request.copies, shape, request.dtype, "attention")
        tables = pool.tables(batch, heads, request.copies)
        factor = FP8_DESCALE if fp8 else 1.0

        def inputs(query: Any, table: Any) -> list[tuple[Any, Any, Any]]:
            found, first = [], 0
            for row, sequence in enumerate(sequences):
                pages = table[row].long()
                k, v = (cache[pages].float().flatten(0, 1)[: sequence.keys] * factor for cache in (keys, values))
                found.append((query[first : first + sequence.new].float() * factor, k, v))
                first += sequence.new
            return found

        return [
            Call(
                partial(
                    flash_attn_varlen_func,
                    q=query,
                    k=keys,
                    v=values,
                    out=out,
                    cu_seqlens_q=starts,
                    max_seqlen_q=longest_q,
                    seqused_k=used,
                    max_seqlen_k=longest_k,
                    softmax_scale=heads.head_dim**-0.5,
                    causal=True,
                    window_size=[-1, -1],
                    block_table=table,
                    scheduler_metadata=metadata,
                    fa_version=3,
                    q_descale=descale,
                    k_descale=descale,
                    v_descale=descale,
                    num_splits=splits,
                ),
                partial(inputs, query, table),
                lambda result: result,
            )
            for query, out, table in zip(queries, outputs, tables, strict=True)
        ]


class Varlen(Backend):
    name = "varlen"

    def unavailable(self, device: str) -> str | None:
        if device != "cuda":
            return "torch's varlen attention needs a GPU"
        try:
            from torch.nn.attention.varlen import varlen_attn  # noqa: F401
        except ImportError:
            return "this torch has no torch.nn.attention.varlen"
        return None

    def calls(self, request: Request, pool: Pool) -> list[Call]:
        from torch.nn.attention.varlen import varlen_attn

        bench, batch, heads = pool.bench, request.batch, request.heads
        sequences = batch.sequences
        new, held = [sequence.new for sequence in sequences], [sequence.keys for sequence in sequences]
        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
        if "enable_gqa" in known:
            options["enable_gqa"] = heads.q_heads != heads.kv_heads
        starts_q, starts_k = _starts(new, bench), _starts(held, bench)
        queries = bench.views(request.copies, (batch.tokens, heads.q_heads, heads.head_dim), request.dtype, "query")

        def call(index: int, query: Any) -> Call:
            k, v = pool.contiguous((batch.keys, heads.kv_heads, heads.head_dim), request.kv_dtype, index)
            return Call(
                partial(varlen_attn, query, k, v, starts_q, starts_k, max(new), max(held), **options),
                lambda: [
                    (a.float(), b.float(), c.float())
                    for a, b, c in zip(query.split(new), k.split(held), v.split(held), strict=True)
                ],
                lambda result: result,
            )

        return [call(index, query) for index, query in enumerate(queries)]


class _Grouped(Backend):
    """One dense call per group of equal sequences, inputs (count, heads, tokens, head_dim)."""

    @abstractmethod
    def attention(self, group: Group, heads: Heads, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        """One call on one group."""

    def calls(self, request: Request, pool: Pool) -> list[Call]:
        bench, batch, heads = pool.bench, request.batch, request.heads
        queries = bench.views(request.copies, (batch.tokens * heads.q_heads * heads.head_dim,), request.dtype, "query")

        def call(index: int, flat: Any) -> Call:
            parts = []
            first = 0
            for group in batch.groups:
                size = group.count * group.new * heads.q_heads * heads.head_dim
                q = flat[first : first + size].view(group.count, heads.q_heads, group.new, heads.head_dim)
                shape = (group.count, heads.kv_heads, group.keys, heads.head_dim)
                place = len(batch.groups) * index + len(parts)
                parts.append((group, q, *pool.contiguous(shape, request.kv_dtype, place)))
                first += size
            runs = [self.attention(group, heads, q, k, v) for group, q, k, v in parts]

            def output(results: list[Any]) -> Any:
                return bench.torch.cat([result.transpose(1, 2).flatten(0, 1) for result in results])

            return Call(
                runs[0] if len(runs) == 1 else lambda: [run() for run in runs],
                lambda: [
                    (q[i].transpose(0, 1).float(), k[i].transpose(0, 1).float(), v[i].transpose(0, 1).float())
                    for group, q, k, v in parts
                    for i in range(group.count)
                ],
                lambda result: output([result] if len(runs) == 1 else result),
            )

        return [call(index, flat) for index, flat in enumerate(queries)]


class Sdpa(_Grouped):
    def __init__(self, name: str, backend: str, devices: tuple[str, ...]) -> None:
        self.name = name
        self.backend = backend  # of torch.nn.attention.SDPBackend
        self.devices = devices

    def unavailable(self, device: str) -> str | None:
        return None if device in self.devices else f"{self.name} is not there for device {device}"

    def attention(self, group: Group, heads: Heads, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.functional import scaled_dot_product_attention

        options: dict[str, Any] = {"enable_gqa": heads.q_heads != heads.kv_heads}
        shared = heads.q_heads // heads.kv_heads
        if self.backend == "EFFICIENT_ATTENTION":  # knows no grouped queries: KV is repeated in memory, as part of it
            options["enable_gqa"] = False
        else:
            shared = 1
        if group.new > 1 and not group.context:
            options["is_causal"] = True
        elif group.new > 1 and self.backend == "FLASH_ATTENTION" and q.is_cuda:
            options["attn_mask"] = causal_lower_right(group.new, group.keys)
        elif group.new > 1:
            allowed = torch.ones((group.new, group.keys), dtype=torch.bool, device=q.device)
            options["attn_mask"] = allowed.tril(group.context)[None, None]
        kernel = getattr(SDPBackend, self.backend)

        def run() -> Any:
            wide = [x.repeat_interleave(shared, dim=1) for x in (k, v)] if shared > 1 else (k, v)
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(q, *wide, **options)

        if self.backend == "MATH" and q.is_cuda:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without: scores in float32
        return run


class Flex(_Grouped):
    name = "flex"
    launch = "compiled_graph"

    def unavailable(self, device: str) -> str | None:
        return None

    def attention(self, group: Group, heads: Heads, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        flex_attention = _flex(q.is_cuda)
        mask = _flex_mask(group.new, group.keys, str(q.device)) if group.new > 1 else None
        return partial(flex_attention, q, k, v, block_mask=mask, enable_gqa=heads.q_heads != heads.kv_heads)


@lru_cache
def _flex(compiled: bool) -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:  # the CPU's times are not for use, and compiling takes seconds
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention
    torch._dynamo.config.recompile_limit = 64  # every shape is one; above the limit it would run unfused
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=4)
def _flex_mask(new: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q + (keys - new) >= k, None, None, new, keys, device=device)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        FlashAttention3(),
        Varlen(),
        Sdpa("sdpa_flash", "FLASH_ATTENTION", ("cuda", "cpu")),
        Sdpa("sdpa_math", "MATH", ("cuda", "cpu")),
        Sdpa("sdpa_cudnn", "CUDNN_ATTENTION", ("cuda",)),
        Sdpa("sdpa_efficient", "EFFICIENT_ATTENTION", ("cuda",)),
        Flex(),
    )
}


# ---- the operator -------------------------------------------------------------------------------------------------


class Attention:
    """All three ops: "attention_prefill", "attention_decode" and "attention_mixed"."""

    name = "attention"

    def points(self, wanted: Wanted) -> Iterator[Point]:
        seen: set[str] = set()
        for point in self._ordered(wanted):
            if wanted.wants(point.op) and point.key not in seen:
                seen.add(point.key)
                yield point

    def _ordered(self, wanted: Wanted) -> Iterator[Point]:
        shapes = head_shapes(wanted)
        if not shapes:
            return
        elements = pool_elements(wanted.device)
        dtype = next((name for name in wanted.dtypes if name in ("bfloat16", "float16")), "bfloat16")
        main, others = shapes[0], shapes[1:]
        kv_dtypes = [dtype, *(["fp8"] if "fp8" in wanted.kv_dtypes else [])]

        def grid(backend: str, heads: Heads, kv_dtype: str = dtype, launch: str | None = None) -> _Grid:
            return _Grid(backend, heads, dtype, kv_dtype, elements, launch or BACKENDS[backend].launch)

        if wanted.tiny:
            for backend in ("sdpa_math", "sdpa_flash", "flex"):
                yield from _tiny(grid(backend, main))
            return
        # What engines run here comes first and is measured well: FlashAttention 3, or else the best that torch has.
        first = next(name for name in ("fa3", "varlen", "sdpa_flash") if not BACKENDS[name].unavailable("cuda"))
        fp8 = [kv for kv in kv_dtypes if kv == "fp8" and kv in BACKENDS[first].kv_dtypes]
        yield from _coarse(grid(first, main))
        yield from _near(grid(first, main))
        for heads in others:
            yield from _sparse(grid(first, heads))
        for kv_dtype in fp8:
            yield from _sparse(grid(first, main, kv_dtype))
        for backend in BACKENDS:
            if backend == first:
                continue
            shown = grid(backend, main)
            if BACKENDS[backend].unavailable("cuda"):  # one point of each op, for its reason to be noted
                yield from [*shown.prefill((128,), (0,)), *shown.decode((8,), (1024,))]
            elif backend == "flex":  # compiling takes seconds a shape
                yield from [*shown.prefill((512, 2048), (0,)), *shown.decode((8, 64), (4096,))]
            elif backend == "varlen":
                yield from _sparse(shown)
            else:
                yield from _torch_backend(shown)
        if first == "fa3":
            eager = grid(first, main, launch="eager")
            yield from eager.decode((1, 8, 64, 256), (256, 1024, 4096, 16384))
            yield from eager.prefill((64, 256, 512), (0, 4096))
        yield from _skewed(grid(first, main))
        yield from _scheduled(grid(first, main))
        yield from _dense(grid(first, main))
        for kv_dtype in fp8:
            yield from _coarse(grid(first, main, kv_dtype))
            yield from _near(grid(first, main, kv_dtype))
            yield from _skewed(grid(first, main, kv_dtype))
            yield from _scheduled(grid(first, main, kv_dtype))
            for heads in others:
                yield from _sparse(grid(first, heads, kv_dtype))
        for heads in others:
            yield from _coarse(grid(first, heads))
            yield from _near(grid(first, heads))
        for kv_dtype in fp8:
            yield from _dense(grid(first, main, kv_dtype))

    def measure(self, point: Point, bench: Bench) -> Row:
        batch = batch_of(point)
        heads = Heads(point["q_heads"], point["kv_heads"], point["head_dim"])
        least = batch.bytes(heads, point["kv_dtype"])
        try:
            with bench.torch.inference_mode():
                calls = prepare(point, _pool(bench), bench.copies(least))
            return bench.time(point, [call.run for call in calls], flops=batch.flops(heads), bytes=least)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Unavailable(f"torch has no {point.variant} kernel for {point.op} here") from None
            raise


def prepare(point: Point, pool: Pool, copies: int) -> list[Call]:
    """The calls of a point; the same operation on other parts of the pool."""
    backend = BACKENDS[point.variant]
    reason = backend.unavailable(pool.bench.device)
    if reason:
        raise Unavailable(reason)
    heads = Heads(point["q_heads"], point["kv_heads"], point["head_dim"])
    request = Request(batch_of(point), heads, point["dtype"], point["kv_dtype"], point.launch, copies)
    return backend.calls(request, pool)


@lru_cache(maxsize=1)
def _pool(bench: Bench) -> Pool:
    return Pool(bench)


# ---- is it attention? ---------------------------------------------------------------------------------------------


def reference(q: Any, k: Any, v: Any) -> Any:
    """Plain causal attention in float32 of one sequence; q (n, q_heads, d), k and v (keys, kv_heads, d)."""
    import torch

    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def error(point: Point, pool: Pool) -> float:
    """Largest difference from plain attention over the largest value, the worst of two calls."""
    worst = 0.0
    torch = pool.bench.torch
    with torch.inference_mode():
        for call in prepare(point, pool, 2):
            exact = torch.cat([reference(*sequence) for sequence in call.inputs()])
            got = call.output(call.run()).float()
            worst = max(worst, float((got - exact).abs().max() / exact.abs().max()))
    return worst


def selftest_points(backend: str, device: str, heads: Sequence[Heads]) -> Iterator[Point]:
    for shape, kv_dtype in product(heads, BACKENDS[backend].kv_dtypes):
        for launch in ("graph", "eager") if backend == "fa3" else ("eager",):
            grid = _Grid(backend, shape, "bfloat16", kv_dtype, pool_elements(device), launch)
            yield from grid.prefill((17, 90), (0, 150))
            yield from grid.prefill((300, 1024), (0, 700) if device == "cuda" else ())
            yield from grid.decode((5,), (333,), "half")
            yield from grid.decode((9,), (100,), "one_long")
            yield from grid.mixed((64,), (200,), (6,), (150,))


def selftest(device: str, backends: Sequence[str]) -> list[tuple[str, str, str, str, float]]:
    """(backend, op, kv_dtype, head shape, error), the worst each; why a backend is not here is printed."""
    from calibration.measure.timing import Bench

    pool = Pool(Bench(device), 1 << (22 if device == "cpu" else 28))
    shapes = [Heads(32, 8, 128), Heads(14, 2, 64)]
    if device == "cuda":
        shapes += [Heads(8, 1, 128), Heads(16, 8, 256)]
    worst: dict[tuple[str, str, str, str], float] = {}
    for name in backends:
        reason = BACKENDS[name].unavailable(device)
        if reason:
            print(f"{name}: {reason}")
            continue
        for point in selftest_points(name, device, shapes[:1] if name == "flex" else shapes):  # flex compiles each
            line = (name, point.op, point["kv_dtype"], f"{point['q_heads']}/{point['kv_heads']} x {point['head_dim']}")
            try:
                worst[line] = max(worst.get(line, 0.0), error(point, pool))
            except RuntimeError as problem:
                print(f"{point.key}: {str(problem).splitlines()[0]}")
    return [(*line, value) for line, value in worst.items()]


def _main() -> int:
    import argparse

    import torch

    parser = argparse.ArgumentParser(prog="python -m calibration.measure.attention")
    parser.add_argument("--selftest", action="store_true", required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    given = parser.parse_args()
    backends = given.backends.split(",")
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        parser.error(f"--backends: unknown backend {unknown[0]!r}. Use some of {', '.join(BACKENDS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch. Check nvidia-smi, or give --device cpu")
    failed = False
    for name, op, kv_dtype, shape, value in selftest(given.device, backends):
        wrong = not value < (0.15 if kv_dtype == "fp8" else 0.02)
        failed |= wrong
        print(f"{name:<15}{op:<19}{kv_dtype:<10}{shape:<12}{value:.2e}{'  WRONG' if wrong else ''}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(_main())
