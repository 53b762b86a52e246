"""Which cost model a scenario's `cost` names.

auto              the shipped profile measured on this GPU; the roofline where there is none, and for MoE and MLA models
roofline          data-sheet facts only
constant:SECONDS  the same for every iteration
NAME or PATH      a shipped profile, or a profile file (JSON)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

from llmsim.cost import CostModel, worker_host
from llmsim.cost.graphs import Graphs
from llmsim.hardware import Gpu, Model, find_model

if TYPE_CHECKING:
    from llmsim.drafting import Speculation


@dataclass(frozen=True)
class CostSettings:
    tensor_parallel: int
    dtype: str  # of the weights: "bfloat16", "fp8", ...
    kv_dtype: str
    graphs: Graphs
    host_scale: float = 1.0  # 2: everything the host does takes twice as long
    attention_kernel: str = "flash"
    kernel_fusion: str = "compiled"
    activation_dtype: str = "auto"
    speculation: Speculation | None = None
    asynchronous: bool = True  # an iteration is launched while the GPU is at the one before

    def __post_init__(self) -> None:
        if not (isfinite(self.host_scale) and self.host_scale >= 0):
            raise ValueError(f"host_scale={self.host_scale} must be 0 or more. 1 is the host of the cost model")

    def widened(self, model: Model) -> bool:
        """Whether weights that the GPU could multiply as they are get inputs in bfloat16."""
        return self.activation_dtype != "auto" and model.weight_format(self.dtype) in ("fp8", "int8")

    def compute_dtype(self, model: Model, gpu: Gpu) -> str:
        """What matrix products run in."""
        return "bfloat16" if self.widened(model) else gpu.compute_dtype(model.weight_format(self.dtype))

    @property
    def varied(self) -> bool:
        return self.attention_kernel != "flash" or self.kernel_fusion != "compiled"


def load_cost(spec: str, model: Model, gpu: Gpu, settings: CostSettings) -> CostModel:
    cost = _without_drafts(spec, model, gpu, settings)
    own = settings.speculation
    if own is None:
        return cost
    from llmsim.cost.speculative import SpeculativeCost

    draft = None
    if own.model is not None:
        small = find_model(own.model)
        plain = replace(settings, dtype="bfloat16", speculation=None)
        draft = _without_drafts("roofline" if spec == "roofline" else "auto", small, gpu, plain)
    return SpeculativeCost(cost, model, own, settings.graphs, draft)


def _without_drafts(spec: str, model: Model, gpu: Gpu, settings: CostSettings) -> CostModel:
    cost = _load(spec, model, gpu, settings)
    if not settings.varied:
        return cost
    if cost.kind == "constant":
        raise ValueError(f"cost={spec} has no kernels to exchange: leave attention_kernel and kernel_fusion out")
    from llmsim.cost.variant import VariantCost

    return VariantCost(cost, model, gpu, settings)


def _load(spec: str, model: Model, gpu: Gpu, settings: CostSettings) -> CostModel:
    if spec == "roofline":
        return _roofline(model, gpu, settings)
    if spec.partition(":")[0] == "constant":
        return _constant(spec, settings)
    from llmsim.cost.profile import find_profile, load_profile

    name = find_profile(model, gpu, settings) if spec == "auto" else spec
    if name is None:
        return _roofline(model, gpu, settings)
    return load_profile(name, model, gpu, settings)


def _roofline(model: Model, gpu: Gpu, settings: CostSettings) -> CostModel:
    from llmsim.cost.roofline import RooflineCost, default_host

    host = default_host(model.layers)
    if settings.tensor_parallel > 1:
        host = worker_host(host)
    return RooflineCost(
        model,
        gpu,
        tensor_parallel=settings.tensor_parallel,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        graphs=settings.graphs,
        compute_dtype=settings.compute_dtype(model, gpu),
        host=host.scaled(settings.host_scale),
    )


def _constant(spec: str, settings: CostSettings) -> CostModel:
    from llmsim.cost.constant import ConstantCost

    given = spec.partition(":")[2]
    try:
        seconds = float(given)
    except ValueError:
        raise ValueError(f"cost={spec} needs seconds after the colon, as in constant:0.01") from None
    if settings.host_scale != 1.0:
        raise ValueError(
            f"host_scale={settings.host_scale:g} contradicts cost={spec}, which has no host: leave one of them out"
        )
    return ConstantCost(seconds, settings.graphs)
