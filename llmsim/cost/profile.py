"""Cost of iterations from a profile: coefficients fitted to recordings of a real engine, scaled by shapes.

    pure decodes      T = (G(n) + b_full * kv_tokens * (1 + u(seqs))) * (1 + stalls)
    with chunks       T = B + w * min(B, 50 ms) * seqs^2 / (seqs^2 + 55^2)
                      B = G(n) + b_mixed * kv_tokens + sum over chunks max(a * pairs, b_mixed * computed)

T GPU seconds; n rows of the iteration: its tokens, padded in graph modes. G: table of seconds over rows, linear between
its knots: linear layers, norms, sampling. a: seconds per (query, key) pair of prefill attention. b: seconds per cached
token that a decode reads; beside chunks the decodes run in the prefill's attention kernel, which reads no faster. A
short chunk over a long context costs at least what a decode of it does. Stalls: the share of decode time that the host
loses now and then (its own launches never pace a decode, its hiccups do).

u is what is lost when the attention kernel's work does not divide evenly: with 8 KV heads, 1 to 4 requests of any
context fill the 132 SMs of an H100 or H200 in one wave, and so do 8 and 16; other small batches need a second, half
empty one. Timed on an H200 by CUDA events beside the same steps' other terms (long_q0.7, contexts of 12,000 to 30,000).

w is power (and so is `Host.warm_share`, after another chunk): after many decodes, which draw it on memory, the matrix
units of a chunk find lower clocks for some 50 ms.
Timed on an H200 by CUDA events, chunks of 16 to 8,192 tokens beside 8 to 220 decodes: the same kernels need 2 % longer
beside 8, 6 % beside 30, 12 % beside 60 and 18 to 20 % beside 120 and more, and as long as expected after 45 ms of rest.

GEMMs compute tiles of 128 rows. Above 256 rows, where they pace G, a tile just begun costs a quarter of a full one and
half a tile costs all of it: on an H200, of what 1,152 rows cost more than 1,024, 1,032 cost 0.3 and 1,090 cost 0.95.
So n stands for `effective_rows(n)`. For 60 decodes beside a 1,024-token chunk this is 8 % of the iteration.

Another dense model, dtype or tensor-parallel size is scaled by shapes. G by the ratio of

    F(n) = layers * o + (M^p + C(n)^p)^(1/p) + all-reduce

M weight bytes / bandwidth, C(n) n * FLOPs per token / rate, o seconds per layer, p sharpness of the change from
memory-bound to compute-bound; bandwidth, rate and p fitted to G. a is scaled by attention FLOPs, b by KV bytes, all
per rank; launches of piecewise and eager iterations by layers (every layer is so many kernels). Above the
last knot G grows with F. Left out: skew of context lengths inside a batch, MoE, MLA and sliding windows (refused),
overlap of all-reduce with compute, pipeline parallelism.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from llmsim.cost import FULL, PIECEWISE, WARM_S, Host, Ramp
from llmsim.hardware import ELEMENT_BYTES, Gpu, Model, find_model

if TYPE_CHECKING:
    from llmsim.cost.load import CostSettings

FORMAT = "llmsim-profile"
VERSION = 1
TILE_ROWS = 128
TILE_AT_ONCE = 0.25  # of a full tile's time, as soon as its first row is there
TILE_PAID_ROWS = 64  # rows after which the whole tile is paid
FIRST_TILED_ROW = 256  # below, memory paces the GEMMs
UNEVEN = {5: 0.3, 6: 0.25, 7: 0.25, 9: 0.13, 10: 0.13, 11: 0.13, **dict.fromkeys(range(12, 16), 0.08)}  # 8 KV heads
POWER_SEQS = 55  # decodes that pull them half-way down
# An all-reduce over NVLink costs about this before bytes count (NCCL tests, small messages).
ALL_REDUCE_LATENCY_S = 8e-6


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


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest values among the steps the fit has seen."""

    tokens: int
    seqs: int
    kv_tokens: int
    context_tokens: int  # of one prompt, chunk included


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    engine: str
    gpu: str
    recorded: str
    fitter: str
    scenarios: tuple[str, ...]
    recordings: dict[str, str]  # file -> sha256


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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

    @property
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
    if model.experts or model.mla or model.sliding_layers:
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
    return profile


def unevenness(seqs: int, kv_heads: float) -> float:
    """u: share by which decode attention of `seqs` requests with `kv_heads` KV heads on a rank takes longer."""
    return UNEVEN.get(round(seqs * kv_heads / 8), 0.0)


def power(seqs: int) -> float:
    """How far `seqs` decodes have pulled the clocks down for a chunk beside them: 0 to 1."""
    return seqs * seqs / (seqs * seqs + POWER_SEQS * POWER_SEQS)


def effective_rows(rows: int) -> float:
    """Rows of full GEMM tiles that take as long as `rows` do."""
    if rows <= FIRST_TILED_ROW:
        return rows
    full, begun = divmod(rows, TILE_ROWS)
    share = min(TILE_AT_ONCE + (1.0 - TILE_AT_ONCE) * begun / TILE_PAID_ROWS, 1.0) if begun else 0.0
    return TILE_ROWS * (full + share)


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


def model_shape(model: Model, gpu: Gpu, dtype: str, kv_dtype: str, tensor_parallel: int, fitted_dtype: str) -> Shape:
    for feature, there in (
        ("MoE", model.experts),
        ("latent attention", model.mla),
        ("sliding windows", model.sliding_layers),
    ):
        if there:
            raise ValueError(f"model={model.name} has {feature}; profiles scale dense models only. Use cost=roofline")
    model.check_tensor_parallel(tensor_parallel)
    tp, plain = tensor_parallel, model.plain_bytes(dtype)
    stored = gpu.compute_dtype(model.weight_format(dtype))
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


