"""Charts by Altair: functions of a frame and a few facts, for those who have the extra `plots`.

Files are self-contained: HTML carries its JavaScript and needs no network, SVG and PNG are drawn by vl-convert.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsim.text import named

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

Box = tuple[float, float, float, float]

SUFFIXES = (".html", ".svg", ".png")
PHASE_COLOURS = {"prefill": "#c2410c", "decode": "#1d4ed8"}
# What colours mean, the same in all charts; each is read on white and on near-black
COLOURS = {
    "baseline": "#71829a",
    "candidate": "#f0532d",
    "queue": "#8593a8",
    **PHASE_COLOURS,
    "preempted": "#be185d",
    "slo": "#b7791f",
    "text": "#6e7b90",
    "grid": "#94a3b8",
}
ROOF = "#475569"
WIDTH, HEIGHT = 720, 440  # pixels of the plot
DOT = 7  # radius of what a label keeps clear of
LETTER, LINE = 6.6, 14  # of a label
PANEL = 210  # pixels of a parity plot's side
PALETTE = ("#1d4ed8", "#c2410c", "#047857", "#7c3aed", "#be185d", "#a16207")
# sides of a comparison by their order: read on white (3:1 at least) and on the dark theme's background
SIDE_COLOURS = (
    COLOURS["baseline"], COLOURS["candidate"], "#3b82f6", "#12926b", "#a25ee8", "#b7791f", "#db4a93", "#0e93a8",
    "#6f8f1a", "#a56a4a",
)  # fmt: skip
WITHIN = 0.1  # of the measured time: the dashed lines beside a parity plot's diagonal
SHIFTS = (0, -26, *range(4, 200, 4))  # pixels down from its place below and right of its point, in order of preference


def check_plot(path: Path) -> None:
    """Refuse what `save` could not write, before anything is computed for it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"plot={path}: no picture is written as {path.suffix or 'a file without suffix'}. Use {', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"plot={path}: there is no folder {path.parent}: make it first")
    if any(find_spec(module) is None for module in ("altair", "vl_convert")):
        raise ValueError('plots need two more packages: pip install "altair>=6,<7" "vl-convert-python>=1.7"')


