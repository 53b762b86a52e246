"""docs/explain.md runs: its commands give what the page says about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pages import REPORTS, ROOT, run_page


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_runs(name: str, tmp_path: Path) -> None:
    cells = run_page((ROOT / "docs" / name).read_text(encoding="utf-8"), tmp_path)
    tail, request, frame, of_run, table = (printed for _, _, printed in cells)
    assert "Cause: the KV cache was full" in tail and "Helps most: " in tail
    assert request.startswith("Request 1335: ") and "recompute after preemption for request" in request
    assert "in all: the request's E2EL" in request and "Tried" not in request
    assert [line.split()[0] for line in frame.splitlines()[2:]] == ["queue", "prefill", "decode", "preempted"]
    assert "requests with TTFT above 2,000 ms" in of_run
    assert table.startswith("|  | vllm | `max_num_batched_tokens=512` |") and "mean over 3 seeds" in table
    for _, shown, _ in cells:
        assert shown is None or shown.strip(), "the page shows what it prints"
