# ruff: noqa: E402 - what needs torch is imported once it is known to be there
"""Measuring: what is measured, in which order, and that nothing measured is lost. On the CPU, at tiny sizes."""

import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from needs import require

require("torch")

import torch
from click.testing import CliRunner

from calibration.measure import command, elementwise, layers, linear, run, stacks
from calibration.measure.plan import SHARES, Measured, Plan, expected_error, leave_one_out
from calibration.measure.points import Point, Unavailable, Wanted
from calibration.measure.rows import Journal, Row, read_parquet, write_parquet
from calibration.measure.timing import Bench, Nvml, quantile
from llmsim.hardware import find_model

LLAMA = find_model("llama-3.1-8b")
ABOUT = {"gpu": "cpu", "torch": "1", "seed": 0}


def wanted(*ops, models=("llama-3.1-8b",), **fields):
    fields = {"dtypes": ("bfloat16",), "device": "cpu", "ops": ops or None, **fields}
    return Wanted(models=tuple(find_model(name) for name in models), **fields)


@pytest.fixture(scope="module")
def bench():
    return Bench("cpu", cap_s=0.001)


# ---- rows ---------------------------------------------------------------------------------------------------------


def row(tokens=1, median_s=1e-5, **columns):
    return Row(op="linear", variant="cublas", launch="graph", median_s=median_s, tokens=tokens, **columns)


def test_parquet_gives_back_what_was_written(tmp_path):
    rows = [row(dtype="fp8", samples_s=(1.0, 2.0), power_w=1.5), row(2)]
    write_parquet(tmp_path / "a.parquet", rows, {**ABOUT, "notes": ["n"]})
    back, about = read_parquet(tmp_path / "a.parquet")
    assert back == rows
    assert about == {"format": "llmsim-measurements", "version": 1, **ABOUT, "notes": ["n"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("damage", ["half", "foreign", "absent"])
def test_a_damaged_or_foreign_parquet_is_told_in_one_line(tmp_path, damage):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    if damage == "half":
        write_parquet(path, [row()], ABOUT)
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"a\.parquet") as told:
        read_parquet(path)
    assert "\n" not in str(told.value)


def test_a_journal_cut_anywhere_keeps_every_whole_point(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, ABOUT)
    for tokens in (1, 2, 3):
        journal.append(f"key{tokens}", [row(tokens), row(tokens + 10)])
    journal.note("warm")
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        opened = Journal(path, ABOUT)
        assert list(opened.points) == ["key1", "key2", "key3"][: max(0, lines - 1)]
        assert ("warm" in opened.notes) == (lines == 5)
        half_written = lines > 0 and not whole[:cut].endswith(b"\n")
        assert any("half-written" in note for note in opened.notes) == half_written
        opened.append("new", [row(7)])
        opened.close()
        again = Journal(path, ABOUT)
        assert again.points["new"] == [row(7)] and len(again.points) == len(opened.points)
        again.close()


def test_a_journal_of_another_gpu_or_with_a_damaged_line_is_refused(tmp_path):
    path = tmp_path / "j"
    Journal(path, ABOUT).close()
    with pytest.raises(ValueError, match="was measured with gpu cpu, this is NVIDIA H100"):
        Journal(path, {**ABOUT, "gpu": "NVIDIA H100"})
    path.write_text(path.read_text() + "rubbish\n" + json.dumps({"key": "a", "rows": []}) + "\n")
    with pytest.raises(ValueError, match=r"j:2: not a JSON object"):
        Journal(path, ABOUT)


# ---- points -------------------------------------------------------------------------------------------------------


def test_linear_shapes_of_known_models():
    assert linear.linear_shapes(LLAMA) == {
        "qkv": (6144, 4096),
        "output": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    }
    assert linear.linear_shapes(find_model("qwen2.5-0.5b"), 2) == {
        "qkv": ((7 + 2) * 64, 896),
        "output": (896, 448),
        "gate_up": (4864, 896),
        "down": (896, 2432),
        "lm_head": (75968, 896),
    }
    # 8 KV heads on 16 ranks are repeated
    assert linear.linear_shapes(find_model("llama-3.1-70b"), 16)["qkv"] == ((4 + 2) * 128, 8192)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "qwen2.5-7b", "gemma-2-9b", "qwen3-0.6b", "mistral-nemo-12b"])
