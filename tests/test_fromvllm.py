"""A pasted `vllm serve` line: every flag becomes a field, is ignored with a reason, or is named as not modelled."""

from __future__ import annotations

from typing import Any

import pytest

from llmsim import vllm_flags
from llmsim.fromvllm import as_flags, check, translate
from llmsim.scenario import Scenario

MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def fields(flags: str) -> dict[str, Any]:
    translation = translate(f"vllm serve {MODEL} {flags}")
    assert translation.not_modelled == []
    found = dict(translation.fields)
    assert found.pop("model") == "llama-3.1-8b"
    return found


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        ("--max-num-seqs 64", {"max_num_seqs": 64}),
        ("--max-num-seqs=64", {"max_num_seqs": 64}),
        ("--max_num_seqs 64", {"max_num_seqs": 64}),
        ("--max-num-seq 64", {"max_num_seqs": 64}),  # argparse takes unique prefixes
        ("--tensor-parallel-size 2", {"tensor_parallel": 2}),
        ("--tensor-parallel 2", {"tensor_parallel": 2}),
        ("-tp 2", {"tensor_parallel": 2}),
        ("-tp=2", {"tensor_parallel": 2}),
        ("-dp 4", {"replicas": 4}),
        ("--max-model-len 32k", {"max_model_len": 32000}),
        ("--max-model-len 32K", {"max_model_len": 32768}),
        ("--max-num-batched-tokens 16384 --block-size 32", {"max_num_batched_tokens": 16384, "block_size": 32}),
        ("--gpu-memory-utilization .95", {"gpu_memory_utilization": 0.95}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--no_enable_prefix_caching", {"enable_prefix_caching": False}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--enable-chunked-prefill False --port 80", {"enable_chunked_prefill": False}),
        ("--enable-chunked-prefill=false", {"enable_chunked_prefill": False}),
        ("--no-async-scheduling", {"async_scheduling": False}),
        ("--no-scheduler-reserve-full-isl", {"reserve_full_isl": False}),
        ("--kv-cache-dtype fp8 --dtype half", {"kv_cache_dtype": "fp8", "dtype": "half"}),
        ("-q fp8", {"quantization": "fp8"}),
        ("--quantization modelopt", {"quantization": "fp8"}),
        ("--scheduling-policy priority", {"scheduling_policy": "priority"}),
        ("--num-gpu-blocks-override 3000 --watermark 0.01", {"num_gpu_blocks_override": 3000, "watermark": 0.01}),
        ("--long-prefill-token-threshold 512", {"long_prefill_token_threshold": 512}),
        # config/scheduler.py: 4 % of the context
        (
            "--max-num-partial-prefills 2 --max-model-len 10000",
            {"max_model_len": 10000, "long_prefill_token_threshold": 400},
        ),
        ("--max-num-partial-prefills 1", {}),
        ("--enforce-eager", {"cudagraph": "none"}),
        ("-O0", {"cudagraph": "none"}),
        ("-O 1", {"cudagraph": "piecewise"}),
        ("--optimization-level=2", {"cudagraph": "full_and_piecewise"}),
        ("--enforce-eager -O2", {"cudagraph": "none"}),
        ("""--compilation-config '{"cudagraph_mode": "PIECEWISE"}'""", {"cudagraph": "piecewise"}),
        ("-cc.cudagraph_mode=NONE", {"cudagraph": "none"}),
        ("-cc.cudagraph_mode=FULL_DECODE_ONLY", {"cudagraph": "full_decode_only"}),
        ("--compilation-config.cudagraph_mode FULL_AND_PIECEWISE", {"cudagraph": "full_and_piecewise"}),
        ("--host 0.0.0.0 --port 8000 --served-model-name a b --trust-remote-code --disable-log-requests", {}),
        ("> server.log 2>&1 &", {}),
        ("| tee log", {}),
        ("&& echo --max-num-seqs 3", {}),
        ("--speculative-config null --pipeline-parallel-size 1 -pp 1 --no-enable-lora", {}),
    ],
)
def test_flags_become_fields(flags: str, expected: dict[str, Any]) -> None:
    assert fields(flags) == expected


@pytest.mark.parametrize(
    "command",
    [
        f"vllm serve {MODEL} --max-num-seqs 8",
        f"vllm serve --max-num-seqs 8 {MODEL}",
        f"vllm serve --trust-remote-code {MODEL} --max-num-seqs 8",
        f"vllm serve --model {MODEL} --max-num-seqs 8",
        f"CUDA_VISIBLE_DEVICES=0,1 VLLM_USE_V1=1 nohup /opt/venv/bin/vllm serve {MODEL} --max-num-seqs 8 &",
        f"uv run vllm serve {MODEL} \\\n    --max-num-seqs 8 \\\n    --port 80",
        f"python -m vllm.entrypoints.openai.api_server --model {MODEL} --max-num-seqs 8",
        f"docker run --gpus all -p 8000:8000 --ipc=host vllm/vllm-openai:v0.25.1 --model {MODEL} --max-num-seqs 8",
        f"docker run vllm/vllm-openai {MODEL} --max-num-seqs 8  # the test server",
    ],
)
def test_commands_as_people_paste_them(command: str) -> None:
    assert translate(command).fields == {"model": "llama-3.1-8b", "max_num_seqs": 8}


def test_words_need_no_second_splitting() -> None:
    assert translate(["vllm", "serve", MODEL, "-tp", "2"]).fields["tensor_parallel"] == 2


