"""What if: two set-ups answer the same requests, side by side."""

import streamlit as st

from app_pages import shared
from llmsim import views
from llmsim.charts_run import ecdf_chart, strip_chart, where_chart
from llmsim.command_line import argv_of
from llmsim.runs import with_goodput

TTFT_MS = [50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000]
TPOT_MS = [5, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 500]
HEADLINES = (
    "p99_ttft_ms", "p99_tpot_ms", "slo_attainment", "output_throughput", "cost_per_1m_output_tokens",
)  # fmt: skip

with st.sidebar:
    with shared.error_in_place():
        choice = shared.trace_picker()
    candidate_tab, baseline_tab = st.tabs(["Candidate", "Baseline"])
    with baseline_tab:
        baseline = shared.scenario_picker("base")
    with candidate_tab:
        candidate = shared.scenario_picker("cand", follows="base")
    st.markdown("**Promises**")
    ttft_ms = st.select_slider("TTFT at most (ms)", TTFT_MS, 500, key="slo_ttft", bind="query-params")
    tpot_ms = st.select_slider("TPOT at most (ms)", TPOT_MS, 50, key="slo_tpot", bind="query-params")

shared.page_header("What if", "Two set-ups answer the same requests. Drag a setting and see what it would change.")
if choice is None or baseline is None or candidate is None:
    st.info("The answer appears here once the settings at the left are complete.", icon=":material/arrow_back:")
    st.stop()

pair = {"baseline": baseline, "candidate": candidate}
slo = {"ttft": float(ttft_ms), "tpot": float(tpot_ms)}
folders = None
with shared.error_in_place():
    folders = shared.answers("what_if", choice, pair)
if folders is None:
    st.stop()

runs = {label: with_goodput(shared.read(folder), slo) for label, folder in folders.items()}
numbers = views.kpis(runs["baseline"], runs["candidate"])
shared.kpi_row([number for number in numbers if number.key in HEADLINES])
for label, run in runs.items():
    if run.summary["stable"] is False:
        st.warning(run.summary["stability"], title=f"The {label} does not keep up", icon=":material/trending_up:")

limits_ms = {"ttft": slo["ttft"], "tpot": slo["tpot"], "e2el": None}
for place, (metric, limit_ms) in zip(st.columns(3), limits_ms.items(), strict=True):
    with place:
        frame = shared.cached_frame(views.ecdf, folders, metric=metric)
        alt = f"Cumulative distribution of {metric.upper()}, baseline and candidate"
        shared.chart(ecdf_chart(frame, limit_ms), alt=alt, key=f"what_if_ecdf_{metric}")
left, right = st.columns([3, 2])
with left:
    strip = shared.cached_frame(views.strip, folders)
    said = "Running and waiting requests, KV cache in use, tokens per second and TTFT over simulated time"
    shared.chart(strip_chart(strip), alt=said, key="what_if_strip")
with right:
    where = shared.cached_frame(views.where, folders)
    said = "Mean end-to-end latency split into queue, prefill, decode and preempted, for both set-ups"
    shared.chart(where_chart(where), alt=said, key="what_if_where")
    table = shared.kpi_table(numbers)
shared.footer(
    "what_if",
    commands=[choice.before(), *(argv_of(one, trace=choice.shown(), goodput=slo) for one in pair.values())],
    frames={"numbers": table, "strip": strip, "where": where},
)
