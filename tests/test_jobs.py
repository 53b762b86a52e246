"""Worker processes and the store of their results: stopped at once, bounded, and gone with their server."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import llmsim
from llmsim.choice import Replay, Synthesis, TraceChoice, replay_all, shipped
from llmsim.jobs import JobError, Jobs
from llmsim.jobs_store import PREFIX, Store, remove_stale
from llmsim.runs import read_run
from llmsim.scenario import Scenario

SCENARIO = Scenario(model="llama-3.1-8b", gpu="h100-sxm", cost="constant:0.01", num_gpu_blocks_override=20000)
SMALL = TraceChoice(synthesis=Synthesis(requests=200, rate=50.0))
ENDLESS = TraceChoice(synthesis=Synthesis(requests=300_000, rate=50.0))
HOME = {**os.environ, "PYTHONPATH": str(Path(llmsim.__file__).parent.parent)}


def until(there, most_s=10.0):
    started_s = time.monotonic()
    while not there():
        assert time.monotonic() - started_s < most_s
        time.sleep(0.01)
    return time.monotonic() - started_s


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path / "jobs", at_once=2)
    yield jobs
    jobs.close()


def test_a_job_returns_what_its_function_returns_and_says_how_far_it_is(jobs, tmp_path):
    todo = [Replay(SMALL, SCENARIO, tmp_path / "a"), Replay(SMALL, replace(SCENARIO, max_num_seqs=4), tmp_path / "b")]
    job = jobs.start(replay_all, todo)
    until(lambda: job.state != "running")
    assert job.result() == [tmp_path / "a", tmp_path / "b"]
    assert read_run(tmp_path / "a").summary["completed"] == 200
    assert job.progress()[:2] == (400, 400)


def test_a_job_does_what_the_same_call_does_here(jobs, tmp_path):
    job = jobs.start(replay_all, [Replay(SMALL, SCENARIO, tmp_path / "there")])
    replay_all([Replay(SMALL, SCENARIO, tmp_path / "here")])
    until(lambda: job.state != "running")
    for name in ("summary.json", "requests.parquet", "iterations.parquet"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_what_a_function_refuses_arrives_as_its_own_line(jobs, tmp_path):
    bad = replace(SCENARIO, scheduler="nonsense")
    job = jobs.start(replay_all, [Replay(SMALL, bad, tmp_path / "run")])
    until(lambda: job.state != "running")
    with pytest.raises(JobError, match=r"unknown scheduler 'nonsense'"):
        job.result()
    assert not (tmp_path / "run").exists()


def test_a_worker_that_dies_says_what_it_said_last(jobs):
    job = jobs.start(replay_all, [Replay(ENDLESS, SCENARIO, Path("/nowhere"))])
    os.kill(job.process.pid, signal.SIGKILL)
    until(lambda: job.state != "running")
    with pytest.raises(RuntimeError, match="ended with status -9"):
        job.result()


def test_stop_kills_a_job_within_a_second(jobs, tmp_path):
    job = jobs.start(replay_all, [Replay(ENDLESS, SCENARIO, tmp_path / "run")])
    until(lambda: job.progress()[0] > 0)
    started_s = time.monotonic()
    job.stop()
    assert time.monotonic() - started_s < 1.0
    assert job.state == "stopped" and gone(job.process.pid) and not (tmp_path / "run").exists()


def test_more_jobs_than_the_machine_takes_are_refused_in_words(jobs, tmp_path):
    for name in "ab":
        jobs.start(replay_all, [Replay(ENDLESS, SCENARIO, tmp_path / name)])
    with pytest.raises(ValueError, match="2 long runs are under way"):
        jobs.start(replay_all, [])


def test_jobs_end_with_their_server_however_it_ends(tmp_path):
    server = (
        "import os, sys; from pathlib import Path; from llmsim.jobs import Jobs; from llmsim.choice import *;"
        "from llmsim.scenario import Scenario\n"
        "one = Replay(TraceChoice(synthesis=Synthesis(requests=300000)), Scenario(model='llama-3.1-8b',"
        " gpu='h100-sxm', cost='constant:0.01'), Path(sys.argv[1]) / 'run')\n"
        "job = Jobs(Path(sys.argv[1])).start(replay_all, [one]); print(job.process.pid, flush=True)\n"
        "import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", server, str(tmp_path)], stdout=subprocess.PIPE, env=HOME)
    worker = int(parent.stdout.readline())
    until(lambda: (tmp_path / "job-0" / "progress.json").is_file())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: gone(worker), 5.0)


def fill(store, names):
    for name in names:
        with store.making(name) as folder:
            replay_all([Replay(replace(SMALL, requests=5), SCENARIO, folder)])


def test_the_store_keeps_the_runs_used_last(tmp_path):
    store = Store(tmp_path / "root", most_runs=3, spared_s=0.0)
    fill(store, "abc")
    store.used("a")
    fill(store, "d")
    assert sorted(path.name for path in store.runs.iterdir()) == ["a", "c", "d"]
    store.close()
    assert not store.root.exists()


def test_a_run_asked_for_a_moment_ago_is_spared(tmp_path):
    store = Store(tmp_path / "root", most_runs=2, spared_s=60.0)
    fill(store, "abcd")
    assert len(list(store.runs.iterdir())) == 4
    fill(store, "e")  # twice as many as meant to be: no longer
    assert len(list(store.runs.iterdir())) == 4
    store.close()


def test_the_store_is_bounded_in_bytes_on_disk_and_in_memory(tmp_path):
    store = Store(tmp_path / "root", most_bytes=1, most_read_bytes=1, spared_s=0.0)
    fill(store, "a")
    one = store.read(store.runs / "a")
    assert store.read(store.runs / "a") is one
    fill(store, "b")
    store.read(store.runs / "b")
    assert [path.name for path in store.runs.iterdir()] == ["b"]  # the latest stays, though it is more than a byte
    assert len(store._read) == 1
    store.close()


def test_the_store_reads_a_table_when_it_is_asked_for(tmp_path):
    store = Store(tmp_path / "root")
    fill(store, "a")
    requests = store.read(store.runs / "a", ("requests",))
    assert requests.iterations == {} and "arrival_s" in requests.requests and "ttft_s" not in requests.requests
    whole = store.read(store.runs / "a")
    assert whole.requests is requests.requests and "gpu_end_s" in whole.iterations
    assert store.read(store.runs / "a", ("requests",)) is whole
    store.close()


def test_what_killed_workers_left_half_written_is_removed(tmp_path):
    store = Store(tmp_path / "root")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (store.runs / f".x.partial-{ended.pid}").mkdir()
    (store.runs / f".y.partial-{os.getpid()}").mkdir()
    fill(store, "a")
    assert sorted(path.name for path in store.runs.iterdir()) == [f".y.partial-{os.getpid()}", "a"]
    store.close()


def test_only_folders_of_dead_servers_are_stale(tmp_path):
    alive = Store(tmp_path / f"{PREFIX}alive")
    dead = f"from llmsim.jobs_store import Store; from pathlib import Path; import os; Store(Path({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", f"{dead} / '{PREFIX}dead'); os._exit(1)"], env=HOME, check=False)
    (tmp_path / f"{PREFIX}not-ours").mkdir()  # no lock: not made by a server
    assert remove_stale(tmp_path) == [tmp_path / f"{PREFIX}dead"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{PREFIX}alive", f"{PREFIX}not-ours"]
    alive.close()


def test_the_latest_uploads_are_kept(tmp_path):
    store = Store(tmp_path / "root")
    paths = []
    for number in range(12):
        paths.append(store.keep_upload("../evil.csv", f"digest{number}", b"x"))
        os.utime(paths[-1].parent, (number, number))
    assert all(path.name == "evil.csv" and path.is_relative_to(store.uploads) for path in paths)
    assert [path.exists() for path in paths] == [False] * 4 + [True] * 8
    store.close()


def test_a_choice_loads_what_the_command_line_would(tmp_path):
    from llmsim.trace import load_trace

    choice = replace(shipped("chat.csv"), traffic=2.0, requests=100)
    direct = load_trace(choice.path, limit=100, time_scale=0.5)
    loaded = choice.load()
    assert (loaded.arrival_s == direct.arrival_s).all() and (loaded.prompt_tokens == direct.prompt_tokens).all()
    assert choice.command_line()[1:] == ["--limit", "100", "--time-scale", "0.5"]


def test_a_synthetic_trace_begins_alike_however_long_it_is():
    whole, part = Synthesis(requests=5000).make(), Synthesis(requests=5000).make(300)
    assert (whole.arrival_s[:300] == part.arrival_s).all()
    assert (whole.prompt_tokens[:300] == part.prompt_tokens).all()
    assert (whole.output_tokens[:300] == part.output_tokens).all()


def test_a_quick_answer_is_shorter_where_answers_are_long():
    short, long = Synthesis(requests=100_000, output_tokens=50), Synthesis(requests=100_000, output_tokens=2000)
    assert TraceChoice(synthesis=Synthesis(requests=500)).quick() == 500
    assert 300 <= TraceChoice(synthesis=long).quick() < TraceChoice(synthesis=short).quick() <= 20_000
