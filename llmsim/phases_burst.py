"""A burst of prompts that meets a decoding batch, iteration by iteration on both clocks: what chunked prefill does.

`decodes` requests with `context_tokens` cached each are decoding when `prompts` prompts of `prompt_tokens` arrive at
once, at 0 s. The engine's scheduler cuts them into chunks: an iteration computes at most max_num_batched_tokens
tokens, the decodes' included. The engine is the one of every other replay (`llmsim.simulate`, launch jitter off);
iterations are taken one at a time and noted (`llmsim.phases_watch`).

Shown are the last iterations before the burst, the burst, and the first few decodes after its last prompt, at most
`MOST_SHOWN` iterations. Gaps are those that clients see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.cost import MODE_NAMES
from llmsim.phases import Engine, check_decodes, decode_point
from llmsim.phases_watch import Noted, Watched
from llmsim.scenario import Scenario
from llmsim.simulate import Fleet, simulate
from llmsim.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.metrics import Result

BEFORE, AFTER = 3, 6  # iterations shown beside those of the burst
MOST_SHOWN = 400
MOST_ITERATIONS = 20_000  # of a burst
ANSWER_TOKENS = 8  # of the prompts that burst in
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Burst:
    """Seconds are from the burst's arrival. Gaps are None without decodes."""

    token_budget: int
    prompts: int
    prompt_tokens: int
    decodes: int
    context_tokens: int
    iterations: int  # that compute the burst's prompts
    chunks: int
    mean_ttft_s: float
    last_ttft_s: float  # the largest
    steady_gap_s: float | None  # the last between two tokens before the burst
    longest_gap_s: float | None  # from the burst to the last prompt's first token
    worker: bool
    shown: tuple[Noted, ...]
    updates: tuple[tuple[float, float], ...]
    left_out: int  # iterations of the burst that are not shown

    def clocks(self) -> pd.DataFrame:
        """lane, part, iteration, begin_s, end_s, mode, tokens: what host and GPU are busy with."""
        import pandas as pd

        launcher = "worker" if self.worker else "host"
        rows: list[tuple[str, str, int, float, float, str, int]] = []
        for i, one in enumerate(self.shown):
            mode, tokens = MODE_NAMES[one.mode], sum(chunk.tokens for chunk in one.chunks)
            rows.append(("host", "schedule", i, one.schedule_s, one.scheduled_s, mode, tokens))
            rows.append((launcher, "launch", i, one.launch_s, one.launched_s, mode, tokens))
            split_s = one.gpu_begin_s + one.prefill_share * (one.gpu_end_s - one.gpu_begin_s)
            if one.prefill_share > 0:
                rows.append(("GPU", "prefill", i, one.gpu_begin_s, split_s, mode, tokens))
            if one.prefill_share < 1:
                rows.append(("GPU", "decode", i, split_s, one.gpu_end_s, mode, tokens))
        rows += [("host", "update", i, begin_s, end_s, "", 0) for i, (begin_s, end_s) in enumerate(self.updates)]
        return pd.DataFrame(rows, columns=["lane", "part", "iteration", "begin_s", "end_s", "mode", "tokens"])

    def requests(self) -> pd.DataFrame:
        """lane, kind, iteration, request, tokens, requests, computed_tokens, begin_s, end_s: what is computed for each.

        A lane for each prompt of the burst and one for the batch that decodes. Decodes of an iteration last from the
        GPU's start of it to its end, and so do the chunks: they are computed together.
        """
        import pandas as pd

        rows: list[tuple[str, str, int, int, int, int, int, float, float]] = []
        for i, one in enumerate(self.shown):
            own = [chunk for chunk in one.chunks if chunk.request >= self.decodes]
            others = [chunk for chunk in one.chunks if chunk.request < self.decodes]
            span_s = one.gpu_begin_s, one.gpu_end_s
            if others:
                cached = sum(chunk.computed_tokens for chunk in others)
                rows.append((self.batch_lane, "decode", i, -1, len(others), len(others), cached, *span_s))
            for chunk in own:
                number = chunk.request - self.decodes + 1
                rows.append(
                    (f"prompt {number}", chunk.kind, i, number, chunk.tokens, 1, chunk.computed_tokens, *span_s)
                )
        names = "lane", "kind", "iteration", "request", "tokens", "requests", "computed_tokens", "begin_s", "end_s"
        return pd.DataFrame(rows, columns=list(names))

    @property
    def batch_lane(self) -> str:
        return f"{self.decodes} decodes" if self.decodes != 1 else "1 decode"

    def facts(self) -> dict[str, Any]:
        """The numbers alone, JSON-ready."""
        left = ("shown", "updates", "worker")
        return {name: value for name, value in asdict(self).items() if name not in left}


