"""Send what begins alike to the same replica, whose prefix cache knows it, unless that one is far busier."""


class PrefixAffinity:
    def __init__(self, slack: int = 8):
        self.slack = slack  # unanswered requests that the known replica may have more than the idlest one
        self.homes = {}

    def route(self, request, replicas, now_s):
        idlest = min(replicas, key=lambda replica: replica.outstanding)
        home = self.homes.get(request.prefix_ids[:1], idlest)
        chosen = home if home.outstanding <= idlest.outstanding + self.slack else idlest
        self.homes[request.prefix_ids[:1]] = chosen
        return chosen