@pytest.mark.parametrize("tp", [1, 2])
def test_linear_operations_and_weights_are_the_models(name, tp):
    model = find_model(name)
    shapes = linear.linear_shapes(model, tp)
    head = shapes.pop("lm_head")
    assert model.layers * sum(n * k for n, k in shapes.values()) == model.dense_linear_params(tp)
    assert head[0] * head[1] * tp == pytest.approx(model.lm_head_params, rel=1e-3)
    flops = model.layers * sum(linear.linear_flops(1, *shape) for shape in shapes.values())
    assert flops == pytest.approx(model.linear_flops_per_token / tp)
    weights = model.layers * sum(linear.linear_bytes("bfloat16", 0, *shape) for shape in shapes.values())
    assert weights == model.linear_bytes("bfloat16", tp)


def test_bytes_by_dtype():
    assert linear.linear_bytes("bfloat16", 3, 5, 7) == 2 * (35 + 21 + 15)
    assert linear.linear_bytes("fp8", 3, 5, 7) == 35 + 21 + 2 * 15
    assert linear.linear_bytes("tf32", 3, 5, 7) == 4 * (35 + 21 + 15)
    assert linear.linear_bytes("int8", 3, 5, 7) == 35 + 2 * (21 + 15)
    point = Point.of("kv_write", "torch", "graph", tokens=3, kv_heads=2, head_dim=64, kv_dtype="fp8")
    assert elementwise.least_bytes(point) == 3 * (2 * 128 * (2 + 1) + 8)
    point = Point.of("add_rms_norm", "torch", "graph", tokens=3, n=64)
    assert elementwise.least_bytes(point) == 4 * 2 * 3 * 64


