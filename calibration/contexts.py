"""The contexts of the requests that decode in each step, worked out from what the client saw.

A step log holds the sum of its decodes' contexts. How uneven they are and how long the longest is decides what
attention takes beyond that sum (`llmsim.cost.basis.SKEW_SHARE`, `llmsim.cost.tiles`). Both follow from the requests:
the step that completes a prompt is the last one before the client sees the first token whose chunks end such a prompt,
and from then on the request is in every step until its last token.

Where this gives other numbers of decodes or another sum than a step was logged with (after a preemption, or where two
prompts of one length change places), the step is left as it was: even contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from calibration.steps import RequestRow, StepRow

LOOK_BACK = 6  # steps before a first token in which its prompt may have ended


def note_contexts(steps: Sequence[StepRow], requests: Sequence[RequestRow]) -> None:
    """Fill `deviation_tokens` and `longest_tokens` of the steps whose decodes are all found."""
    count = len(steps)
    updates_s = np.array([step.update_s for step in steps])
    ending = [[new + done for new, done in step.chunks] for step in steps]  # tokens computed of each prompt
    seqs, tokens, longest = (np.zeros(count, np.int64) for _ in range(3))
    squares = np.zeros(count)
    for request in sorted((request for request in requests if request.token_s), key=lambda request: request.token_s[0]):
        last = int(np.searchsorted(updates_s, request.token_s[0], "right")) - 1
        for ended in range(last, max(last - LOOK_BACK, -1), -1):
            if request.prompt_tokens in ending[ended]:
                ending[ended].remove(request.prompt_tokens)
                break
        else:
            continue
        during = slice(ended + 1, min(ended + len(request.token_s), count))
        contexts = request.prompt_tokens + np.arange(max(during.stop - during.start, 0))
        seqs[during] += 1
        tokens[during] += contexts
        squares[during] += contexts.astype(float) ** 2
        longest[during] = np.maximum(longest[during], contexts)
    deviations = np.sqrt(np.maximum(seqs * squares - tokens.astype(float) ** 2, 0.0))
    for i, step in enumerate(steps):
        if step.seqs and (seqs[i], tokens[i]) == (step.seqs, step.kv_tokens):
            step.deviation_tokens, step.longest_tokens = float(deviations[i]), int(longest[i])
