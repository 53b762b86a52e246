"""The optimisations that `llmsim whatif` tries, one line each.

A `Change` is one setting. Where the scenario has the optimisation already, the change takes it away, and what it buys
is the difference between the run without it and the run with it; where it does not, the change adds it. `fields` is
told about the scenario and returns the fields to replace, or in a few words why the change does not apply.
"""

from __future__ import annotations

from llmsim.whatif_fields import (
    HOST_GIB,
    Change,
    allocation,
    attention,
    budget,
    chunked,
    compression,
    full_graphs,
    graphs,
    has,
    kv,
    no_compiler,
    offload,
    prefix_caching,
    seqs,
    speculates,
    speculation,
    swap,
    tensor_parallel,
    weights,
)

CHANGES: tuple[Change, ...] = (
    Change("flash-attention", "FlashAttention", attention, has("attention_kernel", "flash")),
    Change("operator-fusion", "operator fusion", no_compiler("none"), lambda f: f.scenario.kernel_fusion != "none"),
    Change("torch-compile", "torch.compile", no_compiler("custom"), has("kernel_fusion", "compiled")),
    Change("cuda-graphs", "CUDA graphs", graphs, lambda f: f.scenario.cudagraph != "none"),
    Change("full-graphs", "full CUDA graphs", full_graphs, has("cudagraph", "full_and_piecewise")),
    Change("prefix-caching", "prefix caching", prefix_caching, has("enable_prefix_caching", True)),
    Change("chunked-prefill", "chunked prefill", chunked, has("enable_chunked_prefill", True)),
    Change(
        "async-scheduling",
        "asynchronous scheduling",
        lambda f: {"async_scheduling": not f.scenario.async_scheduling},
        has("async_scheduling", True),
    ),
    Change("weights-fp32", "weights and activations in float32", weights("float32")),
    Change("weights-bf16", "weights and activations in bfloat16", weights("bfloat16")),
    Change("weights-fp8", "weights and activations in fp8", weights("fp8")),
    Change("weights-fp8-only", "weights in fp8, activations in bfloat16", weights("fp8", activations="bfloat16")),
    Change("weights-int4", "weights in int4", weights("int4")),
    Change("kv-bf16", "KV cache in bfloat16", kv("bfloat16")),
    Change("kv-fp8", "KV cache in fp8", kv("fp8")),
    Change("kv-int8", "KV cache in int8", kv("int8")),
    Change("kv-int4", "KV cache in int4", kv("int4")),
    Change("paged-kv", "paged KV cache", allocation, has("kv_allocation", "paged")),
    Change(
        "kv-sinks",
        "KV cache of 4 sinks and 1,020 tokens",
        compression("sinks:4+1020"),
        has("kv_compression", "sinks:4+1020"),
    ),
    Change("kv-offload", f"KV offload to {HOST_GIB} GiB of the host", offload, lambda f: f.scenario.kv_tiers != "none"),
    Change("preemption-swap", "preemption by swap", swap, has("preemption", "swap")),
    Change("tp-double", "twice the tensor-parallel size", tensor_parallel(True)),
    Change("tp-half", "half the tensor-parallel size", tensor_parallel(False)),
    Change("seqs-double", "twice max_num_seqs", seqs(2)),
    Change("seqs-quarter", "a quarter of max_num_seqs", seqs(0.25)),
    Change("budget-double", "twice the token budget", budget(2)),
    Change("budget-quarter", "a quarter of the token budget", budget(0.25)),
    Change(
        "speculation-ngram", "n-gram speculation, 3 drafts at 0.4", speculation("ngram", 3, 0.4), speculates("ngram")
    ),
    Change("speculation-eagle", "EAGLE head, 3 drafts at 0.7", speculation("eagle", 3, 0.7), speculates("eagle")),
    Change(
        "speculation-model",
        "draft model, 4 drafts at 0.75",
        speculation("draft_model", 4, 0.75),
        speculates("draft_model"),
    ),
)


def chosen(only: tuple[str, ...], skip: tuple[str, ...]) -> list[Change]:
    """The table, or the part of it that `--only` and `--skip` name."""
    known = [change.name for change in CHANGES]
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option} {name}: no such change. Known: {', '.join(known)}")
    return [c for c in CHANGES if (not only or c.name in only) and c.name not in skip]