def test_stacks_time_each_set_of_shapes_once_at_both_clocks():
    models = tuple(find_model(name) for name in ("llama-3.1-8b", "mistral-7b", "qwen2.5-7b"))  # two of one layer
    asked = Wanted(models, ("bfloat16", "fp8", "float16"), tensor_parallel=(1, 2, 8))
    points = list(stacks.Stacks().points(asked))
    assert len({point.key for point in points}) == len(points)
    pairs = [(name, tp) for tp in (1, 2, 8) for name in ("llama-3.1-8b", "qwen2.5-7b")]
    timed = [pair for pair in pairs if pair[1] in find_model(pair[0]).tensor_parallel_sizes()]
    assert list(dict.fromkeys((point["model"], point["tensor_parallel"]) for point in points)) == timed
    assert {point["dtype"] for point in points} == {"bfloat16", "fp8"}
    for clocks, fewest, most in (("cold", 1, stacks.COLD_TO), ("sustained", stacks.SUSTAINED_FROM, 8192)):
        sizes = {point["tokens"] for point in points if point["clocks"] == clocks}
        assert {size for size in stacks.COARSE if fewest <= size <= most} <= sizes
        assert fewest <= min(sizes) and max(sizes) <= most
    assert list(LLAMA.layer_linears(2).values()) == [(3072, 4096), (4096, 2048), (14336 * 2 // 2, 4096), (4096, 7168)]


def test_a_stack_runs_its_products_in_turn_on_buffers_of_their_own(monkeypatch):
    called = []

    def product(bench, count, dtype, tokens, n, k, of=""):
        return [lambda i=i: called.append((n, k, i, of)) for i in range(count)]

    class Bench:
        cuda = False

        def synchronize(self):
            pass

        def copies(self, nbytes):
            self.nbytes = nbytes
            return 2

        def time(self, point, calls, **columns):
            for call in calls:
                call()
            return columns

    monkeypatch.setitem(stacks.CALLS, "cublas", product)
    operator, bench = stacks.Stacks(), Bench()
    point = next(iter(operator.points(Wanted((LLAMA,), ("bfloat16",), tensor_parallel=(1,)))))
    columns = operator.measure(point, bench)
    shapes = list(LLAMA.layer_linears().values())
    order = [(n, k, i, f" {place}") for i in (0, 1) for place, (n, k) in enumerate(shapes)]
    assert called[1:] == order, "after one call that tries the kernel out"
    assert columns["flops"] == sum(2.0 * n * k for n, k in shapes) and columns["bytes"] == bench.nbytes


def test_points_cover_every_shape_of_every_model_and_tensor_parallel_size():
    models = tuple(find_model(name) for name in command.DENSE_FAMILIES.split(","))
    asked = Wanted(models, ("bfloat16", "fp8", "float16"), tensor_parallel=(1, 2, 4, 8))
    points = list(linear.Linear().points(asked))
    keys = [point.key for point in points]
    assert len(keys) == len(set(keys))
    tokens: dict[tuple[str, int, int], set[int]] = {}
    for point in points:
        tokens.setdefault((point["dtype"], point["n"], point["k"]), set()).add(point["tokens"])
    for model in models:
        for tp in (1, 2, 4, 8):
            if tp not in model.tensor_parallel_sizes():
                continue
            for name, shape in linear.linear_shapes(model, tp).items():
                for dtype in ("bfloat16", "fp8"):
                    most = 512 if name == "lm_head" else 16384
                    grid = {size for size in linear.COARSE if size <= most}
                    assert grid <= tokens[dtype, *shape]
                    assert max(tokens[dtype, *shape]) >= most
    coarse = [point for point in points if not point.refine]
    assert {point["clocks"] for point in coarse if point["tokens"] == 2048} == {"sustained", "cold"}
    assert points[: len(coarse)] == coarse, "the grid comes first"
    assert {128, 129, 192, 1025, 16384} <= set(linear.dense_tokens())
    assert set(range(256, 513, 16)) <= set(linear.dense_tokens()), "graph sizes"


def test_a_key_tells_points_apart_and_not_by_how_they_are_planned():
    one = Point.of("linear", "cublas", "graph", n=1, k=2, model=None)
    assert one.key == "linear/cublas/graph/k=2/n=1"
    assert replace(one, refine=True, weight=0.5) == one
    assert Point.of("linear", "cublas", "graph", n=2, k=1).key != one.key


# ---- the plan -----------------------------------------------------------------------------------------------------


def measured(tokens, seconds, spread=0.0):
    return Measured(math.log(tokens), math.log(seconds), spread)


def test_leave_one_out_is_the_distance_from_the_neighbours_line():
    series = [measured(1, 1.0), measured(4, 2.0), measured(16, 4.0), measured(64, 16.0)]
    assert leave_one_out(series) == pytest.approx([0.0, math.log(math.sqrt(2.0 * 16.0) / 4.0)])
    noisy = [series[0], measured(4, 2.2, spread=0.2), series[2]]
    assert leave_one_out(noisy) == [0.0]
    assert expected_error(series[:2], math.log(2)) == 1.0


def refinements(n, times, weight=1.0):
    """A measured series over powers of two, and the points halfway between."""
    done, points = {}, []
    for power, seconds in enumerate(times):
        point = replace(Point.of("linear", "cublas", "graph", n=n, k=8, tokens=4**power), weight=weight)
        points.append(point)
        done[point.key] = [row(4**power, seconds)]
        points.append(replace(Point.of("linear", "cublas", "graph", n=n, k=8, tokens=2 * 4**power), refine=True))
        points[-1] = replace(points[-1], weight=weight)
    return points[:-1], done


def test_the_plan_puts_the_next_point_where_it_knows_least():
    knee, done = refinements(1, [1.0, 1.0, 1.0, 4.0, 16.0, 64.0])  # flat, then in proportion: bent at 4**2
    points = Plan({"linear": knee}, done).next()
    assert [point["tokens"] for point in points] in ([8], [32])
    assert points[0].key not in done


def test_the_plan_weighs_errors_with_the_share_of_a_step():
    slight, done_a = refinements(1, [1.0, 1.0, 1.0, 4.0, 16.0], weight=0.9)
    strong, done_b = refinements(2, [1.0, 1.0, 1.0, 40.0, 400.0], weight=0.1)
    plan = Plan({"linear": [*slight, *strong]}, {**done_a, **done_b})
    assert [point["n"] for point in plan.next()] == [1, 2]


def test_a_straight_series_gets_no_more_points():
    straight, done = refinements(1, [1.0, 4.0, 16.0, 64.0])
    assert Plan({"linear": straight}, done).next() == []


def test_bisection_finds_a_step():
    def truth(tokens):
        return 1e-5 * (1 if tokens <= 300 else 2)

    points = [
        replace(Point.of("linear", "cublas", "graph", n=1, k=1, tokens=tokens), refine=tokens not in (1, 64, 512, 4096))
        for tokens in (1, 8, 64, 128, 192, 256, 288, 304, 320, 384, 448, 512, 1024, 2048, 4096)
    ]
    plan, seen = Plan({"linear": points}, {}), []
    while batch := plan.next():
        for point in batch:
            seen.append(point["tokens"])
            plan.measured(point, [row(point["tokens"], truth(point["tokens"]))], 0.01)
    assert {288, 304} <= set(seen) and len(seen) == len(set(seen))
    assert len(seen) < len(points), "not everything is needed to find one step"


def test_every_operator_gets_its_turn():
    def grid(op, count):
        return [Point.of(op, "v", "graph", n=index) for index in range(count)]

    plan = Plan({"linear": grid("linear", 500), "attention": grid("attention_decode", 500)}, {})
    spent = {"linear": 0.0, "attention_decode": 0.0}
    for _ in range(12):
        for point in plan.next():
            plan.measured(point, [row()], 0.1)
            spent[point.op] += 0.1
    assert spent["linear"] / SHARES["linear"] == pytest.approx(spent["attention_decode"] / SHARES["attention"], rel=0.2)


# ---- timing -------------------------------------------------------------------------------------------------------


def test_buffers_are_random_and_apart(bench):
    views = bench.views(3, (5, 7), "bfloat16", "test")
    places = {view.data_ptr() for view in views}
    assert len(places) == 3 and all(place % 16 == 0 for place in places)
    views[0].fill_(1)
    assert abs(float(views[1].float().std()) - 1) < 0.5
    assert not bool((views[1] == views[2]).all())
    assert bench.randn((4, 4), "fp8").dtype == torch.float8_e4m3fn
    assert int(bench.randn((1000,), "int8").abs().max()) > 100


def test_a_timed_row_has_all_about_its_point(bench):
    point = Point.of("rms_norm", "torch", "graph", dtype="bfloat16", tokens=3, n=5)
    timed = bench.time(point, [lambda: None], bytes=60.0, samples=True)
    assert (timed.op, timed.variant, timed.launch, timed.tokens, timed.n) == ("rms_norm", "torch", "eager", 3, 5)
    assert timed.p10_s <= timed.median_s <= timed.p90_s and timed.repeats == len(timed.samples_s) >= 3
    assert timed.measured_at and timed.bytes == 60.0


def test_quantiles_lie_between_neighbours():
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([3.0], 0.9) == 3.0


class Gpu:
    """Stands for torch and torch.cuda: kernels take virtual seconds of `now`, a graph is the list of its kernels, and
    launching one costs `gap` when the GPU is idle."""

    gap = 8e-6

    def __init__(self):
        self.cuda = self
        self.now = 0.0
        self.graph = None
        self.graphs = []
        self.bfloat16 = torch.bfloat16

    def __getattr__(self, name):
        return getattr(torch, name)

    def run(self, seconds):
        if self.graph is not None:
            self.graph.append(seconds)
        else:
            self.now += seconds

    def kernel(self, seconds):
        return lambda: self.run(seconds)

    def mm(self, left, right, out):
        self.run(2e-4)

    def synchronize(self):
        pass

    empty_cache = synchronize

    def graph_pool_handle(self):
        return 1

    def current_stream(self):
        return self

    def wait_stream(self, _other):
        pass

    def stream(self, _stream):
        return nullcontext()

    Stream = current_stream

    def CUDAGraph(self):  # noqa: N802
        gpu = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                gpu.graph = self.nodes = []

            def capture_end(self):
                gpu.graph = None
                gpu.graphs.append(self.nodes)

            def replay(self):
                gpu.now += gpu.gap + sum(self.nodes)

        return Graph()

    def Event(self, enable_timing):  # noqa: N802
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()

    def get_device_properties(self, _index):
        return SimpleNamespace(L2_cache_size=50_000_000, uuid="none")


@pytest.fixture
def gpu_bench():
    bench = Bench("cpu")
    gpu = Gpu()
    bench.torch, bench.cuda, bench.nvml = gpu, True, Nvml("none")
    bench.l2_bytes, bench._stream, bench._load = 50_000_000, None, (torch.ones(1), torch.ones(1), 2e-4)
    bench._graph_pool, bench._max_mhz, bench._read_at, bench._slow = 1, None, -1.0, {}
    bench._stream = gpu
    return bench, gpu


@pytest.mark.parametrize("seconds", [1.5e-6, 4e-5, 3e-3])
def test_a_replay_is_long_enough_for_its_start_not_to_matter(gpu_bench, seconds):
    bench, gpu = gpu_bench
    point = Point.of("linear", "cublas", "graph", tokens=1)
    timed = bench.time(point, [gpu.kernel(seconds)] * 7)
    assert timed.median_s == pytest.approx(seconds, rel=0.01)
    assert timed.launch == "graph" and timed.repeats >= 10
    assert all(len(nodes) % 7 == 0 and len(nodes) <= 2000 for nodes in gpu.graphs)


def test_eager_calls_are_timed_without_a_graph(gpu_bench):
    bench, gpu = gpu_bench
    timed = bench.time(Point.of("linear", "cublas", "eager", tokens=1), [gpu.kernel(2e-5)] * 3)
    assert timed.median_s == pytest.approx(2e-5) and gpu.graphs == []


def test_sustained_points_run_after_load_and_cold_ones_after_a_pause(gpu_bench, monkeypatch):
    bench, gpu = gpu_bench
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks="cold"), [gpu.kernel(1e-3)])
    assert not slept and gpu.now < 0.1, "nothing ran before: no need to wait"
    before = gpu.now
    bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks="sustained"), [gpu.kernel(1e-3)])
    assert gpu.now - before > 0.3, "the GPU was idle: load first"
    before = gpu.now
    bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks="sustained"), [gpu.kernel(1e-3)])
    assert gpu.now - before < 0.1, "it is warm still"
    bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks="cold"), [gpu.kernel(1e-3)], flops=1e12)
    assert slept and slept[0] == pytest.approx(0.2, abs=0.05)
    bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks="cold"), [gpu.kernel(1e-3)])
    assert len(slept) == 2, "the last one was heavy itself"


