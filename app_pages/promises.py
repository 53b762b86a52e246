"""The widgets that say what answers have to keep to; the same keys, and so the same promises, on every page."""

from __future__ import annotations

import streamlit as st

TTFT_MS = [50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000]
TPOT_MS = [5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 500]


def promises() -> tuple[tuple[str, float], ...]:
    """(latency, ms) pairs."""
    st.markdown("**Promises**")
    ttft_ms = st.select_slider("TTFT at most (ms)", TTFT_MS, 500, key="slo_ttft", bind="query-params")
    tpot_ms = st.select_slider("TPOT at most (ms)", TPOT_MS, 50, key="slo_tpot", bind="query-params")
    return ("ttft", float(ttft_ms)), ("tpot", float(tpot_ms))
