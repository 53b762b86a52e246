"""Virtual Token Counter: fair service among tenants (OSDI'24, arXiv 2401.00588, algorithm 2).

    counter of a tenant += w_p * prompt tokens / weight     when a request of it is admitted for the first time
                        += w_q / weight                     for each token generated for it
    admission           of the tenant with the smallest counter among those with waiting requests, its earliest request
    lift                a tenant without a waiting request sends one: its counter becomes the larger of its own and the
                        smallest of the tenants with waiting requests; if there are none, that of the tenant whose
                        waiting requests ran out last

The lift keeps a tenant from saving up credit while it is idle. Between two tenants that both have requests waiting all
through an interval, the services received in it, W = w_p * prompts admitted + w_q * tokens generated (each / weight),
differ by at most 2 max(w_p L, w_q M): L the longest prompt, M the tokens that the KV cache holds (theorem 4.4), if
nothing is preempted. Weighted VTC (section 4.3) is weights other than 1. The paper's w_p = 1, w_q = 2 are the defaults.

Differences from the paper: the first token, which a prefill makes, counts as generated; a prompt counts when its first
chunk is admitted; with a base that preempts, recomputed tokens are no service and count once.

Counters are exact at every admission: what running requests have generated is summed up only then. While the base
holds its answer, counters grow in proportion to the tenants' running requests; the hold ends where another tenant's
counter becomes the smallest.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any

from llmsim.schedulers.ordered import Ordered

if TYPE_CHECKING:
    from llmsim.replica import Replica
    from llmsim.request import Request

Tenant = Hashable


class VirtualTokenCounter(Ordered):
    """`w_p`, `w_q`: cost of a prompt token and of a generated one; `weights`: {"tenant": weight}, 1 for all others."""

    order = None  # type: ignore[assignment]  # the front moves with the counters: see `queue`

    def __init__(
        self,
        base: str = "vllm",
        base_args: dict[str, Any] | None = None,
        w_p: float = 1.0,
        w_q: float = 2.0,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(base, base_args)
        if not isinstance(weights, dict | None):
            raise ValueError(f'VirtualTokenCounter: weights={weights!r} is no table: give JSON such as {{"tenant": 2}}')
        for name, value in {"w_p": w_p, "w_q": w_q, **{f"weight {k}": v for k, v in (weights or {}).items()}}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
                raise ValueError(f"VirtualTokenCounter: {name}={value!r} is not a number above 0: give one")
        self.w_p, self.w_q, self.weights = w_p, w_q, {str(name): weight for name, weight in (weights or {}).items()}
        self._ended = getattr(self.base, "ended", None)

    def queue(self, engine: Replica) -> FairQueue:
        """The engine's waiting requests."""
        self._queue = FairQueue(engine, self.w_p, self.w_q, self.weights)
        return self._queue

    def ended(self, request: Request, now_s: float) -> None:
        self._queue.settle(request)
        if self._ended is not None:
            self._ended(request, now_s)

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        hold: bool | None = self.base.schedule(replica, now_s)
        if hold and replica.waiting.size:
            lasts = self._queue.lasts()
            if lasts:
                replica.hold_for(lasts)
        self._queue.stale()  # this iteration generates tokens
        return hold


