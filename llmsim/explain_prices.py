"""To whom an iteration's GPU time is due: it is priced alone, with the decodes, and as it was.

    own      = T(own) / T          T(x): what the cost model asks for an iteration of x; T: of the whole
    decodes  = (T(own + decodes) - T(own)) / T
    prompts  = (T - T(own + decodes)) / T

The order matters a little: what decodes and prompts share (weights that are read once) is counted for the first of the
three. What the engine's clock says beyond T (lower clocks after a chunk) is spread in the same proportion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llmsim.cost import CostModel
from llmsim.explain_record import Recorder

Shares = tuple[float, float, float]  # of an iteration's GPU time: own, others' decodes, others' prompts


class Row(NamedTuple):
    """An iteration, or a run of decodes, as the record has it."""

    steps: int
    decodes: int  # of each step, whose tokens are wanted
    seqs: int
    kv_tokens: int
    drafts: int
    made: int  # tokens of all steps
    gpu_s: float
    gpu_end_s: float
    chunks: list[tuple[int, int, int]]  # request, tokens, computed before


class Prices:
    """What the rows of one record would take with less in them. Rows are looked up again and again: they are kept."""

    def __init__(self, recorder: Recorder, cost: CostModel) -> None:
        self.recorder, self.cost = recorder, cost
        self._table = recorder.tables()[0]
        self._speculates = hasattr(cost, "drafts")
        self._rows: dict[int, Row] = {}
        self._whole: dict[int, tuple[float, float]] = {}

    def row(self, at: int) -> Row:
        row = self._rows.get(at)
        if row is None:
            line = self._table[at]
            facts: dict[str, Any] = {name: line[name].item() for name in Row._fields[:-1]}
            row = self._rows[at] = Row(**facts, chunks=self.recorder.chunks_of(at))
        return row

    def shares(self, at: int, own: tuple[int, int] | None) -> Shares:
        """Of the row's GPU time: what is due to `own` (tokens of a chunk, or 0 for a decode; context), to the other
        decodes, and to the other prompts."""
        row = self.row(at)
        seqs, kv_tokens, steps, drafts = row.seqs, row.kv_tokens, row.steps, row.drafts
        whole_s, decodes_s = self._both(at, row)
        if whole_s <= 0.0:
            return (0.0, 0.0, 0.0) if own is None else (1.0, 0.0, 0.0)
        if own is None:
            alone_s, beside_s = 0.0, decodes_s
        elif own[0] > 1:
            alone_s = self._price([own], 0, 0, 1, 0)
            beside_s = self._price([own], seqs, kv_tokens, 1, drafts) if seqs else alone_s
        else:
            alone_s, beside_s = self._price([], 1, own[1], steps, round(drafts / max(seqs, 1))), decodes_s
        alone_s = min(alone_s, whole_s)
        beside_s = min(max(beside_s, alone_s), whole_s)
        return alone_s / whole_s, (beside_s - alone_s) / whole_s, (whole_s - beside_s) / whole_s

    def _both(self, at: int, row: Row) -> tuple[float, float]:
        """Of the whole row, and of its decodes alone."""
        found = self._whole.get(at)
        if found is None:
            # the tail of a prompt is a decode to the GPU, and counted in seqs
            chunks = [(new, before) for _, new, before in row.chunks if new != 1]
            decodes_s = self._price([], row.seqs, row.kv_tokens, row.steps, row.drafts)
            whole_s = self._price(chunks, row.seqs, row.kv_tokens, 1, row.drafts) if chunks else decodes_s
            found = self._whole[at] = whole_s, decodes_s
        return found

    def _price(self, chunks: list[tuple[int, int]], seqs: int, kv_tokens: int, steps: int, drafts: int) -> float:
        cost: Any = self.cost
        if self._speculates:
            cost.drafts = drafts
        try:
            if chunks:
                return float(cost.mixed_s(chunks, seqs, kv_tokens))
            return float(cost.decode_ramp(seqs, kv_tokens).elapsed_s(steps)) if seqs else 0.0
        finally:
            if self._speculates:
                cost.drafts = None
