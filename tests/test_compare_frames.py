"""Frames of a comparison against plain recomputation: sides, rates, tenants, caches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsim import compare_groups, compare_rates, compare_sides
from llmsim.choice import shipped
from llmsim.cli import main
from llmsim.compare import compare, run_sides
from llmsim.compare_cache import COMPUTED, GPU, UNDIVIDED, cache_frame, cache_use, found_frame, moved_frame
from llmsim.compare_frames import (
    BETTER,
    HEADLINES,
    UNCLEAR,
    WHOLE,
    WORSE,
    differences_frame,
    intervals_frame,
    sides_frame,
)
from llmsim.compare_rates import RatePoint, carried, carried_frame, rate_curves, rate_grid
from llmsim.compare_study import (
    Study,
    by_rate,
    cache_sides,
    compared,
    in_cache,
    rate_unit,
    reused,
    saturation_rate,
)
from llmsim.hardware import find_model
from llmsim.reuse import UNLIMITED, Point, curves, distinct_blocks, frame, size_grid
from llmsim.scenario import Scenario
from llmsim.simulate import simulate
from llmsim.trace import Trace, at_rate, load_trace

BASE = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
SLOW = Scenario(**BASE, cost="constant:0.05", max_num_seqs=4, launch_jitter=False)
CHAT, SESSIONS = shipped("chat.csv"), shipped("sessions.jsonl")


def requests_of(rows: list[tuple[str, float, float, float, float, int, int]]) -> dict[str, np.ndarray]:
    """tenant, arrival, scheduled, first token, finish (s), prompt and output tokens."""
    names = ("tenant", "arrival_s", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


# ---- sides ----------------------------------------------------------------------------------------------------------


def test_words_are_schedulers_unless_they_change_fields() -> None:
    assert compare_sides.parted(["vllm", " engine=sglang", "my.py:Mine"]) == (["vllm", "my.py:Mine"], ["engine=sglang"])
    assert compare_sides.flags_of(["engine=sglang", "sjf"]) == ["--scheduler", "sjf", "--set", "engine=sglang"]


def test_sides_of_a_page_are_those_of_its_command_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    import json

    from llmsim.command_line import argv_of

    words = ["vllm", "slo-chunk", "engine=sglang", "scheduler=slo-chunk,scheduler.tpot_ms=40"]
    scenario = Scenario(**BASE, max_num_seqs=64, scheduler="sjf")
    sides = compare_sides.sides_of(compare_sides.given(scenario), *compare_sides.parted(words))
    base = compare_sides.base_of(scenario, words)
    argv = argv_of(base, command="compare", trace=[*CHAT.command_line(), "--limit", "40"],
                   options=compare_sides.flags_of(words))  # fmt: skip
    assert main([*argv[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["sides"]
    assert {side["name"]: side["scenario"] for side in printed} == {k: s.to_dict() for k, s in sides.items()}
    assert sides["engine=sglang"].scheduler == "sglang" and sides["vllm"].max_num_seqs == 64


def test_another_engine_is_left_its_own_settings() -> None:
    given = compare_sides.given(Scenario(**BASE, engine="sglang", seed=3))
    assert given == {**BASE, "engine": "sglang", "seed": 3}
    assert compare_sides.given(Scenario(**BASE, engine="orca")) == {**BASE, "engine": "orca"}  # lacks are its own too
    assert compare_sides.given(Scenario(**BASE, block_size=32)) == {**BASE, "block_size": 32}


def test_a_file_of_the_users_is_stamped(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Mine: ...")
    named = Scenario(**BASE, scheduler=f"{file}:Mine")
    assert compare_sides.stamps([named, SLOW]) == ((str(file), file.stat().st_mtime_ns),)


# ---- differences ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome():
    trace = at_rate(CHAT.load(300), 0.6)
    sides = {"vllm": SLOW, "twice as fast": replace(SLOW, cost="constant:0.025"), "same": SLOW}
    return compare(run_sides(trace, sides, {"ttft": 500.0}), {"ttft": 500.0})


def test_differences_carry_every_number_of_the_comparison(outcome) -> None:
    made = differences_frame(outcome)
    for row in made.itertuples():
        change = outcome.differences[row.side][row.key]
        assert row.change == change.value and row.value == outcome.numbers[row.side][row.key]
        if change.low is not None:
            assert (row.low, row.high) == (change.low, change.high)
    assert len(made) == sum(map(len, outcome.differences.values()))


def test_verdicts_follow_the_interval_and_the_direction(outcome) -> None:
    verdicts = differences_frame(outcome).set_index(["side", "key"])["verdict"]
    assert verdicts["twice as fast", "mean_ttft_ms"] == BETTER
    assert verdicts["twice as fast", "request_goodput"] == BETTER  # more of it is better
    assert verdicts["same", "p99_e2el_ms"] == UNCLEAR
    assert verdicts["same", "output_throughput"] == WHOLE
    back = compare([outcome.sides[1], outcome.sides[0]], {"ttft": 500.0})
    assert differences_frame(back).set_index("key")["verdict"]["mean_ttft_ms"] == WORSE


def test_intervals_name_latency_and_statistic(outcome) -> None:
    made = intervals_frame(outcome)
    assert set(made["latency"]) == {"ttft", "tpot", "e2el"} and set(made["statistic"]) == {"mean", "p50", "p90", "p99"}
    assert len(made) == 2 * 12
    table = sides_frame(outcome)
    assert list(table["side"]) == ["vllm", "twice as fast", "same"]
    assert table["p99_ttft_ms"][1] == outcome.sides[1].summary["p99_ttft_ms"]
    assert set(HEADLINES) <= set(table.columns)


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_every_point_is_a_replay_at_its_rate() -> None:
    trace, targets = CHAT.load(120), {"ttft": 400.0}
    sides = {"a": SLOW, "b": replace(SLOW, max_num_seqs=2)}
    told: list[tuple[int, int]] = []
    points = rate_curves(trace, sides, [0.5, 2.0], targets, progress=lambda done, total, _: told.append((done, total)))
    assert [(point.side, point.rate) for point in points] == [("a", 0.5), ("b", 0.5), ("a", 2.0), ("b", 2.0)]
    again = simulate(at_rate(trace, 2.0), sides["b"]).summary(targets)
    assert points[3].numbers["slo_attainment"] == again["slo_attainment"]
    assert points[3].numbers["p99_ttft_ms"] == again["p99_ttft_ms"] and points[3].stable == again["stable"]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    made = compare_rates.frame(points)
    assert made["request_goodput"].tolist() == [point.numbers["request_goodput"] for point in points]


def point(side: str, rate: float, share: float) -> RatePoint:
    numbers = dict.fromkeys(compare_rates.NUMBERS) | {"slo_attainment": share, "request_goodput": rate * share}
    return RatePoint(side, rate, 10, 10, True, "", numbers)


def test_a_side_carries_what_it_never_fell_below() -> None:
    points = [point("a", 1, 1.0), point("a", 2, 0.98), point("a", 3, 1.0), point("b", 2, 0.99), point("b", 1, 1.0),
              point("c", 1, 0.5)]  # fmt: skip
    assert carried(points, 0.99) == {"a": 1, "b": 2, "c": None}
    made = carried_frame(points, 0.99)
    assert list(made["side"]) == ["a", "b", "c"] and made["highest_goodput"].tolist() == [3.0, 1.98, 0.5]
    assert np.isnan(made["carried_rate"][2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((2.0, 1.0, 5), "the lower one first"), ((0.0, 1.0, 5), "above 0"), ((1.0, 2.0, 1), "give 2 to 64")],
)
def test_a_grid_that_is_none_is_refused(arguments: tuple[float, float, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rate_grid(*arguments)


def test_a_grid_is_even() -> None:
    assert rate_grid(1.0, 3.0, 5) == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_goodput_needs_targets() -> None:
    with pytest.raises(ValueError, match="needs targets"):
        rate_curves(CHAT.load(10), {"a": SLOW}, [1.0], {})


def test_saturation_is_what_a_full_batch_serves() -> None:
    """Four at a time, 50 ms an iteration: a request holds its slot for one iteration of prefill and n - 1 decodes."""
    same = Trace("made", np.arange(40.0), np.full(40, 10), np.full(40, 20))
    assert saturation_rate(same, SLOW) == pytest.approx(4 / (20 * 0.05), rel=0.1)
    assert rate_unit(same) == "requests/s"


def test_sessions_are_counted_as_sessions() -> None:
    trace = SESSIONS.load(200)
    sessions = float(np.isfinite(trace.arrival_s).mean())
    alone = replace(trace, arrival_s=np.arange(200.0), parent=None, delay_s=None)
    assert rate_unit(trace) == "sessions/s" and sessions < 0.5
    assert saturation_rate(trace, SLOW) == pytest.approx(saturation_rate(alone, SLOW) * sessions)


# ---- tenants --------------------------------------------------------------------------------------------------------

TWO = requests_of(
    [("a", 0.0, 1.0, 2.0, 6.0, 100, 5), ("a", 0.0, 3.0, 4.0, 4.0, 40, 1), ("b", 0.5, 2.0, 3.0, 5.0, 60, 3)]
)


def plain_service(requests: dict[str, np.ndarray], tenant: str, t: float) -> float:
    """Token by token."""
    total = 0.0
    rows = zip(*(requests[name] for name in ("tenant", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens",
                                             "output_tokens")), strict=True)  # fmt: skip
    for name, scheduled, first, finish, prompt, output in rows:
        if name == tenant:
            total += prompt * (scheduled <= t) + 2 * (first <= t)
            if output > 1:
                total += 2 * (output - 1) * np.clip((t - first) / (finish - first), 0.0, 1.0)
    return total


def test_service_is_prompts_at_admission_and_answers_as_they_are_made() -> None:
    made = compare_groups.service_frame({"one": TWO}, slices=12)
    assert set(made["tenant"]) == {"a", "b"} and made["time_s"].max() == 6.0
    for row in made.itertuples():
        assert row.service_tokens == pytest.approx(plain_service(TWO, row.tenant, row.time_s))
    last = made[made["time_s"] == 6.0].set_index("tenant")
    assert last["service_tokens"]["a"] == last["asked_tokens"]["a"] == 140 + 2 * 6
    first = made[made["time_s"] == 0.0].set_index("tenant")
    assert first["asked_tokens"]["a"] == 152 and first["asked_tokens"]["b"] == 0.0


def test_who_asks_for_most_is_shown_and_the_rest_is_one() -> None:
    rows = [(f"t{i}", float(i), i + 1.0, i + 2.0, i + 3.0, 10 * (i + 1), 2) for i in range(8)]
    made = compare_groups.service_frame({"one": requests_of(rows)}, slices=4, shown=3)
    assert list(dict.fromkeys(made["tenant"])) == ["t7", "t6", "t5", compare_groups.OTHERS]
    end = made[made["time_s"] == made["time_s"].max()].set_index("tenant")["service_tokens"]
    assert end.sum() == sum(10 * (i + 1) + 4 for i in range(8))


def test_unfairness_is_the_largest_swing_while_both_wait() -> None:
    """Both wait from 1 to 4. Tenant a gets 100 at 2 and 50 at 3 (not the 30 at 5), tenant b nothing until 4."""
    rows = [("a", 0.0, 2.0, 9.0, 9.0, 100, 1), ("a", 0.0, 3.0, 9.0, 9.0, 50, 1), ("a", 0.0, 5.0, 9.0, 9.0, 30, 1),
            ("b", 1.0, 4.0, 9.0, 9.0, 70, 1)]  # fmt: skip
    assert compare_groups.unfairness(requests_of(rows)) == 150.0
    never = [("a", 0.0, 0.0, 1.0, 1.0, 10, 1), ("b", 2.0, 5.0, 6.0, 6.0, 10, 1)]
    assert compare_groups.unfairness(requests_of(never)) is None


def test_vtc_is_fairer_than_first_come_and_within_its_bound() -> None:
    trace = load_trace(CHAT.path, limit=400, rate=20, assign_classes="tenants:flood=0.8,small=0.2")
    scenario = Scenario(**BASE, cost="constant:0.05", max_num_seqs=8, max_num_batched_tokens=2048)
    made = {name: simulate(trace, replace(scenario, scheduler=name)).requests for name in ("fcfs", "vtc")}
    by_side = compare_groups.fairness_frame(made).set_index("side")["unfairness_tokens"]
    batch = 8 * (trace.prompt_tokens + trace.output_tokens).max()
    assert by_side["vtc"] <= 2 * max(trace.prompt_tokens.max(), 2 * batch) < by_side["fcfs"]


def test_latencies_by_group_are_numpys() -> None:
    made = compare_groups.latency_frame({"one": TWO}).set_index(["group", "latency"])
    assert made["p50_ms"]["a", "ttft"] == np.percentile([2000.0, 4000.0], 50)
    assert made["p99_ms"]["a", "ttft"] == pytest.approx(np.percentile([2000.0, 4000.0], 99))
    assert made["samples"]["a", "tpot"] == 1 and made["requests"]["a", "tpot"] == 2
    assert made["mean_ms"]["b", "tpot"] == 1000.0


def test_a_trace_without_tenants_says_how_to_draw_them() -> None:
    with pytest.raises(ValueError, match="--assign-classes tenants:"):
        compare_groups.labels_of({"id": np.arange(2)}, "tenant")


# ---- caches ---------------------------------------------------------------------------------------------------------


def test_tokens_found_add_up_and_bytes_are_those_of_the_model() -> None:
    base = Scenario(**BASE, max_num_seqs=32)
    sides = dict(cache_sides(base, ["lru", "fifo"], "cpu:1GiB:50GB/s:10us,ssd:8GiB:5GB/s:100us", 1500))
    assert list(sides) == ["lru", "fifo", "lru + cpu + ssd"]
    uses = in_cache(Study(SESSIONS, tuple(sides.items()), limit=150))
    found = found_frame(uses)
    assert found.groupby("side")["share"].sum().tolist() == pytest.approx([1.0] * 3)
    result = simulate(SESSIONS.load(150), sides["lru + cpu + ssd"])
    tiers = {row["name"]: row for row in result.summary()["kv_tiers"]}
    mine = found[found["side"] == "lru + cpu + ssd"].set_index("place")["tokens"]
    assert list(mine.index) == [GPU, "cpu", "ssd", COMPUTED]
    assert mine["ssd"] == tiers["ssd"]["loaded_tokens"] > 0
    assert mine[GPU] + mine["cpu"] + mine["ssd"] == result.requests["cached_tokens"].sum()
    moved = moved_frame(uses).set_index(["tier", "direction"])
    a_token = find_model("llama-3.1-8b").kv_bytes_per_token("bfloat16")
    assert moved["bytes"]["cpu", "written"] == tiers["cpu"]["written_tokens"] * a_token
    numbers = cache_frame(uses).set_index("side")
    assert numbers["evicted_blocks"]["lru + cpu + ssd"] == result.stats["evicted_blocks"] > 0
    assert numbers["evicted_tokens"]["lru"] == 16 * numbers["evicted_blocks"]["lru"]


def test_what_was_loaded_ahead_of_admission_is_not_divided() -> None:
    tiers = "cpu:1GiB:50GB/s:10us,ssd:8GiB:5GB/s:100us"
    scenario = Scenario(**BASE, kv_tiers=tiers, kv_tier_prefetch=True, num_gpu_blocks_override=1500, max_num_seqs=32)
    use = cache_use("ahead", simulate(SESSIONS.load(150), scenario))
    assert not use.divided
    assert found_frame([use])["place"].tolist() == [UNDIVIDED, COMPUTED]


def test_no_side_of_a_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="name an eviction policy"):
        cache_sides(SLOW, [], "")
    with pytest.raises(ValueError, match="kv_tiers"):
        cache_sides(SLOW, ["lru"], "cpu")


def test_sizes_reach_from_the_longest_prompt_to_everything() -> None:
    trace = SESSIONS.load(80)
    sizes = size_grid(trace, 5)
    longest = max(len(ids) + len(more) for ids, more in zip(trace.block_ids, trace.output_block_ids, strict=True))
    assert sizes[0] == longest and sizes[-1] == distinct_blocks(trace) and len(sizes) == 5
    ratios = np.array(sizes[1:]) / np.array(sizes[:-1])
    assert ratios.max() / ratios.min() < 1.05


def test_a_frame_of_reuse_counts_blocks_tokens_and_bytes() -> None:
    made = frame([Point("lru", 10, 3, 6), Point("lru", UNLIMITED, 4, 6)], block_tokens=64, token_bytes=2.0)
    assert made["cache_tokens"].tolist() == [640.0, np.inf] and made["cache_bytes"][0] == 1280.0
    assert made["hit_ratio"].tolist() == [0.5, 4 / 6]


def test_a_quick_look_at_reuse_is_that_of_the_first_requests() -> None:
    found = reused(SESSIONS, ["lru", "fifo"], 3, "llama-3.1-8b", "bfloat16", touched=3000)
    assert found.requests == 200  # the fewest it takes
    trace = SESSIONS.load(200)
    plain = curves(trace, size_grid(trace, 3), ["lru", "fifo"])
    assert found.points["hit_blocks"].tolist() == [one.hit_blocks for one in plain]
    assert found.unlimited == curves(trace, [UNLIMITED], ["lru"])[0].hit_ratio
    with pytest.raises(ValueError, match="names no prefix blocks"):
        reused(CHAT, ["lru"], 3, "llama-3.1-8b", "bfloat16")


# ---- all of it ------------------------------------------------------------------------------------------------------


def test_a_study_returns_what_its_parts_do() -> None:
    sides = (("vllm", SLOW), ("sjf", replace(SLOW, scheduler="sjf")))
    study = Study(CHAT, sides, (("ttft", 500.0),), "tenants:3", limit=150)
    found = compared(study)
    trace = study.trace()
    assert found.requests == 150 and found.assigned == trace.assigned
    assert set(found.latencies) == {"tenant"} and len(found.groups["tenant"]) == 2 * 3
    summary = simulate(trace, sides[1][1]).summary({"ttft": 500.0})
    row = found.sides.set_index("side").loc["sjf"]
    assert row["p99_ttft_ms"] == summary["p99_ttft_ms"] and row["slo_attainment"] == summary["slo_attainment"]
    assert "95 % interval" in found.report and found.calm == ""
    assert found.fairness is not None and list(found.fairness["side"]) == ["vllm", "sjf"]


def test_seeds_are_replayed_and_averaged() -> None:
    host = Scenario(**BASE)  # launch times are drawn
    study = Study(
        CHAT, (("vllm", host.resolved()), ("sjf", replace(host, scheduler="sjf").resolved())), limit=60, seeds=2
    )
    told: list[tuple[int, int]] = []
    found = compared(study, lambda done, total, _: told.append((done, total)))
    alone = [simulate(CHAT.load(60), replace(host, seed=seed)).summary()["p99_ttft_ms"] for seed in (0, 1000)]
    assert alone[0] != alone[1]
    assert found.sides.set_index("side")["p99_ttft_ms"]["vllm"] == pytest.approx(np.mean(alone))
    assert told[-1] == (240, 240)
    with pytest.raises(ValueError, match="seeds=0: give 1 to"):
        compared(replace(study, seeds=0))


def test_where_nothing_waits_the_study_says_so() -> None:
    idle = Scenario(**BASE, cost="constant:0.001")
    found = compared(Study(CHAT, (("vllm", idle), ("sjf", replace(idle, scheduler="sjf"))), limit=100))
    assert "hardly matters" in found.calm and found.service is None


def test_rates_that_nobody_gave_span_the_saturation() -> None:
    study = Study(CHAT, (("vllm", SLOW),), (("ttft", 500.0),), limit=100)
    found = by_rate(study, None, None, 3)
    served = saturation_rate(study.trace(), SLOW)
    assert found.rates[0] == pytest.approx(0.2 * served, rel=0.01)
    assert found.rates[-1] == pytest.approx(1.6 * served, rel=0.01)
    assert by_rate(study, 0.5, 1.0, 2).rates == (0.5, 1.0)