def burst(
    scenario: Scenario,
    *,
    prompts: int = 4,
    prompt_tokens: int = 1024,
    decodes: int = 16,
    context_tokens: int = 512,
    token_budget: int | None = None,
) -> Burst:
    """Simulate it; `token_budget` replaces scenario.max_num_batched_tokens.

    Raises ValueError for what no engine would start with, for a budget that the decodes fill by themselves, and for
    more than `MOST_ITERATIONS` iterations.
    """
    budget = scenario.max_num_batched_tokens if token_budget is None else token_budget
    engine = _engine(scenario, budget)
    decoding = _decoding(engine, prompts, prompt_tokens, decodes, context_tokens)
    arrival_s = _arrival_s(engine, decoding, context_tokens)
    fleet = Fleet(
        _with_prompts(decoding, prompts, prompt_tokens, arrival_s), engine.scenario, cost=engine.cost, make=Watched
    )
    result = fleet.run()
    replica = fleet.replicas[0]
    assert isinstance(replica, Watched)
    return _told(engine, result, replica, (prompts, prompt_tokens, decodes, context_tokens), arrival_s)


def budgets(
    scenario: Scenario,
    *,
    prompts: int = 4,
    prompt_tokens: int = 1024,
    decodes: int = 16,
    context_tokens: int = 512,
) -> pd.DataFrame:
    """The same burst at every token budget of `BUDGETS` that its decodes leave room in, as `burst` has it:
    token_budget, iterations, mean_ttft_s, last_ttft_s, longest_gap_s."""
    import pandas as pd

    rows = []
    for budget in BUDGETS:
        if budget > decodes:
            engine = _engine(scenario, budget)
            decoding = _decoding(engine, prompts, prompt_tokens, decodes, context_tokens)
            arrival_s = _arrival_s(engine, decoding, context_tokens)
            trace = _with_prompts(decoding, prompts, prompt_tokens, arrival_s)
            result = simulate(trace, engine.scenario, cost=engine.cost)
            later = (result.iterations["prefill_requests"] > 0) & (result.iterations["start_s"] >= arrival_s)
            rows.append(
                {"token_budget": budget, "iterations": int(later.sum())} | _latencies_s(result, decodes, arrival_s)
            )
    return pd.DataFrame(rows)


def _engine(scenario: Scenario, token_budget: int | None) -> Engine:
    return Engine.of(replace(scenario, max_num_batched_tokens=token_budget, replicas=1, concurrency=None))


