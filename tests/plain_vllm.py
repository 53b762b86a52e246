"""A stand-in for the installed vLLM, for machines without one: the plain twin's scheduler behind the same interface.

`tests/plain_engine.py` was written against the specification and shares nothing with `llmsim`, so the way from a case
to its comparison can be tested without vLLM. Whether vLLM itself agrees only vLLM can say (`benchmarks.parity`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from plain_engine import Blocks, PlainRequest, Scheduler, Settings

from llmsim.schedulers.vllm_installed import Answer, Options, Scheduled


@dataclass(eq=False)
class TokenRequest(PlainRequest):
    """Its blocks are named by the tokens up to their end, as a hash chain does."""

    token_ids: list[int] = field(default_factory=list)
    block_size: int = 16

    def key(self, block: int) -> object:
        return tuple(self.token_ids[: (block + 1) * self.block_size])


class CountingBlocks(Blocks):
    evicted = 0

    def take(self, *arguments: Any) -> None:
        before = len(self.hash_of)
        super().take(*arguments)
        self.evicted += before - len(self.hash_of)


class PlainVllm:
    """As `llmsim.schedulers.vllm_installed.InstalledVllm`."""

    def __init__(self, options: Options) -> None:
        o = self.options = options
        settings = Settings(
            num_gpu_blocks=o.num_gpu_blocks,
            block_size=o.block_size,
            max_num_seqs=o.max_num_seqs,
            max_num_batched_tokens=o.max_num_batched_tokens,
            max_model_len=o.max_model_len,
            long_prefill_token_threshold=o.long_prefill_token_threshold,
            chunked_prefill=o.enable_chunked_prefill,
            prefix_caching=o.enable_prefix_caching,
            reserve_full_isl=o.scheduler_reserve_full_isl,
            watermark=o.watermark,
            policy=o.policy,
            async_scheduling=o.async_scheduling,
        )
        self.scheduler = Scheduler(settings)
        self.scheduler.blocks = self.blocks = CountingBlocks(settings)

    def add(self, name: str, prompt: list[int], output_tokens: int, arrival_s: float, priority: int = 0) -> None:
        size = self.options.block_size
        request = TokenRequest(name, arrival_s, len(prompt), output_tokens, priority)  # type: ignore[arg-type]
        request.token_ids, request.block_size = list(prompt), size
        self.scheduler.add(request)

    def schedule(self) -> Answer:
        step = self.scheduler.schedule()
        scheduled = [Scheduled(str(request.id), *share) for request, share in step.scheduled.items()]
        return Answer(scheduled, [str(name) for name in step.preempted], step)

    def update(self, raw: Any, tokens: dict[str, int]) -> list[tuple[str, int, str | None]]:
        for request in raw.scheduled:
            if request not in raw.partial:
                request.token_ids.append(tokens[request.id])
        return [(str(r.id), 1, "length" if r.finished else None) for r in self.scheduler.update(raw)]

    @property
    def free_blocks(self) -> int:
        return len(self.blocks.free)

    @property
    def evicted_blocks(self) -> int:
        return self.blocks.evicted

    def running_names(self) -> list[str]:
        return [str(request.id) for request in self.scheduler.running]

    def waiting_names(self) -> list[str]:
        return [str(request.id) for request in self.scheduler.waiting]
