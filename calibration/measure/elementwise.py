"""What a layer does between its matrix products and its attention, and at both ends of a forward pass.

    rms_norm, add_rms_norm, residual_add   tokens x n (n hidden; rms_norm also n head size, one row a head: QK norms)
    norm_add_norm                          tokens x n: a norm behind a block, the residual, the norm before the next
                                           (Gemma; the compiler makes one kernel of them)
    rope                                   tokens x (q_heads + kv_heads) x head_dim, half of each head with the other
    silu_mul                               n values out of 2 n (n width of the MLP on one rank)
    embedding                              rows of n of a table of k
    sample_greedy, sample_top_k_top_p      tokens sampled from n logits each (k 50, p 0.9)
    kv_write                               keys and values into blocks of 16 tokens at random places
    quant_fp8                              one scale a row

Each as plain torch operations ("torch"), eager, in a CUDA graph, compiled, and compiled in a graph; and as vLLM's own
kernel ("vllm"). Widths stay constants for the compiler and tokens a symbol, as engines compile. `bytes` are the least:
inputs read once, outputs written once, so that eager's extra passes show as lost bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench
from llmsim.model import Model

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
MORE_TOKENS = (2, 4, 8, 32, 128, 192, 384, 512, 768, 1536, 2048, 3072, 6144, 8192, 12288)
SAMPLED = (1, 8, 64, 256)
MORE_SAMPLED = (2, 4, 16, 32, 128, 192, 384, 512)
TINY_TOKENS = (1, 8, 64)
LAUNCHES = ("graph", "eager", "compiled_graph", "compiled")
SAMPLERS = ("sample_greedy", "sample_top_k_top_p")
BLOCK = 16  # tokens of a KV block
POSITIONS = 8192  # rows of the rotary table
TOP_K, TOP_P = 50, 0.9
EPSILON = 1e-5
WEIGHT = 0.02  # of a step's time, or so


def shapes(model: Model, tensor_parallel: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each op of one rank and its widths."""
    heads, kv_heads = model.heads // tensor_parallel, max(1, model.kv_heads // tensor_parallel)
    head = {"q_heads": heads, "kv_heads": kv_heads, "head_dim": model.head_dim}
    yield "add_rms_norm", {"n": model.hidden}
    if model.norms_per_layer == 4:
        yield "norm_add_norm", {"n": model.hidden}
    yield "silu_mul", {"n": model.intermediate // tensor_parallel}
    yield "rope", head
    yield "kv_write", {"kv_heads": kv_heads, "head_dim": model.head_dim}
    yield "rms_norm", {"n": model.hidden}
    if model.qk_norm:
        yield "rms_norm", {"n": model.head_dim}
    yield "sample_greedy", {"n": model.vocab}
    yield "embedding", {"n": model.hidden, "k": model.vocab}
    yield "residual_add", {"n": model.hidden}
    yield "sample_top_k_top_p", {"n": model.vocab}
    for width in (model.hidden, heads * model.head_dim, model.intermediate // tensor_parallel):
        yield "quant_fp8", {"n": width}


def least_bytes(point: Point) -> float:
    """Read and written once, in a 2-byte dtype but for what is quantised."""
    tokens, n = point["tokens"], point.get("n", 0)
    kv = point.get("kv_heads", 0) * point.get("head_dim", 0)
    q = point.get("q_heads", 0) * point.get("head_dim", 0)
    return float(
        tokens
        * {
            "rms_norm": 4 * n,
            "add_rms_norm": 8 * n,
            "norm_add_norm": 8 * n,
            "residual_add": 6 * n,
            "silu_mul": 6 * n,
            "rope": 4 * (q + kv) + 8,
            "embedding": 4 * n + 8,
            "sample_greedy": 2 * n + 8,
            "sample_top_k_top_p": 2 * n + 8,
            "kv_write": (6 if point.get("kv_dtype") == "fp8" else 8) * kv + 8,
            "quant_fp8": 3 * n + 4,
        }[point.op]
    )


class Elementwise:
    name = "elementwise"

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def points(self, wanted: Wanted) -> Iterator[Point]:
        """What engines run first, for every width; the other launch modes for the first model; compiled ones last."""
        seen: set[str] = set()
        for launches in (("graph",), ("eager",), ("compiled_graph", "compiled")):
            for refine in (False, True) if launches == ("graph",) else (False,):
                for number, model in enumerate(wanted.models):
                    if number and launches != ("graph",):
                        break
                    for point in self._of(wanted, model, launches, refine):
                        if point.key not in seen:
                            seen.add(point.key)
                            yield point

    def _of(self, wanted: Wanted, model: Model, launches: tuple[str, ...], refine: bool) -> Iterator[Point]:
        sizes = [size for size in wanted.tensor_parallel if size in model.tensor_parallel_sizes()]
        if launches != ("graph",):
            sizes = sizes[:1]
        for tp in sizes:
            for op, widths in shapes(model, tp):
                if not wanted.wants(op):
                    continue
                if wanted.tiny:
                    widths = {name: _tiny(name, extent) for name, extent in widths.items()}
                for launch in launches:
                    for variant in ("torch", "vllm") if launch in ("graph", "eager") else ("torch",):
                        yield from self._over_tokens(wanted, op, widths, variant, launch, refine)

    def _over_tokens(
        self, wanted: Wanted, op: str, widths: dict[str, int], variant: str, launch: str, refine: bool
    ) -> Iterator[Point]:
        if op == "sample_top_k_top_p" and variant == "vllm" and launch == "graph":
            return  # vLLM samples outside its graphs
        grid, more = (SAMPLED, MORE_SAMPLED) if op in SAMPLERS else (TOKENS, MORE_TOKENS)
        if op == "rms_norm" and widths["n"] <= 256:  # a row a head
            grid, more = tuple(32 * size for size in grid), tuple(32 * size for size in more)
        if wanted.tiny:
            grid, more = TINY_TOKENS, ()
        kv_dtypes = wanted.kv_dtypes if op == "kv_write" else (None,)
        for tokens in more if refine else grid:
            for kv_dtype in kv_dtypes:
                point = Point.of(op, variant, launch, dtype="bfloat16", kv_dtype=kv_dtype, tokens=tokens, **widths)
                yield replace(point, refine=refine, weight=WEIGHT)

    def measure(self, point: Point, bench: Bench) -> Row:
        op = _OPS[point.op]
        nbytes = least_bytes(point)
        inputs = op.inputs(point, bench, bench.copies(nbytes))
        if point.variant == "vllm":
            call = _vllm(point, bench)
        elif point.launch in ("compiled", "compiled_graph"):
            call = self._compile(point, bench, op.torch(bench.torch))
            for tensors in inputs:
                for tensor in tensors:
                    if tensor.dim() > 0 and tensor.shape[0] == point["tokens"]:
                        bench.torch._dynamo.maybe_mark_dynamic(tensor, 0)
        else:
            call = op.torch(bench.torch)
        return bench.time(point, [partial(call, *tensors) for tensors in inputs], bytes=nbytes)

    def _compile(self, point: Point, bench: Bench, function: Callable[..., Any]) -> Callable[..., Any]:
        """One for each width."""
        key = (point.op, *(item for item in point.shape if item[0] != "tokens"))
        if key not in self._compiled:
            self._compiled[key] = bench.compile(function)
        return self._compiled[key]


def _tiny(name: str, extent: int) -> int:
    return (
        min(2, extent) if name.endswith("heads") else min(32, extent) if name == "head_dim" else max(16, extent // 64)
    )


# ---- plain torch ----------------------------------------------------------------------------------------------------


def _rms_norm(torch: Any) -> Callable[..., Any]:
    def rms_norm(x: Any, weight: Any) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * weight

    return rms_norm


def _add_rms_norm(torch: Any) -> Callable[..., Any]:
    norm = _rms_norm(torch)

    def add_rms_norm(x: Any, residual: Any, weight: Any) -> Any:
        added = x + residual
        return norm(added, weight), added

    return add_rms_norm


def _norm_add_norm(torch: Any) -> Callable[..., Any]:
    norm, add_norm = _rms_norm(torch), _add_rms_norm(torch)

    def norm_add_norm(x: Any, residual: Any, weight: Any) -> Any:
        return add_norm(norm(x, weight), residual, weight)

    return norm_add_norm


def _residual_add(torch: Any) -> Callable[..., Any]:
    return torch.add


def _silu_mul(torch: Any) -> Callable[..., Any]:
    def silu_mul(x: Any) -> Any:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    return silu_mul


def _rope(torch: Any) -> Callable[..., Any]:
    def turn(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def rope(positions: Any, query: Any, key: Any, table: Any) -> Any:
        cos, sin = table[positions].unsqueeze(1).chunk(2, -1)
        return turn(query, cos, sin), turn(key, cos, sin)

    return rope


def _embedding(torch: Any) -> Callable[..., Any]:
    return torch.nn.functional.embedding


def _sample_greedy(torch: Any) -> Callable[..., Any]:
    def sample_greedy(logits: Any) -> Any:
        return logits.float().argmax(-1)

    return sample_greedy


def _sample_top_k_top_p(torch: Any) -> Callable[..., Any]:
    def sample_top_k_top_p(logits: Any) -> Any:
        ordered, places = logits.float().sort(-1, descending=True)
        chance = ordered[:, :TOP_K].softmax(-1)
        chance = chance.masked_fill(chance.cumsum(-1) - chance > TOP_P, 0.0)
        drawn = (chance / torch.empty_like(chance).exponential_()).argmax(-1, keepdim=True)
        return places.gather(-1, drawn)

    return sample_top_k_top_p


def _kv_write(torch: Any) -> Callable[..., Any]:
    def kv_write(key: Any, value: Any, keys: Any, values: Any, slots: Any) -> None:
        for new, cache in ((key, keys), (value, values)):
            bits = torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype  # there is no index_copy of fp8
            cache.view(bits).view(-1, *new.shape[1:]).index_copy_(0, slots, new.to(cache.dtype).view(bits))

    return kv_write


def _quant_fp8(torch: Any) -> Callable[..., Any]:
    def quant_fp8(x: Any) -> Any:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
        return (wide / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale

    return quant_fp8


# ---- inputs, in the order of the function above ---------------------------------------------------------------------


def _x(point: Point, bench: Bench, count: int, factor: int = 1) -> list[Any]:
    return bench.views(count, (point["tokens"], factor * point["n"]), point["dtype"], "x")


def _ids(bench: Bench, count: int, tokens: int, below: int) -> list[Any]:
    torch, device = bench.torch, bench.device
    return [torch.randint(below, (tokens,), device=device, generator=bench.generator) for _ in range(count)]


def _norm_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    weight = bench.randn((point["n"],), point["dtype"])
    written = bench.views(count, (point["tokens"], point["n"]), point["dtype"], "out")
    return [(x, weight) for x in written]


def _add_norm_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    residuals = bench.views(count, (point["tokens"], point["n"]), point["dtype"], "residual")
    return [
        (x, residual, weight)
        for (x, weight), residual in zip(_norm_inputs(point, bench, count), residuals, strict=True)
    ]


def _pair_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    residuals = bench.views(count, (point["tokens"], point["n"]), point["dtype"], "residual")
    return list(zip(_x(point, bench, count), residuals, strict=True))


def _single_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    return [(x,) for x in _x(point, bench, count)]


def _double_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    return [(x,) for x in _x(point, bench, count, 2)]


def _rope_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    tokens, size = point["tokens"], point["head_dim"]
    queries = bench.views(count, (tokens, point["q_heads"], size), point["dtype"], "out")
    keys = bench.views(count, (tokens, point["kv_heads"], size), point["dtype"], "residual")
    angles = bench.torch.rand((POSITIONS, size // 2), device=bench.device, generator=bench.generator)
    table = bench.torch.cat((angles.cos(), angles.sin()), -1).to(bench.dtype(point["dtype"]))
    positions = _ids(bench, count, tokens, POSITIONS)
    return [(place, query, key, table) for place, query, key in zip(positions, queries, keys, strict=True)]


def _embedding_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    table = bench.views(1, (point["k"], point["n"]), point["dtype"], "weight")[0]
    return [(ids, table) for ids in _ids(bench, count, point["tokens"], point["k"])]


def _kv_inputs(point: Point, bench: Bench, count: int) -> list[tuple[Any, ...]]:
    torch = bench.torch
    tokens, shape = point["tokens"], (point["kv_heads"], point["head_dim"])
    keys = bench.views(count, (tokens, *shape), point["dtype"], "x")
    values = bench.views(count, (tokens, *shape), point["dtype"], "value")
    blocks = 2 * max(1024, -(-tokens // BLOCK))
    caches = [bench.views(1, (blocks, BLOCK, *shape), point["kv_dtype"], use)[0] for use in ("keys", "values")]
    slots = [
        torch.randperm(blocks * BLOCK, device=bench.device, generator=bench.generator)[:tokens] for _ in range(count)
    ]
    return [(key, value, *caches, slot) for key, value, slot in zip(keys, values, slots, strict=True)]


class _Op(NamedTuple):
    torch: Callable[[Any], Callable[..., Any]]
    inputs: Callable[[Point, Bench, int], list[tuple[Any, ...]]]


_OPS = {
    "rms_norm": _Op(_rms_norm, _norm_inputs),
    "add_rms_norm": _Op(_add_rms_norm, _add_norm_inputs),
    "norm_add_norm": _Op(_norm_add_norm, _add_norm_inputs),
    "residual_add": _Op(_residual_add, _pair_inputs),
    "silu_mul": _Op(_silu_mul, _double_inputs),
    "rope": _Op(_rope, _rope_inputs),
    "embedding": _Op(_embedding, _embedding_inputs),
    "sample_greedy": _Op(_sample_greedy, _single_inputs),
    "sample_top_k_top_p": _Op(_sample_top_k_top_p, _single_inputs),
    "kv_write": _Op(_kv_write, _kv_inputs),
    "quant_fp8": _Op(_quant_fp8, _single_inputs),
}


# ---- vLLM's kernels -------------------------------------------------------------------------------------------------


def _vllm(point: Point, bench: Bench) -> Callable[..., Any]:
    """vLLM's kernel for the op, taking the same tensors."""
    try:
        import vllm._custom_ops as ops
    except ImportError as error:
        raise Unavailable(f"vLLM cannot be imported ({error})") from None
    torch, name = bench.torch, point.op
    kernels = torch.ops._C

    def have(library: Any, kernel: str) -> Any:
        if not hasattr(library, kernel):
            raise Unavailable(f"this vLLM has no kernel {kernel}")
        return getattr(library, kernel)

    if name == "rms_norm":
        kernel = have(kernels, "rms_norm")
        return lambda x, weight: kernel(torch.empty_like(x), x, weight, EPSILON)
    if name == "add_rms_norm":
        kernel = have(kernels, "fused_add_rms_norm")
        return lambda x, residual, weight: kernel(x, residual, weight, EPSILON)
    if name == "silu_mul":
        kernel = have(kernels, "silu_and_mul")
        return lambda x: kernel(x.new_empty((x.shape[0], x.shape[1] // 2)), x)
    if name == "rope":
        kernel, size = have(kernels, "rotary_embedding"), point["head_dim"]
        return lambda positions, query, key, table: kernel(
            positions, query.flatten(1), key.flatten(1), size, table, True
        )
    if name == "kv_write":
        kernel, one = have(torch.ops._C_cache_ops, "reshape_and_cache_flash"), torch.ones((), device=bench.device)
        kind = "fp8" if point["kv_dtype"] == "fp8" else "auto"

        def write(key: Any, value: Any, keys: Any, values: Any, slots: Any) -> None:
            if kind == "fp8":  # vLLM keeps fp8 caches as bytes
                keys, values = keys.view(torch.uint8), values.view(torch.uint8)
            kernel(key, value, keys, values, slots, kind, one, one)

        return write
    if name == "quant_fp8":
        return partial(have(ops, "scaled_fp8_quant"), use_per_token_if_dynamic=True)
    if name == "sample_top_k_top_p":
        return _vllm_sampler(torch, bench.device)
    raise Unavailable("vLLM runs torch's operation")


def _vllm_sampler(torch: Any, device: str) -> Callable[..., Any]:
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample
    except ImportError as error:
        raise Unavailable(f"this vLLM has no such sampler ({error})") from None

    def sample(logits: Any) -> Any:
        rows = logits.shape[0]
        k = torch.full((rows,), TOP_K, device=device, dtype=torch.int32)
        p = torch.full((rows,), TOP_P, device=device)
        return random_sample(apply_top_k_top_p(logits.float(), k, p).softmax(-1), {})

    return sample
