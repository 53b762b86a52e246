"""vLLM's own scheduler, as installed, on llmsim's clock: slow, and exactly what that version does.

Before every iteration the policy hands vLLM the tokens of the iterations whose results the host has taken, adds the
requests that have arrived, calls vLLM's `schedule()`, and repeats the answer on the replica with the primitives that
any policy has. Clock, metrics and outputs are the replica's; who runs, how many tokens, who is preempted, what the
prefix cache holds and how many blocks are free are vLLM's.

    results known at schedule k    asynchronous: all but those of the iteration answered last, unless nothing was
                                   scheduled then (the host waited for it); synchronous: all
                                   [vLLM v1/engine/core.py, step and step_with_batch_queue]
    prefix ids                     id X of the trace, B tokens long, becomes tokens base(X) .. base(X) + B - 1; what no
                                   id describes becomes tokens of its own, so vLLM's hash chain finds what is equal
    KV blocks                      vLLM's pool; the replica's cache is a mirror that counts nothing itself

A request makes exactly the trace's output tokens (`ignore_eos`). `llmsim.schedulers.vllm_installed` says how vLLM is
started without a GPU. If vLLM answers something the replica's model of a request cannot follow, PolicyError names the
version, the request and both numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING

from llmsim.kvcache import Hit, KVCache
from llmsim.plugins import PolicyError
from llmsim.schedulers.vllm_installed import WRITTEN_FOR, Answer, InstalledVllm, Options, Scheduled, vllm_version

if TYPE_CHECKING:
    from llmsim.engine import Engine
    from llmsim.replica import Replica
    from llmsim.request import Request

UNLIMITED_TOKENS = 1 << 22  # max_model_len where nobody gave one


class TokenIds:
    """Sequences as token ids: equal where the prefix ids are equal, different everywhere else."""

    def __init__(self, id_tokens: int) -> None:
        self.id_tokens = id_tokens  # tokens that one prefix id stands for; 0: nothing is shared
        self._first: dict[Hashable, int] = {}
        self._next = 0

    def of(self, request: Request) -> list[int]:
        """Prompt and answer."""
        total = request.prompt_tokens + request.output_tokens
        sequence: list[int] = []
        size = self.id_tokens
        if size:
            named = min(request.identity_tokens, len(request.prefix_ids) * size)
            for name in request.prefix_ids[: -(-named // size)]:
                first = self._first.get(name)
                if first is None:
                    first = self._first[name] = self._new(size)
                sequence.extend(range(first, first + size))
            del sequence[named:]
        own = total - len(sequence)
        first = self._new(own)
        sequence.extend(range(first, first + own))
        return sequence

    def _new(self, tokens: int) -> int:
        first = self._next
        self._next += tokens
        return first


class Known:
    """A request that vLLM has: its answer's token ids, how many are sampled, how many of them vLLM has taken."""

    __slots__ = ("answer", "request", "sampled", "taken")

    def __init__(self, request: Request, answer: list[int]) -> None:
        self.request, self.answer = request, answer
        self.sampled = self.taken = 0

    def next_token(self) -> int:
        self.sampled += 1
        return self.answer[self.sampled - 1]


class MirroredKV(KVCache):
    """The cache of a replica whose blocks somebody else counts: `free_blocks` and `evicted_blocks` are written from
    outside."""

    def take(self, blocks: int) -> None:
        """They have been taken."""

    def admit(self, request: Request, hit: Hit, tokens: int) -> None:
        """They have been taken."""

    def store(self, request: Request, tokens: int) -> None:
        """It has been registered."""

    def release(
        self, request: Request, blocks: int, full_tokens: int, *, resumes: bool = False, keep_content: bool = True
    ) -> None:
        """They have been, or are about to be, freed."""


