"""Which iterations run as a CUDA graph, and how many tokens they are padded to (vLLM 0.25.1).

    capture sizes   1, 2, 4; 8 to 248 in steps of 8; 256 and up in steps of 16; none above
                    min(2 * max_num_seqs, 512, max_num_batched_tokens), which is itself one if it is the last of these
    full graph      every request has one token, and the padded count is at most max_num_seqs
    piecewise       otherwise, up to the largest size: all but attention is a graph
    eager           above the largest size; no padding

With "full_decode_only" iterations with prompts are eager too: all that is left where the model is not compiled, since
piecewise graphs are cut out of compiled code (small ones are padded here nevertheless: at most 15 rows too many).

Sources: config/vllm.py, config/compilation.py, v1/cudagraph_dispatcher.py. Not modelled: capture sizes set by hand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llmsim.cost import EAGER, FULL, PIECEWISE

LARGEST_CAPTURE = 512
CUDAGRAPH_MODES = ("full_and_piecewise", "full_decode_only", "piecewise", "none")
FULL_DECODES = ("full_and_piecewise", "full_decode_only")


def capture_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[int, ...]:
    largest = min(2 * max_num_seqs, LARGEST_CAPTURE, max_num_batched_tokens)
    grid = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_CAPTURE + 1, 16)]
    sizes = [size for size in grid if size <= largest]
    if max_num_batched_tokens <= largest and max_num_batched_tokens not in sizes:
        sizes.append(max_num_batched_tokens)
    return tuple(sizes)


class Graphs:
    """The graphs of one engine. `sizes` is empty with cudagraph "none"."""

    def __init__(self, sizes: Sequence[int], max_num_seqs: int, cudagraph: str = "full_and_piecewise") -> None:
        if cudagraph not in CUDAGRAPH_MODES:
            raise ValueError(f"cudagraph={cudagraph!r} is not a mode. Use one of {', '.join(CUDAGRAPH_MODES)}")
        if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
            raise ValueError(f"cudagraph capture sizes {list(sizes)} must be whole numbers above 0 in rising order")
        self.sizes = tuple(sizes) if cudagraph != "none" else ()
        self.max_num_seqs = max_num_seqs
        self.largest = self.sizes[-1] if self.sizes else 0
        # up to as many tokens attention may cut sequences into many pieces (llmsim.cost.tiles)
        self.split_tokens = self.largest if cudagraph in FULL_DECODES else 0
        self._padded = [0] + [self.sizes[bisect_left(self.sizes, n)] for n in range(1, self.largest + 1)]
        self._chunked = EAGER if cudagraph == "full_decode_only" else PIECEWISE
        # by token count, for iterations whose requests have one token each
        self._uniform = [
            FULL if cudagraph in FULL_DECODES and padded <= max_num_seqs else self._chunked for padded in self._padded
        ]

    @classmethod
    def of_engine(cls, max_num_seqs: int, max_num_batched_tokens: int, cudagraph: str = "full_and_piecewise") -> Graphs:
        return cls(capture_sizes(max_num_seqs, max_num_batched_tokens), max_num_seqs, cudagraph)

    def mode(self, tokens: int, chunks: int) -> int:
        """`chunks`: requests of the iteration that have more than one token."""
        if tokens > self.largest:
            return EAGER
        return self._chunked if chunks else self._uniform[tokens]

    def padded(self, tokens: int) -> int:
        """Rows the linear layers compute."""
        return tokens if tokens > self.largest else self._padded[tokens]
