"""Recordings: what is read from them, and one line for each way in which they can be broken."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsim.readers import source
from llmsim.recorded import GRID, load_files, packed_file, read_bytes
from llmsim.recording import load_recording

H100 = "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16"
RECORDINGS = Path(__file__).parent / "data" / "recordings"
ENGINE = {
    "num_gpu_blocks": 500,
    "block_size": 16,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
    "async_scheduling": False,
    "prefix": True,
    "kv_dtype": "auto",
    "cudagraph_mode": "CUDAGraphMode.PIECEWISE",
    "tensor_parallel_size": 2,
    "scheduling_policy": "priority",
    "gpu": "NVIDIA H100 80GB HBM3 (SXM, 700 W)",
    "model": "Llama-3.1-8B architecture",
    "startup_s": 3.0,
    "quantization": None,
}
REQUESTS = [
    {"arrival": 0.0, "prompt": 100, "output": 3, "submit": 0.01, "t": [[0.11, 1], [0.13, 2]], "cached": 0},
    {"arrival": 0.0, "prompt": 40, "output": 1, "submit": 0.005, "t": [[0.105, 1]], "cached": 0},
    {"arrival": 2.0, "prompt": 60, "output": 2, "submit": 2.0, "t": [[2.05, 1], [2.07, 1]], "cached": 0},
]


def recording(folder: Path, requests: Any = REQUESTS, engine: Any = ENGINE, **scenario: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "engine.json").write_text(json.dumps(engine))
    document = {"scenario": {"name": "load", **scenario}, "unfinished": 0, "errors": [], "requests": requests}
    (folder / "load.requests.json.gz").write_bytes(gzip.compress(json.dumps(document).encode()))
    return folder


def changed(row: int, **fields: Any) -> list[dict[str, Any]]:
    """REQUESTS with other fields in one of them; a field that is None is taken out."""
    requests = [dict(request) for request in REQUESTS]
    requests[row] |= fields
    requests[row] = {name: value for name, value in requests[row].items() if value is not None}
    return requests


def test_a_scenario_is_what_was_sent_and_what_came_back(tmp_path: Path) -> None:
    (one,) = load_recording(recording(tmp_path))
    assert one.name == "load" and one.concurrency is None and one.notes == ()
    np.testing.assert_allclose(one.trace.arrival_s, [0.0, 0.005, 1.995])  # in order of sending
    assert one.trace.prompt_tokens.tolist() == [40, 100, 60]
    assert one.trace.output_tokens.tolist() == [1, 3, 2]
    np.testing.assert_allclose(one.ttft_s, [0.1, 0.1, 0.05])
    np.testing.assert_allclose(one.e2el_s, [0.1, 0.12, 0.07])
    np.testing.assert_allclose(np.concatenate(one.gaps_s), [0.02, 0.02])  # two tokens in one chunk are one gap
    assert one.duration_s == pytest.approx(2.07 - 0.005)


def test_engine_settings_become_scenario_fields(tmp_path: Path) -> None:
    (one,) = load_recording(recording(tmp_path, engine=ENGINE | {"mystery": 1}))
    assert one.settings == {
        "num_gpu_blocks_override": 500,
        "block_size": 16,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "async_scheduling": False,
        "enable_prefix_caching": True,
        "kv_cache_dtype": "auto",
        "cudagraph": "piecewise",
        "tensor_parallel": 2,
        "scheduling_policy": "priority",
    }
    assert len(one.notes) == 1 and "mystery is not used" in one.notes[0]


def test_capture_sizes_other_than_vllms_are_noted(tmp_path: Path) -> None:
    usual = [1, 2, 4, *range(8, 129, 8)]
    assert load_recording(recording(tmp_path, engine=ENGINE | {"cudagraph_capture_sizes": usual}))[0].notes == ()
    (one,) = load_recording(recording(tmp_path, engine=ENGINE | {"cudagraph_capture_sizes": [1, 2, 4]}))
    assert "cudagraph_capture_sizes (3, to 4) are not vLLM's" in one.notes[0]


def test_hash_ids_name_shared_prefixes_and_what_they_do_not_cover_is_nobody_elses(tmp_path: Path) -> None:
    named = ([7, 8], [7, 8, 9], None)
    requests = [r | {"prompt": 1200, "hash_ids": ids} for r, ids in zip(REQUESTS, named, strict=True)]
    (one,) = load_recording(recording(tmp_path, requests))
    assert one.trace.block_tokens == 512 and one.trace.block_ids is not None
    second, first, third = one.trace.block_ids  # sent second, first, third
    assert second == (7, 8, 9)
    assert first[:2] == (7, 8) and len(first) == 3
    assert len({first[2], 9, *third}) == 5


def test_a_closed_loop_keeps_its_concurrency_and_order(tmp_path: Path) -> None:
    (one,) = load_recording(recording(tmp_path, concurrency=2))
    assert one.concurrency == 2
    np.testing.assert_allclose(one.trace.arrival_s, [0.0, 0.005, 0.005])  # the third waits for a slot


def test_unfinished_requests_stay_in_the_load_and_out_of_the_comparison(tmp_path: Path) -> None:
    requests = [*changed(0, t=[[0.11, 1]]), {"arrival": 3.0, "prompt": 5, "output": 5, "t": []}]
    (one,) = load_recording(recording(tmp_path, requests))
    assert one.finished.tolist() == [True, False, True]
    assert np.isnan(one.ttft_s[1]) and one.gaps_s[1].size == 0
    assert any("1 of 4 requests were never sent" in note for note in one.notes)
    assert any("1 of 3 requests did not finish" in note for note in one.notes)


def test_each_batch_of_a_decode_grid_is_a_scenario(tmp_path: Path) -> None:
    recording(tmp_path)
    grid = [{"name": f"grid_{n}", "requests": REQUESTS, "steps": [["s", 0.1]]} for n in range(2)]
    (tmp_path / "decode_grid.json.gz").write_bytes(gzip.compress(json.dumps(grid).encode()))
    assert [one.name for one in load_recording(tmp_path)] == ["load", "grid_0", "grid_1"]


def test_other_files_of_a_recording_are_named_as_skipped(tmp_path: Path) -> None:
    (recording(tmp_path) / "mixed_grid.json.gz").write_bytes(gzip.compress(b"[]"))
    (one,) = load_recording(tmp_path)
    assert len(one.notes) == 1 and "mixed_grid.json.gz" in one.notes[0] and "skipped" in one.notes[0]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (changed(1, prompt=None), r"missing required field `prompt` - at `\$.requests\[1\]`"),
        (changed(1, prompt=0), r"Expected `int` >= 1 - at `\$.requests\[1\].prompt`"),
        (changed(0, output="many"), r"Expected `int`, got `str` - at `\$.requests\[0\].output`"),
        (changed(0, output=2), "request 0: t holds more tokens than output=2"),
        (changed(0, t=[[0.13, 1], [0.11, 2]]), "request 0: its times run backwards"),
        (changed(0, submit=0.12), "request 0: its times run backwards"),
        (changed(0, submit=None), "request 0: received tokens but has no submit"),
        ([r | {"t": []} for r in REQUESTS], "none of its 3 requests finished"),
        ([], "no request that was sent"),
    ],
)
def test_a_broken_recording_is_one_line_that_says_where(tmp_path: Path, requests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_recording(recording(tmp_path, requests))
    assert "load.requests.json.gz" in str(error.value) and "\n" not in str(error.value)


def test_loads_packed_with_xz_are_the_same(tmp_path: Path) -> None:
    whole = load_recording(recording(tmp_path))
    gz = tmp_path / "load.requests.json.gz"
    xz = gz.with_suffix(".xz")
    content = gz.read_bytes()
    xz.write_bytes(lzma.compress(gzip.decompress(content)))
    with pytest.raises(ValueError, match=r"load\.requests\.json\.gz is there as load\.requests\.json\.xz, too: remove"):
        load_recording(tmp_path)
    gz.unlink()
    assert load_files(tmp_path) == [xz] and packed_file(tmp_path, "load.requests.json") == xz
    for path in (tmp_path, xz):
        (again,) = load_recording(path)
        assert (again.name, again.duration_s) == ("load", whole[0].duration_s)
        assert again.ttft_s.tolist() == whole[0].ttft_s.tolist()
    xz.write_bytes(xz.read_bytes()[:-9])
    with pytest.raises(ValueError, match="xz data is damaged or cut short"):
        load_recording(tmp_path)
    xz.write_bytes(lzma.compress(gzip.decompress(content)) + b"more")
    with pytest.raises(ValueError, match="xz data is damaged or cut short"):
        load_recording(tmp_path)
    (tmp_path / "load.requests.json").mkdir()
    with pytest.raises(ValueError, match=r"load\.requests\.json is there as load\.requests\.json\.xz, too"):
        load_recording(tmp_path)
    xz.unlink()
    with pytest.raises(ValueError, match=r"load\.requests\.json: cannot be read \(Is a directory\)"):
        load_recording(tmp_path)


def test_streams_of_one_xz_file_are_all_read(tmp_path: Path) -> None:
    file = tmp_path / "a.xz"
    first, second = lzma.compress(b"x" * 100), lzma.compress(b"y" * 100)
    file.write_bytes(first + bytes(8) + second)  # padding between streams is part of the format
    assert read_bytes(file) == b"x" * 100 + b"y" * 100
    file.write_bytes(first + second[:8] + b"\0\0\0" + second[11:])
    with pytest.raises(ValueError, match=r"a\.xz: xz data is damaged or cut short \(Corrupt"):
        read_bytes(file)


def test_a_recording_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "UNPACKED_BYTES", 1 << 20)
    file = tmp_path / "bomb.xz"
    file.write_bytes(lzma.compress(bytes(4 << 20)))
    with pytest.raises(ValueError, match=r"bomb\.xz: [\d,]+ bytes that unpack to more than 1,048,576: "):
        read_bytes(file)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_list_of_loads_is_replayed_however_it_is_packed(tmp_path: Path, pack: Any) -> None:
    folder = recording(tmp_path)
    held = json.loads(gzip.decompress((folder / "load.requests.json.gz").read_bytes()))
    part = [{"name": "batch", "requests": held["requests"]}]
    packed = tmp_path / f"{GRID}.json.{'gz' if pack is gzip.compress else 'xz'}"
    packed.write_bytes(pack(json.dumps(part).encode()))
    assert [load.name for load in load_recording(folder)] == ["load", "batch"]
    assert [load.name for load in load_recording(packed)] == ["batch"]


def test_half_a_file_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    file = recording(tmp_path) / "load.requests.json.gz"
    whole = file.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "gzip data is damaged or cut short"),
        (gzip.compress(gzip.decompress(whole)[:90]), "Input data was truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"", "the file is empty"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_recording(tmp_path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_recording(tmp_path / "nowhere")
    (recording(tmp_path / "inner") / "engine.json").rename(tmp_path / "engine.json")
    with pytest.raises(FileNotFoundError, match=r"inner/engine.json: missing"):
        load_recording(tmp_path / "inner")
    (tmp_path / "engine.json").rename(tmp_path / "inner" / "engine.json")
    with pytest.raises(ValueError, match=r"give a recording folder \(inside it: inner\)"):
        load_recording(tmp_path)
    with pytest.raises(ValueError, match="cudagraph_mode='FULL' is not modelled"):
        load_recording(recording(tmp_path / "inner", engine=ENGINE | {"cudagraph_mode": "FULL"}))


BENCH = {
    "date": "20261122-100000",
    "backend": "vllm",
    "label": None,
    "model_id": "meta-llama/Llama-3.1-8B",
    "num_prompts": 3,
    "request_rate": 5.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.0,
    "input_lens": [10, 20, 30],
    "output_lens": [3, 0, 2],
    "ttfts": [0.1, 0.0, 0.2],
    "itls": [[0.01, 0.02], [], [0.03]],
    "start_times": [105.0, 104.0, 103.5],
    "generated_texts": ["", "", ""],
    "errors": ["", "timeout", ""],
}


def bench(path: Path, *documents: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(document) for document in documents))
    return path


def test_a_vllm_benchmark_result_is_a_recording(tmp_path: Path) -> None:
    (one,) = load_recording(bench(tmp_path / "result.json", BENCH))
    assert one.trace.arrival_s.tolist() == [0.0, 1.5]
    assert one.trace.prompt_tokens.tolist() == [30, 10]
    np.testing.assert_allclose(one.e2el_s, [0.23, 0.13])
    assert one.duration_s == pytest.approx(1.63)
    assert one.notes == ("result: 1 of 3 requests failed: left out",)
    assert one.settings == {} and one.concurrency is None


def test_appended_results_are_a_scenario_each(tmp_path: Path) -> None:
    path = bench(tmp_path / "runs.json", BENCH, BENCH | {"request_rate": "inf", "max_concurrency": 4})
    first, second = load_recording(path)
    assert (first.name, second.name) == ("runs#1", "runs#2")
    assert second.concurrency == 4 and second.trace.arrival_s.tolist() == [0.0, 0.0]
    assert "closed loop" in second.notes[0]


def test_an_open_loop_that_a_limit_held_back_is_sent_as_it_was_and_says_so(tmp_path: Path) -> None:
    (one,) = load_recording(bench(tmp_path / "result.json", BENCH | {"max_concurrency": 1}))
    assert one.concurrency is None and one.trace.arrival_s.tolist() == [0.0, 1.5]
    assert "max_concurrency=1 held some of its 5.0 requests/s back" in one.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttfts": None, "input_lens": None}, "summary only: no input_lens/output_lens/ttfts. Re-run"),
        ({"itls": None}, "itls is missing"),
        ({"start_times": None}, "no start_times, so its arrivals"),
        ({"ttfts": [0.1]}, "ttfts has 1 entries, input_lens 3"),
        ({"input_lens": [10, 0, 30]}, r"input_lens\[1\]=0 is not possible"),
        ({"itls": [[0.01, -0.02], [], [0.03]]}, r"itls\[0\] has a negative gap"),
        ({"errors": ["a", "b", "c"]}, "all 3 requests failed"),
        ({"output_lens": "3"}, r"Expected `array \| null`, got `str` - at `\$.output_lens`"),
    ],
)
def test_a_broken_benchmark_result_is_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = bench(tmp_path / "result.json", BENCH | fields)
    with pytest.raises(ValueError, match=message) as error:
        load_recording(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_line_of_a_broken_appended_result_is_named(tmp_path: Path) -> None:
    path = bench(tmp_path / "runs.json", BENCH, BENCH | {"itls": None})
    with pytest.raises(ValueError, match=r"runs.json, line 2: itls is missing"):
        load_recording(path)
    path.write_text(json.dumps(BENCH) + "\n" + json.dumps(BENCH)[:200])
    with pytest.raises(ValueError, match=r"runs.json, line 2: Input data was truncated"):
        load_recording(path)
    path.write_text(json.dumps(BENCH)[:200])
    with pytest.raises(ValueError, match=r"runs.json: Input data was truncated"):
        load_recording(path)


def test_recordings_of_a_real_engine_load() -> None:
    scenarios = load_recording(RECORDINGS / H100)
    assert sum(one.name.startswith("grid_") for one in scenarios) == 30
    loads = {one.name: one for one in scenarios if not one.name.startswith("grid_")}
    assert {name: len(one.trace) for name, one in loads.items()} == {
        "azconv_x1": 301,
        "closed64_1024_256": 384,
        "poisson_1024_128_q18": 764,
        "poisson_1024_128_q8": 303,
    }
    assert all(one.notes == () and one.finished.all() for one in scenarios)
    assert loads["closed64_1024_256"].concurrency == 64
    assert loads["poisson_1024_128_q8"].settings["num_gpu_blocks_override"] == 28240