def test_low_clocks_and_heat_are_noted_once(gpu_bench):
    bench, gpu = gpu_bench
    readings = {"sm_mhz": 1200, "power_w": 500.0, "memory_mhz": 2600, "temperature_c": 88, "faults": ["heat"]}
    bench.nvml, bench._max_mhz = SimpleNamespace(**readings), 1980
    for clocks in ("cold", "sustained", "cold"):
        timed = bench.time(Point.of("linear", "cublas", "graph", tokens=1, clocks=clocks), [gpu.kernel(1e-3)])
    assert (timed.sm_mhz, timed.memory_mhz, timed.temperature_c, timed.power_w) == (1200, 2600, 88, 500.0)
    assert [note[:25] for note in bench.notes] == ["under 80% of the GPU's 19", "the GPU lowered its clock"]


@pytest.mark.parametrize(
    ("name", "processes", "used_gib", "says"),
    [
        ("NVIDIA H200", 1, 0.5, []),
        ("NVIDIA H200", 3, 30, ["the GPU is shared: 2 other processes with 30.0 GiB"]),
        ("NVIDIA H200", None, 30, ["the GPU is shared: something else with 30.0 GiB"]),
        ("NVIDIA X1", 1, 0.5, ["llmsim has no facts for the GPU 'NVIDIA X1'"]),
    ],
)
def test_what_is_wrong_with_a_gpu_is_noted_first(name, processes, used_gib, says):
    cuda = SimpleNamespace(
        get_device_name=lambda _index: name,
        mem_get_info=lambda: (int((100 - used_gib) * 2**30), 100 * 2**30),
        memory_reserved=lambda: 0,
    )
    nvml = SimpleNamespace(processes=processes, sm_mhz=1980, faults=[])
    notes = run.device_notes(SimpleNamespace(cuda=True, torch=SimpleNamespace(cuda=cuda), nvml=nvml))
    assert len(notes) == len(says)
    assert all(note.startswith(start) and "\n" not in note for note, start in zip(notes, says, strict=True))


