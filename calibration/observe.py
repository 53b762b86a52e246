"""What a step log says about the two clocks, once it is known which of them each update waited for.

Steps are walked in order along the recurrence of docs/architecture.md with the current estimate of both clocks. The GPU
end of a step is seen in its update if the estimate says that the next launch was over by then, with a margin; otherwise
it is taken from the estimate, and the update shows the end of that launch instead. The choice rests on the estimate
alone, so noise in a step cannot select it. Walked three or four times, estimate and choice agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan

from calibration.steps import StepRow
from llmsim.cost import FULL, Host

# From the end of schedule() to the start of the launch, and from the end of sampling to the update: both about this
# (median 0.045 and 0.1 ms in a log that has all four instants).
DISPATCH_S = 5e-5
RETURN_S = 1e-4
# The estimate must put the GPU's end this far behind (or ahead of) the end of the next launch.
GRAPH_MARGIN_S = 1e-3
LAUNCH_MARGIN_S = 8e-3


@dataclass
class Seen:
    """A step with the instants that could be inferred; nan where the log does not show them."""

    step: StepRow
    mode: int
    launch_s: float  # x0
    launched_s: float  # L
    gpu_start_s: float
    gpu_end_s: float  # estimate, or the update where that waited for the GPU
    gpu_s: float  # seen GPU seconds
    follows_gpu: bool  # started when the step before it ended
    clean: bool  # and the end of the step before it was seen as well
    overlapped: bool  # the step before was still in flight when this one was scheduled

    @property
    def steady(self) -> bool:
        """Whether `gpu_s` is the GPU's alone, with no wait for the host in it."""
        return self.step.gpu_s == self.step.gpu_s or (self.follows_gpu and self.clean and self.gpu_s == self.gpu_s)


def observe(
    steps: Sequence[StepRow], host: Host, mode_of: Callable[[int, int], int], gpu_s: Callable[[StepRow], float]
) -> list[Seen]:
    rows: list[Seen] = []
    end_s, end_seen = -inf, False
    for i, step in enumerate(steps):
        mode = mode_of(step.tokens, len(step.chunks))
        logged = step.launch_s == step.launch_s
        launch_s = step.launch_s if logged else step.schedule_s + step.schedule_took_s + DISPATCH_S
        ready_s = launch_s + host.lead_s[mode]
        start_s = max(end_s, ready_s)
        took_s = host.launch_s[mode] + host.launch_per_chunk_s[mode] * len(step.chunks)
        timed = step.gpu_s == step.gpu_s
        expected_s = max(start_s + (step.gpu_s if timed else gpu_s(step)), launch_s + took_s + host.tail_s[mode])
        overlapped = i > 0 and step.schedule_s < steps[i - 1].update_s
        row = Seen(step, mode, launch_s, nan, start_s, expected_s, nan, end_s >= ready_s, end_seen, overlapped)
        end_seen = _waits_for_gpu(steps, i, host, mode_of, expected_s)
        if end_seen:
            row.gpu_end_s, row.gpu_s = step.update_s, step.update_s - start_s
        else:
            row.gpu_end_s = min(expected_s, step.update_s)
        if timed:
            row.gpu_s = step.gpu_s
        end_s = row.gpu_end_s
        rows.append(row)
    for i, row in enumerate(rows):
        row.launched_s = _launched_s(rows, i)
    if any(step.gpu_s == step.gpu_s for step in steps):  # what the GPU did not time, its launch paced
        for row in rows:
            row.gpu_s = row.step.gpu_s
    return rows


def timed_on_gpu(steps: Sequence[StepRow], mode_of: Callable[[int, int], int]) -> list[Seen]:
    """The steps whose GPU seconds CUDA events showed, without a word on the host."""
    return [
        Seen(step, mode_of(step.tokens, len(step.chunks)), nan, nan, nan, nan, step.gpu_s, True, True, False)
        for step in steps
        if step.gpu_s == step.gpu_s
    ]


def _waits_for_gpu(
    steps: Sequence[StepRow], i: int, host: Host, mode_of: Callable[[int, int], int], expected_s: float
) -> bool:
    """Whether the update of step i is expected to wait for the GPU rather than for the launch of step i + 1."""
    if i + 1 == len(steps) or steps[i + 1].schedule_s >= steps[i].update_s:
        return True
    after = steps[i + 1]
    mode = mode_of(after.tokens, len(after.chunks))
    launched_s = after.schedule_s + after.schedule_took_s + DISPATCH_S
    launched_s += host.launch_s[mode] + host.launch_per_chunk_s[mode] * len(after.chunks)
    return expected_s > launched_s + (GRAPH_MARGIN_S if mode == FULL else LAUNCH_MARGIN_S)


def _launched_s(rows: Sequence[Seen], i: int) -> float:
    """End of the launch of row i, if the log shows it."""
    step = rows[i].step
    if step.launched_s == step.launched_s:
        return step.launched_s + RETURN_S
    if rows[i].overlapped:
        before = rows[i - 1]
        margin_s = LAUNCH_MARGIN_S if before.step.chunks and rows[i].mode != FULL else GRAPH_MARGIN_S
        launch_bound = before.gpu_s != before.gpu_s and before.gpu_end_s < before.step.update_s - margin_s
        return before.step.update_s if launch_bound else nan
    if i + 1 < len(rows) and rows[i + 1].overlapped:  # alone in flight: the host went straight on to the next schedule
        return rows[i + 1].step.schedule_s
    return nan
