"""A page of the shared parts alone, without charts, for AppTest: what 'What if' does, many times a second."""

import streamlit as st

from app_pages import shared
from llmsim.command_line import argv_of

choice = candidate = None
with shared.error_in_place():
    choice = shared.trace_picker()
baseline = shared.scenario_picker("base")
candidate = shared.scenario_picker("cand", follows="base")
if choice is None or baseline is None or candidate is None:
    st.stop()
pair = {"baseline": baseline, "candidate": candidate}
with shared.error_in_place():
    folders, used = shared.answers("small", choice, pair)
    for label, folder in folders.items():
        st.metric(label, shared.read(folder).summary["p99_ttft_ms"])
    shared.command_line(*(argv_of(one, trace=used.shown()) for one in pair.values()))
