"""Plan: promises in, cheapest fleets out."""

import os

import streamlit as st

from app_pages import plan_views as views
from app_pages import quick, shared
from app_pages.shared_scenario import other_fields
from llmsim.engines import ENGINES
from llmsim.hardware import gpu_names, model_names
from llmsim.plan_study import Demand, planned, quick_requests
from llmsim.scenario import QUANTIZATIONS, Scenario

PROMISES = ["ttft_p99=500ms", "tpot_p95=50ms"]
MORE_PROMISES = ["ttft_p50=200ms", "ttft_p99=1s", "tpot_p99=40ms", "itl_p99=100ms", "e2el_p99=20s"]
GPUS = ["h100-sxm", "h200-sxm"]
PUBLISHED = "as published"


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
    return fields | other_fields(more)


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
    first, second, third, fourth = st.columns(4)
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
        most = st.number_input("GPUs at most", 1, 10_000, 256, key="plan_most", bind="query-params")
    return {"rate": rate or None, "replicas": replicas, "budget_usd_per_h": budget, "max_gpus": most}


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
        demand = Demand(choice, scenario, tuple(slos), **kinds, **asked)
if demand is None:
    st.stop()

with shared.error_in_place():
    limit = quick_requests(demand)
    whole = len(choice.load())
    sample = views.limited(demand, limit)
    found = None
    if whole > limit:
        found = shared.long_job("plan_job", "Plan on the whole trace", planned, demand, os.cpu_count() or 1)
    used = demand if found is not None else sample
    found = found if found is not None else quick.answer(planned, sample)
    covered = "all" if used.limit is None or whole <= limit else f"the first {limit:,} of"
    st.caption(f"Planned on {covered} {whole:,} requests.")
    views.show(demand, used, found)
