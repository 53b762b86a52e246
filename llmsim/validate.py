"""Predicted against measured: replay what a real engine was sent and compare what its client saw.

Open loops are sent when the recording sent them; closed loops keep the recorded order and concurrency. The engine's
settings, its number of KV blocks included, are those of the recording. Then, for requests that finished (itl: only if
all did, for simulated gaps between tokens are pooled over all requests):

    ttft_ms, tpot_ms, itl_ms, e2el_ms     mean, p50, p90, p99, defined as in `llmsim.metrics`
    output_throughput                     output tokens / (last completion - first send), tokens/s
    error                                 (predicted - measured) / measured, so +0.02 is 2 % too slow (or too much)

The host's launch times are drawn; a prediction is the mean of each statistic over `SEEDS` draws, so that the error
shown is the model's and not the draw's (near saturation one draw is 1 to 2 % from the mean).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsim.gaps import GapRuns
from llmsim.hardware import find_model, gpu_names, model_names
from llmsim.memory import engine_blocks
from llmsim.metrics import Result, json_safe, latencies_s
from llmsim.recorded import RecordedScenario
from llmsim.recording import load_recording
from llmsim.scenario import Scenario
from llmsim.simulate import cost_of, simulate

Floats = NDArray[np.float64]
Statistics = dict[str, float]

PERCENTS = (50, 90, 99)
SEEDS = 32  # the mean of TTFT p90 near saturation is then known to 0.4 %
LABELS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2el_ms": "E2EL", "output_throughput": "tok/s"}


def validate(
    recording: str | Path | Sequence[RecordedScenario],
    model: str | None = None,
    gpu: str | None = None,
    cost: str = "auto",
    *,
    notes: list[str] | None = None,
    seeds: int = SEEDS,
    **overrides: Any,
) -> dict[str, Any]:
    """{"scenarios": [{"name", "metrics": {metric: {statistic: {"predicted", "measured", "error"}}}}]}.

    Without `model` or `gpu` the recording's own description has to name a known one. `overrides` are Scenario fields
    that the recording does not know or that are to differ from it. `notes` collects what was left out, a line each.
    """
    recorded_scenarios = load_recording(recording) if isinstance(recording, str | Path) else recording
    scenarios = []
    for recorded in recorded_scenarios:
        first = overrides.get("seed", 0)
        results = replays(recorded, range(first, first + seeds), model, gpu, cost, **overrides)
        scenarios.append({"name": recorded.name, "metrics": compare(results, recorded)})
        if notes is not None:
            notes.extend(note for note in recorded.notes if note not in notes)
    return {"scenarios": scenarios}


def predicted(
    recorded: RecordedScenario, model: str | None = None, gpu: str | None = None, cost: str = "auto", **overrides: Any
) -> Result:
    """The recorded load, replayed."""
    return simulate(recorded.trace, scenario_of(recorded, model, gpu, cost, overrides))


def replays(
    recorded: RecordedScenario,
    seeds: Iterable[int],
    model: str | None = None,
    gpu: str | None = None,
    cost: str = "auto",
    **overrides: Any,
) -> list[Result]:
    """What `predicted` gives for each seed; the cost model, which draws nothing, is made once."""
    scenarios = [scenario_of(recorded, model, gpu, cost, overrides | {"seed": seed}) for seed in seeds]
    made = cost_of(scenarios[0])
    return [simulate(recorded.trace, scenario, cost=made) for scenario in scenarios]


def scenario_of(
    recorded: RecordedScenario,
    model: str | None = None,
    gpu: str | None = None,
    cost: str = "auto",
    overrides: Mapping[str, Any] | None = None,
) -> Scenario:
    """The recorded engine and client, with `overrides`."""
    model = model or named_in(recorded.name, recorded.engine, "model", model_names())
    gpu = gpu or named_in(recorded.name, recorded.engine, "gpu", gpu_names())
    settings = recorded.settings | {"concurrency": recorded.concurrency}
    if blocks := settings.get("num_gpu_blocks_override"):
        settings["num_gpu_blocks_override"] = engine_blocks(find_model(model), blocks)
    settings |= overrides or {}
    return Scenario.from_dict({"model": model, "gpu": gpu, "cost": cost} | settings)


def compare(results: Sequence[Result], recorded: RecordedScenario) -> dict[str, Any]:
    """Replays of the same load, differing in their seed, against what was measured."""
    guesses, truth = [_predicted_metrics(result, recorded) for result in results], measured_metrics(recorded)
    guess = {
        metric: {name: float(np.mean([one[metric][name] for one in guesses])) for name in statistics}
        for metric, statistics in truth.items()
    }
    return {
        metric: {
            statistic: json_safe(
                {
                    "predicted": guess[metric][statistic],
                    "measured": measured,
                    "error": guess[metric][statistic] / measured - 1.0 if measured else float("nan"),
                }
            )
            for statistic, measured in truth[metric].items()
        }
        for metric in truth
    }


def measured_metrics(recorded: RecordedScenario) -> dict[str, Statistics]:
    kept, outputs = recorded.finished, recorded.trace.output_tokens
    several = kept & (outputs > 1)
    tpot_s = (recorded.e2el_s[several] - recorded.ttft_s[several]) / (outputs[several] - 1)
    return {
        "ttft_ms": _statistics(recorded.ttft_s[kept]),
        "tpot_ms": _statistics(tpot_s),
        "itl_ms": _statistics(np.concatenate([np.zeros(0), *recorded.gaps_s])),
        "e2el_ms": _statistics(recorded.e2el_s[kept]),
        "output_throughput": {"mean": float(outputs[kept].sum()) / recorded.duration_s},
    }


def _predicted_metrics(result: Result, recorded: RecordedScenario) -> dict[str, Statistics]:
    rejected = int((~result.finished).sum())
    if rejected:
        raise ValueError(
            f"{recorded.name}: {rejected} of {len(recorded.trace)} requests do not fit the simulated engine "
            f"({result.kv_blocks} KV blocks); set num_gpu_blocks_override and max_model_len as the real one had"
        )
    kept = {name: column[recorded.finished] for name, column in result.requests.items()}
    latency_s, gaps = latencies_s(kept), GapRuns.of(result.gaps)
    comparable = recorded.finished.all() and gaps.total  # simulated gaps do not say whose they are
    statistics = {f"{name}_ms": _statistics(values_s[np.isfinite(values_s)]) for name, values_s in latency_s.items()}
    itl_s = [gaps.mean_s(), *gaps.percentiles_s(PERCENTS)] if comparable else [float("nan")] * (1 + len(PERCENTS))
    statistics["itl_ms"] = _named([1e3 * value_s for value_s in itl_s])
    duration_s = float(kept["finish_s"].max() - result.requests["arrival_s"].min())
    return statistics | {"output_throughput": {"mean": float(kept["output_tokens"].sum()) / duration_s}}


def _statistics(values_s: Floats) -> Statistics:
    if not values_s.size:
        return _named([float("nan")] * (1 + len(PERCENTS)))
    return _named([1e3 * float(values_s.mean()), *(1e3 * np.percentile(values_s, PERCENTS)).tolist()])


def _named(values: list[float]) -> Statistics:
    return dict(zip(("mean", *(f"p{percent}" for percent in PERCENTS)), values, strict=True))


def named_in(recording: str, engine: Mapping[str, Any], key: str, known: list[str]) -> str:
    """The known model or GPU whose name occurs, whole or else part by part, in what the recording says of itself."""
    text = str(engine.get(key, "")).lower().replace("_", "-")
    matches = [name for name in known if _begins_in(text, name.lower())]
    if not matches:
        matches = [name for name in known if all(_begins_in(text, part) for part in name.lower().split("-"))]
    longest = [name for name in matches if not any(name != other and name in other for other in matches)]
    if len(longest) != 1:
        found = f"could be any of {', '.join(longest)}" if longest else "is no known one (see `llmsim list`)"
        raise ValueError(f"{recording}: its {key} {text!r} {found}; give {key} (--{key} NAME)")
    return longest[0]


def _begins_in(text: str, part: str) -> bool:
    """ "4b" is in "qwen3-4b" and not in "qwen3-14b"; "sxm" is in "sxm5"."""
    return re.search(rf"(?<![a-z0-9.]){re.escape(part)}", text) is not None


def report(comparison: dict[str, Any]) -> str:
    """One line a scenario and metric: predicted, measured (ms; tokens/s) and error of each statistic; of several
    scenarios also the median size of each metric's errors."""
    columns = ("mean", *(f"p{percent}" for percent in PERCENTS))
    width = max([len("median |error|"), *(len(scenario["name"]) for scenario in comparison["scenarios"])])
    header = f"{'scenario':<{width}}  {'metric':<10}" + "".join(f"  {c + ' pred / meas  error':>30}" for c in columns)
    return "\n".join([header, *_rows(comparison, columns, width), *_overall(comparison, columns, width)])


