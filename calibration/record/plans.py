"""Loads for an engine: by name, from a plan file, from a trace, or as an earlier recording sent them.

    warm                        ten prompts of all sizes, not kept
    decode_grid[:small]         batches of equal requests sent at once to an idle engine, 40 tokens out
    mixed_grid[:small]          single prompts, and prompts injected beside running decodes, also on cached prefixes
    poisson:IN:OUT:qRATE:30s    Poisson arrivals of RATE requests/s for 30 s (or :n300, that many)
    chat:qRATE:30s              the same; lengths lognormal: in median 760, sigma 1, to 8,000; out 150, 0.86, to 1,000
    long:qRATE:60s              prompts of 12,000 to 30,000 tokens, 200 out
    closed:CLIENTS:IN:OUT:n384  closed loop
    offline:n400:chat           all at once: maximum throughput; or offline:n400:IN:OUT
    prefix_tree:qRATE:n300      prompts of a 512-token root, one of 12 branches (Zipf) and content of their own
    prefix_turns:60             sessions of 3 to 7 turns at times fixed in advance, each on the whole blocks of the last
    recorded:FILE               arrivals, lengths and prefixes of a NAME.requests.json.gz

`LOAD=NAME` names the scenario. A load's random numbers come from the seed and its text alone, so the same load is the
same on every engine and machine, whatever is recorded before it. Rates are requests/s, lengths tokens.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import isnan
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from llmsim.trace import Trace

HASH_BLOCK_TOKENS = 512
AFTER_LAST_S = 150.0  # how long to wait for answers after the last arrival
MOST_PROMPT_TOKENS = 20_000_000  # of one scenario: its prompts are made before it starts
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Send(NamedTuple):
    """One request. `hash_ids` name its prompt's content in blocks; a nan arrival waits for `parent` to finish."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    parent: int = -1
    delay_s: float = 0.0
    priority: int = 0


@dataclass(frozen=True)
class Load:
    """Requests sent to the engine. `keep`: the file it goes to, its own ("requests"), or "" for none."""

    name: str
    sends: tuple[Send, ...]
    concurrency: int | None = None
    hash_block_tokens: int = HASH_BLOCK_TOKENS
    keep: str = "requests"
    lead_s: float = 0.3
    timeout_s: float | None = None

    @property
    def limit_s(self) -> float:
        last_s = max((send.arrival_s for send in self.sends if not isnan(send.arrival_s)), default=0.0)
        return self.timeout_s if self.timeout_s is not None else last_s + AFTER_LAST_S


@dataclass(frozen=True)
class Mixed:
    """Prompts of `chunks` tokens injected one at a time beside `levels` = (context, number) of running decodes.

    `spins`: with the GPU held until the host has launched the step, or not. `prefixes`: cached tokens before the chunk.
    `grow`: keep the decodes of the level before.
    """

    name: str
    levels: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    spins: tuple[bool, ...] = (True, False)
    prefixes: tuple[int, ...] = (0,)
    grow: bool = False
    gap_steps: int = 6
    timeout_s: float | None = None
    keep = "mixed_grid"
    limit_s = 300.0


@dataclass(frozen=True)
class Plan:
    model: str | dict[str, Any]  # a name that llmsim knows, the path of a config.json, or its content
    engine: dict[str, Any]  # fields of vLLM's AsyncEngineArgs
    loads: tuple[Load | Mixed, ...]
    seed: int = 1


# ---- loads by name ------------------------------------------------------------------------------------------------

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_GRID = ((128, POWERS), (1024, POWERS), (4096, POWERS[:7]), (16384, POWERS[:5]))
DECODE_GRID_SMALL = ((1024, (1, 8, 32, 128, 256)), (4096, (1, 8, 64)))
CHUNKS = (16, 64, 128, 256, 400, 512, 768, 1024, 2048, 4096, 8192)
ALONE = tuple(sorted({*CHUNKS, 32, 96, 192, 320, 384, 520, 640, 1280, 1536, 3072, 6144}))
CACHED_CHUNKS = (16, 64, 256, 512, 1024, 2048, 4096)
CACHED = (4096, 16384, 32768)
SKEW = (
    [16384] + [256] * 63,
    [32768] + [256] * 31,
    [4096] * 32 + [256] * 32,
    [65536] + [256] * 127,
    [8192] * 8 + [512] * 120,
)
WARM = (8192, 4096, 2048, 1024, 512, 400, 256, 128, 64, 16)


