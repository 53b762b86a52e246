"""One request's critical path: spans that follow one another without a gap from its send to its last token.

    phase      kind        what the request does in it
    queue      client      is on its way to the engine (the client side)
               schedule    is schedulable; the host schedules next when the iterations under way allow
               queue       waits; the reason names the resource that was short at each schedule (explain_record), or
                           `order`: a request that came later was admitted, or stood at the head, at that schedule
               loading     its KV comes from a lower tier
    prefill    prefill     iterations that compute chunks of its prompt
               held        half-prefilled, in an iteration that has no chunk of it
    decode     decode      iterations that make its tokens, and those of others' prompts alone between two of them
               sat-out     it keeps its slot and makes no token in an iteration in which others do
               paused      set aside by the policy
    preempted  queue       waits to be admitted again; the other kinds likewise, from the last token before the
                           preemption to the next one
               recompute   iterations that compute again what it had
    handout                its answer is complete and withheld

Seconds of a span in which it computes, or waits for the next schedule, are split four ways, and add up to the span:

    own_s      what the iteration would take on the GPU with this request alone
    decodes_s  what the other requests' decodes add
    prompts_s  what the other requests' prompts add
    host_s     the rest: the GPU waited for the host, clocks, copies; results on their way back

(`llmsim.explain_prices`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

ORDER = "order"


@dataclass
class Span:
    """Seconds in which one thing happened to a request."""

    request: int
    replica: int
    start_s: float
    end_s: float
    phase: str
    kind: str
    reason: str = ""
    own_s: float = 0.0
    decodes_s: float = 0.0
    prompts_s: float = 0.0
    host_s: float = 0.0
    iterations: int = 0
    decoded: int = 0  # decodes in them, of all requests
    prompt_tokens: int = 0  # of others, in the same iterations
    who: int = -1  # whose lack of the resource held the queue up; of a recompute: for whom it was preempted
    blocks: tuple[int, int] = (0, 0)  # free and needed, when the wait began
    preemptions: int = 0  # in the replica, while it waited

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def divided(self) -> bool:
        """Whether its seconds are split four ways."""
        return self.iterations > 0 or self.kind == "schedule"

    @property
    def batch(self) -> float:
        """Mean decodes of its iterations."""
        return self.decoded / self.iterations if self.iterations else 0.0

    def shorten(self, end_s: float) -> None:
        """What was under way is cut off; its parts in proportion."""
        share = (end_s - self.start_s) / self.length_s
        self.end_s = end_s
        for name in ("own_s", "decodes_s", "prompts_s", "host_s"):
            setattr(self, name, share * getattr(self, name))


@dataclass(frozen=True)
class Life:
    """A request's spans; `facts`: its row of the requests table."""

    request: int
    facts: dict[str, Any]
    spans: tuple[Span, ...]
    ahead: int  # requests that waited when it became schedulable
    preempted_for: tuple[int, ...] = field(default=())

    def of(self, metric: str) -> tuple[Span, ...]:
        """The spans that a latency consists of: e2el all, ttft those to the first token, tpot those after it."""
        first_s = self.facts["first_token_s"]
        if metric == "e2el":
            return self.spans
        return tuple(span for span in self.spans if (span.start_s < first_s) == (metric == "ttft"))

    def parts_s(self, metric: str = "e2el") -> dict[str, float]:
        """Seconds by part: PHASE.KIND for waits (with `.REASON`), PHASE.KIND.own, .decodes, .prompts, .host else."""
        parts: dict[str, float] = {}
        for span in self.of(metric):
            name = f"{span.phase}.{span.kind}"
            if span.divided:
                pieces = {"own": span.own_s, "decodes": span.decodes_s, "prompts": span.prompts_s, "host": span.host_s}
                for piece, seconds in pieces.items():
                    parts[f"{name}.{piece}"] = parts.get(f"{name}.{piece}", 0.0) + seconds
            else:
                name = f"{name}.{span.reason}" if span.reason else name
                parts[name] = parts.get(name, 0.0) + span.length_s
        return parts


def merged(spans: Sequence[Span]) -> Iterator[Span]:
    """Neighbours of one kind and reason as one; `who` is then the one that it was for the longest."""
    for _, same in groupby(spans, key=lambda span: (span.phase, span.kind, span.reason)):
        group = list(same)
        whole = replace(group[0], end_s=group[-1].end_s)
        for name in ("own_s", "decodes_s", "prompts_s", "host_s", "iterations", "decoded", "prompt_tokens"):
            setattr(whole, name, sum(getattr(span, name) for span in group))
        held_s: dict[int, float] = {}
        for span in group:
            held_s[span.who] = held_s.get(span.who, 0.0) + span.length_s
        whole.who = max(held_s, key=lambda who: held_s[who])
        yield whole
