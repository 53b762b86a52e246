"""SGLang's policy on the radix cache against a plain scheduling round, round by round over random requests."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from plain_sglang import PlainRequest, PlainSglang
from stepping import Stepped

from llmsim.radixcache import RadixCache
from llmsim.request import Request
from llmsim.schedulers.sglang import Sglang

ID_TOKENS = 16


def pair_of(random: Random, id_: int, typical_tokens: int) -> tuple[Request, PlainRequest]:
    prompt = max(1, int(random.lognormvariate(0.0, 0.8) * typical_tokens))
    output = max(1, int(random.lognormvariate(0.0, 0.8) * typical_tokens / 2))
    named = prompt + random.choice((0, output))
    ids = -(-named // ID_TOKENS)
    family, common = random.randrange(4), random.choice((0, random.randrange(ids + 1), ids))
    names = tuple((family, i) if i < common else ("own", id_, i) for i in range(ids))
    tokens = tuple((names[at // ID_TOKENS], at) if at < named else (id_, at) for at in range(prompt + output + 1))
    priority = random.randrange(3)
    fast = Request(id_, float(id_), prompt, output, priority, names, named)
    return fast, PlainRequest(id_, prompt, output, priority, tokens)


CASES: list[Any] = [  # tokens of the pool, page, slots, chunk, options of both
    pytest.param(4000, 1, 64, 200, {}, id="ample"),
    pytest.param(500, 1, 64, 100, {"conservativeness": 0.1}, id="tight"),
    pytest.param(480, 4, 64, 64, {"conservativeness": 0.2}, id="pages of 4"),
    pytest.param(500, 1, 64, 100, {"conservativeness": 0.2, "mixed": True}, id="mixed"),
    pytest.param(600, 1, 6, 60, {"interval": 3}, id="interval, few slots"),
    pytest.param(600, 1, 12, 100, {"policy": "lpm", "conservativeness": 0.3}, id="lpm"),
    pytest.param(600, 1, 12, 100, {"policy": "hrrn"}, id="hrrn"),
    pytest.param(600, 1, 12, 100, {"policy": "lof", "conservativeness": 0.1}, id="lof"),
    pytest.param(700, 1, 5, 100, {"priorities": True, "threshold": 0, "conservativeness": 0.1}, id="priorities"),
]
NAMES = {
    "policy": "schedule_policy", "conservativeness": "schedule_conservativeness", "mixed": "enable_mixed_chunk",
    "interval": "prefill_decode_interval", "priorities": "enable_priority_scheduling",
    "threshold": "priority_scheduling_preemption_threshold",
}  # fmt: skip


def race(
    seed: int, tokens: int, page: int, seqs: int, chunk: int, options: dict[str, Any], asynchronous: bool
) -> tuple[Stepped, PlainSglang]:
    random = Random(seed)
    policy = Sglang(**{NAMES[name]: value for name, value in options.items()})
    fast = Stepped(
        policy, RadixCache(tokens // page, page, prefix_block_tokens=ID_TOKENS), seqs=seqs, budget=chunk,
        asynchronous=asynchronous,
    )  # fmt: skip
    plain = PlainSglang(tokens // page, page, seqs, chunk, asynchronous, **options)
    made = 0
    for step in range(3000):
        while made < 80 and random.random() < 0.3:
            one, other = pair_of(random, made, 40)
            if one.prompt_tokens + one.output_tokens + 2 * page + 2 < tokens // 2:
                fast.add(one)
                other.seen = plain.computed
                plain.waiting.append(other)
            made += 1
        got = fast.step(float(step))
        assert (got.decodes, got.chunks, got.preempted) == plain.step(), step
        kv, tree = fast.engine.kv, plain.tree
        assert (kv.free_blocks, kv.idle_blocks, kv.evicted_blocks) == (tree.empty + tree.idle, tree.idle, tree.evicted)
        if made == 80 and not fast.engine.running and not fast.engine.waiting:
            break
    assert fast.finished == plain.finished
    assert not fast.engine.waiting
    return fast, plain


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "page", "seqs", "chunk", "options"), CASES)
def test_every_round_is_the_plain_one(
    tokens: int, page: int, seqs: int, chunk: int, options: dict[str, Any], seed: int, asynchronous: bool
) -> None:
    race(seed, tokens, page, seqs, chunk, options, asynchronous)


def test_the_cases_retract_evict_and_share() -> None:
    """Agreement says something only if this happens."""
    retracted = evicted = 0
    for case in CASES[1:]:
        tokens, page, seqs, chunk, options = case.values
        fast, _ = race(1, tokens, page, seqs, chunk, options, True)
        retracted += fast.engine.preemptions > 0
        evicted += fast.engine.kv.evicted_blocks > 0
        assert fast.engine.hit_tokens > 0
    assert retracted >= 4
    assert evicted == len(CASES) - 1
