"""The installed vLLM's scheduler on our clock. Without vLLM a plain stand-in takes its place (`plain_vllm`)."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from plain_vllm import PlainVllm

from llmsim.plugins import PolicyError
from llmsim.request import Request
from llmsim.scenario import Scenario
from llmsim.schedulers import load_scheduler, vllm_installed, vllm_native
from llmsim.schedulers.vllm_native import TokenIds
from llmsim.simulate import simulate
from llmsim.trace import Trace

SETTINGS: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_native, "InstalledVllm", PlainVllm)
    monkeypatch.setattr(vllm_native, "vllm_version", lambda: "plain")


def chat(n: int = 120, seed: int = 0) -> Trace:
    random = np.random.default_rng(seed)
    at_s = np.cumsum(random.exponential(0.05, n))
    lengths = (np.clip(random.lognormal(np.log(mean), 0.8, n).astype(int), 1, 2000) for mean in (300, 80))
    return Trace("chat", at_s - at_s[0], *lengths, priority=random.integers(0, 3, n))


# ---- without vLLM --------------------------------------------------------------------------------------------------


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    vllm_installed._vllm.cache_clear()
    with pytest.raises(ValueError, match=r"needs vLLM, which is not installed here\. pip install 'llmsim\[native\]'"):
        load_scheduler("vllm-native")
    with pytest.raises(ValueError, match="not installed here"):
        simulate(chat(3), Scenario(**SETTINGS, scheduler="vllm-native"))


def test_a_vllm_that_does_not_load_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleType("vllm")
    broken.__spec__ = importlib.util.spec_from_loader("vllm", None)
    broken.__path__ = []  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", broken)
    vllm_installed._vllm.cache_clear()
    with pytest.raises(ValueError, match=r"the installed vLLM does not load: No module named 'vllm\.config'") as error:
        load_scheduler("vllm-native")
    assert "\n" not in str(error.value)
    vllm_installed._vllm.cache_clear()


def test_settings_of_another_scheduler_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler_args watermark=0\.1: the scheduler vllm-native takes it from"):
        Scenario(**SETTINGS, scheduler="vllm-native", scheduler_args={"watermark": 0.1})
    Scenario(**SETTINGS, scheduler="vllm-native", watermark=0.1, long_prefill_token_threshold=64)


# ---- token ids -----------------------------------------------------------------------------------------------------


def named(prompt: int, output: int, ids: tuple[str, ...], identity_tokens: int | None = None) -> Request:
    request = Request(0, 0.0, prompt, output)
    request.prefix_ids = ids
    request.identity_tokens = prompt if identity_tokens is None else identity_tokens
    return request


def test_equal_prefix_ids_become_equal_tokens_and_nothing_else_is_equal() -> None:
    tokens = TokenIds(4)
    first = tokens.of(named(10, 3, ("a", "b", "c")))
    second = tokens.of(named(12, 2, ("a", "b", "d")))
    assert len(first) == 13
    assert len(second) == 14
    assert first[:8] == second[:8]
    assert not set(first[8:]) & set(second[8:])
    assert len(set(first)) == 13


def test_a_partial_last_id_is_the_beginning_of_the_whole_one() -> None:
    tokens = TokenIds(4)
    short = tokens.of(named(6, 5, ("a", "b")))
    whole = tokens.of(named(8, 1, ("a", "b")))
    assert short[:6] == whole[:6]
    assert not set(short[6:]) & set(whole)  # its answer is its own


def test_ids_of_the_answer_go_on_behind_the_prompt() -> None:
    tokens = TokenIds(4)
    turn = tokens.of(named(5, 3, ("a", "b"), identity_tokens=8))
    following = tokens.of(named(10, 1, ("a", "b", "c")))
    assert turn == following[:8]


def test_without_prefix_ids_all_tokens_differ() -> None:
    tokens = TokenIds(0)
    assert not set(tokens.of(Request(0, 0.0, 9, 2))) & set(tokens.of(Request(1, 0.0, 9, 2)))


# ---- the mirror, with a stand-in that decides ----------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_times_are_those_of_our_own_scheduler(stand_in: None, asynchronous: bool, policy: str) -> None:
    """Under pressure, so that preemptions, resumptions and partial chunks are repeated too."""
    settings = SETTINGS | {
        "num_gpu_blocks_override": 200, "max_num_batched_tokens": 512, "max_num_seqs": 64,
        "async_scheduling": asynchronous, "scheduling_policy": policy, "long_prefill_token_threshold": 300,
    }  # fmt: skip
    ours, theirs = (simulate(chat(), Scenario(**settings, scheduler=name)) for name in ("vllm", "vllm-native"))
    assert ours.stats["preemptions"] > 10
    assert ours.stats == theirs.stats
    for name, column in ours.requests.items():
        np.testing.assert_allclose(column, theirs.requests[name], rtol=0, atol=1e-9, err_msg=name)


class Late(PlainVllm):
    """Lets a request go on one token longer than asked."""

    def update(self, raw: Any, tokens: dict[str, int]) -> list[tuple[str, int, str | None]]:
        return [(name, count, None) for name, count, _ in super().update(raw, tokens)]


class Skipping(PlainVllm):
    """Claims to have computed one token more than it has."""

    def schedule(self) -> Any:
        answer = super().schedule()
        shares = [s._replace(computed_before=s.computed_before + (s.computed_before > 0)) for s in answer.scheduled]
        return answer._replace(scheduled=shares)


@pytest.mark.parametrize(
    ("stranger", "sentence"),
    [
        (Late, r"vLLM plain: request 0 goes on after 2 of 2 tokens\. This version schedules in a way"),
        (Skipping, r"vLLM plain: request 0 runs 1 tokens behind 11; the replica has it at 10\. This version"),
    ],
)
def test_a_vllm_that_the_replica_cannot_follow_is_named(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, stranger: type, sentence: str
) -> None:
    monkeypatch.setattr(vllm_native, "InstalledVllm", stranger)
    trace = Trace("two", np.array([0.0]), np.array([10]), np.array([2]))
    with pytest.raises(PolicyError, match=sentence):
        simulate(trace, Scenario(**SETTINGS, scheduler="vllm-native"))


# ---- with vLLM -----------------------------------------------------------------------------------------------------


def test_the_installed_vllm_gives_the_times_of_our_own_scheduler() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: docs/policies/vllm-native.md says how")
    vllm_installed._vllm.cache_clear()
    settings = SETTINGS | {"num_gpu_blocks_override": 200, "max_num_batched_tokens": 512, "max_num_seqs": 64}
    ours, theirs = (simulate(chat(), Scenario(**settings, scheduler=name)) for name in ("vllm", "vllm-native"))
    assert ours.stats == theirs.stats
    np.testing.assert_allclose(ours.requests["finish_s"], theirs.requests["finish_s"], rtol=0, atol=1e-9)
