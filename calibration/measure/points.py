"""What can be measured: a point is one operator at one shape, and has a key that stays the same from run to run.

class Norm:
    name = "rms_norm"

    def points(self, wanted):            # most important first: a coarse grid over everything, then refinements
        for tokens in (1, 64, 512):
            yield Point.of("rms_norm", "torch", "graph", dtype="bfloat16", tokens=tokens, n=4096)

    def measure(self, point, bench):     # raises Unavailable if this machine cannot do it
        tokens, n = point["tokens"], point["n"]
        inputs = [bench.randn((tokens, n), point["dtype"]) for _ in range(bench.copies(4 * tokens * n))]
        return bench.time(point, [partial(norm, x) for x in inputs], bytes=4 * tokens * n)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llmsim.model import Model

if TYPE_CHECKING:
    from calibration.measure.rows import Row
    from calibration.measure.timing import Bench


class Unavailable(Exception):  # noqa: N818 - a state of the machine, not an error
    """This machine cannot measure an operator's variant: a reason in one line, noted once per operator and variant."""


@dataclass(frozen=True)
class Point:
    op: str
    variant: str
    launch: str
    shape: tuple[tuple[str, Any], ...]  # columns of a Row and their values, by name
    # How the plan treats it. Neither is part of what it is.
    refine: bool = field(default=False, compare=False)  # measured only where its neighbours say it is needed
    weight: float = field(default=1.0, compare=False)  # share of a step's time; 0: no neighbour of others

    @classmethod
    def of(cls, op: str, variant: str, launch: str, **columns: Any) -> Point:
        return cls(op, variant, launch, tuple(sorted(item for item in columns.items() if item[1] is not None)))

    @property
    def key(self) -> str:
        return "/".join((self.op, self.variant, self.launch, *(f"{name}={value}" for name, value in self.shape)))

    @property
    def columns(self) -> dict[str, Any]:
        return dict(self.shape)

    @property
    def series(self) -> str:
        """What points have in common that differ only in tokens and clocks."""
        shape = (f"{name}={value}" for name, value in self.shape if name not in ("tokens", "clocks"))
        return "/".join((self.op, self.variant, self.launch, *shape))

    def __getitem__(self, column: str) -> Any:
        return self.columns[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.columns.get(column, default)


@dataclass(frozen=True)
class Wanted:
    models: tuple[Model, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)  # names of llmsim.model.ELEMENT_BYTES, and "tf32"
    kv_dtypes: tuple[str, ...] = ("bfloat16",)
    tensor_parallel: tuple[int, ...] = (1,)
    device: str = "cuda"  # or "cpu": tiny sizes
    ops: tuple[str, ...] | None = None  # None: all
    gpus: int = 1  # on this machine

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def wants(self, op: str) -> bool:
        return self.ops is None or op in self.ops


class Operator(Protocol):
    """`name` of the operator, or of the family whose points have several `op`s. One that holds processes or files has
    `close()` too."""

    name: str

    def points(self, wanted: Wanted) -> Iterable[Point]: ...

    def measure(self, point: Point, bench: Bench) -> Row | list[Row]: ...
