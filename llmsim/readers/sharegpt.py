"""Conversations and prompts as text: ShareGPT JSON, and vLLM's custom JSON lines. No times, no token counts.

Tokens come from a configured tokenizer, else from the estimate of four characters a token, named as an estimate.
`first-pair` is vLLM's choice: the first two messages whatever their roles, prompt and answer of at least 4 tokens,
prompt at most 1024, sum at most 2048, in the order of Python's `random.Random(seed).shuffle`.
`multi-turn` makes a request of every assistant message that follows a human one: its prompt is the whole history, so a
leading assistant message is context. Later turns wait for the one before; no think time is recorded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from llmsim.readers.rows import ReadOptions, Rows
from llmsim.readers.table import Records
from llmsim.readers.values import count_of, missing_field

CHARACTERS_PER_TOKEN = 4
ASSISTANT = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}
HUMAN = {"human", "user"}
BLOCK_TOKENS = 16  # grid on which turns of one conversation share their history
LEAST_TOKENS, MOST_PROMPT_TOKENS, MOST_TOKENS = 4, 1024, 2048  # vLLM's filter


def fits(keys: set[str]) -> bool:
    return "conversations" in keys or "conversation" in keys


def fits_prompts(keys: set[str]) -> bool:
    return "prompt" in keys and "prompt_tokens" not in keys


def _counter(options: ReadOptions, notes: list[str]) -> Callable[[str], int]:
    if options.tokenizer is not None:
        return options.tokenizer
    notes.append(f"token counts are an ESTIMATE: {CHARACTERS_PER_TOKEN} characters a token, rounded up (no tokenizer)")
    return lambda text: -(-len(text) // CHARACTERS_PER_TOKEN)


def read(table: Records, options: ReadOptions) -> Rows:
    notes: list[str] = []
    count = _counter(options, notes)
    column = table.find("conversations", "conversation", "messages")
    assert column is not None
    talks = [_messages(table, row, talk) for row, talk in enumerate(table.raw(column))]
    build = _first_pairs if options.sharegpt_mode == "first-pair" else _turns
    rows = build(table, talks, count, options)
    rows.notes[:0] = notes
    if not len(rows.line):
        reasons = "; ".join(f"{number} {reason}" for reason, number in rows.dropped.items())
        raise ValueError(f"{table.name}: no requests in {len(table)} conversations ({reasons})")
    return rows


def _messages(table: Records, row: int, talk: object) -> list[tuple[str, str]]:
    where = f"{table.name}: {table.unit} {table.lines[row]}"
    if not isinstance(talk, list):
        raise ValueError(f"{where}: conversations missing or not a list; every element needs a list of messages")
    messages = []
    for message in talk:
        role = message.get("from", message.get("role")) if isinstance(message, dict) else None
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"{where}: a message needs from and value (or role and content), both text")
        messages.append((role.casefold(), text))
    return messages


def _first_pairs(
    table: Records, talks: list[list[tuple[str, str]]], count: Callable[[str], int], options: ReadOptions
) -> Rows:
    order = list(range(len(talks)))
    random.Random(options.seed).shuffle(order)
    kept: list[tuple[int, int, int]] = []
    dropped = {"conversation shorter than two messages": 0, "outside the length filter of first-pair": 0}
    for row in order:
        if len(talks[row]) < 2:
            dropped["conversation shorter than two messages"] += 1
            continue
        prompt, output = count(talks[row][0][1]), count(talks[row][1][1])
        short = min(prompt, output) < LEAST_TOKENS
        if short or prompt > MOST_PROMPT_TOKENS or prompt + output > MOST_TOKENS:
            dropped["outside the length filter of first-pair"] += 1
            continue
        kept.append((int(table.lines[row]), prompt, output))
    columns = np.array(kept, dtype=np.int64).reshape(-1, 3)
    rows = Rows("sharegpt", columns[:, 0], columns[:, 1], columns[:, 2], unit=table.unit)
    rows.dropped = {reason: number for reason, number in dropped.items() if number}
    rows.notes.append(f"first-pair: first two messages of each conversation, shuffled with seed {options.seed}")
    return rows


def _turns(
    table: Records, talks: list[list[tuple[str, str]]], count: Callable[[str], int], options: ReadOptions
) -> Rows:
    line: list[int] = []
    prompts: list[int] = []
    outputs: list[int] = []
    parent: list[int] = []
    session: list[str] = []
    blocks: list[tuple[Any, ...]] = []
    answers: list[tuple[Any, ...]] = []
    fresh = empty = leading = 0
    block_tokens = options.block_tokens or BLOCK_TOKENS
    for row, talk in enumerate(talks):
        history, previous, stream = 0, -1, list[int]()
        leading += bool(talk) and talk[0][0] in ASSISTANT
        for place, (role, text) in enumerate(talk):
            tokens = count(text)
            if role in ASSISTANT and place and talk[place - 1][0] in HUMAN:
                needed = -(-(history + tokens) // block_tokens)
                stream += range(fresh, fresh + needed - len(stream))
                fresh = stream[-1] + 1 if stream else fresh
                asked = -(-history // block_tokens)
                blocks.append(tuple(stream[:asked]))
                answers.append(tuple(stream[asked:needed]))
                line.append(int(table.lines[row]))
                prompts.append(history)
                outputs.append(tokens)
                parent.append(previous)
                session.append(str(row))
                previous = len(line) - 1
            history += tokens
        empty += previous < 0
    lines, asked_tokens, said_tokens = (np.array(column, dtype=np.int64) for column in (line, prompts, outputs))
    rows = Rows("sharegpt", lines, asked_tokens, said_tokens, unit=table.unit)
    rows.parent, rows.delay_s = np.array(parent, dtype=np.int64), np.zeros(len(line))
    rows.session, rows.ids = session, [str(row) for row in range(len(line))]
    rows.block_tokens, rows.block_ids, rows.output_block_ids = block_tokens, blocks, answers
    if empty:
        rows.dropped["conversation without an answer to a human message"] = empty
    rows.notes.append(
        "multi-turn: the prompt of a turn is its whole history, shared with the turns before it; a turn waits for the "
        "one before, without think time"
    )
    if leading:
        rows.notes.append(
            f"{leading} conversations begin with an assistant message: treated as context, not as a request"
        )
    return rows


def read_prompts(table: Records, options: ReadOptions) -> Rows:
    notes: list[str] = []
    texts = table.raw("prompt")
    bad = [int(table.lines[row]) for row, text in enumerate(texts) if not isinstance(text, str)]
    if bad:
        raise missing_field(table.name, "prompt (as text)", bad, table.unit)
    column = table.find("output_tokens", "output_length", "output_len")
    if column is None:
        raise ValueError(
            f"{table.name}: {table.unit} {table.lines[0]}: output_tokens missing (found {', '.join(table.names)}); the "
            "replay needs the length of every answer"
        )
    outputs = table.ints(column)
    count = _counter(options, notes)
    prompts = np.array([count_of(count(text), text=False) for text in texts], dtype=np.int64)
    return Rows("prompts", table.lines, prompts, outputs, unit=table.unit, notes=notes)