class ProfileCost:
    """A profile applied to one model, dtype, tensor-parallel size and set of CUDA graphs."""

    kind = "profile"

    def __init__(self, profile: Profile, model: Model, gpu: Gpu, settings: CostSettings) -> None:
        if gpu.name != profile.gpu:
            raise ValueError(f"gpu={gpu.name}: profile {profile.name} was measured on {profile.gpu}. Use that GPU")
        self.profile, clock = profile, profile.gpu_clock
        source = find_model(profile.model)
        fitted = model_shape(source, gpu, profile.dtype, profile.kv_dtype, profile.tensor_parallel, profile.dtype)
        shape = model_shape(model, gpu, settings.dtype, settings.kv_dtype, settings.tensor_parallel, profile.dtype)
        self._shape, self._fitted, self._clock = shape, fitted, clock
        self.scaled = shape != fitted
        self.label = self._describe(model, settings)
        self.host = host_of(profile.host_clock, shape.layers / fitted.layers).scaled(settings.host_scale)
        self.mode = settings.graphs.mode
        self._padded, self._largest_graph = settings.graphs.padded, settings.graphs.largest

        self._knots = list(clock.tokens)
        ratios = [shape.form_s(clock, n) / fitted.form_s(clock, n) for n in self._knots]
        self._linear_s = [t * ratio for t, ratio in zip(clock.linear_s, ratios, strict=True)]
        self._last = self._knots[-1]
        self._beyond = self._linear_s[-1] / shape.form_s(clock, self._last)
        kv_ratio = shape.kv_token_bytes / fitted.kv_token_bytes
        self._pair_s = clock.pair_s * shape.pair_flops / fitted.pair_flops / shape.flops_ratio
        self._full_kv_s = clock.full_kv_token_s * kv_ratio * (1.0 + profile.host_clock.stall_share)
        self._mixed_kv_s = clock.mixed_kv_token_s * kv_ratio
        self._power_share = clock.power_share
        self._stalled = 1.0 + profile.host_clock.stall_share
        sizes = range(1, self._largest_graph + 1)
        kv_heads = model.kv_heads / min(settings.tensor_parallel, model.kv_heads)
        self._decode_kv_s = [self._full_kv_s * (1.0 + unevenness(n, kv_heads)) for n in range(self._largest_graph + 1)]
        self._decode_s = [0.0, *(self._stalled * self.linear_s(self._padded(n)) for n in sizes)]

    def _describe(self, model: Model, settings: CostSettings) -> str:
        profile = self.profile
        shown = measured_error(profile)
        scaled = f", scaled from {profile.model} by shapes to {model.name}" if self.scaled else ""
        for name, now, then in (
            ("tensor_parallel", settings.tensor_parallel, profile.tensor_parallel),
            ("weights in", settings.dtype, profile.dtype),
            ("KV cache in", settings.kv_dtype, profile.dtype if profile.kv_dtype == "auto" else profile.kv_dtype),
        ):
            if self.scaled and now != then:
                scaled += f", {name} {now}"
        return f"profile {profile.name} ({profile.id}), {profile.provenance.engine}{scaled}{shown}"

    def linear_s(self, tokens: int) -> float:
        """G: seconds of everything but attention for `tokens` rows."""
        knots, values = self._knots, self._linear_s
        rows = effective_rows(tokens)
        if rows >= self._last:
            return self._beyond * self._shape.form_s(self._clock, rows)
        i = bisect_right(knots, rows)
        if i == 0:
            return values[0]
        share = (rows - knots[i - 1]) / (knots[i] - knots[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])

    def decode_ramp(self, seqs: int, kv_tokens: int) -> Ramp:
        if seqs <= self._largest_graph:
            linear_s, kv_s = self._decode_s[seqs], self._decode_kv_s[seqs]
        else:
            linear_s, kv_s = self._stalled * self.linear_s(seqs), self._full_kv_s
        return Ramp(linear_s + kv_s * kv_tokens, kv_s * seqs)

    def mixed_s(self, chunks: Sequence[tuple[int, int]], seqs: int, kv_tokens: int) -> float:
        kv_s, pair_s = self._mixed_kv_s, self._pair_s
        seconds = kv_s * kv_tokens
        tokens = seqs
        for new, done in chunks:
            tokens += new
            seconds += max(pair_s * new * (done + 0.5 * (new + 1)), kv_s * done)
        seconds += self.linear_s(self._padded(tokens))
        return seconds + self._power_share * power(seqs) * min(seconds, WARM_S)

    def outside_measured(self, iterations: dict[str, Any]) -> Any:
        """Rows with more tokens, decodes, cached tokens or prompt context than any step the profile was fitted to.

        Decodes without a full graph are outside too: recordings have piecewise and eager launches of prompts only.
        """
        measured = self.profile.measured
        last_kv_tokens = iterations["kv_tokens"] + iterations["seqs"] * (iterations["iterations"] - 1)
        return (
            (iterations["seqs"] + iterations["prefill_tokens"] > measured.tokens)
            | (iterations["seqs"] > measured.seqs)
            | (last_kv_tokens > measured.kv_tokens)
            | (iterations["prefill_context"] > measured.context_tokens)
            | ((iterations["prefill_tokens"] == 0) & (iterations["mode"] != FULL))
        )
