"""Sweeps on a Ray cluster of two machines: the same bytes as without, also when one of the machines is lost."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import require

from llmsim import sweep
from llmsim.sweep_ray import arrange

require("ray")

POLICY = """
import os, signal, time
from pathlib import Path
from llmsim.schedulers.vllm import VllmScheduler


class Once(VllmScheduler):
    '''Ends its process the first time it is made; takes a tenth of a second.'''

    def __init__(self):
        super().__init__()
        time.sleep(0.1)
        if not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU, on this machine; nothing is sent anywhere."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        yield made
    finally:
        made.shutdown()


def test_a_cluster_gives_the_same_bytes_and_survives_a_lost_machine(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{second},64,11" for second in range(10)]
    Path("ten.csv").write_text("\n".join(["arrival_time_s,prompt_tokens,output_tokens", *lines]) + "\n")
    Path("odd.py").write_text(POLICY)
    spec = {
        "trace": "ten.csv",
        "scenario": {"model": "llama-3.1-8b", "gpu": "h100-sxm", "scheduler": "odd.py:Once"},
        "scenarios": [{"name": "plain"}, {"name": "impossible", "max_num_batched_tokens": 1, "max_num_seqs": 2}],
        "seeds": 12,
    }
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int, left_s: float | None) -> None:
        told.append((done, total))
        if done == 4:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    found = sweep(spec, out="ray", executor="ray", progress=progress)
    assert told == [(at, 24) for at in range(1, 25)]
    assert len(cluster.worker_nodes) == 0
    assert Path("killed").exists()  # one worker ended itself
    assert found.failed == 12  # the impossible ones
    sweep(spec, out="local")
    both = [{path.name: path.read_bytes() for path in Path(out).iterdir()} for out in ("ray", "local")]
    assert len(both[0]) == 26
    assert both[0] == both[1]


def test_files_follow_the_runs_to_machines_without_them(tmp_path: Path) -> None:
    """Relative paths lead to the same content from the folder that a worker is put in."""
    home = tmp_path / "home" / "work"
    home.mkdir(parents=True)
    (home / "policy.py").write_text("a")
    (home / "../traces").mkdir()
    (home / "../traces/t.csv").write_text("b")
    files = {path: hashlib.sha256(text).hexdigest() for path, text in (("policy.py", b"a"), ("../traces/t.csv", b"b"))}
    fetched: list[str] = []

    def fetch(path: str) -> bytes:
        fetched.append(path)
        return (home / path).read_bytes()

    assert arrange(str(home), files, fetch) == str(home)
    assert fetched == []
    elsewhere = Path(arrange(str(tmp_path / "missing"), files, fetch))
    assert {path: (elsewhere / path).read_text() for path in files} == {"policy.py": "a", "../traces/t.csv": "b"}
    assert sorted(fetched) == ["../traces/t.csv", "policy.py"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "policy.py").write_text("another one")
    assert arrange(str(other), files, fetch) != str(other)


def test_without_a_cluster_the_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ten.csv").write_text("arrival_time_s,prompt_tokens,output_tokens\n0,1,1\n")
    spec = {"trace": "ten.csv", "scenario": {"model": "llama-3.1-8b", "gpu": "h100-sxm"}}
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'executor=ray: Ray is not installed: pip install "llmsim\[ray\]"'):
        sweep(spec, out="out", executor="ray")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
