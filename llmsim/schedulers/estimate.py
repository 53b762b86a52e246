"""How long iterations will take, for policies that plan: both clocks of the replica, without waiting for either.

    asynchronous   period = max(GPU, host)      the two overlap (docs/architecture.md, "The two clocks of a replica")
    synchronous    period = host + GPU + results' return
    host           schedule + launch + update of the iteration, with the means of `llmsim.cost.Host`

Left out: launch noise, the clocks' warm and cool shares, arrivals during a launch; a few per cent each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmsim.replica import Replica


def iteration_s(replica: Replica, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: int) -> float:
    """Seconds from this iteration's schedule to the next one's; `chunks` of (new tokens, computed before)."""
    cost, host = replica.cost, replica.cost.host
    new_tokens = sum(tokens for tokens, _ in chunks)
    requests = seqs + len(chunks)
    gpu_s = cost.mixed_s(chunks, seqs, kv_tokens) if chunks else cost.decode_ramp(seqs, kv_tokens).first_s
    mode = cost.mode(seqs + new_tokens, len(chunks))
    host_s = host.schedule_s + host.schedule_per_request_s * requests + host.schedule_per_token_s * new_tokens
    host_s += host.launch_s[mode] + host.launch_per_request_s[mode] * requests
    host_s += host.launch_per_chunk_s[mode] * len(chunks) + host.update_s + host.update_per_output_s * requests
    return max(gpu_s, host_s) if replica.asynchronous else host_s + gpu_s + host.return_s


def prefill_s(replica: Replica, tokens: int, computed: int = 0) -> float:
    """Seconds until a prompt of `tokens` more is computed if nothing else runs, in chunks of the whole budget."""
    budget = replica.limits.max_num_batched_tokens
    seconds = 0.0
    while tokens > 0:
        chunk = min(tokens, budget)
        seconds += iteration_s(replica, [(chunk, computed)], 0, 0)
        tokens, computed = tokens - chunk, computed + chunk
    return seconds
