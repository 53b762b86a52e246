"""The flags of `vllm serve` (vLLM 0.25), and what each means to a simulator. Data for `llmsim.fromvllm`."""

from __future__ import annotations

SHORT = {
    "-tp": "tensor-parallel-size",
    "-dp": "data-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-pcp": "prefill-context-parallel-size",
    "-dcp": "decode-context-parallel-size",
    "-ep": "enable-expert-parallel",
    "-q": "quantization",
    "-O": "optimization-level",
    "-cc": "compilation-config",
    "-sc": "speculative-config",
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-n": "nnodes",
    "-r": "node-rank",
}

# flag: the scenario field it sets
INTEGERS = {
    "tensor-parallel-size": "tensor_parallel",
    "data-parallel-size": "replicas",
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "max-model-len": "max_model_len",
    "block-size": "block_size",
    "num-gpu-blocks-override": "num_gpu_blocks_override",
    "long-prefill-token-threshold": "long_prefill_token_threshold",
    "max-num-partial-prefills": "max_num_partial_prefills",  # not a field: becomes a long_prefill_token_threshold
}
NUMBERS = {"gpu-memory-utilization": "gpu_memory_utilization", "watermark": "watermark"}
TEXTS = {
    "dtype": "dtype",
    "kv-cache-dtype": "kv_cache_dtype",
    "quantization": "quantization",
    "scheduling-policy": "scheduling_policy",
}
SWITCHES = {
    "enable-prefix-caching": "enable_prefix_caching",
    "enable-chunked-prefill": "enable_chunked_prefill",
    "async-scheduling": "async_scheduling",
    "scheduler-reserve-full-isl": "reserve_full_isl",
}

# vLLM's names of weight formats, and the marks of hub names, as the element format they store
QUANTIZATION_NAMES = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "modelopt": "fp8",
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "bitsandbytes": "int4",
    "bnb-4bit": "int4",
    "w4a16": "int4",
    "int4": "int4",
    "w8a8": "int8",
    "int8": "int8",
    "experts_int8": "int8",
    "mxfp4": "mxfp4",
}

_KV = "KV blocks that move between machines or to the host are not modelled"
_SPEC = "no command line says how many drafts are accepted: give llmsim a --speculative-config with an acceptance"
_LORA = "adapters are not modelled: every request runs the base model"
_PARALLEL = "llmsim splits a replica over GPUs by tensor parallelism only"
_MEMORY = "the number of KV blocks would differ: give --num-gpu-blocks-override"
_GRAPHS = "llmsim has vLLM's default graph sizes"

