"""Sends a load to vLLM's AsyncLLM and notes what comes back, in seconds of perf_counter.

Prompts are random token ids; `hash_ids` name blocks of content, so that shared prefixes are the same tokens. Greedy
sampling, `ignore_eos`: every answer has the length asked for. No tokenizer, no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from math import isnan
from time import perf_counter
from typing import Any

import numpy as np

from calibration.record.export import Served
from calibration.record.hooks import HELD
from calibration.record.plans import DECODE_TOKENS, Load, Mixed, Send

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 120_000
STREAM_BLOCKS = 1_000_003  # of the random contents of named blocks
SETTLE_S = 0.1  # until the engine has nothing in flight, after the last answer
WAIT_S = 60.0  # for one thing within a mixed scenario
PROGRESS_S = 10.0
MOST_ERRORS = 3

Row = dict[str, Any]


class Client:
    """`generate(prompt, output_tokens, request_id, priority)` yields (tokens of a chunk, cached prompt tokens)."""

    def __init__(
        self, generate: Callable[..., Any], vocab: int, seed: int, stop: asyncio.Event, say: Callable[[str], None]
    ) -> None:
        self._generate = generate
        self._rng = np.random.default_rng(seed)
        self._last_id = min(vocab, LAST_TOKEN_ID)
        self._blocks: dict[int, list[int]] = {}
        self._stop = stop
        self._say = say

    async def serve(self, load: Load | Mixed, within_s: float) -> Served:
        """Until all have their answers, `within_s` seconds have passed, or the stop was asked for."""
        if isinstance(load, Mixed):
            return await self._serve_mixed(load, min(within_s, load.limit_s))
        return await self._serve_load(load, min(within_s, load.limit_s))

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(FIRST_TOKEN_ID, self._last_id, count).tolist()

    def prompt(self, tokens: int, hash_ids: Sequence[int] = (), block_tokens: int = 512) -> list[int]:
        """Of the blocks named, and of tokens of its own beyond them."""
        ids: list[int] = []
        for name in hash_ids:
            if name not in self._blocks:
                content = np.random.default_rng([STREAM_BLOCKS, name])
                self._blocks[name] = content.integers(FIRST_TOKEN_ID, self._last_id, block_tokens).tolist()
            ids += self._blocks[name]
        return (ids + self._tokens(max(0, tokens - len(ids))))[:tokens]

    # ---- open and closed loops ------------------------------------------------------------------------------------

    async def _serve_load(self, load: Load, within_s: float) -> Served:
        self._blocks.clear()  # their size may differ between loads
        prompts = [self.prompt(send.prompt_tokens, send.hash_ids, load.hash_block_tokens) for send in load.sends]
        slots = asyncio.Semaphore(load.concurrency) if load.concurrency else None
        answered = [asyncio.Event() for _ in load.sends]
        rows = [self._row(load.name, i, send) for i, send in enumerate(load.sends)]
        start_s = perf_counter() + load.lead_s
        scenario: dict[str, Any] = {"name": load.name}
        if load.concurrency:
            scenario["concurrency"] = load.concurrency
        if any(send.hash_ids for send in load.sends):
            scenario["hash_block_tokens"] = load.hash_block_tokens
        served = Served(load.name, load.keep, scenario, start_s, rows)

        async def one(i: int, send: Send) -> None:
            if slots is not None:
                await slots.acquire()
            elif send.parent >= 0:
                await answered[send.parent].wait()
                await asyncio.sleep(send.delay_s)
            elif (left_s := start_s + send.arrival_s - perf_counter()) > 0:
                await asyncio.sleep(left_s)
            try:
                await self._ask(prompts[i], rows[i], send.priority)
            finally:
                answered[i].set()
                if slots is not None:
                    slots.release()

        await self._finish([one(i, send) for i, send in enumerate(load.sends)], served, within_s)
        return served

    def _row(self, name: str, index: int, send: Send) -> Row:
        arrival = None if isnan(send.arrival_s) else send.arrival_s
        row: Row = {"id": f"{name}-{index}", "arrival": arrival, "prompt": send.prompt_tokens}
        row |= {"output": send.output_tokens, "t": []}
        return row | ({"hash_ids": list(send.hash_ids)} if send.hash_ids else {})

    async def _ask(self, prompt: list[int], row: Row, priority: int = 0) -> None:
        row["submit"], row["cached"] = perf_counter(), None
        async for tokens, cached in self._generate(prompt, row["output"], row["id"], priority):
            row["t"].append((perf_counter(), tokens))
            if cached is not None:
                row["cached"] = cached

    async def _finish(self, work: Sequence[Coroutine[Any, Any, None]], served: Served, within_s: float) -> None:
        tasks = [asyncio.create_task(one) for one in work]
        stopped = asyncio.create_task(self._stop.wait())
        begin_s = perf_counter()
        pending: set[asyncio.Task[Any]] = set(tasks)
        while pending and not self._stop.is_set() and (left_s := begin_s + within_s - perf_counter()) > 0:
            whole = asyncio.create_task(asyncio.wait(pending))
            await asyncio.wait({whole, stopped}, timeout=min(left_s, PROGRESS_S), return_when=asyncio.FIRST_COMPLETED)
            whole.cancel()
            pending = {task for task in pending if not task.done()}
            if pending and perf_counter() - begin_s >= PROGRESS_S:
                done = len(tasks) - len(pending)
                self._say(f"  {served.name}: {done} of {len(tasks)} answered, {perf_counter() - begin_s:.0f} s")
        stopped.cancel()
        for task in pending:
            task.cancel()
        await asyncio.sleep(SETTLE_S)
        served.unfinished = len(pending)
        failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        served.errors = [_one_line(error) for error in failed if error is not None][:MOST_ERRORS]

    # ---- prompts beside running decodes ---------------------------------------------------------------------------

    async def _serve_mixed(self, load: Mixed, within_s: float) -> Served:
        scenario = {"kind": "mixed"} | {k: v for k, v in asdict(load).items() if k not in ("keep", "timeout_s")}
        served = Served(load.name, load.keep, scenario, perf_counter(), [])
        work = _Injections(self, load, served, self._stop).run()
        await self._finish([work], served, within_s)
        return served


class _Injections:
    def __init__(self, client: Client, load: Mixed, served: Served, stop: asyncio.Event) -> None:
        self._client, self._load, self._served, self._stop = client, load, served, stop
        self._decodes: list[Row] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        try:
            for context, decodes in self._load.levels:
                if not self._load.grow:
                    await self._drop()
                while len(self._decodes) < decodes:
                    row = self._row("bg", context, DECODE_TOKENS, "background")
                    self._decodes.append(row)
                    self._tasks.append(asyncio.create_task(self._client._ask(self._client._tokens(context), row)))
                await self._until(lambda: all(len(row["t"]) >= 3 for row in self._decodes), "the running decodes")
                for cached in self._load.prefixes:
                    await self._level(f"c{context}d{decodes}p{cached}", cached)
        finally:
            await self._drop()

    async def _level(self, tag: str, cached: int) -> None:
        prefix = self._client._tokens(cached)
        if cached:
            await self._inject(1, f"{tag}base", prefix)
        for held in self._load.spins:
            for chunk in self._load.chunks:
                await self._inject(chunk, f"{tag}n{chunk}" + (HELD if held else ""), prefix)

    async def _inject(self, tokens: int, tag: str, prefix: list[int]) -> None:
        row = self._row(tag, len(prefix) + tokens, 1, tag)
        await self._client._ask(prefix + self._client._tokens(tokens), row)
        if self._decodes:
            wanted = len(self._decodes[0]["t"]) + self._load.gap_steps
            await self._until(lambda: len(self._decodes[0]["t"]) >= wanted, "decodes after a chunk")

    def _row(self, tag: str, prompt: int, output: int, shown: str) -> Row:
        rows = self._served.requests
        row: Row = {
            "id": f"{self._load.name}_{tag}-{len(rows)}", "arrival": round(perf_counter() - self._served.start_s, 5),
            "prompt": prompt, "output": output, "tag": shown, "t": [],
        }  # fmt: skip
        rows.append(row)
        return row

    async def _until(self, reached: Callable[[], bool], what: str) -> None:
        end_s = perf_counter() + WAIT_S
        while not reached():
            if any(task.done() for task in self._tasks):
                raise RuntimeError(f"a decode of {self._load.name} ended before the chunks were through")
            if perf_counter() > end_s:
                raise TimeoutError(f"waited {WAIT_S:g} s for {what}")
            await asyncio.sleep(0.001)

    async def _drop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks, self._decodes = [], []
        await asyncio.sleep(0.05)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
