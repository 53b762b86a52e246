"""What the papers found between batching policies, at their settings; `benchmarks/batching.py` says which."""

from __future__ import annotations

from pathlib import Path

from benchmarks import batching


def test_orca_serves_an_order_of_magnitude_more_than_static_batching_at_the_same_latency(tmp_path: Path) -> None:
    """OSDI'22: 36.9 times FasterTransformer on twice the GPUs; docs/policies/batching.md says what differs."""
    rates = batching.orca(tmp_path)
    assert 8.0 < rates["orca"] / rates["static"] < 40.0
    assert rates["static"] < rates["dynamic"] < rates["orca"] / 5.0


def test_paging_serves_more_than_reserving(tmp_path: Path) -> None:
    """SOSP'23, section 6.2: 1.7 to 2.7 times Orca (Oracle), 2.7 to 8 times Orca (Max), Pow2 in between."""
    rates = batching.paged(tmp_path)
    assert 1.7 < rates["vllm-v0"] / rates["orca oracle"] < 2.7
    assert 2.7 < rates["vllm-v0"] / rates["orca max"] < 8.0
    assert rates["orca max"] < rates["orca pow2"] < rates["orca oracle"]


def test_stall_free_batches_keep_the_tail_of_time_between_tokens() -> None:
    """OSDI'24: up to 2.6 times vLLM's capacity for Mistral-7B on one A100; Orca stalls as vLLM does."""
    found = batching.stalls()
    (orca_s, _), (v0_s, v0_rate), (sarathi_s, sarathi_rate) = (found[name] for name in ("orca", "vllm-v0", "sarathi"))
    assert sarathi_s < v0_s / 3.0
    assert abs(orca_s / v0_s - 1.0) < 0.2
    assert 2.0 < sarathi_rate / v0_rate < 4.0
