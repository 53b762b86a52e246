"""Measure what a plan says until the budget is spent, losing nothing: `measure` is the command without its options.

Every measured point is in the journal beside the Parquet file before the next begins. Ctrl-C and SIGTERM end after the
current point; running out of memory frees what is held, tries once more, then skips the point; a variant that this
machine lacks is noted once; a point whose kernel fails is noted and not tried again, a variant that keeps failing is
given up, and if a failure broke the GPU's context the run ends there. The same command goes on from the journal.
"""

from __future__ import annotations

import hashlib
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import llmsim
from calibration.measure.plan import Plan
from calibration.measure.points import Operator, Point, Unavailable, Wanted
from calibration.measure.rows import Journal, Row
from calibration.measure.timing import Bench
from llmsim.hardware import find_gpu

# family: where its class is, and the ops of its points
OPERATORS = {
    "linear": ("linear:Linear", ("linear",)),
    "stacks": ("stacks:Stacks", ("linear_stack",)),
    "attention": ("attention:Attention", ("attention_prefill", "attention_decode", "attention_mixed")),
    "elementwise": (
        "elementwise:Elementwise",
        (
            "rms_norm",
            "add_rms_norm",
            "norm_add_norm",
            "rope",
            "silu_mul",
            "residual_add",
            "embedding",
            "sample_greedy",
            "sample_top_k_top_p",
            "kv_write",
            "quant_fp8",
        ),
    ),
    "layers": ("layers:Layers", ("layer", "forward")),
    "launch": ("launch:Launch", ("launch",)),
    "memory": ("memory:Memory", ("memory",)),
    "copies": ("copies:Copies", ("copy_h2d", "copy_d2h", "copy_p2p", "copy_d2d")),
    "communication": ("communication:Communication", ("all_reduce", "all_gather", "reduce_scatter", "send_recv")),
}
JOURNAL = ".journal.jsonl"  # instead of .parquet
MOST_FAILURES = 8  # in a row, of one op and variant
MUCH_USED_BYTES = 2**31  # of GPU memory, before anything is measured


@dataclass(frozen=True)
class Outcome:
    path: Path
    points: int
    new_points: int
    rows: int
    interrupted: bool
    broken: str | None
    unwritten: str | None  # why the Parquet file could not be written
    notes: tuple[str, ...]


def ops_of(names: Sequence[str]) -> tuple[str, ...]:
    """Names of ops and of whole families, as ops."""
    known = {family: ops for family, (_, ops) in OPERATORS.items()}
    known |= {op: (op,) for ops in list(known.values()) for op in ops if op not in known}
    for name in names:
        if name not in known:
            raise ValueError(f"--ops: unknown op {name!r}. Use some of {', '.join(known)}")
    if not names:
        raise ValueError(f"--ops: none given. Use some of {', '.join(known)}")
    return tuple(dict.fromkeys(op for name in names for op in known[name]))


def load_operators(wanted: Wanted) -> dict[str, Operator]:
    operators = {}
    for family, (where, ops) in OPERATORS.items():
        if any(wanted.wants(op) for op in ops):
            module, _, name = where.partition(":")
            operators[family] = getattr(import_module(f"calibration.measure.{module}"), name)()
    return operators


def code_hash() -> str:
    """Of the sources that measure: which of their versions made a file."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def provenance(bench: Bench, argv: Sequence[str]) -> dict[str, Any]:
    torch = bench.torch
    return {
        "gpu": torch.cuda.get_device_name(0) if bench.cuda else "cpu",
        "driver": bench.nvml.driver if bench.cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmsim": f"{llmsim.__version__} {code_hash()}",
        "seed": bench.seed,
        "argv": list(argv),
    }


def known_gpu(name: str) -> str | None:
    """llmsim's name of the GPU that a driver calls `name` ("NVIDIA H100 80GB HBM3" is h100-sxm)."""
    words = [word for word in name.lower().split() if word != "nvidia" and not word.startswith("hbm")]
    try:
        return find_gpu("-".join(words)).name
    except ValueError:
        return None


