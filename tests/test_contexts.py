"""Contexts of decodes worked out from requests: against engines whose every context is known."""

from pathlib import Path

import numpy as np
import pytest

from calibration.contexts import note_contexts
from calibration.steps import RequestRow, StepRow, read_recording

FOLDER = Path(__file__).parent.parent / "calibration" / "recordings"
H200 = "vllm-0.25.1_h200-sxm"


def step(at_s: float, contexts: list[int], chunks: list[tuple[int, int]]) -> StepRow:
    tokens = len(contexts) + sum(new for new, _ in chunks)
    return StepRow(at_s, 0.0, tokens, len(contexts), sum(contexts), chunks, 0, 0, update_s=at_s)


def request(prompt: int, token_s: list[float]) -> RequestRow:
    return RequestRow(0.0, prompt, len(token_s), token_s)


def test_every_context_is_found() -> None:
    """A prompt of 100 and one of 300 in two chunks; clients see tokens half a step after the step's results."""
    steps = [
        step(1.0, [], [(100, 0)]),
        step(2.0, [100], [(200, 0)]),
        step(3.0, [101], [(100, 200)]),
        step(4.0, [102, 300], []),
        step(5.0, [301], []),
    ]
    note_contexts(steps, [request(300, [3.5, 4.5, 5.5]), request(100, [1.5, 2.5, 3.5, 4.5])])
    assert [row.longest_tokens for row in steps] == [0, 100, 101, 300, 301]
    both = [102, 300]
    expected = [0.0, 0.0, 0.0, 2 * float(np.std(both)), 0.0]
    assert [row.deviation_tokens for row in steps] == pytest.approx(expected)
    assert steps[3].read_tokens(0.1) == pytest.approx(402 + 0.1 * expected[3])


def test_steps_that_do_not_add_up_are_left_as_they_were() -> None:
    steps = [step(1.0, [], [(100, 0), (50, 0)]), step(2.0, [100, 50], []), step(3.0, [101], []), step(4.0, [102], [])]
    preempted = request(50, [1.5, 2.5, 9.5])  # gone from the third step on, which nothing says
    note_contexts(steps, [request(100, [1.5, 2.5, 3.5, 4.5]), preempted, request(70, [2.5, 3.5])])
    assert [row.longest_tokens for row in steps] == [0, 100, 0, 102]
    assert [row.deviation_tokens for row in steps] == pytest.approx([0.0, 2 * 25.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("folder", "load", "share"),
    [
        ("llama-3.1-8b_bf16_eighth-machine", "chat_q20", 1.0),
        ("llama-3.1-8b_bf16_prefix", "prefix_turns", 1.0),
        ("qwen2.5-14b_bf16_tp2", "offline_n200_chat", 1.0),
        ("llama-3.1-8b_bf16_sixth-machine_batched-2048", "long_among_short", 1.0),
        ("llama-3.1-8b_bf16_preempt", "preempt_256_1024_q8", 0.1),
    ],
)
def test_contexts_of_recordings_add_up_to_what_the_engine_logged(folder: str, load: str, share: float) -> None:
    scenario = read_recording(FOLDER / f"{H200}_{folder}", [load]).scenarios[0]
    decoding = [row for row in scenario.steps if row.seqs]
    assert np.mean([row.longest_tokens > 0 for row in decoding]) >= share
    assert all(row.deviation_tokens == 0.0 or row.longest_tokens * row.seqs > row.kv_tokens for row in decoding)
