"""Cost of iterations from a profile: coefficients fitted to recordings of a real engine, other models by their kernels.

The equations of an iteration's GPU seconds T are those of `llmsim.cost.basis`. A profile holds, of the model it was
fitted on, L at knots of rows (linear layers, norms, and without kernels the head), a (seconds per (query, key) pair of
prefill attention), b (seconds per cached token that a decode reads, alone and beside chunks) and w; and stalls, the
share of decode time that the host loses now and then (its own launches never pace a decode, its hiccups do): decodes
take T * (1 + stalls).

w is power (and so are `Host.warm_share`, after another chunk, and `Host.cool_share`): after many decodes, which draw it
on memory, the matrix units of a chunk find lower clocks for some 50 ms. Timed on an H200 by CUDA events, chunks of 16
to 8,192 tokens beside 8 to 220 decodes: the same kernels need 2 % longer beside 8, 6 % beside 30, 12 % beside 60 and 18
to 20 % beside 120 and more, and as long as expected after 45 ms of rest.

Another dense model, dtype or tensor-parallel size

    by kernels    L(n) = r(n) * body(n) + layers * gap(n): body and the other terms are composed of the model's own
                  kernels (llmsim.cost.kernels); r and gap, what the engine adds to them, are those of the fitted
                  model, as is the ratio of a and b to theirs
    by shapes     where the kernels lack what is needed, or the profile has none: L by the ratio of
                  F(n) = layers * o + (M^p + C(n)^p)^(1/p) + all-reduce; M weight bytes / bandwidth, C(n) n * FLOPs per
                  token / rate, o seconds per layer, p sharpness of the change from memory-bound to compute-bound;
                  bandwidth, rate and p fitted to L. a by attention FLOPs, b by KV bytes, all per rank

Launches of piecewise and eager iterations grow with the layers (every layer is so many kernels); with tensor_parallel
above 1 workers make them (`worker_host`). Layers of sliding windows read the last tokens only, the mean context
standing for all; a run of decodes grows as its first iteration. Left out: MoE and MLA (refused), soft-capped scores and
logits, overlap of all-reduce with compute, pipeline parallelism.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from llmsim.cost import EAGER, FULL, PIECEWISE, WARM_S, Host, Ramp, worker_host
from llmsim.cost.basis import Basis, Coefficients, KernelBasis, ShapeBasis, StepClock, Windows, power
from llmsim.cost.graphs import LARGEST_CAPTURE
from llmsim.cost.kernels import LAYER_LINEARS, Forward, Kernels, NotTimedError
from llmsim.cost.terms import Parts, shared
from llmsim.hardware import ELEMENT_BYTES, Gpu, Model, find_model

if TYPE_CHECKING:
    from llmsim.cost.load import CostSettings

FORMAT = "llmsim-profile"
VERSION = 1
# An all-reduce over NVLink costs about this before bytes count (NCCL tests, small messages).
ALL_REDUCE_LATENCY_S = 8e-6
FULL_ROWS = 256  # requests of the largest batch: more rows are prompts
# Power pulls clocks down less where matrix products run in fp8. On H200s, two models, three loads each: decodes lose
# 0.8 % of the chunks before them (3 % in bf16, every dense model, TP 1 and 2), chunks beside many decodes 4 to 6 %
# (11 to 14 %), chunks after chunks nothing (5 %).
FP8_POWER = 0.3
GAP_ROWS = 16
CLOCKED_ROWS = 512  # rows from which products of matrices are paced by compute, and so by the clocks
# What a profile's numbers may be: seconds of one thing, and anything else.
MOST_S, MOST = 1e3, 1e18
# What launching a full graph takes of a host that never waits for the GPU, of what it takes one that does: on one H200
# host in one hour, vLLM 0.25.1 with async scheduling, 1.70 ms (Qwen2.5-1.5B, 2.2 ms a step) and 1.88 (Llama-3.2-1B,
# 2.4), and 2.64 (Llama-3.1-8B, 5.2); 0.7 gives the mean step of both within 5 %.
NEVER_WAITING = 0.7
# And what each request adds to it: 5.4, 6.5, 6.5 and 6.9 us in four loads of those two (up to 95 requests), 4.1 to 6.7
# in seven of ten loads of five models up to 12B that have 40 requests and more.
GRAPH_REQUEST_S = 6e-6
SIGNED = ("launch_jitter_s", "launch_drift_s")
NOT_ZERO = ("count", "pair_s", "block_s", "token_s", "full_kv_token_s", "mixed_kv_token_s", "linear_s", "seconds")


class GpuClock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: tuple[int, ...]  # knots of G
    linear_s: tuple[float, ...]
    pair_s: float
    full_kv_token_s: float
    mixed_kv_token_s: float
    power_share: float
    layer_overhead_s: float
    bandwidth_bytes_per_s: float
    flops_per_s: float
    sharpness: float


class HostClock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of `llmsim.cost.Host`, every one of them, and the share of decode time lost to stalls."""

    stall_share: float
    schedule_s: float
    schedule_per_request_s: float
    schedule_per_token_s: float
    launch_s: tuple[float, float, float]
    launch_per_request_s: tuple[float, float, float]
    launch_per_chunk_s: tuple[float, float, float]
    launch_jitter_s: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    launch_drift_s: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    drift_hold_s: float
    update_s: float
    update_per_output_s: float
    interference_per_token_s: float
    lead_s: tuple[float, float, float]
    tail_s: tuple[float, float, float]
    receive_busy_s: float
    receive_per_token_s: float
    receive_s: float
    wake_s: float
    respond_s: float
    respond_per_output_s: float
    warm_share: float
    cool_share: float = 0.0
    return_s: float = 0.0
    worker: bool = False


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest values among the steps the fit has seen."""

    tokens: int
    seqs: int
    kv_tokens: int
    context_tokens: int  # of one prompt, chunk included


class Deviation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Relative standard deviations of GPU seconds and launches, and how many loads or machines they rest on."""

    gpu_decode: float
    gpu_chunk: float
    host: float
    count: int