def save(chart: alt.LayerChart | alt.ConcatChart | alt.VConcatChart, path: Path, ppi: int = 160) -> None:
    """Complete or not at all."""
    kind: Any = path.suffix.lower()[1:]
    options: dict[str, dict[str, Any]] = {
        "html": {"inline": True, "embed_options": {"actions": {"export": True, "source": False, "editor": False}}},
        "png": {"ppi": ppi},
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with named(path):
        try:
            chart.save(str(unfinished), format=kind, **options.get(kind, {}))
            if kind == "png":
                unfinished.write_bytes(smaller(unfinished.read_bytes()))
            unfinished.replace(path)
        finally:
            with suppress(OSError):
                unfinished.unlink()


def png(chart: Any, ppi: int = 160) -> bytes:
    """A chart as a picture. Raises ValueError when vl-convert is missing."""
    if find_spec("vl_convert") is None:
        raise ValueError('pictures need one more package: pip install "vl-convert-python>=1.7"')
    import io

    buffer = io.BytesIO()
    chart.save(buffer, format="png", ppi=ppi)
    return smaller(buffer.getvalue())


def smaller(png: bytes) -> bytes:
    """The same picture, its data compressed as far as zlib goes: a third of what vl-convert writes in haste."""
    chunks, at = [], 8
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        chunks.append((kind, png[at + 8 : at + 8 + size]))
        at += size + 12  # length, kind and checksum too
    data = zlib.compress(zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT")), 9)
    first = [kind for kind, _ in chunks].index(b"IDAT")
    kept = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    kept.insert(first, (b"IDAT", data))
    return png[:8] + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in kept
    )


def roofline(
    points: pd.DataFrame, *, peak_flops_per_s: float, peak_bytes_per_s: float, title: str, subtitle: str
) -> alt.LayerChart:
    """`points`: phase, size, intensity_flops_per_byte, flops_per_s, mfu, mbu, binds. Both axes are logarithmic."""
    import altair as alt
    import pandas as pd

    ridge, peak, bandwidth = peak_flops_per_s / peak_bytes_per_s, peak_flops_per_s / 1e12, peak_bytes_per_s / 1e12
    shown = points.assign(intensity=points["intensity_flops_per_byte"], tflops=points["flops_per_s"] / 1e12)
    left, right = min(shown["intensity"].min(), ridge) / 2, max(shown["intensity"].max(), ridge) * 8
    bottom, top = min(shown["tflops"].min(), left * bandwidth) / 2, max(shown["tflops"].max(), peak) * 2.5
    slope = (left * ridge) ** 0.5  # half-way up the memory roof
    x, y = _log_x("intensity", left, right, "Arithmetic intensity (FLOP/byte)"), _log_y("tflops", bottom, top)
    colour = alt.Color(
        "phase:N",
        scale=alt.Scale(domain=list(PHASE_COLOURS), range=list(PHASE_COLOURS.values())),
        legend=alt.Legend(title=None, orient="top-left", symbolSize=110, symbolOpacity=1, labelFontSize=13),
    )
    roof = pd.DataFrame({"intensity": [left, ridge, right], "tflops": [left * bandwidth, peak, peak]})
    corner = pd.DataFrame({"intensity": [ridge, ridge], "tflops": [bottom, peak]})
    fields = ["intensity", "tflops", "text"]
    labels = _labels(shown, WIDTH / log10(right / left), HEIGHT / log10(top / bottom))
    layers = [
        alt.Chart(corner).mark_line(color=ROOF, strokeDash=[4, 4], strokeWidth=1.5).encode(x, y),
        alt.Chart(roof).mark_line(color=ROOF, strokeWidth=2.5).encode(x, y),
        *_texts(
            pd.DataFrame([(slope, slope * bandwidth, f"memory: {bandwidth:.3g} TB/s")], columns=fields),
            {"align": "right", "dx": -12, "dy": -4, "color": ROOF},
            (x, y),
        ),
        *_texts(
            pd.DataFrame([(right, peak, f"compute: {peak:,.4g} TFLOP/s")], columns=fields),
            {"align": "right", "dx": -4, "dy": -12, "color": ROOF},
            (x, y),
        ),
        *_texts(
            pd.DataFrame([(ridge, bottom, f"ridge point: {ridge:.3g} FLOP/byte")], columns=fields),
            {"align": "left", "dx": 7, "dy": -12, "color": ROOF},
            (x, y),
        ),
        *_texts(labels, {"align": "left", "baseline": "top", "dx": 7, "dy": 5}, (x, y), (colour,)),
        alt.Chart(shown)
        .mark_circle(size=90, opacity=1)
        .encode(x, y, colour, tooltip=["phase", "size", "intensity", "tflops", "mfu", "mbu", "binds"]),
    ]
    return framed(layers, title, subtitle)


def framed(layers: Sequence[alt.Chart | alt.LayerChart], title: str, subtitle: str | list[str]) -> alt.LayerChart:
    """Layers as one picture, in the style of all that stand alone."""
    import altair as alt

    chart: alt.LayerChart = (
        alt.layer(*layers)
        .properties(
            width=WIDTH,
            height=HEIGHT,
            title=alt.TitleParams(
                title, subtitle=subtitle, anchor="start", fontSize=16, subtitleFontSize=12, offset=14
            ),
        )
        .configure_axis(labelFontSize=12, titleFontSize=13, titleFontWeight="normal", gridColor="#e2e8f0")
        .configure_view(stroke=None)
    )
    return chart


def run_colours(labels: Sequence[str]) -> list[str]:
    """A colour for each run of a chart: one alone or the first is the baseline, the second the candidate."""
    more = [colour for colour in PALETTE if colour not in PHASE_COLOURS.values()] + ["#0891b2", "#65a30d", "#9f1239"]
    known = [COLOURS["baseline"], COLOURS["candidate"], *more]
    return [known[at % len(known)] for at in range(len(labels))]


def _log_x(field: str, low: float, high: float, title: str) -> alt.X:
    import altair as alt

    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.X(f"{field}:Q", scale=scale, axis=alt.Axis(title=title, values=_decades(low, high), format=",~g"))


def _log_y(field: str, low: float, high: float) -> alt.Y:
    import altair as alt

    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(title="TFLOP/s of one GPU", values=_decades(low, high), format=",~g")
    return alt.Y(f"{field}:Q", scale=scale, axis=axis)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(ceil(log10(low)), floor(log10(high)) + 1)]


