"""Shortest prompt first, never more than `prefill_tokens` of prompts beside the decodes: short gaps for everybody."""

from llmsim import HOLD


class ShortPromptsFirst:
    def __init__(self, prefill_tokens: int = 1024):
        self.prefill_tokens = prefill_tokens

    def order(self, request):  # of the queue: a key that stays the same while the request waits
        return request.prompt_tokens, request.id

    def schedule(self, replica, now_s):
        replica.decode()  # every decoding request makes a token
        left = min(self.prefill_tokens, replica.limits.max_num_batched_tokens - replica.decoding)
        for request in list(replica.prefilling):  # what an earlier iteration began
            tokens = min(left, request.prefill_tokens - request.computed_tokens)
            if tokens == 0 or not replica.prefill(request, tokens):
                return HOLD
            left -= tokens
        while replica.waiting and left > 0 and len(replica.running) < replica.limits.max_num_seqs:
            request = replica.waiting.head
            hit = replica.look_up(request)  # what the prefix cache has of it
            tokens = min(left, request.prefill_tokens - hit.blocks * replica.kv.block_tokens)
            if not replica.prefill(request, tokens, hit):  # no room in the KV cache
                break
            left -= tokens
        return HOLD  # the same until a request arrives or ends, or KV blocks run short
