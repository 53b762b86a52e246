"""The widgets that make a scenario."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app_pages.shared_files import ask_for_files
from app_pages.shared_output import error_in_place
from llmsim.cli_options import value_of
from llmsim.engines import ENGINES
from llmsim.hardware import gpu_names, model_names
from llmsim.routers import BUILTIN as ROUTERS
from llmsim.scenario import KV_CACHE_DTYPES, QUANTIZATIONS, Scenario
from llmsim.schedulers import BUILTIN as SCHEDULERS
from llmsim.simulate import blocks_of

OWN = "auto"  # the engine decides, for this model and GPU
SEQS = [OWN, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048]
TOKENS = [OWN, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
MEMORY = [OWN, *(share / 100 for share in range(50, 99, 2))]
MOST_REPLICAS = 256  # of what a page simulates at once, in the server's own process
SWITCH = ("on", "off")
WIDGETS = (
    "model", "gpu", "tp", "replicas", "engine", "scheduler", "seqs", "tokens", "memory", "weights", "kv", "router",
    "prefixes", "chunks", "more",
)  # fmt: skip


def scenario_picker(key: str, label: str = "", *, follows: str | None = None) -> Scenario | None:
    """A model, a GPU, an engine and its settings; None after showing what is wrong with them, in place.

    `follows`: the key of another picker, drawn before this one. A widget here that shows the same as its counterpart
    there goes along when that one changes.
    """
    if label:
        st.markdown(f"**{label}**")
    if follows is not None:
        _follow(key, follows)
    values = _hardware(key) | _engine(key) | _details(key)
    with error_in_place():
        return _made(values, st.session_state.get(f"{key}_more", ""))
    return None


def _follow(key: str, leader: str) -> None:
    """Carry over what changed there since the last time, where both were alike before."""
    state = st.session_state
    seen: dict[str, Any] = state.setdefault(f"{key}_seen", {})
    for name in WIDGETS:
        now, before = state.get(f"{leader}_{name}"), seen.get(name)
        if name in seen and now is not None and now != before and state.get(f"{key}_{name}", before) == before:
            state[f"{key}_{name}"] = now
        if now is not None:
            seen[name] = now


def _made(values: dict[str, Any], more: str) -> Scenario:
    """Checked as far as a simulation would: against the model, the GPU and its memory."""
    given = {name: value for name, value in values.items() if value is not None}
    scenario = Scenario.from_dict(given | other_fields(more), source="other settings")
    check_size(scenario)
    ask_for_files(scenario)
    blocks_of(scenario)
    return scenario


def check_size(*scenarios: Scenario) -> None:
    """Raises ValueError for more than a page answers at once, whichever setting says so."""
    for scenario in scenarios:
        within("replicas", scenario.replicas, MOST_REPLICAS, "llmsim replay takes any")


def within(field: str, value: float | None, most: float, instead: str) -> None:
    """A limit of the page's own, which the library does not have."""
    if value is not None and value > most:
        raise ValueError(f"{field}={value:,.10g} is more than this page tries, {most:,}: {instead}")


def other_fields(text: str) -> dict[str, Any]:
    """{"watermark": 0.01} from "watermark=0.01"; words as on the command line."""
    fields: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError:
        raise ValueError(f"other settings {text!r}: a quote or a backslash is left open: close it") from None
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"other settings {word!r}: write FIELD=VALUE, e.g. kv_cache_dtype=fp8")
        if name in fields:
            raise ValueError(f"other settings: {name} is given twice, {fields[name]!r} and {value!r}: leave one out")
        fields[name] = value_of(value)
    return fields


def _hardware(key: str) -> dict[str, Any]:
    models, gpus = list(model_names()), list(gpu_names())
    values: dict[str, Any] = {"model": _select("Model", models, key, "model", "llama-3.1-8b")}
    values["gpu"] = _select("GPU", gpus, key, "gpu", "h100-sxm")
    left, right = st.columns(2)
    with left:
        values["tensor_parallel"] = st.selectbox("Tensor parallel", [1, 2, 4, 8], key=f"{key}_tp", bind="query-params")
    with right:
        values["replicas"] = st.number_input(
            "Replicas", 1, MOST_REPLICAS, 1, key=f"{key}_replicas", bind="query-params"
        )
    return values


def _engine(key: str) -> dict[str, Any]:
    left, right = st.columns(2)
    with left:
        values: dict[str, Any] = {"engine": _select("Engine", list(ENGINES), key, "engine", "vllm")}
    with right:
        policies = [name for name in SCHEDULERS if name != "vllm-native"]
        values["scheduler"] = _own(_select("Policy", [OWN, *policies], key, "scheduler", OWN))
    values["max_num_batched_tokens"] = _slide("Tokens of one iteration", TOKENS, key, "tokens")
    values["max_num_seqs"] = _slide("Requests running at once", SEQS, key, "seqs")
    return values


def _details(key: str) -> dict[str, Any]:
    with st.expander("More settings"):
        left, right = st.columns(2)
        with left:
            weights = _select("Weights", ["as published", *QUANTIZATIONS], key, "weights", "as published")
            prefixes = _select("Prefix caching", SWITCH, key, "prefixes", "on")
        with right:
            kv = _select("KV cache", list(KV_CACHE_DTYPES), key, "kv", "auto")
            chunks = _select("Chunked prefill", SWITCH, key, "chunks", "on")
        router = _select("Router", list(ROUTERS), key, "router", "round_robin")
        memory = _slide("Share of GPU memory", MEMORY, key, "memory")
        st.text_input(
            "Other settings",
            key=f"{key}_more",
            bind="query-params",
            placeholder="watermark=0.01 seed=1",
            help="Any field of a scenario as FIELD=VALUE, separated by spaces; they override the widgets.",
        )
    values: dict[str, Any] = {
        "quantization": None if weights == "as published" else weights,
        "kv_cache_dtype": kv,
        "router": router,
        "gpu_memory_utilization": memory,
    }
    if prefixes == "off":  # on is the engine's business: some have none
        values["enable_prefix_caching"] = False
    if chunks == "off":
        values["enable_chunked_prefill"] = False
    return values


def _select(label: str, options: Sequence[Any], key: str, name: str, usual: Any) -> Any:
    """The usual one comes first: a default elsewhere could not be carried over from another picker."""
    ordered = [usual, *(option for option in options if option != usual)]
    return st.selectbox(label, ordered, key=f"{key}_{name}", bind="query-params")


def _slide(label: str, options: Sequence[Any], key: str, name: str) -> Any:
    return _own(st.select_slider(label, options, key=f"{key}_{name}", bind="query-params"))


def _own(value: Any) -> Any:
    return None if value == OWN else value