class _Fields:
    """A load's text in parts: whole numbers by position, qRATE, nCOUNT, SECONDSs, and words."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kind, *parts = text.split(":")
        self.numbers: list[int] = []
        self.words: list[str] = []
        self.rate: float | None = None
        self.count: int | None = None
        self.seconds: float | None = None
        for part in parts:
            if re.fullmatch(r"\d+", part):
                self.numbers.append(int(part))
            elif match := re.fullmatch(r"q(\d+(?:\.\d+)?)", part):
                self.rate = float(match[1])
            elif match := re.fullmatch(r"n(\d+)", part):
                self.count = int(match[1])
            elif match := re.fullmatch(r"(\d+(?:\.\d+)?)s", part):
                self.seconds = float(match[1])
            elif re.fullmatch(r"[a-z]+", part):
                self.words.append(part)
            else:
                raise ValueError(f"load {text!r}: {part!r} is no number, qRATE, nCOUNT or SECONDSs, as {USAGE['chat']}")

    def check(
        self, numbers: int, *, rate: bool = False, count: bool = False, span: bool = False, words: str = ""
    ) -> None:
        """Exactly these parts are given; `span`: either nCOUNT or SECONDSs."""
        wrong = (
            len(self.numbers) != numbers
            or 0 in self.numbers
            or rate != (self.rate is not None)
            or not (self.rate is None or self.rate > 0)
            or (count and not self.count)
            or (span and bool(self.count) == bool(self.seconds))
            or (not span and self.seconds is not None)
            or (not span and not count and self.count is not None)
            or any(word not in words.split() for word in self.words)
            or len(self.words) > 1
        )
        if wrong:
            raise ValueError(f"load {self.text!r}: write it as {USAGE[self.kind]}")

    def arrivals_s(self, rng: np.random.Generator) -> list[float]:
        assert self.rate is not None
        if self.count:
            times_s = np.cumsum(rng.exponential(1 / self.rate, self.count))
        else:
            assert self.seconds is not None
            if self.rate * self.seconds > MOST_PROMPT_TOKENS:
                raise ValueError(f"load {self.text!r}: more than {MOST_PROMPT_TOKENS:,} requests. Give fewer seconds")
            times_s = np.cumsum(rng.exponential(1 / self.rate, int(self.rate * self.seconds * 2) + 50))
            times_s = times_s[times_s < self.seconds]
        if not len(times_s):
            raise ValueError(f"load {self.text!r}: no request arrives in that time. Give a higher rate or more seconds")
        return [round(float(time_s), 5) for time_s in times_s]


def _lognormal(rng: np.random.Generator, median: float, sigma: float, least: int, most: int) -> int:
    return int(np.clip(round(median * np.exp(sigma * rng.normal())), least, most))


def _chat(rng: np.random.Generator, at_s: float) -> Send:
    return Send(at_s, _lognormal(rng, 760, 1.0, 4, 8000), _lognormal(rng, 150, 0.86, 1, 1000))


def _warm(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0)
    yield Load("warm", tuple(Send(round(0.1 * i, 1), n, 8) for i, n in enumerate(WARM)), keep="")


def _decode_grid(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0, words="small")
    for context, batches in DECODE_GRID_SMALL if f.words else DECODE_GRID:
        for batch in batches:
            sends = (Send(0.0, context, 40),) * batch
            yield Load(f"grid_c{context}_b{batch}", sends, keep="decode_grid", lead_s=0.05)


def _mixed_grid(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0, words="small")
    if f.words:
        yield Mixed("alone", ((0, 0),), ALONE)
        yield Mixed("mix_c1024", ((1024, 8), (1024, 64)), CHUNKS)
        return
    yield Mixed("alone", ((0, 0),), ALONE, spins=(True, True, False, False))
    for context in (1024, 256):
        yield Mixed(f"mix_c{context}", tuple((context, d) for d in (8, 32, 64, 128, 220)), CHUNKS)
    yield Mixed("mix_c4096", tuple((4096, d) for d in (8, 32, 64, 128, 180)), CHUNKS, grow=True)
    yield Mixed("ctx_d0", ((0, 0),), CACHED_CHUNKS, spins=(True,), prefixes=CACHED)
    yield Mixed("ctx_d64", ((1024, 64),), CACHED_CHUNKS, spins=(True,), prefixes=CACHED)
    for i, contexts in enumerate(SKEW):
        sends = tuple(Send(0.0, context, 40) for context in contexts)
        yield Load(f"skew_{i}", sends, keep="mixed_grid", lead_s=0.05)


def _poisson(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(2, rate=True, span=True)
    prompt, output = f.numbers
    yield Load(f"poisson_{prompt}_{output}_q{f.rate:g}", tuple(Send(t, prompt, output) for t in f.arrivals_s(rng)))


def _chat_load(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0, rate=True, span=True)
    yield Load(f"chat_q{f.rate:g}", tuple(_chat(rng, t) for t in f.arrivals_s(rng)))


def _long(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0, rate=True, span=True)
    sends = tuple(Send(t, int(rng.integers(12_000, 30_001)), 200) for t in f.arrivals_s(rng))
    yield Load(f"long_q{f.rate:g}", sends)


def _closed(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(3, count=True)
    clients, prompt, output = f.numbers
    sends = (Send(0.0, prompt, output),) * (f.count or 0)
    yield Load(f"closed{clients}_{prompt}_{output}", sends, concurrency=clients, timeout_s=300.0)


def _offline(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0 if f.words else 2, count=True, words="chat")
    if f.words:
        sends = tuple(_chat(rng, 0.0) for _ in range(f.count or 0))
    else:
        sends = (Send(0.0, *f.numbers),) * (f.count or 0)
    lengths = "chat" if f.words else "_".join(map(str, f.numbers))
    yield Load(f"offline_n{f.count}_{lengths}", sends, timeout_s=300.0)


def _ragged(tokens: int) -> int:
    """No multiple of the engine's block: of a prompt that is cached whole, the engine computes the last block again."""
    return tokens + 1 if tokens % 16 == 0 else tokens