@pytest.mark.parametrize(
    ("name", "model", "quantization"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b", None),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b", None),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b", None),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b", "fp8"),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "llama-3.1-8b", "int4"),
        ("Qwen/Qwen3-8B", "qwen3-8b", None),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "qwen2.5-7b", "awq"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen2.5-7b", "gptq"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b", None),
        ("openai/gpt-oss-20b", "gpt-oss-20b", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b", None),
        ("google/gemma-2-9b-it", "gemma-2-9b", None),
    ],
)
def test_hub_names_find_the_shapes_and_the_weight_format(name: str, model: str, quantization: str | None) -> None:
    found = translate(f"vllm serve {name}").fields
    assert (found["model"], found.get("quantization")) == (model, quantization)


def test_a_quantisation_flag_beats_the_one_in_the_name() -> None:
    assert translate("vllm serve Qwen/Qwen2.5-7B-Instruct-AWQ -q awq_marlin").fields["quantization"] == "awq"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("""--speculative-config '{"method": "eagle", "num_speculative_tokens": 3}'""", "drafts are accepted"),
        ("""--kv-transfer-config '{"kv_connector": "NixlConnector"}'""", "KV blocks that move"),
        ("--enable-lora", "adapters"),
        ("--lora-modules a=/x b=/y", "adapters"),
        ("-pp 2", "tensor parallelism only"),
        ("--enable-expert-parallel", "tensor parallelism only"),
        ("--max-model-len auto", "the model's own"),
        ("--stream-interval 8", "every token"),
        ("--kv-cache-memory-bytes 40G", "--num-gpu-blocks-override"),
        ("--cudagraph-capture-sizes 1 2 4 8", "graph sizes"),
        ("--quantization torchao", "element size"),
        ("--config serve.yaml", "not read"),
        ("--max-numseqs 4", "did you mean --max-num-seqs"),
        ("--frobnicate", "not a vLLM flag"),
    ],
)
def test_what_changes_the_schedule_and_is_not_modelled_is_said(flags: str, reason: str) -> None:
    translation = translate(f"vllm serve {MODEL} {flags}")
    assert len(translation.not_modelled) == 1
    assert reason in translation.not_modelled[0]
    assert translation.fields == {"model": "llama-3.1-8b"}


def test_each_ignored_flag_is_one_line_with_its_value_and_the_reason() -> None:
    translation = translate(
        f"vllm serve {MODEL} --port 8000 --served-model-name a b --seed 3 --enable-auto-tool-choice"
    )
    assert [line.partition(":")[0] for line in translation.ignored] == [
        "--port 8000",
        "--served-model-name a b",
        "--seed 3",
        "--enable-auto-tool-choice",
    ]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "no 'vllm serve'"),
        ("sglang launch", "no 'vllm serve'"),
        ("vllm bench serve --model x", "no 'vllm serve'"),
        ("vllm serve", "without a model"),
        ("vllm serve --max-num-seqs 8", "without a model"),
        (f"vllm serve {MODEL} extra", "'extra' follows no flag"),
        (f"vllm serve {MODEL} --model other", "two models"),
        (f"vllm serve {MODEL} --max-num-seqs", "--max-num-seqs has no value"),
        (f"vllm serve {MODEL} --max-num-seqs lots", "'lots' is not a number"),
        (f"vllm serve {MODEL} --max-num-seqs --port 80", "--max-num-seqs has no value"),
        (f"vllm serve {MODEL} --gpu-memory-utilization high", "'high' is not a number"),
        (f"vllm serve {MODEL} --enable-prefix-caching=maybe", "neither true nor false"),
        (f"vllm serve {MODEL} -O7", "-O0, -O1"),
        (f"vllm serve {MODEL} -cc '{{'", "not JSON"),
        (f"vllm serve {MODEL} -cc '[1]'", "not a JSON object"),
        (f"vllm serve {MODEL} 'open", "unbalanced quotes"),
        ("vllm serve acme/secret-model-9000", "acme/secret-model-9000"),
        ("vllm serve acme/secret-model-9000-FP8", "secret-model-9000"),
    ],
)
def test_wrong_commands_are_one_sentence(command: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        translate(command)
    assert said in str(caught.value)


def test_what_vllm_would_refuse_is_refused() -> None:
    translation = translate(f"vllm serve {MODEL} --max-num-seqs 512 --max-num-batched-tokens 256")
    with pytest.raises(ValueError, match="max_num_batched_tokens=256 is below max_num_seqs=512"):
        check(translation.fields, None)
    translation = translate(f"vllm serve {MODEL} -tp 3")
    with pytest.raises(ValueError, match="tensor_parallel=3 does not divide"):
        check(translation.fields, "h100-sxm")


def test_flags_and_fields_say_the_same() -> None:
    line = f"vllm serve {MODEL} -tp 2 --no-enable-prefix-caching --no-scheduler-reserve-full-isl --max-model-len 8k"
    translation = translate(line)
    again = translate(["vllm", "serve", *as_flags(translation.fields)])
    assert again == translation


def test_every_field_of_the_tables_is_a_field_of_the_scenario() -> None:
    known = set(Scenario.__dataclass_fields__) | {"max_num_partial_prefills"}
    tables = (vllm_flags.INTEGERS, vllm_flags.NUMBERS, vllm_flags.TEXTS, vllm_flags.SWITCHES)
    assert {name for table in tables for name in table.values()} <= known


def test_no_flag_is_in_two_tables() -> None:
    tables = (
        vllm_flags.INTEGERS,
        vllm_flags.NUMBERS,
        vllm_flags.TEXTS,
        vllm_flags.SWITCHES,
        vllm_flags.CHANGES_NOTHING,
        vllm_flags.CHANGES_THE_SCHEDULE,
    )
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(set(names))
    assert set(names) >= vllm_flags.VALUELESS
    assert set(names) >= vllm_flags.TAKES_SEVERAL
