"""The widget that chooses a trace."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import streamlit as st

from app_pages.shared_runs import store
from app_pages.shared_words import plain
from llmsim.choice import OVER_CONTEXT, SHIPPED, Synthesis, TraceChoice, on_disk, shipped

SOURCES = ("shipped", "upload", "file", "synthetic")  # as they are called in links


def trace_picker(key: str = "trace") -> TraceChoice | None:
    """Where the requests come from and how fast; None until a file is given. Shows the reader's error in place."""
    source = st.selectbox("Requests", SOURCES, key=f"{key}_from", bind="query-params")
    choice = {"shipped": _shipped, "upload": _uploaded, "file": _path, "synthetic": _synthetic}[source](key)
    if choice is None:
        return None
    traffic = st.slider(
        "Traffic",
        0.1,
        10.0,
        1.0,
        0.1,
        format="× %.1f",
        key=f"{key}_traffic",
        bind="query-params",
        help="× 2: the same requests arrive in half the time, so that bursts keep their shape.",
    )
    over = "error"
    if source in ("upload", "file"):
        over = st.selectbox(
            "Requests longer than the model's context",
            OVER_CONTEXT,
            key=f"{key}_over",
            bind="query-params",
        )
    return replace(choice, traffic=float(traffic), over_context=over)


def _shipped(key: str) -> TraceChoice:
    name = st.selectbox("Trace", list(SHIPPED), key=key, bind="query-params")
    st.caption(SHIPPED[name])
    return shipped(name)


def _uploaded(key: str) -> TraceChoice | None:
    """The file in the widget; on another page, whose widget is empty, the one that came through the last one."""
    kept = f"{key}_kept"
    file = st.file_uploader(
        "A trace of your own",
        key=f"{key}_file",
        on_change=lambda: st.session_state.pop(kept, None),
        help="CSV, JSON lines or Parquet; Azure, Mooncake, BurstGPT, ShareGPT, vLLM and others are recognised.",
    )
    if file is not None:
        data = file.getvalue()
        st.session_state[kept] = store().keep_upload(file.name, hashlib.sha256(data).hexdigest()[:16], data)
    path = st.session_state.get(kept)
    if path is None or not path.is_file():
        st.caption("Columns such as arrival_time_s, prompt_tokens, output_tokens are recognised by name.")
        return None
    if file is None:
        st.caption(f"{plain(path.name)}, which you uploaded before; another file takes its place.")
    return on_disk(path, path.name)


def _path(key: str) -> TraceChoice | None:
    text = st.text_input(
        "File on this machine", key=f"{key}_path", bind="query-params", placeholder="/data/azure_conv.csv"
    )
    return on_disk(text) if text else None


def _synthetic(key: str) -> TraceChoice:
    usual = Synthesis()
    left, right = st.columns(2)
    with left:
        requests = st.number_input("Requests", 1, 5_000_000, usual.requests, key=f"{key}_n", bind="query-params")
        prompt = st.number_input(
            "Prompt (median tokens)", 1, 1_000_000, usual.prompt_tokens, key=f"{key}_prompt", bind="query-params"
        )
        spread = st.number_input(
            "Spread of lengths (σ)", 0.0, 3.0, usual.spread, 0.1, key=f"{key}_sigma", bind="query-params"
        )
    with right:
        rate = st.number_input(
            "Requests per second", 0.01, 10_000.0, usual.rate, key=f"{key}_rate", bind="query-params"
        )
        output = st.number_input(
            "Answer (median tokens)", 1, 100_000, usual.output_tokens, key=f"{key}_output", bind="query-params"
        )
        cv = st.number_input(
            "Burstiness (CV of gaps)", 0.0, 10.0, usual.burstiness, 0.1, key=f"{key}_cv", bind="query-params"
        )
    seed = st.number_input("Seed of the trace", 0, 2**31, usual.seed, key=f"{key}_seed", bind="query-params")
    made = Synthesis(requests, float(rate), float(cv), prompt, output, float(spread), seed)
    return TraceChoice(synthesis=made)
