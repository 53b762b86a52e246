"""Prefill vs decode: why the two phases of one model differ, and what the engine makes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import streamlit as st

from app_pages import shared
from llmsim import charts_burst, charts_phases, phases, phases_burst, phases_curves, phases_table, phases_words
from llmsim.command_line import argv_of
from llmsim.hardware import gpu_names, model_names
from llmsim.scenario import KV_CACHE_DTYPES, QUANTIZATIONS, Scenario

PUBLISHED = "published"
LENGTHS = [2 << i for i in range(17)]  # tokens: 2 to 131,072
BATCHES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
TITLES = {"context": "Tokens cached of each request", "batch": "Requests in the batch"}
COLUMNS = {"context": "context_tokens", "batch": "batch"}
BOUND: dict[str, Any] = {"bind": "query-params"}


def cached(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the library computed for the same arguments, whoever asked."""
    return st.cache_data(function, max_entries=128, show_spinner=False)(*arguments, **options)


def pick_scenario() -> Scenario:
    models, gpus = list(model_names()), list(gpu_names())
    model = st.selectbox("Model", models, models.index("llama-3.1-8b"), key="ph_model", **BOUND)
    gpu = st.selectbox("GPU", gpus, gpus.index("h100-sxm"), key="ph_gpu", **BOUND)
    left, right = st.columns(2)
    weights = left.selectbox("Weights", [PUBLISHED, *QUANTIZATIONS], key="ph_weights", **BOUND)
    kv = right.selectbox("KV cache", list(KV_CACHE_DTYPES), key="ph_kv", **BOUND)
    ranks = st.segmented_control("GPUs of one replica", [1, 2, 4, 8], default=1, required=True, key="ph_tp", **BOUND)
    quantization = None if weights == PUBLISHED else weights
    return Scenario(model=model, gpu=gpu, tensor_parallel=ranks, quantization=quantization, kv_cache_dtype=kv)


def roofline(scenario: Scenario, sizes: dict[str, int]) -> None:
    by = st.segmented_control(
        "What moves", list(phases_curves.BY), default="batch", required=True, key="ph_by", **BOUND
    )
    moves = cached(phases_curves.moves, scenario, by, **sizes)
    left, right = st.columns([3, 1.25])
    with left:
        drawing = charts_phases.moves_chart(moves.frame)
        shared.chart(drawing, alt=phases_words.moves_in_words(moves, by), key="ph_roofline_chart")
    with right:
        st.table(phases_table.beside(moves.prefill, moves.decode), alt="Prefill and decode side by side")
        for line in moves.left_out:
            st.caption(f"Left out: {shared.plain(line)}")
        shared.downloads("ph_roofline", moves.frame, name="roofline", drawing=drawing)


def times(scenario: Scenario, sizes: dict[str, int], outcome: phases.Phases) -> None:
    prompt, batch, context = sizes["prompt_tokens"], sizes["batch"], sizes["context_tokens"]
    across = st.segmented_control(
        "Decode against", list(TITLES), default="context", required=True, key="ph_across", **BOUND
    )
    left, right = st.columns(2)
    with left:
        st.markdown("**Prefill**: linear layers grow with the tokens, attention with their square")
        growth = cached(phases_curves.prefill_growth, scenario, prompt)
        drawing = charts_phases.growth_chart(growth, "prompt_tokens", "prefill", here=prompt, title="Prompt (tokens)")
        shared.chart(drawing, alt=phases_words.growth_in_words(growth, "prompt_tokens"), key="ph_prefill_chart")
        shared.downloads("ph_prefill", growth, name="prefill", drawing=drawing)
    with right:
        st.markdown("**Decode**: weights are read once a step, the cache of every request")
        if across == "batch":
            steps = cached(phases_curves.decode_by_batch, scenario, context)
        else:
            steps = cached(phases_curves.decode_by_context, scenario, batch, context)
        drawing = charts_phases.growth_chart(
            steps, COLUMNS[across], "decode", here=sizes[COLUMNS[across]], title=TITLES[across]
        )
        shared.chart(drawing, alt=phases_words.growth_in_words(steps, COLUMNS[across]), key="ph_decode_chart")
        shared.downloads("ph_decode", steps, name="decode", drawing=drawing)
    st.caption("Dashed: time on both clocks, the host's included. The line: the setting on the left.")
    for line in phases_table.growing(outcome):
        st.markdown(f"- {line}")