def test_buffers_exceed_twice_the_cache(gpu_bench):
    bench, _ = gpu_bench
    for size in (1e6, 7e6, 99e6, 1e9):
        assert bench.copies(size) * size > 2 * bench.l2_bytes
    assert bench.copies(1) == 256


# ---- operators compute what they say ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cublas", "scaled_mm", "int8_weight"])
def test_a_linear_call_is_the_matrix_product(bench, variant):
    dtype = {"cublas": "bfloat16", "scaled_mm": "fp8", "int8_weight": "int8"}[variant]
    tokens, n, k = 16, 48, 64
    out = linear.CALLS[variant](bench, 2, dtype, tokens, n, k)[1]()
    x = bench.views(2, (tokens, k), "bfloat16" if variant == "int8_weight" else dtype, "x")[1].float()
    weight = bench.views(2, (n, k), dtype, "weight")[1].float()
    assert out.shape == (tokens, n)
    if variant != "int8_weight":
        assert torch.allclose(out.float(), x @ weight.T, rtol=0.02, atol=0.1)


def elementwise_call(op, bench, **columns):
    point = Point.of(op, "torch", "eager", dtype="bfloat16", **columns)
    inputs = elementwise._OPS[op].inputs(point, bench, 1)[0]
    return inputs, elementwise._OPS[op].torch(torch)(*inputs)