class FairQueue:
    """Waiting requests by tenant, `llmsim.queue.WaitingQueue`'s interface; `head` is whose turn it is."""

    def __init__(self, engine: Replica, w_p: float, w_q: float, weights: dict[str, float]) -> None:
        self.size = self.prefill_tokens = 0
        self._engine, self._w_p, self._w_q, self._weights = engine, w_p, w_q, weights
        self._settled: dict[Tenant, float] = defaultdict(float)  # counters without what running requests generated
        self._queues: dict[Tenant, deque[Request]] = {}  # of tenants with waiting requests, each in order of arrival
        self._number: dict[Tenant, int] = {}  # order of first appearance, for ties
        self._last_left: Tenant | None = None  # whose waiting requests ran out last
        self._generated: dict[Tenant, float] = {}  # by running requests, weighted
        self._decoding: dict[Tenant, int] = {}  # running requests that generate a token an iteration
        self._counted = False  # whether the two are those of now
        self._head: Request | None = None

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Request]:
        """The order of admission if all were admitted now."""
        turns = [(self.counter(tenant), self._number[tenant], tenant) for tenant in self._queues]
        heapify(turns)
        copies = {tenant: deque(queue) for tenant, queue in self._queues.items()}
        while turns:
            counter, number, tenant = heappop(turns)
            request = copies[tenant].popleft()
            if copies[tenant]:
                heappush(turns, (counter + self._prompt_cost(request), number, tenant))
            yield request

    # ---------------------------------------------------------------------------------------------------- counters

    def counter(self, tenant: Tenant) -> float:
        """Service that a tenant has been given, and what lifts added, at this instant."""
        if not self._counted:
            self._count()
        return self._settled[tenant] + self._generated.get(tenant, 0.0)

    def _count(self) -> None:
        """Sum up what running requests have generated: one pass, when somebody asks."""
        now = self._engine.batch.iteration
        self._counted = True
        generated: dict[Tenant, float] = defaultdict(float)
        decoding: dict[Tenant, int] = defaultdict(int)
        for request in self._engine.running:
            joined, tenant = request.joined, request.tenant
            if joined >= 0:
                generated[tenant] += request.generated_tokens + now - joined
                decoding[tenant] += 1
            else:
                generated[tenant] += request.generated_tokens
        self._generated = {tenant: tokens * self._token_cost(tenant) for tenant, tokens in generated.items()}
        self._decoding = decoding

    def _token_cost(self, tenant: Tenant) -> float:
        return self._w_q / self._weights.get(str(tenant), 1.0)

    def _prompt_cost(self, request: Request) -> float:
        """Of admitting it: its prompt, unless it was admitted before."""
        if not isnan(request.scheduled_s):
            return 0.0
        return self._w_p * request.prompt_tokens / self._weights.get(str(request.tenant), 1.0)

    def settle(self, request: Request) -> None:
        """A request has left for good: what it generated stays with its tenant."""
        if isnan(request.scheduled_s):  # turned away while it waited: its prompt was charged when it left the queue
            self._settled[request.tenant] -= self._prompt_cost(request)
        self._settled[request.tenant] += request.generated_tokens * self._token_cost(request.tenant)
        self.stale()

    def stale(self) -> None:
        """What running requests have generated is no longer what it was."""
        self._counted, self._head = False, None

    def lasts(self) -> int:
        """Iterations from this one on until another tenant's turn comes, if nothing else changes; 0: never."""
        first = self.head.tenant
        counter, pace = self.counter(first), self._pace(first)
        lasts = 0
        for tenant in self._queues:
            gaining = pace - self._pace(tenant)
            if gaining > 0.0:
                iterations = max(1, int((self.counter(tenant) - counter) / gaining))
                lasts = min(lasts, iterations) if lasts else iterations
        return lasts

    def _pace(self, tenant: Tenant) -> float:
        """Growth of a counter in one iteration."""
        return self._decoding.get(tenant, 0) * self._token_cost(tenant)

    # ----------------------------------------------------------------------------------------------------- requests

    @property
    def head(self) -> Request:
        if self._head is None:
            if not self._queues:
                raise IndexError("nobody waits")
            turn = min(self._queues, key=lambda tenant: (self.counter(tenant), self._number[tenant]))
            self._head = self._queues[turn][0]
        return self._head

    def append(self, request: Request) -> None:
        """A new arrival."""
        tenant = request.tenant
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant] = deque()
        self._queues[tenant].append(request)
        self.size += 1
        self.prefill_tokens += request.prefill_tokens
        self._head = None

    def _lift(self, tenant: Tenant) -> None:
        self._number.setdefault(tenant, len(self._number))
        if self._queues:
            floor = min(map(self.counter, self._queues))
        elif self._last_left is not None:
            floor = self.counter(self._last_left)
        else:
            return
        below = floor - self.counter(tenant)
        if below > 0.0:
            self._settled[tenant] += below

    def put_back(self, request: Request) -> None:
        """A preempted request: to its place among its tenant's; no lift, since it never stopped being served."""
        tenant = request.tenant
        queue = self._queues.setdefault(tenant, deque())
        if queue and (queue[0].arrival_s, queue[0].id) < (request.arrival_s, request.id):
            ordered = list(queue)
            insort(ordered, request, key=lambda one: (one.arrival_s, one.id))
            self._queues[tenant] = deque(ordered)
        else:
            queue.appendleft(request)
        self._settled[tenant] += request.generated_tokens * self._token_cost(tenant)  # no longer counted as running
        self.size += 1
        self.prefill_tokens += request.prefill_tokens
        self.stale()

    def pop(self) -> Request:
        request = self.head
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """A request is admitted (or turned away: `settle` takes the charge back). IndexError: it does not wait."""
        tenant = request.tenant
        queue = self._queues.get(tenant, deque())
        if queue and queue[0] is request:
            queue.popleft()
        else:
            try:
                queue.remove(request)
            except ValueError:
                raise IndexError(f"request {request.id} does not wait") from None
        if not queue:
            del self._queues[tenant]
            self._last_left = tenant
        self._settled[tenant] += self._prompt_cost(request) - request.generated_tokens * self._token_cost(tenant)
        self.size -= 1
        self.prefill_tokens -= request.prefill_tokens
        self._head = None
        if request.generated_tokens:  # counts as running again
            self.stale()
