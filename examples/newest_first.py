"""First come, first served; but once the oldest has waited for `patience_s`, the newest first (adaptive LIFO)."""

from llmsim import HOLD


class NewestFirst:
    def __init__(self, patience_s: float = 0.5):
        self.patience_s = patience_s

    def schedule(self, replica, now_s):
        replica.decode()  # every decoding request makes a token
        left = replica.limits.max_num_batched_tokens - replica.decoding
        queue = list(replica.waiting)  # in order of arrival
        if queue and now_s - queue[0].arrival_s > self.patience_s:
            queue.reverse()
        for request in [*replica.prefilling, *queue]:  # what was begun, then what waits
            hit = None if request in replica.running else replica.look_up(request)  # found in the prefix cache
            done = request.computed_tokens if hit is None else hit.blocks * replica.kv.block_tokens
            tokens = min(left, request.prefill_tokens - done)
            full = hit is not None and len(replica.running) == replica.limits.max_num_seqs
            if full or tokens == 0 or not replica.prefill(request, tokens, hit):
                return None  # somebody waits, and who is next depends on the clock: ask me before every iteration
            left -= tokens
        return HOLD  # nobody waits: the same until a request arrives or ends, or KV blocks run short
