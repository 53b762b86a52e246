"""What the iterations of a speculating engine cost (`llmsim.drafting` says what speculation is).

GPU seconds of an iteration of s decodes with D drafts in all (D = s k where nothing is cut), kv cached tokens:

    verify    T(s, kv) + rows(s + D) - rows(s), rows being linear layers, what lies between, and the LM head for each
              row; attention reads the cache once for all rows of a request, or takes a pair each if that is longer
    draft     draft_model: k decodes of the draft model, the first of them with 1 + k rows a request, and its prompts
              eagle, mtp: the same of `draft_layers` layers and the LM head

Graphs: 1 + k rows a request are vLLM's uniform decode, a full graph up to the largest capture size
(`llmsim.cost.graphs`, with max_num_seqs (1 + k) rows); a batch in which some have fewer drafts is as one with
prompts. Left out: rejection sampling, drafts of draft models in eager launches, trees of drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmsim.cost import CostModel, Ramp
from llmsim.cost.graphs import Graphs
from llmsim.cost.terms import Parts, termed
from llmsim.drafting import Speculation
from llmsim.hardware import Model, find_model


def drafter_bytes(model: Model, own: Speculation, kv_dtype: str, tensor_parallel: int) -> tuple[float, float]:
    """On one rank: its weights in 2-byte numbers, and its KV cache for each token. A head shares the model's
    embeddings.
    """
    if own.on_host:
        return 0.0, 0.0
    if own.model is not None:
        small = find_model(own.model)
        return small.weight_bytes("bfloat16", tensor_parallel), small.kv_bytes_per_token(kv_dtype, tensor_parallel)
    layers = own.draft_layers
    weights = 2.0 * model.dense_linear_params(tensor_parallel) / model.layers * layers
    return weights, model.kv_layer_bytes(kv_dtype, tensor_parallel)


class SpeculativeCost:
    """Stands before the cost model of the engine without drafts. `drafts`: of the iteration to be priced, all requests'
    together; None: as many as they have on average."""

    def __init__(
        self, inner: CostModel, model: Model, speculation: Speculation, graphs: Graphs, draft: CostModel | None
    ) -> None:
        self._inner, self.speculation = termed(inner), speculation
        self._draft = None if draft is None else termed(draft)
        self._graphs = graphs
        self.kind, self.origin = inner.kind, f"{self._inner.origin} + drafts"
        self.pair_s = self._inner.pair_s
        self.tokens_per_step = speculation.tokens_per_step
        self.drafts: int | None = None
        self._share = speculation.draft_layers / model.layers
        self._head_share = model.lm_head_params / (model.lm_head_params + model.linear_params)
        self._slopes: dict[int, tuple[float, float, float]] = {}
        self._decodes: dict[tuple[int, int], float] = {}
        self._drafting: dict[int, float] = {}
        profile = getattr(inner, "profile", None)
        if profile is not None:
            self.profile = profile
        host = inner.host
        if speculation.on_host:
            host = replace(host, update_per_output_s=host.update_per_output_s + speculation.draft_host_s)
        else:
            more_s = speculation.drafts * speculation.draft_host_s
            full_s, piecewise_s, eager_s = host.launch_s
            host = replace(host, launch_s=(full_s + more_s, piecewise_s + more_s, eager_s + more_s))
        self.host = host
        self.skew_share = getattr(inner, "skew_share", None)
        self.reads_longest = getattr(inner, "reads_longest", False)
        self.label = (
            f"{inner.label}; speculating by {speculation.method}"
            + (f" {speculation.model}" if speculation.model else "")
            + f", {speculation.drafts} drafts, {self.tokens_per_step:.2f} tokens a verification (acceptance as given)"
        )

    def _drafted(self, seqs: int) -> int:
        own = self.speculation
        return round(seqs * own.drafts * own.proposal_rate) if self.drafts is None else self.drafts

    def mode(self, tokens: int, chunks: int) -> int:
        drafts = self._drafted(tokens)
        uniform = not chunks and drafts == tokens * self.speculation.drafts
        return self._graphs.mode(tokens + drafts, 0 if uniform else max(chunks, 1))

    # ---- verification -----------------------------------------------------------------------------------------

    def _slope(self, seqs: int) -> tuple[float, float, float]:
        """Of `seqs` decodes: seconds without context; per cached token; the same in the draft model."""
        if seqs not in self._slopes:
            far, draft_s = seqs * 4096, 0.0
            near_s = self._inner.decode_ramp(seqs, 0).first_s
            token_s = (self._inner.decode_ramp(seqs, far).first_s - near_s) / far
            if self._draft is not None:
                draft_s = (self._draft.decode_ramp(seqs, far).first_s - self._draft.decode_ramp(seqs, 0).first_s) / far
            elif not self.speculation.on_host:
                draft_s = self._share * token_s
            self._slopes[seqs] = near_s, token_s, draft_s
        return self._slopes[seqs]

    def _more_attention_s(self, seqs: int, drafts: int, kv_tokens: float) -> float:
        """What (query, key) pairs take beyond reading the cache once."""
        if not seqs:
            return 0.0
        token_s = self._slope(seqs)[1]
        return max(self.pair_s * (1.0 + drafts / seqs) - token_s, 0.0) * kv_tokens

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        drafts = self._drafted(seqs)
        near_s, token_s, draft_s = self._slope(seqs)
        fixed_s = self._decodes.get((seqs, drafts))
        if fixed_s is None:
            more_s = self._inner.rows_s(seqs + drafts, seqs + drafts) - self._inner.rows_s(seqs, seqs)
            fixed_s = self._decodes[seqs, drafts] = near_s + more_s + self._draft_s(seqs, 0)
        token_s = max(token_s, self.pair_s * (1.0 + drafts / seqs)) + self.speculation.drafts * draft_s
        return Ramp(fixed_s + token_s * kv_tokens, 0.0)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, *longest: float) -> float:
        drafts = self._drafted(seqs)
        seconds = self._inner.mixed_s(chunks, seqs, kv_tokens, *longest)
        if drafts:
            tokens, requests = seqs + sum(new for new, _ in chunks), seqs + len(chunks)
            seconds += self._inner.rows_s(tokens + drafts, requests + drafts) - self._inner.rows_s(tokens, requests)
            seconds += self._more_attention_s(seqs, drafts, kv_tokens)
        if self.speculation.on_host:
            return seconds
        held = kv_tokens + sum(new + done for new, done in chunks)
        seconds += self._draft_s(seqs + len(chunks), held)
        if self._draft is not None:
            return seconds + self._draft.mixed_s(chunks, 0, 0)
        return seconds + self._share * self._inner.mixed_s(chunks, 0, 0)

    # ---- drafts -----------------------------------------------------------------------------------------------

    def _draft_s(self, requests: int, kv_tokens: float) -> float:
        """k drafts of each, one after the other; the first step also passes what the verification before accepted."""
        own = self.speculation
        if own.on_host or not requests:
            return 0.0
        fixed_s = self._drafting.get(requests)
        if fixed_s is None:
            first_rows = (1 + own.drafts) * requests
            if self._draft is not None:
                more_s = self._draft.rows_s(first_rows, requests) - self._draft.rows_s(requests, requests)
                fixed_s = own.drafts * self._draft.decode_ramp(requests, 0).first_s + more_s
            else:
                fixed_s = self._head_step_s(first_rows, requests)
                fixed_s += (own.drafts - 1) * self._head_step_s(requests, requests)
            self._drafting[requests] = fixed_s
        return fixed_s + own.drafts * self._slope(requests)[2] * kv_tokens

    def _head_step_s(self, rows: int, requests: int) -> float:
        """One pass of a drafting head without context."""
        body_s, head_s = self._inner.rows_s(rows, requests), self._inner.head_s(requests)
        body_s -= head_s
        if not head_s:  # a profile without kernels has it within the linear layers
            head_s = self._head_share * body_s
            body_s -= head_s
        attention_s = self._slope(requests)[0] - self._inner.rows_s(requests, requests)
        return self._share * (body_s + attention_s) + head_s

    # ---- terms ------------------------------------------------------------------------------------------------

    def rows_s(self, tokens: int, requests: int) -> float:
        return self._inner.rows_s(tokens, requests)

    def head_s(self, requests: int) -> float:
        return self._inner.head_s(requests)

    def parts(self, tokens: int, requests: int, seqs: int) -> Parts:
        drafts = self._drafted(seqs)
        parts = self._inner.parts(tokens + drafts, requests + drafts, seqs)
        return parts._replace(draft_s=self._draft_s(requests, 0))

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        return self._inner.prompts_s(chunks, tokens, context_tokens, pairs)

    def clocked_s(self, seconds: float, seqs: int) -> float:
        return self._inner.clocked_s(seconds, seqs)

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        """All that speculate: no engine was recorded with drafts."""
        return (iterations["seqs"] > 0) | self._inner.outside_measured(iterations)