def _new_ids(ids: Iterator[int], prompt: int, held: Sequence[int]) -> tuple[int, ...]:
    return tuple(held) + tuple(next(ids) for _ in range(-(-prompt // HASH_BLOCK_TOKENS) - len(held)))


def _prefix_tree(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(0, rate=True, span=True)
    ids = count(1)
    root = next(ids)
    branches = [[next(ids) for _ in range(int(rng.integers(1, 5)))] for _ in range(12)]
    popularity = 1 / np.arange(1, 13)
    sends: list[Send] = []
    for i, at_s in enumerate(f.arrivals_s(rng)):
        output = _lognormal(rng, 120, 0.6, 16, 400)
        if i > 20 and rng.random() < 0.06:  # the same prompt sent again
            again = sends[int(rng.integers(max(0, i - 60), i))]
            sends.append(again._replace(arrival_s=at_s, output_tokens=output))
            continue
        shared = [root, *branches[int(rng.choice(12, p=popularity / popularity.sum()))]]
        tokens = HASH_BLOCK_TOKENS * len(shared)
        prompt = _ragged(int(np.clip(tokens + 1100 * np.exp(0.7 * rng.normal()), max(1024, tokens + 1), 5990)))
        sends.append(Send(at_s, prompt, output, _new_ids(ids, prompt, shared)))
    yield Load(f"prefix_tree_q{f.rate:g}", tuple(sends))


def _prefix_turns(f: _Fields, rng: np.random.Generator) -> Iterator[Load | Mixed]:
    f.check(1)
    (sessions,) = f.numbers
    ids = count(1)
    sends = []
    for start_s in np.sort(rng.uniform(0, 0.6 * sessions, sessions)):
        at_s, held = float(start_s), tuple[int, ...]()
        prompt, output = _lognormal(rng, 900, 0.5, 300, 3000), _lognormal(rng, 120, 0.6, 16, 400)
        for _ in range(int(rng.integers(3, 8))):
            prompt = _ragged(prompt)
            named = _new_ids(ids, prompt, held)
            sends.append(Send(round(at_s, 5), prompt, output, named))
            held = named[: prompt // HASH_BLOCK_TOKENS]
            prompt += output + _lognormal(rng, 350, 0.7, 30, 2000)
            output = _lognormal(rng, 120, 0.6, 16, 400)
            at_s += 2.5 + min(9.0, rng.exponential(3.0))
    yield Load("prefix_turns", tuple(sorted(sends)))


USAGE = {
    "warm": "warm",
    "decode_grid": "decode_grid or decode_grid:small",
    "mixed_grid": "mixed_grid or mixed_grid:small",
    "poisson": "poisson:1024:128:q8:30s (or :n240)",
    "chat": "chat:q8:30s (or :n240)",
    "long": "long:q0.7:60s (or :n40)",
    "closed": "closed:64:1024:256:n384",
    "offline": "offline:n400:chat or offline:n400:1024:128",
    "prefix_tree": "prefix_tree:q6:n300 (or :50s)",
    "prefix_turns": "prefix_turns:60",
}
_MAKERS: dict[str, Callable[[_Fields, np.random.Generator], Iterator[Load | Mixed]]] = {
    "warm": _warm,
    "decode_grid": _decode_grid,
    "mixed_grid": _mixed_grid,
    "poisson": _poisson,
    "chat": _chat_load,
    "long": _long,
    "closed": _closed,
    "offline": _offline,
    "prefix_tree": _prefix_tree,
    "prefix_turns": _prefix_turns,
}


def make_load(text: str, seed: int = 1) -> list[Load | Mixed]:
    """The scenarios that one load's text stands for."""
    text, _, name = text.strip().partition("=")
    if text.startswith("recorded:"):
        made: list[Load | Mixed] = [_recorded(Path(text.removeprefix("recorded:")))]
    else:
        kind = text.split(":")[0]
        if kind not in _MAKERS:
            raise ValueError(f"load {text!r}: {kind!r} is none of {', '.join(_MAKERS)}, recorded")
        made = list(_MAKERS[kind](_Fields(text), np.random.default_rng([seed, zlib.crc32(text.encode())])))
    if not name:
        return made
    if len(made) > 1:
        raise ValueError(f"load {text}={name}: {len(made)} scenarios cannot have one name. Leave ={name} out")
    return [replace(made[0], name=name)]


def make_loads(text: str, seed: int = 1) -> tuple[Load | Mixed, ...]:
    """Comma-separated loads."""
    return checked([load for part in text.split(",") if part.strip() for load in make_load(part, seed)])


def checked(loads: Sequence[Load | Mixed]) -> tuple[Load | Mixed, ...]:
    if not loads:
        raise ValueError("no load given. Name some, as in --loads warm,chat:q8:30s")
    names = [load.name for load in loads]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"scenario {name}: named twice. Write one as LOAD=OTHER_NAME")
        if not SAFE_NAME.fullmatch(name):
            raise ValueError(f"scenario {name!r}: cannot be a file's name. Use letters, digits, '.', '_' and '-'")
    return tuple(loads)


# ---- loads from files ---------------------------------------------------------------------------------------------


def _recorded(path: Path) -> Load:
    from llmsim.recording import load_recording

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give recorded: the path of a NAME.requests.json.gz")
    scenarios = load_recording(path)
    if len(scenarios) != 1:
        raise ValueError(f"{path}: holds {len(scenarios)} scenarios. Give a NAME.requests.json.gz, which holds one")
    return of_trace(scenarios[0].trace, scenarios[0].name, scenarios[0].concurrency)


def of_trace(trace: Trace, name: str, concurrency: int | None = None) -> Load:
    """Block ids of the trace become numbers; later turns of sessions wait for the turn before."""
    numbers: dict[Hashable, int] = {}
    ids = [tuple(numbers.setdefault(key, len(numbers) + 1) for key in keys) for keys in trace.block_ids or ()]
    sends = []
    for i in range(len(trace)):
        waits = isnan(trace.arrival_s[i])
        sends.append(
            Send(
                arrival_s=float(trace.arrival_s[i]),
                prompt_tokens=int(trace.prompt_tokens[i]),
                output_tokens=int(trace.output_tokens[i]),
                hash_ids=ids[i] if ids else (),
                parent=int(trace.parent[i]) if waits and trace.parent is not None else -1,
                delay_s=float(trace.delay_s[i]) if waits and trace.delay_s is not None else 0.0,
                priority=int(trace.priority[i]) if trace.priority is not None else 0,
            )
        )
    return Load(name, tuple(sends), concurrency, trace.block_tokens or HASH_BLOCK_TOKENS)


_Count = Annotated[int, msgspec.Meta(ge=1)]
_Some = Annotated[int, msgspec.Meta(ge=0)]


_Row = tuple[Annotated[float, msgspec.Meta(ge=0, le=1e7)], _Count, _Count]
_NamedRow = tuple[Annotated[float, msgspec.Meta(ge=0, le=1e7)], _Count, _Count, tuple[int, ...]]


class _Scenario(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    load: str = ""
    requests: list[list[Any]] = []
    concurrency: _Count | None = None
    hash_block_tokens: _Count = HASH_BLOCK_TOKENS
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    kind: str = ""
    levels: list[tuple[_Some, _Some]] = []
    chunks: list[_Count] = []
    spins: list[bool] = msgspec.field(default_factory=lambda: [True, False])
    prefixes: list[_Some] = msgspec.field(default_factory=lambda: [0])
    grow: bool = False


class _File(msgspec.Struct, forbid_unknown_fields=True):
    model: str | dict[str, Any]
    scenarios: list[_Scenario]
    engine: dict[str, Any] = {}
    seed: int = 1


def read_plan(path: Path) -> Plan:
    """{"model", "engine": {AsyncEngineArgs fields}, "seed", "scenarios": [...]} with scenarios of one of three kinds:

    {"load": "chat:q8:30s", "name"?}
    {"name", "requests": [[arrival s, prompt, output, hash ids?], ...], "concurrency"?, "hash_block_tokens"?}
    {"name", "kind": "mixed", "levels": [[context, decodes], ...], "chunks": [...], "spins"?, "prefixes"?, "grow"?}
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a plan, or --loads")
    try:
        held = msgspec.convert(json.loads(path.read_text(encoding="utf-8")), _File)
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    loads = [load for i, scenario in enumerate(held.scenarios) for load in _of_file(path, i, scenario, held.seed)]
    return Plan(held.model, held.engine, checked(loads), held.seed)


def _of_file(path: Path, index: int, scenario: _Scenario, seed: int) -> list[Load | Mixed]:
    where = f"{path}: scenarios[{index}]"
    kinds = (bool(scenario.load), bool(scenario.requests), scenario.kind == "mixed")
    if sum(kinds) != 1 or scenario.kind not in ("", "mixed"):
        raise ValueError(f"{where}: needs one of load, requests (not empty) and kind='mixed'")
    if scenario.load:
        try:
            return make_load(scenario.load + (f"={scenario.name}" if scenario.name else ""), seed)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{where}: {error}") from None
    if not scenario.name:
        raise ValueError(f"{where}: has no name")
    if scenario.kind:
        if not (scenario.levels and scenario.chunks):
            raise ValueError(f"{where}: kind='mixed' needs levels and chunks")
        levels, chunks = tuple(scenario.levels), tuple(scenario.chunks)
        return [Mixed(scenario.name, levels, chunks, tuple(scenario.spins), tuple(scenario.prefixes), scenario.grow)]
    sends = []
    for i, row in enumerate(scenario.requests):
        try:
            sends.append(Send(*msgspec.convert(row, _Row if len(row) == 3 else _NamedRow)))
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{where}: requests[{i}]={row}: {error}; write [arrival s, prompt, output, ids?]"
            ) from None
    more = {"timeout_s": scenario.timeout_s, "hash_block_tokens": scenario.hash_block_tokens}
    return [Load(scenario.name, tuple(sends), scenario.concurrency, **more)]


# ---- what an engine can take --------------------------------------------------------------------------------------


def fitting(load: Load | Mixed, max_model_len: int, max_num_seqs: int) -> tuple[Load | Mixed | None, str]:
    """The part of the load that this engine can serve, and a line on what was left out."""
    if isinstance(load, Mixed):
        return _fitting_mixed(load, max_model_len, max_num_seqs)
    long = {i for i, send in enumerate(load.sends) if send.prompt_tokens + send.output_tokens > max_model_len}
    if load.keep.endswith("_grid") and (long or len(load.sends) > max_num_seqs):
        cause = f"max_model_len={max_model_len}" if long else f"max_num_seqs={max_num_seqs}"
        return None, f"{load.name}: left out, above {cause}"
    tokens = sum(send.prompt_tokens for send in load.sends)
    if tokens > MOST_PROMPT_TOKENS:
        return None, f"{load.name}: left out, {tokens} prompt tokens, at most {MOST_PROMPT_TOKENS}; send fewer requests"
    if not long:
        return load, ""
    new_index: dict[int, int] = {-1: -1}
    kept = []
    for i, send in enumerate(load.sends):
        if i not in long and send.parent in new_index:
            new_index[i] = len(kept)
            kept.append(send._replace(parent=new_index[send.parent]))
    note = f"{load.name}: {len(load.sends) - len(kept)} of {len(load.sends)} requests left out, above {max_model_len=}"
    return (replace(load, sends=tuple(kept)) if kept else None), note


def _fitting_mixed(load: Mixed, max_model_len: int, max_num_seqs: int) -> tuple[Mixed | None, str]:
    prefixes = tuple(n for n in load.prefixes if n + max(load.chunks) + 1 <= max_model_len)
    levels = tuple((c, d) for c, d in load.levels if d < max_num_seqs and c + DECODE_TOKENS <= max_model_len)
    note = ""
    if prefixes != load.prefixes or levels != load.levels:
        note = f"{load.name}: only levels {list(levels)}, prefixes {list(prefixes)}: {max_model_len=}, {max_num_seqs=}"
    return (replace(load, prefixes=prefixes, levels=levels) if prefixes and levels else None), note


DECODE_TOKENS = 3000  # what a decode beside injected prompts is asked for; it is stopped when they are through
