"""How much at a time: output tokens by the second, requests under way, and whether the queue kept growing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

DENSE_SECONDS = 10_000_000  # above 115 days only the seconds with tokens are held: 80 MB would not do
CHUNK = 1 << 20  # tokens' instants held at a time: 8 MB an array
FEWEST_FOR_STABILITY = 100  # requests
UNSERVED = 0.02  # part of the arrivals


def tokens_per_second(requests: Columns, iterations: Columns, gaps: Columns) -> Floats:
    """Output tokens in each whole second since the first send, as vLLM's benchmark counts them (of a run longer than
    `DENSE_SECONDS`: in each second that has any).

    With the gaps' `end_s` the instants are the client's; without it the GPU's log stands in: the same tokens a few
    milliseconds earlier, evenly placed within a run of iterations.
    """
    done = np.isfinite(requests["finish_s"])
    if not done.any():
        return np.zeros(0)
    origin_s = float(requests["arrival_s"].min())
    seconds = int(np.ceil(requests["finish_s"][done].max() - origin_s)) + 1
    first_s = requests["first_token_s"][done]
    parts = chain(((first_s, np.ones(first_s.size)),), _token_instants(iterations, gaps, origin_s))
    if seconds > DENSE_SECONDS:
        return _sparse_tokens(parts, origin_s, seconds)
    tokens = np.zeros(seconds)
    for instants_s, weights in parts:
        second = (instants_s - origin_s).astype(np.int64)
        counts = np.bincount(second, weights=weights, minlength=seconds)
        tokens += counts[:seconds]  # tokens of requests that never completed can lie beyond; vLLM leaves them out too
    return tokens


def _sparse_tokens(parts: Iterable[tuple[Floats, Floats]], origin_s: float, seconds: int) -> Floats:
    """Output tokens of those seconds in which there were any."""
    held_s: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    counts: Floats = np.zeros(0)
    for instants_s, weights in parts:
        second = np.concatenate([held_s, (instants_s - origin_s).astype(np.int64)])
        held_s, place = np.unique(second, return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate([counts, weights]), minlength=held_s.size).astype(np.float64)
    return counts[held_s < seconds]


def _token_instants(iterations: Columns, gaps: Columns, origin_s: float) -> Iterator[tuple[Floats, Floats]]:
    """(instants, tokens) of all tokens but the first of each request."""
    if "end_s" in gaps:
        end_s, count, weight = (gaps[name] for name in ("end_s", "count", "weight"))
        gap_s, growth_s = gaps["gap_s"], gaps["growth_s"]
    else:
        end_s, count, weight = (iterations[name] for name in ("gpu_end_s", "iterations", "seqs"))
        gap_s, growth_s = (end_s - iterations["start_s"]) / np.maximum(count, 1), np.zeros(len(end_s))
    count = count.astype(np.int64)  # an engine may log all columns as floats
    first_s = end_s - (gap_s * (count - 1) + growth_s * (count * (count - 1) / 2))
    whole = np.floor(end_s - origin_s) == np.floor(first_s - origin_s)  # a run within one second needs no expansion
    yield end_s[whole], (count * weight)[whole].astype(np.float64)
    rows = np.flatnonzero(~whole & (count > 0))
    for part in np.array_split(rows, int(count[rows].sum()) // CHUNK + 1):
        counts = count[part]
        step = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        gap, growth = np.repeat(gap_s[part], counts), np.repeat(growth_s[part], counts)
        # The i-th instant is the first one plus the gaps 1 .. i of the run.
        instants_s = np.repeat(first_s[part], counts) + step * gap + growth * (step * (step + 1) / 2)
        yield instants_s, np.repeat(weight[part], counts).astype(np.float64)


def peak_concurrency(requests: Columns) -> int:
    """Largest number of completed requests under way at one instant, each from its send up to its last token."""
    done = np.isfinite(requests["finish_s"])
    if not done.any():
        return 0
    times_s = np.concatenate([requests["arrival_s"][done], requests["finish_s"][done]])
    change = np.repeat([1, -1], int(done.sum()))
    return int(np.cumsum(change[np.lexsort((change, times_s))]).max())  # at a tie the departure comes first


def stability(requests: Columns, concurrency: int | None) -> tuple[bool | None, str]:
    """Whether the load was more than the system can serve, and that in words. None: cannot be told.

    Unstable: the queue (sent, not yet scheduled) kept growing, or, with room in the batch, the requests under way did
    (sent, not yet finished). The latter is judged only if early requests took less than an eighth of the arrivals'
    span, for until the first ones finish their number grows under any load. Both are compared as they would be if
    arrivals kept one pace: of a trace whose load rises, the batch rises with it, and nothing runs away.

    The highest stable rate is that of all completions: a system that falls behind works at its capacity until it has
    caught up, so only its filling and its last few answers are missing. Of chats on an H200 that hold up to 21.8
    requests/s, 2,000 sent at 24 to 60 a second say 20.6 to 21.6 (counting completions while requests still arrive says
    15 to 23, for the batch is filling up then).
    """
    if concurrency is not None:
        return None, f"closed loop of {concurrency}: the load follows the system, the queue cannot run away"
    order = np.argsort(requests["arrival_s"], kind="stable")
    sent_s, scheduled_s, finish_s = (requests[name][order] for name in ("arrival_s", "scheduled_s", "finish_s"))
    taken = np.isfinite(finish_s)  # the others were rejected at once
    sent_s, scheduled_s, finish_s = sent_s[taken], scheduled_s[taken], finish_s[taken]
    span_s = float(np.ptp(sent_s)) if sent_s.size else 0.0
    if sent_s.size < FEWEST_FOR_STABILITY or span_s == 0.0:
        return None, f"{sent_s.size} requests over {span_s:.3g} s are too few to tell whether the queue grows"
    measures = [("queue", scheduled_s, 1.0)]
    early = sent_s.size // 4
    if np.median((finish_s - sent_s)[:early]) < span_s / 8:
        measures.append(("number of requests under way", finish_s, 1.5))  # a batch strays for longer than a queue
    rate = (sent_s.size - 1) / span_s
    for name, left_s, strays in measures:
        growth, last = _growth(sent_s, left_s, strays)
        if growth > 0.0:
            served = sent_s.size / float(finish_s.max() - sent_s.min())
            return False, (
                f"unstable: the {name} grew all along, by {growth * rate:.2g} of {rate:.3g} requests/s, to {last} at "
                f"the last arrival, so latencies depend on the trace's length; highest stable rate about {served:.3g} "
                "requests/s, what was completed from the first send to the last answer (llmsim plan finds it)"
            )
    waiting = _growth(sent_s, scheduled_s, 1.0)[1]
    return True, f"stable: the queue did not keep growing ({waiting} waiting at the last arrival)"


def _growth(sent_s: Floats, left_s: Floats, strays: float) -> tuple[float, int]:
    """(part of the arrivals by which the number sent and not yet left kept growing, or 0; that number in the end).

    The number is averaged over each quarter of the arrivals, times how long that quarter took beside the mean one (by
    Little's law: the number if all came at the mean pace). It kept growing if it rises from the second to the third to
    the last quarter, by more than 2 % of what arrived between, and by more than `strays` times the square root of that,
    which is how far Poisson arrivals stray on their own.
    """
    inside = np.arange(1, sent_s.size + 1) - np.searchsorted(np.sort(left_s), sent_s, side="right")
    takes_s = np.diff(sent_s[np.linspace(0, sent_s.size - 1, 5).astype(np.int64)])
    pace = takes_s / takes_s.mean()
    quarters = [float(part.mean()) * own for part, own in zip(np.array_split(inside, 4), pace.tolist(), strict=True)]
    between = sent_s.size / 2  # arrivals between the middles of the second and the last quarter
    growth = (quarters[3] - quarters[1]) / between
    kept_growing = quarters[1] < quarters[2] < quarters[3] and growth > max(UNSERVED, strays * between**-0.5)
    return (growth if kept_growing else 0.0), int(inside[-1])