# flag: (why the replay will differ, the value at which it does not)
CHANGES_THE_SCHEDULE: dict[str, tuple[str, str | None]] = {
    "speculative-config": (_SPEC, "null"),
    "speculative-model": (_SPEC, "null"),
    "num-speculative-tokens": (_SPEC, "0"),
    "num-lookahead-slots": (_SPEC, "0"),
    "kv-transfer-config": (_KV, "null"),
    "kv-events-config": (_KV, "null"),
    "kv-offloading-size": (_KV, "0"),
    "kv-offloading-backend": (_KV, "null"),
    "ec-transfer-config": (_KV, "null"),
    "enable-lora": (_LORA, "false"),
    "lora-modules": (_LORA, "null"),
    "max-loras": (_LORA, "null"),
    "max-lora-rank": (_LORA, "null"),
    "max-cpu-loras": (_LORA, "null"),
    "pipeline-parallel-size": (_PARALLEL, "1"),
    "prefill-context-parallel-size": (_PARALLEL, "1"),
    "decode-context-parallel-size": (_PARALLEL, "1"),
    "enable-expert-parallel": (_PARALLEL, "false"),
    "enable-eplb": (_PARALLEL, "false"),
    "enable-dbo": ("dual batch overlap is not modelled", "false"),
    "cpu-offload-gb": ("weights on the host would slow every iteration: not modelled", "0"),
    "kv-cache-memory-bytes": (_MEMORY, "null"),
    "cudagraph-capture-sizes": (_GRAPHS, "null"),
    "max-cudagraph-capture-size": (_GRAPHS, "512"),
    "cuda-graph-sizes": (_GRAPHS, "null"),
    "performance-mode": ("it changes default limits and graphs: give the limits as flags", "balanced"),
    "max-num-scheduled-tokens": ("llmsim schedules up to max_num_batched_tokens", "null"),
    "prefill-schedule-interval": ("prefills are admitted in every iteration", "1"),
    "stream-interval": ("clients see every token as it comes out", "1"),
    "scheduler-cls": ("give a policy of your own with --scheduler file.py:Class", "null"),
    "hf-overrides": ("it changes the model: edit a config.json and give its path as the model", "null"),
    "config": ("the file is not read: give its settings as flags", "null"),
    "attention-backend": ("another attention kernel has other times than those measured", "FLASH_ATTN"),
    "attention-config": ("another attention kernel has other times than those measured", "null"),
    "disable-sliding-window": ("llmsim keeps the model's sliding windows", "false"),
    "disable-hybrid-kv-cache-manager": ("layers of different windows would share one block table", "false"),
    "device": ("llmsim replays on GPUs", "cuda"),
    "runner": ("only generation is modelled", "generate"),
    "task": ("only generation is modelled", "generate"),
    "convert": ("only generation is modelled", "none"),
    "additional-config": ("platform settings are not read", "null"),
    "block-size-per-group": (_MEMORY, "null"),
}


def _names(text: str) -> list[str]:
    return text.split()


_SERVER = "about the HTTP server"
_NAMES = "about names and files"
_LOAD = "about loading, before the first request"
_LOGS = "about logs and metrics"
_TEXT = "about text: a trace has token counts"
_PLACE = "about where processes run"
_V0 = "without effect in vLLM V1"
_MEDIA = "about images and audio: a trace has token counts"

CHANGES_NOTHING: dict[str, str] = {
    **dict.fromkeys(
        _names("""
            host port uds uvicorn-log-level allow-credentials allowed-origins allowed-methods allowed-headers
            api-key ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs enable-ssl-refresh root-path middleware
            disable-fastapi-docs disable-frontend-multiprocessing enable-request-id-headers
            enable-server-load-tracking h11-max-incomplete-event-size h11-max-header-count api-server-count
            response-role enable-offline-docs
        """),
        _SERVER,
    ),
    **dict.fromkeys(
        _names("""
            served-model-name tokenizer tokenizer-mode tokenizer-revision revision code-revision hf-token
            hf-config-path config-format generation-config override-generation-config trust-remote-code
            allow-deprecated-quantization
        """),
        _NAMES,
    ),
    **dict.fromkeys(
        _names("""
            load-format download-dir model-loader-extra-config ignore-patterns use-tqdm-on-load
            safetensors-load-strategy max-parallel-loading-workers enable-sleep-mode model-impl pt-load-map-location
            skip-tokenizer-init logits-processors worker-cls worker-extension-cls
        """),
        _LOAD,
    ),
    **dict.fromkeys(
        _names("""
            disable-log-requests enable-log-requests disable-log-stats disable-uvicorn-access-log max-log-len
            log-config-file show-hidden-metrics-for-version otlp-traces-endpoint collect-detailed-traces
            kv-cache-metrics enable-log-outputs enable-log-deltas log-error-stack aggregate-engine-logging
            cudagraph-metrics enable-mfu-metrics profiler-config enable-logging-iteration-details
        """),
        _LOGS,
    ),
    **dict.fromkeys(
        _names("""
            chat-template chat-template-content-format default-chat-template-kwargs tool-call-parser
            tool-parser-plugin enable-auto-tool-choice reasoning-parser reasoning-parser-plugin enable-reasoning
            max-logprobs logprobs-mode guided-decoding-backend structured-outputs-config seed
            enable-prompt-tokens-details enable-force-include-usage enable-tokenizer-info-endpoint
            return-tokens-as-token-ids enable-prompt-embeds exclude-tools-when-tool-choice-none tool-server
            trust-request-chat-template
        """),
        _TEXT,
    ),
    **dict.fromkeys(
        _names("""
            distributed-executor-backend nnodes node-rank master-addr master-port headless data-parallel-address
            data-parallel-rpc-port data-parallel-backend data-parallel-size-local data-parallel-start-rank
            data-parallel-rank data-parallel-hybrid-lb data-parallel-external-lb ray-workers-use-nsight
            disable-custom-all-reduce numa-bind enable-elastic-ep
        """),
        _PLACE,
    ),
    **dict.fromkeys(
        _names("""
            swap-space num-scheduler-steps multi-step-stream-outputs use-v2-block-manager preemption-mode
            max-seq-len-to-capture scheduler-delay-factor max-long-partial-prefills disable-async-output-proc
            enable-multi-step disable-mm-preprocessor-cache
        """),
        _V0,
    ),
    **dict.fromkeys(
        _names("""
            limit-mm-per-prompt mm-processor-kwargs mm-processor-cache-gb mm-processor-cache-type mm-encoder-tp-mode
            mm-encoder-only media-io-kwargs interleave-mm-strings skip-mm-profiling video-pruning-rate
            allowed-local-media-path allowed-media-domains disable-chunked-mm-input enable-mm-embeds
            language-model-only mm-encoder-attn-backend
        """),
        _MEDIA,
    ),
    "disable-cascade-attn": "cascade attention is not modelled either way",
    "prefix-caching-hash-algo": "blocks are matched by content, not by hash",
    "calculate-kv-scales": "about values, not times",
    "kv-sharing-fast-prefill": "without effect on the models llmsim knows",
}

