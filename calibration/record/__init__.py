"""Record a real vLLM: what its clients saw, what its scheduler did, and how long its GPU needed.

`hooks` times vLLM's own methods, `client` sends the load, `export` writes the folder, `session` runs one engine under a
plan, `plans` makes loads from names, `setup` says what model and machine it is. Times are seconds of CLOCK_MONOTONIC
(time.perf_counter), which processes share on Linux, written from the start of the scenario. A folder holds

    engine.json              settings of the engine, and the machine (llmsim.recording)
    NAME.requests.json.gz    {"scenario", "unfinished", "errors", "requests": [{"arrival", "prompt", "output", "submit",
                             "t": [[s, tokens], ...], "cached", "queued" (s, in the scheduler's queue), "hash_ids"?}]}
    NAME.steps.jsonl.gz      a line each (calibration.steps):
        ["s", t, dt, tokens, decodes, decode context, [[chunk, context], ...], running, waiting, kv usage]  schedule()
        ["e", t]             a schedule without tokens
        ["x", t, dt, tokens] the executor's execute_model     ["y", t, dt] its sample_tokens
        ["u", t, dt, tokens] update_from_output               ["p", t, computed, outputs] a preemption
      and with several GPUs, where x and y only send a message to the workers, rank 0's own launch, by time:
        ["w", t, dt, tokens] execute_model                    ["v", t, dt] sample_tokens
      The n-th "w" and the n-th "v" belong to the n-th "s". A worker lags: a "w" may follow the "s" of the next step.
    NAME.gpu.jsonl.gz        CUDA-event milliseconds on (rank 0's) GPU: [step (its number among the "s" lines), idle
                             before, input preparation, forward, LM head and sampling, mode, padded tokens, held]
    decode_grid.json.gz, mixed_grid.json.gz   lists of small scenarios with requests, steps and gpu

`held` = 1 (mixed_grid only): the GPU was kept waiting 45 ms while the host launched, so "forward" is GPU time without
launch gaps; that step's host times and idle are not those of serving.
"""
