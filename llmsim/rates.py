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
CAUGHT_UP = 0.02  # part of the starts in half of the arrivals
TRICKLE = 0.15  # part of the arrivals by which they run ahead of an even pace


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

    Judged over the plateau of arrivals: of sessions the last turns trickle in, and a load that has ended says nothing.

    Unstable: the queue (sent, not yet scheduled) kept growing, or, with room in the batch, the requests under way did
    (sent, not yet finished). The latter is judged only if early requests took less than an eighth of the plateau, for
    until the first ones finish their number grows under any load. What counts as growing: `_growth`.

    Not told: the queue did not grow by more than chance would have it, but over half of the arrivals in a row the
    system hardly ever caught up either: after fewer than `CAUGHT_UP` of its starts nobody was left waiting at that
    replica. A load just above the capacity looks like that, one just below in a short trace, and one that is above for
    a while.

    How often that errs, against queues whose utilisation is known: docs/metrics.md, and tests/test_stability.py.

    The highest stable rate is that of all completions: a system that falls behind works at its capacity until it has
    caught up, so only its filling and its last few answers are missing. Of chats on an H200 that hold up to 21.8
    requests/s, 2,000 sent at 24 to 60 a second say 20.6 to 21.6 (counting completions while requests still arrive says
    15 to 23, for the batch is filling up then).
    """
    if concurrency is not None:
        return None, f"closed loop of {concurrency}: the load follows the system, the queue cannot run away"
    taken = np.isfinite(requests["finish_s"])  # the others were rejected at once
    order = np.flatnonzero(taken)[np.argsort(requests["arrival_s"][taken], kind="stable")]
    sent_s, scheduled_s, finish_s = (requests[name][order] for name in ("arrival_s", "scheduled_s", "finish_s"))
    count = plateau(sent_s)
    span_s = float(sent_s[count - 1] - sent_s[0]) if count else 0.0
    if count < FEWEST_FOR_STABILITY or span_s == 0.0:
        return None, f"{count} requests over {span_s:.3g} s are too few to tell whether the queue grows"
    measures = [("queue", scheduled_s, 1.0)]
    if np.median((finish_s - sent_s)[: count // 4]) < span_s / 8:
        measures.append(("number of requests under way", finish_s, 1.5))  # a batch strays for longer than a queue
    rate = (count - 1) / span_s
    for name, left_s, strays in measures:
        growth, first, last = _growth(sent_s[:count], left_s, strays)
        if growth > 0.0:
            served = sent_s.size / float(finish_s.max() - sent_s[0])
            return False, (
                f"unstable: the {name} grew all along, by {growth * rate:.2g} of {rate:.3g} requests/s, from "
                f"{first:.0f} in the second quarter of the arrivals to {last:.0f} in the last, so latencies depend on "
                f"the trace's length; highest stable rate about {served:.3g} requests/s, what was completed from the "
                "first send to the last answer (llmsim plan finds it)"
            )
    replica = requests["replica"][order] if "replica" in requests else np.zeros(order.size)
    caught = _caught_up(sent_s, scheduled_s, replica)[:count]
    waiting = count - int((scheduled_s <= sent_s[count - 1]).sum())
    least = _least_share(caught, count // 2)
    if least < CAUGHT_UP:
        return None, (
            f"saturated: in one half of the arrivals {100 * (1.0 - least):.3g} % of all starts left others waiting "
            f"({waiting} wait at the last arrival), so latencies depend on how long that lasts; whether the queue goes "
            "on growing cannot be told, give a longer trace"
        )
    return True, f"stable: the queue did not keep growing ({waiting} waiting at the last arrival)"


def plateau(sent_s: Floats) -> int:
    """How many of these rising arrivals come before they trickle.

    The count runs ahead of its straight line by most where a trickle begins. It is cut there if that lead is beyond
    what chance does to even a bursty trace (`TRICKLE`, and four standard errors of Poisson arrivals): otherwise all.
    """
    count, span_s = sent_s.size, float(np.ptp(sent_s)) if sent_s.size else 0.0
    if not span_s:
        return count
    lead = np.arange(1, count + 1) / count - (sent_s - sent_s[0]) / span_s
    knee = int(lead.argmax())
    return knee + 1 if lead[knee] > max(TRICKLE, 4.0 * count**-0.5) else count


def _caught_up(sent_s: Floats, scheduled_s: Floats, replica: NDArray[Any]) -> NDArray[np.bool_]:
    """Of each request: whether nobody was left waiting at its replica when it had been scheduled."""
    caught = np.zeros(sent_s.size, dtype=bool)
    together = np.argsort(replica, kind="stable")
    for own in np.split(together, np.flatnonzero(np.diff(replica[together])) + 1):
        at_s = scheduled_s[own]
        sent = np.searchsorted(sent_s[own], at_s, side="right")
        caught[own] = sent <= np.searchsorted(np.sort(at_s), at_s, side="right")
    return caught


def _least_share(caught: NDArray[np.bool_], width: int) -> float:
    """Of those in a row, `width` at a time, the least share that did catch up."""
    before = np.concatenate([[0], np.cumsum(caught)])
    return float((before[width:] - before[:-width]).min()) / width


def _growth(sent_s: Floats, left_s: Floats, strays: float) -> tuple[float, float, float]:
    """(part of the arrivals by which the number sent and not yet left kept growing, or 0; that number in the second and
    in the last quarter).

    The number is averaged over each quarter of the arrivals. It kept growing if it rises from the second to the third
    to the last quarter, by more than 2 % of what arrived between, and by more than `strays` times how far the arrivals
    between stray on their own: the square root of their number, times the variation of their gaps if that is more than
    a Poisson process has. All of that must also be so of the number that there would be if arrivals kept one pace (by
    Little's law: times how long the quarter took beside the mean one): of a trace whose load rises, the batch rises
    with it, and nothing runs away.
    """
    inside = np.arange(1, sent_s.size + 1) - np.searchsorted(np.sort(left_s), sent_s, side="right")
    takes_s = np.diff(sent_s[np.linspace(0, sent_s.size - 1, 5).astype(np.int64)])
    raw = np.array([part.mean() for part in np.array_split(inside, 4)])
    between = sent_s.size / 2  # arrivals between the middles of the second and the last quarter
    gaps_s = np.diff(sent_s)
    variation = max(1.0, float(gaps_s.std() / gaps_s.mean()))
    least = max(UNSERVED, strays * variation * between**-0.5)
    growths = []
    for number in (raw, raw * takes_s / takes_s.mean()):
        growth = float(number[3] - number[1]) / between
        growths.append(growth if number[1] < number[2] < number[3] and growth > least else 0.0)
    return min(growths), float(raw[1]), float(raw[3])