def _ticks(low: float, high: float) -> list[float]:
    """Every decade or every second; on a short axis what is between them too, on a very short one even steps."""
    decades = _decades(low, high)
    if len(decades) >= 2:
        return decades[:: ceil(len(decades) / 5)]
    powers = range(floor(log10(low)), ceil(log10(high)))
    fine = ([m * 10.0**power for power in powers for m in steps] for steps in ((1, 2, 5), range(1, 10)))
    coarse, all_of_them = ([tick for tick in ticks if low <= tick <= high] for ticks in fine)
    found = coarse if len(coarse) >= 2 else all_of_them
    return found if len(found) >= 2 else _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    """Two to six multiples of 1, 2 or 5 times a power of ten; of an empty range its end."""
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / 2))
    step = next(m * power for m in (5, 2, 1) if m * power <= (high - low) / 2)
    return [float(f"{step * k:.12g}") for k in range(ceil(low / step), floor(high / step) + 1)]


def _texts(
    frame: pd.DataFrame, style: dict[str, Any], axes: tuple[alt.X, alt.Y], colour: tuple[alt.Color, ...] = ()
) -> list[alt.Chart]:
    """Text on a white edge, to be read over lines."""
    import altair as alt

    edge = {**style, "color": "white", "stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}
    base = alt.Chart(frame)
    return [
        base.mark_text(fontSize=12, **edge).encode(*axes, text="text:N"),
        base.mark_text(fontSize=12, **style).encode(*axes, *colour, text="text:N"),
    ]


def _labels(points: pd.DataFrame, x_pixels: float, y_pixels: float) -> pd.DataFrame:
    """What each point is, or its `text`, where no other label or point is; `x_pixels` and `y_pixels` to a decade."""
    import pandas as pd

    boxes = [  # left, top, right, bottom
        (x - DOT, y - DOT, x + DOT, y + DOT)
        for x, y in zip(x_pixels * np.log10(points["intensity"]), -y_pixels * np.log10(points["tflops"]), strict=True)
    ]
    rows = []
    for i, (phase, size, intensity) in enumerate(
        zip(points["phase"], points["size"], points["intensity"], strict=True)
    ):
        text = f"{size:,} tokens" if phase == "prefill" else f"batch {size:,}"
        text = str(points["text"].iloc[i]) if "text" in points else text
        left, top = boxes[i][2], boxes[i][3] - 2
        for shift in SHIFTS:
            box = (left, top + shift, left + LETTER * len(text), top + shift + LINE)
            if not any(_overlap(box, other) for j, other in enumerate(boxes) if j != i):
                break
        boxes.append(box)
        rows.append((phase, intensity, 10 ** (-(box[1] - DOT + 2) / y_pixels), text))
    return pd.DataFrame(rows, columns=["phase", "intensity", "tflops", "text"])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def parity(
    points: pd.DataFrame,
    panels: Mapping[str, Sequence[str]],
    kinds: Sequence[str],
    *,
    title: str,
    subtitle: Sequence[str],
    columns: int,
) -> alt.ConcatChart:
    """Measured against predicted seconds, a square for each panel, both axes logarithmic and alike.

    `points`: panel, kind (their colour, the same in all panels), measured_s, predicted_s, what (shown on hover).
    `panels`: name -> lines below it. The dashed lines are `WITHIN` of the diagonal.
    """
    import altair as alt

    scale = alt.Scale(domain=list(kinds), range=list(PALETTE[: len(kinds)]))
    legend = alt.Legend(title=None, orient="top", symbolSize=90, symbolOpacity=1, labelFontSize=12)
    colour = alt.Color("kind:N", scale=scale, legend=legend if len(kinds) > 1 else None)
    squares = [
        _square(points[points["panel"] == name], colour).properties(
            title=alt.TitleParams(name, subtitle=list(below), anchor="start", frame="group")
        )
        for name, below in panels.items()
    ]
    chart: alt.ConcatChart = (
        alt.concat(*squares, columns=columns, spacing={"row": 26, "column": 22})
        .properties(
            title=alt.TitleParams(
                title, subtitle=list(subtitle), anchor="start", fontSize=16, subtitleFontSize=12, offset=14
            )
        )
        .configure_title(fontSize=13, subtitleFontSize=11, subtitleColor=ROOF, offset=6)
        .configure_axis(labelFontSize=10, titleFontSize=11, titleFontWeight="normal", gridColor="#e2e8f0")
        .configure_view(stroke="#cbd5e1")
    )
    return chart


def _square(points: pd.DataFrame, colour: alt.Color) -> alt.LayerChart:
    import altair as alt
    import pandas as pd

    seconds = points[["measured_s", "predicted_s"]].to_numpy()
    low, high = float(seconds.min()) / 1.5, float(seconds.max()) * 1.5
    axis: dict[str, Any] = {"values": _ticks(low, high), "labelExpr": "format(datum.value, '~s') + 's'"}
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    x = alt.X("measured_s:Q", scale=scale, axis=alt.Axis(title="measured", **axis))
    y = alt.Y("predicted_s:Q", scale=scale, axis=alt.Axis(title="predicted", minExtent=38, maxExtent=38, **axis))
    lines = [
        alt.Chart(pd.DataFrame({"measured_s": [low, high], "predicted_s": [low * ratio, high * ratio]}))
        .mark_line(color=ROOF, strokeWidth=1, strokeDash=dash, clip=True)
        .encode(x, y)
        for ratio, dash in ((1.0, [1, 0]), (1.0 - WITHIN, [4, 3]), (1.0 + WITHIN, [4, 3]))
    ]
    shown = points.assign(error=points["predicted_s"] / points["measured_s"] - 1.0)
    tips = ["what:N", "kind:N", *(alt.Tooltip(f"{name}:Q", format=".3~s") for name in ("measured_s", "predicted_s"))]
    dots = (
        alt.Chart(shown)
        .mark_circle(size=14, opacity=0.55)
        .encode(x, y, colour, tooltip=[*tips, alt.Tooltip("error:Q", format="+.1%")])
    )
    return alt.LayerChart(layer=[*lines, dots], width=PANEL, height=PANEL)


def speedup(rows: list[dict[str, Any]], *, title: str) -> alt.LayerChart:
    """`rows`: batch, speedup, best_speedup; the line at 1 is where drafts stop paying."""
    import altair as alt
    import pandas as pd

    shown = [(row["batch"], row["speedup"], "all drafts") for row in rows]
    shown += [(row["batch"], row["best_speedup"], "best number of drafts") for row in rows]
    frame = pd.DataFrame(shown, columns=["batch", "times", "with"])
    x = alt.X("batch:Q", scale=alt.Scale(type="log", base=2), title="Requests in the batch")
    y = alt.Y("times:Q", title="Tokens per second over those without drafts")
    lines = alt.Chart(frame).mark_line(point=True).encode(x, y, alt.Color("with:N", legend=alt.Legend(title=None)))
    even = alt.Chart(pd.DataFrame({"times": [1.0]})).mark_rule(color=ROOF, strokeDash=[4, 4]).encode(y="times:Q")
    return alt.LayerChart(layer=[even, lines]).properties(width=WIDTH, height=HEIGHT, title=title)
