"""One request's critical path, found in the record of its replica: from event to event of its trail.

What spans there are and how their seconds are divided: `llmsim.explain_spans`. A wait is cut at every answer of the
policy that left the request waiting. An iteration counts from when clients saw the tokens of the one before it to when
they saw its own; the first after an admission from the schedule that admitted, and there the time until the GPU is
through with the iteration before belongs to what that one held. A wait for the next schedule belongs to what the GPU
computes meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from math import isnan, nan
from typing import Any

from llmsim.explain_prices import Prices
from llmsim.explain_record import RESOURCES, Event, Trail
from llmsim.explain_spans import ORDER, Life, Span, merged
from llmsim.metrics import Columns

__all__ = ["Life", "Span", "life_of"]


def life_of(request: int, requests: Columns, prices: Prices) -> Life:
    """The spans of one answered request of the replica whose record `prices` has.

    Raises ValueError for a request that was rejected or that the recorder was not asked about.
    """
    facts = {name: column[request].item() for name, column in requests.items()}
    trail = prices.recorder.trails.get(request)
    if trail is None or isnan(facts["finish_s"]):
        raise ValueError(f"request {request} was rejected: there is no latency to explain")
    return _Walk(request, facts, trail, prices).life()


class _Walk:
    """From event to event of one trail; `now_s` is how far the path is explained."""

    def __init__(self, request: int, facts: dict[str, Any], trail: Trail, prices: Prices) -> None:
        self.request, self.facts, self.trail, self.prices = request, facts, trail, prices
        self.recorder = prices.recorder
        self.spans: list[Span] = []
        self.now_s: float = facts["arrival_s"]
        self.finish_s: float = facts["finish_s"]
        self.token_s = nan  # when its last token so far was seen
        self.context = 0  # tokens whose KV it has
        self.decoding = self.again = False  # again: it computes what it had before a preemption
        self.since_s = nan  # of a preemption that no token has followed yet
        self.preempted: list[tuple[float, float]] = []
        self.preempted_for: list[int] = []

    def life(self) -> Life:
        trail = self.trail
        self._step_to(trail.ready_s, "client")
        state, since_s, row = "waiting", trail.ready_s, 0
        for event in trail.events:
            if state == "running" and event.row > trail.end_row >= row:
                break  # its last token was on its way: what followed did not delay it
            if state == "waiting":
                self._wait(since_s, event.time_s)
            elif state == "parked":
                loading = not self.facts["scheduled_s"] < event.time_s
                self._step_to(event.time_s, "loading" if loading else "paused")
            else:
                self._iterate(row, event.row)
            if event.what == "vacated":
                self._vacated(event)
            state = {"vacated": "waiting", "parked": "parked"}.get(event.what, "running")
            since_s, row = event.time_s, event.row
            if state == "running":
                self.decoding, self.context = event.decoding, event.computed
        self._iterate(row, trail.end_row + 1)
        self._step_to(self.finish_s, "handout")
        self._name_phases()
        spans = tuple(merged(self.spans))
        waits = self.recorder.tables()[2]
        for span in spans:
            if span.kind == "queue":
                span.preemptions = int(waits["preempted"][self.recorder.waits_between(span.start_s, span.end_s)].sum())
        return Life(self.request, self.facts, spans, trail.ahead, tuple(self.preempted_for))

    def _step_to(self, end_s: float, kind: str, reason: str = "", **facts: Any) -> Span | None:
        """What it did until `end_s`; nothing if that is past."""
        end_s = min(end_s, self.finish_s)
        if not end_s > self.now_s:
            return None
        span = Span(self.request, int(self.facts["replica"]), self.now_s, end_s, "", kind, reason, **facts)
        self.spans.append(span)
        if kind == "schedule":
            self._divide_by_others(span)
        self.now_s = end_s
        return span

    # ---- waits

    def _wait(self, since_s: float, until_s: float) -> None:
        """From `since_s`, when it began to wait, to the schedule that let it in."""
        waits, part = self.recorder.tables()[2], self.recorder.waits_between(since_s, until_s)
        for at in range(part.start, part.stop):
            wait = waits[at]
            self._step_to(float(wait["time_s"]), "schedule")  # before the first of them
            end_s = until_s if at + 1 == part.stop else float(waits["time_s"][at + 1])
            overtaken = wait["latest_s"] > self.facts["arrival_s"]
            reason = ORDER if overtaken else RESOURCES[wait["resource"]]
            blocks = int(wait["free_blocks"]), int(wait["needed_blocks"])
            self._step_to(end_s, "queue", reason, who=int(wait["blocked"]), blocks=blocks)
        self._step_to(until_s, "schedule")

    def _vacated(self, event: Event) -> None:
        """Preempted, with a token on its way (the wait begins when that is seen) or without."""
        if not self.decoding:  # what was under way is lost
            while self.spans and self.spans[-1].start_s >= event.time_s:
                self.spans.pop()
            if self.spans and self.spans[-1].end_s > event.time_s:
                self.spans[-1].shorten(event.time_s)
            self.now_s = min(self.now_s, event.time_s)
        if isnan(self.since_s):
            self.since_s = event.time_s if isnan(self.token_s) else self.token_s
        self.preempted_for.append(event.who)
        self.again = True

    # ---- iterations

    def _iterate(self, first: int, stop: int) -> None:
        """Rows first .. stop-1, in which it holds a slot and is not set aside."""
        trail, prices = self.trail, self.prices
        for row in range(first, min(stop, trail.end_row + 1)):
            chunk = trail.chunks.get(row)
            if chunk is not None:
                tokens, computed, last = chunk
                self._computes(row, "recompute" if self.again else "prefill", (tokens, computed), row == first)
                self.context = tokens + computed
                if last:
                    self._makes_token(row)
            elif not self.decoding:
                self._computes(row, "held", None, row == first)
            elif row in trail.sat_out:
                self._computes(row, "sat-out", None, row == first)
            elif not prices.row(row).decodes:
                self._computes(row, "decode", None, row == first)
            else:
                self._computes(row, "decode", (0, self.context), row == first)
                self.context += round(prices.row(row).made / prices.row(row).decodes)
                self._makes_token(row)

    def _makes_token(self, row: int) -> None:
        self.decoding, self.again = True, False
        self.token_s = self.recorder.seen_s[row]
        if not isnan(self.since_s):
            self.preempted.append((self.since_s, self.token_s))
            self.since_s = nan

    def _computes(self, at: int, kind: str, own: tuple[int, int] | None, begun: bool) -> None:
        """One row, from when the row before was seen, or from its schedule if `begun`."""
        span = self._step_to(self.recorder.seen_s[at], kind)
        if span is None:
            return
        if kind == "recompute":
            span.who = self.preempted_for[-1]
        row, length_s, behind_s = self.prices.row(at), span.length_s, 0.0
        if begun and at:
            behind_s = min(max(self.prices.row(at - 1).gpu_end_s - span.start_s, 0.0), length_s)
            _, decodes, prompts = self.prices.shares(at - 1, None)
            span.decodes_s, span.prompts_s = behind_s * decodes, behind_s * prompts
        gpu_s = min(row.gpu_s, length_s - behind_s)
        mine, decodes, prompts = self.prices.shares(at, own)
        span.own_s = gpu_s * mine
        span.decodes_s += gpu_s * decodes
        span.prompts_s += gpu_s * prompts
        span.host_s = max(length_s - span.own_s - span.decodes_s - span.prompts_s, 0.0)
        span.iterations, span.decoded = row.steps, row.steps * row.decodes
        span.prompt_tokens = sum(tokens for request, tokens, _ in row.chunks if request != self.request)

    def _divide_by_others(self, span: Span) -> None:
        """A wait that ends when iterations under way allow it: by what the GPU computes meanwhile."""
        ends_s = self.recorder.tables()[0]["gpu_end_s"]
        for at in range(bisect_right(ends_s, span.start_s), len(ends_s)):
            row = self.prices.row(at)
            begin_s = max(row.gpu_end_s - row.gpu_s, float(ends_s[at - 1]) if at else 0.0, span.start_s)
            if begin_s >= span.end_s:
                break
            _, decodes, prompts = self.prices.shares(at, None)
            seconds = min(row.gpu_end_s, span.end_s) - begin_s
            span.decodes_s += seconds * decodes
            span.prompts_s += seconds * prompts
        span.host_s = max(span.length_s - span.decodes_s - span.prompts_s, 0.0)

    # ---- phases

    def _name_phases(self) -> None:
        """As `llmsim.metrics` divides the latency: queue, prefill, decode, preempted."""
        scheduled_s, first_s = self.facts["scheduled_s"], self.facts["first_token_s"]
        for span in self.spans:
            if span.start_s < scheduled_s:
                span.phase = "queue"
            elif any(start_s <= span.start_s < end_s for start_s, end_s in self.preempted):
                span.phase = "preempted"
            else:
                span.phase = "prefill" if span.start_s < first_s else "decode"
