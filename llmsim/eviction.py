"""Which cached content is lost when KV blocks are needed: policies of the prefix cache, and how to write one.

Unless told otherwise a replica loses content in vLLM's exact order (`lru`, built into `llmsim.kvcache`). Any other
policy is a plain class, a built-in one or the user's own (`--eviction my.py:Mine --eviction-arg name=value`):

    class Mine:
        def key(self, extent, now_s):             # asked when content becomes idle: nobody holds it any more
            return extent.hits, extent.used_s     # the smallest key goes first; of equal keys what went idle first

A key must not be nan, must compare with the policy's other keys, and stands until the content is used again. `extent`
is a run of consecutive blocks of one sequence (`llmsim.content.Content`), of which a policy may read

    blocks, tokens     its size
    first_token        where in its sequence it begins: 0 for the beginning of prompts
    hits               requests that found it in the cache
    stored_s, used_s   when it was computed; when the last request let go of it
    gap_s              how long it lay idle before it was last found (nan: it was never found)

Optional methods:

    victim(extents, now_s)           picks the one that goes, when keys cannot tell (they change while content is idle);
                                     `extents` may go now, in order of their keys
    evicted(extent, blocks, now_s)   told after `blocks` blocks from the extent's end were lost
    lifetime_s(extent)               idle content older than this is dropped before any look-up; asked beside key
    foresee(future)                  makes the policy clairvoyant: `future.next_use(extent)` is then the place in the
                                     trace of the next request that uses the extent's last block (inf: none); turns
                                     that wait for an answer are foreseen as if answers took no time

The cache guarantees, whatever a policy answers: content that a running request holds is never lost; content without
its beginning cannot be found, so only *tips* may go, that is idle content with nothing idle behind it in any sequence,
and what lies before it becomes a tip in turn; an extent loses blocks from its end, no more than are needed.
A policy that breaks a rule gets a PolicyError: a key that is nan or does not compare, a victim that was not offered.

The built-in policies (uses = hits + 1, the one that computed it; L = the key lost last, which ages what is not used):

    lru       least recently used, vLLM's order to the block
    lfu       (hits, used_s): least frequently used while it stayed, of equals the least recently
    fifo      stored_s
    size      L + uses / tokens up to the extent's end: GreedyDual-Size-Frequency (Cherkasova 1998) with equal costs,
              so the ends of long sequences go first
    cost      L + uses * recompute cost per byte: GDSF with the cost of a prefill, (1 + position / attention_tokens) a
              token, where attention over that many tokens costs as much as the linear layers
    length    (hits, -position): LFU that begins with blocks late in their sequences, as we read the Mooncake paper's
              LengthAwareCache (arXiv 2407.00079, section 4.2: it says no more than that)
    ttl       used_s + time to live: what dies first; what is dead is dropped and not found
    belady    what is used again latest (Belady 1966, MIN): a bound, for it reads the future of the trace

Belady's policy finds the most blocks that any eviction could if requests come one at a time in the order of the trace
and every block is as large and as dear as another: a block's beginning is needed no later than the block itself, so
the rule about tips never stands in its way (`tests/test_eviction.py` compares it with every possible choice). It counts
blocks, not seconds. In a replay requests overlap, are admitted in another order than they came in, and hold blocks
while they run; then it is what a cache that knew the trace would do, and no proof of the best.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf, isnan
from typing import TYPE_CHECKING, Any, Protocol

from llmsim.plugins import load_plugin

if TYPE_CHECKING:
    from llmsim.content import Content, Future

DEFAULT = "lru"
BUILTIN = {
    "lru": "llmsim.eviction:LeastRecentlyUsed",
    "lfu": "llmsim.eviction:LeastFrequentlyUsed",
    "fifo": "llmsim.eviction:FirstInFirstOut",
    "size": "llmsim.eviction:SizeAware",
    "cost": "llmsim.eviction:CostAware",
    "length": "llmsim.eviction:LengthAware",
    "ttl": "llmsim.eviction:TimeToLive",
    "belady": "llmsim.eviction:Belady",
}


class Eviction(Protocol):
    def key(self, extent: Content, now_s: float) -> Any:
        """Idle content with the smallest key is lost first."""


def load_eviction(spec: str, arguments: dict[str, Any] | None = None) -> Any:
    """A policy by name, or from the user's own file."""
    return load_plugin(
        spec, arguments, kind="eviction", builtin=BUILTIN, method="key", signature="key(self, extent, now_s)"
    )