def device_notes(bench: Bench) -> list[str]:
    """What is wrong with the device before anything is measured."""
    if not bench.cuda:
        return ["measured on a CPU at tiny sizes: these times say nothing about a GPU"]
    notes = []
    name = bench.torch.cuda.get_device_name(0)
    if known_gpu(name) is None:
        notes.append(
            f"llmsim has no facts for the GPU {name!r}: measured all the same; "
            "add its memory, bandwidth and peaks to llmsim/data/gpus.toml before fitting"
        )
    free, total = bench.torch.cuda.mem_get_info()
    used = total - free - bench.torch.cuda.memory_reserved()
    others = (bench.nvml.processes or 1) - 1
    if others or used > MUCH_USED_BYTES:
        who = f"{others} other process{'es' * (others > 1)}" if others else "something else"
        notes.append(
            f"the GPU is shared: {who} with {used / 2**30:.1f} GiB of its memory in use. Times may be too long"
        )
    if bench.nvml.sm_mhz is None:
        notes.append("NVML does not answer here: clocks, temperature, power and throttling are not known")
    for fault in bench.nvml.faults:
        notes.append(f"the GPU runs at lowered clocks because of {fault}, before any load")
    return notes


def output_path(out: Path, gpu: str) -> Path:
    if out.suffix == ".parquet":
        return out
    if out.suffix:
        raise ValueError(f"--out {out}: neither a folder nor a .parquet file")
    return out / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".parquet")


def _journal(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".parquet") + JOURNAL)


def _parquet(journal: Path) -> Path:
    return journal.with_name(journal.name.removesuffix(JOURNAL) + ".parquet")


def open_journal(path: Path, provenance: dict[str, Any]) -> Journal:
    try:
        return Journal(_journal(path), provenance)
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be written ({error.strerror or error}). Give another --out") from None


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came. A second Ctrl-C ends at once."""
    stopped = False

    def stop(number: int, _frame: Any) -> None:
        nonlocal stopped
        if stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """One line on stderr, rewritten on a terminal and repeated every ten seconds elsewhere."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._started = time.monotonic()
        self._shown = -10.0
        self._live = sys.stderr.isatty()

    @property
    def left_s(self) -> float:
        return self._budget_s - (time.monotonic() - self._started)

    def show(self, measured: int, left: int, point: Point) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._live else 10.0):
            return
        self._shown = now
        grid = f", {left} of the grid to go" if left else ", refining"
        text = f"{measured} points{grid}, {max(0.0, self.left_s) / 60:.1f} min left: {point.key}"
        print(
            f"\r\x1b[K{text[:150]}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True
        )

    def say(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self._live else text, file=sys.stderr, flush=True)


