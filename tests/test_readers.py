"""Every format is recognised by content and read with its own units, by column name."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from llmsim.readers.report import describe, prefix_hit_ceiling
from llmsim.trace import Trace, load_trace

SHARED = Path(__file__).parents[2] / "shared" / "traces"


def shared(path: str) -> Path:
    if not SHARED.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"{SHARED} is absent")
    return SHARED / path


def read(tmp_path: Path, name: str, text: str, **options: object) -> Trace:
    (tmp_path / name).write_text(text)
    return load_trace(tmp_path / name, **options)  # type: ignore[arg-type]


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_azure_conversation_has_its_published_figures() -> None:
    report = describe(load_trace(shared("azure-2023/AzureLLMInferenceTrace_conv.csv")))
    assert report["format"] == "azure" and report["requests"] == 19_366
    assert report["rows_read"] == report["rows_kept"] + sum(report["rows_dropped"].values())
    assert report["cv_gaps"] == pytest.approx(1.09, abs=0.005)
    prompt, output = report["prompt_tokens"], report["output_tokens"]
    assert [round(prompt[key]) for key in ("mean", "p50", "p99", "max")] == [1155, 1020, 4142, 14050]
    assert [round(output[key]) for key in ("mean", "p50", "p90", "p99", "max")] == [211, 129, 424, 601, 1000]


@pytest.mark.parametrize(
    ("path", "prompt", "output"),
    [
        ("azure-2023/AzureLLMInferenceTrace_conv.csv", (6.633, 0.985), (5.019, 0.859)),
        ("mooncake/synthetic_trace.jsonl.gz", (7.982, 2.700), (3.916, 1.768)),
        ("vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz", (7.717, 0.755), (5.187, 0.796)),
    ],
)
def test_lognormal_fits_are_the_known_ones(path: str, prompt: tuple[float, float], output: tuple[float, float]) -> None:
    trace = load_trace(shared(path))
    for tokens, fit in ((trace.prompt_tokens, prompt), (trace.output_tokens, output)):
        log = np.log(tokens)
        assert (log.mean(), log.std()) == (pytest.approx(fit[0], abs=0.001), pytest.approx(fit[1], abs=0.001))


@pytest.mark.parametrize(
    ("path", "format", "requests", "span_s"),
    [
        ("azure-2024/AzureLLMInferenceTrace_code_1week.excerpt.csv", "azure", 10, 604799.919571),
        ("azure-2025/AzureLMMInferenceTrace_multimodal.excerpt.csv", "azure", 7, 604799.444),
        ("burstgpt/BurstGPT_1.head5.csv", "burstgpt", 5, 209.0),
        ("mooncake/conversation_trace.first2000.jsonl", "mooncake", 2000, 669.0),
        ("llmservingsim/example_trace.jsonl", "llmservingsim", 10, 0.980043269),
        ("llmservingsim/measured/RTXPRO6000_Llama-3.1-8B.requests.jsonl", "llmservingsim-bench", 300, 29.121193),
        ("servegen/sampled_deepseek-r1_20h_3600s_seed0.csv.gz", "generic", 71_391, 3599.999999),
    ],
)
def test_shared_file_is_recognised_by_content(path: str, format: str, requests: int, span_s: float) -> None:
    trace = load_trace(shared(path))
    assert (trace.format, len(trace)) == (format, requests)
    assert trace.span_s == pytest.approx(span_s, abs=1e-6)
    assert trace.arrival_s[0] == 0 and (np.diff(trace.arrival_s) >= 0).all()


def test_mooncake_synthetic_has_its_published_prefix_hits() -> None:
    ceiling = prefix_hit_ceiling(load_trace(shared("mooncake/synthetic_trace.jsonl.gz")))
    assert ceiling is not None and ceiling["block_share"] == pytest.approx(0.640, abs=0.0005)


def test_agent_trace_without_prompt_lengths_is_refused_not_guessed() -> None:
    with pytest.raises(ValueError, match="all 4976 rows were dropped"):
        load_trace(shared("agentic/lmcache_agentic_shard4.jsonl.gz"))


def test_aiperf_session_turn_waits_its_delay_after_its_parent(tmp_path: Path) -> None:
    turn = {"session_id": "a", "input_length": 6, "output_length": 5}
    trace = read(tmp_path, "a.jsonl", lines({**turn, "timestamp": 9000}, {**turn, "delay": 500}))
    assert trace.parent is not None and trace.parent.tolist() == [-1, 0]
    assert trace.delay_s is not None and trace.delay_s.tolist() == [0, 0.5]
    assert trace.arrival_s[0] == 0 and np.isnan(trace.arrival_s[1])


def qwen(chat: int, parent: int, at: float) -> dict[str, object]:
    return {"chat_id": chat, "parent_chat_id": parent, "timestamp": at, "input_length": 20, "output_length": 4,
            "turn": 1, "hash_ids": [1, chat]}  # fmt: skip


def test_qwen_turns_keep_their_stamps_or_wait_in_closed_loop(tmp_path: Path) -> None:
    text = lines(qwen(7, -1, 61.0), qwen(8, 7, 70.5))
    stamped = read(tmp_path, "q.jsonl", text)
    assert stamped.arrival_s.tolist() == [0, 9.5] and stamped.block_tokens == 16
    closed = read(tmp_path, "q.jsonl", text, closed_loop=True)
    assert np.isnan(closed.arrival_s[1]) and closed.delay_s is not None and closed.delay_s[1] == 9.5
    assert closed.session == ["7", "7"]


def test_llmservingsim_waits_for_tools_and_chains_token_ids(tmp_path: Path) -> None:
    prompt, answer = list(range(20)), list(range(100, 112))
    flat = {"input_toks": 20, "output_toks": 12, "arrival_time_ns": 5_000_000_000, "input_tok_ids": prompt,
            "output_tok_ids": answer}  # fmt: skip
    later = {
        "input_toks": 40,
        "output_toks": 2,
        "arrival_time_ns": 6_000_000_000,
        "input_tok_ids": [*prompt, *answer, *range(8)],
    }
    call = {"input_toks": 3, "output_toks": 2, "tool_duration_ns": 1_500_000_000}
    agent = {"session_id": "s", "arrival_time_ns": 7_000_000_000, "sub_requests": [call, call]}
    trace = read(tmp_path, "l.jsonl", lines(flat, later, agent))
    assert trace.block_ids and trace.output_block_ids and trace.parent is not None and trace.delay_s is not None
    # 32 tokens of prompt and answer are two whole blocks, and the next prompt begins with both.
    assert trace.block_ids[0] + trace.output_block_ids[0] == trace.block_ids[1][:2]
    assert trace.parent.tolist() == [-1, -1, -1, 2] and trace.delay_s[3] == 1.5


def test_weka_subagent_joins_before_the_next_outer_request(tmp_path: Path) -> None:
    session = {"id": "x", "block_size": 64, "hash_id_scope": "local", "requests": [
        {"t": 0, "in": 100, "out": 5, "hash_ids": [0, 1], "api_time": 2},
        {"type": "subagent", "requests": [{"t": 3, "in": 10, "out": 5, "hash_ids": [7], "api_time": 1}]},
        {"t": 1000, "in": 130, "out": 5, "hash_ids": [0, 1, 2], "think_time": 990}]}  # fmt: skip
    other = {**session, "id": "y"}
    trace = read(tmp_path, "w.jsonl", lines(session, other), max_wait_s=60)
    assert trace.parent is not None and trace.delay_s is not None and trace.block_ids is not None
    assert trace.parent.tolist() == [-1, 0, 1, -1, 3, 4]
    assert trace.delay_s.tolist()[:3] == [0, 1, 60]  # 3 - 0 - 2 s of service; the cap
    assert not set(trace.block_ids[0]) & set(trace.block_ids[3])  # ids are local to their session


def test_sharegpt_modes(tmp_path: Path) -> None:
    talk = [{"from": who, "value": "x" * size} for who, size in
            (("human", 40), ("gpt", 80), ("human", 20), ("gpt", 400))]  # fmt: skip
    text = json.dumps([{"id": "a_0", "conversations": talk}, {"id": "b_0", "conversations": talk[:1]}])
    turns = read(tmp_path, "s.json", text)
    assert turns.prompt_tokens.tolist() == [10, 35] and turns.output_tokens.tolist() == [20, 100]
    assert turns.parent is not None and turns.parent.tolist() == [-1, 0]
    assert turns.rows_read == 3 and sum(turns.dropped.values()) == 1
    assert any("ESTIMATE" in note for note in turns.notes)
    pair = read(tmp_path, "s.json", text, sharegpt_mode="first-pair", tokenizer=lambda words: len(words) // 2)
    assert (pair.prompt_tokens.tolist(), pair.output_tokens.tolist()) == ([20], [40])


def test_vllm_result_replays_its_start_times_and_drops_failures(tmp_path: Path) -> None:
    result = {"input_lens": [5, 6, 7], "output_lens": [1, 2, 3], "start_times": [103.0, 100.0, 101.0],
              "errors": ["", "", "timeout"], "ttfts": [0, 0, 0], "max_concurrency": 4}  # fmt: skip
    trace = read(tmp_path, "v.json", json.dumps(result, indent=1))
    assert trace.arrival_s.tolist() == [0, 3] and trace.prompt_tokens.tolist() == [6, 5]
    assert dict(trace.dropped) == {"failed in the benchmark": 1} and any("closed loop" in note for note in trace.notes)


def test_other_results_and_simulators(tmp_path: Path) -> None:
    metrics = {"input_sequence_length": {"value": 5, "unit": "tokens"}, "output_sequence_length": {"value": 6}}
    at_ns = 1_715_299_200_000_000_000
    aiperf = lines(*({"metadata": {"request_start_ns": at_ns + k * 10**9}, "metrics": metrics} for k in range(2)))
    assert read(tmp_path, "ai.jsonl", aiperf).arrival_s.tolist() == [0, 1]
    one = {"request_start_time": 5.0, "prompt_tokens": 5, "output_tokens": 3}
    guide = {"benchmarks": [{"requests": {"successful": [one], "errored": [one]}}]}
    assert dict(read(tmp_path, "g.json", json.dumps(guide)).dropped) == {"errored in the benchmark": 1}
    splitwise = (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n0,2,0,0.5,1,9,2\n"
    )
    assert read(tmp_path, "sw.csv", splitwise).format == "splitwise"
    vidur = read(tmp_path, "vi.csv", ",arrived_at,num_prefill_tokens,num_decode_tokens,pd_ratio\n0,1.5,3,4,0.75\n")
    assert (vidur.format, vidur.prompt_tokens.tolist()) == ("vidur", [3])
    prompts = read(tmp_path, "p.jsonl", '{"prompt": "hello there", "output_tokens": 10}\n')
    assert (prompts.format, prompts.prompt_tokens.tolist()) == ("prompts", [3])


def test_blis_adds_the_prefix_to_the_input(tmp_path: Path) -> None:
    table = "client_id,arrival_time_us,input_tokens,output_tokens,round_index,prefix_group,prefix_length\n"
    rows = "c,0,10,5,0,g,32\nc,1500000,10,5,0,,0\nc,2000000,10,5,0,g,32\n"
    trace = read(tmp_path, "b.csv", "trace_version: 2\ntime_unit: us\n" + table + rows)
    assert trace.prompt_tokens.tolist() == [42, 10, 42] and trace.arrival_s.tolist() == [0, 1.5, 2]
    assert trace.block_ids is not None and trace.block_ids[0][:2] == trace.block_ids[2][:2]


def pool(tmp_path: Path) -> Path:
    (tmp_path / "chunk-0-trace.csv").write_text("0,2,1,Gamma,1,0.5\n600,0,0,,0,0\n1200,4,2,Weibull,0.6,1\n")
    data = {"0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{1: 0.5, 2: 0.5}"}}
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps(data))
    return tmp_path


def test_servegen_pool_fills_each_window_with_its_rate(tmp_path: Path) -> None:
    trace = load_trace(pool(tmp_path))
    counts = np.histogram(trace.arrival_s, bins=[0, 600, 1200, 1801])[0]
    # ceil(rate * 600) requests, the last of each exactly at the end of its window (and so outside it).
    assert counts.tolist() == pytest.approx([1200, 0, 2400], abs=2)
    assert set(trace.prompt_tokens) == {10, 20}
    assert abs(np.corrcoef(trace.prompt_tokens, trace.output_tokens)[0, 1]) < 0.1
    ranked = load_trace(tmp_path, rank_correlated=True, rate=1.0)
    assert np.corrcoef(ranked.prompt_tokens, ranked.output_tokens)[0, 1] == pytest.approx(1)
    assert len(ranked) == pytest.approx(1800, abs=4)


def test_generic_columns_units_and_mapping(tmp_path: Path) -> None:
    assert read(tmp_path, "ms.csv", "arrival_time_ms,isl,osl\n500,3,4\n2000,5,6\n").arrival_s.tolist() == [0, 1.5]
    when = read(tmp_path, "w.csv", "when,a,b\n1,2,3\n", columns={"arrival": "when", "prompt": "a", "output": "b"})
    assert when.prompt_tokens.tolist() == [2]
    zoned = "timestamp,prompt_tokens,output_tokens\n2024-05-10T00:00:00Z,1,1\n2024-05-10T02:00:01.5+02:00,1,1\n"
    assert read(tmp_path, "z.csv", zoned).arrival_s.tolist() == [0, 1.5]
    nanos = "timestamp,prompt_tokens,output_tokens\n1715299200000000000,1,1\n1715299200000000001,1,1\n"
    assert read(tmp_path, "n.csv", nanos, time_unit="ns").arrival_s.tolist() == [0, 1e-9]
    shared_rows = (
        "arrival_time_s,prompt_tokens,output_tokens,prefix_id,prefix_tokens\n0,40,1,a,33\n1,50,1,a,33\n2,40,1,,\n"
    )
    prefixed = read(tmp_path, "p.csv", shared_rows)
    assert prefixed.block_ids is not None and [len(ids) for ids in prefixed.block_ids] == [3, 4, 3]
    assert (
        prefixed.block_ids[0][:2] == prefixed.block_ids[1][:2] and prefixed.block_ids[0][2] != prefixed.block_ids[1][2]
    )


def test_a_short_csv_leaves_no_starting_threads_behind(tmp_path: Path) -> None:
    """A thread that still starts when the process ends aborts it: exit status 134 after a good error."""
    (tmp_path / "odd.csv").write_text("when,in_len,out_len\n" + "1,2,3\n" * 2000)
    code = (
        "import os, sys\nimport pyarrow.csv\nfrom llmsim.trace import load_trace\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "try:\n    load_trace('odd.csv')\nexcept ValueError as error:\n    print(error)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    said, threads = done.stdout.splitlines()
    assert said.startswith("odd.csv: cannot tell the format: columns when, in_len, out_len")
    assert int(threads) <= 1  # Arrow's reader, whose block was waited for


def test_a_rate_and_a_time_scale_contradict_each_other(tmp_path: Path) -> None:
    rows = "arrival_time_s,prompt_tokens,output_tokens\n0,1,1\n1,1,1\n"
    with pytest.raises(ValueError, match=r"^rate=10 with time_scale=2: the rate alone decides .*: leave one of them"):
        read(tmp_path, "t.csv", rows, rate=10.0, time_scale=2.0)


def test_arrivals_drawn_over_centuries_are_the_rates_fault(tmp_path: Path) -> None:
    rows = "prompt_tokens,output_tokens\n1,1\n1,1\n"
    with pytest.raises(ValueError, match=r"^t\.csv: arrivals span .* \(300 years\): give a rate above 1e-12$"):
        read(tmp_path, "t.csv", rows, rate=1e-12)


@pytest.mark.parametrize(("kind", "meant"), [("session", "session_id"), ("class", "slo_class"), ("tennant", "tenant")])
def test_a_column_that_is_called_otherwise_is_guessed(tmp_path: Path, kind: str, meant: str) -> None:
    rows = "arrival_time_s,prompt_tokens,output_tokens,x\n0,1,1,a\n"
    with pytest.raises(ValueError, match=rf"--columns {kind}=x: {kind} is not one of .*: did you mean {meant}\?"):
        read(tmp_path, "t.csv", rows, columns={kind: "x"})


def test_a_rate_of_waiting_turns_is_one_of_sessions(tmp_path: Path) -> None:
    head = "request_id,parent_id,session_id,arrival_time_s,delay_s,prompt_tokens,output_tokens\n"
    turns = "a,,s,0,0,1,1\nb,a,s,,1,1,1\nc,,t,1,0,1,1\n"
    trace = read(tmp_path, "t.csv", head + turns, rate=2.0)
    assert "rescaled from 1 to 2 sessions/s" in trace.notes
    plain = read(tmp_path, "p.csv", "arrival_time_s,prompt_tokens,output_tokens\n0,1,1\n1,1,1\n", rate=2.0)
    assert "rescaled from 1 to 2 requests/s" in plain.notes


BAD_TEXT = pa.Array.from_buffers(  # "a", two bytes that are not UTF-8, "b"
    pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")]
)
UNREADABLE = {  # what Arrow holds and Python does not, and how row 2 of a column of it is refused
    "time": (
        pa.array([0, 9 * 10**18, 1], pa.timestamp("us")),
        "9000000000000000000 is not a timestamp[us] that Python can hold; correct it, or write the column as numbers",
    ),
    "date": (pa.array([0, 2**31 - 1, 1], pa.int32()).view(pa.date32()), "2147483647 is not a date32[day] that Python"),
    "wait": (pa.array([0, 2**62, 1], pa.duration("s")), "4611686018427387904 is not a duration[s] that Python can"),
    "text": (BAD_TEXT, "b'\\xff\\xfe' is not UTF-8 text; write the column again as UTF-8"),
    "list": (pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), BAD_TEXT), "b'\\xff\\xfe' is not UTF-8 text"),
    "zone": (
        pa.array([None, 1, None], pa.timestamp("us", "Mars/Phobos")),
        "1 is not a time in a zone that this machine knows (the column's is 'Mars/Phobos'); write the column in UTC",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_parquet_columns_are_read_where_a_format_asks_for_them(tmp_path: Path, kind: str) -> None:
    column, said = UNREADABLE[kind]
    tokens = {"prompt_tokens": [5, 6, 7], "output_tokens": [1, 2, 3]}
    pq.write_table(pa.table({**tokens, "arrival_s": [0.0, 1.0, 2.0], "x": column}), tmp_path / "unused.parquet")
    assert load_trace(tmp_path / "unused.parquet").arrival_s.tolist() == [0, 1, 2]
    turns = {"request_id": ["a", "b", "c"], "parent_id": [None, "a", None], "arrival_s": [0.0, None, 2.0]}
    pq.write_table(pa.table({**tokens, **turns, "x": column}), tmp_path / "turns.parquet")  # a part of its rows is read
    assert load_trace(tmp_path / "turns.parquet").arrival_s[::2].tolist() == [0, 2]
    pq.write_table(pa.table({**tokens, "arrival": column}), tmp_path / "used.parquet")
    with pytest.raises(ValueError) as caught:
        load_trace(tmp_path / "used.parquet")
    assert str(caught.value).startswith("used.parquet: row 2, arrival: " + said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (True, "a Parquet file whose footer is encrypted; write it unencrypted"),
        (False, "an encrypted Parquet file (Cannot decrypt ColumnMetadata. FileDecryption is not setup correctly)"),
    ],
)
def test_an_encrypted_parquet_file_is_called_so(tmp_path: Path, whole: bool, said: str) -> None:
    class Keys(encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

    factory = encryption.CryptoFactory(lambda _: Keys())
    how = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"key": ["prompt_tokens"]}, plaintext_footer=not whole
    )
    table = pa.table({"arrival_s": [0.0], "prompt_tokens": [5], "output_tokens": [1]})
    keys = factory.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    pq.write_table(table, tmp_path / "secret.parquet", encryption_properties=keys)
    with pytest.raises(ValueError, match=rf"^secret\.parquet: {re.escape(said)}"):
        load_trace(tmp_path / "secret.parquet")
