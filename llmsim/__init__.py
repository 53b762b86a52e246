"""llmsim: replay real request traffic on LLM-serving GPUs and engines you do not have.

    from llmsim import Scenario, load_trace, simulate

    result = simulate(load_trace("chat.csv"), Scenario(model="llama-3.1-8b", gpu="h100-sxm"))
    result.summary()["p99_ttft_ms"]

`compare` replays a trace under several scenarios and pairs the requests, `plan` finds the fleets that keep promises
about latency, `sweep` does every run of a specification; what they return has `.frame()`.
Names are imported when they are first used: `import llmsim` itself loads nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsim.comparing import compare
    from llmsim.hardware import Gpu, Model, find_gpu, find_model
    from llmsim.metrics import Result
    from llmsim.plan import plan
    from llmsim.scenario import Scenario
    from llmsim.schedulers import HOLD, PolicyError, Scheduler
    from llmsim.simulate import simulate
    from llmsim.sweep import sweep
    from llmsim.trace import Trace, load_trace

__version__ = "0.1.0"

_HOMES = {
    "HOLD": "llmsim.schedulers",
    "Gpu": "llmsim.hardware",
    "Model": "llmsim.hardware",
    "PolicyError": "llmsim.plugins",
    "Result": "llmsim.metrics",
    "Scenario": "llmsim.scenario",
    "Scheduler": "llmsim.schedulers",
    "Trace": "llmsim.trace",
    "find_gpu": "llmsim.hardware",
    "find_model": "llmsim.hardware",
    "load_trace": "llmsim.trace",
}

__all__ = [
    "HOLD",
    "Gpu",
    "Model",
    "PolicyError",
    "Result",
    "Scenario",
    "Scheduler",
    "Trace",
    "compare",
    "find_gpu",
    "find_model",
    "load_trace",
    "plan",
    "simulate",
    "sweep",
]


def _function(name: str, home: str) -> property:
    """A function that is called like its module: an import binds the module to its package's attribute, which this
    property takes no notice of."""

    def function(package: ModuleType) -> Any:
        return getattr(import_module(home), name)

    def bind(package: ModuleType, module: ModuleType) -> None:
        """What an import does."""

    return property(function, bind)


class _Package(ModuleType):
    """`llmsim.simulate` is the function, also once the module of that name has been imported; so are the others."""

    simulate = _function("simulate", "llmsim.simulate")
    compare = _function("compare", "llmsim.comparing")
    plan = _function("plan", "llmsim.plan")
    sweep = _function("sweep", "llmsim.sweep")


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmsim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