class _Run:
    def __init__(self, bench: Bench, journal: Journal, progress: Progress) -> None:
        self.bench = bench
        self.journal = journal
        self.progress = progress
        self.new_points = 0
        self.broken: str | None = None
        self.missing: set[tuple[str, str]] = set()
        self.failures: dict[tuple[str, str], int] = {}

    def note(self, text: str) -> None:
        if self.journal.note(text):
            self.progress.say(f"note: {text}")

    def measure(self, operator: Operator, point: Point) -> list[Row]:
        """Its rows, kept in the journal; none, with a note, if it cannot be measured."""
        torch = self.bench.torch
        measured = None
        for _ in range(2):
            try:
                with torch.inference_mode():
                    measured = operator.measure(point, self.bench)
                break
            except Unavailable as reason:
                self.missing.add((point.op, point.variant))
                self.note(f"{point.op} {point.variant}: not measured, {reason}")
                return []
            except torch.OutOfMemoryError:
                pass  # the error holds what was allocated until it is left
            except Exception as error:
                self._failed(point, error)
                return []
            self.bench.reset()
        if measured is None:
            self.note(f"out of memory at {point.key}: skipped")
            return []
        rows = measured if isinstance(measured, list) else [measured]
        self.journal.append(point.key, rows)
        self.new_points += 1
        self.failures.pop((point.op, point.variant), None)
        return rows

    def _failed(self, point: Point, error: Exception) -> None:
        """A kernel's own refusal is final for its point; any other error is the tool's, and a later run tries again."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        if isinstance(error, RuntimeError):
            self.journal.append(point.key, [])
        self.note(f"{point.key}: skipped, {type(error).__name__}: {reason}")
        kind = (point.op, point.variant)
        self.failures[kind] = self.failures.get(kind, 0) + 1
        if self.failures[kind] == MOST_FAILURES:
            self.missing.add(kind)
            self.note(f"{point.op} {point.variant}: given up after {MOST_FAILURES} failures in a row")
        try:
            self.bench.synchronize()
        except RuntimeError:
            self.broken = point.key


def measure(
    wanted: Wanted,
    out: Path,
    budget_s: float = 1200.0,
    seed: int = 0,
    argv: Sequence[str] = (),
    cap_s: float = 0.15,
) -> Outcome:
    """Measures `wanted` for `budget_s` and writes `out`. Its journal, if there is one, says what needs no measuring."""
    progress = Progress(budget_s)
    for size in wanted.tensor_parallel:
        if not any(size in model.tensor_parallel_sizes() for model in wanted.models):
            raise ValueError(f"--tp {size}: none of these models splits over as many GPUs, 8 at most. Leave it out")
    operators = load_operators(wanted)
    bench = Bench(wanted.device, seed, cap_s)
    about = provenance(bench, argv)
    path = output_path(out, about["gpu"])
    if path.exists() and not _journal(path).exists():
        raise ValueError(f"{path}: is there without its {_journal(path).name}, and would be lost. Give another --out")
    journal = open_journal(path, about)
    run = _Run(bench, journal, progress)
    for text in device_notes(bench):
        run.note(text)
    if journal.points:
        progress.say(f"{journal.path}: going on after {len(journal.points)} points")
    plan = Plan({family: operator.points(wanted) for family, operator in operators.items()}, journal.points)
    by_op = {op: operators[family] for family in operators for op in OPERATORS[family][1]}
    with stop_on_signal() as stopped:
        try:
            while not stopped() and not run.broken and progress.left_s > 0 and (points := plan.next()):
                for point in points:
                    if stopped() or run.broken or progress.left_s <= 0:
                        break
                    if (point.op, point.variant) in run.missing:
                        continue
                    progress.show(len(journal.points), plan.left, point)
                    begun = time.monotonic()
                    rows = run.measure(by_op[point.op], point)
                    plan.measured(point, rows, time.monotonic() - begun)
                    if (point.op, point.variant) in run.missing:
                        plan.drop(point.op, point.variant)
                    for text in bench.notes:
                        run.note(text)
        finally:
            for operator in operators.values():
                if hasattr(operator, "close"):
                    operator.close()
            unwritten = _finish(journal, path)
    return Outcome(
        path=path,
        points=len(journal.points),
        new_points=run.new_points,
        rows=len(journal.rows),
        interrupted=stopped(),
        broken=run.broken,
        unwritten=unwritten,
        notes=tuple(journal.notes),
    )


def finish_only(out: Path) -> list[tuple[Path, int]]:
    """Writes the Parquet of the journals at `out`, on any machine: (path, rows) of each."""
    found = [out] if out.suffix == ".parquet" else [_parquet(path) for path in sorted(out.glob(f"*{JOURNAL}"))]
    written = []
    for path in found:
        if not _journal(path).is_file():
            raise FileNotFoundError(f"{_journal(path)}: no such file. Measure first")
        journal = open_journal(path, {})
        try:
            if not journal.points:
                raise ValueError(f"{journal.path}: no point was measured. Measure first")
            journal.finish(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror or error}). Mend that and repeat") from None
        finally:
            journal.close()
        written.append((path, len(journal.rows)))
    if not written:
        raise FileNotFoundError(f"--out {out}: no journal of measurements there. Measure first")
    return written


def _finish(journal: Journal, path: Path) -> str | None:
    try:
        journal.finish(path)
    except (ImportError, OSError) as error:
        return (
            f"{path}: not written ({error}). All measurements are in {journal.path}: "
            "repeat the command with --budget 0s once that is mended"
        )
    finally:
        journal.close()
    return None
