"""Frames for charts against plain recomputations, and what down-sampling must keep."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import numpy as np
import pytest
from made_results import Served, made_result, random_served

from llmsim import views
from llmsim.metrics import Result, latencies_s
from llmsim.utilisation import active_seconds

REJECTED = Served(1.0, [])


def log(rows: list[tuple[float, float, int, int, int, int]]) -> list[dict[str, float]]:
    """(start_s, gpu_end_s, seqs, prefill_tokens, kv_blocks, iterations) of one replica."""
    names = ("start_s", "gpu_end_s", "seqs", "prefill_tokens", "kv_blocks", "iterations")
    return [dict(zip(names, row, strict=True)) for row in rows]


def random_run(seed: int = 1, count: int = 300) -> Result:
    """Requests and, unrelated to them, iterations of two replicas with pauses between them."""
    rng = np.random.default_rng(seed)
    served = [replace(one, replica=at % 2) for at, one in enumerate(random_served(count, seed))]
    rows = []
    for replica in (0, 1):
        at_s = 0.0
        while at_s < 14.0:
            start_s, length_s = at_s + float(rng.exponential(0.02)), float(rng.exponential(0.2))
            ahead_s = start_s - float(rng.random()) * 0.01  # scheduled while the one before it still ran
            rows.append({
                "replica": replica, "start_s": max(ahead_s, 0.0), "gpu_end_s": start_s + length_s,
                "seqs": int(rng.integers(0, 9)), "iterations": int(rng.integers(1, 6)),
                "prefill_tokens": int(rng.integers(0, 900)), "kv_blocks": int(rng.integers(0, 1000)),
            })  # fmt: skip
            at_s = start_s + length_s
    return made_result([*served, REJECTED], *rows, replicas=2)


def overlap_s(begin_s: float, end_s: float, low_s: float, high_s: float) -> float:
    return max(0.0, min(end_s, high_s) - max(begin_s, low_s))


# ---- the strip ------------------------------------------------------------------------------------------------------


def test_a_strip_by_hand() -> None:
    served = [
        Served(0.0, [2.0, 3.0, 4.0], scheduled_s=1.0),  # waits 1 s, runs 3 s
        Served(0.5, [2.0], scheduled_s=1.5),  # waits 1 s, runs half a second
    ]
    rows = log([(1.0, 2.0, 0, 200, 500, 1), (2.0, 4.0, 1, 0, 250, 2)])  # 1,000 usable blocks
    frame = views.strip({"run": made_result(served, *rows)}, slices=4)
    assert frame["time_s"].tolist() == [0, 1, 2, 3]
    assert frame["end_s"].tolist() == [1, 2, 3, 4]
    assert frame["waiting"].tolist() == [1.5, 0.5, 0, 0]
    assert frame["waiting_max"].tolist() == [2, 1, 0, 0]
    assert frame["running"].tolist() == [0, 1.5, 1, 1]
    assert frame["running_max"].tolist() == [0, 2, 1, 1]
    assert frame["kv_usage"].tolist() == [0, 0.5, 0.25, 0.25]
    assert frame["kv_usage_max"].tolist() == [0, 0.5, 0.25, 0.25]
    assert frame["prompt_tokens_per_s"].tolist() == [0, 200, 0, 0]
    assert frame["output_tokens_per_s"].tolist() == [0, 0, 3, 1]  # both first tokens come at 2 s, which begins a slice
    assert frame["sent"].tolist() == [2, 0, 0, 0]
    assert frame["ttft_p50_ms"][0] == pytest.approx(1750.0)
    assert frame["ttft_p50_ms"][1:].isna().all()


def test_every_column_of_a_strip_is_what_loops_compute() -> None:
    run = random_run()
    frame = views.strip({"run": run}, slices=200)
    requests, rows, active_s = run.requests, run.iterations, active_seconds(run.iterations)
    done = [at for at in range(len(requests["id"])) if np.isfinite(requests["finish_s"][at])]
    decodes = float((rows["seqs"] * rows["iterations"]).sum())
    rest = sum(int(requests["output_tokens"][at]) - 1 for at in done)
    together = frame.attrs["ttft_slices"]
    assert len(frame) > 30 and together > 1
    for at, row in enumerate(frame.to_dict("records")):
        low_s, high_s = row["time_s"], row["end_s"]
        last = at == len(frame) - 1
        for name, begin, end in (("running", "scheduled_s", "finish_s"), ("waiting", "arrival_s", "scheduled_s")):
            spans = [(float(requests[begin][i]), float(requests[end][i])) for i in done]
            mean = sum(overlap_s(*span, low_s, high_s) for span in spans) / (high_s - low_s)
            assert row[name] == pytest.approx(mean, abs=1e-9)
            instants_s = [low_s, *(begin_s for begin_s, _ in spans if low_s <= begin_s < high_s)]
            most = max(sum(begin_s <= t < end_s for begin_s, end_s in spans) for t in instants_s)
            assert row[f"{name}_max"] == most
        blocks = tokens = out = 0.0
        highest = 0
        for i in range(len(rows["start_s"])):
            end_s = float(rows["gpu_end_s"][i])
            begin_s = end_s - float(active_s[i])
            inside_s = overlap_s(begin_s, end_s, low_s, high_s)
            blocks += inside_s * int(rows["kv_blocks"][i])
            tokens += inside_s / float(active_s[i]) * int(rows["prefill_tokens"][i])
            out += inside_s / float(active_s[i]) * int(rows["seqs"][i]) * int(rows["iterations"][i])
            if inside_s > 0.0:
                highest = max(highest, int(rows["kv_blocks"][i]))
        firsts = sum(low_s <= requests["first_token_s"][i] < high_s for i in done)
        assert row["kv_usage"] == pytest.approx(blocks / (1000 * 2 * (high_s - low_s)), rel=1e-9, abs=1e-12)
        assert row["kv_usage_max"] == highest / 1000
        assert row["prompt_tokens_per_s"] == pytest.approx(tokens / (high_s - low_s), rel=1e-9, abs=1e-6)
        assert row["output_tokens_per_s"] * (high_s - low_s) == pytest.approx(firsts + out * rest / decodes, rel=1e-7)
        group = at // together * together
        from_s = frame["time_s"][group]
        to_s = frame["time_s"][group + together] if group + together < len(frame) else np.inf
        sent = [i for i in done if from_s <= requests["arrival_s"][i] < to_s]
        assert row["ttft_requests"] == len(sent)
        for percent in (50, 90, 99):
            ttft_ms = [1e3 * (requests["first_token_s"][i] - requests["arrival_s"][i]) for i in sent]
            expected = np.percentile(ttft_ms, percent) if sent else nan
            assert row[f"ttft_p{percent}_ms"] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        arrived = sum(low_s <= t < high_s or (last and t == high_s) for t in requests["arrival_s"].tolist())
        assert row["sent"] == arrived


def test_the_means_of_a_strip_are_the_summary_s_numbers() -> None:
    run = random_run(2)
    frame = views.strip({"run": run}, slices=50)
    lengths_s = frame["end_s"] - frame["time_s"]
    done = np.isfinite(run.requests["finish_s"])
    queued_s = (run.requests["scheduled_s"] - run.requests["arrival_s"])[done].sum()
    assert (frame["waiting"] * lengths_s).sum() == pytest.approx(queued_s, rel=1e-9)  # Little's law
    ran_s = (run.requests["finish_s"] - run.requests["scheduled_s"])[done].sum()
    assert (frame["running"] * lengths_s).sum() == pytest.approx(ran_s, rel=1e-9)


def test_kv_usage_over_a_whole_run_is_that_of_its_summary() -> None:
    rows = log([(0.0, 2.0, 1, 0, 400, 1), (1.5, 3.0, 1, 0, 700, 1), (5.0, 8.0, 1, 0, 100, 1)])
    run = made_result([Served(0.0, [1.0, 8.0], scheduled_s=0.0)], *rows)
    frame = views.strip({"run": run}, slices=7)
    usage = run.summary()["kv_cache_usage_perc"]
    mean = (frame["kv_usage"] * (frame["end_s"] - frame["time_s"])).sum() / 8.0
    assert mean == pytest.approx(usage["mean"])
    assert mean == pytest.approx((2 * 0.4 + 1 * 0.7 + 3 * 0.1) / 8)
    assert frame["kv_usage_max"].max() == usage["max"] == 0.7


def test_runs_share_their_slices_and_end_when_they_end() -> None:
    short, long = made_result([Served(0.0, [1.0, 2.0])]), made_result([Served(0.0, [1.0, 20.0])])
    frame = views.strip({"short": short, "long": long}, slices=20)
    assert frame.attrs["slice_s"] == 1.0
    assert frame[frame["label"] == "long"]["time_s"].tolist() == list(range(20))
    assert frame[frame["label"] == "short"]["time_s"].max() == 2.0


def test_a_single_instant_and_a_run_without_answers_make_a_strip() -> None:
    assert len(views.strip({"run": made_result([Served(3.0, [3.0])])})) == 1
    frame = views.strip({"run": made_result([Served(0.0, []), Served(4.0, [])])}, slices=4)
    assert frame["sent"].sum() == 2
    assert frame["output_tokens_per_s"].sum() == 0
    assert frame["ttft_p50_ms"].isna().all()


# ---- distributions --------------------------------------------------------------------------------------------------


def test_a_short_ecdf_has_every_request() -> None:
    served = [Served(0.0, [0.1]), Served(0.0, [0.3]), Served(0.0, [0.3]), Served(0.0, [0.2]), REJECTED]
    frame = views.ecdf({"run": made_result(served)}, "ttft")
    assert frame["value"].tolist() == pytest.approx([100, 200, 300])
    assert frame["share"].tolist() == [0.25, 0.5, 1.0]
    assert set(frame["requests"]) == {4}
    assert frame.attrs["notes"] == ["run: 1 of 5 requests have none: rejected"]


@pytest.mark.parametrize("metric", ["ttft", "tpot", "e2el", "queue", "output_tokens"])
def test_a_thinned_ecdf_keeps_the_extremes_and_exact_shares(metric: str) -> None:
    run = random_run(3, 900)
    frame = views.ecdf({"run": run}, metric, points=40)
    every = sorted(value for value in views.values(run, metric).tolist() if value == value)
    assert len(frame) <= 40
    assert frame["value"].iloc[-1] == every[-1]
    assert frame["value"].iloc[0] == every[0]
    for value, share in zip(frame["value"], frame["share"], strict=True):
        assert share == sum(one <= value for one in every) / len(every)
    if metric != "output_tokens":  # of which there are fewer kinds than points
        assert "the extremes among them" in frame.attrs["notes"][0]


def test_where_it_went_is_the_summary_s_shares_and_adds_up() -> None:
    served = random_served(200, 4)
    served[5] = replace(served[5], preemptions=1, preempted_s=0.01)
    run = made_result([*served, REJECTED])
    frame = views.where({"run": run}, slowest=0.1)
    whole = frame[frame["group"] == "all requests"].set_index("part")
    for part in views.PARTS:
        assert whole["share"][part] == pytest.approx(run.summary()[f"{part}_ms"]["share_of_e2el"])
    tail = frame[frame["group"] == "the slowest 10 %"]
    e2el_s = latencies_s(run.requests)["e2el"]
    slowest_s = sorted(value for value in e2el_s.tolist() if value == value)[-20:]
    assert set(tail["requests"]) == {20}
    assert tail["mean_ms"].sum() == pytest.approx(1e3 * sum(slowest_s) / 20)
    assert tail["end_ms"].max() == pytest.approx(tail["mean_ms"].sum())


def test_kpis_are_the_summary_s_with_differences() -> None:
    slow = made_result([Served(0.0, [0.4, 0.8]), Served(1.0, [1.2, 1.6])])
    fast = made_result([Served(0.0, [0.2, 0.4]), Served(1.0, [1.1, 1.3])])
    rows = {kpi.key: kpi for kpi in views.kpis(slow, fast)}
    ttft = rows["p50_ttft_ms"]
    assert (ttft.baseline, ttft.candidate) == (pytest.approx(300.0), pytest.approx(150.0))
    assert (ttft.delta, ttft.relative) == (pytest.approx(-150.0), pytest.approx(-0.5))
    assert (ttft.unit, ttft.better) == ("ms", "lower")
    assert rows["p99_ttft_ms"].few == "P99 from 2 requests; 368 are needed to bound it"
    assert rows["num_preemptions"].relative is None
    assert "slo_attainment" not in rows  # no run has one
    assert all(kpi.candidate is None and kpi.delta is None for kpi in views.kpis(slow))


# ---- dots and single requests ---------------------------------------------------------------------------------------


def test_few_dots_are_all_there_and_a_rejected_request_is_none() -> None:
    run = random_run(5)
    frame = views.scatter({"run": run}, y="e2el")
    assert frame["id"].tolist() == run.requests["id"][:-1].tolist()
    assert frame["y"].tolist() == pytest.approx((1e3 * latencies_s(run.requests)["e2el"][:-1]).tolist())


def test_thinned_dots_keep_the_extremes_of_every_moment() -> None:
    run = made_result(random_served(5000, 6))
    frame = views.scatter({"run": run}, y="ttft", points=400)
    assert len(frame) <= 400
    assert "of 5,000 requests drawn, the extremes of each moment among them" in frame.attrs["notes"][0]
    sent_s, ttft_ms = views.values(run, "arrival_s"), views.values(run, "ttft")
    low_s, span_s = sent_s.min(), np.ptp(sent_s)
    kept = set(frame["id"])
    place = np.minimum(((sent_s - low_s) / span_s * 100).astype(int), 99)
    for moment in range(100):
        there = np.flatnonzero(place == moment)
        if there.size:
            assert {int(there[ttft_ms[there].argmin()]), int(there[ttft_ms[there].argmax()])} <= kept


def test_dots_in_no_order_with_equal_values_keep_the_first_lowest_and_the_last_highest() -> None:
    run = made_result(random_served(3000, 7))
    mixed = np.random.default_rng(7).permutation(3000)
    requests = {name: column[mixed] for name, column in run.requests.items()} | {"preemptions": mixed % 3}
    run = replace(run, requests=requests)
    frame = views.scatter({"run": run}, y="preemptions", points=200)
    assert len(frame) <= 200
    lowest: dict[int, int] = {}
    highest: dict[int, int] = {}
    sent_s = requests["arrival_s"]
    for at, place in enumerate(np.minimum((sent_s - sent_s.min()) / np.ptp(sent_s) * 50, 49).astype(int).tolist()):
        times = requests["preemptions"]
        if place not in lowest or times[at] < times[lowest[place]]:
            lowest[place] = at
        if place not in highest or times[at] >= times[highest[place]]:
            highest[place] = at
    assert {int(requests["id"][at]) for at in (*lowest.values(), *highest.values())} <= set(frame["id"])


def test_within_selects_as_a_loop_does_also_among_those_not_drawn() -> None:
    run = random_run(7)
    ids = views.within(run, {"arrival_s": (6.0, 2.0), "ttft": (50.0, 400.0)})  # a brush may be drawn from the right
    sent_s, ttft_ms = views.values(run, "arrival_s"), views.values(run, "ttft")
    expected = [i for i in range(len(sent_s)) if 2.0 <= sent_s[i] <= 6.0 and 50.0 <= ttft_ms[i] <= 400.0]
    assert ids.tolist() == expected
    assert 10 < len(ids) < 200
    assert len(views.within(run, {})) == len(sent_s)


def test_a_gantt_chart_has_the_slowest_in_the_order_of_sending() -> None:
    served = [Served(float(at), [at + 1.0 + 0.1 * at, at + 2.0], scheduled_s=at + 0.5) for at in range(5)]
    frame = views.gantt(made_result([*served, REJECTED]), worst="ttft", rows=2)
    assert frame["id"].tolist() == [3, 3, 3, 4, 4, 4]
    assert frame["place"].tolist() == [0, 0, 0, 1, 1, 1]
    assert frame["phase"].tolist() == ["queue", "prefill", "decode"] * 2
    assert frame["begin_s"].tolist() == pytest.approx([3.0, 3.5, 4.3, 4.0, 4.5, 5.4])
    assert frame["end_s"].tolist() == pytest.approx([3.5, 4.3, 5.0, 4.5, 5.4, 6.0])
    assert frame.attrs["notes"] == ["the 2 of 5 requests with the largest TTFT"]
    assert len(views.gantt(random_run(8, 700), rows=9999)) == 3 * 500  # never more lines than can be seen
    chosen = views.gantt(made_result(served), ids=[2, 0])
    assert chosen["id"].tolist() == [0, 0, 0, 2, 2, 2]


def test_the_life_of_a_request_adds_up_and_says_what_went_on() -> None:
    served = [
        Served(0.0, [2.0, 9.0], scheduled_s=0.0),
        Served(0.5, [2.5, 5.0], scheduled_s=2.0),
        Served(1.0, [4.0, 6.0], scheduled_s=3.0, prompt_tokens=1500, cached_tokens=1000),
    ]
    run = made_result(served)
    frame = views.life(run, 2)
    assert frame["phase"].tolist() == ["queue", "prefill", "decode"]
    assert frame["duration_ms"].tolist() == pytest.approx([2000, 1000, 2000])
    assert frame["share"].tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert frame["reason"][0] == "Queue: 1 requests waited ahead of it and 1 were running when it was sent"
    assert frame["reason"][1].startswith("Prefill: 1,500 prompt tokens, 1,000 of them found in the cache")
    with pytest.raises(ValueError, match="request 7: the run has none of this id; ids are 0 to 2"):
        views.life(run, 7)
    with pytest.raises(ValueError, match="request 1 was rejected"):
        views.life(made_result([Served(0.0, [1.0]), REJECTED]), 1)


def test_a_table_is_sorted_and_a_subset_has_the_chosen_requests_only() -> None:
    run = random_run(9)
    frame = views.table(run, by="ttft", rows=None)
    shown = frame["ttft_ms"].tolist()
    assert shown[:-1] == sorted(shown[:-1], reverse=True)
    assert shown[-1] != shown[-1]  # the rejected one has none, and comes last
    assert len(views.table(run, by="ttft", rows=10)) == 10
    part = views.subset(run, [5, 3])
    assert part.requests["id"].tolist() == [3, 5]
    assert len(views.ecdf({"part": part}, "e2el")) == 2
    begin_s, end_s = views.window_s(run, [3, 5])
    assert begin_s == run.requests["arrival_s"][3]
    assert end_s > max(run.requests["finish_s"][[3, 5]])
    with pytest.raises(ValueError, match="no request is selected"):
        views.window_s(run, [])


def test_the_largest_are_those_of_a_stable_sort_whatever_the_order_of_ids() -> None:
    run = random_run(9)  # one has no latency
    rng = np.random.default_rng(9)
    mixed = rng.permutation(len(run.requests["id"]))
    requests = {name: column[mixed] for name, column in run.requests.items()}
    run = replace(run, requests=requests | {"cached_tokens": rng.integers(0, 5, mixed.size)})
    for by in ("cached_tokens", "ttft"):
        measured = views.values(run, by).tolist()
        ordered = sorted(range(mixed.size), key=lambda at: -measured[at] if np.isfinite(measured[at]) else np.inf)
        for rows in (1, 50, 301, None):
            frame = views.table(run, by=by, rows=rows)
            assert frame["id"].tolist() == [run.requests["id"][at] for at in ordered[:rows]]
    asked = [17, 5, 17, 250]
    assert views.subset(run, asked).requests["id"].tolist() == [5, 17, 250]
    with pytest.raises(ValueError, match="request 301: the run has none"):
        views.table(run, [5, 301])


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measure=latency: unknown\. Use ttft, tpot"):
        views.ecdf({"run": random_run()}, "latency")


def test_a_million_requests_become_few_points() -> None:
    run = million()
    for frame in (views.ecdf({"run": run}), views.strip({"run": run}), views.scatter({"run": run})):
        assert 50 < len(frame) <= views.POINTS


def test_linked_rows_are_those_of_the_dots_of_every_run() -> None:
    runs = {"a": random_run(10), "b": random_run(11)}
    frame = views.linked(runs, points=100)
    dots = views.scatter(runs, points=100)
    assert frame[["label", "id"]].to_numpy().tolist() == dots[["label", "id"]].to_numpy().tolist()
    assert len(frame) <= 100
    row = frame.iloc[-1]
    assert row["name"] == f"{row['id']} (b)"
    assert row["e2el_ms"] == pytest.approx(1e3 * (row["finish_s"] - row["arrival_s"]))


def million() -> Result:
    rng = np.random.default_rng(0)
    n = 1_000_000
    small = made_result([Served(0.0, [1.0])])
    sent_s = np.cumsum(rng.exponential(0.1, n))
    scheduled_s = sent_s + rng.exponential(0.05, n)
    first_s = scheduled_s + rng.exponential(0.2, n)
    tokens = rng.integers(1, 500, n)
    requests = {name: np.zeros(n) for name in small.requests} | {
        "id": np.arange(n), "arrival_s": sent_s, "scheduled_s": scheduled_s, "first_token_s": first_s,
        "finish_s": first_s + tokens * 0.02, "output_tokens": tokens, "prompt_tokens": rng.integers(1, 4000, n),
    }  # fmt: skip
    rows = 2 * n
    ends_s = np.cumsum(rng.exponential(sent_s[-1] / rows, rows))
    iterations = {name: np.zeros(rows) for name in small.iterations} | {
        "start_s": np.append(0.0, ends_s[:-1]), "gpu_end_s": ends_s, "kv_blocks": rng.integers(0, 1000, rows),
        "seqs": rng.integers(0, 64, rows), "iterations": np.ones(rows, dtype=np.int64),
    }  # fmt: skip
    return replace(small, requests=requests, iterations=iterations)
