"""Why a change helps: which term of the cost it changes, on the very same steps.

A change feeds back: faster steps make smaller batches, fewer prompts beside them, shorter queues. So the cause is
looked for in the baseline's own iterations. Each is priced by both cost models, counting once for every decode in it
and divided by the tokens that a decode makes of it (1, without drafts): the sum is what a client waits for a token,

    GPU     the terms of `llmsim.cost.terms`
    host    what the host's clock adds to the GPU's, H = schedule + launch + update of the mode the step would have:
            asynchronous max(0, H - T); synchronous schedule + max(lead + T, launch + tail) + update + return - T

If nothing of that changes, the change is one of scheduling or memory; then it is the runs that are compared: prompt
tokens computed, preemptions, cached tokens that a decode reads, decodes in a step.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.cost import CostModel
from llmsim.cost.terms import row_terms_s
from llmsim.scenario import Scenario
from llmsim.whatif_run import HOST, Run

WORDS = {
    "linear": "linear layers",
    "between": "kernels between them",
    "head": "LM head and sampling",
    "draft": "drafts",
}
LEAST_SHARE = 0.005  # of the mean gap: a term that changes by less is no reason
WAIT_SHARE = 0.5  # of a change of TTFT from which the queue is named
SHOWS = 0.01  # a relative change from which scheduling is named
FEW = 0.05  # preemptions of a request that explain nothing
SECOND_SHARE = 0.4  # of the first term's change: from there on a second one is named too

Columns = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
Priced = tuple[Run, dict[str, float]]  # a run, and the baseline's steps by its cost model


def step_terms_s(rows: Columns, cost: CostModel, scenario: Scenario) -> dict[str, float]:
    """Seconds of a token by term, if these iterations ran by this cost model; clocks left out."""
    by_row = row_terms_s(cost, rows)
    del by_row["clocks"]
    n = rows["iterations"]
    weight = rows["seqs"] / (rows["seqs"] * n).sum() / getattr(cost, "tokens_per_step", 1.0)
    gpu_s = sum(by_row.values()) / n
    by_row[HOST] = n * exposed_s(rows, gpu_s, cost, scenario.async_scheduling)
    return {name: float((seconds * weight).sum()) for name, seconds in by_row.items()}


def exposed_s(rows: Columns, gpu_s: Floats, cost: CostModel, asynchronous: bool) -> Floats:
    """What the host adds to `gpu_s` of each iteration."""
    host = cost.host
    chunks, requests = rows["prefill_requests"], rows["seqs"] + rows["prefill_requests"]
    keys, places = np.unique(np.stack([rows["seqs"] + rows["prefill_tokens"], chunks]), axis=1, return_inverse=True)
    mode = np.array([cost.mode(int(tokens), int(count)) for tokens, count in keys.T])[places.ravel()]

    def of(field: str) -> Floats:
        by_mode: Floats = np.array(getattr(host, field))[mode]
        return by_mode

    schedule_s = host.schedule_s + host.schedule_per_request_s * rows["running"]
    schedule_s = schedule_s + host.schedule_per_token_s * rows["prefill_tokens"]
    launch_s = of("launch_s") + of("launch_per_request_s") * requests + of("launch_per_chunk_s") * chunks
    update_s = host.update_s + host.update_per_output_s * rows["seqs"]
    if asynchronous:
        exposed: Floats = np.maximum(schedule_s + launch_s + update_s - gpu_s, 0.0)
        return exposed
    step_s = np.maximum(of("lead_s") + gpu_s, launch_s + of("tail_s"))
    synchronous: Floats = schedule_s + step_s + update_s + host.return_s - gpu_s
    return synchronous


def cause(without_s: dict[str, float], with_s: dict[str, float], helps: bool) -> str | None:
    """The terms that shrank most between two prices of the same steps, or if it does not help grew most: one or two."""
    sign = 1 if helps else -1
    change_s = {name: sign * (with_s[name] - before_s) for name, before_s in without_s.items()}
    first, second = sorted(change_s, key=lambda name: change_s[name])[:2]
    least_s = LEAST_SHARE * sum(without_s.values())
    if -change_s[first] < least_s:
        return None
    named = [first]
    if -change_s[second] >= max(least_s, -SECOND_SHARE * change_s[first]):
        named.append(second)
    said = [f"{WORDS.get(name, name)} {1e3 * without_s[name]:.2f} → {1e3 * with_s[name]:.2f}" for name in named]
    return f"{', '.join(said)} ms a token"


def reason(without: Priced, with_: Priced, helps: bool) -> str:
    before, after = without[0], with_[0]
    said = [cause(without[1], with_[1], helps) or _scheduling(before, after)]
    ttft_s, queue_s = after.ttft_s - before.ttft_s, after.queue_s - before.queue_s
    if abs(ttft_s) > 0.01 * before.ttft_s and queue_s * ttft_s > 0 and abs(queue_s) >= WAIT_SHARE * abs(ttft_s):
        said.append(f"queue {_time(before.queue_s)} → {_time(after.queue_s)}")
    if after.completed != before.completed:
        said.append(f"requests that fit {before.completed:,} → {after.completed:,}")
    return "; ".join(part for part in said if part) or "nothing that shows"


def _scheduling(before: Run, after: Run) -> str | None:
    """What changed most between two runs whose steps cost the same."""
    counts = {
        "prompt tokens computed": (before.prompt_tokens, after.prompt_tokens, ",.0f"),
        "preemptions": (before.preemptions, after.preemptions, ",.0f"),
        "cached tokens of a decode": (before.context_tokens, after.context_tokens, ",.0f"),
        "decodes in a step": (before.batch, after.batch, ".1f"),
    }
    least = dict.fromkeys(counts, 1.0) | {"preemptions": FEW * before.completed}
    change = {name: abs(log(max(b, least[name]) / max(a, least[name]))) for name, (a, b, _) in counts.items()}
    name = max(change, key=lambda item: change[item])
    then, now, form = counts[name]
    return f"{name} {then:{form}} → {now:{form}}" if change[name] > SHOWS else None


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