def one_batch(scenario: Scenario, sizes: dict[str, int]) -> tuple[Scenario, list[str]]:
    """The scenario with the token budget chosen here, and the options of a burst."""
    first, second, third = st.columns(3)
    budget = first.select_slider(
        "Token budget of an iteration",
        list(phases_burst.BUDGETS),
        1024,
        key="ph_budget",
        **BOUND,
    )
    prompts = second.slider("Prompts that arrive at once", 1, 8, 4, key="ph_prompts", **BOUND)
    decodes = third.slider("Requests that decode meanwhile", 0, 63, 16, key="ph_decodes", **BOUND)
    of = {"prompts": prompts, "prompt_tokens": sizes["prompt_tokens"], "decodes": decodes}
    of["context_tokens"] = sizes["context_tokens"]
    burst = cached(phases_burst.burst, scenario, token_budget=budget, **of)
    shared.figures(phases_words.cards(burst))
    clocks, requests = burst.clocks(), burst.requests()
    drawing = charts_burst.burst_chart(clocks, requests)
    shared.chart(drawing, alt=phases_words.burst_in_words(burst), key="ph_burst_chart")
    tokens = charts_burst.tokens_chart(clocks, requests, budget)
    shared.chart(tokens, alt=f"Tokens of each iteration, against the budget of {budget:,}", key="ph_tokens_chart")
    st.caption(phases_words.BURST + phases_words.left_out(burst))
    shared.downloads("ph_burst", requests, name="burst", drawing=drawing)
    table = cached(phases_burst.budgets, scenario, **of)
    st.markdown("**What the token budget trades**: small chunks delay the prompts, large ones stall the answers")
    trade = charts_burst.budgets_chart(table, budget)
    shared.chart(trade, alt=phases_words.budgets_in_words(table), key="ph_budgets_chart")
    shared.downloads("ph_budgets", table, name="budgets", drawing=trade)
    options = ["--burst", str(prompts), "--decodes", str(decodes)]
    return replace(scenario, max_num_batched_tokens=budget), options


def tables(outcome: phases.Phases) -> None:
    st.table(phases_table.points_table(outcome).frame(), alt="Prefill and decode at several sizes")
    st.caption(phases_table.legend(outcome))
    st.table(phases_table.served_table(outcome).frame(), alt="Where the time of a request goes, alone and under load")
    st.caption(phases_table.served_legend(outcome))
    shared.downloads("ph_table", outcome.frame(), name="phases")


shared.page_header(
    "Prefill vs decode",
    "One model, two kinds of work: a prompt is computed at once, its answer token by token. Drag, and see what binds.",
)
scenario = None
with st.sidebar:
    with shared.error_in_place():
        scenario = pick_scenario()
    sizes = {
        "prompt_tokens": st.select_slider("Prompt (tokens)", LENGTHS, 2048, key="ph_prompt", **BOUND),
        "batch": st.select_slider("Batch of a decode step (requests)", BATCHES, 32, key="ph_batch", **BOUND),
        "context_tokens": st.select_slider("Cached of each decode (tokens)", LENGTHS, 1024, key="ph_context", **BOUND),
    }
if scenario is None:
    shared.end_page()
roofline_tab, times_tab, batch_tab, table_tab = st.tabs(
    ["Roofline", "Time", "One batch", "Table"], key="ph_tab", on_change="rerun", **BOUND
)
shown, options = scenario, []
with shared.error_in_place():
    batches = cached(phases.batches_beside, scenario, sizes["batch"], sizes["context_tokens"])
    asked = {"prompt_tokens": sizes["prompt_tokens"], "context_tokens": sizes["context_tokens"]}
    outcome = cached(phases.compare, scenario, batches=batches, **asked)
    with roofline_tab:
        if roofline_tab.open:
            roofline(scenario, sizes)
    with times_tab:
        if times_tab.open:
            times(scenario, sizes, outcome)
    with batch_tab:
        if batch_tab.open:
            shown, options = one_batch(scenario, sizes)
    with table_tab:
        if table_tab.open:
            tables(outcome)
    st.info(outcome.textbook, icon=":material/menu_book:")
    for line in phases_table.setting(outcome):
        st.caption(line)
    options += ["--prompt", str(sizes["prompt_tokens"]), "--context", str(sizes["context_tokens"])]
    options += ["--batch", ",".join(str(size) for size in batches)]
    shared.command_line(argv_of(shown, command="phases", trace=[], options=options))