# named in fromvllm beside the tables
CHANGES_NOTHING |= dict.fromkeys(("compilation-config", "optimization-level", "enforce-eager"), "sets cudagraph")

VALUELESS = frozenset(
    _names("""
            enforce-eager enable-lora enable-expert-parallel enable-eplb enable-dbo disable-sliding-window
            disable-hybrid-kv-cache-manager allow-credentials enable-ssl-refresh disable-fastapi-docs
            disable-frontend-multiprocessing enable-request-id-headers enable-server-load-tracking
            enable-offline-docs trust-remote-code allow-deprecated-quantization use-tqdm-on-load enable-sleep-mode
            skip-tokenizer-init disable-log-requests enable-log-requests disable-log-stats
            disable-uvicorn-access-log enable-log-outputs enable-log-deltas log-error-stack aggregate-engine-logging
            cudagraph-metrics kv-cache-metrics enable-mfu-metrics enable-logging-iteration-details
            enable-auto-tool-choice enable-reasoning enable-prompt-tokens-details enable-force-include-usage
            enable-tokenizer-info-endpoint return-tokens-as-token-ids enable-prompt-embeds
            exclude-tools-when-tool-choice-none trust-request-chat-template headless data-parallel-hybrid-lb
            data-parallel-external-lb ray-workers-use-nsight disable-custom-all-reduce numa-bind enable-elastic-ep
            use-v2-block-manager multi-step-stream-outputs disable-async-output-proc enable-multi-step
            disable-mm-preprocessor-cache mm-encoder-only interleave-mm-strings skip-mm-profiling
            disable-chunked-mm-input enable-mm-embeds language-model-only disable-cascade-attn calculate-kv-scales
            kv-sharing-fast-prefill
        """)
)

TAKES_SEVERAL = frozenset(
    _names("""
            served-model-name lora-modules middleware cudagraph-capture-sizes cuda-graph-sizes allowed-origins
            allowed-methods allowed-headers api-key collect-detailed-traces logits-processors ignore-patterns
        """)
)
