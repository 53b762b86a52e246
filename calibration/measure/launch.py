"""Host seconds to launch a forward pass of a model's layers: the time from Python until the last launch returns.

The layers have the model's shapes and one layer's random weights between them: only the host's time counts. A layer is
norm, QKV product, rotary embedding, KV write, attention over `CONTEXT_TOKENS` cached tokens a sequence, output product,
added norm, gate-up product, activation and down product, in torch; attention is FlashAttention 3 where vLLM is, torch's
otherwise, on buffers of its own. `tokens` decodes are in the batch. The GPU is idle at the start of every sample.

    eager      every kernel is launched from Python
    piecewise  what lies between two attentions is one CUDA graph, KV write and attention are launched from Python
    full       one CUDA graph

"MODE+arrivals": a thread of the same process handles a request with a 1,000-token prompt meanwhile, in Python: it reads
JSON, looks words up, checks and copies token ids and hashes blocks of 16. Launches then wait for the interpreter lock.
`samples_s` has every launch: a distribution, not a mean, is what it is measured for.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from calibration.measure.attention import BACKENDS, Pool, prepare
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Row
from calibration.measure.timing import Bench, sampled
from llmsim.model import Model

MODES = ("eager", "piecewise", "full")
TOKENS = (16, 256)
SAMPLES = 200
CONTEXT_TOKENS = 256
PROMPT_TOKENS = 1000
BLOCK_TOKENS = 16
USUAL_MODEL = "llama-3.1-8b"


class Stack:
    """`layers` layers of `model` for decode batches of up to `tokens`, all with one layer's weights."""

    def __init__(self, model: Model, layers: int, tokens: int, bench: Bench) -> None:
        torch = self.torch = bench.torch
        self.bench, self.model, self.layers = bench, model, layers
        held = 2 * (CONTEXT_TOKENS + 2 * BLOCK_TOKENS) * model.kv_heads * model.head_dim
        self._pool = Pool(bench, tokens * held)
        self._calls: dict[int, Callable[[], Any]] = {}
        self._launches: dict[str, Callable[[], Any]] = {}

        def weight(*shape: int) -> Any:
            return bench.randn(shape, "bfloat16") * shape[-1] ** -0.5

        heads, kv_heads, size = model.heads, model.kv_heads, model.head_dim
        self.norm = torch.ones(model.hidden, dtype=torch.bfloat16, device=bench.device)
        self.qkv = weight((heads + 2 * kv_heads) * size, model.hidden)
        self.out = weight(model.hidden, heads * size)
        self.gate_up = weight(2 * model.intermediate, model.hidden)
        self.down = weight(model.hidden, model.intermediate)
        self.x = bench.randn((tokens, model.hidden), "bfloat16")
        angle = torch.rand((tokens, 1, size // 2), device=bench.device)
        self.cos, self.sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)
        self.cache = torch.zeros((2, 2 * tokens, kv_heads, size), dtype=torch.bfloat16, device=bench.device)
        self.slots = torch.randperm(2 * tokens, device=bench.device)[:tokens]

    def _rope(self, x: Any) -> Any:
        first, second = x.chunk(2, -1)
        cos, sin = self.cos[: len(x)], self.sin[: len(x)]
        return self.torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def before(self, x: Any, residual: Any) -> tuple[Any, ...]:
        """Norm, QKV and rotary embedding: (query, key, value, residual)."""
        functional, model = self.torch.nn.functional, self.model
        residual = residual + x
        normed = functional.rms_norm(residual, (model.hidden,), self.norm, 1e-5)
        sizes = [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
        query, key, value = functional.linear(normed, self.qkv).split(sizes, -1)
        query, key, value = (part.unflatten(-1, (-1, model.head_dim)) for part in (query, key, value))
        return self._rope(query), self._rope(key), value, residual

    def attend(self, key: Any, value: Any) -> Any:
        slots = self.slots[: len(key)]
        self.cache[0].index_copy_(0, slots, key)
        self.cache[1].index_copy_(0, slots, value)
        return self._attention(len(key))()

    def _attention(self, tokens: int) -> Callable[[], Any]:
        if tokens not in self._calls:
            backend = next(
                name for name in ("fa3", "sdpa_flash", "sdpa_math") if not BACKENDS[name].unavailable(self.bench.device)
            )
            model = self.model
            point = Point.of(
                "attention_decode",
                backend,
                "graph",
                dtype="bfloat16",
                kv_dtype="bfloat16",
                q_heads=model.heads,
                kv_heads=model.kv_heads,
                head_dim=model.head_dim,
                seqs=tokens,
                seq_context_tokens=CONTEXT_TOKENS,
                skew="uniform",
            )
            self._calls[tokens] = prepare(point, self._pool, 1)[0].run
        return self._calls[tokens]

    def after(self, attended: Any, residual: Any) -> tuple[Any, Any]:
        """Output product and MLP: (x, residual)."""
        functional = self.torch.nn.functional
        residual = residual + functional.linear(attended.reshape(len(residual), -1), self.out)
        normed = functional.rms_norm(residual, (self.model.hidden,), self.norm, 1e-5)
        gate, up = functional.linear(normed, self.gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down), residual

    def forward(self, tokens: int) -> Any:
        x, residual = self.x[:tokens], self.x[:tokens]
        for _ in range(self.layers):
            _query, key, value, residual = self.before(x, residual)
            x, residual = self.after(self.attend(key, value), residual)
        return x + residual

    def launch(self, mode: str, tokens: int) -> Callable[[], Any]:
        if mode not in self._launches:
            if mode == "eager":
                made = partial(self.forward, tokens)
            else:
                made = self._piecewise(tokens) if mode == "piecewise" else self._full(tokens)
            self._launches[mode] = made
        return self._launches[mode]

    def _full(self, tokens: int) -> Callable[[], Any]:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            self.forward(tokens)
        return graph.replay

    def _piecewise(self, tokens: int) -> Callable[[], Any]:
        """One graph before the first attention, one between each two, one after the last."""
        torch = self.torch
        graphs, between, held = [], [], []
        x, residual = self.x[:tokens], self.x[:tokens]
        handle = torch.cuda.graph_pool_handle()
        for layer in range(self.layers + 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=handle):
                if layer:
                    x, residual = self.after(held[-1], residual)
                if layer < self.layers:
                    _query, key, value, residual = self.before(x, residual)
            graph.replay()
            graphs.append(graph)
            if layer < self.layers:
                between.append((key, value))
                held.append(self.attend(key, value))  # read by the next graph, so kept
        self._held = held

        def run() -> None:
            for graph, (key, value) in zip(graphs, between, strict=False):
                graph.replay()
                self.attend(key, value)
            graphs[-1].replay()

        return run


# ---- requests that arrive -------------------------------------------------------------------------------------------


def prompt_body() -> bytes:
    """A request with a prompt of `PROMPT_TOKENS` words and their token ids."""
    ids = [(7919 * place) % 128_000 for place in range(PROMPT_TOKENS)]
    return json.dumps({"prompt": " ".join(f"w{number}" for number in ids), "prompt_token_ids": ids}).encode()


def handle(body: bytes, vocabulary: dict[str, int]) -> list[bytes]:
    """What an engine's front end does with a request before it is scheduled: the hashes of its blocks."""
    request = json.loads(body)
    ids = [vocabulary[word] for word in re.findall(r"\w+", request["prompt"])]
    if ids != request["prompt_token_ids"] or not all(0 <= number < 128_000 for number in ids):
        raise ValueError("prompt: its words and its token ids differ")
    kept = list(ids)
    hashes, parent = [], b""
    for first in range(0, len(kept), BLOCK_TOKENS):
        parent = hashlib.sha256(pickle.dumps((parent, tuple(kept[first : first + BLOCK_TOKENS]), None))).digest()
        hashes.append(parent)
    return hashes


@contextmanager
def arrivals(wanted: bool) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Two functions: let a request arrive now, in another thread; wait until it is handled."""
    if not wanted:
        yield (lambda: None), (lambda: None)
        return
    body = prompt_body()
    vocabulary = {f"w{number}": number for number in json.loads(body)["prompt_token_ids"]}
    arrived, handled = threading.Semaphore(0), threading.Semaphore(0)
    ended = False

    def work() -> None:
        while arrived.acquire() and not ended:
            handle(body, vocabulary)
            handled.release()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield arrived.release, handled.acquire
    finally:
        ended = True
        arrived.release()
        thread.join()


# ---- the operator ---------------------------------------------------------------------------------------------------


class Launch:
    name = "launch"

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._made: tuple[Any, Stack] | None = None

    def points(self, wanted: Wanted) -> Iterator[Point]:
        models = sorted(
            (model for model in wanted.models if not model.mla and model.intermediate),
            key=lambda model: model.name != USUAL_MODEL,
        )
        if not wanted.wants("launch") or not models:
            return
        model = _tiny(models[0]) if wanted.tiny else models[0]
        self._models[model.name] = model
        for tokens in (2,) if wanted.tiny else TOKENS:
            for mode in MODES[:1] if wanted.tiny else MODES:
                for variant in (mode, f"{mode}+arrivals"):
                    yield Point.of(
                        "launch",
                        variant,
                        "host",
                        dtype="bfloat16",
                        model=model.name,
                        layers=model.layers,
                        tokens=tokens,
                    )

    def measure(self, point: Point, bench: Bench) -> Row:
        mode, _, extra = point.variant.partition("+")
        if mode != "eager" and not bench.cuda:
            raise Unavailable("CUDA graphs need a GPU")
        tokens = point["tokens"]
        with bench.torch.inference_mode():
            stack = self._stack(point, bench)
            launch = stack.launch(mode, tokens)
            with arrivals(bool(extra)) as (arrive, handled):
                seconds = []
                for index in range(-5, SAMPLES if bench.cuda else 10):
                    bench.synchronize()
                    arrive()
                    begun = time.perf_counter()
                    launch()
                    took_s = time.perf_counter() - begun
                    handled()
                    if index >= 0:  # the first ones warm up
                        seconds.append(took_s)
            bench.synchronize()
        return sampled(point, seconds, keep=True)

    def _stack(self, point: Point, bench: Bench) -> Stack:
        key = (bench, point["model"], point["tokens"])
        if self._made is None or self._made[0] != key:
            self._made = None
            stack = Stack(self._models[point["model"]], point["layers"], point["tokens"], bench)
            stack.forward(point["tokens"])
            bench.synchronize()
            self._made = key, stack
        return self._made[1]


def _tiny(model: Model) -> Model:
    return replace(model, layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16)
