"""What is wrong with a trace is said in one line that names the place, the value and the way out."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import pytest

from llmsim.trace import Trace, load_trace

BAD = Path(__file__).parents[2] / "shared" / "traces" / "bad"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
GENERIC = b"arrival_time_s,prompt_tokens,output_tokens"
AT = b"2023-11-16 18:15:46.6805900"

# Words of the manifest's messages that ours must contain.
SAID = {
    "azure_missing_column.csv": ("Azure", "GeneratedTokens is missing", "TIMESTAMP, ContextTokens"),
    "azure_negative_tokens.csv": ("line 2", "ContextTokens", "-5 is not a non-negative integer"),
    "azure_mixed_tz.csv": ("line 3", "has a UTC offset but line 2", "one convention"),
    "azure_header_only.csv": ("header but no requests",),
    "azure_no_header.csv": ("not a header", "TIMESTAMP,ContextTokens,GeneratedTokens"),
    "burstgpt_zero_response.csv": ("1 of 2 rows", "Response tokens = 0", "--failed keep|drop"),
    "burstgpt_all_failed.csv": ("no requests left", "all 1 rows"),
    "mooncake_hash_count.jsonl": ("line 2", "ceil(2000/512) = 4 hash_ids, found 2"),
    "mooncake_missing_output.jsonl": ("line 1", "output_length missing"),
    "mooncake_nan.jsonl": ("line 1", "timestamp", "not a finite number"),
    "mooncake_seconds_not_ms.jsonl": ("fractional and span 18.13 ms (2758 req/s)", "--time-unit s"),
    "qwen_orphan_parent.jsonl": ("1 request names parent_chat_id 7", "start of its session"),
    "qwen_duplicate_chat_id.jsonl": ("chat_id 1 appears on lines 1 and 2",),
    "sharegpt_starts_with_gpt.json": ("treated as context, not as a request",),
    "vllm_bench_not_detailed.json": ("no input_lens/output_lens/ttfts", "--save-detailed"),
    "llmservingsim_no_sub_requests.jsonl": ("line 1", "sub_requests is empty"),
    "unknown_columns.csv": ("when, who, what match no known trace", "Known:", "--columns arrival="),
    "latin1.csv": ("line 2", "not UTF-8", "byte offset"),
}


def manifest() -> list[dict[str, str]]:
    if not BAD.is_dir():
        return []
    with (BAD / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_shared_bad_files_are_there() -> None:
    if not BAD.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"{BAD} is absent")
    assert manifest()


@pytest.mark.parametrize("row", manifest(), ids=lambda row: row["file"])
def test_bad_file_behaves_as_its_manifest_says(row: dict[str, str]) -> None:
    path = BAD / row["file"]
    if row["expected"] == "error":
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_trace(path)
        said = str(caught.value)
        assert said.startswith(row["file"]) and "\n" not in said
    else:
        trace = load_trace(path)
        said = " | ".join(trace.notes)
        assert trace.format == row["format"]
        assert len(trace) > 0
    for words in SAID.get(row["file"], ()):
        assert words in said


def read(tmp_path: Path, name: str, data: bytes, **options: object) -> Trace:
    (tmp_path / name).write_bytes(data)
    return load_trace(tmp_path / name, **options)  # type: ignore[arg-type]


MOON = b'{"timestamp": 0, "input_length": 600, "output_length": 5}\n'
REFUSED = [
    ("text.csv", AZURE + AT + b",abc,5\n", ("line 2", "ContextTokens", "'abc'")),
    ("empty_field.csv", AZURE + AT + b",,5\n", ("line 2", "ContextTokens", "''")),
    ("fraction.csv", AZURE + AT + b",3.5,5\n", ("line 2", "3.5 is not a non-negative integer")),
    ("thousands.csv", AZURE + AT + b',"1,374",5\n', ("line 2", "without thousands separators")),
    ("unquoted.csv", AZURE + AT + b",1,374,5\n", ("line 2", "header (3)", "4 is not")),
    ("underscore.csv", AZURE + AT + b",1_374,5\n", ("line 2", "without thousands separators")),
    ("hex.csv", AZURE + AT + b",0x10,5\n", ("line 2", "0x10")),
    ("nan.csv", AZURE + AT + b",NaN,5\n", ("line 2", "'NaN'")),
    ("huge.csv", AZURE + AT + b",99999999999999999999999,5\n", ("line 2", "plausible")),
    ("when.csv", AZURE + b"yesterday,3,5\n", ("line 2", "TIMESTAMP", "'yesterday'", "a date like")),
    ("inf.csv", AZURE + b"inf,3,5\n", ("line 2", "finite")),
    ("month.csv", AZURE + b"2023-13-01 00:00:00,3,5\n", ("line 2", "2023-13-01", "readable time")),
    ("last.csv", AZURE + b"9999-12-31 23:59:59-12:00,3,5\n", ("line 2", "9999-12-31", "readable time")),
    ("first.csv", AZURE + b"0001-01-01 00:00:00+12:00,3,5\n", ("line 2", "0001-01-01", "readable time")),
    ("short.csv", AZURE + AT + b",3,5\n" + AT + b",3\n", ("line 3", "2 is not", "header (3)")),
    ("twice.csv", b"TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n0,1,1,1\n", ("twice", "columns 2 and 3")),
    ("zero.csv", AZURE + AT + b",0,5\n", ("no requests left", "prompt tokens = 0")),
    ("burst.csv", b"Timestamp,Model,Request tokens\n5,x,3\n", ("BurstGPT", "Response tokens is missing")),
    ("blank.csv", b" \n\n", ("file is empty",)),
    ("nothing.csv", b"", ("file is empty",)),
    ("page.csv", b"<!DOCTYPE html><html></html>", ("HTML page",)),
    ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ("Git LFS pointer",)),
    ("zip.csv", b"PK\x03\x04....", ("zip archive",)),
    ("db.csv", b"SQLite format 3\x00...", ("SQLite",)),
    ("utf16.csv", "arrival".encode("utf-16"), ("UTF-16",)),
    ("zst.csv", b"\x28\xb5\x2f\xfdgarbage", ("Zstandard",)),
    ("half.parquet", b"PAR1garbagePAR1", ("Parquet",)),
    ("dup.csv", GENERIC + b",request_id\n0,1,1,a\n1,1,1,a\n", ("request_id a appears on lines 2 and 3",)),
    ("cycle.csv", GENERIC + b",request_id,parent_id\n0,1,1,a,b\n1,1,1,b,a\n", ("a, b form a cycle", "lines 2, 3")),
    ("over.csv", GENERIC + b",prefix_id,prefix_tokens\n0,10,1,a,20\n", ("line 2", "20 is not at most the prompt (10)")),
    ("past.csv", GENERIC + b"\n-1,10,1\n", ("line 2", "-1 is not a finite number of at least 0")),
    ("lacking.csv", b"arrival_time_s,prompt_tokens\n0,10\n", ("output_tokens missing", "--columns output=NAME")),
    ("multi.csv", GENERIC + b',note\n0,1,1,"a\nb"\n1,x,1,c\n', ("line 4", "'x'")),
    ("quoted.jsonl", b'{"timestamp": 0, "input_length": "600", "output_length": 5}\n', ("line 1", "without quotes")),
    ("cut.jsonl", MOON + b'{"timestamp": 3, "inp', ("line 2", "truncated", "1 complete")),
    ("frac.jsonl", b'{"timestamp": 0, "input_length": 6.5, "output_length": 5}\n', ("line 1", "6.5")),
    ("kind.jsonl", MOON + b"[1]\n", ("line 2", "expected a JSON object, found an array")),
    ("junk.jsonl", MOON + b"foo\n" + MOON, ("line 2", "not valid JSON")),
    ("null.jsonl", MOON + b'{"timestamp": 0, "input_length": 6, "output_length": null}\n', ("line 2", "missing")),
    ("gap.jsonl", MOON + b'{"timestamp": 0, "output_length": 6}\n', ("line 2", "input_length missing")),
    ("infinite.jsonl", b'{"timestamp": 0, "input_length": 6, "output_length": Infinity}\n', ("line 1", "finite")),
    ("bool.jsonl", b'{"timestamp": true, "input_length": 6, "output_length": 5}\n', ("line 1", "timestamp", "True")),
    ("text.jsonl", b'{"timestamp": 0, "text_input": "hello", "output_length": 5}\n', ("tokenizer", "input_length")),
    ("ids.jsonl", MOON[:-2] + b', "hash_ids": [1, null]}\n', ("line 1", "hash_ids")),
    ("size.jsonl", MOON[:-2] + b', "hash_ids": ' + str(list(range(38))).encode() + b"}\n", ("--block-tokens 16",)),
    ("deep.jsonl", b'{"a":' * 3000 + b"1" + b"}" * 3000, ("deeply",)),
    ("utf8.jsonl", MOON + b'{"timestamp": 0, "input_length": 6, "x": "caf\xe9"}\n', ("line 2", "not UTF-8")),
    ("array.json", b'[{"id": 1, "conversations": []}, {"id": 2, "conv', ("byte offset", "1 complete conv")),
    ("none.json", b"[]", ("array is empty",)),
    ("talk.json", b'[{"conversations": [{"from": "human"}]}]', ("element 1", "from and value")),
    ("cr.csv", GENERIC + b"\r0,1,1\r", ("line 1", "CR alone")),
    ("lonecr.csv", GENERIC + b"\n0,1,1\n1,2\r3,4,4\n", ("line 3",)),
    ("comment.csv", b"# made by me\n" + GENERIC + b"\n0,1,1\n", ("line 1", "comment")),
    ("last.csv", GENERIC + b"\n0,1,1\n1,2", ("line 3", "truncated")),
    ("unmeasured.json", b'{"input_lens": [], "output_lens": []}', ("input_lens is empty",)),
    ("lists.json", b'{"input_lens": [1, 2], "output_lens": [1]}', ("input_lens has 2 entries but output_lens has 1",)),
    ("toks.jsonl", b'{"input_toks": 3, "output_toks": 2, "arrival_time_ns": 5, "input_tok_ids": [1]}', ("line 1",)),
    ("before.jsonl", b'{"input_toks": 3, "output_toks": 2, "arrival_time_ns": -5}', ("line 1", "-5")),
    ("gz.csv", gzip.compress(GENERIC + b"\n0,10,1\n" * 50)[:30], ("gzip data is damaged or cut",)),
    ("chunk-0-trace.csv", b"0,0.1,1,Gamma,1,1\n", ("ServeGen", "directory")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "words"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_bad_input_is_refused_in_one_line_that_names_it(
    tmp_path: Path, name: str, data: bytes, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, name, data)
    said = str(caught.value)
    assert said.startswith(name) and "\n" not in said
    for word in words:
        assert word in said


def test_five_bad_lines_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, "many.csv", AZURE + (AT + b",-1,5\n") * 9)
    assert "line 6" in str(caught.value) and "line 7" not in str(caught.value) and "4 more" in str(caught.value)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_bytes(GENERIC + b"\n0,1,1\n")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*trace\.csv"):
        load_trace(tmp_path / "trase.csv")


def test_directory_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="a directory, but neither"):
        load_trace(tmp_path)


def test_harmless_spellings_are_accepted(tmp_path: Path) -> None:
    spelled = (
        b"\xef\xbb\xbf timestamp ,CONTEXTTOKENS,GeneratedTokens\r\n" + AT + b", 12.0 ,5\r\n\r\n" + AT + b",7,1\r\n"
    )
    trace = read(tmp_path, "odd.csv", gzip.compress(spelled))
    assert trace.prompt_tokens.tolist() == [12, 7]


def test_warnings_count_what_they_warn_of(tmp_path: Path) -> None:
    order = read(tmp_path, "order.csv", GENERIC + b"\n5,1,1\n3,1,1\n9,1,1\n")
    assert any("1 rows are earlier" in note for note in order.notes)
    total = read(tmp_path, "total.csv", BURST + b"5,ChatGPT,472,18,491,Conversation log\n")
    assert any("Total tokens" in note and "line 2" in note for note in total.notes)
    forked = read(tmp_path, "forked.jsonl", b"".join(
        b'{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [%d, 9]}\n' % k for k in (1, 2)
    ))  # fmt: skip
    assert any("9 follows different ids on lines 1 and 2" in note for note in forked.notes)
