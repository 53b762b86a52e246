"""Plan: promises in, cheapest fleets out."""

import os
from dataclasses import replace

import streamlit as st

from app_pages import plan_views as views
from app_pages import shared
from app_pages.quick import answer
from llmsim.engines import ENGINES
from llmsim.hardware import gpu_names, model_names
from llmsim.plan_study import Demand, planned, quick
from llmsim.scenario import QUANTIZATIONS, Scenario

PROMISES = ["ttft_p99=500ms", "tpot_p95=50ms"]
MORE_PROMISES = ["ttft_p50=200ms", "ttft_p99=1s", "tpot_p99=40ms", "itl_p99=100ms", "e2el_p99=20s"]
GPUS = ["h100-sxm", "h200-sxm"]
PUBLISHED = "as published"
NO_CONFIDENCE, CONFIDENCES = "as calibrated", ("0.8", "0.9", "0.95", "0.99")


def model_picker() -> dict[str, object]:
    models = list(model_names())
    model = st.selectbox("Model", models, models.index("llama-3.1-8b"), key="plan_model", bind="query-params")
    weights = st.selectbox("Weights", [PUBLISHED, *QUANTIZATIONS], key="plan_weights", bind="query-params")
    more = st.text_input(
        "Other settings",
        key="plan_more",
        bind="query-params",
        placeholder="kv_cache_dtype=fp8 max_num_seqs=128",
        help="Any field of a scenario as FIELD=VALUE, separated by spaces.",
    )
    fields: dict[str, object] = {"model": model}
    if weights != PUBLISHED:
        fields["quantization"] = weights
    return fields | shared.other_fields(more)


def fleet_picker() -> dict[str, tuple[object, ...]]:
    first, second, third = st.columns([4, 2, 3])
    with first:
        gpus = st.multiselect("GPUs", list(gpu_names()), GPUS, key="plan_gpus", bind="query-params")
    with second:
        sizes = st.multiselect(
            "GPUs of a replica", [1, 2, 4, 8], [1, 2], key="plan_tp", bind="query-params", help="Tensor parallelism."
        )
    with third:
        engines = st.multiselect("Engines", list(ENGINES), ["vllm"], key="plan_engines", bind="query-params")
    for name, chosen in (("GPU", gpus), ("number of GPUs of a replica", sizes), ("engine", engines)):
        if not chosen:
            raise ValueError(f"no {name}: choose one or more")
    return {"gpus": tuple(gpus), "tensor_parallels": tuple(sizes), "engines": tuple(engines)}


def demand_picker() -> dict[str, float | int | None]:
    first, second, third, fourth, fifth = st.columns(5)
    with first:
        rate = st.number_input(
            "Rate to hold (per s)", 0.0, None, 40.0, key="plan_rate", bind="query-params",
            help="Requests per second; sessions per second of a trace whose turns wait. 0: the trace's own, or the "
            "highest one where replicas are given.",
        )  # fmt: skip
    with second:
        replicas = st.number_input(
            "Replicas", 1, None, None, key="plan_replicas", bind="query-params", placeholder="as few as hold it",
            help="Given: the fleet is fixed. Without a rate the highest one that it holds is looked for.",
        )  # fmt: skip
    with third:
        budget = st.number_input(
            "Budget ($ per hour)", 0.0, None, None, key="plan_budget", bind="query-params", placeholder="none"
        )
    with fourth:
        most = st.number_input("GPUs at most", 1, None, 256, key="plan_most", bind="query-params")
    with fifth:
        confidence = st.selectbox(
            "Confidence", [NO_CONFIDENCE, *CONFIDENCES], key="plan_sure", bind="query-params",
            help="The answers hold with this probability, given how far the cost model may be off. Looked at on the "
            "whole trace.",
        )  # fmt: skip
    for field, value, limit in (
        ("Rate to hold", rate, 10_000),
        ("Replicas", replicas, 64),
        ("GPUs at most", most, 512),
    ):
        shared.within(field, value, limit, "llmsim plan takes any")
    return {
        "rate": rate or None,
        "replicas": replicas,
        "budget_usd_per_h": budget,
        "max_gpus": most,
        "confidence": None if confidence == NO_CONFIDENCE else float(confidence),
    }


with st.sidebar:
    choice = fields = None
    with shared.error_in_place():
        choice = shared.trace_picker()
    with shared.error_in_place():
        fields = model_picker()

shared.page_header("Plan", "Promises in, cheapest fleets out: how many GPUs, of which kind, for these requests.")
demand = None
with shared.error_in_place():
    slos = st.multiselect(
        "Promises",
        [*PROMISES, *MORE_PROMISES],
        PROMISES,
        key="plan_slos",
        bind="query-params",
        accept_new_options=True,
        help="METRIC_STATISTIC=LIMIT: ttft, tpot, itl or e2el; mean, median, p1 to p99.99; us, ms or s. Type your own.",
    )
    kinds = fleet_picker()
    asked = demand_picker()
    if choice is not None and fields is not None:
        scenario = Scenario.from_dict(fields | {"gpu": kinds["gpus"][0]}, source="other settings")
        shared.check_size(scenario)
        shared.ask_for_files(scenario)
        demand = Demand(choice, scenario, tuple(slos), **kinds, **asked)
if demand is None:
    shared.end_page()

with shared.error_in_place():
    whole, sample, found = choice.size(demand.scenario), quick(demand), None
    if whole > sample.limit or demand.confidence is not None:
        found = shared.long_job("plan_job", "Plan on the whole trace", planned, demand, os.cpu_count() or 1)
    used = demand if found is not None else sample
    found = found if found is not None else answer(planned, sample)
    covered = "all" if used.limit is None or whole <= used.limit else f"the first {used.limit:,} of"
    sure = "" if found.confidence is None else f", so that answers hold with probability {found.confidence:g}"
    st.caption(f"Planned on {covered} {whole:,} requests{sure}.")
    shared.say(choice.notes(demand.scenario))
    views.show(demand, replace(used, limit=None) if covered == "all" else used, found)
