"""What if: two set-ups on the same requests, side by side."""

import streamlit as st

from app_pages import shared
from llmsim.command_line import argv_of

shared.page_header("What if", "Two set-ups answer the same requests. Drag a setting and see what it would change.")
with st.sidebar:
    st.subheader("Requests")
    with shared.error_in_place():
        choice = shared.trace_picker()
    candidate_tab, baseline_tab = st.tabs(["Candidate", "Baseline"])
    with baseline_tab:
        baseline = shared.scenario_picker("base")
    with candidate_tab:
        candidate = shared.scenario_picker("cand", follows="base")
if choice is None or baseline is None or candidate is None:
    st.stop()
with shared.error_in_place():
    runs = shared.full_runs("whatif", choice, {"baseline": baseline, "candidate": candidate})
    if runs is None:
        runs = shared.quick_runs(choice, {"baseline": baseline, "candidate": candidate})
    st.write({k: shared.read(v).summary["p99_ttft_ms"] for k, v in runs.items()})
shared.command_line(argv_of(baseline, trace=choice.command_line()), argv_of(candidate, trace=choice.command_line()))
