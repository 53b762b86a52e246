"""KV tiers below the GPU: host memory, SSD, a remote store; what each holds, and how long a load from it takes.

    name:capacity:bandwidth:latency      cpu:64GiB:50GB/s:10us    (of one replica, all its GPUs together)

Content goes to the first tier when it is computed (`write_through`, as vLLM's offloading connector does,
v1/kv_offload of 0.25.1) or when the GPU loses it (`on_eviction`); what a tier loses goes to the next. Each tier is LRU
over ranges of blocks of one stretch, ends first. A look-up goes on where the GPU's hit ends, block by block, in the
fastest tier that has it. A tier sends one load at a time and writes one at a time:

    start = max(now, when the tier has what is asked for, end of its load before)
    end   = start + bytes / bandwidth;  arrival = end + latency

and a request's load is complete when all its tiers' parts are there. The bandwidth of a lower tier is taken end to end
(through host memory or not). Content that was loaded is put into the first tier too. Answers that the trace does not
name are not copied (vLLM's option to offload prompts only).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from llmsim.kvcache import Extent, Held, Hit, KVCache, Node
from llmsim.request import Request

NONE = "none"
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


class TierSpec(NamedTuple):
    name: str
    capacity_bytes: float
    bytes_per_s: float
    latency_s: float


def parse_tiers(text: str) -> list[TierSpec]:
    """Fastest first, separated by commas; ValueError with the fix for what is no tier."""
    specs = [_parse_tier(word.strip()) for word in text.split(",")] if text != NONE else []
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"kv_tiers={text!r}: two tiers have the same name: give each its own")
    return specs


def _parse_tier(text: str) -> TierSpec:
    found = re.fullmatch(
        r"(\w+):([\d.]+)([kmgt]?i?)b:([\d.]+)([kmgt]?i?)b/s:([\d.]+)(s|ms|us|ns)", text, flags=re.IGNORECASE
    )
    if found is None:
        raise ValueError(f"kv_tiers={text!r}: write name:capacity:bandwidth:latency, as cpu:64GiB:50GB/s:10us")
    name, size, size_unit, rate, rate_unit, latency, latency_unit = found.groups()
    try:
        spec = TierSpec(
            name,
            float(size) * _BYTES[size_unit.lower()],
            float(rate) * _BYTES[rate_unit.lower()],
            float(latency) / _PER_SECOND[latency_unit.lower()],
        )
    except (ValueError, KeyError):
        raise ValueError(f"kv_tiers={text!r}: write numbers with units, as cpu:64GiB:50GB/s:10us") from None
    if spec.bytes_per_s <= 0 or spec.capacity_bytes <= 0:
        raise ValueError(f"kv_tiers={text!r}: capacity and bandwidth must be above 0")
    return spec


class Part:
    """Blocks [start, end) of a stretch in a tier, there from `ready_s` on."""

    __slots__ = ("end", "ready_s", "start")

    def __init__(self, start: int, end: int, ready_s: float) -> None:
        self.start, self.end, self.ready_s = start, end, ready_s


class Tier:
    """`blocks` blocks of `block_bytes` bytes; what it loses goes to `below`."""

    def __init__(self, spec: TierSpec, block_bytes: float, below: Tier | None) -> None:
        self.spec, self.below = spec, below
        self.blocks = int(spec.capacity_bytes / block_bytes)
        self.seconds_per_block = block_bytes / spec.bytes_per_s
        self.used_blocks = self.loaded_blocks = self.written_blocks = 0
        self.parts: OrderedDict[Node, Part] = OrderedDict()  # least recently used first
        self._read_s = self._write_s = 0.0  # until when it is busy

    def has(self, node: Node, at: int) -> int:
        """Up to which block of the stretch it has everything from block `at` on; `at` if it lacks that one."""
        part = self.parts.get(node)
        return part.end if part is not None and part.start <= at < part.end else at

    def put(self, node: Node, start: int, end: int, now_s: float) -> None:
        """Write what of these blocks is not there."""
        part = self.parts.get(node)
        if part is not None and (part.end < start or end < part.start):
            self._drop(node, part.end - part.start)  # with a hole between them only the newer part can be of use
            part = None
        if part is None:
            part = self.parts[node] = Part(start, start, now_s)
        more = max(end, part.end) - min(start, part.start) - (part.end - part.start)
        self.parts.move_to_end(node)
        if not more:
            return
        part.start, part.end = min(start, part.start), max(end, part.end)
        self._write_s = max(now_s, self._write_s) + more * self.seconds_per_block
        part.ready_s = max(part.ready_s, self._write_s + self.spec.latency_s)
        self.written_blocks += more
        self.used_blocks += more
        while self.used_blocks > self.blocks:
            oldest, lost = next(iter(self.parts.items()))
            size = min(lost.end - lost.start, self.used_blocks - self.blocks)
            if self.below is not None:
                self.below.put(oldest, lost.end - size, lost.end, now_s)
            self._drop(oldest, size)

    def _drop(self, node: Node, blocks: int) -> None:
        """Lose blocks from the end of a stretch's part."""
        part = self.parts[node]
        part.end -= blocks
        self.used_blocks -= blocks
        if part.end <= part.start:
            del self.parts[node]

    def touch(self, node: Node) -> None:
        if node in self.parts:
            self.parts.move_to_end(node)

    def read(self, blocks: int, ready_s: float, now_s: float) -> float:
        """When blocks that are there from `ready_s` on arrive, if they are asked for now."""
        self._read_s = max(now_s, ready_s, self._read_s) + blocks * self.seconds_per_block
        self.loaded_blocks += blocks
        return self._read_s + self.spec.latency_s


