"""Admission control: who is turned away, by hand; and what the command line and the run folder say of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_order import Seconds, finished, request, served

from llmsim.admission import load_admission
from llmsim.cli import main
from llmsim.scenario import Scenario
from llmsim.schedulers import load_scheduler
from llmsim.simulate import simulate
from llmsim.trace import Trace

MACHINE = ["--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--num-gpu-blocks-override", "2000", "--max-num-seqs", "16"]
SPEC = "interactive:0.7:ttft=500ms,tpot=50ms;batch:0.3:ttft=10s;tenants:8:zipf=1"


def test_a_full_queue_turns_the_next_one_away() -> None:
    jobs = [request(i, 0.1 * i, 10) for i in range(6)]
    replica = served(load_scheduler("fcfs"), jobs, admission=load_admission("queue-depth", {"max_waiting": 2}))
    # 0 runs; at 1 s the others become schedulable: 1 and 2 wait, 3, 4 and 5 find two waiting
    assert [one.rejected_s == one.rejected_s for one in jobs] == [False, False, False, True, True, True]
    assert finished(jobs)[:3] == [10.0, 20.0, 30.0] and replica.rejections == 3
    assert jobs[3].rejected_s == pytest.approx(0.3)


def test_no_queue_at_all_serves_who_comes_to_an_empty_one() -> None:
    jobs = [request(0, 0.0, 5), request(1, 9.0, 5)]
    served(load_scheduler("fcfs"), jobs, admission=load_admission("queue-depth", {"max_waiting": 1}))
    assert finished(jobs) == [5.0, 14.0]


@pytest.mark.parametrize(("promised_s", "admitted"), [(5.5, True), (4.5, False)])
def test_a_first_token_that_would_surely_be_late_is_not_waited_for(promised_s: float, admitted: bool) -> None:
    """100 tokens a second: 300 wait and it brings 180, so its first token takes 5 s from where it arrives."""
    jobs = [request(0, 0.0, 50), request(1, 0.1, 2, 300), request(2, 0.1, 2, 180, slo_ttft_s=promised_s)]
    served(load_scheduler("fcfs"), jobs, Seconds(per_s=100), admission=load_admission("deadline"))
    assert (jobs[2].rejected_s != jobs[2].rejected_s) is admitted


def test_headroom_sheds_earlier_and_no_promise_is_never_shed() -> None:
    for headroom, promised_s, admitted in ((0.2, 5.5, False), (0.2, 6.5, True), (9.0, float("nan"), True)):
        jobs = [request(0, 0.0, 50), request(1, 0.1, 2, 300), request(2, 0.1, 2, 180, slo_ttft_s=promised_s)]
        control = load_admission("deadline", {"headroom": headroom})
        served(load_scheduler("fcfs"), jobs, Seconds(per_s=100), admission=control)
        assert (jobs[2].rejected_s != jobs[2].rejected_s) is admitted


def test_the_users_own_file_decides(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Short:\n"
        "    def __init__(self, most: int = 100):\n"
        "        self.most = most\n"
        "    def admit(self, request, replica, now_s):\n"
        "        return request.prompt_tokens <= self.most\n"
    )
    trace = Trace("t", np.array([0.0, 0.1, 0.2]), np.array([50, 150, 250]), np.array([4, 4, 4]))
    settings: dict[str, Any] = {"model": "llama-3.1-8b", "gpu": "h100-sxm", "admission": f"{tmp_path}/mine.py:Short"}
    result = simulate(trace, Scenario(**settings, admission_args={"most": 200}))
    assert result.requests["turned_away"].tolist() == [False, False, True]
    assert np.isnan(result.requests["finish_s"]).tolist() == [False, False, True]
    assert result.summary()["turned_away"] == 1


@pytest.mark.parametrize(
    ("spec", "arguments", "says"),
    [
        ("lottery", {}, "unknown admission 'lottery'. Built-in: none, deadline, queue-depth"),
        ("queue-depth", {"max_waiting": -1}, "max_waiting=-1 is negative"),
        ("deadline", {"headroom": -0.1}, "headroom=-0.1 is negative"),
        ("deadline", {"colour": 1}, "unknown argument 'colour'. Valid arguments: headroom"),
    ],
)
def test_what_cannot_be_loaded_is_explained(spec: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_admission(spec, arguments)


# ---- what is printed and written -----------------------------------------------------------------------------------


def replayed(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, str]:
    assert main(["replay", "traces/chat.csv", "--limit", "400", "--rate", "40", *MACHINE, *flags]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_the_result_says_that_classes_were_assigned_and_how_each_fared(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = replayed(
        capsys, "--assign-classes", SPEC, "--predict", "tau=0.55", "--no-out", "--admission", "deadline"
    )
    assert "assigned, not in the trace: classes interactive 0.7, batch 0.3; 8 tenants" in err
    printed = " ".join(out.split())
    assert "Assigned, not in the trace: classes interactive 0.7, batch 0.3; 8 tenants" in printed
    assert "Predictions made, not in the trace: log-normal noise" in printed and "Kendall's tau 0.55" in printed
    assert "class interactive: " in out and "SLO attained" in out and "turned away" in out
    assert out.count("tenant t") == 5 and "... and 3 tenants with fewer requests" in out
    assert "requests were turned away; latencies are those of the others" in err


def test_classes_tenants_and_predictions_are_in_the_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--assign-classes", SPEC, "--predict", "rank", "--out", str(tmp_path / "run"), "--scheduler", "edf"]
    replayed(capsys, *flags, "--scheduler-arg", "shed=true")
    table = pq.read_table(tmp_path / "run" / "requests.parquet").to_pydict()
    assert set(table["slo_class"]) == {"interactive", "batch"} and set(table["tenant"]) == {f"t{i}" for i in range(8)}
    assert all(0.0 <= rank < 1.0 for rank in table["predicted_tokens"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name, one in summary["classes"].items():
        mine = [i for i, label in enumerate(table["slo_class"]) if label == name]
        assert one["requests"] == len(mine)
        assert one["turned_away"] == sum(table["turned_away"][i] for i in mine)
        promised_s = {"interactive": (0.5, 0.05), "batch": (10.0, float("inf"))}[name]
        good = sum(
            table["ttft_s"][i] is not None
            and table["ttft_s"][i] <= promised_s[0]
            and (table["tpot_s"][i] or 0.0) <= promised_s[1]
            for i in mine
        )
        assert one["slo_attainment"] == pytest.approx(good / len(mine))
    assert sum(one["service_share"] for one in summary["tenants"].values()) == pytest.approx(1.0)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert any("assigned, not in the trace" in note for note in manifest["notes"])


def test_without_labels_nothing_is_added(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, _ = replayed(capsys, "--out", str(tmp_path / "run"))
    assert "class " not in out and "tenant" not in out and "ssigned" not in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not {"classes", "tenants", "turned_away", "assigned"} & set(summary)
    columns = pq.read_table(tmp_path / "run" / "requests.parquet").column_names
    assert not {"tenant", "slo_class", "predicted_tokens", "turned_away"} & set(columns)


def test_classes_that_nobody_promised_anything_have_no_attainment() -> None:
    trace = Trace("t", np.zeros(2), np.array([50, 150]), np.array([4, 1]), slo_class=["a", "b"])
    summary = simulate(trace, Scenario(model="llama-3.1-8b", gpu="h100-sxm")).summary()
    assert [one["slo_attainment"] for one in summary["classes"].values()] == [None, None]
    assert summary["classes"]["b"]["mean_tpot_ms"] is None