def _decoding(engine: Engine, prompts: int, prompt_tokens: int, decodes: int, context_tokens: int) -> Trace:
    """The requests that decode when the burst comes, with answers that outlast it."""
    s = engine.scenario
    assert s.max_num_batched_tokens is not None and s.max_num_seqs is not None
    for name, value, least in (("prompts", prompts, 1), ("prompt", prompt_tokens, 1), ("decodes", decodes, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is too small: give {least} or more")
    budget = s.max_num_batched_tokens
    if decodes >= min(budget, s.max_num_seqs):
        raise ValueError(
            f"decodes={decodes} fill an iteration: max_num_batched_tokens={budget} and max_num_seqs={s.max_num_seqs} "
            "leave no room for a prompt. Give fewer decodes or a larger token budget"
        )
    room = min(budget - decodes, engine.chunk_tokens)
    before = decodes * ceil(context_tokens / room)
    iterations = before + prompts * ceil(prompt_tokens / room)
    if iterations > MOST_ITERATIONS:
        raise ValueError(
            f"max_num_batched_tokens={budget} cuts {prompts} prompts of {prompt_tokens:,} tokens beside "
            f"{decodes} decodes of {context_tokens:,} into some {iterations:,} iterations, more than "
            f"{MOST_ITERATIONS:,}: raise it"
        )
    if decodes:
        check_decodes(engine, [decodes], context_tokens)
    answer = iterations + decodes + 2 * (BEFORE + AFTER + ANSWER_TOKENS)
    return Trace(
        name="decodes",
        arrival_s=np.zeros(decodes),
        prompt_tokens=np.full(decodes, context_tokens),
        output_tokens=np.full(decodes, answer),
    )


def _arrival_s(engine: Engine, decoding: Trace, context_tokens: int) -> float:
    """When all of them decode and some steady steps have passed; 0 if there are none."""
    if not len(decoding):
        return 0.0
    alone = simulate(decoding, engine.scenario, cost=engine.cost)
    step_s = decode_point(engine, len(decoding), context_tokens).wall_s
    return float(alone.requests["first_token_s"].max()) + (BEFORE + 2) * step_s


def _with_prompts(decoding: Trace, prompts: int, prompt_tokens: int, arrival_s: float) -> Trace:
    def both(column: Any, value: float) -> Any:
        return np.concatenate([column, np.full(prompts, value, dtype=column.dtype)])

    return Trace(
        name="a burst of prompts",
        arrival_s=both(decoding.arrival_s, arrival_s),
        prompt_tokens=both(decoding.prompt_tokens, prompt_tokens),
        output_tokens=both(decoding.output_tokens, ANSWER_TOKENS),
    )


def _told(engine: Engine, result: Result, replica: Watched, of: tuple[int, int, int, int], arrival_s: float) -> Burst:
    prompts, prompt_tokens, decodes, context_tokens = of
    own = [
        i
        for i, one in enumerate(replica.noted)
        if any(chunk.kind == "prefill" and chunk.request >= decodes for chunk in one.chunks)
    ]
    first, last = max(own[0] - BEFORE, 0), own[-1] + AFTER
    shown = [_from(one, arrival_s) for one in replica.noted[first : last + 1][:MOST_SHOWN]]
    begin_s, end_s = shown[0].schedule_s, shown[-1].gpu_end_s
    assert engine.scenario.max_num_batched_tokens is not None
    return Burst(
        token_budget=engine.scenario.max_num_batched_tokens,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        decodes=decodes,
        context_tokens=context_tokens,
        iterations=len(own),
        chunks=sum(chunk.kind == "prefill" for i in own for chunk in replica.noted[i].chunks),
        steady_gap_s=float(result.gaps["gap_s"][result.gaps["end_s"] <= arrival_s][-1]) if decodes else None,
        **_latencies_s(result, decodes, arrival_s),
        worker=engine.cost.host.worker,
        shown=tuple(shown),
        updates=tuple(
            (a - arrival_s, b - arrival_s)
            for a, b in replica.updates
            if begin_s <= a - arrival_s and b - arrival_s <= end_s
        ),
        left_out=max(last + 1 - first - MOST_SHOWN, 0),
    )


def _latencies_s(result: Result, decodes: int, arrival_s: float) -> dict[str, Any]:
    """What the clients see: first tokens of the burst, and the longest gap from its arrival to the last of them."""
    ttft_s = result.requests["first_token_s"][decodes:] - arrival_s
    gaps, last_ttft_s = result.gaps, float(ttft_s.max())
    ended_s, largest_s = gaps["end_s"] - arrival_s, gaps["gap_s"] + gaps["growth_s"] * (gaps["count"] - 1)
    during_s = largest_s[(ended_s > 0) & (ended_s <= last_ttft_s + 1e-9)]
    return {
        "mean_ttft_s": float(ttft_s.mean()),
        "last_ttft_s": last_ttft_s,
        "longest_gap_s": float(during_s.max()) if decodes else None,
    }


def _from(one: Noted, zero_s: float) -> Noted:
    times = ("schedule_s", "scheduled_s", "launch_s", "launched_s", "gpu_begin_s", "gpu_end_s")
    return one._replace(**{name: getattr(one, name) - zero_s for name in times})