class TieredKV(KVCache):
    """A KV cache (vLLM's order on the GPU) over tiers. `clock()` is the simulation's time, s."""

    def __init__(
        self,
        total_blocks: int,
        block_tokens: int,
        *,
        prefix_block_tokens: int,
        specs: list[TierSpec],
        block_bytes: float,
        write: str,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        super().__init__(total_blocks, block_tokens, prefix_block_tokens=prefix_block_tokens)
        self.clock = clock
        self.write_through = write == "write_through"
        self.tiers: list[Tier] = []
        for spec in reversed(specs):
            self.tiers.insert(0, Tier(spec, block_bytes, self.tiers[0] if self.tiers else None))
            if not self.tiers[0].blocks:
                raise ValueError(f"kv_tiers: {spec.name} is smaller than one KV block of {block_bytes:.0f} bytes")

    # ---------------------------------------------------------------------------------------------------- looking up

    def match(self, request: Request, tokens: int) -> Hit:
        """The GPU's hit; for a request whose KV a tier could load, one that fits nowhere: it is loaded first."""
        hit = super().match(request, tokens)
        if self.extension(request, hit, tokens):
            hit = Hit()
            hit.idle_blocks = self.total_blocks + 1
        return hit

    def gpu_match(self, request: Request, tokens: int) -> Hit:
        return super().match(request, tokens)

    def extension(self, request: Request, hit: Hit, tokens: int) -> list[tuple[Tier, Node, int, int]]:
        """(tier, stretch, from, to) of the blocks behind a GPU hit that tiers hold."""
        held: Held | None = request.held
        if held is None:
            return []
        found: list[tuple[Tier, Node, int, int]] = []
        per_node = self._blocks_per_id
        limit = (tokens - 1) // self.block_tokens
        public = min(limit, held.public_blocks)
        at = hit.blocks
        while at < public:
            index, start = divmod(at, per_node)
            upto = self._in_tiers(held.path[index], start, min(per_node, public - index * per_node), found)
            at = index * per_node + upto
            if upto < per_node:
                break
        if held.private is not None and at >= held.public_blocks:
            self._in_tiers(held.private, at - held.public_blocks, limit - held.public_blocks, found)
        return found

    def _in_tiers(self, node: Node, at: int, upto: int, found: list[tuple[Tier, Node, int, int]]) -> int:
        while at < upto:
            for tier in self.tiers:
                end = min(tier.has(node, at), upto)
                if end > at:
                    found.append((tier, node, at, end))
                    at = end
                    break
            else:
                break
        return at

    # -------------------------------------------------------------------------------------------------------- moving

    def load(self, parts: list[tuple[Tier, Node, int, int]]) -> float:
        """Begin to load; returns when all of it is on the GPU. Before blocks are taken: what the GPU loses for them may
        push out of the tier what is on its way."""
        now_s, done_s = self.clock(), 0.0
        for tier, node, start, end in parts:
            done_s = max(done_s, tier.read(end - start, tier.parts[node].ready_s, now_s))
        for tier, node, start, end in reversed(parts):  # beginnings are used last: they are the last to be lost
            tier.touch(node)
            if tier is not self.tiers[0]:
                self.tiers[0].put(node, start, end, now_s)
        return done_s

    def prefetch(self, request: Request, tokens: int) -> None:
        """Move what lower tiers hold of a request's prompt to the first one, before it is asked for."""
        hit = self.gpu_match(request, tokens)
        for tier, node, start, end in reversed(self.extension(request, hit, tokens)):
            source = tier.parts.get(node)  # what comes up may push it out
            if tier is not self.tiers[0] and source is not None:
                arrival_s = tier.read(end - start, source.ready_s, self.clock())
                self.tiers[0].put(node, start, end, self.clock())
                part = self.tiers[0].parts.get(node)
                if part is not None:
                    part.ready_s = max(part.ready_s, arrival_s)

    def _store_piece(self, held: Held, node: Node, start: int, end: int) -> None:
        super()._store_piece(held, node, start, end)
        if self.write_through:
            self.tiers[0].put(node, start, end, self.clock())

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        held: Held | None = request.held
        super().release(request, blocks, full_tokens, resumes=resumes, keep_content=keep_content)
        if held is not None and self.write_through:
            for node in reversed(held.path):
                self.tiers[0].touch(node)

    def _evict(self, blocks: int) -> None:
        if not self.write_through:
            left, extent = blocks, self._end.newer
            while left > 0:
                lost = min(left, extent.end - extent.start)
                self._save(extent, lost)
                left -= lost
                extent = extent.newer
        super()._evict(blocks)

    def _save(self, extent: Extent, blocks: int) -> None:
        if extent.node is not None:
            self.tiers[0].put(extent.node, extent.end - blocks, extent.end, self.clock())