def _rows(comparison: dict[str, Any], columns: Sequence[str], width: int) -> Iterator[str]:
    for scenario in comparison["scenarios"]:
        for metric, statistics in scenario["metrics"].items():
            cells = [_cell(statistics[column]) for column in columns if column in statistics]
            yield f"{scenario['name']:<{width}}  {LABELS[metric]:<10}" + "".join(f"  {cell:>30}" for cell in cells)


def _overall(comparison: dict[str, Any], columns: Sequence[str], width: int) -> Iterator[str]:
    scenarios = comparison["scenarios"]
    if len(scenarios) < 2:
        return
    for metric, label in LABELS.items():
        cells = []
        for column in [c for c in columns if c in scenarios[0]["metrics"][metric]]:
            errors = [scenario["metrics"][metric][column]["error"] for scenario in scenarios]
            sizes = [abs(error) for error in errors if error is not None]
            cells.append(f"{np.median(sizes) * 100:.1f} %" if sizes else "-")
        yield f"{'median |error|':<{width}}  {label:<10}" + "".join(f"  {cell:>30}" for cell in cells)


def _cell(values: dict[str, float | None]) -> str:
    guess, truth, error = values["predicted"], values["measured"], values["error"]
    numbers = " / ".join("-" if value is None else f"{value:.2f}" for value in (guess, truth))
    return f"{numbers}  {'-' if error is None else f'{error * 100:+.1f} %':>8}"
