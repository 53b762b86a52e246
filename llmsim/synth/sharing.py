"""Prompts that begin alike: which prefix each request carries, and how much an infinite cache could reuse.

`repetition` (vLLM's prefix_repetition: floor(n / prefixes) requests of each, shuffled), `groups` (SGLang's
generated-shared-prefix; Zipf over the groups as an option) and `buckets` (GuideLLM's: weight, count, tokens). The
request's own text comes after the prefix. With c_g requests of group g and blocks of B tokens, an infinite cache finds
sum_g (c_g - 1) floor(tokens_g / B) blocks; drawn at random, E[c_g - 1 if c_g > 0] = n p_g - (1 - (1 - p_g)^n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsim.readers.rows import FloatArray, IntArray
from llmsim.synth.spec import parse


@dataclass(frozen=True)
class Prefixes:
    """Groups of requests with a common prefix: its tokens, and each group's chance or exact share."""

    tokens: IntArray
    chance: FloatArray
    exact: bool  # every group gets the same number of requests, shuffled

    def assign(self, requests: int, rng: np.random.Generator) -> IntArray:
        """The group of each request; exact groups leave a remainder out, so there may be fewer than asked."""
        if not self.exact:
            return rng.choice(len(self.tokens), size=requests, p=self.chance).astype(np.int64)
        each = requests // len(self.tokens)
        if each == 0:
            raise ValueError(
                f"requests={requests} is below the number of prefixes ({len(self.tokens)}): lower prefixes"
            )
        return np.asarray(rng.permutation(np.repeat(np.arange(len(self.tokens)), each)))

    def expected_hit_blocks(self, requests: int, block_tokens: int) -> float:
        """Blocks an infinite prefix cache finds, in closed form."""
        if self.exact:
            repeats = np.full(len(self.tokens), requests // len(self.tokens) - 1.0)
        else:
            repeats = requests * self.chance - (1 - (1 - self.chance) ** requests)
        return float((repeats * (self.tokens // block_tokens)).sum())


def prefixes(text: str) -> Prefixes:
    spec = parse(text)
    if spec.name == "repetition":
        count, size = spec.count("prefixes", 10), spec.count("tokens", 256)
        made = Prefixes(np.full(count, size), np.full(count, 1 / count), exact=True)
    elif spec.name == "groups":
        count, size = spec.count("groups", 64), spec.count("tokens", 2048)
        theta = spec.number("zipf", 0.0, least=0)
        weights = np.arange(1, count + 1, dtype=np.float64) ** -theta
        exact = bool(spec.count("exact", 0, least=0))
        if exact and theta:
            raise ValueError(f"{text!r}: exact groups are equally large: leave zipf or exact out")
        made = Prefixes(np.full(count, size), weights / weights.sum(), exact=exact)
    elif spec.name == "buckets":
        weights = np.array(spec.numbers("weights"))
        counts, sizes = np.array(spec.numbers("counts"), dtype=int), np.array(spec.numbers("tokens"), dtype=int)
        if not len(weights) == len(counts) == len(sizes) or (counts < 1).any() or not weights.sum() > 0:
            raise ValueError(f"{text!r}: weights, counts (at least 1) and tokens need as many entries")
        chance = np.repeat(weights / weights.sum() / counts, counts)
        made = Prefixes(np.repeat(sizes, counts), chance / chance.sum(), exact=False)
    else:
        raise ValueError(f"prefixes {text!r}: {spec.name!r} is not one of repetition, groups, buckets, tree")
    spec.done()
    return made