class LeastRecentlyUsed:
    """Least recently used; vLLM's order (replays use vLLM's own list, to the block)."""

    def key(self, extent: Content, now_s: float) -> Any:
        return extent.used_s


class LeastFrequentlyUsed:
    """Least frequently used while it stayed; of equals the least recently."""

    def key(self, extent: Content, now_s: float) -> Any:
        return extent.hits, extent.used_s


class FirstInFirstOut:
    """What was stored first, however often it is used."""

    def key(self, extent: Content, now_s: float) -> Any:
        return extent.stored_s


class LengthAware:
    """Least frequently used, and of equals what comes latest in its sequence (Mooncake)."""

    def key(self, extent: Content, now_s: float) -> Any:
        return extent.hits, -extent.first_token


class _Ageing(ABC):
    """GreedyDual: keys grow with what was lost last, so content that is not used again falls behind new content."""

    def __init__(self) -> None:
        self.age = 0.0

    @abstractmethod
    def worth(self, extent: Content) -> float:
        """Of one use of the content."""

    def key(self, extent: Content, now_s: float) -> Any:
        return self.age + (extent.hits + 1) * self.worth(extent)

    def evicted(self, extent: Content, blocks: int, now_s: float) -> None:
        self.age = max(self.age, extent.key)


class SizeAware(_Ageing):
    """GreedyDual-Size-Frequency: the ends of long, seldom used sequences."""

    def worth(self, extent: Content) -> float:
        return 1.0 / (extent.first_token + extent.tokens)


class CostAware(_Ageing):
    """GreedyDual by recompute cost per byte: what is cheap to compute again and seldom used.

    `attention_tokens`: context at which attention costs as many FLOPs a token as the linear layers; a replay takes
    it from its model, and the default is that of Llama-3.1-8B (13.96 GFLOP / 0.524 MFLOP a pair)."""

    def __init__(self, attention_tokens: float = 26624.0) -> None:
        if not attention_tokens > 0:
            raise ValueError(f"attention_tokens={attention_tokens} is not positive. Give a number of tokens.")
        super().__init__()
        self.attention_tokens = attention_tokens

    def worth(self, extent: Content) -> float:
        return 1.0 + (extent.first_token + extent.tokens / 2) / self.attention_tokens


class TimeToLive:
    """Content lives `ttl_s` after its last use: what dies first.

    So do the prompt caches that providers sell; 5 minutes is usual there.

    With `per_session` above 0, content that was found again after a pause of g seconds lives per_session * g, where
    that is longer: each conversation is kept for the pace it has shown (as Continuum does for agents, arXiv
    2511.02230), at most `most_s`.
    """

    def __init__(self, ttl_s: float = 300.0, per_session: float = 0.0, most_s: float = 3600.0) -> None:
        for name, value in (("ttl_s", ttl_s), ("per_session", per_session), ("most_s", most_s)):
            if not value >= 0:
                raise ValueError(f"{name}={value} is negative. Give 0 or more.")
        self.ttl_s, self.per_session, self.most_s = ttl_s, per_session, most_s

    def lifetime_s(self, extent: Content) -> float:
        if not self.per_session or isnan(extent.gap_s):
            return self.ttl_s
        return max(self.ttl_s, min(self.per_session * extent.gap_s, self.most_s))

    def key(self, extent: Content, now_s: float) -> Any:
        return extent.used_s + self.lifetime_s(extent)


class Belady:
    """Clairvoyant: what the trace needs again latest. A bound, for it reads the future."""

    def __init__(self) -> None:
        self._future: Future | None = None

    def foresee(self, future: Future) -> None:
        self._future = future

    def key(self, extent: Content, now_s: float) -> Any:
        return -(inf if self._future is None else self._future.next_use(extent))
