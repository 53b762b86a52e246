"""A workload refitted to the prefix tree of a trace, larger or smaller than the original.

Blocks that more than one request of the trace goes through are its core tree; what follows them is a request's own. A
new request takes the path and the lengths of a random request of the trace, under one of `roots` copies of the tree
(more copies: less sharing), with the shared part `prefix` times and its own part `prompt` times as long. The idea is
that of Dynamo's `datagen synthesize`; arrivals come from any arrival process.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np

from llmsim.readers.rows import Blocks, IntArray
from llmsim.synth.spec import parse
from llmsim.trace import load_trace


def refit(text: str, requests: int, rng: np.random.Generator) -> tuple[IntArray, IntArray, int, Blocks]:
    """(prompt tokens, output tokens, block tokens, block ids) of ``tree:path=...``."""
    spec = parse(text)
    trace = load_trace(spec.text_of("path"))
    roots, prefix = spec.count("roots", 1), spec.count("prefix", 1)
    own = spec.number("prompt", 1.0, above=0)
    spec.done()
    if trace.block_ids is None:
        raise ValueError(f"{text!r}: {trace.name} has no prefix ids (hash_ids) to refit")
    size = trace.block_tokens
    visits = Counter(chain.from_iterable(trace.block_ids))
    core = [next((k for k, block in enumerate(ids) if visits[block] < 2), len(ids)) for ids in trace.block_ids]
    names: dict[object, int] = {}
    for ids, shared in zip(trace.block_ids, core, strict=True):
        for block in ids[:shared]:
            names.setdefault(block, len(names))
    # Core blocks of copy r are numbered from r * len(names) * prefix; a request's own blocks come after all copies.
    fresh = roots * len(names) * prefix
    chosen = rng.integers(len(trace), size=requests).tolist()
    copies = rng.integers(roots, size=requests).tolist()
    prompts, blocks = np.empty(requests, dtype=np.int64), []
    for row, (source, copy) in enumerate(zip(chosen, copies, strict=True)):
        shared_tokens = min(core[source] * size, int(trace.prompt_tokens[source]))
        # Only whole blocks of the shared part repeat; a last block that is partial is the request's own.
        whole = shared_tokens // size
        rest = max(round((int(trace.prompt_tokens[source]) - whole * size) * own), 0 if whole else 1)
        prompts[row] = whole * size * prefix + rest
        base = copy * len(names) * prefix
        shared_ids = [
            base + names[block] * prefix + k for block in trace.block_ids[source][:whole] for k in range(prefix)
        ]
        needed = -(-int(prompts[row]) // size) - len(shared_ids)
        blocks.append((*shared_ids, *range(fresh, fresh + needed)))
        fresh += needed
    return prompts, trace.output_tokens[chosen], size, blocks
