"""Dynamic batching with a time-out, as Triton's dynamic batcher in front of a model that runs one batch at a time.

    begin     as soon as a batch of a preferred size can be formed, the largest such; else when the oldest request has
              waited `timeout_s`, with all that wait up to `batch_size`
    batch     prompts are not padded, and a row that has finished costs nothing more; but nobody is admitted before the
              last row is done: batching by request, not by iteration
    answers   each when its batch is done; with `stream` token by token
    KV        what each row needs to its end, set aside for the whole batch

Source: Triton Inference Server, user guide, "Dynamic Batcher" (preferred_batch_size, max_queue_delay_microseconds,
max_batch_size). Triton does not say what its backend does with finished rows: that they cost nothing is the kindest
case for it (packed inputs). Left out: priorities, queue policies, several model instances.
"""

from __future__ import annotations

from llmsim.schedulers.static import StaticBatching


class DynamicBatching(StaticBatching):
    """One batch at a time, of a `preferred_batch_sizes` (as in 4,8) or what waits after `timeout_s`; no padding."""

    pads = False

    def __init__(
        self,
        batch_size: int = 32,
        timeout_s: float = 0.05,
        preferred_batch_sizes: list[int] | str | int | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__(batch_size, timeout_s, 0, stream)
        self.preferred_batch_sizes = "" if preferred_batch_sizes is None else preferred_batch_sizes
        self._preferred = sorted({*_sizes(self.preferred_batch_sizes), batch_size})
        if self._preferred[0] < 1 or self._preferred[-1] > batch_size:
            raise ValueError(
                f"preferred_batch_sizes={preferred_batch_sizes!r} are not all between 1 and batch_size={batch_size}."
            )

    def next_size(self, waiting: int, most: int, due: bool) -> int:
        if due or waiting == most:
            return waiting
        return max((size for size in self._preferred if size <= waiting), default=0)


def _sizes(given: list[int] | str | int) -> list[int]:
    words = given if isinstance(given, list) else str(given).replace("+", ",").split(",")
    try:
        return [int(str(word)) for word in words if str(word).strip()]
    except ValueError:
        raise ValueError(f"preferred_batch_sizes={given!r} are not whole numbers, as in 4,8.") from None