def test_elementwise_operations_are_what_they_are_called(bench):
    (x, weight), out = elementwise_call("rms_norm", bench, tokens=4, n=64)
    exact = torch.nn.functional.rms_norm(x.float(), (64,), weight.float(), 1e-5)
    assert torch.allclose(out.float(), exact, rtol=0.02, atol=0.02)
    (x, residual, _), (_, added) = elementwise_call("add_rms_norm", bench, tokens=4, n=64)
    assert torch.equal(added, x + residual)
    (x,), out = elementwise_call("silu_mul", bench, tokens=4, n=64)
    assert out.shape == (4, 64)
    _, query, key, _ = (inputs := elementwise_call("rope", bench, tokens=4, q_heads=2, kv_heads=1, head_dim=32))[0]
    turned, turned_key = inputs[1]
    assert torch.allclose(turned.float().norm(dim=-1), query.float().norm(dim=-1), rtol=0.03)
    assert turned_key.shape == key.shape
    (logits,), token = elementwise_call("sample_greedy", bench, tokens=4, n=64)
    assert torch.equal(token, logits.argmax(-1))
    (logits,), token = elementwise_call("sample_top_k_top_p", bench, tokens=4, n=256)
    assert bool((logits.gather(-1, token) >= logits.topk(elementwise.TOP_K).values[:, -1:]).all())
    (x,), (small, scale) = elementwise_call("quant_fp8", bench, tokens=4, n=64)
    assert torch.allclose(small.float() * scale, x.float(), rtol=0.07, atol=0.02)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8"])
def test_kv_write_writes(bench, kv_dtype):
    columns = {"tokens": 4, "kv_heads": 2, "head_dim": 32, "kv_dtype": kv_dtype}
    (key, _, keys, _, slots), _ = elementwise_call("kv_write", bench, **columns)
    assert torch.equal(keys.flatten(0, 1)[slots].float(), key.to(keys.dtype).float())


def test_every_elementwise_op_has_inputs_bytes_and_points():
    models = ("qwen3-8b", "gemma-2-9b")
    points = list(elementwise.Elementwise().points(wanted(models=models, kv_dtypes=("bfloat16", "fp8"))))
    assert {point.op for point in points} == set(run.OPERATORS["elementwise"][1]) == set(elementwise._OPS)
    assert all(elementwise.least_bytes(point) > 0 for point in points)
    assert {point.launch for point in points} == {"graph", "eager", "compiled", "compiled_graph"}


def test_a_forward_pass_is_all_its_layers(bench):
    operator = layers.Layers()
    points = [point for point in operator.points(wanted()) if point.launch == "eager"]
    assert {point.op for point in points} == {"layer", "forward"}
    assert {bool(point.get("chunks")) + 2 * bool(point.get("seqs")) for point in points} == {1, 2, 3}
    rows = {point.op: operator.measure(point, bench) for point in points if point["tokens"] == 4}
    assert (rows["layer"].layers, rows["forward"].layers) == (1, 2)
    head = linear.linear_flops(4, 256, 64)
    assert rows["forward"].flops == 2 * rows["layer"].flops + head


# ---- a run --------------------------------------------------------------------------------------------------------


