"""Many iterations at once: how a run of decodes goes on while nothing changes.

Between two changes of membership the GPU's time of an iteration grows by the same amount each time and the host's
does not change. Whichever clock is slower sets the pace, and all instants are sums of an arithmetic series. With the
symbols of `llmsim.replica`, T1 = T(k+1), H = update + schedule + launch:

    the GPU sets the pace    every launch is through before the GPU needs it: L(k+1) <= E(k), return + H <= T1
                             U(k+j) = E(k+j) + return: S(k+j) = E(k) + return + update + (T1 + ... j-2 terms), j >= 2
    the host sets the pace   the GPU is idle when the next launch reaches it: E(k) <= L(k+1) and T1 <= H
                             U(k+j-1) = L(k+j), so S(k+j) = L(k+1) + update + (j-2) H from j = 2 on, while T <= H
                             (not if workers launch: there the iterations are taken one by one)
    synchronous              each iteration lasts schedule + max(lead + T, launch + tail) + return + update

In between (the clocks catching up with each other) there is no closed form, and iterations are taken one by one.
"""

from __future__ import annotations

from math import inf

from llmsim.cost import FULL, Host, Ramp, steps_within


class Step:
    """The iteration at hand: its composition, and when its launch and its GPU work begin and end."""

    __slots__ = (
        "chunks", "free_s", "gpu", "gpu_end_s", "kv_blocks", "kv_tokens", "launch_s", "launched_s", "mode",
        "new_tokens", "outputs", "running", "schedule_s", "seqs", "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int]] = []
        self.gpu = Ramp(0.0, 0.0)
        self.gpu_end_s = self.launch_s = self.launched_s = self.schedule_s = 0.0
        self.free_s = 0.0  # when the engine's thread goes on: at the end of a launch that it makes itself
        self.kv_blocks = self.kv_tokens = self.mode = self.new_tokens = self.running = self.seqs = self.waiting = 0
        self.outputs = 0  # decodes whose tokens are wanted; `seqs` also counts ghosts


class Plan:
    """Iterations k .. k+steps-1 of a run: S(k+1) = second_s; S(k+j) = base_s + j-2 terms of `pace` from j = 2 on."""

    __slots__ = ("base_s", "gpu_bound", "pace", "second_s", "steps")

    def __init__(self) -> None:
        self.steps = 1
        self.second_s = self.base_s = 0.0
        self.pace: tuple[float, float] = (0.0, 0.0)  # first term and growth, s: a bare Ramp, made for every run
        self.gpu_bound = True  # which clock sets the pace

    def steps_until(self, ready_s: float) -> int:
        """Iterations that are scheduled before a request that becomes schedulable at `ready_s` is seen."""
        if ready_s <= self.second_s:
            return 1
        if ready_s == inf:
            return self.steps
        steps = 2 + steps_within(*self.pace, ready_s - self.base_s)
        return steps if steps < self.steps else self.steps

    def scheduled_s(self, steps: int) -> float:
        """S(k + steps)."""
        if steps == 1:
            return self.second_s
        first_s, growth_s = self.pace
        steps -= 2
        return self.base_s + steps * first_s + growth_s * (steps * (steps - 1)) * 0.5


def plan_run(plan: Plan, step: Step, second_s: float, steps: int, running: int, host: Host) -> bool:
    """Fill `plan` for up to `steps` iterations, the first being `step`; False if no closed form holds yet.

    `second_s` is S(k+1), `running` the number of requests that hold slots from then on.
    """
    seqs, gpu_s = step.seqs, step.gpu_end_s
    first_s, growth_s = step.gpu
    first_s += growth_s  # of iteration k+1
    schedule_s = host.schedule_s + host.schedule_per_request_s * running
    launch_s = host.launch_s[FULL] + host.launch_per_request_s[FULL] * seqs
    update_s = host.update_s + host.update_per_output_s * step.outputs
    lead_s, tail_s = host.lead_s[FULL], host.tail_s[FULL]
    host_s, return_s = update_s + schedule_s + launch_s, host.return_s
    launch_at_s = second_s + schedule_s
    if host.worker and step.launched_s > launch_at_s:
        launch_at_s = step.launched_s
    launched_s = launch_at_s + launch_s
    plan.second_s, plan.steps = second_s, steps
    if (
        launched_s <= gpu_s
        and return_s + host_s <= first_s
        and launch_at_s + lead_s <= gpu_s
        and launched_s + tail_s <= gpu_s + first_s
        and return_s + update_s + schedule_s + lead_s <= first_s
        and return_s + host_s + tail_s <= first_s + first_s
    ):
        plan.gpu_bound = True
        plan.base_s = gpu_s + return_s + update_s
        plan.pace = (first_s, growth_s)
        return True
    if (
        not host.worker
        and gpu_s + return_s <= launched_s
        and gpu_s <= launch_at_s + lead_s
        and first_s <= host_s
        and lead_s + first_s + return_s <= launch_s + host_s
        and tail_s <= update_s + schedule_s + lead_s
        and tail_s + return_s <= host_s
    ):
        plan.gpu_bound = False
        plan.base_s = launched_s + update_s
        plan.pace = (host_s, 0.0)
        plan.steps = min(steps, _steps_below(first_s, growth_s, min(host_s, launch_s + host_s - lead_s - return_s)) + 1)
        return True
    return False


def plan_synchronous_run(plan: Plan, step: Step, second_s: float, steps: int, running: int, host: Host) -> bool:
    """The same for synchronous scheduling, where the GPU waits for the host and the host for the GPU."""
    first_s, growth_s = step.gpu
    first_s += growth_s
    schedule_s = host.schedule_s + host.schedule_per_request_s * running
    launch_s = host.launch_s[FULL] + host.launch_per_request_s[FULL] * step.seqs
    update_s = host.update_s + host.update_per_output_s * step.outputs
    begin_s = schedule_s + host.lead_s[FULL] + host.return_s
    floor_s = schedule_s + launch_s + max(host.tail_s[FULL], 0.0) + host.return_s
    if begin_s + first_s < floor_s:  # the launch is longer than the GPU's work
        steps = min(steps, _steps_below(first_s, growth_s, floor_s - begin_s) + 1)
        begin_s, first_s, growth_s = floor_s, 0.0, 0.0
    pace_s = begin_s + first_s + update_s
    plan.second_s, plan.steps = second_s, steps
    plan.base_s = second_s + pace_s
    plan.pace = (pace_s + growth_s, growth_s)
    return True


def _steps_below(first_s: float, growth_s: float, limit_s: float) -> int:
    """How many terms first_s, first_s + growth_s, ... are at most limit_s (the first one is)."""
    return 1 << 40 if growth_s <= 0.0 else int((limit_s - first_s) / growth_s) + 1
