"""Lose the ends of conversations first: what begins at token 0, a system prompt, serves the most different requests."""


class KeepBeginnings:
    def __init__(self, token_s: float = 0.01):
        self.token_s = token_s  # seconds of being unused that a token further into its sequence counts for

    def key(self, extent, now_s):  # the smallest goes first
        return extent.used_s - self.token_s * extent.first_token
