"""Results of `vllm bench serve --save-result --save-detailed` as loads to repeat (vllm/benchmarks/serve.py).

One JSON object, or one a line when it was written with --append-result. Lists have one entry a request, seconds:

    input_lens, output_lens   tokens
    start_times               when it was sent, on a clock of its own (older versions lack it)
    ttfts, itls               first chunk - sent; gaps between chunks. e2el = ttft + the sum of its gaps
    errors                    "" or why it failed

It does not say how the server was set up: those settings come from the caller. With max_concurrency and an infinite
request rate the load is a closed loop: the send times followed the measured system, so they are not replayed but found
anew. Failed requests are left out, with their count in the notes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmsim.recorded import LARGEST, LONGEST_S, Floats, Positive, RecordedScenario, read_bytes
from llmsim.trace import Trace

NEEDED = ("input_lens", "output_lens", "ttfts", "itls")


class _Bench(msgspec.Struct):
    input_lens: list[int] | None = None
    output_lens: list[int] | None = None
    ttfts: list[float] | None = None
    itls: list[list[float]] | None = None
    start_times: list[float] | None = None
    errors: list[str] | None = None
    label: str | None = None
    model_id: str | None = None
    duration: float | None = None
    max_concurrency: Positive | None = None
    request_rate: float | str | None = None


def load_benchmark(path: Path) -> list[RecordedScenario]:
    content = read_bytes(path)
    if not content.strip():
        raise ValueError(f"{path}: empty file; give the JSON that vllm bench serve --save-result wrote")
    try:
        documents = [msgspec.json.decode(content, type=_Bench)]
        return [_scenario(str(path), path.name.partition(".")[0], documents[0])]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        lines = [(n, line) for n, line in enumerate(content.splitlines(), start=1) if line.strip()]
        if len(lines) < 2 or not lines[0][1].rstrip().endswith(b"}"):
            raise ValueError(f"{path}: {error}") from None
    return [_line(path, number, line) for number, line in lines]


def _line(path: Path, number: int, line: bytes) -> RecordedScenario:
    where = f"{path}, line {number}"
    try:
        bench = msgspec.json.decode(line, type=_Bench)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return _scenario(where, f"{path.name.partition('.')[0]}#{number}", bench)


def _scenario(where: str, name: str, bench: _Bench) -> RecordedScenario:
    lists = _checked(where, bench)
    failed = np.array([bool(e) for e in bench.errors or [""] * len(lists["input_lens"])], dtype=bool)
    kept = np.flatnonzero(~failed & (lists["output_lens"] > 0))
    if not kept.size:
        raise ValueError(f"{where}: all {failed.size} requests failed; nothing to compare with")
    sent_s, concurrency, notes = _sends(where, name, bench, failed.size)
    if kept.size < failed.size:
        notes += (f"{name}: {failed.size - kept.size} of {failed.size} requests failed: left out",)
    kept = kept[np.argsort(sent_s[kept], kind="stable")]
    gaps_s = [np.array((bench.itls or [])[row], dtype=np.float64) for row in kept.tolist()]
    ttft_s = lists["ttfts"][kept].astype(np.float64)
    e2el_s = ttft_s + np.array([row.sum() for row in gaps_s])
    start_s = np.zeros(failed.size) if bench.start_times is None else np.array(bench.start_times)
    ends_s = start_s[kept] + e2el_s
    return RecordedScenario(
        name=name,
        trace=Trace(
            name=name,
            arrival_s=sent_s[kept] - sent_s[kept[0]],
            prompt_tokens=lists["input_lens"][kept],
            output_tokens=lists["output_lens"][kept],
        ),
        concurrency=concurrency,
        settings={},
        engine={"model": bench.model_id} if bench.model_id else {},
        finished=np.ones(kept.size, dtype=bool),
        ttft_s=ttft_s,
        e2el_s=e2el_s,
        gaps_s=gaps_s,
        duration_s=float(ends_s.max() - start_s[kept].min()) if bench.start_times else bench.duration or float("nan"),
        notes=notes,
    )


def _checked(where: str, bench: _Bench) -> dict[str, Any]:
    if bench.ttfts is None or bench.input_lens is None:
        raise ValueError(
            f"{where}: summary only: no input_lens/output_lens/ttfts. Re-run vllm bench serve with --save-detailed"
        )
    rows = len(bench.input_lens)
    for name in (*NEEDED, "start_times", "errors"):
        values = getattr(bench, name)
        if values is None and name in NEEDED:
            raise ValueError(f"{where}: {name} is missing; re-run vllm bench serve with --save-detailed")
        if values is not None and len(values) != rows:
            raise ValueError(f"{where}: {name} has {len(values)} entries, input_lens {rows}; the file is damaged")
    for name in ("input_lens", "output_lens", "ttfts"):
        for row, value in enumerate(getattr(bench, name)):
            limit = LONGEST_S if name == "ttfts" else LARGEST
            if not 0 <= value <= limit or (name == "input_lens" and value < 1):
                raise ValueError(f"{where}: {name}[{row}]={value} is not possible; the file is damaged")
    for row, gaps in enumerate(bench.itls or []):
        if not all(0 <= gap <= LONGEST_S for gap in gaps):
            raise ValueError(f"{where}: itls[{row}] has a negative gap, or one of centuries; the file is damaged")
    starts = bench.start_times or [0.0]
    if max(starts) - min(starts) > LONGEST_S:
        raise ValueError(f"{where}: start_times span {max(starts) - min(starts):.3g} s; the file is damaged")
    return {
        "input_lens": np.array(bench.input_lens, dtype=np.int64),
        "output_lens": np.array(bench.output_lens, dtype=np.int64),
        "ttfts": np.array(bench.ttfts, dtype=np.float64),
    }


def _sends(where: str, name: str, bench: _Bench, rows: int) -> tuple[Floats, int | None, tuple[str, ...]]:
    """(when to send each request, closed-loop concurrency, notes)."""
    unlimited = bench.request_rate in (None, "inf")
    if bench.max_concurrency is not None and unlimited:
        note = f"{name}: max_concurrency={bench.max_concurrency}: replayed as a closed loop, not by its start times"
        return np.zeros(rows), bench.max_concurrency, (note,)
    if bench.start_times is None:
        raise ValueError(
            f"{where}: no start_times, so its arrivals (request_rate={bench.request_rate}) cannot be repeated exactly; "
            "re-run with a vllm that records them, or replay a synthetic trace of that rate"
        )
    start_s = np.array(bench.start_times, dtype=np.float64)
    if bench.max_concurrency is None:
        return start_s, None, ()
    note = (
        f"{name}: max_concurrency={bench.max_concurrency} held some of its {bench.request_rate} requests/s back: "
        "replayed by its start times, which followed the measured system"
    )
    return start_s, None, (note,)