class Fake:
    """Ten points; what `at` says happens before the point of that many tokens is measured."""

    name = "linear"

    def __init__(self, at=None):
        self.at = at or {}
        self.asked = []

    def points(self, _wanted):
        for tokens in range(1, 11):
            variant = "absent" if tokens % 2 else "cublas"
            yield Point.of("linear", variant if self.at.get("absent") else "cublas", "graph", tokens=tokens)

    def measure(self, point, bench):
        self.asked.append(point["tokens"])
        if point.variant == "absent":
            raise Unavailable("there is none")
        happens = self.at.get(point["tokens"])
        if happens:
            happens()
        return bench.time(point, [lambda: None])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m"


@pytest.fixture
def measure(out, monkeypatch):
    def run_it(operator, **options):
        monkeypatch.setattr(run, "load_operators", lambda _wanted: {"linear": operator})
        return run.measure(wanted(), out, cap_s=0.0005, **options)

    return run_it


def raising(error):
    def happens():
        raise error

    return happens


def test_a_run_has_its_provenance(measure):
    outcome = measure(Fake(), seed=3, argv=["measure", "--out", "x"])
    rows, about = read_parquet(outcome.path)
    assert [one.tokens for one in rows] == list(range(1, 11))
    assert all(one.repeats and one.measured_at for one in rows)
    fields = "gpu driver torch cuda python host cpu date llmsim seed argv notes format version"
    assert set(about) == set(fields.split())
    assert about["seed"] == 3 and about["argv"] == ["measure", "--out", "x"] and about["torch"] == torch.__version__
    assert any("CPU" in note for note in about["notes"])
    assert about["cpu"] and about["host"] and about["llmsim"].startswith("0.1.0 ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_the_current_point_and_is_resumed(measure, number):
    before = signal.getsignal(number)
    outcome = measure(Fake({4: lambda: os.kill(os.getpid(), number)}))
    assert outcome.interrupted and outcome.points == 4
    assert len(read_parquet(outcome.path)[0]) == 4
    assert signal.getsignal(number) == before
    rest = Fake()
    outcome = measure(rest)
    assert rest.asked == [5, 6, 7, 8, 9, 10] and outcome.new_points == 6
    assert len(read_parquet(outcome.path)[0]) == 10


def test_measurements_without_their_journal_are_not_overwritten(measure, out):
    path = measure(Fake()).path
    (out / "cpu.journal.jsonl").unlink()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"cpu\.parquet: is there without its cpu\.journal\.jsonl, and would be lost"):
        measure(Fake())
    assert path.read_bytes() == before and sorted(file.name for file in out.iterdir()) == ["cpu.parquet"]


def test_a_run_goes_on_with_its_own_seed_only(measure):
    measure(Fake(), seed=3)
    with pytest.raises(ValueError, match="was measured with seed 3, this is 4"):
        measure(Fake(), seed=4)


def test_what_cannot_be_written_is_said_and_kept(measure):
    first = measure(Fake())
    first.path.unlink()
    first.path.mkdir()
    outcome = measure(Fake())
    assert outcome.unwritten and "not written" in outcome.unwritten and "cpu.journal.jsonl" in outcome.unwritten
    assert outcome.points == 10