class VllmNative:
    """The scheduler of the installed vLLM (extra `native`). Arguments as vLLM's; `max_model_len` 0: any length."""

    requires = "vllm"  # the module without which no instance can be made

    def __init__(
        self,
        policy: str = "fcfs",
        long_prefill_token_threshold: int = 0,
        watermark: float = 0.0,
        reserve_full_isl: bool = True,
        enable_chunked_prefill: bool = True,
        max_model_len: int = 0,
    ) -> None:
        if policy not in ("fcfs", "priority"):
            raise ValueError(f"scheduling_policy={policy!r} is unknown. Choose fcfs or priority.")
        self.version = vllm_version()  # before the trace is read: the error comes at once
        self.policy = policy
        self.threshold = long_prefill_token_threshold
        self.watermark = watermark
        self.reserve_full_isl = reserve_full_isl
        self.chunked = enable_chunked_prefill
        self.max_model_len = max_model_len or UNLIMITED_TOKENS
        self._vllm: InstalledVllm | None = None
        self._known: dict[str, Known] = {}  # requests that vLLM has, by the name it has them under
        self._untaken: deque[tuple[Answer, dict[str, int]]] = deque()  # iterations whose tokens vLLM lacks

    # ------------------------------------------------------------------------------------------------- one iteration

    def schedule(self, replica: Replica, now_s: float) -> bool | None:
        vllm = self._vllm or self._attach(replica)
        in_flight = 1 if replica.asynchronous and self._untaken and self._untaken[-1][0].scheduled else 0
        while len(self._untaken) > in_flight:
            self._hand_over(vllm, *self._untaken.popleft())
        if replica.waiting.size + len(replica.running) > len(self._known):
            self._feed(vllm, replica)
        answer = vllm.schedule()
        kv = replica.kv
        kv.free_blocks = kv.total_blocks  # vLLM has found room for all of this
        self._untaken.append((answer, self._mirror(replica, answer)))
        kv.free_blocks, kv.evicted_blocks = vllm.free_blocks, vllm.evicted_blocks
        return None

    def _attach(self, engine: Engine) -> InstalledVllm:
        """Make the scheduler for this replica, and the replica's cache a mirror."""
        kv, limits = engine.kv, engine.limits
        self._vllm = InstalledVllm(
            Options(
                num_gpu_blocks=kv.total_blocks + 1,  # and vLLM's null block
                block_size=kv.block_tokens,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                policy=self.policy,
                long_prefill_token_threshold=self.threshold,
                watermark=self.watermark,
                scheduler_reserve_full_isl=self.reserve_full_isl,
                enable_chunked_prefill=self.chunked,
                enable_prefix_caching=kv.prefix_caching,
                async_scheduling=engine.asynchronous,
            )
        )
        self._tokens = TokenIds(kv.prefix_block_tokens)
        engine.kv = MirroredKV(
            kv.total_blocks,
            kv.block_tokens,
            prefix_caching=kv.prefix_caching,
            prefix_block_tokens=kv.prefix_block_tokens,
        )
        return self._vllm

    def _feed(self, vllm: InstalledVllm, replica: Replica) -> None:
        """Requests that have joined the queue since the last iteration, in its order."""
        for request in replica.waiting:
            name = request.name or f"{request.id:012d}"  # vLLM orders equal priorities and times by this text
            if name in self._known:
                continue
            sequence = self._tokens.of(request)
            prompt, answer = sequence[: request.prompt_tokens], sequence[request.prompt_tokens :]
            self._known[name] = Known(request, answer)
            vllm.add(name, prompt, request.output_tokens, request.arrival_s, request.priority)

    def _hand_over(self, vllm: InstalledVllm, answer: Answer, sampled: dict[str, int]) -> None:
        """The host has an iteration's tokens: vLLM takes them, and frees who has ended."""
        if not answer.scheduled:
            return
        for name, tokens, reason in vllm.update(answer.raw, sampled):
            known = self._known[name]
            known.taken += tokens
            if (reason is not None) != (known.taken == len(known.answer)):
                does = "goes on" if reason is None else f"ended ({reason})"
                raise self._lost(known.request, f"{does} after {known.taken} of {len(known.answer)} tokens")
            if reason is not None:
                del self._known[name]

    # ------------------------------------------------------------------------------------------------------ mirroring

    def _mirror(self, replica: Replica, answer: Answer) -> dict[str, int]:
        """Repeat the answer on the replica; returns the token of each request that makes one."""
        batch, prefilling = replica.batch, replica.prefilling
        for name in answer.preempted:
            replica.preempt(self._known[name].request)
        sampled: dict[str, int] = {}
        decodes: list[Request] = []
        chunks: list[tuple[Known, Scheduled]] = []
        for entry in answer.scheduled:
            known = self._known[entry.name]
            request = known.request
            if request in batch:
                computed = batch.computed(request)
                if entry.tokens != 1 or entry.computed_before != computed:
                    raise self._lost(request, f"runs {entry.tokens} tokens behind {entry.computed_before}", computed)
                decodes.append(request)
                sampled[entry.name] = known.next_token()
            else:
                if request in prefilling and entry.computed_before != request.computed_tokens:
                    where = f"runs {entry.tokens} tokens behind {entry.computed_before}"
                    raise self._lost(request, where, request.computed_tokens)
                chunks.append((known, entry))
        if len(decodes) == batch.size:
            if decodes:
                replica.decode()
        else:
            for request in decodes:
                replica.decode_one(request)
            replica.pause_others()
        for known, entry in chunks:
            if self._prefill(replica, known.request, entry):
                sampled[entry.name] = known.next_token()
        return sampled

    def _prefill(self, replica: Replica, request: Request, entry: Scheduled) -> bool:
        """One chunk; whether it ends the prompt."""
        hit = None
        if request not in replica.prefilling:
            hit = Hit()
            hit.blocks, rest = divmod(entry.computed_before, replica.kv.block_tokens)
            if rest:
                raise self._lost(request, f"starts behind {entry.computed_before} tokens", "whole blocks")
        if not replica.prefill(request, entry.tokens, hit):
            raise self._lost(request, f"runs {entry.tokens} tokens", "no KV blocks")
        return request.computed_tokens == request.prefill_tokens

    def _lost(self, request: Request, what: str, ours: object = None) -> PolicyError:
        where = "" if ours is None else f"; the replica has it at {ours}"
        return PolicyError(
            f"vllm-native: vLLM {self.version}: request {request.id} {what}{where}. This version schedules in a way "
            f"that the replica cannot follow: use --scheduler vllm, or vLLM {WRITTEN_FOR}."
        )