class Within(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Relative standard deviations of GPU seconds inside a load, and how many loads they rest on."""

    decode: float
    chunk: float
    count: int


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How far recordings are from the profile at random: what no better fit to one of them removes."""

    runs: Deviation  # loads of one machine, what the profile misses in each included
    machines: Deviation  # machines of a kind beyond that
    models: dict[str, Deviation] = {}  # setups it was carried to (`setup_name`): all of it, machine and hour included
    sizes: Within | None = None  # iterations of one size beyond their load, of what it was fitted to
    carried_sizes: Within | None = None  # and of what it was carried to
    steps: Within | None = None  # single iterations beyond those of their size


def setup_name(model: str, dtype: str, tensor_parallel: int) -> str:
    """What a profile is carried to, as `Spread.models` names it: a model, its weights' dtype, GPUs of a replica."""
    return f"{model} {dtype} tp{tensor_parallel}"


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    engine: str
    gpu: str
    recorded: str
    fitter: str
    scenarios: tuple[str, ...]
    recordings: dict[str, str]  # file -> sha256
    touched: dict[str, float] | None = None  # factors of a touch-up: as used, as seen, standard errors


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    format: str
    version: int
    name: str
    gpu: str
    model: str
    dtype: str
    kv_dtype: str
    tensor_parallel: int
    gpu_clock: GpuClock
    host_clock: HostClock
    measured: Measured
    provenance: Provenance
    error: dict[str, float]  # residuals on the fitted recordings and, by scenario, on those held out
    kernels: Kernels | None = None  # what carries it to other models; by data-sheet shapes where there are none
    spread: Spread | None = None

    @cached_property  # megabytes of JSON
    def id(self) -> str:
        """Hash of the content: two profiles with one id give the same numbers."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]


def profile_names() -> list[str]:
    return sorted(
        file.name[:-5] for file in files("llmsim").joinpath("profiles").iterdir() if file.name[-5:] == ".json"
    )


@cache
def read_profile(path_or_name: str) -> Profile:
    path = Path(path_or_name)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such profile. Fit one (python -m calibration fit) or name a shipped one"
            )
        return decode_profile(path.read_bytes(), str(path))
    if path_or_name not in profile_names():
        known = ", ".join(profile_names())
        raise ValueError(f"unknown profile {path_or_name!r}. Use one of {known}, or the path of a .json file")
    shipped = files("llmsim").joinpath("profiles", f"{path_or_name}.json")
    return decode_profile(shipped.read_bytes(), f"profile {path_or_name}")


def find_profile(model: Model, gpu: Gpu, settings: CostSettings) -> str | None:
    """The shipped profile of this GPU that can be scaled to the model, one fitted on the model itself first."""
    if model.experts or model.mla:
        return None
    fitting = [name for name in profile_names() if read_profile(name).gpu == gpu.name]
    return min(fitting, key=lambda name: (read_profile(name).model != model.name, name), default=None)


def measured_error(profile: Profile) -> str:
    """Median error of step times on recordings it was not fitted to, or where there are none on those it was."""
    for others, label in ((True, "steps it was not fitted to"), (False, "steps it was fitted to")):
        kinds = []
        for kind, name in (("decode", "decodes"), ("chunk", "with prompts")):
            ending = f"{kind}_step_median"
            errors = [e for key, e in profile.error.items() if key.endswith(ending) and (key[:4] != "fit_") == others]
            if errors:
                kinds.append(f"{name} {median(errors):.1%}")
        if kinds:
            return f", median error of {label}: {', '.join(kinds)}"
    return ""


def load_profile(path_or_name: str, model: Model, gpu: Gpu, settings: CostSettings) -> ProfileCost:
    return ProfileCost(read_profile(path_or_name), model, gpu, settings)


def decode_profile(text: bytes, where: str) -> Profile:
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a profile: {error}. Fit it again with: python -m calibration fit") from None
    if profile.format != FORMAT or profile.version != VERSION:
        found = f"format={profile.format!r} version={profile.version}"
        raise ValueError(f"{where}: {found}; this llmsim reads {FORMAT} version {VERSION}. Fit it again")
    clock = profile.gpu_clock
    knots, values = list(clock.tokens), list(clock.linear_s)
    if not knots or len(knots) != len(values) or knots != sorted(set(knots)):
        raise ValueError(f"{where}: gpu_clock.tokens={knots} must rise, with one value of linear_s for each")
    if values != sorted(values) or values[0] <= 0.0:
        raise ValueError(f"{where}: gpu_clock.linear_s={values} must be above 0 s and must not fall as tokens rise")
    try:
        for name in ("gpu_clock", "host_clock", "tensor_parallel", "spread", "kernels"):
            _check_numbers(getattr(profile, name), name)
        if profile.kernels is not None:
            _check_kernels(profile.kernels, profile.gpu)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Fit it again with: python -m calibration fit") from None
    return profile


def _check_numbers(part: Any, path: str) -> None:
    """Every number in it is one that its field's name allows: seconds, shares and deviations may be 0, rates not."""
    if isinstance(part, msgspec.Struct):
        for field in part.__struct_fields__:
            if field != "error":
                _check_numbers(getattr(part, field), f"{path}.{field}")
    elif isinstance(part, dict):
        for key, held in part.items():
            _check_numbers(held, f"{path}.{key}")
    elif isinstance(part, tuple) and part and isinstance(part[0], int | float):
        _check_numbers(min(part), path)
        _check_numbers(max(part), path)
    elif isinstance(part, tuple):
        for held in part:
            _check_numbers(held, path)
    elif isinstance(part, int | float) and not isinstance(part, bool):
        field = path.rpartition(".")[2]
        seconds = field.endswith(("_s", "seconds")) and not field.endswith("_per_s")
        most = MOST_S if seconds else MOST
        least = -most if field in SIGNED else 0.0
        zero = field not in NOT_ZERO and (seconds or field.endswith("_share") or path.startswith("spread."))
        if not least <= part <= most or (part == 0 and not zero):
            raise ValueError(
                f"{path}={str(part)[:20]} must be {'0 or more' if zero else 'above 0'} and at most {most:.0e}"
            )


def _check_kernels(kernels: Kernels, gpu: str) -> None:
    if kernels.gpu != gpu:
        raise ValueError(f"kernels.gpu={kernels.gpu} is not the profile's gpu={gpu}")
    curves = {f"elementwise.{op}": curve for op, curve in kernels.elementwise.items()}
    curves |= {f"all_reduce.{gpus}": curve for gpus, curve in kernels.all_reduce.items()} | {
        "head_rows": kernels.head_rows
    }
    for name, curve in curves.items():
        _check_table(f"{name}.size_bytes", curve.size_bytes, curve.seconds)
    for gpus in kernels.all_reduce:
        if not gpus.isdecimal() or int(gpus) < 2:
            raise ValueError(f"kernels.all_reduce.{gpus}: name it by a number of GPUs, 2 or more")
    for dtype, table in kernels.linears.items():
        _check_table(f"linears.{dtype}.tokens", table.tokens, *table.slowness)
        for stack in table.stacks:
            _check_table(f"linears.{dtype}.stacks", stack.tokens, stack.ratio)
            if len(stack.shapes) != LAYER_LINEARS:
                raise ValueError(f"kernels.linears.{dtype}.stacks: {len(stack.shapes)} shapes, not {LAYER_LINEARS}")
        if len(table.shapes) != len(table.slowness):
            raise ValueError(
                f"kernels.linears.{dtype}.shapes: {len(table.shapes)} for {len(table.slowness)} of slowness"
            )
    for decode in kernels.decodes:
        _check_table("decodes.seqs", decode.seqs, decode.base_s, decode.token_s)
    kv_dtypes = [table.heads.kv_dtype for table in kernels.decodes] + [form.heads.kv_dtype for form in kernels.prefills]
    for kv_dtype in [*kv_dtypes, *(tiles.kv_dtype for tiles in kernels.tiles)]:
        if kv_dtype not in ("bfloat16", "fp8"):
            raise ValueError(f"kernels: attention of kv_dtype={kv_dtype!r}, neither bfloat16 nor fp8")
    for name in ("linears", "decodes", "prefills"):
        if not getattr(kernels, name):
            raise ValueError(f"kernels.{name} is empty")


def _check_table(name: str, knots: Sequence[float], *values: Sequence[float]) -> None:
    if not knots or not values or any(len(row) != len(knots) for row in values):
        raise ValueError(f"kernels.{name}: {len(knots)} knots for {len(values[0]) if values else 0} values")
    if list(knots) != sorted(set(knots)):
        raise ValueError(f"kernels.{name} must rise")


@dataclass(frozen=True)
class Shape:
    """What the form of G needs of a model on one rank."""

    layers: int
    weight_bytes: float  # read by every iteration: linear layers and LM head
    flops_per_token: float
    flops_ratio: float  # peak of its dtype over the peak of the fitted dtype
    pair_flops: float
    kv_token_bytes: float
    all_reduce_bytes_per_token: float
    link_bytes_per_s: float
    tensor_parallel: int

    def form_s(self, clock: GpuClock, tokens: float) -> float:
        memory_s = self.weight_bytes / clock.bandwidth_bytes_per_s
        compute_s = tokens * self.flops_per_token / (clock.flops_per_s * self.flops_ratio)
        p = clock.sharpness
        reduce_s = 0.0
        if self.tensor_parallel > 1:
            reduce_s = 2 * self.layers * ALL_REDUCE_LATENCY_S
            reduce_s += tokens * self.all_reduce_bytes_per_token / self.link_bytes_per_s
        return float(self.layers * clock.layer_overhead_s + (memory_s**p + compute_s**p) ** (1 / p) + reduce_s)

    def form_parts(self, clock: GpuClock, tokens: float) -> dict[str, float]:
        """The same by term."""
        alone = replace(self, tensor_parallel=1)  # without all-reduces
        between_s = self.layers * clock.layer_overhead_s
        linear_s = alone.form_s(clock, tokens) - between_s
        reduce_s = 0.0 if self.tensor_parallel == 1 else self.form_s(clock, tokens) - linear_s - between_s
        return {"linear": linear_s, "between": between_s, "communication": reduce_s}


def model_shape(
    model: Model,
    gpu: Gpu,
    dtype: str,
    kv_dtype: str,
    tensor_parallel: int,
    fitted_dtype: str,
    compute_dtype: str | None = None,
) -> Shape:
    """`compute_dtype`: what matrix products run in, if not what the weights are stored in."""
    for feature, there in (
        ("MoE", model.experts),
        ("latent attention", model.mla),
    ):
        if there:
            raise ValueError(f"model={model.name} has {feature}; profiles scale dense models only. Use cost=roofline")
    model.check_tensor_parallel(tensor_parallel)
    tp, plain = tensor_parallel, model.plain_bytes(dtype)
    stored = compute_dtype or gpu.compute_dtype(model.weight_format(dtype))
    return Shape(
        layers=model.layers,
        weight_bytes=model.linear_bytes(dtype, tp) + model.lm_head_params / tp * plain,
        flops_per_token=model.linear_flops_per_token / tp,
        flops_ratio=gpu.flops_per_s[stored] / gpu.flops_per_s[gpu.compute_dtype(fitted_dtype)],
        pair_flops=model.attention_flops_per_pair / tp,
        kv_token_bytes=model.kv_bytes_per_token(kv_dtype, tp),
        # two all-reduces a layer; each rank sends and receives 2 (tp - 1) / tp of the activations
        all_reduce_bytes_per_token=2 * model.layers * 2 * (tp - 1) / tp * model.hidden * ELEMENT_BYTES["bfloat16"],
        link_bytes_per_s=gpu.link_bytes_per_s,
        tensor_parallel=tp,
    )


def reached(iterations: Mapping[str, Any]) -> dict[str, Any]:
    """Of each row of an iteration log, what `Measured` holds the largest of."""
    return {
        "tokens": iterations["seqs"] + iterations["prefill_tokens"],
        "seqs": iterations["seqs"],
        "kv_tokens": iterations["kv_tokens"] + iterations["seqs"] * (iterations["iterations"] - 1),
        "context_tokens": iterations["prefill_context"],
    }


def without_graph(iterations: Mapping[str, Any]) -> Any:
    """Rows of decodes that no full graph launches: recordings have piecewise and eager launches of prompts only."""
    return (iterations["prefill_tokens"] == 0) & (iterations["mode"] != FULL)


def host_of(clock: HostClock, layers_ratio: float) -> Host:
    """The host of a model with `layers_ratio` times the layers: launches beyond a full graph's cost grow with them."""
    graph_s = clock.launch_s[FULL]
    later = [graph_s + max(launch_s - graph_s, 0.0) * layers_ratio for launch_s in clock.launch_s[PIECEWISE:]]
    launch_s = (graph_s, later[0], later[1])
    growth = [now / before if before > 0.0 else 1.0 for now, before in zip(launch_s, clock.launch_s, strict=True)]

    def noise(tables: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(value * factor for value in table) for table, factor in zip(tables, growth, strict=True))

    plain = {name: getattr(clock, name) for name in clock.__struct_fields__ if name != "stall_share"}
    plain["launch_s"] = launch_s
    plain["launch_jitter_s"] = noise(clock.launch_jitter_s)
    plain["launch_drift_s"] = noise(clock.launch_drift_s)
    return Host(**plain)


def never_waiting(host: Host) -> Host:
    """As it launches full graphs that set the pace: where the GPU does, launches are longer and hide behind it."""

    def with_graph(times_s: tuple[float, float, float], graph_s: float) -> tuple[float, float, float]:
        return graph_s, times_s[PIECEWISE], times_s[EAGER]

    request_s = host.launch_per_request_s
    return replace(
        host,
        launch_s=with_graph(host.launch_s, NEVER_WAITING * host.launch_s[FULL]),
        lead_s=with_graph(host.lead_s, NEVER_WAITING * host.lead_s[FULL]),
        launch_per_request_s=with_graph(request_s, max(request_s[FULL], GRAPH_REQUEST_S)),
    )


def _forward(profile: Profile, model: Model, settings: CostSettings) -> tuple[Forward | None, str]:
    """The model's forward pass by the profile's kernels, and how it is scaled: without them by data-sheet shapes."""
    if profile.kernels is None:
        return None, "shapes"
    if settings.widened(model):
        return None, f"shapes (dtype={settings.dtype}: with bfloat16 inputs it was not timed)"
    try:
        return Forward(profile.kernels, model, settings.dtype, settings.kv_dtype, settings.tensor_parallel), "kernels"
    except NotTimedError as missing:
        return None, f"shapes ({missing})"


def fitted_basis(profile: Profile) -> KernelBasis | ShapeBasis:
    """The basis of the model the profile was fitted on."""
    model = find_model(profile.model)
    if profile.kernels is None:
        kv_heads = model.kv_heads / min(profile.tensor_parallel, model.kv_heads)
        return ShapeBasis(kv_heads, profile.gpu_clock.tokens[-1])
    return KernelBasis(Forward(profile.kernels, model, profile.dtype, profile.kv_dtype, profile.tensor_parallel))


def fitted_coefficients(clock: GpuClock) -> Coefficients:
    return Coefficients(
        clock.tokens, clock.linear_s, clock.full_kv_token_s, clock.mixed_kv_token_s, clock.pair_s, clock.power_share
    )


def by_kernels(
    profile: Profile, forward: Forward, graph_tokens: int = LARGEST_CAPTURE
) -> tuple[KernelBasis, Coefficients]:
    """What the engine adds to its kernels is that of the fitted model; the kernels are the model's own.

    Per layer it adds a gap between kernels, the same for layers of any size: at most what it adds to the fitted model's
    where memory paces them (GAP_ROWS and fewer; on H200s 8 us, and what was recorded of eight others, of layers of 60
    to 280 us, comes to 1 to 15). What is beyond that is a ratio, r.

    Where matrix products are paced by compute (CLOCKED_ROWS and more) kernels take in an engine what they take alone:
    on H200s steps of nine models, bf16 and fp8, without what power costs them come to 0.97 to 1.02 of them.
    """
    fitted, own, clock = fitted_basis(profile), KernelBasis(forward, graph_tokens), profile.gpu_clock
    assert isinstance(fitted, KernelBasis)
    knots = np.array(clock.tokens, float)
    own_s, fitted_s = own.body_s(knots), fitted.body_s(knots)
    recorded_s = np.array(clock.linear_s)
    excess_s = (recorded_s - fitted_s) / fitted.layers
    gap_s = np.clip(excess_s, 0.0, max(median(excess_s[knots <= max(GAP_ROWS, knots[0])]), 0.0))
    linear_s = own_s * (recorded_s / fitted.layers - gap_s) / (fitted_s / fitted.layers) + own.layers * gap_s
    clocked = knots >= CLOCKED_ROWS
    linear_s[clocked] = own_s[clocked]
    if np.array_equal(own_s, fitted_s):  # the fitted model itself
        linear_s = recorded_s
    kv_ratio, pair_ratio = own.kv_token_s / fitted.kv_token_s, own.pair_s / fitted.pair_s
    return own, Coefficients(
        knots=clock.tokens,
        linear_s=tuple(linear_s.tolist()),
        full_kv_s=clock.full_kv_token_s * kv_ratio,
        mixed_kv_s=clock.mixed_kv_token_s * kv_ratio,
        pair_s=clock.pair_s * pair_ratio,
        power_share=clock.power_share,
    )


def _by_shapes(
    profile: Profile, shape: Shape, fitted: Shape, model: Model, settings: CostSettings
) -> tuple[ShapeBasis, Coefficients]:
    clock = profile.gpu_clock
    knots = np.array(clock.tokens, float)
    linear_s = np.array(clock.linear_s)
    if profile.kernels is not None:  # there L is without the head, and the head's rows are those of a batch
        linear_s = linear_s + fitted_basis(profile).head_s(np.minimum(knots, FULL_ROWS))
    ratios = [shape.form_s(clock, n) / fitted.form_s(clock, n) for n in clock.tokens]
    kv_ratio = shape.kv_token_bytes / fitted.kv_token_bytes
    kv_heads = model.kv_heads / min(settings.tensor_parallel, model.kv_heads)
    basis = ShapeBasis(kv_heads, clock.tokens[-1])
    return basis, Coefficients(
        knots=clock.tokens,
        linear_s=tuple((linear_s * ratios).tolist()),
        full_kv_s=clock.full_kv_token_s * kv_ratio,
        mixed_kv_s=clock.mixed_kv_token_s * kv_ratio,
        pair_s=clock.pair_s * shape.pair_flops / fitted.pair_flops / shape.flops_ratio,
        power_share=clock.power_share,
    )


def _stored(kv_dtype: str, dtype: str) -> str:
    """What "auto" stands for: the dtype of the activations."""
    return kv_dtype if kv_dtype != "auto" else dtype if dtype in ("float16", "float32") else "bfloat16"


class ProfileCost:
    """A profile applied to one model, dtype, tensor-parallel size and set of CUDA graphs."""

    kind = "profile"

    def __init__(self, profile: Profile, model: Model, gpu: Gpu, settings: CostSettings) -> None:
        if gpu.name != profile.gpu:
            raise ValueError(f"gpu={gpu.name}: profile {profile.name} was measured on {profile.gpu}. Use that GPU")
        self.profile = profile
        source = find_model(profile.model)
        fitted = model_shape(source, gpu, profile.dtype, profile.kv_dtype, profile.tensor_parallel, profile.dtype)
        shape = model_shape(
            model,
            gpu,
            settings.dtype,
            settings.kv_dtype,
            settings.tensor_parallel,
            profile.dtype,
            settings.compute_dtype(model, gpu),
        )
        self.scaled = shape != fitted
        host = host_of(profile.host_clock, shape.layers / fitted.layers)
        if settings.asynchronous:
            host = never_waiting(host)
        if settings.tensor_parallel > 1 and not host.worker:
            host = worker_host(host)
        felt = FP8_POWER if shape.flops_ratio > 1.0 else 1.0
        host = replace(host, cool_share=host.cool_share * felt, warm_share=host.warm_share * felt)
        self.host = host.scaled(settings.host_scale)
        self.mode = settings.graphs.mode
        self._stalled = 1.0 + profile.host_clock.stall_share
        forward, self._how = _forward(profile, model, settings)
        self._forward, self._shape = forward, shape
        self._neighbours: list[str] = []
        basis: Basis
        if forward is None:
            basis, coefficients = _by_shapes(profile, shape, fitted, model, settings)
        else:
            basis, coefficients = by_kernels(profile, forward, settings.graphs.split_tokens)
            self._neighbours = forward.extrapolated
        coefficients = replace(coefficients, power_share=coefficients.power_share * felt)
        share = model.sliding_layers / model.layers
        windows = Windows(share, model.sliding_window) if share else None
        self.clock = StepClock(basis, coefficients, settings.graphs.padded, windows)
        self._basis, self._coefficients, self._padded = basis, coefficients, settings.graphs.padded
        self.pair_s = coefficients.pair_s
        self.skew_share = self.clock.skew_share
        self.reads_longest = basis.schedule is not None
        self.label = self._describe(model, settings)

    @property
    def origin(self) -> str:
        """What its seconds rest on, in a word."""
        if not self.scaled:
            return "recorded"
        return "kernels" if self._forward is not None else "shapes"

    def _describe(self, model: Model, settings: CostSettings) -> str:
        profile = self.profile
        shown = measured_error(profile)
        scaled = f", scaled from {profile.model} by {self._how} to {model.name}" if self.scaled else ""
        for name, now, then in (
            ("tensor_parallel", settings.tensor_parallel, profile.tensor_parallel),
            ("weights in", settings.dtype, profile.dtype),
            ("KV cache in", _stored(settings.kv_dtype, settings.dtype), _stored(profile.kv_dtype, profile.dtype)),
        ):
            if self.scaled and now != then:
                scaled += f", {name} {now}"
        if self.scaled and self._neighbours:
            scaled += f" (from their neighbours: {', '.join(self._neighbours)})"
        return f"profile {profile.name} ({profile.id}), {profile.provenance.engine}{scaled}{shown}"

    def linear_s(self, tokens: int) -> float:
        """Seconds of the linear layers and what is between them for `tokens` rows."""
        return self.clock.linear_s(tokens)

    def decode_ramp(self, seqs: int, kv_tokens: float) -> Ramp:
        first_s, kv_s = self.clock.decode(seqs)
        kv_s *= self._stalled
        windows = self.clock.windows
        if windows is None:
            return Ramp(self._stalled * first_s + kv_s * kv_tokens, kv_s * seqs)
        read = windows.read_tokens(kv_tokens, seqs)
        growing = 1.0 if kv_tokens < seqs * windows.tokens else 1.0 - windows.share
        return Ramp(self._stalled * first_s + kv_s * read, kv_s * growing * seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: float, longest: float = 0.0) -> float:
        return self.clock.mixed_s(chunks, seqs, kv_tokens, longest)

    def parts(self, tokens: int, requests: int, seqs: int) -> Parts:
        """L in proportion to what its terms take by themselves."""
        rows = self._padded(tokens)
        at, sampled = np.array([float(rows)]), np.array([float(requests)])
        if self._forward is not None:
            weights = {name: float(seconds[0]) for name, seconds in self._forward.body_parts(at).items()}
        else:
            weights = self._shape.form_parts(self.profile.gpu_clock, rows)
        clock = self.clock
        part = shared(clock.mixed_linear_s(rows) if tokens > seqs else clock.linear_s(rows), weights)
        base_s = float(self._basis.base_s(np.array([float(seqs)]))[0])
        head_s = float(self._basis.head_s(sampled)[0])
        return Parts(part["linear"], part["between"], head_s, base_s, part["communication"])

    def rows_s(self, tokens: int, requests: int) -> float:
        return self.clock.rows_s(tokens, requests)

    def head_s(self, requests: int) -> float:
        return self.clock.head_s(requests)

    def prompts_s(self, chunks: Any, tokens: Any, context_tokens: Any, pairs: Any) -> Any:
        return self.clock.prompts_s(chunks, tokens, context_tokens, pairs)

    def clocked_s(self, seconds: float, seqs: int) -> float:
        return seconds + self._coefficients.power_share * power(seqs) * min(seconds, WARM_S)

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        """Rows with more tokens, decodes, cached tokens or prompt context than any step the profile was fitted to, and
        decodes without a full graph."""
        outside = without_graph(iterations)
        for name, values in reached(iterations).items():
            outside = outside | (values > getattr(self.profile.measured, name))
        return outside

    @property
    def from_neighbours(self) -> tuple[str, ...]:
        """Kernels of this model that were not timed, but taken from those next to them."""
        return tuple(self._neighbours) if self.scaled else ()