def test_an_error_of_the_tool_itself_loses_nothing(measure, out):
    outcome = measure(Fake({4: raising(KeyError("bug"))}))
    assert outcome.rows == 9 and any("tokens=4: skipped, KeyError: 'bug'" in note for note in outcome.notes)
    again = Fake({4: raising(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        measure(again)
    assert again.asked == [4] and len(read_parquet(out / "cpu.parquet")[0]) == 9


def test_out_of_memory_is_tried_again_then_skipped_and_tried_by_the_next_run(measure):
    full = Fake({4: raising(torch.OutOfMemoryError("no"))})
    outcome = measure(full)
    assert full.asked == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10] and outcome.points == 9
    assert any(note.startswith("out of memory at linear/cublas/graph/tokens=4") for note in outcome.notes)
    empty = Fake()
    measure(empty)
    assert empty.asked == [4]


def test_a_failing_kernel_is_noted_and_not_tried_again(measure):
    outcome = measure(Fake({4: raising(RuntimeError("no such\nkernel"))}))
    assert outcome.rows == 9 and any("tokens=4: skipped, RuntimeError: no such" in note for note in outcome.notes)
    again = Fake()
    measure(again)
    assert again.asked == []


def test_a_broken_context_ends_the_run(measure, monkeypatch):
    def synchronize(_bench):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Bench, "synchronize", synchronize)
    outcome = measure(Fake({4: raising(RuntimeError("CUDA error"))}))
    assert outcome.broken == "linear/cublas/graph/tokens=4" and outcome.rows == 3
    monkeypatch.undo()


def test_a_missing_variant_is_noted_once(measure):
    fake = Fake({"absent": True})
    outcome = measure(fake)
    assert fake.asked == [1, 2, 4, 6, 8, 10]
    assert [note for note in outcome.notes if "absent" in note] == ["linear absent: not measured, there is none"]


def test_a_variant_that_keeps_failing_is_given_up(measure, monkeypatch):
    monkeypatch.setattr(run, "MOST_FAILURES", 3)
    fake = Fake({tokens: raising(RuntimeError("no kernel")) for tokens in (1, 3, 4, 5)})
    outcome = measure(fake)
    assert fake.asked == [1, 2, 3, 4, 5] and outcome.rows == 1
    assert "linear cublas: given up after 3 failures in a row" in outcome.notes


def test_the_budget_ends_a_run(measure):
    import time

    outcome = measure(Fake(dict.fromkeys(range(1, 11), lambda: time.sleep(0.05))), budget_s=0.12)
    assert 1 <= outcome.points <= 4 and not outcome.interrupted


def test_the_command_measures_resumes_and_finishes(tmp_path):
    options = ["--out", str(tmp_path / "m"), "--device", "cpu", "--models", "llama-3.2-1b", "--tp", "1"]
    options += ["--ops", "linear,kv_write", "--dtypes", "bf16"]
    first = CliRunner().invoke(command.measure, [*options, "--budget", "30s"], catch_exceptions=False)
    rows, about = read_parquet(tmp_path / "m" / "cpu.parquet")
    assert f"{len(rows)} rows" in first.output
    assert {(one.op, one.variant) for one in rows} == {("linear", "cublas"), ("kv_write", "torch")}
    assert {one.launch for one in rows} == {"eager", "compiled"}
    assert any("vllm" in note.lower() for note in about["notes"])
    assert str(tmp_path) not in json.dumps(about)
    (tmp_path / "m" / "cpu.parquet").unlink()
    CliRunner().invoke(command.measure, [*options, "--budget", "0s"], catch_exceptions=False)
    assert read_parquet(tmp_path / "m" / "cpu.parquet")[0] == rows


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "20"], "--budget '20'"),
        (["--budget", "soon"], "--budget 'soon'"),
        (["--models", "llama-9"], "unknown model 'llama-9'"),
        (["--models", "mixtral-8x7b"], "not dense"),
        (["--models", ","], "--models: none given"),
        (["--dtypes", "bf17"], "--dtypes: unknown dtype 'bf17'"),
        (["--kv-dtypes", "int4"], "--kv-dtypes: unknown dtype 'int4'"),
        (["--ops", "linear,nothing"], "--ops: unknown op 'nothing'"),
        (["--tp", "0"], "--tp '0'"),
        (["--tp", "two"], "--tp 'two'"),
        (["--out", "/proc/nothing/here"], "--out /proc/nothing/here"),
        (["--out", "results.csv"], "neither a folder nor a .parquet file"),
        (["--budget", "0s"], "no journal"),
    ],
)
def test_a_bad_option_is_told_in_one_line(tmp_path, options, says):
    defaults = ["--out", str(tmp_path / "m"), "--device", "cpu", "--ops", "memory"]
    result = CliRunner().invoke(command.measure, [*defaults, *options])
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert says in str(result.exception) and "\n" not in str(result.exception)


def test_no_gpu_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(command.measure, ["--out", str(tmp_path / "m")])
    assert "no CUDA GPU is visible to torch" in str(result.exception) and "\n" not in str(result.exception)


def test_names_that_drivers_give_gpus():
    assert run.known_gpu("NVIDIA H100 80GB HBM3") == "h100-sxm"
    assert run.known_gpu("NVIDIA H200") == "h200-sxm"
    assert run.known_gpu("NVIDIA A100-SXM4-80GB") == "a100-80gb-sxm"
    assert run.known_gpu("NVIDIA H100 NVL") is None
    assert run.known_gpu("NVIDIA Nonesuch 9000") is None
