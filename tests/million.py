"""A run folder of a million requests, made without simulating them."""

from dataclasses import replace

import numpy as np
from made_results import Served, made_result, request_columns

from llmsim.metrics import ITERATION_COLUMNS
from llmsim.runs import write_run

REQUESTS, ROWS = 1_000_000, 100_000


def million_run(folder):
    """Poisson arrivals at 100/s, log-normal waits and answers: the columns alone, in no time."""
    rng = np.random.default_rng(0)
    columns = dict(request_columns([]))
    sent_s = np.cumsum(rng.exponential(0.01, REQUESTS))
    queue_s, prefill_s = rng.lognormal(-5, 1, REQUESTS), rng.lognormal(-3, 0.5, REQUESTS)
    output = rng.integers(2, 400, REQUESTS)
    columns |= {
        "id": np.arange(REQUESTS),
        "arrival_s": sent_s,
        "prompt_tokens": rng.integers(10, 2000, REQUESTS),
        "output_tokens": output,
        "scheduled_s": sent_s + queue_s,
        "first_token_s": sent_s + queue_s + prefill_s,
        "finish_s": sent_s + queue_s + prefill_s + output * 0.01,
    }
    zeros = {"replica": int, "preempted_s": float, "preempted_before_first_s": float, "cached_tokens": int}
    columns |= {name: np.zeros(REQUESTS, dtype=kind) for name, kind in (zeros | {"preemptions": int}).items()}
    starts_s = np.linspace(0.0, sent_s[-1], ROWS)
    log = {name: np.zeros(ROWS, dtype=np.int64) for name in ITERATION_COLUMNS}
    log |= {"start_s": starts_s, "gpu_first_s": np.full(ROWS, 0.01), "gpu_growth_s": np.zeros(ROWS)}
    log |= {"gpu_end_s": starts_s + 0.01, "iterations": np.ones(ROWS, dtype=np.int64), "seqs": np.full(ROWS, 200)}
    log |= {"running": np.full(ROWS, 200), "kv_blocks": rng.integers(100, 900, ROWS)}
    template = made_result([Served(0.0, [0.1, 0.2])], cost=None)
    result = replace(template, requests=columns, iterations=log)
    write_run(result, folder, summary=result.summary())
    return folder
