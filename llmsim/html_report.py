"""Runs as one HTML file that needs nothing else: headline numbers, what they rest on, the charts of the dashboard, the
printed block, the manifest and the command that repeats each run.

The file holds its JavaScript and its data (about 1 MB and up to 20,000 points a chart) and forbids the browser to load
anything (Content-Security-Policy). It follows the reader's light or dark setting and prints on white.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsim import views
from llmsim.metrics import WALL_KEYS
from llmsim.report import report, trust

if TYPE_CHECKING:
    import pandas as pd

    from llmsim.runs import Run
from llmsim.text import named

LATENCIES = ("ttft", "tpot", "e2el")
ECDF_POINTS, SLICES, DOTS = 400, 200, 2000  # enough for the eye; the file stays below 2 MB
WIDE_PX, PANEL_PX = 960, 260
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(runs: Mapping[str, Run], path: Path, title: str | None = None) -> None:
    """Complete or not at all. Raises ValueError for no run, or one whose folder an older version wrote."""
    text = page(runs, title)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with named(path):
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        finally:
            with suppress(OSError):
                unfinished.unlink()


def page(runs: Mapping[str, Run], title: str | None = None) -> str:
    """The whole document."""
    from llmsim.charts_style import javascript

    if not runs:
        raise ValueError("no run to report: give the folder that 'llmsim replay --out' wrote")
    name = title or f"llmsim: {_traces(runs)}"
    curves, notes = _curves(runs)
    charts = dict(_charts(runs, curves))
    about = ["Share of requests with at most a latency, over a logarithmic axis; colours as above", *notes]
    body = [
        f"<h1>{escape(name)}</h1>",
        *_settings(runs),
        *_numbers(runs),
        "<h2>Latency</h2>",
        f"<p class='soft'>{escape('; '.join(about))}.</p>",
        "<div class='row'>" + "".join(_figure(key, charts) for key in LATENCIES) + "</div>",
        *(_figure(key, charts) for key in ("where", "strip", "requests")),
        *_printed(runs),
    ]
    head = [
        "<meta charset='utf-8'>",
        f"<meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(name)}</title>",
        f"<style>{_text('report.css')}</style>",
    ]
    scripts = [f"<script>{javascript()}</script>", f"<script>{_text('report.js')}</script>"]
    lines = ["<!DOCTYPE html>", "<html lang='en'><head>", *head, "</head><body><main>", *body, "</main>", *scripts]
    return "\n".join([*lines, "</body></html>", ""])


def _text(name: str) -> str:
    return (files("llmsim") / "data" / name).read_text(encoding="utf-8")


# ---- charts ---------------------------------------------------------------------------------------------------------


def _curves(runs: Mapping[str, Run]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """What the small panels draw, and their notes, which go below the heading: there is no room in a panel."""
    curves = {metric: views.ecdf(runs, metric, ECDF_POINTS) for metric in LATENCIES}
    notes = [note for frame in curves.values() for note in frame.attrs["notes"]]
    for frame in curves.values():
        frame.attrs["notes"] = []
    return curves, list(dict.fromkeys(notes))


def _charts(runs: Mapping[str, Run], curves: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, dict[str, Any]]]:
    from llmsim import charts_run
    from llmsim.charts_style import sized

    targets = common_targets(runs)
    for metric, frame in curves.items():
        if len(frame):
            yield metric, sized(charts_run.ecdf_chart(frame, targets.get(metric), legend=False), PANEL_PX, 220)
    yield "where", sized(charts_run.where_chart(views.where(runs)), WIDE_PX - 120)
    yield "strip", sized(charts_run.strip_chart(views.strip(runs, SLICES)), WIDE_PX)
    yield "requests", sized(charts_run.linked_chart(views.linked(runs, DOTS)), WIDE_PX)


def common_targets(runs: Mapping[str, Run]) -> dict[str, float]:
    """Goodput targets (ms) of the runs, if they are the same for all."""
    targets = [run.summary.get("slo") or {} for run in runs.values()]
    return dict(targets[0]) if all(one == targets[0] for one in targets) else {}


def _figure(key: str, charts: Mapping[str, dict[str, Any]]) -> str:
    if key not in charts:
        return ""
    said = escape(str(charts[key]["description"]), quote=True)
    document = json.dumps(charts[key], separators=(",", ":")).replace("</", "<\\/")
    return (
        f"<figure role='group' aria-label=\"{said}\"><div id='chart-{key}'></div></figure>"
        f"<script type='application/json' data-figure='chart-{key}'>{document}</script>"
    )


# ---- numbers and words ----------------------------------------------------------------------------------------------


def _traces(runs: Mapping[str, Run]) -> str:
    names = dict.fromkeys(str(run.manifest.get("trace", {}).get("name", "a run")) for run in runs.values())
    return ", ".join(names)


def _settings(runs: Mapping[str, Run]) -> Iterator[str]:
    """A line a run: what it is, when it was made; below it what its numbers rest on."""
    from llmsim.charts import run_colours

    for (label, run), colour in zip(runs.items(), run_colours(list(runs)), strict=True):
        scenario, summary = run.manifest["scenario"], _whole(run)
        fleet = f"{scenario['replicas']} × {scenario['tensor_parallel']} {scenario['gpu']}"
        words = f"{scenario['model']} on {fleet}, {scenario['engine']}, {summary['num_prompts']:,} requests"
        made = f"llmsim {run.manifest['versions']['llmsim']}, {run.manifest['date']}"
        yield (
            f"<p><span class='key' style='background:{colour}'></span><strong>{escape(label)}</strong>: {escape(words)}"
            f" <span class='soft'>({escape(made)})</span></p>"
        )
        yield f"<p class='soft'>{escape('. '.join(line.rstrip('.') for line in trust(summary)))}.</p>"


def _whole(run: Run) -> dict[str, Any]:
    """The summary with the two numbers that are kept apart from it."""
    return run.summary | {name: run.manifest.get(name) for name in WALL_KEYS}


def _numbers(runs: Mapping[str, Run]) -> Iterator[str]:
    (first, baseline), *others = runs.items()
    columns = [views.kpis(baseline, run) for _, run in others] or [views.kpis(baseline)]
    names = [first, *(label for label, _ in others)]
    rows: dict[str, views.Kpi] = {}
    for column in columns:
        for kpi in column:
            rows.setdefault(kpi.key, kpi)
    yield "<h2>Headline numbers</h2><table>"
    if others:
        yield f"<caption>Differences are to {escape(first)}.</caption>"
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    yield f"<thead><tr><th scope='col'>Metric</th>{heads}</tr></thead><tbody>"
    for key, kpi in rows.items():
        cells = [f"<td>{_shown(kpi.baseline, kpi.unit)}</td>"]
        for column in columns if others else ():
            cells.append(_cell(next((one for one in column if one.key == key), None)))
        star = f' <abbr title="{escape(kpi.few)}">*</abbr>' if kpi.few else ""
        yield f"<tr><th scope='row'>{escape(kpi.title)} ({kpi.unit}){star}</th>{''.join(cells)}</tr>"
    yield "</tbody></table>"
    few = dict.fromkeys(kpi.few for kpi in rows.values() if kpi.few)
    if few:
        yield f"<p class='soft'>* {escape('; '.join(few))}</p>"


def _cell(kpi: views.Kpi | None) -> str:
    if kpi is None or kpi.candidate is None:
        return "<td>-</td>"
    if kpi.delta is None:
        return f"<td>{_shown(kpi.candidate, kpi.unit)}</td>"
    judged = "" if kpi.better is None or not kpi.delta else " better" if _is_better(kpi) else " worse"
    word = f" {judged.strip()}" if judged else ""
    return f"<td>{_shown(kpi.candidate, kpi.unit)} <span class='delta{judged}'>{_change(kpi)}{word}</span></td>"


def _is_better(kpi: views.Kpi) -> bool:
    assert kpi.delta is not None
    return (kpi.delta < 0) == (kpi.better == "lower")


def _change(kpi: views.Kpi) -> str:
    if kpi.relative is None:
        return f"{kpi.delta:+,.4g}"
    return f"× {1 + kpi.relative:,.3g}" if kpi.relative > 9 else f"{kpi.relative:+.1%}"


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":  # 99.95 is not 100
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _printed(runs: Mapping[str, Run]) -> Iterator[str]:
    for label, run in runs.items():
        yield f"<h2>{escape(label)}</h2>"
        command = run.manifest.get("command")
        if command:
            yield f"<p>Made by</p><pre><code>{escape(_line(command))}</code></pre>"
        yield "<details open><summary>What <code>llmsim replay</code> prints</summary>"
        yield f"<pre>{escape(report(_whole(run)))}</pre></details>"
        manifest = json.dumps(run.manifest, indent=1)
        yield "<details class='screen'><summary>Manifest: every setting, versions, hashes</summary>"
        yield f"<pre>{escape(manifest)}</pre></details>"


def _line(command: Sequence[str] | str) -> str:
    return command if isinstance(command, str) else shlex.join(command)
